"""The plain form of dispatch, a task for each handler: what the fast one is held against."""

from collections import deque
from collections.abc import Iterable
from functools import partial

from anyio import create_task_group
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from eventkit import Delivery
from eventkit._dispatch import (
    Run,
    Terms,
    _add_note,
    _attempt,
    _cancel_requests,
    _failures_in,
    _in_cancelled_scope,
)
from eventkit._stats import Outcome


class OneRun:
    """What the tally sees of one task."""

    def __init__(self, run: Run) -> None:
        self.delivery: Delivery | None = run.delivery
        self.handled = 0


async def run_all(events: Iterable[Iterable[Run]], terms: Terms) -> int:
    """Run the handlers of each event. See `eventkit._dispatch.run_all`."""
    handled = 0
    for event in events:
        runs = [*event]
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
                    terms.tally.end(Outcome.UNDELIVERED, 1)
            if fatal:
                raise fatal.pop()
        handled += sum(run.outcome is Outcome.HANDLED for run in runs)
    return handled


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
    worker = OneRun(run)
    terms.tally.enter(worker)
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
        # On asyncio the waiting task is told itself.
    finally:
        run.outcome = outcome
        worker.delivery = None
        terms.tally.leave(worker)
        terms.tally.end(outcome, 1)


async def _outcome(run: Run, terms: Terms) -> Outcome:
    try:
        await _attempt(run, terms)
    except Exception as error:
        _add_note(error, run)
        terms.report(run.delivery, error)
        return Outcome.FAILED
    return Outcome.HANDLED
