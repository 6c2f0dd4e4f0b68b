"""A database with the outbox's tables, and rows to put into them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID, uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from eventkit.outbox._store import Claimed, Known, NewEvent, NewRow, Store

T = TypeVar("T")

ME = "host:1:me"
OTHER = "host:2:other"
LEASE = 15.0
HANDLERS = ("mail", "stock", "bill")
EVENT_TYPE = "shop.placed"
KNOWN = Known(HANDLERS, (EVENT_TYPE,))
PUBLISHED = 1_700_000_000.25


@dataclass
class Database:
    """One transaction per call, as the store's callers have it."""

    engine: Engine | AsyncEngine
    store: Store
    schema: str | None
    run: Callable[[Any], Any]  # runs a coroutine
    prefix: str = field(init=False)

    def __post_init__(self) -> None:
        self.prefix = "" if self.schema is None else f"{self.schema}."

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    def call(self, function: Callable[[Connection], T]) -> T:
        if isinstance(self.engine, Engine):
            with self.engine.begin() as connection:
                return function(connection)
        result: T = self.run(self._await(self.engine, function))
        return result

    def do(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """`call` with the arguments that come behind the connection."""
        return self.call(lambda connection: function(connection, *args, **options))

    async def _await(self, engine: AsyncEngine, function: Callable[[Connection], T]) -> T:
        async with engine.begin() as connection:
            return await connection.run_sync(function)

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement, with `{p}` before the names of tables."""

        def execute(connection: Connection) -> list[tuple[Any, ...]]:
            result = connection.exec_driver_sql(statement.format(p=self.prefix))
            return [tuple(row) for row in result] if result.returns_rows else []

        return self.call(execute)

    def clear(self) -> None:
        self.sql("delete from {p}eventkit_outbox")
        self.sql("delete from {p}eventkit_process")
        self.sql("delete from {p}eventkit_inbox")

    def insert(self, *events: NewEvent, owner: str | None = None) -> list[UUID]:
        """Write events; the ids of their rows."""
        self.do(self.store.insert, events, owner)
        return [row.id for event in events for row in event.rows]

    def plant(self, handler: str = "mail", key: str | None = None) -> UUID:
        """One ready row."""
        (id_,) = self.insert(placed(handler, key=key))
        return id_

    def claim(self, owner: str = ME, limit: int = 100, **options: Any) -> list[Claimed]:
        return self.do(self.store.claim, owner, KNOWN, limit, **options)

    def claimed(self, owner: str = ME, **options: Any) -> list[UUID]:
        return [row.id for row in self.claim(owner, **options)]

    def change(self, id_: UUID, assignments: str) -> None:
        """Change a row as no statement of the store would."""
        shown = id_.hex if self.is_sqlite else str(id_)
        self.sql(f"update {{p}}eventkit_outbox set {assignments} where id = '{shown}'")

    def all_due(self) -> None:
        """As if all that waits had waited long enough."""
        self.sql("update {p}eventkit_outbox set due_at = due_at - 100000")

    def lapse(self, owner: str) -> None:
        """As if a process had not renewed for long."""
        self.sql(f"update {{p}}eventkit_process set alive_until = 1 where owner = '{owner}'")

    def processes(self) -> set[str]:
        return {owner for (owner,) in self.sql("select owner from {p}eventkit_process")}

    def rows(self) -> dict[UUID, tuple[int, int, str | None]]:
        """State, attempt and owner of each row."""
        rows = self.sql("select id, state, attempt, owner from {p}eventkit_outbox")
        return {UUID(str(id_)): (state, attempt, owner) for id_, state, attempt, owner in rows}


def placed(
    *handlers: str, key: str | None = None, event_type: str = EVENT_TYPE, payload: str = "{}"
) -> NewEvent:
    """An event with a row for each handler."""
    rows = [NewRow(uuid4(), handler, key) for handler in handlers]
    return NewEvent(uuid4(), event_type, payload, None, 1, PUBLISHED, rows)
