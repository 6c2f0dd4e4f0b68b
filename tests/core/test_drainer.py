"""The drainer alone: order, bounds, its end in time and out of time, and who cannot break it."""

import asyncio
import logging
import math
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import trio
from anyio import (
    CancelScope,
    Event,
    create_task_group,
    fail_after,
    get_running_tasks,
    sleep,
    sleep_forever,
    to_thread,
    wait_all_tasks_blocked,
)
from anyio.lowlevel import checkpoint

from eventkit import Delivery, EventBus, Observer, Stats
from eventkit._core.bus import state_of
from eventkit._core.context import context_of
from eventkit._core.drainer import Drainer
from eventkit._core.loops import native_asyncio
from eventkit._core.units import Unit
from tests.contract.bus import ignore
from tests.witness import assert_settled, entered, unit_of, virtual_time, witnessed

pytestmark = pytest.mark.anyio


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@asynccontextmanager
async def draining(
    bus: EventBus, *, concurrency: int = 4, max_pending: int | None = None
) -> AsyncGenerator[Drainer]:
    """A drainer in a task group, closed after the block without a deadline."""
    async with create_task_group() as tasks:
        drainer = Drainer(state_of(bus), tasks, concurrency=concurrency, max_pending=max_pending)
        yield drainer
        await drainer.close(math.inf)


def unit(bus: EventBus, *events: object, **options: Any) -> Unit:
    """A unit of work in which these events were published, and nothing was decided."""
    context = unit_of(bus)
    with entered(context):
        bus.publish(*events, **options)
    return context


async def pause(_: str) -> None:
    """A handler that takes a moment."""
    await checkpoint()


class Gate:
    """A handler that notes what comes, and lets nothing go on before it is open."""

    def __init__(self, bus: EventBus) -> None:
        self.entered: list[object] = []
        self.left: list[object] = []
        self.open = Event()
        bus.subscribe(str, self.handle, name="gate")

    async def handle(self, event: str) -> None:
        self.entered.append(event)
        await self.open.wait()
        self.left.append(event)


def lines(caplog: pytest.LogCaptureFixture, start: str) -> list[logging.LogRecord]:
    """The log lines that begin so."""
    return [record for record in caplog.records if record.getMessage().startswith(start)]


# Order and bounds.


async def test_units_are_delivered_in_the_order_in_which_they_ended(bus: EventBus) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, pause)

    async with draining(bus, concurrency=1) as drainer:
        for number in range(5):
            drainer.submit(unit(bus, f"{number}a", f"{number}b"), success=True)

    assert seen == [f"handled {number}{letter}" for number in range(5) for letter in "ab"]


async def test_as_many_units_are_drained_at_once_as_said_each_in_one_task(bus: EventBus) -> None:
    gate = Gate(bus)

    async with draining(bus, concurrency=3) as drainer:
        for number in range(10):
            drainer.submit(unit(bus, str(number)), success=True)
        await wait_all_tasks_blocked()

        assert sorted(gate.entered, key=str) == ["0", "1", "2"]
        names = [task.name for task in get_running_tasks()]
        assert names.count("eventkit drains 'default'") == 3
        assert (bus.stats.units_draining, bus.stats.units_waiting) == (3, 7)
        gate.open.set()

    assert sorted(gate.left, key=str) == [str(number) for number in range(10)]
    assert (bus.stats.units_draining, bus.stats.units_waiting) == (0, 0)


async def test_no_two_units_are_drained_in_the_same_task(
    bus: EventBus, anyio_backend_name: str
) -> None:
    on_trio = anyio_backend_name == "trio"
    tasks: set[object] = set()

    @bus.on(str)
    async def handle(event: str) -> None:
        tasks.add(trio.lowlevel.current_task() if on_trio else asyncio.current_task())
        await checkpoint()

    async with draining(bus, concurrency=1) as drainer:
        for number in range(3):
            drainer.submit(unit(bus, str(number)), success=True)
        await wait_all_tasks_blocked()
        drainer.submit(unit(bus, "after a pause"), success=True)

    assert len(tasks) == 4


async def test_units_that_have_been_drained_keep_no_task() -> None:
    bus = EventBus(handler_timeout=None)  # on trio a time limit is a task, one for all units
    bus.subscribe(str, pause)

    async with draining(bus, concurrency=2) as drainer:
        await wait_all_tasks_blocked()
        before = len(get_running_tasks())
        for number in range(10):
            drainer.submit(unit(bus, str(number)), success=True)
        await wait_all_tasks_blocked()

        assert bus.stats.handled == 10
        assert len(get_running_tasks()) == before


