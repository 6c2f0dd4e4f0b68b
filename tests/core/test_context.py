"""Units of work beside their contract: threads, synchronous jobs, interrupts, memory."""

import asyncio
import gc
import logging
import re
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack, suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, from_thread, to_thread, wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from eventkit import (
    DispatchError,
    DrainInProgressError,
    DrainReport,
    EventBus,
    EventContext,
    EventContextClosedError,
    EventContextFullError,
    EventContextUsageError,
)
from tests.contract.bus import Gate
from tests.witness import assert_settled, calling, freed_by_anyio, ignore, nothing, witnessed

pytestmark = pytest.mark.anyio

Backend = tuple[str, dict[str, Any]]  # what the fixture `anyio_backend` gives


@pytest.fixture
def bus() -> EventBus:
    """A bus whose handler of strings fails for those that say so, and of whom nobody complains."""
    bus = EventBus()
    bus.report_failure = ignore

    @bus.on(str)
    async def handle(event: str) -> None:
        await checkpoint()
        if "bad" in event:
            raise ValueError(event)

    return bus


@pytest.fixture
def seen(bus: EventBus) -> Generator[list[str]]:
    """What became of each delivery; nothing may be left over at the end of the test."""
    yield witnessed(bus)
    assert_settled(bus)


def run(main: Callable[[], Awaitable[object]], backend: Backend) -> None:
    """Run it on an event loop of its own."""

    async def awaiting() -> None:
        await main()

    anyio.run(awaiting, backend=backend[0], backend_options=backend[1])


async def test_a_drain_without_failures_raises_nothing() -> None:
    DrainReport(handled=1, failures=()).raise_for_failures()


# Closing


async def test_a_thread_that_publishes_at_the_moment_of_closing_is_delivered_or_told(
    bus: EventBus, seen: list[str]
) -> None:
    threads, rounds, each = 3, 25, 20
    accepted, refused = 0, 0
    lock = threading.Lock()

    def publish(started: threading.Barrier) -> None:
        nonlocal accepted, refused
        started.wait()
        for _ in range(each):
            try:
                bus.publish("a")
            except EventContextClosedError:
                with lock:
                    refused += 1
            else:
                with lock:
                    accepted += 1

    def open_nested_and_publish(started: threading.Barrier) -> None:
        nonlocal accepted
        started.wait()
        for _ in range(each):
            with bus.context():
                bus.publish("a")
            with lock:
                accepted += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(rounds):
            started = threading.Barrier(threads + 1)
            async with create_task_group() as tasks:
                async with bus.context() as unit:
                    tasks.start_soon(to_thread.run_sync, open_nested_and_publish, started)
                    for _ in range(threads - 1):
                        tasks.start_soon(to_thread.run_sync, publish, started)
                    await to_thread.run_sync(started.wait)
                assert unit.closed
                assert unit.pending == ()
    finally:
        sys.setswitchinterval(interval)

    assert accepted + refused == threads * rounds * each
    assert bus.stats.accepted == bus.stats.handled == accepted
    assert seen == ["handled a"] * accepted


# Threads and synchronous jobs


