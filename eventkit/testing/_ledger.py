"""Owns the record of what happened on one bus, and wakes code that waits for a change."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from threading import Condition

from eventkit._core.ambient import current_delivery
from eventkit._core.events import Delivery
from eventkit._core.locks import new_lock
from eventkit._core.observers import Observer
from eventkit._core.turns import Failure
from eventkit.exceptions import NoDeliveryError


class Fate(Enum):
    """The decision of a unit of work about one event."""

    OPEN = "open"
    RELEASED = "released"
    WITHDRAWN = "withdrawn"


@dataclass(slots=True, eq=False)
class Record:
    """One event that was published, and the delivery whose handler published it."""

    event: object
    cause: Delivery | None
    fate: Fate = Fate.OPEN

    def comes_of(self, event: object) -> bool:
        """Whether a handler of that event, or of an event that it caused, published this one."""
        chain = self.cause.chain() if self.cause else []
        return any(each.event is event or each.event == event for each in chain)


@dataclass(slots=True, eq=False)
class Pending:
    """A delivery that has not ended. It has no record if its publish was not observed."""

    record: Record | None
    running: bool = False

    @property
    def undecided(self) -> bool:
        """Whether its unit of work has not decided about the event."""
        return not self.running and self.record is not None and self.record.fate is Fate.OPEN


class Ledger(Observer):
    """An observer that collects everything in lists.

    Attributes:
        changed: A condition. Its lock guards all attributes; each change notifies it.
        records: All events, in the order of publishing.
        dropped: The events that were withdrawn, in the order of withdrawal.
        successes: The deliveries that ended well, in the order of their ends.
        losses: The deliveries that did not run, or not to their end.
        returns: The deliveries that an outbox stores, and that run later or elsewhere.
        failures: The deliveries that failed, with their errors.
        pending: The deliveries that have not ended.
    """

    def __init__(self) -> None:
        self.changed = Condition(new_lock())
        self.records: list[Record] = []
        self.dropped: list[object] = []
        self.successes: list[Delivery] = []
        self.losses: list[Delivery] = []
        self.returns: list[Delivery] = []
        self.failures: list[Failure] = []
        self.pending: dict[Delivery, Pending] = {}
        # `published` of a thread may be called after other threads have seen what became of it.
        self._ended_early: set[Delivery] = set()
        self._decided_early: list[tuple[object, Fate]] = []
        self._alarms: list[Callable[[], object]] = []

    @property
    def idle(self) -> bool:
        """Whether each event is decided, and each delivery has ended."""
        with self.changed:
            return not self.pending and not any(each.fate is Fate.OPEN for each in self.records)

    @property
    def quiet(self) -> bool:
        """Whether no delivery runs or waits for its turn; units of work may be open."""
        with self.changed:
            return all(each.undecided for each in self.pending.values())

    def published(self, event: object, deliveries: Sequence[Delivery]) -> None:
        """Note an event, and the deliveries that it will have."""
        record = Record(event, deliveries[0].cause if deliveries else _current())
        with self._change():
            self.records.append(record)
            early = next((each for each in self._decided_early if each[0] is event), None)
            if early is not None:
                self._decided_early.remove(early)
                record.fate = early[1]
            for delivery in deliveries:
                if delivery in self._ended_early:
                    self._ended_early.remove(delivery)
                else:
                    self.pending.setdefault(delivery, Pending(record)).record = record

    def released(self, events: Sequence[object]) -> None:
        """Note that these will be delivered."""
        with self._change():
            self._decide(events, Fate.RELEASED)

    def withdrawn(self, events: Sequence[object]) -> None:
        """Note that these were dropped."""
        with self._change():
            self.dropped += events
            self._decide(events, Fate.WITHDRAWN)

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        """Note that these will not run."""
        with self._change():
            self._end(*deliveries)

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        """Note that these were not run to their end."""
        with self._change():
            self.losses += deliveries
            self._end(*deliveries)

    def requeued(self, deliveries: Sequence[Delivery]) -> None:
        """Note that these run later, or elsewhere."""
        with self._change():
            self.returns += deliveries
            self._end(*deliveries)

    @contextmanager
    def delivery(self, delivery: Delivery) -> Generator[None]:
        """Note that a delivery runs, and how it ends."""
        with self._change():
            self.pending.setdefault(delivery, Pending(None)).running = True
        try:
            yield
        except Exception as error:
            with self._change():
                self.failures.append(Failure(delivery, error))
                self._end(delivery)
            raise
        with self._change():
            self.successes.append(delivery)
            self._end(delivery)

    @contextmanager
    def alarm(self, alarm: Callable[[], object]) -> Generator[None]:
        """In the block, call `alarm` at each change, in the thread that makes the change."""
        with self.changed:
            self._alarms.append(alarm)
        try:
            yield
        finally:
            with self.changed:
                self._alarms.remove(alarm)

    def wake(self) -> None:
        """Wake all code that waits for a change."""
        with self.changed:
            self.changed.notify_all()
            for alarm in self._alarms:
                alarm()

    @contextmanager
    def _change(self) -> Generator[None]:
        with self.changed:
            yield
            self.wake()

    def _decide(self, events: Sequence[object], fate: Fate) -> None:
        for event in events:
            for record in reversed(self.records):
                if record.event is event and record.fate is Fate.OPEN:
                    record.fate = fate
                    break
            else:
                self._decided_early.append((event, fate))

    def _end(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            pending = self.pending.pop(delivery, None)
            if pending is None or pending.record is None:
                self._ended_early.add(delivery)


def _current() -> Delivery | None:
    try:
        return current_delivery()
    except NoDeliveryError:
        return None
