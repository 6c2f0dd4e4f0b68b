"""Owns one event on its way through the dispatcher, and the report of a drain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol

from eventkit._core.ambient import on_this_loop
from eventkit._core.announcements import announce_lost, announce_skipped, what_becomes_of
from eventkit._core.dispatch import Interlude, Turn
from eventkit._core.events import Delivery, type_name
from eventkit._core.handlers import Handler
from eventkit._core.loops.running import library
from eventkit._core.observers import Observer
from eventkit._core.queue import Envelope
from eventkit._core.state import BusState
from eventkit._core.stats import Outcome
from eventkit._core.subscriptions import Plan
from eventkit._core.threads import thread_level
from eventkit.exceptions import DispatchError


class Drained(Protocol):
    """The unit of work that the event belongs to.

    Attributes:
        state: The state that all units of its bus share.
        origin: The application that the unit of work was opened in.
    """

    state: BusState
    origin: object

    def unit_of(self, delivery: Delivery) -> Any:  # Any: a unit like itself
        """Make the unit of work of a delivery of its event."""
        ...


class EventTurn:
    """An event on its way through the dispatcher: the dispatcher's `Turn`.

    Most handlers do not publish, and do not ask for their delivery. So the unit of work of a
    delivery and the `Delivery` object are made when they are needed. Until then the handler's
    context variables hold the pair of this turn and the handler's index instead of the unit.
    """

    # Defaults in the class, not in `__init__`: an instance is made for every event.
    interlude: Interlude | None = None
    _ended = False
    _units: dict[int, Any] | None = None
    _deliveries: dict[int, Delivery] | None = None

    def __init__(
        self,
        envelope: Envelope,
        plan: Plan,
        indexes: Sequence[int],
        drained: Drained,
        enter: Callable[[tuple[Turn, int]], object],
    ) -> None:
        self.event: object = envelope.event
        self.handlers: Sequence[Handler] = plan.handlers
        self.indexes: Sequence[int] = indexes
        self.observers: tuple[Observer, ...] = drained.state.observers.delivery
        if envelope.rows is not None and envelope.rows.written:
            self.observers = (*self.observers, envelope.rows.observer)
        self.alike: bool = plan.alike
        self.in_threads: bool = plan.in_threads
        variables = envelope.variables
        self.variables: Context = variables
        if variables.get(thread_level, 0) != thread_level.get() or variables.get(
            library
        ) != library.get(None):
            self.variables = on_this_loop(variables)
        self.enter = enter
        self.lost: dict[int, Outcome] = {}
        self._envelope = envelope
        self._drained = drained

    @property
    def origin(self) -> object:
        """The application that the unit of work was opened in."""
        return self._drained.origin

    @property
    def received(self) -> Mapping[str, str] | None:
        """The headers of the message that the event was read from; None if there is no message."""
        incoming = self._envelope.incoming
        return None if incoming is None else incoming.headers

    def delivery(self, index: int) -> Delivery:
        """The delivery to the handler at this index."""
        if self._deliveries is None:
            self._deliveries = {}
        delivery = self._deliveries.get(index)
        if delivery is None:
            delivery = self._deliveries[index] = self._envelope.delivery(index)
        return delivery

    def unit(self, index: int) -> Any:  # Any: see `Drained`
        """The unit of work of one delivery. Its parent is the unit that is drained."""
        drained = self._drained
        with drained.state.tally.lock:
            if self._units is None:
                self._units = {}
            unit = self._units.get(index)
            if unit is None:
                unit = self._units[index] = drained.unit_of(self.delivery(index))
                if self._ended:  # checked last, so that `end` in another thread finds the unit
                    unit.queue.clear()
            return unit

    def end_badly(self, index: int, outcome: Outcome) -> Outcome:
        """Note the outcome of a delivery, and return it: it is REQUEUED if an outbox stores it."""
        outcome = self.lost[index] = what_becomes_of(outcome, index, self._envelope.rows)
        return outcome

    def end(self) -> None:
        """End the units of work of the deliveries. Afterwards `unit` gives closed ones."""
        self._ended = True
        for index, unit in sorted(self._units.items()) if self._units else ():
            unit.hand_over(success=index not in self.lost)
        for outcome in (Outcome.UNDELIVERED, Outcome.REQUEUED) if self.lost else ():
            lost = sorted(at for at, how in self.lost.items() if how is outcome)
            announce_lost(self._drained.state, [self.delivery(index) for index in lost], outcome)


def what_to_run(state: BusState, envelope: Envelope) -> tuple[Plan, Sequence[int], int]:
    """Leave out the deliveries that must not run here.

    Deliveries of cancelled subscriptions are discarded. Deliveries that an outbox stores are
    requeued: they wait in the table for a process that knows the handler, or that may run it.

    Returns:
        The current plan, the indexes of the deliveries to run, and how many were requeued.
    """
    plan, rows = envelope.plan, envelope.rows
    if not plan.valid:
        plan = envelope.plan = plan.renewed()
    elsewhere = () if rows is None else rows.elsewhere()
    if not elsewhere and len(plan.indexes) == len(plan):  # nearly always
        return plan, plan.indexes, 0
    left = [index for index in plan.indexes if index not in elsewhere]
    out = sorted({*range(len(plan))}.difference(left))
    kept = [index for index in out if rows is not None and index in rows]
    for outcome, indexes in (
        (Outcome.DISCARDED, [index for index in out if index not in kept]),
        (Outcome.REQUEUED, kept),
    ):
        announce_skipped(state, [envelope.delivery(index) for index in indexes], outcome)
    return plan, left, len(kept)


class InterludeTurn:
    """A turn without handlers. Its interlude writes the rows of the next events."""

    indexes: Sequence[int] = ()
    in_threads = False

    def __init__(self, interlude: Interlude) -> None:
        self.interlude: Interlude | None = interlude


@dataclass(frozen=True, slots=True)
class Failure:
    """A delivery that has failed, and its exception.

        for failure in report.failures:
            print(failure.delivery.handler, failure.delivery.event, failure.error)

    Attributes:
        delivery: The delivery: `delivery.handler` is the handler's name, `delivery.event` the
            event.
        error: The exception that the handler raised.
    """

    delivery: Delivery
    error: Exception


@dataclass(frozen=True, slots=True)
class DrainReport:
    """The result of one drain: how many deliveries succeeded, and which ones failed.

        report = await unit.drain()
        report.raise_for_failures()

    Attributes:
        handled: How many deliveries have ended without an exception.
        failures: The deliveries that failed, in the order of their failures.
        requeued: How many deliveries an outbox stores for later, or for another process.
    """

    handled: int
    failures: tuple[Failure, ...]
    requeued: int = 0

    def raise_for_failures(self) -> None:
        """Raise all failures as one exception group; do nothing if there are none.

        Raises:
            DispatchError: There are failures.
        """
        if self.failures:
            raise together(self.failures)


def together(failures: Sequence[Failure]) -> DispatchError:
    """Make one error of all failures."""
    events = dict.fromkeys(type_name(type(failure.delivery.event)) for failure in failures)
    return DispatchError(
        f"handlers failed for {', '.join(events)}", [failure.error for failure in failures]
    )
