"""What leads to an engine, and what a tie holds on to: one line ties all that the engine does."""

import asyncio
import gc
import re
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import to_thread
from sqlalchemy import Engine, create_engine, delete, insert, select, text
from sqlalchemy.exc import SAWarning
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from eventkit import EventBus
from eventkit._core.transactions import Transaction
from eventkit.sqlalchemy import deliver_on_commit
from tests.databases import Base, Row, obey, sqlite
from tests.sqlalchemy.steps import DECIDED, Wrong
from tests.witness import assert_settled, freed_by_anyio, nothing, witnessed

pytestmark = pytest.mark.anyio

# How the sessions, or connections, of an application are opened.
Open = Callable[[], AbstractContextManager[Any]]
AsyncOpen = Callable[[], AbstractAsyncContextManager[Any]]


@pytest.fixture
def other_engine(tmp_path: Path) -> Iterator[Engine]:
    """Another one, which no test ties at first."""
    with sqlite(tmp_path / "other.db") as engine:
        yield engine


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    """What became of each event, in the order of its end."""
    return witnessed(bus)


async def decide(bus: EventBus, open: Open) -> None:
    """End a transaction in each of the ways, in the unit of work that would decide otherwise."""
    with suppress(Wrong):
        async with bus.context():
            with open() as session:
                session.execute(insert(Row).values(name="committed"))
                bus.publish("committed")
                session.commit()
            raise Wrong
    async with bus.context():
        with open() as session:
            session.execute(insert(Row).values(name="rolled back"))
            bus.publish("rolled back")
            session.rollback()
        with open() as session:
            session.execute(insert(Row).values(name="closed"))
            bus.publish("closed")
        with open() as session:
            session.execute(select(Row)).all()
            bus.publish("read")


async def decide_async(bus: EventBus, open: AsyncOpen) -> None:
    """Do the same with what is awaited."""
    with suppress(Wrong):
        async with bus.context():
            async with open() as session:
                await session.execute(insert(Row).values(name="committed"))
                bus.publish("committed")
                await session.commit()
            raise Wrong
    async with bus.context():
        async with open() as session:
            await session.execute(insert(Row).values(name="rolled back"))
            bus.publish("rolled back")
            await session.rollback()
        async with open() as session:
            await session.execute(insert(Row).values(name="closed"))
            bus.publish("closed")
        async with open() as session:
            (await session.execute(select(Row))).all()
            bus.publish("read")


def empty(session: Session) -> None:
    """Make room for the same rows again."""
    session.execute(delete(Row))
    session.commit()


# One line of user code each, and then sessions or connections of any making


@contextmanager
def scope(session: scoped_session[Session]) -> Generator[scoped_session[Session]]:
    """A request, as scoped sessions are used in one."""
    try:
        yield session
    finally:
        session.remove()


@asynccontextmanager
async def async_scope(
    session: async_scoped_session[AsyncSession],
) -> AsyncGenerator[async_scoped_session[AsyncSession]]:
    """A request, as scoped sessions to await are used in one."""
    try:
        yield session
    finally:
        await session.remove()


@contextmanager
def session_on_a_connection(engine: Engine) -> Generator[Session]:
    with engine.connect() as connection, Session(connection) as session:
        yield session


def tie_engine(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, engine)
    return partial(Session, engine)


def tie_engine_for_connections(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, engine)
    return engine.connect


def tie_engine_for_sessions_on_connections(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, engine)
    return partial(session_on_a_connection, engine)


def tie_engine_for_sessions_bound_one_by_one(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, engine)
    sessions = sessionmaker()
    return lambda: sessions(bind=engine)


def tie_engine_for_its_options(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, engine)
    return partial(Session, engine.execution_options(logging_token="reports"))


def tie_options_for_their_engine(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, engine.execution_options(logging_token="reports"))
    return partial(Session, engine)


def tie_options_for_other_options(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, engine.execution_options(logging_token="reports"))
    return engine.execution_options(logging_token="orders").connect


