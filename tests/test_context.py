"""Units of work: what is delivered, what is dropped, when, and that nothing is ever lost."""

import asyncio
import gc
import logging
import re
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import ExitStack, aclosing, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, from_thread, to_thread, wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from eventkit import (
    Delivery,
    DispatchError,
    DrainInProgressError,
    DrainReport,
    EventBus,
    EventContext,
    EventContextClosedError,
    EventContextFullError,
    current_delivery,
)
from tests.witness import (
    assert_settled,
    calling,
    freed_by_anyio,
    ignore,
    nothing,
    witnessed,
)

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


class Gate:
    """Holds a handler up until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self.opened = anyio.Event()

    async def __call__(self, event: object) -> None:
        self.reached.set()
        await self.opened.wait()


# The outermost unit


async def test_a_clean_exit_delivers_after_the_block(bus: EventBus, seen: list[str]) -> None:
    async with bus.context() as unit:
        bus.publish("a")
        await wait_all_tasks_blocked()
        assert seen == []
        assert not unit.closed

    assert seen == ["handled a"]
    assert unit.closed


async def test_an_exception_discards_and_passes_on(bus: EventBus, seen: list[str]) -> None:
    unit = bus.context()

    async def fail() -> None:
        async with unit:
            bus.publish("a", "b")
            raise LookupError

    with pytest.raises(LookupError):
        await fail()

    assert seen == ["discarded a", "discarded b"]
    assert unit.closed


async def test_a_failing_handler_stops_neither_the_drain_nor_the_unit(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context():
        bus.publish("bad", "a")

    assert seen == ["failed bad", "handled a"]


async def test_what_is_published_even_on_failure_is_delivered_although_the_unit_fails(
    bus: EventBus, seen: list[str]
) -> None:
    with suppress(LookupError):
        async with bus.context():
            bus.publish("a")
            bus.publish("login failed", even_on_failure=True)
            bus.publish("b")
            raise LookupError

    assert seen == ["discarded a", "discarded b", "handled login failed"]


async def test_what_is_published_even_on_failure_is_delivered_in_its_place_on_success(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context():
        bus.publish("a")
        bus.publish("b", even_on_failure=True)
        bus.publish("c")

    assert seen == ["handled a", "handled b", "handled c"]


async def test_what_was_released_is_delivered_although_the_unit_fails(
    bus: EventBus, seen: list[str]
) -> None:
    with suppress(LookupError):
        async with bus.context() as unit:
            bus.publish("a")
            unit.release()
            bus.publish("b")
            raise LookupError

    assert seen == ["discarded b", "handled a"]


async def test_what_was_discarded_is_not_delivered_although_the_unit_succeeds(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context() as unit:
        bus.publish("a")
        unit.discard()
        bus.publish("b")
        assert seen == ["discarded a"]

    assert seen == ["discarded a", "handled b"]


async def test_discard_leaves_what_is_released_or_even_on_failure(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context() as unit:
        bus.publish("a")
        unit.release()
        bus.publish("b", even_on_failure=True)
        bus.publish("c")
        unit.discard()
        unit.discard()

        assert [delivery.event for delivery in unit.pending] == ["a", "b"]

    assert seen == ["discarded c", "handled a", "handled b"]


async def test_release_delivers_nothing_by_itself(bus: EventBus, seen: list[str]) -> None:
    async with bus.context() as unit:
        bus.publish("a")
        unit.release()
        unit.release()
        await wait_all_tasks_blocked()

        assert seen == []

    assert seen == ["handled a"]


async def test_pending_lists_the_deliveries_that_wait_released_ones_first(
    bus: EventBus, seen: list[str]
) -> None:
    bus.subscribe(str, nothing, name="second", thread=False)
    async with bus.context() as unit:
        bus.publish("a")
        unit.release()
        bus.publish("b")

        assert [str(d).rpartition(".")[2] for d in unit.pending[1::2]] == ["str -> second"] * 2
        assert [delivery.event for delivery in unit.pending] == ["a", "a", "b", "b"]
        assert bus.stats.pending == len(unit.pending)

    assert unit.pending == ()


async def test_events_without_a_handler_are_counted_and_forgotten() -> None:
    bus = EventBus(max_events=1)
    async with bus.context() as unit:
        bus.publish("a", "b", "c")

        assert unit.pending == ()
    assert (bus.stats.published, bus.stats.accepted) == (3, 0)


async def test_publish_without_events_does_nothing(bus: EventBus, seen: list[str]) -> None:
    async with bus.context():
        bus.publish()

    assert seen == []
    assert bus.stats.published == 0


async def test_publish_accepts_all_or_raises() -> None:
    bus = EventBus(max_events=2)
    seen = witnessed(bus)
    bus.subscribe(str, nothing, thread=False)

    async with bus.context():
        bus.publish("a")
        with pytest.raises(EventContextFullError):
            bus.publish("b", "c")
        with pytest.raises(TypeError):
            bus.publish("d", str)
        assert (bus.stats.published, bus.stats.accepted) == (1, 1)
        bus.publish("e")

    assert seen == ["handled a", "handled e"]


async def test_max_events_counts_what_waits_in_nested_units_and_handlers_too() -> None:
    bus = EventBus(max_events=2)
    seen = witnessed(bus)
    refused: list[str] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        if event == "a":
            bus.publish("b", "c")
            with pytest.raises(EventContextFullError) as error:
                bus.publish("d")
            refused.append(str(error.value))

    async with bus.context() as unit:
        async with bus.context():
            bus.publish("x", "y")
            with pytest.raises(EventContextFullError):
                unit.publish("z")
            with suppress(LookupError):
                async with bus.context():
                    with pytest.raises(EventContextFullError):
                        bus.publish("z")
                    raise LookupError
        with pytest.raises(EventContextFullError):
            bus.publish("z")
        unit.discard()
        bus.publish("a")

    assert seen[2:] == ["handled a", "handled b", "handled c"]
    assert len(refused) == 1


async def test_a_drain_makes_room_in_a_full_unit() -> None:
    bus = EventBus(max_events=1)
    seen = witnessed(bus)
    bus.subscribe(str, nothing, thread=False)

    async with bus.context() as unit:
        for event in "abc":
            bus.publish(event)
            await unit.drain()

    assert seen == ["handled a", "handled b", "handled c"]


async def test_publish_captures_the_context_variables_of_its_moment(bus: EventBus) -> None:
    tenant: ContextVar[str] = ContextVar("tenant")
    told: list[str] = []
    bus.subscribe(int, calling(lambda: told.append(tenant.get())), thread=False)

    async with bus.context():
        for name in ("first", "second"):
            tenant.set(name)
            bus.publish(1)
        tenant.set("third")

    assert told == ["first", "second"]


# Draining midway


async def test_drain_delivers_now_what_was_published_so_far_and_all_that_it_causes(
    bus: EventBus, seen: list[str]
) -> None:
    bus.subscribe(int, calling(lambda: bus.publish("caused")), thread=False)

    async with bus.context() as unit:
        bus.publish(1)
        report = await unit.drain()
        assert seen == ["handled 1", "handled caused"]
        assert report.handled == 2
        bus.publish("a")

    assert seen[2:] == ["handled a"]


async def test_what_was_drained_stays_delivered_although_the_unit_fails(
    bus: EventBus, seen: list[str]
) -> None:
    with suppress(LookupError):
        async with bus.context() as unit:
            bus.publish("a")
            await unit.drain()
            bus.publish("b")
            raise LookupError

    assert seen == ["handled a", "discarded b"]


async def test_a_drain_reports_failures_and_returns_them(bus: EventBus, seen: list[str]) -> None:
    told: list[str] = []

    def tell(delivery: Delivery, error: Exception) -> None:
        told.append(f"{delivery.event}: {error!r}")

    bus.report_failure = tell
    async with bus.context() as unit:
        bus.publish("bad", "a", "bad too")
        report = await unit.drain()

    assert report.handled == 1
    assert [failure.delivery.event for failure in report.failures] == ["bad", "bad too"]
    assert told == ["bad: ValueError('bad')", "bad too: ValueError('bad too')"]
    with pytest.raises(DispatchError) as raised:
        report.raise_for_failures()
    assert raised.value.exceptions == tuple(failure.error for failure in report.failures)
    assert raised.value.message == "handlers failed for builtins.str"


async def test_a_drain_without_failures_raises_nothing() -> None:
    DrainReport(handled=1, failures=()).raise_for_failures()


async def test_draining_what_is_empty_or_over_does_nothing(bus: EventBus, seen: list[str]) -> None:
    async with bus.context() as unit:
        assert await unit.drain() == DrainReport(0, ())

    assert await unit.drain() == DrainReport(0, ())


async def test_what_is_published_to_the_unit_during_a_drain_waits(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(int, gate)

    async with bus.context() as unit:
        bus.publish(1)
        async with create_task_group() as tasks:
            tasks.start_soon(unit.drain)
            await gate.reached.wait()
            unit.publish("a")
            gate.opened.set()

        assert seen == ["handled 1"]
        assert [delivery.event for delivery in unit.pending] == ["a"]

    assert seen == ["handled 1", "handled a"]


async def test_discard_during_a_drain_drops_only_what_is_not_released(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(int, gate)

    async with bus.context() as unit, create_task_group() as tasks:
        bus.publish(1, "a")
        tasks.start_soon(unit.drain)
        await gate.reached.wait()
        unit.publish("b")
        unit.discard()
        gate.opened.set()

    assert seen == ["discarded b", "handled 1", "handled a"]


async def test_release_during_a_drain_adds_to_it(bus: EventBus, seen: list[str]) -> None:
    gate = Gate()
    bus.subscribe(int, gate)

    async with bus.context() as unit:
        bus.publish(1)
        async with create_task_group() as tasks:
            tasks.start_soon(unit.drain)
            await gate.reached.wait()
            unit.publish("a")
            unit.release()
            gate.opened.set()

        assert seen == ["handled 1", "handled a"]


async def test_the_end_of_a_unit_waits_for_the_drain_of_another_task(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(int, gate)
    reports: list[DrainReport] = []

    async def drain(unit: EventContext) -> None:
        reports.append(await unit.drain())

    async def end() -> None:
        async with bus.context() as unit:
            bus.publish(1, "a")
            tasks.start_soon(drain, unit)
            await gate.reached.wait()
            bus.publish("b")
        assert seen == ["handled 1", "handled a", "handled b"]
        assert unit.closed

    async with create_task_group() as tasks:
        tasks.start_soon(end)
        await wait_all_tasks_blocked()
        assert seen == []
        gate.opened.set()

    assert [report.handled for report in reports] == [3]


async def test_the_end_of_a_unit_waits_for_the_last_handler_of_the_drain_of_another_task(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()

    @bus.on(int)
    async def follow(event: int) -> None:
        await gate(event)
        bus.publish("caused")

    async def end() -> None:
        async with bus.context() as unit:
            bus.publish(1)
            tasks.start_soon(unit.drain)
            await gate.reached.wait()
        assert seen == ["handled 1", "handled caused"]
        assert unit.closed

    async with create_task_group() as tasks:
        tasks.start_soon(end)
        await wait_all_tasks_blocked()
        gate.opened.set()


async def test_the_end_of_a_unit_delivers_what_a_cancelled_drain_of_another_task_left(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(int, gate)
    scope = CancelScope()

    async def drain(unit: EventContext) -> None:
        with scope:
            await unit.drain()

    async def end() -> None:
        async with bus.context() as unit:
            bus.publish(1, "a")
            tasks.start_soon(drain, unit)
            await gate.reached.wait()

    async with create_task_group() as tasks:
        tasks.start_soon(end)
        await wait_all_tasks_blocked()
        scope.cancel()

    assert seen == ["undelivered 1", "handled a"]


async def test_a_drain_of_the_outer_unit_leaves_the_nested_one_alone(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context() as outer:
        bus.publish("a")
        async with bus.context():
            bus.publish("b")
            await outer.drain()
            assert seen == ["handled a"]

    assert seen == ["handled a", "handled b"]


async def test_a_drain_of_a_nested_unit_delivers_its_own_events_now(
    bus: EventBus, seen: list[str]
) -> None:
    with suppress(LookupError):
        async with bus.context():
            bus.publish("a")
            async with bus.context() as nested:
                bus.publish("b")
                await nested.drain()
                assert seen == ["handled b"]
                bus.publish("c")
            raise LookupError

    assert seen == ["handled b", "discarded a", "discarded c"]


async def test_units_nested_in_each_other_drain_at_the_same_time(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(int, gate)

    async with bus.context() as outer, create_task_group() as tasks:
        bus.publish(1)
        tasks.start_soon(outer.drain)
        await gate.reached.wait()
        async with bus.context() as nested:
            bus.publish("a")
            await nested.drain()
            assert seen == ["handled a"]
            bus.publish("b")
        gate.opened.set()

    assert seen == ["handled a", "handled 1", "handled b"]


# Nested units are savepoints


async def test_a_nested_unit_hands_over_and_delivers_nothing_itself(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context() as outer:
        bus.publish("a")
        async with bus.context() as nested:
            bus.publish("b")
        assert nested.closed
        assert seen == []
        assert [delivery.event for delivery in outer.pending] == ["a", "b"]
        bus.publish("c")

    assert seen == ["handled a", "handled b", "handled c"]


async def test_an_exception_drops_only_the_events_of_the_nested_unit(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context():
        bus.publish("a")
        with suppress(LookupError):
            async with bus.context():
                bus.publish("b")
                raise LookupError
        assert seen == ["discarded b"]
        bus.publish("c")

    assert seen == ["discarded b", "handled a", "handled c"]


async def test_what_a_nested_unit_handed_over_fails_with_the_outer_one(
    bus: EventBus, seen: list[str]
) -> None:
    with suppress(LookupError):
        async with bus.context():
            async with bus.context():
                bus.publish("a")
            raise LookupError

    assert seen == ["discarded a"]


@pytest.mark.parametrize("nested_fails", [False, True])
@pytest.mark.parametrize("outer_fails", [False, True])
async def test_what_was_released_in_a_nested_unit_is_delivered_whatever_fails(
    bus: EventBus, seen: list[str], nested_fails: bool, outer_fails: bool
) -> None:
    with suppress(LookupError):
        async with bus.context():
            with suppress(LookupError):
                async with bus.context() as nested:
                    bus.publish("a")
                    nested.release()
                    if nested_fails:
                        raise LookupError
            if outer_fails:
                raise LookupError

    assert seen == ["handled a"]


async def test_what_is_even_on_failure_stays_so_when_handed_over(
    bus: EventBus, seen: list[str]
) -> None:
    with suppress(LookupError):
        async with bus.context():
            async with bus.context():
                bus.publish("a", even_on_failure=True)
            with suppress(KeyError):
                async with bus.context():
                    bus.publish("b", even_on_failure=True)
                    bus.publish("c")
                    raise KeyError
            raise LookupError

    assert seen == ["discarded c", "handled a", "handled b"]


async def test_discard_of_the_outer_unit_drops_what_was_handed_over_undecided(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context() as outer:
        async with bus.context() as nested:
            bus.publish("a")
            nested.release()
            bus.publish("b")
        outer.discard()

    assert seen == ["discarded b", "handled a"]


async def test_the_active_unit_is_the_innermost_one_and_then_the_outer_one_again(
    bus: EventBus,
) -> None:
    async with bus.context() as outer:
        assert bus.current_context() is outer
        async with bus.context() as nested:
            assert bus.current_context() is nested
        assert bus.current_context() is outer


async def test_a_nested_unit_that_outlives_its_outer_one_drains(
    bus: EventBus, seen: list[str]
) -> None:
    go_on = anyio.Event()

    async def nested() -> None:
        async with bus.context():
            bus.publish("nested")
            await go_on.wait()
        assert seen == ["handled outer", "handled nested"]

    async with create_task_group() as tasks:
        async with bus.context():
            bus.publish("outer")
            tasks.start_soon(nested)
            await wait_all_tasks_blocked()
        assert seen == ["handled outer"]
        go_on.set()


async def test_a_nested_unit_that_outlives_the_middle_one_hands_over_to_the_outermost(
    bus: EventBus, seen: list[str]
) -> None:
    go_on = anyio.Event()

    async def innermost() -> None:
        async with bus.context():
            bus.publish("innermost")
            await go_on.wait()

    with suppress(LookupError):
        async with bus.context():
            async with create_task_group() as tasks:
                async with bus.context():
                    tasks.start_soon(innermost)
                    await wait_all_tasks_blocked()
                go_on.set()
            assert seen == []
            raise LookupError

    assert seen == ["discarded innermost"]


async def test_a_unit_opened_in_a_task_that_outlived_its_unit_is_one_of_its_own(
    bus: EventBus, seen: list[str]
) -> None:
    go_on = anyio.Event()

    async def late() -> None:
        await go_on.wait()
        async with bus.context():
            bus.publish("late")
        assert seen == ["handled late"]

    async with create_task_group() as tasks:
        async with bus.context(), bus.context():
            tasks.start_soon(late)
        go_on.set()


async def test_a_unit_that_is_left_while_another_task_drains_it_loses_nothing(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()

    @bus.on(int)
    async def follow(event: int) -> None:
        await gate(event)
        bus.publish("caused")

    async with bus.context() as outer:
        async with create_task_group() as tasks:
            async with bus.context() as nested:
                bus.publish(1, "a")
                tasks.start_soon(nested.drain)
                await gate.reached.wait()
                bus.publish("b")
            assert nested.closed
            gate.opened.set()
        assert seen == ["handled 1", "handled a", "handled caused"]
        assert [delivery.event for delivery in outer.pending] == ["b"]

    assert seen[3:] == ["handled b"]


async def test_a_drain_that_is_cancelled_after_its_unit_was_left_hands_the_rest_over(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(int, gate)

    with suppress(LookupError):
        async with bus.context():
            async with create_task_group() as tasks:
                async with bus.context() as nested:
                    bus.publish(1, "a")
                    tasks.start_soon(nested.drain)
                    await gate.reached.wait()
                tasks.cancel_scope.cancel()
            raise LookupError

    assert seen == ["undelivered 1", "handled a"]


# A delivery is a unit


async def test_a_failed_handlers_events_are_discarded_and_its_siblings_are_not(
    bus: EventBus, seen: list[str]
) -> None:
    @bus.on(int)
    async def fail(event: int) -> None:
        bus.publish("of the failed one")
        raise LookupError

    bus.subscribe(int, calling(lambda: bus.publish("of its sibling")), thread=False)
    async with bus.context():
        bus.publish(1)

    assert seen == [
        "failed 1",
        "handled 1",
        "discarded of the failed one",
        "handled of its sibling",
    ]


async def test_what_a_failed_handler_had_released_is_delivered(
    bus: EventBus, seen: list[str]
) -> None:
    @bus.on(int)
    async def fail(event: int) -> None:
        bus.publish("released")
        bus.current_context().release()
        bus.publish("even on failure", even_on_failure=True)
        bus.publish("undecided")
        raise LookupError

    async with bus.context():
        bus.publish(1)

    assert seen == [
        "failed 1",
        "discarded undecided",
        "handled released",
        "handled even on failure",
    ]


async def test_a_handler_may_discard_what_it_published(bus: EventBus, seen: list[str]) -> None:
    @bus.on(int)
    async def rolled_back(event: int) -> None:
        bus.publish("dropped")
        bus.current_context().discard()
        bus.publish("kept")

    async with bus.context():
        bus.publish(1)

    assert seen == ["discarded dropped", "handled 1", "handled kept"]


async def test_units_nested_in_a_handler_hand_over_to_its_delivery(
    bus: EventBus, seen: list[str]
) -> None:
    @bus.on(int)
    async def handle(event: int) -> None:
        async with bus.context():
            bus.publish("kept")
        with suppress(KeyError):
            async with bus.context() as nested:
                bus.publish("released")
                nested.release()
                bus.publish("dropped")
                raise KeyError
        if event == 2:
            raise LookupError

    async with bus.context():
        bus.publish(1)
    assert seen == ["discarded dropped", "handled 1", "handled kept", "handled released"]
    seen.clear()
    async with bus.context():
        bus.publish(2)
    assert seen == ["discarded dropped", "failed 2", "discarded kept", "handled released"]


async def test_a_synchronous_handler_nests_units_with_a_plain_with(
    bus: EventBus, seen: list[str]
) -> None:
    def handle(event: int) -> None:
        with bus.context():
            bus.publish("kept")
        with suppress(KeyError), bus.context():
            bus.publish("dropped")
            raise KeyError

    bus.subscribe(int, handle)
    async with bus.context():
        bus.publish(1)

    assert seen == ["discarded dropped", "handled 1", "handled kept"]


async def test_follow_ups_are_delivered_although_the_unit_that_caused_them_failed(
    bus: EventBus, seen: list[str]
) -> None:
    bus.subscribe(int, calling(lambda: bus.publish("caused")), thread=False)
    with suppress(LookupError):
        async with bus.context():
            bus.publish(1, even_on_failure=True)
            raise LookupError

    assert seen == ["handled 1", "handled caused"]


async def test_a_task_that_outlives_its_handler_is_told_so_and_opens_its_own_unit(
    bus: EventBus, seen: list[str]
) -> None:
    told: list[str] = []
    go_on = anyio.Event()

    async def outlive() -> None:
        await go_on.wait()
        with pytest.raises(EventContextClosedError) as error:
            bus.publish("late")
        told.append(str(error.value))
        async with bus.context() as unit:
            bus.publish("its own")
            [delivery] = unit.pending
            assert (delivery.cause, delivery.depth) == (None, 0)
            await unit.drain()  # it is not inside a handler any more
            assert unit.pending == ()

    async with create_task_group() as tasks:

        @bus.on(int)
        async def handle(event: int) -> None:
            tasks.start_soon(outlive)

        async with bus.context():
            bus.publish(1)
        go_on.set()

    assert seen == ["handled 1", "handled its own"]
    assert len(told) == 1
    assert re.fullmatch(
        r"the handler that this event context of bus 'default' belongs to has ended \("
        r"builtins\.int -> .*handle\)\. A task that outlives its handler needs a unit of its own: "
        r"`async with bus\.context\(\):`",
        told[0],
    )


async def test_a_unit_that_outlives_the_handler_it_is_in_drains(
    bus: EventBus, seen: list[str]
) -> None:
    go_on = anyio.Event()

    async def outlive(opened: anyio.Event) -> None:
        async with bus.context(), bus.context():
            bus.publish("drained late")
            opened.set()
            await go_on.wait()
            await bus.current_context().drain()
            bus.publish("late")

    async with create_task_group() as tasks, bus.context():

        @bus.on(int)
        async def handle(event: int) -> None:
            opened = anyio.Event()
            tasks.start_soon(outlive, opened)
            await opened.wait()

        bus.publish(1)
        await bus.current_context().drain()
        go_on.set()
        await wait_all_tasks_blocked()
        assert seen == ["handled 1", "handled drained late", "handled late"]


async def test_a_handler_that_publishes_to_the_unit_around_it_causes_what_it_publishes() -> None:
    bus = EventBus(max_depth=3)
    bus.report_failure = ignore
    depths: list[int] = []

    async with bus.context() as unit:

        @bus.on(int)
        async def again(event: int) -> None:
            depths.append(current_delivery().depth)
            unit.publish(event + 1)

        bus.publish(1)

    assert depths == [0, 1, 2, 3]
    assert (bus.stats.handled, bus.stats.failed) == (3, 1)


async def test_a_task_that_outlives_its_handler_is_the_cause_of_nothing(
    bus: EventBus, seen: list[str]
) -> None:
    go_on = anyio.Event()

    async def outlive(unit: EventContext) -> None:
        await go_on.wait()
        unit.publish("late")
        assert [delivery.cause for delivery in unit.pending] == [None]

    async with bus.context() as unit, create_task_group() as tasks:
        bus.subscribe(int, calling(lambda: tasks.start_soon(outlive, unit)), thread=False)
        bus.publish(1)
        await unit.drain()
        go_on.set()

    assert seen == ["handled 1", "handled late"]


# Dispatch is a unit of its own


async def test_what_was_dispatched_stays_delivered_if_the_outer_unit_fails(
    bus: EventBus, seen: list[str]
) -> None:
    bus.subscribe(int, calling(lambda: bus.publish("caused")), thread=False)
    with suppress(LookupError):
        async with bus.context():
            bus.publish("a")
            await bus.dispatch(1)
            raise LookupError

    assert seen == ["handled 1", "handled caused", "discarded a"]


async def test_a_failed_handlers_dispatches_stay_delivered(bus: EventBus, seen: list[str]) -> None:
    @bus.on(int)
    async def fail(event: int) -> None:
        await bus.dispatch("dispatched")
        bus.publish("published")
        raise LookupError

    with pytest.raises(DispatchError):
        await bus.dispatch(1)

    assert seen == ["handled dispatched", "failed 1", "discarded published"]


async def test_cancelling_a_dispatch_reports_the_failures_that_it_can_no_longer_raise(
    bus: EventBus, seen: list[str]
) -> None:
    told: list[object] = []

    def tell(delivery: Delivery, error: Exception) -> None:
        told.append(delivery.event)

    bus.report_failure = tell

    @bus.on(int)
    async def publish_two(event: int) -> None:
        bus.publish("bad", 1.0, "left")

    with CancelScope() as scope:

        @bus.on(float)
        async def cancel(event: float) -> None:
            scope.cancel()
            await checkpoint()

        await bus.dispatch(1)

    assert seen == ["handled 1", "failed bad", "undelivered 1.0", "undelivered left"]
    assert told == ["bad"]


# Closing


async def test_a_late_publish_during_the_final_drain_is_delivered_after_success(
    bus: EventBus, seen: list[str]
) -> None:
    async with bus.context() as unit:

        @bus.on(int)
        async def publish_late(event: int) -> None:
            unit.publish("late")

        bus.publish(1, "a")

    assert seen == ["handled 1", "handled a", "handled late"]
    assert unit.closed


async def test_a_late_publish_during_the_final_drain_is_discarded_after_failure(
    bus: EventBus, seen: list[str]
) -> None:
    with suppress(LookupError):
        async with bus.context() as unit:

            @bus.on(int)
            async def publish_late(event: int) -> None:
                unit.publish("late")
                unit.publish("late, even on failure", even_on_failure=True)

            bus.publish(1, even_on_failure=True)
            raise LookupError

    assert seen == ["handled 1", "discarded late", "handled late, even on failure"]


async def test_publishing_to_a_unit_that_has_ended_raises(bus: EventBus, seen: list[str]) -> None:
    async with bus.context() as outer:
        async with bus.context() as nested:
            pass
        with pytest.raises(EventContextClosedError):
            nested.publish("a")
    with pytest.raises(EventContextClosedError):
        outer.publish("a")

    assert bus.stats.published == 0


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
    monkeypatch.delattr(anyio, "run")
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
        with pytest.raises(RuntimeError):
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


# Several buses


async def test_units_of_different_buses_do_not_nest_in_each_other() -> None:
    first, second = EventBus(name="first"), EventBus(name="second")
    seen = witnessed(first)
    second.observe(first._core.observers[0])
    for bus in (first, second):
        bus.subscribe(str, nothing, thread=False)

    with suppress(LookupError):
        async with first.context() as around:
            first.publish("1")
            async with second.context():
                second.publish("2")
                first.publish("3")
                assert first.current_context() is around
            assert seen == ["handled 2"]
            raise LookupError

    assert seen == ["handled 2", "discarded 1", "discarded 3"]


async def test_a_handler_publishes_to_another_bus_in_a_unit_of_that_bus() -> None:
    first, second = EventBus(name="first", max_depth=3), EventBus(name="second", max_depth=3)
    causes: list[list[str]] = []

    @first.on(int)
    async def there(event: int) -> None:
        async with second.context():
            second.publish(event)

    @second.on(int)
    async def back(event: int) -> None:
        causes.append([str(delivery) for delivery in current_delivery().chain()])
        async with first.context():
            first.publish(event)

    first.report_failure = second.report_failure = ignore
    async with first.context():
        first.publish(1)

    # Two buses that answer each other are bounded, too.
    assert [len(chain) for chain in causes] == [2, 4]
    assert all(step.endswith(("there", "back")) for step in causes[1])


async def test_a_handler_publishes_to_its_own_bus_from_inside_a_unit_of_another() -> None:
    first, second = EventBus(name="first"), EventBus(name="second")
    seen = witnessed(first)
    first.subscribe(str, nothing, thread=False)

    @first.on(int)
    async def handle(event: int) -> None:
        async with second.context():
            first.publish("caused")

    async with first.context():
        first.publish(1)

    assert seen == ["handled 1", "handled caused"]


# Async generators


async def test_a_unit_may_be_open_around_a_yield(bus: EventBus, seen: list[str]) -> None:
    async def dependency() -> AsyncGenerator[EventContext]:
        async with bus.context() as unit:
            yield unit

    async for unit in dependency():
        bus.publish("a")
        assert bus.current_context() is unit

    assert seen == ["handled a"]


async def test_a_unit_around_a_yield_that_is_thrown_into_discards(
    bus: EventBus, seen: list[str]
) -> None:
    async def dependency() -> AsyncGenerator[None]:
        async with bus.context():
            yield

    with suppress(LookupError):
        async with aclosing(dependency()) as generator:
            await anext(generator)
            bus.publish("a")
            await generator.athrow(LookupError())

    assert seen == ["discarded a"]


async def test_a_unit_may_end_in_another_task_than_it_began_in(
    bus: EventBus, seen: list[str]
) -> None:
    async def dependency() -> AsyncGenerator[EventContext]:
        async with bus.context() as unit:
            yield unit

    async def begin() -> None:
        unit = await anext(generator)
        unit.publish("a")

    async def end() -> None:
        async with bus.context() as other:
            with suppress(StopAsyncIteration):
                await anext(generator)
            assert seen == ["handled a"]
            assert bus.current_context() is other

    generator = dependency()
    async with create_task_group() as tasks:
        tasks.start_soon(begin)
    async with create_task_group() as tasks:
        tasks.start_soon(end)


async def test_units_around_yields_may_overlap(bus: EventBus, seen: list[str]) -> None:
    async def dependency() -> AsyncGenerator[EventContext]:
        async with bus.context() as unit:
            yield unit

    first, second = dependency(), dependency()
    outer, nested = await anext(first), await anext(second)
    outer.publish("a")
    bus.publish("b")
    with suppress(StopAsyncIteration):
        await anext(first)
    assert seen == ["handled a"]
    assert bus.current_context() is nested
    with suppress(StopAsyncIteration):
        await anext(second)

    assert seen == ["handled a", "handled b"]


# Cancellation: what is true of our state if this `await` never returns?


async def test_cancelled_in_the_final_drain_what_is_left_is_undelivered(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(int, gate)
    units: list[EventContext] = []

    async def work() -> None:
        async with bus.context() as unit:
            units.append(unit)
            bus.publish("a", 1, "b")

    async with create_task_group() as tasks:
        tasks.start_soon(work)
        await gate.reached.wait()
        tasks.cancel_scope.cancel()

    assert seen == ["handled a", "undelivered 1", "undelivered b"]
    assert units[0].closed
    async with bus.context():
        bus.publish("once more")
    assert seen[3:] == ["handled once more"]


async def test_cancelled_in_a_drain_midway_what_had_not_started_waits_for_the_next(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(int, gate)

    async with bus.context() as unit:
        bus.publish("a", 1, "b")
        async with create_task_group() as tasks:
            tasks.start_soon(unit.drain)
            await gate.reached.wait()
            tasks.cancel_scope.cancel()
        assert seen == ["handled a", "undelivered 1"]
        assert [delivery.event for delivery in unit.pending] == ["b"]
        bus.publish("once more")

    assert seen[2:] == ["handled b", "handled once more"]


async def test_cancelled_while_waiting_for_the_drain_of_another_task_a_unit_closes(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()

    @bus.on(int)
    async def follow(event: int) -> None:
        await gate(event)
        bus.publish("caused")

    async with create_task_group() as tasks:
        unit = bus.context()
        with CancelScope() as scope:
            async with unit:
                bus.publish(1, "a")
                tasks.start_soon(unit.drain)
                await gate.reached.wait()
                bus.publish("b")
                scope.cancel()
        assert seen == ["undelivered a", "undelivered b"]
        assert unit.closed
        with pytest.raises(EventContextClosedError):
            unit.publish("late")
        gate.opened.set()

    assert seen[2:] == ["handled 1", "handled caused"]
    async with bus.context():
        bus.publish("once more")


async def test_cancelled_in_its_block_a_unit_fails(bus: EventBus, seen: list[str]) -> None:
    unit = bus.context()
    with CancelScope() as scope:
        async with unit:
            bus.publish("a")
            bus.publish("even on failure", even_on_failure=True)
            scope.cancel()
            await checkpoint()

    assert seen == ["discarded a", "undelivered even on failure"]
    assert unit.closed
    async with bus.context():
        bus.publish("once more")


async def test_what_a_cancelled_handler_published_is_accounted_for(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()

    @bus.on(int)
    async def publish_and_wait(event: int) -> None:
        bus.publish("undecided")
        bus.publish("even on failure", even_on_failure=True)
        await gate(event)

    async with bus.context() as unit:
        bus.publish(1)
        async with create_task_group() as tasks:
            tasks.start_soon(unit.drain)
            await gate.reached.wait()
            tasks.cancel_scope.cancel()
        assert seen == ["discarded undecided", "undelivered 1"]

    assert seen[2:] == ["handled even on failure"]


async def test_cancelled_in_a_dispatch_what_is_left_is_undelivered(
    bus: EventBus, seen: list[str]
) -> None:
    gate = Gate()
    bus.subscribe(bytes, gate)
    bus.subscribe(int, calling(lambda: bus.publish("a", b"stuck", "b")), thread=False)

    async with create_task_group() as tasks:
        tasks.start_soon(bus.dispatch, 1)
        await gate.reached.wait()
        tasks.cancel_scope.cancel()

    assert seen == ["handled 1", "handled a", "undelivered b'stuck'", "undelivered b"]
    await bus.dispatch("once more")
    assert seen[4:] == ["handled once more"]


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
        report = await unit.drain()
        with suppress(DispatchError):
            report.raise_for_failures()


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
        return sum(isinstance(thing, EventContext) for thing in gc.get_objects())

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


async def test_units_around_yields_that_overlap_leave_the_outer_one_active(bus: EventBus) -> None:
    async def block() -> AsyncGenerator[None]:
        async with bus.context():
            yield

    async with bus.context() as outer:
        first, second = block(), block()
        await anext(first)
        await anext(second)
        await first.aclose()
        await second.aclose()

        assert bus.current_context() is outer


async def test_a_handler_can_drain_no_unit_of_its_bus(bus: EventBus) -> None:
    async with bus.context() as outer:

        @bus.on(str)
        async def handle(event: str) -> None:
            with pytest.raises(DrainInProgressError):
                await outer.drain()

        await bus.dispatch("now")


async def test_a_unit_that_is_not_open_yet_cannot_be_drained(bus: EventBus) -> None:
    with pytest.raises(EventContextClosedError, match="not open yet"):
        await bus.context().drain()


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
