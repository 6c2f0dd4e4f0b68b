"""Owns the interface to the differences of asyncio and trio: tasks, scopes, steps, timers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from contextvars import Context
from types import ModuleType
from typing import Any, Protocol

from anyio import Event
from anyio.abc import TaskGroup

from eventkit._core.loops import native_asyncio
from eventkit._core.loops.running import on_trio


class Stepping(Protocol):
    """The part of a worker that `drive` uses."""

    def note_thrown(self, error: BaseException) -> None:
        """Note that the event loop throws this exception into the handler."""
        ...


# Does what `await` does, from the second step of a coroutine on.
Drive = Callable[
    [Any, Context, Coroutine[object, object, object], object], Awaitable[None]
]  # Any: a `Stepping`; a protocol in a callable would have to be matched exactly


class Tasks(Protocol):
    """Native tasks of the running event loop, for deliveries behind the response.

    Attributes:
        scope: Makes a cancel scope; a native one if that is cheaper.
        time: Returns the time of the event loop, in seconds.
        drive: Goes on with a coroutine whose first step was taken by hand.
        primed: Whether the coroutine takes a step to a bare `yield` before its task is made, so
            that its `finally` blocks run even if the task is cancelled before its first step.
    """

    scope: Callable[[], AbstractContextManager[Any]]  # Any: AnyIO's or trio's, which are alike
    time: Callable[[], float]
    drive: Drive
    primed: bool

    def open(self, group: TaskGroup, over: Event) -> None:
        """Start what the tasks need in the group, until `over` is set and all tasks have ended."""
        ...

    def start(self, run: Workplace, worker: Any) -> None:
        """Start the first task of a run. If that fails, the run ends."""
        ...

    def spawn(self, run: Workplace, worker: Any) -> None:
        """Start another task of a run. If that fails, the run ends."""
        ...

    def call_soon(self, function: Callable[[], object]) -> None:
        """Schedule a call on the event loop, from any thread."""
        ...

    def call_at(self, when: float, function: Callable[[], object]) -> Callable[[], object]:
        """Schedule a call at that time; the function that is returned cancels it."""
        ...


class Workplace(Protocol):
    """A run, as the tasks know it.

    Attributes:
        nursery: On trio, the nursery of its tasks.
    """

    nursery: Any

    async def work(self, worker: Any) -> None:
        """Do the work of one task; it never raises."""
        ...

    def miss(self, worker: Any, error: Exception) -> None:
        """Note that the worker's task could not be started: nothing of `work` has run."""
        ...


def tasks_here(name: str) -> Tasks:
    """Native tasks of the calling event loop; `name` is the name of the tasks."""
    tasks: Tasks = _differences().NativeTasks(name)
    return tasks


def drive_here() -> Drive:
    """The `drive` function for the calling event loop."""
    drive: Drive = _differences().drive
    return drive


def _differences() -> ModuleType:
    if on_trio():
        from eventkit._core.loops import native_trio

        return native_trio
    return native_asyncio
