"""What comes between the last statement and COMMIT: the two hooks of a tie."""

from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Connection, event, insert, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from eventkit import EventBus
from eventkit._core.transactions import End, Transaction
from eventkit.sqlalchemy import CommitTie
from tests.databases import Row
from tests.sqlalchemy.steps import Database, Warnings, Wrong, blocking, done, inside, put

pytestmark = pytest.mark.anyio


@pytest.fixture
def calls(tie: CommitTie) -> list[str]:
    """What the hooks of the tie were called with."""
    calls: list[str] = []

    def note(connection: Connection, transaction: Transaction) -> None:
        assert connection.in_transaction()
        calls.append("commits " + " ".join(str(each.event) for each in transaction.decides()))

    def note_end(transaction: Transaction, how: End) -> None:
        calls.append(how.value)

    tie.before_commit.append(note)
    tie.ended.append(note_end)
    return calls


def commit_from_the_pool(database: Database) -> None:
    """Commit one row as the next user of the pool: on the connection that came back last."""
    with Session(database.plain) as session:
        session.add(Row(name="bob"))
        session.commit()


USERS = ["session", "connection"]


def open_one(database: Database, by: str) -> Any:
    return inside(database.session()) if by == "session" else database.connection()


@pytest.mark.parametrize("by", USERS)
async def test_the_hook_is_told_what_the_commit_releases_in_order_of_publish(
    by: str, bus: EventBus, database: Database, seen: list[str], calls: list[str]
) -> None:
    async with bus.context():
        bus.publish("before")
        async with open_one(database, by) as used:
            await put(used)
            bus.publish("inside")
            nested = await done(used.begin_nested())
            await put(used, "kept")
            bus.publish("kept")
            await done(nested.commit())
            nested = await done(used.begin_nested())
            await put(used, "dropped")
            bus.publish("dropped")
            await done(nested.rollback())
            async with bus.context():
                bus.publish("handed over")
            with suppress(Wrong):
                async with bus.context():
                    bus.publish("failed inside")
                    raise Wrong
            bus.publish("after")
            assert calls == []
            await done(used.commit())
            bus.publish("late")

    assert calls[:1] == ["commits before inside kept handed over after"]
    assert [line for line in seen if "handled" in line] == [
        "handled before",
        "handled inside",
        "handled kept",
        "handled handed over",
        "handled after",
        "handled late",
    ]
    assert calls.count("committed") == 1


async def test_the_hook_comes_after_flushes_and_the_hooks_of_sessions(
    bus: EventBus, database: Database, seen: list[str], calls: list[str]
) -> None:
    order: list[str] = []
    session = database.session()

    @event.listens_for(blocking(session), "before_commit")
    def add_more(session: Session) -> None:
        order.append("before_commit")
        session.add(Row(name="late"))
        bus.publish("before_commit")

    @event.listens_for(blocking(session), "after_flush")
    def flushed(*_: object) -> None:
        order.append("after_flush")
        bus.publish("after_flush")

    async with bus.context(), inside(session):
        session.add(Row(name="ada"))
        await done(session.commit())

    assert order == ["before_commit", "after_flush"]
    assert calls == ["commits before_commit after_flush", "committed"]


@pytest.mark.parametrize("by", USERS)
async def test_what_the_hook_writes_is_a_part_of_the_transaction(
    by: str, bus: EventBus, database: Database, tie: CommitTie
) -> None:
    def write(connection: Connection, transaction: Transaction) -> None:
        for envelope in transaction.decides():
            connection.execute(insert(Row).values(name=f"row of {envelope.event}"))

    tie.before_commit.append(write)
    async with bus.context():
        for name, end in (("ada", "commit"), ("bob", "rollback")):
            async with open_one(database, by) as used:
                await put(used, name)
                bus.publish(name)
                await done(getattr(used, end)())

    assert database.names() == ["ada", "row of ada"]


async def test_the_hook_may_write_with_the_drivers_own_words(
    bus: EventBus, database: Database, tie: CommitTie
) -> None:
    if database.kind == "postgresql":
        pytest.skip("the table of the tests is in a schema of its own")

    def write(connection: Connection, transaction: Transaction) -> None:
        connection.exec_driver_sql("INSERT INTO `rows` (name, note) VALUES ('hook', '')")

    tie.before_commit.append(write)
    async with bus.context(), inside(database.session()) as session:
        await put(session)
        bus.publish("ada")
        await done(session.commit())

    assert database.names() == ["ada", "hook"]


@pytest.mark.parametrize("error", [Wrong, KeyboardInterrupt])
@pytest.mark.parametrize("by", [*USERS, "session in two phases"])
async def test_what_the_hook_raises_comes_out_of_the_commit_and_nothing_is_committed(
    by: str,
    error: type[BaseException],
    bus: EventBus,
    database: Database,
    tie: CommitTie,
    seen: list[str],
    warnings: Warnings,
) -> None:
    if by not in USERS and (database.kind != "mysql" or database.awaits):
        pytest.skip("MariaDB is the one that has two phases here")

    def refuse(connection: Connection, transaction: Transaction) -> None:
        raise error

    tie.before_commit.append(refuse)
    opened = open_one(database, by) if by in USERS else inside(database.session(twophase=True))
    async with bus.context(), opened as used:
        await put(used)
        bus.publish("ada")
        with pytest.raises(error):
            await done(used.commit())

    tie.before_commit.clear()
    commit_from_the_pool(database)
    assert (seen, database.names(), warnings()) == (["discarded ada"], ["bob"], [])


