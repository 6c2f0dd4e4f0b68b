"""The rare ways of transactions: what is undone, lost, refused or noticed late."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import to_thread
from sqlalchemy import Connection, Engine, create_engine, event, insert, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit
from tests.databases import Row
from tests.sqlalchemy.steps import Wrong
from tests.witness import witnessed

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine(engine: Engine) -> Engine:
    """The database, with one row in it."""
    with engine.begin() as connection:
        connection.execute(insert(Row).values(name="first"))
    return engine


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    """What became of each event, in the order of its end."""
    return witnessed(bus)


async def test_the_database_undoes_savepoints_too(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, engine)
    async with bus.context():
        with suppress(OperationalError), Session(engine) as session:  # its savepoint is gone
            session.execute(insert(Row).values(name="ada"))
            bus.publish("ada")
            session.begin_nested()
            session.execute(insert(Row).values(name="bob"))
            bus.publish("bob")
            with pytest.raises(IntegrityError):
                session.execute(
                    text("INSERT OR ROLLBACK INTO rows (name, note) VALUES ('first', '')")
                )
            assert seen == ["discarded ada", "discarded bob"]


async def test_a_context_inside_a_transaction_in_which_that_is_used(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, engine)
    async with bus.context():
        with Session(engine) as session:
            session.execute(insert(Row).values(name="ada"))
            async with bus.context():
                session.execute(insert(Row).values(name="bob"))
                bus.publish("inside")
            session.rollback()

    assert seen == ["discarded inside"]


async def test_an_engine_that_cannot_connect_raises_as_without_a_tie(
    bus: EventBus, tmp_path: Path
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/missing/test.db")
    deliver_on_commit(bus, engine)
    async with bus.context():
        with pytest.raises(OperationalError), engine.connect():
            pass


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_a_connection_whose_tie_was_detached_has_lost_what_it_wrote(
    end: str, bus: EventBus, engine: Engine, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tie = deliver_on_commit(bus, engine)
    async with bus.context():
        with engine.connect() as connection:
            connection.execute(insert(Row).values(name="ada"))
            bus.publish("ada")
            tie.detach()
            getattr(connection, end)()

    assert seen == ["discarded ada"]
    assert "was still open when its unit of work ended" in caplog.text


async def test_a_commit_that_a_listener_refuses_is_noticed_by_the_thread_that_sent_it(
    bus: EventBus, engine: Engine, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    deliver_on_commit(bus, engine)

    @event.listens_for(engine, "commit")
    def refuse(connection: Connection) -> None:
        raise Wrong

    async with bus.context():
        with engine.connect() as connection:
            connection.execute(insert(Row).values(name="ada"))
            bus.publish("ada")
            with pytest.raises(Wrong):
                connection.commit()
            await to_thread.run_sync(bus.publish, "elsewhere")
            assert seen == []
            bus.publish("here")
            assert seen[0] == "discarded ada"
            connection.rollback()

    assert "may have happened all the same" in caplog.text


async def test_a_session_whose_engine_is_known_late_is_in_a_savepoint_already(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    sessions = sessionmaker(binds={Row: engine})
    deliver_on_commit(bus, sessions)
    with suppress(Wrong):
        async with bus.context():
            with sessions() as session:
                with session.begin_nested():
                    session.execute(insert(Row).values(name="ada"))
                    bus.publish("ada")
                session.commit()
            raise Wrong

    assert seen == ["handled ada"]


async def test_a_session_commits_what_was_published_in_a_savepoint_of_its_connection(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, engine)
    with suppress(Wrong):
        async with bus.context():
            with Session(engine) as session:
                connection = session.connection()
                connection.begin_nested()
                connection.execute(insert(Row).values(name="ada"))
                bus.publish("ada")
                session.commit()
            raise Wrong

    assert seen == ["handled ada"]


async def test_objects_that_cannot_be_compared_count_as_changed(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    class Odd(Session):
        def is_modified(self, instance: object, include_collections: bool = True) -> bool:
            raise Wrong

    deliver_on_commit(bus, engine)
    async with bus.context():
        with Odd(engine) as session:
            row = session.get_one(Row, "first")
            row.note = "changed"
            bus.publish("ada")

    assert seen == ["discarded ada"]


async def test_a_hook_that_loses_the_connection_and_raises(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    def lose(connection: Connection, _: Any) -> None:
        connection.invalidate()
        raise Wrong

    tie = deliver_on_commit(bus, engine)
    tie.before_commit.append(lose)
    other = EventBus(name="other")
    deliver_on_commit(other, create_engine("sqlite://"))
    async with bus.context():
        with Session(engine) as session:
            session.execute(insert(Row).values(name="ada"))
            bus.publish("ada")
            with pytest.raises(Wrong):
                session.commit()

    assert seen == ["discarded ada"]
