"""Owns how the events of a unit of work are delivered: in its midst, and at its end."""

from __future__ import annotations

from eventkit._core.announcements import announce_dropped
from eventkit._core.awaited import run_all
from eventkit._core.loops.running import current_loop
from eventkit._core.stats import Outcome
from eventkit._core.units import Ending, Report, Unit


def abandon(*units: Unit) -> None:
    """Close units of one bus at once: what is not released is discarded, the rest undelivered.

    What an outbox keeps is requeued. What is undelivered is told in one go, so that the end of
    thousands is one line in the log.
    """
    for unit in units:
        unit.discard()
    left = [envelope for unit in units for envelope in unit.queue.clear()]
    for unit in units[:1]:
        announce_dropped(unit.state, left, Outcome.UNDELIVERED)


async def end(unit: Unit, *, success: bool) -> None:
    """Deliver what is to be delivered, here or in the background, and close."""
    host = unit.host() if unit.background else None
    if host is None:
        await finish(unit, unit.state.report, unit.state.handler_timeout, success=success)
    else:
        host.submit(unit, success=success)


async def finish(unit: Unit, report: Report, timeout: float | None, *, success: bool) -> None:
    """Deliver what is to be delivered, then close; what a cancellation left is undelivered."""
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
    """Deliver what is released, and what comes of it; returns how many were handled."""
    unit.occupy(current_loop())
    try:
        return await run_all(unit.next_turn, unit.terms(report, unit.state.handler_timeout))
    finally:
        unit.end_drain()
        await unit.settle()
