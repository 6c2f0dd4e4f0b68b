"""Owns delivery behind the response: the units of work that have ended, and their runs.

Whoever has a task group that outlives requests makes a `Drainer` in it and submits what has ended.
Knows nothing of HTTP and of servers.

All workers of a run are alike. The worker that ends last goes on with the next event, and in the
end it ends the run. No scope of a user's is around them, so each worker has one, the outermost of
its task, and the run is cancelled by cancelling those scopes. A scope cancels again at each
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
    """Delivers units of work in the order in which they ended, each in tasks of its own.

    Belongs to the event loop of its task group, which has to wait for `close`. No handler,
    observer or reporter can end it.

    | state | what is submitted | left by |
    |---|---|---|
    | open | begins, or waits while `concurrency` units are drained | `close` |
    | closing | the same | nothing left, the deadline, or a cancellation |
    | closed | is undelivered | |

    The tasks are native ones, which cost a fraction of a task group's. A guard in the task group
    stands for them: the group ends when they have ended, and a cancellation of it reaches them.

    Args:
        state: Of the bus whose units they are.
        tasks: The group that the guard is in. Tasks start in the context variables of this moment.
        concurrency: How many units are drained at once.
        max_pending: How many deliveries may wait before it calls itself full; None for no limit.
            What is submitted is always taken: holding back new work is for the submitter.
        watch: Called with how many deliveries wait when that changes, and when somebody begins to
            wait for room, which its second argument says. It must not raise.

    Attributes:
        full: Whether as many deliveries wait as may.
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
        self._starting = False  # what waits: see `_start_waiting`
        self._closing = False
        self.closed = False
        self._lost = Counter[str]()  # what was undelivered at the end, by handler
        self._over = Event()  # no more tasks are started
        self._room = Change()  # it is not full
        self._change = Change()  # a unit has ended, or may have nothing pending any more
        self._cancel_timer: Callable[[], object] | None = None
        state.tally.drainers.add(self)
        # In a copy, because older releases of AnyIO let eager tasks begin in here.
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
        """Whether, once closed, handlers go on that could not be ended."""
        return self.closed and bool(self._draining)

    def expect(self, unit: Unit) -> None:
        """Count on a unit that has begun: once it has something pending, `close` waits for it."""
        self._open.add(unit)
        unit.emptied = self._emptied

    def forget(self, unit: Unit) -> None:
        """Count on it no longer."""
        self._open.discard(unit)
        if self._closing or self.closed:  # else nobody waits for it
            self._change.announce()

    def submit(self, unit: Unit, *, success: bool) -> None:
        """End a unit: release or discard what nobody has decided, deliver when its turn comes.

        Never blocks, no checkpoint, so whatever becomes of the caller's task does not matter.
        After `close` what is left to deliver is undelivered.
        """
        if unit.close_if_idle(success=success):
            pass  # so it is with most requests: nothing was published
        elif self.closed:
            self._abandon(unit)
        else:
            self._take(Ending(unit, success, self._loop))
        self.forget(unit)

    def begin(self, ending: Ending) -> None:
        """Deliver what an ending gives, beside the units that are submitted.

        It takes no room of theirs, so whoever begins it sees to it that there are few.
        """
        self._places += 1
        self._start(ending)

    @property
    def is_crowded(self) -> bool:
        """Whether more than half as many deliveries wait as may."""
        return self._waiting_deliveries * 2 > self._max_pending

    async def wait_for_room(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds until it is not full, and say whether it is so."""
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
        """Deliver what is left within `timeout` seconds; what remains then is undelivered.

        Waits also for units that are expected and have something pending. Logs at its start what
        is pending, by handler, and at its end what was left. Handlers that are cancelled have a
        moment for their clean-up. What cannot be cancelled, a plain `def` in a thread for one, is
        named in the log and left to itself. If the caller is cancelled, the time is over.
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
            finally:  # `Task.cancel()` knows no shields
                self._say_what_is_left()

    async def _guard(self) -> None:
        """Stand for the tasks in the task group: wait for all, and have a cancellation end all."""
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
        """Cancel what is drained, and close what waits or has not even ended."""
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
        except BaseException as error:  # noqa: BLE001 - an observer's, which the server would get
            log(logging.CRITICAL, "an observer failed", error=error, bus=self._state.name)

    def _take(self, ending: Ending) -> None:
        """Start a unit, or have it wait for its turn."""
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
        """Start what waits, as far as it may begin.

        A run that cannot start ends in here, and `ended` comes back to this loop.
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
        """A unit is done with: let the next one begin."""
        if run.fatal:
            log(logging.CRITICAL, "a drain was ended", error=run.fatal.pop(), bus=self._state.name)
        self._draining.remove(run)
        self._places -= run.ending.is_beside
        if self._waiting and not self._starting:
            self._start_waiting()
        if self._closing or self.closed:  # as in `forget`
            self._change.announce()

    def expire_at(self, deadline: float) -> None:
        """Have runs expire whose deadline this is.

        One timer does for all: it is set for the earliest deadline, and again for the next one.
        The limits of all units are equal, so no deadline comes before one that is set already.
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
        """A unit may have nothing pending any more. May be called in any thread."""
        if not self._closing or self.closed:  # once closed, it waits only for what it drains
            return
        if get_ident() == self._thread:
            self._change.announce()
        else:
            with suppress(RuntimeError):  # the event loop has ended meanwhile
                self._tasks.call_soon(self._change.announce)

    def _by_handler(self) -> Counter[str]:
        """How many deliveries each handler has waiting here, or running anywhere.

        One that is taken from its queue and comes to its first step next, is neither.
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
        for run in self._draining:  # what could not be ended
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
    """Go through the event loop once, by asyncio's simplest trap: see `NativeTasks.spawn` there."""
    yield


class BackgroundRun(Run):
    """A run in tasks of its own.

    Attributes:
        ending: The unit of work that is delivered.
        deadline: When the time of the event at hand is up.
        nursery: Where its tasks are, on trio.
    """

    __slots__ = ("_drainer", "_expired", "_stopped", "_tasks", "deadline", "ending", "nursery")

    def __init__(self, ending: Ending, terms: Terms, tasks: Tasks, drainer: Drainer) -> None:
        super().__init__(ending.next_turn, terms, tasks.drive)
        self.ending = ending
        self.deadline = math.inf
        self.nursery: Any = None  # Any: trio's
        self._tasks = tasks
        self._drainer = drainer
        self._stopped = False  # nothing begins any more
        self._expired = False  # nothing of this event begins any more
        self._coming = 1  # the first worker, which the drainer calls

    def miss(self, worker: Worker, error: Exception) -> None:
        """End, because a worker's task could not be started. See `Workplace`."""
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
        """The time of the event at hand is up."""
        self.deadline = math.inf
        self._expired = self.cancelled = True
        self._cancel_scopes()

    def cancel(self) -> None:
        """End it: what runs is cancelled, and what has not begun is undelivered."""
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
        """Do one worker's part. See `Workplace`."""
        try:
            try:
                if self._tasks.primed:
                    await _bare_yield()
            finally:
                self._coming -= 1  # also where its task was cancelled before
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
        except BaseException as error:  # noqa: BLE001 - asyncio would end the loop for some
            worker.received |= not self.end(error)
        finally:
            worker.scope = None
            if worker.received and not self.cancelled:
                self.call()  # its task alone was cancelled; another one does what it was to do next
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
