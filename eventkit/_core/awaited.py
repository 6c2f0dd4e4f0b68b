"""Runs handlers for a caller that waits: in the caller's task, and in a task group inside it.

So the caller's scopes, deadlines and cancellations reach the handlers through the tree of scopes.
The caller's task is the first worker, so handlers that never wait cost no task.
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
    """Run the handlers of all events, one event after the other.

    The handlers of an event begin in order, each in its own context variables. The next event is
    taken when all handlers of the event before have ended, and never earlier. At the end every
    delivery has an outcome, also if this call raises.

    Cancelling the call cancels the handlers. Those that have not begun are then undelivered.

    Returns:
        How many handlers have ended well.

    Raises:
        BaseException: A handler raised an exception that is neither an `Exception` nor a
            cancellation. The other handlers were cancelled.
    """
    return await _AwaitedRun(next_turn, terms).work()


class _AwaitedRun(Run):
    """A run in the caller's task.

    One scope is around all its workers: that of the task group, if there is one. The group must be
    open before the first handler of an event begins, because cancel scopes have to nest.
    """

    __slots__ = ("_deadline", "_first", "_scope", "_tasks")

    def __init__(self, next_turn: Callable[[], Turn | None], terms: Terms) -> None:
        super().__init__(next_turn, terms, drive_here())
        self._first: Worker | None = next(iter(self.workers))  # in the caller's task
        self._tasks: TaskGroup | None = None  # open while there may be other workers
        self._scope: CancelScope | None = None  # around everything that the workers do
        self._deadline = math.inf

    @property
    def _is_cancelled(self) -> bool:
        """Whether the scope around the workers is cancelled."""
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
        # `Task.cancel()` of the caller's task would not wait for a thread. So other workers begin
        # the handlers that run in threads.
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
        except Exception as error:  # noqa: BLE001 - the caller gets it when all handlers have ended
            self.miss(worker, error)

    async def work(self) -> int:
        """Run the handlers. See `run_all`."""
        first = cast("Worker", self._first)
        self.terms.tally.runs.add(self)  # without the lock: one step, and nothing is counted yet
        try:
            if in_cancelled_scope():
                await checkpoint()
                # This line is reached only if a worker thread has called, and the thread's task was
                # cancelled before. AnyIO on asyncio does not cancel this task then, and
                # `checkpoint_if_cancelled` would never return.
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
        # asyncio may have cancelled other workers before their first step. Nothing of them has run.
        self.workers.clear()
        self._coming = 0

    async def _help(self, worker: Worker) -> None:
        """Run another worker in its own task; the task raises nothing but a cancellation."""
        try:
            if in_cancelled_scope():  # a task begins even in a cancelled scope
                await checkpoint()
            self._coming -= 1
            await worker.serve()
            await worker.take_cancellation()  # otherwise AnyIO takes it for one of the whole group
        except get_cancelled_exc_class():
            if not cancel_requests() and in_cancelled_scope():
                raise  # a trio nursery learns from its children that it was cancelled
            # On asyncio the waiting task itself is cancelled. If it were raised here, too, the
            # cancellation of this task alone would reach its siblings, and AnyIO would keep it and
            # the event alive.
            self.workers.discard(worker)
            if self.workers and not self._is_cancelled and not in_cancelled_scope():
                # The other workers do the rest of this worker. After the last one, the caller does.
                self.get_help()
                self.start_clock()
        finally:
            self.workers.discard(worker)

    def _disband(self) -> None:
        """Drop workers and scopes: a reference cycle would keep exceptions and events alive."""
        self.workers.clear()
        self._tasks = self._scope = self._first = None
