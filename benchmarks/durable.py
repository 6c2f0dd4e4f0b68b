"""Databases, events and transactions of the benchmarks of durable deliveries.

Each contender has tables of its own: a SQLite file in a folder, or a schema of PostgreSQL, which is
found through `EVENTKIT_POSTGRES_URL`. All are gone afterwards.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.schema import CreateSchema, DropSchema

from eventkit import EventBus, named
from eventkit.outbox import Outbox, add_tables

SQLITE = "SQLite, a file"
PSYCOPG = "PostgreSQL, psycopg"
ASYNCPG = "PostgreSQL, asyncpg"
PLACES = (SQLITE, PSYCOPG, ASYNCPG)
IN_MEMORY = "SQLite in memory"  # which keeps nothing, but takes part in transactions
POSTGRES_URL = "postgresql://postgres@127.0.0.1:5432/test"

TABLE = "eventkit_outbox"
EVENT_TYPE = "benchmark.order.placed"

numbers = count(1)

_Result = TypeVar("_Result")


@named(EVENT_TYPE)
@dataclass(frozen=True, slots=True)
class OrderPlaced:
    """What has happened."""

    order_id: int
    customer: str
    total: Decimal
    placed_at: datetime


def placed(number: int = 1) -> OrderPlaced:
    """An event of ordinary size."""
    return OrderPlaced(number, "a customer", Decimal("99.90"), datetime(2026, 11, 29, tzinfo=UTC))


class Base(DeclarativeBase):
    """What the application keeps, and the outbox's tables."""


class Order(Base):
    """What a transaction inserts."""

    __tablename__ = "eventkit_benchmark_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str]


add_tables(Base.metadata)


@dataclass(frozen=True, slots=True)
class Database:
    """An engine, and what is done with it in the same way whether it blocks or is awaited.

    Attributes:
        engine: As the application has it.
        url: Where it is.
        schema: The schema of PostgreSQL that its connections find; None on SQLite.
    """

    engine: Engine | AsyncEngine
    url: URL
    schema: str | None

    @property
    def sync_engine(self) -> Engine:
        """The engine to listen to."""
        return self.engine.sync_engine if isinstance(self.engine, AsyncEngine) else self.engine

    async def call(self, function: Callable[[Connection], _Result]) -> _Result:
        """Call it in a transaction."""
        if isinstance(self.engine, AsyncEngine):
            async with self.engine.begin() as connection:
                return await connection.run_sync(function)
        with self.engine.begin() as connection:
            return function(connection)

    def transactions(self, kind: type[Session]) -> Transaction:
        """How a transaction is run in a session of this kind."""
        if isinstance(self.engine, AsyncEngine):
            return _awaited(async_sessionmaker(self.engine, sync_session_class=kind))
        return _blocking(sessionmaker(self.engine, class_=kind))


# Inserts an order, calls the function, awaits the other one with the session, and commits.
After = Callable[[Any], Awaitable[object]]
Transaction = Callable[[Callable[[], object], After | None], Coroutine[Any, Any, None]]


def _blocking(sessions: sessionmaker[Session]) -> Transaction:
    async def transact(work: Callable[[], object], after: After | None) -> None:
        with sessions.begin() as session:
            session.add(Order(id=next(numbers), note="new"))
            work()
            if after is not None:
                session.flush()
                await after(session)

    return transact


def _awaited(sessions: async_sessionmaker[Any]) -> Transaction:
    async def transact(work: Callable[[], object], after: After | None) -> None:
        async with sessions.begin() as session:
            session.add(Order(id=next(numbers), note="new"))
            work()
            if after is not None:
                await session.flush()
                await after(session)

    return transact


@asynccontextmanager
async def database(place: str) -> AsyncGenerator[Database]:
    """Tables of a contender's own."""
    with TemporaryDirectory() as folder:
        if place in (SQLITE, IN_MEMORY):
            path = f"/{Path(folder) / 'test.db'}" if place == SQLITE else ""
            url = make_url(f"sqlite://{path}")
            opened = Database(create_engine(url), url, None)
        else:
            opened = _on_postgres(place)
        try:
            await opened.call(partial(_create, schema=opened.schema))
            yield opened
        finally:
            if opened.schema is not None:
                await opened.call(partial(_drop, schema=opened.schema))
            if isinstance(opened.engine, AsyncEngine):
                await opened.engine.dispose()
            else:
                opened.engine.dispose()


