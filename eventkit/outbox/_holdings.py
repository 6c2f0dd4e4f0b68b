"""Owns what one process holds of the table: its lease, its rows, and outcomes not yet written.

Knows nothing of users' transactions, and not when somebody looks into the table.
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
_GLANCE = 0.005  # seconds between two looks whether another task has written
_SECONDS_TO_WRITE = 5.0
_SECONDS_BETWEEN_COMPLAINTS = 60.0


class Looking(Protocol):
    """A relay, as far as it is known here."""

    @property
    def is_looking(self) -> bool:
        """Whether it has looked into the table lately."""
        ...

    def wake(self) -> None:
        """Look into the table now. Thread-safe."""

    def hear(self) -> None:
        """An outcome waits to be written. On its event loop alone."""

    def expect(self, seconds: float | None) -> None:
        """A row is due in so many seconds; None where none is. Thread-safe."""


class Holdings:
    """What one process holds of the table. Thread-safe.

    Attributes:
        catalog: What can be run here.
        database: The connections.
        store: The statements.
        lease: Who this process is, and whether it may run rows.
        relays: Whether rows run in this process at all.
        slows_down: Whether its relays look less often while they find nothing.
        patience: Seconds that deliveries may go on at shutdown; None where the application says so.
        lost: How many leases were lost before the outcome was written.
        closed: Whether the outbox is detached, so that nothing is claimed any more.
        given_back: How many rows were given back: cancelled, or not begun as relays ended.
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
        # By id; events hold their rows, and whatever drops an event frees them.
        self._rows: WeakValueDictionary[UUID, Row] = WeakValueDictionary()
        self._running: set[Row] = set()
        self._outcomes: deque[Outcome] = deque()
        self._flushes: set[object] = set()  # those that are on their way
        self._relays: dict[object, list[Looking]] = {}  # by event loop
        self._complained_at = -math.inf
        self.lease = Lease(database, store, seconds, self._known_ids)
        _in_this_process.add(self)

    def forget(self) -> None:
        """Hold nothing: this is a forked child, and all of it is its parent's."""
        self._rows = WeakValueDictionary()
        self._running, self._flushes = set(), set()
        self._outcomes, self._relays = deque(), {}

    def become_relay(self) -> None:
        """Have this process run rows, whatever was said before: it does nothing else."""
        self.relays, self.slows_down = True, False

    # Rows

    def term(self) -> object | None:
        """The term of the lease, whose rows this process may run; None if it has no lease."""
        return self.lease.term

    def know(self, row: Row) -> None:
        """Somebody here has the row, for as long as the object lives."""
        self._rows[row.id] = row

    def disown(self, row: Row) -> None:
        """Nobody here has the row, even if objects still refer to it: the lease returns it."""
        self._rows.pop(row.id, None)

    def row_of(self, delivery_id: UUID) -> Row | None:
        """The row of a delivery that runs here; None where it has none."""
        return self._rows.get(delivery_id)

    def _known_ids(self) -> Collection[UUID]:
        """Those that somebody here has; the lease gives back the others."""
        # Copied in one step: to go through it fails where another thread adds a row meanwhile.
        return {row.id for ref in self._rows.valuerefs() if (row := ref()) is not None}

    async def hold_lease(self) -> None:
        """Have this process be alive for the others, before it claims rows."""
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
        """A run of a row's handler has begun. Thread-safe."""
        self._running.add(row)

    def runs(self, row: Row) -> bool:
        """Whether its handler runs now."""
        return row in self._running

    def hear(self, outcome: Outcome) -> None:
        """A run of a row has ended: it is written down soon."""
        self._running.discard(outcome.row)
        self._outcomes.append(outcome)
        for relay in self._relays.get(current_loop(), ())[-1:] if on_event_loop() else ():
            relay.hear()

    async def settle(self) -> None:
        """Write down what has become of deliveries, within five seconds. Is not cancelled."""
        if self._outcomes or self._flushes:
            try:
                await self._settle()
            except get_cancelled_exc_class():  # `Task.cancel()` knows no shields
                await self._settle()
                raise

    async def _settle(self) -> None:
        with move_on_after(_SECONDS_TO_WRITE, shield=True):
            while not await self.flush():  # noqa: ASYNC110 - a database tells nobody
                await sleep(PAUSE_AFTER_ERROR)
            others = {*self._flushes}
            while others & self._flushes:  # noqa: ASYNC110 - they may be on other event loops
                await sleep(_GLANCE)

    async def flush(self) -> bool:
        """Write down the outcomes that there are; False where the database would not have it."""
        outcomes: list[Outcome] = []
        flush = object()
        self._flushes.add(flush)
        try:
            with suppress(IndexError):  # another thread may take the last one
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
            if scope.cancelled_caught:  # it goes on by itself, and nobody knows how it ends
                _doubt(outcomes)
                raise TimeoutError("the database does not answer")
        except Exception as error:  # noqa: BLE001 - of a database, or of its driver
            self._outcomes.extendleft(reversed(outcomes))
            self.complain("outcomes of deliveries could not be written down, and wait", error)
            return False
        except BaseException:  # `Task.cancel()` knows no shields
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
            self.wake()  # the next one of the key may run
        return True

    def _write_down(self, outcomes: Iterable[Outcome], connection: Connection) -> list[Row]:
        """Write all of them in one transaction; returns the rows whose lease was lost before."""
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
        """Count and warn of rows that another process was given meanwhile."""
        self.lost += len(rows)
        for row in rows:
            log(
                logging.WARNING,
                "the lease of a delivery was lost before its outcome was written: another process "
                "has been given it, and it may run twice",
                handler=row.handler,
                delivery_id=str(row.id),
            )

    # Relays

    def enter(self, relay: Looking) -> None:
        """A relay has begun on the event loop that calls."""
        self._relays.setdefault(current_loop(), []).append(relay)

    async def leave(self, relay: Looking) -> None:
        """A relay has ended: write down all outcomes, and give back what nobody runs here.

        Rows whose handler is a thread that could not be stopped stay leased, and lapse with the
        process.
        """
        for loop, relays in [*self._relays.items()]:
            if relay in relays:
                relays.remove(relay)
                if not relays:
                    del self._relays[loop]
        await self.settle()
        await checkpoint()  # no further, if the time is over
        await self.settle()  # what another task was writing, and could not
        if not self._relays and (self.relays or self.lease.is_valid):
            await self._say_farewell()

    async def leave_if_idle(self) -> None:
        """Say farewell, too, where rows were run without a relay, and nobody here has one."""
        if not self._relays and not self._running and not self._known_ids():
            await self._say_farewell()

    async def _say_farewell(self) -> None:
        # Copied in one step, as above.
        running = [row.id for row in [*self._running]]
        farewell = partial(self.store.farewell, owner=self.lease.owner, but=running)
        await to_thread.run_sync(self.lease.stop)  # which waits for a heartbeat on its way
        try:
            given_back = await self.database.run(farewell)
        except Exception as error:  # noqa: BLE001 - as above; what it has leased lapses
            self.complain("deliveries could not be given back, and lapse", error)
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
        """Claim nothing any more, and end the lease and the connections. Thread-safe."""
        self.closed = True
        self.wake()
        self.lease.stop()
        self.database.close()

    @property
    def looking(self) -> list[Looking]:
        """The relays of this process."""
        return [relay for relays in [*self._relays.values()] for relay in relays]

    def wake(self) -> None:
        """Have the relays of this process look into the table now."""
        for relay in self.looking:
            relay.wake()

    def place_tables(self) -> None:
        """Know in which schema the tables are, before a user's transaction could change the way.

        It is looked up once, on a connection of the outbox's own. A relay has done so at its start.
        A process that only writes has no such connection: there `schema=` says it.
        """
        if self.relays and not self.store.is_placed:
            self.database.call(self.store.place, writes=False)

    async def check(self) -> None:
        """Refuse tables that are missing, or of another version.

        Raises:
            OutboxSchemaError: Naming what is missing, and the way to make it.
        """
        problem = await self.database.run(self.store.problem, writes=False)
        if problem is not None:
            raise OutboxSchemaError(problem)

    def complain(self, text: str, error: BaseException) -> None:
        """Warn of an error of the database, once per minute."""
        now = self.lease.now()
        if now - self._complained_at >= _SECONDS_BETWEEN_COMPLAINTS:
            self._complained_at = now
            log(logging.WARNING, text, error=error, bus=self._state.name)


def _when_to_give_up() -> float:
    """The moment from which on a write is not waited for, by the event loop's clock.

    A shield hides the deadlines around it, and a server that is cut off answers never.
    """
    latest, around = current_time() + _SECONDS_TO_WRITE, current_effective_deadline()
    return latest if around == -math.inf else min(latest, around)  # cancelled: it is written still


# All of the process, for a child that is forked.
_in_this_process: WeakSet[Holdings] = WeakSet()


def _after_fork_in_child() -> None:
    for holdings in [*_in_this_process]:
        holdings.forget()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has none
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _doubt(outcomes: Sequence[Outcome]) -> None:
    """Note that they may be written already."""
    for outcome in outcomes:
        outcome.unsure = True


def _say_dead(outcome: Outcome) -> None:
    log(
        logging.ERROR,
        "a delivery is dead: its attempts are used up, or it was given up. "
        "`eventkit outbox retry module:outbox ID` tries it again",
        handler=outcome.row.handler,
        delivery_id=str(outcome.row.id),
        attempt=outcome.row.attempt,
        failed_with=outcome.error,
    )
