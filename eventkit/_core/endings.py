"""Owns how the events of a unit of work are delivered: while it is open, and at its end."""

from __future__ import annotations

from eventkit._core.announcements import announce_dropped
from eventkit._core.awaited import run_all
from eventkit._core.loops.running import current_loop
from eventkit._core.stats import Outcome
from eventkit._core.units import Ending, Report, Unit


def abandon(*units: Unit) -> None:
    """Close units of one bus: discard the events that are not released; the rest is undelivered.

    Deliveries that an outbox stores are requeued. All undelivered ones are announced together, so
    that thousands of them are one line in the log.
    """
    for unit in units:
        unit.discard()
    left = [envelope for unit in units for envelope in unit.queue.clear()]
    for unit in units[:1]:
        announce_dropped(unit.state, left, Outcome.UNDELIVERED)


async def end(unit: Unit, *, success: bool) -> None:
    """Deliver the events, here or in the background, and close."""
    host = unit.host() if unit.background else None
    if host is None:
        await finish(unit, unit.state.report, unit.state.handler_timeout, success=success)
    else:
        host.submit(unit, success=success)


async def finish(unit: Unit, report: Report, timeout: float | None, *, success: bool) -> None:
    """Deliver the events, then close; after a cancellation the remaining ones are undelivered."""
    if unit.close_if_idle(success=success):
        return
    ending = Ending(unit, success, current_loop())
    try:
        await ending.begin()
        await run_all(ending.next_turn, unit.terms(report, timeout))
    finally:
        ending.end()
        await unit.settle()


async def deliver(unit: Unit, report: Report) -> int:
    """Deliver the released events and those they cause; return how many deliveries succeeded."""
    unit.occupy(current_loop())
    try:
        return await run_all(unit.next_turn, unit.terms(report, unit.state.handler_timeout))
    finally:
        unit.end_drain()
        await unit.settle()
