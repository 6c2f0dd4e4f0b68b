"""The contract of units of work: what is delivered, what is dropped, and when."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from contextvars import ContextVar

from anyio import CancelScope, create_task_group, wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from eventkit import DrainReport, EventContext, current_delivery
from eventkit._core.events import Delivery
from eventkit.exceptions import (
    DispatchError,
    DrainInProgressError,
    EventContextClosedError,
    EventContextFullError,
)
from tests.contract.bus import (
    BusContract,
    Gate,
    Witness,
    calling,
    ignore,
    nothing,
    raises,
    witnessed,
)


class ContextContract(BusContract):
    """One unit of work: released, discarded, drained midway, closed, cancelled."""

    # The outermost unit

    async def test_a_clean_exit_delivers_after_the_block(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context() as unit:
            bus.publish("a")
            await wait_all_tasks_blocked()
            assert seen == []
            assert not unit.closed

        assert seen == ["handled a"]
        assert unit.closed

    async def test_an_exception_discards_and_passes_on(self) -> None:
        bus, seen = self.watched_bus()
        unit = bus.context()

        async def fail() -> None:
            async with unit:
                bus.publish("a", "b")
                raise LookupError

        with raises(LookupError):
            await fail()

        assert seen == ["discarded a", "discarded b"]
        assert unit.closed

    async def test_a_failing_handler_stops_neither_the_drain_nor_the_unit(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context():
            bus.publish("bad", "a")

        assert seen == ["failed bad", "handled a"]

    async def test_what_is_published_even_on_failure_is_delivered_although_the_unit_fails(
        self,
    ) -> None:
        bus, seen = self.watched_bus()
        with suppress(LookupError):
            async with bus.context():
                bus.publish("a")
                bus.publish("login failed", even_on_failure=True)
                bus.publish("b")
                raise LookupError

        assert seen == ["discarded a", "discarded b", "handled login failed"]

    async def test_what_is_published_even_on_failure_is_delivered_in_its_place_on_success(
        self,
    ) -> None:
        bus, seen = self.watched_bus()
        async with bus.context():
            bus.publish("a")
            bus.publish("b", even_on_failure=True)
            bus.publish("c")

        assert seen == ["handled a", "handled b", "handled c"]

    async def test_what_was_released_is_delivered_although_the_unit_fails(self) -> None:
        bus, seen = self.watched_bus()
        with suppress(LookupError):
            async with bus.context() as unit:
                bus.publish("a")
                unit.release()
                bus.publish("b")
                raise LookupError

        assert seen == ["discarded b", "handled a"]

    async def test_what_was_discarded_is_not_delivered_although_the_unit_succeeds(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context() as unit:
            bus.publish("a")
            unit.discard()
            bus.publish("b")
            assert seen == ["discarded a"]

        assert seen == ["discarded a", "handled b"]

    async def test_discard_leaves_what_is_released_or_even_on_failure(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context() as unit:
            bus.publish("a")
            unit.release()
            bus.publish("b", even_on_failure=True)
            bus.publish("c")
            unit.discard()
            unit.discard()

            assert [delivery.event for delivery in unit.pending] == ["a", "b"]

        assert seen == ["discarded c", "handled a", "handled b"]

    async def test_release_delivers_nothing_by_itself(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context() as unit:
            bus.publish("a")
            unit.release()
            unit.release()
            await wait_all_tasks_blocked()

            assert seen == []

        assert seen == ["handled a"]

    async def test_pending_lists_the_deliveries_that_wait_released_ones_first(self) -> None:
        bus, _ = self.watched_bus()
        bus.subscribe(str, nothing, name="second", thread=False)
        async with bus.context() as unit:
            bus.publish("a")
            unit.release()
            bus.publish("b")

            assert [str(d).rpartition(".")[2] for d in unit.pending[1::2]] == ["str -> second"] * 2
            assert [delivery.event for delivery in unit.pending] == ["a", "a", "b", "b"]
            assert bus.stats.pending == len(unit.pending)

        assert unit.pending == ()

    async def test_events_without_a_handler_are_counted_and_forgotten(self) -> None:
        class Unheard: ...

        bus = self.new_bus(max_events=1)
        async with bus.context() as unit:
            bus.publish(Unheard(), Unheard(), Unheard())

            assert unit.pending == ()
        assert (bus.stats.published, bus.stats.accepted) == (3, 0)

    async def test_publish_without_events_does_nothing(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context():
            bus.publish()

        assert seen == []
        assert bus.stats.published == 0

    async def test_publish_accepts_all_or_raises(self) -> None:
        bus = self.new_bus(max_events=2)
        seen = witnessed(bus)
        bus.subscribe(str, nothing, thread=False)

        async with bus.context():
            bus.publish("a")
            with raises(EventContextFullError):
                bus.publish("b", "c")
            with raises(TypeError):
                bus.publish("d", str)
            assert (bus.stats.published, bus.stats.accepted) == (1, 1)
            bus.publish("e")

        assert seen == ["handled a", "handled e"]

    async def test_max_events_counts_what_waits_in_nested_units_and_handlers_too(self) -> None:
        bus = self.new_bus(max_events=2)
        seen = witnessed(bus)
        refused: list[str] = []

        @bus.on(str)
        async def handle(event: str) -> None:
            if event == "a":
                bus.publish("b", "c")
                with raises(EventContextFullError) as error:
                    bus.publish("d")
                refused.append(str(error.value))

        async with bus.context() as unit:
            async with bus.context():
                bus.publish("x", "y")
                with raises(EventContextFullError):
                    unit.publish("z")
                with suppress(LookupError):
                    async with bus.context():
                        with raises(EventContextFullError):
                            bus.publish("z")
                        raise LookupError
            with raises(EventContextFullError):
                bus.publish("z")
            unit.discard()
            bus.publish("a")

        assert seen[2:] == ["handled a", "handled b", "handled c"]
        assert len(refused) == 1

    async def test_a_drain_makes_room_in_a_full_unit(self) -> None:
        bus = self.new_bus(max_events=1)
        seen = witnessed(bus)
        bus.subscribe(str, nothing, thread=False)

        async with bus.context() as unit:
            for event in "abc":
                bus.publish(event)
                await unit.drain()

        assert seen == ["handled a", "handled b", "handled c"]

    async def test_publish_captures_the_context_variables_of_its_moment(self) -> None:
        bus, _ = self.watched_bus()
        tenant: ContextVar[str] = ContextVar("tenant")
        told: list[str] = []
        bus.subscribe(int, calling(lambda: told.append(tenant.get())), thread=False)

        async with bus.context():
            for name in ("first", "second"):
                tenant.set(name)
                bus.publish(1)
            tenant.set("third")

        assert told == ["first", "second"]

    async def test_a_unit_that_is_not_open_yet_cannot_be_drained(self) -> None:
        bus, _ = self.watched_bus()
        with raises(EventContextClosedError) as error:
            await bus.context().drain()

        assert "not open yet" in str(error.value)

    # Draining midway

    async def test_drain_delivers_now_what_was_published_so_far_and_all_that_it_causes(
        self,
    ) -> None:
        bus, seen = self.watched_bus()
        bus.subscribe(int, calling(lambda: bus.publish("caused")), thread=False)

        async with bus.context() as unit:
            bus.publish(1)
            report = await unit.drain()
            assert seen == ["handled 1", "handled caused"]
            assert report.handled == 2
            bus.publish("a")

        assert seen[2:] == ["handled a"]

    async def test_what_was_drained_stays_delivered_although_the_unit_fails(self) -> None:
        bus, seen = self.watched_bus()
        with suppress(LookupError):
            async with bus.context() as unit:
                bus.publish("a")
                await unit.drain()
                bus.publish("b")
                raise LookupError

        assert seen == ["handled a", "discarded b"]

    async def test_a_drain_reports_failures_and_returns_them(self) -> None:
        bus, _ = self.watched_bus()
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
        with raises(DispatchError) as raised:
            report.raise_for_failures()
        assert raised.value.exceptions == tuple(failure.error for failure in report.failures)
        assert raised.value.message == "handlers failed for builtins.str"

    async def test_draining_what_is_empty_or_over_does_nothing(self) -> None:
        bus, _ = self.watched_bus()
        async with bus.context() as unit:
            assert await unit.drain() == DrainReport(0, ())

        assert await unit.drain() == DrainReport(0, ())

    async def test_what_is_published_to_the_unit_during_a_drain_waits(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_discard_during_a_drain_drops_only_what_is_not_released(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_release_during_a_drain_adds_to_it(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_the_end_of_a_unit_waits_for_the_drain_of_another_task(self) -> None:
        bus, seen = self.watched_bus()
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
        self,
    ) -> None:
        bus, seen = self.watched_bus()
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
        self,
    ) -> None:
        bus, seen = self.watched_bus()
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

    async def test_a_drain_of_the_outer_unit_leaves_the_nested_one_alone(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context() as outer:
            bus.publish("a")
            async with bus.context():
                bus.publish("b")
                await outer.drain()
                assert seen == ["handled a"]

        assert seen == ["handled a", "handled b"]

    async def test_a_drain_of_a_nested_unit_delivers_its_own_events_now(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_units_nested_in_each_other_drain_at_the_same_time(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_a_handler_can_drain_no_unit_of_its_bus(self) -> None:
        bus, _ = self.watched_bus()
        async with bus.context() as outer:

            @bus.on(str)
            async def handle(event: str) -> None:
                with raises(DrainInProgressError):
                    await outer.drain()

            await bus.dispatch("now")

    # Dispatch is a unit of its own

    async def test_what_was_dispatched_stays_delivered_if_the_outer_unit_fails(self) -> None:
        bus, seen = self.watched_bus()
        bus.subscribe(int, calling(lambda: bus.publish("caused")), thread=False)
        with suppress(LookupError):
            async with bus.context():
                bus.publish("a")
                await bus.dispatch(1)
                raise LookupError

        assert seen == ["handled 1", "handled caused", "discarded a"]

    async def test_a_failed_handlers_dispatches_stay_delivered(self) -> None:
        bus, seen = self.watched_bus()

        @bus.on(int)
        async def fail(event: int) -> None:
            await bus.dispatch("dispatched")
            bus.publish("published")
            raise LookupError

        with raises(DispatchError):
            await bus.dispatch(1)

        assert seen == ["handled dispatched", "failed 1", "discarded published"]

    async def test_cancelling_a_dispatch_reports_the_failures_that_it_can_no_longer_raise(
        self,
    ) -> None:
        bus, seen = self.watched_bus()
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

    async def test_a_late_publish_during_the_final_drain_is_delivered_after_success(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context() as unit:

            @bus.on(int)
            async def publish_late(event: int) -> None:
                unit.publish("late")

            bus.publish(1, "a")

        assert seen == ["handled 1", "handled a", "handled late"]
        assert unit.closed

    async def test_a_late_publish_during_the_final_drain_is_discarded_after_failure(self) -> None:
        bus, seen = self.watched_bus()
        with suppress(LookupError):
            async with bus.context() as unit:

                @bus.on(int)
                async def publish_late(event: int) -> None:
                    unit.publish("late")
                    unit.publish("late, even on failure", even_on_failure=True)

                bus.publish(1, even_on_failure=True)
                raise LookupError

        assert seen == ["handled 1", "discarded late", "handled late, even on failure"]

    async def test_publishing_to_a_unit_that_has_ended_raises(self) -> None:
        bus, _ = self.watched_bus()
        async with bus.context() as outer:
            async with bus.context() as nested:
                pass
            with raises(EventContextClosedError):
                nested.publish("a")
        with raises(EventContextClosedError):
            outer.publish("a")

        assert bus.stats.published == 0

    # Several buses

    async def test_units_of_different_buses_do_not_nest_in_each_other(self) -> None:
        first, second = self.new_bus(name="first"), self.new_bus(name="second")
        witness = Witness()
        first.observe(witness)
        second.observe(witness)
        for bus in (first, second):
            bus.subscribe(str, nothing, thread=False)

        with suppress(LookupError):
            async with first.context() as around:
                first.publish("1")
                async with second.context():
                    second.publish("2")
                    first.publish("3")
                    assert first.current_context() is around
                assert witness.seen == ["handled 2"]
                raise LookupError

        assert witness.seen == ["handled 2", "discarded 1", "discarded 3"]

    async def test_a_handler_publishes_to_another_bus_in_a_unit_of_that_bus(self) -> None:
        first, second = (
            self.new_bus(name="first", max_depth=3),
            self.new_bus(name="second", max_depth=3),
        )
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

    async def test_a_handler_publishes_to_its_own_bus_from_inside_a_unit_of_another(self) -> None:
        first, second = self.new_bus(name="first"), self.new_bus(name="second")
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

    async def test_a_unit_may_be_open_around_a_yield(self) -> None:
        bus, seen = self.watched_bus()

        async def dependency() -> AsyncGenerator[EventContext]:
            async with bus.context() as unit:
                yield unit

        async for unit in dependency():
            bus.publish("a")
            assert bus.current_context() is unit

        assert seen == ["handled a"]

    async def test_a_unit_around_a_yield_that_is_thrown_into_discards(self) -> None:
        bus, seen = self.watched_bus()

        async def dependency() -> AsyncGenerator[None]:
            async with bus.context():
                yield

        with suppress(LookupError):
            async with aclosing(dependency()) as generator:
                await anext(generator)
                bus.publish("a")
                await generator.athrow(LookupError())

        assert seen == ["discarded a"]

    async def test_a_unit_may_end_in_another_task_than_it_began_in(self) -> None:
        bus, seen = self.watched_bus()

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

    async def test_units_around_yields_may_overlap(self) -> None:
        bus, seen = self.watched_bus()

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

    async def test_units_around_yields_that_overlap_leave_the_outer_one_active(self) -> None:
        bus, _ = self.watched_bus()

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

    # Cancellation: what is true of our state if this `await` never returns?

    async def test_cancelled_in_the_final_drain_what_is_left_is_undelivered(self) -> None:
        bus, seen = self.watched_bus()
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
        self,
    ) -> None:
        bus, seen = self.watched_bus()
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
        self,
    ) -> None:
        bus, seen = self.watched_bus()
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
            with raises(EventContextClosedError):
                unit.publish("late")
            gate.opened.set()

        assert seen[2:] == ["handled 1", "handled caused"]
        async with bus.context():
            bus.publish("once more")

    async def test_cancelled_in_its_block_a_unit_fails(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_what_a_cancelled_handler_published_is_accounted_for(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_cancelled_in_a_dispatch_what_is_left_is_undelivered(self) -> None:
        bus, seen = self.watched_bus()
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
