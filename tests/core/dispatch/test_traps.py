"""Dispatch: what goes wrong when handlers are stepped by hand, and does not go wrong here."""

import asyncio
import functools
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextvars import ContextVar
from types import FrameType, SimpleNamespace, coroutine
from typing import Any

import anyio
import pytest
import trio
from anyio import (
    CancelScope,
    create_task_group,
    from_thread,
    get_current_task,
    get_running_tasks,
    to_thread,
)
from anyio.lowlevel import checkpoint
from trio.testing import MockClock

from eventkit import Delivery, EventBus
from eventkit._core.bus import state_of
from eventkit._core.dispatch import EVENTS_BETWEEN_CHECKPOINTS
from eventkit._core.whereabouts import whereabouts
from tests.contract.timeouts import TINY
from tests.dispatching import (
    Boom,
    Deliver,
    NewBus,
    Ping,
    all_tasks_blocked,
    by_drain,
    outcomes,
)

pytestmark = pytest.mark.anyio

stealing = pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)

value: ContextVar[str] = ContextVar("value", default="unset")


# Whose task it is


@stealing
async def test_handlers_that_do_not_wait_share_the_task_that_dispatches(
    bus: EventBus, deliver: Deliver
) -> None:
    tasks: list[int] = []

    async def handler(event: Ping) -> None:
        tasks.append(get_current_task().id)

    for _ in range(3):
        bus.subscribe(Ping, functools.partial(handler))

    await deliver(bus, Ping())

    assert tasks == [get_current_task().id] * 3


@stealing
async def test_what_begins_while_a_handler_waits_begins_in_another_task(
    bus: EventBus, deliver: Deliver
) -> None:
    tasks: list[int] = []

    async def handler(event: Ping, waits: bool) -> None:
        tasks.append(get_current_task().id)
        if waits:
            await all_tasks_blocked()
            assert get_current_task().id in tasks

    for waits in (False, True, False, True, False):
        bus.subscribe(Ping, functools.partial(handler, waits=waits))

    await deliver(bus, Ping())

    first, second, third, fourth, fifth = tasks
    assert first == second == get_current_task().id
    assert third == fourth
    assert len({second, third, fifth}) == 3


async def test_no_two_handlers_that_wait_at_the_same_time_have_the_same_task(
    bus: EventBus, deliver: Deliver
) -> None:
    all_begun = anyio.Event()
    begun: list[int] = []
    waiting: set[int] = set()
    at_once: list[int] = []

    async def handler(event: Ping, number: int) -> None:
        task = get_current_task().id
        assert task not in waiting
        begun.append(number)
        if len(begun) == 30:
            all_begun.set()
        if number % 3:
            waiting.add(task)
            await checkpoint()
            if number % 3 == 2:
                await all_begun.wait()
                at_once.append(len(waiting))
            waiting.remove(task)

    for number in range(30):
        bus.subscribe(Ping, functools.partial(handler, number=number))

    assert await deliver(bus, Ping()) == []
    assert max(at_once) >= 10


async def test_a_context_variable_is_each_handlers_own_and_what_it_holds_is_the_publishers(
    bus: EventBus, deliver: Deliver
) -> None:
    basket: ContextVar[list[str]] = ContextVar("basket")
    held: list[list[str]] = []

    async def handler(event: Ping) -> None:
        held.append(basket.get())
        basket.set([])
        await checkpoint()
        basket.get().append("the handler's own")

    for _ in range(2):
        bus.subscribe(Ping, functools.partial(handler))
    published = ["the publisher's"]
    basket.set(published)

    await deliver(bus, Ping())

    assert [each is published for each in held] == [True, True]
    assert published == ["the publisher's"]


