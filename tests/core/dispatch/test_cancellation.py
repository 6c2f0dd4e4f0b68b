"""Dispatch beside its contract: cancellation as only one event loop knows it."""

import asyncio
import functools
import gc
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
import pytest
import trio
from anyio import CancelScope, sleep_forever
from anyio.lowlevel import checkpoint

from eventkit import EventBus, HandlerCancelledError, Observer
from eventkit._core import threads
from tests.contract.timeouts import TINY
from tests.dispatching import (
    Boom,
    Cancel,
    Deliver,
    NewBus,
    Ping,
    Pong,
    all_tasks_blocked,
    kinds_in,
    outcomes,
)

pytestmark = pytest.mark.anyio


# Timeouts of asyncio's own


async def sleep_past(limit: asyncio.Timeout) -> None:
    async with limit:
        await checkpoint()
        await sleep_forever()


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("count", [1, 3])
async def test_native_timeouts_inside_handlers_work(
    bus: EventBus, deliver: Deliver, count: int
) -> None:
    steps: list[str] = []

    async def handler(event: Ping, number: int) -> None:
        with pytest.raises(TimeoutError):
            await sleep_past(asyncio.timeout(0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sleep_forever(), 0.001)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(checkpoint())
        steps.append("went on")

    for number in range(count):
        bus.subscribe(Ping, functools.partial(handler, number=number))

    assert await deliver(bus, Ping()) == []
    assert steps == ["went on"] * count


@pytest.mark.usefixtures("on_asyncio")
async def test_a_native_timeout_across_suspensions_may_be_moved_by_a_sibling(
    bus: EventBus, deliver: Deliver
) -> None:
    limit = asyncio.timeout(None)
    waiting = anyio.Event()
    steps: list[str] = []

    @bus.on(Ping)
    async def has_limit(event: Ping) -> None:
        await checkpoint()
        waiting.set()
        with pytest.raises(TimeoutError):
            await sleep_past(limit)
        steps.append("has_limit")

    @bus.on(Ping)
    async def moves_it(event: Ping) -> None:
        await waiting.wait()
        limit.reschedule(0)
        await checkpoint()
        steps.append("moves_it")

    assert await deliver(bus, Ping()) == []
    assert sorted(steps) == ["has_limit", "moves_it"]


# Cancellation from outside


@pytest.mark.usefixtures("on_asyncio")
async def test_a_shielded_handler_finishes_although_the_dispatching_task_is_cancelled_natively(
    bus: EventBus, deliver: Deliver
) -> None:
    release = anyio.Event()

    @bus.on(Ping)
    async def open_to_it(event: Ping) -> None:
        await sleep_forever()

    @bus.on(Ping)
    async def shielded(event: Ping) -> None:
        with CancelScope(shield=True):
            await release.wait()

    task = asyncio.create_task(deliver(bus, Ping()))
    await all_tasks_blocked()
    for _ in range(2):
        task.cancel()
        await all_tasks_blocked()
    assert outcomes(bus) == (0, 0, 1)
    release.set()
    await asyncio.wait([task])

    assert task.cancelled()
    assert outcomes(bus) == (1, 0, 1)


@pytest.mark.usefixtures("on_asyncio")
async def test_a_native_timeout_around_a_dispatch_is_the_callers_timeout_error(
    bus: EventBus,
) -> None:
    @bus.on(Ping)
    async def wait(event: Ping) -> None:
        await sleep_forever()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await bus.dispatch(Ping())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bus.dispatch(Ping()), 0.01)

    assert outcomes(bus) == (0, 0, 2)


