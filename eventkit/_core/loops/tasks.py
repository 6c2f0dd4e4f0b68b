"""Owns what differs between asyncio and trio where handlers run: tasks, scopes, steps, timers."""

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
    """Whose task drives a handler, as far as `drive` knows it."""

    def note_thrown(self, error: BaseException) -> None:
        """The event loop throws this into the handler."""
        ...


# What `await` is from the second step of a coroutine on: a pipe between the event loop and it.
Drive = Callable[
    [Any, Context, Coroutine[object, object, object], object], Awaitable[None]
]  # Any: a `Stepping`; a protocol in a callable would have to be matched exactly


class Tasks(Protocol):
    """Native tasks of the running event loop, for what runs behind the response.

    Attributes:
        scope: Makes a cancel scope, a native one where that costs less.
        time: The time of the event loop, in seconds.
        drive: Goes on with a coroutine that was stepped by hand.
        primed: Whether a task is brought to a first bare yield before it is one, so that a
            cancellation before its first step finds it begun.
    """

    scope: Callable[[], AbstractContextManager[Any]]  # Any: AnyIO's or trio's, which are alike
    time: Callable[[], float]
    drive: Drive
    primed: bool

    def open(self, group: TaskGroup, over: Event) -> None:
        """Have the group own what has to own the tasks, until `over` is set and they have ended."""
        ...

    def start(self, run: Workplace, worker: Any) -> None:
        """Start the first task of a run. Where that fails, the run ends."""
        ...

    def spawn(self, run: Workplace, worker: Any) -> None:
        """Start another task of a run. Where that fails, the run ends."""
        ...

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call it on the event loop; from any thread."""
        ...

    def call_at(self, when: float, function: Callable[[], object]) -> Callable[[], object]:
        """Call it once at that time; what is returned takes that back."""
        ...


class Workplace(Protocol):
    """What tasks are started for.

    Attributes:
        nursery: Where they are, on trio.
    """

    nursery: Any

    async def work(self, worker: Any) -> None:
        """What a task does, to its end; no exception leaves it."""
        ...

    def miss(self, worker: Any, error: Exception) -> None:
        """The worker's task could not be started, and nothing of `work` has run."""
        ...


def tasks_here(name: str) -> Tasks:
    """Native tasks of the event loop that calls, of this name."""
    tasks: Tasks = _differences().NativeTasks(name)
    return tasks


def drive_here() -> Drive:
    """What goes on with a stepped coroutine on the event loop that calls."""
    drive: Drive = _differences().drive
    return drive


def _differences() -> ModuleType:
    if on_trio():
        from eventkit._core.loops import native_trio

        return native_trio
    return native_asyncio
