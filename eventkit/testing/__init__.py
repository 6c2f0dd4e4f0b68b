"""What tests of event-driven code need, for whichever test runner: no pytest inside.

With pytest, the fixture `capevents` is an `EventCapture` of the bus that the fixture `event_bus`
gives.
"""

from eventkit.testing._capture import DeliveryList, EventCapture, FailureList, UnexpectedFailures
from eventkit.testing._explain import explain
from eventkit.testing._fakes import Fake
from eventkit.testing._recorder import EventList, EventRecorder
from eventkit.testing._wiring import assert_handles, assert_no_orphans

__all__ = [
    "DeliveryList",
    "EventCapture",
    "EventList",
    "EventRecorder",
    "FailureList",
    "Fake",
    "UnexpectedFailures",
    "assert_handles",
    "assert_no_orphans",
    "explain",
]
