"""Owns `EventBus`: the object with which users subscribe, publish, dispatch and observe."""

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

# All buses of the process, by their id. A bus leaves this mapping when nothing else refers to it.
_buses: WeakValueDictionary[int, EventBus] = WeakValueDictionary()


class Wiring(TypedDict):
    """One subscription as plain data: an entry in the result of `EventBus.describe`.

        for each in bus.describe():
            print(each["event_type"], "->", each["handler"])

    Attributes:
        event_type: Name of the event class, with its module.
        handler: Name of the handler.
        location: Place where the handler is defined, as `file:line`.
        subscribed_at: Place where the handler was subscribed, as `file:line`.
        thread: Whether the handler starts in a worker thread.
        timeout: Time limit of one delivery in a drain, in seconds; None for no limit.
        durable: Whether an outbox stores the deliveries until they are done.
    """

    event_type: str
    handler: str
    location: str
    subscribed_at: str
    thread: bool
    timeout: float | None
    durable: bool


class EventBus(Subscribing, Aliased):
    """Connects events to handlers: subscribe handlers, publish events, observe deliveries.

        bus = EventBus()

        @bus.on(UserCreated)
        async def greet(event: UserCreated) -> None: ...

        async with bus.context():          # in a web application the middleware does this
            bus.publish(UserCreated(1))    # delivered when the block ends without an exception

    A bus is not bound to an event loop. One bus at module level serves any number of loops, one
    after the other or at the same time. Subscribing, publishing and reading are thread-safe.

    A process may be forked at any moment, also while other threads publish. The child process has
    the subscriptions and the counters of that moment. Events that other threads had published stay
    pending in the child. Only the parent process delivers these events.

    Args:
        name: Name of the bus in logs and messages.
        sequential: If True, the handlers of one event run one after the other. By default they run
            at the same time.
        handler_timeout: Time limit of a handler in a drain, in seconds; None for no limit. The time
            starts when all handlers of the event have begun. A `timeout=` of the subscription
            replaces it. A plain `def` in a thread has no limit, and `dispatch` sets none.
        max_events: How many events may wait in one event context. Events without a handler do not
            count.
        max_depth: Greatest depth of an event. An event that no handler published has the depth 0.
            An event that a handler publishes is one deeper than the handler's own event.
        resolver: Gives handlers their dependencies. By default FastAPI's `Depends` does; FastAPI
            is imported when the first handler with dependencies is subscribed.
        debug: Turns on three aids for development. (1) `Delivery.published_from`, and the note on
            a failure, say where the event was published; for this, each `publish` looks for its
            caller. (2) The log line about events that nobody handles is a warning. (3) The steps
            of handlers on the event loop are timed, and the log names a handler that blocks the
            loop, once. By default, all three are on under `python -X dev`, and (1) and (2) under
            pytest.

    Raises:
        TypeError: `resolver` is not a `Resolver`.
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
        # Not under pytest: tests run handlers exactly as in production, and may stop the clock.
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
        # By place (`file:line`): the first subscription made there inside a unit of work, and the
        # unit. None once the warning was written.
        self._made_in_units: dict[str, tuple[Subscription, ref[Unit]] | None] = {}
        _buses[id(self)] = self

    @property
    def name(self) -> str:
        """Name of the bus in logs and messages."""
        return self._state.name

    @property
    def report_failure(self) -> Callable[[Delivery, Exception], None]:
        """Callable that reports each failure of a handler that no code awaits.

        It gets the delivery and the exception, in the task of the failed handler. By default it
        writes a line to the log. Assign another callable to replace it. An exception that the
        callable raises is logged.
        """
        return self._state.report_failure

    @report_failure.setter
    def report_failure(self, report: Callable[[Delivery, Exception], None]) -> None:
        self._state.report_failure = report

    @property
    def stats(self) -> Stats:
        """The counters of this bus at this moment. Reading them is thread-safe."""
        return self._state.tally.snapshot()

    @overload
    def subscribe(  # for type checkers: lets them infer the parameter of a lambda
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
        """Subscribe a handler to events of this type and of its subclasses.

        Args:
            event_type: A class; `object` for every event.
            handler: A callable that takes the event, and its dependencies as keyword arguments: an
                `async def`, a plain `def` (runs in a worker thread), a method, a partial, or an
                object with `__call__`.
            name: A stable name of the handler. By default it is `module:qualname`.
            timeout: Time limit of one delivery, in seconds; None for no limit. By default the
                bus's `handler_timeout` applies in drains.
            thread: True starts the call in a worker thread, False on the event loop. By default a
                plain `def` starts in a thread, and everything async on the event loop.
            durable: Whether a table stores the deliveries until they are done, so that a crash
                loses none. `Durable(...)` also says how often a delivery is tried. Needs an
                `eventkit.outbox.Outbox`. The handler may run twice for one event: use
                `complete_with(session)` for your own rows, and `current_delivery().id` as the
                idempotency key for other systems. Every process that publishes the event must
                subscribe the handler, too.

        Returns:
            The subscription. `cancel()` ends it. Used as a context manager, it ends with the block.

        Raises:
            InvalidEventTypeError: `event_type` is not a class.
            InvalidHandlerError: The handler takes no event, or has a parameter that nothing
                provides.
            DuplicateSubscriptionError: The handler is subscribed to this type already.
            DuplicateNameError: Another handler has this name.
        """
        declaration = declare(
            event_type, handler, name=name, timeout=timeout, thread=thread, durable=durable
        )
        return self._add([declaration])[0]

    def include(self, router: EventRouter) -> None:
        """Subscribe all handlers of a router. If this raises, none is subscribed.

        Args:
            router: The router. Afterwards no handler can be declared on it.

        Raises:
            DuplicateSubscriptionError: One of the handlers is subscribed already.
            InvalidHandlerError: One of the handlers has a parameter that nothing provides.
            DuplicateNameError: Another handler has the name of one of the handlers.
        """
        include_into(self, router)

    def _add(self, declarations: Sequence[Declaration]) -> list[Subscription]:
        if self._state.keeper is not None:
            self._state.keeper.admit(declarations)
        made = self._registry.add(declarations)
        unit = surrounding()
        if unit is not None:  # rare: most handlers are subscribed at import or start-up
            for subscription in made:
                self._watch(subscription, unit)
        return made

    def _watch(self, subscription: Subscription, unit: Unit) -> None:
        """Warn once about a line of code that subscribes in each unit of work and never cancels."""
        place = subscription.subscribed_at
        before = self._made_in_units.setdefault(place, (subscription, ref(unit)))
        if before is None:  # the warning was written already
            return
        earlier, its_unit = before
        if not earlier.active:
            self._made_in_units[place] = (subscription, ref(unit))
        elif (of_earlier := its_unit()) is None or of_earlier.closed:
            self._made_in_units[place] = None
            log(
                logging.WARNING,
                "one place subscribes in each unit of work, and never cancels",
                subscribed_at=place,
                handler=subscription.name,
                event_type=type_name(subscription.event_type),
                bus=self.name,
            )

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        """Publish events: their handlers run when the unit of work has succeeded.

        The events wait in the active event context, in order. `publish` returns at once: it never
        blocks, and it is not a checkpoint. It is thread-safe. The handlers are looked up now. They
        will run with the context variables of this moment. Either all events are accepted, or an
        error is raised and none is accepted.

        Args:
            events: Instances of any class. An event without a handler is counted and dropped.
            even_on_failure: If True, the events are delivered also if the unit of work fails. An
                example is a `LoginFailed` in a request that is answered with 401.

        Raises:
            NoEventContextError: No event context of this bus is active here. The message says why.
            EventContextClosedError: The event context has ended.
            EventContextFullError: More than `max_events` events would wait in the event context.
            EventDepthError: The event would be deeper than `max_depth`.
            EventEncodingError: The event has a durable handler and cannot be stored.
            InvalidEventTypeError: A class was given instead of an instance. Or the object has no
                handler and is not an event: a list of events, a name, a `dict`, None.
        """
        active_unit(self._state).publish(events, even_on_failure)

    async def dispatch(self, event: object) -> None:
        """Run the handlers of an event now, and wait for them and for the events they publish.

            try:
                await bus.dispatch(OrderPaid(7))
            except DispatchError as failed:
                print(failed.exceptions)  # each exception has a note that names its handler

        A dispatch is a unit of work of its own: events that it delivered stay delivered if an outer
        unit of work fails. Do not dispatch inside an open transaction, because the handlers' own
        sessions cannot see its changes. Publish there instead.

        The only time limits are those of the subscriptions (`timeout=`). Cancelling the call
        cancels the handlers, for example by a timeout around the call. The call is not a checkpoint
        if the event has no handler, or if no handler waits.

        All handlers of an event run at the same time. A handler costs a task only if it waits. The
        handlers up to the first one that waits begin in the calling task, and share its identity.
        Handlers of the events that they publish may begin in any of these tasks. asyncio's own
        `Task.cancel()` on the calling task reaches one waiting handler, also through a shield. The
        page "How dispatch works" explains this: https://fastapi-eventkit.readthedocs.io/dispatch/.

        Args:
            event: An instance of any class.

        Raises:
            DispatchError: Handlers failed. The group has every failure.
            EventDepthError: A handler dispatches, and the event would be deeper than `max_depth`.
            InvalidEventTypeError: A class was given instead of an instance. Or the object has no
                handler and is not an event: a list of events, a name, a `dict`, None.
        """
        dispatching = dispatch(self._state, event)
        del event  # otherwise a traceback with local variables would show the payload
        failures = await dispatching
        try:
            if failures:
                raise together(failures)
        finally:
            failures.clear()  # otherwise this frame and the tracebacks keep each other alive

    def context(self, *, independent: bool = False, background: bool = False) -> EventContext:
        """Create an event context for `async with`, or for `with` in synchronous jobs.

        It is for code outside of requests, such as jobs, scripts and websocket messages. The end of
        the block delivers the events, and waits until their handlers have ended. An exception in
        the block discards the events. If the block is cancelled while handlers run, the handlers
        are cancelled. Their deliveries are undelivered, and so are those that have not started.
        Inside another context of this bus the block works like a savepoint: see `EventContext`.

        `with` is for threads that have no event loop. The handlers run on the first loop in this
        list that exists:

        1. the loop that the thread works for, in a worker thread of AnyIO or trio;
        2. the loop of the unit of work in the thread's context variables;
        3. the loop of a running application whose middleware has this bus;
        4. an asyncio loop that the process keeps for such blocks.

        The block waits for that loop. So code on the loop must not block until the thread has
        ended.

        Args:
            independent: If True, the context is not a savepoint. The unit of work around it, and a
                transaction that is open in that unit, neither deliver nor discard its events. Use
                it in tasks and threads that may outlive the code that started them. Inside a
                handler, its events still have that delivery as their cause, and count in
                `max_depth`.
            background: If True, the end of the block does not wait for handlers. The events are
                delivered as those of requests are: by the tasks that `EventContextMiddleware` runs
                in the application's lifespan on this event loop. At most `concurrency` units are
                delivered at once, and at shutdown they are delivered before the application closes
                its resources. Then the end of the block is not a checkpoint, and a later
                cancellation does not reach the handlers. The block still waits where no lifespan
                is running, and in a request or websocket of an in-process client. In a savepoint
                `background` has no effect: the outer unit decides when events are delivered.

        Returns:
            The context. It is open inside the block.
        """
        unit = Unit(self._state)
        if independent:
            unit.independent = True
        if background:
            unit.background = True
        return EventContext(unit)

    def current_context(self) -> EventContext:
        """Return the active event context of this bus.

        Raises:
            NoEventContextError: No event context is active here. The message says why.
        """
        return context_of(active_unit(self._state))

    def handlers_for(self, event_type: type) -> tuple[Subscription, ...]:
        """Return the subscriptions that an event of exactly this class reaches, in start order.

        Args:
            event_type: The class of the event.

        Raises:
            InvalidEventTypeError: `event_type` is not a class.
        """
        check_event_type(event_type)
        return self._registry.resolve(event_type)

    def describe(self) -> list[Wiring]:
        """Return all subscriptions as plain data, in start order."""
        # By `thread`: a thread cannot be stopped, so it has no limit.
        defaults = {False: self._state.handler_timeout, True: None}
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
        """Explain which handlers an event of exactly this class reaches, and why.

            print(bus.explain(OrderPaid))

        The text lists the handlers in start order. For each handler it says: where the handler is
        defined and subscribed, through which class it gets the event, whether it runs on the event
        loop or in a thread, and its time limit. The text also lists handlers that were perhaps
        meant: those of subclasses, and of other classes with the same name.

        Args:
            event_type: The class of the event.

        Raises:
            InvalidEventTypeError: `event_type` is not a class.
        """
        reached = self.handlers_for(event_type)
        return explain(event_type, reached, [*self._registry], self._state)

    def observe(self, observer: Observer) -> Observation:
        """Call the hooks of an observer from now on. Thread-safe.

        Args:
            observer: An instance of a subclass of `Observer`.

        Returns:
            A handle with a method `detach()` that ends the observation. Used as a context manager,
            it ends with the block.

        Raises:
            TypeError: `observer` is not an instance of `Observer`.
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
        """Log once that no handler takes events of this type, and name the buses that have one."""
        others = (other() for other in _buses.valuerefs())
        names = dict.fromkeys(  # several buses may have the same name
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
    """The resolver for FastAPI. FastAPI is imported here, when a handler needs it."""
    from eventkit._core.depends import FastAPIResolver

    return FastAPIResolver()


def all_buses() -> list[EventBus]:
    """The buses of this process, in the order in which they were created; for the command line."""
    return [bus for each in _buses.valuerefs() if (bus := each()) is not None]


def registry_of(bus: EventBus) -> Registry:
    """The subscriptions of the bus, for the testing kit."""
    return bus._registry  # noqa: SLF001 - the only access from other modules


def _handles(bus: EventBus, event_type: type) -> bool:
    """Whether the bus has a handler for this type that is not subscribed to `object`."""
    return any(each.event_type is not object for each in registry_of(bus).resolve(event_type))


def _debugging() -> bool:
    """Whether Python runs with `-X dev`, or under pytest (8.2 or later sets this variable)."""
    return sys.flags.dev_mode or "PYTEST_VERSION" in os.environ


def state_of(bus: EventBus) -> BusState:
    """The state that all units of work of the bus share, for the modules above the core."""
    return bus._state  # noqa: SLF001 - the only access from other modules
