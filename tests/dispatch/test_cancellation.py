"""Dispatch: scopes and shields inside handlers, and cancellation that comes from outside."""

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable

import anyio
import pytest
import trio
from anyio import CancelScope, create_task_group, fail_after, move_on_after, sleep_forever
from anyio.lowlevel import checkpoint

from eventkit import Delivery, DispatchError, EventBus, HandlerCancelledError, _handlers
from tests.dispatching import (
    Boom,
    Cancel,
    Deliver,
    NewBus,
    Ping,
    Pong,
    all_tasks_blocked,
    by_dispatch,
    by_drain,
    cancel_by_scope,
    kept_reports,
    kinds_in,
    outcomes,
)

pytestmark = pytest.mark.anyio


# Scopes of a handler's own


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_timeouts_inside_handlers_work(bus: EventBus, deliver: Deliver, count: int) -> None:
    steps: list[str] = []

    async def handler(event: Ping, number: int) -> None:
        await checkpoint()
        with move_on_after(0) as scope:
            await sleep_forever()
        assert scope.cancelled_caught
        await checkpoint()
        with pytest.raises(TimeoutError), fail_after(0):
            await sleep_forever()
        await checkpoint()
        steps.append("went on")

    for number in range(count):
        bus.subscribe(Ping, functools.partial(handler, number=number))

    assert await deliver(bus, Ping()) == []
    assert steps == ["went on"] * count


@pytest.mark.parametrize("cancelling_first", [True, False])
async def test_a_scope_across_suspensions_ends_its_own_block_alone(
    bus: EventBus, deliver: Deliver, cancelling_first: bool
) -> None:
    scope = CancelScope()
    waiting, cancelled = anyio.Event(), anyio.Event()
    steps: list[str] = []

    async def has_scope(event: Ping) -> None:
        with scope:
            await checkpoint()
            waiting.set()
            await sleep_forever()
        await checkpoint()
        steps.append("has_scope")

    async def cancelling(event: Ping) -> None:
        await waiting.wait()
        scope.cancel()
        cancelled.set()
        await checkpoint()
        steps.append("cancelling")

    async def sibling(event: Ping) -> None:
        await cancelled.wait()
        await checkpoint()
        steps.append("sibling")

    handlers = [has_scope, cancelling, sibling]
    for handler in reversed(handlers) if cancelling_first else handlers:
        bus.subscribe(Ping, handler)

    assert await deliver(bus, Ping()) == []
    assert sorted(steps) == ["cancelling", "has_scope", "sibling"]


async def test_task_groups_inside_handlers_end_for_themselves(
    bus: EventBus, deliver: Deliver
) -> None:
    ended: list[str] = []

    async def fail() -> None:
        await checkpoint()
        raise Boom

    @bus.on(Ping)
    async def failing(event: Ping) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(fail)
            tasks.start_soon(sleep_forever)

    @bus.on(Ping)
    async def cancelled(event: Ping) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(sleep_forever)
            await checkpoint()
            tasks.cancel_scope.cancel()
        ended.append("cancelled")

    @bus.on(Ping)
    async def working(event: Ping) -> None:
        async with create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(checkpoint)
        await all_tasks_blocked()
        ended.append("working")

    (group,) = await deliver(bus, Ping())

    assert kinds_in(group) == [Boom]
    assert sorted(ended) == ["cancelled", "working"]


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


def stuck(bus: EventBus) -> None:
    @bus.on(Ping)
    async def wait(event: Ping) -> None:
        await sleep_forever()


def stuck_with_a_timeout(bus: EventBus) -> None:
    @bus.on(Ping, timeout=3600)
    async def wait(event: Ping) -> None:
        await sleep_forever()


def stuck_in_a_result(bus: EventBus) -> None:
    @bus.on(Ping, thread=False)
    def wait(event: Ping) -> Awaitable[None]:
        return sleep_forever()


def stuck_in_the_result_of_a_thread(bus: EventBus) -> None:
    @bus.on(Ping)
    def wait(event: Ping) -> Awaitable[None]:
        return sleep_forever()


def stuck_in_a_task_group(bus: EventBus) -> None:
    @bus.on(Ping)
    async def wait(event: Ping) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(sleep_forever)


def stuck_in_a_scope(bus: EventBus) -> None:
    @bus.on(Ping)
    async def wait(event: Ping) -> None:
        with move_on_after(3600):
            await checkpoint()
            with fail_after(3600):
                await sleep_forever()


STUCK = [
    stuck,
    stuck_with_a_timeout,
    stuck_in_a_result,
    stuck_in_the_result_of_a_thread,
    stuck_in_a_task_group,
    stuck_in_a_scope,
]


@pytest.mark.parametrize("subscribe", STUCK)
@pytest.mark.parametrize("count", [1, 3])
async def test_what_a_cancellation_ends_is_undelivered_and_the_bus_works_on(
    bus: EventBus,
    deliver: Deliver,
    cancel: Cancel,
    subscribe: Callable[[EventBus], None],
    count: int,
) -> None:
    for _ in range(count):
        subscribe(bus)
    seen: list[int] = []

    @bus.on(Ping)
    async def note(event: Ping) -> None:
        seen.append(event.number)

    await cancel(deliver, bus, Ping(1))
    assert outcomes(bus) == (1, 0, count)
    assert (bus.stats.pending, bus.stats.running) == (0, 0)

    for subscription in bus.handlers_for(Ping)[:count]:
        subscription.cancel()
    assert await deliver(bus, Ping(2)) == []
    assert seen == [1, 2]


