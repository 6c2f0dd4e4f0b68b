"""The ASGI middleware: one unit of work for each request, delivered after the response.

It works with every ASGI application, also without Starlette or FastAPI. It knows no databases.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from anyio import create_task_group, current_time, move_on_after
from anyio.abc import TaskGroup
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit._core.ambient import outside
from eventkit._core.asgi import Lifespan, Origin, WatchedResponse
from eventkit._core.bus import EventBus, state_of
from eventkit._core.drainer import Drainer
from eventkit._core.endings import abandon, finish
from eventkit._core.handlers import is_duration, layers, name_of
from eventkit._core.log import log
from eventkit._core.loops.running import current_loop
from eventkit._core.loops.threads import Entrance
from eventkit._core.state import BusState, Host, Service
from eventkit._core.units import Unit
from eventkit.exceptions import NoOutboxError

__all__ = ["EventContextMiddleware", "Origin", "Outcome", "succeeded"]

_SCOPE_KEY = "eventkit"
_MAX_LAYERS = 100  # longest chain of middlewares that is followed: a chain may be a cycle
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, section 9.2.1

_WEBSOCKET = (
    "a websocket has no event context of its own, because it would be open for hours. Open one for "
    "each message: `async with bus.context():`, or `async with bus.context(background=True):` if "
    "the websocket must not wait for the handlers"
)
_LIFESPAN = (
    "code at start-up and shutdown belongs to no request. Open a unit of work: "
    "`async with bus.context():`"
)


_NO_STATE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request has ended: the argument of `deliver_if`.

        def deliver_if(outcome: Outcome) -> bool:
            return succeeded(outcome) or outcome.status == 409

    Attributes:
        scope: The ASGI scope of the request.
        status: The HTTP status that was sent; None if the response was never started.
        body_complete: Whether the last part of the body was given to the server. False if the
            client disconnected before.
        exception: The exception that the app raised. None if the client has disconnected.
    """

    scope: MutableMapping[str, Any]  # as ASGI defines it
    status: int | None
    body_complete: bool
    exception: BaseException | None


def succeeded(outcome: Outcome) -> bool:
    """Return whether the app raised no exception and the status is below 400.

    This is the default of `deliver_if`. A client that disconnects early does not make its request
    fail.

    Args:
        outcome: How the request has ended.
    """
    return _is_success(outcome.status, outcome.exception)


def _is_success(status: int | None, error: BaseException | None) -> bool:
    return error is None and status is not None and status < 400


