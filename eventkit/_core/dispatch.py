"""Runs the handlers of one event after another: every delivery goes through this module.

Knows nothing of subscriptions and units of work. `policy` decides what an exception means.
`awaited` and `drainer` have the two kinds of run: they start the workers' tasks, and wait for
these tasks.

Concurrency without a task per handler
--------------------------------------
All handlers of an event run at the same time. The plain way is a task for each handler. A task
costs a hundred times as much as the call of a short handler, and most short handlers never wait.
The technique here is known from parallel runtimes as continuation stealing. It rests on one fact:
a coroutine that has to wait *yields* an object to the event loop, which says what the coroutine
waits for. The object passes through all coroutines that await this one. Here the object is called
a trap. Code that steps a coroutine by hand sees the trap before the event loop does.

A task that runs handlers is a *worker*. A worker calls a handler and takes its first step itself,
`next(...)`. Usually that is all: the handler has ended, and it has cost no task. If the step gave a
trap instead, the handler wants to wait, and the event loop does not know it yet. At this moment the
worker calls for help: a second worker is spawned, which goes on with the handlers that have *not
begun*. Then the first worker gives the trap to the event loop. From now on the worker does what an
`await` does: it is a pipe between the event loop and this handler. The second worker does the same.
Ten handlers that wait need ten workers; ten handlers that do not wait need one.

    worker 1:  a  b  c~~~~~~~~~~~~~~~~~~c      a, b, d, e and f never wait; c and g do
    worker 2:         d  e  f  g~~~~~g

The worker that ends last goes on with the next event of the unit of work. Every other worker ends.

A handler that has begun never changes its task. This keeps the technique correct: cancel scopes,
shields, timeouts and task groups of a handler belong to the task in which the handler began, and a
worker drives one handler at a time. Only handlers that have not begun move to another worker.

All workers of a unit of work share its *run*: the current event, the handlers that have not begun,
and a deadline.

Two things differ from a task per handler. Handlers that do not wait share the task of their
worker. A handler that waits is stepped, not awaited: a debugger that follows `cr_await` ends at
`drive`. `whereabouts` finds the line at which each handler waits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from operator import length_hint
from types import SimpleNamespace
from typing import Protocol, cast

from anyio import CancelScope
from anyio.lowlevel import checkpoint

from eventkit._core.attempts import attempt
from eventkit._core.events import Delivery
from eventkit._core.handlers import Handler
from eventkit._core.limits import run_in_time
from eventkit._core.loops.tasks import Drive
from eventkit._core.observers import Observer
from eventkit._core.policy import (
    add_note,
    cancel_requests,
    failures_in,
    is_native,
    timeout_of,
    verdict_on,
)
from eventkit._core.stats import Outcome, Tally

Steps = Coroutine[object, object, object]
Interlude = Callable[[], Awaitable[object]]

_ENDED = object()  # instead of a trap: the handler has ended

# After so many events in a row without a handler that waits, there is a checkpoint: other tasks can
# run, and a cancellation can arrive. A checkpoint costs as much as twenty short handlers.
EVENTS_BETWEEN_CHECKPOINTS = 100


class Turn(Protocol):
    """One event whose turn has come. Each delivery is known by its index in `handlers`.

    Attributes:
        event: The event.
        handlers: Its handlers.
        indexes: The indexes of the handlers to run, in start order; never empty.
        observers: The observers to call.
        alike: Whether all handlers are plain coroutine functions with the default time limit. Only
            then one limit serves all of them together.
        in_threads: Whether one of the handlers starts in a worker thread.
        variables: The context variables. Each delivery gets its own copy.
        enter: Called with `(turn, index)` in the delivery's own variables, before its handler.
        lost: The outcomes of the deliveries that did not end well; only the run sets them.
        interlude: Has to be awaited before the next turn. The worker that awaits it removes it.
            A turn with an interlude has no handlers.
    """

    event: object
    handlers: Sequence[Handler]
    indexes: Sequence[int]
    observers: tuple[Observer, ...]
    alike: bool
    in_threads: bool
    variables: Context
    enter: Callable[[tuple[Turn, int]], object]
    lost: dict[int, Outcome]
    interlude: Interlude | None

    @property
    def origin(self) -> object:
        """The application that the unit was opened in, for the handlers' dependencies."""
        ...

    @property
    def received(self) -> Mapping[str, str] | None:
        """The headers of the message that the event was read from; None without a message."""
        ...

    def delivery(self, index: int) -> Delivery:
        """The delivery to the handler at this index; made when it is needed."""
        ...

    def end_badly(self, index: int, outcome: Outcome) -> Outcome:
        """Note the outcome of a delivery in `lost`, and return it: it may become REQUEUED."""
        ...


