"""An async event bus for Python services, made for FastAPI and Starlette.

Application code publishes events with `EventBus.publish`. Handlers in other modules do the side
effects. They run after the response was sent and after the transaction was committed.

The documentation is at https://fastapi-eventkit.readthedocs.io/.
"""

from eventkit._core.ambient import current_delivery
from eventkit._core.bus import EventBus, Wiring
from eventkit._core.context import EventContext
from eventkit._core.dependencies import Resolver
from eventkit._core.durable import Durable
from eventkit._core.events import Delivery, DomainEvent, Publisher
from eventkit._core.handlers import Solver
from eventkit._core.observers import Observation, Observer
from eventkit._core.routers import EventRouter
from eventkit._core.stats import Stats
from eventkit._core.subscriptions import Subscription
from eventkit._core.turns import DrainReport, Failure
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
    EventEncodingError,
    EventKitError,
    HandlerCancelledError,
    HandlerTimeoutError,
    InvalidEventTypeError,
    InvalidHandlerError,
    LeaseLostError,
    NoDeliveryError,
    NoEventContextError,
    NoOutboxError,
    NoRequestError,
    OutboxSchemaError,
    RouterClosedError,
    StreamOverflowError,
)
from eventkit.wire import named

__all__ = [
    "BusLookupError",
    "Delivery",
    "DispatchError",
    "DomainEvent",
    "DrainInProgressError",
    "DrainReport",
    "DuplicateNameError",
    "DuplicateSubscriptionError",
    "Durable",
    "EventBus",
    "EventContext",
    "EventContextClosedError",
    "EventContextFullError",
    "EventContextUsageError",
    "EventDepthError",
    "EventEncodingError",
    "EventKitError",
    "EventRouter",
    "Failure",
    "HandlerCancelledError",
    "HandlerTimeoutError",
    "InvalidEventTypeError",
    "InvalidHandlerError",
    "LeaseLostError",
    "NoDeliveryError",
    "NoEventContextError",
    "NoOutboxError",
    "NoRequestError",
    "Observation",
    "Observer",
    "OutboxSchemaError",
    "Publisher",
    "Resolver",
    "RouterClosedError",
    "Solver",
    "Stats",
    "StreamOverflowError",
    "Subscription",
    "Wiring",
    "current_delivery",
    "named",
]

__version__ = "0.1.0"

# The repr of a public name, and tracebacks, show the module that users import the name from.
for _name in __all__:
    if globals()[_name].__module__.startswith(("eventkit._core", "eventkit.wire")):
        globals()[_name].__module__ = __name__
