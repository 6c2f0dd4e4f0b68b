"""Owns the observation of a response and of the lifespan protocol, and the origin of a unit.

Knows nothing of buses and events.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventkit._core.log import log

# The messages with a response's body; the last two belong to extensions of ASGI.
_BODY = {"http.response.body", "http.response.pathsend", "http.response.zerocopysend"}


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The application in which a unit of work was opened: the argument of a `Solver`.

    It has nothing of a request, because the same handler also runs for jobs without a request.

    Attributes:
        app: The application of the middleware or lifespan; None if it is not known.
        state: The state that the lifespan yielded. Without a running lifespan, it is
            `scope["state"]` at the start of the request. All units of the lifespan share it, so do
            not change it.
    """

    app: Starlette | None
    state: Mapping[str, Any]  # as ASGI defines it


class Lifespan:
    """One run of the lifespan protocol, with actions before the app's own steps.

    If an app returns early, this class answers the server for it. The same applies to an app that
    does not support the protocol: it raises before it receives the server's first message. An app
    that raises later has failed.
    """

    __slots__ = (
        "_answered",
        "_asked",
        "_failure",
        "_farewell",
        "_heard",
        "_ready",
        "_receive",
        "_send",
    )

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._asked = False  # whether the app has asked for the server's first message
        self._heard: set[str] = set()  # the messages that the server has sent
        self._answered = False
        self._ready = False
        self._farewell: Message | None = None
        self._failure: BaseException | None = None

    async def run(
        self,
        app: ASGIApp,
        scope: Scope,
        *,
        ready: Callable[[], Awaitable[None]],
        stopping: Callable[[], Awaitable[None]],
    ) -> None:
        """Run the app's lifespan without its last message, which `end` sends.

        `ready` is awaited when the app has started up, before the server gets the message. If it
        raises, the start has failed: the app gets an exception, and closes its resources.
        `stopping` is awaited when the server shuts down, before the app gets the message.
        """

        async def receive() -> Message:
            self._asked = True
            message = await self._receive()
            self._heard.add(message["type"])
            if message["type"] == "lifespan.shutdown":
                await stopping()
            return message

        async def send(message: Message) -> None:
            self._answered = True
            if self._failure is not None:  # `ready` has failed: `end` tells the server
                return
            if message["type"] == "lifespan.startup.complete":
                try:
                    await ready()
                except Exception as error:
                    self._failure = error
                    self._farewell = {"type": "lifespan.startup.failed", "message": str(error)}
                    raise
                self._ready = True
            if message["type"].startswith("lifespan.shutdown."):
                self._farewell = message
            else:
                await self._send(message)

        try:
            await app(scope, receive, send)
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001
            # `end` raises it later, because the task group around this call would wrap it.
            if self._asked or self._answered or not isinstance(error, Exception):
                self._failure = self._failure or error
                return
            log(logging.INFO, "the app has no lifespan of its own", reason=repr(error))
        if not self._answered:
            if not self._heard:
                await receive()
            try:
                await send({"type": "lifespan.startup.complete"})
            except Exception as error:  # noqa: BLE001 - `end` raises it, as above
                self._failure = error
        if self._ready and "lifespan.shutdown" not in self._heard:
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    async def bid_farewell(self) -> None:
        """Send the app's last message, once.

        After this message, hypercorn cancels an app that has not returned.
        """
        farewell, self._farewell = self._farewell, None
        if farewell is not None:
            await self._send(farewell)

    async def end(self) -> None:
        """Send the app's last message, and raise the app's exception, if there is one."""
        await self.bid_farewell()
        if self._failure is not None:
            raise self._failure


class WatchedResponse:
    """The state of one response: what was sent, and whether the client has disconnected."""

    # Defaults in the class, not in `__init__`: an instance is made for every request.
    status: int | None = None
    body_complete = False
    losses: tuple[OSError, ...] = ()
    started: Callable[[], object] | None = None  # called when the response starts

    def __init__(self, send: Send) -> None:
        self._send = send

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self.status = message["status"]  # also if the client has just disconnected
            if self.started is not None:
                self.started()
        try:
            await self._send(message)
        except OSError as error:  # ASGI 2.4: servers raise it if the client has disconnected
            self.losses = (*self.losses, error)
            raise
        if kind in _BODY:
            self.body_complete = not message.get("more_body", False)

    def without_losses(self, error: BaseException | None) -> BaseException | None:
        """The app's exception; None if it only says that the client has disconnected.

        Starlette and the servers have different exceptions for this. It may be called only once.
        """
        losses, self.losses = self.losses, ()  # their tracebacks refer to this object
        if error is None:
            return None
        _, other = BaseExceptionGroup("", [error]).split(
            lambda part: isinstance(part, ClientDisconnect) or part in losses
        )
        return None if other is None else error
