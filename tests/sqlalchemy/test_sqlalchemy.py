"""Delivered if and only if committed: transactions and units of work, without a web application."""

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import Event, create_task_group, to_thread
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from eventkit import EventBus, Observer, current_delivery
from eventkit.sqlalchemy import deliver_on_commit
from tests.databases import Base, Row, obey, to_await
from tests.sqlalchemy.steps import Wrong
from tests.witness import Number, assert_settled, freed_by_anyio, ignore, nothing, witnessed

pytestmark = pytest.mark.anyio

Sessions = sessionmaker[Session]


@pytest.fixture
def engine(engine: Engine) -> Engine:
    """The database, with one row in it."""
    with engine.begin() as connection:
        connection.execute(insert(Row).values(name="first"))
    return engine


@pytest.fixture
def sessions(bus: EventBus, engine: Engine) -> Sessions:
    """Sessions whose transactions decide."""
    sessions = sessionmaker(engine)
    deliver_on_commit(bus, sessions)
    return sessions


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    """What became of each event, in the order of its end."""
    return witnessed(bus)


async def test_a_commit_releases_although_the_unit_of_work_fails(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            with sessions.begin() as session:
                session.add(Row(name="ada"))
                bus.publish("ada")
            assert seen == []  # nothing runs in SQLAlchemy's hook
            raise Wrong

    assert seen == ["handled ada"]


async def test_a_rollback_discards_although_the_unit_of_work_succeeds(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with suppress(Wrong), sessions.begin() as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            raise Wrong
        assert seen == ["discarded ada"]

    assert_settled(bus)


async def test_each_of_several_commits_in_one_unit_releases_its_part(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            for name in ("ada", "bob", "cid"):
                session.add(Row(name=name))
                bus.publish(name)
                if name == "bob":
                    session.rollback()
                else:
                    session.commit()

    assert seen == ["discarded bob", "handled ada", "handled cid"]


async def test_the_rollback_of_a_savepoint_discards_what_was_published_in_it(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions.begin() as session:
            bus.publish("before")
            with suppress(Wrong), session.begin_nested():
                session.add(Row(name="ada"))
                bus.publish("inside")
                raise Wrong
            assert seen == ["discarded inside"]
            bus.publish("after")

    assert seen == ["discarded inside", "handled before", "handled after"]


async def test_what_a_savepoint_kept_is_decided_by_the_transaction_around_it(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            with session.begin_nested(), session.begin_nested():
                session.add(Row(name="ada"))
                bus.publish("ada")
            session.rollback()
            with session.begin_nested():
                session.add(Row(name="bob"))
                bus.publish("bob")
            session.commit()

    assert seen == ["discarded ada", "handled bob"]


async def test_the_commit_of_the_whole_commits_the_savepoints_that_are_open(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            with sessions() as session:
                session.begin_nested()
                session.add(Row(name="ada"))
                bus.publish("ada")
                session.commit()
            raise Wrong

    assert seen == ["handled ada"]


async def test_an_event_from_before_the_first_statement_belongs_to_the_transaction(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        bus.publish("early")
        with sessions() as session:
            session.add(Row(name="ada"))
            session.rollback()

    assert seen == ["discarded early"]


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize("commit", [True, False])
async def test_an_event_from_after_the_commit_is_released_by_the_next_one_or_left_to_the_unit(
    commit: bool, success: bool, bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            with sessions() as session:
                session.add(Row(name="ada"))
                session.commit()
                bus.publish("late")
                session.add(Row(name="bob"))
                if commit:
                    session.commit()
                else:
                    session.rollback()
            if not success:
                raise Wrong

    assert seen == ["handled late" if commit or success else "discarded late"]


@pytest.mark.parametrize("success", [True, False])
async def test_an_event_that_no_transaction_follows_is_decided_by_its_unit(
    success: bool, bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            with sessions() as session:
                session.add(Row(name="ada"))
                session.commit()
            bus.publish("late")
            if success:
                bus.current_context().release()
            raise Wrong

    assert seen == ["handled late" if success else "discarded late"]


async def test_a_commit_a_refresh_and_then_an_event_is_delivered(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            row = Row(name="ada")
            session.add(row)
            session.commit()
            session.refresh(row)  # begins a transaction, which closing ends without a word
            bus.publish(row.name)

    assert seen == ["handled ada"]


def change(session: Session) -> None:
    session.scalars(select(Row)).one().note = "changed"


def flush(session: Session) -> None:
    change(session)
    session.flush()


def flush_in_savepoint(session: Session) -> None:
    with session.begin_nested():
        flush(session)


def insert_in_bulk(session: Session) -> None:
    session.bulk_insert_mappings(inspect(Row), [{"name": "ada"}])


def read_in_savepoint(session: Session) -> None:
    session.begin_nested()
    session.get(Row, "first")


WRITING: dict[str, Callable[[Session], object]] = {
    "an object is added": lambda session: session.add(Row(name="ada")),
    "an object is changed": change,
    "an object is deleted": lambda session: session.delete(session.scalars(select(Row)).one()),
    "a change is flushed": flush,
    "INSERT": lambda session: session.execute(insert(Row).values(name="ada")),
    "UPDATE": lambda session: session.execute(update(Row).values(note="changed")),
    "textual UPDATE": lambda session: session.execute(text("UPDATE rows SET note = 'changed'")),
    "bulk method": insert_in_bulk,
    "connection": lambda session: session.connection().execute(insert(Row).values(name="ada")),
    "a savepoint that writes": flush_in_savepoint,
}


@pytest.mark.parametrize("write", WRITING.values(), ids=WRITING)
async def test_what_was_written_and_not_committed_takes_its_events_along(
    write: Callable[[Session], object], bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            write(session)
            bus.publish("lost")

    assert seen == ["discarded lost"]


READING: dict[str, Callable[[Session], object]] = {
    "SELECT": lambda session: session.scalars(select(Row)).all(),
    "get": lambda session: session.get(Row, "first"),
    "textual SELECT": lambda session: session.execute(text(" select 1")).one(),
    "savepoint": read_in_savepoint,
    "nothing": lambda session: session.begin(),
}


@pytest.mark.parametrize("read", READING.values(), ids=READING)
async def test_a_transaction_that_wrote_nothing_has_no_say_when_it_is_closed(
    read: Callable[[Session], object], bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            read(session)
            bus.publish("kept")

    assert seen == ["handled kept"]


async def test_a_session_that_only_reads_leaves_its_events_to_the_one_that_writes(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as writer:
            writer.add(Row(name="ada"))
            with sessions() as reader:
                reader.get(Row, "first")
                bus.publish("ada")
            writer.rollback()

    assert seen == ["discarded ada"]


async def test_two_sessions_in_one_unit_decide_for_themselves(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with suppress(Wrong), sessions.begin() as first:
            first.add(Row(name="lost"))
            bus.publish("first")
            with sessions.begin() as second:
                second.add(Row(name="second"))
                bus.publish("second")
            bus.publish("first again")
            raise Wrong

    assert seen == ["discarded first", "discarded first again", "handled second"]


async def test_tasks_of_one_unit_have_their_transactions_each(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    begun, published = Event(), Event()

    async def roll_back() -> None:
        with sessions() as session:
            session.add(Row(name="lost"))
            begun.set()
            await published.wait()
            bus.publish("lost")
            session.rollback()

    async def commit() -> None:
        await begun.wait()
        with sessions() as session:
            session.get(Row, "first")
            bus.publish("kept")
            session.commit()
            session.get(Row, "first")
            published.set()
            await checkpoint()

    async with bus.context(), create_task_group() as tasks:
        tasks.start_soon(roll_back)
        tasks.start_soon(commit)

    assert seen == ["discarded lost", "handled kept"]


async def test_a_session_may_be_begun_used_and_ended_in_different_threads(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        for end in (Session.rollback, Session.commit):
            session = sessions()
            await to_thread.run_sync(session.add, Row(name="ada"))
            await to_thread.run_sync(bus.publish, end.__name__)
            await to_thread.run_sync(end, session)
            await to_thread.run_sync(session.close)

    assert seen == ["discarded rollback", "handled commit"]


async def test_a_context_inside_a_transaction_leaves_its_events_to_it(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            with suppress(Wrong):
                async with bus.context():
                    bus.publish("dropped")
                    raise Wrong
            async with bus.context():
                bus.publish("handed over")
            session.rollback()

    assert seen == ["discarded dropped", "discarded handed over"]


async def test_a_transaction_does_not_decide_for_an_independent_context_inside_it(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with suppress(Wrong), sessions.begin() as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            async with bus.context(independent=True):
                with sessions.begin() as inner:
                    inner.add(Row(name="cid"))
                    bus.publish("cid")
                    inner.rollback()
                bus.publish("bob")
            assert seen == ["discarded cid", "handled bob"]
            raise Wrong

    assert seen == ["discarded cid", "handled bob", "discarded ada"]


async def test_a_transaction_that_is_rolled_back_in_an_inner_context_leaves_the_outer_ones_events(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        bus.publish("outer")
        async with bus.context():
            with sessions() as session:
                session.add(Row(name="ada"))
                bus.publish("inner")
                session.rollback()

    assert seen == ["discarded inner", "handled outer"]


async def test_a_transaction_may_outlive_the_inner_context_that_it_began_in(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            async with bus.context():
                session.add(Row(name="ada"))
                bus.publish("inner")
            await to_thread.run_sync(bus.publish, "outer")
            session.rollback()

    assert seen == ["discarded inner", "discarded outer"]


async def test_a_context_beside_that_of_a_transaction_is_not_part_of_it(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    begun, published = Event(), Event()

    async def roll_back() -> None:
        async with bus.context():
            with sessions() as session:
                session.add(Row(name="lost"))
                begun.set()
                await published.wait()
                session.rollback()

    async def publish() -> None:
        await begun.wait()
        async with bus.context():
            bus.publish("kept")
        published.set()

    async with bus.context(), create_task_group() as tasks:
        tasks.start_soon(roll_back)
        tasks.start_soon(publish)

    assert seen == ["handled kept"]


async def test_a_transaction_may_begin_in_a_task_that_has_outlived_its_unit(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    ended = Event()

    async def go_on() -> None:
        await ended.wait()
        with sessions.begin() as session:
            session.add(Row(name="ada"))

    async with create_task_group() as tasks:
        async with bus.context():
            tasks.start_soon(go_on)
            bus.publish("kept")
        ended.set()

    assert seen == ["handled kept"]


@pytest.mark.parametrize("commit", [True, False])
async def test_a_transaction_that_outlives_the_unit_has_not_been_committed(
    commit: bool,
    bus: EventBus,
    sessions: Sessions,
    seen: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    with sessions() as session:
        async with bus.context():
            session.add(Row(name="ada"))
            bus.publish("ada")
        if commit:
            session.commit()

    assert seen == ["discarded ada"]
    assert "reason=the transaction was still open when its unit of work ended" in caplog.text
    assert_settled(bus)


async def test_a_transaction_from_before_the_unit_takes_part_in_it_once_it_is_used_there(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    with sessions() as session:
        session.add(Row(name="ada"))
        session.flush()
        async with bus.context():
            bus.publish("before its use")
            session.get(Row, "first")
            bus.publish("rolled back")
            session.rollback()
        session.get(Row, "first")
        async with bus.context():
            bus.publish("not used")
            session.rollback()

    assert seen == ["discarded before its use", "discarded rolled back", "handled not used"]


@pytest.mark.parametrize("flush", [True, False])
async def test_a_session_from_before_the_unit_that_has_something_to_write_takes_part(
    flush: bool,
    bus: EventBus,
    sessions: Sessions,
    seen: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with sessions.begin() as session:  # as a middleware does that was added too late
        async with bus.context():
            session.add(Row(name="ada"))
            if flush:
                session.flush()
            bus.publish("ada")

    assert seen == ["discarded ada"]
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "a transaction that has written was still open when its unit of work ended: its events are "
        "lost, even if it is committed later. End it inside the unit of work. A middleware that "
        "commits goes inside of EventContextMiddleware: add EventContextMiddleware after it: "
        "bus=default deliveries=1 event_types=builtins.str x1"
    )


async def test_a_session_from_before_the_unit_takes_part_in_units_of_its_own_bus_alone(
    bus: EventBus, sessions: Sessions, engine: Engine, seen: list[str]
) -> None:
    other = EventBus(name="other")
    other.subscribe(str, nothing)
    deliver_on_commit(other, create_engine("sqlite://"))
    with sessions() as session:
        session.add(Row(name="ada"))
        async with other.context():
            other.publish("of the other bus")

    assert (seen, other.stats.handled) == ([], 1)


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "control_fully"])
async def test_a_session_on_its_callers_connection_leaves_the_decision_to_that(
    mode: Any, commit: bool, bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, engine)
    with suppress(Wrong):
        async with bus.context():
            with engine.connect() as connection:
                connection.begin()
                with Session(connection, join_transaction_mode=mode) as session:
                    session.add(Row(name="ada"))
                    bus.publish("ada")
                    session.flush()
                    if mode != "control_fully":
                        session.commit()
                        assert seen == []
                    elif commit:
                        session.commit()
                if mode != "control_fully":
                    (connection.commit if commit else connection.rollback)()
            if commit:
                raise Wrong

    assert seen == ["handled ada" if commit else "discarded ada"]


async def test_a_session_outside_any_unit_is_left_alone(
    bus: EventBus, sessions: Sessions, engine: Engine
) -> None:
    context = bus.context()
    async with context:
        pass
    with sessions.begin() as session:
        session.add(Row(name="ada"))
    with Session(engine) as session:
        assert session.get(Row, "ada") is not None


async def test_observers_hear_of_the_decision_when_it_is_made_also_about_unhandled_events(
    bus: EventBus, sessions: Sessions
) -> None:
    told: list[str] = []

    class Told(Observer):
        def released(self, events: Sequence[object]) -> None:
            told.append(f"released {events}")

        def withdrawn(self, events: Sequence[object]) -> None:
            told.append(f"withdrawn {events}")

    bus.observe(Told())
    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            bus.publish("ada", Number(1))
            session.commit()
            session.add(Row(name="bob"))
            bus.publish("bob", Number(2))
            session.rollback()
            told.append("end")

    assert told == ["released ['ada', 1]", "withdrawn ['bob', 2]", "end"]


async def test_what_is_released_or_discarded_by_hand_is_decided(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context() as unit:
        with sessions() as session:
            session.add(Row(name="ada"))
            bus.publish("released")
            unit.release()
            bus.publish("drained")
            await unit.drain()
            bus.publish("discarded")
            unit.discard()
            session.rollback()

    assert seen == ["handled released", "handled drained", "discarded discarded"]
    assert_settled(bus)


async def test_what_an_inner_context_has_released_outlives_the_rollback(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            async with bus.context() as inner:
                bus.publish("released")
                inner.release()
            session.rollback()

    assert seen == ["handled released"]


async def test_even_on_failure_goes_before_the_rollback(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            bus.publish("refused", even_on_failure=True)
            bus.publish("created")
            session.rollback()

    assert seen == ["discarded created", "handled refused"]


async def test_a_rollback_makes_room_in_its_unit(engine: Engine) -> None:
    bus = EventBus(max_events=1)
    bus.subscribe(str, nothing)
    sessions = sessionmaker(engine)
    deliver_on_commit(bus, sessions)

    async with bus.context():
        for name in ("ada", "bob"):
            with sessions() as session:
                session.add(Row(name=name))
                bus.publish(name)
                session.rollback()

    assert bus.stats.discarded == 2


async def test_a_handlers_own_transaction_decides_what_the_handler_publishes(
    engine: Engine,
) -> None:
    bus = EventBus()
    bus.report_failure = ignore
    sessions = sessionmaker(engine)
    deliver_on_commit(bus, sessions)

    @bus.on(int)
    async def commit_and_fail(event: int) -> None:
        with sessions.begin() as session:
            session.get(Row, "first")
            bus.publish("committed")
        bus.publish("after it")
        raise Wrong

    @bus.on(float)
    async def roll_back_and_go_on(event: float) -> None:
        with sessions() as session:
            session.add(Row(name="ada"))
            bus.publish("rolled back")
            session.rollback()
        bus.publish("gone on")

    @bus.on(bytes)
    async def forget(event: bytes) -> None:
        session = sessions()
        session.add(Row(name="ada"))
        bus.publish("forgotten")
        left_open.append(session)

    bus.subscribe(str, nothing, thread=False)
    left_open: list[Session] = []
    seen = witnessed(bus)
    async with bus.context():
        bus.publish(1, 1.5, b"")

    assert [line for line in seen if not line.endswith(("1", "1.5", "b''"))] == [
        "discarded after it",
        "discarded rolled back",
        "discarded forgotten",
        "handled committed",
        "handled gone on",
    ]
    left_open[0].close()
    assert_settled(bus)


async def test_a_dispatch_inside_a_transaction_is_not_part_of_it(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    @bus.on(int)
    async def publish(event: int) -> None:
        bus.publish("from the handler")

    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            await bus.dispatch(1)
            session.rollback()

    assert seen == ["handled 1", "handled from the handler"]


async def test_a_flush_that_fails_dooms_what_is_published_until_the_rollback(
    bus: EventBus, sessions: Sessions, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with bus.context():
        with sessions() as session:
            session.add(Row(name="first"))
            bus.publish("before")
            with pytest.raises(IntegrityError):
                session.commit()
            assert seen == ["discarded before"]
            bus.publish("doomed")
            session.rollback()
            bus.publish("afterwards")

    assert seen == ["discarded before", "discarded doomed", "handled afterwards"]
    assert caplog.records == []


@pytest.mark.parametrize("error", [Wrong, asyncio.CancelledError])
@pytest.mark.parametrize("rollback", [True, False])
async def test_a_commit_that_raises_may_have_happened_and_is_reported_as_such(
    rollback: bool,
    error: type[BaseException],
    bus: EventBus,
    engine: Engine,
    sessions: Sessions,
    seen: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    @event.listens_for(engine, "commit")
    def lose_the_connection(connection: Connection) -> None:
        raise error

    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            with pytest.raises(error):
                session.commit()
            if rollback:
                session.rollback()

    assert seen == ["discarded ada"]
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "a commit failed, and may have happened all the same: bus=default deliveries=1 "
        "event_types=builtins.str x1"
    )


async def test_a_session_whose_connection_is_lost_on_closing_begins_afresh(
    bus: EventBus, engine: Engine, sessions: Sessions, seen: list[str]
) -> None:
    @event.listens_for(engine, "rollback", once=True)
    def lose_the_connection(connection: Connection) -> None:
        raise Wrong

    async with bus.context():
        session = sessions()
        session.add(Row(name="ada"))
        bus.publish("ada")
        session.flush()
        with pytest.raises(Wrong):
            session.close()
        session.add(Row(name="bob"))
        assert seen == ["discarded ada"]
        bus.publish("bob")
        session.commit()

    assert seen == ["discarded ada", "handled bob"]


async def test_a_session_without_autobegin_stays_without(bus: EventBus, engine: Engine) -> None:
    sessions = sessionmaker(engine, autobegin=False)
    deliver_on_commit(bus, sessions)

    with sessions() as session, pytest.raises(InvalidRequestError, match="Autobegin is disabled"):
        session.execute(insert(Row).values(name="ada"))


async def test_a_commit_inside_a_tests_outer_transaction_is_a_commit(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        sessions = sessionmaker(connection, join_transaction_mode="create_savepoint")
        deliver_on_commit(bus, sessions)
        async with bus.context():
            with sessions() as session:
                session.add(Row(name="ada"))
                bus.publish("ada")
                session.commit()
                session.add(Row(name="bob"))
                bus.publish("bob")
                session.rollback()
        outer.rollback()

    assert seen == ["discarded bob", "handled ada"]


async def test_a_prepared_transaction_that_is_rolled_back_is_in_no_doubt(
    bus: EventBus,
    engine: Engine,
    seen: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialect = engine.dialect  # SQLite has no first phase, so here it is the second alone

    def then(step: Callable[[Any], None]) -> Callable[..., None]:
        def do(connection: Connection, *_: object, **__: object) -> None:
            step(connection.connection)

        return do

    monkeypatch.setattr(dialect, "do_begin_twophase", then(dialect.do_begin))
    monkeypatch.setattr(dialect, "do_prepare_twophase", then(nothing))
    monkeypatch.setattr(dialect, "do_commit_twophase", then(dialect.do_commit))
    monkeypatch.setattr(dialect, "do_rollback_twophase", then(dialect.do_rollback))
    sessions = sessionmaker(engine, twophase=True)
    deliver_on_commit(bus, sessions)

    async with bus.context():
        with sessions() as session:
            for name, end in (("ada", Session.commit), ("bob", Session.rollback)):
                session.add(Row(name=name))
                bus.publish(name)
                session.prepare()
                end(session)
        with engine.connect() as connection:  # of which nothing is known
            twophase = connection.begin_twophase()
            twophase.prepare()
            twophase.commit()

    assert seen == ["discarded bob", "handled ada"]
    assert caplog.records == []


STEPS = ["add", "publish", "begin_nested", "commit", "rollback", "close", "read", "end savepoint"]


@given(st.lists(st.sampled_from(["add", *STEPS]), max_size=25), st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_a_session_does_the_events_of_committed_rows_are_delivered(
    steps: list[str], success: bool
) -> None:
    bus, delivered = EventBus(), set[str]()
    bus.subscribe(str, delivered.add, name="remember", thread=False)
    engine = create_engine("sqlite://", poolclass=StaticPool)
    obey(engine)
    Base.metadata.create_all(engine)
    sessions = sessionmaker(engine)
    deliver_on_commit(bus, sessions)

    with suppress(Wrong), bus.context():
        session = sessions()
        for number, step in enumerate(steps):
            match step:
                case "add":
                    session.add(Row(name=str(number)))
                    bus.publish(str(number))
                case "publish":
                    bus.publish("of no row", even_on_failure=True)
                case "read":
                    session.scalars(select(Row)).all()
                case "end savepoint":
                    nested = session.get_nested_transaction()
                    if nested is not None:
                        (nested.rollback if number % 2 else nested.commit)()
                case _:
                    getattr(session, step)()
        session.close()
        if not success:
            raise Wrong

    with Session(engine) as session:
        committed = set(session.scalars(select(Row.name)))
    assert delivered - {"of no row"} == committed
    engine.dispose()


@freed_by_anyio
async def test_nothing_is_kept_of_a_transaction_that_has_ended(
    bus: EventBus, sessions: Sessions
) -> None:
    class Paid:
        pass

    @bus.on(Paid)
    async def handle(event: Paid) -> None: ...

    gc.disable()
    try:
        async with bus.context():
            for end in (Session.commit, Session.rollback, Session.close):
                with sessions() as session:
                    session.add(Row(name=end.__name__))
                    paid = Paid()
                    kept = weakref.ref(paid)
                    bus.publish(paid)
                    end(session)
                del paid, session
        assert kept() is None
    finally:
        gc.enable()


def test_a_job_without_a_loop_is_decided_by_its_commits(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    with suppress(Wrong), bus.context():
        with sessions.begin() as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
        raise Wrong

    assert seen == ["handled ada"]


@pytest.fixture
def async_engine(engine: Engine) -> AsyncEngine:
    """The same database, for those who await."""
    return to_await(engine)


@pytest.fixture
def async_sessions(
    bus: EventBus, async_engine: AsyncEngine, anyio_backend_name: str
) -> async_sessionmaker[AsyncSession]:
    """Sessions to await whose transactions decide."""
    if anyio_backend_name != "asyncio":
        pytest.skip("SQLAlchemy's asynchronous sessions are made for asyncio")
    sessions = async_sessionmaker(async_engine)
    deliver_on_commit(bus, sessions)
    return sessions


async def test_sessions_to_await_decide_as_others_do(
    bus: EventBus, async_sessions: async_sessionmaker[AsyncSession], seen: list[str]
) -> None:
    with suppress(Wrong):
        async with bus.context():
            async with async_sessions() as session:
                session.add(Row(name="bob"))
                bus.publish("rolled back")
                await session.rollback()
            async with async_sessions.begin() as session:
                session.add(Row(name="ada"))
                bus.publish("committed")
                with suppress(Wrong):
                    async with session.begin_nested():
                        bus.publish("in a savepoint")
                        raise Wrong
                await session.run_sync(lambda _: bus.publish("in run_sync"))
            async with async_sessions() as session:
                session.add(Row(name="cid"))
                bus.publish("forgotten")
            async with async_sessions() as session:
                await session.scalars(select(Row))
                bus.publish("left to the unit")
            raise Wrong

    assert seen == [
        "discarded rolled back",
        "discarded in a savepoint",
        "discarded forgotten",
        "discarded left to the unit",
        "handled committed",
        "handled in run_sync",
    ]


async def test_tasks_with_sessions_to_await_have_their_transactions_each(
    bus: EventBus, async_sessions: async_sessionmaker[AsyncSession], seen: list[str]
) -> None:
    begun, published = Event(), Event()

    async def roll_back() -> None:
        async with async_sessions() as session:
            session.add(Row(name="lost"))
            begun.set()
            await published.wait()
            bus.publish("lost")
            await session.rollback()

    async def commit() -> None:
        await begun.wait()
        async with async_sessions() as session:
            session.add(Row(name="kept"))
            published.set()
            await checkpoint()
            bus.publish("kept")
            await session.commit()

    async with bus.context(), create_task_group() as tasks:
        tasks.start_soon(roll_back)
        tasks.start_soon(commit)

    assert seen == ["discarded lost", "handled kept"]


async def test_a_scoped_session_stands_for_its_factory(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    session = scoped_session(sessionmaker(engine))
    deliver_on_commit(bus, session)

    async with bus.context():
        session.add(Row(name="ada"))
        bus.publish("ada")
        session.remove()

    assert seen == ["discarded ada"]


async def test_a_scoped_session_to_await_stands_for_its_factory(
    bus: EventBus, async_engine: AsyncEngine, anyio_backend_name: str, seen: list[str]
) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("SQLAlchemy's asynchronous sessions are made for asyncio")
    session = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
    deliver_on_commit(bus, session)

    async with bus.context():
        session.add(Row(name="ada"))
        bus.publish("ada")
        await session.remove()

    assert seen == ["discarded ada"]


async def test_a_session_scoped_by_the_delivery_is_shared_by_no_two_handlers(
    async_engine: AsyncEngine,
) -> None:
    factory = async_sessionmaker(async_engine)
    session = async_scoped_session(factory, scopefunc=lambda: current_delivery().id)
    bus = EventBus()
    used: dict[str, list[AsyncSession]] = {"mail": [], "audit": []}

    async def handle(event: str) -> None:
        mine = used[current_delivery().handler]
        try:
            mine.append(session())
            await checkpoint()
            mine.append(session())
        finally:
            await session.remove()

    for name in used:
        bus.subscribe(str, partial(handle), name=name)
    async with bus.context():
        bus.publish("ada")

    assert used["mail"][0] is used["mail"][1]
    assert used["audit"][0] is used["audit"][1]
    assert used["mail"][0] is not used["audit"][0]
    assert session.registry.registry == {}


async def test_a_session_class_of_ones_own_stays_what_it_is(
    bus: EventBus, async_engine: AsyncEngine
) -> None:
    class OwnSession(Session):
        pass

    sessions = sessionmaker(class_=OwnSession)
    async_sessions = async_sessionmaker(async_engine, sync_session_class=OwnSession)
    deliver_on_commit(bus, sessions)
    deliver_on_commit(bus, async_sessions)

    assert isinstance(sessions(), OwnSession)
    assert isinstance(async_sessions().sync_session, OwnSession)


async def test_every_bus_that_is_tied_is_served(engine: Engine) -> None:
    buses = [EventBus(name="one"), EventBus(name="two")]
    sessions = sessionmaker(engine)
    all_seen: list[list[str]] = []
    for bus in buses:
        bus.subscribe(str, nothing)
        deliver_on_commit(bus, sessions)
        all_seen.append(witnessed(bus))

    async with buses[0].context(), buses[1].context():
        with sessions() as session:
            session.add(Row(name="ada"))
            for bus in buses:
                bus.publish("rolled back")
            session.rollback()
            session.add(Row(name="ada"))
            for bus in buses:
                bus.publish("committed")
            session.commit()

    assert all_seen == [["discarded rolled back", "handled committed"]] * 2


async def test_a_tie_that_is_detached_leaves_no_trace(
    bus: EventBus, engine: Engine, async_engine: AsyncEngine, seen: list[str]
) -> None:
    sessions, async_sessions = sessionmaker(engine), async_sessionmaker(async_engine)
    made_by = sessions.class_
    with deliver_on_commit(bus, sessions) as tie, deliver_on_commit(bus, async_sessions):
        pass
    tie.detach()

    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            session.rollback()

    assert seen == ["handled ada"]
    assert type(session) is made_by
    assert type(async_sessions().sync_session) is Session


async def test_what_was_written_before_the_tie_was_detached_is_lost_with_the_unit(
    bus: EventBus, engine: Engine, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tie = deliver_on_commit(bus, engine)
    async with bus.context():
        with Session(engine) as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            tie.detach()
            session.commit()

    assert seen == ["discarded ada"]
    assert "was still open when its unit of work ended" in caplog.text


async def test_ties_may_be_detached_in_any_order(
    bus: EventBus, sessions: Sessions, seen: list[str]
) -> None:
    other = deliver_on_commit(EventBus(), sessions)
    with deliver_on_commit(EventBus(), sessions):
        other.detach()

    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            session.rollback()

    assert seen == ["discarded ada"]


async def test_a_tie_that_was_detached_leaves_a_later_one_alone(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    sessions = sessionmaker(engine)
    earlier = deliver_on_commit(bus, sessions)
    earlier.detach()
    deliver_on_commit(bus, sessions)
    earlier.detach()

    async with bus.context():
        with sessions() as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            session.rollback()

    assert seen == ["discarded ada"]


async def test_a_tie_holds_for_sessions_made_before_it_and_not_for_what_follows_it(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    before = Session(engine)
    tie = deliver_on_commit(bus, engine)
    async with bus.context():
        with before, Session(engine) as session:
            before.add(Row(name="ada"))
            bus.publish("lost")
            before.rollback()
            session.begin()
            tie.detach()
            session.add(Row(name="bob"))
            bus.publish("kept")
            session.rollback()

    assert seen == ["discarded lost", "handled kept"]


async def test_one_engine_is_tied_to_a_bus_once(bus: EventBus, sessions: Sessions) -> None:
    with pytest.raises(
        ValueError,
        match=r"'default'.* is tied to Engine\(.*\) already: all sessions and connections of an "
        r"engine count, so call deliver_on_commit\(\) once",
    ):
        deliver_on_commit(bus, scoped_session(sessions))


@pytest.mark.parametrize("wrong", [Session, Session(), "sqlite://", None])
async def test_what_leads_to_no_engine_is_refused(wrong: Any, bus: EventBus) -> None:
    with pytest.raises(
        TypeError,
        match=r"deliver_on_commit\(\) takes an Engine or AsyncEngine, or a sessionmaker or "
        r"async_sessionmaker that has one, not .*: pass the engine itself",
    ):
        deliver_on_commit(bus, wrong)


async def test_what_is_no_bus_is_refused(sessions: Any) -> None:
    with pytest.raises(TypeError, match="takes an EventBus first, not sessionmaker"):
        deliver_on_commit(sessions, sessions)
