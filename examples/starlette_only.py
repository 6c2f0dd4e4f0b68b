"""Starlette without FastAPI: a shop whose handlers get what they need from an object.

    uvicorn examples.starlette_only:app

    curl -X POST localhost:8000/orders -d '{"number": 7}'     # 201, and then a mail
    curl -X POST localhost:8000/orders -d '{"number": 0}'     # 422, and no mail
    curl localhost:8000/mails

eventkit needs Starlette alone. `Depends` belongs to FastAPI, so here handlers are methods of an
object that has what they need. `create_app` makes all objects and ties them together.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from json import JSONDecodeError

from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from eventkit import DomainEvent, EventBus, Publisher, current_delivery
from eventkit.starlette import EventContextMiddleware

# The events: they say what happened, with plain values.


@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    """An order is in the books."""

    number: int


@dataclass(frozen=True, slots=True)
class OrderRefused(DomainEvent):
    """An order was not accepted."""

    reason: str


# The use case: it knows no HTTP, and of the bus only `publish`.


class OrderRefusedError(Exception):
    """The order is wrong."""


class PlaceOrder:
    """Takes an order."""

    def __init__(self, events: Publisher) -> None:
        self._events = events

    def execute(self, number: int) -> None:
        """Place the order, or raise `OrderRefusedError`."""
        if number < 1:
            reason = "orders begin with 1"
            # The answer will be 422: without `even_on_failure` the event would be discarded.
            self._events.publish(OrderRefused(reason), even_on_failure=True)
            raise OrderRefusedError(reason)
        self._events.publish(OrderPlaced(number))


# The handlers.


class Mailer:
    """Sends mails; here it only keeps them."""

    def __init__(self) -> None:
        self.sent: dict[str, str] = {}
        self.connected = False

    async def send(self, key: str, text: str) -> None:
        """Send a mail once for each key."""
        if not self.connected:
            raise ConnectionError("the mail server is not connected")
        await checkpoint()  # a real one waits for the network
        self.sent.setdefault(key, text)


class Letters:
    """The handlers that write mails."""

    def __init__(self, mailer: Mailer) -> None:
        self._mailer = mailer

    async def confirm(self, event: OrderPlaced) -> None:
        """Tell the customer. The id of the delivery is the key, so no mail is sent twice."""
        key = str(current_delivery().id)
        await self._mailer.send(key, f"Order {event.number} is placed")

    def complain(self, event: OrderRefused) -> None:
        """Note the reason; a plain `def` runs in a worker thread."""
        logging.getLogger(__name__).warning("an order was refused: %s", event.reason)


# The application.


def create_app() -> Starlette:
    """Make one application with a bus of its own, so that each test can have one, too."""
    bus = EventBus()
    mailer = Mailer()
    letters = Letters(mailer)
    bus.subscribe(OrderPlaced, letters.confirm)
    bus.subscribe(OrderRefused, letters.complain)

    async def place(request: Request) -> JSONResponse:
        try:
            number = int((await request.json())["number"])
        except (JSONDecodeError, KeyError, TypeError, ValueError):
            return JSONResponse({"detail": "an order has a number"}, status_code=400)
        PlaceOrder(bus).execute(number)
        return JSONResponse({"number": number}, status_code=201)

    async def mails(_: Request) -> JSONResponse:
        return JSONResponse([*mailer.sent.values()])

    async def counter(socket: WebSocket) -> None:
        """Take one order per message. A websocket opens a unit of work for each one."""
        await socket.accept()
        async for text in socket.iter_text():
            try:
                async with bus.context(background=True):
                    PlaceOrder(bus).execute(int(text))
            except (OrderRefusedError, ValueError):
                await socket.send_text("refused")
            else:
                await socket.send_text("placed")

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        """Connect before the first request, and disconnect after the last handler."""
        mailer.connected = True
        yield
        mailer.connected = False

    return Starlette(
        routes=[
            Route("/orders", place, methods=["POST"]),
            Route("/mails", mails),
            WebSocketRoute("/counter", counter),
        ],
        # The first one is the outermost. A middleware that commits would be the last one here.
        middleware=[
            Middleware(CORSMiddleware, allow_origins=["*"]),
            Middleware(EventContextMiddleware, bus=bus, concurrency=50),
        ],
        exception_handlers={OrderRefusedError: refuse},
        lifespan=lifespan,
    )


app = create_app()