def _on_postgres(place: str) -> Database:
    driver = "psycopg" if place == PSYCOPG else "asyncpg"
    url = make_url(os.environ.get("EVENTKIT_POSTGRES_URL", POSTGRES_URL))
    url = url.set(drivername=f"postgresql+{driver}")
    schema = f"eventkit_benchmark_{uuid4().hex[:12]}"
    return Database(engine_of(url, schema), url, schema)


def engine_of(url: URL, schema: str | None) -> Engine | AsyncEngine:
    """An engine whose connections find the tables in this schema."""
    if schema is None:
        return create_engine(url)
    if url.drivername.endswith("asyncpg"):
        found = {"search_path": schema}
        return create_async_engine(url, connect_args={"server_settings": found})
    return create_engine(url, connect_args={"options": f"-c search_path={schema}"})


def _create(connection: Connection, schema: str | None) -> None:
    if schema is not None:
        connection.execute(CreateSchema(schema))
    Base.metadata.create_all(connection)


def _drop(connection: Connection, schema: str) -> None:
    connection.execute(DropSchema(schema, cascade=True))


@contextmanager
def outbox_of(bus: EventBus, database: Database, **options: Any) -> Generator[Outbox]:
    """An outbox, and no connection of it left behind."""
    with Outbox(bus, database.engine, **options) as outbox:
        yield outbox


class Insert:
    """The rows of one event, written as cheaply as it can be done: what anything would have to pay.

    The text is rendered once, what the rows share is bound once, and the payload is ready. Only the
    ids are new each time.
    """

    def __init__(self, database: Database, rows: int, *, leased: bool) -> None:
        dialect = database.sync_engine.dialect
        clock = "((julianday('now') - 2440587.5) * 86400.0)"
        if dialect.name == "postgresql":
            clock = "cast(extract(epoch from clock_timestamp()) as double precision)"
        state = f"1, 1, {clock}, :o" if leased else f"0, 0, {clock}, null"
        values = ", ".join(
            f"(:i{n}, :e, :t, :n{n}, null, 0, :p, null, 0, :a, {state})" for n in range(rows)
        )
        compiled = text(
            f"insert into {TABLE} (id, event_id, event_type, handler, key, position, payload,"
            " headers, depth, published_at, state, attempt, due_at, owner) values " + values
        ).compile(dialect=dialect)
        self._text, self._order = str(compiled), compiled.positiontup
        self._rows = rows
        self._hex = dialect.name == "sqlite"
        self._payload = (
            '{"order_id":1,"customer":"a customer","total":"99.90",'
            '"placed_at":"2026-11-29T00:00:00Z"}'
        )
        self._owner = {"o": "a process"} if leased else {}

    def __call__(self, connection: Connection) -> None:
        """Write them."""
        ids: list[Any] = [uuid4() for _ in range(self._rows + 1)]
        if self._hex:
            ids = [each.hex for each in ids]
        values: dict[str, Any] = {
            "e": ids[-1],
            "t": EVENT_TYPE,
            "p": self._payload,
            "a": 1.8e9,
            **self._owner,
        }
        for n in range(self._rows):
            values[f"i{n}"], values[f"n{n}"] = ids[n], handler_name(n)
        if self._order is None:
            connection.exec_driver_sql(self._text, values)
        else:
            connection.exec_driver_sql(self._text, tuple([values[name] for name in self._order]))


def handler_name(number: int) -> str:
    """What the handlers are called."""
    return f"benchmarks:handler_{number}"


def subscribe(bus: EventBus, handlers: Sequence[Any], *, durable: bool) -> None:
    """Subscribe handlers of the event."""
    for number, handler in enumerate(handlers):
        bus.subscribe(OrderPlaced, handler, name=handler_name(number), durable=durable)


def empty(connection: Connection) -> None:
    """Delete all rows."""
    connection.exec_driver_sql(f"delete from {TABLE}")


def session_that_inserts(insert: Insert) -> type[Session]:
    """A session that writes such rows right before its commit."""

    class Inserting(Session):
        pass

    @event.listens_for(Inserting, "before_commit")
    def write(session: Session) -> None:  # pyright: ignore[reportUnusedFunction]
        session.flush()
        insert(session.connection())

    return Inserting
