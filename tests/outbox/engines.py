"""Engines of each kind that an outbox may have, on databases of tests' own."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

DRIVERS = {
    "pysqlite": "sqlite+pysqlite",
    "aiosqlite": "sqlite+aiosqlite",
    "psycopg": "postgresql+psycopg",
    "asyncpg": "postgresql+asyncpg",
}
# One that blocks and one that is awaited. `nox -s coverage` uses all, by EVENTKIT_DRIVERS=all.
KINDS = [*DRIVERS] if os.environ.get("EVENTKIT_DRIVERS") == "all" else ["pysqlite", "asyncpg"]


class Place:
    """A database, reached by one driver, with a schema of its own where it has schemas.

    Attributes:
        kind: The driver's name.
        url: Where it is.
        table: The name of a table with one column `name`, as statements write it.
    """

    def __init__(self, kind: str, url: str, schema: str | None) -> None:
        self.kind = kind
        self.url = url
        self.schema = schema
        self.table = "things" if schema is None else f"{schema}.things"
        self._engines: list[Engine] = []

    @property
    def awaits(self) -> bool:
        return self.kind in {"aiosqlite", "asyncpg"}

    def engine(self, **options: Any) -> Engine | AsyncEngine:
        """Make one as a user would, who does not use it here."""
        if self.awaits:
            return create_async_engine(self.url, **options)
        engine = create_engine(self.url, **options)
        self._engines.append(engine)
        return engine

    def insert(self, name: str) -> Callable[[Connection], None]:
        def insert(connection: Connection) -> None:
            connection.exec_driver_sql(f"INSERT INTO {self.table} VALUES ('{name}')")

        return insert

    def names(self, connection: Connection) -> list[str]:
        rows = connection.exec_driver_sql(f"SELECT name FROM {self.table} ORDER BY name")
        return [name for (name,) in rows]

    def dispose(self) -> None:
        for engine in self._engines:
            engine.dispose()


@contextmanager
def place_of(kind: str, tmp_path: Path, service_url: Callable[[str], str]) -> Generator[Place]:
    """Make a database, and drop it afterwards."""
    pytest.importorskip(kind if kind != "pysqlite" else "sqlite3")
    if kind in {"pysqlite", "aiosqlite"}:
        schema, url = None, make_url(f"sqlite:///{tmp_path / 'outbox.db'}")
    else:
        pytest.importorskip("psycopg")
        schema, url = f"eventkit_{uuid4().hex}", make_url(service_url("postgres"))
    plain = "sqlite" if schema is None else "postgresql+psycopg"
    server = create_engine(url.set(drivername=plain), poolclass=NullPool)
    rendered = url.set(drivername=DRIVERS[kind]).render_as_string(hide_password=False)
    place = Place(kind, rendered, schema)
    with server.begin() as connection:
        if schema is not None:
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        connection.exec_driver_sql(f"CREATE TABLE {place.table} (name text)")
    yield place
    place.dispose()
    if schema is not None:
        with server.begin() as connection:
            connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")


def processed_apart(script: str, *options: str) -> str:
    """Run it in a process of its own; give all that it printed, on either stream."""
    done = subprocess.run(
        [sys.executable, *options, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return f"{done.stdout}{done.stderr}" + (f"exit {done.returncode}" if done.returncode else "")
