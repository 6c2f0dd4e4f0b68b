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
waits for it: the worker spawns a second worker with all handlers that have *not begun*, then hands
the trap on to the event loop, and from there on is what an `await` would be, a pipe between the
loop and this one handler. The second worker does the same with the rest. Ten handlers that wait
are ten workers, ten that do not are one.

    worker 1:  a  b  c~~~~~~~~~~~~~~~~~~c      a, b, d, e and f never wait, c and g do
    worker 2:         d  e  f  g~~~~~g

Nothing that has begun ever changes its task, and that is what keeps it correct: a handler's cancel
scopes, shields, timeouts and task groups belong to the task that it began in, and each worker
drives one handler at a time. Only what has not begun is given away, and the continuation is stolen
rather than the handler.

What can be told apart from a task per handler: handlers that do not wait share the identity of
their worker, the first worker being the task that dispatches; and a handler that waits is stepped,
not awaited, so debuggers that follow `cr_await` from a task end at `_drive`; `whereabouts` knows
where each handler waits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from operator import length_hint
from types import FrameType, coroutine
from typing import Any, Protocol, cast

from anyio import (
    CancelScope,
    create_task_group,
    current_effective_deadline,
    current_time,
    get_cancelled_exc_class,
    move_on_after,
)
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from eventkit._events import Delivery, type_name
from eventkit._handlers import Handler
from eventkit._observers import Observer, watched
from eventkit._stats import Outcome, Tally
from eventkit.exceptions import HandlerCancelledError, HandlerTimeoutError

_Steps = Coroutine[object, object, object]

_ENDED = object()  # in the place of a trap: the handler has ended

# So many events in a row may pass without a handler that waits, before other tasks get their turn
# and a cancellation its chance. A turn of the event loop costs as much as twenty short handlers.
_BREATH = 100

# What `_drive` knows the context variables of its task by.
_stepped_from: ContextVar[object] = ContextVar("eventkit_stepped_from", default=None)


