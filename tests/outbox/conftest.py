"""The outbox's tables in each kind of database, through each driver."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Engine, MetaData, create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.schema import CreateSchema, DropSchema

from eventkit.outbox._store import Store, add_tables
from tests.outbox.rows import Database

DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "aiosqlite": "sqlite+aiosqlite",
    "psycopg": "postgresql+psycopg",
    "asyncpg": "postgresql+asyncpg",
}


@pytest.fixture(scope="module", params=DRIVERS)
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
