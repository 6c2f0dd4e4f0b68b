"""The error tree: one class per situation that a caller would treat differently.

Every error derives from `EventKitError` and keeps the facts it was built from as attributes.
This module knows nothing of the rest of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

__all__ = [
    "BadMessageError",
    "BridgeError",
    "BusLookupError",
    "DispatchError",
    "DrainInProgressError",
    "DuplicateNameError",
    "DuplicateSubscriptionError",
    "EventContextClosedError",
    "EventContextFullError",
    "EventContextUsageError",
    "EventDepthError",
    "EventEncodingError",
    "EventKitError",
    "HandlerCancelledError",
    "HandlerTimeoutError",
    "InvalidEventTypeError",
    "InvalidHandlerError",
    "LeaseLostError",
    "NoDeliveryError",
    "NoEventContextError",
    "NoOutboxError",
    "NoRequestError",
    "OutboxSchemaError",
    "RouterClosedError",
    "StreamOverflowError",
]


class EventKitError(Exception):
    """Base of every error that eventkit raises on purpose."""

    def __reduce__(self) -> tuple[Callable[..., EventKitError], tuple[object, ...]]:
        """Pickle it as it is, without going through `__init__` again."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[EventKitError], args: tuple[object, ...], facts: dict[str, object]
) -> EventKitError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


def not_installed(module: str, package: str, extra: str) -> ModuleNotFoundError:
    """What a module raises whose package is missing; it names the extra that brings the package."""
    return ModuleNotFoundError(
        f"{module} needs {package}, which is not installed: install fastapi-eventkit[{extra}]",
        name=package,
    )


class InvalidEventTypeError(EventKitError, TypeError):
    """Something that is not an event class was subscribed to, or a class itself was published."""


class InvalidHandlerError(EventKitError, TypeError):
    """A handler cannot be subscribed: not callable, a wrong signature, or impossible options."""


_HAS_RUN_TWICE = (
    "A line runs twice in a function that is called twice: where it makes an application, make "
    "the bus in it, too. And it runs twice in a script that is also imported: subscribe and "
    "include in a module that is only imported"
)


class DuplicateSubscriptionError(EventKitError, ValueError):
    """The same handler was subscribed twice to one event type.

    Attributes:
        handler: The handler's name.
        first: Where it was subscribed first, as `file:line`.
        second: Where it was subscribed again.
    """

    def __init__(
        self,
        handler: str,
        event_type: str,
        first: str,
        second: str,
        *,
        included_twice: bool = False,
        named_twice: bool = False,
    ) -> None:
        if included_twice:
            reason = (
                f"its router was included twice. The handler is declared at {first}, and the "
                f"router was included again at {second}. Include a router once, directly or "
                f"through another one. {_HAS_RUN_TWICE}"
            )
        elif named_twice:
            reason = f"the decorator at {first} names the same event type twice. Name it once"
        elif first == second:
            reason = f"the line at {first} has run twice. {_HAS_RUN_TWICE}"
        else:
            reason = f"first at {first}, again at {second}. Remove one of the two"
        super().__init__(
            f"{handler} is already subscribed to {event_type}: {reason}; a handler runs once per "
            "event in any case"
        )
        self.handler = handler
        self.first = first
        self.second = second


class NoOutboxError(EventKitError, RuntimeError):
    """An application starts whose bus has to keep deliveries, and has no outbox for them.

    The bus has durable handlers, or consumers that hand messages of other services to its outbox.
    """

    def __init__(self, bus: str, handlers: Sequence[str], consumers: Sequence[str] = ()) -> None:
        found = (("durable handlers", handlers), ("durable consumers", consumers))
        needs = " and ".join(f"{kind} ({', '.join(names)})" for kind, names in found if names)
        super().__init__(
            f"bus {bus!r} has {needs} and no outbox: "
            "Outbox(bus, engine), where the application is wired"
        )


class OutboxSchemaError(EventKitError, RuntimeError):
    """The tables of an outbox are missing, or are not as this version of eventkit needs them."""


class LeaseLostError(EventKitError, RuntimeError):
    """Another process was given a delivery that `complete_with` was to complete in a commit.

    Raised out of that commit: nothing of its transaction is committed.
    """


class DuplicateNameError(EventKitError, ValueError):
    """Two different handlers were given the same name.

    Attributes:
        name: The name.
        first: The handler that has it, as `file:line`.
        second: The handler that was to have it too.
    """

    def __init__(self, name: str, first: str, second: str) -> None:
        super().__init__(
            f"two handlers are called {name!r}, the one at {first} and the one at {second}. A name "
            "says in logs and counters whose a delivery is: give one of them another name="
        )
        self.name = name
        self.first = first
        self.second = second


class RouterClosedError(EventKitError, RuntimeError):
    """A handler was declared on a router after the router had been included somewhere."""


class NoEventContextError(EventKitError, RuntimeError):
    """There is no unit of work here that an event could belong to.

    Attributes:
        bus: The name of the bus.
    """

    def __init__(self, bus: str, cause: str) -> None:
        super().__init__(f"no event context of bus {bus!r} is active here: {cause}")
        self.bus = bus


class NoDeliveryError(EventKitError, LookupError):
    """`current_delivery()` was called outside a handler."""