class Run(Protocol):
    """One delivery that is about to happen.

    Attributes:
        event: What is delivered.
        handler: What to run.
        observers: Whom to tell.
        variables: The context variables to run it in, nobody else's.
        outcome: None before; set by `run_all`, and by nobody else.
        steps: The coroutine of the handler, once it waits; set by `run_all`.
        cancelled: False before; whether its task was cancelled natively; set by `run_all`.
    """

    event: object
    handler: Handler
    observers: tuple[Observer, ...]
    variables: Context
    outcome: Outcome | None
    steps: _Steps | None
    cancelled: bool

    @property
    def delivery(self) -> Delivery:
        """What observers are told; made when it is asked for."""
        ...

    @property
    def origin(self) -> object:
        """Where the unit of work comes from, for the handler's dependencies."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What all runs of one unit of work have in common.

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


async def run_all(events: Iterable[Sequence[Run]], terms: Terms) -> int:
    """Run the handlers of each event; those of the next begin when all of this one have ended.

    They begin in the given order, each in its own context variables. An event is asked for when
    its turn has come, and never before; none may be empty. Afterwards every run that was given
    has an outcome, whatever way this was left.

    Cancelling it cancels the handlers; those that have not begun then are undelivered.

    Returns:
        How many handlers have ended well.

    Raises:
        BaseException: What a handler raised that is neither an `Exception` nor a cancellation,
            after its siblings have been cancelled.
    """
    result = _Result()
    first = _Worker(terms, result, events=events)
    terms.tally.enter(first)
    try:
        if _in_cancelled_scope():
            await checkpoint()
            # Still here, it was begun by a worker thread whose task had been cancelled. On asyncio
            # AnyIO tells it nothing, and `checkpoint_if_cancelled` would wait for that for ever.
            raise asyncio.CancelledError
        await first.take_cancellation()
        while not result.fatal and first.has_event():
            if first.may_need_help():
                async with create_task_group() as tasks:
                    await first.work(tasks)
            else:
                await first.work(None)
    finally:
        first.leave()
        for run in first.event:
            if run.outcome is None:  # it never began
                run.outcome = Outcome.UNDELIVERED
                terms.tally.end(Outcome.UNDELIVERED, 1)
        if result.fatal:
            raise result.fatal.pop()
    return result.handled


@dataclass(slots=True, eq=False)
class _Result:
    """What all workers have come to; `fatal` is what ends it all."""

    handled: int = 0
    fatal: list[BaseException] = field(default_factory=list[BaseException])


class _Worker:
    """One task's part of the work: it runs handlers, one at a time.

    The first one has the events and works in the task that dispatches; each of the others has the
    rest of one event and a task of its own.
    """

    __slots__ = (
        "_events",
        "_helped",
        "_is_first",
        "_needs_task",
        "_requests",
        "_rest",
        "_result",
        "_terms",
        "event",
        "handled",
        "run",
    )

    def __init__(
        self,
        terms: Terms,
        result: _Result,
        *,
        events: Iterable[Sequence[Run]] | None = None,
        rest: Iterable[Run] = (),
    ) -> None:
        self._terms = terms
        self._result = result
        self._is_first = events is not None
        self._events = iter(events or ())
        self._rest = iter(rest)  # what is this worker's to begin
        self._helped = False  # it was, and another worker has it
        self._needs_task = False  # what is next has to have a task of its own
        self._requests = 0
        self.event: Sequence[Run] = ()
        self.run: Run | None = None  # what has begun and not ended
        self.handled = 0

    @property
    def delivery(self) -> Delivery | None:
        """The delivery that is running, for the tally, which asks instead of being told."""
        return self.run.delivery if self.run else None

    def has_event(self) -> bool:
        """Whether there is an event to go on with: the one at hand, or else the next one."""
        if not length_hint(self._rest):
            self.event = next(self._events, ())
            self._rest = iter(self.event)
            self._helped = False
        return length_hint(self._rest) > 0

    def may_need_help(self) -> bool:
        """Whether a task group has to be there before the next handler begins.

        Opened later, while it waits, the group would stand in the midst of its scopes.
        """
        return self._needs_task or (len(self.event) > 1 and not self._terms.sequential)

    async def help(self, tasks: TaskGroup) -> None:
        """Do this worker's part in a task of its own, which only a cancellation leaves as such."""
        self._terms.tally.enter(self)
        try:
            await checkpoint_if_cancelled()
            await self.work(tasks)
        except get_cancelled_exc_class():
            if not _cancel_requests() and _in_cancelled_scope():
                raise  # a trio nursery learns from its children that it was cancelled
            # On asyncio the waiting task is told itself. Raised here too, the cancellation of this
            # task alone would reach its siblings, and AnyIO would keep it and the event in a ring.
        finally:
            self.leave()

    def leave(self) -> None:
        """Give up the work, and the count of it."""
        self._terms.tally.leave(self)
        self._result.handled += self.handled

    async def work(self, tasks: TaskGroup | None) -> None:
        """Run handlers, until none is left or it is not for this worker to begin the next."""
        try:
            while await self._work_in_time(tasks):
                await self.take_cancellation()
        except BaseException as error:
            if _failures_in(error) is None:
                raise
            if not self._result.fatal:  # one can propagate, and the first one does
                self._result.fatal.append(error)
            if tasks is not None:
                tasks.cancel_scope.cancel()
        finally:
            if self.run is not None:
                self._end(self.run, Outcome.UNDELIVERED)

    async def _work_in_time(self, tasks: TaskGroup | None) -> bool:
        """Do it in one cancel scope; True where that is spent, and another one has to be opened.

        It has the deadlines of all handlers that this worker runs. One for each would cost more
        than a handler that does not wait, and a scope cannot be opened once the handler waits.
        """
        stopped: BaseException | None = None
        limit = self._terms.timeout
        try:
            with nullcontext() if limit is None else CancelScope() as scope:
                try:
                    return await self._run_handlers(tasks, scope)
                except BaseException as error:
                    stopped = error
                    raise
            run = cast("Run", self.run)
            self._fail(run, _late(run, cast("float", limit), stopped))
        except BaseException as error:  # noqa: BLE001 - the policy
            now = self.run
            verdict = _verdict(error, now, self._requests)
            try:
                if now is None or not isinstance(verdict, Exception):
                    raise verdict from verdict.__cause__
                self._fail(now, verdict)
            finally:
                del verdict  # or this frame and its traceback keep each other alive
            await self._pass_cancellation(now)
        finally:
            del stopped  # likewise
        return True

    async def _run_handlers(self, tasks: TaskGroup | None, scope: CancelScope | None) -> bool:
        """Run one handler after the other; True where `scope` was spent on the last of them.

        What leaves this as an exception came out of `self.run`, where there is one.
        """
        terms = self._terms
        breath = _BREATH
        while True:
            waited: Run | None = None
            for run in self._rest:
                handler = run.handler
                plain = handler.direct and not run.observers  # else there is more around it
                if not plain and handler.in_thread and self._is_first:
                    # It is sure to wait, and a native cancellation would not wait for its thread.
                    # That can only reach the task that dispatches, so it goes to another one.
                    self._rest = iter([run, *self._rest])
                    self._needs_task = tasks is None
                    self._get_help(tasks)
                    break
                self.run = run
                try:
                    steps: _Steps
                    if not plain:
                        steps = _attempt(run, terms)
                    elif handler.solver is None:
                        steps = handler.function(run.event)
                    else:
                        steps = handler.with_dependencies(handler.solver, run.event, run.origin)
                    trap = run.variables.run(next, steps.__await__(), _ENDED)
                    if trap is not _ENDED:
                        waited = run
                        run.steps = steps
                        if not terms.sequential:
                            self._get_help(tasks)
                        await self._wait_for(run, trap, scope if plain else None)
                except Exception as error:  # noqa: BLE001 - the policy
                    self._fail(run, error)
                else:
                    run.outcome = Outcome.HANDLED
                    self.run = None
                    self.handled += 1
                if waited is not None:
                    break
            if scope is not None and scope.cancel_called:
                return True
            if waited is not None and self._is_first:
                await self._pass_cancellation(waited)
            breath -= 1
            if not breath:
                await checkpoint()
                breath = _BREATH
            if self._helped or not self.has_event():
                return False  # what is left is for others, or for nobody
            if tasks is None and self.may_need_help():
                return False

    def _get_help(self, tasks: TaskGroup | None) -> None:
        """Have another worker begin what has not begun."""
        if tasks is not None and length_hint(self._rest):
            helper = _Worker(self._terms, self._result, rest=self._rest)
            tasks.start_soon(helper.help, tasks, name="eventkit handlers")
            self._rest = iter(())
            self._helped = True

    async def _wait_for(self, run: Run, trap: object, scope: CancelScope | None) -> None:
        """Go on with a handler that waits, until it ends or its time is up."""
        if scope is None or self._terms.timeout is None:
            await _drive(run, trap)
            return
        scope.deadline = current_time() + self._terms.timeout
        try:
            await _drive(run, trap)
        finally:
            scope.deadline = math.inf

    def _fail(self, run: Run, error: Exception) -> None:
        _add_note(error, run)
        run.variables.run(self._terms.report, run.delivery, error)
        self._end(run, Outcome.FAILED)

    def _end(self, run: Run, outcome: Outcome) -> None:
        run.outcome = outcome
        self.run = None
        self._terms.tally.end(outcome, 1)

    async def take_cancellation(self) -> None:
        """Be cancelled now, if this task was cancelled natively and does not know it yet.

        What comes out of a handler then, can be told from what came before.
        """
        requests = _cancel_requests()
        if requests > self._requests:
            await checkpoint()
            self._requests = _cancel_requests()

    async def _pass_cancellation(self, run: Run) -> None:
        """Raise the cancellation of this task, if the handler that has ended kept it to itself.

        What a scope cancels is told again at each checkpoint; asyncio itself tells it only once.
        """
        await checkpoint_if_cancelled()
        requests = _cancel_requests()
        if requests > self._requests and run.cancelled:
            raise asyncio.CancelledError
        self._requests = requests  # older releases of AnyIO leave some behind


