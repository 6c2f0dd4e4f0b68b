"""Runs the handlers of one event after another: concurrency and failure policy, nothing else.

`run_all` is the whole of it. It knows nothing of who subscribed and why, of units of work, or of
what happens before and after.

The policy, per delivery: an `Exception` is recorded and disturbs nobody; a cancellation that came
from outside ends the delivery and passes on; one that the handler made up is a failure; anything
else (`KeyboardInterrupt`, `SystemExit`) cancels the siblings and propagates.

Concurrency without a task per handler
--------------------------------------
All handlers of an event run at the same time. The plain way is a task for each, and a task costs a
hundred times what calling a short handler costs, mostly for handlers that never wait for anything.
The technique here is known from parallel runtimes as continuation stealing. It needs one fact: a
coroutine that has to wait *yields* to the event loop, through all who await it, an object that says
what it waits for. Here that object is called a trap. Whoever steps a coroutine by hand sees the
trap first.

So one task, the *worker*, calls a handler and takes its first step itself, `next(...)`. Mostly
there is none but that step: the handler has ended, and has cost no task. If it gave a trap instead,
it wants to wait, but the event loop does not know yet. This is the moment to make sure that nobody
waits for it: the worker has a second one spawned, which goes on with the handlers that have *not
begun*, and then hands the trap on to the event loop. From there on it is what an `await` would be,
a pipe between the loop and this one handler. The second worker does the same, and a third one goes
on. Ten handlers that wait are ten workers, ten that do not are one.

    worker 1:  a  b  c~~~~~~~~~~~~~~~~~~c      a, b, d, e and f never wait, c and g do
    worker 2:         d  e  f  g~~~~~g

The worker that ends last goes on with the next event of the unit of work, whichever it is. The
others rest until one that waits calls them, which costs a quarter of a new task; but helpers of the
first event, which mostly is the only one, go when it ends.

Nothing that has begun ever changes its task, and that is what keeps it correct: a handler's cancel
scopes, shields, timeouts and task groups belong to the task that it began in, and each worker
drives one handler at a time. Only what has not begun is given away, and the continuation is stolen
rather than the handler.

What all workers of a unit of work share is the *crew*: the event at hand, what has not begun of it,
and the one cancel scope around them, that of their task group where there is one. Its deadline is
the time limit of the event. A scope for each handler would cost more than a handler that does not
wait, and none can be opened once the handler waits.

What can be told apart from a task per handler: handlers that do not wait share the identity of
their worker, which is the task that dispatches up to the first handler that waits; and a handler
that waits is stepped, not awaited, so debuggers that follow `cr_await` from a task end at `_drive`;
`whereabouts` knows where each handler waits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from types import FrameType, coroutine
from typing import Any, Protocol, cast

from anyio import (
    CancelScope,
    Event,
    create_task_group,
    current_effective_deadline,
    get_cancelled_exc_class,
    move_on_after,
)
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from eventkit._events import Delivery, type_name
from eventkit._handlers import Handler
from eventkit._loops import clock
from eventkit._observers import Observer, watched
from eventkit._stats import Outcome, Tally
from eventkit.exceptions import HandlerCancelledError, HandlerTimeoutError

_Steps = Coroutine[object, object, object]

_ENDED = object()  # in the place of a trap: the handler has ended

# So many events in a row may pass without a handler that waits, before other tasks get their turn
# and a cancellation its chance. A turn of the event loop costs as much as twenty short handlers.
_BREATH = 100

# By so much of itself a time limit may be late. Where each event has one handler, and it waits,
# events close together then share a deadline: to set one costs more than all else of it.
_SLACK = 0.001

# What `_drive` knows the context variables of its task by.
_stepped_from: ContextVar[object] = ContextVar("eventkit_stepped_from", default=None)


class Turn(Protocol):
    """One event whose turn has come. Each of its deliveries is known by its place in `handlers`.

    Attributes:
        event: What is delivered.
        handlers: Whom it is delivered to.
        places: Which of them to run, in the order in which they begin; never empty.
        observers: Whom to tell.
        alike: Whether all handlers are bare coroutine functions under the usual limit, and nobody
            watches them. Only then is that one limit of them together.
        variables: The context variables of which each delivery gets its own copy.
        lost: The outcomes of those that did not end well; set by `run_all`, and by nobody else.
    """

    event: object
    handlers: Sequence[Handler]
    places: Sequence[int]
    observers: tuple[Observer, ...]
    alike: bool
    variables: Context
    lost: dict[int, Outcome]

    @property
    def origin(self) -> object:
        """Where the unit of work comes from, for the handlers' dependencies."""
        ...

    def delivery(self, place: int) -> Delivery:
        """What observers are told; made when it is asked for."""
        ...


