"""Owns units of work: the events published in them, and whether these are delivered or discarded.

Knows nothing of HTTP and of subscriptions. How events flow: `publish` stages an envelope in the
unit's queue. `release` releases it for delivery. `discard` drops it, unless it was published with
`even_on_failure`. A drain takes released envelopes one by one and runs their handlers. Each handler
has its own unit. When the last handler of the event has ended, the events left in these units join
the end of the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from functools import partial
from itertools import count
from time import time_ns
from typing import Any, cast

from anyio import Event
from structlog import is_configured

from eventkit._core.ambient import (
    active,
    current,
    find,
    origin,
    outward,
    running,
    waiting,
    way_in,
    why_none,
    why_not_open,
)
from eventkit._core.announcements import (
    announce_dropped,
    announce_published,
    announce_released,
)
from eventkit._core.dispatch import Terms, Turn
from eventkit._core.events import Delivery, Incoming, type_name
from eventkit._core.locations import caller
from eventkit._core.loops.running import current_loop
from eventkit._core.loops.threads import Function, reach
from eventkit._core.queue import Envelope, EventQueue, Refusal, State, Verdict
from eventkit._core.state import BusState, Host
from eventkit._core.stats import Outcome
from eventkit._core.turns import EventTurn, InterludeTurn, what_to_run
from eventkit.exceptions import (
    EventContextClosedError,
    EventContextFullError,
    EventContextUsageError,
    EventDepthError,
    NoEventContextError,
)

_numbers = count()

Report = Callable[[Delivery, Exception], None]


def next_number() -> int:
    """A new number for an event, unique in this process."""
    return next(_numbers)


class Unit:
    """A unit of work inside the core. Users have an `EventContext` of it.

    `publish`, `release` and `discard` are thread-safe; everything else belongs to the event loop
    on which it was opened.

    Attributes:
        state: The state that all units of its bus share.
        queue: Its events; also says whether it is new, open or closed.
        parent: The unit around it, of any bus; for the unit of a delivery, the drained unit.
        hands_over: Whether its remaining events go to the next unit of this bus around it.
        delivery: The delivery that it belongs to, or is inside of.
        is_delivery: Whether it is the unit of a delivery.
        origin: The application that it was opened in; only resolvers use it.
        loop: The event loop on which it or the unit around it is open, or is delivered.
        independent: The unit around it neither delivers nor discards its events.
        background: It leaves its drain to a running application, if there is one.
        waits: It delivers its events itself; so do units inside it, even with `background`.
        draining: A task delivers its events.
        decided: Something was committed in it, or its response was started.
        emptied: Called when events of it were dropped or delivered, in any thread.
        context: Weak reference to its `EventContext`, if one was made.
        keeps: Before delivery, write the rows of durable deliveries that no transaction has
            decided.
        kept: Whether it has delivered events with deliveries that an outbox stores.
        requeued: How many deliveries its drains left out, because an outbox stores them.
    """

    __slots__ = (
        "__weakref__",
        "_before",
        "_enter",
        "_freed",
        "_turn",
        "background",
        "context",
        "decided",
        "delivery",
        "draining",
        "emptied",
        "hands_over",
        "independent",
        "is_delivery",
        "keeps",
        "kept",
        "loop",
        "origin",
        "parent",
        "queue",
        "requeued",
        "state",
        "waits",
    )

    def __init__(self, state: BusState) -> None:
        self.state: BusState = state
        self.queue: EventQueue = EventQueue(state.tally)
        self.parent: Unit | None = None
        self.hands_over: bool = False
        self.delivery: Delivery | None = None
        self.is_delivery: bool = False
        self.origin: object = None
        self.loop: object = None
        self.independent: bool = False
        self.background: bool = False
        self.waits: bool = False
        self.draining: bool = False
        self.decided: bool = False
        self.emptied: Callable[[], None] | None = None
        self.context: Callable[[], Any] | None = None  # Any: an `EventContext`
        self.keeps: bool = True
        self.kept: bool = False
        self.requeued: int = 0
        self._before: Unit | None = None  # the unit that was active before this one
        self._turn: EventTurn | None = None  # the current event of a drain
        self._freed: Event | None = None  # exists only while a task waits for the drain's end
        self._enter: Callable[[tuple[Turn, int]], object] = active.set  # see `occupy`

    @property
    def closed(self) -> bool:
        """Whether it takes no more events."""
        return self.queue.state is State.CLOSED

    @property
    def around(self) -> Unit | None:
        """The unit around it, of any bus; None for the unit of a delivery."""
        return None if self.is_delivery else self.parent

    # Opening and leaving it

    def open(self, parent: Unit | None, *, nested: bool) -> None:
        """Open it inside `parent`; its events have the same cause as those of `parent`.

        With `nested` it hands over to the unit of the same bus around it, if there is one.
        """
        if self.queue.state is not State.NEW:
            raise EventContextUsageError(
                "an event context can be opened only once: call bus.context() for each unit of work"
            )
        self.origin = origin.get() if parent is None else parent.origin
        if parent is not None:
            self.loop = parent.loop
        while parent is not None and parent.closed:  # a task that outlived its unit
            parent = parent.around
        outer: Unit | None = None
        if parent is not None:
            self.parent = parent
            self.delivery = parent.delivery
            outer = find(parent, self.state) if nested else None
            self.hands_over = outer is not None
        self.queue.open(None if outer is None else outer.queue)

    def enter(
        self, parent: Unit | None, where: object, *, loop: object = None, waits: bool = False
    ) -> None:
        """Open it inside `parent`, not inside the active unit, and make it the active one.

        For code that calls `leave` in one place and ends the unit in another. It hands nothing
        over: `parent` is of another bus. Threads in it deliver on this event loop. With `waits`,
        units inside it deliver their events themselves.
        """
        if parent is None:  # nearly all requests
            self.queue.open(None)
        else:
            self.open(parent, nested=False)
        self.origin, self.loop, self.waits = where, loop, waits
        if active.get() is None:  # as above
            active.set(self)
        else:
            self.activate()

    def activate(self) -> None:
        """Make it the active one."""
        self._before = current()
        active.set(self)

    def leave(self) -> None:
        """Make the unit before it active again, if this unit is still the active one.

        Blocks around a `yield` may overlap, or end in other context variables than they began in.
        Then a unit that became active later stays active.
        """
        before = self._before
        if active.get() is self:
            while before is not None and before.closed:
                before = before.around
            active.set(before)
        self._before = None

    def unit_of(self, delivery: Delivery) -> Unit:
        """Make the unit of work of a delivery of one of its events."""
        unit = Unit(self.state)
        unit.parent = self
        unit.origin = self.origin
        unit.loop = self.loop
        unit.delivery = delivery
        unit.is_delivery = True
        unit.queue.open(None)
        unit.queue.backlog = self.queue.backlog
        return unit

    def with_those_it_hands_to(self) -> Iterator[Unit]:
        """The unit, and the units around it that may get its events."""
        unit: Unit | None = self
        while unit is not None:
            yield unit
            unit = find(unit.parent, self.state) if unit.hands_over else None

    # Publishing

    def publish(
        self, events: Sequence[object], even_on_failure: bool, incoming: Incoming | None = None
    ) -> None:
        """Queue all events, or raise and queue none.

        `incoming` is the message that they were read from, if another service has sent them.
        """
        state = self.state
        cause = self.delivery if active.get() is self else running() or self.delivery
        if cause is not None and cause.depth >= state.max_depth and events:
            raise EventDepthError(
                type_name(type(events[0])), state.max_depth, [str(d) for d in cause.chain()]
            )
        variables, now = copy_context(), time_ns()
        here = caller() if state.debug else None
        verdict = Verdict.EVEN_ON_FAILURE if even_on_failure else Verdict.OPEN
        plan_for = state.plan_for
        envelopes = [
            Envelope(
                each, plan_for(each), variables, cause, now, next(_numbers), verdict, here, incoming
            )
            for each in events
        ]
        if self.keeps:
            for envelope in envelopes:
                if envelope.plan.durable:
                    self._keep(envelope)
        decisions, tag = state.decisions, None
        if decisions is not None:
            decisions.look(self)
            tag = partial(decisions.tag, self)
        told = state.observers
        refusal = self.queue.stage(
            envelopes, state.max_events, watched=told.watches_decisions, tag=tag
        )
        if refusal is not None:
            raise self._refused(refusal)
        if told.published:
            announce_published(state, envelopes)
        if decisions is not None:
            decisions.settle(self, envelopes)

    def _keep(self, envelope: Envelope) -> None:
        """Let the outbox store the durable deliveries of an event, if there is an outbox."""
        if self.state.keeper is None:
            self.state.miss_keeper()
        else:
            self.state.keeper.accept(envelope)

    def _refused(self, refusal: Refusal) -> Exception:
        if refusal is Refusal.FULL:
            return EventContextFullError(self.state.name, self.state.max_events)
        return EventContextClosedError(why_not_open(self))

    # Deciding

    def release(self) -> None:
        """Decide that the events published so far are delivered, whatever follows."""
        announce_released(self.state, self.queue.release())

    def discard(self) -> None:
        """Drop the events that are neither released nor `even_on_failure`."""
        kept, dropped = self.queue.discard()
        announce_released(self.state, kept)
        self._drop(dropped, Outcome.DISCARDED)

    def hand_over(self, *, success: bool) -> bool:
        """Close it, and give its remaining events to the outer unit; False if none is open.

        Events that were released here stay released, also if the outer unit fails. If another task
        drains this unit, that drain goes on with them.
        """
        if self.is_delivery:
            self._end_transactions()
        released: list[Envelope] = []
        with self.state.tally.lock:
            receiver = self._receiver()
            if receiver is None:
                return False
            if self.is_delivery:
                released, dropped = self.queue.give(receiver.queue, success=success)
            else:
                if self.state.decisions is not None:
                    self.state.decisions.follow(self, receiver)
                dropped = self.queue.hand_over(
                    receiver.queue, success=success, released=not self.draining
                )
        announce_released(self.state, released)
        self._drop(dropped, Outcome.DISCARDED)
        return True

    def _receiver(self) -> Unit | None:
        """The nearest open unit around it; for the unit of a delivery, the drained unit."""
        if self.is_delivery:
            return self.parent
        unit: Unit | None = self
        while unit is not None and (unit is self or unit.closed):
            unit = (
                None if unit.is_delivery or not unit.hands_over else find(unit.parent, self.state)
            )
        return unit

    def _end_transactions(self) -> None:
        """Let the transactions of the unit decide, because the unit ends."""
        decisions = self.state.decisions
        if decisions is not None and self.queue.transactions:
            decisions.end(self)

    def mark_decided(self) -> None:
        """Note that a later rollback no longer discards events published before it."""
        for unit in self.with_those_it_hands_to():
            unit.decided = True

    def close_if_idle(self, *, success: bool, by_drain: bool = False) -> bool:
        """Release or discard the staged events; close the unit if nothing is left to deliver."""
        queue = self.queue
        self._end_transactions()
        if not success and queue.staged:
            self.discard()
        idle, released = queue.close_if_empty(release=success, may_close=by_drain is self.draining)
        if released and self.state.observers.released:
            announce_released(self.state, released)
        return idle

    def abandon(self) -> None:
        """Close it; its remaining events will not be delivered."""
        if left := self.queue.clear():
            self._drop(left, Outcome.UNDELIVERED)

    def _drop(self, envelopes: Sequence[Envelope], outcome: Outcome) -> None:
        announce_dropped(self.state, envelopes, outcome)
        self.tell_emptied()

    def tell_emptied(self) -> None:
        """Call `emptied`: fewer events may wait here now."""
        if self.emptied is not None:
            self.emptied()

    # Delivering

    async def settle(self) -> None:
        """Write the outcomes of durable deliveries, if the unit had any.

        Other units do not wait for a database that they may not use.
        """
        if self.kept and self.state.keeper is not None:
            await self.state.keeper.settle()

    def terms(self, report: Report, timeout: float | None) -> Terms:
        return Terms(self.state.sequential, timeout, self.state.tally, report)

    def occupy(self, loop: object) -> None:
        """Note that a task on this event loop drains it from now on."""
        self.draining, self.loop = True, loop
        self._enter = way_in() if is_configured() else active.set

    def free(self) -> None:
        """Note that no task drains it now."""
        self.draining = False
        if self._freed is not None:
            self._freed.set()
            self._freed = None
        if self.emptied is not None:
            self.emptied()

    async def until_free(self) -> None:
        """Wait until the task that drains it has ended its drain."""
        self._freed = self._freed or Event()
        await self._freed.wait()

    def end_drain(self) -> None:
        """End the current event, and leave the remaining events to the unit or its receiver."""
        self._end_turn()
        self.free()
        if self.closed and not self.hand_over(success=False):  # closed in the meantime
            self.abandon()

    def next_turn(self, *, closing: bool = False) -> Turn | None:
        """End the current event, and give the next released one; None if there is none.

        If rows of the next events must be written first, it gives a turn that writes them.

        With `closing` it closes if no event is left to be decided.
        """
        if self._turn is not None:
            self._end_turn()
        keeper = self.state.keeper
        if keeper is not None and self.keeps and (unwritten := self.queue.unwritten()):
            self.kept = True
            return cast("Turn", InterludeTurn(partial(keeper.write, unwritten)))
        while (envelope := self.queue.take(closing=closing)) is not None:
            plan = envelope.plan
            indexes = plan.indexes
            if not plan.valid or envelope.rows is not None:
                self.kept |= envelope.rows is not None
                plan, indexes, requeued = what_to_run(self.state, envelope)
                self.requeued += requeued
            if indexes:
                self._turn = EventTurn(envelope, plan, indexes, self, self._enter)
                return self._turn
        return None

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.end()

    # Where it is delivered

    def ways_to_loops(self) -> Iterator[Callable[[Function], bool]]:
        """Ways to event loops that run in other threads, the nearest first.

        First the loop of the unit around it. Then the loop of the application that it was opened
        in. Then the loops of other applications with this bus, the one that began last first.
        """
        if self.loop is not None:
            yield partial(reach, self.loop)
        hosts = reversed(self.state.hosts)
        for host in sorted(hosts, key=lambda host: host.origin is not self.origin):
            yield host.entrance.run

    def host(self) -> Host | None:
        """The application that delivers it in the background, on the calling event loop.

        It is the application that the unit was opened in, else the one that began last. None if a
        request or websocket around the unit delivers its events itself.
        """
        state = self.state
        if state in waiting.get() or any(
            unit.waits and unit.state is state for unit in outward(self)
        ):
            return None
        loop, found = current_loop(), None
        for host in state.hosts:
            if host.entrance.loop is loop:
                found = host
                if host.origin is self.origin:
                    break
        return found

    def inside_handler(self) -> bool:
        """Whether the unit, or the caller, is inside a handler of this bus.

        A unit that is independent of the handler is not inside it.
        """
        for innermost in (self, current()):
            for unit in outward(innermost):
                if unit.state is self.state:
                    if unit.independent:
                        break
                    if unit.is_delivery and not unit.closed:
                        return True
        return False


class Ending:
    """A unit of work that ends: it gives its released events one by one, and closes then.

    It releases or discards the undecided events.

    Attributes:
        unit: The unit.
        is_beside: Whether it does not count for `concurrency`.
    """

    __slots__ = ("_begun", "_loop", "_success", "unit")

    is_beside = False

    def __init__(self, unit: Unit, success: bool, loop: object) -> None:
        self._begun = False
        self._loop = loop  # on which it is drained
        self._success = success
        self.unit = unit

    async def begin(self) -> None:
        """Drain it from now on; if another task drains it, wait until that task has ended."""
        while self.unit.draining:
            await self.unit.until_free()
        self._begun = True
        self.unit.occupy(self._loop)

    def next_turn(self) -> Turn | None:
        """End the current event, and give the next one; None if the unit has closed."""
        unit = self.unit
        while (turn := unit.next_turn(closing=True)) is None:
            if unit.closed or unit.close_if_idle(success=self._success, by_drain=True):
                unit.free()
                return None
        return turn

    def end(self) -> None:
        """End the current event, and close; the remaining events are undelivered."""
        if self._begun and self.unit.draining:
            self.unit.end_drain()
        if not self.unit.closed:
            self.unit.abandon()


def active_unit(state: BusState) -> Unit:
    """The unit of work of this bus that surrounds the caller, open or not.

    Raises:
        NoEventContextError: There is none; the message names the likely cause.
    """
    unit = active.get()
    if type(unit) is Unit and unit.state is state:  # nearly always
        return unit
    found: Unit | None = find(current(), state)
    if found is None:
        raise NoEventContextError(state.name, why_none())
    return found