async def test_a_child_that_a_handler_starts_is_a_child_of_its_own_scopes(
    bus: EventBus, deliver: Deliver
) -> None:
    ended: list[int] = []

    async def child(number: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(number)

    async def handler(event: Ping, number: int) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(child, number)
            await checkpoint()
            tasks.cancel_scope.cancel()
        assert number in ended
        await checkpoint()

    for number in range(4):
        bus.subscribe(Ping, functools.partial(handler, number=number))

    assert await deliver(bus, Ping()) == []
    assert sorted(ended) == [0, 1, 2, 3]


# Who comes to help


async def drained(bus: EventBus, *events: Ping) -> None:
    async with bus.context():
        bus.publish(*events)


@stealing
async def test_a_drain_never_has_more_tasks_than_handlers_that_wait_at_once(bus: EventBus) -> None:
    before = len(get_running_tasks())
    tasks: list[int] = []

    async def handler(event: Ping) -> None:
        await checkpoint()
        tasks.append(len(get_running_tasks()) - before)
        await checkpoint()

    for _ in range(3):
        bus.subscribe(Ping, functools.partial(handler))

    await drained(bus, *map(Ping, range(20)))

    # The third one is the task that drains: it waits for the others from the second event on.
    assert max(tasks) <= 3
    assert bus.stats.handled == 60


@stealing
@pytest.mark.usefixtures("on_asyncio")
async def test_handlers_that_all_wait_begin_within_a_few_turns_of_the_event_loop(
    bus: EventBus, deliver: Deliver
) -> None:
    turns = 0
    counting = True
    begun: list[int] = []

    def count() -> None:
        nonlocal turns
        turns += 1
        if counting:
            asyncio.get_running_loop().call_soon(count)

    async def handler(event: Ping) -> None:
        begun.append(turns)
        await checkpoint()

    for _ in range(100):
        bus.subscribe(Ping, functools.partial(handler))

    count()
    await deliver(bus, Ping())
    counting = False

    assert begun[-1] - begun[0] <= 8


@stealing
async def test_whoever_ends_last_goes_on_with_the_next_event(bus: EventBus) -> None:
    first: list[int] = []
    last: list[int] = []
    begun = [anyio.Event() for _ in range(5)]

    @bus.on(Ping)
    async def ends_first(event: Ping) -> None:
        first.append(get_current_task().id)
        await begun[event.number].wait()

    @bus.on(Ping)
    async def ends_last(event: Ping) -> None:
        last.append(get_current_task().id)
        begun[event.number].set()
        await all_tasks_blocked()

    await drained(bus, *map(Ping, range(5)))

    assert first[0] == get_current_task().id
    assert first[1:] == last[:-1]
    assert bus.stats.handled == 10


@stealing
async def test_a_drain_can_be_cancelled_wherever_its_helpers_are(
    bus: EventBus, anyio_backend_name: str
) -> None:
    """Whoever runs the handlers, and whoever waits for them."""

    async def handler(event: Ping, times: int) -> None:
        for _ in range((times + event.number) % 4):
            await checkpoint()

    for times in range(4):
        bus.subscribe(Ping, functools.partial(handler, times=times))

    drain = functools.partial(drained, bus, *map(Ping, range(6)))
    whole = 0
    for natively in {False, anyio_backend_name == "asyncio"}:
        for steps in range(60):
            before = bus.stats.handled
            if natively:
                task = asyncio.ensure_future(drain())
                for _ in range(steps):
                    await asyncio.sleep(0)
                cancelled = task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() == cancelled
            else:
                with CancelScope() as scope:
                    async with create_task_group() as tasks:
                        tasks.start_soon(drain)
                        for _ in range(steps):
                            await checkpoint()
                        scope.cancel()
            whole += bus.stats.handled - before == 24
            stats = bus.stats
            assert stats.handled + stats.undelivered == stats.accepted
    assert whole


async def cancels_its_own_task(event: Ping) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    raise asyncio.CancelledError


@pytest.mark.usefixtures("on_asyncio")
async def test_what_follows_a_handler_that_cancels_its_own_task_begins_all_the_same(
    bus: EventBus, deliver: Deliver
) -> None:
    begun = anyio.Event()

    @bus.on(Ping)
    async def waits_for_the_last(event: Ping) -> None:
        await begun.wait()

    bus.subscribe(Ping, cancels_its_own_task)

    @bus.on(Ping)
    async def last(event: Ping) -> None:
        begun.set()

    with anyio.fail_after(5):
        assert await deliver(bus, Ping()) == []
    assert outcomes(bus) == (2, 0, 1)


@stealing
@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("count", [1, 2])
async def test_a_handler_that_cancels_its_own_task_and_ends_without_waiting_spares_its_siblings(
    bus: EventBus, deliver: Deliver, count: int
) -> None:
    waits = anyio.Event()

    @bus.on(Ping)
    async def first(event: Ping) -> None:
        await waits.wait()
        await all_tasks_blocked()

    async def cancels(event: Ping) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        waits.set()

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(cancels))

    assert await deliver(bus, Ping()) == []
    assert outcomes(bus) == (1 + count, 0, 0)


@stealing
@pytest.mark.usefixtures("on_asyncio")
async def test_the_time_of_others_begins_although_the_last_handler_cancels_its_own_task(
    new_bus: NewBus,
) -> None:
    bus = new_bus(handler_timeout=TINY)

    @bus.on(Ping)
    async def stuck(event: Ping) -> None:
        await anyio.sleep_forever()

    bus.subscribe(Ping, cancels_its_own_task)

    with anyio.fail_after(5):
        await drained(bus, Ping())
    assert outcomes(bus) == (0, 1, 1)


