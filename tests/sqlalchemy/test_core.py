"""Connections without a session, sessions on them, savepoints, AUTOCOMMIT, two phases."""

from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Connection, create_engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from eventkit import EventBus
from eventkit.sqlalchemy import CommitTie, deliver_on_commit
from tests.databases import Row
from tests.sqlalchemy.steps import Database, Warnings, Wrong, blocking, done, inside, put, run
from tests.witness import witnessed

pytestmark = pytest.mark.anyio


def on(connection: Any, **options: Any) -> Any:
    """A session on the connection, of the same kind."""
    make = AsyncSession if hasattr(connection, "sync_connection") else Session
    return make(bind=connection, **options)


# Connections


@pytest.mark.parametrize("success", [True, False])
async def test_a_connections_block_decides(
    success: bool, bus: EventBus, database: Database, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            with suppress(Wrong):
                async with inside(database.engine.begin()) as connection:
                    await put(connection)
                    bus.publish("ada")
                    if not success:
                        raise Wrong
            if success:
                raise Wrong

    assert seen == ["handled ada" if success else "discarded ada"]
    assert database.names() == (["ada"] if success else [])


@pytest.mark.parametrize("order", ["publish first", "write first"])
@pytest.mark.parametrize("end", ["commit", "rollback", "close", "nothing"])
async def test_a_connection_that_begins_by_itself_decides(
    end: str, order: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), database.connection() as connection:
        if order == "publish first":
            bus.publish("ada")
        await put(connection)
        if order == "write first":
            bus.publish("ada")
        if end != "nothing":
            await done(getattr(connection, end)())

    assert seen == ["handled ada" if end == "commit" else "discarded ada"]
    assert database.names() == (["ada"] if end == "commit" else [])


async def test_each_transaction_of_one_connection_decides_for_itself(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            async with database.connection() as connection:
                for name, end in (("ada", "commit"), ("bob", "rollback"), ("cid", "commit")):
                    await put(connection, name)
                    bus.publish(name)
                    await done(getattr(connection, end)())
                await done(connection.execute(select(Row)))
                bus.publish("read")
            raise Wrong

    assert seen == ["discarded bob", "discarded read", "handled ada", "handled cid"]
    assert database.names() == ["ada", "cid"]


async def test_a_connection_that_only_reads_has_no_say(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), database.connection() as connection:
        await done(connection.execute(select(Row)))
        bus.publish("ada")
        await done(connection.rollback())

    assert seen == ["handled ada"]


async def test_a_connection_that_is_forgotten_or_invalidated_has_lost_its_events(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), database.connection() as connection:
        await put(connection)
        bus.publish("ada")
        await done(connection.invalidate())

    assert (seen, database.names()) == (["discarded ada"], [])


@pytest.mark.parametrize("inner", ["commit", "rollback", "close"])
@pytest.mark.parametrize("outer", ["commit", "rollback"])
async def test_the_savepoint_of_a_connection(
    outer: str, inner: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), database.connection() as connection:
        await put(connection, "before")
        bus.publish("before")
        nested = await done(connection.begin_nested())
        await put(connection, "inside")
        bus.publish("inside")
        await done(getattr(nested, inner)())
        await put(connection, "after")
        bus.publish("after")
        await done(getattr(connection, outer)())

    delivered = sorted(line.removeprefix("handled ") for line in seen if "handled" in line)
    assert delivered == database.names()
    if outer == "commit":
        assert delivered == sorted(
            {"before", "after"} | ({"inside"} if inner == "commit" else set())
        )
    assert len(seen) == 3


async def test_a_statement_that_fails_in_the_savepoint_of_a_connection(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    with suppress(Wrong):
        async with bus.context():
            async with inside(database.engine.begin()) as connection:
                await put(connection)
                bus.publish("ada")
                with suppress(IntegrityError):
                    async with inside(connection.begin_nested()):
                        bus.publish("lost")
                        await put(connection, "first")
            raise Wrong

    assert seen == ["discarded lost", "handled ada"]
    assert (database.names(), warnings()) == (["ada"], [])


async def test_a_statement_that_fails_on_a_connection_before_its_commit(
    bus: EventBus, database: Database, seen: list[str], warnings: Warnings
) -> None:
    async with bus.context(), database.connection() as connection:
        await put(connection)
        bus.publish("ada")
        with pytest.raises(IntegrityError):
            await put(connection, "first")
        await done(connection.commit())

    if database.kind == "postgresql":
        assert (seen, database.names()) == (["discarded ada"], [])
        assert warnings() == [
            "a statement had failed, so the database answered COMMIT with ROLLBACK: "
            "bus=default deliveries=1 "
            "event_types=builtins.str x1"
        ]
    else:
        assert (seen, database.names(), warnings()) == (["handled ada"], ["ada"], [])


async def test_savepoints_in_text(bus: EventBus, database: Database, seen: list[str]) -> None:
    async with bus.context(), inside(database.engine.begin()) as connection:

        async def say(statement: str) -> None:
            await done(connection.execute(text(statement)))

        await put(connection, "before")
        bus.publish("before")
        await say("SAVEPOINT one")
        await put(connection, "kept")
        bus.publish("kept")
        await say("RELEASE SAVEPOINT one")
        await say("savepoint Two")
        await put(connection, "lost")
        bus.publish("lost")
        await say("ROLLBACK TO SAVEPOINT Two")
        await put(connection, "in its place")
        bus.publish("in its place")
        await say("SAVEPOINT three")
        await put(connection, "lost too")
        bus.publish("lost too")
        await say("rollback to Two")
        await say("RELEASE SAVEPOINT Two")
        await put(connection, "after")
        bus.publish("after")

    committed = ["after", "before", "kept"]
    assert database.names() == committed
    delivered = sorted(line.removeprefix("handled ") for line in seen if "handled" in line)
    assert delivered == committed


# Sessions on a connection

MODES = ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]


@pytest.mark.parametrize("outer", ["commit", "rollback"])
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", MODES)
async def test_a_session_on_its_callers_connection(
    mode: Any,
    nested: bool,
    end: str,
    outer: str,
    bus: EventBus,
    database: Database,
    seen: list[str],
) -> None:
    fixture = mode == "create_savepoint" or (mode == "conditional_savepoint" and nested)
    async with bus.context(), database.connection() as connection:
        await put(connection, "outer")
        bus.publish("outer")
        savepoint = await done(connection.begin_nested()) if nested else None
        async with inside(on(connection, join_transaction_mode=mode)) as session:
            session.add(Row(name="inner"))
            await done(session.flush())
            bus.publish("inner")
            await done(getattr(session, end)())
        if savepoint is not None and savepoint.is_active:
            await done(savepoint.commit())
        if connection.in_transaction():
            await done(getattr(connection, outer)())

    committed = database.names()
    delivered = sorted(line.removeprefix("handled ") for line in seen if "handled" in line)
    if fixture:  # the session's own commit counts, as in the usual test fixture
        assert ("inner" in delivered) == (end == "commit")
        assert ("outer" in delivered) == ("outer" in committed)
    else:
        assert delivered == committed
    assert len(seen) == 2


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_a_session_that_controls_its_callers_savepoint_takes_along_what_is_in_it(
    end: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), inside(database.engine.begin()) as connection:
        await done(connection.begin_nested())
        await put(connection)
        bus.publish("ada")
        async with inside(on(connection, join_transaction_mode="control_fully")) as session:
            await done(session.get(Row, "first"))
            bus.publish("read")
            await done(getattr(session, end)())
        await put(connection, "bob")
        bus.publish("bob")

    delivered = sorted(line.removeprefix("handled ") for line in seen if "handled" in line)
    assert [name for name in delivered if name != "read"] == database.names()
    assert ("read" in delivered) == (end == "commit")


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("mode", MODES)
async def test_the_savepoint_of_a_session_on_its_callers_connection(
    mode: Any, end: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with (
        bus.context(),
        inside(database.engine.begin()) as connection,
        inside(on(connection, join_transaction_mode=mode)) as session,
    ):
        session.add(Row(name="outer"))
        bus.publish("outer")
        nested = await done(session.begin_nested())
        session.add(Row(name="inner"))
        await done(session.flush())
        bus.publish("inner")
        await done(getattr(nested, end)())
        await done(session.commit())

    committed = ["inner", "outer"] if end == "commit" else ["outer"]
    assert database.names() == committed
    delivered = sorted(line.removeprefix("handled ") for line in seen if "handled" in line)
    assert delivered == committed


async def test_the_usual_test_fixture_runs_as_production_does(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with database.connection() as connection:
        outer = await done(connection.begin())
        session = on(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
        async with inside(session):
            for number, end in enumerate(("commit", "rollback", "close", "commit")):
                async with bus.context():  # a request each
                    session.add(Row(name=str(number)))
                    bus.publish(f"{number} {end}")
                    await done(session.flush())
                    with suppress(IntegrityError):
                        async with inside(session.begin_nested()):
                            bus.publish(f"{number} lost")
                            await put(session, "first")
                    await done(getattr(session, end)())
            async with bus.context():
                await done(session.get(Row, "first"))
                bus.publish("read")
                await done(session.rollback())
        await done(outer.rollback())

    assert seen == [
        "discarded 0 lost",
        "handled 0 commit",
        "discarded 1 lost",
        "discarded 1 rollback",
        "discarded 2 lost",
        "discarded 2 close",
        "discarded 3 lost",
        "handled 3 commit",
        "handled read",
    ]
    assert database.names() == []


# AUTOCOMMIT


async def test_what_was_written_in_autocommit_is_committed(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    if database.kind == "sqlite":
        pytest.skip("here the BEGIN of the tests' listener goes before")
    with suppress(Wrong):
        async with bus.context():
            async with database.connection() as connection:
                await done(connection.execution_options(isolation_level="AUTOCOMMIT"))
                bus.publish("before")
                await put(connection, "by a connection")
                bus.publish("behind")
                await done(connection.rollback())
            async with inside(database.session()) as session:
                await done(session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}))
                bus.publish("of a session")
                await put(session, "by a session")
                await done(session.rollback())
            raise Wrong

    assert database.names() == ["by a connection", "by a session"]
    assert sorted(seen) == ["handled before", "handled behind", "handled of a session"]


@pytest.mark.parametrize("of", ["the engine", "its options"])
async def test_an_engine_in_autocommit(
    of: str, bus: EventBus, database: Database, tie: CommitTie, seen: list[str]
) -> None:
    if of == "its options" and database.kind == "sqlite":
        pytest.skip("here the BEGIN of the tests' listener goes before")
    if of == "its options":
        engine: Any = database.engine.execution_options(isolation_level="AUTOCOMMIT")
    else:
        tie.detach()
        create: Any = create_async_engine if database.awaits else create_engine
        engine = create(
            database.engine.url,
            isolation_level="AUTOCOMMIT",
            execution_options=database.plain.get_execution_options(),
            poolclass=NullPool,
        )
        deliver_on_commit(bus, engine)
    make = AsyncSession if database.awaits else Session
    with suppress(Wrong):
        async with bus.context():
            async with inside(make(engine)) as session:
                bus.publish("before")
                await put(session)
                bus.publish("behind")
                await done(session.rollback())
            async with inside(make(engine)) as session:
                session.add(Row(name="never"))
                bus.publish("never flushed")
            raise Wrong

    assert database.names() == ["ada"]
    assert sorted(seen) == ["discarded never flushed", "handled before", "handled behind"]


@pytest.mark.parametrize("by", ["session", "connection"])
async def test_what_fails_in_autocommit_has_committed_nothing(
    by: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    if database.kind == "sqlite":
        pytest.skip("here the BEGIN of the tests' listener goes before")
    options = {"isolation_level": "AUTOCOMMIT"}
    async with bus.context():
        bus.publish("before")
        opened = inside(database.session()) if by == "session" else database.connection()
        async with opened as used:
            if by == "session":
                await done(used.connection(execution_options=options))
            else:
                await done(used.execution_options(**options))
            with pytest.raises(IntegrityError):
                await put(used, "first")
            bus.publish("failed")
        assert seen == ["discarded before", "discarded failed"]
        async with database.connection() as used:
            await done(used.execution_options(**options))
            await put(used)
            with pytest.raises(IntegrityError):
                await put(used, "first")
            bus.publish("one has worked")

    assert seen == ["discarded before", "discarded failed", "handled one has worked"]


# Two phases, two engines


async def test_two_phases(bus: EventBus, database: Database, seen: list[str]) -> None:
    if not _has_two_phases(database):
        pytest.skip("no two phases here (PostgreSQL: set max_prepared_transactions)")
    with suppress(Wrong):
        async with bus.context():
            for name, end in (("ada", Session.commit), ("bob", Session.rollback)):
                with Session(database.plain, twophase=True) as session:
                    session.add(Row(name=name))
                    bus.publish(name)
                    session.prepare()
                    end(session)
            with Session(database.plain, twophase=True) as session:
                session.add(Row(name="cid"))
                bus.publish("cid")
                session.commit()
            raise Wrong

    assert database.names() == ["ada", "cid"]
    assert seen == ["discarded bob", "handled ada", "handled cid"]


def _has_two_phases(database: Database) -> bool:
    if database.awaits or database.kind == "sqlite":
        return False
    if database.kind == "mysql":
        return True
    with database.plain.connect() as connection:
        return int(connection.scalar(text("SHOW max_prepared_transactions")) or 0) > 0


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_one_session_of_two_engines_is_one_decision(
    end: str, bus: EventBus, database: Database, tie: CommitTie, seen: list[str]
) -> None:
    create: Any = create_async_engine if database.awaits else create_engine
    engine = create(
        database.engine.url,
        execution_options=database.plain.get_execution_options(),
        poolclass=NullPool,
    )
    sessions = database.sessions(binds={Row: engine})
    deliver_on_commit(bus, engine)
    async with bus.context(), inside(sessions()) as session:
        await done(session.execute(text("SELECT 1"), bind_arguments={"bind": database.hooks}))
        await put(session)
        bus.publish("ada")
        await done(session.execute(text("SELECT 1"), bind_arguments={"bind": database.hooks}))
        await done(getattr(session, end)())

    assert seen == ["handled ada" if end == "commit" else "discarded ada"]


# A factory's engines


async def test_a_factory_leads_to_engines_that_it_is_bound_to_later(
    bus: EventBus, database: Database, tie: CommitTie
) -> None:
    tie.detach()
    sessions = database.sessions(bind=None)
    seen = witnessed(bus)
    with deliver_on_commit(bus, sessions):
        sessions.configure(bind=database.engine)
        async with bus.context():
            async with inside(sessions()) as session:
                await put(session)
                bus.publish("ada")
                await done(session.rollback())
            async with database.connection() as connection:
                await put(connection)
                bus.publish("bob")
                await done(connection.rollback())

    assert seen == ["discarded ada", "discarded bob"]


# Listeners that publish

HOOKS = ["before_commit", "after_flush", "after_flush_postexec", "after_commit", "engine commit"]


@pytest.mark.parametrize("first", ["the tie", "the listener"])
@pytest.mark.parametrize("end", ["commit", "refused"])
@pytest.mark.parametrize("hook", HOOKS)
async def test_what_a_hook_publishes_shares_the_fate_of_the_transaction(
    hook: str,
    end: str,
    first: str,
    bus: EventBus,
    database: Database,
    tie: CommitTie,
    seen: list[str],
) -> None:
    if end == "refused" and (database.kind == "mysql" or hook == "after_commit"):
        pytest.skip("MariaDB defers no constraint, and after_commit comes only behind a commit")

    def publish(*_: object) -> None:
        bus.publish("from the hook")

    target: Any = database.hooks if hook == "engine commit" else Session
    name = hook.removeprefix("engine ")
    if first == "the listener":
        tie.detach()
        event.listen(target, name, publish)
        tie = deliver_on_commit(bus, database.engine)
    else:
        event.listen(target, name, publish)
    try:
        with suppress(Wrong):
            async with bus.context():
                async with inside(database.session()) as session:
                    session.add(Row(name="ada", parent="missing" if end == "refused" else None))
                    with suppress(IntegrityError):
                        await done(session.commit())
                if end == "commit":
                    raise Wrong
    finally:
        event.remove(target, name, publish)
        tie.detach()

    assert seen == ["handled from the hook" if end == "commit" else "discarded from the hook"]


@pytest.mark.parametrize("end", ["commit", "refused"])
async def test_what_the_listener_of_an_engine_publishes_shares_the_fate_of_a_connection(
    end: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    if end == "refused" and database.kind == "mysql":
        pytest.skip("MariaDB defers no constraint")

    @event.listens_for(database.hooks, "commit", once=True)
    def publish(connection: Connection) -> None:
        bus.publish("from the hook")

    with suppress(Wrong):
        async with bus.context():
            async with database.connection() as connection:
                parent = "missing" if end == "refused" else None
                await done(connection.execute(insert(Row).values(name="ada", parent=parent)))
                with suppress(IntegrityError):
                    await done(connection.commit())
            if end == "commit":
                raise Wrong

    assert seen == ["handled from the hook" if end == "commit" else "discarded from the hook"]


# What else a session can do


async def test_run_sync_is_a_part_of_the_transaction(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    def work(session: Session) -> None:
        session.add(Row(name="ada"))
        with session.begin_nested():
            bus.publish("ada")
        session.rollback()
        session.add(Row(name="bob"))
        bus.publish("bob")

    async with bus.context(), inside(database.session()) as session:
        await run(session, work)
        await done(session.commit())

    assert (seen, database.names()) == (["discarded ada", "handled bob"], ["bob"])


async def test_results_may_be_streamed_beside_writes(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), inside(database.session()) as session:

        def work(session: Session) -> None:
            rows = session.scalars(select(Row).execution_options(yield_per=1))
            for row in rows.fetchmany(1):
                bus.publish(row.name)
            rows.close()
            session.add(Row(name="ada"))

        await run(session, work)
        await done(session.rollback())

    assert seen == ["discarded first"]


async def test_the_isolation_level_of_one_transaction_changes_nothing(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), database.connection() as connection:
        options = {"isolation_level": "SERIALIZABLE"}
        await done(connection.execution_options(**options))
        await put(connection)
        bus.publish("ada")
        await done(connection.rollback())
        await put(connection, "bob")
        bus.publish("bob")
        await done(connection.commit())

    assert (seen, database.names()) == (["discarded ada", "handled bob"], ["bob"])


async def test_a_session_that_is_prepared_and_used_by_name_only(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async with bus.context(), inside(database.session()) as session:
        plain = blocking(session)
        session.add(Row(name="ada"))
        bus.publish("ada")
        assert plain.in_transaction()
        session.expunge_all()
        await done(session.close())

    assert (seen, database.names()) == (["discarded ada"], [])
