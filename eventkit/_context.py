"""Owns units of work: what was published in them, and whether it is delivered or discarded.

Knows nothing of HTTP, nor of who subscribed and why.

How events flow: `publish` appends an envelope to `_staged`. `release` moves what is staged to
`_released`; `discard` drops it, save what was published `even_on_failure`. `_deliver` takes
envelopes off `_released` one by one and runs their handlers, each in a unit of its own, whose
remaining events join `_released` behind all others when the last handler of the event has ended.
A `Section` is a transaction that is open in a unit; it decides the envelopes that are tagged with
it before the unit does. All queues of a bus are guarded by the one lock of its `Tally`, and only
this module changes them.
"""
# ruff: noqa: SLF001 - the class and the functions of this module own its state together

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import count
from time import time_ns
from types import TracebackType
from typing import Protocol, Self, cast

import anyio

from eventkit._dispatch import Seat, Terms, Turn, run_all
from eventkit._events import Delivery, type_name
from eventkit._handlers import Handler, thread_level
from eventkit._log import bind, binds, log
from eventkit._loops import (
    Entrance,
    Function,
    current_loop,
    in_worker_thread,
    library,
    on_event_loop,
    reach,
    run,
)
from eventkit._observers import Observer, contained
from eventkit._registry import Plan, caller
from eventkit._stats import Outcome, Tally
from eventkit.exceptions import (
    DispatchError,
    DrainInProgressError,
    EventContextClosedError,
    EventContextFullError,
    EventContextUsageError,
    EventDepthError,
    NoDeliveryError,
    NoEventContextError,
)

_active: ContextVar[EventContext | Seat | None] = ContextVar("eventkit_active", default=None)
_outside: ContextVar[str | None] = ContextVar("eventkit_outside", default=None)
_origin: ContextVar[object] = ContextVar("eventkit_origin", default=None)
_waiting: ContextVar[frozenset[Core]] = ContextVar("eventkit_waiting", default=frozenset())
_begun: ContextVar[Section | None] = ContextVar("eventkit_begun", default=None)
_numbers = count()


@dataclass(slots=True, eq=False)
class Core:
    """What all units of work of one bus share.

    The bus makes it and changes `observers` and `report_failure`; `add_host` and `remove_host`
    change `hosts`; everything else is fixed.
    """

    bus: object  # whose they are, for those above who know what it is
    name: str
    sequential: bool
    handler_timeout: float | None
    max_events: int
    max_depth: int
    debug: bool
    plan_for: Callable[[object], Plan]
    tally: Tally
    report_failure: Callable[[Delivery, Exception], None]
    observers: tuple[Observer, ...] = ()
    hosts: tuple[Host, ...] = ()  # in the order in which they began


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """A running application that delivers units of work of the bus in the background.

    Attributes:
        entrance: The event loop it runs on, for threads that have none.
        submit: Ends a unit of work: what there is to deliver is delivered later. Called on the
            event loop; never blocks.
        origin: The origin of the units that are opened in it.
    """

    entrance: Entrance
    submit: Submit
    origin: object


class Submit(Protocol):
    def __call__(self, context: EventContext, /, *, success: bool) -> None:
        """End the unit of work, in the background."""


class _Envelope:
    """One published event with its deliveries, none of which has started."""

    __slots__ = (
        "cause",
        "even_on_failure",
        "event",
        "number",
        "plan",
        "published_from",
        "published_ns",
        "released",
        "section",
        "variables",
    )

    def __init__(
        self,
        event: object,
        plan: Plan,
        variables: Context,
        cause: Delivery | None,
        published_ns: int,
        number: int,
        even_on_failure: bool,
        published_from: str | None,
    ) -> None:
        self.event = event
        self.plan = plan
        self.variables = variables
        self.cause = cause
        self.published_ns = published_ns
        self.number = number
        self.even_on_failure = even_on_failure
        self.published_from = published_from
        self.released = False  # observers know that it will be delivered
        self.section: Section | None = None  # the open transaction that decides it

    def decide(self) -> None:
        """It will be delivered, whatever becomes of its unit of work."""
        self.even_on_failure = True
        self.section = None

    def deliveries(self) -> list[Delivery]:
        return [self.delivery(index) for index in range(len(self.plan))]

    def delivery(self, index: int) -> Delivery:
        """The delivery to the handler at this place of the plan."""
        return Delivery(
            event=self.event,
            handler=self.plan[index].name,
            cause=self.cause,
            depth=0 if self.cause is None else self.cause.depth + 1,
            attempt=1,
            _published_ns=self.published_ns,
            _number=(self.number, index),
            published_from=self.published_from,
        )


