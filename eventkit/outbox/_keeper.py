"""Owns the writing of rows in transactions: when rows are written, and what a commit changes.

Knows no SQL text, and nothing of how rows run later.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary, WeakMethod

from anyio import fail_after
from anyio.abc import TaskGroup
from sqlalchemy import Connection, Engine, RootTransaction, event
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
)
from sqlalchemy.orm import Session, scoped_session

from eventkit._core.ambient import current
from eventkit._core.locations import caller
from eventkit._core.log import log
from eventkit._core.queue import Envelope, Verdict
from eventkit._core.state import BusState, Host
from eventkit._core.subscriptions import Declaration
from eventkit._core.transactions import End, Transaction
from eventkit.exceptions import LeaseLostError
from eventkit.outbox._holdings import Holdings
from eventkit.outbox._relay import Relay
from eventkit.outbox._rows import EventRows, Row, headers_of, rows_of
from eventkit.sqlalchemy import CommitTie
from eventkit.wire import codec_for

CONCURRENCY = 4  # the default of the middleware
_LARGE = 1_000_000  # characters of a payload, above which a warning is logged


@dataclass(eq=False, slots=True)
class _Underway:
    """The work of the outbox in a transaction that is being committed.

    Attributes:
        events: The events with rows in this transaction.
        completed: The rows that this commit completes, by `complete_with`.
        renewed: The local time before this transaction renewed the lease. None if it did not.
        term: The term of the lease. None if this transaction renews the lease.
        unowned: Whether some of the rows are not leased, so that a relay has to claim them.
    """

    events: list[EventRows] = field(default_factory=list[EventRows])
    completed: list[Row] = field(default_factory=list[Row])
    renewed: float | None = None
    term: object | None = None
    unowned: bool = False


class Keeper:
    """Writes rows in transactions. Implements the core's protocol `Keeper`.

    Attributes:
        outbox: The public `Outbox`. Any, because this module must not import that layer.
        memory: The number of open `in_memory` blocks.
    """

    def __init__(
        self, outbox: Any, state: BusState, holdings: Holdings, tie: CommitTie, engine: Engine
    ) -> None:
        self.outbox = outbox
        self.memory = 0
        self._state = state
        self._holdings = holdings
        self._tie = tie
        self._engine = engine
        self._marks: WeakKeyDictionary[Session, Row] = WeakKeyDictionary()
        self._underway: WeakKeyDictionary[Transaction, _Underway] = WeakKeyDictionary()
        # By root transaction: rows written in savepoints, not visible before the root's commit.
        self._unseen: WeakKeyDictionary[RootTransaction, Counter[str]] = WeakKeyDictionary()
        self._lock = Lock()
        self._told: set[object] = set()  # the warnings that were logged
        self._examined = False  # whether the tables were checked
        # Weak, because the tie and SQLAlchemy may live longer than the bus.
        tie.before_commit.append(_weakly(self._before_commit))
        tie.ended.append(_weakly(self._ended))
        self._session_hook = _weakly(self._before_session_commit)
        event.listen(Session, "before_commit", self._session_hook)

    def detach(self) -> None:
        """Stop writing rows."""
        self._tie.detach()
        event.remove(Session, "before_commit", self._session_hook)

    def admit(self, declarations: Sequence[Declaration]) -> None:
        """Refuse durable handlers of events that cannot be stored. See the core's `Keeper`."""
        for declaration in declarations:
            self._holdings.catalog.admit(declaration)

    def accept(self, envelope: Envelope) -> None:
        """Make the rows of an event that is being published. See the core's `Keeper`.

        The event is encoded at once. So an event that cannot be stored raises at its publish, and
        a later change of the event is not stored.
        """
        codec = codec_for(type(envelope.event))
        payload = codec.encode(envelope.event)
        if len(payload) > _LARGE:
            self._warn_once(
                ("large", codec.name),
                "an event is large, and is stored once for each delivery: put an id into the "
                "event, and load the rest in the handler",
                event_type=codec.name,
                characters=len(payload),
            )
        if self.memory or self._holdings.database.is_in_memory:
            return
        envelope.rows = rows = rows_of(
            envelope,
            self._holdings,
            name=codec.name,
            payload=payload,
            headers=headers_of(envelope, self._state.observers.headers),
            # For the warning about a missing transaction. An event that is delivered even on
            # failure waits for no commit on purpose, so it needs no warning.
            location=caller() if envelope.verdict is Verdict.OPEN else None,
        )
        for row in rows.rows.values():
            if row.key is None:
                self._holdings.know(row)

    def _before_session_commit(self, session: Session) -> None:
        """Begin the transaction of a session without statements, if its commit decides events."""
        transaction = self._tie.transaction_of(session)
        if transaction is not None and _deciding(transaction):
            session.connection()

    def _before_commit(self, connection: Connection, transaction: Transaction) -> None:
        """Write the rows that this commit decides. The user's `commit()` raises the errors."""
        if connection.engine.pool is not self._engine.pool:
            return
        if transaction.is_root and self._unseen:
            self._show(connection)
        events = _deciding(transaction)
        marked = self._marked(connection, transaction)
        if events or marked:
            self._holdings.place_tables()
            self._underway[transaction] = underway = _Underway(events)
            leased = bool(events) and transaction.is_root and self._may_lease()
            if leased:  # first, as `Store.reap` does: the other order could make a deadlock
                self._renew(connection, underway)
            self._complete(connection, marked, underway)
            self._write(connection, underway, leased=leased)
            if not transaction.is_root:
                self._note_unseen(connection, events)

    def _note_unseen(self, connection: Connection, events: Sequence[EventRows]) -> None:
        """Note rows in a savepoint: others see them only after the commit of the root."""
        root = connection.get_transaction()
        assert root is not None
        names = Counter(row.handler for each in events for row in each.rows.values())
        with self._state.tally.lock:
            self._unseen.setdefault(root, Counter()).update(names)
            self._state.unseen.update(names)

    def _show(self, connection: Connection) -> None:
        """Note that the root commits, so rows from its savepoints become visible."""
        root = connection.get_transaction()
        assert root is not None
        with self._state.tally.lock:
            self._state.unseen -= self._unseen.pop(root, Counter())

    def _marked(self, connection: Connection, transaction: Transaction) -> list[Row]:
        """Return the rows that this commit completes: rows of handlers that still run."""
        if not self._marks:
            return []
        with self._lock:
            marks = [*self._marks.items()]
        return [
            row
            for session, row in marks
            if (session.bind is connection or self._tie.transaction_of(session) is transaction)
            and not row.completed
            and self._holdings.runs(row)
        ]

    def _complete(self, connection: Connection, marked: list[Row], underway: _Underway) -> None:
        """Delete rows in the user's transaction. Raise if another process has taken one over."""
        if not marked:
            return
        wanted = [(row.id, row.attempt) for row in marked]
        done = self._holdings.store.complete(connection, self._holdings.lease.owner, wanted)
        for row in marked:
            if row.id not in done:
                row.lost = True
                self._holdings.tell_lost([row])
                raise LeaseLostError(
                    f"another process has taken over delivery {row.id}, so this transaction is not "
                    "committed"
                )
        underway.completed = marked

    def _may_lease(self) -> bool:
        """Whether this process leases the rows that it writes: not if it has no room for them."""
        crowded = any(host.is_crowded() for host in self._state.hosts)
        return self._holdings.relays and not crowded

    def _renew(self, connection: Connection, underway: _Underway) -> None:
        """Write in the same transaction that this process is alive, if its lease is not valid."""
        lease = self._holdings.lease
        underway.term = lease.term
        lease.start(at_once=underway.term is not None)
        if underway.term is None:
            underway.renewed = lease.now()
            self._holdings.store.beat(connection, lease.owner, lease.seconds)

    def _write(self, connection: Connection, underway: _Underway, *, leased: bool) -> None:
        """Insert the rows of events in this transaction.

        The rows are not leased, so that a relay claims them later, in these cases:

        - This process runs no deliveries, or has no room for more.
        - The transaction is a savepoint. Its root decides when the rows are visible, and the
          outbox may not see the end of the root.
        """
        facts = [each.facts for each in underway.events if each.facts is not None]
        if not facts:
            return
        owner = self._holdings.lease.owner if leased else None
        self._holdings.store.insert(connection, facts, owner)
        for each in underway.events:
            each.write(leased=leased, term=underway.term)
        underway.unowned = any(
            not row.leased for each in underway.events for row in each.rows.values()
        )

    def _ended(self, transaction: Transaction, how: End) -> None:
        """Handle the end of a transaction, for the rows that were written or completed in it."""
        underway = self._underway.pop(transaction, None)
        if underway is None:
            return
        if how is not End.COMMITTED:
            for each in underway.events:
                each.unwrite()
            return
        for row in underway.completed:
            row.completed = True
        self._committed(underway)

    def _committed(self, underway: _Underway) -> None:
        """Handle a commit: the lease is renewed, and rows without an owner can be claimed."""
        if underway.renewed is not None:
            lease = self._holdings.lease
            lease.extend(underway.renewed)
            for each in underway.events:
                each.enter(lease.term)
        if underway.unowned:
            self._holdings.wake()

    async def write(self, envelopes: Sequence[Envelope]) -> None:
        """Write the rows of events that no transaction decides. See the core's `Keeper`."""
        underway = _Underway([each.rows for each in envelopes if isinstance(each.rows, EventRows)])
        for rows in underway.events:
            if rows.location is not None:
                self._warn_once(
                    rows.location,
                    "an event with durable handlers belongs to no transaction: it is stored only "
                    "now, and a crash before would have lost it. Publish it inside a session's "
                    "transaction",
                    published_from=rows.location,
                    bus=self._state.name,
                )
        leased = self._may_lease()

        def write(connection: Connection) -> None:
            if leased:
                self._renew(connection, underway)
            self._write(connection, underway, leased=leased)

        try:
            # After this timeout the events run in memory, although the rows may still be written.
            # Then they run twice: the lease gives rows back that this process does not know.
            with fail_after(self._holdings.lease.seconds, shield=True):
                await self._holdings.database.run(write)
        except Exception as error:  # noqa: BLE001 - of a database, or of its driver
            for envelope in envelopes:
                envelope.rows = None
            log(
                logging.ERROR,
                "events with durable handlers could not be kept, and run in memory",
                error=error,
                bus=self._state.name,
                events=len(envelopes),
            )
            return
        self._committed(underway)

    async def receive(self, envelope: Envelope, consumer: str, message_id: str) -> bool:
        """Commit the id of a message with the rows of its event; False if the id is not new.

        If this is cancelled or fails, the commit may have happened. This process then forgets the
        rows, so that the lease gives them back.
        """
        holdings = self._holdings
        if self.memory or holdings.database.is_in_memory:
            return True
        await self._examine()
        underway = _Underway([envelope.rows] if isinstance(envelope.rows, EventRows) else [])
        leased = bool(underway.events) and self._may_lease()

        def write(connection: Connection) -> bool:
            # First, because it may wait for another process that has the same message. The waiting
            # transaction holds no other lock then.
            is_new = holdings.store.note_message(connection, consumer, message_id)
            if is_new and leased:
                self._renew(connection, underway)
            if is_new:
                self._write(connection, underway, leased=leased)
            return is_new

        is_new = False
        try:
            is_new = await holdings.database.run(write)
        finally:
            if not is_new:
                for each in underway.events:
                    for row in each.rows.values():
                        holdings.disown(row)
        if is_new:
            self._committed(underway)
        return is_new

    async def _examine(self) -> None:
        """Check the tables once, as a relay does at its start."""
        if not self._examined:
            await self._holdings.check()
            self._examined = True

    def mark(self, session: Session, delivery_id: UUID) -> None:
        """Let the session's next commit complete the delivery, if this process has its row."""
        row = self._holdings.row_of(delivery_id)
        if row is None:
            return
        engine = None if session.bind is None else session.bind.engine  # None: several engines
        if engine is not None and engine.pool is not self._engine.pool:
            raise ValueError(
                f"complete_with() takes a session of the outbox's engine, {self._engine!r}, not of "
                f"{engine!r}: the delivery's row is in another database. A test with its own "
                "engine runs in `with outbox.in_memory():`"
            )
        with self._lock:
            self._marks[session] = row

    def settle(self) -> Coroutine[Any, Any, None]:
        """Write the outcomes of deliveries. See the core's `Keeper`."""
        return self._holdings.settle()  # not `async def`: saves a coroutine per unit of work

    def serve(self, host: Host, tasks: TaskGroup, *, concurrency: int) -> Relay:
        """Make a relay for this event loop. See the core's `Keeper`."""
        return Relay(
            self._holdings, self._state, host, tasks, self.outbox.concurrency or concurrency
        )

    def _warn_once(self, what: object, text: str, **facts: str | int) -> None:
        if what not in self._told:
            self._told.add(what)
            log(logging.WARNING, text, error=None, **facts)


