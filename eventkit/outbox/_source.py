"""Owns the rows that a process has claimed: how many it holds, and which one is run next.

Knows nothing of when to look into the table. Claimed rows wait in memory. A few units of work are
*fed*: each takes the next row whenever it is free. So no row has a task of its own, and none waits
behind a slow one.
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
_PATIENCE = 5.0  # seconds that a suspect waits to run alone
_PACE = 2.0  # seconds: as many rows are held as have ended in so many

_UNKNOWN = Durable()  # of a handler that has gone since its row was claimed


class Stock:
    """Rows that are claimed and have not begun, and how many of each handler run.

    While others wait, one handler has at most half of the places.
    """

    def __init__(self, concurrency: int) -> None:
        self._most_of_one = max(1, concurrency // 2)
        self._waiting: dict[str, deque[tuple[int, StoredEnvelope]]] = {}  # by handler
        self._running: Counter[str] = Counter()
        self._numbers = count()

    @property
    def waiting(self) -> int:
        """How many have not begun."""
        return sum(map(len, self._waiting.values()))

    def held(self) -> Counter[str]:
        """How many rows each handler has here, waiting or running."""
        waiting = Counter({name: len(rows) for name, rows in self._waiting.items()})
        return waiting + self._running

    def add(self, envelope: StoredEnvelope) -> None:
        """It waits from now on."""
        rows = self._waiting.setdefault(envelope.claimed.handler, deque())
        rows.append((next(self._numbers), envelope))

    def take(self) -> StoredEnvelope | None:
        """The next one to run: the one that came first, of a handler that has room."""
        heads = [(rows[0][0], name) for name, rows in self._waiting.items()]
        allowed = [each for each in heads if self._running[each[1]] < self._most_of_one]
        if len(heads) == 1:  # nobody else waits
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
        """A row that was taken has ended."""
        self._running[handler] -= 1
        if not self._running[handler]:
            del self._running[handler]

    def clear(self) -> None:
        """Drop what waits: the lease gives it back."""
        self._waiting.clear()


class RowSource:
    """Claims rows, makes events of them, and gives them one by one to those who run them.

    Belongs to the event loop on which it was made. Rows run in the context variables of that
    moment.

    Args:
        holdings: What this process holds of the table.
        state: Of the bus.
        concurrency: How many run at once.
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
        self._variables.run(carried.set, NOTHING_CARRIED)  # who runs rows has not caused them
        self._busy_since = current_time()  # when nothing was held the last time, or a suspect came
        self._ended: deque[float] = deque()  # when rows have ended, within the pace
        # The one that runs, until its outcome is written or nobody has it any more.
        self._suspect: weakref.ref[Row] | None = None

    def end(self, handler: str) -> None:
        """A row has ended."""
        self.stock.end(handler)
        self._ended.append(current_time())
        self._tell_ended()

    def most_held(self) -> int:
        """How many rows may be held: as many as ended lately, within limits."""
        while self._ended and self._ended[0] < current_time() - _PACE:
            self._ended.popleft()
        return min(max(len(self._ended), self.concurrency), _MOST_HELD)

    async def claim(self, within: float = 0.0) -> int:
        """Claim what is due, as far as there is room; returns how many rows.

        A handler that holds half of the rows is given no more, and does not count: rows of others
        find room beside it. A row whose process has died repeatedly is claimed once nothing else
        is held, or after some seconds in which that was never so; the next one when its outcome
        is written.

        Args:
            within: Also what is due in so many seconds.
        """
        holdings, most, held = self._holdings, self.most_held(), self.stock.held()
        busy = [name for name, number in held.items() if number * 2 >= max(most, 2)]
        room = most - sum(number for name, number in held.items() if name not in busy)
        if room <= 0:
            return 0
        await holdings.hold_lease()
        term = holdings.lease.term  # before: the process may stand still after it has claimed
        owner, known = holdings.lease.owner, holdings.catalog.known()
        claim = partial(holdings.store.claim, owner=owner, known=known, within=within)
        claimed = await self._claim(partial(claim, limit=room, busy=busy), term)
        rest = most - held.total() - claimed
        if busy and rest > 0:  # nobody else waits
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
        """Whether there was a suspect whose outcome is written now, or which nobody has."""
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
        """Claim rows, and have them wait for their run; returns how many.

        They are known before the transaction is over: this event loop may be blocked for longer
        than the lease waits before it gives back what nobody knows.
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
        """Have them wait for their run, or write down at once why not."""
        find = cache(self._holdings.catalog.find)  # most of them are of few handlers
        for claimed, row in rows:
            if claimed.suspect:
                self._suspect = weakref.ref(row)
            try:
                self._admit(claimed, row, find)
            except Exception as error:  # noqa: BLE001 - also of the user's functions in `formerly`
                self._complain(claimed, error)
                self._holdings.hear(Outcome(row, describe(error), unreadable=True))

    def _admit(self, claimed: Claimed, row: Row, find: Callable[[str, str], Found | None]) -> None:
        holdings = self._holdings
        found = find(claimed.handler, claimed.event_type)
        if found is None:
            reason = "no handler of this name takes such events here"
            holdings.hear(Outcome(row, reason, unreadable=True))
            return
        row.durable = found.subscription.durable or _UNKNOWN
        if claimed.attempt > row.durable.attempts:
            holdings.hear(Outcome(row, "its process ended, each time"))
            return
        event = found.codec.decode(claimed.payload, claimed.event_type)
        variables = self._variables.copy()
        headers = Headers.load(claimed.headers) if claimed.headers else Headers({})
        variables.run(headers.restore, self._state.observers.restored)
        row.handler = found.subscription.name  # which may have been another one at the publish
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
        """End the event at hand, and give the next one, also of the next row."""
        unit = self.unit
        while (turn := unit.next_turn()) is None:
            self._let_go()
            self._taken = self._source.stock.take()
            if self._taken is None:
                return super().next_turn()
            (subscription,) = self._taken.plan
            if not subscription.active:  # it was cancelled after the claim
                self._taken.plan.valid = False
            unit.queue.feed(self._taken)
        return turn

    def end(self) -> None:
        """End the event at hand, and close."""
        super().end()
        self._let_go()
        self._over(self)

    def _let_go(self) -> None:
        """The row that was taken has ended, with all that it has caused."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._source.end(taken.claimed.handler)
