"""Owns the rows that a relay has claimed: how many rows wait, and which one runs next.

Knows nothing of when to read the table. Claimed rows wait in memory. A few units of work are *fed*:
each takes the next row whenever it is free. So no row needs a task of its own, and no row waits
behind a slow one.

A *suspect* is a row whose process died in its second attempt or later. The row may have caused
this, so it runs while no other row runs here, if possible.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import cache, partial
from itertools import count

from anyio import current_time
from sqlalchemy import Connection

from eventkit._core.ambient import NOTHING_CARRIED, carried
from eventkit._core.dispatch import Turn
from eventkit._core.durable import Durable
from eventkit._core.log import log
from eventkit._core.loops.running import current_loop
from eventkit._core.state import BusState
from eventkit._core.units import Ending, Unit, next_number
from eventkit.outbox._catalog import Found
from eventkit.outbox._holdings import Holdings
from eventkit.outbox._rows import EventRows, Headers, Outcome, Row, StoredEnvelope, describe
from eventkit.outbox._store import Claimed

_MOST_HELD = 500
_PATIENCE = 5.0  # seconds that a suspect waits for a moment without other rows
_PACE = 2.0  # seconds; a relay holds as many rows as have ended within this time

_UNKNOWN = Durable()  # for a handler that was removed after its row was claimed


class Stock:
    """Claimed rows that have not begun, and the number of running rows of each handler.

    While rows of several handlers wait, one handler may use at most half of the concurrency.
    """

    def __init__(self, concurrency: int) -> None:
        self._most_of_one = max(1, concurrency // 2)
        self._waiting: dict[str, deque[tuple[int, StoredEnvelope]]] = {}  # by handler
        self._running: Counter[str] = Counter()
        self._numbers = count()

    @property
    def waiting(self) -> int:
        """The number of rows that have not begun."""
        return sum(map(len, self._waiting.values()))

    def held(self) -> Counter[str]:
        """Return the number of waiting and running rows of each handler."""
        waiting = Counter({name: len(rows) for name, rows in self._waiting.items()})
        return waiting + self._running

    def add(self, envelope: StoredEnvelope) -> None:
        """Add a row that waits."""
        rows = self._waiting.setdefault(envelope.claimed.handler, deque())
        rows.append((next(self._numbers), envelope))

    def take(self) -> StoredEnvelope | None:
        """Take the oldest row of a handler that may run more; None if there is no such row."""
        heads = [(rows[0][0], name) for name, rows in self._waiting.items()]
        allowed = [each for each in heads if self._running[each[1]] < self._most_of_one]
        if len(heads) == 1:  # no other handler waits
            allowed = heads
        if not allowed:
            return None
        _, name = min(allowed)
        rows = self._waiting[name]
        _, envelope = rows.popleft()
        if not rows:
            del self._waiting[name]
        self._running[name] += 1
        return envelope

    def end(self, handler: str) -> None:
        """Note that a taken row has ended."""
        self._running[handler] -= 1
        if not self._running[handler]:
            del self._running[handler]

    def clear(self) -> None:
        """Drop all waiting rows. The lease gives them back."""
        self._waiting.clear()


class RowSource:
    """Claims rows, decodes their events, and adds them to its stock.

    A source belongs to one event loop. Rows run with a copy of the context variables from the
    moment at which the source was made.

    Args:
        holdings: The holdings of this process.
        state: The state of the bus.
        concurrency: The number of rows that run at once.
        ended: Called when a row has ended.
    """

    def __init__(
        self, holdings: Holdings, state: BusState, concurrency: int, ended: Callable[[], None]
    ) -> None:
        self.stock = Stock(concurrency)
        self.concurrency = concurrency
        self._holdings = holdings
        self._state = state
        self._tell_ended = ended
        self._variables = copy_context()
        # A row gets the carried headers of its own publish, and none of the relay.
        self._variables.run(carried.set, NOTHING_CARRIED)
        # The last time without rows here, or at which a suspect was claimed.
        self._busy_since = current_time()
        self._ended: deque[float] = deque()  # the times at which rows ended, within `_PACE`
        # The running suspect, until its outcome is written or its object is freed.
        self._suspect: weakref.ref[Row] | None = None

    def end(self, handler: str) -> None:
        """Note that a row has ended."""
        self.stock.end(handler)
        self._ended.append(current_time())
        self._tell_ended()

    def most_held(self) -> int:
        """Return the maximum of held rows: the number that has ended lately, within limits."""
        while self._ended and self._ended[0] < current_time() - _PACE:
            self._ended.popleft()
        return min(max(len(self._ended), self.concurrency), _MOST_HELD)

    async def claim(self, within: float = 0.0) -> int:
        """Claim due rows, as far as there is room; return the number of claimed rows.

        A *busy* handler has at least half of the rows that may be held. It gets no more rows while
        others wait. Its rows do not count, so that there is room for rows of other handlers.

        A suspect is claimed when no other row is held, or after some seconds without such a moment.
        The next suspect is claimed after the outcome of this one is written.

        Args:
            within: Seconds. Also claim rows that are due within this time.
        """
        holdings, most, held = self._holdings, self.most_held(), self.stock.held()
        busy = [name for name, number in held.items() if number * 2 >= max(most, 2)]
        room = most - sum(number for name, number in held.items() if name not in busy)
        if room <= 0:
            return 0
        await holdings.hold_lease()
        term = holdings.lease.term  # before the claim: the process may be stopped during it
        owner, known = holdings.lease.owner, holdings.catalog.known()
        claim = partial(holdings.store.claim, owner=owner, known=known, within=within)
        claimed = await self._claim(partial(claim, limit=room, busy=busy), term)
        rest = most - held.total() - claimed
        if busy and rest > 0:  # no other handler waits
            claimed += await self._claim(partial(claim, limit=rest), term)
        if not held:
            self._busy_since = current_time()
        alone = not held and not claimed
        if not self._suspect_runs and (alone or current_time() - self._busy_since >= _PATIENCE):
            self._busy_since = current_time()
            one = partial(holdings.store.claim_suspect, owner=owner, known=known)
            claimed += await self._claim(
                lambda connection: [*filter(None, [one(connection)])], term
            )
        return claimed

    def suspect_is_done(self) -> bool:
        """Return True once after a suspect: its outcome is written, or its object is freed."""
        if self._suspect is None or self._suspect_runs:
            return False
        self._suspect = None
        return True

    @property
    def _suspect_runs(self) -> bool:
        suspect = None if self._suspect is None else self._suspect()
        return suspect is not None and not suspect.ended

    async def _claim(
        self, claim: Callable[[Connection], Sequence[Claimed]], term: object | None
    ) -> int:
        """Claim rows, and add them to the stock; return the number of rows.

        The rows are made known inside the transaction. Later is too late: the event loop may be
        blocked, and the lease gives back rows that this process does not know for some time.
        """

        def claim_and_know(connection: Connection) -> list[tuple[Claimed, Row]]:
            return [(each, self._row_of(each, term)) for each in claim(connection)]

        rows = await self._holdings.database.run(claim_and_know)
        self._receive(rows)
        return len(rows)

    def _row_of(self, claimed: Claimed, term: object | None) -> Row:
        row = Row(claimed.id, claimed.handler, _UNKNOWN, claimed.key, claimed.attempt)
        row.leased, row.term = True, term
        self._holdings.know(row)
        return row

    def _receive(self, rows: Sequence[tuple[Claimed, Row]]) -> None:
        """Add rows to the stock. Write the outcome of a row that cannot run here."""
        find = cache(self._holdings.catalog.find)  # most rows belong to a few handlers
        for claimed, row in rows:
            if claimed.suspect:
                self._suspect = weakref.ref(row)
            try:
                self._admit(claimed, row, find)
            except Exception as error:  # noqa: BLE001 - functions in `formerly` are user code
                self._complain(claimed, error)
                self._holdings.hear(Outcome(row, describe(error), unreadable=True))

    def _admit(self, claimed: Claimed, row: Row, find: Callable[[str, str], Found | None]) -> None:
        holdings = self._holdings
        found = find(claimed.handler, claimed.event_type)
        if found is None:
            reason = "this process has no handler with this name for these events"
            holdings.hear(Outcome(row, reason, unreadable=True))
            return
        row.durable = found.subscription.durable or _UNKNOWN
        if claimed.attempt > row.durable.attempts:
            holdings.hear(Outcome(row, "its process ended during the last attempt"))
            return
        event = found.codec.decode(claimed.payload, claimed.event_type)
        variables = self._variables.copy()
        headers = Headers.load(claimed.headers) if claimed.headers else Headers({})
        variables.run(headers.restore, self._state.observers.restored)
        row.handler = found.subscription.name  # the row may have a former name of the handler
        rows = EventRows(holdings, {0: row}, None, None)
        received, number = headers.received, next_number()
        self.stock.add(
            StoredEnvelope(claimed, event, found.plan, variables, number, rows, received)
        )

    def _complain(self, claimed: Claimed, error: Exception) -> None:
        log(
            logging.ERROR,
            "a stored delivery cannot be read here, and is tried again in ten minutes",
            handler=claimed.handler,
            event_type=claimed.event_type,
            delivery_id=str(claimed.id),
            failed_with=describe(error),
        )


class Fed(Ending):
    """A unit of work that takes the next row whenever it has nothing left to deliver."""

    __slots__ = ("_over", "_source", "_taken")

    is_beside = True

    def __init__(
        self, state: BusState, source: RowSource, origin: object, over: Callable[[Fed], object]
    ) -> None:
        unit = Unit(state)
        unit.queue.open(None)
        unit.origin, unit.loop = origin, current_loop()
        super().__init__(unit, True, unit.loop)
        self._source = source
        self._over = over
        self._taken: StoredEnvelope | None = None

    def next_turn(self) -> Turn | None:
        """End the current event, and return the next turn. If there is none, take the next row."""
        unit = self.unit
        while (turn := unit.next_turn()) is None:
            self._let_go()
            self._taken = self._source.stock.take()
            if self._taken is None:
                return super().next_turn()
            (subscription,) = self._taken.plan
            if not subscription.active:  # the subscription was cancelled after the claim
                self._taken.plan.valid = False
            unit.queue.feed(self._taken)
        return turn

    def end(self) -> None:
        """End the current event, and close the unit."""
        super().end()
        self._let_go()
        self._over(self)

    def _let_go(self) -> None:
        """End the taken row. All events that it has caused have ended, too."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._source.end(taken.claimed.handler)
