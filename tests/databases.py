"""Databases of tests' own, on SQLite, PostgreSQL and MariaDB, with one table."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, ForeignKey, String, create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, Pool
from sqlalchemy.schema import CreateSchema, DropSchema


class Base(DeclarativeBase):
    pass


class Row(Base):
    """Something kept. One whose parent is missing cannot be committed."""

    __tablename__ = "rows"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    note: Mapped[str] = mapped_column(String(100), default="")
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
def postgres(url: str, pool: type[Pool] = NullPool) -> Generator[Engine]:
    """A schema in a database that others use, too."""
    pytest.importorskip("psycopg")
    schema = f"eventkit_{uuid4().hex}"
    options = {"schema_translate_map": {None: schema}}
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        execution_options=options,
        poolclass=pool,
    )
    with engine.begin() as connection:
        connection.execute(CreateSchema(schema))
    Base.metadata.create_all(engine)
    yield engine
    with engine.begin() as connection:
        connection.execute(DropSchema(schema, cascade=True))
    engine.dispose()


@contextmanager
def mariadb(url: str, pool: type[Pool] = NullPool) -> Generator[Engine]:
    """A database of its own on a server that others use, too. It defers no constraint."""
    pytest.importorskip("pymysql")
    name = f"eventkit_{uuid4().hex}"
    address = make_url(url).set(drivername="mysql+pymysql")
    plain = {"ssl_disabled": True}  # to read the certificates takes longer than a test
    server = create_engine(address, connect_args=plain, poolclass=NullPool)
    with server.begin() as connection:
        connection.execute(CreateSchema(name))
    engine = create_engine(address.set(database=name), connect_args=plain, poolclass=pool)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE `rows` (name VARCHAR(100) PRIMARY KEY, note VARCHAR(100) NOT NULL,"
            " parent VARCHAR(100) REFERENCES `rows` (name)) ENGINE=InnoDB"
        )
    yield engine
    engine.dispose()
    with server.begin() as connection:
        connection.execute(DropSchema(name))


DRIVERS_TO_AWAIT = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mysql": "aiomysql"}


def to_await(engine: Engine) -> AsyncEngine:
    """The same database, for those who await."""
    driver = DRIVERS_TO_AWAIT[engine.dialect.name]
    pytest.importorskip(driver)
    awaited = create_async_engine(
        engine.url.set(drivername=f"{engine.dialect.name}+{driver}"),
        execution_options=engine.get_execution_options(),
        poolclass=NullPool,
    )
    if engine.dialect.name == "sqlite":
        obey(awaited.sync_engine)
    return awaited
