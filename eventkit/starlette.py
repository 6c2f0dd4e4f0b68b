"""Owns the ASGI middleware: one unit of work per request, ended after the response.

Knows nothing of FastAPI and of databases: an app is anything that speaks ASGI.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from anyio import move_on_after
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventkit._bus import EventBus
from eventkit._context import EventContext, close_if_idle, entered, finish, outside
from eventkit._handlers import is_duration
from eventkit._log import log

__all__ = ["EventContextMiddleware", "Outcome", "succeeded"]

_SCOPE_KEY = "eventkit"

# The messages that carry a response's body; ASGI's extensions add the last two.
_BODY = {"http.response.body", "http.response.pathsend", "http.response.zerocopysend"}

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
    `even_on_failure`, are delivered in any case.

    Delivery happens before the ASGI call returns, shielded from cancellation scopes, for at most
    `shutdown_timeout` seconds; what has not been delivered then is counted, logged and told to
    observers as undelivered. No handler's failure reaches the server.

    A request inside another one of the same bus (a mounted app with the same middleware) shares
    its context. Websockets have none: open one per message with `async with bus.context():`.

    Args:
        app: The ASGI app inside.
        bus: The bus whose events belong to requests. For several, add the middleware for each.
        deliver_if: Judges the outcome of a request whose events nobody has released or discarded
            before. One that raises counts as False, and is logged.
        shutdown_timeout: Seconds that the delivery of one request's events may take.

    Raises:
        TypeError: `bus` is not an `EventBus`, or `deliver_if` is not a plain function.
        ValueError: `shutdown_timeout` is not a number of seconds above 0.
    """

    def __init__(
        self,
        app: ASGIApp,
        bus: EventBus,
        *,
        deliver_if: Callable[[Outcome], bool] = succeeded,
        shutdown_timeout: float = 20.0,
    ) -> None:
        if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"EventContextMiddleware needs an EventBus, not {bus!r}: "
                "app.add_middleware(EventContextMiddleware, bus=bus)"
            )
        if inspect.iscoroutinefunction(deliver_if) or not callable(deliver_if):
            raise TypeError(
                f"deliver_if takes a plain function from an Outcome to a bool, not {deliver_if!r}"
            )
        if not is_duration(shutdown_timeout):
            raise ValueError(f"shutdown_timeout takes seconds above 0, not {shutdown_timeout!r}")
        self.app = app
        self.bus = bus
        self._deliver_if = deliver_if
        self._shutdown_timeout = shutdown_timeout
        self._announced = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope, as ASGI defines it."""
        if scope["type"] == "http":
            await self._serve_request(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._serve_lifespan(scope, receive, send)
        else:
            with outside(_WEBSOCKET):
                await self.app(scope, receive, send)

    async def _serve_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Joined by this mark alone: context variables of tests and servers leak into requests.
        marks: dict[EventBus, EventContext] = scope.get(_SCOPE_KEY, {})
        around = {bus: context for bus, context in marks.items() if not context.closed}
        if self.bus in around:
            await self.app(scope, receive, send)
            return
        self._announce()
        context = self.bus.context()
        scope[_SCOPE_KEY] = {**around, self.bus: context}
        response = _Response(scope, send)
        try:
            with entered(context, next(reversed(around.values()), None)):
                await self.app(scope, receive, response.send)
        except BaseException as error:
            await self._end(context, response.outcome(error))
            raise
        await self._end(context, response.outcome(None))

    async def _end(self, context: EventContext, outcome: Outcome) -> None:
        success = self._judge(outcome)
        if not close_if_idle(context, success=success):
            with move_on_after(self._shutdown_timeout, shield=True):
                await finish(context, success=success)

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

    async def _serve_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        marks: set[EventBus] = scope.setdefault(_SCOPE_KEY, set())
        if self.bus not in marks:  # or else an instance outside announces it
            marks.add(self.bus)
            send = self._announcing(send)
        with outside(_LIFESPAN):
            await self.app(scope, receive, send)

    def _announcing(self, send: Send) -> Send:
        async def announce(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._announce()
            await send(message)

        return announce

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


class _Response:
    """What has been sent of one response, and whether the client was there to take it."""

    __slots__ = ("_body_complete", "_losses", "_scope", "_send", "_status")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._status: int | None = None
        self._body_complete = False
        self._losses: list[OSError] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]  # also for a client that has just left
        try:
            await self._send(message)
        except OSError as error:  # ASGI 2.4: what a server raises when the client has left
            self._losses.append(error)
            raise
        if message["type"] in _BODY:
            self._body_complete = not message.get("more_body", False)

    def outcome(self, error: BaseException | None) -> Outcome:
        """How it ended, given what the app raised. To be asked once."""
        if error is not None and self._losses and self._is_loss(error):
            error = None
        self._losses.clear()  # their tracebacks lead back here, which would close a ring
        return Outcome(self._scope, self._status, self._body_complete, error)

    def _is_loss(self, error: BaseException) -> bool:
        """Whether it says nothing but that the client has left, as Starlette or `send` say it."""
        _, other = BaseExceptionGroup("", [error]).split(
            lambda part: isinstance(part, ClientDisconnect) or part in self._losses
        )
        return other is None
