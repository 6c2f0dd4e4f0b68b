"""The errors of eventkit: one class for each situation that a caller would treat differently.

Every error derives from `EventKitError`. An error has attributes for the facts in its message.
This module imports nothing else of the package.
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
    """Base class of all errors that eventkit raises on purpose.

    Most errors are also the built-in exception for that kind of problem. For example,
    `InvalidHandlerError` is also a `TypeError`.
    """

    def __reduce__(self) -> tuple[Callable[..., EventKitError], tuple[object, ...]]:
        """Pickle the message and the attributes; unpickling does not call `__init__`."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[EventKitError], args: tuple[object, ...], facts: dict[str, object]
) -> EventKitError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


def not_installed(module: str, package: str, extra: str) -> ModuleNotFoundError:
    """The error for a missing third-party package; it names the extra that installs the package."""
    return ModuleNotFoundError(
        f"{module} needs {package}, which is not installed: install fastapi-eventkit[{extra}]",
        name=package,
    )


class InvalidEventTypeError(EventKitError, TypeError):
    """A subscription or a publish was given something that cannot be an event type or an event.

    Raised when an event type is not a class, and when the published object is a class, a list of
    events, or another object that is not an event and has no handler.
    """


class InvalidHandlerError(EventKitError, TypeError):
    """A handler cannot be subscribed: the message says why.

    Possible reasons: it is not callable, its signature does not take an event, it has a parameter
    that nothing provides, or its options contradict each other.
    """


_HAS_RUN_TWICE = (
    "There are two usual causes. A function is called twice, for example an application factory: "
    "create the bus inside the function. Or a script is also imported: subscribe and include in a "
    "module that is only imported"
)


