"""Owns the way to an event loop for threads that have none.

Such a thread has three ways: to the loop whose worker it is (`run`), to a loop that runs in another
thread (`reach`, and `Entrance` where that loop's owner has to know), and to the loop that the
process keeps for such threads (`_OwnLoop`). Knows nothing of events and handlers.
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

# What a thread has an event loop run for it.
Function = Callable[[], Coroutine[object, object, None]]

# How often a thread that waits for an event loop looks whether somebody has closed the loop.
_LOOK_SECONDS = 1.0


def in_worker_thread() -> bool:
    """Whether AnyIO or trio runs this thread, on behalf of a task of an event loop."""
    return _way_back() is not None


def _way_back() -> Callable[..., object] | None:
    """What calls a coroutine function on the event loop that this thread works for."""
    # Who has not imported trio has no thread of trio's.
    ways = [from_thread, *(trio.from_thread for trio in [sys.modules.get("trio")] if trio)]
    for way in ways:
        try:
            way.check_cancelled()
        except RuntimeError:
            continue
        except BaseException:  # noqa: BLE001 - cancelled, and outside a loop nobody says what that is
            pass
        run: Callable[..., object] = way.run
        return run
    return None


def run(function: Function, nearby: Iterable[Callable[[Function], bool]]) -> None:
    """Run it on the event loop that suits a thread that has none, and wait for its end.

    That is the loop that this thread works for, beside the application's resources; else the
    first of those nearby that takes it; else the one that the process keeps for such threads.
    """
    way_back = _way_back()
    if way_back is not None:
        way_back(_unless_cancelled, function)
    elif not any(takes(function) for takes in nearby):
        _own_loop.run(function)


async def _unless_cancelled(function: Function) -> None:
    """Run it, unless the worker thread was cancelled before.

    On asyncio AnyIO cancels no task that begins in a cancelled scope: it could wait for ever.
    """
    if anyio.current_effective_deadline() > -math.inf:
        await function()


class _Call:
    """A coroutine function that a thread has called on an event loop, and waits for.

    | state | `start` | `cancel` |
    |---|---|---|
    | new | runs | over, and nothing was run |
    | runs | | its function is cancelled; over when that has ended |
    | over | | |

    The event loop calls `start` and `cancel`, one after the other. Ctrl-C may come at any moment,
    so a thread that is interrupted cannot tell whether the loop will call `start`.

    An event loop that ends may cancel the call before its first step, or take no call any more.
    Then it is over, and has not begun.

    Args:
        function: What to run, in the context variables of this moment.
        turn: Notified when it is over.
    """

    def __init__(self, function: Function, turn: threading.Condition) -> None:
        self.begun = False
        self.over = False
        self._started = False
        self._function = function
        self._turn = turn
        self._variables = copy_context()
        self._variables.run(library.set, None)  # which may tell of another loop
        self._scope: CancelScope | None = None
        self._cancelled = False
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start it, called by the event loop."""
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
            # If the task is cancelled before its first step, nothing of `_run` runs.
            self._task.add_done_callback(lambda _: self._end())

    def cancel(self) -> None:
        """Cancel it, called by the event loop."""
        self._cancelled = True
        if not self._started:
            self._end()
        elif self._scope is not None:
            self._scope.cancel()

    async def watch(self) -> None:
        """Wait for it in another task of asyncio, whose cancellation is passed on."""
        if self._task is None:  # it was cancelled before it was started
            return
        try:
            await asyncio.wait([self._task])
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.wait([self._task])
            raise

    def wait_while(self, go_on: Callable[[], bool]) -> None:
        """Block the thread until it is over, or `go_on` says that it never will be."""
        with self._turn:
            _wait_for(self._turn, lambda: self.over, go_on)

    def raise_error(self) -> None:
        """Raise what it raised; nothing, if the event loop cancelled it.

        Raises:
            RuntimeError: It will never be over.
        """
        if not self.over:
            raise RuntimeError("the event loop was closed while a thread waited for its call on it")
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # or this frame and its traceback keep each other alive

    async def _run(self) -> None:
        self.begun = True
        try:
            with CancelScope() as self._scope:
                if self._cancelled:
                    self._scope.cancel()
                await self._function()
        except get_cancelled_exc_class():  # the event loop ends
            raise
        except BaseException as error:  # noqa: BLE001 - the thread's, and it would end the loop
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
    """Block the thread until it is ready; now and then ask whether to go on.

    On Windows, Ctrl-C reaches a thread that waits only between two of these waits.
    """
    while not turn.wait_for(ready, _LOOK_SECONDS) and go_on():
        pass