@coroutine
def _drive(run: Run, trap: object) -> Generator[object, object, None]:
    """What `await` is from the second step on: the pipe between the event loop and the handler.

    It steps the handler in its own context variables. Not so where the event loop has exchanged
    them: trio runs what a thread calls by `from_thread.run` in the task that waits for the thread,
    and in the thread's context variables.
    """
    steps = cast("_Steps", run.steps)
    elsewhere, here = _stepped_from.get(), object()
    sent: object = None
    thrown: BaseException | None = None
    try:
        _stepped_from.set(here)
        while True:
            try:
                sent = yield trap
            except GeneratorExit as closed:
                try:
                    run.variables.run(steps.close)
                except Exception as broken:
                    raise closed from broken
                raise
            except BaseException as error:  # noqa: BLE001 - it is the handler's
                thrown = error
                run.cancelled = run.cancelled or _is_native(error)
            step = run.variables.run if _stepped_from.get() is here else _call
            if thrown is None:
                trap = step(steps.send, sent)
            else:
                trap = step(steps.throw, thrown)
                thrown = None
    except StopIteration:
        pass
    finally:
        _stepped_from.set(elsewhere)
        del sent, thrown  # or this frame and the traceback of what they hold keep each other alive


def _call(step: Callable[[Any], object], value: Any) -> object:
    return step(value)