async def test_a_cancellation_is_seen_by_every_handler_where_it_waits(
    bus: EventBus, deliver: Deliver, cancel: Cancel
) -> None:
    seen: list[int] = []

    async def handler(event: Ping, number: int) -> None:
        try:
            await sleep_forever()
        except anyio.get_cancelled_exc_class():
            seen.append(number)
            raise

    for number in range(5):
        bus.subscribe(Ping, functools.partial(handler, number=number))

    await cancel(deliver, bus, Ping())

    assert sorted(seen) == list(range(5))


async def test_cancellation_by_a_scope_comes_again_at_each_further_await(
    bus: EventBus, deliver: Deliver
) -> None:
    times: list[int] = []

    async def handler(event: Ping, number: int) -> None:
        for time in range(3):
            try:
                await sleep_forever()
            except anyio.get_cancelled_exc_class():
                times.append(time)
        await sleep_forever()

    for number in range(2):
        bus.subscribe(Ping, functools.partial(handler, number=number))

    await cancel_by_scope(deliver, bus, Ping())

    assert sorted(times) == [0, 0, 1, 1, 2, 2]
    assert outcomes(bus) == (0, 0, 2)


async def test_a_handler_that_ends_well_although_cancelled_is_handled(
    bus: EventBus, deliver: Deliver, cancel: Cancel
) -> None:
    @bus.on(Ping)
    async def stubborn(event: Ping) -> None:
        try:
            await sleep_forever()
        except anyio.get_cancelled_exc_class():
            pass

    @bus.on(Ping)
    async def other(event: Ping) -> None:
        await sleep_forever()

    await cancel(deliver, bus, Ping())

    assert outcomes(bus) == (1, 0, 1)


def kept_failures(bus: EventBus, deliver: Deliver) -> tuple[set[Exception], Deliver]:
    """All failures, whether raised or, where nobody can be told by that, reported."""
    failures: set[Exception] = set()

    async def keeping(bus: EventBus, event: object) -> list[Exception]:
        failures.update(await deliver(bus, event))
        return []

    def report(delivery: Delivery, error: Exception) -> None:
        failures.add(error)

    bus.report_failure = report
    return failures, keeping


async def test_a_handler_that_fails_while_cancelled_is_a_failure_that_is_not_lost(
    bus: EventBus, deliver: Deliver, cancel: Cancel
) -> None:
    failures, keeping = kept_failures(bus, deliver)

    @bus.on(Ping)
    async def broken_cleanup(event: Ping) -> None:
        try:
            await sleep_forever()
        finally:
            raise Boom

    await cancel(keeping, bus, Ping())

    assert [type(error) for error in failures] == [Boom]
    assert outcomes(bus) == (0, 1, 0)


async def test_a_child_that_fails_while_its_handler_is_cancelled_is_not_lost(
    bus: EventBus, deliver: Deliver, cancel: Cancel
) -> None:
    failures, keeping = kept_failures(bus, deliver)

    async def child() -> None:
        try:
            await sleep_forever()
        finally:
            raise Boom

    @bus.on(Ping)
    async def parent(event: Ping) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(child)
            tasks.start_soon(sleep_forever)
            await sleep_forever()

    await cancel(keeping, bus, Ping())

    (group,) = failures
    assert kinds_in(group) == [Boom]
    assert outcomes(bus) == (0, 1, 0)


@pytest.mark.parametrize("shielded_first", [True, False])
async def test_a_shielded_handler_finishes_while_its_sibling_is_cancelled_at_once(
    bus: EventBus, deliver: Deliver, shielded_first: bool
) -> None:
    release, cancelled = anyio.Event(), anyio.Event()
    scope = CancelScope()

    async def shielded(event: Ping) -> None:
        with CancelScope(shield=True):
            await release.wait()

    async def open_to_it(event: Ping) -> None:
        try:
            await sleep_forever()
        finally:
            cancelled.set()

    async def run() -> None:
        with scope:
            await deliver(bus, Ping())

    handlers = [shielded, open_to_it]
    for handler in handlers if shielded_first else reversed(handlers):
        bus.subscribe(Ping, handler)

    async with create_task_group() as tasks:
        tasks.start_soon(run)
        await all_tasks_blocked()
        scope.cancel()
        await cancelled.wait()
        assert bus.stats.running >= 1
        release.set()

    assert outcomes(bus) == (1, 0, 1)


@pytest.mark.usefixtures("on_asyncio")
async def test_a_shielded_handler_finishes_although_the_dispatching_task_is_cancelled_natively(
    bus: EventBus, deliver: Deliver
) -> None:
    release = anyio.Event()

    @bus.on(Ping)
    async def shielded(event: Ping) -> None:
        with CancelScope(shield=True):
            await release.wait()

    @bus.on(Ping)
    async def open_to_it(event: Ping) -> None:
        await sleep_forever()

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