Seat = tuple[Turn, int]  # one delivery; a tuple, because it is made for each and costs a fifth


@dataclass(slots=True)
class Terms:
    """What all deliveries of one unit of work have in common.

    Attributes:
        sequential: One handler after the other, instead of all at once.
        timeout: Seconds that a handler may wait where nothing else is said, None for no limit.
        tally: The counters to keep.
        report: Called at once with every failure, in the context variables of the failed handler.
        enter: Called in the delivery's own context variables right before its handler.
    """

    sequential: bool
    timeout: float | None
    tally: Tally
    report: Callable[[Delivery, Exception], None]
    enter: Callable[[Seat], object]


async def run_all(turns: Iterable[Turn], terms: Terms) -> int:
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
    crew = _Crew(turns, terms)
    terms.tally.enter(crew)
    try:
        if _in_cancelled_scope():
            await checkpoint()
            # Still here, it was begun by a worker thread whose task had been cancelled. On asyncio
            # AnyIO tells it nothing, and `checkpoint_if_cancelled` would wait for that for ever.
            raise asyncio.CancelledError
        await crew.work()
    finally:
        crew.disband()
        terms.tally.leave(crew)
        for place in crew.places:  # what never began
            crew.lose(place, Outcome.UNDELIVERED)
        if crew.fatal:
            raise crew.fatal.pop()
    return crew.handled


