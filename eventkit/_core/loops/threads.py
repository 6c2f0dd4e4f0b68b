"""Owns the ways to an event loop for threads that have none.

Such a thread has three ways. `run` uses the loop whose worker thread it is. `reach` uses a loop in
another thread, and `Entrance` does this so that the owner of the loop can close the way. `_OwnLoop`
is a loop that the process keeps for such threads. Knows nothing of events and handlers.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context, copy_context
from typing import Any

import anyio
from anyio import CancelScope, from_thread, get_cancelled_exc_class, move_on_after

from eventkit._core.loops.changes import GRACE_SECONDS, Change
from eventkit._core.loops.running import current_loop, library, on_trio

# The coroutine function that an event loop runs for a thread.
Function = Callable[[], Coroutine[object, object, None]]

# Seconds between two checks of a waiting thread whether its event loop was closed.
_LOOK_SECONDS = 1.0


def in_worker_thread() -> bool:
    """Whether this is a worker thread of AnyIO or trio, started by a task of an event loop."""
    return _way_back() is not None


def _way_back() -> Callable[..., object] | None:
    """The function that runs a coroutine function on the event loop of this worker thread."""
    # If trio was not imported, no thread belongs to trio.
    ways = [from_thread, *(trio.from_thread for trio in [sys.modules.get("trio")] if trio)]
    for way in ways:
        try:
            way.check_cancelled()
        except RuntimeError:
            continue
        except BaseException:  # noqa: BLE001 - a cancellation, whose class is not known in a thread
            pass
        run: Callable[..., object] = way.run
        return run
    return None


def run(function: Function, nearby: Iterable[Callable[[Function], bool]]) -> None:
    """Run the function on an event loop, from a thread that has none, and wait for its end.

    It is the loop that this worker thread works for; else the first of `nearby` that accepts the
    function; else the loop that the process keeps for such threads.
    """
    way_back = _way_back()
    if way_back is not None:
        way_back(_unless_cancelled, function)
    elif not any(takes(function) for takes in nearby):
        _own_loop.run(function)


async def _unless_cancelled(function: Function) -> None:
    """Run the function, unless the worker thread was cancelled before.

    On asyncio AnyIO does not cancel a task that begins in a cancelled scope, so the function could
    wait without an end.
    """
    if anyio.current_effective_deadline() > -math.inf:
        await function()


class _Call:
    """A call of a coroutine function on an event loop; a thread waits for its end.

    | state | after `start` | after `cancel` |
    |---|---|---|
    | new | runs | over; nothing has run |
    | runs | | the function is cancelled; over when it has ended |
    | over | | |

    The event loop calls `start` and `cancel`, one after the other. Ctrl-C may come at any moment,
    so an interrupted thread does not know whether the loop will call `start`.

    An event loop that ends may cancel the call before its first step, or accept no call. Then the
    call is over, and has not begun.

    Args:
        function: The function; it runs with the context variables of this moment.
        turn: Notified when the call is over.
    """

    def __init__(self, function: Function, turn: threading.Condition) -> None:
        self.begun = False
        self.over = False
        self._started = False
        self._function = function
        self._turn = turn
        self._variables = copy_context()
        self._variables.run(library.set, None)  # it may name another event loop
        self._scope: CancelScope | None = None
        self._cancelled = False
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the function. The event loop calls this."""
        if self._cancelled:
            return
        self._started = True
        if on_trio():
            spawn: Callable[..., object] = sys.modules["trio"].lowlevel.spawn_system_task
            try:
                spawn(self._run, context=self._variables)
            except RuntimeError:  # trio is about to end
                self._end()
        else:
            self._task = self._variables.run(asyncio.get_running_loop().create_task, self._run())
            # Needed if the task is cancelled before its first step: then nothing of `_run` runs.
            self._task.add_done_callback(lambda _: self._end())

    def cancel(self) -> None:
        """Cancel the function. The event loop calls this."""
        self._cancelled = True
        if not self._started:
            self._end()
        elif self._scope is not None:
            self._scope.cancel()

    async def watch(self) -> None:
        """Wait for the end in another asyncio task; a cancellation of that task is passed on."""
        if self._task is None:  # it was cancelled before it was started
            return
        try:
            await asyncio.wait([self._task])
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.wait([self._task])
            raise

    def wait_while(self, go_on: Callable[[], bool]) -> None:
        """Block the thread until the call is over, or until `go_on` returns False."""
        with self._turn:
            _wait_for(self._turn, lambda: self.over, go_on)

    def raise_error(self) -> None:
        """Raise the exception of the function; do nothing if the event loop cancelled it.

        Raises:
            RuntimeError: The event loop was closed, so the call will never be over.
        """
        if not self.over:
            raise RuntimeError("the event loop was closed while a thread waited for its call on it")
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # otherwise this frame and its traceback keep each other alive

    async def _run(self) -> None:
        self.begun = True
        try:
            with CancelScope() as self._scope:
                if self._cancelled:
                    self._scope.cancel()
                await self._function()
        except get_cancelled_exc_class():  # the event loop ends
            raise
        except BaseException as error:  # noqa: BLE001 - the thread's; here it would end the loop
            self._error = error
        finally:
            self._end()

    def _end(self) -> None:
        with self._turn:
            self.over = True
            self._turn.notify_all()


