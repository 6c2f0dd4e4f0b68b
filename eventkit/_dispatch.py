"""Runs the handlers of one event: concurrency and failure policy, and nothing else.

`run_all` is the whole of it. It knows nothing of who subscribed and why, of units of work, or of
what happens before and after.

The policy, per delivery: an `Exception` is recorded and disturbs nobody; a cancellation that came
from outside ends the delivery and passes on; one that the handler made up is a failure; anything
else (`KeyboardInterrupt`, `SystemExit`) cancels the siblings and propagates.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import cast

from anyio import (
    create_task_group,
    current_effective_deadline,
    get_cancelled_exc_class,
    move_on_after,
)
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from eventkit._events import Delivery, type_name
from eventkit._handlers import Handler
from eventkit._observers import Observer, watched
from eventkit._stats import Outcome, Tally
from eventkit.exceptions import HandlerCancelledError, HandlerTimeoutError


@dataclass(slots=True, eq=False)
class Run:
    """One delivery that is about to happen.

    Attributes:
        delivery: What observers are told.
        handler: What to run.
        timeout: Seconds it may take on the event loop, None for no limit.
        origin: Where the unit of work comes from, for the handler's dependencies.
        variables: The context variables to run it in; copied, never changed.
        outcome: Set by `run_all`, and by nobody else.
    """

    delivery: Delivery
    handler: Handler
    timeout: float | None
    origin: object
    variables: Context
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What all runs of one unit of work have in common.

    Attributes:
        sequential: One handler after the other, instead of all at once.
        tally: The counters to keep.
        observers: Whom to tell.
        report: Called at once with every failure, from the task of the failed handler.
    """

    sequential: bool
    tally: Tally
    observers: tuple[Observer, ...]
    report: Callable[[Delivery, Exception], None]


async def run_all(runs: Sequence[Run], terms: Terms) -> None:
    """Run the handlers of one event, and wait until every one of them has ended.

    Each runs in a task of its own and in its own copy of its context variables. They start in the
    given order. Afterwards every run has an outcome, whatever way this was left.

    Cancelling it cancels the handlers; those that have not started then are undelivered.

    Raises:
        BaseException: What a handler raised that is neither an `Exception` nor a cancellation,
            after its siblings have been cancelled.
    """
    waiting = deque(runs)
    fatal: list[BaseException] = []
    try:
        while waiting and not fatal:
            async with create_task_group() as tasks:
                _start_next(waiting, terms, fatal, tasks)
    finally:
        for run in runs:
            if run.outcome is None:  # it never came to its first step
                run.outcome = Outcome.UNDELIVERED
                terms.tally.skip(Outcome.UNDELIVERED, 1)
        if fatal:
            raise fatal.pop()


def _start_next(
    waiting: deque[Run], terms: Terms, fatal: list[BaseException], tasks: TaskGroup
) -> None:
    """Start the task of the next run; unless sequential, it starts the one after it, and so on.

    Tasks that are spawned together start in any order on trio; one by one they keep theirs.
    """
    if waiting:
        run = waiting.popleft()
        start = partial(tasks.start_soon, name=run.handler.name)
        run.variables.run(start, _guard, run, waiting, terms, fatal, tasks)


async def _guard(
    run: Run, waiting: deque[Run], terms: Terms, fatal: list[BaseException], tasks: TaskGroup
) -> None:
    """Run one handler, so that nothing but the cancellation of the dispatch leaves its task."""
    terms.tally.start(run.delivery)
    outcome = Outcome.UNDELIVERED
    try:
        await checkpoint_if_cancelled()
        if not terms.sequential:
            _start_next(waiting, terms, fatal, tasks)
        outcome = await _outcome(run, terms)
    except BaseException as error:
        if _failures_in(error) is not None:
            fatal[:] = fatal or [error]  # one can propagate, and the first one does
            tasks.cancel_scope.cancel()
        elif not _cancel_requests() and _in_cancelled_scope():
            raise  # a trio nursery learns from its children that it was cancelled
        # On asyncio the waiting task is told itself. Raised here too, the cancellation of this
        # task alone would reach its siblings, and AnyIO would keep it and the event in a ring.
    finally:
        run.outcome = outcome
        terms.tally.end(run.delivery, outcome)


async def _outcome(run: Run, terms: Terms) -> Outcome:
    """Run one handler under the eyes of the observers, and report its failure."""
    try:
        with watched(terms.observers, run.delivery):
            await _attempt(run)
    except Exception as error:  # noqa: BLE001 - the policy
        _add_note(error, run)
        terms.report(run.delivery, error)
        return Outcome.FAILED
    return Outcome.HANDLED


async def _attempt(run: Run) -> None:
    """Call one handler, and raise what its delivery failed with."""
    requests = _cancel_requests()
    try:
        awaitable = await run.handler.start(run.delivery.event, run.origin)
        if awaitable is not None:
            await _await_in_time(awaitable, run)
    except Exception:
        raise
    except BaseException as error:  # noqa: BLE001 - the policy
        failures = _failures_in(error)
        try:
            if failures is None and not _was_cancelled_since(requests):
                raise HandlerCancelledError(run.handler.name) from error
            if failures is None or failures is error:
                raise
            raise failures from failures.__cause__
        finally:
            del failures  # or this frame and its traceback keep each other alive


async def _await_in_time(awaitable: Awaitable[object], run: Run) -> None:
    if run.timeout is None:
        await awaitable
        return
    waiting: BaseException | None = None
    try:
        with move_on_after(run.timeout) as scope:
            try:
                await awaitable
            except BaseException as error:
                waiting = error
                raise
        if scope.cancelled_caught:
            raise HandlerTimeoutError(run.handler.name, run.timeout) from waiting
    finally:
        del waiting  # or this frame and its traceback keep each other alive


def _add_note(error: Exception, run: Run) -> None:
    """Say in its traceback which handler it came from; left out where it takes no notes."""
    event = type_name(type(run.delivery.event))
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


def _in_cancelled_scope() -> bool:
    return current_effective_deadline() == -math.inf


def _was_cancelled_since(requests: int) -> bool:
    return _in_cancelled_scope() or _cancel_requests() > requests


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