class _Turn:
    """An event on its way through the dispatcher: what that calls a `Turn`.

    Most handlers neither publish nor ask for their delivery, so both the unit of work that it is
    and the `Delivery` are made when somebody asks. Until then the pair of this and the handler's
    place stands for the unit in the handler's context variables.
    """

    # Here and not in `__init__`, for this is made once for every event.
    _ended = False
    _units: dict[int, EventContext] | None = None
    _deliveries: dict[int, Delivery] | None = None

    def __init__(
        self,
        envelope: _Envelope,
        outer: EventContext,
        variables: Context,
        plan: Plan,
    ) -> None:
        self.event = envelope.event
        self.handlers: Sequence[Handler] = plan.handlers
        self.places = plan.places
        self.observers = outer._core.observers
        self.alike = plan.alike and not self.observers
        self.variables = variables
        self.lost: dict[int, Outcome] = {}
        self._envelope = envelope
        self._outer = outer

    @property
    def origin(self) -> object:
        return self._outer._origin

    def delivery(self, place: int) -> Delivery:
        if self._deliveries is None:
            self._deliveries = {}
        delivery = self._deliveries.get(place)
        if delivery is None:
            delivery = self._deliveries[place] = self._envelope.delivery(place)
        return delivery

    def unit(self, place: int) -> EventContext:
        """The unit of work of one delivery: of this bus only, inside the one that is drained."""
        outer = self._outer
        with outer._core.tally.lock:
            if self._units is None:
                self._units = {}
            unit = self._units.get(place)
            if unit is None:
                unit = EventContext(outer._core)
                unit._state = _State.OPEN
                unit._outer = outer
                unit._load = outer._load
                unit._origin = outer._origin
                unit._loop = outer._loop
                unit._delivery = self.delivery(place)
                unit._is_delivery = True
                self._units[place] = unit
                if self._ended:  # looked at last: whoever ends it meanwhile finds the unit
                    unit._state = _State.CLOSED
            return unit

    def end(self) -> None:
        """End the units of work that there are; nobody gets an open one any more."""
        self._ended = True
        for place, unit in sorted(self._units.items()) if self._units else ():
            unit._hand_over(success=place not in self.lost)
        if self.lost:
            lost = sorted(at for at, how in self.lost.items() if how is Outcome.UNDELIVERED)
            deliveries = [self.delivery(place) for place in lost]
            _announce(self._outer._core, deliveries, Outcome.UNDELIVERED)