def reach(loop: object, function: Function) -> bool:
    """Run it on an event loop that runs in another thread, and wait for its end.

    Ctrl-C in a main thread that waits cancels it, and is raised when its clean-up has ended; once
    more Ctrl-C is raised at once. What the loop cancels as it ends is over.

    Args:
        loop: What `current_loop` gave.
        function: What to run.

    Returns:
        False if the loop runs no longer or is about to end, and nothing was done.
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
    """Have a running event loop call it; False where it does not run."""
    try:
        if not isinstance(loop, asyncio.AbstractEventLoop):
            loop.run_sync_soon(function)  # trio's
        elif loop.is_running():
            loop.call_soon_threadsafe(function)
        else:
            return False
    except RuntimeError:
        return False
    return True


def _is_open(loop: object) -> bool:
    """Whether what was called on it may still end."""
    if isinstance(loop, asyncio.AbstractEventLoop):
        return not loop.is_closed()
    return _call_soon(loop, lambda: None)


class Entrance:
    """Where threads call functions on the event loop that made it, until it is closed.

    For the owner of a loop whose shutdown may block the loop until threads have ended: after
    `close` no thread waits for the loop.
    """

    def __init__(self) -> None:
        self.loop: object = current_loop()
        self._closed = False
        self._calls: set[CancelScope] = set()
        self._call_ended = Change()

    def run(self, function: Function) -> bool:
        """As `reach`; False also where it is closed."""
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
        """Let no more calls in, and wait for `timeout` seconds at most; cancel what is left."""
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
    """The event loop of a process's threads that have none, kept open from call to call.

    What belongs to an event loop, such as the connections of a pool, is of use in the next call.
    It has no thread: one of those that wait for their calls drives it, and the calls of all run
    on it meanwhile. When that thread's own call is over, another one takes its place. Between
    calls it stands still.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()  # guards what follows
        self._driver: _Call | None = None  # the call whose thread drives the loop
        self._loop: asyncio.AbstractEventLoop | None = None
        # With a factory, it does not make the loop the thread's current one.
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)

    def run(self, function: Function) -> None:
        """Run it there, and wait for its end. Ctrl-C is as in `asyncio.run`."""
        call = _Call(function, self._turn)
        with self._turn:
            if self._loop is None:
                self._loop = Context().run(self._runner.get_loop)  # it would keep this context
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
        """Wait for the call, and drive the loop where nobody else does."""
        try:
            while self._take_turn(call):
                self._runner.run(call.watch())
        finally:
            with self._turn:
                if self._driver is call:
                    self._driver = None
                    self._turn.notify_all()

    def _take_turn(self, call: _Call) -> bool:
        """Wait until nobody else drives the loop; False if the call is over by then."""
        with self._turn:
            _wait_for(self._turn, lambda: call.over or self._driver in (None, call))
            if not call.over:
                self._driver = call
            return not call.over

    def close(self) -> None:
        """Cancel what is left on it and close it, unless a thread that may not end drives it."""
        with self._turn:
            if self._driver is None:
                self._runner.close()


_own_loop = _OwnLoop()
# Kept for ever: a loop that is freed is closed, and in a child process that takes the parent's loop
# out of the selector that both share.
_of_parents: list[_OwnLoop] = []


def _close_own_loop() -> None:
    _own_loop.close()


def _renew_own_loop() -> None:
    """Have a loop of its own in a child process, whose threads are gone."""
    global _own_loop
    _of_parents.append(_own_loop)
    _own_loop = _OwnLoop()


atexit.register(_close_own_loop)
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_renew_own_loop)
