"""The contract of cancellation: what it ends, what it leaves alone, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import anyio
from anyio import CancelScope, create_task_group, fail_after, move_on_after, sleep_forever
from anyio.lowlevel import checkpoint

from eventkit._core.bus import EventBus
from tests.contract.bus import (
    Boom,
    BusContract,
    Ping,
    Pong,
    all_tasks_blocked,
    by_drain,
    cancelled_by_scope,
    for_each,
    kept_reports,
    kinds_in,
    outcomes,
    raises,
)


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


class CancellationContract(BusContract):
    """What a cancellation from outside does to deliveries that run, and to those that wait."""

    async def failures_of_cancelled(self, bus: EventBus) -> set[Exception]:
        """Deliver an event, cancel that, and give what failed: raised or, if need be, reported."""
        reported = kept_reports(bus)
        raised: list[Exception] = []

        async def deliver() -> None:
            raised.extend(await self.deliver(bus, Ping()))

        await self.cancel(deliver)
        return {*raised, *reported}

    @for_each(*STUCK)
    @for_each(1, 3)
    async def test_what_a_cancellation_ends_is_undelivered_and_the_bus_works_on(
        self, count: int, subscribe: Callable[[EventBus], None]
    ) -> None:
        bus = self.new_bus()
        for _ in range(count):
            subscribe(bus)
        seen: list[int] = []

        @bus.on(Ping)
        async def note(event: Ping) -> None:
            seen.append(event.number)

        await self.cancel(partial(self.deliver, bus, Ping(1)))
        assert outcomes(bus) == (1, 0, count)
        assert (bus.stats.pending, bus.stats.running) == (0, 0)

        for subscription in bus.handlers_for(Ping)[:count]:
            subscription.cancel()
        assert await self.deliver(bus, Ping(2)) == []
        assert seen == [1, 2]

    async def test_a_cancellation_is_seen_by_every_handler_where_it_waits(self) -> None:
        bus = self.new_bus()
        seen: list[int] = []

        async def handler(event: Ping, number: int) -> None:
            try:
                await sleep_forever()
            except anyio.get_cancelled_exc_class():
                seen.append(number)
                raise

        for number in range(5):
            bus.subscribe(Ping, partial(handler, number=number))

        await self.cancel(partial(self.deliver, bus, Ping()))

        assert sorted(seen) == list(range(5))

    async def test_cancellation_by_a_scope_comes_again_at_each_further_await(self) -> None:
        bus = self.new_bus()
        times: list[int] = []

        async def handler(event: Ping, number: int) -> None:
            for time in range(3):
                try:
                    await sleep_forever()
                except anyio.get_cancelled_exc_class():
                    times.append(time)
            await sleep_forever()

        for number in range(2):
            bus.subscribe(Ping, partial(handler, number=number))

        await cancelled_by_scope(partial(self.deliver, bus, Ping()))

        assert sorted(times) == [0, 0, 1, 1, 2, 2]
        assert outcomes(bus) == (0, 0, 2)

    async def test_a_handler_that_ends_well_although_cancelled_is_handled(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping)
        async def stubborn(event: Ping) -> None:
            try:
                await sleep_forever()
            except anyio.get_cancelled_exc_class():
                pass

        @bus.on(Ping)
        async def other(event: Ping) -> None:
            await sleep_forever()

        await self.cancel(partial(self.deliver, bus, Ping()))

        assert outcomes(bus) == (1, 0, 1)

    async def test_a_handler_that_fails_while_cancelled_is_a_failure_that_is_not_lost(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping)
        async def broken_cleanup(event: Ping) -> None:
            try:
                await sleep_forever()
            finally:
                raise Boom

        failures = await self.failures_of_cancelled(bus)

        assert [type(error) for error in failures] == [Boom]
        assert outcomes(bus) == (0, 1, 0)

    async def test_a_child_that_fails_while_its_handler_is_cancelled_is_not_lost(self) -> None:
        bus = self.new_bus()

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

        (group,) = await self.failures_of_cancelled(bus)

        assert kinds_in(group) == [Boom]
        assert outcomes(bus) == (0, 1, 0)

    @for_each(True, False)
    async def test_a_shielded_handler_finishes_while_its_sibling_is_cancelled_at_once(
        self, shielded_first: bool
    ) -> None:
        bus = self.new_bus()
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
                await self.deliver(bus, Ping())

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

    async def test_under_a_cancellation_already_in_effect_no_handler_starts(self) -> None:
        bus = self.new_bus()
        started: list[object] = []
        bus.subscribe(Ping, started.append, thread=False)
        bus.subscribe(Ping, partial(started.append))
        returned: list[object] = []

        with CancelScope() as scope:
            scope.cancel()
            returned.append(await self.deliver(bus, Ping()))

        assert started == []
        assert returned == [], "nothing was delivered, so it must not look as if"
        assert outcomes(bus) == (0, 0, 2)

    async def test_inside_a_shield_an_outer_cancellation_means_nothing_to_a_dispatch(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping)
        async def handler(event: Ping) -> None:
            await checkpoint()

        with CancelScope() as scope:
            scope.cancel()
            with CancelScope(shield=True):
                assert await self.deliver(bus, Ping()) == []

        assert outcomes(bus) == (1, 0, 0)

    async def test_cancelling_sequential_handlers_leaves_the_later_ones_undelivered(self) -> None:
        bus = self.new_bus(sequential=True)
        started: list[int] = []

        async def handler(event: Ping, number: int) -> None:
            started.append(number)
            if number == 1:
                await sleep_forever()

        for number in range(4):
            bus.subscribe(Ping, partial(handler, number=number))

        await self.cancel(partial(self.deliver, bus, Ping()))

        assert started == [0, 1]
        assert outcomes(bus) == (1, 0, 3)

    async def test_cancelling_leaves_follow_ups_undelivered(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping)
        async def publishes(event: Ping) -> None:
            bus.publish(Pong(1), Pong(2))

        @bus.on(Pong)
        async def wait(event: Pong) -> None:
            await sleep_forever()

        await self.cancel(partial(bus.dispatch, Ping()))

        assert outcomes(bus) == (1, 0, 2)

    async def test_what_an_interrupted_drain_had_not_started_waits_for_the_next(self) -> None:
        bus = self.new_bus()
        seen: list[int] = []

        @bus.on(Ping)
        async def handler(event: Ping) -> None:
            seen.append(event.number)
            if event.number == 2:
                await sleep_forever()

        async with bus.context() as unit:
            unit.publish(*map(Ping, range(1, 5)))

            await cancelled_by_scope(unit.drain)
            assert outcomes(bus) == (1, 0, 1)
            assert (await unit.drain()).handled == 2

        assert seen == [1, 2, 3, 4]

    async def test_a_narrower_timeout_around_one_awaited_dispatch_ends_that_alone(self) -> None:
        bus = self.new_bus()
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

        assert await self.deliver(bus, Ping()) == []
        assert sorted(steps) == ["outer went on", "sibling was spared"]
        assert outcomes(bus) == (2, 0, 2)

    async def test_a_timeout_around_a_dispatch_is_the_callers_timeout_error(self) -> None:
        bus = self.new_bus()
        stuck(bus)

        with raises(TimeoutError), fail_after(0.01):
            await bus.dispatch(Ping())

        assert outcomes(bus) == (0, 0, 1)

    async def test_a_dispatch_cancelled_from_outside_raises_no_dispatch_error(self) -> None:
        bus = self.new_bus()
        reported = kept_reports(bus)
        stuck(bus)

        @bus.on(Ping)
        async def fails(event: Ping) -> None:
            raise Boom

        await cancelled_by_scope(partial(bus.dispatch, Ping()))

        assert [type(error) for error in reported] == [Boom]
        await cancelled_by_scope(partial(by_drain, bus, Ping()))
        assert outcomes(bus) == (0, 2, 2)
