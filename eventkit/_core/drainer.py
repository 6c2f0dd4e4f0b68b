"""Owns delivery behind the response: the units of work that have ended, and their runs.

Code with a task group that outlives requests makes a `Drainer` in it, and submits units that have
ended. Knows nothing of HTTP and of servers.

All workers of a run are alike. The worker that ends last goes on with the next event, and in the
end it ends the run. No scope of user code is around the workers. So each worker has a scope, the
outermost of its task, and cancelling these scopes cancels the run. A scope cancels again at each
checkpoint, shields hold, and threads are waited for.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import suppress
from contextvars import copy_context
from dataclasses import asdict
from threading import get_ident
from types import coroutine
from typing import Any

from anyio import CancelScope, Event, move_on_after
from anyio.abc import TaskGroup

from eventkit._core.dispatch import NO_TURN, Run, Terms, Worker
from eventkit._core.endings import abandon
from eventkit._core.log import log
from eventkit._core.loops.changes import GRACE_SECONDS, Change
from eventkit._core.loops.running import current_loop
from eventkit._core.loops.tasks import Tasks, tasks_here
from eventkit._core.policy import cancel_requests
from eventkit._core.state import BusState
from eventkit._core.units import Ending, Unit


class Drainer:
    """Delivers units of work in the order in which they ended, each in its own tasks.

    It belongs to the event loop of its task group. The task group has to wait for `close`. No
    handler, observer or reporter can end it.

    | state | a submitted unit | next state after |
    |---|---|---|
    | open | begins, or waits while `concurrency` units are drained | `close` |
    | closing | the same | nothing is left, the deadline, or a cancellation |
    | closed | is undelivered | |

    Native tasks are used, because they cost a fraction of those of a task group. A guard task in
    the task group represents them: the group ends when they have ended, and a cancellation of the
    group reaches them.

    Args:
        state: The state of the bus of these units.
        tasks: The task group of the guard. Tasks start with the context variables of this moment.
        concurrency: How many units are drained at once.
        max_pending: How many deliveries may wait before it is full; None for no limit. It always
            takes a submitted unit: the submitter has to hold back new work.
        watch: Called with the number of waiting deliveries when it changes, and when a request
            begins to wait for room; then the second argument is True. It must not raise.

    Attributes:
        full: Whether `max_pending` deliveries wait.
        closed: Whether it takes no more units.
    """

    def __init__(
        self,
        state: BusState,
        tasks: TaskGroup,
        *,
        concurrency: int,
        max_pending: int | None,
        watch: Callable[[int, bool], None] = lambda waiting, held: None,
    ) -> None:
        self._state = state
        self._terms = Terms(state.sequential, state.handler_timeout, state.tally, state.report)
        self._loop = current_loop()
        self._thread = get_ident()
        self._tasks = tasks_here(f"eventkit drains {state.name!r}")
        self._places = concurrency  # how many runs there may be
        self._max_pending = math.inf if max_pending is None else max_pending
        self._watch = watch
        self._open: set[Unit] = set()
        self._waiting: deque[tuple[Ending, int]] = deque()  # each with how many deliveries it has
        self._waiting_deliveries = 0
        self.full = False
        self._draining: set[BackgroundRun] = set()
        self._starting = False  # see `_start_waiting`
        self._closing = False
        self.closed = False
        self._lost = Counter[str]()  # undelivered deliveries at the end, by handler
        self._over = Event()  # set when no more tasks are started
        self._room = Change()  # announced when it is not full
        self._change = Change()  # announced when a unit has ended, or has perhaps nothing pending
        self._cancel_timer: Callable[[], object] | None = None
        state.tally.drainers.add(self)
        # In a copy of the context: with older releases of AnyIO, eager tasks begin in it.
        copy_context().run(tasks.start_soon, self._guard)
        self._tasks.open(tasks, self._over)

    @property
    def units_waiting(self) -> int:
        """Units of work that have ended and wait for their drain."""
        return len(self._waiting)

    @property
    def units_draining(self) -> int:
        """Units of work that are being drained."""
        return len(self._draining)

    @property
    def stuck(self) -> bool:
        """Whether handlers that could not be ended still run after `close`."""
        return self.closed and bool(self._draining)

    def expect(self, unit: Unit) -> None:
        """Register an open unit: `close` waits for it if it has pending deliveries."""
        self._open.add(unit)
        unit.emptied = self._emptied

    def forget(self, unit: Unit) -> None:
        """Unregister a unit from `expect`."""
        self._open.discard(unit)
        if self._closing or self.closed:  # else no task waits for a change
            self._change.announce()

    def submit(self, unit: Unit, *, success: bool) -> None:
        """End a unit: release or discard its undecided events, and deliver them in turn.

        It never blocks and is not a checkpoint, so a cancellation of the caller has no effect.
        After `close` the unit's remaining deliveries are undelivered.
        """
        if unit.close_if_idle(success=success):
            pass  # most requests: nothing was published
        elif self.closed:
            self._abandon(unit)
        else:
            self._take(Ending(unit, success, self._loop))
        self.forget(unit)

    def begin(self, ending: Ending) -> None:
        """Deliver the events of an ending, in addition to the submitted units.

        It does not count for `concurrency`, so the caller has to keep the number of endings small.
        """
        self._places += 1
        self._start(ending)

    @property
    def is_crowded(self) -> bool:
        """Whether more than half of `max_pending` deliveries wait."""
        return self._waiting_deliveries * 2 > self._max_pending

    async def wait_for_room(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds until it is not full; False if it is still full."""
        tally = self._state.tally
        tally.shift("held", 1)
        self._watch(self._waiting_deliveries, True)
        try:
            with move_on_after(timeout):
                while self.full:
                    await self._room.wait()
        finally:
            tally.shift("held", -1)
        tally.shift("refused", int(self.full))
        return not self.full

    async def close(self, timeout: float) -> None:
        """Deliver the remaining events within `timeout` seconds; the rest is then undelivered.

        It also waits for expected units with pending deliveries. It logs the pending deliveries by
        handler at the start, and those that were lost at the end. Cancelled handlers have a moment
        for their clean-up. A handler that cannot be cancelled, such as a plain `def` in a thread,
        is named in the log and goes on. If the caller is cancelled, the time is over.
        """
        if self._closing:
            return
        self._closing = True
        if self._busy():
            self._log(logging.INFO, "delivering before shutdown", self._by_handler())
        try:
            with move_on_after(timeout):
                while self._busy():
                    await self._change.wait()
        finally:
            self._stop()
            try:
                with move_on_after(GRACE_SECONDS, shield=True):
                    while self._draining:
                        await self._change.wait()
            finally:  # `Task.cancel()` ignores shields
                self._say_what_is_left()

    async def _guard(self) -> None:
        """Represent the tasks in the task group: wait for them, and cancel them if cancelled."""
        try:
            await self._over.wait()
        finally:
            self._stop()
            try:
                with CancelScope(shield=True):
                    while self._draining:
                        await self._change.wait()
            finally:  # as above
                self._state.tally.drainers.discard(self)

    def _busy(self) -> bool:
        return bool(
            self._waiting or self._draining or any(unit.queue.waiting for unit in self._open)
        )

    def _stop(self) -> None:
        """Cancel the units that are drained, and close those that wait or have not ended."""
        if self.closed:
            return
        self.closed = True
        self._state.count_losses(self._lost)
        self._over.set()
        for run in [*self._draining]:
            run.cancel()
        self._abandon(*(ending.unit for ending, _ in self._waiting), *self._open)
        self._waiting.clear()
        self._waiting_deliveries, self.full = 0, False
        self._room.announce()
        if self._cancel_timer is not None:
            self._cancel_timer()

    def _abandon(self, *units: Unit) -> None:
        try:
            abandon(*units)
        except BaseException as error:  # noqa: BLE001 - of an observer; the server must not get it
            log(logging.CRITICAL, "an observer failed", error=error, bus=self._state.name)

    def _take(self, ending: Ending) -> None:
        """Start a unit, or let it wait for its turn."""
        if len(self._draining) < self._places:
            self._start(ending)
        else:
            deliveries = ending.unit.queue.waiting
            self._waiting.append((ending, deliveries))
            self._count_waiting(deliveries)

    def _count_waiting(self, more: int) -> None:
        self._waiting_deliveries += more
        self.full = self._waiting_deliveries >= self._max_pending
        self._watch(self._waiting_deliveries, False)

    def _start(self, ending: Ending) -> None:
        run = BackgroundRun(ending, self._terms, self._tasks, self)
        self._draining.add(run)
        self._terms.tally.runs.add(run)
        (worker,) = run.workers
        self._tasks.start(run, worker)

    def _start_waiting(self) -> None:
        """Start waiting units, up to the limit.

        A run that cannot start ends in this call. Then `ended` must not start others: this loop
        does.
        """
        self._starting = True
        try:
            while self._waiting and len(self._draining) < self._places:
                ending, deliveries = self._waiting.popleft()
                self._count_waiting(-deliveries)
                self._start(ending)
        finally:
            self._starting = False
        if not self.full:
            self._room.announce()

    def ended(self, run: BackgroundRun) -> None:
        """Note that a run has ended, and start the next unit."""
        if run.fatal:
            log(logging.CRITICAL, "a drain was ended", error=run.fatal.pop(), bus=self._state.name)
        self._draining.remove(run)
        self._places -= run.ending.is_beside
        if self._waiting and not self._starting:
            self._start_waiting()
        if self._closing or self.closed:  # as in `forget`
            self._change.announce()

    def expire_at(self, deadline: float) -> None:
        """Expire the runs with this deadline when it comes.

        One timer serves all runs. It is set for the earliest deadline, then for the next one. All
        units have the same time limit, so a new deadline is never earlier than the timer's.
        """
        if self._cancel_timer is None and not self.closed:
            self._cancel_timer = self._tasks.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._cancel_timer = None
        now = self._tasks.time()
        for run in self._draining:
            if run.deadline <= now:
                run.expire()
        later = min((run.deadline for run in self._draining), default=math.inf)
        if later != math.inf:
            self.expire_at(later)

    def _emptied(self) -> None:
        """Note that a unit may have nothing pending now. Any thread may call it."""
        if not self._closing or self.closed:  # once closed, it waits only for running units
            return
        if get_ident() == self._thread:
            self._change.announce()
        else:
            with suppress(RuntimeError):  # the event loop has ended in the meantime
                self._tasks.call_soon(self._change.announce)

    def _by_handler(self) -> Counter[str]:
        """How many deliveries of each handler wait here, or run anywhere.

        A delivery that was taken from its queue and has not begun is not counted.
        """
        draining = [run.ending.unit for run in self._draining]
        ended = [ending.unit for ending, _ in self._waiting]
        units = [*draining, *ended, *self._open]
        waiting = (each for unit in units for each in unit.queue.pending)
        handlers = (delivery.handler for each in waiting for delivery in each.deliveries())
        return self._state.tally.running_by_handler() + Counter(handlers)

    def _say_what_is_left(self) -> None:
        lost = self._lost
        self._state.count_losses_no_more(lost)
        for run in self._draining:  # the runs that could not be ended
            lost.update(delivery.handler for delivery in run.running)
        self._log(
            logging.ERROR if lost else logging.INFO,
            "eventkit has stopped",
            lost,
            still_running=_listed(self._state.tally.running_by_handler()),
            **asdict(self._state.tally.snapshot()),
        )

    def _log(self, level: int, message: str, by_handler: Counter[str], **facts: object) -> None:
        log(
            level,
            message,
            error=None,
            bus=self._state.name,
            left=by_handler.total(),
            handlers=_listed(by_handler),
            **facts,
        )


