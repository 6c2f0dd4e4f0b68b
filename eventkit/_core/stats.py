"""Owns the counters of one bus. Knows the outcomes of a delivery, not how they come about."""

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
    """The final outcome of a delivery."""

    HANDLED = "handled"
    FAILED = "failed"
    DISCARDED = "discarded"
    UNDELIVERED = "undelivered"
    REQUEUED = "requeued"


Background = Literal["held", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The counters of a bus at one moment.

        assert bus.stats.failed == 0

    `accepted` to `running` count deliveries. One event with two handlers has two deliveries.
    `accepted == handled + failed + discarded + undelivered + requeued + pending + running`.

    Attributes:
        published: Events that were published or dispatched, with or without a handler.
        accepted: Deliveries that eventkit has taken responsibility for.
        handled: Deliveries whose handler has ended without an exception.
        failed: Deliveries whose handler has raised, or has exceeded its time limit.
        discarded: Deliveries that were dropped, because their unit of work failed or their
            subscription was cancelled.
        undelivered: Deliveries that did not run, or were ended by a cancellation from outside.
        requeued: Deliveries that were given back to the table of an outbox. They run later, or in
            another process.
        pending: Deliveries that wait now.
        running: Deliveries whose handler runs now.
        units_waiting: Units of work that have ended and wait for their drain.
        units_draining: Units of work that are drained in the background now.
        held: Requests that are held back now, because too many deliveries wait.
        refused: Requests that were answered 503, because too many deliveries waited.
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
    """Runs the handlers of one unit of work, and counts them itself.

    Only the run changes its counters, in one thread, so it needs no lock. A delivery that ends is
    removed from `running` first, and counted then.

    Attributes:
        handled: How many deliveries have ended well. When the run leaves, the tally adds this
            number to its own.
    """

    handled: int

    @property
    def running(self) -> Iterable[Delivery]:
        """The deliveries that have begun and not ended."""
        ...


class Drainer(Protocol):
    """Delivers units of work in the background."""

    @property
    def units_waiting(self) -> int:
        """How many units have ended and wait for their drain."""
        ...

    @property
    def units_draining(self) -> int:
        """How many units are being drained."""
        ...


class Tally:
    """The counters themselves.

    Units of work and the dispatcher change them, and always hold `lock`. The same lock guards the
    queues of the bus's units of work, so that a publish from another thread is one step. The runs
    know the deliveries that run, and count those that end well. Runs and drainers are added without
    the lock, because adding to a set is one step. So code that iterates makes a copy first.
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
        self.handled: int = 0  # by runs that have left; the runs in `runs` count their own
        self.ended: dict[Outcome, int] = dict.fromkeys(Outcome, 0)  # HANDLED is not counted here
        self.background: Counter[Background] = Counter()
        self.drainers: set[Drainer] = set()

    def leave(self, run: Run) -> None:
        """Remove the run, and add its counter to the tally's own."""
        with self.lock:
            self.runs.remove(run)
            self.handled += run.handled

    def end(self, outcome: Outcome, deliveries: int) -> None:
        """Count deliveries that have ended, or will never run."""
        with self.lock:
            self.ended[outcome] += deliveries

    def shift(self, count: Background, by: int) -> None:
        """Change one of the counters `held` and `refused`."""
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
            running = len(self.running())  # last: a delivery that ends now must not count twice
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