class DuplicateSubscriptionError(EventKitError, ValueError):
    """The same handler was subscribed twice to one event type.

    Attributes:
        handler: Name of the handler.
        first: Place of the first subscription, as `file:line`.
        second: Place of the second subscription, as `file:line`.
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
            f"{handler} is already subscribed to {event_type}: {reason}. A second subscription has "
            "no use: a handler runs once for each event"
        )
        self.handler = handler
        self.first = first
        self.second = second


class NoOutboxError(EventKitError, RuntimeError):
    """An application starts, and its bus needs an outbox but has none.

    A bus needs an outbox if it has durable handlers, or consumers that store the messages of other
    services in the outbox. Create an `eventkit.outbox.Outbox` for the bus before the application
    starts.
    """

    def __init__(self, bus: str, handlers: Sequence[str], consumers: Sequence[str] = ()) -> None:
        found = (("durable handlers", handlers), ("durable consumers", consumers))
        needs = " and ".join(f"{kind} ({', '.join(names)})" for kind, names in found if names)
        super().__init__(
            f"bus {bus!r} has {needs} but no outbox. Create one where you set up the application: "
            "Outbox(bus, engine)"
        )


class OutboxSchemaError(EventKitError, RuntimeError):
    """The tables of an outbox are missing, or this version of eventkit needs other tables.

    Raised at start-up. The message names what is missing, and says how to create it.
    """


class LeaseLostError(EventKitError, RuntimeError):
    """The lease of a delivery is lost, so `complete_with` must not commit the handler's work.

    Another process has taken over the delivery. It runs the delivery, or keeps it as dead if this
    was the last attempt. The error is raised from the commit, and nothing of the transaction is
    committed.
    """


class DuplicateNameError(EventKitError, ValueError):
    """Two different handlers were given the same name.

    Attributes:
        name: The name.
        first: Place of the handler that has the name, as `file:line`.
        second: Place of the handler that was refused, as `file:line`.
    """

    def __init__(self, name: str, first: str, second: str) -> None:
        super().__init__(
            f"two handlers have the name {name!r}, the one at {first} and the one at {second}. "
            "Logs and counters identify a handler by its name: give one of the two another name="
        )
        self.name = name
        self.first = first
        self.second = second


class RouterClosedError(EventKitError, RuntimeError):
    """A handler was declared on a router that had been included already.

    Declare all handlers of a router before the bus, or another router, includes it.
    """


class NoEventContextError(EventKitError, RuntimeError):
    """The caller is not inside an event context of the bus, so an event would belong to none.

    The message names the likely cause and the remedy: install the middleware, or open a context
    with `bus.context()`.

    Attributes:
        bus: Name of the bus.
    """

    def __init__(self, bus: str, cause: str) -> None:
        super().__init__(f"no event context of bus {bus!r} is active here: {cause}")
        self.bus = bus


class NoDeliveryError(EventKitError, LookupError):
    """`current_delivery()` was called outside a handler."""


class NoRequestError(EventKitError, LookupError):
    """A dependency of a handler used something that only a request has.

    A handler runs after its request, or without a request. Put the data that the handler needs
    into the event.

    Attributes:
        missing: The part of the request that the dependency used, for example `headers`.
    """

    def __init__(self, missing: str) -> None:
        if missing == "app":
            reason = (
                "the handler's unit of work was not opened in a request or in the lifespan of an "
                "application that has EventContextMiddleware for this bus"
            )
        else:
            reason = (
                "a handler runs after its request, or without a request. Put what the handler "
                "needs into the event"
            )
            if missing.startswith("state."):
                reason = f"{reason}, or have the lifespan yield it"
        super().__init__(f"a handler's Request has no {missing}: {reason}")
        self.missing = missing


class BusLookupError(EventKitError, LookupError):
    """`Bus` or `CurrentContext` was used, and the application does not have exactly one bus.

    Both aliases stand for the only bus of an application. If there is no bus, install
    `EventContextMiddleware`. If there are several, write an alias for each.
    """


class EventContextClosedError(EventKitError, RuntimeError):
    """The event context is not open: it has ended, or was not opened yet.

    When a context ends, its events are delivered or discarded. Afterwards it takes no events.
    """


class EventContextFullError(EventKitError, RuntimeError):
    """The publish would leave more events waiting in one event context than the bus allows.

    Nothing of this publish was accepted.

    Attributes:
        limit: The bus's `max_events`.
    """

    def __init__(self, bus: str, limit: int) -> None:
        super().__init__(
            f"more than {limit} events would wait in one event context of bus {bus!r} "
            "(max_events). Publish one event for the whole batch, or raise "
            "EventBus(max_events=...). After a commit, and outside of handlers, you can also "
            "deliver the events that wait: `await bus.current_context().drain()`. Do not drain "
            "before the commit, because the transaction may still be rolled back"
        )
        self.limit = limit


class EventContextUsageError(EventKitError, RuntimeError):
    """An event context was used in a way that cannot work.

    For example: it was opened twice, or `with bus.context()` was used on an event loop, which the
    block would stop.
    """


class EventDepthError(EventKitError, RuntimeError):
    """Events caused events in a longer chain of deliveries than the bus allows.

    The usual reason is a loop: a handler publishes an event that the same handler gets again.

    Attributes:
        limit: The bus's `max_depth`.
        chain: The deliveries that led to this event, oldest first, each as `Event -> handler`.
    """

    def __init__(self, event: str, limit: int, chain: Sequence[str]) -> None:
        steps = "\n  ".join(chain)
        super().__init__(
            f"{event} comes after a chain of more than {limit} deliveries (max_depth), which is "
            f"usually a loop. The chain is:\n  {steps}\nBreak the loop, or raise "
            "EventBus(max_depth=...)"
        )
        self.limit = limit
        self.chain: tuple[str, ...] = tuple(chain)


class EventEncodingError(EventKitError, ValueError):
    """An event cannot be written as JSON and read back without a loss.

    An event is written as JSON where an outbox stores it, and where it is sent to another service.
    The event that is read back must be equal, and its fields must have the same types.

    Attributes:
        event: Name of the event's class.
        field: Path of the field in the event, such as `OrderPlaced.lines[...].price`. The value of
            the field is never shown.
    """

    def __init__(self, event: str, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.event = event
        self.field = field


class BadMessageError(EventKitError, ValueError):
    """A message from a broker cannot be read as one of the events that the service consumes.

    The error text does not contain the body of the message.

    Attributes:
        reason: One of three texts. "foreign": the message is not a CloudEvent. "unknown": no
            consumer takes this type of event. "undecodable": the body is not the JSON of its type.
    """

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


class BridgeError(EventKitError, RuntimeError):
    """The setup of the application does not allow events to be sent to a broker, or received.

    In a delivery that forwards an event, this error means: the broker has not confirmed the
    message. Then only this delivery has failed.
    """


class DrainInProgressError(EventKitError, RuntimeError):
    """`drain()` was called while another task drains the context, or inside one of its handlers."""


class HandlerTimeoutError(EventKitError):
    """A handler took longer than its time limit, and was cancelled.

    This error is not a `TimeoutError`: a `TimeoutError` comes from the handler's own code. The
    `__cause__` is the cancellation. Its traceback shows the line at which the handler waited.

    Attributes:
        handler: Name of the handler.
        timeout: The time limit, in seconds.
    """

    def __init__(self, handler: str, timeout: float) -> None:
        super().__init__(
            f"{handler} was cancelled after {timeout:g} s. Make it faster, or give it more time "
            "with timeout= when subscribing or EventBus(handler_timeout=...)"
        )
        self.handler = handler
        self.timeout = timeout


class HandlerCancelledError(EventKitError):
    """A handler raised a cancellation exception, but nobody had cancelled the handler.

    Usually the handler has awaited a task or a future that was cancelled.

    Attributes:
        handler: Name of the handler.
    """

    def __init__(self, handler: str) -> None:
        super().__init__(
            f"{handler} raised a cancellation exception, but nobody had cancelled the handler. It "
            "probably awaited a task or future that was cancelled: catch the exception at that "
            "await"
        )
        self.handler = handler


class StreamOverflowError(EventKitError, RuntimeError):
    """A stream with `overflow="raise"` was read too slowly, and has ended.

    The reader gets the events in the buffer first, then this error.

    Attributes:
        buffer: Size of the buffer, in events.
    """

    def __init__(self, event_type: str, buffer: int) -> None:
        super().__init__(
            f"a stream of {event_type} had {buffer} events waiting (buffer) when one more came, so "
            "it has ended. Load the current state, then open a new stream. To prevent this, read "
            "faster, or use a larger buffer="
        )
        self.buffer = buffer


class DispatchError(EventKitError, ExceptionGroup[Exception]):
    """All failures of one dispatch or drain, as an `ExceptionGroup`.

    Each exception in the group has a note that names its handler. Use `except*`, or read
    `exceptions`:

        try:
            await bus.dispatch(OrderPaid(7))
        except DispatchError as failed:
            for error in failed.exceptions:
                print(error, error.__notes__)
    """

    def derive(  # type: ignore[override]
        self,
        excs: Sequence[Exception],  # pyright: ignore[reportIncompatibleMethodOverride]
        /,
    ) -> Self:
        """Keep the class when `split` and `subgroup` make a smaller group."""
        return type(self)(self.message, excs)
