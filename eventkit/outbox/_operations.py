"""Owns the operations on rows: list, get, retry, drop, count.

Knows of leases only that leased rows stay. Each operation is a function of a connection. Its caller
has begun a transaction on this connection.

`retry` and `drop` change a bounded number of rows per call, so that no transaction is long. On
SQLite nobody else can write during a transaction. `in_batches` repeats them for all rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import Connection, Dialect

from eventkit.outbox._statements import Statements, to_uuid
from eventkit.outbox._tables import State, ddl_of, problem_of

__all__ = ["Batch", "Known", "Operations", "OutboxStats", "StoredDelivery", "in_batches"]

_BATCH = 1000  # rows

# The names of states for users. A suspect row is a ready one that is run alone.
_STATES: dict[str, tuple[State, ...]] = {
    "ready": (State.READY, State.SUSPECT),
    "leased": (State.LEASED,),
    "dead": (State.DEAD,),
    "unreadable": (State.UNREADABLE,),
}
_WORDS = {state: word for word, states in _STATES.items() for state in states}

_LISTED = (
    "id, event_id, event_type, handler, key, state, attempt, due_at, owner, error, published_at"
)
_RETRY = """
    update {outbox} set state = 0, attempt = 0, due_at = {clock}, owner = null, error = null
    where id in (select id from chosen) returning id
