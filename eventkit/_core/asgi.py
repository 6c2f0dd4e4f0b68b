"""Owns the watchers of a response and of the lifespan protocol, and where a unit comes from.

Knows nothing of buses and events: what happens meanwhile is up to the caller.
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

# The messages that carry a response's body; ASGI's extensions add the last two.
_BODY = {"http.response.body", "http.response.pathsend", "http.response.zerocopysend"}


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The application that a unit of work was opened in, as a `Resolver` is given it.

    Of a request it has nothing: the same handler is run for jobs, which have none.

    Attributes:
        app: The application whose middleware or lifespan it was; None where none is known.
        state: What the lifespan yielded. Without a running lifespan, what `scope["state"]` held
            when the request came in. Shared by all units of the lifespan, and not to be changed.
    """

    app: Starlette | None
    state: Mapping[str, Any]  # as ASGI defines it


class Lifespan:
    """One run of the lifespan protocol, with something to do before the app's own steps.

    An app that leaves early is spoken for, and so is one that does not speak the protocol: it
    raises before it asks for the server's first message. One that raises later has failed.
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
        self._asked = False  # for the server's first message
        self._heard: set[str] = set()  # what the server has said
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
        """Run the app's lifespan but for its end, which `end` brings about.

        `ready` is awaited when the app has started up, before the server knows. If it raises, the
        start has failed: the app is told by an exception, and closes what it has opened.
        `stopping` is awaited when the server shuts down, before the app knows.
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
            if self._failure is not None:  # of `ready`: `end` tells the server
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
            # Kept for `end`, which raises it: the task group around it would wrap it.
            if self._asked or self._answered or not isinstance(error, Exception):
                self._failure = self._failure or error
                return
            log(logging.INFO, "the app has no lifespan of its own", reason=repr(error))
        if not self._answered:
            if not self._heard:
                await receive()
            try:
                await send({"type": "lifespan.startup.complete"})
            except Exception as error:  # noqa: BLE001 - kept for `end`, as above
                self._failure = error
        if self._ready and "lifespan.shutdown" not in self._heard:
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    async def bid_farewell(self) -> None:
        """Send the app's last message, once.

        After it hypercorn cancels whatever has not returned.
        """
        farewell, self._farewell = self._farewell, None
        if farewell is not None:
            await self._send(farewell)

    async def end(self) -> None:
        """Send the app's last message, and raise what it raised."""
        await self.bid_farewell()
        if self._failure is not None:
            raise self._failure


class WatchedResponse:
    """What has been sent of one response, and whether the client was there to take it."""

    # Here and not in `__init__`, for this is made for every request.
    status: int | None = None
    body_complete = False
    losses: tuple[OSError, ...] = ()
    started: Callable[[], object] | None = None  # called when it is

    def __init__(self, send: Send) -> None:
        self._send = send

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self.status = message["status"]  # also for a client that has just left
            if self.started is not None:
                self.started()
        try:
            await self._send(message)
        except OSError as error:  # ASGI 2.4: what a server raises when the client has left
            self.losses = (*self.losses, error)
            raise
        if kind in _BODY:
            self.body_complete = not message.get("more_body", False)

    def without_losses(self, error: BaseException | None) -> BaseException | None:
        """What the app raised; None if that says only that the client has left. To be asked once.

        Starlette says so in its own way, and `send` in that of the server.
        """
        losses, self.losses = self.losses, ()  # their tracebacks lead back here
        if error is None:
            return None
        _, other = BaseExceptionGroup("", [error]).split(
            lambda part: isinstance(part, ClientDisconnect) or part in losses
        )
        return None if other is None else error