@dataclass(slots=True, eq=False)
class _Load:
    """How many events wait in an outermost unit and all inside it, which share this object."""

    events: int = 0


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
    """

    handled: int
    failures: tuple[Failure, ...]

    def raise_for_failures(self) -> None:
        """Raise everything that failed as one group.

        Raises:
            DispatchError: There were failures.
        """
        if self.failures:
            raise _together(self.failures)


Report = Callable[[Delivery, Exception], None]


def _together(failures: Sequence[Failure]) -> DispatchError:
    events = dict.fromkeys(type_name(type(failure.delivery.event)) for failure in failures)
    return DispatchError(
        f"handlers failed for {', '.join(events)}", [failure.error for failure in failures]
    )


class _State(Enum):
    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


class EventContext:
    """A unit of work: events published in it are delivered when it succeeds.

    Made by `EventBus.context()`, by the middleware for each request, and for each delivery.
    Opened inside another one of the same bus it works like a savepoint: an exception drops only
    its own events, a clean exit hands them to the outer unit.

    Events may be published from any task and any thread that sees the context; everything else
    belongs to the event loop on which it was opened, but `release` and `discard`, which are
    thread-safe too. It cannot be opened twice. While it is open it holds no cancel scope and no
    task group, so an async generator may open it around a `yield`.
    """

    # Here and not in `__init__`, for this is made once for every request.
    _state = _State.NEW
    _outer: EventContext | None = None  # the unit of this bus that this one hands to
    _enclosing: EventContext | None = None  # the unit around it, of whichever bus
    _delivery: Delivery | None = None  # the delivery that it is, or that it is inside
    _is_delivery = False
    _draining = False
    _drained: anyio.Event | None = None  # there while somebody waits for the drain's end
    _before: EventContext | None = None  # what was active when it became so
    _origin: object = None  # which application it belongs to; for resolvers alone
    _loop: object = None  # on which it or the unit around it is open, or is delivered
    _independent = False
    _background = False
    _ending = False  # its end has begun, on an event loop
    _waits = False  # it delivers its events itself, and so do those inside with `background`

    def __init__(self, core: Core, *, independent: bool = False, background: bool = False) -> None:
        self._core = core
        if independent:
            self._independent = True
        if background:
            self._background = True
        self._staged: list[_Envelope] = []
        self._released: deque[_Envelope] = deque()
        self._load = _Load()
        self._sections: list[Section] = []  # open ones here and in units inside, oldest first

    @property
    def closed(self) -> bool:
        """Whether it takes no more events, because its own were delivered or discarded."""
        return self._state is _State.CLOSED

    @property
    def pending(self) -> tuple[Delivery, ...]:
        """The deliveries that wait here, released ones first. Thread-safe."""
        with self._core.tally.lock:
            envelopes = [*self._released, *self._staged]
        return tuple(delivery for envelope in envelopes for delivery in envelope.deliveries())

    def _count_pending(self) -> int:
        """How many deliveries wait here. Thread-safe."""
        with self._core.tally.lock:
            return sum(len(envelope.plan) for envelope in (*self._released, *self._staged))

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Say that something happened in this unit of work. See `EventBus.publish`."""
        self._accept(events, even_on_failure)

    def _accept(self, events: Sequence[object], even_on_failure: bool) -> None:
        """Queue the deliveries of all of them, or raise and queue none."""
        core = self._core
        cause = self._delivery if _active.get() is self else _running() or self._delivery
        if cause is not None and cause.depth >= core.max_depth and events:
            raise EventDepthError(
                type_name(type(events[0])), core.max_depth, [str(d) for d in cause.chain()]
            )
        variables, now = copy_context(), time_ns()
        place = caller() if core.debug else None
        envelopes: list[_Envelope] = []
        waiting = deliveries = 0
        for event in events:
            plan, number = core.plan_for(event), next(_numbers)
            envelopes.append(
                _Envelope(event, plan, variables, cause, now, number, even_on_failure, place)
            )
            if plan:
                waiting += 1
                deliveries += len(plan)
        load, tally = self._load, core.tally
        tally.acquire()  # a `with` would cost as much again as what it does
        try:
            if self._state is not _State.OPEN:
                raise EventContextClosedError(self._why_not_open())
            if load.events + waiting > core.max_events:
                raise EventContextFullError(core.name, core.max_events)
            load.events += waiting
            staged = envelopes
            if waiting < len(envelopes) and not core.observers:
                # What has no handler is forgotten, unless somebody watches what becomes of it.
                staged = [envelope for envelope in envelopes if envelope.plan]
            if self._sections:
                self._tag(staged)
            self._staged += staged
            tally.published += len(envelopes)
            tally.accepted += deliveries
        finally:
            tally.release()
        for observer in core.observers:
            for envelope in envelopes:
                with contained(observer):
                    observer.published(envelope.event, envelope.deliveries())

    def release(self) -> None:
        """What was published so far will be delivered, whatever follows. Thread-safe.

        For the moment after a commit. Delivery itself happens when the unit ends, or in `drain`;
        where a cancellation reaches that, what it ends or leaves is undelivered.
        """
        with self._core.tally.lock:
            news = self._queue(self._take_staged(), self._released)
        _announce_released(self._core, news)

    def discard(self) -> None:
        """Drop what is neither released nor `even_on_failure`. Thread-safe.

        For the moment after a rollback. What is dropped is counted, logged, and told observers.
        """
        kept: list[_Envelope] = []
        with self._core.tally.lock:
            dropped = self._unstage(kept)
            news = self._queue(kept, self._released)
        _announce_released(self._core, news)
        self._drop(dropped, Outcome.DISCARDED)

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
        if self._state is _State.NEW:
            raise EventContextClosedError(self._why_not_open())
        if self._inside_handler():
            raise DrainInProgressError(
                f"a handler of bus {self._core.name!r} cannot drain its own unit of work: what it "
                "publishes is delivered when the handlers of its event have ended. To wait for "
                "handlers, use `await bus.dispatch(event)`"
            )
        if self._draining:
            raise DrainInProgressError(
                f"this event context of bus {self._core.name!r} is being drained by another task"
            )
        self.release()
        failures: list[Failure] = []

        def report(delivery: Delivery, error: Exception) -> None:
            failures.append(Failure(delivery, error))
            self._report(delivery, error)

        try:
            handled = await self._deliver(report, self._core.handler_timeout)
            return DrainReport(handled, tuple(failures))
        finally:
            failures.clear()  # a handler's traceback leads to `report`, which would close a ring

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: Callable[[object], object]
    ) -> object:
        """What FastAPI and Pydantic ask, where they take the class for a field of theirs."""
        return refuse_as_field(source, handler, "unit: CurrentContext")

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
        self._leave()
        success = exc is None
        if not self._hand_over(success=success) and not self._close_if_idle(success=success):
            try:
                if on_event_loop():
                    raise EventContextUsageError(
                        "`with bus.context()` was opened in a thread and ends on an event loop, "
                        "which it would block: leave the block in the thread that entered it"
                    )
                run(partial(self._end, success), self._nearby())
            finally:
                if not self._ending:  # there was no loop to run it
                    self._abandon()

    async def __aenter__(self) -> Self:
        self._enter()
        self._loop = current_loop()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()
        success = exc is None
        if not self._hand_over(success=success):
            await self._end(success)

    def __repr__(self) -> str:
        kind = f"EventContext of bus {self._core.name!r}"
        if self._is_delivery:
            kind = f"{kind} for {self._delivery}"
        return f"<{kind}, {self._state.value}, {self._count_pending()} pending>"

    def _open(self, enclosing: EventContext | None, *, nested: bool = True) -> None:
        """Open it inside `enclosing`, whose events' cause it shares.

        With `nested` it hands over to the unit of the same bus around it, if there is one.
        """
        if self._state is not _State.NEW:
            raise EventContextUsageError(
                "an event context is opened once: call bus.context() for each unit of work"
            )
        self._origin = _origin.get() if enclosing is None else enclosing._origin
        if enclosing is not None:
            self._loop = enclosing._loop
        while enclosing is not None and enclosing.closed:  # a task that outlived its unit
            enclosing = enclosing._enclosing
        self._state = _State.OPEN
        self._enclosing = enclosing
        if enclosing is not None:
            self._delivery = enclosing._delivery
        if nested:
            self._outer = _find(enclosing, self._core)
        if self._outer is not None:
            self._load = self._outer._load
            self._sections = self._outer._sections

    def _enter(self) -> None:
        """Open it, and make it the active one."""
        self._open(_current(), nested=not self._independent)
        self._activate()

    def _activate(self) -> None:
        self._before = _current()
        _active.set(self)

    def _leave(self) -> None:
        """Make the one before it the active one again.

        Blocks around a `yield` may overlap, or end in other context variables than they began in:
        who became active in the meantime stays so.
        """
        before = self._before
        if _current() is self:
            while before is not None and before.closed:
                before = before._enclosing
            _active.set(before)
        self._before = None

    def _why_not_open(self) -> str:
        bus = self._core.name
        if self._state is _State.NEW:
            return f"this event context of bus {bus!r} is not open yet: use `async with`"
        if self._is_delivery:
            return (
                f"the handler that this event context of bus {bus!r} belongs to has ended "
                f"({self._delivery}). A task that outlives its handler needs a unit that is "
                "independent of it: `async with bus.context(independent=True):`"
            )
        return (
            f"this event context of bus {bus!r} has ended: the request or job it belongs to is "
            "over, and its events were delivered. A task or thread that outlives it needs a unit "
            "that is independent of it: `async with bus.context(independent=True):`, in a thread "
            "`with`"
        )

    def _inside_handler(self) -> bool:
        """Whether it, or who asks, is inside a handler of this bus.

        What is independent of the handler is not inside it.
        """
        for innermost in (self, _current()):
            for unit in _outward(innermost):
                if unit._core is self._core:
                    if unit._independent:
                        break
                    if unit._is_delivery and not unit.closed:
                        return True
        return False

    def _tag(self, envelopes: Sequence[_Envelope]) -> None:
        """Have the innermost open transaction decide what is published here. Needs the lock."""
        section = self._innermost(_begun.get())
        if section is not None:
            section._take(self, envelopes)

    def _innermost(self, begun: Section | None) -> Section | None:
        """The innermost open transaction, given the last one that the caller's task has begun.

        A session that was begun in another thread or task, as FastAPI begins those of a plain
        `def` dependency, is the caller's all the same: it is one of this unit or of one around it.
        """
        while begun is not None:
            if begun in self._sections:
                return begun
            begun = begun._before
        around: list[EventContext] = []
        unit: EventContext | None = self
        while unit is not None:
            around.append(unit)
            unit = None if unit._is_delivery else unit._outer
        return next((each for each in reversed(self._sections) if each._unit in around), None)

    def _close_sections(self) -> None:
        """Close the transactions that are still open here although the unit ends."""
        with self._core.tally.lock:
            still_open = [each for each in reversed(self._sections) if each._unit is self]
        for section in still_open:
            section.close("the transaction was still open when its unit of work ended")

    def _take_staged(self) -> list[_Envelope]:
        """Empty what is staged. Needs the lock."""
        staged, self._staged = self._staged, []
        return staged

    def _unstage(self, kept: list[_Envelope]) -> list[_Envelope]:
        """Empty what is staged: the part to deliver anyway goes to `kept`, the rest is returned.

        Needs the lock.
        """
        staged = self._take_staged()
        kept.extend(envelope for envelope in staged if envelope.even_on_failure)
        dropped = [envelope for envelope in staged if not envelope.even_on_failure]
        self._load.events -= sum(1 for envelope in dropped if envelope.plan)
        return dropped

    def _queue(
        self, envelopes: Sequence[_Envelope], queue: deque[_Envelope]
    ) -> Sequence[_Envelope]:
        """Put on the queue what has handlers; returns what observers have not been told of.

        Needs the lock.
        """
        queue += [envelope for envelope in envelopes if envelope.plan]
        return self._news(envelopes)

    def _news(self, envelopes: Sequence[_Envelope]) -> Sequence[_Envelope]:
        """Those of which observers have not been told that they will be delivered, once.

        Needs the lock.
        """
        if not self._core.observers:
            return ()
        news = [envelope for envelope in envelopes if not envelope.released]
        for envelope in news:
            envelope.released = True
        return news

    def _hand_over(self, *, success: bool) -> bool:
        """Close it, and give what is left to the outer unit; False where there is none open.

        What was released here stays decided, also if the outer unit fails. A drain that another
        task runs goes on with it.
        """
        if self._is_delivery and self._sections:
            self._close_sections()
        with self._core.tally.lock:
            outer = self._heir()
            if outer is None:
                return False
            self._state = _State.CLOSED
            left: list[_Envelope] = []
            if not self._draining:
                left.extend(self._released)
                self._released.clear()
            dropped: list[_Envelope] = []
            news: Sequence[_Envelope] = ()
            if not self._is_delivery:
                for envelope in left:
                    envelope.decide()
                for section in self._sections:
                    section._follow(self, outer)
            if success:
                left += self._take_staged()
            else:
                dropped = self._unstage(left)
            if self._is_delivery:
                news = self._queue(left, outer._released)
            else:
                outer._staged += left
        _announce_released(self._core, news)
        self._drop(dropped, Outcome.DISCARDED)
        return True

    def _heir(self) -> EventContext | None:
        """Who gets what is left: the nearest open unit around it; of a delivery, who drains it."""
        outer = self._outer
        if self._is_delivery:
            return outer
        while outer is not None and outer.closed:
            outer = None if outer._is_delivery else outer._outer
        return outer

    def _close_if_idle(self, *, success: bool) -> bool:
        """Decide what is staged; close it if then nothing is left to deliver."""
        if self._sections:
            self._close_sections()
        if self._staged and not success:
            self.discard()
        news: Sequence[_Envelope] = ()
        tally = self._core.tally
        tally.acquire()
        try:
            if self._staged and success:
                news = self._queue(self._take_staged(), self._released)
            idle = not self._released and not self._staged and not self._draining
            if idle:
                self._state = _State.CLOSED
        finally:
            tally.release()
        _announce_released(self._core, news)
        return idle

    async def _end(self, success: bool) -> None:
        self._ending = True
        host = self._host() if self._background else None
        if host is None:
            await self._finish(self._report, self._core.handler_timeout, success=success)
        else:
            host.submit(self, success=success)

    def _nearby(self) -> Iterator[Callable[[Function], bool]]:
        """Ways to event loops that run in other threads, the nearest first.

        That is the loop of the unit around it, then that of the application that it was opened
        in, then those of others that have this bus, the last one that has begun first.
        """
        if self._loop is not None:
            yield partial(reach, self._loop)
        hosts = reversed(self._core.hosts)
        for host in sorted(hosts, key=lambda host: host.origin is not self._origin):
            yield host.entrance.run

    def _host(self) -> Host | None:
        """Who delivers it in the background, on the event loop that calls.

        That is the application that it was opened in, else the last one that has begun. Nobody
        does where a request or websocket delivers its events itself.
        """
        core = self._core
        if core in _waiting.get() or any(
            unit._waits and unit._core is core for unit in _outward(self)
        ):
            return None
        loop, found = current_loop(), None
        for host in core.hosts:
            if host.entrance.loop is loop:
                found = host
                if host.origin is self._origin:
                    break
        return found

    async def _finish(self, report: Report, timeout: float | None, *, success: bool) -> None:
        """Deliver what is to be delivered, then close; what a cancellation left is undelivered."""
        try:
            while not self._close_if_idle(success=success):
                if not self._draining:
                    await self._deliver(report, timeout)
                else:  # another task is at it; what it leaves is ours
                    self._drained = self._drained or anyio.Event()
                    await self._drained.wait()
        finally:
            if not self.closed:
                self._abandon()

    async def _deliver(self, report: Report, timeout: float | None) -> int:
        """Deliver what is released, and what comes of it; returns how many were handled."""
        core = self._core
        self._draining, self._loop = True, current_loop()
        enter = _enter_for_logs if binds() else _active.set
        terms = Terms(core.sequential, timeout, core.tally, report, enter)
        turns = self._turns()
        try:
            return await run_all(turns, terms)
        finally:
            turns.close()
            self._draining = False
            if self._drained is not None:
                self._drained.set()
                self._drained = None
            if self.closed and not self._hand_over(success=False):  # left in the meantime
                self._abandon()

    def _turns(self) -> Generator[Turn]:
        """Each event that is released, and its end when the next one is asked for."""
        level, current = thread_level.get(), library.get(None)
        while (envelope := self._next()) is not None:
            variables, plan = envelope.variables, envelope.plan
            if variables.get(thread_level, 0) != level or variables.get(library) != current:
                variables = _on_this_loop(variables, level, current)
            if not plan.valid:
                plan = self._without_cancelled(envelope)
            if plan.places:
                turn = _Turn(envelope, self, variables, plan)
                try:
                    yield turn
                finally:
                    turn.end()

    def _without_cancelled(self, envelope: _Envelope) -> Plan:
        """The plan as it is now; the deliveries of cancelled subscriptions are discarded."""
        plan = envelope.plan = envelope.plan.renewed()
        left = set(range(len(plan))) - {*plan.places}
        self._skip([envelope.delivery(place) for place in sorted(left)], Outcome.DISCARDED)
        return plan

    def _next(self) -> _Envelope | None:
        tally = self._core.tally
        tally.acquire()
        try:
            if not self._released:
                return None
            self._load.events -= 1
            return self._released.popleft()
        finally:
            tally.release()

    def _abandon(self) -> None:
        """Close it; what is left will not be delivered."""
        if left := self._clear():
            self._drop(left, Outcome.UNDELIVERED)

    def _clear(self) -> list[_Envelope]:
        """Close it, and return what is left, of which nobody has been told."""
        with self._core.tally.lock:
            self._state = _State.CLOSED
            left = [*self._released, *self._take_staged()]
            if not left:
                return left
            self._released.clear()
            self._load.events -= sum(1 for envelope in left if envelope.plan)
            return left

    def _drop(
        self, envelopes: Sequence[_Envelope], outcome: Outcome, reason: str | None = None
    ) -> None:
        if outcome is Outcome.DISCARDED:
            _announce_withdrawn(self._core, envelopes)
        self._skip([d for envelope in envelopes for d in envelope.deliveries()], outcome, reason)

    def _skip(
        self, deliveries: Sequence[Delivery], outcome: Outcome, reason: str | None = None
    ) -> None:
        """Account for deliveries that will never run."""
        self._core.tally.end(outcome, len(deliveries))
        _announce(self._core, deliveries, outcome, reason)

    def _report_all(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            self._report(failure.delivery, failure.error)

    def _report(self, delivery: Delivery, error: Exception) -> None:
        """Tell the bus's owner of a failure that nobody awaits."""
        try:
            self._core.report_failure(delivery, error)
        except Exception as broken:  # noqa: BLE001 - a reporter is user code
            log(logging.ERROR, "report_failure failed", error=broken, bus=self._core.name)
            log_failure(delivery, error)


class Section:
    """What is published in one open transaction or savepoint, which decides it.

    Made by `begin`; whoever watches the transaction says how it ended. Its events are those that
    were published while it was the innermost one, and those of its unit that were published when
    none was open. It marks and drops: no handler runs in it. Thread-safe.

    Attributes:
        wrote: Whether it has changed anything; one that has not has no say when it is closed.
        in_doubt: Whether it may have been committed although nobody has heard of it.
    """

    __slots__ = ("_before", "_dirty", "_enclosing", "_unit", "_units", "in_doubt", "wrote")

    def __init__(
        self, unit: EventContext, dirty: Callable[[], bool], enclosing: Section | None
    ) -> None:
        self._unit = unit
        self._units = {unit}  # where its events are staged
        self._dirty = dirty
        self._enclosing = enclosing
        self._before = _begun.get()
        while self._before is not None and not self._before.open:
            self._before = self._before._before
        self.wrote = False
        self.in_doubt = False

    @property
    def open(self) -> bool:
        """Whether neither it nor its unit of work has ended."""
        return self in self._unit._sections

    def commit(self) -> None:
        """End it: its events will be delivered; those of a savepoint join what is around it."""
        news: Sequence[_Envelope] = ()
        with self._unit._core.tally.lock:
            if self._enclosing is None:
                decided = self._envelopes()
                for envelope in decided:
                    envelope.decide()
                news = self._unit._news(decided)
            else:
                self._enclosing.wrote |= self.wrote
            self._end()
        _announce_released(self._unit._core, news)

    def rollback(self, reason: str = "the transaction was rolled back") -> None:
        """Drop its events. What is published in it from now on cannot be committed either."""
        self.wrote = True
        core = self._unit._core
        with core.tally.lock:
            dropped = self._envelopes()
            for unit in self._units:
                unit._staged = [each for each in unit._staged if each.section is not self]
            self._unit._load.events -= sum(1 for envelope in dropped if envelope.plan)
        if dropped and self.in_doubt:
            log(
                logging.WARNING,
                "a commit failed, and may have happened all the same",
                bus=core.name,
                deliveries=sum(len(each.plan) for each in dropped),
            )
        self._unit._drop(dropped, Outcome.DISCARDED, reason)

    def close(self, reason: str = "the transaction was closed without a commit") -> None:
        """End it, if that has not happened: what it wrote is lost, and with it its events.

        If it wrote nothing, they go where they would have gone without it.
        """
        if not self.open:
            return
        if self.wrote or self._dirty():
            self.rollback(reason)
        with self._unit._core.tally.lock:
            self._end()

    def _envelopes(self) -> list[_Envelope]:
        """Its events that are still to be decided, in publish order. Needs the lock."""
        theirs = [each for unit in self._units for each in unit._staged if each.section is self]
        return sorted(theirs, key=lambda envelope: envelope.number)

    def _end(self) -> None:
        """Leave what is still undecided to the transaction around it, or to none.

        Needs the lock.
        """
        if self.open:
            self._unit._sections.remove(self)
            heir = self._unit._innermost(self._enclosing or self._before)
            for envelope in self._envelopes():
                envelope.section = heir
            if heir is not None:
                heir._units |= self._units
            self._units.clear()

    def _take(self, unit: EventContext, envelopes: Sequence[_Envelope]) -> None:
        """Have these, staged in the unit, decided here. Needs the lock."""
        self._units.add(unit)
        for envelope in envelopes:
            if envelope.section is None and not envelope.even_on_failure:
                envelope.section = self

    def _follow(self, unit: EventContext, outer: EventContext) -> None:
        """Go where the unit hands its events to. Needs the lock."""
        if unit in self._units:
            self._units.add(outer)
        if unit is self._unit:
            self._unit = outer


def begin(
    core: Core, dirty: Callable[[], bool], *, around: Section | None = None
) -> Section | None:
    """A transaction begins in the active unit of work; None where none is open.

    It takes in what was published in that unit and is undecided; a savepoint does not.

    Args:
        core: The bus whose events it decides.
        dirty: Says whether there are changes that are still to be written in it.
        around: The transaction or savepoint that it is a savepoint in.
    """
    unit = _find(_current(), core)
    if unit is None:
        return None
    section = Section(unit, dirty, around)
    with core.tally.lock:
        if unit.closed:
            return None
        unit._sections.append(section)
        if around is None:
            section._take(unit, unit._staged)
    _begun.set(section)
    return section


def refuse_as_field(source: object, handler: Callable[[object], object], instead: str) -> object:
    """Say which alias FastAPI knows, where Pydantic is asked for a field of this class.

    Raises:
        TypeError: Pydantic cannot make one; a model that allows arbitrary types can.
    """
    try:
        return handler(source)
    except Exception as error:  # Pydantic's, which is not imported here
        name, alias = getattr(source, "__name__", source), instead.partition(": ")[2]
        raise TypeError(
            f"{name} is no field that FastAPI can read from a request. In an endpoint, a "
            f"dependency or a handler declare `{instead}`: from eventkit.fastapi import {alias}. "
            "In a model of Pydantic set arbitrary_types_allowed=True"
        ) from error


def log_failure(delivery: Delivery, error: Exception) -> None:
    """Write the line that a failed delivery leaves by default: never the payload."""
    log(
        logging.ERROR,
        "event handler failed",
        error=error,
        event_type=type_name(type(delivery.event)),
        handler=delivery.handler,
        delivery_id=str(delivery.id),
    )


def _announce(
    core: Core, deliveries: Sequence[Delivery], outcome: Outcome, reason: str | None = None
) -> None:
    """Log and tell observers that these were dropped."""
    if not deliveries:
        return
    lost = outcome is Outcome.UNDELIVERED
    kinds = Counter(type_name(type(delivery.event)) for delivery in deliveries)
    log(
        logging.ERROR if lost else logging.INFO,
        f"deliveries {outcome.value}",
        bus=core.name,
        deliveries=len(deliveries),
        event_types=", ".join(f"{kind} x{times}" for kind, times in kinds.items()),
        error=None,
        **({} if reason is None else {"reason": reason}),
    )
    for observer in core.observers:
        with contained(observer):
            (observer.undelivered if lost else observer.discarded)(deliveries)


def _announce_released(core: Core, envelopes: Sequence[_Envelope]) -> None:
    for observer in core.observers if envelopes else ():
        with contained(observer):
            observer.released([envelope.event for envelope in envelopes])


def _announce_withdrawn(core: Core, envelopes: Sequence[_Envelope]) -> None:
    for observer in core.observers if envelopes else ():
        with contained(observer):
            observer.withdrawn([envelope.event for envelope in envelopes])


async def dispatch(core: Core, event: object) -> None:
    """Run the handlers of one event, and of all that comes of it. See `EventBus.dispatch`."""
    if not core.plan_for(event) and not core.observers:
        with core.tally.lock:
            core.tally.published += 1
        return
    unit = EventContext(core)
    unit._open(_current(), nested=False)
    unit.publish(event)
    del event  # or a traceback that shows local variables shows the payload
    failures: list[Failure] = []

    def collect(delivery: Delivery, error: Exception) -> None:
        failures.append(Failure(delivery, error))

    try:
        try:
            await unit._finish(collect, None, success=True)
        except BaseException:
            unit._report_all(failures)  # nobody else will hear of them
            raise
        if failures:
            raise _together(failures)
    finally:
        failures.clear()  # a handler's traceback leads to `collect`, which would close a ring


def publish(core: Core, events: Sequence[object], even_on_failure: bool) -> None:
    """Publish in the active unit of work of this bus. See `EventBus.publish`."""
    context = _active.get()
    if not isinstance(context, EventContext) or context._core is not core:
        context = active(core)  # which takes as long as all the rest
    context._accept(events, even_on_failure)


def active(core: Core) -> EventContext:
    """The unit of work of this bus that surrounds the caller, open or not.

    Raises:
        NoEventContextError: There is none; the message names the likely cause.
    """
    context = _find(_current(), core)
    if context is None:
        raise NoEventContextError(core.name, _why_none())
    return context


def current_delivery() -> Delivery:
    """The delivery that the calling handler is.

    Its `id` is fit for an idempotency key. Seen by everything that shares the handler's context
    variables: the functions it calls, its threads and tasks.

    Raises:
        NoDeliveryError: Called outside a handler.
    """
    context = _current()
    if context is None or context._delivery is None:
        raise NoDeliveryError(
            "current_delivery() is for handlers and what they call; nothing here belongs to one. "
            "Where the delivery's id is needed elsewhere, have the handler pass it on"
        )
    return context._delivery


def surrounding() -> EventContext | None:
    """The unit of work, of whichever bus, that surrounds the caller; None if it is not open."""
    context = _current()
    return None if context is None or context.closed else context


def delivering() -> dict[object, EventContext]:
    """The bus whose handler the caller is part of, with the unit of work that the delivery is."""
    context = _current()
    return {} if context is None or not context._is_delivery else {context._core.bus: context}


def enter(
    context: EventContext,
    enclosing: EventContext | None,
    origin: object,
    *,
    loop: object = None,
    waits: bool = False,
) -> None:
    """Open it inside `enclosing` alone, whatever is active, and make it the active one.

    For those who `leave` a unit of work in one place and end it in another, with `finish`. It
    hands nothing over: `enclosing` is of another bus. Threads in it deliver on this event loop.
    With `waits`, units inside it deliver their events themselves.
    """
    context._open(enclosing, nested=False)
    context._origin, context._loop = origin, loop
    if waits:
        context._waits = True
    context._before = _current()
    _active.set(context)


def leave(context: EventContext) -> None:
    """It is the active one no longer, and goes on."""
    if context._before is None and _active.get() is context:  # so it is in nearly all requests
        _active.set(None)
    else:
        context._leave()


@contextmanager
def outside(
    core: Core, reason: str, origin: object, *, waits: bool | None = None
) -> Generator[None]:
    """No unit of work is active in the block; an attempt to publish is told the reason.

    Units that are opened in it, or in tasks that are started in it, are of this origin. `waits`
    says whether those of this bus deliver their events themselves; None leaves that as it was.
    """
    active, told, came = _active.set(None), _outside.set(reason), _origin.set(origin)
    waiting = _waiting.get()
    if waits is not None:
        waiting = waiting | {core} if waits else waiting - {core}
    waited = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(waited)
        _origin.reset(came)
        _outside.reset(told)
        _active.reset(active)


def add_host(core: Core, host: Host) -> None:
    """From now on it delivers units of work in the background. Thread-safe."""
    with core.tally.lock:
        core.hosts = (*core.hosts, host)


def remove_host(core: Core, host: Host) -> None:
    """It does so no longer; nothing happens where that is so already. Thread-safe."""
    with core.tally.lock:
        core.hosts = tuple(other for other in core.hosts if other is not host)


async def finish(context: EventContext, *, success: bool) -> None:
    """Release or discard what nobody has decided, deliver what is released, and close.

    Raises where a handler has left a cancel scope open, on which the drainer relies.
    """
    # Dispatch puts a scope around handlers that have a limit, and leaving it fails while another
    # is open in it. With an endless limit it does so for those that have none.
    timeout = context._core.handler_timeout or math.inf
    await context._finish(context._report, timeout, success=success)


def abandon(*contexts: EventContext) -> None:
    """Close units of one bus at once: what is not released is discarded, the rest undelivered.

    What is undelivered is told in one go, so that the end of thousands is one line in the log.
    """
    for context in contexts:
        context.discard()
    left = [envelope for context in contexts for envelope in context._clear()]
    for context in contexts[:1]:
        context._drop(left, Outcome.UNDELIVERED)


def count_pending(context: EventContext) -> int:
    """How many deliveries wait in it: `pending` makes them all."""
    return context._count_pending()


def close_if_idle(context: EventContext, *, success: bool) -> bool:
    """As `finish`, where there is nothing to deliver; False where there is."""
    return context._close_if_idle(success=success)


def _running() -> Delivery | None:
    """The delivery that the caller is part of, whichever unit of work it publishes to."""
    context = _current()
    return None if context is None or context.closed else context._delivery


def _current() -> EventContext | None:
    """The unit of work that surrounds the caller, open or not."""
    active = _active.get()
    if isinstance(active, tuple):
        turn, place = active
        return cast("_Turn", turn).unit(place)
    return active


def _enter_for_logs(seat: Seat) -> None:
    """As `_active.set`, and what the handler logs with structlog says whose it is."""
    _active.set(seat)
    turn, place = seat
    event_type = type_name(type(turn.event))
    delivery = turn.delivery(place)
    bind(event_type=event_type, handler=delivery.handler, delivery_id=str(delivery.id))


def _on_this_loop(captured: Context, level: int, current: str | None) -> Context:
    """The captured context variables, as they are to be on the event loop that drains.

    They are of a publisher that was in a thread, or on another kind of event loop.
    """
    captured = captured.copy()
    captured.run(thread_level.set, level)
    captured.run(library.set, current)
    return captured


def _outward(innermost: EventContext | None) -> Iterator[EventContext]:
    """The unit, the one around it, and so on."""
    while innermost is not None:
        yield innermost
        innermost = innermost._enclosing


def _find(innermost: EventContext | None, core: Core) -> EventContext | None:
    return next((unit for unit in _outward(innermost) if unit._core is core), None)


def _why_none() -> str:
    enclosing = _current()
    reason = _outside.get()
    if enclosing is not None:
        return (
            f"this is a unit of work of another bus, {enclosing._core.name!r}, and it is not "
            "inside one of this bus. Publish to that one, or open a unit of work of this bus: "
            "`async with bus.context():`; two buses in one application need the middleware each, "
            "and names: EventBus(name=...)"
        )
    if reason is not None:
        return reason
    if on_event_loop() or in_worker_thread():
        return (
            "no request or job surrounds the caller. In a web application install the middleware: "
            "app.add_middleware(EventContextMiddleware, bus=bus). If it is installed, this code "
            "runs outside of it: add it last, because the last one added is the outermost. "
            "Elsewhere, and in an exception_handler(Exception), which is outside of all "
            "middlewares, open a unit of work: `async with bus.context():`, in a thread "
            "`with bus.context():`"
        )
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        return (
            f"the thread {thread.name!r} was started without its creator's context variables. "
            "Use anyio.to_thread.run_sync() or asyncio.to_thread(), which pass them on, or open "
            "a unit of work of its own: `with bus.context():`"
        )
    return (
        "this is start-up code, a script or a synchronous test. Open a unit of work: "
        "`with bus.context():`"
    )