"""
_DROP = "delete from {outbox} where id in (select id from chosen) returning id"


class Known(NamedTuple):
    """The handlers and events that this process can run.

    Attributes:
        handlers: The names of its durable handlers, former ones included.
        event_types: The names of their events, former ones included.
    """

    handlers: tuple[str, ...]
    event_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredDelivery:
    """A delivery in the outbox's table.

    Attributes:
        id: The id of the delivery, as in logs and in `current_delivery()`.
        event_id: The id of the event. All deliveries of one publish have the same.
        event_type: The stored name of the event's class.
        handler: The name of the handler.
        key: The key of `Durable`. Deliveries to one handler with an equal key run in order. None:
            no order.
        state: "ready", "leased", "dead" or "unreadable".
        attempt: The number of attempts that have begun.
        due_at: The time of the next run, for a ready or unreadable delivery. Else the time of the
            last run.
        owner: The process that has leased the delivery.
        error: The class and place of the last error.
        published_at: The time of the publish, by the clock of the publishing process.
        payload: The encoded event. None in lists.
    """

    id: UUID
    event_id: UUID
    event_type: str
    handler: str
    key: str | None
    state: str
    attempt: int
    due_at: datetime
    owner: str | None
    error: str | None
    published_at: datetime
    payload: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class OutboxStats:
    """The numbers of stored deliveries, by state.

    Attributes:
        ready: Deliveries that wait: new ones, and those with an attempt left.
        leased: Deliveries that a process runs or is about to run.
        unreadable: Deliveries with a payload that cannot be decoded.
        dead: Deliveries that are not tried again.
        unknown: Due deliveries, ready or unreadable, that nothing in this process can run.
        lost: How often this process ended a delivery that another process had taken over.
        oldest_due: For how many seconds the oldest ready delivery has been due; None: none is due.
        handlers: The same numbers for each handler, by name.
    """

    ready: int = 0
    leased: int = 0
    unreadable: int = 0
    dead: int = 0
    unknown: int = 0
    lost: int = 0
    oldest_due: float | None = None
    handlers: Mapping[str, OutboxStats] = field(default_factory=dict[str, "OutboxStats"])


class Batch(NamedTuple):
    """The result of one call of `retry` or `drop`.

    Attributes:
        changed: The number of changed rows.
        last: The argument `after` for the next call; None if no row is left.
    """

    changed: int
    last: UUID | None


class _Step(Protocol):
    def __call__(self, connection: Connection, /, *, after: UUID | None) -> Batch: ...


class Operations:
    """The operations of users on the rows of one outbox. Thread-safe.

    Args:
        dialect: SQLAlchemy's dialect, for PostgreSQL or SQLite.
        schema: The schema of the tables. None: it is looked up once, on the first connection.

    Raises:
        ValueError: The dialect belongs to another database.
    """

    def __init__(self, dialect: Dialect, schema: str | None) -> None:
        self._schema = schema
        self._statements = Statements(dialect, schema)

    @property
    def is_placed(self) -> bool:
        """Whether the schema of the tables is known."""
        return self._statements.schema is not None

    def place(self, connection: Connection) -> None:
        """Look up the schema of the tables, by the connection's search_path."""
        self._statements.resolve(connection)

    def ddl(self) -> str:
        """Return the statements that create the tables. Each ends with `;`."""
        return ddl_of(self._statements.dialect, self._schema)

    def problem(self, connection: Connection) -> str | None:
        """Check the database and its tables; return the problem and its remedy, or None.

        If no schema was given, this also looks up the schema of the tables.

        Raises:
            ValueError: The version is older than PostgreSQL 12 or SQLite 3.35.
        """
        self._statements.check_version()
        self._statements.resolve(connection)
        return problem_of(connection, self._statements.schema)

    def deliveries(
        self,
        connection: Connection,
        state: str | None = "dead",
        handler: str | None = None,
        limit: int = 100,
    ) -> list[StoredDelivery]:
        """Return rows without payloads, ordered by `due_at`. With `state=None`, of all states.

        Raises:
            ValueError: There is no such state.
        """
        rows = self._statements.run(
            connection,
            f"select {_LISTED} from {{outbox}} where state in :states"
            + ("" if handler is None else " and handler = :handler")
            + " order by due_at, id limit :limit",
            states=_states(state),
            limit=limit,
            **({} if handler is None else {"handler": handler}),
        )
        return [_stored(row) for row in rows]

    def get(self, connection: Connection, id_: UUID) -> StoredDelivery | None:
        """Return one row with its payload; None if there is no row with this id."""
        statement = f"select {_LISTED}, payload from {{outbox}} where id = :id"
        for row in self._statements.run(connection, statement, id=id_):
            return _stored(row)
        return None

    def retry(
        self,
        connection: Connection,
        *,
        ids: Iterable[UUID] | None = None,
        handler: str | None = None,
        before: timedelta | float | None = None,
        after: UUID | None = None,
        limit: int = _BATCH,
    ) -> Batch:
        """Make dead and unreadable rows ready now, with their first attempt.

        Rows in other states are not changed: a leased row is running, and a ready row will run.

        Args:
            connection: A connection in a transaction.
            ids: Only rows with these ids.
            handler: Only rows of this handler.
            before: Only rows of events that are at least this old: seconds or a timedelta.
            after: The `last` of the previous call.
            limit: The maximum number of rows.

        Raises:
            ValueError: None of `ids`, `handler` and `before` is given.
        """
        states = (State.DEAD, State.UNREADABLE)
        selection = _selection("retry", states, ids, handler, before)
        return self._batch(connection, _RETRY, selection, after, limit)

    def drop(
        self,
        connection: Connection,
        *,
        ids: Iterable[UUID] | None = None,
        handler: str | None = None,
        before: timedelta | float | None = None,
        state: str | None = None,
        after: UUID | None = None,
        limit: int = _BATCH,
    ) -> Batch:
        """Delete rows permanently. Leased rows are never deleted.

        Args:
            connection: A connection in a transaction.
            ids: Only rows with these ids.
            handler: Only rows of this handler.
            before: Only rows of events that are at least this old: seconds or a timedelta.
            state: Only rows in this state.
            after: The `last` of the previous call.
            limit: The maximum number of rows.

        Raises:
            ValueError: None of `ids`, `handler` and `before` is given, or there is no such state.
        """
        states = tuple(each for each in _states(state) if each is not State.LEASED)
        selection = _selection("drop", states, ids, handler, before)
        return self._batch(connection, _DROP, selection, after, limit)

    def count(
        self,
        connection: Connection,
        *,
        ids: Iterable[UUID] | None = None,
        handler: str | None = None,
        before: timedelta | float | None = None,
    ) -> dict[tuple[str, str], int]:
        """Count rows by handler and state. Arguments choose rows as for `drop`; default: all."""
        chosen = _chosen(ids, handler, before)
        conditions = " and ".join(["1 = 1", *map(_CONDITIONS.__getitem__, chosen)])
        statement = f"""
            select handler, state, count(*) from {{outbox}} where {conditions}
            group by handler, state order by handler, state
        """
        counts = defaultdict[tuple[str, str], int](int)
        for name, state, count in self._statements.run(connection, statement, **chosen):
            counts[name, _WORDS[State(state)]] += count
        return dict(counts)

    def stats(self, connection: Connection, known: Known) -> OutboxStats:
        """Count all rows. Reads the whole table once."""
        rows = self._statements.run(
            connection,
            """
            select handler, state, count(*),
                sum(case when state in (0, 3, 4) and due_at <= {now}
                    and not (handler in :handlers and event_type in :event_types)
                    then 1 else 0 end),
                {now} - min(case when state in (0, 4) and due_at <= {now} then due_at end)
            from {outbox} group by handler, state order by handler
            """,
            **known._asdict(),
        )
        rows_of = defaultdict[str, list[tuple[Any, ...]]](list)
        for row in rows:
            rows_of[row[0]].append(row)
        return _counted(rows, {handler: _counted(some, {}) for handler, some in rows_of.items()})

    def _batch(
        self,
        connection: Connection,
        change: str,
        selection: Mapping[str, object],
        after: UUID | None,
        limit: int,
    ) -> Batch:
        values = dict(selection) if after is None else {**selection, "after": after}
        condition = " and ".join(_CONDITIONS[name] for name in values if name != "states")
        statement = f"""
            with chosen as (
                select id from {{outbox}} as r where state in :states and {condition}
                order by id limit :limit {{skip}})
            {change}
        """
        changed = self._statements.run(connection, statement, limit=limit, **values)
        ids = [to_uuid(id_) for (id_,) in changed]
        return Batch(len(ids), max(ids) if len(ids) == limit else None)


