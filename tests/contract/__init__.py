"""The contract of an event bus, as tests that every implementation of a part of it passes.

Each dispatcher of ours passes it: the one that ships, and the plain form beside it. Override the
hooks of `BusContract` to plug another one in. There is no pytest inside: plain classes with
`async def test_...` methods and bare asserts, which AnyIO's plugin and unittest both run.

The parts:

- `DispatchContract`: the handlers of one event, concurrently, in order, each in its own context;
- `OrderContract`: which event follows which, and what caused it;
- `CancellationContract`, `FailureContract`, `TimeoutContract`: how they end other than well;
- `ContextContract`, `NestingContract`: units of work, released, discarded, inside each other;
- `CounterContract`: nothing is lost from sight, at any moment, however it ends.

What only one event loop can do, threads outside of a loop, and memory are not part of it.
"""

from tests.contract.bus import (
    BusContract,
    BusOptions,
    by_dispatch,
    by_drain,
    cancelled_by_scope,
)
from tests.contract.cancellation import CancellationContract
from tests.contract.contexts import ContextContract
from tests.contract.counters import CounterContract
from tests.contract.dispatch import DispatchContract
from tests.contract.failures import FailureContract
from tests.contract.nesting import NestingContract
from tests.contract.order import OrderContract
from tests.contract.timeouts import TimeoutContract

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