async def _attempt(run: Run, terms: Terms) -> None:
    """Run one handler of any kind under the eyes of the observers, who are told what it raises."""
    requests = _cancel_requests()
    with watched(run.observers, run.delivery):
        try:
            awaitable = await run.handler.start(run.event, run.origin)
            if awaitable is not None:
                await _await_in_time(awaitable, run, terms)
        except Exception:
            raise
        except BaseException as error:  # noqa: BLE001 - the policy
            verdict = _verdict(error, run, requests)
            try:
                raise verdict from verdict.__cause__
            finally:
                del verdict  # or this frame and its traceback keep each other alive


async def _await_in_time(awaitable: Awaitable[object], run: Run, terms: Terms) -> None:
    limit = run.handler.timeout
    if limit is ...:
        limit = terms.timeout
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
            raise _late(run, limit, stopped)
    finally:
        del stopped  # or this frame and its traceback keep each other alive


def _late(run: Run, limit: float, stopped: BaseException | None) -> HandlerTimeoutError:
    error = HandlerTimeoutError(run.handler.name, limit)
    error.__cause__ = stopped  # its traceback shows where the handler was waiting
    return error


def _verdict(error: BaseException, run: Run | None, requests: int) -> BaseException:
    """What the handler failed with, or else what it was ended by.

    Args:
        error: What came out of it.
        run: Whose handler it is.
        requests: How often the task had been asked to cancel when the handler began.
    """
    failures = _failures_in(error)
    if failures is not None:
        return failures
    if run is None or _in_cancelled_scope() or _cancel_requests() > requests:
        return error
    made_up = HandlerCancelledError(run.handler.name)
    made_up.__cause__ = error
    return made_up


def _add_note(error: Exception, run: Run) -> None:
    """Say in its traceback which handler it came from; left out where it takes no notes."""
    event = type_name(type(run.event))
    note = f"raised by the handler {run.handler.name} ({run.handler.location}) for {event}"
    if run.delivery.published_from is not None:
        note = f"{note}, published at {run.delivery.published_from}"
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
        worker.run.delivery: list(_frames(worker.run.steps))
        for worker in [*tally.workers]
        if isinstance(worker, _Worker) and worker.run is not None
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
