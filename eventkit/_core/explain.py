"""Owns the text that explains which handlers an event reaches, and why.

It helps users who ask why a handler is called, or is not called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eventkit._core.durable import Durable
from eventkit._core.events import type_name
from eventkit._core.state import BusState
from eventkit._core.subscriptions import Subscription


def explain(
    event_type: type,
    reached: Sequence[Subscription],
    subscribed: Sequence[Subscription],
    state: BusState,
) -> str:
    """The text of `EventBus.explain`, from the subscriptions that it reaches and all others."""
    if not reached:
        found = "no handler"
    elif len(reached) == 1:
        found = "1 handler"
    else:
        found = f"{len(reached)} handlers"
    lines = [f"{type_name(event_type)} reaches {found} of bus {state.name!r}."]
    if len(reached) > 1:
        how = "one after the other, in" if state.sequential else "concurrently, and start in"
        lines[0] = f"{lines[0]} They run {how} this order:"
    for number, subscription in enumerate(reached, 1):
        through = _through(event_type, subscription)
        lines += [
            f"{number}. {subscription.name}, at {subscription.location}",
            f"   subscribed to {through}, at {subscription.subscribed_at}",
            f"   runs {_where_and_how_long(subscription, state.handler_timeout)}",
        ]
        if subscription.durable is not None:
            lines.append(f"   durable: {_how_durable(subscription.durable, state)}")
    near = [*_near_misses(event_type, subscribed)]
    if not reached and not near:
        lines.append(
            f"None of its {len(subscribed)} subscriptions is for a similar class. Is the module "
            "that declares the handler imported, and its router included: bus.include(router)?"
        )
    return "\n".join([*lines, *near])


def _through(event_type: type, subscription: Subscription) -> str:
    if subscription.event_type is event_type:
        return "this class itself"
    if subscription.event_type is object:
        return "object, so to every event"
    return f"its base class {type_name(subscription.event_type)}"


def _where_and_how_long(subscription: Subscription, handler_timeout: float | None) -> str:
    if subscription.thread:
        return "in a worker thread, which no timeout can stop"
    if subscription.timeout is ...:
        limit = "for any time" if handler_timeout is None else f"for at most {handler_timeout:g} s"
        return f"on the event loop, {limit} in a drain (the bus's handler_timeout)"
    if subscription.timeout is None:
        return "on the event loop, for any time (timeout=None)"
    return f"on the event loop, for at most {subscription.timeout:g} s (timeout=)"


def _how_durable(durable: Durable, state: BusState) -> str:
    if state.keeper is None:
        return "the bus has no outbox, so it runs in memory. Create one: Outbox(bus, engine)"
    key = "" if durable.key is None else ", in order of its key"
    return f"kept until it is done, for at most {durable.attempts} attempts{key}"


def _near_misses(event_type: type, subscribed: Sequence[Subscription]) -> Iterator[str]:
    """Handlers that were perhaps meant: those of subclasses, and of classes with the same name."""
    narrower: list[Subscription] = []
    namesakes: list[Subscription] = []
    for subscription in subscribed:
        candidate = subscription.event_type
        if candidate in event_type.__mro__ or event_type is object:
            continue
        if event_type in candidate.__mro__:
            narrower.append(subscription)
        elif candidate.__name__ == event_type.__name__:
            namesakes.append(subscription)
    for kind, missed in (
        ("a subclass of it", narrower),
        ("another class of the same name", namesakes),
    ):
        if missed:
            yield f"Not called, because subscribed to {kind}:"
            yield from (
                f"- {s.name}, at {s.location}, for {type_name(s.event_type)}" for s in missed
            )
