"""Owns the façade: one object through which users subscribe, publish, dispatch and observe."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import EllipsisType
from typing import Concatenate, TypedDict, TypeVar, overload
from weakref import WeakValueDictionary, ref

from eventkit._core.ambient import surrounding
from eventkit._core.context import EventContext, context_of, dispatch
from eventkit._core.dependencies import Aliased, Resolver
from eventkit._core.durable import Durable
from eventkit._core.events import Delivery, type_name
from eventkit._core.explain import explain
from eventkit._core.handlers import is_duration
from eventkit._core.log import log
from eventkit._core.observers import Audience, Observation, Observer
from eventkit._core.registry import Registry
from eventkit._core.routers import EventRouter, Subscribing, include_into
from eventkit._core.state import BusState, log_failure
from eventkit._core.stats import Stats, Tally
from eventkit._core.subscriptions import Declaration, Subscription, check_event_type, declare
from eventkit._core.turns import together
from eventkit._core.units import Unit, active_unit

E = TypeVar("E")

# All buses of the process, by their id, as long as somebody else keeps them.
_buses: WeakValueDictionary[int, EventBus] = WeakValueDictionary()


class Wiring(TypedDict):
    """One subscription as plain data, as `EventBus.describe` gives it."""

    event_type: str
    handler: str
    location: str
    subscribed_at: str
    thread: bool
    timeout: float | None
    durable: bool


class EventBus(Subscribing, Aliased):
    """Ties events to handlers, and says what becomes of them.

        bus = EventBus()

        @bus.on(UserCreated)
        async def greet(event: UserCreated) -> None: ...

        async with bus.context():          # in a web application the middleware does this
            bus.publish(UserCreated(1))    # delivered when the block has ended well

    It holds nothing that is bound to an event loop: one bus at module level serves any number of
    loops, one after the other or at once. Subscribing, publishing and reading are thread-safe.
    A process may be forked at any moment, also while other threads publish. The child has the
    subscriptions and the counters of that moment; what other threads had published is pending
    there for ever, and is delivered by the parent alone.

    Args:
        name: Stands in logs and messages.
        sequential: Handlers of one event run one after the other instead of concurrently.
        handler_timeout: Seconds that a handler may take in a drain, counted from when all handlers
            of its event have begun; None for no limit. A subscription's own `timeout=` goes before
            it; plain `def`s in a thread have none, and neither has `dispatch`.
        max_events: How many events with a handler may wait in one unit of work.
        max_depth: How many handlers deep events may cause events.
        resolver: What gives handlers their dependencies; left out, FastAPI's `Depends` does, which
            is looked for when the first handler that has some is subscribed.
        debug: Whether a failure's note says where its event was published, and so does
            `Delivery.published_from`; it makes `publish` look for its caller. The log line about
            events that nobody handles is then a warning. It also times each step of a handler on
            the event loop, and the log names a handler that blocks the loop, once. Left out, all
            are so under `python -X dev`, and under pytest all but the last.

    Attributes:
        name: As given.
        report_failure: Called with the delivery and the exception of each failure that nobody
            awaits, in the task of the failed handler; writes a line to the log. Assign another
            callable to replace it; what it raises is logged.

    Raises:
        TypeError: `resolver` is no `Resolver`.
        ValueError: A limit is not above 0.
    """

    alias = "events: Bus"

    def __init__(
        self,
        *,
        name: str = "default",
        sequential: bool = False,
        handler_timeout: float | None = 30.0,
        max_events: int = 1000,
        max_depth: int = 16,
        resolver: Resolver | None = None,
        debug: bool | None = None,
    ) -> None:
        if handler_timeout is not None and not is_duration(handler_timeout):
            raise ValueError(f"handler_timeout takes seconds above 0, not {handler_timeout!r}")
        if max_events < 1 or max_depth < 1:
            raise ValueError(
                f"max_events and max_depth are at least 1, not {max_events!r} and {max_depth!r}"
            )
        if resolver is not None and (
            isinstance(resolver, type) or not isinstance(resolver, Resolver)  # pyright: ignore[reportUnnecessaryIsInstance]
        ):
            raise TypeError(
                f"resolver takes an object with the methods of eventkit.Resolver, not {resolver!r}"
            )
        # Not under pytest: tests run handlers as production does, and may stop the clock.
        timed = bool(sys.flags.dev_mode) if debug is None else debug
        self._registry = Registry(resolver, _fastapi_resolver, self._log_unhandled, timed=timed)
        self._state = BusState(
            bus=self,
            name=name,
            sequential=sequential,
            handler_timeout=handler_timeout,
            max_events=max_events,
            max_depth=max_depth,
            debug=_debugging() if debug is None else debug,
            plan_for=self._registry.plan_for,
            tally=Tally(),
            report_failure=log_failure,
        )
        # The first subscription of each place that subscribes in units of work, and its unit.
        self._made_in_units: dict[str, tuple[Subscription, ref[Unit]] | None] = {}
        _buses[id(self)] = self

    @property
    def name(self) -> str:
        """What the bus is called in logs and messages."""
        return self._state.name

    @property
    def report_failure(self) -> Callable[[Delivery, Exception], None]:
        """What is called with each failure that nobody awaits; assign to replace it."""
        return self._state.report_failure

    @report_failure.setter
    def report_failure(self, report: Callable[[Delivery, Exception], None]) -> None:
        self._state.report_failure = report

    @property
    def stats(self) -> Stats:
        """The counters of this bus at this moment. Thread-safe."""
        return self._state.tally.snapshot()

    @overload
    def subscribe(  # what a lambda can be inferred from
        self,
        event_type: type[E],
        handler: Callable[[E], object],
        *,
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
        durable: bool | Durable = False,
    ) -> Subscription: ...
    @overload
    def subscribe(
        self,
        event_type: type[E],
        handler: Callable[Concatenate[E, ...], object],
        *,
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
        durable: bool | Durable = False,
    ) -> Subscription: ...
    def subscribe(
        self,
        event_type: type[object],
        handler: Callable[..., object],
        *,
        name: str | None = None,
        timeout: float | None | EllipsisType = ...,
        thread: bool | None = None,
        durable: bool | Durable = False,
    ) -> Subscription:
        """Have the handler called for events of this type and its subclasses.

        Args:
            event_type: A class; `object` for every event.
            handler: Anything callable with the event and its dependencies: `async def`, plain
                `def` (runs in a worker thread), methods, partials, callable objects.
            name: A stable name, where `module:qualname` would not be one.
            timeout: Seconds that one delivery may take, None for no limit; left out, the bus's
                `handler_timeout` holds in drains.
            thread: Where the call starts: True in a worker thread, False on the event loop; left
                out, a plain `def` in a thread and everything async on the loop.
            durable: Whether its deliveries are kept in a table until they are done, so that no
                crash loses them; `Durable(...)` says how often they are tried. Needs an
                `eventkit.outbox.Outbox`. May run twice: use `complete_with(session)` for your own
                rows, `current_delivery().id` as a key elsewhere. Every process that publishes
                includes the router.

        Returns:
            The subscription; `cancel()` ends it, and so does leaving it as a context manager.

        Raises:
            InvalidEventTypeError: `event_type` is not a class.
            InvalidHandlerError: The handler takes no event, or something that nobody provides.
            DuplicateSubscriptionError: It is subscribed to this type already.
            DuplicateNameError: Another handler has been given this name.
        """
        declaration = declare(
            event_type, handler, name=name, timeout=timeout, thread=thread, durable=durable
        )
        return self._add([declaration])[0]

    def include(self, router: EventRouter) -> None:
        """Subscribe all handlers of a router, or none.

        Raises:
            DuplicateSubscriptionError: One of them is subscribed already.
            InvalidHandlerError: One of them takes something that nobody provides.
            DuplicateNameError: Another handler has been given the name of one of them.
        """
        include_into(self, router)

    def _add(self, declarations: Sequence[Declaration]) -> list[Subscription]:
        if self._state.keeper is not None:
            self._state.keeper.admit(declarations)
        made = self._registry.add(declarations)
        unit = surrounding()
        if unit is not None:  # which is rare: subscribing belongs to where the bus is made
            for subscription in made:
                self._watch(subscription, unit)
        return made

    def _watch(self, subscription: Subscription, unit: Unit) -> None:
        """Warn once of a place that subscribes in one unit of work after the other."""
        place = subscription.subscribed_at
        before = self._made_in_units.setdefault(place, (subscription, ref(unit)))
        if before is None:  # who reads the log knows
            return
        earlier, its_unit = before
        if not earlier.active:
            self._made_in_units[place] = (subscription, ref(unit))
        elif (of_earlier := its_unit()) is None or of_earlier.closed:
            self._made_in_units[place] = None
            log(
                logging.WARNING,
                "a place subscribes in each unit of work, and nobody cancels",
                subscribed_at=place,
                handler=subscription.name,
                event_type=type_name(subscription.event_type),
                bus=self.name,
            )

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Say that something happened; handlers run when the unit of work has succeeded.

        Queues in the active event context, in order, and returns at once: it never blocks and is
        no checkpoint. Thread-safe. Handlers are looked up now, and will run in the context
        variables of this moment. All events are accepted, or one error is raised.

        Args:
            events: Instances of any class. Without a handler they are counted and forgotten.
            even_on_failure: Deliver although the unit of work fails, a `LoginFailed` on a 401
                for instance.

        Raises:
            NoEventContextError: No unit of work is active here; the message says why.
            EventContextClosedError: It has ended.
            EventContextFullError: More than `max_events` would wait in it.
            EventDepthError: A handler published this, too many handlers deep.
            InvalidEventTypeError: A class was given instead of an instance of it, or something
                that nobody handles and that is no event: a list of events, a name, a `dict`, None.
        """
        active_unit(self._state).publish(events, even_on_failure)

    async def dispatch(self, event: object) -> None:
        """Run the handlers now, then those of what they publish, and wait for all of them.

        A unit of work of its own: what it delivered stays delivered if an outer one fails. Not
        for use inside an open transaction, whose changes the handlers' own sessions cannot see:
        publish there instead. It has no timeout but those given to a subscription; cancelling it,
        for instance by a timeout around it, cancels the handlers. With no handler, and with
        handlers that do not wait, it is no checkpoint.

        All handlers of an event run at the same time, and only those that wait cost a task: up to
        the first of them, its handlers begin in the task that dispatches, and share its identity;
        those of what they publish may begin in any of these tasks.
        Asyncio's own `Task.cancel()` reaches one waiting handler there, through shields.
        `docs/dispatch.md` has all of it.

            try:
                await bus.dispatch(OrderPaid(7))
            except DispatchError as failed:
                print(failed.exceptions)  # what handlers raised, each with a note saying which

        Raises:
            DispatchError: Handlers failed; the group has every failure.
            EventDepthError: Handlers dispatch to handlers, too many deep.
            InvalidEventTypeError: A class was given instead of an instance of it, or something
                that nobody handles and that is no event: a list of events, a name, a `dict`, None.
        """
        dispatching = dispatch(self._state, event)
        del event  # or a traceback that shows local variables shows the payload
        failures = await dispatching
        try:
            if failures:
                raise together(failures)
        finally:
            failures.clear()  # or this frame and the tracebacks keep each other alive

    def context(self, *, independent: bool = False, background: bool = False) -> EventContext:
        """A unit of work outside HTTP, for `async with`, or for `with` in synchronous jobs.

        A clean exit delivers its events, and returns when their handlers have ended; an exception
        discards them. Cancelling it while they run ends them: they, and what has not started, are
        undelivered. Inside another context of this bus it is a savepoint: see `EventContext`.

        With `with`, in a thread that has no event loop, the handlers run on the loop that the
        thread works for (a worker thread of AnyIO or trio); else on the loop of the unit of work
        whose context variables the thread has; else on that of a running application whose
        middleware has this bus; else on one of asyncio's that the process keeps for all such
        blocks. The block waits: do not block an event loop until such a thread has ended.

        Args:
            independent: It is no savepoint. The unit of work around it neither delivers nor
                discards its events, and neither does a transaction that is open in that unit.
                For tasks and threads that may outlive what started them. Inside a handler its
                events still name that delivery as their cause, and count in `max_depth`.
            background: The block does not wait for handlers. The tasks of the application's
                lifespan, which `EventContextMiddleware` starts on this event loop, deliver the
                events, as they do for requests: at most `concurrency` units at once, and at
                shutdown before the application closes its resources. The exit is no checkpoint
                then, and a cancellation that comes later does not reach the handlers. The exit
                waits all the same where no lifespan is running, and in a request or a websocket
                of an in-process client. A savepoint hands its events to the unit around it, which
                decides when they are delivered: there it has no effect.
        """
        unit = Unit(self._state)
        if independent:
            unit.independent = True
        if background:
            unit.background = True
        return EventContext(unit)

    def current_context(self) -> EventContext:
        """The active unit of work of this bus.

        Raises:
            NoEventContextError: There is none; the message says why.
        """
        return context_of(active_unit(self._state))

    def handlers_for(self, event_type: type) -> tuple[Subscription, ...]:
        """The subscriptions that an event of exactly this class reaches, in start order.

        Raises:
            InvalidEventTypeError: `event_type` is not a class.
        """
        check_event_type(event_type)
        return self._registry.resolve(event_type)

    def describe(self) -> list[Wiring]:
        """The whole wiring as plain data, in start order."""
        defaults = {False: self._state.handler_timeout, True: None}  # a thread cannot be stopped
        return [
            Wiring(
                event_type=type_name(subscription.event_type),
                handler=subscription.name,
                location=subscription.location,
                subscribed_at=subscription.subscribed_at,
                thread=subscription.thread,
                timeout=defaults[subscription.thread]
                if subscription.timeout is ...
                else subscription.timeout,
                durable=subscription.durable is not None,
            )
            for subscription in self._registry
        ]

    def explain(self, event_type: type) -> str:
        """Which handlers an event of exactly this class reaches, and why, as text to read.

        For each one, in start order: where it is defined and subscribed, through which class it
        gets the event, whether it runs on the event loop or in a thread, and for how long. Then
        what might have been meant: handlers of subclasses, and of other classes with its name.

            print(bus.explain(OrderPaid))

        Raises:
            InvalidEventTypeError: `event_type` is not a class.
        """
        reached = self.handlers_for(event_type)
        return explain(event_type, reached, [*self._registry], self._state)

    def observe(self, observer: Observer) -> Observation:
        """Have an observer told what happens from now on.

        Returns:
            A handle whose `detach()` ends it; also a context manager.

        Raises:
            TypeError: It is not an instance of `Observer`.
        """
        if not isinstance(observer, Observer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"observe() takes an instance of eventkit.Observer, not {observer!r}")
        state = self._state
        with state.tally.lock:
            state.observers = Audience((*state.observers.everyone, observer))
        return Observation(partial(self._detach, observer))

    def _detach(self, observer: Observer) -> None:
        state = self._state
        with state.tally.lock:
            left = [*state.observers.everyone]
            del left[[*map(id, left)].index(id(observer))]
            state.observers = Audience(tuple(left))

    def _log_unhandled(self, event_type: type) -> None:
        """Say once that nobody handles events of this type, and which other buses would."""
        others = (other() for other in _buses.valuerefs())
        names = dict.fromkeys(  # buses may have one name
            other.name for other in others if other is not None and _handles(other, event_type)
        )
        handled_by = ", ".join(f"another bus {name!r}" for name in names)
        log(
            logging.WARNING if self._state.debug else logging.INFO,
            "nobody handles these events",
            event_type=type_name(event_type),
            bus=self.name,
            error=None,
            **({"handled_by": handled_by} if handled_by else {}),
        )

    def __repr__(self) -> str:
        subscribed = sum(1 for _ in self._registry)
        return f"<EventBus {self.name!r}, {subscribed} subscriptions, {self.stats.pending} pending>"


def _fastapi_resolver() -> Resolver:
    """FastAPI's, which is not imported before a handler needs it."""
    from eventkit._core.depends import FastAPIResolver

    return FastAPIResolver()


def all_buses() -> list[EventBus]:
    """Those of this process, in the order in which they were made, for the command."""
    return [bus for each in _buses.valuerefs() if (bus := each()) is not None]


def registry_of(bus: EventBus) -> Registry:
    """Who is subscribed to the bus, for the testing kit."""
    return bus._registry  # noqa: SLF001 - the one door to it


def _handles(bus: EventBus, event_type: type) -> bool:
    """Whether the bus has a handler of it, other than one for every event."""
    return any(each.event_type is not object for each in registry_of(bus).resolve(event_type))


def _debugging() -> bool:
    """Whether this is `python -X dev`, or pytest is running, which says so since 8.2."""
    return sys.flags.dev_mode or "PYTEST_VERSION" in os.environ


def state_of(bus: EventBus) -> BusState:
    """What the bus's units of work share, for the modules above."""
    return bus._state  # noqa: SLF001 - the one door to it