def tie_engine_for_sessions_that_await_nothing(bus: EventBus, engine: Engine) -> Open:
    """`Session` of a class of its own, with `get_bind`, as those have that route to replicas."""
    deliver_on_commit(bus, engine)

    class Routed(Session):
        def get_bind(self, *_: object, **__: object) -> Engine:
            return engine

    return Routed


def tie_factory(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessions := sessionmaker(engine))
    return sessions


def tie_factory_for_other_sessions(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessionmaker(engine))
    return partial(Session, engine)


def tie_factory_for_connections(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessionmaker(engine))
    return engine.connect


def tie_factory_of_options(bus: EventBus, engine: Engine) -> Open:
    options = engine.execution_options(logging_token="reports")
    deliver_on_commit(bus, sessions := sessionmaker(options))
    return sessions


def tie_factory_with_binds(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessions := sessionmaker(binds={Row: engine}))
    return sessions


def tie_factory_with_binds_of_base(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessions := sessionmaker(binds={Base: engine}))
    return sessions


def tie_factory_with_binds_of_table(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessions := sessionmaker(binds={Row.__table__: engine}))
    return sessions


def tie_factory_with_class_of_its_own(bus: EventBus, engine: Engine) -> Open:
    class OwnSession(Session):
        pass

    deliver_on_commit(bus, sessions := sessionmaker(engine, class_=OwnSession))
    return sessions


def tie_factory_bound_later(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessions := sessionmaker())
    sessions.configure(bind=engine)
    return sessions


def tie_factory_with_binds_later(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessions := sessionmaker())
    sessions.configure(binds={Row: engine})
    return sessions


def tie_factory_of_sessions_bound_one_by_one(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, sessions := sessionmaker())
    return lambda: sessions(bind=engine)


def tie_factory_bound_to_another_engine_at_first(bus: EventBus, engine: Engine) -> Open:
    """As a test does that binds the application's factory to an engine of its own."""
    deliver_on_commit(bus, sessions := sessionmaker(create_engine("sqlite://")))
    sessions.configure(bind=engine)
    return sessions


def tie_scoped_session(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, session := scoped_session(sessionmaker(engine)))
    return lambda: scope(session)


def tie_scoped_session_bound_later(bus: EventBus, engine: Engine) -> Open:
    deliver_on_commit(bus, session := scoped_session(sessionmaker()))
    session.configure(bind=engine)
    return lambda: scope(session)


TIES = [
    tie_engine,
    tie_engine_for_connections,
    tie_engine_for_sessions_on_connections,
    tie_engine_for_sessions_bound_one_by_one,
    tie_engine_for_its_options,
    tie_options_for_their_engine,
    tie_options_for_other_options,
    tie_engine_for_sessions_that_await_nothing,
    tie_factory,
    tie_factory_for_other_sessions,
    tie_factory_for_connections,
    tie_factory_of_options,
    tie_factory_with_binds,
    tie_factory_with_binds_of_base,
    tie_factory_with_binds_of_table,
    tie_factory_with_class_of_its_own,
    tie_factory_bound_later,
    tie_factory_with_binds_later,
    tie_factory_of_sessions_bound_one_by_one,
    tie_factory_bound_to_another_engine_at_first,
    tie_scoped_session,
    tie_scoped_session_bound_later,
]