async def test_a_unit_that_ends_makes_place_for_the_next_one_at_once(bus: EventBus) -> None:
    gates = {name: Event() for name in ("slow", "quick", "next")}
    begun = {name: Event() for name in gates}

    @bus.on(str)
    async def handle(event: str) -> None:
        begun[event].set()
        await gates[event].wait()

    async with draining(bus, concurrency=2) as drainer:
        for name in gates:
            drainer.submit(unit(bus, name), success=True)
        await wait_all_tasks_blocked()
        assert [event.is_set() for event in begun.values()] == [True, True, False]
        gates["quick"].set()
        await begun["next"].wait()
        for gate in gates.values():
            gate.set()


@pytest.mark.parametrize("success", [True, False])
async def test_submitting_decides_what_nobody_has_decided(bus: EventBus, success: bool) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, pause)

    async with draining(bus) as drainer:
        context = unit(bus, "undecided")
        drainer.submit(context, success=success)
        drainer.submit(unit(bus, "anyway", even_on_failure=True), success=success)
        assert context.closed is not success  # what has nothing to deliver is closed at once

    assert set(seen) == {"handled anyway", f"{'handled' if success else 'discarded'} undecided"}
    assert context.closed


async def test_a_drain_sees_no_context_variables_of_whoever_submits(bus: EventBus) -> None:
    request: ContextVar[str] = ContextVar("request", default="none")
    seen: list[str] = []

    class Watcher(Observer):
        def discarded(self, deliveries: Sequence[Delivery]) -> None:
            seen.append(f"drain {request.get()}")

    @bus.on(int)
    async def handle(event: int) -> None:
        seen.append(f"handler {request.get()}")

    bus.observe(Watcher())
    subscription = bus.subscribe(str, pause)
    async with draining(bus) as drainer:
        request.set("mine")
        drainer.submit(unit(bus, "cancelled", 1), success=True)
        subscription.cancel()

    assert seen == ["drain none", "handler mine"]


async def test_ten_thousand_units_are_all_delivered(bus: EventBus) -> None:
    handled: list[object] = []

    @bus.on(int)
    async def handle(event: int) -> None:
        handled.append(event)
        if event % 100 == 0:
            await checkpoint()

    async with draining(bus, max_pending=1) as drainer:
        for number in range(10_000):
            drainer.submit(unit(bus, number), success=True)

    assert sorted(handled, key=hash) == list(range(10_000))
    assert bus.stats.handled == 10_000
    assert_settled(bus)


# When too much waits.


async def test_it_is_full_when_as_many_deliveries_wait_as_may_those_that_run_not_counted(
    bus: EventBus,
) -> None:
    gate = Gate(bus)
    bus.subscribe(str, pause)

    async with draining(bus, concurrency=1, max_pending=4) as drainer:
        for number in range(2):
            drainer.submit(unit(bus, str(number)), success=True)
        assert not drainer.full  # one unit of two deliveries runs, one waits
        drainer.submit(unit(bus, "2"), success=True)
        assert drainer.full
        drainer.submit(unit(bus, "taken nevertheless"), success=True)
        gate.open.set()

    assert not drainer.full
    assert len(gate.left) == 4


async def test_without_a_limit_it_is_never_full(bus: EventBus) -> None:
    gate = Gate(bus)

    async with draining(bus, concurrency=1, max_pending=None) as drainer:
        for number in range(500):
            drainer.submit(unit(bus, str(number)), success=True)
        assert not drainer.full
        gate.open.set()


async def test_whoever_waits_for_room_goes_on_when_there_is_some(bus: EventBus) -> None:
    gates = {"running": Event(), "waiting": Event()}
    answers: list[bool] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        await gates[event].wait()

    async def wait(drainer: Drainer) -> None:
        answers.append(await drainer.wait_for_room(math.inf))

    async with draining(bus, concurrency=1, max_pending=1) as drainer:
        for name in gates:
            drainer.submit(unit(bus, name), success=True)
        async with create_task_group() as tasks:
            tasks.start_soon(wait, drainer)
            tasks.start_soon(wait, drainer)
            await wait_all_tasks_blocked()
            assert (answers, bus.stats.held) == ([], 2)
            gates["running"].set()
        assert answers == [True, True]
        assert (bus.stats.held, bus.stats.refused) == (0, 0)
        gates["waiting"].set()


@virtual_time
async def test_whoever_waits_for_room_in_vain_is_told_so_when_the_time_is_over(
    bus: EventBus,
) -> None:
    gate = Gate(bus)

    async with draining(bus, concurrency=1, max_pending=1) as drainer:
        for number in range(2):
            drainer.submit(unit(bus, str(number)), success=True)
        begun = anyio.current_time()
        assert not await drainer.wait_for_room(5)
        assert anyio.current_time() - begun == 5
        assert (bus.stats.held, bus.stats.refused) == (0, 1)
        gate.open.set()


