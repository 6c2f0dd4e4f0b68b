"""Owns what ties a handler to an event type, and the plan for one type of events.

Knows nothing of how handlers are run, and of who else has subscribed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from enum import Enum
from itertools import count
from types import EllipsisType
from typing import Any, Self

from eventkit._core.durable import Durable, as_durable
from eventkit._core.events import type_name
from eventkit._core.handlers import Handler, inspect_handler
from eventkit._core.locations import caller, calling, place_of
from eventkit.exceptions import (
    DuplicateSubscriptionError,
    InvalidEventTypeError,
)

_order = count()

# Modules whose classes nobody has made to say what happened.
_NOT_OURS = {
    "builtins",
    "collections",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "itertools",
    "types",
    "uuid",
}

_MADE_BY_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE of CPython: made while Python runs


class Declaration:
    """A handler for an event type, as declared and checked, not yet tied to a bus."""

    __slots__ = ("_event_type", "declared", "line")

    def __init__(self, event_type: type, declared: Handler, line: tuple[str, int | None]) -> None:
        self._event_type = event_type
        self.declared: Handler = declared
        # File and number; put together only when asked, for the file is shared.
        self.line: tuple[str, int | None] = line

    @property
    def event_type(self) -> type:
        """Instances of it and of its subclasses are delivered."""
        return self._event_type

    @property
    def subscribed_at(self) -> str:
        """Where it was subscribed, or declared on a router, as `file:line`."""
        return place_of(*self.line)

    def refuse_twin(self, twin: Declaration | None, *, named_twice: bool = False) -> None:
        """Raise if the same handler is there for the same event type already.

        Args:
            twin: The declaration of the same handler, if there is one.
            named_twice: Whether one decorator has made both declarations.
        """
        if twin is not None:
            included_twice = twin.declared is self.declared
            raise DuplicateSubscriptionError(
                self.declared.name,
                type_name(self._event_type),
                twin.subscribed_at,
                caller() if included_twice else self.subscribed_at,
                included_twice=included_twice,
                named_twice=named_twice,
            )


class Subscription(Declaration):
    """Ties one handler to one event type. Made by `EventBus.subscribe`; `cancel()` ends it.

    Also a context manager that cancels at the end of the block. May be cancelled from any thread.

    Attributes:
        active: False once cancelled.
        target: What a delivery runs: the declared handler, but for a fake of the testing kit.
        order: Its place among all subscriptions: lower ones start first.
        successor: Who has replaced it, because its file has run again.
    """

    __slots__ = ("_end", "active", "order", "successor", "target")

    def __init__(
        self, declaration: Declaration, target: Handler, end: Callable[[Subscription], object]
    ) -> None:
        super().__init__(declaration.event_type, declaration.declared, declaration.line)
        self.target: Handler = target
        self.active: bool = True
        self.order: int = next(_order)
        self.successor: Subscription | None = None
        self._end = end

    @property
    def latest(self) -> Subscription:
        """Who stands in its place now: itself, or the last one that has replaced it."""
        latest = self
        while latest.successor is not None:
            latest = latest.successor
        return latest

    @property
    def handler(self) -> Callable[..., object]:
        """The callable as it was given."""
        return self.declared.function

    @property
    def name(self) -> str:
        """The handler's stable name: its `module:qualname` as it was then, or what `name=` said."""
        return self.target.name

    @property
    def location(self) -> str:
        """Where the handler is defined, as `file:line`."""
        return self.target.location

    @property
    def thread(self) -> bool:
        """Whether the call starts in a worker thread."""
        return self.target.in_thread

    @property
    def durable(self) -> Durable | None:
        """How its deliveries are kept until they are done; None where they are not."""
        return self.declared.durable

    @property
    def timeout(self) -> float | None | EllipsisType:
        """Seconds a delivery may take, None for no limit, `...` for the bus's default."""
        return self.target.timeout

    def cancel(self) -> None:
        """End the subscription. Its deliveries of events that have not started are discarded."""
        self._end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __repr__(self) -> str:
        state = "" if self.active else " (cancelled)"
        return f"<Subscription {type_name(self.event_type)} -> {self.name} {self.location}{state}>"


