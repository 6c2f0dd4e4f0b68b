"""Each implementation of dispatch keeps the contract, however deliveries and cancellations come."""

from collections.abc import Awaitable, Callable

import pytest

from eventkit import EventBus
from tests.contract import (
    CancellationContract,
    CounterContract,
    DispatchContract,
    FailureContract,
    OrderContract,
    TimeoutContract,
    by_drain,
)
from tests.dispatching import cancelled_natively

pytestmark = pytest.mark.anyio


class TestByDispatch(
    DispatchContract,
    OrderContract,
    CancellationContract,
    FailureContract,
    TimeoutContract,
    CounterContract,
):
    """Events are dispatched."""


class TestByDrain(TestByDispatch):
    """Events are published in units of work that are drained."""

    async def deliver(self, bus: EventBus, event: object) -> list[Exception]:
        return await by_drain(bus, event)


@pytest.mark.usefixtures("on_asyncio")
class TestNativelyCancelledDispatch(CancellationContract):
    """It is the task that is cancelled, not a scope around it."""

    async def cancel(self, work: Callable[[], Awaitable[object]]) -> None:
        await cancelled_natively(work)


class TestNativelyCancelledDrain(TestNativelyCancelledDispatch):
    async def deliver(self, bus: EventBus, event: object) -> list[Exception]:
        return await by_drain(bus, event)