async def test_whoever_is_cancelled_while_waiting_for_room_is_no_longer_counted(
    bus: EventBus,
) -> None:
    gate = Gate(bus)

    async with draining(bus, concurrency=1, max_pending=1) as drainer:
        for number in range(2):
            drainer.submit(unit(bus, str(number)), success=True)
        async with create_task_group() as tasks:
            tasks.start_soon(drainer.wait_for_room, math.inf)
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert (bus.stats.held, bus.stats.refused) == (0, 0)
        gate.open.set()


async def test_closing_lets_those_go_on_who_wait_for_room(bus: EventBus) -> None:
    Gate(bus)
    answers: list[bool] = []

    async def wait(drainer: Drainer) -> None:
        answers.append(await drainer.wait_for_room(math.inf))

    async with draining(bus, concurrency=1, max_pending=1) as drainer:
        for number in range(2):
            drainer.submit(unit(bus, str(number)), success=True)
        async with create_task_group() as tasks:
            tasks.start_soon(wait, drainer)
            await wait_all_tasks_blocked()
            await drainer.close(0.01)

    assert answers == [True]


# The end.


async def test_closing_waits_for_everything_and_for_what_handlers_publish(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    gate = Gate(bus)
    seen = witnessed(bus)

    @bus.on(int)
    async def follow_up(event: int) -> None:
        bus.publish("follow-up")

    async with draining(bus, concurrency=1) as drainer:
        drainer.submit(unit(bus, "running", 1), success=True)
        drainer.submit(unit(bus, "waiting"), success=True)
        await wait_all_tasks_blocked()
        async with create_task_group() as tasks:
            tasks.start_soon(drainer.close, math.inf)
            await wait_all_tasks_blocked()
            drainer.submit(unit(bus, "ended during the close"), success=True)
            gate.open.set()

    assert seen == [
        "handled running",
        "handled 1",
        "handled follow-up",
        "handled waiting",
        "handled ended during the close",
    ]
    name = f"{follow_up.__module__}:{follow_up.__qualname__}"
    (begin,) = lines(caplog, "delivering before shutdown")
    assert begin.levelno == logging.INFO
    assert begin.getMessage() == (
        f"delivering before shutdown: bus=default left=3 handlers=gate x2, {name} x1"
    )
    (end,) = lines(caplog, "eventkit has stopped")
    assert end.levelno == logging.INFO
    assert end.getMessage() == (
        "eventkit has stopped: bus=default left=0 handlers= still_running= published=5 "
        "accepted=5 handled=5 failed=0 discarded=0 undelivered=0 requeued=0 pending=0 "
        "running=0 "
        "units_waiting=0 units_draining=0 held=0 refused=0"
    )


async def test_with_nothing_to_deliver_one_line_is_logged(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")

    async with draining(bus) as drainer:
        await drainer.close(math.inf)
        await drainer.close(math.inf)  # the second time does nothing

    assert lines(caplog, "delivering") == []
    assert len(lines(caplog, "eventkit has stopped")) == 1


@virtual_time
async def test_at_the_deadline_what_runs_is_cancelled_and_what_waits_is_told_to_observers(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    told: list[Delivery] = []

    class Rescuer(Observer):
        def undelivered(self, deliveries: Sequence[Delivery]) -> None:
            told.extend(deliveries)

    bus.observe(Rescuer())
    bus.subscribe(float, sleep, name="sleeps")

    async with draining(bus, concurrency=2) as drainer:
        for seconds in (9.0, 11.0, 12.0, 13.0):
            drainer.submit(unit(bus, seconds), success=True)
        begun = anyio.current_time()
        await drainer.close(10)
        assert anyio.current_time() - begun == 10

    assert sorted((delivery.event, delivery.handler) for delivery in told) == [
        (11.0, "sleeps"),
        (12.0, "sleeps"),
        (13.0, "sleeps"),
    ]
    assert (bus.stats.handled, bus.stats.undelivered) == (1, 3)
    assert_settled(bus)
    (end,) = lines(caplog, "eventkit has stopped")
    assert end.levelno == logging.ERROR
    assert "left=3 handlers=sleeps x3 still_running= " in end.getMessage()


@virtual_time
async def test_handlers_that_are_cancelled_at_the_deadline_have_a_moment_for_their_clean_up(
    bus: EventBus,
) -> None:
    cleaned_up: list[float] = []

    @bus.on(float)
    async def handle(event: float) -> None:
        try:
            await sleep_forever()
        finally:
            with CancelScope(shield=True):
                await sleep(event)
                cleaned_up.append(event)

    async with draining(bus) as drainer:
        for seconds in (0.25, 3.0):
            drainer.submit(unit(bus, seconds), success=True)
        begun = anyio.current_time()
        await drainer.close(10)
        assert anyio.current_time() - begun == 10.5
        assert cleaned_up == [0.25]
        assert drainer.stuck

    assert cleaned_up == [0.25, 3.0]
    assert not drainer.stuck
    assert bus.stats.undelivered == 2
    assert_settled(bus)


@virtual_time
async def test_a_handler_that_swallows_its_cancellation_does_not_hold_the_close(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    released = Event()

    @bus.on(str)
    async def stubborn(event: str) -> None:
        while not released.is_set():
            try:
                await sleep_forever()
            except BaseException:  # what no handler should do
                with CancelScope(shield=True):
                    await released.wait()

    async with draining(bus) as drainer:
        drainer.submit(unit(bus, "event"), success=True)
        await drainer.close(1)
        assert drainer.stuck
        released.set()

    (end,) = lines(caplog, "eventkit has stopped")
    name = f"{stubborn.__module__}:{stubborn.__qualname__}"
    assert f"left=1 handlers={name} x1 still_running={name} x1 " in end.getMessage()
    assert bus.stats.handled == 1  # it ended as if nothing had happened
    assert_settled(bus)


async def test_a_plain_def_that_hangs_is_named_in_the_log_and_left_to_itself(
    bus: EventBus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventkit._core.drainer.GRACE_SECONDS", 0.01)
    release = threading.Event()
    begun = Event()

    @bus.on(str)
    def hang(event: str) -> None:
        anyio.from_thread.run_sync(begun.set)
        release.wait()

    async with draining(bus, concurrency=1) as drainer:
        drainer.submit(unit(bus, "event"), success=True)
        drainer.submit(unit(bus, "waiting"), success=True)
        await begun.wait()
        await drainer.close(0.01)
        assert drainer.stuck
        (end,) = lines(caplog, "eventkit has stopped")
        release.set()

    name = f"{hang.__module__}:{hang.__qualname__}"
    assert f"left=2 handlers={name} x2 still_running={name} x1 " in end.getMessage()
    assert (bus.stats.undelivered + bus.stats.handled) == 2
    assert_settled(bus)


async def test_what_is_submitted_after_the_close_is_undelivered(bus: EventBus) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, pause)

    async with draining(bus) as drainer:
        await drainer.close(math.inf)
        drainer.submit(unit(bus, "late"), success=True)
        drainer.submit(unit(bus, "failed"), success=False)

    assert seen == ["undelivered late", "discarded failed"]
    assert_settled(bus)


# What handlers had published when the time is over.


@virtual_time
@pytest.mark.parametrize(
    ("numbers", "ends", "undelivered"),
    [
        pytest.param((1,), "well", 2, id="well"),
        pytest.param((1, 2, 3), "well", 4, id="three"),
        pytest.param((1,), "never", 2, id="never"),
        pytest.param((1,), "badly", 1, id="badly"),
        pytest.param((), "well", 1, id="nothing"),
    ],
)
async def test_the_last_line_says_as_many_are_left_as_are_undelivered(
    bus: EventBus,
    caplog: pytest.LogCaptureFixture,
    numbers: tuple[int, ...],
    ends: str,
    undelivered: int,
) -> None:
    bus.report_failure = ignore

    @bus.on(str)
    async def publishes(event: str) -> None:
        for number in numbers:
            async with bus.context():
                bus.publish(number)
        if ends == "badly":
            raise LookupError
        if ends == "never":
            await sleep_forever()

    @bus.on(str)
    async def sleeps(event: str) -> None:
        await sleep_forever()

    @bus.on(int)
    async def follows(event: int) -> None: ...

    async with draining(bus) as drainer:
        drainer.submit(unit(bus, "event"), success=True)
        await drainer.close(1)

    (end,) = lines(caplog, "eventkit has stopped")
    facts = dict(fact.split("=") for fact in re.findall(r"\w+=\d+", end.getMessage()))
    assert (facts["left"], facts["undelivered"]) == (f"{undelivered}", f"{undelivered}")
    assert bus.stats.undelivered == undelivered
    assert_settled(bus)


# Units that have begun and not ended when it closes.


async def test_closing_waits_for_expected_units_that_have_something_pending(bus: EventBus) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, pause)

    async with draining(bus) as drainer:
        idle, busy = unit(bus), unit(bus, "published")
        for context in (idle, busy):
            drainer.expect(context)
        async with create_task_group() as tasks:
            tasks.start_soon(drainer.close, math.inf)
            await wait_all_tasks_blocked()
            assert not busy.closed
            drainer.submit(busy, success=True)

    assert seen == ["handled published"]
    assert idle.closed


async def discard(context: Unit) -> None:
    context.discard()


async def discard_in_a_thread(context: Unit) -> None:
    await to_thread.run_sync(context.discard)


async def drain(context: Unit) -> None:
    await context_of(context).drain()


@pytest.mark.parametrize("empty", [discard, discard_in_a_thread, drain])
async def test_closing_waits_no_longer_for_a_unit_that_has_nothing_pending_any_more_and_goes_on(
    bus: EventBus, empty: Callable[[Unit], Awaitable[None]]
) -> None:
    bus.subscribe(str, pause)
    closed = Event()

    async def close(drainer: Drainer) -> None:
        await drainer.close(math.inf)
        closed.set()

    waited = goes_on = None
    async with create_task_group() as tasks:
        drainer = Drainer(state_of(bus), tasks, concurrency=1, max_pending=None)
        context = unit(bus, "published")
        drainer.expect(context)
        tasks.start_soon(close, drainer)
        await wait_all_tasks_blocked()
        waited = not closed.is_set()
        await empty(context)
        await wait_all_tasks_blocked()
        goes_on = not closed.is_set()
        drainer.submit(context, success=False)

    assert (waited, goes_on) == (True, False)
    assert_settled(bus)


async def test_expected_units_that_are_forgotten_are_not_waited_for(bus: EventBus) -> None:
    bus.subscribe(str, pause)

    async with draining(bus) as drainer:
        context = unit(bus, "published")
        drainer.expect(context)
        async with create_task_group() as tasks:
            tasks.start_soon(drainer.close, math.inf)
            await wait_all_tasks_blocked()
            drainer.forget(context)

    context.discard()


async def test_at_the_deadline_expected_units_lose_what_nobody_has_released(bus: EventBus) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, pause)

    async with draining(bus) as drainer:
        context = unit_of(bus)
        with entered(context):
            bus.publish("released")
            context.release()
            bus.publish("undecided")
        drainer.expect(context)
        await drainer.close(0.01)
        drainer.submit(context, success=True)

    assert seen == ["discarded undecided", "undelivered released"]
    assert_settled(bus)


# Nobody can break it.


def exit_the_process(_: object = None) -> None:
    raise SystemExit(3)


def interrupt(_: object = None) -> None:
    raise KeyboardInterrupt


def fail(_: object = None) -> None:
    raise RuntimeError("no mail today")


async def leave_a_scope_open(_: int) -> None:
    CancelScope().__enter__()


async def leave_a_task_group_open(_: int) -> None:
    await create_task_group().__aenter__()


@pytest.mark.parametrize("handler_timeout", [30, None])
@pytest.mark.parametrize("handlers", [1, 2])
@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("leave_open", [leave_a_scope_open, leave_a_task_group_open])
async def test_a_handler_that_leaves_a_scope_open_ends_nobody_elses_deliveries(
    leave_open: Callable[[int], Awaitable[None]],
    concurrency: int,
    handlers: int,
    handler_timeout: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = EventBus(handler_timeout=handler_timeout)
    handled: list[str] = []
    for _ in range(handlers):
        bus.subscribe(int, partial(leave_open))

    @bus.on(str)
    async def handle(event: str) -> None:
        await checkpoint()
        handled.append(event)

    async with draining(bus, concurrency=concurrency) as drainer:
        for event in (1, "a", 2, "b"):
            drainer.submit(unit(bus, event), success=True)

    assert sorted(handled) == ["a", "b"]
    assert len(lines(caplog, "a drain was ended: bus=default")) == 2
    assert_settled(bus)


@pytest.mark.usefixtures("on_asyncio")
async def test_a_handler_that_cancels_its_own_task_ends_nobody_elses_deliveries(
    bus: EventBus,
) -> None:
    handled: list[str] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        await checkpoint()
        if event == "bad":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await checkpoint()
        handled.append(event)

    async with draining(bus, concurrency=1) as drainer:
        for event in ("bad", "a", "bad", "b"):
            drainer.submit(unit(bus, event), success=True)

    assert handled == ["a", "b"]
    assert bus.stats.undelivered == 2
    assert_settled(bus)


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("late", [False, True])
async def test_no_handler_is_blamed_for_a_cancellation_that_the_one_before_asked_for(
    late: bool,
) -> None:
    bus = EventBus(handler_timeout=0.01)
    failed: list[Exception] = []

    def note(delivery: Delivery, error: Exception) -> None:
        failed.append(error)

    bus.report_failure = note

    @bus.on(str)
    async def handle(event: str) -> None:
        with CancelScope() as scope:
            scope.cancel()
            await checkpoint()
        if event == "bad":
            if late:
                with suppress(asyncio.CancelledError):
                    await sleep_forever()
            task = asyncio.current_task()
            assert task is not None
            task.cancel()  # no `await` follows in which it would receive it

    async with draining(bus, concurrency=1) as drainer:
        drainer.submit(unit(bus, "bad", "a", "bad"), success=True)

    assert bus.stats.handled == 3
    assert failed == []
    assert_settled(bus)


@pytest.mark.usefixtures("on_asyncio")
async def test_a_unit_whose_task_is_cancelled_before_its_first_step_is_drained_by_another(
    bus: EventBus,
) -> None:
    bus.subscribe(str, pause)

    def cancel_drains() -> int:
        tasks = [each for each in asyncio.all_tasks() if each.get_name().startswith("eventkit dr")]
        return sum(task.cancel() for task in tasks)

    async with draining(bus, concurrency=1) as drainer:
        drainer.submit(unit(bus, "a"), success=True)
        assert cancel_drains() == 1
        drainer.submit(unit(bus, "b"), success=True)

    assert bus.stats.handled == 2
    assert_settled(bus)


@virtual_time
async def test_each_unit_has_its_whole_time_whenever_the_others_have_begun() -> None:
    ended: list[float] = []

    def note(delivery: Delivery, error: Exception) -> None:
        ended.append(anyio.current_time() - begun)

    bus = EventBus(handler_timeout=10)
    bus.report_failure = note

    @bus.on(int)
    async def handle(event: int) -> None:
        await sleep(9 if event == 2 else 11)

    async with draining(bus, concurrency=3) as drainer:
        begun = anyio.current_time()
        for number in range(3):
            drainer.submit(unit(bus, number + 1), success=True)
            await sleep(4)

    assert ended == [10, 18]
    assert bus.stats.handled == 1


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("events", [1, 2])
async def test_handlers_wait_for_each_other_after_tasks_were_cancelled_before_their_first_step(
    bus: EventBus, events: int
) -> None:
    begun = [[Event() for _ in range(4)] for _ in range(events)]

    def cancel_the_others(first: asyncio.Task[Any] | None) -> None:
        for task in asyncio.all_tasks():
            if task.get_name().startswith("eventkit drains") and task is not first:
                task.cancel()
                cancelled.append(task)

    async def handle(event: int, number: int) -> None:
        begun[event][number].set()
        if event == 0 and number == 0:
            asyncio.get_running_loop().call_soon(cancel_the_others, asyncio.current_task())
        for each in begun[event]:
            await each.wait()

    for number in range(4):
        bus.subscribe(int, partial(handle, number=number))
    cancelled: list[asyncio.Task[Any]] = []

    with fail_after(5):
        async with draining(bus, concurrency=1) as drainer:
            drainer.submit(unit(bus, *range(events)), success=True)

    assert len(cancelled) == 2
    assert bus.stats.handled == 4 * events
    assert_settled(bus)


async def test_closing_does_not_wait_for_a_task_that_drains_a_unit_by_itself(
    bus: EventBus,
) -> None:
    gate = Gate(bus)
    async with create_task_group() as tasks:
        context = unit(bus, "drained elsewhere", "lost")
        tasks.start_soon(context_of(context).drain)
        await wait_all_tasks_blocked()
        drainer = Drainer(state_of(bus), tasks, concurrency=1, max_pending=None)
        drainer.submit(context, success=True)
        await wait_all_tasks_blocked()

        await drainer.close(0)

        assert (bus.stats.units_draining, bus.stats.running) == (0, 1)
        gate.open.set()

    assert gate.left == ["drained elsewhere"]
    assert bus.stats.undelivered == 1
    assert_settled(bus)


@pytest.mark.parametrize(
    ("place", "action"),
    [
        *product(["handler", "thread", "before", "after"], [exit_the_process, interrupt, fail]),
        ("reporter", fail),
    ],
)
async def test_whatever_user_code_raises_others_are_delivered(
    bus: EventBus, action: Callable[[], None], place: str
) -> None:
    handled: list[str] = []

    def do(event: str, where: str) -> None:
        if event == "bad" and where == place:
            action()

    class Breaker(Observer):
        def delivery(self, delivery: Delivery) -> Any:
            do(str(delivery.event), "before")
            return self

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            do("bad" if len(handled) == 1 else "good", "after")

    def in_thread(event: str) -> None:
        do(event, "thread")

    @bus.on(str)
    async def handle(event: str) -> None:
        handled.append(event)
        await checkpoint()
        do(event, "handler")
        if place == "reporter":
            raise ValueError

    def report(delivery: Delivery, error: Exception) -> None:
        do(str(delivery.event), "reporter")

    bus.report_failure = report
    bus.observe(Breaker())
    if place == "thread":
        bus.subscribe(str, in_thread, name="thread")

    async with draining(bus, concurrency=1) as drainer:
        drainer.submit(unit(bus, "bad"), success=True)
        drainer.submit(unit(bus, "good"), success=True)

    assert handled[-1] == "good"
    assert_settled(bus)


async def test_a_handler_that_ends_the_process_is_logged(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    bus.subscribe(str, exit_the_process, thread=False)

    async with draining(bus) as drainer:
        drainer.submit(unit(bus, "event", "next"), success=True)

    (line,) = lines(caplog, "a drain was ended: bus=default")
    assert line.levelno == logging.CRITICAL
    assert line.exc_info is not None
    assert line.exc_info[0] is SystemExit
    assert bus.stats.undelivered == 2


@pytest.mark.parametrize("action", [exit_the_process, fail])
async def test_an_observer_that_fails_at_the_end_does_not_keep_others_from_being_told(
    bus: EventBus, action: Callable[[], None]
) -> None:
    gate = Gate(bus)

    class Breaker(Observer):
        def undelivered(self, deliveries: Sequence[Delivery]) -> None:
            action()

    bus.observe(Breaker())
    async with draining(bus, concurrency=1) as drainer:
        for number in range(3):
            drainer.submit(unit(bus, str(number)), success=True)
        await drainer.close(0.01)
        drainer.submit(unit(bus, "late"), success=True)

    assert gate.left == []
    assert bus.stats.undelivered == 4
    assert_settled(bus)


# Cancellation.


async def test_when_the_owner_is_cancelled_everything_is_undelivered(bus: EventBus) -> None:
    gate = Gate(bus)
    seen = witnessed(bus)

    async with create_task_group() as owner:
        drainer = Drainer(state_of(bus), owner, concurrency=1, max_pending=None)
        for number in range(3):
            drainer.submit(unit(bus, str(number)), success=True)
        await wait_all_tasks_blocked()
        owner.cancel_scope.cancel()
        with pytest.raises(anyio.get_cancelled_exc_class()):
            await drainer.close(math.inf)

    assert gate.entered == ["0"]
    assert sorted(seen) == ["undelivered 0", "undelivered 1", "undelivered 2"]
    assert_settled(bus)


@pytest.mark.parametrize("steps", range(12))
async def test_wherever_the_owner_is_cancelled_every_delivery_is_accounted_for(
    bus: EventBus, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")

    @bus.on(str)
    async def handle(event: str) -> None:
        await checkpoint()
        if event == "first":
            bus.publish("follow-up")

    async def own(scope: CancelScope) -> None:
        async with create_task_group() as tasks:
            drainer = Drainer(state_of(bus), tasks, concurrency=1, max_pending=None)
            try:
                drainer.submit(unit(bus, "first", "second"), success=True)
                drainer.submit(unit(bus, "third"), success=True)
                await checkpoint()
                drainer.submit(unit(bus, "fourth"), success=True)
                scope.shield = False
            finally:
                await drainer.close(math.inf)

    with CancelScope() as scope:
        async with create_task_group() as tasks:
            tasks.start_soon(own, scope)
            for _ in range(steps):
                await checkpoint()
            scope.cancel()

    assert_settled(bus)
    assert len(lines(caplog, "eventkit has stopped")) == (1 if bus.stats.accepted else 0)
    async with draining(bus) as drainer:
        before = bus.stats.handled
        drainer.submit(unit(bus, "next"), success=True)
    assert bus.stats.handled == before + 1


@pytest.mark.parametrize("steps", range(5))
async def test_what_is_submitted_after_its_owner_was_cancelled_is_undelivered(
    bus: EventBus, steps: int
) -> None:
    bus.subscribe(str, pause)

    async with create_task_group() as owner:
        drainer = Drainer(state_of(bus), owner, concurrency=1, max_pending=None)
        drainer.submit(unit(bus, "before"), success=True)
        await wait_all_tasks_blocked()
        owner.cancel_scope.cancel()
        with CancelScope(shield=True):
            for _ in range(steps):
                await checkpoint()
            drainer.submit(unit(bus, "after"), success=True)
            await wait_all_tasks_blocked()
            await drainer.close(math.inf)

    assert (bus.stats.handled, bus.stats.undelivered) == (1, 1)
    assert_settled(bus)


def test_the_counters_are_part_of_the_public_statistics(bus: EventBus) -> None:
    stats: Stats = bus.stats

    assert (stats.units_waiting, stats.units_draining, stats.held, stats.refused) == (0, 0, 0, 0)


def test_one_bus_is_drained_on_one_event_loop_after_the_other(bus: EventBus) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, pause)

    async def drain(event: str) -> None:
        async with draining(bus) as drainer:
            drainer.submit(unit(bus, event), success=True)

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(partial(drain, backend), backend=backend)

    assert seen == ["handled asyncio", "handled trio", "handled asyncio"]


async def test_a_thread_that_discards_after_the_event_loop_has_ended_is_not_told_of_it(
    bus: EventBus, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    bus.subscribe(str, pause)

    async def main() -> Unit:
        late = unit(bus, "late")
        async with create_task_group() as tasks:
            drainer = Drainer(state_of(bus), tasks, concurrency=1, max_pending=None)
            drainer.expect(late)
            await drainer.close(0)
        return late

    def run() -> None:
        late = anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])
        context_of(late).discard()

    await to_thread.run_sync(run)

    assert_settled(bus)


@pytest.mark.usefixtures("on_asyncio")
async def test_a_guard_that_is_cancelled_again_and_again_leaves_nothing_behind(
    bus: EventBus,
) -> None:
    go_on = Event()

    @bus.on(str)
    async def handle(event: str) -> None:
        with CancelScope(shield=True):
            await go_on.wait()

    async def live() -> None:
        async with create_task_group() as tasks:
            drainer = Drainer(state_of(bus), tasks, concurrency=1, max_pending=None)
            drainer.submit(unit(bus, "a"), success=True)
            await sleep_forever()

    life = asyncio.ensure_future(live())
    await wait_all_tasks_blocked()
    (guard,) = (task for task in asyncio.all_tasks() if "Drainer._guard" in repr(task))
    for _ in range(2):
        guard.cancel()
        await wait_all_tasks_blocked()
    go_on.set()
    await asyncio.wait([life])
    await wait_all_tasks_blocked()

    assert not state_of(bus).tally.drainers
    assert_settled(bus)


@pytest.mark.usefixtures("on_asyncio")
async def test_a_close_that_is_cancelled_again_and_again_still_says_what_is_left(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    go_on = Event()

    @bus.on(str)
    async def handle(event: str) -> None:
        with CancelScope(shield=True):
            await go_on.wait()

    async with create_task_group() as tasks:
        drainer = Drainer(state_of(bus), tasks, concurrency=1, max_pending=None)
        drainer.submit(unit(bus, "a"), success=True)
        closing = asyncio.ensure_future(drainer.close(math.inf))
        await wait_all_tasks_blocked()
        for _ in range(2):
            closing.cancel()
            await wait_all_tasks_blocked()
        go_on.set()

    assert len(lines(caplog, "eventkit has stopped: bus=default left=1")) == 1
    assert not state_of(bus).losses


async def test_two_drainers_that_close_at_once_both_say_what_was_undelivered_meanwhile(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")

    @bus.on(str)
    async def handle(event: str) -> None:
        await sleep_forever()

    async with create_task_group() as tasks, create_task_group() as closing:
        drainers = [
            Drainer(state_of(bus), tasks, concurrency=1, max_pending=None) for _ in range(2)
        ]
        for drainer in drainers:
            drainer.submit(unit(bus, "a"), success=True)
        await wait_all_tasks_blocked()
        for drainer in drainers:
            closing.start_soon(drainer.close, 0)

    told = lines(caplog, "eventkit has stopped: bus=default")
    assert len(told) == 2
    assert not lines(caplog, "eventkit has stopped: bus=default left=0")
    assert bus.stats.undelivered == 2
    assert not state_of(bus).losses
    assert_settled(bus)


# What an event loop that starts no tasks leaves.


@pytest.fixture
def startable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A task of a drainer starts for each item that it takes from here; without one it fails."""
    left: list[str] = []

    class Task(asyncio.Task[None]):
        def __init__(self, *args: Any, **options: Any) -> None:
            if not left:
                raise RuntimeError("no more tasks")
            left.pop()
            super().__init__(*args, **options)

    def start_soon(nursery: trio.Nursery, function: Any, *args: Any, name: object = None) -> None:
        if str(name).startswith("eventkit drains"):
            if not left:
                raise RuntimeError("no more tasks")
            left.pop()
        starts(nursery, function, *args, name=name)

    starts = trio.Nursery.start_soon
    monkeypatch.setattr(trio.Nursery, "start_soon", start_soon)
    monkeypatch.setattr(
        native_asyncio,
        "asyncio",
        SimpleNamespace(Task=Task, get_running_loop=asyncio.get_running_loop),
    )
    return left


@pytest.mark.parametrize("units", [1, 3, 500])
async def test_a_unit_whose_task_cannot_be_started_is_undelivered_and_holds_nothing_up(
    bus: EventBus, startable: list[str], caplog: pytest.LogCaptureFixture, units: int
) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, pause)

    with fail_after(5):
        async with create_task_group() as tasks:
            drainer = Drainer(state_of(bus), tasks, concurrency=1, max_pending=None)
            startable.append("the first")
            for number in range(units):
                drainer.submit(unit(bus, str(number)), success=True)
            await wait_all_tasks_blocked()

            assert (bus.stats.units_draining, bus.stats.units_waiting) == (0, 0)
            startable.append("the last")
            drainer.submit(unit(bus, "last"), success=True)
            await drainer.close(math.inf)

    assert [each for each in seen if each.startswith("handled")] == ["handled 0", "handled last"]
    assert len(lines(caplog, "a drain was ended")) == units - 1
    assert bus.stats.undelivered == units - 1
    assert_settled(bus)


async def test_a_handler_that_waits_is_ended_where_no_task_begins_its_siblings(
    bus: EventBus, startable: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[str] = []

    async def wait(_: str) -> None:
        try:
            await sleep_forever()
        finally:
            ends.append("ended")

    for number in range(3):
        bus.subscribe(str, partial(wait), name=str(number))

    with fail_after(5):
        async with draining(bus) as drainer:
            startable.append("the first worker")
            drainer.submit(unit(bus, "event"), success=True)

    assert ends == ["ended"]
    assert bus.stats.undelivered == 3
    assert len(lines(caplog, "a drain was ended")) == 1
    assert_settled(bus)