NO_TURN: Turn = cast("Turn", SimpleNamespace(indexes=(), interlude=None))


@dataclass(slots=True)
class Terms:
    """The options that all deliveries of one unit of work share.

    Attributes:
        sequential: Whether handlers run one after the other, instead of at the same time.
        timeout: Default time limit of a handler in seconds; None for no limit.
        tally: The counters.
        report: Called at once with every failure, in the context variables of the failed handler.
    """

    sequential: bool
    timeout: float | None
    tally: Tally
    report: Callable[[Delivery, Exception], None]


class Run(ABC):
    """One unit of work that is being delivered: its workers, and the state that they share.

    | state | handlers begin | what follows |
    |---|---|---|
    | going | yes | one of the others |
    | `cancelled` by the time limit of an event | no | the last worker goes on with the next event |
    | `cancelled` finally, or `fatal` | no | the last worker ends the run |
    | `exhausted`: no event is left | no | the last worker ends the run |

    Only the workers change it, all on one event loop, so it needs no lock.

    Attributes:
        terms: As given.
        turn: The current event; `NO_TURN` before the first one.
        indexes: Its handlers that have not begun. A worker takes an index from here to begin it.
        workers: The workers of the current event.
        handled: How many deliveries have ended well.
        fatal: The exception that ends the run.
        drive: Goes on with a handler that waits.
        exhausted: There is no further event.
        cancelled: The workers' scopes are cancelled, so no more handlers may begin in them. An
            awaited run uses its one scope instead.
        must_hand_on: The current worker must not begin the event's handlers: they need a task
            group that is not open yet, or, for threads, another worker.
    """

    __slots__ = (
        "_coming",
        "_next_turn",
        "_quiet_events",
        "_timed",
        "cancelled",
        "drive",
        "exhausted",
        "fatal",
        "handled",
        "indexes",
        "must_hand_on",
        "terms",
        "turn",
        "workers",
    )

    def __init__(self, next_turn: Callable[[], Turn | None], terms: Terms, drive: Drive) -> None:
        self.terms = terms
        self.turn = NO_TURN
        self.indexes: Iterator[int] = iter(())
        self.workers = {Worker(self)}
        self.handled = 0
        self.fatal: list[BaseException] = []
        self.exhausted = False
        self.must_hand_on = False
        self.cancelled = False
        self._next_turn = next_turn
        self.drive = drive
        self._coming = 0  # how many workers have been called and have not begun
        self._timed = False  # whether the deadline is that of the current event
        self._quiet_events = 0  # how many events in a row had no handler that waited

    @property
    @abstractmethod
    def late(self) -> bool:
        """Whether the workers are cancelled because of the time limit of the current event."""

    @abstractmethod
    def spawn(self, worker: Worker) -> None:
        """Start the task of a worker."""

    @abstractmethod
    def set_deadline(self, seconds: float) -> None:
        """Cancel the workers' scopes in so many seconds; `math.inf` for never."""

    @abstractmethod
    def cancel(self) -> None:
        """Cancel the workers' scopes."""

    @abstractmethod
    async def may_go_on(self, worker: Worker) -> bool:
        """Whether a worker whose handler has waited or was cancelled may begin the next one."""

    @property
    def running(self) -> dict[Delivery, Steps | None]:
        """The deliveries that run, each with its coroutine if the handler has waited."""
        at_work = [(worker.index, worker.steps) for worker in self.workers.copy()]
        return {
            turn.delivery(index): steps
            for index, steps in at_work
            # Another thread may read this when the next event's turn has already come.
            if index is not None and index in (turn := self.turn).indexes
        }

    @property
    def is_shared(self) -> bool:
        """Whether the current event has more than one worker."""
        return len(self.workers) > 1

    @property
    def not_begun(self) -> int:
        """How many handlers of the current event have not begun."""
        return length_hint(self.indexes)

    def advance(self, worker: Worker) -> bool:
        """Go on to the next event; False if there is none, or if something comes before it.

        That may be the end of other workers, or an interlude.

        Args:
            worker: The worker that will begin the handlers of the next event.
        """
        if (
            self.exhausted
            or len(self.workers) > 1
            or self._quiet_events >= EVENTS_BETWEEN_CHECKPOINTS
            or self.cancelled
            or self.turn.interlude is not None
        ):
            return False
        if self._timed:
            self._timed = False
            self.set_deadline(math.inf)
        turn = self._next_turn()
        if turn is None:
            self.exhausted = True
            return False
        self._quiet_events += 1
        self.turn = turn
        self.indexes = iter(turn.indexes)
        return True

    def take_interlude(self) -> Interlude | None:
        """Take the awaitable that comes before the next event; None if there is none.

        It is the interlude of the turn, or a checkpoint, so that other tasks can run.
        """
        interlude = self.turn.interlude
        if interlude is not None:
            self.turn.interlude = None
        elif self._quiet_events >= EVENTS_BETWEEN_CHECKPOINTS and not self.exhausted:
            interlude = checkpoint
        else:
            return None
        self._quiet_events = 0
        return interlude

    def get_help(self) -> None:
        """Call other workers for the handlers that have not begun; this worker is about to wait.

        One worker would be enough. With two, a hundred handlers that wait have begun after seven
        turns of the event loop. The number of workers without work is at most one more than the
        number of handlers that have waited.
        """
        self._quiet_events = 0
        if not self.terms.sequential:
            for _ in range(min(2, self.not_begun - self._coming)):
                self.call()

    def call(self) -> None:
        """Call one more worker."""
        worker = Worker(self)
        self.workers.add(worker)
        self._coming += 1
        self.spawn(worker)

    def miss(self, worker: Worker, error: Exception) -> None:
        """End the run, because the task of a worker that was called could not be started."""
        self._coming -= 1
        self.workers.discard(worker)
        self.end(error)

    def start_clock(self) -> None:
        """Set the event's deadline, once a handler waits and all handlers have begun.

        One deadline serves all handlers of the event. With sequential handlers, each one that waits
        sets it again. It is not set earlier: in a cancelled scope no handler may begin, and a
        shielded handler may wait for one that has not begun.
        """
        limit, sequential = self.terms.timeout, self.terms.sequential
        if limit is None or not self.turn.alike:
            return
        if sequential or not (self._timed or self.not_begun):
            self._timed = True
            self.set_deadline(limit)

    def end(self, error: BaseException) -> bool:
        """End the run, whose first such error is raised; False if it is only a cancellation."""
        failures = failures_in(error)
        if failures is None:
            return False
        self.fatal = self.fatal or [failures]
        self.cancel()
        return True

    def lose(self, index: int, outcome: Outcome) -> None:
        """Count a delivery that did not end well."""
        self.terms.tally.end(self.turn.end_badly(index, outcome), 1)

    def lose_the_rest(self) -> None:
        """Count the handlers that never began as undelivered."""
        for index in self.indexes:
            self.lose(index, Outcome.UNDELIVERED)