async def in_batches(
    run: Callable[[Callable[[Connection], Batch]], Awaitable[Batch]],
    step: _Step,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Repeat a `retry` or `drop` until it has seen all rows; return the number of changed rows.

    Each batch is a transaction of its own. After a cancellation or an error, the earlier batches
    stay committed. Each row is seen once. So a row that becomes dead again during the call is not
    retried again.

    Args:
        run: Calls a function with a connection, and commits: `Database.run`.
        step: The operation with its arguments, such as `partial(store.retry, handler=...)`.
        progress: Called after each batch with the number of rows changed so far.
    """
    count, after = 0, None
    while True:
        batch = await run(partial(step, after=after))
        count += batch.changed
        if progress is not None:
            progress(count)
        if batch.last is None:
            return count
        after = batch.last


_CONDITIONS = {
    "ids": "id in :ids",
    "handler": "handler = :handler",
    "before": "published_at <= {now} - :before",
    # PostgreSQL compares ids by bytes, SQLite by hexadecimal digits: the same order.
    "after": "id > :after",
}


def _selection(
    operation: str,
    states: Iterable[State],
    ids: Iterable[UUID] | None,
    handler: str | None,
    before: timedelta | float | None,
) -> dict[str, object]:
    chosen = _chosen(ids, handler, before)
    if not chosen:
        raise ValueError(f"{operation} which deliveries? Give ids, handler= or before= (their age)")
    return {"states": tuple(map(int, states)), **chosen}


def _chosen(
    ids: Iterable[UUID] | None, handler: str | None, before: timedelta | float | None
) -> dict[str, object]:
    """Return the values of the conditions that are given, by the name of the condition."""
    if isinstance(before, timedelta):
        before = before.total_seconds()
    chosen = {"ids": None if ids is None else tuple(ids), "handler": handler, "before": before}
    return {name: value for name, value in chosen.items() if value is not None}


def _states(state: str | None) -> tuple[State, ...]:
    if state is None:
        return tuple(State)
    if state not in _STATES:
        raise ValueError(f"there is no state '{state}': use one of {', '.join(_STATES)}")
    return _STATES[state]


def _stored(row: tuple[Any, ...]) -> StoredDelivery:
    id_, event_id, event_type, handler, key, state, attempt, due, owner, error, published = row[:11]
    return StoredDelivery(
        to_uuid(id_),
        to_uuid(event_id),
        event_type,
        handler,
        key,
        _WORDS[State(state)],
        attempt,
        datetime.fromtimestamp(due, UTC),
        owner,
        error,
        datetime.fromtimestamp(published, UTC),
        *row[11:],
    )


def _counted(rows: Collection[tuple[Any, ...]], handlers: Mapping[str, OutboxStats]) -> OutboxStats:
    counts = dict.fromkeys(_STATES, 0)
    for _, state, count, _, _ in rows:
        counts[_WORDS[State(state)]] += count
    due = [seconds for *_, seconds in rows if seconds is not None]
    return OutboxStats(
        **counts,
        unknown=sum(row[3] for row in rows),
        oldest_due=max(due) if due else None,
        handlers=handlers,
    )
