"""Databases of tests' own, on SQLite and PostgreSQL, with one table."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, ForeignKey, create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateSchema, DropSchema


class Base(DeclarativeBase):
    pass


class Row(Base):
    """Something kept. One whose parent is missing cannot be committed."""

    __tablename__ = "rows"

    name: Mapped[str] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(default="")
    parent: Mapped[str | None] = mapped_column(
        ForeignKey("rows.name", deferrable=True, initially="DEFERRED")
    )


@contextmanager
def sqlite(path: Path) -> Generator[Engine]:
    """A database in a file."""
    engine = create_engine(
        f"sqlite:///{path}", connect_args={"check_same_thread": False}, poolclass=NullPool
    )
    obey(engine)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def obey(engine: Engine) -> None:
    """Have SQLite's driver leave transactions to SQLAlchemy, as its docs tell users."""

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=OFF", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")


@contextmanager
def postgres(url: str) -> Generator[Engine]:
    """A schema in a database that others use, too."""
    pytest.importorskip("psycopg")
    schema = f"eventkit_{uuid4().hex}"
    options = {"schema_translate_map": {None: schema}}
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        execution_options=options,
        poolclass=NullPool,
    )
    with engine.begin() as connection:
        connection.execute(CreateSchema(schema))
    Base.metadata.create_all(engine)
    yield engine
    with engine.begin() as connection:
        connection.execute(DropSchema(schema, cascade=True))
    engine.dispose()


def to_await(engine: Engine) -> AsyncEngine:
    """The same database, for those who await."""
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    if engine.dialect.name == "postgresql":
        pytest.importorskip("asyncpg")
    awaited = create_async_engine(
        engine.url.set(drivername=driver[engine.dialect.name]),
        execution_options=engine.get_execution_options(),
        poolclass=NullPool,
    )
    if engine.dialect.name == "sqlite":
        obey(awaited.sync_engine)
    return awaited
