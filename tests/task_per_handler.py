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
        event = _Event(turn, terms)
        try:
            while event.waiting and not event.fatal:
                async with create_task_group() as tasks:
                    event.start_next(tasks)
        finally:
            for place in turn.places:
                if place not in event.ended:  # it never came to its first step
                    turn.lost[place] = Outcome.UNDELIVERED
                    terms.tally.end(Outcome.UNDELIVERED, 1)
            if event.fatal:
                raise event.fatal.pop()
        handled += len(event.ended) - len(turn.lost)
    return handled


class _Event:
    """One event, and how far its handlers are."""

    def __init__(self, turn: Turn, terms: Terms) -> None:
        self.turn = turn
        self.terms = terms
        self.waiting = deque(turn.places)
        self.ended: list[int] = []
        self.fatal: list[BaseException] = []

    def start_next(self, tasks: TaskGroup) -> None:
        """Start the task of the next handler; unless sequential, it starts the one after it.

        Tasks that are spawned together start in any order on trio; one by one they keep theirs.
        """
        if self.waiting:
            place = self.waiting.popleft()
            start = partial(tasks.start_soon, name=self.turn.handlers[place].name)
            variables = self.turn.variables.copy()
            variables.run(self.terms.enter, (self.turn, place))
            variables.run(start, self._run, place, tasks)

    async def _run(self, place: int, tasks: TaskGroup) -> None:
        """Run one handler, so that nothing but the cancellation of the dispatch leaves its task."""
        task = OneTask(self.turn.delivery(place))
        self.terms.tally.enter(task)
        outcome = Outcome.UNDELIVERED
        try:
            await checkpoint_if_cancelled()
            if not self.terms.sequential:
                self.start_next(tasks)
            outcome = await _outcome(self.turn, place, self.terms)
        except BaseException as error:
            if _failures_in(error) is not None:
                self.fatal[:] = self.fatal or [error]  # one can propagate, and the first one does
                tasks.cancel_scope.cancel()
            elif not _cancel_requests() and _in_cancelled_scope():
                raise  # a trio nursery learns from its children that it was cancelled
            # On asyncio the waiting task is told itself.
        finally:
            self.ended.append(place)
            if outcome is not Outcome.HANDLED:
                self.turn.lost[place] = outcome
            task.running.clear()
            self.terms.tally.leave(task)
            self.terms.tally.end(outcome, 1)


async def _outcome(turn: Turn, place: int, terms: Terms) -> Outcome:
    try:
        await _attempt(turn, place, terms)
    except Exception as error:
        _add_note(error, turn, place)
        terms.report(turn.delivery(place), error)
        return Outcome.FAILED
    return Outcome.HANDLED