@pytest.mark.parametrize("tie", TIES)
async def test_whatever_is_tied_leads_to_the_engine(
    tie: Callable[[EventBus, Engine], Open], bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    await decide(bus, tie(bus, engine))

    assert seen == DECIDED
    assert_settled(bus)


def tie_async_engine(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    deliver_on_commit(bus, engine)
    return partial(AsyncSession, engine)


def tie_async_engine_for_connections(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    deliver_on_commit(bus, engine)
    return engine.connect


def tie_the_engine_inside(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    deliver_on_commit(bus, engine.sync_engine)
    return partial(AsyncSession, engine)


def tie_async_engine_for_its_options(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    deliver_on_commit(bus, engine)
    return partial(AsyncSession, engine.execution_options(logging_token="reports"))


def tie_async_options_for_their_engine(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    deliver_on_commit(bus, engine.execution_options(logging_token="reports"))
    return engine.connect


def tie_async_factory(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    deliver_on_commit(bus, sessions := async_sessionmaker(engine))
    return sessions


def tie_async_factory_for_connections(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    deliver_on_commit(bus, async_sessionmaker(engine))
    return engine.connect


def tie_async_factory_with_binds(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    deliver_on_commit(bus, sessions := async_sessionmaker(binds={Row: engine}))
    return sessions


def tie_async_factory_bound_later(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    sessions: async_sessionmaker[AsyncSession] = async_sessionmaker()
    deliver_on_commit(bus, sessions)
    sessions.configure(bind=engine)
    return sessions


def tie_async_factory_of_sessions_bound_one_by_one(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    sessions: async_sessionmaker[AsyncSession] = async_sessionmaker()
    deliver_on_commit(bus, sessions)
    return lambda: sessions(bind=engine)


def tie_async_factory_with_class_of_its_own(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    class OwnSession(Session):
        pass

    deliver_on_commit(bus, sessions := async_sessionmaker(engine, sync_session_class=OwnSession))
    return sessions


def tie_async_factory_with_factory_inside(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    """SQLAlchemy calls what it is given as `sync_session_class`: a factory does as well."""
    inside: Any = sessionmaker()
    deliver_on_commit(bus, sessions := async_sessionmaker(engine, sync_session_class=inside))
    return sessions


def tie_async_factory_with_factory_inside_bound_later(
    bus: EventBus, engine: AsyncEngine
) -> AsyncOpen:
    inside: Any = sessionmaker()
    sessions: async_sessionmaker[AsyncSession] = async_sessionmaker(sync_session_class=inside)
    deliver_on_commit(bus, sessions)
    sessions.configure(bind=engine)
    return sessions


def tie_factory_of_async_sessions(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    """As it was written before `async_sessionmaker`."""
    sessions: Any = cast("Any", sessionmaker)(engine, class_=AsyncSession)
    deliver_on_commit(bus, sessions)
    return cast("AsyncOpen", sessions)


def tie_factory_of_async_sessions_bound_later(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    sessions: Any = cast("Any", sessionmaker)(class_=AsyncSession)
    deliver_on_commit(bus, sessions)
    sessions.configure(bind=engine)
    return cast("AsyncOpen", sessions)


def tie_async_scoped_session(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    session = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
    deliver_on_commit(bus, session)
    return lambda: async_scope(session)


def tie_async_scoped_session_bound_later(bus: EventBus, engine: AsyncEngine) -> AsyncOpen:
    sessions: async_sessionmaker[AsyncSession] = async_sessionmaker()
    session = async_scoped_session(sessions, asyncio.current_task)
    deliver_on_commit(bus, session)
    session.configure(bind=engine)
    return lambda: async_scope(session)


ASYNC_TIES = [
    tie_async_engine,
    tie_async_engine_for_connections,
    tie_the_engine_inside,
    tie_async_engine_for_its_options,
    tie_async_options_for_their_engine,
    tie_async_factory,
    tie_async_factory_for_connections,
    tie_async_factory_with_binds,
    tie_async_factory_bound_later,
    tie_async_factory_of_sessions_bound_one_by_one,
    tie_async_factory_with_class_of_its_own,
    tie_async_factory_with_factory_inside,
    tie_async_factory_with_factory_inside_bound_later,
    tie_factory_of_async_sessions,
    tie_factory_of_async_sessions_bound_later,
    tie_async_scoped_session,
    tie_async_scoped_session_bound_later,
]


@pytest.mark.parametrize("tie", ASYNC_TIES)
async def test_whatever_is_tied_leads_to_the_engine_that_is_awaited(
    tie: Callable[[EventBus, AsyncEngine], AsyncOpen],
    bus: EventBus,
    async_engine: AsyncEngine,
    seen: list[str],
) -> None:
    await decide_async(bus, tie(bus, async_engine))

    assert seen == DECIDED
    assert_settled(bus)


async def test_an_engine_that_nobody_has_tied_decides_nothing(
    bus: EventBus, engine: Engine, other_engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, engine)

    async with bus.context():
        with Session(other_engine) as session:
            session.add(Row(name="replica"))
            bus.publish("replica")
            session.rollback()

    assert seen == ["handled replica"]


async def test_all_engines_of_a_factory_are_tied(
    bus: EventBus, engine: Engine, other_engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, sessionmaker(engine, binds={Row: other_engine}))

    await decide(bus, partial(Session, engine))
    await decide(bus, other_engine.connect)

    assert seen == [*DECIDED, *DECIDED]


async def test_what_a_factory_was_bound_to_first_stays_tied(
    bus: EventBus, engine: Engine, other_engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, sessions := sessionmaker(engine))
    sessions.configure(bind=other_engine)

    await decide(bus, sessions)
    await decide(bus, partial(Session, engine))
    with Session(other_engine) as session:
        empty(session)
    await decide(bus, other_engine.connect)  # a session of the factory has shown the way there

    assert seen == [*DECIDED, *DECIDED, *DECIDED]


async def test_a_session_of_two_engines_decides_once(
    bus: EventBus, engine: Engine, other_engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, engine)
    deliver_on_commit(bus, other_engine)

    @contextmanager
    def open() -> Generator[Session]:
        """A session that has read on the one engine, and then writes and reads on the other."""
        with Session(engine, binds={Row: other_engine}) as session:
            session.execute(text("SELECT 1")).all()
            yield session

    await decide(bus, open)

    assert seen == DECIDED


async def test_sessions_and_connections_from_before_the_tie_count(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    with Session(engine) as session, engine.connect() as connection:
        deliver_on_commit(bus, engine)
        async with bus.context():
            for made_before in (session, connection):
                made_before.execute(insert(Row).values(name="ada"))
                bus.publish("ada")
                made_before.rollback()

    assert seen == ["discarded ada", "discarded ada"]


# Once is enough


def engine_itself(engine: Engine) -> object:
    return engine


def options(engine: Engine) -> object:
    return engine.execution_options(logging_token="reports")


def factory_with_binds(engine: Engine) -> object:
    return sessionmaker(binds={Row: engine})


def scoped(engine: Engine) -> object:
    return scoped_session(sessionmaker(engine))


ROUTES = [engine_itself, options, sessionmaker, factory_with_binds, scoped]


def already(engine: Engine) -> str:
    """The pattern of the message."""
    return (
        rf"is tied to {re.escape(repr(engine))} already: all sessions and connections of an engine "
        r"count, so call deliver_on_commit\(\) once"
    )


@pytest.mark.parametrize("second", ROUTES)
@pytest.mark.parametrize("first", ROUTES)
async def test_an_engine_is_tied_to_a_bus_once(
    first: Callable[[Engine], Any],
    second: Callable[[Engine], Any],
    bus: EventBus,
    engine: Engine,
    seen: list[str],
) -> None:
    deliver_on_commit(bus, first(engine))
    with pytest.raises(ValueError, match=already(engine)):
        deliver_on_commit(bus, second(engine))

    await decide(bus, partial(Session, engine))

    assert seen == DECIDED


def inside(engine: AsyncEngine) -> object:
    return engine.sync_engine


def factory_of_async_sessions(engine: AsyncEngine) -> object:
    return cast("object", cast("Any", sessionmaker)(engine, class_=AsyncSession))


def async_scoped(engine: AsyncEngine) -> object:
    return async_scoped_session(async_sessionmaker(engine), asyncio.current_task)


ASYNC_ROUTES = [inside, async_sessionmaker, factory_of_async_sessions, async_scoped]


@pytest.mark.parametrize("route", ASYNC_ROUTES)
async def test_an_engine_that_is_awaited_is_tied_to_a_bus_once(
    route: Callable[[AsyncEngine], Any], bus: EventBus, async_engine: AsyncEngine
) -> None:
    message = already(async_engine.sync_engine)
    with deliver_on_commit(bus, async_engine), pytest.raises(ValueError, match=message):
        deliver_on_commit(bus, route(async_engine))
    deliver_on_commit(bus, route(async_engine))
    with pytest.raises(ValueError, match=message):
        deliver_on_commit(bus, async_engine)


async def test_a_factory_that_is_refused_has_tied_none_of_its_engines(
    bus: EventBus, engine: Engine, other_engine: Engine, seen: list[str]
) -> None:
    deliver_on_commit(bus, engine)
    for refused in (
        sessionmaker(other_engine, binds={Row: engine}),
        sessionmaker(engine, binds={Row: other_engine}),
    ):
        with pytest.raises(ValueError, match="already"):
            deliver_on_commit(bus, refused)
    deliver_on_commit(bus, other_engine)

    await decide(bus, partial(Session, other_engine))

    assert seen == DECIDED


async def test_a_factory_that_comes_to_an_engine_which_is_tied_already_counts_once(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    for sessions in (unbound := [sessionmaker(), sessionmaker()]):
        deliver_on_commit(bus, sessions)
    deliver_on_commit(bus, engine)
    for sessions in unbound:
        sessions.configure(bind=engine)

    for sessions in unbound:
        await decide(bus, sessions)
        with Session(engine) as session:
            empty(session)

    assert seen == [*DECIDED, *DECIDED]


async def test_an_engine_that_a_factory_came_to_later_is_tied_like_any_other(
    bus: EventBus, engine: Engine
) -> None:
    deliver_on_commit(bus, sessions := sessionmaker())
    with sessions(bind=engine) as session:
        session.execute(select(Row)).all()

    with pytest.raises(ValueError, match=already(engine)):
        deliver_on_commit(bus, engine)


# Detached


@pytest.mark.parametrize("route", ROUTES)
async def test_a_tie_that_is_detached_leaves_no_trace(
    route: Callable[[Engine], Any], bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    before = listeners(engine)
    with deliver_on_commit(bus, route(engine)) as tie:
        assert listeners(engine) > before
    tie.detach()
    assert listeners(engine) == before

    async with bus.context():
        with Session(engine) as session:
            session.add(Row(name="ada"))
            bus.publish("ada")
            session.rollback()

    assert seen == ["handled ada"]


async def test_an_engine_may_be_tied_again_after_it_was_detached(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    earlier = deliver_on_commit(bus, engine)
    earlier.detach()
    deliver_on_commit(bus, sessionmaker(engine))
    earlier.detach()

    await decide(bus, engine.connect)

    assert seen == DECIDED


async def test_a_tie_ends_with_its_block_also_after_an_error(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    with suppress(Wrong), deliver_on_commit(bus, engine):
        raise Wrong
    with deliver_on_commit(bus, engine):
        await decide(bus, partial(Session, engine))

    assert seen == DECIDED


async def test_a_factory_that_is_detached_ties_nothing_that_it_is_bound_to_later(
    bus: EventBus, engine: Engine, other_engine: Engine, seen: list[str]
) -> None:
    tie = deliver_on_commit(bus, sessions := sessionmaker(other_engine))
    with sessions(bind=engine) as session:
        session.execute(select(Row)).all()
    tie.detach()
    sessions.configure(bind=engine)

    async with bus.context():
        for open in (sessions, partial(Session, other_engine), engine.connect):
            with open() as session:
                session.execute(insert(Row).values(name="ada"))
                bus.publish("ada")
                session.rollback()

    assert seen == ["handled ada"] * 3


async def test_what_a_detached_tie_has_seen_written_is_lost_with_the_unit(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    tie = deliver_on_commit(bus, engine)
    async with bus.context():
        with Session(engine) as writer, Session(engine) as reader:
            writer.add(Row(name="ada"))
            writer.flush()
            bus.publish("written")
            tie.detach()
            writer.commit()
            reader.execute(select(Row)).all()
            bus.publish("afterwards")

    assert seen == ["discarded written", "handled afterwards"]


async def test_a_tie_may_begin_in_the_middle_of_a_transaction(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    async with bus.context():
        with engine.connect() as connection:
            connection.execute(select(Row)).all()
            deliver_on_commit(bus, engine)
            connection.execute(insert(Row).values(name="ada"))
            bus.publish("ada")
            connection.rollback()

    assert seen == ["discarded ada"]


# Several buses


async def test_every_bus_that_is_tied_is_served(engine: Engine) -> None:
    buses = [EventBus(name="one"), EventBus(name="two")]
    all_seen: list[list[str]] = []
    ways: list[Any] = [engine, sessionmaker(engine)]
    for bus, tied in zip(buses, ways, strict=True):
        bus.subscribe(str, nothing, thread=False)
        deliver_on_commit(bus, tied)
        all_seen.append(witnessed(bus))

    async with buses[0].context(), buses[1].context():
        for open in (partial(Session, engine), engine.connect):
            with open() as session:
                for end in ("rollback", "commit"):
                    session.execute(insert(Row).values(name=f"{end} {open}"))
                    for bus in buses:
                        bus.publish(end)
                    getattr(session, end)()

    lines = ["discarded rollback"] * 2 + ["handled commit"] * 2
    assert all_seen == [lines, lines]


async def test_ties_may_be_detached_in_any_order(
    bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    first = deliver_on_commit(EventBus(), engine)
    deliver_on_commit(bus, engine)
    with deliver_on_commit(EventBus(), engine):
        first.detach()

    await decide(bus, partial(Session, engine))

    assert seen == DECIDED


# What a tie holds on to

ENGINE_EVENTS = (
    "begin",
    "before_cursor_execute",
    "after_cursor_execute",
    "before_execute",
    "after_execute",
    "commit",
    "commit_twophase",
    "prepare_twophase",
    "release_savepoint",
    "rollback",
    "rollback_savepoint",
    "rollback_twophase",
    "savepoint",
)
SESSION_EVENTS = (
    "after_begin",
    "after_commit",
    "after_flush",
    "after_rollback",
    "after_soft_rollback",
    "after_transaction_create",
    "after_transaction_end",
    "before_commit",
    "before_flush",
    "pending_to_transient",
    "persistent_to_detached",
)


def listeners(engine: Engine) -> int:
    """How many listeners an engine, its dialect, and a session of it call.

    Without those for buses of earlier tests that are gone.
    """
    gc.collect()
    deliver_on_commit(EventBus(), engine).detach()
    targets: list[tuple[Any, tuple[str, ...]]] = [
        (engine, ENGINE_EVENTS),
        (engine.dialect, ("handle_error",)),
        (Session(engine), SESSION_EVENTS),
    ]
    return sum(
        len(list(getattr(target.dispatch, name))) for target, names in targets for name in names
    )


async def test_ties_of_buses_that_are_gone_do_not_pile_up(engine: Engine) -> None:
    gc.collect()
    deliver_on_commit(EventBus(), engine).detach()  # what other tests have left is swept
    nobody = listeners(engine)
    deliver_on_commit(one := EventBus(), engine)
    with_one = listeners(engine)
    for number in range(6):
        tied = engine if number % 2 else sessionmaker(engine)
        deliver_on_commit(EventBus(), tied)
        gc.collect()
    deliver_on_commit(last := EventBus(), engine)

    assert listeners(engine) <= nobody + 2 * (with_one - nobody)
    for bus in (one, last):
        bus.subscribe(str, nothing, thread=False)
        seen = witnessed(bus)
        await decide(bus, partial(Session, engine))
        assert seen == DECIDED
        with Session(engine) as session:
            empty(session)


async def test_a_tie_keeps_neither_its_bus_nor_its_engine_alive(tmp_path: Path) -> None:
    bus, engine = EventBus(), create_engine(f"sqlite:///{tmp_path}/test.db")
    factory = sessionmaker(engine)
    tie = deliver_on_commit(bus, factory)
    of_bus, of_engine, of_factory = weakref.ref(bus), weakref.ref(engine), weakref.ref(factory)

    del bus
    gc.collect()
    assert of_bus() is None
    with factory() as session:  # its listeners may still be there
        session.execute(select(1))
        session.commit()
    tie.detach()
    del tie, factory
    gc.collect()
    assert of_factory() is None
    del session
    engine.dispose()
    del engine
    gc.collect()
    assert of_engine() is None


def pooled(path: Path) -> Engine:
    """An engine whose pool can be asked for what it has lent."""
    engine = create_engine(f"sqlite:///{path}", poolclass=QueuePool)
    obey(engine)
    Base.metadata.create_all(engine)
    return engine


def lent(engine: Engine | AsyncEngine) -> int:
    """How many connections are out of the pool."""
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedout()


def read_and_write(session: Session) -> object:
    session.execute(select(Row)).all()
    session.add(Row(name="ada"))
    session.flush()
    return session.get_transaction()


def leave_objects(session: Session) -> object:
    session.execute(select(Row)).all()
    session.add(Row(name="ada"))
    return session.get_transaction()


def write_in_savepoints(session: Session) -> object:
    session.begin_nested()
    session.execute(insert(Row).values(name="ada"))
    session.begin_nested()
    session.execute(insert(Row).values(name="bob"))
    return session.get_nested_transaction()


@freed_by_anyio
@pytest.mark.parametrize("use", [read_and_write, leave_objects, write_in_savepoints])
async def test_a_session_that_is_forgotten_gives_its_connection_back_at_once(
    use: Callable[[Session], object],
    bus: EventBus,
    tmp_path: Path,
    seen: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = pooled(tmp_path / "test.db")
    deliver_on_commit(bus, engine)

    async with bus.context():
        session = Session(engine)
        transaction: Any = use(session)
        bus.publish("ada")
        kept = [weakref.ref(session), weakref.ref(transaction), weakref.ref(session.connection())]
        assert lent(engine) == 1
        del session, transaction
        gc.collect()
        assert lent(engine) == 0
        assert [each() for each in kept] == [None, None, None]

    assert seen == ["discarded ada"]
    assert "a transaction that has written was still open when its unit of work" in caplog.text
    assert_settled(bus)
    engine.dispose()


@freed_by_anyio
async def test_a_connection_that_is_forgotten_is_given_back_at_once(
    bus: EventBus, tmp_path: Path, seen: list[str]
) -> None:
    engine = pooled(tmp_path / "test.db")
    deliver_on_commit(bus, engine)

    async with bus.context():
        connection = engine.connect()
        connection.execute(insert(Row).values(name="ada"))
        connection.begin_nested()
        connection.execute(insert(Row).values(name="bob"))
        bus.publish("ada")
        root: Any = connection.get_transaction()
        nested: Any = connection.get_nested_transaction()
        kept = [weakref.ref(connection), weakref.ref(root), weakref.ref(nested)]
        del connection, root, nested
        gc.collect()
        assert lent(engine) == 0
        assert [each() for each in kept] == [None, None, None]

    assert seen == ["discarded ada"]
    assert_settled(bus)
    engine.dispose()


@freed_by_anyio
@pytest.mark.parametrize("commit", [True, False])
async def test_what_has_ended_is_held_by_nothing_though_the_unit_goes_on(
    commit: bool, bus: EventBus, tmp_path: Path
) -> None:
    engine = pooled(tmp_path / "test.db")
    deliver_on_commit(bus, engine)

    async with bus.context():
        kept: list[weakref.ref[Any]] = []
        for open in (partial(Session, engine), engine.connect):
            with open() as session:
                session.execute(insert(Row).values(name=f"{open}"))
                bus.publish("ada")
                kept += [weakref.ref(session), weakref.ref(session.get_transaction())]
                if commit:
                    session.commit()
            del session
        gc.collect()
        assert [each() for each in kept] == [None] * 4
        assert lent(engine) == 0
    engine.dispose()


def use_session(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(select(Row)).all()
        session.commit()


def use_connection(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(select(Row)).all()
        connection.commit()


def use_session_on_a_connection(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(select(Row)).all()
        with Session(connection) as session:
            session.execute(select(Row)).all()
            session.commit()


def transactions() -> int:
    """How many are known in this process."""
    gc.collect()
    return sum(isinstance(each, Transaction) for each in gc.get_objects())


USES = [use_session, use_connection, use_session_on_a_connection]


@freed_by_anyio
@pytest.mark.parametrize("in_units", [True, False])
@pytest.mark.parametrize("use", USES)
async def test_a_task_that_goes_on_keeps_nothing_of_what_it_has_used(
    use: Callable[[Engine], None], in_units: bool, bus: EventBus, engine: Engine
) -> None:
    deliver_on_commit(bus, engine)
    before = transactions()
    for _ in range(10):
        async with bus.context() if in_units else nullcontext():
            use(engine)

    assert transactions() <= before + 2  # no more than those of the last round


@freed_by_anyio
async def test_a_session_to_await_that_is_forgotten_gives_its_connection_back_at_once(
    bus: EventBus, async_engine: AsyncEngine, seen: list[str]
) -> None:
    engine = create_async_engine(async_engine.url, poolclass=AsyncAdaptedQueuePool)
    obey(engine.sync_engine)
    deliver_on_commit(bus, engine)
    before = threading.enumerate()  # others may have left connections open

    async with bus.context():
        session, connection = AsyncSession(engine), await engine.connect()
        await session.execute(insert(Row).values(name="ada"))
        bus.publish("ada")
        await connection.execute(select(Row))
        assert lent(engine) == 2
        kept: list[weakref.ref[Any]] = [
            weakref.ref(session),
            weakref.ref(session.sync_session),
            weakref.ref(connection),
            weakref.ref(connection.sync_connection),
        ]
        del session, connection
        drivers = [
            each
            for each in threading.enumerate()
            if "_connection_" in each.name and each not in before
        ]
        with warnings.catch_warnings():  # SQLAlchemy warns of what it has to end unasked
            warnings.simplefilter("ignore", SAWarning)
            gc.collect()
        assert lent(engine) == 0
        assert [each() for each in kept] == [None] * 4

    assert seen == ["discarded ada"]
    await engine.dispose()
    for driver in drivers:
        await to_thread.run_sync(driver.join)


# Wrong arguments


def without_type_checker(bus: EventBus, wrong: Any) -> None:
    deliver_on_commit(bus, wrong)


@pytest.mark.parametrize(
    "wrong",
    [Session, Session(), AsyncSession, sessionmaker, "sqlite://", None, print],
    ids=lambda wrong: str(wrong)[:20],
)
async def test_what_leads_to_no_engine_is_refused(wrong: object, bus: EventBus) -> None:
    shown = "a str" if isinstance(wrong, str) else repr(wrong)  # a URL may have a password
    message = (
        "deliver_on_commit() takes an Engine or AsyncEngine, or a sessionmaker or "
        f"async_sessionmaker that has one, not {shown}: pass the engine itself"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        without_type_checker(bus, wrong)


async def test_what_is_no_bus_is_refused(engine: Any) -> None:
    with pytest.raises(TypeError, match="takes an EventBus first, not Engine"):
        deliver_on_commit(engine, engine)
