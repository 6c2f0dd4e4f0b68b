"""The contract of order: what is delivered after what, and because of what."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

from anyio import to_thread
from anyio.lowlevel import checkpoint

from eventkit import current_delivery
from eventkit._core.events import Delivery
from eventkit._core.observers import Observer
from tests.contract.bus import BusContract, calling, for_each


class Announced(Observer):
    """Keeps the deliveries as they were announced when their event was published."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []

    def published(self, event: object, deliveries: Sequence[Delivery]) -> None:
        """Keep them."""
        self.deliveries += deliveries


async def rest(steps: int) -> None:
    """Let others go on this many times."""
    for _ in range(steps):
        await checkpoint()


class OrderContract(BusContract):
    """In which order events are delivered, and what each delivery knows of its cause."""

    async def test_events_are_delivered_in_publish_order(self) -> None:
        bus = self.new_bus()
        handled: list[int] = []

        @bus.on(int)
        async def handle(event: int) -> None:
            await rest(10 - event)
            handled.append(event)

        async with bus.context():
            bus.publish(0, 1)
            for event in range(2, 10):
                bus.publish(event)

        assert handled == list(range(10))

    @for_each(False, True)
    async def test_the_next_event_starts_when_all_handlers_of_the_one_before_have_ended(
        self, sequential: bool
    ) -> None:
        bus = self.new_bus(sequential=sequential)
        steps: list[str] = []

        @bus.on(int)
        async def slow(event: int) -> None:
            steps.append(f"slow begins {event}")
            await rest(5)
            steps.append(f"slow ends {event}")

        @bus.on(int)
        async def quick(event: int) -> None:
            steps.append(f"quick {event}")

        async with bus.context():
            bus.publish(1, 2)

        one = (
            ["slow begins", "slow ends", "quick"]
            if sequential
            else ["slow begins", "quick", "slow ends"]
        )
        assert steps == [f"{step} {event}" for event in (1, 2) for step in one]

    async def test_follow_ups_come_breadth_first_behind_all_that_was_published_before(self) -> None:
        bus = self.new_bus()
        handled: list[str] = []

        @bus.on(str)
        async def handle(event: str) -> None:
            handled.append(event)
            if len(event) < 3:
                bus.publish(f"{event}0", f"{event}1")

        async with bus.context():
            bus.publish("a", "b")

        assert handled == [
            *("a", "b"),
            *("a0", "a1", "b0", "b1"),
            *("a00", "a01", "a10", "a11", "b00", "b01", "b10", "b11"),
        ]

    async def test_follow_ups_come_in_handler_order_then_publish_order_although_concurrent(
        self,
    ) -> None:
        bus = self.new_bus()
        handled: list[str] = []

        def publishing(name: str, steps: int) -> None:
            @bus.on(int, name=name)
            async def publish(event: int) -> None:
                await rest(steps)
                bus.publish(f"{name}1")
                await rest(steps)
                bus.publish(f"{name}2")

        for name, steps in (("last", 9), ("first", 1), ("middle", 5)):
            publishing(name, steps)
        bus.subscribe(str, handled.append, thread=False)

        async with bus.context():
            bus.publish(0)

        assert handled == ["last1", "last2", "first1", "first2", "middle1", "middle2"]

    async def test_follow_ups_follow_when_all_handlers_of_their_event_have_ended(self) -> None:
        bus = self.new_bus()
        steps: list[str] = []

        @bus.on(int)
        async def publish(event: int) -> None:
            bus.publish("follow-up")

        @bus.on(int)
        async def sibling(event: int) -> None:
            await rest(5)
            steps.append("sibling has ended")

        bus.subscribe(str, steps.append, thread=False)
        await bus.dispatch(1)

        assert steps == ["sibling has ended", "follow-up"]

    async def test_each_round_of_follow_ups_keeps_the_order_of_the_one_before(self) -> None:
        bus = self.new_bus()
        handled: list[tuple[int, ...]] = []

        async def follow(event: tuple[int, ...], number: int) -> None:
            if number == 0:
                handled.append(event)
            await rest(3 - number)
            if len(event) < 2:
                bus.publish((*event, number))

        for number in range(3):
            bus.subscribe(tuple, partial(follow, number=number), name=str(number))
        await bus.dispatch(())

        # Each event of the second round has three handlers, which publish one after the other.
        ones = [(i,) for i in range(3)]
        assert handled == [(), *ones, *((i, j) for i in range(3) for j in range(3))]

    async def test_follow_ups_of_worker_threads_keep_their_order(self) -> None:
        bus = self.new_bus()
        handled: list[str] = []

        @bus.on(int)
        def in_thread(event: int) -> None:
            bus.publish("thread1", "thread2")

        bus.subscribe(int, calling(lambda: bus.publish("loop")), thread=False)
        bus.subscribe(str, handled.append, thread=False)
        await bus.dispatch(1)

        assert handled == ["thread1", "thread2", "loop"]

    async def test_follow_ups_carry_their_cause_and_depth(self) -> None:
        bus = self.new_bus()
        chains: list[list[str]] = []
        depths: list[int] = []

        @bus.on(int, name="count")
        async def count_down(event: int) -> None:
            delivery = current_delivery()
            depths.append(delivery.depth)
            chains.append([str(step) for step in delivery.chain()])
            if event:
                async with bus.context():  # a unit inside the handler is no step of its own
                    bus.publish(event - 1)

        async with bus.context():
            bus.publish(2)

        assert depths == [0, 1, 2]
        assert chains == [["builtins.int -> count"] * depth for depth in (1, 2, 3)]

    async def test_a_dispatch_inside_a_handler_is_caused_by_it(self) -> None:
        bus = self.new_bus()
        causes: list[Delivery | None] = []
        bus.subscribe(str, calling(lambda: causes.append(current_delivery().cause)), thread=False)

        @bus.on(int)
        async def handle(event: int) -> None:
            await bus.dispatch("inner")
            assert causes == [current_delivery()]

        await bus.dispatch(1)
        await bus.dispatch("outer")

        assert causes[1:] == [None]

    async def test_current_delivery_is_the_one_that_was_announced_also_in_threads(self) -> None:
        bus = self.new_bus()
        announced = Announced()
        bus.observe(announced)
        current: list[Delivery] = []

        @bus.on(int)
        async def handle(event: int) -> None:
            current.append(current_delivery())
            current.append(await to_thread.run_sync(current_delivery))

        bus.subscribe(int, calling(lambda: current.append(current_delivery())), name="second")
        before = datetime.now(UTC)
        async with bus.context():
            bus.publish(7)
            waiting = bus.current_context().pending

        first, second = announced.deliveries
        assert sorted(map(hash, current)) == sorted(map(hash, [first, first, second]))
        assert set(current) == {first, second} == set(waiting)
        assert (first.event, first.cause, first.depth, first.attempt) == (7, None, 0, 1)
        assert second.handler == "second"
        assert first.published_at.tzinfo is UTC
        assert abs(first.published_at - before).total_seconds() < 60

    async def test_delivery_ids_are_stable_and_distinct(self) -> None:
        bus = self.new_bus()
        announced = Announced()
        bus.observe(announced)
        ids: list[object] = []
        for name in ("first", "second"):
            bus.subscribe(
                int, calling(lambda: ids.append(current_delivery().id)), name=name, thread=False
            )

        same = 1
        async with bus.context():
            bus.publish(same, same)
            bus.publish(same)

        assert len(set(ids)) == 6
        assert [delivery.id for delivery in announced.deliveries] == ids
        assert [delivery.id for delivery in announced.deliveries] == ids  # at every look
