"""An async-first event bus for Python services, made for FastAPI and Starlette.

Say what happened with `EventBus.publish`; handlers elsewhere do the side effects, after the
response was sent and after the transaction was committed.
"""

from eventkit._bus import EventBus, Wiring
from eventkit._context import DrainReport, EventContext, Failure, current_delivery
from eventkit._events import Delivery, DomainEvent, Publisher
from eventkit._handlers import Resolver, Solver
from eventkit._observers import Observation, Observer
from eventkit._registry import EventRouter, Subscription
from eventkit._stats import Stats
from eventkit.exceptions import (
    BusLookupError,
    DispatchError,
    DrainInProgressError,
    DuplicateNameError,
    DuplicateSubscriptionError,
    EventContextClosedError,
    EventContextFullError,
    EventContextUsageError,
    EventDepthError,
    EventKitError,
    HandlerCancelledError,
    HandlerTimeoutError,
    InvalidEventTypeError,
    InvalidHandlerError,
    NoDeliveryError,
    NoEventContextError,
    NoRequestError,
    RouterClosedError,
    StreamOverflowError,
)

__all__ = [
    "BusLookupError",
    "Delivery",
    "DispatchError",
    "DomainEvent",
    "DrainInProgressError",
    "DrainReport",
    "DuplicateNameError",
    "DuplicateSubscriptionError",
    "EventBus",
    "EventContext",
    "EventContextClosedError",
    "EventContextFullError",
    "EventContextUsageError",
    "EventDepthError",
    "EventKitError",
    "EventRouter",
    "Failure",
    "HandlerCancelledError",
    "HandlerTimeoutError",
    "InvalidEventTypeError",
    "InvalidHandlerError",
    "NoDeliveryError",
    "NoEventContextError",
    "NoRequestError",
    "Observation",
    "Observer",
    "Publisher",
    "Resolver",
    "RouterClosedError",
    "Solver",
    "Stats",
    "StreamOverflowError",
    "Subscription",
    "Wiring",
    "current_delivery",
]
