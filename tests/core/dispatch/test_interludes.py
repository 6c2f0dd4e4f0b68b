"""What has to be awaited before an event: an outbox writes rows, and a cancellation may come."""

import anyio
import pytest
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from eventkit import EventBus
from tests.core.keepers import FakeKeeper
from tests.dispatching import Boom, NewBus, Ping, Pong
from tests.witness import witnessed

pytestmark = pytest.mark.anyio


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    """What handlers do: two of `Ping`, one of which is kept, and a kept one of `Pong`."""
    seen: list[str] = []

    @bus.on(Ping, durable=True, name="kept")
    async def keep(event: Ping) -> None:
        await checkpoint()
        seen.append(f"kept {event.number}")

    @bus.on(Ping, name="memory")
    async def remember(event: Ping) -> None:
        seen.append(f"memory {event.number}")
        bus.publish(Pong(event.number))

    @bus.on(Pong, durable=True, name="pong")
    async def pong(event: Pong) -> None:
        seen.append(f"pong {event.number}")

    return seen


@pytest.fixture
def keeper(bus: EventBus, seen: list[str]) -> FakeKeeper:
    return FakeKeeper(bus)


async def test_rows_are_written_before_the_first_event_of_several_and_before_what_comes_of_them(
    bus: EventBus, seen: list[str], keeper: FakeKeeper
) -> None:
    async with bus.context():
        bus.publish(Ping(1), Ping(2))

    written = [each for each in keeper.told if each.startswith("write")]
    assert written[0] == "write Ping(number=1) Ping(number=2)"
    assert " ".join(written[1:]).count("Pong") == 2
    assert keeper.told.index("handled kept") > keeper.told.index(written[0])
    assert sorted(seen) == ["kept 1", "kept 2", "memory 1", "memory 2", "pong 1", "pong 2"]
    assert keeper.told[-1] == "settle"


async def test_a_keeper_that_may_not_run_leaves_out_what_it_keeps(
    bus: EventBus, seen: list[str], keeper: FakeKeeper
) -> None:
    keeper.may_run = False

    async with bus.context() as unit:
        bus.publish(Ping(1))
        unit.release()
        report = await unit.drain()

    assert report.requeued == 2
    assert seen == ["memory 1"]
    assert bus.stats.requeued == 2


async def test_a_cancellation_while_rows_are_written_runs_nothing(
    bus: EventBus, seen: list[str], keeper: FakeKeeper
) -> None:
    told = witnessed(bus)

    with CancelScope() as scope:

        async def cancelled() -> None:
            scope.cancel()
            await checkpoint()

        keeper.works = cancelled
        async with bus.context():
            bus.publish(Ping(1))

    assert seen == []
    assert told == ["undelivered Ping(number=1)"] * 2
    assert keeper.told[-1] == "settle"


async def test_a_cancellation_after_rows_were_written_requeues_what_they_keep(
    bus: EventBus, seen: list[str], keeper: FakeKeeper
) -> None:
    told = witnessed(bus)

    with CancelScope() as scope:

        async def cancelled() -> None:
            scope.cancel()

        keeper.works = cancelled
        async with bus.context():
            bus.publish(Ping(1))

    assert seen == []
    assert sorted(told) == ["requeued Ping(number=1)", "undelivered Ping(number=1)"]


async def test_a_handler_that_is_cancelled_is_requeued_if_it_is_kept(
    bus: EventBus, keeper: FakeKeeper
) -> None:
    told = witnessed(bus)

    @bus.on(int, durable=True, name="kept number")
    async def keep(event: int) -> None:
        await anyio.sleep_forever()

    @bus.on(int, name="memory of a number")
    async def remember(event: int) -> None:
        scope.cancel()
        await anyio.sleep_forever()

    with CancelScope() as scope:
        async with bus.context():
            bus.publish(7)

    assert sorted(told) == ["requeued 7", "undelivered 7"]
    assert bus.stats.requeued == bus.stats.undelivered == 1


async def test_a_handler_that_fails_is_failed_whether_it_is_kept_or_not(
    new_bus: NewBus,
) -> None:
    bus = new_bus()

    @bus.on(Ping, durable=True, name="kept")
    async def keep(event: Ping) -> None:
        raise Boom

    keeper = FakeKeeper(bus)
    async with bus.context() as unit:
        bus.publish(Ping(1))
        unit.release()
        report = await unit.drain()

    assert [type(failure.error) for failure in report.failures] == [Boom]
    assert "Boom kept" in keeper.told
    assert bus.stats.failed == 1
