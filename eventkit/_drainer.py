"""Owns the units of work that have ended and wait to be delivered: a bounded crew of tasks.

Whoever has a task group that outlives requests makes a `Drainer` in it and submits what has ended.
Knows nothing of HTTP and of servers.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import asdict, dataclass
from functools import partial

from anyio import CancelScope, Event, create_task_group, get_cancelled_exc_class, move_on_after
from anyio.abc import TaskGroup

from eventkit._context import (
    Core,
    EventContext,
    abandon,
    close_if_idle,
    count_pending,
    finish,
)
from eventkit._log import log

# How long the clean-up of handlers that were cancelled at the end may hold up the shutdown.
_GRACE_SECONDS = 0.5


@dataclass(slots=True, eq=False)
class _Ended:
    """A unit of work that waits for its drain, or is being drained."""

    context: EventContext
    success: bool
    deliveries: int = 0  # that wait with it


class _Lane:
    """Where one unit after the other is drained, each in a task of its own.

    A handler that leaves a cancel scope open spoils the task it ran in, whose end raises in the
    group around it. So each lane has a group of its own, and one that is spoiled is given up.

    A lane drains a unit, or is idle, or is over: that is set when its drainer stops, when a unit
    has spoiled it or was cancelled alone, and before its group closes, which takes a moment.
    """

    __slots__ = ("over", "scope", "tasks")

    def __init__(self) -> None:
        self.scope = CancelScope()  # around the group
        self.tasks: TaskGroup  # once it is open
        self.over = Event()  # no more units come


class Drainer:
    """Delivers units of work in the order in which they ended, each in a task of its own.

    Belongs to the event loop of its task group, which has to wait for `close`. No handler,
    observer or reporter can end it.

    Args:
        core: The bus whose units they are.
        tasks: The group that owns the tasks. They start in the context variables of this moment.
        concurrency: How many units are drained at once.
        max_pending: How many deliveries may wait before it calls itself full; None for no limit.
            What is submitted is always taken: holding back new work is for the submitter.
        watch: Called with how many deliveries wait when that changes, and when somebody begins to
            wait for room, which its second argument says. It must not raise.
    """

    def __init__(
        self,
        core: Core,
        tasks: TaskGroup,
        *,
        concurrency: int,
        max_pending: int | None,
        watch: Callable[[int, bool], None] = lambda waiting, held: None,
    ) -> None:
        self._core = core
        self._name = f"eventkit drains {core.name!r}"
        self._tasks = tasks
        self._concurrency = concurrency
        self._max_pending = max_pending
        self._watch = watch
        self._variables = copy_context()
        self._open: set[EventContext] = set()
        self._waiting: deque[_Ended] = deque()
        self._waiting_deliveries = 0
        self._draining: dict[_Ended, _Lane] = {}
        self._idle: list[_Lane] = []
        self._closed = False
        self._room: Event | None = None  # there while somebody waits for room
        self._change: Event | None = None  # there while `close` waits for a unit to end

    @property
    def full(self) -> bool:
        """Whether as many deliveries wait as may."""
        return self._max_pending is not None and self._waiting_deliveries >= self._max_pending

    @property
    def stuck(self) -> bool:
        """Whether, once closed, handlers go on that could not be ended."""
        return self._closed and bool(self._draining)

    def expect(self, context: EventContext) -> None:
        """Count on a unit that has begun: once it has something pending, `close` waits for it."""
        self._open.add(context)

    def forget(self, context: EventContext) -> None:
        """Count on it no longer."""
        self._open.discard(context)
        self._changed()

    def submit(self, context: EventContext, *, success: bool) -> None:
        """End a unit: release or discard what nobody has decided, deliver when its turn comes.

        Never blocks, no checkpoint, so whatever becomes of the caller's task does not matter.
        After `close` what is left to deliver is undelivered.
        """
        if close_if_idle(context, success=success):
            pass
        elif self._closed:
            self._abandon(context)
        else:
            self._take(_Ended(context, success))
        self.forget(context)

    async def wait_for_room(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds until it is not full, and say whether it is so."""
        tally = self._core.tally
        tally.shift("held", 1)
        self._watch(self._waiting_deliveries, True)
        try:
            with move_on_after(timeout):
                while self.full:
                    if self._room is None:
                        self._room = Event()
                    await self._room.wait()
        finally:
            tally.shift("held", -1)
        tally.shift("refused", int(self.full))
        return not self.full

    async def close(self, timeout: float) -> None:
        """Deliver what is left within `timeout` seconds; what remains then is undelivered.

        Waits also for units that are expected and have something pending. Logs at its start what
        is pending, by handler, and at its end what was left. Handlers that are cancelled have a
        moment for their clean-up. What cannot be cancelled, a plain `def` in a thread for one, is
        named in the log and left to itself. If the caller is cancelled, the time is over.
        """
        if self._closed:
            return
        if self._busy():
            self._log(logging.INFO, "delivering before shutdown", self._by_handler())
        try:
            with move_on_after(timeout):
                while self._busy():
                    await self._next_change()
        finally:
            left = self._by_handler()
            self._stop()
            with move_on_after(_GRACE_SECONDS, shield=True):
                while self._draining:
                    await self._next_change()
            self._log(
                logging.ERROR if left else logging.INFO,
                "eventkit has stopped",
                left,
                still_running=_listed(self._core.tally.running_by_handler()),
                **asdict(self._core.tally.snapshot()),
            )

    def _busy(self) -> bool:
        return bool(self._waiting or self._draining or any(map(count_pending, self._open)))

    def _stop(self) -> None:
        """Cancel the drains, and close what waits or has not even ended."""
        self._closed = True
        for lane in self._draining.values():
            lane.scope.cancel()
        self._abandon(*(ended.context for ended in self._waiting), *self._open)
        self._core.tally.shift("units_waiting", -len(self._waiting))
        self._waiting.clear()
        self._waiting_deliveries = 0
        for lane in self._idle:
            lane.over.set()
        self._idle.clear()
        self._make_room()

    def _abandon(self, *contexts: EventContext) -> None:
        try:
            abandon(*contexts)
        except BaseException as error:  # noqa: BLE001 - an observer's, which the server would get
            log(logging.CRITICAL, "an observer failed", error=error, bus=self._core.name)

    def _take(self, ended: _Ended) -> None:
        """Start a unit, or have it wait for its turn."""
        if len(self._draining) < self._concurrency:
            self._start(ended)
        else:
            ended.deliveries = count_pending(ended.context)
            self._waiting_deliveries += ended.deliveries
            self._waiting.append(ended)
            self._core.tally.shift("units_waiting", 1)
            self._watch(self._waiting_deliveries, False)

    def _start(self, ended: _Ended) -> None:
        self._core.tally.shift("units_draining", 1)
        if self._idle:
            lane = self._draining[ended] = self._idle.pop()
            self._drain_soon(ended, lane)
        else:
            lane = self._draining[ended] = _Lane()
            keep_open = partial(self._tasks.start_soon, name="eventkit keeps a lane open")
            self._variables.copy().run(keep_open, self._keep_open, lane, ended)

    def _drain_soon(self, ended: _Ended, lane: _Lane) -> None:
        # In a copy, because older releases of AnyIO let eager tasks begin in here.
        drain = partial(lane.tasks.start_soon, name=self._name)
        self._variables.copy().run(drain, self._drain, ended, lane)

    async def _keep_open(self, lane: _Lane, first: _Ended) -> None:
        try:
            with lane.scope:
                async with create_task_group() as lane.tasks:
                    self._drain_soon(first, lane)
                    try:
                        await lane.over.wait()
                    finally:
                        lane.over.set()
                        if lane in self._idle:
                            self._idle.remove(lane)
        except get_cancelled_exc_class():
            raise
        except BaseException:  # noqa: BLE001 - the end of a spoiled task, whose drain told of it
            pass
        finally:
            for ended in [unit for unit, its in self._draining.items() if its is lane]:
                self._abandon(ended.context)  # whose task has never begun
                self._give_way(ended, lane)

    async def _drain(self, ended: _Ended, lane: _Lane) -> None:
        try:
            await finish(ended.context, success=ended.success)
        except get_cancelled_exc_class():
            lane.over.set()  # AnyIO cancels the group of a task that was cancelled alone
            raise
        except BaseException as error:  # noqa: BLE001 - asyncio would end the loop for some
            lane.over.set()  # a scope that is not its own may be open
            log(logging.CRITICAL, "a drain was ended", error=error, bus=self._core.name)
        finally:
            self._give_way(ended, lane)

    def _give_way(self, ended: _Ended, lane: _Lane) -> None:
        """Let the next unit begin, now that this one is done with."""
        del self._draining[ended]
        self._core.tally.shift("units_draining", -1)
        if self._closed:
            lane.over.set()
        elif not lane.over.is_set():
            self._idle.append(lane)
        if self._waiting:
            following = self._waiting.popleft()
            self._waiting_deliveries -= following.deliveries
            self._core.tally.shift("units_waiting", -1)
            self._watch(self._waiting_deliveries, False)
            self._start(following)
        self._make_room()
        self._changed()

    def _make_room(self) -> None:
        if self._room is not None and not self.full:
            self._room.set()
            self._room = None

    def _changed(self) -> None:
        if self._change is not None:
            self._change.set()
            self._change = None

    async def _next_change(self) -> None:
        self._change = Event()
        await self._change.wait()

    def _by_handler(self) -> Counter[str]:
        """How many deliveries each handler has waiting here, or running anywhere.

        One that is taken from its queue and comes to its first step next, is neither.
        """
        ended = (unit.context for unit in [*self._draining, *self._waiting])
        waiting = (delivery for context in [*ended, *self._open] for delivery in context.pending)
        return self._core.tally.running_by_handler() + Counter(d.handler for d in waiting)

    def _log(self, level: int, message: str, by_handler: Counter[str], **facts: object) -> None:
        log(
            level,
            message,
            error=None,
            bus=self._core.name,
            left=by_handler.total(),
            handlers=_listed(by_handler),
            **facts,
        )


def _listed(by_handler: Counter[str]) -> str:
    return ", ".join(f"{name} x{times}" for name, times in by_handler.items())
