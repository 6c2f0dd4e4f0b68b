"""Owns waiting for a change of a ledger, on an event loop or in a thread, and the timeout message.

It does not poll, and it reads no clock: changes come also from other threads and loops. The time is
real time. Hours of a virtual clock cause no timeout, and a stopped clock makes no wait longer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import TIMEOUT_MAX, Timer
from types import TracebackType
from typing import Self, TypeVar

from anyio import Event
from anyio.lowlevel import checkpoint, current_token

from eventkit._core.bus import EventBus
from eventkit._core.events import Delivery
from eventkit.streams import threadsafe_call_of
from eventkit.testing._ledger import Fate, Ledger
from eventkit.testing._matching import describe
from eventkit.testing._stuck import where

T = TypeVar("T")

# How many deliveries and events a message lists.
_NAMED = 10


class Patience:
    """The time limit of a wait. It is a context manager: its end stops the timer.

    The timer is a thread that waits. It reads no clock, because libraries such as freezegun replace
    all clocks that Python code can read. The timer starts when `over` is read first.

    Args:
        seconds: Seconds of real time; infinity for no limit.
        ledger: The ledger whose waiting code is woken when the time is over.
    """

    def __init__(self, seconds: float, ledger: Ledger) -> None:
        self._seconds = seconds
        self._ledger = ledger
        self._timer: Timer | None = None
        self._over = not seconds > 0  # this form includes NaN

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        if not self._over and self._timer is None:
            self._timer = Timer(min(self._seconds, TIMEOUT_MAX), self._end)
            self._timer.daemon = True
            self._timer.start()
        return self._over

    def _end(self) -> None:
        self._over = True
        self._ledger.wake()


async def until(
    ledger: Ledger, look: Callable[[], T | None], patience: Patience, explain: Callable[[], str]
) -> T:
    """Call `look` after each change until it returns something, and return that.

    Raises:
        TimeoutError: The time is over.
    """
    __tracebackhide__ = True
    await checkpoint()
    call_soon = threadsafe_call_of(current_token())
    while True:
        changed = Event()
        with ledger.alarm(partial(_set, changed, call_soon)):
            if (seen := look()) is not None:
                return seen
            if patience.over:
                raise TimeoutError(explain())
            await changed.wait()


def block_until(
    ledger: Ledger, look: Callable[[], T | None], patience: Patience, explain: Callable[[], str]
) -> T:
    """As `until`, in a thread without an event loop."""
    __tracebackhide__ = True
    with ledger.changed:
        while (seen := look()) is None:
            if patience.over:
                raise TimeoutError(explain())
            ledger.changed.wait()
    return seen


def what_goes_on(ledger: Ledger, bus: EventBus) -> list[str]:
    """What has not ended, one line each: running deliveries, waiting ones, undecided events."""
    with ledger.changed:
        pending = dict(ledger.pending)
        open_events = [each.event for each in ledger.records if each.fate is Fate.OPEN]
    lines = [
        *(f"  {_named(d)} is running{_at(d, bus)}" for d, p in pending.items() if p.running),
        *(
            f"  {_named(delivery)} waits for its turn"
            for delivery, each in pending.items()
            if not (each.running or each.undecided)
        ),
        *(f"  {describe(event)} is in a unit of work that is still open" for event in open_events),
    ]
    more = [f"  ... and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return [*lines[:_NAMED], *more]


def _set(event: Event, call_soon: Callable[[Callable[[], object]], object]) -> None:
    with suppress(RuntimeError):  # the loop has ended, and the waiting task with it
        call_soon(event.set)


def _named(delivery: Delivery) -> str:
    return f"{delivery.handler} for {describe(delivery.event)}"


def _at(delivery: Delivery, bus: EventBus) -> str:
    line = where(delivery, bus)
    return f", at {line}" if line else ""
