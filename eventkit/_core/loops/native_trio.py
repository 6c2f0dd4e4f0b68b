"""The parts that are special for trio: tasks, scopes, and the steps of a coroutine."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from types import coroutine
from typing import Any

import trio
from anyio import Event
from anyio.abc import TaskGroup

# Marks the context variables of the task that runs `drive`.
_stepped_from: ContextVar[object] = ContextVar("eventkit_stepped_from", default=None)


@coroutine
def drive(
    worker: Any,  # `tasks.Stepping`
    variables: Context,
    steps: Coroutine[object, object, object],
    trap: object,
) -> Generator[object, object, None]:
    """Pass traps and results between the event loop and a handler, from its second step on.

    It steps the handler in the handler's own context variables, unless trio has changed the current
    ones: trio runs a call of `from_thread.run` in the task that waits for the thread, with the
    thread's context variables.
    """
    elsewhere = _stepped_from.get()
    sent: object = None
    thrown: BaseException | None = None
    try:
        _stepped_from.set(worker)
        while True:
            try:
                # trio sends an outcome, also for a cancellation. It throws only if the trap is not
                # one of trio.
                sent = yield trap
            except GeneratorExit as closed:
                try:
                    variables.run(steps.close)
                except Exception as broken:
                    raise closed from broken
                raise
            except BaseException as error:  # noqa: BLE001 - it is thrown into the handler
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
        # Otherwise this frame and the tracebacks in these variables keep each other alive.
        del sent, thrown, trap


def _call(step: Callable[[Any], object], value: Any) -> object:
    return step(value)


class NativeTasks:
    """Tasks in trio's nurseries: one nursery for each run, all inside one outer nursery.

    If a handler leaves a nursery open, the nursery around its task raises. So each run has its own
    nursery, and an error of this nursery is dropped.
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
        self._early: list[Callable[[], None]] = []  # starts that wait until the nursery is open

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

    @trio.lowlevel.enable_ki_protection  # otherwise a Ctrl-C could be raised here and be lost
    async def _surround(self, run: Any, worker: Any) -> None:
        try:
            async with trio.open_nursery() as run.nursery:
                self.spawn(run, worker)
        except BaseException:  # noqa: BLE001 - a handler has left a nursery open; see above
            pass
        finally:
            run.nursery = None  # otherwise the run and the nursery keep each other alive

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
            # A copy, because the task of a request may be running in this context.
            self._variables.copy().run(start, function, *args)