# What a handler may wait for


@coroutine
def bare(times: int) -> Generator[None, None, str]:
    for _ in range(times):
        yield
    return "returned"


class Plainly:
    """Its iterator is no generator: it has neither `send` nor `throw`."""

    def __await__(self) -> Any:  # Any: a type checker wants a generator
        return iter([None, None])


async def numbers() -> AsyncGenerator[int]:
    for number in range(3):
        await checkpoint()
        yield number


async def waits_for_bare_yields(event: Ping) -> None:
    assert await bare(3) == "returned"


async def waits_for_a_plain_iterator(event: Ping) -> None:
    await Plainly()


async def waits_for_sleep(event: Ping) -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0.001)


async def waits_for_a_future(event: Ping) -> None:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, "done")
    assert await future == "done"


async def waits_for_a_failing_future(event: Ping) -> None:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_exception, Boom())
    with pytest.raises(Boom):
        await future
    await asyncio.sleep(0)


async def waits_for_a_task(event: Ping) -> None:
    assert await asyncio.create_task(asyncio.sleep(0, "done")) == "done"


async def waits_in_an_async_generator(event: Ping) -> None:
    assert [number async for number in numbers()] == [0, 1, 2]


async def leaves_an_async_generator(event: Ping) -> None:
    generator = numbers()
    assert await anext(generator) == 0
    await generator.aclose()


ANYWHERE = [waits_in_an_async_generator, leaves_an_async_generator]
ON_ASYNCIO = [
    waits_for_bare_yields,
    waits_for_a_plain_iterator,
    waits_for_sleep,
    waits_for_a_future,
    waits_for_a_failing_future,
    waits_for_a_task,
]


@pytest.mark.parametrize("handler", [*ANYWHERE, *ON_ASYNCIO])
@pytest.mark.parametrize("count", [1, 3])
async def test_a_handler_may_wait_for_whatever_can_be_awaited(
    bus: EventBus,
    deliver: Deliver,
    anyio_backend_name: str,
    handler: Callable[[Ping], Awaitable[None]],
    count: int,
) -> None:
    if handler in ON_ASYNCIO and anyio_backend_name != "asyncio":
        pytest.skip("about asyncio alone")
    for _ in range(count):
        bus.subscribe(Ping, functools.partial(handler))

    assert await deliver(bus, Ping()) == []
    assert outcomes(bus) == (count, 0, 0)


async def test_what_a_thread_calls_on_the_loop_sees_the_context_variables_of_the_thread(
    bus: EventBus, deliver: Deliver
) -> None:
    seen: list[str] = []

    async def look() -> None:
        seen.append(value.get())
        await checkpoint()
        seen.append(value.get())

    def in_thread() -> None:
        value.set("thread")
        from_thread.run(look)

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        value.set("handler")
        await to_thread.run_sync(in_thread)
        seen.append(value.get())
        await checkpoint()
        seen.append(value.get())

    assert await deliver(bus, Ping()) == []
    assert seen == ["thread", "thread", "handler", "handler"]
    assert value.get() == "unset"


async def test_sequential_handlers_stay_so_where_some_begin_in_threads(
    new_bus: NewBus, deliver: Deliver
) -> None:
    bus = new_bus(sequential=True)
    steps: list[str] = []

    async def waits(event: Ping, name: str) -> None:
        steps.append(f"{name} begins")
        await all_tasks_blocked()
        steps.append(f"{name} ends")

    def in_thread(event: Ping, name: str) -> None:
        steps.append(f"{name} begins")
        from_thread.run(checkpoint)
        steps.append(f"{name} ends")

    for number, handler in enumerate([waits, in_thread, waits, waits, in_thread]):
        bus.subscribe(Ping, functools.partial(handler, name=str(number)))

    assert await deliver(bus, Ping()) == []
    assert steps == [f"{number} {what}" for number in range(5) for what in ("begins", "ends")]


async def test_a_failure_is_reported_in_the_context_variables_of_its_handler(
    bus: EventBus,
) -> None:
    seen: list[str] = []

    def report(delivery: Delivery, error: Exception) -> None:
        seen.append(value.get())

    bus.report_failure = report

    async def fails(event: Ping, number: int) -> None:
        value.set(f"handler {number}")
        if number:
            await checkpoint()
        raise Boom

    for number in range(3):
        bus.subscribe(Ping, functools.partial(fails, number=number))

    await by_drain(bus, Ping())

    assert sorted(seen) == ["handler 0", "handler 1", "handler 2"]


