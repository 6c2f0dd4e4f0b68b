"""Owns the events of one unit of work while they wait: staged, then released, then taken.

It awaits nothing and calls no observer, so it is tested without an event loop. Each method is one
step for all threads, under the lock of the bus's `Tally`. It returns the events that it moved, and
the caller announces them.

| state | `stage` | `take` gives | next state |
|---|---|---|---|
| NEW | refused | nothing | OPEN by `open` |
| OPEN | accepted | released events, the oldest first | CLOSED by each method that says so |
| CLOSED | refused | events that were released before | |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from enum import Enum
from typing import Any, Protocol

from eventkit._core.events import Delivery, Incoming
from eventkit._core.stats import Tally
from eventkit._core.subscriptions import Plan


class Verdict(Enum):
    """The decision about an event that waits."""

    OPEN = "open"  # not decided: its unit of work or its transaction will decide
    EVEN_ON_FAILURE = "even on failure"  # by the publisher: it is delivered in any case
    RELEASED = "released"  # by `release` or a commit: it is delivered in any case
    DISCARDED = "discarded"  # by a transaction: it is dropped


class Rows(Protocol):
    """The rows of an outbox for the durable deliveries of one event.

    Attributes:
        written: Whether the rows are in the table, or in a transaction that is being committed.
    """

    written: bool

    @property
    def observer(self) -> Any:  # Any: an `Observer`, whose module is a layer above
        """The observer of each run of a handler."""
        ...

    def __contains__(self, index: int, /) -> bool:
        """Whether the delivery at this index of the plan has a row that is written."""
        ...

    def elsewhere(self) -> Sequence[int]:
        """The indexes of the deliveries that must not run here now."""
        ...


class Envelope:
    """One published event whose deliveries have not started."""

    __slots__ = (
        "announced",
        "cause",
        "decision",
        "event",
        "incoming",
        "number",
        "plan",
        "published_from",
        "published_ns",
        "rows",
        "variables",
        "verdict",
    )

    def __init__(
        self,
        event: object,
        plan: Plan,
        variables: Context,
        cause: Delivery | None,
        published_ns: int,
        number: int,
        verdict: Verdict,
        published_from: str | None,
        incoming: Incoming | None = None,
    ) -> None:
        self.event: object = event
        self.plan: Plan = plan
        self.variables: Context = variables
        self.cause: Delivery | None = cause
        self.published_ns: int = published_ns
        self.number: int = number
        self.verdict: Verdict = verdict
        self.published_from: str | None = published_from
        self.incoming: Incoming | None = incoming  # the message that it was read from
        self.announced: bool = False  # observers know that it will be delivered
        self.decision: Any = None  # transactions that may decide it; Any: see `transactions`
        self.rows: Rows | None = None  # the rows of its durable deliveries, with an outbox

    def decide(self) -> None:
        """Decide that it is delivered, whatever happens to its unit of work."""
        self.verdict = Verdict.RELEASED
        self.decision = None

    @property
    def waiting(self) -> int:
        """How many deliveries wait to run here."""
        elsewhere = () if self.rows is None else self.rows.elsewhere()
        return len(self.plan) - len(elsewhere)

    def deliveries(self) -> list[Delivery]:
        """All its deliveries."""
        return [self.delivery(index) for index in range(len(self.plan))]

    def delivery(self, index: int) -> Delivery:
        """The delivery to the handler at this index of the plan."""
        return Delivery(
            event=self.event,
            handler=self.plan[index].name,
            cause=self.cause,
            depth=0 if self.cause is None else self.cause.depth + 1,
            attempt=1,
            _published_ns=self.published_ns,
            _number=(self.number, index),
            published_from=self.published_from,
            attempts=1 if self.rows is None else self.plan.attempts(index),
            _incoming=self.incoming,
        )


class Backlog:
    """Counts the events that wait in an outermost unit and in all units inside it.

    All these units share one object.
    """

    events: int = 0  # a default in the class, because an instance is made for every request


class State(Enum):
    """Whether a queue takes events."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


