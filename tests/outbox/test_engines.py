"""Engines of each kind that an outbox may have, and what it refuses."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool, StaticPool

from eventkit import DuplicateNameError, Durable, EventBus, InvalidHandlerError
from eventkit.outbox import Outbox
from eventkit.outbox._store import State
from eventkit.sqlalchemy import deliver_on_commit
from tests.databases import Row, obey, sqlite
from tests.outbox.scenes import Paid, Placed, Scene, make_tables, relaying, until
from tests.sqlalchemy.steps import done, inside, put

pytestmark = pytest.mark.anyio

LEASED = (State.LEASED, 1)


def keep(bus: EventBus) -> list[str]:
    """Subscribe a durable handler."""
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)

    return seen


def engine_of(scene: Scene, **options: Any) -> Any:
    """Another engine of the scene's driver and database."""
    make: Any = create_async_engine if scene.awaits else create_engine
    url = scene.engine.url
    options = {"execution_options": scene.engine.get_execution_options(), **options}
    engine = make(url, **options)
    if scene.kind == "sqlite":
        obey(engine.sync_engine if scene.awaits else engine)
    return engine


# Pools


@pytest.mark.parametrize(
    "pool",
    [
        {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1},
        {"poolclass": NullPool},
    ],
    ids=["one connection", "no pool"],
)
async def test_an_engine_with_the_smallest_pool_is_enough(
    bus: EventBus, scene: Scene, pool: dict[str, Any]
) -> None:
    """The outbox uses none of its connections, also while a transaction is open."""
    engine = engine_of(scene, **pool)
    outbox = scene.outbox(bus, engine=engine)
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        async with inside(scene.sessions(bind=engine).begin()) as session:
            await put(session, f"mail {event.name}")
        seen.append(event.name)

    async with relaying(outbox):
        async with bus.context():
            async with inside(scene.sessions(bind=engine).begin()) as session:
                await put(session)
                bus.publish(Placed())
                if scene.kind != "sqlite":
                    await outbox.stats()
            assert "mail" in scene.kept()
        await until(lambda: seen == ["ada"] and not scene.kept())
    await done(engine.dispose())

    assert scene.names() == ["ada", "mail ada"]