async def test_under_a_cancellation_already_in_effect_no_handler_starts(
    bus: EventBus, deliver: Deliver
) -> None:
    started: list[str] = []

    @bus.on(Ping)
    async def on_loop(event: Ping) -> None:
        started.append("on_loop")

    @bus.on(Ping)
    def in_thread(event: Ping) -> None:
        started.append("in_thread")

    with CancelScope() as scope:
        scope.cancel()
        await deliver(bus, Ping())
        pytest.fail("nothing was delivered, so it must not look as if")

    assert started == []
    assert outcomes(bus) == (0, 0, 2)


async def test_inside_a_shield_an_outer_cancellation_means_nothing_to_a_dispatch(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        await checkpoint()

    with CancelScope() as scope:
        scope.cancel()
        with CancelScope(shield=True):
            assert await deliver(bus, Ping()) == []

    assert outcomes(bus) == (1, 0, 0)


async def test_cancelling_sequential_handlers_leaves_the_later_ones_undelivered(
    new_bus: NewBus, deliver: Deliver, cancel: Cancel
) -> None:
    bus = new_bus(sequential=True)
    started: list[int] = []

    async def handler(event: Ping, number: int) -> None:
        started.append(number)
        if number == 1:
            await sleep_forever()

    for number in range(4):
        bus.subscribe(Ping, functools.partial(handler, number=number))

    await cancel(deliver, bus, Ping())

    assert started == [0, 1]
    assert outcomes(bus) == (1, 0, 3)


async def test_cancelling_leaves_follow_ups_undelivered(bus: EventBus, cancel: Cancel) -> None:
    @bus.on(Ping)
    async def publishes(event: Ping) -> None:
        bus.publish(Pong(1), Pong(2))

    @bus.on(Pong)
    async def wait(event: Pong) -> None:
        await sleep_forever()

    await cancel(by_dispatch, bus, Ping())

    assert outcomes(bus) == (1, 0, 2)


async def test_what_an_interrupted_drain_had_not_started_waits_for_the_next(
    bus: EventBus,
) -> None:
    seen: list[int] = []

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        seen.append(event.number)
        if event.number == 2:
            await sleep_forever()

    async with bus.context() as unit:
        unit.publish(*map(Ping, range(1, 5)))

        async def drain(bus: EventBus, event: object) -> list[Exception]:
            await unit.drain()
            return []

        await cancel_by_scope(drain, bus, None)
        assert outcomes(bus) == (1, 0, 1)
        assert (await unit.drain()).handled == 2

    assert seen == [1, 2, 3, 4]


async def test_a_narrower_timeout_around_one_awaited_dispatch_ends_that_alone(
    bus: EventBus, deliver: Deliver
) -> None:
    steps: list[str] = []
    inner_ended = anyio.Event()

    @bus.on(Ping)
    async def outer(event: Ping) -> None:
        await checkpoint()
        with move_on_after(0.01) as scope:
            await bus.dispatch(Pong())
        assert scope.cancelled_caught
        inner_ended.set()
        await checkpoint()
        steps.append("outer went on")

    @bus.on(Ping)
    async def sibling(event: Ping) -> None:
        await inner_ended.wait()
        steps.append("sibling was spared")

    @bus.on(Pong)
    async def inner(event: Pong) -> None:
        await sleep_forever()

    @bus.on(Pong)
    async def inner_too(event: Pong) -> None:
        await sleep_forever()

    assert await deliver(bus, Ping()) == []
    assert sorted(steps) == ["outer went on", "sibling was spared"]
    assert outcomes(bus) == (2, 0, 2)


async def test_a_timeout_around_a_dispatch_is_the_callers_timeout_error(bus: EventBus) -> None:
    stuck(bus)

    with pytest.raises(TimeoutError), fail_after(0.01):
        await bus.dispatch(Ping())

    assert outcomes(bus) == (0, 0, 1)


@pytest.mark.usefixtures("on_asyncio")
async def test_a_native_timeout_around_a_dispatch_is_the_callers_timeout_error(
    bus: EventBus,
) -> None:
    stuck(bus)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await bus.dispatch(Ping())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bus.dispatch(Ping()), 0.01)

    assert outcomes(bus) == (0, 0, 2)


async def test_a_thread_that_runs_is_waited_for_and_one_that_does_not_never_starts(
    bus: EventBus, deliver: Deliver, cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_handlers, "_threads", functools.cache(lambda: anyio.CapacityLimiter(1)))
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


async def test_a_dispatch_cancelled_from_outside_raises_no_dispatch_error(
    bus: EventBus,
) -> None:
    reported = kept_reports(bus)
    stuck(bus)

    @bus.on(Ping)
    async def fails(event: Ping) -> None:
        raise Boom

    try:
        await cancel_by_scope(by_dispatch, bus, Ping())
    except DispatchError:
        pytest.fail("what was cancelled has no result")

    assert [type(error) for error in reported] == [Boom]
    await cancel_by_scope(by_drain, bus, Ping())
    assert outcomes(bus) == (0, 2, 2)
