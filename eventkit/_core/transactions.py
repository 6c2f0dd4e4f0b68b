"""Owns which transaction decides an event. Knows nothing of databases.

A `Section` is a transaction that is open in a unit of work; it decides the envelopes that are
tagged with it before the unit does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from eventkit._core.ambient import current, find
from eventkit._core.announcements import announce_dropped, announce_released
from eventkit._core.log import log
from eventkit._core.queue import Envelope, Verdict
from eventkit._core.state import BusState
from eventkit._core.stats import Outcome
from eventkit._core.units import Unit

_begun: ContextVar[Section | None] = ContextVar("eventkit_begun", default=None)


class Section:
    """What is published in one open transaction or savepoint, which decides it.

    Made by `begin`; whoever watches the transaction says how it ended. Its events are those that
    were published while it was the innermost one, and those of its unit that were published when
    none was open. It marks and drops: no handler runs in it. Thread-safe.

    Attributes:
        unit: The unit of work that it is open in.
        units: Where its events are staged.
        before: The one that the same task had begun before, and that is still open.
        wrote: Whether it has changed anything; one that has not has no say when it is closed.
        in_doubt: Whether it may have been committed although nobody has heard of it.
    """

    __slots__ = ("_dirty", "_enclosing", "before", "in_doubt", "unit", "units", "wrote")

    def __init__(self, unit: Unit, dirty: Callable[[], bool], enclosing: Section | None) -> None:
        self.unit = unit
        self.units = {unit}
        self._dirty = dirty
        self._enclosing = enclosing
        self.before = _begun.get()
        while self.before is not None and not self.before.open:
            self.before = self.before.before
        self.wrote = False
        self.in_doubt = False

    @property
    def open(self) -> bool:
        """Whether neither it nor its unit of work has ended."""
        return self in self.unit.queue.sections

    def commit(self) -> None:
        """End it: its events will be delivered; those of a savepoint join what is around it."""
        decided: list[Envelope] = []
        with self.unit.state.tally.lock:
            if self._enclosing is None:
                decided = self._envelopes()
                for envelope in decided:
                    envelope.decide()
            else:
                self._enclosing.wrote |= self.wrote
            self._end()
        announce_released(self.unit.state, decided)

    def rollback(self, reason: str = "the transaction was rolled back") -> None:
        """Drop its events. What is published in it from now on cannot be committed either."""
        self.wrote = True
        state = self.unit.state
        with state.tally.lock:
            dropped = self._envelopes()
            for unit in self.units:
                unit.queue.drop_staged(self)
        if dropped and self.in_doubt:
            log(
                logging.WARNING,
                "a commit failed, and may have happened all the same",
                bus=state.name,
                deliveries=sum(len(each.plan) for each in dropped),
            )
        announce_dropped(state, dropped, Outcome.DISCARDED, reason)
        self.unit.tell_emptied()

    def close(self, reason: str = "the transaction was closed without a commit") -> None:
        """End it, if that has not happened: what it wrote is lost, and with it its events.

        If it wrote nothing, they go where they would have gone without it.
        """
        if not self.open:
            return
        if self.wrote or self._dirty():
            self.rollback(reason)
        with self.unit.state.tally.lock:
            self._end()

    def tag(self, unit: Unit, envelopes: Sequence[Envelope]) -> None:
        """Have the innermost one open decide what is published in the unit. Needs the lock."""
        section = _innermost(unit, _begun.get())
        if section is not None:
            section.take(unit, envelopes)

    def take(self, unit: Unit, envelopes: Sequence[Envelope]) -> None:
        """Have these, staged in the unit, decided here. Needs the lock."""
        self.units.add(unit)
        for envelope in envelopes:
            if envelope.section is None and envelope.verdict is Verdict.OPEN:
                envelope.section = self

    def follow(self, unit: Unit, outer: Unit) -> None:
        """Go where the unit hands its events to. Needs the lock."""
        if unit in self.units:
            self.units.add(outer)
        if unit is self.unit:
            self.unit = outer

    def _envelopes(self) -> list[Envelope]:
        """Its events that are still to be decided, in publish order. Needs the lock."""
        theirs = [each for unit in self.units for each in unit.queue.staged if each.section is self]
        return sorted(theirs, key=lambda envelope: envelope.number)

    def _end(self) -> None:
        """Leave what is still undecided to the transaction around it, or to none.

        Needs the lock.
        """
        if self.open:
            self.unit.queue.sections.remove(self)
            receiver = _innermost(self.unit, self._enclosing or self.before)
            for envelope in self._envelopes():
                envelope.section = receiver
            if receiver is not None:
                receiver.units |= self.units
            self.units.clear()


def _innermost(unit: Unit, begun: Section | None) -> Section | None:
    """The innermost one open in the unit, given the last one that the caller's task has begun.

    A session that was begun in another thread or task, as FastAPI begins those of a plain `def`
    dependency, is the caller's all the same: it is one of this unit or of one around it.
    """
    sections: list[Section] = unit.queue.sections
    while begun is not None:
        if begun in sections:
            return begun
        begun = begun.before
    around = [*unit.with_those_it_hands_to()]
    return next((each for each in reversed(sections) if each.unit in around), None)


def begin(
    state: BusState, dirty: Callable[[], bool], *, around: Section | None = None
) -> Section | None:
    """A transaction begins in the active unit of work; None where none is open.

    It takes in what was published in that unit and is undecided; a savepoint does not.

    Args:
        state: Of the bus whose events it decides.
        dirty: Says whether there are changes that are still to be written in it.
        around: The transaction or savepoint that it is a savepoint in.
    """
    unit: Unit | None = find(current(), state)
    if unit is None:
        return None
    section = Section(unit, dirty, around)
    with state.tally.lock:
        if unit.closed:
            return None
        unit.queue.sections.append(section)
        if around is None:
            section.take(unit, unit.queue.staged)
    _begun.set(section)
    return section
