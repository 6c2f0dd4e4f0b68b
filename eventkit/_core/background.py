"""Runs handlers behind the response: in tasks of their own, which nobody awaits.

All workers are alike. The worker that ends last goes on with the next event, and in the end it ends
the run. No scope of a user's is around them, so each worker has one, the outermost of its task, and
the run is cancelled by cancelling those: that is told again at each checkpoint, shields hold, and
threads are waited for.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from eventkit._core.dispatch import NO_TURN, Run, Terms, Worker
from eventkit._core.loops.tasks import Tasks
from eventkit._core.policy import cancel_requests
from eventkit._core.units import Ending


class Owner(Protocol):
    """Who submitted the run, and waits for its end."""

    def expire_at(self, deadline: float) -> None:
        """Have runs expire whose deadline this is."""
        ...

    def ended(self, run: BackgroundRun) -> None:
        """The last worker of the run has ended."""
        ...


class BackgroundRun(Run):
    """A run in tasks of its own.

    Attributes:
        ending: The unit of work that is delivered.
        deadline: When the time of the event at hand is up.
        nursery: Where its tasks are, on trio.
    """

    __slots__ = ("_expired", "_over", "_owner", "_tasks", "deadline", "ending", "nursery")

    def __init__(self, ending: Ending, terms: Terms, tasks: Tasks, owner: Owner) -> None:
        super().__init__(ending.next_turn, terms, tasks.drive)
        self.ending = ending
        self.deadline = math.inf
        self.nursery: Any = None  # Any: trio's
        self._tasks = tasks
        self._owner = owner
        self._over = False  # nothing begins any more
        self._expired = False  # nothing of this event begins any more

    def start(self) -> None:
        """Have the first worker come."""
        self.terms.tally.enter(self)
        worker = Worker(self)
        self.workers.add(worker)
        self._coming += 1
        self._tasks.start(self, worker)

    @property
    def spent(self) -> bool:
        return self._over or self._expired

    @property
    def late(self) -> bool:
        return self._expired and not self._over

    def spawn(self, worker: Worker) -> None:
        self._tasks.spawn(self, worker)

    def set_deadline(self, seconds: float) -> None:
        self.deadline = self._tasks.time() + seconds
        if seconds != math.inf:
            self._owner.expire_at(self.deadline)

    def expire(self) -> None:
        """The time of the event at hand is up."""
        self.deadline = math.inf
        self._expired = True
        self._cancel_scopes()

    def cancel(self) -> None:
        """End it: what runs is cancelled, and what has not begun is undelivered."""
        self._over = True
        self._cancel_scopes()

    def _cancel_scopes(self) -> None:
        for worker in self.workers:
            if worker.scope is not None:
                worker.scope.cancel()

    async def may_go_on(self, worker: Worker) -> bool:
        if self.spent:
            return False
        if worker.told:
            requests = cancel_requests()
            if requests > worker.requests and worker.natively:
                return False
            worker.requests = requests  # a handler may have dealt with others
        return True

    async def work(self, worker: Worker) -> None:
        """Do one worker's part. See `Workplace`."""
        try:
            await self._tasks.first_step()
            self.arrive()
            if self.turn is NO_TURN:
                await self.ending.until_free()
            while not self._over:
                with self._tasks.scope() as worker.scope:
                    await worker.serve()
                if not self._expired or self.is_shared:
                    break
                self._expired = self._timed = False
                worker.requests = cancel_requests()
        except BaseException as error:  # noqa: BLE001 - asyncio would end the loop for some
            worker.told |= not self.end(error)
        finally:
            worker.scope = None
            if worker.told and not self.spent:
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
        self._owner.ended(self)
