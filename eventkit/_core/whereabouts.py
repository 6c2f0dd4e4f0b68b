"""Owns the look-up of the lines at which running handlers wait. Only messages use it."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

from eventkit._core.dispatch import Run
from eventkit._core.events import Delivery
from eventkit._core.stats import Tally


def whereabouts(tally: Tally) -> dict[Delivery, list[FrameType]]:
    """The running deliveries, each with the frames in which it waits, the outermost first.

    It reads the frames of the coroutines, so it costs nothing before it is called. For a plain
    function in a worker thread, it gives the line at which the event loop waits for the thread.
    """
    return {
        delivery: list(_frames(steps))
        for run in [*tally.runs]
        if isinstance(run, Run)
        for delivery, steps in run.running.items()
    }


def _frames(awaited: object) -> Iterator[FrameType]:
    """The frames of a coroutine and of all that it awaits."""
    while True:
        # Any: coroutines, generators and async generators have different names for the same things.
        waiting = cast("Any", awaited)
        for kind, inner in (("cr", "await"), ("gi", "yieldfrom"), ("ag", "await")):
            frame = getattr(waiting, f"{kind}_frame", None)
            if frame is not None:
                yield frame
                awaited = getattr(waiting, f"{kind}_{inner}")
                break
        else:
            return
