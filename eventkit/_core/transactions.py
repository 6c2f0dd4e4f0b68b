"""Owns which transaction decides an event. Knows nothing of databases, and runs no handler.

The rules
---------
1. *Taking part.* A transaction takes part in each unit of work in which it is used: from its begin
   on, or from the first statement that is sent in the unit.
2. *Deciding.* A transaction that has not written decides nothing, however it ends.
3. *Candidates.* An event is decided by the first transaction that has written, among those that
   were open at its publish. First come those of the publisher's own task, the one used last first.
   Then come those of other tasks. If the own task has one, those of other tasks can only release.
   If none of them has written, one that was committed still releases the event.
4. *Afterwards.* An event that is still undecided is released by the next transaction that writes
   and commits in the unit of work. A rollback discards it only if three things are true: the
   publisher's own task has begun the transaction, nothing in the unit was committed before, and the
   response was not started before. A task or thread that the publisher's task has started since the
   publish counts as the publisher's own.
5. *End of the unit.* If a transaction has written and is still open, its events are discarded.
   Events that no transaction has decided are decided by the outcome of the unit.

A savepoint that is rolled back discards the events that were published in it. A savepoint that is
kept becomes part of the transaction or savepoint around it.

| class | owns |
|---|---|
| `Level` | how a transaction or savepoint stands: whether it has written, how it ended |
| `Decision` | the candidates of one event, and rules 3 to 5 |
| `Transaction` | the levels of one transaction, and the units of work it takes part in: rule 1 |
| `Decisions` | the methods that a unit of work calls at a publish and at its end |
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from enum import Enum
from functools import partial
from weakref import ref

from eventkit._core.ambient import active, current, find
from eventkit._core.announcements import announce_dropped, announce_released, event_types
from eventkit._core.events import type_name
from eventkit._core.log import log
from eventkit._core.queue import Envelope, Verdict
from eventkit._core.state import BusState
from eventkit._core.stats import Outcome
from eventkit._core.units import Unit

# The transactions that this task has used in units of work, the one used last first.
_used: ContextVar[tuple[Transaction, ...]] = ContextVar("eventkit_used", default=())
# The decisions about the events that this task has published, while the events are undecided.
_published: ContextVar[tuple[ref[Decision], ...]] = ContextVar("eventkit_published", default=())

STILL_OPEN = "the transaction was still open when its unit of work ended"


class End(Enum):
    """How a transaction or savepoint has ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    KEPT = "kept"  # a savepoint: it is now part of the transaction or savepoint around it


class Say(Enum):
    """Why a transaction is a candidate for an event."""

    OWN = "open when it was published, in the publisher's task"
    OTHERS = "open when it was published, in another task beside own ones"
    NEXT = "used afterwards, by the publisher's task, before any commit and answer"
    LATER = "used afterwards"


class Level:
    """A transaction, or a savepoint in one.

    Attributes:
        around: The savepoint or transaction around it.
        name: The name of a savepoint that a statement has begun.
        wrote: Whether something in it may have changed the database. Only ever set to True.
        end: How it ended; None while it is open.
        reason: Why it was rolled back, for the log.
        warning: The text of a warning, if its end loses events.
    """

    __slots__ = ("around", "end", "name", "reason", "warning", "wrote")

    def __init__(self, around: Level | None = None, name: str | None = None) -> None:
        self.around = around
        self.name = name
        self.wrote = False
        self.end: End | None = None
        self.reason: str | None = None
        self.warning: str | None = None

    def outward(self) -> Iterator[Level]:
        """This level, and all levels around it."""
        level: Level | None = self
        while level is not None:
            yield level
            level = level.around

    @property
    def has_written(self) -> bool:
        """Whether it or a level around it has written."""
        level: Level | None = self
        while level is not None and not level.wrote:
            level = level.around
        return level is not None

    @property
    def has_no_say(self) -> bool:
        """Whether it has ended without writing, so it decides nothing: rule 2."""
        level = self.deciding()
        return level.end is not None and not level.wrote

    def deciding(self) -> Level:
        """The level that decides the events that were published here.

        For a savepoint that was kept, or was rolled back without a write, it is the level around.
        """
        level = self
        while (
            level.around is not None
            and level.end is not None
            and (level.end is End.KEPT or not level.wrote)
        ):
            level = level.around
        return level


