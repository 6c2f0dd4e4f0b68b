"""Owns the counters of one bus. Knows what can become of a delivery, not how it comes about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

from eventkit._core.events import Delivery
from eventkit._core.locks import new_lock


class Outcome(Enum):
    """What finally became of a delivery."""

    HANDLED = "handled"
    FAILED = "failed"
    DISCARDED = "discarded"
    UNDELIVERED = "undelivered"
    REQUEUED = "requeued"


Background = Literal["held", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The counters of a bus at one moment, all but `published` per delivery.

    `accepted == handled + failed + discarded + undelivered + requeued + pending + running`.

    Attributes:
        published: Events published or dispatched, with or without a handler.
        accepted: Deliveries that eventkit took responsibility for.
        handled: The handler ended without an exception.
        failed: The handler raised, or took too long.
        discarded: Dropped because the unit of work failed or its subscription was cancelled.
        undelivered: Not run, or ended by a cancellation from outside.
        requeued: Given back to the table of an outbox, from which they run later or elsewhere.
        pending: Waiting to be delivered or discarded.
        running: The handler is running now.
        units_waiting: Units of work that have ended and wait for their drain.
        units_draining: Units of work that are being drained in the background.
        held: Requests held back now, because too many deliveries wait.
        refused: Requests refused for that reason.
    """

    published: int
    accepted: int
    handled: int
    failed: int
    discarded: int
    undelivered: int
    requeued: int
    pending: int
    running: int
    units_waiting: int
    units_draining: int
    held: int
    refused: int


class Run(Protocol):
    """Who runs the handlers of one unit of work, and keeps count of them itself.

    It alone writes here, in one thread, and needs no lock for it: a delivery that ends is first
    taken out of `running` and then counted.

    Attributes:
        handled: How many have ended well; the tally takes over the number when the run leaves.
    """

    handled: int

    @property
    def running(self) -> Iterable[Delivery]:
        """Those that have begun and not ended."""
        ...


class Drainer(Protocol):
    """Who has units of work delivered in the background."""

    @property
    def units_waiting(self) -> int:
        """Those that have ended and wait for their drain."""
        ...

    @property
    def units_draining(self) -> int:
        """Those that are being drained."""
        ...


class Tally:
    """The counters themselves.

    Changed by units of work and by the dispatcher, only ever with `lock` held; the same lock
    guards the queues of the bus's units of work, so that a publish from a thread is one step.
    What is running, and what has ended well since they began, the runs know. Runs and drainers
    come without the lock, because to add one is a single step: who iterates takes a copy.
    """

    __slots__ = (
        "accepted",
        "acquire",
        "background",
        "drainers",
        "ended",
        "handled",
        "lock",
        "published",
        "release",
        "runs",
    )

    def __init__(self) -> None:
        lock = new_lock()
        self.lock: AbstractContextManager[object] = lock
        self.acquire: Callable[[], object] = lock.acquire
        self.release: Callable[[], object] = lock.release
        self.published: int = 0
        self.accepted: int = 0
        self.runs: set[Run] = set()
        self.handled: int = 0  # by runs that have left
        self.ended: dict[Outcome, int] = dict.fromkeys(Outcome, 0)  # but for those
        self.background: Counter[Background] = Counter()
        self.drainers: set[Drainer] = set()

    def leave(self, run: Run) -> None:
        """Take over what it has handled."""
        with self.lock:
            self.runs.remove(run)
            self.handled += run.handled

    def end(self, outcome: Outcome, deliveries: int) -> None:
        """Count deliveries that have ended, or will never run."""
        with self.lock:
            self.ended[outcome] += deliveries

    def shift(self, count: Background, by: int) -> None:
        """Change one of the counters of background delivery."""
        with self.lock:
            self.background[count] += by

    def running(self) -> list[Delivery]:
        """The deliveries that are running now."""
        with self.lock:
            return [delivery for run in [*self.runs] for delivery in run.running]

    def running_by_handler(self) -> Counter[str]:
        """How many deliveries each handler is running."""
        return Counter(delivery.handler for delivery in self.running())

    def snapshot(self) -> Stats:
        """All counters at one moment."""
        with self.lock:
            ended = Counter({outcome.value: count for outcome, count in self.ended.items()})
            handled = self.handled + sum(run.handled for run in [*self.runs])
            ended[Outcome.HANDLED.value] += handled
            running = len(self.running())  # afterwards, or what ends meanwhile would count twice
            return Stats(
                published=self.published,
                accepted=self.accepted,
                pending=self.accepted - running - ended.total(),
                running=running,
                units_waiting=sum(drainer.units_waiting for drainer in [*self.drainers]),
                units_draining=sum(drainer.units_draining for drainer in [*self.drainers]),
                held=self.background["held"],
                refused=self.background["refused"],
                **ended,
            )
