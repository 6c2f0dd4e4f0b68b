"""Dispatch beside its contract: what one event loop alone can show."""

import asyncio
from collections.abc import Awaitable
from random import Random
from unittest.mock import AsyncMock

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint
from trio._core import _run as trio_runner

from eventkit import EventBus
from tests.dispatching import Deliver, NewBus, Ping, Pong, outcomes

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("sequential", [False, True])
def test_the_order_of_follow_ups_is_the_same_for_every_schedule(
    new_bus: NewBus, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_runner, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    random = Random()
    monkeypatch.setattr(trio_runner, "_r", random)
    steps: list[tuple[int, int]] = []
    followed: list[int] = []
    bus = new_bus(sequential=sequential)
    for number in range(1, 4):

        async def handler(event: Ping, number: int = number) -> None:
            for step in range(2):
                await checkpoint()
                steps.append((number, step))
            if event.number < 100:
                bus.publish(Ping(event.number * 10 + number))

        bus.subscribe(Ping, handler)

    @bus.on(Ping)
    async def note(event: Ping) -> None:
        followed.append(event.number)

    orders: set[tuple[int, ...]] = set()
    interleavings: set[tuple[tuple[int, int], ...]] = set()
    for seed in range(200):
        random.seed(seed)
        trio.run(bus.dispatch, Ping(1))
        orders.add(tuple(followed))
        interleavings.add(tuple(steps))
        followed.clear()
        steps.clear()

    assert len(orders) == 1
    assert (len(interleavings) > 1) is not sequential


@pytest.mark.usefixtures("on_asyncio")
async def test_a_future_as_result_is_awaited(bus: EventBus, deliver: Deliver) -> None:
    future = asyncio.get_running_loop().create_future()
    seen: list[str] = []

    def subscribed(event: Ping) -> Awaitable[None]:
        asyncio.get_running_loop().call_soon(seen.append, "looped")
        asyncio.get_running_loop().call_soon(future.set_result, None)
        return future

    bus.subscribe(Ping, subscribed, thread=False)

    assert await deliver(bus, Ping()) == []
    assert seen == ["looped"]


async def test_a_mock_that_is_awaited_is_a_handler(bus: EventBus, deliver: Deliver) -> None:
    mock = AsyncMock()
    bus.subscribe(Ping, mock)

    assert await deliver(bus, Ping(5)) == []
    mock.assert_awaited_once_with(Ping(5))


@pytest.mark.parametrize("before", [98, 99, 100])
async def test_handlers_wait_for_each_other_wherever_in_a_long_drain_their_event_comes(
    bus: EventBus, before: int
) -> None:
    begun = anyio.Event()

    @bus.on(Pong)
    async def does_not_wait(event: Pong) -> None:
        pass

    @bus.on(Ping)
    async def waits(event: Ping) -> None:
        await begun.wait()

    @bus.on(Ping)
    async def is_waited_for(event: Ping) -> None:
        begun.set()

    with anyio.fail_after(5):
        async with bus.context() as unit:
            unit.publish(*[Pong()] * before, Ping())

    assert outcomes(bus) == (before + 2, 0, 0)
