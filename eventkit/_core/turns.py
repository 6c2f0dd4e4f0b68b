"""Owns one event on its way through the dispatcher, and what is told of a drain afterwards."""

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
    """The unit of work whose event it is.

    Attributes:
        state: What the units of its bus share.
        origin: Where it comes from.
    """

    state: BusState
    origin: object

    def unit_of(self, delivery: Delivery) -> Any:  # Any: a unit like itself
        """The unit of work that a delivery of its event is."""
        ...


class EventTurn:
    """An event on its way through the dispatcher: what that calls a `Turn`.

    Most handlers neither publish nor ask for their delivery, so both the unit of work that it is
    and the `Delivery` are made when somebody asks. Until then the pair of this and the handler's
    index stands for the unit in the handler's context variables.
    """

    # Here and not in `__init__`, for this is made once for every event.
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
        """Where the unit of work comes from."""
        return self._drained.origin

    @property
    def received(self) -> Mapping[str, str] | None:
        """The headers of the message that the event was read from, if it was."""
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
        """The unit of work of one delivery: of this bus only, inside the one that is drained."""
        drained = self._drained
        with drained.state.tally.lock:
            if self._units is None:
                self._units = {}
            unit = self._units.get(index)
            if unit is None:
                unit = self._units[index] = drained.unit_of(self.delivery(index))
                if self._ended:  # looked at last: whoever ends it meanwhile finds the unit
                    unit.queue.clear()
            return unit

    def end_badly(self, index: int, outcome: Outcome) -> Outcome:
        """Note what has become of a delivery, and return it: an outbox may keep it."""
        outcome = self.lost[index] = what_becomes_of(outcome, index, self._envelope.rows)
        return outcome

    def end(self) -> None:
        """End the units of work that there are; nobody gets an open one any more."""
        self._ended = True
        for index, unit in sorted(self._units.items()) if self._units else ():
            unit.hand_over(success=index not in self.lost)
        for outcome in (Outcome.UNDELIVERED, Outcome.REQUEUED) if self.lost else ():
            lost = sorted(at for at, how in self.lost.items() if how is outcome)
            announce_lost(self._drained.state, [self.delivery(index) for index in lost], outcome)


def what_to_run(state: BusState, envelope: Envelope) -> tuple[Plan, Sequence[int], int]:
    """Leave out the deliveries that are not to run here.

    Those of cancelled subscriptions are discarded. What an outbox keeps is requeued: it waits in
    the table for a process that knows the handler, or that may run it.

    Returns:
        The plan as it is now, the indexes of what is left, and how many were requeued.
    """
    plan, rows = envelope.plan, envelope.rows
    if not plan.valid:
        plan = envelope.plan = plan.renewed()
    elsewhere = () if rows is None else rows.elsewhere()
    if not elsewhere and len(plan.indexes) == len(plan):  # so it is nearly always
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
    """Stands for a turn before events whose rows are to be written first; it has no handlers."""

    indexes: Sequence[int] = ()
    in_threads = False

    def __init__(self, interlude: Interlude) -> None:
        self.interlude: Interlude | None = interlude


@dataclass(frozen=True, slots=True)
class Failure:
    """A delivery that failed.

    Attributes:
        delivery: Which one: `delivery.handler` is the handler's name, `delivery.event` the event.
        error: What the handler raised.
    """

    delivery: Delivery
    error: Exception


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What one drain delivered.

    Attributes:
        handled: Deliveries whose handler ended well.
        failures: The others, in the order in which they failed.
        requeued: Deliveries that an outbox keeps, and that run later or elsewhere.
    """

    handled: int
    failures: tuple[Failure, ...]
    requeued: int = 0

    def raise_for_failures(self) -> None:
        """Raise everything that failed as one group.

        Raises:
            DispatchError: There were failures.
        """
        if self.failures:
            raise together(self.failures)


def together(failures: Sequence[Failure]) -> DispatchError:
    """All of them as one error."""
    events = dict.fromkeys(type_name(type(failure.delivery.event)) for failure in failures)
    return DispatchError(
        f"handlers failed for {', '.join(events)}", [failure.error for failure in failures]
    )
