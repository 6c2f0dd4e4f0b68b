"""Dispatch: how long a handler may take, and what becomes of one that takes longer."""

import functools
import threading
import traceback
from collections.abc import Awaitable

import anyio
import pytest
import trio
from anyio import CancelScope, create_task_group, fail_after, sleep_forever
from anyio.lowlevel import checkpoint
from trio.testing import MockClock

from eventkit import Delivery, EventBus, HandlerTimeoutError
from tests.dispatching import Boom, Deliver, NewBus, Ping, Pong, by_drain, kinds_in, outcomes

pytestmark = pytest.mark.anyio

# On trio time jumps as soon as everybody waits.
with_trio_time = pytest.mark.parametrize(
    "anyio_backend", [("trio", {"clock": MockClock(autojump_threshold=0)})], ids=["trio"]
)

TINY = 0.01


def timed_out(failures: list[Exception]) -> list[float]:
    assert all(isinstance(failure, HandlerTimeoutError) for failure in failures)
    return sorted(getattr(failure, "timeout", 0.0) for failure in failures)


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


async def takes(seconds: float, event: object) -> None:
    await anyio.sleep(seconds)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_handler_past_its_time_is_cancelled_and_its_siblings_are_not(
    bus: EventBus, deliver: Deliver, count: int
) -> None:
    cancelled = anyio.Event()

    async def slow(event: Ping, number: int) -> None:
        try:
            await sleep_forever()
        finally:
            if number == 0:
                cancelled.set()

    for number in range(count):
        bus.subscribe(Ping, functools.partial(slow, number=number), timeout=TINY)

    @bus.on(Ping)
    async def sibling(event: Ping) -> None:
        await cancelled.wait()
        await checkpoint()

    assert timed_out(await deliver(bus, Ping())) == [TINY] * count
    assert outcomes(bus) == (1, count, 0)


async def test_a_timeout_error_shows_where_the_handler_was_waiting(
    bus: EventBus, deliver: Deliver
) -> None:
    async def waits_here() -> None:
        await sleep_forever()

    @bus.on(Ping, name="slow", timeout=TINY)
    async def slow(event: Ping) -> None:
        await waits_here()

    (error,) = await deliver(bus, Ping())

    assert isinstance(error, HandlerTimeoutError)
    assert (error.handler, error.timeout) == ("slow", TINY)
    assert str(error).startswith("slow was cancelled after 0.01 s.")
    assert error.__cause__ is not None
    frames = [frame.name for frame in traceback.extract_tb(error.__cause__.__traceback__)]
    assert "waits_here" in frames


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


async def test_a_timeout_error_of_the_handlers_own_stays_one(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping, timeout=3600)
    async def raises(event: Ping) -> None:
        raise TimeoutError("mine")

    @bus.on(Ping, timeout=3600)
    async def has_limit(event: Ping) -> None:
        with fail_after(0):
            await sleep_forever()

    failures = await deliver(bus, Ping())

    assert [type(failure) for failure in failures] == [TimeoutError, TimeoutError]


async def test_an_awaitable_that_a_plain_function_returns_is_timed(new_bus: NewBus) -> None:
    bus = new_bus(handler_timeout=TINY)

    @bus.on(Ping)
    def plain(event: Ping) -> Awaitable[None]:
        return sleep_forever()

    assert timed_out(await by_drain(bus, Ping())) == [TINY]


async def test_a_plain_function_in_a_thread_has_no_timeout(new_bus: NewBus) -> None:
    bus = new_bus(handler_timeout=TINY)
    other_timed_out = threading.Event()

    def report(delivery: Delivery, error: Exception) -> None:
        other_timed_out.set()

    bus.report_failure = report

    @bus.on(Ping)
    def in_thread(event: Ping) -> None:
        assert other_timed_out.wait(10)

    bus.subscribe(Ping, functools.partial(takes, 3600))

    assert timed_out(await by_drain(bus, Ping())) == [TINY]
    assert outcomes(bus) == (1, 1, 0)


async def test_a_shielded_handler_that_outlives_its_time_and_ends_well_is_handled(
    new_bus: NewBus,
) -> None:
    bus = new_bus(handler_timeout=TINY)
    numbers: list[int] = []
    other_timed_out = anyio.Event()

    def report(delivery: Delivery, error: Exception) -> None:
        other_timed_out.set()

    bus.report_failure = report

    @bus.on(Ping)
    async def shielded(event: Ping) -> None:
        with CancelScope(shield=True):
            await other_timed_out.wait()
        numbers.append(event.number)

    @bus.on(Ping)
    async def slow(event: Ping) -> None:
        if event.number == 1:
            await sleep_forever()

    @bus.on(Pong)
    async def follow(event: Pong) -> None:
        await checkpoint()

    async with bus.context() as unit:
        unit.publish(Ping(1), Ping(2), Pong())
        drained = await unit.drain()

    assert numbers == [1, 2]
    assert (drained.handled, len(drained.failures)) == (4, 1)


async def test_a_handler_that_swallows_its_timeout_and_ends_well_is_handled(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping, timeout=TINY)
    async def swallows(event: Ping) -> None:
        try:
            await sleep_forever()
        except anyio.get_cancelled_exc_class():
            pass

    assert await deliver(bus, Ping()) == []
    assert outcomes(bus) == (1, 0, 0)


async def test_a_handler_that_fails_when_timed_out_has_that_failure(
    bus: EventBus, deliver: Deliver
) -> None:
    async def child() -> None:
        try:
            await sleep_forever()
        finally:
            raise Boom

    @bus.on(Ping, timeout=TINY)
    async def broken_cleanup(event: Ping) -> None:
        await child()

    @bus.on(Ping, timeout=TINY)
    async def broken_child(event: Ping) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(child)
            await sleep_forever()

    alone, group = sorted(await deliver(bus, Ping()), key=lambda error: type(error).__name__)

    assert type(alone) is Boom
    assert kinds_in(group) == [Boom]


async def test_an_infinite_timeout_is_none(bus: EventBus, deliver: Deliver) -> None:
    bus.subscribe(Ping, functools.partial(takes, 0), timeout=float("inf"))

    assert await deliver(bus, Ping()) == []
