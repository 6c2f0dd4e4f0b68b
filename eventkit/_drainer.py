"""Owns the units of work that have ended and wait to be delivered: a bounded crew of tasks.

Whoever has a task group that outlives requests makes a `Drainer` in it and submits what has ended.
Knows nothing of HTTP and of servers.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from contextvars import copy_context
from dataclasses import asdict, dataclass

from anyio import CancelScope, Event, get_cancelled_exc_class, move_on_after
from anyio.abc import TaskGroup

from eventkit._context import Core, EventContext, abandon, finish
from eventkit._log import log

# How long the clean-up of handlers that were cancelled at the end may hold up the shutdown.
_GRACE_SECONDS = 0.5


@dataclass(slots=True, eq=False)
class _Ended:
    """A unit of work that waits for its drain, or is being drained."""

    context: EventContext
    success: bool
    deliveries: int
    scope: CancelScope


class Drainer:
    """Delivers units of work in the order in which they ended, each in a task of its own.

    Belongs to the event loop of its task group. No handler, observer or reporter can end it.

    Args:
        core: The bus whose units they are.
        tasks: The group that owns the tasks. They start in the context variables of this moment.
        concurrency: How many units are drained at once.
        max_pending: How many deliveries may wait before it calls itself full; None for no limit.
            What is submitted is always taken: holding back new work is for the submitter.
    """

    def __init__(
        self, core: Core, tasks: TaskGroup, *, concurrency: int, max_pending: int | None
    ) -> None:
        self._core = core
        self._tasks = tasks
        self._concurrency = concurrency
        self._max_pending = max_pending
        self._variables = copy_context()
        self._waiting: deque[_Ended] = deque()
        self._waiting_deliveries = 0
        self._draining: set[_Ended] = set()
        self._changed: Event | None = None  # there while somebody waits for a unit to end

    @property
    def full(self) -> bool:
        """Whether as many deliveries wait as may."""
        return self._max_pending is not None and self._waiting_deliveries >= self._max_pending

    def submit(self, context: EventContext, *, success: bool) -> None:
        """Deliver and close the unit when its turn comes. Never blocks, no checkpoint."""
        ended = _Ended(context, success, len(context.pending), CancelScope())
        self._waiting_deliveries += ended.deliveries
        self._waiting.append(ended)
        self._core.tally.shift("units_waiting", 1)
        self._start()

    async def wait_for_room(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds until it is not full, and say whether it is so."""
        tally = self._core.tally
        tally.shift("held", 1)
        try:
            with move_on_after(timeout):
                while self.full:
                    await self._change()
        finally:
            tally.shift("held", -1)
        tally.shift("refused", int(self.full))
        return not self.full

    async def close(self, timeout: float) -> None:
        """Deliver what is left within `timeout` seconds; what remains then is undelivered.

        Logs at its start what is pending, by handler, and at its end what was left. Handlers that
        are cancelled have a moment for their clean-up. A plain `def` in a thread cannot be
        cancelled: it is named in the log and left to itself.
        """
        pending = self._by_handler()
        if pending:
            self._log(logging.INFO, "delivering before shutdown", pending)
        with move_on_after(timeout):
            await self._until_idle()
        left = self._by_handler()
        for ended in self._draining:
            ended.scope.cancel()
        for ended in self._waiting:
            abandon(ended.context)
        self._core.tally.shift("units_waiting", -len(self._waiting))
        self._waiting.clear()
        self._waiting_deliveries = 0
        with move_on_after(_GRACE_SECONDS):
            await self._until_idle()
        level = logging.ERROR if left else logging.INFO
        self._log(level, "eventkit has stopped", left, **asdict(self._core.tally.snapshot()))

    def _start(self) -> None:
        """Start as many of the waiting units as may run at once."""
        while self._waiting and len(self._draining) < self._concurrency:
            ended = self._waiting.popleft()
            self._waiting_deliveries -= ended.deliveries
            self._draining.add(ended)
            self._core.tally.shift("units_waiting", -1)
            self._core.tally.shift("units_draining", 1)
            self._variables.run(self._tasks.start_soon, self._drain, ended)

    async def _drain(self, ended: _Ended) -> None:
        try:
            with ended.scope:
                await finish(ended.context, success=ended.success)
        except get_cancelled_exc_class():
            raise
        except BaseException as error:  # noqa: BLE001 - it would end the deliveries of everybody
            log(logging.CRITICAL, "a drain was ended", error=error, bus=self._core.name)
        finally:
            self._draining.remove(ended)
            self._core.tally.shift("units_draining", -1)
            self._start()
            if self._changed is not None:
                self._changed.set()
                self._changed = None

    async def _until_idle(self) -> None:
        while self._waiting or self._draining:
            await self._change()

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = Event()
        await self._changed.wait()

    def _by_handler(self) -> Counter[str]:
        """How many deliveries each handler has waiting or running here."""
        units = [*self._draining, *self._waiting]
        waiting = (delivery for ended in units for delivery in ended.context.pending)
        return self._core.tally.running_by_handler() + Counter(d.handler for d in waiting)

    def _log(self, level: int, message: str, by_handler: Counter[str], **counters: int) -> None:
        handlers = ", ".join(f"{name} x{times}" for name, times in by_handler.items())
        log(
            level,
            message,
            error=None,
            bus=self._core.name,
            left=by_handler.total(),
            handlers=handlers,
            **counters,
        )
