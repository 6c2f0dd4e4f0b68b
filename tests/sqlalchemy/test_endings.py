"""How a transaction has ended is the database's word: refused, undone, lost, left open."""

import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import create_task_group, move_on_after, sleep, to_thread
from anyio.lowlevel import checkpoint
from sqlalchemy import create_engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from eventkit import EventBus
from eventkit._core.ambient import current, find
from eventkit._core.bus import state_of
from eventkit._core.units import Unit
from eventkit.sqlalchemy import CommitTie, deliver_on_commit
from tests.databases import Row, obey
from tests.sqlalchemy.steps import Database, Warnings, Wrong, blocking, done, inside, put, run
from tests.witness import assert_settled, freed_by_anyio

pytestmark = pytest.mark.anyio


ANSWERED = (
    "a statement had failed, so the database answered COMMIT with ROLLBACK: "
    "bus=default deliveries=1 "
    "event_types=builtins.str x1"
)
IN_DOUBT = (
    "a commit failed, and may have happened all the same: bus=default deliveries=1 "
    "event_types=builtins.str x1"
)
LEFT_OPEN = (
    "a transaction that has written was still open when its unit of work ended: its events are "
    "lost, even if it is committed later. End it inside the unit of work. A middleware that "
    "commits goes inside of EventContextMiddleware: add EventContextMiddleware after it: "
    "bus=default deliveries=1 event_types=builtins.str x1"
)
DISPATCHED = (
    "dispatch of builtins.str inside a transaction that has written: the handlers do not see its "
    "rows, wait for its locks, and run also if it is rolled back. Commit first, or publish: "
    "bus=default"
)


class Unheard:
    """An event without handlers."""


async def put_twice(session: Any) -> None:
    with pytest.raises(IntegrityError):
        await put(session, "first")


# A statement has failed


