"""Owns what one process holds of the table: its lease, its rows, and outcomes not yet written.

Knows nothing of users' transactions, and nothing of when a relay reads the table.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol
from uuid import UUID
from weakref import WeakSet, WeakValueDictionary

from anyio import (
    CancelScope,
    current_effective_deadline,
    current_time,
    get_cancelled_exc_class,
    move_on_after,
    sleep,
    to_thread,
)
from anyio.lowlevel import checkpoint
from sqlalchemy import Connection

from eventkit._core.log import log
from eventkit._core.loops.running import current_loop, on_event_loop
from eventkit._core.state import BusState
from eventkit.exceptions import OutboxSchemaError
from eventkit.outbox._catalog import Catalog
from eventkit.outbox._database import Database
from eventkit.outbox._lease import Lease
from eventkit.outbox._rows import Outcome, Row
from eventkit.outbox._store import Store

PAUSE_AFTER_ERROR = 0.5
_GLANCE = 0.005  # seconds between two checks whether another task has written its outcomes
_SECONDS_TO_WRITE = 5.0
_SECONDS_BETWEEN_COMPLAINTS = 60.0


class Looking(Protocol):
    """A relay, as `Holdings` needs it."""

    @property
    def is_looking(self) -> bool:
        """Whether the relay has read the table lately."""
        ...

    def wake(self) -> None:
        """Read the table now. Thread-safe."""

    def hear(self) -> None:
        """Write the waiting outcomes soon. To be called on the relay's event loop only."""

    def expect(self, seconds: float | None) -> None:
        """Note that a row is due in `seconds`; None: no row. Thread-safe."""