class Decision:
    """The transactions that may decide one event.

    Attributes:
        by: The level that has decided; None before.
    """

    __slots__ = ("__weakref__", "_afterwards", "_at_hand", "by")

    def __init__(self, at_hand: Sequence[tuple[Level, Say]]) -> None:
        self.by: Level | None = None
        self._at_hand = at_hand  # open when it was published
        self._afterwards: list[tuple[Level, Say]] = []

    def add(self, transaction: Level, say: Say) -> None:
        """Add a transaction that is used after the publish; it decides if no earlier one does."""
        self._afterwards = [
            (level, how)
            for level, how in self._afterwards
            if not (level.has_no_say or (how is Say.LATER and level.end is End.ROLLED_BACK))
        ]
        known = (level for level, _ in (*self._at_hand, *self._afterwards))
        if all(transaction not in level.outward() for level in known):
            self._afterwards.append((transaction, say))

    def verdict(self, *, last: bool = False) -> Verdict:
        """The decision so far; `last` says that the unit of work ends now."""
        verdict = self._of_those_at_hand(last)
        return self._of_those_afterwards(last) if verdict is None else verdict

    def _of_those_at_hand(self, last: bool) -> Verdict | None:
        """Rule 3. OPEN: one of them has to end first. None: they do not decide."""
        waits = False
        committed: Level | None = None
        for candidate, say in self._at_hand:
            level = candidate.deciding()
            if level.end is None:
                if say is Say.OTHERS:
                    waits = not last
                elif not last:
                    return Verdict.OPEN
                elif level.has_written:
                    return self._decided(Verdict.DISCARDED, level)
            elif not level.wrote:
                if level.end is End.COMMITTED:
                    committed = committed or level
            elif level.end is End.COMMITTED:
                return self._decided(Verdict.RELEASED, level)
            elif say is Say.OWN:
                return self._decided(Verdict.DISCARDED, level)
        if waits:
            return Verdict.OPEN
        return None if committed is None else self._decided(Verdict.RELEASED, committed)

    def _of_those_afterwards(self, last: bool) -> Verdict:
        """Rule 4."""
        for candidate, say in self._afterwards:
            level = candidate.deciding()
            if level.end is End.COMMITTED and level.wrote:
                return self._decided(Verdict.RELEASED, level)
            lost = level.wrote if level.end is not None else last and level.has_written
            if lost and say is Say.NEXT:
                return self._decided(Verdict.DISCARDED, level)
        return Verdict.OPEN

    def _decided(self, verdict: Verdict, by: Level) -> Verdict:
        self.by = by
        return verdict


