"""Owns the operations of processes on rows: write, lease, claim, complete, give back, reap.

Knows no threads, no event loops, no bus. Each operation is a function of a connection. Its caller
has begun a transaction on this connection, on SQLite with `BEGIN IMMEDIATE`, and ends it.

To *reap* is to make the rows of a dead process ready for others. A row is changed only by:

- the process that has leased it,
- a process that claims it,
- a process that reaps its owner.

A change of a leased row is *fenced*: it names the owner, and at the end of an attempt also the
attempt. So it does not change a row that another process has taken over.

A statement waits for a row lock only if its own process has leased the row. Nothing lasts longer
than a transaction: no SET, no session or advisory lock, no LISTEN.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, Dialect

from eventkit.outbox._insert import Insert, NewEvent, NewRow
from eventkit.outbox._operations import (
    Batch,
    Known,
    Operations,
    OutboxStats,
    StoredDelivery,
    in_batches,
)
from eventkit.outbox._statements import to_uuid
from eventkit.outbox._tables import State, add_tables

__all__ = [
    "Batch",
    "Claimed",
    "Known",
    "Look",
    "NewEvent",
    "NewRow",
    "OutboxStats",
    "State",
    "Store",
    "StoredDelivery",
    "add_tables",
    "in_batches",
]

_UNREADABLE_AGAIN = 600.0  # seconds

# The list of states has to be the one in the index's condition, or SQLite does not use the index.
_KNOWN_AND_DUE = (
    "state in (0, 3, 4) and due_at <= {now} + :seconds"
    " and (state <> 3 or due_at <= {now})"  # `within` would claim an unreadable row repeatedly
    " and handler in :handlers and event_type in :event_types"
)
_UNCOUNTED = "attempt = case when attempt > 0 then attempt - 1 else 0 end"
_FENCED = "owner = :owner and state = 1"

_BEAT = """
    insert into {process} (owner, alive_until) values (:owner, {clock} + :seconds)
    on conflict (owner) do update set alive_until = excluded.alive_until
"""
_GIVE_BACK = f"update {{outbox}} set state = 0, due_at = {{clock}}, owner = null, {_UNCOUNTED}"
_COMPLETE = f"""
    delete from {{outbox}} where id in :ids and attempt = :attempt and {_FENCED} returning id
"""
_RETRY_LATER = "state = 0, due_at = {clock} + :seconds"
_DIE = "state = 2, due_at = {clock}"
_UNREADABLE = f"state = 3, due_at = {{clock}} + :seconds, {_UNCOUNTED}"

_LOOK = f"""
    select owner from {{process}} where alive_until < {{now}} and owner <> :owner
    union all
    select null where exists (select 1 from {{outbox}} where {_KNOWN_AND_DUE})
"""
# A process that renews its lease at the same time is left out: either it holds the lock of its row,
# or its row has the new time after the lock is taken.
_LAPSED = """
    select owner from {process} as r where owner in :owners and alive_until < {now} {skip}
"""
# If another transaction holds some of the rows, the row of the process stays, and is found again at
# the next look.
_BURY = """
    delete from {process} as p where owner in :owners and not exists (
        select 1 from {outbox} as r where r.owner = p.owner and r.state = 1)
"""


def _reap(condition: str) -> str:
    return f"""
        with chosen as (select id from {{outbox}} as r where state = 1 and {condition} {{skip}})
        update {{outbox}} set state = case when attempt > 1 then 4 else 0 end, due_at = {{clock}},
            owner = null
        where id in (select id from chosen) returning id
    """


_REAP_OWNERS = _reap("owner in :owners")
_REAP_ORPHANS = _reap("not exists (select 1 from {process} as p where p.owner = r.owner)")


def _claim(condition: str) -> str:
    # Order by key. A row has to wait while:
    # - a row of its key runs, also a later one: an unreadable row may find a later row running;
    # - an earlier row of its key is ready or suspect;
    # - an earlier row of its key is unreadable, is due again, and has an event type known here.
    # A row does not wait for dead rows, or for unreadable rows that are due later.
    return f"""
        with chosen as (
            select id from {{outbox}} as r
            where {_KNOWN_AND_DUE} and {condition}
                and (key is null or not exists (
                    select 1 from {{outbox}} as e
                    where e.handler = r.handler and e.key = r.key
                        and (e.state = 1 or e.position < r.position and (e.state in (0, 4)
                            or e.state = 3 and e.due_at <= {{now}}
                                and e.event_type in :event_types))))
            order by due_at limit :limit {{skip}})
        update {{outbox}} set state = 1, owner = :owner, attempt = attempt + 1
        where id in (select id from chosen)
        returning due_at, id, event_id, event_type, handler, key, payload, headers, depth,
            published_at, attempt
    """


_CLAIM_READY = _claim("state <> 4 and handler not in :busy")
_CLAIM_SUSPECT = _claim("state = 4")

# If two transactions note the same message, the second one waits for the end of the first one.
_NOTE = """
    insert into {inbox} (consumer, message_id, received_at)
    values (:consumer, :message_id, {clock}) on conflict do nothing returning message_id