async def test_a_thread_that_runs_is_waited_for_and_one_that_does_not_never_starts(
    bus: EventBus, deliver: Deliver, cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = functools.cache(lambda: anyio.CapacityLimiter(1))
    monkeypatch.setattr(threads, "limiter_of_this_level", limiter)
    release = threading.Event()
    started: list[str] = []

    @bus.on(Ping)
    def holds_the_only_thread(event: Ping) -> None:
        started.append("first")
        assert release.wait(10)

    @bus.on(Ping)
    def waits_for_a_thread(event: Ping) -> None:
        started.append("second")

    @bus.on(Ping)
    async def lets_go(event: Ping) -> None:
        try:
            await sleep_forever()
        finally:
            release.set()

    await cancel(deliver, bus, Ping())

    assert started == ["first"]
    assert outcomes(bus) == (1, 0, 2)


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("implementation", ["a-task-per-handler"], indirect=True)
async def test_the_native_cancellation_of_one_handlers_task_spares_its_siblings(
    bus: EventBus, deliver: Deliver
) -> None:
    cancelled = anyio.Event()

    @bus.on(Ping)
    async def target(event: Ping) -> None:
        tasks.append(asyncio.current_task())
        try:
            await sleep_forever()
        finally:
            cancelled.set()

    @bus.on(Ping)
    async def cancels(event: Ping) -> None:
        await checkpoint()
        assert tasks[0] is not None
        tasks[0].cancel()
        await cancelled.wait()
        await all_tasks_blocked()

    tasks: list[asyncio.Task[object] | None] = []

    assert await deliver(bus, Ping()) == []
    assert outcomes(bus) == (1, 0, 1)


@pytest.mark.parametrize("shield", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
async def test_no_handler_begins_once_it_is_cancelled_although_one_was_not_told_of_it(
    new_bus: NewBus, sequential: bool, shield: bool
) -> None:
    bus = new_bus(sequential=sequential)
    begun: list[object] = []
    ready = anyio.Event()

    @bus.on(Ping)
    async def not_told(event: Ping) -> None:
        with CancelScope(shield=shield):
            await ready.wait()
        begun.append(event)

    async def later(event: Ping | Pong) -> None:
        begun.append(event)

    bus.subscribe(Pong, later)
    if sequential:
        bus.subscribe(Ping, later)

    async def drain() -> None:
        async with bus.context():
            bus.publish(Ping(), Pong())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain)
        await all_tasks_blocked()
        ready.set()
        tasks.cancel_scope.cancel()

    assert begun == [Ping()]


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.filterwarnings("ignore:coroutine '_AwaitedRun._help' was never awaited")
@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
async def test_a_helping_task_that_is_cancelled_before_its_first_step_is_not_waited_for(
    bus: EventBus, deliver: Deliver
) -> None:
    def cancel_helpers() -> None:
        for task in asyncio.all_tasks():
            if task.get_name() == "eventkit handlers":
                task.cancel()
                cancelled.append(task)

    @bus.on(Ping)
    async def waits(event: Ping) -> None:
        asyncio.get_running_loop().call_soon(cancel_helpers)
        await all_tasks_blocked()

    @bus.on(Ping)
    async def begins_later(event: Ping) -> None:
        await checkpoint()

    cancelled: list[asyncio.Task[object]] = []

    assert await deliver(bus, Ping()) == []
    assert len(cancelled) == 1
    assert outcomes(bus) == (1, 0, 1)  # AnyIO cancels the group of a task that was cancelled
    cancelled.clear()
    gc.collect()  # which warns of what was never awaited


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.filterwarnings("ignore:coroutine '_AwaitedRun._help' was never awaited")
@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
async def test_a_drain_goes_on_after_a_helping_task_that_was_cancelled_before_its_first_step(
    bus: EventBus,
) -> None:
    begun = [anyio.Event() for _ in range(3)]

    def cancel_helper() -> None:
        for task in asyncio.all_tasks():
            if task.get_name() == "eventkit handlers":
                task.cancel()

    @bus.on(Ping)
    async def first(event: Ping) -> None:
        if event.number == 0:
            asyncio.get_running_loop().call_soon(cancel_helper)
            await checkpoint()
        else:
            await begun[event.number].wait()

    @bus.on(Ping)
    async def second(event: Ping) -> None:
        begun[event.number].set()

    with anyio.fail_after(5):
        async with bus.context():
            bus.publish(*map(Ping, range(3)))

    assert bus.stats.handled == 6
    gc.collect()  # which warns of what was never awaited


@pytest.mark.usefixtures("on_asyncio")
# With old releases of AnyIO a group waits for ever for several tasks that end in this way.
@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
@pytest.mark.parametrize("count", [1, 3])
async def test_what_a_handler_makes_of_a_cancellation_is_not_told_to_the_scope_that_made_it(
    bus: EventBus, deliver: Deliver, count: int
) -> None:
    async def handler(event: Ping) -> None:
        with CancelScope(shield=True):
            await all_tasks_blocked()
            scope.cancel()
            await cancelled_future()

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(handler))

    with CancelScope() as scope:
        await deliver(bus, Ping())

    assert scope.cancelled_caught
    assert outcomes(bus) == (0, 0, count)
    await checkpoint()


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("count", [1, 3])
async def test_a_native_cancellation_that_looks_like_a_scopes_is_passed_on(
    bus: EventBus, deliver: Deliver, count: int
) -> None:
    """Asyncio makes one of two that come in one turn of the loop, with the message of either."""

    async def handler(event: Ping) -> None:
        await sleep_forever()

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(handler))

    task = asyncio.create_task(deliver(bus, Ping()))
    await all_tasks_blocked()
    task.cancel("by hand, and by a cancel scope")
    await asyncio.wait([task])

    assert task.cancelled()
    assert outcomes(bus) == (0, 0, count)


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("timeout", [None, 3600])
async def test_a_handler_that_ends_at_once_with_the_cancellation_of_the_caller_ends_the_drain(
    bus: EventBus, timeout: float | None
) -> None:
    async def handler(event: Ping) -> None:
        scope.cancel()
        raise asyncio.CancelledError

    bus.subscribe(Ping, handler, timeout=timeout)
    bus.subscribe(Pong, ignore_event)

    with CancelScope() as scope:
        async with bus.context() as unit:
            unit.publish(Ping(), Pong())
            await unit.drain()

    assert scope.cancelled_caught
    assert outcomes(bus) == (0, 0, 2)
    await checkpoint()


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
async def test_a_handler_that_cancels_the_dispatching_task_and_ends_so_is_told_of_once(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping)
    async def cancels(event: Ping) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        raise asyncio.CancelledError

    async def outlives_it() -> None:
        with pytest.raises(asyncio.CancelledError):
            await deliver(bus, Ping())
        await checkpoint()

    await asyncio.create_task(outlives_it())

    assert outcomes(bus) == (0, 0, 1)