def _listed(by_handler: Counter[str]) -> str:
    return ", ".join(f"{name} x{times}" for name, times in by_handler.items())


@coroutine
def _bare_yield() -> Generator[None]:
    """Yield once to asyncio's event loop: see `NativeTasks.spawn` in `native_asyncio`."""
    yield


class BackgroundRun(Run):
    """A run in its own tasks.

    Attributes:
        ending: The unit of work that is delivered.
        deadline: When the time limit of the current event ends.
        nursery: On trio, the nursery of its tasks.
    """

    __slots__ = ("_drainer", "_expired", "_stopped", "_tasks", "deadline", "ending", "nursery")

    def __init__(self, ending: Ending, terms: Terms, tasks: Tasks, drainer: Drainer) -> None:
        super().__init__(ending.next_turn, terms, tasks.drive)
        self.ending = ending
        self.deadline = math.inf
        self.nursery: Any = None  # Any: trio's
        self._tasks = tasks
        self._drainer = drainer
        self._stopped = False  # no handler begins any more
        self._expired = False  # no handler of the current event begins any more
        self._coming = 1  # the first worker, which the drainer calls

    def miss(self, worker: Worker, error: Exception) -> None:
        """End the run, because a worker's task could not be started. See `Workplace`."""
        super().miss(worker, error)
        self._leave(worker)

    @property
    def late(self) -> bool:
        return self._expired and not self._stopped

    def spawn(self, worker: Worker) -> None:
        self._tasks.spawn(self, worker)

    def set_deadline(self, seconds: float) -> None:
        self.deadline = self._tasks.time() + seconds
        if seconds != math.inf:
            self._drainer.expire_at(self.deadline)

    def expire(self) -> None:
        """Cancel the handlers of the current event: their time limit has ended."""
        self.deadline = math.inf
        self._expired = self.cancelled = True
        self._cancel_scopes()

    def cancel(self) -> None:
        """End the run: cancel the running handlers; those that have not begun are undelivered."""
        self._stopped = self.cancelled = True
        self._cancel_scopes()

    def _cancel_scopes(self) -> None:
        for worker in self.workers:
            if worker.scope is not None:
                worker.scope.cancel()

    async def may_go_on(self, worker: Worker) -> bool:
        if worker.received and not self.cancelled:
            if worker.received_task_cancel and cancel_requests() > worker.requests:
                return False
            await worker.take_cancellation()
        return not self.cancelled

    async def work(self, worker: Worker) -> None:
        """Run one worker. See `Workplace`."""
        try:
            try:
                if self._tasks.primed:
                    await _bare_yield()
            finally:
                self._coming -= 1  # also if its task was cancelled before the first step
            while not self._stopped:
                with self._tasks.scope() as worker.scope:
                    if self.turn is NO_TURN:
                        await self.ending.begin()
                    await worker.serve()
                if not self._expired or self.is_shared:
                    break
                self._expired = self._timed = False
                self.cancelled = self._stopped
                await worker.take_cancellation()
        except BaseException as error:  # noqa: BLE001 - some of them would end asyncio's loop
            worker.received |= not self.end(error)
        finally:
            worker.scope = None
            if worker.received and not self.cancelled:
                self.call()  # only its task was cancelled; another worker does the rest
            self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        worker.task = None
        self.workers.discard(worker)
        if self.workers:
            return
        try:
            self.lose_the_rest()
            self.ending.end()
        except BaseException as error:  # noqa: BLE001 - an observer's, as above
            self.fatal = self.fatal or [error]
        self.terms.tally.leave(self)
        self._drainer.ended(self)