class Plan(tuple[Subscription, ...]):  # noqa: SLOT001 - a tuple can have no slots
    """The subscriptions that an event reaches, in start order, and what a drain wants to know.

    Attributes:
        handlers: What each of them runs.
        indexes: Which of them are active.
        alike: Whether all handlers are bare coroutine functions under the usual limit.
        in_threads: Whether the call of one of them starts in a worker thread.
        durable: The indexes of those whose deliveries are kept.
        valid: Whether all this is still so; where it is not, `renewed` is.
    """

    handlers: tuple[Handler, ...]
    indexes: Sequence[int]
    alike: bool
    in_threads: bool
    durable: Sequence[int]
    valid: bool
    _groups: Sequence[Sequence[Subscription]] | None  # None where each is alone in its group

    @classmethod
    def of(cls, groups: Sequence[Sequence[Subscription]]) -> Self:
        """As things stand, given the subscriptions of each handler that the event reaches.

        An event may reach a handler through several of its types. The handler runs once, for the
        first of these subscriptions that is active.
        """
        plan = cls(_first_active(group) for group in groups)
        plan._groups = groups if any(len(group) > 1 for group in groups) else None
        plan.handlers = tuple(each.target for each in plan)
        plan.indexes = range(len(plan))
        if not all(each.active for each in plan):
            plan.indexes = [index for index in plan.indexes if plan[index].active]
        plan.alike = all(handler.direct for handler in plan.handlers)
        plan.in_threads = any(handler.in_thread for handler in plan.handlers)
        plan.durable = [index for index, each in enumerate(plan) if each.durable]
        plan.valid = True
        return plan

    def attempts(self, index: int) -> int:
        """How often a delivery to the handler at this index is tried."""
        durable = self[index].durable
        return 1 if durable is None else durable.attempts

    def renewed(self) -> Self:
        """The same handlers at the same places, as things stand now."""
        return self.of(self._groups or [(each,) for each in self])


def _first_active(group: Sequence[Subscription]) -> Subscription:
    latest = [each.latest for each in group]
    return next((each for each in latest if each.active), group[0])


def declare(
    event_type: type,
    handler: Callable[..., object],
    *,
    name: str | None = None,
    timeout: float | None | EllipsisType = ...,
    thread: bool | None = None,
    durable: bool | Durable = False,
) -> Declaration:
    """Check what a user wants to subscribe.

    Raises:
        InvalidEventTypeError: `event_type` is not a class.
        InvalidHandlerError: The handler cannot be called with an event, or not as asked.
        TypeError: `durable` is neither a bool nor a `Durable`.
    """
    check_event_type(event_type)
    target = inspect_handler(
        handler, name=name, timeout=timeout, thread=thread, durable=as_durable(durable)
    )
    return Declaration(event_type, target, calling())


def check_event_type(event_type: object) -> None:
    """Refuse what no event can be an instance of."""
    alias = hasattr(event_type, "__origin__")
    if isinstance(event_type, type) and not alias and event_type is not Any:
        return
    kind = type(event_type)
    if isinstance(event_type, str):
        remedy = "Give the class itself instead of its name"
    elif inspect.isroutine(event_type):
        remedy = (
            "A decorator takes the event type in parentheses: @bus.on(UserCreated); subscribe "
            "takes it first: subscribe(UserCreated, handler)"
        )
    elif alias or event_type is Any or kind.__module__ in {"builtins", "types", "typing"}:
        remedy = (
            "For one of several, name them all: on(A, B); for a generic class, name the class "
            "without its parameters"
        )
    else:
        remedy = f"For its class: {kind.__name__}"
    raise InvalidEventTypeError(f"an event type is a class, not {event_type!r}. {remedy}")


def refuse_non_event(event: object) -> None:
    """Refuse a class where its instance was meant."""
    if isinstance(event, type):
        raise InvalidEventTypeError(
            f"an event is an instance, not a class: publish {event.__name__}(...), not "
            f"{event.__name__}"
        )


def is_event_type(event_type: type) -> bool:
    """Whether it looks like a class of events, so that an instance without a handler is fine."""
    if issubclass(event_type, BaseException):
        return True
    module, name = event_type.__module__, event_type.__qualname__
    foreign = module in _NOT_OURS and (
        not event_type.__flags__ & _MADE_BY_PYTHON
        # A class that `exec`, `new_class` or `make_dataclass` has made may only claim to be there.
        or getattr(sys.modules.get(module), name, None) is event_type
    )
    return not foreign and not issubclass(event_type, Enum)


def not_an_event(event: object) -> InvalidEventTypeError:
    """What to say of an instance of what is no event type, and has no handler. Not its value."""
    name = type(event).__name__
    no_event = f"an object of the type {name!r} is no event that anybody handles"
    if isinstance(event, Coroutine):
        return InvalidEventTypeError(f"{no_event}: await it, and publish what it returns")
    if isinstance(event, Iterable) and not isinstance(event, str | bytes | bytearray | Mapping):
        return InvalidEventTypeError(f"{no_event}: publish the events in it, publish(*events)")
    kind = f"a member of the enum {name!r}" if isinstance(event, Enum) else f"of {name!r}"
    return InvalidEventTypeError(
        f"an event is an instance of a class of yours, not {kind}, which nobody handles: make a "
        "class of what happened, and publish an instance, publish(UserCreated(...))"
    )


def in_order(subscriptions: Iterable[Subscription]) -> list[Subscription]:
    """Sorted by when they were subscribed, which is the order in which they start."""
    return sorted(subscriptions, key=_order_of)


def _order_of(subscription: Subscription) -> int:
    return subscription.order


def order_of_first(group: Sequence[Subscription]) -> int:
    return group[0].order
