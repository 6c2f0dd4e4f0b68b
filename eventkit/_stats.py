"""Owns the counters of one bus. Knows what can become of a delivery, not how it comes about."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from threading import RLock
from typing import Literal

from eventkit._events import Delivery


class Outcome(Enum):
    """What finally became of a delivery."""

    HANDLED = "handled"
    FAILED = "failed"
    DISCARDED = "discarded"
    UNDELIVERED = "undelivered"


Background = Literal["units_waiting", "units_draining", "held", "refused"]


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
    pending: int
    running: int
    units_waiting: int
    units_draining: int
    held: int
    refused: int


class Tally:
    """The counters themselves.

    Changed by units of work and by the dispatcher, only ever with `lock` held; the same lock
    guards the queues of the bus's units of work, so that a publish from a thread is one step.
    """

    __slots__ = ("accepted", "background", "ended", "lock", "published", "running")

    def __init__(self) -> None:
        self.lock: AbstractContextManager[object] = (
            RLock()
        )  # finalizers run anywhere, also while it is held
        self.published: int = 0
        self.accepted: int = 0
        self.running: set[Delivery] = set()
        self.ended: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.background: Counter[Background] = Counter()

    def start(self, delivery: Delivery) -> None:
        """Count one delivery as running."""
        with self.lock:
            self.running.add(delivery)

    def end(self, delivery: Delivery, outcome: Outcome) -> None:
        """Count one running delivery as ended."""
        with self.lock:
            self.running.remove(delivery)
            self.ended[outcome] += 1

    def skip(self, outcome: Outcome, deliveries: int) -> None:
        """Count deliveries that will never run."""
        with self.lock:
            self.ended[outcome] += deliveries

    def shift(self, count: Background, by: int) -> None:
        """Change one of the counters of background delivery."""
        with self.lock:
            self.background[count] += by

    def rewind(self, then: Stats) -> None:
        """Count on from a moment before, as if only what is in flight now had come since."""
        with self.lock:
            in_flight = self.accepted - sum(self.ended.values())
            self.published = then.published
            for outcome in Outcome:
                self.ended[outcome] = getattr(then, outcome.value)
            self.accepted = sum(self.ended.values()) + in_flight
            self.background["refused"] = then.refused

    def running_by_handler(self) -> Counter[str]:
        """How many deliveries each handler is running."""
        with self.lock:
            return Counter(delivery.handler for delivery in self.running)

    def snapshot(self) -> Stats:
        """All counters at one moment."""
        with self.lock:
            return Stats(
                published=self.published,
                accepted=self.accepted,
                pending=self.accepted - len(self.running) - sum(self.ended.values()),
                running=len(self.running),
                units_waiting=self.background["units_waiting"],
                units_draining=self.background["units_draining"],
                held=self.background["held"],
                refused=self.background["refused"],
                **{outcome.value: count for outcome, count in self.ended.items()},
            )
