"""What people do with deliveries that are kept: look, try again, drop, count, run here and now."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import anyio
import pytest
from sqlalchemy import Engine
from sqlalchemy import event as events
from sqlalchemy.pool import QueuePool

from eventkit import Durable, EventBus
from eventkit._core.bus import state_of
from eventkit.outbox import Outbox
from eventkit.outbox._relay import Relay
from eventkit.outbox._store import State
from tests.outbox.processes import event, holdings_of, keep, look, relay_of, warned
from tests.outbox.rows import PUBLISHED
from tests.outbox.scenes import Placed, Scene, relaying, until
from tests.witness import ignore

pytestmark = pytest.mark.anyio


class NotNow(Exception):
    """What a service says that is busy."""


@pytest.fixture(autouse=True)
def quiet(bus: EventBus) -> None:
    bus.report_failure = ignore


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    names: list[str] = []

    @bus.on(Placed, durable=Durable(attempts=3), name="mail")
    async def mail(event: Placed) -> None:
        names.append(event.name)
        if event.name == "fails":
            raise ValueError("secret of ada")

    return names


async def test_a_dead_delivery_is_found_looked_at_tried_again_and_dropped(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    await keep(scene, bus, Placed("fails"))
    assert scene.kept() == {"mail": (State.READY, 1)}
    report = await outbox.run_due(within=100)
    assert (report.handled, len(report.failures)) == (0, 2)
    (dead,) = await outbox.deliveries()
    assert (dead.state, dead.attempt, dead.handler, dead.event_type) == (
        "dead",
        3,
        "mail",
        "shop.placed",
    )
    assert dead.payload is None
    assert dead.owner is None
    assert dead.error is not None
    assert dead.error.startswith("builtins.ValueError at ")
    assert "secret" not in dead.error
    assert dead.published_at.tzinfo is UTC
    found = await outbox.get(dead.id)
    assert found is not None
    assert found.payload == '{"name":"fails"}'
    assert "fails" not in repr(found)
    assert await outbox.get(uuid4()) is None

    stats = await outbox.stats()
    assert (stats.ready, stats.leased, stats.unreadable, stats.dead) == (0, 0, 0, 1)
    assert stats.handlers["mail"].dead == 1
    assert stats.oldest_due is None

    assert await outbox.retry(handler="stock") == 0
    assert await outbox.retry([dead.id]) == 1
    assert scene.kept() == {"mail": (State.READY, 0)}
    stats = await outbox.stats()
    assert stats.ready == 1
    assert stats.oldest_due is not None
    assert stats.oldest_due >= 0
    report = await outbox.run_due()
    assert [failure.delivery.attempt for failure in report.failures] == [1]
    assert report.failures[0].delivery.id == dead.id

    assert await outbox.drop(handler="mail") == 1
    assert scene.kept() == {}


async def test_lists_are_of_one_state_and_handler_and_limited(scene: Scene, outbox: Outbox) -> None:
    ids = scene.table.insert(event("mail"), event("mail"), event("stock"))
    scene.table.change(ids[0], "state = 2")
    assert [row.id for row in await outbox.deliveries()] == [ids[0]]
    assert {row.id for row in await outbox.deliveries("ready")} == {*ids[1:]}
    assert [row.id for row in await outbox.deliveries("ready", handler="stock")] == [ids[2]]
    assert len(await outbox.deliveries(None)) == 3
    assert len(await outbox.deliveries(None, limit=2)) == 2
    with pytest.raises(ValueError, match="there is no state 'late'"):
        await outbox.deliveries("late")


async def test_who_tries_again_or_drops_says_what(scene: Scene, outbox: Outbox) -> None:
    ids = scene.table.insert(event("mail"), event("stock"), event("bill"))
    for id_ in ids:
        scene.table.change(id_, "state = 2")
    with pytest.raises(ValueError, match="retry which deliveries"):
        await outbox.retry()
    with pytest.raises(ValueError, match="drop which deliveries"):
        await outbox.drop()
    years = datetime.now(UTC) - datetime.fromtimestamp(PUBLISHED, UTC)
    assert await outbox.retry(before=years + timedelta(days=1)) == 0
    said: list[int] = []
    assert await outbox.retry(before=years - timedelta(days=1), progress=said.append) == 3
    assert said == [3]
    assert await outbox.drop(before=60.0) == 3
    assert await outbox.drop([]) == 0
    assert not scene.table.rows()


async def test_what_runs_is_neither_tried_again_nor_dropped(scene: Scene, outbox: Outbox) -> None:
    ids = scene.table.insert(event("mail"), owner="host:1:other")
    assert await outbox.retry(ids) == 0
    assert await outbox.drop(ids) == 0
    assert len(scene.table.rows()) == 1


async def test_an_attempt_waits_for_its_pause_and_within_means_as_if_it_were_over(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    await keep(scene, bus, Placed("fails"))
    assert (await outbox.run_due()).failures == ()
    assert len((await outbox.run_due(within=1.3)).failures) == 1
    assert scene.kept() == {"mail": (State.READY, 2)}
    assert len((await outbox.run_due(within=10)).failures) == 1
    assert scene.kept() == {"mail": (State.DEAD, 3)}


async def test_a_backoff_decides_by_the_error(scene: Scene, bus: EventBus, outbox: Outbox) -> None:
    asked: list[tuple[int, type]] = []

    def backoff(attempt: int, error: BaseException) -> float | None:
        asked.append((attempt, type(error)))
        return 60.0 if isinstance(error, NotNow) else None

    @bus.on(Placed, durable=Durable(backoff=backoff), name="mail")
    async def mail(event: Placed) -> None:
        raise NotNow if event.name == "busy" else LookupError

    busy, gone = scene.table.insert(event("mail", name="busy"), event("mail", name="gone"))
    await outbox.run_due()
    assert sorted(asked, key=str) == [(1, NotNow), (1, LookupError)] or len(asked) == 2
    later, dead = await outbox.get(busy), await outbox.get(gone)
    assert later is not None
    assert dead is not None
    assert (later.state, later.attempt) == ("ready", 1)
    assert (dead.state, dead.attempt) == ("dead", 1)
    seconds = (later.due_at - dead.due_at).total_seconds()
    assert 45 < seconds < 75  # a minute, with 20 % more or less


async def test_a_backoff_that_fails_is_told_and_replaced(
    scene: Scene, bus: EventBus, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    @bus.on(Placed, durable=Durable(backoff=lambda attempt, error: 1 / 0), name="mail")
    async def mail(event: Placed) -> None:
        raise NotNow

    scene.table.insert(event("mail"))
    await outbox.run_due()
    assert scene.kept() == {"mail": (State.READY, 1)}
    assert warned(caplog, "backoff failed, so the default pause is used") == 1


async def test_run_due_reports_and_leaves_the_rest_when_it_is_cancelled(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    begun = anyio.Event()

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        begun.set()
        await anyio.sleep_forever()

    scene.table.insert(*(event("mail") for _ in range(3)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox.run_due)
        await begun.wait()
        tasks.cancel_scope.cancel()
    assert bus.stats.requeued == 1
    states = [(state, attempt) for state, attempt, _ in scene.table.rows().values()]
    assert (State.READY, 0) in states
    known = holdings_of(outbox)._known_ids
    leased = {id_ for id_, (state, *_) in scene.table.rows().items() if state == State.LEASED}
    assert len(leased) == 2
    await until(lambda: not leased & {*known()})  # so the next heartbeats give them back


async def test_run_due_works_beside_a_relay(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    async with relaying(outbox):
        await until(lambda: outbox.healthy)
        scene.table.insert(*(event("mail", name="fails") for _ in range(5)))
        while any(state != State.DEAD for state, *_ in scene.table.rows().values()):
            await outbox.run_due(within=100)
    assert len(seen) == 15


async def test_it_is_healthy_while_each_relay_looks_and_the_lease_is_valid(
    scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    lease: Any = holdings_of(outbox).lease
    monkeypatch.setattr(lease, "_clock", lambda: now)
    monkeypatch.setattr(lease, "start", lambda: None)
    assert not outbox.healthy
    async with relay_of(bus, outbox) as relay:
        assert not outbox.healthy
        await look(relay)
        relay._looked_at = now  # as its loop notes
        assert outbox.healthy
        now += 1.5
        assert outbox.healthy
        now += 0.1
        assert not outbox.healthy
        relay._looked_at = now
        assert outbox.healthy
        lease.stop()
        assert not outbox.healthy
        await holdings_of(outbox).hold_lease()
        assert outbox.healthy
        relay.stop()
        assert not outbox.healthy


async def test_a_relay_uses_three_connections_and_asks_once_per_poll_while_nothing_is_due(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def pause(relay: Relay) -> float:
        nonlocal looks
        looks += 1
        return 0.001

    said: list[str] = []
    database: Any = holdings_of(outbox).database
    async with relay_of(bus, outbox, starts=True):
        await until(lambda: outbox.healthy)
        link: Any = next(iter(database._links.values()))
        engine: Engine = link.engine.sync_engine if scene.awaits else link._engine

        def note(*args: Any) -> None:
            if "eventkit_outbox" in args[2]:
                said.append(args[2])

        events.listen(engine, "before_cursor_execute", note)
        monkeypatch.setattr(Relay, "_pause", pause)
        holdings_of(outbox).wake()
        await until(lambda: looks >= 10)
        monkeypatch.undo()
        for number in range(30):
            scene.table.insert(event("mail", name=str(number)))
        holdings_of(outbox).wake()
        await until(lambda: len(seen) == 30)
        if isinstance(engine.pool, QueuePool):
            assert engine.pool.checkedin() + engine.pool.checkedout() <= 3
        await until(lambda: not scene.table.rows())
    idle = said[:10]
    assert len([text for text in idle if "union all" in text]) >= 9  # the look alone


async def test_a_process_without_a_relay_leases_over_one_connection(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    state_of(bus)
    await keep(scene, bus, Placed())
    assert seen == ["ada"]
    database: Any = holdings_of(outbox).database
    (link,) = database._links.values()
    pool = link.engine.pool if scene.awaits else link._engine.pool
    if isinstance(pool, QueuePool):
        assert pool.checkedin() + pool.checkedout() <= 2


def test_the_schema_can_be_had_as_text(outbox: Outbox) -> None:
    text = outbox.schema()
    for name in ("eventkit_outbox", "eventkit_process"):
        assert name in text


async def test_outboxes_of_three_processes_keep_the_order_of_each_key(scene: Scene) -> None:
    order: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    failed: set[str] = set()
    running: set[str] = set()

    def process() -> tuple[EventBus, Outbox]:
        bus = EventBus()
        bus.report_failure = ignore

        def no_pause(attempt: int, error: BaseException) -> float:
            return 0.0

        @bus.on(
            Placed,
            durable=Durable(attempts=2, backoff=no_pause, key=lambda event: event.name[0]),
            name="mail",
        )
        async def mail(event: Placed) -> None:
            key = event.name[0]
            assert key not in running, "two of one key at once"
            running.add(key)
            try:
                await anyio.sleep(0.001)
                if event.name.endswith("dead") or (
                    event.name.endswith("3") and event.name not in failed
                ):
                    failed.add(event.name)
                    raise ValueError
                order[key].append(event.name)
            finally:
                running.discard(key)

        return bus, scene.outbox(bus)

    processes = [process() for _ in range(3)]
    first, _ = processes[0]
    names = [str(number) for number in range(6)]
    names[2] = "2 dead"
    async with anyio.create_task_group() as tasks:
        for _, outbox in processes:
            tasks.start_soon(outbox.run)
        await until(lambda: all(outbox.healthy for _, outbox in processes))
        for name in names:
            await keep(scene, first, *(Placed(f"{key}{name}") for key in order))

        def is_done() -> bool:
            for _, outbox in processes:
                holdings_of(outbox).wake()
            return {state for state, *_ in scene.table.rows().values()} == {State.DEAD}

        await until(is_done)
        tasks.cancel_scope.cancel()
    for key, handled in order.items():
        assert handled == [f"{key}{name}" for name in names if not name.endswith("dead")]
    assert len(scene.table.rows()) == 3


def test_users_see_of_an_outbox_what_they_are_to_use(outbox: Outbox) -> None:
    assert {each for each in dir(outbox) if not each.startswith("_")} == {
        "bus",
        "concurrency",
        "count",
        "deliveries",
        "detach",
        "detached",
        "drop",
        "get",
        "healthy",
        "in_memory",
        "read_stats",
        "receive",
        "retry",
        "run",
        "run_due",
        "schema",
        "stats",
    }
