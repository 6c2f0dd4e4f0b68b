"""Owns the counters of one bus, and the locks that survive a fork.

Knows what can become of a delivery, not how it comes about.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from threading import RLock
from typing import Any, Literal, Protocol
from weakref import WeakValueDictionary

from eventkit._events import Delivery

# All locks of the process, by their id, as long as their owners live. Any: a fork needs of them
# what `threading` and `logging` use for it, and type checkers do not know.
_locks: WeakValueDictionary[int, Any] = WeakValueDictionary()
_PATIENCE = 1.0  # seconds that a fork waits for a lock; nobody holds one for longer than a moment


def new_lock() -> RLock:
    """Make a lock that is free in a forked child, whatever other threads did with it.

    In a child only the thread that forked exists: a lock that another one held would stay locked.
    So a fork waits until it has all locks. What they guard is then in order in the child, too.

    The lock may be taken twice by one thread, since finalizers and signal handlers run anywhere.
    """
    lock = RLock()
    _locks[id(lock)] = lock
    return lock


class _Forking(threading.local):
    """What a thread that forks has taken for it: each lock, and whether it had the lock before."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, bool]] = []


_forking = _Forking()


def _living_locks() -> list[Any]:
    return [lock for alive in _locks.valuerefs() if (lock := alive()) is not None]


def _before_fork() -> None:
    for lock in _living_locks():
        had_before = lock._is_owned()  # noqa: SLF001 - as `threading` asks
        if lock.acquire(timeout=_PATIENCE):
            _forking.taken.append((lock, had_before))


def _after_fork_in_parent() -> None:
    while _forking.taken:
        lock, _ = _forking.taken.pop()
        lock.release()


def _after_fork_in_child() -> None:
    """Free each lock, but for those that the thread had before: it still has to release them."""
    had_before = {id(lock) for lock, had_before in _forking.taken if had_before}
    _forking.taken.clear()
    for lock in _living_locks():
        if id(lock) in had_before:
            lock.release()
        else:
            lock._at_fork_reinit()  # noqa: SLF001 - as `threading` and `logging` do


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has none
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


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
        lock = new_lock()
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
