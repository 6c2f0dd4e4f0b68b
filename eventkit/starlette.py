"""Owns the ASGI middleware: one unit of work per request, ended after the response.

Knows nothing of FastAPI and of databases: an app is anything that speaks ASGI.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio import create_task_group, move_on_after
from anyio.lowlevel import RunVar
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventkit._bus import EventBus, core_of
from eventkit._context import EventContext, close_if_idle, entered, finish, outside
from eventkit._drainer import Drainer
from eventkit._handlers import is_duration
from eventkit._log import log

__all__ = ["EventContextMiddleware", "Outcome", "succeeded"]

_SCOPE_KEY = "eventkit"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, section 9.2.1

_WEBSOCKET = (
    "a websocket has no event context of its own, because it would be open for hours. Open one "
    "per message: `async with bus.context():`"
)
_LIFESPAN = (
    "start-up and shutdown code belongs to no request. Open a unit of work: "
    "`async with bus.context():`"
)


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
    return outcome.exception is None and outcome.status is not None and outcome.status < 400


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
    its context. Websockets have none: open one per message with `async with bus.context():`.

    Args:
        app: The ASGI app inside.
        bus: The bus whose events belong to requests. For several, add the middleware for each.
        deliver_if: Judges the outcome of a request whose events nobody has released or discarded
            before. One that raises counts as False, and is logged.
        concurrency: How many requests' events are delivered at once in the background. Handlers
            that each hold a database connection need `concurrency` x handlers per event of them,
            beside those of the requests themselves.
        max_pending: When this many deliveries wait for the background, new requests with unsafe
            methods are held before the app sees them; None for no limit.
        overload_timeout: Seconds that they are held for, before they are answered 503 with
            `Retry-After`.
        shutdown_timeout: Seconds that deliveries may go on at shutdown, and that a request may
            take to deliver its events itself.
        background: Whether requests leave delivery to the lifespan's tasks: True and False say
            so for all; None leaves it to them but for in-process clients, which are told from
            servers by a scope without `asgi.spec_version`.

    Raises:
        TypeError: `bus` is not an `EventBus`.
        ValueError: A number is out of range.
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
        self._deliver_if = deliver_if
        self._concurrency = concurrency
        self._max_pending = max_pending
        self._overload_timeout = overload_timeout
        self._shutdown_timeout = shutdown_timeout
        self._background = background
        self._announced = False
        # One per running event loop: a module-level app may be served by several.
        self._drainer: RunVar[Drainer | None] = RunVar("eventkit_drainer", None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope, as ASGI defines it."""
        if scope["type"] == "http":
            self._announce()
            await self._serve_request(scope, receive, send)
        elif scope["type"] == "lifespan":
            with outside(_LIFESPAN):
                await self._serve_lifespan(scope, receive, send)
        else:
            with outside(_WEBSOCKET):
                await self.app(scope, receive, send)

    async def _serve_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Joined by this mark alone: context variables of tests and servers leak into requests.
        contexts: dict[EventBus, EventContext] = scope.get(_SCOPE_KEY, {})
        around = contexts.get(self.bus)
        if around is not None and not around.closed:
            await self.app(scope, receive, send)
            return
        drainer = self._drainer_for(scope)
        if drainer is not None and drainer.full and scope["method"] not in _SAFE_METHODS:
            if not await drainer.wait_for_room(self._overload_timeout):
                await self._refuse(scope, receive, send)
                return
        context = self.bus.context()
        scope[_SCOPE_KEY] = {**contexts, self.bus: context}
        response = _Response(scope, send)
        try:
            with entered(context, next(reversed(contexts.values()), None)):
                await self.app(scope, receive, response.send)
        except BaseException as error:
            await self._end(context, response.outcome(error))
            raise
        await self._end(context, response.outcome(None))

    def _drainer_for(self, scope: Scope) -> Drainer | None:
        """Who delivers the request's events; None where the request does so itself."""
        background = self._background
        if background is None:
            background = "spec_version" in scope.get("asgi", {})
        return self._drainer.get() if background else None

    async def _end(self, context: EventContext, outcome: Outcome) -> None:
        success = self._judge(outcome)
        if close_if_idle(context, success=success):
            return
        drainer = self._drainer_for(outcome.scope)
        if drainer is None:
            with move_on_after(self._shutdown_timeout, shield=True):
                await finish(context, success=success)
        else:
            drainer.submit(context, success=success)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = PlainTextResponse(
            "Too many events wait to be delivered. Try again later.",
            status_code=503,
            headers={"Retry-After": str(math.ceil(self._overload_timeout))},
        )
        await response(scope, receive, send)

    async def _serve_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app's lifespan, and in it the tasks that deliver in the background."""
        failure: Exception | None = None
        async with create_task_group() as tasks:
            drainer = Drainer(
                core_of(self.bus),
                tasks,
                concurrency=self._concurrency,
                max_pending=self._max_pending,
            )
            self._drainer.set(drainer)
            lifespan = _Lifespan(
                receive,
                send,
                ready=self._announce,
                stopping=partial(drainer.close, self._shutdown_timeout),
            )
            try:
                with outside(_LIFESPAN):
                    await lifespan.run(self.app, scope)
            except Exception as error:  # noqa: BLE001 - the task group would wrap it
                failure = error
            finally:
                self._drainer.set(None)
        await lifespan.say_farewell()
        if failure is not None:
            raise failure

    def _judge(self, outcome: Outcome) -> bool:
        try:
            return self._deliver_if(outcome)
        except Exception as error:  # noqa: BLE001 - a predicate is user code
            log(
                logging.ERROR,
                "deliver_if failed, so the request's events are discarded",
                error=error,
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


class _Lifespan:
    """One run of the lifespan protocol, with something to do before the app's own steps.

    An app that does not speak the protocol is spoken for.
    """

    __slots__ = ("_answered", "_begun", "_farewell", "_ready", "_receive", "_send", "_stopping")

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        ready: Callable[[], None],
        stopping: Callable[[], Awaitable[None]],
    ) -> None:
        self._receive = receive
        self._send = send
        self._ready = ready
        self._stopping = stopping
        self._begun = False
        self._answered = False
        self._farewell: Message | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self.receive, self.send)
        except Exception as error:
            if self._answered:
                raise
            log(logging.INFO, "the app has no lifespan of its own", reason=repr(error))
        if self._answered:
            return
        if not self._begun:
            await self.receive()
        await self.send({"type": "lifespan.startup.complete"})
        await self.receive()
        await self.send({"type": "lifespan.shutdown.complete"})

    async def receive(self) -> Message:
        message = await self._receive()
        self._begun = True
        if message["type"] == "lifespan.shutdown":
            await self._stopping()
        return message

    async def send(self, message: Message) -> None:
        self._answered = True
        match message["type"]:
            case "lifespan.shutdown.complete" | "lifespan.shutdown.failed":
                self._farewell = message
                return
            case "lifespan.startup.complete":
                self._ready()
            case _:
                pass
        await self._send(message)

    async def say_farewell(self) -> None:
        """Send the last message, after which hypercorn cancels whatever has not returned."""
        if self._farewell is not None:
            await self._send(self._farewell)


class _Response:
    """What has been sent of one response."""

    __slots__ = ("_body_complete", "_client_left", "_scope", "_send", "_status")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._status: int | None = None
        self._body_complete = False
        self._client_left = False

    async def send(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # ASGI 2.4: what a server raises when the client has left
            self._client_left = True
            raise
        finally:
            self._note(message)

    def _note(self, message: Message) -> None:
        match message["type"]:
            case "http.response.start":
                self._status = message["status"]
            case "http.response.body":
                self._body_complete = not message.get("more_body", False)
            case "http.response.pathsend":
                self._body_complete = True
            case _:
                pass

    def outcome(self, error: BaseException | None) -> Outcome:
        left = self._client_left and isinstance(error, ClientDisconnect | OSError)
        return Outcome(
            scope=self._scope,
            status=self._status,
            body_complete=self._body_complete and not self._client_left,
            exception=None if left else error,
        )
