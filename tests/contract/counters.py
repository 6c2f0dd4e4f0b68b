"""The contract of counters: nothing is lost from sight, at any moment, however it ends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from random import Random

from anyio import create_task_group, from_thread
from anyio.lowlevel import checkpoint

from eventkit._core.events import Delivery
from eventkit._core.observers import Observer
from eventkit.exceptions import EventContextClosedError, EventContextFullError, EventDepthError
from tests.contract.bus import (
    Boom,
    BusContract,
    Gate,
    Ping,
    Pong,
    assert_conserved,
    nothing,
    raises,
)


@dataclass(frozen=True, slots=True)
class Tree:
    """An event whose handler publishes the branches, and then may fail."""

    branches: tuple[Tree, ...]
    fails: bool


def grown(random: Random, depth: int) -> Tree:
    """Any tree, at most this deep."""
    branches = random.randrange(4) if depth else 0
    return Tree(
        tuple(grown(random, depth - 1) for _ in range(branches)), fails=random.random() < 0.3
    )


@dataclass(slots=True)
class Expected:
    """What becomes of the deliveries of trees with one handler."""

    handled: int = 0
    failed: int = 0
    discarded: int = 0

    def add(self, tree: Tree) -> None:
        """Count what comes of the tree; a failed handler's events are discarded."""
        if tree.fails:
            self.failed += 1
            self.discarded += len(tree.branches)
        else:
            self.handled += 1
            for branch in tree.branches:
                self.add(branch)


class CounterContract(BusContract):
    """What `bus.stats` says: `accepted` is the sum of all that can become of a delivery."""

    async def test_each_delivery_is_counted_once_by_how_it_ended(self) -> None:
        bus = self.new_bus()
        gate = Gate()

        @bus.on(Ping)
        async def fails_for_zero(event: Ping) -> None:
            if event.number == 0:
                raise Boom

        bus.subscribe(Pong, gate)
        with suppress(LookupError):
            async with bus.context():
                bus.publish(Ping(1), Pong())
                raise LookupError
        await self.deliver(bus, Ping(0))
        await self.deliver(bus, Ping(1))
        async with create_task_group() as tasks:
            tasks.start_soon(self.deliver, bus, Pong())
            await gate.reached.wait()
            tasks.cancel_scope.cancel()

        stats = bus.stats
        assert (stats.published, stats.accepted) == (5, 5)
        assert (stats.handled, stats.failed) == (1, 1)
        assert (stats.discarded, stats.undelivered) == (2, 1)

    async def test_pending_and_running_are_what_waits_and_runs_at_this_moment(self) -> None:
        bus = self.new_bus()
        gate = Gate()
        bus.subscribe(Ping, gate)

        async with bus.context() as unit:
            bus.publish(Ping(1), Ping(2))
            assert (bus.stats.pending, bus.stats.running) == (2, 0)
            async with create_task_group() as tasks:
                tasks.start_soon(unit.drain)
                await gate.reached.wait()
                assert (bus.stats.pending, bus.stats.running) == (1, 1)
                gate.opened.set()
            assert (bus.stats.pending, bus.stats.running) == (0, 0)

    async def test_what_is_refused_counts_nowhere(self) -> None:
        bus = self.new_bus(max_events=1)
        bus.subscribe(Ping, nothing, thread=False)

        async with bus.context() as unit:
            with raises(EventContextFullError):
                bus.publish(Ping(1), Ping(2))
            with raises(TypeError):
                bus.publish(Ping(1), Ping)
        with raises(EventContextClosedError):
            unit.publish(Ping(1))

        assert (bus.stats.published, bus.stats.accepted) == (0, 0)

    async def test_whatever_tree_of_events_grows_all_of_it_is_accounted_for(self) -> None:
        bus = self.new_bus()
        random = Random(1)
        trees = [grown(random, depth=4) for _ in range(50)]
        expected = Expected()
        for tree in trees:
            expected.add(tree)

        @bus.on(Tree)
        async def publish_branches(tree: Tree) -> None:
            bus.publish(*tree.branches)
            assert_conserved(bus)
            await checkpoint()
            if tree.fails:
                raise Boom

        async with create_task_group() as tasks:
            for tree in trees:
                tasks.start_soon(self.deliver, bus, tree)

        stats = bus.stats
        assert Expected(stats.handled, stats.failed, stats.discarded) == expected
        assert stats.undelivered == 0

    async def test_no_delivery_is_lost_from_sight_at_any_moment(self) -> None:
        bus = self.new_bus(max_depth=2)
        pending: list[int] = []

        class Checking(Observer):
            def published(self, event: object, deliveries: object) -> None:
                assert_conserved(bus)

            def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
                assert_conserved(bus)
                return nullcontext()

        @bus.on(Ping)
        async def publishes(event: Ping) -> None:
            assert_conserved(bus)
            bus.publish(Ping(), Pong())
            assert_conserved(bus)
            await checkpoint()
            assert_conserved(bus)

        @bus.on(Ping)
        async def fails(event: Ping) -> None:
            await checkpoint()
            assert_conserved(bus)
            raise Boom

        @bus.on(Pong)
        def in_thread(event: Pong) -> None:
            from_thread.run_sync(assert_conserved, bus)

        @bus.on(Pong)
        async def waiting(event: Pong) -> None:
            pending.append(bus.stats.pending)
            assert bus.stats.running > 0

        with bus.observe(Checking()):
            failures = await self.deliver(bus, Ping())

        # At the third depth the publish itself is refused.
        kinds = [type(failure) for failure in failures]
        assert (kinds.count(Boom), kinds.count(EventDepthError), len(kinds)) == (3, 1, 4)
        assert bus.stats.handled == 2 + 2 * 2

    async def test_a_handler_that_has_ended_does_not_run_while_the_next_one_is_in_a_thread(
        self,
    ) -> None:
        bus = self.new_bus()
        seen: list[tuple[int, int]] = []

        @bus.on(Ping)
        async def ends(event: Ping) -> None:
            pass

        @bus.on(Ping)
        def in_thread(event: Ping) -> None:
            stats = bus.stats
            seen.append((stats.handled, stats.running))

        assert await self.deliver(bus, Ping()) == []
        assert seen == [(1, 1)]

    async def test_an_event_without_handlers_is_counted_and_otherwise_nothing(self) -> None:
        bus = self.new_bus()
        assert await self.deliver(bus, Ping()) == []
        assert (bus.stats.published, bus.stats.accepted) == (1, 0)
