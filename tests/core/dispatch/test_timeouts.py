"""Dispatch beside its contract: timeouts in virtual time."""

import asyncio
import functools
from typing import cast

import pytest
import trio
from anyio import CancelScope, fail_after, sleep_forever
from anyio.lowlevel import checkpoint
from trio.testing import MockClock

from eventkit import EventBus, HandlerTimeoutError
from eventkit._core.loops.running import current_loop
from tests.contract.timeouts import TINY, takes, timed_out
from tests.dispatching import Deliver, NewBus, Ping, by_drain, outcomes

pytestmark = pytest.mark.anyio

# On trio time jumps as soon as everybody waits.
with_trio_time = pytest.mark.parametrize(
    "anyio_backend", [("trio", {"clock": MockClock(autojump_threshold=0)})], ids=["trio"]
)


@with_trio_time
async def test_in_a_drain_a_handler_may_take_thirty_seconds_if_nothing_else_is_said() -> None:
    bus = EventBus()
    bus.subscribe(Ping, functools.partial(takes, 29))
    bus.subscribe(Ping, functools.partial(takes, 31))
    started = trio.current_time()

    assert timed_out(await by_drain(bus, Ping())) == [30]
    assert trio.current_time() - started == pytest.approx(30)
    assert outcomes(bus) == (1, 1, 0)


@with_trio_time
async def test_what_a_subscription_says_goes_before_what_the_bus_says(new_bus: NewBus) -> None:
    bus = new_bus(handler_timeout=10)
    bus.subscribe(Ping, functools.partial(takes, 11))
    bus.subscribe(Ping, functools.partial(takes, 11), timeout=12)
    bus.subscribe(Ping, functools.partial(takes, 11), timeout=5)
    bus.subscribe(Ping, functools.partial(takes, 3600), timeout=None)

    assert timed_out(await by_drain(bus, Ping())) == [5, 10]
    assert outcomes(bus) == (2, 2, 0)


@with_trio_time
async def test_a_dispatch_has_no_timeout_but_that_of_a_subscription() -> None:
    bus = EventBus()
    bus.subscribe(Ping, functools.partial(takes, 3600))
    started = trio.current_time()
    await bus.dispatch(Ping())
    assert trio.current_time() - started == pytest.approx(3600)

    bus.subscribe(Ping, functools.partial(takes, 10), timeout=5)
    with pytest.RaisesGroup(HandlerTimeoutError):
        await bus.dispatch(Ping())


@with_trio_time
async def test_each_of_sequential_handlers_has_its_whole_time(new_bus: NewBus) -> None:
    bus = new_bus(sequential=True, handler_timeout=10)
    for _ in range(3):
        bus.subscribe(Ping, functools.partial(takes, 9))

    assert await by_drain(bus, Ping()) == []


@with_trio_time
async def test_a_timeout_around_a_dispatch_reaches_handlers_before_their_own(
    bus: EventBus,
) -> None:
    bus.subscribe(Ping, functools.partial(takes, 3600), timeout=60)

    with pytest.raises(TimeoutError), fail_after(5):
        await bus.dispatch(Ping())

    assert outcomes(bus) == (0, 0, 1)


@pytest.mark.usefixtures("on_trio")
async def test_a_timeout_error_has_a_cause_where_several_children_were_cancelled(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping, timeout=TINY)
    async def slow(event: Ping) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
            nursery.start_soon(sleep_forever)

    (error,) = await deliver(bus, Ping())

    assert isinstance(error, HandlerTimeoutError)
    assert error.__cause__ is not None


@with_trio_time
@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
async def test_the_time_of_handlers_is_counted_from_when_all_have_begun(new_bus: NewBus) -> None:
    bus = new_bus(handler_timeout=10)
    ended: list[float] = []
    clock = cast("MockClock", trio.lowlevel.current_clock())

    async def computes_and_waits(seconds: float, event: Ping) -> None:
        clock.jump(seconds)
        try:
            await sleep_forever()
        finally:
            ended.append(trio.current_time() - started)

    for seconds in (0, 4):
        bus.subscribe(Ping, functools.partial(computes_and_waits, seconds))
    started = trio.current_time()

    assert timed_out(await by_drain(bus, Ping())) == [10, 10]
    assert ended == pytest.approx([14, 14])


@with_trio_time
async def test_no_time_is_up_before_all_handlers_have_begun(new_bus: NewBus) -> None:
    bus = new_bus(handler_timeout=30)
    clock = cast("MockClock", trio.lowlevel.current_clock())
    begun = trio.Event()

    async def waits_for_the_last(event: Ping) -> None:
        with CancelScope(shield=True):
            await begun.wait()

    async def computes_for_long_and_waits(event: Ping) -> None:
        clock.jump(31)
        await sleep_forever()

    async def begins_last(event: Ping) -> None:
        begun.set()

    for handler in (waits_for_the_last, computes_for_long_and_waits, begins_last):
        bus.subscribe(Ping, handler)

    assert timed_out(await by_drain(bus, Ping())) == [30]
    assert outcomes(bus) == (2, 1, 0)


async def test_a_handler_past_its_time_ends_although_whoever_began_it_has_nothing_left_to_do(
    new_bus: NewBus,
) -> None:
    bus = new_bus(handler_timeout=TINY)

    @bus.on(Ping)
    async def short(event: Ping) -> None:
        await checkpoint()

    @bus.on(Ping)
    async def stuck(event: Ping) -> None:
        await sleep_forever()

    async with bus.context() as unit:
        unit.publish(Ping(), Ping())
        with fail_after(5):
            report = await unit.drain()

    assert timed_out([failure.error for failure in report.failures]) == [TINY] * 2
    assert report.handled == 2


@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
def test_limits_are_those_of_trio_where_it_runs_inside_of_a_task_of_asyncios(
    new_bus: NewBus,
) -> None:
    bus = new_bus(handler_timeout=30)
    bus.subscribe(Ping, functools.partial(takes, 0.001))
    loops: list[object] = []

    async def drain() -> None:
        async with bus.context():
            bus.publish(Ping())
        loops.append(current_loop())

    async def main() -> None:
        trio.run(drain)
        loops.append(current_loop())

    asyncio.run(main())

    assert bus.stats.handled == 1
    assert loops[0] != loops[1]
