"""Owns the subscription of one handler to one event type, and the plan for one event type.

Knows nothing of how handlers run, and nothing of the other subscriptions of the bus.
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

# Modules of Python whose classes are values, not events.
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

_MADE_BY_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE of CPython: created at run time by a class statement


class Declaration:
    """A handler that was declared for an event type and checked, without a bus yet."""

    __slots__ = ("_event_type", "declared", "line")

    def __init__(self, event_type: type, declared: Handler, line: tuple[str, int | None]) -> None:
        self._event_type = event_type
        self.declared: Handler = declared
        # File and line number, not yet one text: all declarations of a file share its name.
        self.line: tuple[str, int | None] = line

    @property
    def event_type(self) -> type:
        """The class: instances of it and of its subclasses are delivered."""
        return self._event_type

    @property
    def subscribed_at(self) -> str:
        """Place where it was subscribed, or declared on a router, as `file:line`."""
        return place_of(*self.line)

    def refuse_twin(self, twin: Declaration | None, *, named_twice: bool = False) -> None:
        """Raise if the same handler is already subscribed to the same event type.

        Args:
            twin: The earlier declaration of the same handler, if there is one.
            named_twice: Whether one decorator has made both declarations.

        Raises:
            DuplicateSubscriptionError: There is a twin.
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
    """The subscription of one handler to one event type, until `cancel()`.

        with bus.subscribe(OrderPaid, show):   # cancelled at the end of the block
            ...

    `EventBus.subscribe` returns it. It may be cancelled from any thread.

    Attributes:
        active: Whether the subscription has not been cancelled.
        target: The handler that deliveries run. It is the declared handler, or a fake of the
            testing kit.
        order: Number of the subscription. Handlers with a lower number start first.
        successor: The subscription that has replaced it, because its file was executed again.
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
        """The subscription that is in use now: this one, or the last one that has replaced it."""
        latest = self
        while latest.successor is not None:
            latest = latest.successor
        return latest

    @property
    def handler(self) -> Callable[..., object]:
        """The callable that was subscribed."""
        return self.declared.function

    @property
    def name(self) -> str:
        """Stable name of the handler: `name=`, or `module:qualname` at the time of subscribing."""
        return self.target.name

    @property
    def location(self) -> str:
        """Place where the handler is defined, as `file:line`."""
        return self.target.location

    @property
    def thread(self) -> bool:
        """Whether the handler starts in a worker thread."""
        return self.target.in_thread

    @property
    def durable(self) -> Durable | None:
        """Options of a durable handler; None if its deliveries are not stored."""
        return self.declared.durable

    @property
    def timeout(self) -> float | None | EllipsisType:
        """Time limit of a delivery in seconds; None for no limit, `...` for the bus's default."""
        return self.target.timeout

    def cancel(self) -> None:
        """End the subscription. Deliveries that have not started are discarded.

        Calling it again has no effect. Thread-safe.
        """
        self._end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __repr__(self) -> str:
        state = "" if self.active else " (cancelled)"
        return f"<Subscription {type_name(self.event_type)} -> {self.name} {self.location}{state}>"