class _Crew:
    """The tasks that work on one unit of work, and what they share.

    Attributes:
        terms: As given.
        turn: The event at hand.
        places: What has not begun of it. Whoever begins a handler takes it from here.
        lacks_group: Whether there has to be a task group before the next handler begins. Opened
            later, while that waits, the group would stand in the midst of its scopes.
        handled: How many deliveries have ended well.
        fatal: What ends it all.
    """

    __slots__ = (
        "_breath",
        "_coming",
        "_deadline",
        "_events",
        "_resting",
        "_scope",
        "_tasks",
        "_time",
        "_timed",
        "_turns",
        "_workers",
        "fatal",
        "handled",
        "lacks_group",
        "places",
        "terms",
        "turn",
    )

    def __init__(self, turns: Iterable[Turn], terms: Terms) -> None:
        self.terms = terms
        self.turn: Turn
        self.places: Iterator[int] = iter(())
        self.lacks_group = False
        self.handled = 0
        self.fatal: list[BaseException] = []
        self._turns = iter(turns)
        self._events = 0  # whose turn has come
        self._workers: set[_Worker] = set()  # who is at the event at hand
        self._resting: list[_Worker] = []  # who waits to be called to the next one
        self._coming = 0  # workers that have been called and have not begun
        self._tasks: TaskGroup | None = None  # open while there may be helpers
        self._scope: CancelScope | None = None  # around all that the workers do
        self._deadline = math.inf  # what the scope has for one
        self._timed = False  # it is that of the event at hand
        self._time = clock()
        self._breath = _BREATH

    @property
    def running(self) -> dict[Delivery, _Steps | None]:
        """What has begun and not ended, each with its coroutine once it has waited."""
        seats = [(worker.place, worker.steps) for worker in self._workers.copy()]
        return {
            turn.delivery(place): steps
            for place, steps in seats
            # For a thread that asks, the next event's turn may have come since.
            if place is not None and place in (turn := self.turn).places
        }

    @property
    def spent(self) -> bool:
        """Whether the scope is cancelled, so that no more handlers may begin in it."""
        return self._scope is not None and self._scope.cancel_called

    @property
    def late(self) -> bool:
        """Whether the scope is cancelled because the time of the event at hand is up."""
        return self.spent and not self.fatal and self._time() >= self._deadline

    @property
    def is_shared(self) -> bool:
        """Whether more than one worker is at the event at hand."""
        return len(self._workers) > 1

    async def work(self) -> None:
        """Have the handlers run, in one scope, or in several where it is spent in between."""
        first = _Worker(self, is_first=True)
        await first.take_cancellation()
        while not self.fatal and (length_hint(self.places) or self.next_event()):
            self._workers.add(first)
            if self.lacks_group:
                async with create_task_group() as self._tasks:
                    self._scope = self._tasks.cancel_scope
                    self.lacks_group = False
                    await first.serve()
                    self.leave(first)
                self._tasks = None
                self.lacks_group = True  # for what is left of this event
                # Asyncio may have cancelled helpers before their first step: they say no farewell.
                self._workers.clear()
                self._coming = 0
            elif self.terms.timeout is not None:
                with CancelScope() as self._scope:
                    await first.work()
            else:
                await first.work()
            self._scope, self._deadline, self._timed = None, math.inf, False
            self._breath = _BREATH
            await first.take_cancellation()

    def next_event(self) -> bool:
        """Turn to the next event; False where there is none, or something comes before it.

        That may be the end of other workers, or a breath. Says in `lacks_group` what it needs.
        """
        if self.is_shared or not self._breath:
            return False
        turn = next(self._turns, None)
        if turn is None:
            return False
        self._breath -= 1
        self._events += 1
        self.turn = turn
        self.places = iter(turn.places)
        self._timed = False
        if self._deadline != math.inf and not turn.alike:
            self._set_deadline(math.inf)
        self.lacks_group = (
            self._tasks is None and len(turn.places) > 1 and not self.terms.sequential
        )
        return True

    async def breathe(self) -> bool:
        """Let other tasks have their turn, if it is time for that.

        False where it is not, or where a task group comes first.
        """
        if self._breath or self.is_shared:
            return False
        self._breath = _BREATH
        self._set_deadline(math.inf)
        await checkpoint()
        return not self.lacks_group

    def get_help(self) -> None:
        """Have others begin what has not begun; for a worker that is about to wait.

        One would do. Whoever waits beside others calls two, so that a hundred handlers that wait
        have begun within seven turns of the event loop, and no more workers come in vain than
        have waited.
        """
        if not self.terms.sequential:
            wanted = 2 if self.is_shared else 1
            for _ in range(min(wanted, length_hint(self.places) - self._coming)):
                self._call()

    def hand_over(self, place: int) -> None:
        """Have another worker begin the handler at this place, and what follows."""
        self.places = iter([place, *self.places])
        self.lacks_group = self._tasks is None
        if not self.lacks_group:
            self._call()

    def _call(self) -> None:
        """Have one more worker come."""
        worker = self._resting.pop() if self._resting else _Worker(self, is_first=False)
        self._workers.add(worker)
        self._coming += 1
        if worker.call is not None:
            worker.call.set()
        else:
            cast("TaskGroup", self._tasks).start_soon(worker.help, name="eventkit handlers")

    def arrive(self) -> None:
        """One that was called is there."""
        self._coming -= 1

    async def rest(self, worker: _Worker) -> bool:
        """Have a worker wait until it is called again; False where it may go.

        Helpers go with the first event: most units of work have but one. With others they stay,
        for to call them costs a quarter of what a new task does.
        """
        if not self.is_shared or (self._events < 2 and not worker.is_first):
            return False
        self._workers.remove(worker)
        self._resting.append(worker)
        worker.call = Event()
        try:
            await worker.call.wait()
        finally:
            called = worker in self._workers
            if called:
                self.arrive()
            elif worker in self._resting:  # it was cancelled
                self._resting.remove(worker)
        return called

    def leave(self, worker: _Worker) -> None:
        """Count on a worker no longer; the last one that goes takes along those that rest."""
        self._workers.discard(worker)
        if not self._workers:
            for resting in self._resting:
                cast("Event", resting.call).set()
            self._resting.clear()

    def replace(self, helper: _Worker) -> None:
        """Have others do what a helper was to do next, if its task alone was cancelled."""
        self.leave(helper)
        if self._workers and not self.spent and not _in_cancelled_scope():
            self.get_help()
            self.start_clock()

    def start_clock(self) -> None:
        """Give the event its time, once all its handlers have begun and one of them waits.

        They have it together, sequential ones one after the other. It does not begin sooner,
        because a spent scope takes no more handlers, and who is shielded may wait for one of them.
        """
        limit, sequential = self.terms.timeout, self.terms.sequential
        if limit is None or not self.turn.alike:
            return
        if length_hint(self.places) and not sequential:
            if self._deadline != math.inf:  # that of an event before
                self._set_deadline(math.inf)
        elif sequential or not self._timed:
            self._timed = True
            deadline = self._time() + limit
            if self._deadline == math.inf:
                self._set_deadline(deadline)
            elif self._deadline < deadline:  # that of an event before, which may do for this one
                self._set_deadline(deadline + limit * _SLACK)

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline
        if self._scope is not None:
            self._scope.deadline = deadline

    def disband(self) -> None:
        """Forget who knows it, workers and exceptions in the group: a ring would keep all alive."""
        self._workers.clear()
        self._tasks = self._scope = None

    def end(self, error: BaseException) -> bool:
        """Have everything end, and the first such error propagate; False for a cancellation."""
        failures = _failures_in(error)
        if failures is None:
            return False
        self.fatal = self.fatal or [failures]
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()
        return True

    def lose(self, place: int, outcome: Outcome) -> None:
        """Account for a delivery that did not end well."""
        self.turn.lost[place] = outcome
        self.terms.tally.end(outcome, 1)


