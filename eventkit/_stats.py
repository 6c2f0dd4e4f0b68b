"""Owns the counters of one bus. Knows what can become of a delivery, not how it comes about."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from threading import RLock


class Outcome(Enum):
    """What finally became of a delivery."""

    HANDLED = "handled"
    FAILED = "failed"
    DISCARDED = "discarded"
    UNDELIVERED = "undelivered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The counters of a bus at one moment, all but `published` per delivery.

    `accepted == handled + failed + discarded + undelivered + pending + running`.

    Attributes:
        published: Events published or dispatched, with or without a handler.
        accepted: Deliveries that eventkit took responsibility for.
        handled: The handler ended without an exception.
        failed: The handler raised, or took too long.
        discarded: Dropped because the unit of work failed or its subscription was cancelled.
        undelivered: Not run, or ended by a cancellation from outside.
        pending: Waiting to be delivered or discarded.
        running: The handler is running now.
    """

    published: int
    accepted: int
    handled: int
    failed: int
    discarded: int
    undelivered: int
    pending: int
    running: int


class Tally:
    """The counters themselves.

    Changed by units of work and by the dispatcher, only ever with `lock` held; the same lock
    guards the queues of the bus's units of work, so that a publish from a thread is one step.
    """

    __slots__ = ("accepted", "ended", "lock", "published", "running")

    def __init__(self) -> None:
        self.lock = RLock()  # finalizers run anywhere, also while it is held
        self.published = 0
        self.accepted = 0
        self.running = 0
        self.ended = dict.fromkeys(Outcome, 0)

    def start(self) -> None:
        """Count one delivery as running."""
        with self.lock:
            self.running += 1

    def end(self, outcome: Outcome) -> None:
        """Count one running delivery as ended."""
        with self.lock:
            self.running -= 1
            self.ended[outcome] += 1

    def skip(self, outcome: Outcome, deliveries: int) -> None:
        """Count deliveries that will never run."""
        with self.lock:
            self.ended[outcome] += deliveries

    def snapshot(self) -> Stats:
        """All counters at one moment."""
        with self.lock:
            return Stats(
                published=self.published,
                accepted=self.accepted,
                pending=self.accepted - self.running - sum(self.ended.values()),
                running=self.running,
                **{outcome.value: count for outcome, count in self.ended.items()},
            )