class Plan(tuple[Subscription, ...]):  # noqa: SLOT001 - a tuple can have no slots
    """The subscriptions that an event reaches, in start order, prepared for a drain.

    Attributes:
        handlers: The handler of each subscription.
        indexes: The indexes of the active subscriptions.
        alike: Whether all handlers are plain coroutine functions with the default time limit.
        in_threads: Whether one of the handlers starts in a worker thread.
        durable: The indexes of the durable handlers.
        valid: Whether the plan is up to date. If not, `renewed` gives one that is.
    """

    handlers: tuple[Handler, ...]
    indexes: Sequence[int]
    alike: bool
    in_threads: bool
    durable: Sequence[int]
    valid: bool
    _groups: Sequence[Sequence[Subscription]] | None  # None if each group has one subscription

    @classmethod
    def of(cls, groups: Sequence[Sequence[Subscription]]) -> Self:
        """Make a plan of groups: each has the subscriptions of one handler that the event reaches.

        An event may reach a handler through several of its types. The handler runs once, for the
        first subscription of its group that is active.
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
        """Highest number of tries of a delivery to the handler at this index."""
        durable = self[index].durable
        return 1 if durable is None else durable.attempts

    def renewed(self) -> Self:
        """Make the plan again from the current subscriptions; each handler keeps its index."""
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
    """Check the arguments of a subscription, and make a declaration of them.

    Raises:
        InvalidEventTypeError: `event_type` is not a class.
        InvalidHandlerError: The handler cannot be called with an event, or its options are wrong.
        TypeError: `durable` is neither a bool nor a `Durable`.
    """
    check_event_type(event_type)
    target = inspect_handler(
        handler, name=name, timeout=timeout, thread=thread, durable=as_durable(durable)
    )
    return Declaration(event_type, target, calling())


def check_event_type(event_type: object) -> None:
    """Refuse an event type that is not a class."""
    alias = hasattr(event_type, "__origin__")
    if isinstance(event_type, type) and not alias and event_type is not Any:
        return
    kind = type(event_type)
    if isinstance(event_type, str):
        remedy = "Give the class itself instead of its name"
    elif inspect.isroutine(event_type):
        remedy = (
            "Give the event type first. As a decorator: @bus.on(UserCreated). As a call: "
            "subscribe(UserCreated, handler)"
        )
    elif alias or event_type is Any or kind.__module__ in {"builtins", "types", "typing"}:
        remedy = (
            "For several event types, give each of them: on(A, B). For a generic class, give the "
            "class without its parameters"
        )
    else:
        remedy = f"Give its class: {kind.__name__}"
    raise InvalidEventTypeError(f"an event type is a class, not {event_type!r}. {remedy}")


def refuse_non_event(event: object) -> None:
    """Refuse a class that was published instead of an instance."""
    if isinstance(event, type):
        raise InvalidEventTypeError(
            f"an event is an instance, not a class: publish {event.__name__}(...), not "
            f"{event.__name__}"
        )


def is_event_type(event_type: type) -> bool:
    """Whether the class may be a class of events: then an event without a handler is no error."""
    if issubclass(event_type, BaseException):
        return True
    module, name = event_type.__module__, event_type.__qualname__
    foreign = module in _NOT_OURS and (
        not event_type.__flags__ & _MADE_BY_PYTHON
        # A class from `exec`, `new_class` or `make_dataclass` may have a wrong `__module__`.
        or getattr(sys.modules.get(module), name, None) is event_type
    )
    return not foreign and not issubclass(event_type, Enum)


def not_an_event(event: object) -> InvalidEventTypeError:
    """The error for an object that is not an event and has no handler. It hides the value."""
    name = type(event).__name__
    no_event = f"an object of the type {name!r} is not an event, and no handler takes it"
    if isinstance(event, Coroutine):
        return InvalidEventTypeError(f"{no_event}: await it, and publish its result")
    if isinstance(event, Iterable) and not isinstance(event, str | bytes | bytearray | Mapping):
        return InvalidEventTypeError(f"{no_event}: publish its elements, with publish(*events)")
    kind = f"a member of the enum {name!r}" if isinstance(event, Enum) else f"of {name!r}"
    return InvalidEventTypeError(
        f"an event is an instance of a class of yours, not {kind}, and no handler takes this "
        "object. Define a class for the event, and publish an instance: publish(UserCreated(...))"
    )


def in_order(subscriptions: Iterable[Subscription]) -> list[Subscription]:
    """Sort by the time of subscribing, which is the order in which handlers start."""
    return sorted(subscriptions, key=_order_of)


def _order_of(subscription: Subscription) -> int:
    return subscription.order


def order_of_first(group: Sequence[Subscription]) -> int:
    return group[0].order