class EventContextMiddleware:
    """Gives each HTTP request an event context, and delivers its events after the response.

        app.add_middleware(EventContextMiddleware, bus=bus)

    The events of a request are delivered if the request succeeded, and discarded if it failed. This
    is decided when the inner app has returned: after the last part of the body, after
    `BackgroundTasks`, and after the exit of `yield` dependencies with request scope. Events that
    were released before, or published with `even_on_failure`, are delivered in any case. A failure
    of a handler never reaches the server.

    Tasks in the application's lifespan deliver the events, so no request waits for handlers. The
    middleware starts these tasks by itself. At shutdown, the application closes its resources only
    when these deliveries are done, or when `shutdown_timeout` is over.

    A request delivers its events itself if no lifespan is running (a `TestClient(app)` without
    `with`, httpx's `ASGITransport`, a mounted app), and always for in-process clients. Then its
    ASGI call returns after the deliveries, at most `shutdown_timeout` later. Cancel scopes around
    the request do not cancel the deliveries. Deliveries that a deadline ends are undelivered: they
    are counted and logged, and observers see them.

    A request inside another request of the same bus shares its context, for example in a mounted
    app with the same middleware. If an application has the middleware twice for one bus, with
    different options, it does not start. Websockets have no context: open one for each message,
    with `async with bus.context():`. With `bus.context(background=True)` the tasks of the lifespan
    deliver its events, too.

    Args:
        app: The inner ASGI app. `add_middleware` passes it.
        bus: The bus that gets a context for each request. For several buses, add the middleware
            once for each bus.
        deliver_if: Function that gets the outcome of a request, and returns whether the request
            succeeded. It decides about the events that were not released or discarded before. If it
            raises, or returns an awaitable or a generator, that is logged and counts as False.
        concurrency: How many requests' events are delivered at once in the background. If each
            handler holds a database connection, the handlers need up to `concurrency` x handlers
            of one event connections, in addition to those of the requests.
        max_pending: When this many deliveries wait in the background, new requests with unsafe
            methods (such as POST) are held back before the app sees them; None for no limit.
        overload_timeout: How long a request is held back, in seconds. Then it is answered 503 with
            `Retry-After` and the JSON `{"detail": ...}`.
        shutdown_timeout: How long deliveries may go on at shutdown, in seconds, and how long a
            request may take to deliver its events itself.
        background: True: all requests leave the delivery to the tasks of the lifespan. False: all
            requests deliver their events themselves. None: only requests of in-process clients
            deliver their events themselves; their ASGI scope has no `asgi.spec_version`.

    Raises:
        TypeError: `bus` is not an `EventBus`, or `deliver_if` is not a plain function.
        ValueError: A number is out of range. Or, at start-up: the application has a second
            middleware for the same bus, with different options.
    """

    def __init__(
        self,
        app: ASGIApp,
        bus: EventBus,
        *,
        deliver_if: Callable[[Outcome], bool] = succeeded,
        concurrency: int = 4,
        max_pending: int | None = 10_000,
        overload_timeout: float = 5.0,
        shutdown_timeout: float = 20.0,
        background: bool | None = None,
    ) -> None:
        if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"EventContextMiddleware needs an EventBus, not {bus!r}: "
                "app.add_middleware(EventContextMiddleware, bus=bus)"
            )
        called = layers(deliver_if, wrapped=False)
        if any(map(_gives_no_bool, called)) or not callable(deliver_if):
            raise TypeError(
                "deliver_if takes a plain function that gets an Outcome and returns a bool, not "
                f"{deliver_if!r}"
            )
        for name, seconds in (
            ("overload_timeout", overload_timeout),
            ("shutdown_timeout", shutdown_timeout),
        ):
            if not is_duration(seconds):
                raise ValueError(f"{name} takes seconds above 0, not {seconds!r}")
        if concurrency < 1 or (max_pending is not None and max_pending < 1):
            raise ValueError(
                "concurrency and max_pending are at least 1, not "
                f"{concurrency!r} and {max_pending!r}"
            )
        self.app = app
        self.bus = bus
        self._state = state_of(bus)
        self._options: Mapping[str, object] = {
            "deliver_if": deliver_if,
            "concurrency": concurrency,
            "max_pending": max_pending,
            "overload_timeout": overload_timeout,
            "shutdown_timeout": shutdown_timeout,
            "background": background,
        }
        self._deliver_if = deliver_if
        self._concurrency = concurrency
        self._max_pending = max_pending
        self._overload_timeout = overload_timeout
        self._shutdown_timeout = shutdown_timeout
        self._background = background
        self._announced = False
        self._origin = Origin(None, _NO_STATE)  # of the last request outside of all lifespans
        # By event loop. Several loops, in several threads, may serve one application at module
        # level: each loop changes only its own entry. The last lifespan of a loop began last.
        self._lifespans: dict[object, list[tuple[Drainer, Origin]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope, as ASGI defines it."""
        if scope["type"] != "http":
            await self._serve_other(scope, receive, send)
            return
        # Only this mark joins requests: context variables of tests and servers leak into requests.
        marks: dict[EventBus, Unit] | None = scope.get(_SCOPE_KEY)
        around = _still_open(marks) if marks else {}
        if self.bus in around:
            await self.app(scope, receive, send)
            return
        if not self._announced:
            self._announce()
        loop = current_loop()
        drainer, origin = self._surroundings(scope, loop)
        if drainer is not None and drainer.full:
            if not await self._has_room(drainer, scope):
                await self._refuse(scope, receive, send)
                return
            drainer, origin = self._surroundings(scope, loop)  # the drainer may be closed by now
        unit = Unit(self._state)
        scope[_SCOPE_KEY] = {**around, self.bus: unit}
        response = WatchedResponse(send)
        if self._state.decisions is not None:
            response.started = unit.mark_decided
        if drainer is not None:
            drainer.expect(unit)
        enclosing = next(reversed(around.values())) if around else None
        unit.enter(enclosing, origin, loop=loop, waits=drainer is None)
        try:
            try:
                await self.app(scope, receive, response.send)
            finally:
                unit.leave()
        except GeneratorExit:  # the coroutine is closed, so nothing can be awaited any more
            self._abandon(unit, drainer)
            raise
        except BaseException as error:
            await self._end(unit, drainer, self._judge(scope, response, error))
            raise
        status = response.status
        if drainer is None or status is None or self._deliver_if is not succeeded:
            await self._end(unit, drainer, self._judge(scope, response, None))
        else:  # nearly all requests: the short form of `_judge` and `_end`
            drainer.submit(unit, success=status < 400)

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._serve_lifespan(scope, receive, send)
            return
        marks = scope.get(_SCOPE_KEY, {})
        drainer, origin = self._surroundings(scope, current_loop())
        waits = None if self.bus in marks else drainer is None  # decided by an outer instance
        scope[_SCOPE_KEY] = {**marks, self.bus: None}  # so that `get_bus` finds the bus
        with outside(self._state, _WEBSOCKET, origin, waits=waits):
            await self.app(scope, receive, send)

    def _surroundings(self, scope: Scope, loop: object) -> tuple[Drainer | None, Origin]:
        """The drainer for the request's events, None if it delivers them itself; and its origin."""
        lifespans = self._lifespans.get(loop)
        if lifespans is None:
            return None, self._origin_of(scope)
        drainer, origin = lifespans[-1]  # one origin, shared by all requests
        background = self._background
        if background is None:
            background = "spec_version" in scope.get("asgi", {})
        return drainer if background and not drainer.closed else None, origin

    def _origin_of(self, scope: Scope) -> Origin:
        """The origin of a request outside of a lifespan; requests without state share one."""
        app, state, origin = scope.get("app"), scope.get("state"), self._origin
        if app is None or app is not origin.app:  # `_app_of` costs as much as the rest
            app = self._app_of(scope)
        if state:
            return Origin(app, dict(state))
        if app is not origin.app:
            self._origin = origin = Origin(app, _NO_STATE)
        return origin

    def _app_of(self, scope: Scope) -> Starlette | None:
        """The application around the middleware, or inside it if the app was wrapped by hand."""
        app: object = scope.get("app", self.app)
        for _ in range(_MAX_LAYERS):
            if app is None or isinstance(app, Starlette):
                return app
            app = getattr(app, "app", None)
        return None

    async def _end(self, unit: Unit, drainer: Drainer | None, success: bool) -> None:
        if drainer is not None:
            drainer.submit(unit, success=success)
        elif not unit.close_if_idle(success=success):
            with move_on_after(self._shutdown_timeout, shield=True):
                await finish(unit, self._state.report, self._state.handler_timeout, success=success)

    def _abandon(self, unit: Unit, drainer: Drainer | None) -> None:
        abandon(unit)
        if drainer is not None:
            drainer.forget(unit)

    async def _has_room(self, drainer: Drainer, scope: Scope) -> bool:
        """Hold back an unsafe request while too many deliveries wait; False if they still do."""
        if scope["method"] in _SAFE_METHODS:
            return True
        return await drainer.wait_for_room(self._overload_timeout)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = JSONResponse(
            {"detail": "Too many events wait to be delivered. Try again later."},
            status_code=503,
            headers={"Retry-After": str(math.ceil(self._overload_timeout))},
        )
        await response(scope, receive, send)

    async def _serve_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app's lifespan, and in it the tasks that deliver in the background."""
        marks: dict[EventBus, EventContextMiddleware] = scope.setdefault(_SCOPE_KEY, {})
        outer = marks.setdefault(self.bus, self)
        if outer is not self:  # the outer middleware of this bus already has these tasks
            if self._options != outer._options:  # noqa: SLF001 - an instance of this class
                await _refuse_to_start(receive, send, _added_twice(outer, self))
            await self.app(scope, receive, send)
            return
        lifespan, state = Lifespan(receive, send), self._state
        async with create_task_group() as tasks:
            drainer = Drainer(
                state,
                tasks,
                concurrency=self._concurrency,
                max_pending=self._max_pending,
                watch=_Overload(state, self._concurrency, self._max_pending),
            )
            origin = Origin(self._app_of(scope), scope.get("state", {}))
            host = Host(
                Entrance(), drainer.submit, origin, lambda: drainer.is_crowded, drainer.begin
            )
            service: Service | None = None

            async def begin() -> None:
                nonlocal service
                service = await self._begin_service(host, tasks)
                self._announce()

            async def close() -> None:
                timeout = self._shutdown_timeout
                if service is not None:
                    timeout = timeout if service.patience is None else service.patience
                    service.stop()
                deadline = current_time() + timeout
                try:
                    await drainer.close(timeout)
                finally:
                    state.remove_host(host)  # units that end from now on deliver their own events
                    if service is not None:
                        await service.leave()
                    await host.entrance.close(deadline - current_time())

            state.add_host(host)
            try:
                with self._running(drainer, origin), outside(state, _LIFESPAN, origin):
                    await lifespan.run(self.app, scope, ready=begin, stopping=close)
            finally:
                await close()  # if there was no shutdown: the app has ended, or was cancelled
            if drainer.stuck:  # the task group waits for these handlers; the server must not
                await lifespan.bid_farewell()
        await lifespan.end()

    async def _begin_service(self, host: Host, tasks: TaskGroup) -> Service | None:
        """Start running due deliveries from the outbox, if the bus has one.

        Only after the application has started up: its start-up opens the resources of handlers, and
        may create the tables, the outbox or the subscriptions.
        """
        keeper = self._state.keeper
        if keeper is None:
            self._refuse_what_is_durable()
            return None
        service = keeper.serve(host, tasks, concurrency=self._concurrency)
        await service.start()
        return service

    def _refuse_what_is_durable(self) -> None:
        durable = [entry["handler"] for entry in self.bus.describe() if entry["durable"]]
        consumers = self._state.needs_keeper
        if durable or consumers:
            handlers = [*dict.fromkeys(durable)]
            raise NoOutboxError(self.bus.name, handlers, [*dict.fromkeys(consumers)])

    @contextmanager
    def _running(self, drainer: Drainer, origin: Origin) -> Generator[None]:
        """In the block, requests on this event loop find the lifespan."""
        loop, lifespan = current_loop(), (drainer, origin)
        lifespans = self._lifespans.setdefault(loop, [])
        lifespans.append(lifespan)
        try:
            yield
        finally:
            lifespans.remove(lifespan)
            if not lifespans:
                del self._lifespans[loop]

    def _judge(self, scope: Scope, response: WatchedResponse, error: BaseException | None) -> bool:
        """Whether the request succeeded; `error` is the exception that the app raised."""
        if response.losses:
            error = response.without_losses(error)
        if self._deliver_if is succeeded:  # then no `Outcome` has to be made
            return _is_success(response.status, error)
        try:
            outcome = Outcome(scope, response.status, response.body_complete, error)
            answer = self._deliver_if(outcome)
            if left_undone := _left_undone(answer):
                if inspect.iscoroutine(answer):
                    answer.close()  # otherwise Python warns that it was never awaited
                raise TypeError(
                    f"deliver_if returned {answer!r}, which nobody {left_undone}: it has to return "
                    "a bool"
                )
            return answer
        except Exception as failure:  # noqa: BLE001 - a predicate is user code
            log(
                logging.ERROR,
                "deliver_if failed, so the request's events are discarded",
                error=failure,
                bus=self.bus.name,
            )
            return False

    def _announce(self) -> None:
        """Log the wiring once: when the application is ready, or at the first request."""
        if self._announced:
            return
        self._announced = True
        wiring = self.bus.describe()
        log(
            logging.INFO,
            "eventkit is ready",
            bus=self.bus.name,
            event_types=", ".join(sorted({entry["event_type"] for entry in wiring})),
            handlers=len(wiring),
        )


class _Overload:
    """Warns of overload: when half of `max_pending` deliveries wait, and when requests are held.

    Each warning is logged once. Both may be logged again after less than a quarter of `max_pending`
    deliveries have waited.
    """

    __slots__ = ("_concurrency", "_max_pending", "_said_half", "_said_held", "_state")

    def __init__(self, state: BusState, concurrency: int, max_pending: int | None) -> None:
        self._state = state
        self._concurrency = concurrency
        self._max_pending = math.inf if max_pending is None else max_pending
        self._said_half = self._said_held = False

    def __call__(self, waiting: int, held: bool) -> None:
        """Take how many deliveries wait now, and whether a request begins to wait for room."""
        if waiting * 4 < self._max_pending:
            self._said_half = self._said_held = False
        elif held and not self._said_held:
            self._said_half = self._said_held = True
            self._warn(
                "too many deliveries wait, so new requests are held and then answered 503", waiting
            )
        elif not self._said_half and self._max_pending <= waiting * 2 < self._max_pending * 2:
            self._said_half = True
            self._warn("half of max_pending deliveries wait", waiting)

    def _warn(self, what: str, waiting: int) -> None:
        log(
            logging.WARNING,
            f"{what}: raise concurrency, or make the slowest handler faster",
            bus=self._state.name,
            waiting=waiting,
            max_pending=self._max_pending,
            concurrency=self._concurrency,
            slowest_handler=self._slowest(),
        )

    def _slowest(self) -> str:
        """The handler with the most running deliveries, because a slow handler runs most often."""
        running = sorted(self._state.tally.running(), key=lambda delivery: delivery.published_at)
        counted = Counter(delivery.handler for delivery in running).most_common(1)
        return counted[0][0] if counted else "none has begun"


def _gives_no_bool(function: Callable[..., object]) -> bool:
    """Whether a call returns an object that is always true, such as a coroutine."""
    return (
        inspect.isclass(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
        or inspect.isgeneratorfunction(function)
    )


def _left_undone(answer: object) -> str | None:
    """The verb for the message if the answer is an awaitable or a generator; else None."""
    if inspect.isawaitable(answer):
        return "awaits"
    return "iterates" if inspect.isgenerator(answer) or inspect.isasyncgen(answer) else None


def _still_open(marks: Mapping[EventBus, Unit]) -> dict[EventBus, Unit]:
    return {bus: unit for bus, unit in marks.items() if not unit.closed}


def _added_twice(outer: EventContextMiddleware, inner: EventContextMiddleware) -> ValueError:
    """The error for two middlewares for one bus that have different options."""
    differences = [
        f"{name}={_shown(theirs)} outside and {name}={_shown(ours)} inside"
        for (name, theirs), ours in zip(
            outer._options.items(),  # noqa: SLF001 - for the class above alone
            inner._options.values(),  # noqa: SLF001
            strict=True,
        )
        if theirs != ours
    ]
    return ValueError(
        f"EventContextMiddleware was added twice to one application for the bus "
        f"{inner.bus.name!r}, with different options: {', '.join(differences)}. Remove one of the "
        "two"
    )


def _shown(option: object) -> str:
    return name_of(option) if callable(option) else repr(option)


async def _refuse_to_start(receive: Receive, send: Send, error: Exception) -> NoReturn:
    """Tell the server the reason, then raise the error.

    If an app only raises, a server may think that the app does not support the lifespan protocol.
    """
    await receive()
    await send({"type": "lifespan.startup.failed", "message": str(error)})
    raise error