async def cancels_its_task(event: Ping) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()  # no `await` follows in which the handler would receive it


async def cancels_a_scope_and_its_task(event: Ping) -> None:
    with CancelScope() as scope:
        scope.cancel()
        await sleep_forever()
    await cancels_its_task(event)


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
@pytest.mark.parametrize("cancels", [cancels_its_task, cancels_a_scope_and_its_task])
@pytest.mark.parametrize("observed", [True, False])
async def test_a_handler_is_not_blamed_for_a_cancellation_that_the_one_before_asked_for(
    new_bus: NewBus,
    deliver: Deliver,
    cancels: Callable[[Ping], Awaitable[None]],
    observed: bool,
) -> None:
    bus = new_bus(sequential=True)
    if observed:
        bus.observe(Observer())
    bus.subscribe(Ping, cancels)

    @bus.on(Ping)
    async def later(event: Ping) -> None:
        await checkpoint()

    dispatch = asyncio.create_task(deliver(bus, Ping()))
    await asyncio.wait([dispatch])

    assert dispatch.cancelled()
    assert outcomes(bus) == (1, 0, 1)


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
@pytest.mark.parametrize("cancels", [cancels_its_task, cancels_a_scope_and_its_task])
async def test_a_helping_task_that_is_cancelled_when_its_handler_ends_spares_the_others(
    bus: EventBus, deliver: Deliver, cancels: Callable[[Ping], Awaitable[None]]
) -> None:
    @bus.on(Ping)
    async def first(event: Ping) -> None:
        await all_tasks_blocked()

    bus.subscribe(Ping, cancels)

    assert await deliver(bus, Ping()) == []
    assert outcomes(bus) == (2, 0, 0)


# Cancellation that nobody asked for


async def cancelled_future() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def cancelled_task() -> None:
    task = asyncio.create_task(sleep_forever())
    await checkpoint()
    task.cancel()
    await task


async def cancelled_by_hand() -> None:
    raise asyncio.CancelledError


async def cancelled_after_a_real_one() -> None:
    with CancelScope() as scope:
        scope.cancel()
        await sleep_forever()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await sleep_forever()
    raise asyncio.CancelledError


