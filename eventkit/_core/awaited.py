"""Runs handlers for a caller that waits: in its own task, and in a task group that it opens.

So the caller's scopes, deadlines and cancellations reach the handlers through the tree of scopes.
The caller's task is the first worker: handlers that never wait cost no task.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import cast

from anyio import CancelScope, create_task_group, current_time, get_cancelled_exc_class
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from eventkit._core.dispatch import Run, Terms, Turn, Worker
from eventkit._core.loops.tasks import drive_here
from eventkit._core.policy import cancel_requests, in_cancelled_scope


async def run_all(next_turn: Callable[[], Turn | None], terms: Terms) -> int:
    """Run the handlers of each event; those of the next begin when all of this one have ended.

    They begin in the given order, each in its own context variables. An event is asked for when
    its turn has come, and never before. Afterwards every delivery of those that were given has an
    outcome, whatever way this was left.

    Cancelling it cancels the handlers; those that have not begun then are undelivered.

    Returns:
        How many handlers have ended well.

    Raises:
        BaseException: What a handler raised that is neither an `Exception` nor a cancellation,
            after its siblings have been cancelled.
    """
    return await _AwaitedRun(next_turn, terms).work()


class _AwaitedRun(Run):
    """A run in the caller's task.

    One scope is around all its workers: that of the task group where there is one. The group has
    to be open before the first handler of an event begins: cancel scopes have to nest.
    """

    __slots__ = ("_deadline", "_first", "_scope", "_tasks")

    def __init__(self, next_turn: Callable[[], Turn | None], terms: Terms) -> None:
        super().__init__(next_turn, terms, drive_here())
        self._first: Worker | None = next(iter(self.workers))  # in the caller's task
        self._tasks: TaskGroup | None = None  # open while there may be helpers
        self._scope: CancelScope | None = None  # around all that the workers do
        self._deadline = math.inf

    @property
    def _is_cancelled(self) -> bool:
        """Whether the scope around the workers is."""
        return self._scope is not None and self._scope.cancel_called

    @property
    def late(self) -> bool:
        return self._is_cancelled and not self.fatal and current_time() >= self._deadline

    def set_deadline(self, seconds: float) -> None:
        self._deadline = current_time() + seconds
        assert self._scope is not None
        self._scope.deadline = self._deadline

    def cancel(self) -> None:
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    def advance(self, worker: Worker) -> bool:
        if self._is_cancelled or not super().advance(worker):
            return False
        self.must_hand_on = self._must_hand_on(worker)
        return True

    def _must_hand_on(self, worker: Worker) -> bool:
        if self._tasks is None:
            return self._needs_group()
        # `Task.cancel()` of the caller's task would not wait for a thread. So helpers begin the
        # handlers that run in threads.
        return self.turn.in_threads and worker is self._first

    def _needs_group(self) -> bool:
        turn = self.turn
        return turn.in_threads or (len(turn.indexes) > 1 and not self.terms.sequential)

    async def may_go_on(self, worker: Worker) -> bool:
        if not worker.received and not in_cancelled_scope():
            return True
        # A scope cancels again at each checkpoint; asyncio's `Task.cancel()` cancels only once.
        await checkpoint_if_cancelled()
        if worker.received_task_cancel and cancel_requests() > worker.requests:
            await checkpoint()  # if the handler did not receive it, it is raised here
            raise asyncio.CancelledError
        await worker.take_cancellation()
        return True

    def spawn(self, worker: Worker) -> None:
        assert self._tasks is not None
        try:
            self._tasks.start_soon(self._help, worker, name="eventkit handlers")
        except Exception as error:  # noqa: BLE001 - the caller's, once the handlers have ended
            self.miss(worker, error)

    async def work(self) -> int:
        """Have the handlers run. See `run_all`."""
        first = cast("Worker", self._first)
        self.terms.tally.runs.add(self)  # one step for all threads, and nothing to count yet
        try:
            if in_cancelled_scope():
                await checkpoint()
                # If this line is reached, a worker thread has called, and the thread's task was
                # cancelled before. AnyIO on asyncio does not tell this task, and
                # `checkpoint_if_cancelled` would wait for ever.
                raise asyncio.CancelledError
            await first.take_cancellation()
            while not self.fatal and (self.not_begun or self.advance(first)):
                self.workers.add(first)
                if self._needs_group():
                    await self._work_in_group(first)
                elif self.terms.timeout is not None:
                    with CancelScope() as self._scope:
                        await first.serve()
                else:
                    await first.serve()
                self._scope, self._deadline, self._timed = None, math.inf, False
                self._quiet_events = 0
                if self.not_begun or not self.exhausted:
                    await first.take_cancellation()
        finally:
            self._disband()
            self.terms.tally.leave(self)
            self.lose_the_rest()
            if self.fatal:
                raise self.fatal.pop()
        return self.handled

    async def _work_in_group(self, first: Worker) -> None:
        async with create_task_group() as self._tasks:
            self._scope = self._tasks.cancel_scope
            self.must_hand_on = self.turn.in_threads
            if not self.must_hand_on:
                await first.serve()
            if self.not_begun and not self._is_cancelled:
                self.must_hand_on = False
                self.call()
            self.workers.discard(first)
        self._tasks = None
        # Asyncio may have cancelled helpers before their first step: they say no farewell.
        self.workers.clear()
        self._coming = 0

    async def _help(self, worker: Worker) -> None:
        """Do a helper's part in a task of its own, which only a cancellation leaves as such."""
        try:
            if in_cancelled_scope():  # a task begins in it all the same
                await checkpoint()
            self._coming -= 1
            await worker.serve()
            await worker.take_cancellation()  # or AnyIO takes it for the whole group's
        except get_cancelled_exc_class():
            if not cancel_requests() and in_cancelled_scope():
                raise  # a trio nursery learns from its children that it was cancelled
            # On asyncio the waiting task is cancelled itself. Raised here too, the cancellation of
            # this task alone would reach its siblings, and AnyIO would keep it and the event alive.
            self.workers.discard(worker)
            if self.workers and not self._is_cancelled and not in_cancelled_scope():
                # Others do what this worker was to do next. Of the last worker, the caller does it.
                self.get_help()
                self.start_clock()
        finally:
            self.workers.discard(worker)

    def _disband(self) -> None:
        """Forget workers and scopes: a reference cycle would keep exceptions and events alive."""
        self.workers.clear()
        self._tasks = self._scope = self._first = None
