"""The contract of an event bus, as tests that every implementation of a part of it has to pass.

Subclass a part and have your test runner collect it; override the hooks of `BusContract` to plug
your implementation in. There is no pytest inside: plain classes with `async def test_...` methods
and bare asserts. With AnyIO's pytest plugin:

    import pytest
    from eventkit import EventBus
    from eventkit.testing.contract import ContextContract, by_drain

    pytestmark = pytest.mark.anyio

    class TestUnitsOfWork(ContextContract):
        def make_bus(self, **options):
            return EventBus(**options)      # on whatever stands under test

With unittest, `class TestUnitsOfWork(ContextContract, unittest.IsolatedAsyncioTestCase)`.

The parts:

- `DispatchContract`: the handlers of one event, concurrently, in order, each in its own context;
- `OrderContract`: which event follows which, and what caused it;
- `CancellationContract`, `FailureContract`, `TimeoutContract`: how they end other than well;
- `ContextContract`, `NestingContract`: units of work, released, discarded, inside each other;
- `CounterContract`: nothing is lost from sight, at any moment, however it ends.

What only one event loop can do, threads outside of a loop, and memory are not part of it.
"""

from eventkit.testing.contract._bus import (
    BusContract,
    BusOptions,
    by_dispatch,
    by_drain,
    cancelled_by_scope,
)
from eventkit.testing.contract._cancellation import CancellationContract
from eventkit.testing.contract._contexts import ContextContract
from eventkit.testing.contract._counters import CounterContract
from eventkit.testing.contract._dispatch import DispatchContract
from eventkit.testing.contract._failures import FailureContract
from eventkit.testing.contract._nesting import NestingContract
from eventkit.testing.contract._order import OrderContract
from eventkit.testing.contract._timeouts import TimeoutContract

__all__ = [
    "BusContract",
    "BusOptions",
    "CancellationContract",
    "ContextContract",
    "CounterContract",
    "DispatchContract",
    "FailureContract",
    "NestingContract",
    "OrderContract",
    "TimeoutContract",
    "by_dispatch",
    "by_drain",
    "cancelled_by_scope",
]