@pytest.mark.parametrize("by", USERS)
async def test_what_the_database_refuses_of_the_hook_comes_out_of_the_commit(
    by: str, bus: EventBus, database: Database, tie: CommitTie, seen: list[str], warnings: Warnings
) -> None:
    def write(connection: Connection, transaction: Transaction) -> None:
        connection.execute(insert(Row).values(name="first"))

    tie.before_commit.append(write)
    async with bus.context(), open_one(database, by) as used:
        await put(used)
        bus.publish("ada")
        with pytest.raises(IntegrityError):
            await done(used.commit())

    tie.before_commit.clear()
    commit_from_the_pool(database)
    assert (seen, database.names(), warnings()) == (["discarded ada"], ["bob"], [])


async def test_the_hook_is_not_called_for_what_is_doomed(
    bus: EventBus, database: Database, seen: list[str], calls: list[str]
) -> None:
    async with bus.context(), inside(database.session()) as session:
        await put(session)
        bus.publish("ada")
        with pytest.raises(IntegrityError):
            await put(session, "first")
        await done(session.commit())

    doomed = database.kind == "postgresql"
    assert calls == (["rolled back"] if doomed else ["commits ada", "committed"])


@pytest.mark.parametrize("end", ["rollback", "close"])
@pytest.mark.parametrize("by", USERS)
async def test_the_hook_is_not_called_without_a_commit(
    by: str, end: str, bus: EventBus, database: Database, seen: list[str], calls: list[str]
) -> None:
    async with bus.context(), open_one(database, by) as used:
        await put(used)
        bus.publish("ada")
        await done(getattr(used, end)())

    assert (calls, seen) == (["rolled back"], ["discarded ada"])


async def test_a_commit_that_is_refused_has_ended_by_a_rollback(
    bus: EventBus, database: Database, seen: list[str], calls: list[str]
) -> None:
    if database.kind == "mysql":
        pytest.skip("MariaDB defers no constraint")
    async with bus.context(), inside(database.session()) as session:
        await done(session.execute(insert(Row).values(name="ada", parent="missing")))
        bus.publish("ada")
        with pytest.raises(IntegrityError):
            await done(session.commit())

    assert calls == ["commits ada", "rolled back"]


async def test_what_waits_for_a_reader_is_not_released_by_the_commit(
    bus: EventBus, database: Database, seen: list[str], calls: list[str]
) -> None:
    opened, opened_too = inside(database.session()), inside(database.session())
    async with bus.context(), opened as session, opened_too as reader:
        await put(session)
        await done(reader.get(Row, "first"))
        bus.publish("ada")
        await done(session.commit())

    assert calls[0] == "commits "
    assert seen == ["handled ada"]


async def test_an_empty_transaction_has_no_connection_before_a_listener_asks_for_one(
    bus: EventBus, database: Database, seen: list[str], calls: list[str]
) -> None:
    asks: list[bool] = [False, True]

    for ask in asks:
        session = database.session()

        def connect(session: Session, ask: bool = ask) -> None:
            if ask:
                session.connection()

        event.listen(blocking(session), "before_commit", connect)
        async with bus.context(), inside(session):
            await done(session.begin())
            bus.publish(f"asks {ask}")
            await done(session.commit())

    assert calls == ["committed", "commits asks True", "committed"]
    assert seen == ["handled asks False", "handled asks True"]


@pytest.mark.parametrize("nested", [True, False])
async def test_a_session_in_the_usual_test_fixture_calls_the_hook_at_its_commit(
    nested: bool, bus: EventBus, database: Database, seen: list[str], calls: list[str]
) -> None:
    make = AsyncSession if database.awaits else Session
    async with database.connection() as connection:
        outer = await done(connection.begin())
        async with bus.context():
            made: Any = make(bind=connection, join_transaction_mode="create_savepoint")
            async with inside(made) as session:
                await put(session)
                bus.publish("ada")
                if nested:
                    async with inside(session.begin_nested()):
                        await put(session, "bob")
                        bus.publish("bob")
                await done(session.commit())
        await done(outer.rollback())

    assert calls[0] == ("commits ada bob" if nested else "commits ada")
    assert seen == (["handled ada", "handled bob"] if nested else ["handled ada"])


async def test_the_hook_comes_before_prepare(
    bus: EventBus,
    database: Database,
    seen: list[str],
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if database.kind != "mysql" or database.awaits:
        pytest.skip("MariaDB is the one that has two phases here")
    dialect: Any = database.hooks.dialect
    prepare = dialect.do_prepare_twophase

    def note(*args: Any) -> None:
        calls.append("prepare")
        prepare(*args)

    monkeypatch.setattr(dialect, "do_prepare_twophase", note)
    async with bus.context():
        with database.session(twophase=True) as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            session.commit()

    assert calls == ["commits ada", "prepare", "committed"]
    assert database.names() == ["ada"]


async def test_a_hook_that_publishes_has_its_event_released_with_the_others(
    bus: EventBus, database: Database, tie: CommitTie, seen: list[str]
) -> None:
    def publish(connection: Connection, transaction: Transaction) -> None:
        bus.publish("from the hook")
        connection.execute(text("SELECT 1"))

    tie.before_commit.append(publish)
    with suppress(Wrong):
        async with bus.context():
            async with inside(database.session()) as session:
                await put(session)
                bus.publish("ada")
                await done(session.commit())
            raise Wrong

    assert seen == ["handled ada", "handled from the hook"]