def _wait_for(
    turn: threading.Condition, ready: Callable[[], bool], go_on: Callable[[], bool] = lambda: True
) -> None:
    """Block the thread until `ready`; ask `go_on` once in `_LOOK_SECONDS`.

    On Windows, a waiting thread gets Ctrl-C only between two waits.
    """
    while not turn.wait_for(ready, _LOOK_SECONDS) and go_on():
        pass


def reach(loop: object, function: Function) -> bool:
    """Run the function on an event loop in another thread, and wait for its end.

    If the main thread waits, Ctrl-C cancels the function, and is raised when the clean-up of the
    function has ended. A second Ctrl-C is raised at once. If the loop ends and cancels the
    function, this call returns.

    Args:
        loop: The event loop, as `current_loop` returns it.
        function: The function.

    Returns:
        False if the loop has ended or is about to end, and nothing has run.
    """
    call = _Call(function, threading.Condition())
    try:
        if not _call_soon(loop, call.start):
            return False
        call.wait_while(lambda: _is_open(loop))
    except BaseException:
        if _call_soon(loop, call.cancel):
            call.wait_while(lambda: _is_open(loop))
        raise
    call.raise_error()
    return call.begun


def _call_soon(loop: Any, function: Callable[[], None]) -> bool:
    """Schedule a call on a running event loop; False if the loop does not run."""
    try:
        if not isinstance(loop, asyncio.AbstractEventLoop):
            loop.run_sync_soon(function)  # trio
        elif loop.is_running():
            loop.call_soon_threadsafe(function)
        else:
            return False
    except RuntimeError:
        return False
    return True


def _is_open(loop: object) -> bool:
    """Whether a call on the event loop may still end."""
    if isinstance(loop, asyncio.AbstractEventLoop):
        return not loop.is_closed()
    return _call_soon(loop, lambda: None)


class Entrance:
    """The way for threads to call functions on the event loop that made it, until `close`.

    After `close` no thread waits for the loop. So the shutdown of the loop's application may block
    the loop until these threads have ended.
    """

    def __init__(self) -> None:
        self.loop: object = current_loop()
        self._closed = False
        self._calls: set[CancelScope] = set()
        self._call_ended = Change()

    def run(self, function: Function) -> bool:
        """As `reach`; False also if it is closed."""
        entered = False

        async def enter() -> None:
            nonlocal entered
            if self._closed:
                return
            entered = True
            with CancelScope() as call:
                self._calls.add(call)
                try:
                    await function()
                finally:
                    self._calls.discard(call)
                    self._call_ended.announce()

        return reach(self.loop, enter) and entered

    async def close(self, timeout: float) -> None:
        """Refuse new calls, and wait at most `timeout` seconds; then cancel the remaining calls."""
        self._closed = True
        try:
            with move_on_after(timeout):
                await self._all_left()
        finally:
            for call in self._calls:
                call.cancel()
            with move_on_after(GRACE_SECONDS, shield=True):
                await self._all_left()

    async def _all_left(self) -> None:
        while self._calls:
            await self._call_ended.wait()


class _OwnLoop:
    """The event loop of the process for threads that have none. It stays open between calls.

    So objects that belong to the loop, such as connections in a pool, can be used in the next call.
    The loop has no thread: one of the threads that wait for their calls runs it, and the calls of
    all threads run on it. When that thread's own call is over, another thread takes over. Between
    calls the loop does not run.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()  # guards the attributes below
        self._driver: _Call | None = None  # the call whose thread drives the loop
        self._loop: asyncio.AbstractEventLoop | None = None
        # With a factory, the runner does not set the loop as the thread's current one.
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)

    def run(self, function: Function) -> None:
        """Run the function on this loop, and wait for its end. Ctrl-C works as in `asyncio.run`."""
        call = _Call(function, self._turn)
        with self._turn:
            if self._loop is None:
                self._loop = Context().run(self._runner.get_loop)  # the runner keeps its context
            loop = self._loop
        try:
            loop.call_soon_threadsafe(call.start)
            self._drive(call)
        except BaseException:
            loop.call_soon_threadsafe(call.cancel)
            self._drive(call)
            raise
        call.raise_error()

    def _drive(self, call: _Call) -> None:
        """Wait for the call, and run the loop if no other thread does."""
        try:
            while self._take_turn(call):
                self._runner.run(call.watch())
        finally:
            with self._turn:
                if self._driver is call:
                    self._driver = None
                    self._turn.notify_all()

    def _take_turn(self, call: _Call) -> bool:
        """Wait until no other thread runs the loop; False if the call is over by then."""
        with self._turn:
            _wait_for(self._turn, lambda: call.over or self._driver in (None, call))
            if not call.over:
                self._driver = call
            return not call.over

    def close(self) -> None:
        """Cancel the tasks of the loop and close it, unless another thread runs it."""
        with self._turn:
            if self._driver is None:
                self._runner.close()


_own_loop = _OwnLoop()
# Loops of parent processes, never freed: freeing a loop closes it. A close in a child process would
# remove the parent's loop from the selector that both share.
_of_parents: list[_OwnLoop] = []


def _close_own_loop() -> None:
    _own_loop.close()


def _renew_own_loop() -> None:
    """Make a new loop in a forked child process, which has only one thread."""
    global _own_loop
    _of_parents.append(_own_loop)
    _own_loop = _OwnLoop()


atexit.register(_close_own_loop)
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_renew_own_loop)