class Holdings:
    """What one process holds of the table. Thread-safe.

    Attributes:
        catalog: The handlers and event types that this process can run.
        database: The outbox's own connections.
        store: The statements.
        lease: The lease of this process.
        relays: Whether rows run in this process.
        slows_down: Whether its relays read the table less often while they find nothing.
        patience: Seconds that deliveries may still run at shutdown. None: as the application says.
        lost: How many deliveries lost their lease before their outcome was written.
        closed: Whether the outbox is detached. Then no more rows are claimed.
        given_back: How many rows went back to the table: cancelled ones, and those that had not
            begun when the relays ended.
    """

    def __init__(
        self,
        state: BusState,
        catalog: Catalog,
        database: Database,
        store: Store,
        seconds: float,
        *,
        relays: bool,
    ) -> None:
        self.catalog = catalog
        self.database = database
        self.store = store
        self.relays = relays
        self.slows_down = True
        self.patience: float | None = None
        self.lost = 0
        self.closed = False
        self.given_back = 0
        self._state = state
        # By id. Weak: an event keeps its rows, and they are freed with the event.
        self._rows: WeakValueDictionary[UUID, Row] = WeakValueDictionary()
        self._running: set[Row] = set()
        self._outcomes: deque[Outcome] = deque()
        self._flushes: set[object] = set()  # the running calls of `flush`
        self._relays: dict[object, list[Looking]] = {}  # by event loop
        self._complained_at = -math.inf
        self.lease = Lease(database, store, seconds, self._known_ids)
        _in_this_process.add(self)

    def forget(self) -> None:
        """Forget everything, in a forked child: rows and outcomes belong to the parent."""
        self._rows = WeakValueDictionary()
        self._running, self._flushes = set(), set()
        self._outcomes, self._relays = deque(), {}

    def become_relay(self) -> None:
        """Make this process run rows, also with `relay=False`. It serves no requests."""
        self.relays, self.slows_down = True, False

    # Rows

    def term(self) -> object | None:
        """Return the current term of the lease; None if the lease is not valid."""
        return self.lease.term

    def know(self, row: Row) -> None:
        """Note that this process has the row, for as long as the object lives."""
        self._rows[row.id] = row

    def disown(self, row: Row) -> None:
        """Forget the row, even if the object lives: the lease then gives the row back."""
        self._rows.pop(row.id, None)

    def row_of(self, delivery_id: UUID) -> Row | None:
        """Return the row of a delivery; None if this process has no row for it."""
        return self._rows.get(delivery_id)

    def _known_ids(self) -> Collection[UUID]:
        """Return the ids of the rows that this process has. The lease gives back all others."""
        # `valuerefs` copies in one step. A loop fails if another thread adds a row during it.
        return {row.id for ref in self._rows.valuerefs() if (row := ref()) is not None}

    async def hold_lease(self) -> None:
        """Write into the table that this process is alive, before it claims rows."""
        lease = self.lease
        lease.start()
        if not lease.is_valid:
            since = lease.now()
            await self.beat()
            lease.extend(since)

    async def beat(self) -> None:
        """Write into the table that this process is alive."""
        await self.database.run(
            partial(self.store.beat, owner=self.lease.owner, lease_seconds=self.lease.seconds)
        )

    # Outcomes

    def begin(self, row: Row) -> None:
        """Note that a run of the row's handler has begun. Thread-safe."""
        self._running.add(row)

    def runs(self, row: Row) -> bool:
        """Whether the row's handler runs now."""
        return row in self._running

    def hear(self, outcome: Outcome) -> None:
        """Note that a run of a row has ended. A relay writes the outcome soon."""
        self._running.discard(outcome.row)
        self._outcomes.append(outcome)
        for relay in self._relays.get(current_loop(), ())[-1:] if on_event_loop() else ():
            relay.hear()

    async def settle(self) -> None:
        """Write the outcomes of deliveries, within five seconds. A cancellation has to wait."""
        if self._outcomes or self._flushes:
            try:
                await self._settle()
            except get_cancelled_exc_class():  # `Task.cancel()` ignores shields
                await self._settle()
                raise

    async def _settle(self) -> None:
        with move_on_after(_SECONDS_TO_WRITE, shield=True):
            while not await self.flush():  # noqa: ASYNC110 - a database sends no event
                await sleep(PAUSE_AFTER_ERROR)
            others = {*self._flushes}
            while others & self._flushes:  # noqa: ASYNC110 - they may be on other event loops
                await sleep(_GLANCE)

    async def flush(self) -> bool:
        """Write all waiting outcomes; False if the database failed."""
        outcomes: list[Outcome] = []
        flush = object()
        self._flushes.add(flush)
        try:
            with suppress(IndexError):  # another thread may take the last outcome
                while True:
                    outcomes.append(self._outcomes.popleft())
            return not outcomes or await self._flush(outcomes)
        finally:
            self._flushes.discard(flush)

    async def _flush(self, outcomes: Sequence[Outcome]) -> bool:
        lost: list[Row] = []
        try:
            with CancelScope(shield=True, deadline=_when_to_give_up()) as scope:
                lost = await self.database.run(partial(self._write_down, outcomes))
            if scope.cancelled_caught:  # the transaction goes on, and its end is unknown
                _doubt(outcomes)
                raise TimeoutError("the database does not answer")
        except Exception as error:  # noqa: BLE001 - of a database, or of its driver
            self._outcomes.extendleft(reversed(outcomes))
            self.complain("outcomes of deliveries could not be written, and wait", error)
            return False
        except BaseException:  # `Task.cancel()` ignores shields
            _doubt(outcomes)
            self._outcomes.extendleft(reversed(outcomes))
            self.wake()
            raise
        for relay in self.looking:
            for outcome in outcomes:
                relay.expect(outcome.pause)
        self.given_back += sum(each.unused for each in outcomes)
        for outcome in outcomes:
            outcome.row.ended = True
            taken = outcome.row.completed or outcome.row.lost or outcome.row in lost
            if outcome.is_death and not taken:
                _say_dead(outcome)
        unsure = {outcome.row for outcome in outcomes if outcome.unsure}
        self.tell_lost([row for row in lost if row not in unsure])
        if any(outcome.row.key is not None for outcome in outcomes):
            self.wake()  # the next row of the key may run
        return True

    def _write_down(self, outcomes: Iterable[Outcome], connection: Connection) -> list[Row]:
        """Write the outcomes in one transaction; return the rows that another process has now."""
        owner, store = self.lease.owner, self.store
        outcomes = [each for each in outcomes if not (each.row.completed or each.row.lost)]
        done = [each.row for each in outcomes if each.is_success]
        written = store.complete(connection, owner, [(row.id, row.attempt) for row in done])
        lost = [row for row in done if row.id not in written]
        unused = [each.row.id for each in outcomes if each.unused]
        if unused:
            store.give_back(connection, owner, unused)
        for each in outcomes:
            if each.error is None:
                continue
            ending = (connection, owner, each.row.id, each.row.attempt, each.error)
            if not (
                store.unreadable(*ending) if each.unreadable else store.fail(*ending, each.pause)
            ):
                lost.append(each.row)
        return lost

    def tell_lost(self, rows: Sequence[Row]) -> None:
        """Count rows that another process has taken over, and log a warning for each."""
        self.lost += len(rows)
        for row in rows:
            log(
                logging.WARNING,
                "the lease of a delivery was lost before its outcome was written: another process "
                "has taken over the delivery, so it may run twice",
                handler=row.handler,
                delivery_id=str(row.id),
            )

    # Relays

    def enter(self, relay: Looking) -> None:
        """Note that a relay has started on this event loop."""
        self._relays.setdefault(current_loop(), []).append(relay)

    async def leave(self, relay: Looking) -> None:
        """End a relay: write all outcomes, and give back the rows that do not run here.

        A handler in a thread cannot be stopped. Its row stays leased until the lease of the process
        expires.
        """
        for loop, relays in [*self._relays.items()]:
            if relay in relays:
                relays.remove(relay)
                if not relays:
                    del self._relays[loop]
        await self.settle()
        await checkpoint()  # raises if the time is over
        await self.settle()  # outcomes that another task failed to write
        if not self._relays and (self.relays or self.lease.is_valid):
            await self._say_farewell()

    async def leave_if_idle(self) -> None:
        """End the lease also after `run_due`, if no relay and no row is left in this process."""
        if not self._relays and not self._running and not self._known_ids():
            await self._say_farewell()

    async def _say_farewell(self) -> None:
        """Give back all rows but the running ones, and end the lease."""
        running = [row.id for row in [*self._running]]  # copied in one step, as above
        farewell = partial(self.store.farewell, owner=self.lease.owner, but=running)
        await to_thread.run_sync(self.lease.stop)  # it blocks until a running heartbeat has ended
        try:
            given_back = await self.database.run(farewell)
        except Exception as error:  # noqa: BLE001 - as above
            self.complain(
                "deliveries could not be given back, and wait until the lease ends", error
            )
        else:
            self.given_back += given_back
            if given_back:
                log(
                    logging.INFO,
                    "deliveries were given back to the table",
                    bus=self._state.name,
                    deliveries=given_back,
                )
        if self.closed:
            await to_thread.run_sync(self.database.close)

    def close(self) -> None:
        """Stop claiming rows, and end the lease and the connections. Thread-safe."""
        self.closed = True
        self.wake()
        self.lease.stop()
        self.database.close()

    @property
    def looking(self) -> list[Looking]:
        """The relays of this process."""
        return [relay for relays in [*self._relays.values()] for relay in relays]

    def wake(self) -> None:
        """Let the relays of this process read the table now."""
        for relay in self.looking:
            relay.wake()

    def place_tables(self) -> None:
        """Find the schema of the tables, before the first write in a user's transaction.

        That transaction may have another search_path. So the schema is looked up once, on the
        outbox's own connection; a relay does it at its start. With `relay=False` there is no such
        connection, so the user should pass `schema=`.
        """
        if self.relays and not self.store.is_placed:
            self.database.call(self.store.place, writes=False)

    async def check(self) -> None:
        """Check that the tables exist, with all columns.

        Raises:
            OutboxSchemaError: The error names the missing table or column, and the remedy.
        """
        problem = await self.database.run(self.store.problem, writes=False)
        if problem is not None:
            raise OutboxSchemaError(problem)

    def complain(self, text: str, error: BaseException) -> None:
        """Log an error of the database as a warning, at most once per minute."""
        now = self.lease.now()
        if now - self._complained_at >= _SECONDS_BETWEEN_COMPLAINTS:
            self._complained_at = now
            log(logging.WARNING, text, error=error, bus=self._state.name)


def _when_to_give_up() -> float:
    """Return the deadline of a write, by the event loop's clock.

    A shield hides the deadlines around it. Without a deadline of its own, the write would wait
    forever for a server that is cut off.
    """
    latest, around = current_time() + _SECONDS_TO_WRITE, current_effective_deadline()
    return latest if around == -math.inf else min(latest, around)  # -inf: cancelled; still write


# All instances of the process, for `_after_fork_in_child`.
_in_this_process: WeakSet[Holdings] = WeakSet()


def _after_fork_in_child() -> None:
    for holdings in [*_in_this_process]:
        holdings.forget()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has none
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _doubt(outcomes: Sequence[Outcome]) -> None:
    """Note that these outcomes may be in the table already."""
    for outcome in outcomes:
        outcome.unsure = True


def _say_dead(outcome: Outcome) -> None:
    log(
        logging.ERROR,
        "a delivery is dead: it has no attempts left, or `backoff` returned None. "
        "`eventkit outbox retry module:outbox ID` tries it again",
        handler=outcome.row.handler,
        delivery_id=str(outcome.row.id),
        attempt=outcome.row.attempt,
        failed_with=outcome.error,
    )
