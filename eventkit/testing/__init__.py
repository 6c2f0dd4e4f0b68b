"""Tools for tests of code that publishes and handles events. They work with every test runner.

With pytest, the fixture `capevents` gives an `EventCapture` for the bus of the fixture `event_bus`.
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
