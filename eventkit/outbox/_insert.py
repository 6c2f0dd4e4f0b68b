"""Owns the statement that writes new rows. It runs in transactions of users, so it has to be fast.

Knows nothing of how rows are run.

The text of the statement depends only on its shape: the number of rows of each event, which rows
have a key, and whether they are leased. The text is rendered once per shape, in the driver's own
style of parameters, and goes to the driver without SQLAlchemy's compiler. If the driver can use a
parameter twice, the values that the rows of an event share are bound once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, Dialect, Uuid, text

from eventkit.outbox._statements import Statements

__all__ = ["Insert", "NewEvent", "NewRow"]

_SHAPES = 256  # texts in the cache
# Rows of one statement, unless one event has more. Ordinary transactions have fewer. Large ones are
# cut: a statement has a bounded number of parameters, and drivers cache the texts.
_ROWS = 100


class NewRow(NamedTuple):
    """A delivery to write.

    Attributes:
        id: The id of the delivery.
        handler: The name of the handler.
        key: Deliveries to one handler with an equal key run in order. None: no order.
    """

    id: UUID
    handler: str
    key: str | None


class NewEvent(NamedTuple):
    """An event to write, with its rows.

    Attributes:
        event_id: The id of the event. All deliveries of one publish have the same.
        event_type: The stored name of the event's class.
        payload: The encoded event.
        headers: The headers as JSON, or None.
        depth: The number of events that led to this one.
        published_at: Seconds since 1970.
        rows: The deliveries, at least one.
    """

    event_id: UUID
    event_type: str
    payload: str
    headers: str | None
    depth: int
    published_at: float
    rows: Sequence[NewRow]


# For each event and each of its rows: whether the row has a key.
_Shape = tuple[tuple[bool, ...], ...]


class _Text(NamedTuple):
    """A rendered statement, and the functions that make the driver's arguments."""

    statement: str
    arguments: Callable[[list[Any]], Any]
    id_of: Callable[[UUID], Any] | None  # None: the driver takes a UUID as it is


class Insert:
    """Writes new rows. Thread-safe.

    Args:
        statements: The statements of the database.
    """

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        self._texts = lru_cache(_SHAPES)(self._render)

    def run(self, connection: Connection, events: Sequence[NewEvent], owner: str | None) -> None:
        """Write the rows of events in the given order, with one statement per hundred rows."""
        if self._statements.schema is None:
            self._statements.resolve(connection)
        if len(events) > 1 and sum(len(event.rows) for event in events) > _ROWS:
            for few in _cut(events):
                self._run(connection, few, owner)
        elif events:
            self._run(connection, events, owner)

    def _run(self, connection: Connection, events: Sequence[NewEvent], owner: str | None) -> None:
        shape = tuple([tuple([row.key is not None for row in event.rows]) for event in events])
        statement, arguments, id_of = self._texts(
            connection.dialect, self._statements.schema, owner is not None, shape
        )
        values: list[Any] = [owner]
        for event in events:
            event_id, event_type, payload, headers, depth, published_at, rows = event
            values += (
                event_id if id_of is None else id_of(event_id),
                event_type,
                payload,
                headers,
                depth,
                published_at,
            )
            for id_, handler, key in rows:
                values += (id_ if id_of is None else id_of(id_), handler)
                if key is not None:
                    values.append(key)
        connection.exec_driver_sql(statement, arguments(values))

    def _render(self, dialect: Dialect, schema: str | None, leased: bool, shape: _Shape) -> _Text:
        names, rows = ["o"], list[str]()
        for e, keyed in enumerate(shape):
            names += [f"{letter}{e}" for letter in "etphda"]
            for has_key in keyed:
                n = len(rows)
                names += [f"i{n}", f"n{n}", *([f"k{n}"] if has_key else [])]
                rows.append(self._row(e, n, has_key, leased))
        compiled = text(
            "insert into {outbox} (id, event_id, event_type, handler, key, position, payload,"
            " headers, depth, published_at, state, attempt, due_at, owner) values {rows}".format(
                rows=", ".join(rows), **self._statements.words
            )
        ).compile(dialect=dialect)
        id_of = Uuid().dialect_impl(dialect).bind_processor(dialect)
        order = compiled.positiontup
        return _Text(str(compiled), _arguments(names, order), id_of)

    def _row(self, e: int, n: int, has_key: bool, leased: bool) -> str:
        words = self._statements.words
        key, position = "null", "0"
        if has_key:
            key, position = f":k{n}", "default"
            if self._statements.is_sqlite:
                # Safe, because SQLite has one lock for all writers. Each subquery sees the table as
                # it was before the statement, so `n` makes the positions of its rows differ.
                position = (
                    f"(select coalesce(max(position), 0) + {n + 1} from {words['outbox']}"
                    f" where handler = :n{n} and key = :k{n})"
                )
        state = (
            f"1, 1, {words['clock']}, :o"
            if leased and not has_key
            else (f"0, 0, {words['clock']}, null")
        )
        return (
            f"(:i{n}, :e{e}, :t{e}, :n{n}, {key}, {position}, :p{e}, :h{e}, :d{e}, :a{e}, {state})"
        )


def _arguments(
    names: list[str], order: Sequence[str] | None
) -> Callable[[list[Any]], tuple[Any, ...] | dict[str, Any]]:
    """Return a function that turns values in the order of `names` into the driver's arguments."""
    if order is None:
        return lambda values: dict(zip(names, values, strict=True))
    return itemgetter(*map(names.index, order))


def _cut(events: Sequence[NewEvent]) -> Iterator[list[NewEvent]]:
    """Split events into parts of at most a hundred rows. An event is never split."""
    part, rows = list[NewEvent](), 0
    for event in events:
        if part and rows + len(event.rows) > _ROWS:
            yield part
            part, rows = [], 0
        part.append(event)
        rows += len(event.rows)
    yield part
