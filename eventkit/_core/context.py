"""Owns what users have of units of work: `EventContext`, and a dispatch, which is one of its own.

The unit itself, and all that happens to it, is in `units`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self
from weakref import ref

from eventkit._core.ambient import current, why_not_open
from eventkit._core.dependencies import Aliased
from eventkit._core.endings import deliver, end, finish
from eventkit._core.events import Delivery, Incoming
from eventkit._core.loops.running import current_loop, on_event_loop
from eventkit._core.loops.threads import run
from eventkit._core.queue import State
from eventkit._core.state import BusState
from eventkit._core.turns import DrainReport, Failure
from eventkit._core.units import Unit
from eventkit.exceptions import (
    DrainInProgressError,
    EventContextClosedError,
    EventContextUsageError,
)


class EventContext(Aliased):
    """A unit of work: events published in it are delivered when it succeeds.

    Made by `EventBus.context()`, by the middleware for each request, and for each delivery.
    Opened inside another one of the same bus it works like a savepoint: an exception drops only
    its own events, a clean exit hands them to the outer unit.

    Events may be published from any task and any thread that sees the context; everything else
    belongs to the event loop on which it was opened, but `release` and `discard`, which are
    thread-safe too. It cannot be opened twice. While it is open it holds no cancel scope and no
    task group, so an async generator may open it around a `yield`.
    """

    __slots__ = ("__weakref__", "_unit")

    alias = "unit: CurrentContext"

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        unit.context = ref(self)

    @property
    def closed(self) -> bool:
        """Whether it takes no more events, because its own were delivered or discarded."""
        return self._unit.closed

    @property
    def pending(self) -> tuple[Delivery, ...]:
        """The deliveries that wait here, released ones first. Thread-safe."""
        waiting = self._unit.queue.pending
        return tuple(delivery for envelope in waiting for delivery in envelope.deliveries())

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Say that something happened in this unit of work. See `EventBus.publish`."""
        self._unit.publish(events, even_on_failure)

    def release(self) -> None:
        """What was published so far will be delivered, whatever follows. Thread-safe.

        For the moment after a commit. Delivery itself happens when the unit ends, or in `drain`;
        where a cancellation reaches that, what it ends or leaves is undelivered.
        """
        self._unit.release()

    def discard(self) -> None:
        """Drop what is neither released nor `even_on_failure`. Thread-safe.

        For the moment after a rollback. What is dropped is counted, logged, and told observers.
        """
        self._unit.discard()

    async def drain(self) -> DrainReport:
        """Release what was published so far, and deliver it and all that it causes now.

        May be called as often as wanted while the unit is open: per chunk, per message, after
        each commit. Not before a commit: it would deliver what may still be rolled back. Failures
        are reported as in every drain, and are in the result too. What a cancellation interrupts
        is undelivered; what had not started waits for the next drain.

        Raises:
            DrainInProgressError: Called inside a handler, or while another drain of it runs.
            EventContextClosedError: It has not been opened.
        """
        unit = self._unit
        self._refuse_drain()
        unit.release()
        failures: list[Failure] = []

        def report(delivery: Delivery, error: Exception) -> None:
            failures.append(Failure(delivery, error))
            unit.state.report(delivery, error)

        try:
            before = unit.requeued
            handled = await deliver(unit, report)
            return DrainReport(handled, tuple(failures), unit.requeued - before)
        finally:
            failures.clear()  # a traceback leads to `report`, which would close a reference cycle

    def _refuse_drain(self) -> None:
        unit = self._unit
        if unit.queue.state is State.NEW:
            raise EventContextClosedError(why_not_open(unit))
        if unit.inside_handler():
            raise DrainInProgressError(
                f"a handler of bus {unit.state.name!r} cannot drain its own unit of work: what it "
                "publishes is delivered when the handlers of its event have ended. To wait for "
                "handlers, use `await bus.dispatch(event)`"
            )
        if unit.draining:
            raise DrainInProgressError(
                f"this event context of bus {unit.state.name!r} is being drained by another task"
            )

    def __enter__(self) -> Self:
        if on_event_loop():
            raise EventContextUsageError(
                "`with bus.context()` would block the running event loop while it drains: use "
                "`async with bus.context()`"
            )
        self._enter()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unit = self._unit
        unit.leave()
        success = exc is None
        if unit.hand_over(success=success) or unit.close_if_idle(success=success):
            return
        begun = False

        async def begin() -> None:
            nonlocal begun
            begun = True
            await end(unit, success=success)

        try:
            if on_event_loop():
                raise EventContextUsageError(
                    "`with bus.context()` was opened in a thread and ends on an event loop, "
                    "which it would block: leave the block in the thread that entered it"
                )
            run(begin, unit.ways_to_loops())
        finally:
            if not begun:  # there was no loop to run it
                unit.abandon()

    async def __aenter__(self) -> Self:
        self._enter()
        self._unit.loop = current_loop()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unit.leave()
        success = exc is None
        if not self._unit.hand_over(success=success):
            await end(self._unit, success=success)

    def _enter(self) -> None:
        """Open it, and make it the active one."""
        self._unit.open(current(), nested=not self._unit.independent)
        self._unit.activate()

    def __repr__(self) -> str:
        unit = self._unit
        kind = f"EventContext of bus {unit.state.name!r}"
        if unit.is_delivery:
            kind = f"{kind} for {unit.delivery}"
        return f"<{kind}, {unit.queue.state.value}, {unit.queue.waiting} pending>"


def context_of(unit: Unit) -> EventContext:
    """What users have of the unit; the same object for as long as somebody has it."""
    context: EventContext | None = None if unit.context is None else unit.context()
    return EventContext(unit) if context is None else context


async def dispatch(
    state: BusState, event: object, incoming: Incoming | None = None
) -> list[Failure]:
    """Run the handlers of one event, and of all that comes of it, and return what failed.

    See `EventBus.dispatch`. `incoming` is the message that the event was read from.
    """
    plan = state.plan_for(event)
    if not plan and not state.observers.watches_events:
        with state.tally.lock:
            state.tally.published += 1
        return []
    if plan and state.decisions is not None:
        state.decisions.dispatching(state, event)
    unit = Unit(state)
    unit.keeps = False  # who awaits the outcome is the one who tries again
    unit.open(current(), nested=False)
    unit.publish((event,), False, incoming)
    del event  # or a traceback that shows local variables shows the payload
    failures: list[Failure] = []

    def collect(delivery: Delivery, error: Exception) -> None:
        failures.append(Failure(delivery, error))

    try:
        await finish(unit, collect, None, success=True)
        return [*failures]
    except BaseException:
        _report_all(state, failures)  # nobody else will hear of them
        raise
    finally:
        failures.clear()  # a traceback leads to `collect`, which would close a reference cycle


def _report_all(state: BusState, failures: Sequence[Failure]) -> None:
    for failure in failures:
        state.report(failure.delivery, failure.error)
