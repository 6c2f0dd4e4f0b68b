"""Owns the worker threads in which plain functions run.

Knows nothing of events and handlers: a function takes one argument.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

# Not AnyIO's default limiter: slow handlers must not take the threads that sync endpoints need. One
# limiter for each event loop, because a limiter belongs to one loop and a bus does not. And one for
# each nesting level: a thread that waits for other handlers must not hold a token that they need.
_limiters: RunVar[list[CapacityLimiter]] = RunVar("eventkit_handler_threads")
thread_level: ContextVar[int] = ContextVar("eventkit_thread_level", default=0)
_THREADS = 40

# The result or the exception of a call in a worker thread; a list, so that it can be emptied.
_Box = list[tuple[object, BaseException | None]]


async def call_in_thread(function: Callable[..., object], argument: object) -> object:
    """Call it in a worker thread; a cancellation waits until the call has ended."""
    try:
        box = await to_thread.run_sync(_boxed, function, argument, limiter=limiter_of_this_level())
    finally:
        del argument  # otherwise a traceback with local variables would show the payload
    result, error = box.pop()
    try:
        if error is not None:
            raise error
        return result
    finally:
        del error  # otherwise this frame and its traceback keep each other alive


def _boxed(function: Callable[..., object], argument: object) -> _Box:
    """Call the function, and return its result or exception in a box.

    trio refuses a coroutine as a result. An exception that passes through the code between the
    threads would have its frames in the traceback. These frames would keep the exception and the
    argument alive.
    """
    thread_level.set(thread_level.get() + 1)
    try:
        return [(function(argument), None)]
    except BaseException as error:  # noqa: BLE001 - `call_in_thread` raises it again
        return [(None, error)]
    finally:
        del argument  # as above


def limiter_of_this_level() -> CapacityLimiter:
    """The limiter of the caller's level of nesting, on the caller's event loop."""
    try:
        limiters = _limiters.get()
    except LookupError:
        limiters = list[CapacityLimiter]()
        _limiters.set(limiters)
    while len(limiters) <= thread_level.get():
        limiters.append(CapacityLimiter(_THREADS))
    return limiters[thread_level.get()]
