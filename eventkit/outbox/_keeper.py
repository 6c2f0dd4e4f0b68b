"""Owns the way of rows into transactions: what is written when, and what a commit makes of it.

Knows no SQL text, and nothing of who runs rows later.
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

CONCURRENCY = 4  # as the middleware's
_LARGE = 1_000_000  # characters of a payload that is worth a warning


@dataclass(eq=False, slots=True)
class _Underway:
    """What the outbox has done in a transaction that is being committed.

    Attributes:
        events: Whose rows were written.
        completed: The rows that a handler's own commit completes.
        renewed: The local time before the process's lease was renewed in it, if it was.
        term: That of the lease, if it was not.
        unowned: Whether some of the rows are for a relay to claim.
    """

    events: list[EventRows] = field(default_factory=list[EventRows])
    completed: list[Row] = field(default_factory=list[Row])
    renewed: float | None = None
    term: object | None = None
    unowned: bool = False


class Keeper:
    """The way of rows into transactions: what the core calls a `Keeper`.

    Attributes:
        outbox: What users have of it. Any: an `Outbox`, which is a floor above.
        memory: How many `in_memory` blocks are open.
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
        # By the transaction of their caller's connection: rows that its commit is to show.
        self._unseen: WeakKeyDictionary[RootTransaction, Counter[str]] = WeakKeyDictionary()
        self._lock = Lock()
        self._told: set[object] = set()  # what was warned of
        self._examined = False  # whether the tables were checked
        # Weakly, for the tie and SQLAlchemy outlive a bus that is dropped.
        tie.before_commit.append(_weakly(self._before_commit))
        tie.ended.append(_weakly(self._ended))
        self._session_hook = _weakly(self._before_session_commit)
        event.listen(Session, "before_commit", self._session_hook)

    def detach(self) -> None:
        """Write no rows any more."""
        self._tie.detach()
        event.remove(Session, "before_commit", self._session_hook)

    def admit(self, declarations: Sequence[Declaration]) -> None:
        """Refuse durable handlers of events that cannot be stored. See the core's `Keeper`."""
        for declaration in declarations:
            self._holdings.catalog.admit(declaration)

    def accept(self, envelope: Envelope) -> None:
        """Give an event that is being published its rows. See the core's `Keeper`.

        The event is encoded at once: what cannot be stored raises at the line that made it, and
        one that is changed later is stored as it was.
        """
        codec = codec_for(type(envelope.event))
        payload = codec.encode(envelope.event)
        if len(payload) > _LARGE:
            self._warn_once(
                ("large", codec.name),
                "an event is large, and is stored with each delivery: put an id into it, and load "
                "the rest",
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
            # Who delivers an event in any case knows that it waits for no commit.
            location=caller() if envelope.verdict is Verdict.OPEN else None,
        )
        for row in rows.rows.values():
            if row.key is None:
                self._holdings.know(row)

    def _before_session_commit(self, session: Session) -> None:
        """Have a session that has sent nothing begin, if its commit decides events."""
        transaction = self._tie.transaction_of(session)
        if transaction is not None and _deciding(transaction):
            session.connection()

    def _before_commit(self, connection: Connection, transaction: Transaction) -> None:
        """Write what this commit decides; what it raises comes out of the user's `commit()`."""
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
            if leased:  # first, as those do who reap: the other way round both could wait
                self._renew(connection, underway)
            self._complete(connection, marked, underway)
            self._write(connection, underway, leased=leased)
            if not transaction.is_root:
                self._note_unseen(connection, events)

    def _note_unseen(self, connection: Connection, events: Sequence[EventRows]) -> None:
        """Note rows that nobody sees before the caller of this savepoint commits."""
        root = connection.get_transaction()
        assert root is not None
        names = Counter(row.handler for each in events for row in each.rows.values())
        with self._state.tally.lock:
            self._unseen.setdefault(root, Counter()).update(names)
            self._state.unseen.update(names)

    def _show(self, connection: Connection) -> None:
        """The caller commits, so what was written in savepoints before is seen from now on."""
        root = connection.get_transaction()
        assert root is not None
        with self._state.tally.lock:
            self._state.unseen -= self._unseen.pop(root, Counter())

    def _marked(self, connection: Connection, transaction: Transaction) -> list[Row]:
        """The rows that this commit is to complete: of handlers that run still."""
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
        """Delete rows in the user's transaction, unless another process was given one of them."""
        if not marked:
            return
        wanted = [(row.id, row.attempt) for row in marked]
        done = self._holdings.store.complete(connection, self._holdings.lease.owner, wanted)
        for row in marked:
            if row.id not in done:
                row.lost = True
                self._holdings.tell_lost([row])
                raise LeaseLostError(
                    f"another process has been given delivery {row.id} meanwhile: nothing of this "
                    "transaction is committed"
                )
        underway.completed = marked

    def _may_lease(self) -> bool:
        """Whether this process is to run what it writes: it does not if it has too much to do."""
        crowded = any(host.is_crowded() for host in self._state.hosts)
        return self._holdings.relays and not crowded

    def _renew(self, connection: Connection, underway: _Underway) -> None:
        """Have others know in the same transaction that this process is alive."""
        lease = self._holdings.lease
        underway.term = lease.term
        lease.start(at_once=underway.term is not None)
        if underway.term is None:
            underway.renewed = lease.now()
            self._holdings.store.beat(connection, lease.owner, lease.seconds)

    def _write(self, connection: Connection, underway: _Underway, *, leased: bool) -> None:
        """Insert the rows of events in this transaction.

        They are leased, unless somebody else is to run them: a relay in another process, where
        this one has none or too much to do; or a relay later, where an outer transaction that
        nobody tells of decides when they can be seen.
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
        """What was done in a transaction is so, or it is not."""
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
        """What was renewed is, and what was written can be claimed."""
        if underway.renewed is not None:
            lease = self._holdings.lease
            lease.extend(underway.renewed)
            for each in underway.events:
                each.enter(lease.term)
        if underway.unowned:
            self._holdings.wake()

    async def write(self, envelopes: Sequence[Envelope]) -> None:
        """Write the rows of what no transaction has decided. See the core's `Keeper`."""
        underway = _Underway([each.rows for each in envelopes if isinstance(each.rows, EventRows)])
        for rows in underway.events:
            if rows.location is not None:
                self._warn_once(
                    rows.location,
                    "an event with durable handlers belongs to no transaction: it is kept from now "
                    "on only, and a crash before loses it. Publish inside of a session's "
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
            # What is written after this is run twice: nobody here knows its rows.
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
        """Commit the id of a message with the rows of its event; False if the id was there before.

        If this is cancelled or fails, the commit may have happened. Then nobody here has the rows,
        so the lease returns them.
        """
        holdings = self._holdings
        if self.memory or holdings.database.is_in_memory:
            return True
        await self._examine()
        underway = _Underway([envelope.rows] if isinstance(envelope.rows, EventRows) else [])
        leased = bool(underway.events) and self._may_lease()

        def write(connection: Connection) -> bool:
            # First: a process that waits here for another one with this message has locked nothing.
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
        """Check the tables once, as relays do at their start."""
        if not self._examined:
            await self._holdings.check()
            self._examined = True

    def mark(self, session: Session, delivery_id: UUID) -> None:
        """Have the session's next commit complete the delivery, if it has a row here."""
        row = self._holdings.row_of(delivery_id)
        if row is None:
            return
        engine = None if session.bind is None else session.bind.engine  # None: it has several
        if engine is not None and engine.pool is not self._engine.pool:
            raise ValueError(
                f"complete_with() takes a session of the outbox's engine, {self._engine!r}, not of "
                f"{engine!r}: the delivery's row is in another database. A test with its own engine "
                "runs in `with outbox.in_memory():`"
            )
        with self._lock:
            self._marks[session] = row

    def settle(self) -> Coroutine[Any, Any, None]:
        """Write down what has become of deliveries. See the core's `Keeper`."""
        return self._holdings.settle()  # which each unit of work awaits: one coroutine is enough

    def serve(self, host: Host, tasks: TaskGroup, *, concurrency: int) -> Relay:
        """A relay on the event loop that calls. See the core's `Keeper`."""
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
    """Have the session's next commit complete the delivery of the handler that calls.

        @bus.on(OrderPlaced, durable=True)
        async def reserve(event: OrderPlaced, session: AsyncSession) -> None:
            complete_with(session)
            session.add(Reservation(event.order_id))
            await session.commit()

    The delivery's row is deleted in that transaction, so what the handler writes in it happens
    exactly once. If another process has been given the delivery meanwhile, the commit raises
    `LeaseLostError`, and nothing is committed. What the handler does after the commit is not tried
    again. It only marks: nothing is sent.

    Where the delivery has no row, it does nothing: the same handler runs in memory and in tests.

    Args:
        session: A session of the outbox's engine, also one to await.

    Raises:
        TypeError: It is no session.
        ValueError: It is a session of another engine.
    """
    found: object = session
    if isinstance(found, scoped_session | async_scoped_session):
        found = found()
    if isinstance(found, AsyncSession):
        found = found.sync_session
    if not isinstance(found, Session):
        raise TypeError(f"complete_with() takes a session of SQLAlchemy's, not {session!r}")
    unit = current()
    keeper = None if unit is None else unit.state.keeper
    if unit is not None and unit.delivery is not None and isinstance(keeper, Keeper):
        keeper.mark(found, unit.delivery.id)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """What calls a method for as long as its object lives, and does not keep that alive."""
    alive = WeakMethod(method)

    def call(*arguments: object) -> None:
        if (found := alive()) is not None:
            found(*arguments)

    return call


def _deciding(transaction: Transaction) -> list[EventRows]:
    """The rows that a commit of the transaction decides, and that are not written yet."""
    # Asked first, because it costs a hundredth of the other question, and mostly there are none.
    if not any(
        each.rows is not None and not each.rows.written
        for unit in [*transaction.units]
        for each in unit.queue.staged
    ):
        return []
    rows = (envelope.rows for envelope in transaction.decides())
    return [each for each in rows if isinstance(each, EventRows) and not each.written]
