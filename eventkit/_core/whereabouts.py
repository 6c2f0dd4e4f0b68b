"""Owns the question where the handlers that run now wait. For messages; nothing else asks."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

from eventkit._core.dispatch import Run
from eventkit._core.events import Delivery
from eventkit._core.stats import Tally


def whereabouts(tally: Tally) -> dict[Delivery, list[FrameType]]:
    """What runs now, each with the frames in which it waits, the outermost first.

    For messages that say where it is stuck; reads the coroutines' frames, and costs nothing before.
    Of a plain function in a worker thread it shows where the event loop waits for the thread.
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
        # Any: coroutines, generators and async generators call the same things differently.
        waiting = cast("Any", awaited)
        for kind, inner in (("cr", "await"), ("gi", "yieldfrom"), ("ag", "await")):
            frame = getattr(waiting, f"{kind}_frame", None)
            if frame is not None:
                yield frame
                awaited = getattr(waiting, f"{kind}_{inner}")
                break
        else:
            return
