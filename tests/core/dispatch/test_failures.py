"""Dispatch beside its contract: nothing is kept alive by what happened."""

import asyncio
import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio import sleep_forever, to_thread
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from eventkit import DispatchError, EventBus, HandlerCancelledError
from eventkit._core import awaited
from tests.contract.bus import ignore
from tests.dispatching import (
    Boom,
    Cancel,
    Deliver,
    Ping,
    all_tasks_blocked,
    by_dispatch,
    by_drain,
    outcomes,
)
from tests.witness import freed_by_anyio

pytestmark = pytest.mark.anyio


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def works(event: Ping) -> None:
    await checkpoint()


async def fails(event: Ping) -> None:
    await checkpoint()
    raise Boom


class Worse(Exception):
    pass


async def fails_from_a_cause(event: Ping) -> None:
    try:
        await fails(event)
    except Boom as error:
        raise Worse from error


async def fails_in_a_group(event: Ping) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fails, event)


async def takes_too_long(event: Ping) -> None:
    await sleep_forever()


async def makes_up_a_cancellation(event: Ping) -> None:
    kept: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await sleep_forever()
        except anyio.get_cancelled_exc_class() as error:
            kept.append(error)
    raise kept.pop()


async def makes_up_a_mixture(event: Ping) -> None:
    try:
        await makes_up_a_cancellation(event)
    except anyio.get_cancelled_exc_class() as error:
        raise BaseExceptionGroup("mixed", [error, Boom()]) from None


def fails_in_a_thread(event: Ping) -> None:
    raise Boom


async def dispatches(event: Ping) -> None:
    bus = EventBus()
    bus.subscribe(Ping, fails)
    await bus.dispatch(event)


ENDS: list[Callable[[Ping], Awaitable[None] | None]] = [
    works,
    fails,
    fails_from_a_cause,
    fails_in_a_group,
    takes_too_long,
    makes_up_a_cancellation,
    makes_up_a_mixture,
    fails_in_a_thread,
    dispatches,
]


async def other_work_in_all_threads(count: int) -> None:
    """An idle thread may not yet have let go of its last job when the result is there."""
    barrier = threading.Barrier(count, timeout=10)

    async def work() -> None:
        await to_thread.run_sync(barrier.wait)

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(work)


def tracked(*values: object) -> list[weakref.ref[object]]:
    return [weakref.ref(value) for value in values]


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("handler", ENDS)
@pytest.mark.parametrize("count", [1, 3])
async def test_events_and_failures_are_freed_without_the_garbage_collector(
    bus: EventBus, deliver: Deliver, handler: Callable[[Ping], object], count: int
) -> None:
    timeout = 0.01 if handler is takes_too_long else ...
    for number in range(count):
        bus.subscribe(Ping, functools.partial(handler), name=str(number), timeout=timeout)

    async def run() -> list[weakref.ref[object]]:
        event = Ping()
        return tracked(event, *await deliver(bus, event))

    references = await run()
    await all_tasks_blocked()
    await other_work_in_all_threads(count)

    assert len(references) == (1 if handler is works else 1 + count)
    assert [reference() for reference in references] == [None] * len(references)


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
async def test_a_dispatch_error_is_freed_without_the_garbage_collector(bus: EventBus) -> None:
    bus.subscribe(Ping, fails)

    async def run() -> list[weakref.ref[object]]:
        event = Ping()
        try:
            await bus.dispatch(event)
        except DispatchError as group:
            return tracked(event, group, *group.exceptions)
        return []

    references = await run()
    await all_tasks_blocked()

    assert [reference() for reference in references] == [None, None, None]


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
async def test_events_are_freed_without_the_garbage_collector_after_a_cancellation(
    bus: EventBus, deliver: Deliver, cancel: Cancel
) -> None:
    for handler in (works, fails, takes_too_long):
        bus.subscribe(Ping, handler)

    async def run() -> weakref.ref[Ping]:
        event = Ping()
        reference = weakref.ref(event)
        await cancel(deliver, bus, event)
        return reference

    reference = await run()
    await all_tasks_blocked()

    assert reference() is None


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
async def test_events_are_freed_without_the_garbage_collector_if_cancelled_before_any_handler(
    bus: EventBus, deliver: Deliver
) -> None:
    for _ in range(2):
        bus.subscribe(Ping, functools.partial(works))

    async def run() -> weakref.ref[Ping]:
        event = Ping()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await deliver(bus, event)
        return weakref.ref(event)

    reference = await run()
    await all_tasks_blocked()

    assert reference() is None
    assert outcomes(bus) == (0, 0, 2)


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("count", [1, 2])
async def test_events_are_freed_without_the_garbage_collector_after_a_keyboard_interrupt(
    bus: EventBus, deliver: Deliver, count: int
) -> None:
    async def interrupt(event: Ping) -> None:
        await checkpoint()
        raise KeyboardInterrupt

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(interrupt))

    async def run() -> weakref.ref[Ping]:
        event = Ping()
        reference = weakref.ref(event)
        try:
            await deliver(bus, event)
        except KeyboardInterrupt:
            return reference
        raise AssertionError

    reference = await run()
    await all_tasks_blocked()

    assert reference() is None


@pytest.mark.usefixtures("on_asyncio", "no_collector")
@pytest.mark.parametrize("waits_before", [0, 1])
async def test_a_task_that_fails_for_a_handler_is_freed_without_the_garbage_collector(
    bus: EventBus, deliver: Deliver, waits_before: int
) -> None:
    async def fail() -> None:
        await checkpoint()
        raise Boom

    async def handler(event: Ping) -> None:
        for _ in range(waits_before):
            await checkpoint()
        try:
            await asyncio.ensure_future(fail())
        except Boom as error:
            references.append(weakref.ref(error))
            raise

    bus.subscribe(Ping, handler)
    bus.report_failure = ignore
    references: list[weakref.ref[Boom]] = []
    with contextlib.suppress(DispatchError):
        await deliver(bus, Ping())
    await all_tasks_blocked()

    assert [reference() for reference in references] == [None]


@pytest.mark.usefixtures("on_asyncio")
async def test_a_made_up_cancellation_inside_a_dispatch_does_not_end_its_caller(
    bus: EventBus,
) -> None:
    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        raise asyncio.CancelledError

    assert [type(error) for error in await by_dispatch(bus, Ping())] == [HandlerCancelledError]
    assert [type(error) for error in await by_drain(bus, Ping())] == [HandlerCancelledError]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("implementation", ["continuation-stealing"], indirect=True)
async def test_deliveries_end_where_the_event_loop_starts_no_tasks(
    bus: EventBus, deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []

    @asynccontextmanager
    async def create_task_group() -> AsyncGenerator[TaskGroup]:
        async with anyio.create_task_group() as tasks:
            monkeypatch.setattr(tasks, "start_soon", refuse)
            yield tasks

    def refuse(*_: object, **__: object) -> None:
        raise Boom

    async def wait(_: Ping) -> None:
        try:
            await sleep_forever()
        finally:
            ends.append("ended")

    monkeypatch.setattr(awaited, "create_task_group", create_task_group)
    for number in range(3):
        bus.subscribe(Ping, functools.partial(wait), name=str(number))

    with anyio.fail_after(5), pytest.raises(Boom):
        await deliver(bus, Ping())

    assert ends == ["ended"]
    assert bus.stats.undelivered == 3