# Cancellation


@stealing
@pytest.mark.usefixtures("on_asyncio")
async def test_a_task_that_was_cancelled_natively_before_starts_no_handler(bus: EventBus) -> None:
    started: list[Ping] = []

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        started.append(event)
        await checkpoint()

    async def cancelled() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await bus.dispatch(Ping())

    task = asyncio.ensure_future(cancelled())
    await asyncio.wait([task])

    assert task.cancelled()
    assert started == []
    assert outcomes(bus) == (0, 0, 1)


@stealing
@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("count", [1, 3])
async def test_a_drain_in_a_task_that_was_cancelled_natively_before_leaves_all_for_the_next_one(
    bus: EventBus, count: int
) -> None:
    async def handler(event: Ping) -> None:
        pass

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(handler))

    async def cancelled() -> None:
        task = asyncio.current_task()
        assert task is not None
        async with bus.context() as unit:
            unit.publish(Ping(1), Ping(2))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await unit.drain()
            await unit.drain()

    await asyncio.ensure_future(cancelled())

    assert outcomes(bus) == (2 * count, 0, 0)


@pytest.mark.usefixtures("on_asyncio")
async def test_a_task_that_has_caught_a_native_cancellation_can_dispatch(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        await checkpoint()

    async def cancelled() -> list[Exception]:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        return await deliver(bus, Ping())

    assert await asyncio.ensure_future(cancelled()) == []
    assert outcomes(bus) == (1, 0, 0)


@stealing
@pytest.mark.usefixtures("on_asyncio")
async def test_a_native_cancellation_reaches_the_handler_in_the_dispatching_task_through_shields(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping)
    async def shielded(event: Ping) -> None:
        with CancelScope(shield=True):
            await anyio.sleep_forever()

    task = asyncio.ensure_future(deliver(bus, Ping()))
    await all_tasks_blocked()
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    assert outcomes(bus) == (0, 0, 1)


@stealing
@pytest.mark.parametrize("cleanup_fails", [False, True])
async def test_a_dispatch_that_is_closed_closes_the_handler_that_waits(
    bus: EventBus, cleanup_fails: bool
) -> None:
    steps: list[str] = []

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        value.set("handler")
        try:
            await bare(2)
        finally:
            steps.append(value.get())
            if cleanup_fails:
                raise Boom

    dispatch = bus.dispatch(Ping())
    assert dispatch.send(None) is None
    dispatch.close()

    assert steps == ["handler"]
    assert outcomes(bus) == (0, 0, 1)


@stealing
async def test_a_long_drain_of_handlers_that_do_not_wait_lets_others_run(bus: EventBus) -> None:
    seen: list[str] = []

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        seen.append("handler")

    async def other() -> None:
        for _ in range(3):
            await checkpoint()
            seen.append("other")

    async with bus.context() as unit, create_task_group() as tasks:
        unit.publish(*map(Ping, range(6 * EVENTS_BETWEEN_CHECKPOINTS)))
        tasks.start_soon(other)
        await unit.drain()
        assert seen.count("other") == 3


@stealing
async def test_a_long_drain_of_handlers_that_do_not_wait_can_be_cancelled(bus: EventBus) -> None:
    scope = CancelScope()

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        if event.number == 10:
            scope.cancel()

    async with bus.context() as unit:
        unit.publish(*map(Ping, range(4 * EVENTS_BETWEEN_CHECKPOINTS)))
        with scope:
            await unit.drain()
        assert bus.stats.handled == EVENTS_BETWEEN_CHECKPOINTS
        await unit.drain()

    assert bus.stats.handled == 4 * EVENTS_BETWEEN_CHECKPOINTS


@pytest.mark.parametrize(
    "anyio_backend", [("trio", {"clock": MockClock(autojump_threshold=0)})], ids=["trio"]
)
@pytest.mark.parametrize("count", [1, 3])
async def test_every_event_of_a_drain_has_its_whole_time(new_bus: NewBus, count: int) -> None:
    bus = new_bus(handler_timeout=30)

    async def takes_long(event: Ping) -> None:
        await anyio.sleep(31 if event.number == 2 else 29)

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(takes_long))
    started = trio.current_time()

    async with bus.context() as unit:
        unit.publish(*map(Ping, range(4)))
        report = await unit.drain()

    assert (report.handled, len(report.failures)) == (3 * count, count)
    assert trio.current_time() - started == pytest.approx(29 * 3 + 30)


