"""A relay looks into the table, takes over from the dead, and goes on whatever becomes of it."""

from collections.abc import Callable
from functools import partial
from threading import Event as ThreadEvent
from typing import Any
from uuid import UUID

import anyio
import pytest
from anyio import CancelScope
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool

from eventkit import Durable, EventBus
from eventkit.exceptions import OutboxSchemaError
from eventkit.outbox import Outbox
from eventkit.outbox import _relay as module
from eventkit.outbox._relay import Relay
from eventkit.outbox._store import State, Store
from tests.outbox.processes import (
    DEAD,
    Clock,
    event,
    holdings_of,
    keep,
    leave_dead,
    look,
    relay_of,
    warned,
)
from tests.outbox.scenes import Placed, Scene, relaying, until
from tests.witness import ignore

pytestmark = pytest.mark.anyio

AWAY = "the outbox cannot reach its database"
UNKNOWN = "stored deliveries wait for a handler that is not known here"


def seldom(relay: Relay) -> float:
    return 10_000.0


def at_once(relay: Relay) -> float:
    return 0.001


def no_column(connection: object) -> str:
    return "no such column"


@pytest.fixture
def clock(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(outbox, monkeypatch)


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    """What the handler `mail` has got."""
    names: list[str] = []
    bus.report_failure = ignore

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        names.append(event.name)

    return names


@pytest.fixture
def only_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first look a relay looks only when it is woken."""
    monkeypatch.setattr(Relay, "_pause", seldom)


async def test_a_relay_runs_what_is_due_by_handlers_of_both_kinds(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    @bus.on(Placed, durable=True, name="stock")
    def stock(event: Placed) -> None:
        seen.append(f"stock {event.name}")

    scene.table.insert(event("mail", "stock", name="bob"))
    async with relaying(outbox):
        await until(lambda: not scene.table.rows())
    assert sorted(seen) == ["bob", "stock bob"]


async def test_what_was_done_in_a_thread_is_written_down_without_a_further_look(
    scene: Scene, bus: EventBus, outbox: Outbox, only_woken: None
) -> None:
    @bus.on(Placed, durable=True, name="stock")
    def stock(event: Placed) -> None: ...

    scene.table.insert(event("stock"))
    async with relaying(outbox):
        await until(lambda: not scene.table.rows())


async def test_deliveries_of_a_key_follow_each_other_without_a_poll_in_between(
    scene: Scene, bus: EventBus, outbox: Outbox, only_woken: None
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=Durable(key=lambda event: "one"), name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)

    async with relaying(outbox):
        await until(lambda: outbox.healthy)
        for number in range(10):
            await keep(scene, bus, Placed(str(number)))
        await until(lambda: not scene.table.rows())
    assert seen == [str(number) for number in range(10)]


async def test_a_retry_wakes_the_relay(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str], only_woken: None
) -> None:
    (id_,) = scene.table.insert(event("mail"))
    scene.table.change(id_, "state = 2")
    async with relaying(outbox):
        await until(lambda: outbox.healthy)
        assert await outbox.retry([id_]) == 1
        await until(lambda: seen)


# The database is away


def be_away(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have its database be away, until what is returned is called."""
    database: Any = holdings_of(outbox).database

    def fail(*_: object) -> None:
        raise OperationalError("select 1", None, ConnectionRefusedError("nobody there"))

    real = database._transact
    monkeypatch.setattr(database, "_transact", fail)
    return partial(monkeypatch.setattr, database, "_transact", real)


async def test_a_database_that_is_away_is_complained_of_once_a_minute_and_asked_less_often(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    seen: list[str],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene.table.insert(event("mail"))
    polls: list[float] = []

    def pause(relay: Relay) -> float:
        polls.append(relay._poll)
        return 0.001

    monkeypatch.setattr(Relay, "_pause", pause)
    come_back = be_away(outbox, monkeypatch)
    async with relay_of(bus, outbox, starts=True):
        await until(lambda: len(polls) > 5)
        assert polls[:4] == [1.0, 1.6, 1.6, 1.6]
        assert warned(caplog, AWAY) == 1
        assert not outbox.healthy
        clock.now += 60
        await until(lambda: warned(caplog, AWAY) == 2)
        come_back()
        await until(lambda: not scene.table.rows())
        assert seen == ["ada"]
        assert 0.5 in polls

        polls.clear()
        come_back = be_away(outbox, monkeypatch)  # once more, in the midst
        scene.table.insert(event("mail", name="bob"))
        clock.now += 60
        await until(lambda: warned(caplog, AWAY) == 3)
        come_back()
        await until(lambda: not scene.table.rows())
        assert seen == ["ada", "bob"]


async def test_outcomes_wait_until_the_database_is_back(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    seen: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    may_end = anyio.Event()

    @bus.on(Placed, durable=True, name="stock")
    async def stock(event: Placed) -> None:
        seen.append("begins")
        await may_end.wait()

    monkeypatch.setattr(module, "PAUSE_AFTER_ERROR", 0.001)
    scene.table.insert(event("stock"))
    async with relaying(outbox):
        await until(lambda: seen)
        come_back = be_away(outbox, monkeypatch)
        may_end.set()
        await until(lambda: caplog.records)
        assert scene.kept() == {"stock": (State.LEASED, 1)}
        come_back()
        await until(lambda: not scene.table.rows())
    assert seen == ["begins"]


async def test_tables_that_are_missing_are_told_once_the_database_is_there(
    scene: Scene, bus: EventBus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = scene.outbox(bus)
    monkeypatch.setattr(holdings_of(outbox).store, "problem", no_column)
    monkeypatch.setattr(Relay, "_pause", at_once)
    come_back = be_away(outbox, monkeypatch)
    async with relay_of(bus, outbox, starts=True):
        come_back()
        clock = holdings_of(outbox)
        clock._complained_at = -1e9
        await until(lambda: any("no such column" in caplog.text for _ in "a"))


async def test_tables_that_are_missing_keep_a_relay_from_its_start(
    scene: Scene, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings_of(outbox).store, "problem", no_column)
    with pytest.raises(OutboxSchemaError, match="no such column"):
        await outbox.run()
    with pytest.raises(OutboxSchemaError, match="no such column"):
        await outbox.run_due()


# Who is dead


async def test_others_are_dead_only_for_who_was_alive_for_a_whole_lease_without_a_break(
    scene: Scene, bus: EventBus, outbox: Outbox, clock: Clock
) -> None:
    leave_dead(scene, "mail")
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await clock.go_on(14)
        await look(relay)
        await look(relay)
        await clock.go_on(20, renewing=False)  # the database was away
        for _ in range(3):
            await look(relay)
        await clock.go_on(14)
        for _ in range(3):
            await look(relay)
        assert scene.kept() == {"mail": (State.LEASED, 1)}
        assert DEAD in scene.table.processes()

        await clock.go_on(2)
        for _ in range(2):
            await look(relay)
        assert scene.kept() == {"mail": (State.READY, 1)}
        assert DEAD not in scene.table.processes()


async def test_on_sqlite_who_waits_for_the_lock_is_not_dead(
    scene: Scene, bus: EventBus, outbox: Outbox, clock: Clock
) -> None:
    if scene.kind != "sqlite":
        pytest.skip("elsewhere a heartbeat waits for nobody")
    leave_dead(scene, "mail")
    table, store = scene.table, scene.table.store
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await clock.go_on(16)
        pause: Callable[[], float] = relay._pause
        await look(relay)  # somebody held the lock, which ends now
        assert 0.1 < pause() < module.POLL  # SQLite has who waits try again each 0.1 s
        assert not relay._wanted.is_set()
        table.do(store.beat, DEAD, 15.0)  # it has had its turn
        await look(relay)
        assert pause() > module.POLL / 2
        table.lapse(DEAD)
        await look(relay)  # for the first time again
        assert scene.kept() == {"mail": (State.LEASED, 1)}
        await look(relay)
        assert scene.kept() == {"mail": (State.READY, 1)}


async def test_a_second_look_begins_only_after_this_process_has_had_the_lock(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if scene.kind != "sqlite":
        pytest.skip("elsewhere a heartbeat waits for nobody")
    leave_dead(scene, "mail")
    store: Any = holdings_of(outbox).store
    steps: list[str] = []
    for name in ("look", "beat", "reap"):
        monkeypatch.setattr(store, name, partial(noted, steps, name, getattr(store, name)))
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await clock.go_on(16)
        steps.clear()
        await look(relay)
        await look(relay)
    assert steps[:5] == ["look", "beat", "look", "beat", "reap"]


def noted(
    steps: list[str], name: str, function: Callable[..., Any], /, *args: Any, **kw: Any
) -> Any:
    steps.append(name)
    return function(*args, **kw)


async def test_a_process_that_left_nothing_is_no_warning(
    scene: Scene, bus: EventBus, outbox: Outbox, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    leave_dead(scene)
    caplog.set_level("INFO")
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await clock.go_on(16)
        await look(relay)
        await look(relay)
    said = [each for each in caplog.records if "without ending its lease" in each.getMessage()]
    assert [each.levelname for each in said] == ["INFO"]


def nobody_is_reaped(*_: object, **__: object) -> int:
    return 0


async def test_a_process_that_holds_its_row_is_told_of_once(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_dead(scene)
    caplog.set_level("INFO")
    # As where it stands still in a transaction that has written its row.
    monkeypatch.setattr(Store, "reap", nobody_is_reaped)
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await clock.go_on(16)
        for _ in range(3):
            await look(relay)
    said = [each for each in caplog.records if "without ending its lease" in each.getMessage()]
    assert [each.levelname for each in said] == ["INFO"]


async def test_rows_of_nobody_are_swept_once_the_lease_is_steady_and_then_once_a_minute(
    scene: Scene, bus: EventBus, outbox: Outbox, clock: Clock
) -> None:
    scene.table.insert(event("mail"), owner=DEAD)  # which has no row of its own
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await clock.go_on(14)
        await look(relay)
        assert scene.kept() == {"mail": (State.LEASED, 1)}
        await clock.go_on(2)
        await look(relay)
        assert scene.kept() == {"mail": (State.READY, 1)}

        scene.table.insert(event("stock"), owner=DEAD)
        await clock.go_on(59)
        await look(relay)
        assert scene.kept()["stock"] == (State.LEASED, 1)
        await clock.go_on(1)
        await look(relay)
        assert scene.kept()["stock"] == (State.READY, 1)


async def test_rows_whose_process_died_twice_run_one_at_a_time(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    only_woken: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus.report_failure = ignore
    running: list[str] = []
    most = 0
    may_end = anyio.Event()

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        nonlocal most
        running.append(event.name)
        most = max(most, len(running))
        await may_end.wait()
        await anyio.lowlevel.checkpoint()
        running.remove(event.name)

    ids: list[UUID] = []
    for number in range(4):
        ids += scene.table.insert(event("mail", name=str(number)))
        scene.table.change(ids[-1], "state = 4, attempt = 2")
    may_write = False
    holdings = holdings_of(outbox)
    store: Any = holdings.store
    real = store.complete

    def complete(connection: Any, owner: str, done: Any) -> Any:
        if done and not may_write:
            raise OperationalError("delete", None, TimeoutError("locked"))
        return real(connection, owner, done)

    monkeypatch.setattr(store, "complete", complete)
    monkeypatch.setattr(module, "PAUSE_AFTER_ERROR", 0.001)
    async with relaying(outbox):
        await until(lambda: running)
        holdings.wake()
        may_end.set()
        await until(lambda: caplog.records)
        for _ in range(3):
            holdings.wake()  # its outcome is not written yet, so no other one begins
            await holdings.check()
        assert not running
        states = [state for state, _, _ in scene.table.rows().values()]
        assert sorted(states) == [State.LEASED, *[State.SUSPECT] * 3]
        may_write = True
        await until(lambda: not scene.table.rows())
    assert most == 1


async def test_a_suspect_that_was_never_begun_does_not_hold_up_the_others(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str], clock: Clock
) -> None:
    for name in ("a", "b"):
        (id_,) = scene.table.insert(event("mail", name=name))
        scene.table.change(id_, "state = 4, attempt = 2")
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        clock.now += 20  # before its turn has come the lease is over
        await until(lambda: bus.stats.requeued)
        assert not seen
        for _ in range(4):  # which the heartbeat finds out
            await clock.go_on(6)
        await until_looked(relay, lambda: len(seen) == 2)
        await until(lambda: not bus.stats.running)
        await holdings_of(outbox).settle()
    assert not scene.table.rows()


async def test_a_suspect_that_is_never_alone_runs_beside_others_in_the_end(
    scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("eventkit.outbox._source.current_time", lambda: now)
    may_end, running = anyio.Event(), list[str]()

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        running.append(event.name)
        await may_end.wait()

    scene.table.insert(event("mail", name="busy"))
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await until(lambda: running == ["busy"])
        (suspect,) = scene.table.insert(event("mail", name="suspect"))
        scene.table.change(suspect, "state = 4, attempt = 2")
        await look(relay)
        assert scene.table.rows()[suspect][0] == State.SUSPECT
        now += 5
        await look(relay)
        await until(lambda: running == ["busy", "suspect"])
        may_end.set()
        await until(lambda: not bus.stats.running)
        await holdings_of(outbox).settle()
    assert not scene.table.rows()


async def until_looked(relay: Relay, true: Callable[[], bool]) -> None:
    """Look until it is so."""
    with anyio.fail_after(30):
        while not true():
            await look(relay)
            await holdings_of_relay(relay).settle()
            await anyio.lowlevel.checkpoint()


def holdings_of_relay(relay: Relay) -> Any:
    return relay._holdings


async def test_what_its_attempts_were_used_up_for_by_deaths_is_dead_without_a_run(
    scene: Scene, bus: EventBus, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=Durable(attempts=3), name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)

    (id_,) = scene.table.insert(event("mail"))
    scene.table.change(id_, "state = 4, attempt = 3")
    async with relaying(outbox):
        await until(lambda: scene.kept() == {"mail": (State.DEAD, 4)})
        await until(lambda: warned(caplog, "a delivery is dead"))
    (dead,) = await outbox.deliveries()
    assert dead.error == "its process ended during the last attempt"
    assert not seen


# What cannot be run here


async def test_what_nobody_here_knows_is_left_alone_and_told_once_for_each_name(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    seen: list[str],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene.table.insert(event("other"), event("mail", event_type="shop.newer"))
    before = scene.table.rows()
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        assert not warned(caplog, UNKNOWN)  # a rolling deploy may be under way
        scene.table.sql("update {p}eventkit_outbox set due_at = due_at - 61")
        await clock.go_on(59)
        await look(relay)
        assert not warned(caplog, UNKNOWN)
        await clock.go_on(1)
        await look(relay)
        assert warned(caplog, UNKNOWN) == 2
        await clock.go_on(60)
        await look(relay)
        assert warned(caplog, UNKNOWN) == 2
        stats = await outbox.stats()
        assert (stats.unknown, stats.handlers["other"].unknown) == (2, 1)
    assert scene.table.rows() == before

    @bus.on(Placed, durable=True, name="other")
    async def other(event: Placed) -> None:
        seen.append(f"other {event.name}")

    await outbox.run_due()
    assert seen == ["other ada"]


async def test_a_relay_that_starts_tries_again_what_could_not_be_read(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str], clock: Clock
) -> None:
    (id_,) = scene.table.insert(event("mail"))
    scene.table.change(id_, "payload = 'nonsense'")
    async with relay_of(bus, outbox) as relay:
        await look(relay)
        await holdings_of(outbox).settle()
        assert scene.kept() == {"mail": (State.UNREADABLE, 0)}
        scene.table.change(id_, 'payload = \'{{"name": "bob"}}\'')
        await look(relay)
        await clock.go_on(61)
        await look(relay)
        assert not seen  # not before ten minutes are over
    async with relaying(outbox):
        await until(lambda: not scene.table.rows())
    assert seen == ["bob"]


# Its life


async def test_a_relay_of_its_own_gives_back_what_it_could_not_do_and_says_goodbye(
    scene: Scene, bus: EventBus, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    begun = 0

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        nonlocal begun
        begun += 1
        await anyio.sleep_forever()

    caplog.set_level("INFO")
    scene.table.insert(*(event("mail") for _ in range(9)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(outbox.run, shutdown_timeout=0.01))
        await until(lambda: begun == 4)
        assert outbox.healthy
        assert len(scene.table.processes()) == 1
        tasks.cancel_scope.cancel()
    assert {(state, attempt) for state, attempt, _ in scene.table.rows().values()} == {
        (State.READY, 0)
    }
    assert not scene.table.processes()
    assert not outbox.healthy
    assert bus.stats.requeued == 4
    assert warned(caplog, "eventkit has stopped: bus=default left=0") == 1
    assert warned(caplog, " requeued=4 ") == 1


async def test_what_runs_may_end_when_a_relay_is_cancelled(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    begun, may_end = anyio.Event(), anyio.Event()

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        begun.set()
        await may_end.wait()

    scene.table.insert(event("mail"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox.run)
        await begun.wait()
        tasks.cancel_scope.cancel()
        with CancelScope(shield=True):
            await anyio.lowlevel.checkpoint()
            may_end.set()
    assert not scene.kept()
    assert bus.stats.handled == 1


async def test_what_is_claimed_while_the_relay_stops_is_not_begun_and_given_back(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    scene.table.insert(*(event("mail") for _ in range(3)))
    claiming, may_claim = ThreadEvent(), ThreadEvent()
    store: Any = holdings_of(outbox).store
    real = store.claim

    def claim(*args: Any, **options: Any) -> Any:
        claiming.set()
        assert may_claim.wait(30)
        return real(*args, **options)

    store.claim = claim
    async with relay_of(bus, outbox, starts=True) as relay:
        await until(claiming.is_set)
        relay.stop()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.leave)
            await anyio.lowlevel.checkpoint()
            may_claim.set()
    assert not seen
    assert {*scene.table.rows().values()} == {(State.READY, 0, None)}


async def test_two_relays_on_one_event_loop_say_goodbye_when_both_have_left(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str]
) -> None:
    async with relay_of(bus, outbox, starts=True):
        async with relay_of(bus, outbox, starts=True):
            await until(lambda: outbox.healthy)
        assert outbox.healthy
        assert len(scene.table.processes()) == 1
        scene.table.insert(event("mail"))
        holdings_of(outbox).wake()
        await until(lambda: not scene.table.rows())
    assert not outbox.healthy
    assert not scene.table.processes()


async def test_after_detach_a_relay_claims_nothing_more_and_leaves_nothing_open(
    scene: Scene, bus: EventBus, outbox: Outbox, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Relay, "_pause", at_once)
    begun, may_end = anyio.Event(), anyio.Event()

    @bus.on(Placed, durable=True, name="stock")
    async def stock(event: Placed) -> None:
        begun.set()
        await may_end.wait()

    scene.table.insert(event("stock"))
    holdings: Any = holdings_of(outbox)
    async with relay_of(bus, outbox, starts=True) as relay:
        await begun.wait()
        outbox.detach()
        scene.table.insert(event("mail"))
        await until(lambda: not relay._looking)
        assert not holdings.lease.is_valid
        may_end.set()
    assert not seen
    assert scene.kept() == {"mail": (State.READY, 0)}
    assert not scene.table.processes()
    assert open_connections(outbox) == 0


def open_connections(outbox: Outbox) -> int:
    """How many its own engine holds; one without a pool holds none."""
    database: Any = holdings_of(outbox).database
    (link,) = database._links.values()
    pool = link.engine.pool if database.awaits else link._engine.pool
    return pool.checkedin() if isinstance(pool, QueuePool) else 0


async def test_a_process_that_only_writes_keeps_no_connection_and_runs_nothing(
    scene: Scene, bus: EventBus, seen: list[str]
) -> None:
    outbox = scene.outbox(bus, relay=False)
    async with relay_of(bus, outbox, starts=True):
        await keep(scene, bus, Placed())
        assert scene.kept() == {"mail": (State.READY, 0)}
        assert open_connections(outbox) == 0
        assert not scene.table.processes()
        assert not outbox.healthy
    assert not seen
    assert bus.stats.requeued == 1
    assert open_connections(outbox) == 0
    assert scene.kept() == {"mail": (State.READY, 0)}
