"""Owns waiting for a ledger to change, on an event loop or in a thread, and what to say in vain.

No polling, and no clock of an event loop: changes come from other threads and loops too, and the
time is real, so that hours of a virtual clock are no failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Timer
from typing import TypeVar

from anyio import Event
from anyio.lowlevel import checkpoint, current_token

from eventkit._bus import EventBus
from eventkit._events import Delivery
from eventkit.streams import threadsafe_call_of
from eventkit.testing._ledger import Fate, Ledger
from eventkit.testing._matching import describe
from eventkit.testing._stuck import where

T = TypeVar("T")

# How many of what goes on a message names.
_NAMED = 10


async def until(
    ledger: Ledger, look: Callable[[], T | None], deadline: float, explain: Callable[[], str]
) -> T:
    """Look after each change until there is something to see, and return it.

    Raises:
        TimeoutError: `deadline`, of `time.monotonic`, has passed.
    """
    __tracebackhide__ = True
    await checkpoint()
    call_soon = threadsafe_call_of(current_token())
    timer: Timer | None = None
    try:
        while True:
            changed = Event()
            with ledger.alarm(partial(_set, changed, call_soon)):
                if (seen := look()) is not None:
                    return seen
                if time.monotonic() >= deadline:
                    raise TimeoutError(explain())
                if timer is None:
                    timer = Timer(deadline - time.monotonic(), ledger.wake)
                    timer.start()
                await changed.wait()
    finally:
        if timer is not None:
            timer.cancel()


def block_until(
    ledger: Ledger, look: Callable[[], T | None], deadline: float, explain: Callable[[], str]
) -> T:
    """As `until`, in a thread that no event loop needs."""
    __tracebackhide__ = True
    with ledger.changed:
        while (seen := look()) is None:
            if not ledger.changed.wait(deadline - time.monotonic()):
                raise TimeoutError(explain())
    return seen


def what_goes_on(ledger: Ledger, bus: EventBus) -> list[str]:
    """What has not ended, one line for each: running, waiting, undecided."""
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
    with suppress(RuntimeError):  # the loop is gone, and with it who waited
        call_soon(event.set)


def _named(delivery: Delivery) -> str:
    return f"{delivery.handler} for {describe(delivery.event)}"


def _at(delivery: Delivery, bus: EventBus) -> str:
    line = where(delivery, bus)
    return f", at {line}" if line else ""
