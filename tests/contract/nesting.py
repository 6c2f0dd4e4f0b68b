"""The contract of units of work inside each other: savepoints, of which a delivery is one."""

from __future__ import annotations

import re
from contextlib import suppress

import anyio
from anyio import create_task_group, wait_all_tasks_blocked

from eventkit import EventContext, current_delivery
from eventkit.exceptions import EventContextClosedError
from tests.contract.bus import BusContract, Gate, calling, for_each, ignore, raises


class NestingContract(BusContract):
    """Units of work inside units of work, and what they hand to each other."""

    # Nested units are savepoints

    async def test_a_nested_unit_hands_over_and_delivers_nothing_itself(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context() as outer:
            bus.publish("a")
            async with bus.context() as nested:
                bus.publish("b")
            assert nested.closed
            assert seen == []
            assert [delivery.event for delivery in outer.pending] == ["a", "b"]
            bus.publish("c")

        assert seen == ["handled a", "handled b", "handled c"]

    async def test_an_exception_drops_only_the_events_of_the_nested_unit(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context():
            bus.publish("a")
            with suppress(LookupError):
                async with bus.context():
                    bus.publish("b")
                    raise LookupError
            assert seen == ["discarded b"]
            bus.publish("c")

        assert seen == ["discarded b", "handled a", "handled c"]

    async def test_what_a_nested_unit_handed_over_fails_with_the_outer_one(self) -> None:
        bus, seen = self.watched_bus()
        with suppress(LookupError):
            async with bus.context():
                async with bus.context():
                    bus.publish("a")
                raise LookupError

        assert seen == ["discarded a"]

    @for_each(False, True)
    @for_each(False, True)
    async def test_what_was_released_in_a_nested_unit_is_delivered_whatever_fails(
        self, outer_fails: bool, nested_fails: bool
    ) -> None:
        bus, seen = self.watched_bus()
        with suppress(LookupError):
            async with bus.context():
                with suppress(LookupError):
                    async with bus.context() as nested:
                        bus.publish("a")
                        nested.release()
                        _fail_if(nested_fails)
                _fail_if(outer_fails)

        assert seen == ["handled a"]

    async def test_what_is_even_on_failure_stays_so_when_handed_over(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_discard_of_the_outer_unit_drops_what_was_handed_over_undecided(self) -> None:
        bus, seen = self.watched_bus()
        async with bus.context() as outer:
            async with bus.context() as nested:
                bus.publish("a")
                nested.release()
                bus.publish("b")
            outer.discard()

        assert seen == ["discarded b", "handled a"]

    async def test_the_active_unit_is_the_innermost_one_and_then_the_outer_one_again(self) -> None:
        bus, _ = self.watched_bus()
        async with bus.context() as outer:
            assert bus.current_context() is outer
            async with bus.context() as nested:
                assert bus.current_context() is nested
            assert bus.current_context() is outer

    async def test_a_nested_unit_that_outlives_its_outer_one_drains(self) -> None:
        bus, seen = self.watched_bus()
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
        self,
    ) -> None:
        bus, seen = self.watched_bus()
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

    async def test_a_unit_opened_in_a_task_that_outlived_its_unit_is_one_of_its_own(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_a_unit_that_is_left_while_another_task_drains_it_loses_nothing(self) -> None:
        bus, seen = self.watched_bus()
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
        self,
    ) -> None:
        bus, seen = self.watched_bus()
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

    async def test_a_failed_handlers_events_are_discarded_and_its_siblings_are_not(self) -> None:
        bus, seen = self.watched_bus()

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

    async def test_what_a_failed_handler_had_released_is_delivered(self) -> None:
        bus, seen = self.watched_bus()

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

    async def test_a_handler_may_discard_what_it_published(self) -> None:
        bus, seen = self.watched_bus()

        @bus.on(int)
        async def rolled_back(event: int) -> None:
            bus.publish("dropped")
            bus.current_context().discard()
            bus.publish("kept")

        async with bus.context():
            bus.publish(1)

        assert seen == ["discarded dropped", "handled 1", "handled kept"]

    async def test_units_nested_in_a_handler_hand_over_to_its_delivery(self) -> None:
        bus, seen = self.watched_bus()

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

    async def test_a_synchronous_handler_nests_units_with_a_plain_with(self) -> None:
        bus, seen = self.watched_bus()

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

    async def test_follow_ups_are_delivered_although_the_unit_that_caused_them_failed(self) -> None:
        bus, seen = self.watched_bus()
        bus.subscribe(int, calling(lambda: bus.publish("caused")), thread=False)
        with suppress(LookupError):
            async with bus.context():
                bus.publish(1, even_on_failure=True)
                raise LookupError

        assert seen == ["handled 1", "handled caused"]

    async def test_a_task_that_outlives_its_handler_is_told_so_and_opens_its_own_unit(self) -> None:
        bus, seen = self.watched_bus()
        told: list[str] = []
        go_on = anyio.Event()

        async def outlive() -> None:
            await go_on.wait()
            with raises(EventContextClosedError) as error:
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
            r"builtins\.int -> .*handle\)\. A task that outlives its handler needs its own unit of "
            r"work: `async with bus\.context\(independent=True\):`, or in a thread `with`",
            told[0],
        )

    async def test_a_unit_that_outlives_the_handler_it_is_in_drains(self) -> None:
        bus, seen = self.watched_bus()
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

    async def test_a_handler_that_publishes_to_the_unit_around_it_causes_what_it_publishes(
        self,
    ) -> None:
        bus = self.new_bus(max_depth=3)
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

    async def test_a_task_that_outlives_its_handler_is_the_cause_of_nothing(self) -> None:
        bus, seen = self.watched_bus()
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


def _fail_if(wanted: bool) -> None:
    if wanted:
        raise LookupError