async def test_an_engine_made_by_options_is_the_same_engine(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen = keep(bus)
    options = scene.engine.execution_options(logging_token="mine")

    async with bus.context():
        async with inside(scene.sessions(bind=options).begin()) as session:
            await put(session)
            bus.publish(Placed())
        assert scene.kept() == {"mail": LEASED}

    assert seen == ["ada"]


async def test_a_factory_leads_to_its_engine(bus: EventBus, scene: Scene) -> None:
    sessions = scene.sessions()
    scene.outbox(bus, engine=sessions)
    seen = keep(bus)

    async with bus.context():
        async with inside(sessions.begin()) as session:
            await put(session)
            bus.publish(Placed())
        assert scene.kept() == {"mail": LEASED}

    assert seen == ["ada"]


async def test_a_factory_that_leads_to_other_engines_too_has_rows_in_the_outboxs_alone(
    bus: EventBus, scene: Scene, tmp_path: Path
) -> None:
    if scene.awaits:
        pytest.skip("both databases are used by one driver")
    seen = keep(bus)
    with sqlite(tmp_path / "other.db") as other:
        sessions = sessionmaker(scene.hooks, binds={Row: other})
        scene.outbox(bus, engine=sessions)
        async with bus.context():
            with sessions.begin() as session:
                session.add(Row(name="there"))
                session.flush()
                bus.publish(Placed())
            with Session(other) as session:
                assert session.get(Row, "there") is not None

    assert seen == ["ada"]
    assert scene.kept() == {}


class Base(DeclarativeBase):
    pass


class Note(Base):
    """A table in another database."""

    __tablename__ = "notes"
    name: Mapped[str] = mapped_column(primary_key=True)


async def test_sessions_with_binds_write_rows_in_the_transaction_of_the_outboxs_engine(
    bus: EventBus, outbox: Outbox, scene: Scene, tmp_path: Path
) -> None:
    """With a store of its own; the session goes to another database, too."""
    seen = keep(bus)
    with sqlite(tmp_path / "notes.db") as notes:
        if scene.awaits:
            pytest.skip("both databases are used by one driver")
        Base.metadata.create_all(notes)
        sessions = sessionmaker(binds={Row: scene.engine, Note: notes})
        async with bus.context():
            with sessions.begin() as session:
                session.add_all([Row(name="ada"), Note(name="ada")])
                bus.publish(Placed())
            assert scene.kept() == {"mail": LEASED}
            with sessions() as session:
                session.add(Row(name="lost"))
                session.flush()
                bus.publish(Placed("lost"))

    assert seen == ["ada"]
    assert scene.names() == ["ada"]
    assert scene.kept() == {}


async def test_a_store_of_ones_own_has_the_connections_of_the_outbox(
    bus: EventBus, scene: Scene
) -> None:
    own = engine_of(scene, pool_size=3, max_overflow=0)
    counted: list[object] = []
    event.listen(own.sync_engine if scene.awaits else own, "connect", lambda *a: counted.append(a))
    outbox = scene.outbox(bus, store=own)
    seen = keep(bus)

    async with bus.context():
        async with scene.begun() as session:
            await put(session)
            bus.publish(Placed())
        assert scene.kept() == {"mail": LEASED}
    assert seen == ["ada"]
    assert scene.kept() == {}
    assert 1 <= len(counted) <= 3
    outbox.detach()


async def test_an_engine_in_autocommit_mode_is_refused(bus: EventBus, scene: Scene) -> None:
    with pytest.raises(ValueError, match="nothing would be atomic"):
        scene.outbox(bus, engine=engine_of(scene, isolation_level="AUTOCOMMIT"))
    option = scene.engine.execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(ValueError, match="nothing would be atomic"):
        scene.outbox(bus, engine=option)

    scene.outbox(bus)  # the bus is free for the right one
    assert keep(bus) == []


async def test_a_connection_in_autocommit_mode_has_its_rows_all_the_same(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    """They are not atomic with what it writes, which is its user's own doing."""
    seen = keep(bus)

    async with bus.context(), scene.connection() as connection:
        await done(connection.execution_options(isolation_level="AUTOCOMMIT"))
        await put(connection)
        bus.publish(Placed())
        await done(connection.commit())

    assert seen == ["ada"]
    assert scene.kept() == {}


async def test_a_tenants_search_path_moves_no_row(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    if scene.kind != "postgresql":
        pytest.skip("about PostgreSQL")
    seen = keep(bus)

    async with bus.context():
        async with scene.begun() as session:
            await put(session)
            await done(session.execute(text("SET LOCAL search_path TO pg_catalog")))
            bus.publish(Placed())
        assert scene.kept() == {"mail": LEASED}

    assert seen == ["ada"]


async def test_a_search_path_moves_no_row_where_the_schema_was_not_named(
    bus: EventBus, scene: Scene
) -> None:
    """Where the tables are is found out once, on the outbox's own connection."""
    if scene.kind != "postgresql":
        pytest.skip("about PostgreSQL")
    if scene.driver != "psycopg":
        pytest.skip("an option of libpq")
    engine = engine_of(scene, connect_args={"options": f"-c search_path={scene.schema}"})
    scene.outbox(bus, engine=engine, schema=None)
    seen = keep(bus)

    async with bus.context():
        async with inside(scene.sessions(bind=engine).begin()) as session:
            await put(session)
            await done(session.execute(text("SET LOCAL search_path TO pg_catalog")))
            bus.publish(Placed())
        assert scene.kept() == {"mail": LEASED}
    await done(engine.dispose())

    assert seen == ["ada"]


# SQLite


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make engines on a SQLite file with all tables, in whichever mode their driver has."""
    made: list[Any] = []
    with sqlite(tmp_path / "plain.db") as plain:
        make_tables(plain)

        def make(**options: Any) -> Any:
            made.append(create_engine(f"sqlite:///{tmp_path / 'plain.db'}", **options))
            return made[-1]

        yield make
    for each in made:
        each.dispose()


@pytest.mark.parametrize(
    "recipe", ["as it comes", "begin", "begin immediate", "no isolation level", "autocommit false"]
)
async def test_rows_are_atomic_on_sqlite_in_each_mode_of_its_driver(
    bus: EventBus, files: Callable[..., Any], recipe: str
) -> None:
    options: dict[str, Any] = {}
    if recipe == "no isolation level":
        options = {"connect_args": {"isolation_level": None}}
    elif recipe == "autocommit false":
        options = {"connect_args": {"autocommit": False}}
    try:
        engine = files(**options)
        engine.connect().close()
    except TypeError:
        pytest.skip("needs Python 3.12")
    if recipe.startswith("begin"):

        @event.listens_for(engine, "connect")
        def set_up(connection: Any, _: object) -> None:
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql(recipe.upper())

        engine.dispose()
    seen = keep(bus)
    look = create_engine(engine.url)

    def rows() -> int:
        with look.connect() as connection:
            count = connection.exec_driver_sql("select count(*) from eventkit_outbox").scalar_one()
        assert isinstance(count, int)
        return count

    with Outbox(bus, engine) as outbox:
        async with bus.context():
            with Session(engine) as session:
                session.add(Row(name="ada"))
                bus.publish(Placed("ada"))
                session.commit()
                assert rows() == 1
                if recipe != "no isolation level":  # where nothing is atomic anyway
                    session.add(Row(name="lost"))
                    session.flush()
                    bus.publish(Placed("lost"))
                    session.rollback()
        assert rows() == 0
        assert (await outbox.run_due()).handled == 0
    look.dispose()

    assert seen == ["ada"]


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///file:shared?mode=memory&uri=true"])
async def test_nothing_is_kept_in_sqlite_in_memory_and_handlers_run(
    bus: EventBus, url: str, anyio_backend_name: str
) -> None:
    engine = create_engine(url, poolclass=StaticPool)
    seen = keep(bus)

    with Outbox(bus, engine):
        async with bus.context():
            with Session(engine) as session:
                session.connection()
                bus.publish(Placed())
                session.commit()
    engine.dispose()

    assert seen == ["ada"]
    assert bus.stats.handled == 1


async def test_a_full_disk_fails_the_commit_and_loses_the_event_with_it(
    bus: EventBus, files: Callable[..., Any]
) -> None:
    engine = files()

    @event.listens_for(engine, "connect")
    def limit(connection: Any, _: object) -> None:
        if limited:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")

    async def place() -> None:
        async with bus.context():
            with Session(engine) as session:
                session.add(Row(name="ada"))
                bus.publish(Placed("x" * 100_000))
                session.commit()

    limited = True
    seen = keep(bus)
    with Outbox(bus, engine):
        with pytest.raises(OperationalError, match="full"):
            await place()
        limited = False
        engine.dispose()
        assert seen == []
        assert bus.stats.discarded == 1
        async with bus.context():
            with Session(engine) as session:
                assert session.get(Row, "ada") is None
                session.add(Row(name="ada"))
                bus.publish(Placed("again"))
                session.commit()

    assert seen == ["again"]


# Refusals


async def test_a_bus_has_one_outbox(bus: EventBus, outbox: Outbox, scene: Scene) -> None:
    with pytest.raises(ValueError, match="has an outbox already"):
        Outbox(bus, scene.engine)
    outbox.detach()
    outbox.detach()
    with scene.outbox(bus) as other:
        assert not other.detached
        assert repr(other).startswith("<Outbox of <EventBus")
    assert other.detached


async def test_an_outbox_ties_the_engine_itself(bus: EventBus, scene: Scene) -> None:
    with (
        deliver_on_commit(bus, scene.engine),
        pytest.raises(ValueError, match="remove the line with deliver_on_commit"),
    ):
        scene.outbox(bus)
    scene.outbox(bus)


def test_what_is_no_engine_or_no_number_is_refused(bus: EventBus, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'x.db'}")

    with pytest.raises(TypeError, match="takes an EventBus first"):
        Outbox(engine, bus)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leads to none"):
        Outbox(bus, sessionmaker())
    with pytest.raises(ValueError, match="a str leads to none") as caught:
        Outbox(bus, "postgresql://ada:secret@host/shop")
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match=r"lease has to be at least 1\.5 seconds"):
        Outbox(bus, engine, lease=1.4)
    with pytest.raises(ValueError, match="concurrency is at least 1"):
        Outbox(bus, engine, concurrency=0)
    with pytest.raises(ValueError, match="use deliver_on_commit"):
        Outbox(bus, create_engine("mysql+pymysql://host/shop"))
    Outbox(bus, engine).detach()


def test_a_durable_handler_has_a_name_that_no_other_has(bus: EventBus) -> None:
    def make() -> Callable[[object], None]:
        def closure(event: object) -> None: ...

        return closure

    with pytest.raises(InvalidHandlerError, match="name="):
        bus.subscribe(Placed, lambda event: None, durable=True)
    with pytest.raises(InvalidHandlerError, match="name="):
        bus.subscribe(Placed, make(), durable=True)
    bus.subscribe(Placed, make(), durable=True, name="mail")
    with pytest.raises(DuplicateNameError, match="mail"):
        bus.subscribe(Paid, make(), durable=True, name="mail")


# Events


async def test_a_large_event_is_warned_of_once_per_type(
    bus: EventBus, outbox: Outbox, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    seen = keep(bus)

    for _ in range(2):
        async with bus.context(), scene.begun() as session:
            await put(session, f"large {_}")
            bus.publish(Placed("x" * 1_000_001))

    assert len(seen) == 2
    (line,) = [each for each in caplog.records if "an event is large" in each.getMessage()]
    assert line.levelno == logging.WARNING
    assert "shop.placed" in line.getMessage()
    assert "xxx" not in line.getMessage()


def no_text(event: Placed) -> Any:
    return 7


def raising(event: Placed) -> str:
    raise LookupError(event.name)


@pytest.mark.parametrize(
    ("key", "error"), [(no_text, TypeError), (raising, LookupError)], ids=["no text", "raises"]
)
async def test_a_key_that_is_none_raises_at_the_line_that_publishes_and_publishes_nothing(
    bus: EventBus,
    outbox: Outbox,
    scene: Scene,
    key: Callable[[Any], str],
    error: type[Exception],
) -> None:
    seen = keep(bus)
    bus.subscribe(Placed, lambda event: seen.append(event.name), durable=Durable(key=key), name="k")

    async with bus.context() as unit, scene.begun() as session:
        await put(session)
        with pytest.raises(error):
            bus.publish(Placed("kept too"), Placed())
        assert unit.pending == ()

    assert seen == []
    assert scene.names() == ["ada"]
    assert scene.kept() == {}


async def test_a_keyed_delivery_is_for_a_relay_and_its_siblings_are_not(
    bus: EventBus, outbox: Outbox, scene: Scene
) -> None:
    seen = keep(bus)
    keyed: list[str] = []

    @bus.on(Placed, durable=Durable(key=lambda event: event.name), name="keyed")
    async def by_key(event: Placed) -> None:
        keyed.append(event.name)

    async with bus.context():
        async with scene.begun() as session:
            await put(session)
            bus.publish(Placed())
        assert scene.kept() == {"mail": LEASED, "keyed": (State.READY, 0)}
    assert seen == ["ada"]
    assert keyed == []
    assert bus.stats.requeued == 1

    async with relaying(outbox):
        await until(lambda: keyed == ["ada"] and not scene.kept())