def complete_with(
    session: Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any],
) -> None:
    """Complete the running delivery in the next commit of a session.

        @bus.on(OrderPlaced, durable=True)
        async def reserve(
            event: OrderPlaced, session: Annotated[AsyncSession, Depends(get_session)]
        ) -> None:
            complete_with(session)
            session.add(Reservation(event.order_id))
            await session.commit()

    Call it in a durable handler. The call itself sends nothing to the database. The next commit of
    the session deletes the row of the delivery in the same transaction. So the handler's writes in
    this transaction happen exactly once. If the handler fails after the commit, it is not tried
    again.

    If another process has taken over the delivery, the commit raises `LeaseLostError`, and nothing
    is committed.

    If the delivery has no row, the call does nothing. So the same handler also runs in memory and
    in tests.

    Args:
        session: A `Session` or `AsyncSession` of the outbox's engine, or a scoped session.

    Raises:
        TypeError: `session` is no session.
        ValueError: The session belongs to another engine.
    """
    found: object = session
    if isinstance(found, scoped_session | async_scoped_session):
        found = found()
    if isinstance(found, AsyncSession):
        found = found.sync_session
    if not isinstance(found, Session):
        raise TypeError(f"complete_with() takes a session of SQLAlchemy, not {session!r}")
    unit = current()
    keeper = None if unit is None else unit.state.keeper
    if unit is not None and unit.delivery is not None and isinstance(keeper, Keeper):
        keeper.mark(found, unit.delivery.id)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap a method. The wrapper does not keep the object alive, and does nothing after its end."""
    alive = WeakMethod(method)

    def call(*arguments: object) -> None:
        if (found := alive()) is not None:
            found(*arguments)

    return call


def _deciding(transaction: Transaction) -> list[EventRows]:
    """Return the rows that a commit of the transaction decides, without those already written."""
    # This check costs a hundredth of `decides()`, and most commits have no such rows.
    if not any(
        each.rows is not None and not each.rows.written
        for unit in [*transaction.units]
        for each in unit.queue.staged
    ):
        return []
    rows = (envelope.rows for envelope in transaction.decides())
    return [each for each in rows if isinstance(each, EventRows) and not each.written]