class NoRequestError(EventKitError, LookupError):
    """A dependency of a handler asked for something that only a request has.

    Attributes:
        missing: What it asked for.
    """

    def __init__(self, missing: str) -> None:
        if missing == "app":
            reason = (
                "the unit of work was opened neither in a request nor in the lifespan of an "
                "application whose EventContextMiddleware has this bus"
            )
        else:
            reason = (
                "a handler runs after its request, or without one. Put what it needs into the event"
            )
            if missing.startswith("state."):
                reason = f"{reason}, or have the lifespan yield it"
        super().__init__(f"a handler's Request has no {missing}: {reason}")
        self.missing = missing


class BusLookupError(EventKitError, LookupError):
    """An alias of `eventkit.fastapi` stands for the only bus of an application with none or two."""


class EventContextClosedError(EventKitError, RuntimeError):
    """The event context has ended: its events were delivered or discarded before."""


class EventContextFullError(EventKitError, RuntimeError):
    """The unit of work already has as many events waiting as the bus allows.

    Attributes:
        limit: The bus's `max_events`.
    """

    def __init__(self, bus: str, limit: int) -> None:
        super().__init__(
            f"an event context of bus {bus!r} may have {limit} events waiting (max_events). "
            "Publish one event for the whole batch, or raise EventBus(max_events=...). After a "
            "commit, outside of a handler, `await bus.current_context().drain()` delivers what "
            "waits; before the commit it would deliver what may still be rolled back"
        )
        self.limit = limit


class EventContextUsageError(EventKitError, RuntimeError):
    """An event context was opened in a way that cannot work."""


class EventDepthError(EventKitError, RuntimeError):
    """Handlers published events whose handlers published events, deeper than the bus allows.

    Attributes:
        limit: The bus's `max_depth`.
        chain: What led here, oldest first, each as `Event -> handler`.
    """

    def __init__(self, event: str, limit: int, chain: Sequence[str]) -> None:
        steps = "\n  ".join(chain)
        super().__init__(
            f"{event} would be more than {limit} events deep (max_depth), which is usually a "
            f"loop. It was caused by:\n  {steps}\nBreak the loop, or raise "
            "EventBus(max_depth=...)"
        )
        self.limit = limit
        self.chain: tuple[str, ...] = tuple(chain)


class EventEncodingError(EventKitError, ValueError):
    """An event cannot be stored: it would not come back equal and of the same types.

    Attributes:
        event: The name of the event's class.
        field: Where in the event, as `OrderPlaced.lines[...].price`; never the value.
    """

    def __init__(self, event: str, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.event = event
        self.field = field


class BadMessageError(EventKitError, ValueError):
    """A message cannot be read as one of the events that are consumed. The text quotes no body.

    Attributes:
        reason: "foreign": the message is no CloudEvent. "unknown": nobody consumes its type.
            "undecodable": its body is not the JSON of its type.
    """

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


class BridgeError(EventKitError, RuntimeError):
    """Events cannot be sent to a broker, or received from it, as the application is wired.

    Raised by a forward, the error is the failure of one delivery: the broker has not confirmed it.
    """


class DrainInProgressError(EventKitError, RuntimeError):
    """The context is being drained already, or the caller is one of its handlers."""


class HandlerTimeoutError(EventKitError):
    """A handler took longer than it may, and was cancelled.

    Distinct from a `TimeoutError` of the handler's own. Its `__cause__` is the cancellation,
    whose traceback shows where the handler was waiting.

    Attributes:
        handler: The handler's name.
        timeout: What it was allowed, in seconds.
    """

    def __init__(self, handler: str, timeout: float) -> None:
        super().__init__(
            f"{handler} was cancelled after {timeout:g} s. Make it faster, or allow it more "
            "with timeout= when subscribing or EventBus(handler_timeout=...)"
        )
        self.handler = handler
        self.timeout = timeout


class HandlerCancelledError(EventKitError):
    """A handler raised the cancellation exception although nobody had cancelled it.

    Attributes:
        handler: The handler's name.
    """

    def __init__(self, handler: str) -> None:
        super().__init__(
            f"{handler} raised the cancellation exception itself; it most likely awaited a task "
            "or future that had been cancelled. Catch that where it is awaited"
        )
        self.handler = handler


class StreamOverflowError(EventKitError, RuntimeError):
    """A stream with `overflow="raise"` was read too slowly, and has ended.

    Attributes:
        buffer: How many events were kept.
    """

    def __init__(self, event_type: str, buffer: int) -> None:
        super().__init__(
            f"a stream of {event_type} had {buffer} events waiting (buffer) when one more came. "
            "Open it afresh after reading how things stand, read faster, or give it a larger "
            "buffer="
        )
        self.buffer = buffer


class DispatchError(EventKitError, ExceptionGroup[Exception]):
    """Everything that failed in one dispatch or drain, each with a note naming its handler.

    An `ExceptionGroup`: use `except*`, or look at `exceptions`.
    """

    def derive(  # type: ignore[override]
        self,
        excs: Sequence[Exception],  # pyright: ignore[reportIncompatibleMethodOverride]
        /,
    ) -> Self:
        """Keep the class when `split` and `subgroup` make a smaller group."""
        return type(self)(self.message, excs)
