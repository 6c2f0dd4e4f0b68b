"""Owns the counters of one bus. Knows what can become of a delivery, not how it comes about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from threading import RLock
from typing import Literal, Protocol

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


class Crew(Protocol):
    """Who runs the handlers of one unit of work, and keeps count of them itself.

    It alone writes here, in one thread, and needs no lock for it: a delivery that ends is first
    taken out of `running` and then counted.

    Attributes:
        handled: How many have ended well; the tally takes over the number when the crew leaves.
    """

    handled: int

    @property
    def running(self) -> Iterable[Delivery]:
        """Those that have begun and not ended."""
        ...


class Tally:
    """The counters themselves.

    Changed by units of work and by the dispatcher, only ever with `lock` held; the same lock
    guards the queues of the bus's units of work, so that a publish from a thread is one step.
    What is running, and what has ended well since they began, the crews know.
    """

    __slots__ = (
        "accepted",
        "acquire",
        "background",
        "crews",
        "ended",
        "lock",
        "published",
        "release",
    )

    def __init__(self) -> None:
        lock = RLock()  # finalizers run anywhere, also while it is held
        self.lock: AbstractContextManager[object] = lock
        self.acquire: Callable[[], object] = lock.acquire
        self.release: Callable[[], object] = lock.release
        self.published: int = 0
        self.accepted: int = 0
        self.crews: set[Crew] = set()
        self.ended: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.background: Counter[Background] = Counter()

    def enter(self, crew: Crew) -> None:
        """Count what it runs and has handled."""
        with self.lock:
            self.crews.add(crew)

    def leave(self, crew: Crew) -> None:
        """Take over what it has handled."""
        with self.lock:
            self.crews.remove(crew)
            self.ended[Outcome.HANDLED] += crew.handled

    def end(self, outcome: Outcome, deliveries: int) -> None:
        """Count deliveries that have ended, or will never run."""
        with self.lock:
            self.ended[outcome] += deliveries

    def shift(self, count: Background, by: int) -> None:
        """Change one of the counters of background delivery."""
        with self.lock:
            self.background[count] += by

    def rewind(self, then: Stats) -> None:
        """Count on from a moment before, as if only what is in flight now had come since."""
        with self.lock:
            counted = sum(crew.handled for crew in self.crews)  # they go on from there
            in_flight = self.accepted - counted - sum(self.ended.values())
            self.published = then.published
            for outcome in Outcome:
                self.ended[outcome] = getattr(then, outcome.value)
            self.accepted = sum(self.ended.values()) + in_flight
            self.ended[Outcome.HANDLED] -= counted
            self.background["refused"] = then.refused

    def running(self) -> list[Delivery]:
        """The deliveries that are running now."""
        with self.lock:
            return [delivery for crew in self.crews for delivery in crew.running]

    def running_by_handler(self) -> Counter[str]:
        """How many deliveries each handler is running."""
        return Counter(delivery.handler for delivery in self.running())

    def snapshot(self) -> Stats:
        """All counters at one moment."""
        with self.lock:
            ended = Counter({outcome.value: count for outcome, count in self.ended.items()})
            ended[Outcome.HANDLED.value] += sum(crew.handled for crew in self.crews)
            running = len(self.running())  # afterwards, or what ends meanwhile would count twice
            return Stats(
                published=self.published,
                accepted=self.accepted,
                pending=self.accepted - running - ended.total(),
                running=running,
                units_waiting=self.background["units_waiting"],
                units_draining=self.background["units_draining"],
                held=self.background["held"],
                refused=self.background["refused"],
                **ended,
            )
