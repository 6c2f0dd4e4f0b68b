"""Runs the handlers of one event after another: the machine that every delivery goes through.

Knows nothing of who subscribed and why, of units of work, or of what happens before and after.
What becomes of an exception, `policy` decides. `awaited` and `drainer` have the two kinds of run:
they say where the workers' tasks come from, and who waits for these tasks.

Concurrency without a task per handler
--------------------------------------
All handlers of an event run at the same time. The plain way is a task for each handler. A task
costs a hundred times as much as the call of a short handler, and most short handlers never wait.
The technique here is known from parallel runtimes as continuation stealing. It rests on one fact:
a coroutine that has to wait *yields* an object to the event loop, which says what the coroutine
waits for. The object passes through everybody who awaits the coroutine. Here the object is called
a trap. Whoever steps a coroutine by hand sees the trap before the event loop does.

A task that runs handlers is a *worker*. A worker calls a handler and takes its first step itself,
`next(...)`. Usually that is all: the handler has ended, and it has cost no task. If the step gave a
trap instead, the handler wants to wait, and the event loop does not know it yet. At this moment the
worker calls for help: a second worker is spawned, which goes on with the handlers that have *not
begun*. Then the first worker hands the trap to the event loop. From there on the worker is what an
`await` would be: a pipe between the event loop and this one handler. The second worker does the
same. Ten handlers that wait need ten workers; ten handlers that do not wait need one.

    worker 1:  a  b  c~~~~~~~~~~~~~~~~~~c      a, b, d, e and f never wait; c and g do
    worker 2:         d  e  f  g~~~~~g

The worker that ends last goes on with the next event of the unit of work. Every other worker ends.

A handler that has begun never changes its task. This is what keeps the technique correct: cancel
scopes, shields, timeouts and task groups of a handler belong to the task in which the handler
began, and a worker drives one handler at a time. Only what has not begun is given away.

All workers of a unit of work share its *run*: the event at hand, what has not begun, a deadline.

Two things differ from a task per handler. Handlers that do not wait share the task of their
worker. A handler that waits is stepped, not awaited: a debugger that follows `cr_await` ends at
`drive`. `whereabouts` knows where each handler waits.
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

_ENDED = object()  # in the place of a trap: the handler has ended

# So many events in a row may pass without a handler that waits, before other tasks get their turn
# and a cancellation its chance. A turn of the event loop costs as much as twenty short handlers.
EVENTS_BETWEEN_CHECKPOINTS = 100


class Turn(Protocol):
    """One event whose turn has come. Each of its deliveries is known by its index in `handlers`.

    Attributes:
        event: What is delivered.
        handlers: Whom it is delivered to.
        indexes: Which of them to run, in the order in which they begin; never empty.
        observers: Whom to tell.
        alike: Whether all handlers are bare coroutine functions under the usual time limit. Only
            then the limit is one for all of them together.
        in_threads: Whether the call of one of them starts in a worker thread.
        variables: The context variables of which each delivery gets its own copy.
        enter: Called with `(turn, index)` in the delivery's own variables, before its handler.
        lost: The outcomes of those that did not end well; set by the run, and by nobody else.
        interlude: What has to be awaited before the next turn; whoever awaits it takes it out.
            The turn has no handlers then.
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
        """Where the unit of work comes from, for the handlers' dependencies."""
        ...

    @property
    def received(self) -> Mapping[str, str] | None:
        """The headers of the message that the event was read from, if it was."""
        ...

    def delivery(self, index: int) -> Delivery:
        """What observers are told; made when it is asked for."""
        ...

    def end_badly(self, index: int, outcome: Outcome) -> Outcome:
        """Note in `lost` what has become of a delivery, and return it: it may be requeued."""
        ...


NO_TURN: Turn = cast("Turn", SimpleNamespace(indexes=(), interlude=None))