async def test_threads_that_share_the_variables_publish_in_the_unit_of_their_caller(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context():
        await to_thread.run_sync(bus.publish, "from a worker")
        thread = threading.Thread(target=copy_context().run, args=(bus.publish, "from a thread"))
        thread.start()
        await to_thread.run_sync(thread.join)
        assert seen == []

    assert seen == ["handled from a worker", "handled from a thread"]


def test_threads_of_asyncio_publish_in_the_unit_of_their_caller(
    bus: EventBus, seen: list[str]
) -> None:
    async def main() -> None:
        async with bus.context() as outer:
            await asyncio.to_thread(bus.publish, "a")
            await asyncio.to_thread(nested)
            assert [delivery.event for delivery in outer.pending] == ["a", "b"]

    def nested() -> None:
        with bus.context():
            bus.publish("b")

    asyncio.run(main())

    assert seen == ["handled a", "handled b"]


def test_a_synchronous_unit_delivers_on_a_loop_of_its_own(bus: EventBus, seen: list[str]) -> None:
    with bus.context() as unit:
        bus.publish("a")
        assert bus.current_context() is unit
        assert seen == []

    assert seen == ["handled a"]
    assert unit.closed


def test_a_synchronous_unit_that_fails_discards(bus: EventBus, seen: list[str]) -> None:
    with suppress(LookupError), bus.context() as unit:
        bus.publish("a")
        raise LookupError

    assert seen == ["discarded a"]
    assert unit.closed


def test_a_synchronous_unit_without_events_starts_no_loop(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("eventkit._core.context.run")
    with bus.context() as unit:
        pass

    assert unit.closed


def test_synchronous_units_nest(bus: EventBus, seen: list[str]) -> None:
    with bus.context():
        bus.publish("a")
        with suppress(LookupError), bus.context():
            bus.publish("b")
            raise LookupError
        with bus.context():
            bus.publish("c")
        assert seen == ["discarded b"]

    assert seen == ["discarded b", "handled a", "handled c"]


def test_a_synchronous_unit_in_a_plain_thread_delivers_there(
    bus: EventBus, seen: list[str]
) -> None:
    threads: list[threading.Thread] = []
    bus.subscribe(int, calling(lambda: threads.append(threading.current_thread())), thread=False)

    def job() -> None:
        with bus.context():
            bus.publish(1)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()

    assert seen == ["handled 1"]
    assert threads == [thread]


def test_a_synchronous_unit_in_a_thread_of_asyncio_delivers_there(
    bus: EventBus, seen: list[str]
) -> None:
    def job() -> None:
        with bus.context():
            bus.publish("a")
        assert seen == ["handled a"]

    asyncio.run(asyncio.to_thread(job))


async def test_a_synchronous_unit_in_a_worker_thread_delivers_on_the_loop_it_works_for(
    bus: EventBus, seen: list[str]
) -> None:
    here = threading.current_thread()

    @bus.on(int)
    async def handle(event: int) -> None:
        assert threading.current_thread() is here
        await checkpoint()

    def job() -> None:
        with bus.context():
            bus.publish(1, "bad")
        assert seen == ["handled 1", "failed bad"]

    await to_thread.run_sync(job)


async def test_a_synchronous_unit_in_a_worker_thread_hands_over_to_the_unit_of_the_caller(
    bus: EventBus, seen: list[str]
) -> None:
    def job() -> None:
        with bus.context():
            bus.publish("b")
        with suppress(LookupError), bus.context():
            bus.publish("dropped")
            raise LookupError

    async with bus.context():
        bus.publish("a")
        await to_thread.run_sync(job)
        bus.publish("c")
        assert seen == ["discarded dropped"]

    assert seen == ["discarded dropped", "handled a", "handled b", "handled c"]


async def test_a_worker_thread_that_is_cancelled_leaves_its_unit_undelivered(
    bus: EventBus, seen: list[str]
) -> None:
    entered, go_on = anyio.Event(), threading.Event()
    units: list[EventContext] = []

    def job() -> None:
        with bus.context() as unit:
            units.append(unit)
            bus.publish("a")
            from_thread.run_sync(entered.set)
            go_on.wait()

    async with create_task_group() as tasks:
        tasks.start_soon(to_thread.run_sync, job)
        await entered.wait()
        tasks.cancel_scope.cancel()
        go_on.set()

    assert seen == ["undelivered a"]
    assert units[0].closed
    async with bus.context():
        bus.publish("once more")
    assert seen[1:] == ["handled once more"]


async def test_a_synchronous_unit_that_ends_where_a_loop_runs_is_accounted_for(
    bus: EventBus, seen: list[str]
) -> None:
    def enter() -> EventContext:
        unit = stack.enter_context(bus.context())
        bus.publish("a")
        return unit

    with ExitStack() as stack:
        unit = await to_thread.run_sync(enter)
        with pytest.raises(EventContextUsageError, match="ends on an event loop"):
            stack.close()

    assert seen == ["undelivered a"]
    assert unit.closed


def test_release_and_discard_may_be_called_from_other_threads(
    bus: EventBus, seen: list[str]
) -> None:
    with suppress(LookupError), bus.context() as unit:
        for event, decide in (("a", unit.release), ("b", unit.discard)):
            bus.publish(event)
            thread = threading.Thread(target=decide)
            thread.start()
            thread.join()
        raise LookupError

    assert seen == ["discarded b", "handled a"]


# Units that are independent of the one around them


@pytest.mark.parametrize("fails", [False, True], ids=["delivers", "discards"])
async def test_an_independent_unit_is_neither_delivered_nor_discarded_by_the_one_around_it(
    bus: EventBus, seen: list[str], fails: bool
) -> None:
    with suppress(LookupError):
        async with bus.context():
            bus.publish("around")
            async with bus.context(independent=True) as unit:
                bus.publish("a")
                assert bus.current_context() is unit
                assert seen == []
            assert seen == ["handled a"]
            with suppress(ZeroDivisionError):
                async with bus.context(independent=True):
                    bus.publish("b")
                    raise ZeroDivisionError
            assert seen == ["handled a", "discarded b"]
            if fails:
                raise LookupError

    assert seen[2:] == (["discarded around"] if fails else ["handled around"])


async def test_a_task_with_an_independent_unit_is_delivered_whoever_ends_first(
    bus: EventBus, seen: list[str]
) -> None:
    opened, go_on = anyio.Event(), anyio.Event()

    async def job(event: str) -> None:
        async with bus.context(independent=True):
            bus.publish(event)
            if event == "late":
                opened.set()
                await go_on.wait()

    async with create_task_group() as tasks:
        with suppress(LookupError):
            async with bus.context():
                tasks.start_soon(job, "early")
                tasks.start_soon(job, "late")
                await opened.wait()
                await wait_all_tasks_blocked()
                raise LookupError
        assert seen == ["handled early"]
        go_on.set()

    assert seen == ["handled early", "handled late"]


async def test_units_inside_an_independent_one_are_its_savepoints(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context(), bus.context(independent=True) as unit:
        async with bus.context():
            bus.publish("a")
        assert [delivery.event for delivery in unit.pending] == ["a"]
        assert seen == []

    assert seen == ["handled a"]


async def test_a_full_unit_leaves_room_in_an_independent_one() -> None:
    bus = EventBus(max_events=1)
    bus.subscribe(int, nothing, thread=False)

    async with bus.context():
        bus.publish(1)
        async with bus.context(independent=True):
            bus.publish(2)
        with pytest.raises(EventContextFullError):
            bus.publish(3)

    assert bus.stats.handled == 2


async def test_an_independent_unit_in_a_handler_is_delivered_although_the_handler_fails(
    bus: EventBus, seen: list[str]
) -> None:
    causes: list[object] = []

    @bus.on(int)
    async def handle(event: int) -> None:
        bus.publish("dropped")
        async with bus.context(independent=True) as unit:
            bus.publish("kept")
            async with bus.context() as inner:
                bus.publish("midway")
                report = await inner.drain()
            assert report.handled == 1
            assert [delivery.event for delivery in unit.pending] == ["kept"]
            causes.extend(delivery.cause and delivery.cause.event for delivery in unit.pending)
        assert seen == ["handled midway", "handled kept"]
        with pytest.raises(DrainInProgressError):
            await bus.current_context().drain()
        raise LookupError

    async with bus.context():
        bus.publish(1)

    assert causes == [1]
    assert seen == ["handled midway", "handled kept", "failed 1", "discarded dropped"]


async def test_a_unit_inside_one_of_another_bus_drains_midway(
    bus: EventBus, seen: list[str]
) -> None:
    async with EventBus(name="other").context(), bus.context() as unit:
        bus.publish("a")
        await unit.drain()
        assert seen == ["handled a"]


async def test_independent_units_in_handlers_are_as_deep_as_others() -> None:
    bus = EventBus(max_depth=3)
    bus.report_failure = ignore
    depths: list[int] = []

    @bus.on(int)
    async def again(event: int) -> None:
        depths.append(event)
        async with bus.context(independent=True):
            bus.publish(event + 1)

    async with bus.context():
        bus.publish(0)

    assert depths == [0, 1, 2, 3]


async def test_a_synchronous_unit_may_be_independent(bus: EventBus, seen: list[str]) -> None:
    def job() -> None:
        with bus.context(independent=True):
            bus.publish("a")
        assert seen == ["handled a"]

    with suppress(LookupError):
        async with bus.context():
            bus.publish("around")
            await to_thread.run_sync(job)
            raise LookupError

    assert seen == ["handled a", "discarded around"]


# Cancellation: what is true of our state if this `await` never returns?


def test_cancelled_natively_what_is_left_is_undelivered(bus: EventBus, seen: list[str]) -> None:
    async def main() -> None:
        gate = Gate()
        bus.subscribe(int, gate)

        async def work() -> None:
            async with bus.context():
                bus.publish("a", 1, "b")

        task = asyncio.create_task(work())
        await gate.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        async with bus.context():
            bus.publish("once more")

    asyncio.run(main())

    assert seen == ["handled a", "undelivered 1", "undelivered b", "handled once more"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_final_drain_propagates_and_leaves_the_rest_undelivered(
    bus: EventBus, seen: list[str], anyio_backend: Backend, interrupt: type[BaseException]
) -> None:
    bus.subscribe(int, partial(throw, interrupt()), thread=False)
    units: list[EventContext] = []

    async def main() -> None:
        async with bus.context() as unit:
            units.append(unit)
            bus.publish("a", 1, "b")

    with pytest.raises(interrupt):
        run(main, anyio_backend)

    assert seen == ["handled a", "undelivered 1", "undelivered b"]
    assert units[0].closed


def test_an_interrupt_in_a_drain_midway_leaves_the_rest_to_the_unit(
    bus: EventBus, seen: list[str], anyio_backend: Backend
) -> None:
    bus.subscribe(int, partial(throw, KeyboardInterrupt()), thread=False)

    async def main() -> None:
        async with bus.context() as unit:
            bus.publish(1, "a")
            with suppress(KeyboardInterrupt):
                await unit.drain()

    run(main, anyio_backend)

    assert seen == ["undelivered 1", "handled a"]


def test_an_interrupt_in_a_synchronous_unit_propagates(bus: EventBus, seen: list[str]) -> None:
    bus.subscribe(int, partial(throw, KeyboardInterrupt()), thread=False)

    with pytest.raises(KeyboardInterrupt), bus.context() as unit:
        bus.publish(1, "a")

    assert seen == ["undelivered 1", "undelivered a"]
    assert unit.closed


def throw(error: BaseException, event: object) -> None:
    """Fail with this error."""
    raise error


# Memory


class Thing:
    """An event that says when it is gone."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


async def published(bus: EventBus, thing: Thing) -> None:
    async with bus.context(), bus.context():
        bus.publish(thing)


async def discarded(bus: EventBus, thing: Thing) -> None:
    async with bus.context() as unit:
        bus.publish(thing)
        unit.discard()


async def drained(bus: EventBus, thing: Thing) -> None:
    async with bus.context() as unit:
        bus.publish(thing)
        with suppress(
            DispatchError
        ):  # as a variable, the report would hold the frame that holds it
            (await unit.drain()).raise_for_failures()


async def dispatched(bus: EventBus, thing: Thing) -> None:
    with suppress(DispatchError):
        await bus.dispatch(thing)


async def refused(bus: EventBus, thing: Thing) -> None:
    async with bus.context() as unit:
        pass
    with suppress(EventContextClosedError):
        unit.publish(thing)


async def stopped(bus: EventBus, thing: Thing) -> None:
    with CancelScope() as scope:
        async with bus.context():
            bus.publish(thing)
            scope.cancel()


@freed_by_anyio
@pytest.mark.parametrize("use", [published, discarded, drained, dispatched, refused, stopped])
@pytest.mark.parametrize("kind", ["good", "bad", "caused"])
async def test_events_and_units_are_freed_without_the_garbage_collector(
    bus: EventBus, use: Callable[[EventBus, Thing], Awaitable[None]], kind: str
) -> None:
    @bus.on(Thing)
    async def handle(thing: Thing) -> None:
        if thing.kind == "bad":
            raise ValueError
        if thing.kind == "caused":
            bus.publish(Thing("good"))
        await checkpoint()

    def units() -> int:
        return sum(type(thing) is EventContext for thing in gc.get_objects())

    gc.collect()
    before = units()
    gc.disable()
    try:
        thing = Thing(kind)
        freed = weakref.ref(thing)
        await use(bus, thing)
        del thing
        await wait_all_tasks_blocked()

        assert freed() is None
        assert units() == before
    finally:
        gc.enable()


async def test_a_unit_says_what_it_is(bus: EventBus) -> None:
    told: list[str] = []
    bus.subscribe(int, calling(lambda: told.append(repr(bus.current_context()))), thread=False)

    unit = bus.context()
    assert repr(unit) == "<EventContext of bus 'default', new, 0 pending>"
    async with unit:
        bus.publish(1, "a")
        assert repr(unit) == "<EventContext of bus 'default', open, 2 pending>"
    assert repr(unit) == "<EventContext of bus 'default', closed, 0 pending>"
    assert len(told) == 1
    assert re.fullmatch(
        r"<EventContext of bus 'default' for builtins\.int -> .*handle, open, 0 pending>", told[0]
    )


async def test_threads_that_wait_for_handlers_in_threads_hold_no_thread_that_those_need(
    bus: EventBus,
) -> None:
    handled: list[int] = []

    @bus.on(int)
    def outer(event: int) -> None:
        from_thread.run(bus.dispatch, str(event))

    @bus.on(str)
    def inner(event: str) -> None:
        handled.append(int(event))

    with anyio.fail_after(30):  # as many as there are threads: they would wait for ever
        async with create_task_group() as tasks:
            for number in range(40):
                tasks.start_soon(bus.dispatch, number)

    assert sorted(handled) == list(range(40))


async def test_a_dispatch_from_a_thread_that_was_cancelled_meanwhile_ends_undelivered(
    bus: EventBus, seen: list[str]
) -> None:
    cancelled = threading.Event()
    running = anyio.Event()

    @bus.on(int)
    def outer(event: int) -> None:
        from_thread.run_sync(running.set)
        cancelled.wait(30)
        from_thread.run(bus.dispatch, str(event))

    with anyio.fail_after(30):
        async with create_task_group() as tasks:
            tasks.start_soon(bus.dispatch, 1)
            await running.wait()
            tasks.cancel_scope.cancel()
            with CancelScope(shield=True):
                await wait_all_tasks_blocked()  # all know of it, and wait for the thread
            cancelled.set()

    assert seen == ["undelivered 1", "undelivered 1"]
    stats = bus.stats
    assert (stats.accepted, stats.handled, stats.pending, stats.running) == (2, 0, 0, 0)


async def test_handlers_run_on_the_loop_that_drains_whatever_loop_published(bus: EventBus) -> None:
    seen: list[str] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        await checkpoint()
        await to_thread.run_sync(seen.append, event)

    async def publish(event: str) -> None:
        bus.publish(event)

    def elsewhere(backend: str) -> None:
        anyio.run(publish, f"from {backend}", backend=backend)

    async with bus.context():
        await to_thread.run_sync(elsewhere, "trio")
        await to_thread.run_sync(elsewhere, "asyncio")

    assert seen == ["from trio", "from asyncio"]


@pytest.mark.parametrize("loud", [True, False], ids=["raiseExceptions", "silent"])
async def test_a_log_that_raises_loses_no_delivery(
    loud: bool,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", loud)
    caplog.set_level(logging.INFO, "eventkit")
    bus = EventBus()

    def broken(record: logging.LogRecord) -> bool:
        raise RuntimeError("the filter broke")

    cancelled = bus.subscribe(str, nothing)

    @bus.on(str)
    async def fails(event: str) -> None:
        raise ValueError

    @bus.on(str)
    async def works(event: str) -> None:
        bus.publish(1)

    handled: list[int] = []

    @bus.on(int)
    async def follows(event: int) -> None:
        handled.append(event)

    logger = logging.getLogger("eventkit")
    logger.addFilter(broken)
    try:
        async with bus.context():
            bus.publish("event")
            cancelled.cancel()
    finally:
        logger.removeFilter(broken)

    assert handled == [1]
    assert_settled(bus)
    assert ("the filter broke" in capsys.readouterr().err) is loud
