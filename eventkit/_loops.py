"""Owns the question on which event loop code runs, and the way there for code that runs on none.

Knows nothing of events and handlers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine

import anyio
from anyio import current_time, from_thread
from anyio.lowlevel import current_token

_running: object = None  # whose `name` trio sets while it runs, maybe inside of a task of asyncio's
try:
    from sniffio import thread_local
except ImportError:  # pragma: no cover - trio depends on it, newer releases of AnyIO do not
    pass
else:
    _running = thread_local


def current_loop() -> object:
    """The event loop that calls.

    Raises:
        RuntimeError: There is none.
    """
    return current_token() if _on_trio() else asyncio.get_running_loop()


def clock() -> Callable[[], float]:
    """What tells the time of the event loop that calls, in seconds."""
    return current_time if _on_trio() else asyncio.get_running_loop().time


def _on_trio() -> bool:
    """Whether it is trio that calls; else one may ask asyncio, ten times as fast as AnyIO."""
    return getattr(_running, "name", None) == "trio"


def on_event_loop() -> bool:
    """Whether the caller is called by an event loop, which must not be blocked."""
    try:
        current_token()
    except RuntimeError:
        return False
    return True


def in_worker_thread() -> bool:
    """Whether AnyIO runs this thread, on behalf of a task of an event loop."""
    try:
        from_thread.check_cancelled()
    except RuntimeError:
        return False
    except BaseException:  # noqa: BLE001 - cancelled, and outside a loop nobody says what that is
        return True
    return True


def run(end: Callable[[bool], Coroutine[object, object, None]], success: bool) -> None:
    """Run the end of a synchronous unit of work: on the loop this thread works for, or a new one.

    A worker thread's handlers belong on its own event loop, beside the application's resources.
    """
    if in_worker_thread():
        from_thread.run(_unless_cancelled, end, success)
    else:
        anyio.run(end, success)


async def _unless_cancelled(
    end: Callable[[bool], Coroutine[object, object, None]], success: bool
) -> None:
    """Run it, unless the worker thread was cancelled before.

    On asyncio AnyIO cancels no task that begins in a cancelled scope: it could wait for ever.
    """
    if anyio.current_effective_deadline() > -math.inf:
        await end(success)