@dataclass(slots=True)
class Terms:
    """What all deliveries of one unit of work have in common.

    Attributes:
        sequential: One handler after the other, instead of all at once.
        timeout: Seconds that a handler may wait where nothing else is said, None for no limit.
        tally: The counters to keep.
        report: Called at once with every failure, in the context variables of the failed handler.
    """

    sequential: bool
    timeout: float | None
    tally: Tally
    report: Callable[[Delivery, Exception], None]


class Run(ABC):
    """One unit of work on its way: its workers, and what they share.

    | state | handlers begin | what follows |
    |---|---|---|
    | going | yes | one of the others |
    | `cancelled`: the time of an event is up | no | the last worker that ends goes on afresh |
    | `cancelled` for good, or `fatal` | no | the last worker that ends, ends the run |
    | `exhausted`: no event is left | no | the last worker that ends, ends the run |

    Only the workers change it, all on one event loop, so it needs no lock.

    Attributes:
        terms: As given.
        turn: The event at hand; `NO_TURN` before the first one.
        indexes: What has not begun of it. Whoever begins a handler takes its index from here.
        workers: Who is at the event at hand.
        handled: How many deliveries have ended well.
        fatal: What ends it all.
        drive: Goes on with a handler that waits.
        exhausted: There is no further event.
        cancelled: The workers' scopes are cancelled, so that no more handlers may begin in them. An
            awaited run asks its one scope instead.
        must_hand_on: The worker that asks must not begin the event's handlers: they need a task
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
        self._coming = 0  # workers that have been called and have not begun
        self._timed = False  # the deadline is that of the event at hand
        self._quiet_events = 0  # in a row, of which no handler has waited

    @property
    @abstractmethod
    def late(self) -> bool:
        """Whether they are cancelled because the time of the event at hand is up."""

    @abstractmethod
    def spawn(self, worker: Worker) -> None:
        """Start the task of a worker."""

    @abstractmethod
    def set_deadline(self, seconds: float) -> None:
        """Have the workers' scopes cancelled in so many seconds; `math.inf` for never."""

    @abstractmethod
    def cancel(self) -> None:
        """Cancel the workers' scopes."""

    @abstractmethod
    async def may_go_on(self, worker: Worker) -> bool:
        """Whether a worker whose handler has waited, or was cancelled, may begin the next one."""

    @property
    def running(self) -> dict[Delivery, Steps | None]:
        """What has begun and not ended, each with its coroutine once it has waited."""
        at_work = [(worker.index, worker.steps) for worker in self.workers.copy()]
        return {
            turn.delivery(index): steps
            for index, steps in at_work
            # For a thread that asks, the next event's turn may have come since.
            if index is not None and index in (turn := self.turn).indexes
        }

    @property
    def is_shared(self) -> bool:
        """Whether more than one worker is at the event at hand."""
        return len(self.workers) > 1

    @property
    def not_begun(self) -> int:
        """How many handlers of the event at hand have not begun."""
        return length_hint(self.indexes)

    def advance(self, worker: Worker) -> bool:
        """Turn to the next event; False where there is none, or something comes before it.

        That may be the end of other workers, or an interlude that is due.

        Args:
            worker: Who asks, to begin its handlers.
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
        """What is to be awaited before the next event, once; None where nothing is.

        That is what the turn asks for, or a checkpoint, so that other tasks have their turn.
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
        """Have others begin what has not begun; for a worker that is about to wait.

        One would be enough. With two, a hundred handlers that wait have begun after seven turns of
        the event loop. At most one worker more is spawned for nothing than handlers have waited.
        """
        self._quiet_events = 0
        if not self.terms.sequential:
            for _ in range(min(2, self.not_begun - self._coming)):
                self.call()

    def call(self) -> None:
        """Have one more worker come."""
        worker = Worker(self)
        self.workers.add(worker)
        self._coming += 1
        self.spawn(worker)

    def miss(self, worker: Worker, error: Exception) -> None:
        """One that was called will not come, because no task can be started: all has to end."""
        self._coming -= 1
        self.workers.discard(worker)
        self.end(error)

    def start_clock(self) -> None:
        """Set the event's deadline, once a handler waits and no handler is left to begin.

        One deadline serves all handlers of the event; of sequential ones, each that waits sets it
        anew. It is not set sooner: in a cancelled scope no handler may begin, and a shielded
        handler may wait for one that has not begun.
        """
        limit, sequential = self.terms.timeout, self.terms.sequential
        if limit is None or not self.turn.alike:
            return
        if sequential or not (self._timed or self.not_begun):
            self._timed = True
            self.set_deadline(limit)

    def end(self, error: BaseException) -> bool:
        """Have everything end, and the first such error propagate; False for a cancellation."""
        failures = failures_in(error)
        if failures is None:
            return False
        self.fatal = self.fatal or [failures]
        self.cancel()
        return True

    def lose(self, index: int, outcome: Outcome) -> None:
        """Account for a delivery that did not end well."""
        self.terms.tally.end(self.turn.end_badly(index, outcome), 1)

    def lose_the_rest(self) -> None:
        """Account for what never began."""
        for index in self.indexes:
            self.lose(index, Outcome.UNDELIVERED)


