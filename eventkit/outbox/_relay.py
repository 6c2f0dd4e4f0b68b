"""Owns when a process reads the table for due rows, and when it writes the outcomes of deliveries.

Knows nothing of users' transactions. One relay belongs to one event loop. To *look* is to read the
table once for due rows and for processes whose lease is over.

| state | looks and claims | begins rows | writes outcomes | ended by |
|---|---|---|---|---|
| running | yes | yes | yes | `stop` |
| stopped | no | no | yes | `leave` |
| left | no | no | no | |
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from anyio import (
    CancelScope,
    Event,
    create_task_group,
    move_on_after,
    sleep,
    sleep_forever,
    to_thread,
)
from anyio.abc import TaskGroup

from eventkit._core.ambient import current, origin
from eventkit._core.awaited import run_all
from eventkit._core.drainer import Drainer
from eventkit._core.events import Delivery
from eventkit._core.log import log
from eventkit._core.loops.running import current_loop, on_trio
from eventkit._core.loops.tasks import tasks_here
from eventkit._core.loops.threads import Entrance
from eventkit._core.state import BusState, Host
from eventkit._core.turns import DrainReport, Failure
from eventkit.exceptions import OutboxSchemaError
from eventkit.outbox._holdings import PAUSE_AFTER_ERROR, Holdings
from eventkit.outbox._source import Fed, RowSource

_AWAY = "the outbox cannot reach its database"
POLL = 0.5  # seconds between two looks, while rows are found
# Seconds. With the spread it stays below 2 s, the documented limit for a takeover after a lease.
_SLOWEST_POLL = 1.6
_SPREAD = 0.2  # so that processes do not look at the same moments
_GATHERING = 0.005  # seconds to collect outcomes, so that one transaction writes several
_SECOND_LOOK = 0.25  # seconds; a process that waits for SQLite's lock tries each 0.1 s
_ROUND = 60.0  # seconds between two looks for rows without an owner or without a handler
_SECONDS_TO_FORGET = 7 * 86400.0  # a message that comes again later counts as new
_FORGET_EVERY = 3600.0  # seconds
_FORGET_AT_ONCE = 5000  # messages
_SECONDS_TO_LEAVE = 5.0
_SECONDS_TO_LOOK = 2.0  # the part of `_SECONDS_TO_LEAVE` for a running look


class Relay:
    """Runs due rows on the event loop that has made the relay. Implements the core's `Service`.

    Args:
        holdings: The holdings of this process.
        state: The state of the bus.
        host: Runs the units of work that take the rows.
        tasks: The task group for the relay's own tasks.
        concurrency: The number of rows that run at once.
    """

    def __init__(
        self,
        holdings: Holdings,
        state: BusState,
        host: Host,
        tasks: TaskGroup,
        concurrency: int,
    ) -> None:
        self._holdings = holdings
        self._state = state
        self._host = host
        self._tasks = tasks
        self._source = RowSource(holdings, state, concurrency, self._row_ended)
        self._fed: set[Fed] = set()
        self._wanted = Event()  # set: look now
        self._heard = Event()  # set: an outcome waits to be written
        self._stopped = False
        self._left = False
        self._entered = False
        self._examined = False  # whether the tables were checked
        self._looking = False
        self._over = Event()  # set: there is no further look
        self._scope = CancelScope()
        self._poll = POLL
        self._due_at = math.inf  # the time of the next attempt of a row that failed here
        self._looked_at = self._round_at = self._swept_at = self._forgot_at = -math.inf
        # Processes whose lease was over at the last look.
        self._lapsed: frozenset[str] = frozenset()
        self._told_of: frozenset[str] = frozenset()  # processes that were logged as ended
        self._looks_twice = False  # whether `_lapsed` needs a second look, soon
        self._unknown: set[tuple[str, str]] = set()  # handlers and types that were logged
        self._call_soon = tasks_here("eventkit relay").call_soon

    @property
    def is_looking(self) -> bool:
        """Whether the relay has looked within the last three polls."""
        return not self._stopped and self._holdings.lease.now() - self._looked_at <= 3 * self._poll

    @property
    def patience(self) -> float | None:
        """Seconds that deliveries may still run at shutdown. None: as the application says."""
        return self._holdings.patience

    async def start(self) -> None:
        """Start the relay's tasks.

        Raises:
            OutboxSchemaError: The tables are missing, or have another version.
            RuntimeError: The engine is an `AsyncEngine`, and the event loop is trio.
        """
        holdings = self._holdings
        if holdings.database.is_in_memory:
            return
        self._examined = await examine(holdings)
        if not holdings.relays:
            await to_thread.run_sync(holdings.database.close)  # no connection is needed any more
        holdings.enter(self)
        self._entered = True
        self._tasks.start_soon(self._work)

    async def _work(self) -> None:
        with self._scope:
            async with create_task_group() as tasks:
                tasks.start_soon(self._write)
                if self._holdings.relays:
                    self._holdings.lease.start()
                    await self._look_again_and_again()

    def wake(self) -> None:
        """Look now. Thread-safe."""
        with suppress(RuntimeError):  # the event loop has ended
            self._call_soon(self._look_now)

    def _look_now(self) -> None:
        self._wanted.set()
        self._heard.set()  # also write outcomes that a cancelled task has put back

    def expect(self, seconds: float | None) -> None:
        """Look again after `seconds`; None: no further look. Thread-safe."""
        if seconds is not None and seconds < self._poll:
            self._due_at = min(self._due_at, self._holdings.lease.now() + seconds)
            self.wake()

    def hear(self) -> None:
        """Write the waiting outcomes soon. To be called on the relay's event loop only."""
        self._heard.set()

    def stop(self) -> None:
        """Claim no more rows, and begin no more rows."""
        self._stopped = True
        self._source.stock.clear()
        self._wanted.set()

    async def leave(self) -> None:
        """Write all outcomes, and give back rows that did not run. Takes at most five seconds."""
        self.stop()
        if self._left:
            return
        self._left = True
        if not self._entered:
            return
        with move_on_after(_SECONDS_TO_LEAVE, shield=True):
            # Wait for a running look. Else its claim could lease rows after all were given back.
            with move_on_after(_SECONDS_TO_LOOK):
                while self._looking:
                    await self._over.wait()
            self._scope.cancel()
            await self._holdings.leave(self)
        self._scope.cancel()

    # Writing

    async def _write(self) -> None:
        """Write outcomes soon after they arrive, until cancelled."""
        while True:
            await self._heard.wait()
            self._heard = Event()
            await sleep(_GATHERING)
            while not await self._holdings.flush():  # noqa: ASYNC110 - a database sends no event
                await sleep(PAUSE_AFTER_ERROR)
            if self._source.suspect_is_done():
                self._wanted.set()

    # Looking

    async def _look_again_and_again(self) -> None:
        self._looking = True
        try:
            while not self._is_over:
                found = False
                try:
                    found = await self._look()
                    self._looked_at = self._holdings.lease.now()
                    found = await self._forget_messages() or found
                except Exception as error:  # noqa: BLE001 - of a database, or of its driver
                    self._holdings.complain(_AWAY, error)
                idle = not found and self._holdings.slows_down
                self._poll = min(_SLOWEST_POLL, self._poll * 2) if idle else POLL
                with move_on_after(self._pause()):
                    await self._wanted.wait()
                self._wanted = Event()
        finally:
            self._looking = False
            self._over.set()

    @property
    def _is_over(self) -> bool:
        return self._stopped or self._holdings.closed

    def _pause(self) -> float:
        """Return the seconds until the next look. `_wanted` can make it earlier."""
        if self._looks_twice:
            return _SECOND_LOOK
        until_due = max(0.0, self._due_at - self._holdings.lease.now())
        return min(until_due, self._poll * random.uniform(1 - _SPREAD, 1 + _SPREAD))

    async def _look(self) -> bool:
        """Look once, and reap, claim and start rows; return whether there was something to do."""
        holdings, lease = self._holdings, self._holdings.lease
        if not self._examined:  # the database was away at the start
            await holdings.check()
            self._examined = True
        if not lease.is_valid:
            await holdings.hold_lease()
        await self._make_round()
        if self._due_at <= lease.now():
            self._due_at = math.inf
        look = partial(holdings.store.look, owner=lease.owner, known=holdings.catalog.known())
        lapsed, due = await holdings.database.run(look, writes=False)
        found = await self._reap(frozenset(lapsed)) or due
        if found and not self._is_over:
            found = await self._source.claim() > 0
        self._feed()
        return found or bool(lapsed)  # their rows can be reaped soon

    async def _reap(self, lapsed: frozenset[str]) -> bool:
        """Make the rows of dead processes ready for others; return whether there were some.

        While the database is away, no process can renew its lease. So a relay treats others as dead
        only after its own lease has been valid for a whole lease.

        On SQLite the lease of a living process may be over because another process holds the lock
        of the database. So a process counts as dead only after two looks. Before each of them, this
        process renews its own lease, which needs the same lock.
        """
        holdings, lease = self._holdings, self._holdings.lease
        seen, self._lapsed = self._lapsed, frozenset()
        self._looks_twice = False
        if not lapsed or not lease.steady:
            return False
        self._lapsed = lapsed
        if holdings.database.dialect.name == "sqlite":
            await holdings.beat()
            # Others may wait for the lock, too. The second look comes later, so they can renew.
            self._looks_twice = not lapsed <= seen
            lapsed &= seen
        if not lapsed:
            return False
        reap = partial(holdings.store.reap, owner=lease.owner, lapsed=lapsed)
        rows = await holdings.database.run(reap)
        # A process that is frozen in a transaction holds its rows, and is found at each look.
        if not rows and lapsed <= self._told_of:
            return False
        self._told_of = lapsed
        log(
            logging.WARNING if rows else logging.INFO,
            "a process has stopped without ending its lease, and others run its deliveries",
            bus=self._state.name,
            processes=", ".join(sorted(lapsed)),
            deliveries=rows,
        )
        return rows > 0

    async def _make_round(self) -> None:
        """Once per minute, look for rows without a living owner, and for rows without a handler."""
        holdings, now = self._holdings, self._holdings.lease.now()
        if holdings.lease.steady and now - self._swept_at >= _ROUND:
            await holdings.database.run(holdings.store.reap_orphans)
            self._swept_at = now
        if now - self._round_at < _ROUND:
            return
        known = holdings.catalog.known()
        if self._round_at == -math.inf:
            await holdings.database.run(partial(holdings.store.unreadable_due, known=known))
        find = partial(holdings.store.unknown, known=known)
        for handler, event_type, rows in await holdings.database.run(find, writes=False):
            if (handler, event_type) not in self._unknown:
                self._unknown.add((handler, event_type))
                log(
                    logging.WARNING,
                    "stored deliveries wait for a handler that is not known here: run a process "
                    "that includes its router or, for a renamed handler, add this name to its "
                    "`formerly`",
                    handler=handler,
                    event_type=event_type,
                    deliveries=rows,
                    bus=self._state.name,
                )
        self._round_at = now

    async def _forget_messages(self) -> bool:
        """Delete ids of old messages, once per hour; return True if more are left."""
        holdings, now = self._holdings, self._holdings.lease.now()
        if self._is_over or now - self._forgot_at < _FORGET_EVERY:
            return False
        forget = partial(
            holdings.store.forget_messages, older_than=_SECONDS_TO_FORGET, limit=_FORGET_AT_ONCE
        )
        if await holdings.database.run(forget) == _FORGET_AT_ONCE:
            return True
        self._forgot_at = now
        return False

    # Running

    def _feed(self) -> None:
        """Start units of work that take the claimed rows, at most `concurrency` at once."""
        if self._is_over:  # the relay was stopped after the claim: do not begin these rows
            self._source.stock.clear()
        free = self._source.concurrency - len(self._fed)
        for _ in range(min(self._source.stock.waiting, free)):
            fed = Fed(self._state, self._source, self._host.origin, self._fed.discard)
            self._fed.add(fed)
            self._host.begin(fed)

    def _row_ended(self) -> None:
        if self._source.stock.waiting * 2 <= self._source.most_held():
            self._wanted.set()


