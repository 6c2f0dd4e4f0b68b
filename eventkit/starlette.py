"""Owns the ASGI middleware: one unit of work per request, ended after the response.

Knows nothing of FastAPI and of databases: an app is anything that speaks ASGI.
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
_MAX_LAYERS = 100  # of middleware around an app, which may lead back to themselves
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, section 9.2.1

_WEBSOCKET = (
    "a websocket has no event context of its own, because it would be open for hours. Open one "
    "per message: `async with bus.context():`, or `bus.context(background=True)` to go on while "
    "its handlers run"
)
_LIFESPAN = (
    "start-up and shutdown code belongs to no request. Open a unit of work: "
    "`async with bus.context():`"
)


_NO_STATE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended, for `deliver_if` to judge.

    Attributes:
        scope: The request's ASGI scope.
        status: The HTTP status that was sent; None if the response was never started.
        body_complete: Whether the last part of the body was handed to the server. False where
            the client left before.
        exception: What the app raised. None for a client that left.
    """

    scope: MutableMapping[str, Any]  # as ASGI defines it
    status: int | None
    body_complete: bool
    exception: BaseException | None


def succeeded(outcome: Outcome) -> bool:
    """The default of `deliver_if`: no exception, and a status below 400.

    A client that leaves early does not make its request fail.
    """
    return _is_success(outcome.status, outcome.exception)


def _is_success(status: int | None, error: BaseException | None) -> bool:
    return error is None and status is not None and status < 400


