"""Owns the public side of units of work: `EventContext`, and `dispatch`, which makes its own unit.

The unit itself is in `units`.
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
    """An event context is a unit of work: its events are delivered when it succeeds.

        async with bus.context() as unit:
            unit.publish(OrderPlaced(1))
            bus.publish(OrderPlaced(2))    # the same: `unit` is the active context

    The middleware opens one for each request, `EventBus.context()` creates one for other code, and
    each delivery has one. A context inside another context of the same bus works like a savepoint:
    an exception drops only its own events, and a clean exit hands its events to the outer context.

    `publish`, `release` and `discard` are thread-safe. All other methods belong to the event loop
    on which the context was opened. A context can be opened only once. An open context holds no
    cancel scope and no task group, so an async generator may open it around a `yield`.
    """

    __slots__ = ("__weakref__", "_unit")

    alias = "unit: CurrentContext"

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        unit.context = ref(self)

    @property
    def closed(self) -> bool:
        """Whether the context has ended. A context that has ended takes no more events."""
        return self._unit.closed

    @property
    def pending(self) -> tuple[Delivery, ...]:
        """The deliveries that wait in this context, released ones first. Thread-safe."""
        waiting = self._unit.queue.pending
        return tuple(delivery for envelope in waiting for delivery in envelope.deliveries())

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Publish events in this context. See `EventBus.publish`.

        Args:
            events: Instances of any class.
            even_on_failure: If True, the events are delivered also if the unit of work fails.
        """
        self._unit.publish(events, even_on_failure)

    def release(self) -> None:
        """Decide that the events published so far are delivered, whatever follows. Thread-safe.

        Call it after a commit. The delivery itself happens when the context ends, or in `drain`. If
        the delivery is cancelled, its remaining deliveries are undelivered.
        """
        self._unit.release()

    def discard(self) -> None:
        """Drop the events that are neither released nor `even_on_failure`. Thread-safe.

        Call it after a rollback. The dropped events are counted and logged, and observers see them.
        """
        self._unit.discard()

    async def drain(self) -> DrainReport:
        """Release the events published so far, and deliver them and the events they cause now.

            report = await unit.drain()
            report.raise_for_failures()

        It may be called any number of times while the context is open: for each chunk, for each
        message, after each commit. Do not call it before a commit: it would deliver events of a
        transaction that may still be rolled back. Failures are reported as in every drain, and are
        also in the result. If the call is cancelled, the handlers that run are cancelled, and their
        deliveries are undelivered. Events that have not started wait for the next drain.

        Returns:
            How many deliveries succeeded, and the failures.

        Raises:
            DrainInProgressError: Called inside a handler, or while another task drains the context.
            EventContextClosedError: The context has not been opened.
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
            failures.clear()  # a traceback refers to `report`: this breaks the reference cycle

    def _refuse_drain(self) -> None:
        unit = self._unit
        if unit.queue.state is State.NEW:
            raise EventContextClosedError(why_not_open(unit))
        if unit.inside_handler():
            raise DrainInProgressError(
                f"a handler of bus {unit.state.name!r} cannot drain its own unit of work: the "
                "events that it publishes are delivered when all handlers of its own event have "
                "ended. To wait for handlers, use `await bus.dispatch(event)`"
            )
        if unit.draining:
            raise DrainInProgressError(
                f"this event context of bus {unit.state.name!r} is being drained by another task: "
                "call drain() when that drain has ended"
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
                    "`with bus.context()` was opened in a thread without an event loop, and ends "
                    "on an event loop, which it would block: leave the block in the thread that "
                    "entered it"
                )
            run(begin, unit.ways_to_loops())
        finally:
            if not begun:  # no event loop has run it
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
    """The `EventContext` of the unit; always the same object while somebody refers to it."""
    context: EventContext | None = None if unit.context is None else unit.context()
    return EventContext(unit) if context is None else context


async def dispatch(
    state: BusState, event: object, incoming: Incoming | None = None
) -> list[Failure]:
    """Run the handlers of one event and of the events it causes, and return the failures.

    See `EventBus.dispatch`. `incoming` is the message that the event was read from, if any.
    """
    plan = state.plan_for(event)
    if not plan and not state.observers.watches_events:
        with state.tally.lock:
            state.tally.published += 1
        return []
    if plan and state.decisions is not None:
        state.decisions.dispatching(state, event)
    unit = Unit(state)
    unit.keeps = False  # the caller awaits the outcome and can try again by itself
    unit.open(current(), nested=False)
    unit.publish((event,), False, incoming)
    del event  # otherwise a traceback with local variables would show the payload
    failures: list[Failure] = []

    def collect(delivery: Delivery, error: Exception) -> None:
        failures.append(Failure(delivery, error))

    try:
        await finish(unit, collect, None, success=True)
        return [*failures]
    except BaseException:
        _report_all(state, failures)  # the caller gets the exception instead of the failures
        raise
    finally:
        failures.clear()  # a traceback refers to `collect`: this breaks the reference cycle


def _report_all(state: BusState, failures: Sequence[Failure]) -> None:
    for failure in failures:
        state.report(failure.delivery, failure.error)