async def cancelled_out_of_its_scope() -> None:
    kept: list[BaseException] = []
    with CancelScope() as scope:
        scope.cancel()
        try:
            await sleep_forever()
        except trio.Cancelled as error:
            kept.append(error)
    raise kept.pop()


async def cancelled_in_a_group() -> None:
    try:
        await cancelled_out_of_its_scope()
    except trio.Cancelled as error:
        raise BaseExceptionGroup("all cancelled", [error]) from None


ON_ASYNCIO = [cancelled_future, cancelled_task, cancelled_by_hand, cancelled_after_a_real_one]
ON_TRIO = [cancelled_out_of_its_scope, cancelled_in_a_group]


@pytest.mark.parametrize("make_up", [*ON_ASYNCIO, *ON_TRIO])
@pytest.mark.parametrize("first_step", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("timeout", [None, 3600])
async def test_a_cancellation_that_the_handler_made_up_is_its_failure(
    bus: EventBus,
    deliver: Deliver,
    anyio_backend_name: str,
    make_up: Callable[[], Awaitable[None]],
    first_step: bool,
    count: int,
    timeout: float | None,
) -> None:
    if make_up not in (ON_ASYNCIO if anyio_backend_name == "asyncio" else ON_TRIO):
        pytest.skip("made up on the other loop")
    ended = anyio.Event()

    async def handler(event: Ping, number: int) -> None:
        if not first_step:
            await checkpoint()
        await make_up()

    for number in range(count):
        bus.subscribe(Ping, functools.partial(handler, number=number), timeout=timeout)

    @bus.on(Ping)
    async def sibling(event: Ping) -> None:
        await all_tasks_blocked()
        ended.set()

    failures = await deliver(bus, Ping())

    assert [type(failure) for failure in failures] == [HandlerCancelledError] * count
    assert all(failure.__cause__ is not None for failure in failures)
    assert ended.is_set()
    assert outcomes(bus) == (1, count, 0)
    await checkpoint()


@pytest.mark.usefixtures("on_asyncio")
async def test_a_cancellation_made_up_in_a_thread_is_the_handlers_failure(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping)
    def in_thread(event: Ping) -> None:
        raise asyncio.CancelledError

    assert [type(failure) for failure in await deliver(bus, Ping())] == [HandlerCancelledError]


@pytest.mark.usefixtures("on_trio")
async def test_a_failure_beside_a_made_up_cancellation_is_what_is_left(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping)
    async def mixture(event: Ping) -> None:
        try:
            await cancelled_out_of_its_scope()
        except trio.Cancelled as error:
            raise BaseExceptionGroup("mixed", [error, Boom()]) from None

    (group,) = await deliver(bus, Ping())

    assert kinds_in(group) == [Boom]


async def test_an_interrupt_beside_a_made_up_cancellation_is_what_propagates(
    bus: EventBus, deliver: Deliver, anyio_backend_name: str
) -> None:
    make_up = cancelled_by_hand if anyio_backend_name == "asyncio" else cancelled_out_of_its_scope

    @bus.on(Ping)
    async def mixture(event: Ping) -> None:
        try:
            await make_up()
        except anyio.get_cancelled_exc_class() as error:
            raise BaseExceptionGroup("mixed", [error, KeyboardInterrupt()]) from None

    with pytest.raises(BaseExceptionGroup) as group:
        await deliver(bus, Ping())

    assert kinds_in(group.value) == [KeyboardInterrupt]


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("count", [1, 3])
async def test_a_cancellation_that_a_handler_past_its_time_made_up_ends_nobody_else(
    new_bus: NewBus, count: int
) -> None:
    bus = new_bus(handler_timeout=TINY)

    async def makes_it_up(event: Ping) -> None:
        with suppress(asyncio.CancelledError):
            await sleep_forever()
        raise asyncio.CancelledError

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(makes_it_up))
    bus.subscribe(Pong, ignore_event)

    async with bus.context() as unit:
        unit.publish(Ping(), Pong())
        report = await unit.drain()

    assert (report.handled, len(report.failures)) == (1, count)


async def ignore_event(event: object) -> None:
    pass
