"""Owns assertions about subscriptions: which handlers an event would reach."""

from __future__ import annotations

from collections.abc import Iterable

from eventkit._core.bus import EventBus
from eventkit._core.events import type_name
from eventkit._core.subscriptions import Subscription
from eventkit.testing._fakes import Named
from eventkit.testing._matching import shown


def assert_handles(bus: EventBus, event_type: type, *handlers: Named) -> None:
    """Assert that events of exactly this type reach these handlers. They may reach others, too.

        assert_handles(bus, OrderPlaced, send_receipt, "audit")

    It finds two mistakes that other tests do not find: a module of handlers that is never imported,
    and a router that is never included.

    Args:
        bus: The bus.
        event_type: The class of the event.
        handlers: The callables that were subscribed, or their names. With none given, the event
            must reach at least one handler.

    Raises:
        AssertionError: The event does not reach a handler. The message lists those that it reaches.
        InvalidEventTypeError: `event_type` is not a class.
    """
    __tracebackhide__ = True
    subscriptions = bus.handlers_for(event_type)
    event = type_name(event_type)
    if not subscriptions:
        wanted = ", ".join(map(_called, handlers)) or "any handler"
        raise AssertionError(
            f"{event} should reach {wanted}, but nobody handles it. Is the module with the "
            "handlers imported, and its router included?"
        )
    missing = [each for each in handlers if not _reached(each, subscriptions)]
    if missing:
        lines = [f"  {each.name} ({each.location})" for each in subscriptions]
        head = f"{event} should reach {', '.join(map(_called, missing))}, but reaches only:"
        raise AssertionError("\n".join([head, *lines]))


def assert_no_orphans(bus: EventBus, event_types: Iterable[type]) -> None:
    """Assert that each of these event types reaches at least one handler.

        assert_no_orphans(bus, DomainEvent.__subclasses__())

    Args:
        bus: The bus.
        event_types: The classes of the events.

    Raises:
        AssertionError: Some types have no handler. The message lists these types.
        InvalidEventTypeError: One of the types is not a class.
        ValueError: No types were given, so nothing would be checked.
    """
    __tracebackhide__ = True
    checked = list(event_types)
    if not checked:
        raise ValueError(
            "no event types were given, so nothing was checked. Import the modules of the events "
            "first"
        )
    orphans = [each for each in checked if not bus.handlers_for(each)]
    if orphans:
        lines = [f"  {type_name(each)}" for each in orphans]
        raise AssertionError("\n".join([f"nobody on bus {bus.name!r} handles:", *lines]))


def _reached(handler: Named, subscriptions: Iterable[Subscription]) -> bool:
    return any(handler in (each.handler, each.name) for each in subscriptions)


def _called(handler: Named) -> str:
    if isinstance(handler, str):
        return handler
    return getattr(handler, "__qualname__", None) or shown(handler)