@pytest.mark.parametrize("order", ["before", "behind", "only"])
async def test_a_statement_that_fails_and_is_caught_before_the_commit(
    order: str, bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with bus.context(), inside(database.session()) as session:
        if order == "before":
            await put(session)
        bus.publish("ada")
        await put_twice(session)
        if order == "behind" and database.kind != "postgresql":
            await put(session)
        await done(session.commit())

    if database.kind == "postgresql":
        assert (seen, database.names(), warnings()) == (["discarded ada"], [], [ANSWERED])
    else:
        rows = [] if order == "only" else ["ada"]
        assert (seen, database.names(), warnings()) == (["handled ada"], rows, [])


async def test_a_doomed_commit_is_known_to_all_buses(
    bus: EventBus, database: Database, tie: CommitTie, seen: list[str], warnings: Warnings
) -> None:
    if database.kind != "postgresql":
        pytest.skip("only PostgreSQL answers COMMIT with ROLLBACK")
    other = EventBus(name="other")
    other.subscribe(str, lambda event: None, name="nothing", thread=False)
    with deliver_on_commit(other, database.engine):
        async with other.context(), bus.context(), inside(database.session()) as session:
            await put(session)
            bus.publish("ada")
            other.publish("ada")
            await put_twice(session)
            await done(session.commit())

    of_other = ANSWERED.replace("bus=default", "bus=other")
    assert sorted(warnings()) == [ANSWERED, of_other]


async def test_a_statement_that_fails_in_a_savepoint(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    with suppress(Wrong):
        async with bus.context():
            async with inside(database.session()) as session:
                await put(session)
                bus.publish("ada")
                with suppress(IntegrityError):
                    async with inside(session.begin_nested()):
                        bus.publish("lost")
                        await put(session, "first")
                await done(session.commit())
            raise Wrong

    assert seen == ["discarded lost", "handled ada"]
    assert (database.names(), warnings()) == (["ada"], [])


async def test_one_savepoint_that_recovers_and_one_failure_that_does_not(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with bus.context(), inside(database.session()) as session:
        await put(session)
        bus.publish("ada")
        with suppress(IntegrityError):
            async with inside(session.begin_nested()):
                await put(session, "first")
        await put_twice(session)
        await done(session.commit())

    doomed = database.kind == "postgresql"
    assert seen == ["discarded ada" if doomed else "handled ada"]
    assert warnings() == ([ANSWERED] if doomed else [])


async def test_a_parameter_that_the_driver_refuses_dooms_nothing(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    if database.kind == "mysql":
        pytest.skip("its drivers refuse no parameter")
    wrong: Any = {"name": object()}
    with suppress(Wrong):
        async with bus.context():
            async with inside(database.session()) as session:
                await put(session)
                bus.publish("ada")
                with pytest.raises(Exception):  # noqa: B017, PT011 - each driver has its own
                    await done(session.execute(text("SELECT :name"), wrong))
                await done(session.commit())
            raise Wrong

    assert seen == ["handled ada"]
    assert (database.names(), warnings()) == (["ada"], [])


async def test_a_doomed_commit_of_which_nobody_hears_warns_of_nothing(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with bus.context(), inside(database.session()) as session:
        await put_twice(session)
        await done(session.commit())
        bus.publish("afterwards")

    assert (seen, warnings()) == (["handled afterwards"], [])


async def test_sqlite_rolls_a_transaction_back_by_itself(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    if database.kind != "sqlite":
        pytest.skip("only SQLite has INSERT OR ROLLBACK")
    async with bus.context(), inside(database.session()) as session:
        await put(session)
        bus.publish("ada")
        with pytest.raises(IntegrityError):
            await done(
                session.execute(
                    text("INSERT OR ROLLBACK INTO rows (name, note) VALUES ('first', '')")
                )
            )
        assert seen == ["discarded ada"]
        with suppress(DBAPIError):
            await done(session.commit())

    assert (seen, database.names()) == (["discarded ada"], [])


@pytest.mark.parametrize("number", [1213, 1205])
async def test_mariadb_rolls_back_all_or_one_statement(
    number: int, bus: EventBus, database: Database, seen: list[str]
) -> None:
    if database.kind != "mysql":
        pytest.skip("about MariaDB")
    change = text("UPDATE `rows` SET note = 'changed' WHERE name = :name")
    database.clear()
    with Session(database.plain) as setup:
        setup.add(Row(name="other"))
        setup.commit()

    with Session(database.plain) as other:
        other.execute(insert(Row), [{"name": f"heavy {n}"} for n in range(50)])
        other.execute(change, {"name": "other"})
        async with bus.context(), inside(database.session()) as session:
            await done(session.execute(text("SET innodb_lock_wait_timeout = 1")))
            await put(session)
            await done(session.execute(change, {"name": "first"}))
            bus.publish("before")
            async with create_task_group() as tasks:
                if number == 1213:  # they wait for each other
                    tasks.start_soon(aside, other, change, {"name": "first"})
                    await sleep_until_it_waits(database)
                with pytest.raises(DBAPIError, match=str(number)):
                    await aside(session, change, {"name": "other"})
            assert seen == (["discarded before"] if number == 1213 else [])
            await put(session, "again")
            bus.publish("behind")
            await done(session.commit())
        other.rollback()

    rows = ["again", "other"] if number == 1213 else ["ada", "again", "other"]
    assert database.names() == rows
    assert seen == [
        "discarded before" if number == 1213 else "handled before",
        "handled behind",
    ]


async def aside(session: Any, *arguments: Any) -> None:
    """Execute it, and let others run meanwhile."""
    if isinstance(session, AsyncSession):
        await session.execute(*arguments)
    else:
        await to_thread.run_sync(session.execute, *arguments)


async def sleep_until_it_waits(database: Database) -> None:
    waiting = text("SELECT count(*) FROM information_schema.innodb_lock_waits")
    with database.plain.connect() as connection:
        while connection.scalar(waiting) == 0:
            connection.rollback()
            await sleep(0.2)  # the server keeps its answer while it is asked more often


# COMMIT has failed


@pytest.mark.parametrize("by", ["session", "connection"])
async def test_a_deferred_constraint_that_refuses_the_commit_is_in_no_doubt(
    by: str, bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    if database.kind == "mysql":
        pytest.skip("MariaDB defers no constraint")
    opened = inside(database.session()) if by == "session" else database.connection()
    async with bus.context(), opened as used:
        await done(used.execute(insert(Row).values(name="ada", parent="missing")))
        bus.publish("ada")
        with pytest.raises(IntegrityError):
            await done(used.commit())
        assert seen == ["discarded ada"]

    assert (seen, database.names(), warnings()) == (["discarded ada"], [], [])


@pytest.mark.parametrize("by", ["session", "connection"])
async def test_a_connection_lost_at_the_commit_is_in_doubt(
    by: str, bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    kill = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mysql": ("SELECT connection_id()", "KILL {}"),
    }
    if database.kind not in kill:
        pytest.skip("SQLite has no connection to lose")
    who, by_whom = kill[database.kind]
    pids: list[int] = []

    @event.listens_for(database.hooks, "commit", once=True)
    def lose_the_connection(_: object) -> None:
        with database.plain.connect() as other, suppress(OperationalError):
            other.exec_driver_sql(by_whom.format(pids[0]))

    async with bus.context():
        opened = inside(database.session()) if by == "session" else database.connection()
        async with opened as used:
            pids.append((await done(used.execute(text(who)))).scalar())
            await put(used)
            bus.publish("ada")
            with pytest.raises(DBAPIError):
                await done(used.commit())

    assert (seen, warnings()) == (["discarded ada"], [IN_DOUBT])


async def test_a_cancellation_at_the_commit_is_in_doubt(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    if database.driver != "asyncpg":
        pytest.skip("about a driver that can be cancelled in COMMIT")

    async with bus.context(), inside(database.session()) as session:
        await done(session.execute(text("CREATE TEMP TABLE slow (name text)")))
        await done(
            session.execute(
                text(
                    "CREATE FUNCTION pg_temp.wait() RETURNS trigger LANGUAGE plpgsql AS "
                    "'BEGIN PERFORM pg_sleep(1); RETURN NULL; END'"
                )
            )
        )
        await done(
            session.execute(
                text(
                    "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON slow "
                    "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
                    "EXECUTE FUNCTION pg_temp.wait()"
                )
            )
        )
        await done(session.execute(text("INSERT INTO slow VALUES ('ada')")))
        bus.publish("ada")
        with move_on_after(0.2) as scope:
            await session.commit()
        assert scope.cancelled_caught

    assert (seen, warnings()) == (["discarded ada"], [IN_DOUBT])


async def test_a_listener_that_refuses_the_commit_is_believed(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    @event.listens_for(Session, "before_commit", once=True)
    def refuse(_: object) -> None:
        raise Wrong

    async with bus.context(), inside(database.session()) as session:
        await put(session)
        bus.publish("ada")
        with pytest.raises(Wrong):
            await done(session.commit())

    assert (seen, database.names(), warnings()) == (["discarded ada"], [], [])


@pytest.mark.parametrize("first", ["the tie", "the listener"])
async def test_a_listener_that_fails_behind_the_commit_leaves_a_doubt_at_most(
    first: str,
    bus: EventBus,
    database: Database,
    tie: CommitTie,
    seen: list[str],
    warnings: Warnings,
) -> None:
    def fail(_: object) -> None:
        raise Wrong

    if first == "the listener":
        tie.detach()
        event.listen(Session, "after_commit", fail)
        tie = deliver_on_commit(bus, database.engine)
    else:
        event.listen(Session, "after_commit", fail)
    try:
        async with bus.context(), inside(database.session()) as session:
            await put(session)
            bus.publish("ada")
            with pytest.raises(Wrong):
                await done(session.commit())
    finally:
        event.remove(Session, "after_commit", fail)
        tie.detach()

    assert database.names() == ["ada"]
    if first == "the tie":
        assert (seen, warnings()) == (["handled ada"], [])
    else:  # nobody is told any more
        assert (seen, warnings()) == (["discarded ada"], [IN_DOUBT])


# Nobody has ended it


async def test_a_forgotten_session_gives_its_connection_back_at_once(
    bus: EventBus, database: Database, tie: CommitTie, seen: list[str], warnings: Warnings
) -> None:
    if database.awaits:
        pytest.skip("a connection to await cannot be given back by the garbage collector")
    engine = create_engine(
        database.plain.url,
        execution_options=database.plain.get_execution_options(),
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.2,
    )
    if database.kind == "sqlite":
        obey(engine)
    with deliver_on_commit(bus, engine):
        async with bus.context():
            session = Session(engine)
            await put(session)
            bus.publish("ada")
            del session
            gc.collect()
            with engine.connect() as connection:
                connection.execute(select(1))
            assert database.names() == []

    assert (seen, warnings()) == (["discarded ada"], [LEFT_OPEN])
    engine.dispose()


@pytest.mark.parametrize("flushed", [True, False])
async def test_a_session_that_ends_after_its_unit_has_lost_its_events(
    flushed: bool, bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with inside(database.session()) as session:
        async with bus.context():
            session.add(Row(name="ada"))
            if flushed:
                await done(session.flush())
            bus.publish("ada")
        await done(session.commit())

    assert (seen, database.names(), warnings()) == (["discarded ada"], ["ada"], [LEFT_OPEN])
    assert_settled(bus)


async def test_a_connection_that_ends_after_its_unit_has_lost_its_events(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with database.connection() as connection:
        async with bus.context():
            await put(connection)
            bus.publish("ada")
        await done(connection.commit())

    assert (seen, database.names(), warnings()) == (["discarded ada"], ["ada"], [LEFT_OPEN])


async def test_what_has_only_read_and_is_left_open_has_no_say(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with inside(database.session()) as session:
        async with bus.context():
            await done(session.get(Row, "first"))
            bus.publish("ada")
        await done(session.commit())

    assert (seen, warnings()) == (["handled ada"], [])


async def test_what_has_written_and_is_left_open_warns_of_nothing_if_nothing_is_lost(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with inside(database.session()) as session:
        async with bus.context():
            await put(session)
            bus.publish("ada", even_on_failure=True)
        await done(session.rollback())

    assert (seen, warnings()) == (["handled ada"], [])


# Detached


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_what_is_detached_after_it_has_written_is_lost_with_the_unit(
    end: str, bus: EventBus, database: Database, tie: CommitTie, seen: list[str]
) -> None:
    async with bus.context():
        async with inside(database.session()) as session:
            await put(session)
            bus.publish("ada")
            tie.detach()
            await done(getattr(session, end)())
        assert seen == []

    assert seen == ["discarded ada"]


# Dispatched


async def test_a_dispatch_in_a_transaction_that_has_written_runs_and_warns(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with bus.context(), inside(database.session()) as session:
        await put(session)
        await bus.dispatch("ada")
        await done(session.rollback())

    assert (seen, warnings()) == (["handled ada"], [DISPATCHED])


async def test_a_dispatch_beside_what_only_reads_warns_of_nothing(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with bus.context(), inside(database.session()) as session:
        await done(session.get(Row, "first"))
        await bus.dispatch("in one that read")
        await put(session)
        await bus.dispatch(Unheard())
        await done(session.commit())
        await bus.dispatch("behind the commit")

    assert seen == ["handled in one that read", "handled behind the commit"]
    assert warnings() == [
        "nobody handles these events: event_type=tests.sqlalchemy.test_endings.Unheard bus=default"
    ]


# Lost and reused


@pytest.mark.parametrize("how", ["invalidate", "invalidate the connection", "detach"])
async def test_a_session_whose_connection_is_thrown_away_has_lost_its_events(
    how: str, bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with bus.context(), inside(database.session()) as session:
        await put(session)
        bus.publish("ada")
        match how:
            case "invalidate":
                await done(session.invalidate())
            case "invalidate the connection":
                await run(session, lambda blocking: blocking.connection().invalidate())
                await done(session.rollback())
            case _:
                await run(session, lambda blocking: blocking.connection().detach())
                await done(session.rollback())
        await put(session, "bob")
        bus.publish("bob")
        await done(session.commit())

    assert (seen, database.names(), warnings()) == (
        ["discarded ada", "handled bob"],
        ["bob"],
        [],
    )


async def test_an_engine_that_is_disposed_of_in_between_still_commits(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    if database.driver == "psycopg":
        pytest.skip("SQLAlchemy leaves what comes back too late to the garbage collector")
    with suppress(Wrong):
        async with bus.context():
            async with inside(database.session()) as session:
                await put(session)
                bus.publish("ada")
                await done(database.engine.dispose())
                await done(session.commit())
            raise Wrong

    assert (seen, database.names()) == (["handled ada"], ["ada"])


async def test_a_flush_in_the_middle_of_which_the_session_is_closed(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    session = database.session()

    @event.listens_for(blocking(session), "after_flush")
    def fail(*_: object) -> None:
        raise Wrong

    async with bus.context():
        session.add(Row(name="ada"))
        bus.publish("ada")
        with pytest.raises(Wrong):
            await done(session.commit())
        await done(session.close())

    assert (seen, database.names()) == (["discarded ada"], [])


# Nothing is held


@freed_by_anyio
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_nothing_is_held_of_what_has_ended(
    end: str, bus: EventBus, database: Database, tie: CommitTie
) -> None:
    if database.awaits:
        pytest.skip("asyncio's drivers have rings of their own")

    class Paid:
        pass

    @bus.on(Paid)
    async def handle(event: Paid) -> None: ...

    gc.collect()
    gc.disable()
    try:
        held: list[Any] = []
        async with bus.context():
            with database.plain.connect() as connection:
                paid = Paid()
                connection.execute(insert(Row).values(name="bob"))
                bus.publish(paid)
                held += [weakref.ref(each) for each in (connection.get_transaction(), paid)]
                getattr(connection, end)()
            del connection
            with Session(database.plain) as session:
                paid = Paid()
                session.add(Row(name="ada"))
                bus.publish(paid)
                session.flush()
                transaction = session.connection().get_transaction()
                held += [weakref.ref(each) for each in (session, transaction, paid)]
                getattr(session, end)()
            del session, transaction, paid
        await checkpoint()
        assert [each() for each in held] == [None] * len(held)
    finally:
        gc.enable()
    assert len(tie._transactions) == 0


async def test_nothing_is_kept_of_those_that_only_read(
    bus: EventBus, database: Database, tie: CommitTie
) -> None:
    async with bus.context():
        bus.publish("ada")
        unit: Unit | None = find(current(), state_of(bus))
        assert unit is not None
        (envelope,) = unit.queue.staged
        for _ in range(5):
            async with inside(database.session()) as session:
                await done(session.get(Row, "first"))
            async with database.connection() as connection:
                await done(connection.execute(select(Row)))
        assert len(envelope.decision._afterwards) <= 1
        assert len(unit.queue.transactions) <= 1


async def test_async_sessions_are_what_is_tested(database: Database) -> None:
    assert isinstance(database.session(), AsyncSession) == database.awaits