class _Worker:
    """One task's part of the work: it runs handlers, one at a time."""

    __slots__ = ("_crew", "_natively", "_requests", "_told", "call", "is_first", "place", "steps")

    def __init__(self, crew: _Crew, *, is_first: bool) -> None:
        self._crew = crew
        self.is_first = is_first  # in the task that dispatches; others are helpers
        self._requests = 0  # how often the task was asked to cancel, as far as it knows
        self._told = False  # the handler was told of a cancellation,
        self._natively = False  # and of one that no scope made
        self.place: int | None = None  # of the handler that has begun and not ended
        self.steps: _Steps | None = None  # its coroutine, while it waits
        self.call: Event | None = None  # what ends its rest

    async def help(self) -> None:
        """Do this worker's part in a task of its own, which only a cancellation leaves as such."""
        try:
            await _be_cancelled()
            self._crew.arrive()
            await self.serve()
        except get_cancelled_exc_class():
            if not _cancel_requests() and _in_cancelled_scope():
                raise  # a trio nursery learns from its children that it was cancelled
            # On asyncio the waiting task is told itself. Raised here too, the cancellation of this
            # task alone would reach its siblings, and AnyIO would keep it and the event in a ring.
            self._crew.replace(self)
        finally:
            self._crew.leave(self)

    async def serve(self) -> None:
        """Work whenever it is called, until all is over."""
        await self.work()
        while await self._crew.rest(self):
            await _be_cancelled()
            await self.work()

    async def work(self) -> None:
        """Run handlers, until none is left or it is not for this worker to begin the next."""
        crew = self._crew
        try:
            while True:
                self._told = self._natively = False
                waiting = self._begin_handlers()
                if waiting is not None:
                    crew.get_help()
                    await self._finish(*waiting)
                    # Shielded, or ready to go on just then, the handler was not told of it.
                    self._told |= _in_cancelled_scope()
                elif not self._told:
                    if crew.is_shared:
                        crew.start_clock()
                    if not await crew.breathe():
                        break
                if self._told:
                    await self._pass_cancellation()
        except BaseException as error:
            if not crew.end(error):
                raise
        finally:
            if self.place is not None:
                self._lose(Outcome.UNDELIVERED)

    def _begin_handlers(self) -> tuple[Context, _Steps, object] | None:
        """Run handlers to their end, one after the other, until there is one that waits.

        Or until one ends with a cancellation, of which the worker has to be told.

        Returns:
            Its context variables, its coroutine, and the trap; None where none has begun to wait.
        """
        crew = self._crew
        enter = crew.terms.enter
        while True:
            turn = crew.turn
            alike = turn.alike
            for place in crew.places:
                handler = turn.handlers[place]
                if alike:
                    function, argument = handler.function, turn.event
                    if handler.solver is not None:
                        function = partial(handler.with_dependencies, handler.solver, turn.origin)
                elif handler.in_thread and self.is_first:
                    # It is sure to wait, and a native cancellation would not wait for its thread.
                    # That can only reach the task that dispatches, so it goes to another one.
                    crew.hand_over(place)
                    return None
                else:
                    function, argument = partial(_attempt, turn, place), crew.terms
                self.place = place
                variables = turn.variables.copy()
                try:
                    waiting = variables.run(_begin, enter, (turn, place), function, argument)
                except BaseException as error:
                    if not self._settle(variables, error):
                        raise
                    if self._told:
                        return None
                else:
                    if waiting is not None:
                        return variables, *waiting
                    self.place = None  # and then it is counted: no thread is to see it twice
                    crew.handled += 1
            if not crew.next_event() or crew.lacks_group:
                return None

    async def _finish(self, variables: Context, steps: _Steps, trap: object) -> None:
        """Go on with a handler that waits, until it has ended."""
        self.steps = steps
        self._crew.start_clock()
        try:
            await self._drive(variables, steps, trap)
        except BaseException as error:
            if not self._settle(variables, error):
                raise
        else:
            self.place = None
            self._crew.handled += 1
        finally:
            self.steps = None

    @coroutine
    def _drive(
        self, variables: Context, steps: _Steps, trap: object
    ) -> Generator[object, object, None]:
        """What `await` is from the second step on: the pipe between the event loop and the handler.

        It steps the handler in its own context variables. Not so where the event loop has exchanged
        them: trio runs what a thread calls by `from_thread.run` in the task that waits for the
        thread, and in the thread's context variables.
        """
        elsewhere = _stepped_from.get()
        sent: object = None
        thrown: BaseException | None = None
        try:
            _stepped_from.set(self)
            while True:
                try:
                    sent = yield trap
                except GeneratorExit as closed:
                    try:
                        variables.run(steps.close)
                    except Exception as broken:
                        raise closed from broken
                    raise
                except BaseException as error:  # noqa: BLE001 - it is the handler's
                    thrown = error
                    self._told |= not isinstance(error, Exception)
                    self._natively |= _is_native(error)
                step = variables.run if _stepped_from.get() is self else _call
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
            del sent, thrown

    def _settle(self, variables: Context, error: BaseException) -> bool:
        """Account for what came out of the handler; False where all has to end for it."""
        crew, place = self._crew, cast("int", self.place)
        handler = crew.turn.handlers[place]
        verdict = _verdict(error, handler, self._requests)
        if isinstance(verdict, Exception):
            self._fail(variables, verdict)
            return True
        if _failures_in(error) is not None:
            self._lose(Outcome.UNDELIVERED)
            return False
        if crew.late:
            self._fail(variables, _late(handler, cast("float", crew.terms.timeout), error))
        else:
            self._lose(Outcome.UNDELIVERED)
        # What the handler has made of a cancellation, its scope may not know for its own, and where
        # none is cancelled it was native, whatever it looks like. The worker is told again.
        self._told = self._natively = True
        return True

    def _fail(self, variables: Context, error: Exception) -> None:
        turn, place = self._crew.turn, cast("int", self.place)
        _add_note(error, turn, place)
        variables.run(self._crew.terms.report, turn.delivery(place), error)
        self._lose(Outcome.FAILED)

    def _lose(self, outcome: Outcome) -> None:
        place, self.place = cast("int", self.place), None
        self._crew.lose(place, outcome)

    async def take_cancellation(self) -> None:
        """Be cancelled now, if this task was cancelled natively and does not know it yet.

        What comes out of a handler then, can be told from what came before.
        """
        requests = _cancel_requests()
        if requests > self._requests:
            await checkpoint()
            self._requests = _cancel_requests()

    async def _pass_cancellation(self) -> None:
        """Raise the cancellation of this task, if the handler that has ended kept it to itself.

        What a scope cancels is told again at each checkpoint; asyncio itself tells it only once.
        """
        await checkpoint_if_cancelled()
        requests = _cancel_requests()
        if requests > self._requests and self._natively:
            await checkpoint()  # where the handler did not wait for it, it is still to come
            raise asyncio.CancelledError
        # Older releases of AnyIO leave some behind; a handler may have dealt with others.
        self._requests = requests


