"""The parts that are special for asyncio: tasks, scopes, and the steps of a coroutine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context, copy_context
from types import coroutine
from typing import Any

from anyio import CancelScope, Event
from anyio.abc import TaskGroup


@coroutine
def drive(
    worker: Any,  # `tasks.Stepping`
    variables: Context,
    steps: Coroutine[object, object, object],
    trap: object,
) -> Generator[object, object, None]:
    """Pass traps and results between the event loop and a handler, from its second step on."""
    run, send = variables.run, steps.send
    sent: object = None
    thrown: BaseException | None = None
    try:
        while True:
            try:
                sent = yield trap
            except GeneratorExit as closed:
                try:
                    run(steps.close)
                except Exception as broken:
                    raise closed from broken
                raise
            except BaseException as error:  # noqa: BLE001 - it is thrown into the handler
                worker.note_thrown(error)
                thrown = error
            if thrown is None:
                trap = run(send, sent)
            else:
                trap = run(steps.throw, thrown)
                thrown = None
    except StopIteration:
        pass
    finally:
        # Otherwise this frame and the tracebacks in these variables keep each other alive.
        del sent, thrown, trap


class NativeTasks:
    """Tasks of the running event loop without an AnyIO task group.

    A native task costs a ninth of `TaskGroup.start_soon`. The owner of a task has to keep it alive,
    and to wait for it. The run of the task does both.
    """

    drive = staticmethod(drive)
    primed = True

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._variables = copy_context()
        self.scope = type(CancelScope())  # AnyIO's class for asyncio: calling it directly is cheap
        self.time = self._loop.time

    def open(self, group: TaskGroup, over: Event) -> None:
        """Do nothing: on asyncio a native task needs no task group."""

    def spawn(self, run: Any, worker: Any) -> None:  # Any: `tasks.Workplace`, and its worker
        steps = run.work(worker)
        # If a task is cancelled before its first step, nothing of its coroutine runs, not even
        # `finally`. So the coroutine takes a first step to a bare `yield` before the task is made.
        steps.send(None)
        # Not `create_task`: a task factory of the application may make eager tasks, which recurse.
        variables = self._variables.copy()  # two tasks cannot be entered in one context at once
        try:
            worker.task = asyncio.Task(steps, loop=self._loop, name=self._name, context=variables)
        except Exception as error:  # noqa: BLE001 - the run handles it
            with suppress(StopIteration):
                steps.throw(error)  # the coroutine ends as if its task had failed at once

    start = spawn

    def call_soon(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def call_at(self, when: float, function: Callable[[], object]) -> Callable[[], object]:
        return self._loop.call_at(when, function).cancel