async def examine(holdings: Holdings) -> bool:
    """Check the tables; return False if the database is away.

    Raises:
        OutboxSchemaError: The tables are missing, or have another version.
        RuntimeError: The engine is an `AsyncEngine`, and the event loop is trio.
        ValueError: The version of the server is too old.
    """
    if holdings.database.is_in_memory:
        return True
    if holdings.database.awaits and on_trio():
        raise RuntimeError(
            "an AsyncEngine works on asyncio only: on trio use a blocking engine, Outbox(bus, "
            "create_engine(...))"
        )
    try:
        await holdings.check()
    except (OutboxSchemaError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001 - the database may come back
        holdings.complain(_AWAY, error)
        return False
    return True


async def run_until_cancelled(
    holdings: Holdings,
    state: BusState,
    concurrency: int,
    shutdown_timeout: float,
    left: Callable[[bool], object] = lambda stuck: None,
) -> None:
    """Run a relay in a process that serves no requests. See `Outbox.run`.

    Args:
        holdings: The holdings of this process.
        state: The state of the bus.
        concurrency: The number of rows that run at once.
        shutdown_timeout: Seconds that running handlers have after the cancellation.
        left: Called after all outcomes are written and all rows are given back. Its argument is
            True if some handlers could not be stopped. Then this function waits for their end.
    """
    holdings.become_relay()
    await examine(holdings)  # here, because a task group would wrap its errors
    over = Event()

    async def relay_until_over() -> None:
        """Run the relay in a shield, because a cancellation would end running handlers at once."""
        with CancelScope(shield=True):
            async with create_task_group() as tasks:
                drainer = Drainer(state, tasks, concurrency=concurrency, max_pending=None)
                host = Host(
                    Entrance(), drainer.submit, None, lambda: drainer.is_crowded, drainer.begin
                )
                relay = Relay(holdings, state, host, tasks, concurrency)
                await relay.start()
                state.add_host(host)
                try:
                    await over.wait()
                finally:
                    relay.stop()
                    await drainer.close(shutdown_timeout)
                    state.remove_host(host)
                    await relay.leave()
                    left(drainer.stuck)

    async with create_task_group() as tasks:
        tasks.start_soon(relay_until_over)
        try:
            await sleep_forever()
        finally:
            over.set()


async def run_due(
    holdings: Holdings, state: BusState, concurrency: int, within: float
) -> DrainReport:
    """Run due rows in this task until none is due. See `Outbox.run_due`."""
    failures: list[Failure] = []

    def report(delivery: Delivery, error: Exception) -> None:
        failures.append(Failure(delivery, error))
        state.report(delivery, error)

    if holdings.database.is_in_memory:  # the outbox stores no rows there
        return DrainReport(0, ())
    await holdings.check()
    source = RowSource(holdings, state, concurrency, lambda: None)
    handled = requeued = 0
    try:
        while await source.claim(within):
            fed = Fed(state, source, _origin_here(state), lambda fed: None)
            try:
                await fed.begin()
                terms = fed.unit.terms(report, state.handler_timeout)
                handled += await run_all(fed.next_turn, terms)
            finally:
                fed.end()
                await holdings.settle()
            requeued += fed.unit.requeued
            del fed  # else it keeps the last row alive
        await holdings.leave_if_idle()
        return DrainReport(handled, tuple(failures), requeued)
    finally:
        source.stock.clear()  # else the traceback of a cancellation keeps the rows leased
        failures.clear()  # else a reference cycle: failures, traceback, frame of `report`


def _origin_here(state: BusState) -> object:
    """Return the application from which handlers get their dependencies; None if there is none.

    The first one found:

    - the application of the current unit of work or lifespan,
    - the application with a lifespan on this event loop. A test client runs the lifespan in a task
      beside the caller.
    """
    unit = current()
    if unit is not None:
        return unit.origin
    loop = current_loop()
    return origin.get() or next(
        (each.origin for each in state.hosts if each.entrance.loop is loop), None
    )
