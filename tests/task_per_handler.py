"""The plain form of dispatch, a task for each handler: what the fast one is held against."""

from collections import deque
from collections.abc import Callable
from functools import partial

from anyio import create_task_group
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from eventkit import Delivery
from eventkit._core.attempts import attempt
from eventkit._core.dispatch import Terms, Turn
from eventkit._core.policy import add_note, cancel_requests, failures_in, in_cancelled_scope
from eventkit._core.stats import Outcome


class OneTask:
    """What the tally sees of one task."""

    def __init__(self, delivery: Delivery) -> None:
        self.running = [delivery]
        self.handled = 0


async def run_all(next_turn: Callable[[], Turn | None], terms: Terms) -> int:
    """Run the handlers of each event. See `eventkit._core.awaited.run_all`."""
    handled = 0
    while (turn := next_turn()) is not None:
        if turn.interlude is not None:
            await turn.interlude()
            continue
        event = _Event(turn, terms)
        try:
            while event.waiting and not event.fatal:
                async with create_task_group() as tasks:
                    event.start_next(tasks)
        finally:
            for index in turn.indexes:
                if index not in event.ended:  # it never came to its first step
                    terms.tally.end(turn.end_badly(index, Outcome.UNDELIVERED), 1)
            if event.fatal:
                raise event.fatal.pop()
        handled += len(event.ended) - len(turn.lost)
    return handled


class _Event:
    """One event, and how far its handlers are."""

    def __init__(self, turn: Turn, terms: Terms) -> None:
        self.turn = turn
        self.terms = terms
        self.waiting = deque(turn.indexes)
        self.ended: list[int] = []
        self.fatal: list[BaseException] = []

    def start_next(self, tasks: TaskGroup) -> None:
        """Start the task of the next handler; unless sequential, it starts the one after it.

        Tasks that are spawned together start in any order on trio; one by one they keep theirs.
        """
        if self.waiting:
            index = self.waiting.popleft()
            start = partial(tasks.start_soon, name=self.turn.handlers[index].name)
            variables = self.turn.variables.copy()
            variables.run(self.turn.enter, (self.turn, index))
            variables.run(start, self._run, index, tasks)

    async def _run(self, index: int, tasks: TaskGroup) -> None:
        """Run one handler, so that nothing but the cancellation of the dispatch leaves its task."""
        task = OneTask(self.turn.delivery(index))
        self.terms.tally.runs.add(task)
        outcome = Outcome.UNDELIVERED
        try:
            await checkpoint_if_cancelled()
            if not self.terms.sequential:
                self.start_next(tasks)
            outcome = await _outcome(self.turn, index, self.terms)
        except BaseException as error:
            if failures_in(error) is not None:
                self.fatal[:] = self.fatal or [error]  # one can propagate, and the first one does
                tasks.cancel_scope.cancel()
            elif not cancel_requests() and in_cancelled_scope():
                raise  # a trio nursery learns from its children that it was cancelled
            # On asyncio the waiting task is told itself.
        finally:
            self.ended.append(index)
            if outcome is not Outcome.HANDLED:
                outcome = self.turn.end_badly(index, outcome)
            task.running.clear()
            self.terms.tally.leave(task)
            self.terms.tally.end(outcome, 1)


async def _outcome(turn: Turn, index: int, terms: Terms) -> Outcome:
    try:
        await attempt(turn, index, terms.timeout, cancel_requests())
    except Exception as error:
        add_note(error, turn.delivery(index), turn.handlers[index])
        terms.report(turn.delivery(index), error)
        return Outcome.FAILED
    return Outcome.HANDLED
