"""What trio does in ways of its own: tasks, scopes, and the steps of a coroutine."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from types import coroutine
from typing import Any

import trio
from anyio import Event
from anyio.abc import TaskGroup

# What `drive` knows the context variables of its task by.
_stepped_from: ContextVar[object] = ContextVar("eventkit_stepped_from", default=None)


@coroutine
def drive(
    worker: Any,  # `tasks.Stepping`
    variables: Context,
    steps: Coroutine[object, object, object],
    trap: object,
) -> Generator[object, object, None]:
    """Be the pipe between the event loop and a handler, from its second step on.

    It steps the handler in its own context variables. Not so where trio has exchanged them: trio
    runs what a thread calls by `from_thread.run` in the task that waits for the thread, and in the
    thread's context variables.
    """
    elsewhere = _stepped_from.get()
    sent: object = None
    thrown: BaseException | None = None
    try:
        _stepped_from.set(worker)
        while True:
            try:
                # Trio sends an outcome, also of a cancellation. It throws only where the trap is
                # none of trio's.
                sent = yield trap
            except GeneratorExit as closed:
                try:
                    variables.run(steps.close)
                except Exception as broken:
                    raise closed from broken
                raise
            except BaseException as error:  # noqa: BLE001 - it is the handler's
                thrown = error
            step = variables.run if _stepped_from.get() is worker else _call
            if thrown is None:
                trap = step(steps.send, sent)
            else:
                trap = step(steps.throw, thrown)
                thrown = None
    except StopIteration:
        pass
    finally:
        _stepped_from.set(elsewhere)
        # Or this frame and the traceback of what they hold keep each other alive.
        del sent, thrown, trap


def _call(step: Callable[[Any], object], value: Any) -> object:
    return step(value)


class NativeTasks:
    """Tasks in nurseries of trio's own: one nursery for each run, all of them inside one.

    A handler that leaves a nursery open makes the nursery around its task raise. So each run has a
    nursery of its own, whose error goes no further.
    """

    primed = False  # trio takes the first step of each task
    drive = staticmethod(drive)
    scope = trio.CancelScope
    time = staticmethod(trio.current_time)

    def __init__(self, name: str) -> None:
        self._name = name
        self._token = trio.lowlevel.current_trio_token()
        self._variables = copy_context()
        self._nursery: trio.Nursery | None = None
        self._early: list[Callable[[], None]] = []  # what is to be started once that is open

    def open(self, group: TaskGroup, over: Event) -> None:
        self._variables.copy().run(group.start_soon, self._hold, over)

    @trio.lowlevel.enable_ki_protection
    async def _hold(self, over: Event) -> None:
        async with trio.open_nursery() as self._nursery:
            self._nursery.cancel_scope.shield = True  # runs are cancelled by their owner
            for start in self._early:
                start()
            self._early.clear()
            await over.wait()

    def start(self, run: Any, worker: Any) -> None:  # Any: `tasks.Workplace`, and its worker
        try:
            self._start(self._surround, run, worker)
        except Exception as error:  # noqa: BLE001  # pragma: no cover - the nursery outlives all runs
            run.miss(worker, error)

    @trio.lowlevel.enable_ki_protection  # or Ctrl-C could come in here, where it would be lost
    async def _surround(self, run: Any, worker: Any) -> None:
        try:
            async with trio.open_nursery() as run.nursery:
                self.spawn(run, worker)
        except BaseException:  # noqa: BLE001 - a nursery that a handler has left open; see above
            pass
        finally:
            run.nursery = None  # or the two keep each other alive

    def spawn(self, run: Any, worker: Any) -> None:
        try:
            run.nursery.start_soon(run.work, worker, name=self._name)
        except Exception as error:  # noqa: BLE001 - as above
            run.miss(worker, error)

    def call_soon(self, function: Callable[[], object]) -> None:
        self._token.run_sync_soon(function)

    def call_at(self, when: float, function: Callable[[], object]) -> Callable[[], object]:
        scope = trio.CancelScope()

        async def timer() -> None:
            with scope:
                await trio.sleep_until(when)
                function()

        self._start(timer)
        return scope.cancel

    def _start(self, function: Callable[..., Any], *args: object) -> None:
        if self._nursery is None:
            self._early.append(lambda: self._start(function, *args))
        else:
            start = self._nursery.start_soon
            # A copy, because a request's task may be at work in it.
            self._variables.copy().run(start, function, *args)