class Worker:
    """One task's part of the work: it runs handlers, one at a time.

    Attributes:
        run: What it works for.
        scope: The outermost scope of its task, where it has one of its own.
        task: Its task, where somebody has to keep it alive.
        index: Of the handler that has begun and not ended.
        steps: The coroutine of that handler, while it waits.
        requests: How often the task was asked to cancel, as far as it knows.
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
        """Run handlers, until none is left or it is not for this worker to begin the next."""
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
                        # First this, and then it is counted: a thread that reads the counters in
                        # between must not see the delivery as running and as handled.
                        self.index = None
                        run.handled += 1
                    finally:
                        # Or this frame and the exception of a future keep each other alive.
                        self.steps = trap = None
                    if run.is_shared and not self.received and not run.not_begun:
                        return  # others end this event
                elif not self.received:
                    if run.is_shared:
                        run.start_clock()
                        return
                    if run.must_hand_on or (interlude := run.take_interlude()) is None:
                        return
                    await interlude()
                    interlude = None  # it has events, and a traceback may lead to this frame
                if not await run.may_go_on(self):
                    return
        except BaseException as error:
            if not run.end(error):
                raise
        finally:
            if self.index is not None:
                self._lose(Outcome.UNDELIVERED)

    def _begin_handlers(self) -> tuple[Context, Steps, object] | None:
        """Run handlers to their end, one after the other, until there is one that waits.

        Or until one ends with a cancellation, which the worker has to receive, too.

        Returns:
            Its context variables, its coroutine, and the trap; None where none has begun to wait.
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
        """Account for what came out of the handler; False where all has to end for it."""
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
        # The handler may have replaced the exception, so its scope no longer recognises it. And
        # where no scope is cancelled, it was `Task.cancel()`, whatever it looks like. So the worker
        # receives it again.
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
        """Be cancelled now, if this task was cancelled natively and does not know it yet.

        What comes out of a handler then, can be told from what came before.
        """
        requests = cancel_requests()
        if requests > self.requests:
            await checkpoint()
            requests = cancel_requests()
        # Older releases of AnyIO do not take back all their cancel requests, and a handler may have
        # answered others with `uncancel()`.
        self.requests = requests

    def note_thrown(self, error: BaseException) -> None:
        """Remember what the event loop throws into the handler: the handler may swallow it."""
        self.received |= not isinstance(error, Exception)
        self.received_task_cancel |= is_native(error)


def _begin(worker: Worker, turn: Turn, index: int) -> tuple[Steps, object] | None:
    """Call a handler and take its first step; None if that was all, else with what it gave."""
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