class EventContextMiddleware:
    """Gives each HTTP request an event context, and delivers its events after the response.

        app.add_middleware(EventContextMiddleware, bus=bus)

    When the inner app has returned, so after the last part of the body, after `BackgroundTasks`
    and after the exit of request-scoped `yield` dependencies, what was published is delivered if
    the request succeeded, and discarded if not. Events that were released before, or published
    `even_on_failure`, are delivered in any case. No handler's failure reaches the server.

    Delivery happens in tasks that belong to the application's lifespan, which the middleware
    joins by itself: no request waits for handlers, and at shutdown the lifespan is held until
    they are done or `shutdown_timeout` is over, before the application closes its resources.
    Where no lifespan is running (a bare `TestClient(app)`, httpx's `ASGITransport`, a mounted
    app), and for in-process clients in any case, the request delivers its events itself before
    its ASGI call returns, shielded from cancellation scopes, for at most `shutdown_timeout`.
    What a deadline ends is counted, logged and told to observers as undelivered.

    A request inside another one of the same bus (a mounted app with the same middleware) shares
    its context. An application that has the middleware twice for one bus does not start up if
    their options differ. Websockets have none: open one per message with
    `async with bus.context():`, or with `bus.context(background=True)`, which leaves delivery to
    the lifespan's tasks, too.

    Args:
        app: The ASGI app inside.
        bus: The bus whose events belong to requests. For several, add the middleware for each.
        deliver_if: Judges the outcome of a request whose events nobody has released or discarded
            before. One that raises, or returns an awaitable or a generator, counts as False and is
            logged.
        concurrency: How many requests' events are delivered at once in the background. Handlers
            that each hold a database connection need `concurrency` x handlers per event of them,
            beside those of the requests themselves.
        max_pending: When this many deliveries wait for the background, new requests with unsafe
            methods are held before the app sees them; None for no limit.
        overload_timeout: Seconds that they are held for, before they are answered 503 with
            `Retry-After` and JSON, `{"detail": ...}`.
        shutdown_timeout: Seconds that deliveries may go on at shutdown, and that a request may
            take to deliver its events itself.
        background: Whether requests leave delivery to the lifespan's tasks: True and False say
            so for all; None leaves it to them but for in-process clients, which are told from
            servers by a scope without `asgi.spec_version`.

    Raises:
        TypeError: `bus` is not an `EventBus`, or `deliver_if` is a class or no plain function.
        ValueError: A number is out of range; at start-up: the application has another one for the
            same bus with other options.
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
                f"deliver_if takes a plain function from an Outcome to a bool, not {deliver_if!r}"
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
        self._origin = Origin(None, _NO_STATE)  # of the last request that no lifespan surrounded
        # By event loop, for a module-level app may be served by several, in several threads: each
        # changes its own entry alone. Of several on one loop the last to begin is the last.
        self._lifespans: dict[object, list[tuple[Drainer, Origin]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope, as ASGI defines it."""
        if scope["type"] != "http":
            await self._serve_other(scope, receive, send)
            return
        # Joined by this mark alone: context variables of tests and servers leak into requests.
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
            drainer, origin = self._surroundings(scope, loop)  # it may have been closed meanwhile
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
        except GeneratorExit:  # closed from outside: nothing can be awaited any more
            self._abandon(unit, drainer)
            raise
        except BaseException as error:
            await self._end(unit, drainer, self._judge(scope, response, error))
            raise
        status = response.status
        if drainer is None or status is None or self._deliver_if is not succeeded:
            await self._end(unit, drainer, self._judge(scope, response, None))
        else:  # so it is for nearly all requests: what `_judge` and `_end` would do
            drainer.submit(unit, success=status < 400)

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._serve_lifespan(scope, receive, send)
            return
        marks = scope.get(_SCOPE_KEY, {})
        drainer, origin = self._surroundings(scope, current_loop())
        waits = None if self.bus in marks else drainer is None  # an instance outside has said so
        scope[_SCOPE_KEY] = {**marks, self.bus: None}  # a websocket has a bus all the same
        with outside(self._state, _WEBSOCKET, origin, waits=waits):
            await self.app(scope, receive, send)

    def _surroundings(self, scope: Scope, loop: object) -> tuple[Drainer | None, Origin]:
        """Who delivers the request's events, None where it does so itself, and where it came in."""
        lifespans = self._lifespans.get(loop)
        if lifespans is None:
            return None, self._origin_of(scope)
        drainer, origin = lifespans[-1]  # one for all requests, that they need not have their own
        background = self._background
        if background is None:
            background = "spec_version" in scope.get("asgi", {})
        return drainer if background and not drainer.closed else None, origin

    def _origin_of(self, scope: Scope) -> Origin:
        """Where it came in; requests that bring no state share one, for as long as it is alike."""
        app, state, origin = scope.get("app"), scope.get("state"), self._origin
        if app is None or app is not origin.app:  # to look takes as long as all else here
            app = self._app_of(scope)
        if state:
            return Origin(app, dict(state))
        if app is not origin.app:
            self._origin = origin = Origin(app, _NO_STATE)
        return origin

    def _app_of(self, scope: Scope) -> Starlette | None:
        """The application around the middleware, or inside where it was wrapped by hand."""
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
        """Hold an unsafe request while too many deliveries wait; False if they still do."""
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
        if outer is not self:  # which has such tasks
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
                    state.remove_host(host)  # units that end later deliver their events themselves
                    if service is not None:
                        await service.leave()
                    await host.entrance.close(deadline - current_time())

            state.add_host(host)
            try:
                with self._running(drainer, origin), outside(state, _LIFESPAN, origin):
                    await lifespan.run(self.app, scope, ready=begin, stopping=close)
            finally:
                await close()  # where no shutdown came: the app has ended, or was cancelled
            if drainer.stuck:  # the group waits for these handlers, and the server need not
                await lifespan.bid_farewell()
        await lifespan.end()

    async def _begin_service(self, host: Host, tasks: TaskGroup) -> Service | None:
        """Have an outbox run what is due, if the bus has one.

        Not before the application has started up: handlers need what it opens, and it may be what
        makes the tables, the outbox, or the subscriptions.
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
        """Requests of this event loop find the lifespan during the block."""
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
        """Whether the request succeeded, given what the app raised."""
        if response.losses:
            error = response.without_losses(error)
        if self._deliver_if is succeeded:  # and needs no `Outcome` to say so
            return _is_success(response.status, error)
        try:
            outcome = Outcome(scope, response.status, response.body_complete, error)
            answer = self._deliver_if(outcome)
            if left_undone := _left_undone(answer):
                if inspect.iscoroutine(answer):
                    answer.close()  # or Python warns that nobody has awaited it
                raise TypeError(
                    f"deliver_if returned {answer!r}, which nobody {left_undone}: have it return "
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
        """Log the wiring once, when the application is ready or the first request comes."""
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
    """Warns when half as many deliveries wait as may, and when requests are held for too many.

    Once each in an episode, which is over when less than a quarter as many wait.
    """

    __slots__ = ("_concurrency", "_max_pending", "_said_half", "_said_held", "_state")

    def __init__(self, state: BusState, concurrency: int, max_pending: int | None) -> None:
        self._state = state
        self._concurrency = concurrency
        self._max_pending = math.inf if max_pending is None else max_pending
        self._said_half = self._said_held = False

    def __call__(self, waiting: int, held: bool) -> None:
        """Be told how many deliveries wait, and whether a request begins to wait for room."""
        if waiting * 4 < self._max_pending:
            self._said_half = self._said_held = False
        elif held and not self._said_held:
            self._said_half = self._said_held = True
            self._warn(
                "too many deliveries wait, so new requests are held and then answered 503", waiting
            )
        elif not self._said_half and self._max_pending <= waiting * 2 < self._max_pending * 2:
            self._said_half = True
            self._warn("half as many deliveries wait as may", waiting)

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
        """The handler that most of what runs now belongs to: a slow one is found running."""
        running = sorted(self._state.tally.running(), key=lambda delivery: delivery.published_at)
        counted = Counter(delivery.handler for delivery in running).most_common(1)
        return counted[0][0] if counted else "none has begun"


def _gives_no_bool(function: Callable[..., object]) -> bool:
    """Whether a call gives an object that is true in any case: one to be awaited, for example."""
    return (
        inspect.isclass(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
        or inspect.isgeneratorfunction(function)
    )


def _left_undone(answer: object) -> str | None:
    """What nobody does with an answer that is true in any case; None for other answers."""
    if inspect.isawaitable(answer):
        return "awaits"
    return "iterates" if inspect.isgenerator(answer) or inspect.isasyncgen(answer) else None


def _still_open(marks: Mapping[EventBus, Unit]) -> dict[EventBus, Unit]:
    return {bus: unit for bus, unit in marks.items() if not unit.closed}


def _added_twice(outer: EventContextMiddleware, inner: EventContextMiddleware) -> ValueError:
    """What is wrong with two middlewares for one bus that have other options."""
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
        f"{inner.bus.name!r}, with other options: {', '.join(differences)}. Remove one of the two"
    )


def _shown(option: object) -> str:
    return name_of(option) if callable(option) else repr(option)


async def _refuse_to_start(receive: Receive, send: Send, error: Exception) -> NoReturn:
    """Tell the server why, as ASGI defines it: an app that only raises might have no lifespan."""
    await receive()
    await send({"type": "lifespan.startup.failed", "message": str(error)})
    raise error
