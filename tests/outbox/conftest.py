"""The outbox's tables in each kind of database, through each driver."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Engine, MetaData, create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateSchema, DropSchema

from eventkit import EventBus
from eventkit.outbox import Outbox
from eventkit.outbox._store import Store, add_tables
from tests.databases import postgres as postgres_of
from tests.databases import sqlite as sqlite_in
from tests.databases import to_await
from tests.outbox.rows import Database
from tests.outbox.scenes import Scene, make_tables, scene_on

DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "aiosqlite": "sqlite+aiosqlite",
    "psycopg": "postgresql+psycopg",
    "asyncpg": "postgresql+asyncpg",
}

# One that blocks and one that is awaited. `nox -s coverage` uses all, by EVENTKIT_DRIVERS=all.
KINDS = [*DRIVERS] if os.environ.get("EVENTKIT_DRIVERS") == "all" else ["sqlite", "asyncpg"]

# Drivers that are awaited know asyncio alone.
BLOCKING = ["sqlite", "psycopg"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run each scene on the event loops that its driver knows."""
    items[:] = [item for item in items if _can_run(item)]


def _can_run(item: pytest.Item) -> bool:
    chosen: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    if "used_scene" not in chosen or "anyio_backend" not in chosen:
        return True
    loop, _ = chosen["anyio_backend"]
    return loop == "asyncio" or chosen["used_scene"] in BLOCKING


@pytest.fixture(scope="module", params=KINDS)
def used_scene(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    service_url: Callable[[str], str],
) -> Iterator[Scene]:
    """A database of each kind with all tables, used through each driver."""
    kind: str = request.param
    if kind.endswith("sqlite"):
        opened = sqlite_in(tmp_path_factory.mktemp("outbox") / "test.db")
    else:
        opened = postgres_of(service_url("postgres"), QueuePool)
    with opened as engine:
        make_tables(engine)
        yield scene_on(engine, engine if kind in BLOCKING else to_await(engine))


@pytest.fixture
def scene(used_scene: Scene) -> Iterator[Scene]:
    """A database with one row of business and nothing in the outbox; `scene.outbox(bus)` has one.

    At the end no delivery may be lost, on any bus that has had an outbox of the scene.
    """
    used_scene.clear()
    used_scene.table.clear()
    yield used_scene
    used_scene.close()
    used_scene.check()


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def outbox(scene: Scene, bus: EventBus) -> Outbox:
    """The outbox of `bus` on the scene's database."""
    return scene.outbox(bus)


@pytest.fixture(scope="module", params=KINDS)
def used_database(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    service_url: Callable[[str], str],
) -> Iterator[Database]:
    kind: str = request.param
    pytest.importorskip({"sqlite": "sqlite3"}.get(kind, kind))
    if kind.endswith("sqlite"):
        path = tmp_path_factory.mktemp("outbox") / "test.db"
        yield from opened(f"{DRIVERS[kind]}:///{path}", None)
    else:
        url = make_url(service_url("postgres")).set(drivername=DRIVERS[kind])
        yield from opened(url.render_as_string(False), f"eventkit_{uuid4().hex}")


@pytest.fixture
def database(used_database: Database) -> Database:
    """The tables, empty, on each kind of database."""
    used_database.clear()
    return used_database


@pytest.fixture
def store(database: Database) -> Store:
    return database.store


@pytest.fixture(scope="module")
def used_postgres(service_url: Callable[[str], str]) -> Iterator[Database]:
    pytest.importorskip("psycopg")
    url = make_url(service_url("postgres")).set(drivername=DRIVERS["psycopg"])
    yield from opened(url.render_as_string(False), f"eventkit_{uuid4().hex}")


@pytest.fixture
def postgres(used_postgres: Database) -> Database:
    """The tables, empty, on PostgreSQL, through a driver that several threads can use."""
    used_postgres.clear()
    return used_postgres


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """The tables, empty, in a file."""
    yield from opened(f"sqlite:///{tmp_path / 'test.db'}", None)


def opened(url: str, schema: str | None) -> Iterator[Database]:
    """The tables in a schema of their own."""
    with asyncio.Runner() as runner:
        database = made(url, schema, runner.run)
        metadata = MetaData()
        add_tables(metadata, schema=schema)
        if schema is not None:
            database.call(lambda connection: connection.execute(CreateSchema(schema)))
        database.call(metadata.create_all)
        yield database
        if schema is not None:
            database.call(lambda connection: connection.execute(DropSchema(schema, cascade=True)))
        if isinstance(database.engine, AsyncEngine):
            runner.run(database.engine.dispose())
        else:
            database.engine.dispose()


def made(url: str, schema: str | None, run: Callable[[Any], Any]) -> Database:
    is_async = make_url(url).get_dialect().is_async
    engine = create_async_engine(url) if is_async else create_engine(url)
    if engine.dialect.name == "sqlite":
        begin_immediate(engine if isinstance(engine, Engine) else engine.sync_engine)
    return Database(engine, Store(engine.dialect, schema), schema, run)


def begin_immediate(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