def _begin(
    enter: Callable[[Seat], object],
    seat: Seat,
    function: Callable[[Any], _Steps],  # Any: the event, or the terms
    argument: object,
) -> tuple[_Steps, object] | None:
    """Call a handler and take its first step; None if that was all, else with what it gave."""
    enter(seat)
    steps = function(argument)
    trap = next(steps.__await__(), _ENDED)
    return None if trap is _ENDED else (steps, trap)


def _call(step: Callable[[Any], object], value: Any) -> object:
    return step(value)


async def _attempt(turn: Turn, place: int, terms: Terms) -> None:
    """Run one handler of any kind, within its own limit, under the eyes of the observers."""
    handler = turn.handlers[place]
    requests = _cancel_requests()
    with watched(turn.observers, turn.delivery(place)):
        try:
            awaitable = await handler.start(turn.event, turn.origin)
            if awaitable is not None:
                await _await_in_time(awaitable, handler, terms)
        except Exception:
            raise
        except BaseException as error:  # noqa: BLE001 - the policy
            verdict = _verdict(error, handler, requests)
            try:
                raise verdict from verdict.__cause__
            finally:
                del verdict  # or this frame and its traceback keep each other alive


async def _await_in_time(awaitable: Awaitable[object], handler: Handler, terms: Terms) -> None:
    limit = terms.timeout if handler.timeout is ... else handler.timeout
    if limit is None:
        await awaitable
        return
    stopped: BaseException | None = None
    try:
        with move_on_after(limit) as scope:
            try:
                await awaitable
            except BaseException as error:
                stopped = error
                raise
        if scope.cancelled_caught:
            raise _late(handler, limit, stopped)
    finally:
        del stopped  # or this frame and its traceback keep each other alive


