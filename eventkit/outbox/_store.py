"""Owns what processes do with rows: write, lease, claim, complete, give back, reap.

Each is a function of a connection on which its caller has begun a transaction, on SQLite by
`BEGIN IMMEDIATE`. None is begun or ended here. Knows no threads, no event loops, no bus.

A row is changed only by the process that has leased it, by one that claims it, or by one that
reaps a process that is dead. Every change of a leased row is *fenced*: it names the owner, and
where an attempt ends, the attempt. What another process has taken meanwhile is not changed.

No statement waits for rows that another transaction holds, but for those that its own process
has leased. Nothing outlives a transaction: no SET, no session or advisory lock, no LISTEN.
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

# The states stand as they do in the index's condition, or SQLite would not use it.
_KNOWN_AND_DUE = (
    "state in (0, 3, 4) and due_at <= {now} + :seconds"
    " and (state <> 3 or due_at <= {now})"  # else `within` would find it again and again
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
# A process that renews meanwhile holds its row, or has changed it once the lock is had: both times
# it is left out.
_LAPSED = """
    select owner from {process} as r where owner in :owners and alive_until < {now} {skip}
"""
# One whose rows were held by another transaction stays: it is found again at the next look.
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
    # A dead or unreadable row does not hold up those behind it, unless it is tried again just now.
    # What runs does, wherever it stands: an unreadable row may find a later one running.
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

# Two transactions that note the same message: the second one waits until the first one has ended.
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
    """A row that this process has leased, to run its handler."""

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
    """What a relay sees at one glance.

    Attributes:
        lapsed: Other processes whose lease has ended.
        due: Whether something is due that is known here. A row that waits for an earlier one of
            its key counts, too.
    """

    lapsed: tuple[str, ...]
    due: bool


class Store(Operations):
    """The rows of one outbox. Thread-safe: it keeps nothing but the texts of its statements.

    Args:
        dialect: SQLAlchemy's, of PostgreSQL or SQLite.
        schema: Where the tables are. With None, the first connection says it by its search_path:
            call `problem` first, with a connection whose search_path no transaction has changed.

    Raises:
        ValueError: It is another database.
    """

    def __init__(self, dialect: Dialect, schema: str | None) -> None:
        super().__init__(dialect, schema)
        self._insert = Insert(self._statements)

    def insert(self, connection: Connection, events: Sequence[NewEvent], owner: str | None) -> None:
        """Write the rows of events that the connection's transaction decides.

        Rows without a key are leased by the owner, attempt 1. Those with a key, and all if there
        is no owner, are ready. One statement, or one for each hundred rows.
        """
        self._insert.run(connection, events, owner)

    def beat(self, connection: Connection, owner: str, lease_seconds: float) -> None:
        """Say that a process is alive for so long from now on."""
        self._statements.count(connection, _BEAT, owner=owner, seconds=lease_seconds)

    def owned(self, connection: Connection, owner: str) -> set[UUID]:
        """The rows that a process has leased."""
        rows = self._statements.run(
            connection, f"select id from {{outbox}} where {_FENCED}", owner=owner
        )
        return {to_uuid(id_) for (id_,) in rows}

    def give_back(self, connection: Connection, owner: str, ids: Collection[UUID]) -> int:
        """Have others run these rows, now, and do not count the attempt; how many were leased."""
        statement = f"{_GIVE_BACK} where id in :ids and {_FENCED}"
        return self._statements.count(connection, statement, owner=owner, ids=ids)

    def farewell(self, connection: Connection, owner: str, but: Collection[UUID]) -> int:
        """Give back all rows of a process but these; without these it counts as gone."""
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
        """Delete the rows of deliveries that are done, given by id and attempt.

        Returns:
            Those that were deleted. The others have been given to another process.
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
        """Have a row tried again in so many seconds, or never if None; False if it was lost."""
        later = {} if in_seconds is None else {"seconds": in_seconds}
        change = _DIE if in_seconds is None else _RETRY_LATER
        return self._end(connection, change, owner, id_, attempt, error, **later)

    def unreadable(
        self, connection: Connection, owner: str, id_: UUID, attempt: int, error: str
    ) -> bool:
        """Have a row tried again in ten minutes, by who can decode it; False if it was lost.

        The attempt is not counted.
        """
        return self._end(
            connection, _UNREADABLE, owner, id_, attempt, error, seconds=_UNREADABLE_AGAIN
        )

    def look(self, connection: Connection, owner: str, known: Known, within: float = 0.0) -> Look:
        """See what there is to do, with one SELECT: who has lapsed, and whether something is due.

        Args:
            connection: In a transaction.
            owner: This process, which is never among the lapsed.
            known: What it can run.
            within: What is due in so many seconds is due, but for unreadable rows.
        """
        rows = self._statements.run(
            connection, _LOOK, owner=owner, seconds=within, **known._asdict()
        )
        lapsed = tuple(found for (found,) in rows if found is not None)
        return Look(lapsed, due=len(lapsed) < len(rows))

    def reap(self, connection: Connection, owner: str, lapsed: Collection[str]) -> int:
        """Have the rows of dead processes run by others.

        Whether they are dead is looked at once more, under a lock that a renewal waits for. Rows
        that another transaction holds are left for the next time.

        Returns:
            How many rows. They are ready, or suspect if it was not the first attempt.
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
        """Have rows run by others whose owner is not even among the processes; how many."""
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
        """Lease rows that are due, the longest due first.

        Rows that others claim at the same time are left to them. At most one of each handler and
        key, and only if none of that key runs and none before it waits.

        Args:
            connection: In a transaction.
            owner: Who leases them.
            known: What it can run. Other rows are not touched.
            limit: How many at most.
            within: What is due in so many seconds is due, but for unreadable rows.
            busy: Handlers that get no row now.
        """
        return self._claimed(
            connection, _CLAIM_READY, owner, known, limit=limit, seconds=within, busy=busy
        )

    def claim_suspect(self, connection: Connection, owner: str, known: Known) -> Claimed | None:
        """Lease one row whose process has died repeatedly, to run it alone."""
        claimed = self._claimed(connection, _CLAIM_SUSPECT, owner, known, limit=1, seconds=0.0)
        for row in claimed:
            row.suspect = True
            return row
        return None

    def unreadable_due(self, connection: Connection, known: Known) -> int:
        """Have unreadable rows tried again now: this process may be able to. How many."""
        return self._statements.count(
            connection,
            "update {outbox} set due_at = {clock} where state in (0, 3, 4) and state = 3"
            " and due_at > {now} and handler in :handlers and event_type in :event_types",
            **known._asdict(),
        )

    def unknown(
        self, connection: Connection, known: Known, older_than: float = 60.0
    ) -> list[tuple[str, str, int]]:
        """What has been due for so many seconds and cannot be run here.

        Returns:
            Handler, event type, and how many rows.
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
        """Delete notes of messages that were received so many seconds ago, the oldest first.

        Returns:
            How many. Fewer than `limit` only if no more are left, or others are deleting them.
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
        """End an attempt that was not a success; False if the row was not leased for it."""
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
        # UPDATE gives rows in any order.
        return [_claimed(row) for row in sorted(rows, key=itemgetter(0))]


def _claimed(row: tuple[Any, ...]) -> Claimed:
    _, id_, event_id, *rest = row
    return Claimed(to_uuid(id_), to_uuid(event_id), *rest)