class Refusal(Enum):
    """Why a queue takes no events."""

    CLOSED = "closed"
    FULL = "full"


class EventQueue:
    """The events of one unit of work.

    Attributes:
        state: Whether it takes events.
        backlog: Counts the events that wait here, in units around, and in units inside.
        transactions: Those that take part here and in units inside, in the order of joining.
        staged: The events that are not released.
    """

    __slots__ = ("_released", "_tally", "backlog", "staged", "state", "transactions")

    def __init__(self, tally: Tally) -> None:
        self.state: State = State.NEW
        self.backlog: Backlog = Backlog()
        self.transactions: list[Any] = []  # Any: see `transactions`
        self.staged: list[Envelope] = []
        self._released: deque[Envelope] = deque()
        self._tally = tally

    @property
    def pending(self) -> list[Envelope]:
        """The events that wait here, released ones first."""
        with self._tally.lock:
            return [*self._released, *self.staged]

    @property
    def waiting(self) -> int:
        """How many deliveries wait here."""
        with self._tally.lock:
            return sum(envelope.waiting for envelope in (*self._released, *self.staged))

    def open(self, around: EventQueue | None) -> None:
        """Accept events from now on; share backlog and transactions with the queue around."""
        self.state = State.OPEN
        if around is not None:
            self.backlog, self.transactions = around.backlog, around.transactions

    def stage(
        self,
        envelopes: list[Envelope],
        limit: int,
        *,
        watched: bool,
        tag: Callable[[Sequence[Envelope]], None] | None,
    ) -> Refusal | None:
        """Accept all envelopes; or accept none, and return the reason.

        Args:
            envelopes: The envelopes.
            limit: How many events with a handler may wait.
            watched: Whether to keep also events without a handler, for observers of decisions.
            tag: Called with the accepted envelopes, if transactions decide.
        """
        deliveries = waiting = 0
        for envelope in envelopes:
            if envelope.plan:
                waiting += 1
                deliveries += len(envelope.plan)
        backlog, tally = self.backlog, self._tally
        tally.acquire()  # `with` would double the cost of this method
        try:
            if self.state is not State.OPEN:
                return Refusal.CLOSED
            if backlog.events + waiting > limit:
                return Refusal.FULL
            backlog.events += waiting
            tally.published += len(envelopes)
            tally.accepted += deliveries
            if waiting < len(envelopes) and not watched:
                envelopes = [envelope for envelope in envelopes if envelope.plan]
            if tag is not None:
                tag(envelopes)
            self.staged += envelopes
            return None
        finally:
            tally.release()

    def release(self) -> list[Envelope]:
        """Release all staged events, and return them."""
        with self._tally.lock:
            return self._release(self._take_staged())

    def discard(self) -> tuple[list[Envelope], list[Envelope]]:
        """Release the decided staged events, drop the undecided ones, and return both lists."""
        with self._tally.lock:
            kept, dropped = self._divide()
            return self._release(kept), dropped

    def take(self, *, closing: bool) -> Envelope | None:
        """Take the next released event; None if there is none.

        With `closing` it closes in that case, if no event is left to be decided.
        """
        tally = self._tally
        tally.acquire()
        try:
            if self._released:
                self.backlog.events -= 1
                return self._released.popleft()
            if closing and not self.staged and not self.transactions:
                self.state = State.CLOSED
            return None
        finally:
            tally.release()

    def unwritten(self) -> list[Envelope]:
        """The released events with unwritten rows, if the next event is one of them; else none."""
        tally = self._tally
        tally.acquire()
        try:
            if not self._released or not _is_unwritten(self._released[0]):
                return []
            return [each for each in self._released if _is_unwritten(each)]
        finally:
            tally.release()

    def feed(self, envelope: Envelope) -> None:
        """Add a released event that does not come from a publish, but from a table."""
        with self._tally.lock:
            self._tally.accepted += len(envelope.plan)
            self.backlog.events += 1
            self._released.append(envelope)

    def close_if_empty(self, *, release: bool, may_close: bool) -> tuple[bool, list[Envelope]]:
        """With `release`, release the staged events; with `may_close`, close if none are left.

        Returns:
            Whether it has closed, and the events that were released.
        """
        tally = self._tally
        tally.acquire()
        try:
            released = self._release(self._take_staged()) if release and self.staged else []
            empty = may_close and not self._released and not self.staged
            if empty:
                self.state = State.CLOSED
            return empty, released
        finally:
            tally.release()

    def give(self, queue: EventQueue, *, success: bool) -> tuple[list[Envelope], list[Envelope]]:
        """Close, and release the events that a handler has published in the drained queue.

        Returns:
            The events that were released there, and those dropped because the handler failed.
        """
        with self._tally.lock:
            self.state = State.CLOSED
            left, dropped = self._leave(success=success, released=True)
            return queue._release(left), dropped

    def hand_over(self, queue: EventQueue, *, success: bool, released: bool) -> list[Envelope]:
        """Close, and stage the remaining events in the queue around. Released ones stay decided.

        Args:
            queue: The queue around.
            success: Whether all staged events are handed over; else only the decided ones.
            released: Whether released events are handed over, too, because no task drains them.

        Returns:
            The events that were dropped.
        """
        with self._tally.lock:
            self.state = State.CLOSED
            left, dropped = self._leave(success=success, released=released)
            queue.staged += left
            return dropped

    def clear(self) -> list[Envelope]:
        """Close, and return the remaining events."""
        with self._tally.lock:
            self.state = State.CLOSED
            left = [*self._released, *self._take_staged()]
            self._released.clear()
            self._unload(left)
            return left

    def settle(
        self, verdict_on: Callable[[Envelope], Verdict]
    ) -> tuple[list[Envelope], list[Envelope]]:
        """Ask `verdict_on` about each staged event that is undecided.

        Returns:
            The events that are released now, which stay staged, and those that were dropped.
        """
        released: list[Envelope] = []
        dropped: list[Envelope] = []
        with self._tally.lock:
            for envelope in self.staged:
                if envelope.verdict is Verdict.OPEN:
                    verdict = verdict_on(envelope)
                    if verdict is Verdict.RELEASED:
                        envelope.decide()
                        released.append(envelope)
                    elif verdict is Verdict.DISCARDED:
                        envelope.verdict = verdict
                        dropped.append(envelope)
            if dropped:
                self.staged = [
                    each for each in self.staged if each.verdict is not Verdict.DISCARDED
                ]
                self._unload(dropped)
        return released, dropped

    # The methods below need the lock.

    def _release(self, envelopes: list[Envelope]) -> list[Envelope]:
        self._released += [envelope for envelope in envelopes if envelope.plan]
        return envelopes

    def _take_staged(self) -> list[Envelope]:
        staged, self.staged = self.staged, []
        return staged

    def _divide(self) -> tuple[list[Envelope], list[Envelope]]:
        """Empty the staged events; return the decided and the undecided ones."""
        staged = self._take_staged()
        kept = [envelope for envelope in staged if envelope.verdict is not Verdict.OPEN]
        dropped = [envelope for envelope in staged if envelope.verdict is Verdict.OPEN]
        self._unload(dropped)
        return kept, dropped

    def _leave(self, *, success: bool, released: bool) -> tuple[list[Envelope], list[Envelope]]:
        """Empty the queue; return the events that go on, and those that are dropped."""
        left: list[Envelope] = []
        if released:
            left.extend(self._released)
            self._released.clear()
            for envelope in left:
                envelope.decide()
        if success:
            return left + self._take_staged(), []
        kept, dropped = self._divide()
        return left + kept, dropped

    def _unload(self, envelopes: Sequence[Envelope]) -> None:
        self.backlog.events -= sum(1 for envelope in envelopes if envelope.plan)


def _is_unwritten(envelope: Envelope) -> bool:
    return envelope.rows is not None and not envelope.rows.written