def _late(handler: Handler, limit: float, stopped: BaseException | None) -> HandlerTimeoutError:
    error = HandlerTimeoutError(handler.name, limit)
    error.__cause__ = stopped  # its traceback shows where the handler was waiting
    return error


def _verdict(error: BaseException, handler: Handler, requests: int) -> BaseException:
    """What the handler failed with, or else what it was ended by.

    Args:
        error: What came out of it.
        handler: Which one.
        requests: How often the task had been asked to cancel when the handler began.
    """
    failures = _failures_in(error)
    if failures is not None:
        return failures
    if _in_cancelled_scope() or _cancel_requests() > requests:
        return error
    made_up = HandlerCancelledError(handler.name)
    made_up.__cause__ = error
    return made_up


def _add_note(error: Exception, turn: Turn, place: int) -> None:
    """Say in its traceback which handler it came from; left out where it takes no notes."""
    event, handler = type_name(type(turn.event)), turn.handlers[place]
    note = f"raised by the handler {handler.name} ({handler.location}) for {event}"
    published_from = turn.delivery(place).published_from
    if published_from is not None:
        note = f"{note}, published at {published_from}"
    with suppress(Exception):  # a frozen dataclass has none, and `add_note` may be anybody's
        if note not in getattr(error, "__notes__", ()):  # one instance may be raised twice
            error.add_note(note)


def _failures_in(error: BaseException) -> BaseException | None:
    """What is left of it without cancellations; None where it is nothing else.

    A task group of the handler's own, cancelled while its children failed, may raise both: the
    failures are news, and the cancellation comes again at the next checkpoint.
    """
    cancelled = get_cancelled_exc_class()
    if isinstance(error, cancelled):
        return None
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).split(cancelled)[1]
    return error


def whereabouts(tally: Tally) -> dict[Delivery, list[FrameType]]:
    """What runs now, each with the frames in which it waits, the outermost first.

    For messages that say where it is stuck; reads the coroutines' frames, and costs nothing before.
    Of a plain function in a worker thread it shows where the event loop waits for the thread.
    """
    return {
        delivery: list(_frames(steps))
        for crew in [*tally.crews]
        if isinstance(crew, _Crew)
        for delivery, steps in crew.running.items()
    }


def _frames(awaited: object) -> Iterator[FrameType]:
    """The frames of a coroutine and of all that it awaits."""
    while True:
        # Any: coroutines, generators and async generators call the same things differently.
        waiting = cast("Any", awaited)
        for kind, inner in (("cr", "await"), ("gi", "yieldfrom"), ("ag", "await")):
            frame = getattr(waiting, f"{kind}_frame", None)
            if frame is not None:
                yield frame
                awaited = getattr(waiting, f"{kind}_{inner}")
                break
        else:
            return


def _is_native(error: BaseException) -> bool:
    """Whether it is asyncio's own cancellation of a task, which AnyIO's scopes mark as theirs."""
    return isinstance(error, asyncio.CancelledError) and "cancel scope" not in str(error)


def _in_cancelled_scope() -> bool:
    return current_effective_deadline() == -math.inf


async def _be_cancelled() -> None:
    """Be cancelled now, if a scope is: in it a task begins, and wakes, all the same."""
    if _in_cancelled_scope():
        await checkpoint()


def _cancel_requests() -> int:
    """How often this task was asked to cancel, natively or by a scope; trio has no such count.

    On asyncio anyone can raise `CancelledError`. Comparing this count with its value before is
    what tells a cancellation from an exception that merely looks like one.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # not asyncio
        return 0
    return task.cancelling() if task else 0