class Transaction(ABC):
    """One transaction of a database, as the units of work see it.

    The code that watches the database creates it, and calls its methods. It is as thread-safe as
    the database's own transactions: one thread at a time uses it.

    Attributes:
        state: The state of the bus whose events it decides.
        levels: The transaction itself, and the savepoints that are open in it.
        units: The units of work that it takes part in, and those in which its events wait.
        gone: Whether it has left all units of work.
        inside: Weak reference to the transaction of the session that joined it last.
    """

    __slots__ = ("__weakref__", "gone", "inside", "levels", "state", "units")

    def __init__(self, state: BusState) -> None:
        self.state: BusState = state
        self.levels: list[Level] = [Level()]
        self.units: set[Unit] = set()
        self.gone: bool = False
        self.inside: Callable[[], Transaction | None] | None = None

    @property
    @abstractmethod
    def is_root(self) -> bool:
        """Whether its commit is a COMMIT of the database, and not the end of a savepoint."""

    def with_those_inside(self) -> list[Transaction]:
        """This transaction, and the inner ones that its commit commits, too."""
        found: list[Transaction] = [self]
        while (inside := found[-1].inside) is not None and (inner := inside()) is not None:
            found.append(inner)
        return found

    @abstractmethod
    def look(self) -> None:
        """Check the database for changes that no hook has reported."""

    @abstractmethod
    def is_over(self) -> bool:
        """Whether it has ended or is no longer watched."""

    @abstractmethod
    def has_unflushed(self) -> bool:
        """Whether it has changes that are not sent to the database yet."""

    def use(self) -> None:
        """Let it take part in the caller's unit of work, as the transaction that is used last."""
        used = _used.get()
        if not used or used[0] is not self:
            _used.set((self, *[each for each in used if each is not self and not each.is_over()]))
        if active.get() in self.units:  # nearly always; units that end leave this set
            return
        unit = _unit_of(self.state)
        if unit is not None and unit not in self.units:
            self.join(unit)

    def write(self) -> None:
        """Note that a statement in it may change the database."""
        level: Level | None = self.levels[-1]
        while level is not None and not level.wrote:
            level.wrote, level = True, level.around

    def begin_savepoint(self, name: str | None = None) -> None:
        """Begin a savepoint: later publishes are in this savepoint."""
        self.levels.append(Level(self.levels[-1], name))

    def keep_savepoint(self) -> None:
        """Leave the innermost savepoint; if it has not ended, it was kept."""
        level = self.levels.pop()
        level.end = level.end or End.KEPT

    def commit(self) -> None:
        """Note that it was committed, with the savepoints in it."""
        if self.levels[0].end is None and self.levels[0].wrote:
            with self.state.tally.lock:
                for unit in self.units:
                    unit.mark_decided()
        self.end(End.COMMITTED)

    def roll_back(self, reason: str, warning: str | None = None) -> None:
        """Note that it was rolled back, with the savepoints in it."""
        self.end(End.ROLLED_BACK, reason, warning)

    def end(
        self, how: End, reason: str | None = None, warning: str | None = None, *, at: int = 0
    ) -> None:
        """End the transaction, or the savepoint at this depth, with the savepoints in it.

        The same end applies to events that are published in it later, until it is left.
        """
        while len(self.levels) > at + 1:
            self.keep_savepoint()
        level = self.levels[-1]
        if level.end is None:
            level.end, level.reason, level.warning = how, reason, warning
            self.settle()

    def start_over(self, reason: str) -> None:
        """Note that the database has rolled back by itself, and has begun a new transaction."""
        ended, self.levels = self.levels, [Level()]
        for level in ended:
            level.wrote, level.end, level.reason = True, End.ROLLED_BACK, reason
        for level in ended[1:]:
            self.begin_savepoint(level.name)
        self.settle()

    def settle(self) -> None:
        """Release or drop the events in its units that are decided now."""
        with self.state.tally.lock:
            units = [unit for unit in self.units if unit.queue.staged]
        if units:
            _settle(self.state, units)

    def leave(self, reason: str = "the transaction was closed without a commit") -> None:
        """Leave all units of work; if it has not ended, it was rolled back."""
        if self.levels[0].end is None:
            self.roll_back(reason)
        with self.state.tally.lock:
            self.gone = True
            for unit in self.units:
                others = [each for each in unit.queue.transactions if each is not self]
                unit.queue.transactions[:] = others
            self.units.clear()
        used = _used.get()
        if self in used:
            _used.set(tuple([each for each in used if each is not self]))

    def decides(self) -> list[Envelope]:
        """The events that its commit would release, in the order of publish."""
        with self.state.tally.lock:
            levels = [level for each in self.with_those_inside() for level in each.levels]
            ends = [level.end for level in levels]
            for level in levels:
                level.end = End.KEPT
            self.levels[0].end = End.COMMITTED
            released = [
                envelope
                for unit in self.units
                for envelope in unit.queue.staged
                if _verdict_on(envelope) is Verdict.RELEASED
            ]
            for level, end in zip(levels, ends, strict=True):
                level.end = end
        return sorted(released, key=_number)

    def join(self, unit: Unit) -> None:
        """Take part in this unit from now on."""
        _look(unit)
        with self.state.tally.lock:
            self.units.add(unit)
            if self not in unit.queue.transactions:
                unit.queue.transactions.append(self)
            if unit.queue.staged:
                self._follow_up(unit)

    def _follow_up(self, unit: Unit) -> None:
        """Become a candidate for events published in the unit before. Needs the lock."""
        decided = any(each.decided for each in unit.with_those_it_hands_to())
        own = set[Decision | None]() if decided else {each() for each in _published.get()}
        for envelope in unit.queue.staged:
            decision: Decision | None = envelope.decision
            if decision is not None:
                decision.add(self.levels[0], Say.NEXT if decision in own else Say.LATER)


