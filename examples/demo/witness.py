"""Owns how an application in the demo tells on stdout what it does, and how it is served.

Nothing in the application is changed for this. An `Observer` sees the deliveries, a listener of
SQLAlchemy the commits, an ASGI wrapper the responses.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from itertools import count
from threading import Lock, current_thread, main_thread

import uvicorn
from sqlalchemy.event import listen
from sqlalchemy.orm import Session
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from eventkit import Delivery, EventBus, Observer
from examples.demo.trace import Record, What, clock_ns

# The request that this work belongs to. Set here, seen in endpoints, worker threads and handlers.
_request: ContextVar[str] = ContextVar("_request", default="")
_delivery: ContextVar[Delivery | None] = ContextVar("_delivery", default=None)

_stdout = Lock()


def request_name() -> str:
    """The name of the request that this work belongs to; empty if there is none."""
    return _request.get()


@contextmanager
def on_behalf_of(name: str) -> Generator[None]:
    """What happens in the block belongs to a request, perhaps of another service."""
    before = _request.set(name)
    try:
        yield
    finally:
        _request.reset(before)


def tell(record: Record) -> None:
    """Write one line, whole, from whatever thread."""
    line = f"{record.to_json()}\n"
    with _stdout:
        sys.stdout.write(line)
        sys.stdout.flush()


class Witness(Observer):
    """Tells what becomes of every delivery."""

    def published(self, event: object, deliveries: Sequence[Delivery]) -> None:
        """Runs where `publish` was called, so it can see whether that is a worker thread."""
        in_worker_thread = current_thread() is not main_thread()
        for delivery in deliveries:
            tell_delivery("accepted", delivery, in_worker_thread=in_worker_thread)

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            tell_delivery("skipped", delivery, outcome="discarded")

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            tell_delivery("skipped", delivery, outcome="undelivered")

    def requeued(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            tell_delivery("skipped", delivery, outcome="requeued")

    def headers(self, event: object) -> Mapping[str, str]:
        """What the outbox keeps beside the event: the request that has published it."""
        return {"request": _request.get()}

    def restored(self, headers: Mapping[str, str]) -> None:
        """A delivery comes from the outbox, after an attempt that failed or a process that died."""
        _request.set(headers["request"])

    @contextmanager
    def delivery(self, delivery: Delivery) -> Generator[None]:
        """Tell start and end, and mark what the handler does in between as its own."""
        _delivery.set(delivery)
        tell_delivery("started", delivery)
        try:
            yield
        except Exception as error:
            tell_delivery("ended", delivery, outcome="failed", error=type(error).__name__)
            raise
        tell_delivery("ended", delivery, outcome="ok")


def tell_delivery(
    what: What,
    delivery: Delivery,
    *,
    outcome: str = "",
    error: str = "",
    in_worker_thread: bool = False,
) -> None:
    """Tell what a delivery is about, each time, so that each line can be read alone."""
    tell(
        Record(
            what=what,
            request=_request.get(),
            delivery=str(delivery.id),
            event=type(delivery.event).__name__,
            handler=delivery.handler,
            attempt=delivery.attempt,
            outcome=outcome,
            error=error,
            in_worker_thread=in_worker_thread,
        )
    )


def tell_commit(_: Session) -> None:
    """Called by SQLAlchemy after each commit, of the request's session and of handlers' own."""
    delivery = _delivery.get()
    if delivery is None:
        tell(Record(what="committed", request=_request.get()))
    else:
        tell_delivery("committed", delivery)


class Wiretap:
    """An ASGI wrapper that tells when responses are sent and when the whole app is up or down."""

    def __init__(self, app: ASGIApp, bus: EventBus, port: int) -> None:
        self._app = app
        self._bus = bus
        self._port = port
        self._anonymous = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._tell_lifespan(send))
            return
        _request.set(Headers(scope=scope).get("x-request-id") or f"#{next(self._anonymous)}")
        try:
            with bound_contextvars(request_id=_request.get()):  # goes along to other services
                await self._app(scope, receive, self._tell_response(scope, send))
        finally:
            tell(Record(what="returned", request=_request.get()))

    def _tell_lifespan(self, send: Send) -> Send:
        async def send_and_tell(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                tell(Record(what="up", port=self._port))
            elif message["type"] == "lifespan.shutdown.complete":
                tell(Record(what="stats", stats=asdict(self._bus.stats)))
            await send(message)

        return send_and_tell

    def _tell_response(self, scope: Scope, send: Send) -> Send:
        line = f"{scope['method']} {scope['path']}"
        status = 0

        async def send_and_tell(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            at_ns = clock_ns()  # by the time that `send` is back, the client may have it
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                request = _request.get()
                tell(Record(what="sent", at_ns=at_ns, request=request, line=line, status=status))

        return send_and_tell


def serve(app: ASGIApp, bus: EventBus, port: int) -> None:
    """Serve an application on loopback until a signal ends it; port 0 is a free one."""
    bus.observe(Witness())
    listen(Session, "after_commit", tell_commit)
    with socket.create_server(("127.0.0.1", port)) as listener:
        # Or the last bytes of an answer wait some 40 ms for the client's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wiretap = Wiretap(app, bus, listener.getsockname()[1])
        config = uvicorn.Config(wiretap, log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])
