"""An application that delivers in the background, and a handler that holds it up."""

from collections.abc import Awaitable, Callable
from typing import Any

from anyio import Event
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, respond

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


def publishing(
    *buses: EventBus, status: int = 200, error: Exception | None = None, **publish: Any
) -> Asgi:
    """An app without a lifespan that publishes one event on each bus, then responds or raises."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        for bus in buses:
            bus.publish(scope["path"], **publish)
        if error is not None:
            raise error
        await respond(send, status)

    return app


def wrapped(app: ASGIApp, *buses: EventBus, **options: Any) -> ASGIApp:
    """The app with a middleware for each bus, the first outermost."""
    for bus in reversed(buses):
        app = EventContextMiddleware(app, bus, **options)
    return app


class Gate:
    """A handler of strings that lets nothing go on before it is open."""

    def __init__(self, bus: EventBus, trace: list[str] | None = None) -> None:
        self.trace: list[str] = [] if trace is None else trace
        self.begun = Event()
        self.open = Event()
        bus.subscribe(str, self.handle, name="gate")

    async def handle(self, event: str) -> None:
        self.begun.set()
        await self.open.wait()
        self.trace.append(f"handled {event}")


async def request(
    app: ASGIApp, path: str = "/", *, method: str = "POST", trace: list[str] | None = None
) -> Exchange:
    """Make a request as a server does, so that delivery is left to the background."""
    exchange = Exchange(path, method=method, spec_version="2.3", trace=trace)
    await exchange.run(app)
    return exchange