@pytest.mark.parametrize("before", [0, EVENTS_BETWEEN_CHECKPOINTS - 1, EVENTS_BETWEEN_CHECKPOINTS])
async def test_a_drain_goes_on_after_a_handler_past_its_time_whichever_event_it_was_of(
    new_bus: NewBus, before: int
) -> None:
    bus = new_bus(handler_timeout=TINY)

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        if event.number == before:
            await anyio.sleep_forever()

    async with bus.context() as unit:
        unit.publish(*map(Ping, range(before + 3)))
        report = await unit.drain()

    assert (report.handled, len(report.failures)) == (before + 2, 1)


# Exceptions that end more than a handler


@pytest.mark.parametrize("count", [1, 3])
async def test_an_interrupt_out_of_a_report_propagates_bare(bus: EventBus, count: int) -> None:
    def report(delivery: Delivery, error: Exception) -> None:
        raise KeyboardInterrupt

    bus.report_failure = report

    async def fails(event: Ping) -> None:
        raise Boom

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(fails))

    with pytest.raises(KeyboardInterrupt):
        await by_drain(bus, Ping())


INTO_THE_DEPTH = """
import sys
import anyio
from eventkit import DispatchError, EventBus

bus = EventBus(max_depth=100_000)
bus.report_failure = lambda delivery, error: None
depth = 0

@bus.on(int)
async def deeper(event):
    global depth
    depth += 1
    if event:
        await bus.dispatch(event)

async def main():
    try:
        await bus.dispatch(1)
    except DispatchError as group:
        error = group
    while isinstance(error, DispatchError):
        error = error.exceptions[0]
    assert isinstance(error, RecursionError)
    assert depth > 16
    await bus.dispatch(0)

anyio.run(main, backend=sys.argv[1])
"""


def test_dispatching_into_the_depth_ends_in_a_failure_and_the_bus_works_on(
    anyio_backend_name: str,
) -> None:
    # In a process of its own: whoever traces this one, for coverage, gives up on a full stack.
    # Its books are not checked, because where the stack is full, there is no room for them either;
    # `max_depth` is there so that nobody gets so far.
    command = [sys.executable, "-c", INTO_THE_DEPTH, anyio_backend_name]
    subprocess.run(command, check=True, timeout=100)


# Where it is stuck


@stealing
async def test_it_can_be_told_at_which_line_each_handler_waits(bus: EventBus) -> None:
    event, release = anyio.Event(), threading.Event()

    async def deeper() -> None:
        await event.wait()

    @bus.on(Ping, name="first")
    async def first(event: Ping) -> None:
        await deeper()

    @bus.on(Ping, name="plain")
    def plain(event: Ping) -> None:
        release.wait(10)

    @bus.on(Ping, name="quick")
    async def quick(event: Ping) -> None:
        pass

    stuck: dict[str, list[FrameType]] = {}
    async with create_task_group() as tasks:
        tasks.start_soon(bus.dispatch, Ping())
        await all_tasks_blocked()
        stuck |= {run.handler: stack for run, stack in whereabouts(state_of(bus).tally).items()}
        event.set()
        release.set()

    assert sorted(stuck) == ["first", "plain"]
    names = [frame.f_code.co_name for frame in stuck["first"]]
    assert names[names.index("first") :][:3] == ["first", "deeper", "wait"]
    assert "run_sync" in [frame.f_code.co_name for frame in stuck["plain"]]
    assert whereabouts(state_of(bus).tally) == {}


@stealing
async def test_a_thread_may_ask_what_runs_while_one_event_gives_way_to_the_next(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeenBefore(list[object]):
        """As the thread has seen them: at the second handler of the event before."""

        def copy(self) -> list[Any]:  # Any: a worker, as far as it is looked at
            return [SimpleNamespace(index=1, steps=None)]

    running: list[int] = []

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        (run,) = state_of(bus).tally.runs
        with monkeypatch.context() as patch:
            patch.setattr(run, "workers", SeenBefore())
            running.append(bus.stats.running)

    await bus.dispatch(Ping())

    assert running == [0]


async def test_a_trap_of_another_event_loop_is_the_handlers_error_to_handle(
    bus: EventBus, deliver: Deliver
) -> None:
    """Asyncio raises `RuntimeError` in the handler that waits for it, trio `TypeError`."""

    @coroutine
    def foreign() -> Generator[str]:
        yield "a trap that no event loop knows"

    caught: list[type[BaseException]] = []

    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        await checkpoint()
        try:
            await foreign()
        except (RuntimeError, TypeError) as error:
            caught.append(type(error))
        await checkpoint()

    await deliver(bus, Ping())

    assert caught in ([RuntimeError], [TypeError])
    assert bus.stats.handled == 1