class Worker:
    """A worker runs handlers in one task, one at a time.

    Attributes:
        run: The run that it belongs to.
        scope: The outermost scope of its task, if it has its own.
        task: Its task, if a reference has to keep it alive.
        index: Index of the handler that has begun and not ended.
        steps: The coroutine of that handler, while it waits.
        requests: How many cancel requests of the task the worker has seen.
        received: A cancellation was thrown into the handler, or came out of it.
        received_task_cancel: That may be `Task.cancel()`, which asyncio throws only once.
    """

    __slots__ = (
        "index",
        "received",
        "received_task_cancel",
        "requests",
        "run",
        "scope",
        "steps",
        "task",
    )

    def __init__(self, run: Run) -> None:
        self.run = run
        self.scope: CancelScope | None = None
        self.task: object = None
        self.index: int | None = None
        self.steps: Steps | None = None
        self.requests = 0
        self.received = False
        self.received_task_cancel = False

    async def serve(self) -> None:
        """Run handlers, until none is left or another worker has to begin the next one."""
        run = self.run
        drive = run.drive
        try:
            while True:
                self.received = self.received_task_cancel = False
                waiting = self._begin_handlers()
                if waiting is not None:
                    variables, steps, trap = waiting
                    waiting = None
                    run.get_help()
                    run.start_clock()
                    self.steps = steps
                    try:
                        await drive(self, variables, steps, trap)
                    except BaseException as error:
                        if not self._settle(variables, error):
                            raise
                    else:
                        # `index` first, then the counter: another thread that reads the counters in
                        # between must not see the delivery as both running and handled.
                        self.index = None
                        run.handled += 1
                    finally:
                        # Otherwise this frame and the exception of a future keep each other alive.
                        self.steps = trap = None
                    if run.is_shared and not self.received and not run.not_begun:
                        return  # other workers end this event
                elif not self.received:
                    if run.is_shared:
                        run.start_clock()
                        return
                    if run.must_hand_on or (interlude := run.take_interlude()) is None:
                        return
                    await interlude()
                    interlude = None  # it refers to events, and a traceback may refer to this frame
                if not await run.may_go_on(self):
                    return
        except BaseException as error:
            if not run.end(error):
                raise
        finally:
            if self.index is not None:
                self._lose(Outcome.UNDELIVERED)

    def _begin_handlers(self) -> tuple[Context, Steps, object] | None:
        """Run handlers to their end, one after the other, until one of them waits.

        It also stops if a handler ends with a cancellation, which the worker has to receive, too.

        Returns:
            The context variables, the coroutine and the trap of the handler that waits; or None.
        """
        run = self.run
        while True:
            for index in run.indexes:
                turn = run.turn
                self.index = index
                variables = turn.variables.copy()
                try:
                    waiting = variables.run(_begin, self, turn, index)
                except BaseException as error:
                    if not self._settle(variables, error):
                        raise
                    if self.received:
                        return None
                else:
                    if waiting is not None:
                        return variables, *waiting
                    self.index = None
                    run.handled += 1
            if not run.advance(self) or run.must_hand_on:
                return None

    def _settle(self, variables: Context, error: BaseException) -> bool:
        """Handle an exception of a handler; False if it ends the run."""
        run, index = self.run, cast("int", self.index)
        handler = run.turn.handlers[index]
        verdict = verdict_on(error, handler, self.requests)
        if isinstance(verdict, Exception):
            self._fail(variables, verdict)
            return True
        if failures_in(error) is not None:
            self._lose(Outcome.UNDELIVERED)
            return False
        if run.late:
            self._fail(variables, timeout_of(handler, cast("float", run.terms.timeout), error))
        else:
            self._lose(Outcome.UNDELIVERED)
        # The handler may have replaced the exception, so its scope no longer recognises it. And if
        # no scope is cancelled, it was `Task.cancel()`, even if it does not look like it. So the
        # worker receives the cancellation again.
        self.received = self.received_task_cancel = True
        return True

    def _fail(self, variables: Context, error: Exception) -> None:
        turn, index = self.run.turn, cast("int", self.index)
        delivery = turn.delivery(index)
        add_note(error, delivery, turn.handlers[index])
        variables.run(self.run.terms.report, delivery, error)
        self._lose(Outcome.FAILED)

    def _lose(self, outcome: Outcome) -> None:
        index, self.index = cast("int", self.index), None
        self.run.lose(index, outcome)

    async def take_cancellation(self) -> None:
        """Receive a pending `Task.cancel()` of this task now.

        Then a cancellation that comes out of the next handler is a new one.
        """
        requests = cancel_requests()
        if requests > self.requests:
            await checkpoint()
            requests = cancel_requests()
        # Older releases of AnyIO do not undo all their cancel requests, and a handler may have
        # called `uncancel()` for others.
        self.requests = requests

    def note_thrown(self, error: BaseException) -> None:
        """Remember an exception thrown into the handler, because the handler may suppress it."""
        self.received |= not isinstance(error, Exception)
        self.received_task_cancel |= is_native(error)


def _begin(worker: Worker, turn: Turn, index: int) -> tuple[Steps, object] | None:
    """Call a handler and take its first step. None if it has ended, else its coroutine and trap."""
    turn.enter((turn, index))
    handler, run = turn.handlers[index], worker.run
    if turn.observers:
        timed_by = run if turn.alike else None
        steps = attempt(turn, index, run.terms.timeout, worker.requests, timed_by)
    elif not turn.alike:
        limit = run.terms.timeout if handler.timeout is ... else handler.timeout
        steps = run_in_time(handler, turn, limit)
    elif handler.solver is None:
        steps = handler.function(turn.event)
    else:
        steps = handler.with_dependencies(handler.solver, turn.origin, turn.event)
    trap = next(steps.__await__(), _ENDED)
    return None if trap is _ENDED else (steps, trap)