"""
_FORGET = """
    delete from {inbox} where (consumer, message_id) in (
        select consumer, message_id from {inbox} as r where received_at < {now} - :seconds
        order by received_at limit :limit {skip})
"""


@dataclass(slots=True)
class Claimed:
    """A row that this process has claimed."""

    id: UUID
    event_id: UUID
    event_type: str
    handler: str
    key: str | None
    payload: str
    headers: str | None
    depth: int
    published_at: float
    attempt: int
    suspect: bool = False


class Look(NamedTuple):
    """The result of one look of a relay.

    Attributes:
        lapsed: Other processes whose lease is over.
        due: Whether a row is due that this process can run. A row that waits for an earlier row of
            its key counts, too.
    """

    lapsed: tuple[str, ...]
    due: bool


class Store(Operations):
    """The rows of one outbox. Thread-safe: its only state is a cache of statements.

    Args:
        dialect: SQLAlchemy's dialect, for PostgreSQL or SQLite.
        schema: The schema of the tables. None: it is looked up by the search_path of the first
            connection. So call `problem` first, on a connection with an unchanged search_path.

    Raises:
        ValueError: The dialect belongs to another database.
    """

    def __init__(self, dialect: Dialect, schema: str | None) -> None:
        super().__init__(dialect, schema)
        self._insert = Insert(self._statements)

    def insert(self, connection: Connection, events: Sequence[NewEvent], owner: str | None) -> None:
        """Write the rows of events that the connection's transaction decides.

        With an owner, rows without a key are leased, with attempt 1. Rows with a key are ready.
        Without an owner, all rows are ready. Each statement writes up to a hundred rows.
        """
        self._insert.run(connection, events, owner)

    def beat(self, connection: Connection, owner: str, lease_seconds: float) -> None:
        """Write that a process is alive for `lease_seconds` from now on."""
        self._statements.count(connection, _BEAT, owner=owner, seconds=lease_seconds)

    def owned(self, connection: Connection, owner: str) -> set[UUID]:
        """Return the ids of the rows that a process has leased."""
        rows = self._statements.run(
            connection, f"select id from {{outbox}} where {_FENCED}", owner=owner
        )
        return {to_uuid(id_) for (id_,) in rows}

    def give_back(self, connection: Connection, owner: str, ids: Collection[UUID]) -> int:
        """Make leased rows ready now, without counting the attempt; return their number."""
        statement = f"{_GIVE_BACK} where id in :ids and {_FENCED}"
        return self._statements.count(connection, statement, owner=owner, ids=ids)

    def farewell(self, connection: Connection, owner: str, but: Collection[UUID]) -> int:
        """Give back all rows of a process except `but`; return their number.

        If `but` is empty, the row of the process is deleted: its lease has ended.
        """
        statement = f"{_GIVE_BACK} where id not in :ids and {_FENCED}"
        given = self._statements.count(connection, statement, owner=owner, ids=but)
        if not but:
            self._statements.count(
                connection, "delete from {process} where owner = :owner", owner=owner
            )
        return given

    def complete(
        self, connection: Connection, owner: str, done: Iterable[tuple[UUID, int]]
    ) -> set[UUID]:
        """Delete the rows of successful deliveries, given by id and attempt.

        Returns:
            The ids of the deleted rows. Another process has taken over the others.
        """
        ids_of = defaultdict[int, list[UUID]](list)
        for id_, attempt in done:
            ids_of[attempt].append(id_)
        deleted = set[UUID]()
        for attempt, ids in ids_of.items():
            rows = self._statements.run(
                connection, _COMPLETE, owner=owner, attempt=attempt, ids=ids
            )
            deleted.update(to_uuid(id_) for (id_,) in rows)
        return deleted

    def fail(
        self,
        connection: Connection,
        owner: str,
        id_: UUID,
        attempt: int,
        error: str,
        in_seconds: float | None,
    ) -> bool:
        """Write a failure: retry after `in_seconds`, or dead if None. False if the row was lost."""
        later = {} if in_seconds is None else {"seconds": in_seconds}
        change = _DIE if in_seconds is None else _RETRY_LATER
        return self._end(connection, change, owner, id_, attempt, error, **later)

    def unreadable(
        self, connection: Connection, owner: str, id_: UUID, attempt: int, error: str
    ) -> bool:
        """Write that a row cannot be decoded here; False if the row was lost.

        It is due again in ten minutes, for any process. The attempt is not counted.
        """
        return self._end(
            connection, _UNREADABLE, owner, id_, attempt, error, seconds=_UNREADABLE_AGAIN
        )

    def look(self, connection: Connection, owner: str, known: Known, within: float = 0.0) -> Look:
        """Find processes whose lease is over, and whether a row is due, with one SELECT.

        Args:
            connection: A connection in a transaction.
            owner: This process. It is never in the result.
            known: The handlers and event types of this process.
            within: Seconds. Rows that are due within this time count, except unreadable rows.
        """
        rows = self._statements.run(
            connection, _LOOK, owner=owner, seconds=within, **known._asdict()
        )
        lapsed = tuple(found for (found,) in rows if found is not None)
        return Look(lapsed, due=len(lapsed) < len(rows))

    def reap(self, connection: Connection, owner: str, lapsed: Collection[str]) -> int:
        """Make the rows of dead processes ready for others.

        The leases are checked again, under a lock for which a renewal has to wait. Rows that
        another transaction holds are left for the next time.

        Returns:
            The number of rows. A row in its first attempt becomes ready, any other row becomes
            suspect.
        """
        others = [each for each in lapsed if each != owner]
        rows = self._statements.run(connection, _LAPSED, owners=others)
        dead = [found for (found,) in rows]
        if not dead:
            return 0
        reaped = self._statements.run(connection, _REAP_OWNERS, owners=dead)
        self._statements.count(connection, _BURY, owners=dead)
        return len(reaped)

    def reap_orphans(self, connection: Connection) -> int:
        """Do the same as `reap` for owners without a row in the process table."""
        return len(self._statements.run(connection, _REAP_ORPHANS))

    def claim(
        self,
        connection: Connection,
        owner: str,
        known: Known,
        limit: int,
        *,
        within: float = 0.0,
        busy: Collection[str] = (),
    ) -> list[Claimed]:
        """Lease due rows, the longest due first.

        Rows that another process claims at the same time are left out. For each handler and key, at
        most one row is claimed: only if no row of this key runs, and no earlier one waits.

        Args:
            connection: A connection in a transaction.
            owner: The process that claims.
            known: The handlers and event types of the process. Other rows are not claimed.
            limit: The maximum number of rows.
            within: Seconds. Rows that are due within this time count, except unreadable rows.
            busy: The names of handlers that get no row now.
        """
        return self._claimed(
            connection, _CLAIM_READY, owner, known, limit=limit, seconds=within, busy=busy
        )

    def claim_suspect(self, connection: Connection, owner: str, known: Known) -> Claimed | None:
        """Lease one due suspect row, to run it without other rows. None if there is none."""
        claimed = self._claimed(connection, _CLAIM_SUSPECT, owner, known, limit=1, seconds=0.0)
        for row in claimed:
            row.suspect = True
            return row
        return None

    def unreadable_due(self, connection: Connection, known: Known) -> int:
        """Make unreadable rows due now, as this process may decode them; return their number."""
        return self._statements.count(
            connection,
            "update {outbox} set due_at = {clock} where state in (0, 3, 4) and state = 3"
            " and due_at > {now} and handler in :handlers and event_type in :event_types",
            **known._asdict(),
        )

    def unknown(
        self, connection: Connection, known: Known, older_than: float = 60.0
    ) -> list[tuple[str, str, int]]:
        """Count rows that have been due for `older_than` seconds, and cannot run in this process.

        Returns:
            Tuples of handler, event type and number of rows.
        """
        rows = self._statements.run(
            connection,
            "select handler, event_type, count(*) from {outbox}"
            " where state in (0, 3, 4) and due_at <= {now} - :seconds"
            " and not (handler in :handlers and event_type in :event_types)"
            " group by handler, event_type order by handler, event_type",
            seconds=older_than,
            **known._asdict(),
        )
        return [(handler, event_type, count) for handler, event_type, count in rows]

    def note_message(self, connection: Connection, consumer: str, message_id: str) -> bool:
        """Note that a consumer has received a message; False if that was noted before."""
        noted = self._statements.run(connection, _NOTE, consumer=consumer, message_id=message_id)
        return bool(noted)

    def forget_messages(self, connection: Connection, older_than: float, limit: int) -> int:
        """Delete ids of messages received at least `older_than` seconds ago, the oldest first.

        Returns:
            Their number. It is below `limit` only if no more are left, or if other processes are
            deleting them.
        """
        return self._statements.count(connection, _FORGET, seconds=older_than, limit=limit)

    def _end(
        self,
        connection: Connection,
        change: str,
        owner: str,
        id_: UUID,
        attempt: int,
        error: str,
        **values: float,
    ) -> bool:
        """End an attempt without success; False if the row is not leased for this attempt."""
        statement = (
            f"update {{outbox}} set {change}, owner = null, error = :error"
            f" where id = :id and attempt = :attempt and {_FENCED}"
        )
        ended = {"owner": owner, "id": id_, "attempt": attempt, "error": error, **values}
        return self._statements.count(connection, statement, **ended) == 1

    def _claimed(
        self, connection: Connection, statement: str, owner: str, known: Known, **values: object
    ) -> list[Claimed]:
        rows = self._statements.run(connection, statement, owner=owner, **known._asdict(), **values)
        # UPDATE returns rows in any order.
        return [_claimed(row) for row in sorted(rows, key=itemgetter(0))]


def _claimed(row: tuple[Any, ...]) -> Claimed:
    _, id_, event_id, *rest = row
    return Claimed(to_uuid(id_), to_uuid(event_id), *rest)