class Decisions:
    """The methods with which a unit of work uses the transactions that are open in it."""

    __slots__ = ()

    def look(self, unit: Unit) -> None:
        """Update the state of the transactions in the unit.

        A transaction that began outside of all units joins the unit if it has unflushed changes.
        """
        for transaction in () if unit.is_delivery else _used.get():
            if (
                transaction.state is unit.state
                and not (transaction.units or transaction.is_over())
                and transaction.has_unflushed()
            ):
                transaction.join(unit)
        _look(unit)

    def tag(self, unit: Unit, envelopes: Sequence[Envelope]) -> None:
        """Give events that are being published their candidates. Needs the lock."""
        candidates = _open_in(unit)
        for transaction, _ in candidates:
            transaction.units.add(unit)
        at_hand = [(transaction.levels[-1], say) for transaction, say in candidates]
        published = _published.get()
        if not len(published) & (len(published) - 1):  # clean up when the length is a power of two
            published = tuple([each for each in published if each() is not None])
        for envelope in envelopes:
            if envelope.verdict is Verdict.OPEN:
                envelope.decision = decision = Decision(at_hand)
                published = (*published, ref(decision))
        _published.set(published)

    def settle(self, unit: Unit, envelopes: Sequence[Envelope]) -> None:
        """Decide events that were published into a transaction that has ended."""
        if any(_verdict_on(envelope) is not Verdict.OPEN for envelope in envelopes[:1]):
            _settle(unit.state, [unit])

    def follow(self, unit: Unit, receiver: Unit) -> None:
        """Note that `unit` hands its events to `receiver`, which is around it. Needs the lock."""
        for transaction in unit.queue.transactions:
            if unit in transaction.units:
                transaction.units.remove(unit)
                transaction.units.add(receiver)

    def end(self, unit: Unit) -> None:
        """Decide the events of a unit that ends, and let its transactions leave it."""
        self.look(unit)
        _settle(unit.state, [unit], last=True)
        with unit.state.tally.lock:
            for transaction in unit.queue.transactions:
                transaction.units.discard(unit)
            left = [each for each in unit.queue.transactions if each.units]  # in units inside
            unit.queue.transactions[:] = left

    def dispatching(self, state: BusState, event: object) -> None:
        """Warn about a dispatch inside a transaction that has written."""
        unit = _unit_of(state)
        if unit is None or not unit.queue.transactions:
            return
        self.look(unit)
        with state.tally.lock:
            levels = [each.levels[-1] for each, _ in _open_in(unit)]
        if any(level.end is None and level.has_written for level in levels):
            name = type_name(type(event))
            log(
                logging.WARNING,
                f"dispatch of {name} inside a transaction that has written: the handlers do not "
                "see its rows, wait for its locks, and run also if it is rolled back. Commit "
                "first, or publish",
                bus=state.name,
            )


def _unit_of(state: BusState) -> Unit | None:
    """The open unit of work of the bus that surrounds the caller; None if there is none."""
    unit = active.get()
    if type(unit) is not Unit or unit.state is not state:  # rare
        unit = find(current(), state)
    return None if unit is None or unit.closed else unit


def _look(unit: Unit) -> None:
    """Update the state of the transactions that take part in the unit."""
    for transaction in [*unit.queue.transactions]:
        transaction.look()


def _open_in(unit: Unit) -> list[tuple[Transaction, Say]]:
    """The open transactions in the unit, in the order in which they decide. Needs the lock."""
    transactions: list[Transaction] = unit.queue.transactions
    if not transactions:
        return []
    around = [
        each
        for each in reversed(transactions)
        if not each.is_over()
        and (unit in each.units or not each.units.isdisjoint(unit.with_those_it_hands_to()))
    ]
    own = [each for each in _used.get() if each in around]
    others = [each for each in around if each not in own]
    say = Say.OTHERS if own else Say.OWN
    return [*((each, Say.OWN) for each in own), *((each, say) for each in others)]


def _verdict_on(envelope: Envelope, *, last: bool = False) -> Verdict:
    decision: Decision | None = envelope.decision
    return Verdict.OPEN if decision is None else decision.verdict(last=last)


def _number(envelope: Envelope) -> int:
    return envelope.number


def _settle(state: BusState, units: Sequence[Unit], *, last: bool = False) -> None:
    """Release and drop the events in these units of work that are decided."""
    judge: Callable[[Envelope], Verdict] = partial(_verdict_on, last=last)
    released: list[Envelope] = []
    dropped: dict[tuple[str | None, str | None], list[Envelope]] = {}
    for unit in units:
        ready, lost = unit.queue.settle(judge)
        released += ready
        for envelope in lost:
            dropped.setdefault(_why(envelope), []).append(envelope)
    announce_released(state, sorted(released, key=_number))
    for (reason, warning), envelopes in dropped.items():
        if warning is not None and any(each.plan for each in envelopes):
            _warn(state, warning, envelopes)
        announce_dropped(state, envelopes, Outcome.DISCARDED, reason)
    for unit in units if dropped else ():
        unit.tell_emptied()


def _warn(state: BusState, warning: str, envelopes: Sequence[Envelope]) -> None:
    """Warn about events that are lost."""
    deliveries = [delivery for each in envelopes for delivery in each.deliveries()]
    log(
        logging.WARNING,
        warning,
        bus=state.name,
        deliveries=len(deliveries),
        event_types=event_types(deliveries),
    )


def _why(envelope: Envelope) -> tuple[str | None, str | None]:
    """The reason why an event was dropped, and the text of a warning."""
    level: Level = envelope.decision.by
    if level.end is None:
        return STILL_OPEN, _OUTLIVED
    return level.reason, level.warning


_OUTLIVED = (
    "a transaction that has written was still open when its unit of work ended: its events are "
    "lost, even if it is committed later. End it inside the unit of work. A middleware that "
    "commits goes inside of EventContextMiddleware: add EventContextMiddleware after it"
)
