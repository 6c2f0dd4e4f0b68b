"""Owns units of work: what was published in them, and whether it is delivered or discarded.

Knows nothing of HTTP, nor of who subscribed and why. How events flow: `publish` stages an envelope
in the unit's queue. `release` has it delivered; `discard` drops it, save what was published
`even_on_failure`. A drain takes envelopes off the queue one by one and runs their handlers, each in
a unit of its own, whose remaining events join the queue behind all others when the last handler of
the event has ended.
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
    """The number of the next event that waits somewhere in this process."""
    return next(_numbers)


class Unit:
    """A unit of work, as the core knows it: `EventContext` is what users have of one.

    `publish`, `release` and `discard` are thread-safe; everything else belongs to the event loop
    on which it was opened.

    Attributes:
        state: What the units of its bus share.
        queue: Its events; also says whether it is new, open or closed.
        parent: The unit around it, of whichever bus; of a delivery, the unit that is drained.
        hands_over: Whether what is left goes to the next unit of this bus around it.
        delivery: The delivery that it is, or that it is inside.
        is_delivery: Whether it is one.
        origin: Which application it belongs to; for resolvers alone.
        loop: The event loop on which it or the unit around it is open, or is delivered.
        independent: The unit around it neither delivers nor discards its events.
        background: It leaves its drain to a running application, if there is one.
        waits: It delivers its events itself, and so do those inside with `background`.
        draining: A task delivers its events.
        decided: Something was committed in it, or its response was started.
        emptied: Called when events of it were dropped or delivered, in any thread.
        context: What users have of it, if they have; weak.
        keeps: What no transaction has decided is written before it is delivered, if its handlers
            are durable.
        kept: Whether it has delivered events of which an outbox keeps deliveries.
        requeued: How many deliveries were left out of its drains, because an outbox keeps them.
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
        self._turn: EventTurn | None = None  # the event at hand, while it is drained
        self._freed: Event | None = None  # there while somebody waits for the drain's end
        self._enter: Callable[[tuple[Turn, int]], object] = active.set  # see `occupy`

    @property
    def closed(self) -> bool:
        """Whether it takes no more events."""
        return self.queue.state is State.CLOSED

    @property
    def around(self) -> Unit | None:
        """The unit around it, of whichever bus; a delivery is inside of nothing."""
        return None if self.is_delivery else self.parent

    # Opening and leaving it

    def open(self, parent: Unit | None, *, nested: bool) -> None:
        """Open it inside another one, whose events' cause it shares.

        With `nested` it hands over to the unit of the same bus around it, if there is one.
        """
        if self.queue.state is not State.NEW:
            raise EventContextUsageError(
                "an event context is opened once: call bus.context() for each unit of work"
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
        """Open it inside another one alone, whatever is active, and make it the active one.

        For those who `leave` a unit of work in one place and end it in another. It hands nothing
        over: `parent` is of another bus. Threads in it deliver on this event loop. With `waits`,
        units inside it deliver their events themselves.
        """
        if parent is None:  # so it is in nearly all requests
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
        """Make the one before it the active one again.

        Blocks around a `yield` may overlap, or end in other context variables than they began in:
        who became active in the meantime stays so.
        """
        before = self._before
        if active.get() is self:
            while before is not None and before.closed:
                before = before.around
            active.set(before)
        self._before = None

    def unit_of(self, delivery: Delivery) -> Unit:
        """The unit of work that a delivery of one of its events is."""
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
        """The unit, and those around it that its events may come to."""
        unit: Unit | None = self
        while unit is not None:
            yield unit
            unit = find(unit.parent, self.state) if unit.hands_over else None

    # Publishing

    def publish(
        self, events: Sequence[object], even_on_failure: bool, incoming: Incoming | None = None
    ) -> None:
        """Queue the deliveries of all of them, or raise and queue none.

        `incoming` is the message that they were read from, if they are another service's.
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
        """Have an outbox keep the durable deliveries of an event, if there is one."""
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
        """What was published so far will be delivered, whatever follows."""
        announce_released(self.state, self.queue.release())

    def discard(self) -> None:
        """Drop what is neither released nor `even_on_failure`."""
        kept, dropped = self.queue.discard()
        announce_released(self.state, kept)
        self._drop(dropped, Outcome.DISCARDED)

    def hand_over(self, *, success: bool) -> bool:
        """Close it, and give what is left to the outer unit; False where there is none open.

        What was released here stays decided, also if the outer unit fails. A drain that another
        task runs goes on with it.
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
        """Who gets what is left: the nearest open unit around it; of a delivery, who drains it."""
        if self.is_delivery:
            return self.parent
        unit: Unit | None = self
        while unit is not None and (unit is self or unit.closed):
            unit = (
                None if unit.is_delivery or not unit.hands_over else find(unit.parent, self.state)
            )
        return unit

    def _end_transactions(self) -> None:
        """Have the transactions decide that take part here: the unit ends."""
        decisions = self.state.decisions
        if decisions is not None and self.queue.transactions:
            decisions.end(self)

    def mark_decided(self) -> None:
        """From now on a transaction that is rolled back leaves what was published before it."""
        for unit in self.with_those_it_hands_to():
            unit.decided = True

    def close_if_idle(self, *, success: bool, by_drain: bool = False) -> bool:
        """Decide what is staged; close it if then nothing is left to deliver."""
        queue = self.queue
        self._end_transactions()
        if not success and queue.staged:
            self.discard()
        idle, released = queue.close_if_empty(release=success, may_close=by_drain is self.draining)
        if released and self.state.observers.released:
            announce_released(self.state, released)
        return idle

    def abandon(self) -> None:
        """Close it; what is left will not be delivered."""
        if left := self.queue.clear():
            self._drop(left, Outcome.UNDELIVERED)

    def _drop(self, envelopes: Sequence[Envelope], outcome: Outcome) -> None:
        announce_dropped(self.state, envelopes, outcome)
        self.tell_emptied()

    def tell_emptied(self) -> None:
        """Tell whoever wants to know that less may wait here."""
        if self.emptied is not None:
            self.emptied()

    # Delivering

    async def settle(self) -> None:
        """Have written down what has become of durable deliveries, if it had some.

        Others do not wait for a database that they may have nothing to do with.
        """
        if self.kept and self.state.keeper is not None:
            await self.state.keeper.settle()

    def terms(self, report: Report, timeout: float | None) -> Terms:
        return Terms(self.state.sequential, timeout, self.state.tally, report)

    def occupy(self, loop: object) -> None:
        """Somebody drains it from now on, on this event loop."""
        self.draining, self.loop = True, loop
        self._enter = way_in() if is_configured() else active.set

    def free(self) -> None:
        """Nobody drains it any more."""
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
        """End the event at hand, and leave the rest to whoever is responsible for it now."""
        self._end_turn()
        self.free()
        if self.closed and not self.hand_over(success=False):  # left in the meantime
            self.abandon()

    def next_turn(self, *, closing: bool = False) -> Turn | None:
        """End the event at hand, and give the next one that is released; None if there is none.

        Before events whose rows are to be written first, it gives a turn that does so.

        With `closing` it closes where nothing is left that has to be decided.
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

        That is the loop of the unit around it, then that of the application that it was opened
        in, then those of others that have this bus, the last one that has begun first.
        """
        if self.loop is not None:
            yield partial(reach, self.loop)
        hosts = reversed(self.state.hosts)
        for host in sorted(hosts, key=lambda host: host.origin is not self.origin):
            yield host.entrance.run

    def host(self) -> Host | None:
        """Who delivers it in the background, on the event loop that calls.

        That is the application that it was opened in, else the last one that has begun. Nobody
        does where a request or websocket delivers its events itself.
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
        """Whether it, or who asks, is inside a handler of this bus.

        What is independent of the handler is not inside it.
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
    """A unit of work on its way to its end: it gives what is released, and then it closes.

    It releases or discards what nobody has decided.

    Attributes:
        unit: Which one.
        is_beside: Whether it takes no room of the units that requests end.
    """

    __slots__ = ("_begun", "_loop", "_success", "unit")

    is_beside = False

    def __init__(self, unit: Unit, success: bool, loop: object) -> None:
        self._begun = False
        self._loop = loop  # on which it is drained
        self._success = success
        self.unit = unit

    async def begin(self) -> None:
        """Drain it from now on: what another task leaves, that drains it now."""
        while self.unit.draining:
            await self.unit.until_free()
        self._begun = True
        self.unit.occupy(self._loop)

    def next_turn(self) -> Turn | None:
        """End the event at hand and give the next one; None where the unit has closed."""
        unit = self.unit
        while (turn := unit.next_turn(closing=True)) is None:
            if unit.closed or unit.close_if_idle(success=self._success, by_drain=True):
                unit.free()
                return None
        return turn

    def end(self) -> None:
        """End the event at hand, and close; what is left is undelivered."""
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
    if type(unit) is Unit and unit.state is state:  # so it is nearly always
        return unit
    found: Unit | None = find(current(), state)
    if found is None:
        raise NoEventContextError(state.name, why_none())
    return found
