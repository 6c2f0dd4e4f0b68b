"""The plain form of dispatch, a task for each handler: what the fast one is held against."""

from collections import deque
from collections.abc import Iterable
from functools import partial

from anyio import create_task_group
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from eventkit import Delivery
from eventkit._dispatch import (
    Terms,
    Turn,
    _add_note,
    _attempt,
    _cancel_requests,
    _failures_in,
    _in_cancelled_scope,
)
from eventkit._stats import Outcome


class OneTask:
    """What the tally sees of one task."""

    def __init__(self, delivery: Delivery) -> None:
        self.running = [delivery]
        self.handled = 0


async def run_all(turns: Iterable[Turn], terms: Terms) -> int:
    """Run the handlers of each event. See `eventkit._dispatch.run_all`."""
    handled = 0
    for turn in turns:
        waiting = deque(turn.places)
        ended: list[int] = []
        fatal: list[BaseException] = []
        try:
            while waiting and not fatal:
                async with create_task_group() as tasks:
                    _start_next(waiting, turn, terms, ended, fatal, tasks)
        finally:
            for place in turn.places:
                if place not in ended:  # it never came to its first step
                    turn.lost[place] = Outcome.UNDELIVERED
                    terms.tally.end(Outcome.UNDELIVERED, 1)
            if fatal:
                raise fatal.pop()
        handled += len(ended) - len(turn.lost)
    return handled


def _start_next(
    waiting: deque[int],
    turn: Turn,
    terms: Terms,
    ended: list[int],
    fatal: list[BaseException],
    tasks: TaskGroup,
) -> None:
    """Start the task of the next handler; unless sequential, it starts the one after it, and so on.

    Tasks that are spawned together start in any order on trio; one by one they keep theirs.
    """
    if waiting:
        place = waiting.popleft()
        start = partial(tasks.start_soon, name=turn.handlers[place].name)
        variables = turn.variables.copy()
        variables.run(terms.enter, (turn, place))
        variables.run(start, _guard, place, waiting, turn, terms, ended, fatal, tasks)


async def _guard(
    place: int,
    waiting: deque[int],
    turn: Turn,
    terms: Terms,
    ended: list[int],
    fatal: list[BaseException],
    tasks: TaskGroup,
) -> None:
    """Run one handler, so that nothing but the cancellation of the dispatch leaves its task."""
    task = OneTask(turn.delivery(place))
    terms.tally.enter(task)
    outcome = Outcome.UNDELIVERED
    try:
        await checkpoint_if_cancelled()
        if not terms.sequential:
            _start_next(waiting, turn, terms, ended, fatal, tasks)
        outcome = await _outcome(turn, place, terms)
    except BaseException as error:
        if _failures_in(error) is not None:
            fatal[:] = fatal or [error]  # one can propagate, and the first one does
            tasks.cancel_scope.cancel()
        elif not _cancel_requests() and _in_cancelled_scope():
            raise  # a trio nursery learns from its children that it was cancelled
        # On asyncio the waiting task is told itself.
    finally:
        ended.append(place)
        if outcome is not Outcome.HANDLED:
            turn.lost[place] = outcome
        task.running.clear()
        terms.tally.leave(task)
        terms.tally.end(outcome, 1)


async def _outcome(turn: Turn, place: int, terms: Terms) -> Outcome:
    try:
        await _attempt(turn, place, terms)
    except Exception as error:
        _add_note(error, turn, place)
        terms.report(turn.delivery(place), error)
        return Outcome.FAILED
    return Outcome.HANDLED
