"""A small service that people sign up to, and chat with; the tests beside it are what matters."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI, HTTPException, WebSocket

from eventkit import DomainEvent, EventBus, Publisher
from eventkit.starlette import EventContextMiddleware


@dataclass(frozen=True, slots=True)
class SignedUp(DomainEvent):
    """Somebody is a member now."""

    email: str


@dataclass(frozen=True, slots=True)
class Said(DomainEvent):
    """Somebody said something in the chat."""

    text: str


class AlreadySignedUp(Exception):
    """There is a member with this address."""


class SignUp:
    """The use case: knows neither HTTP nor a bus, only somebody to tell."""

    def __init__(self, events: Publisher, members: set[str]) -> None:
        self._events = events
        self._members = members

    def execute(self, email: str) -> None:
        """Make somebody a member.

        Raises:
            AlreadySignedUp: There is one with this address.
        """
        if email in self._members:
            raise AlreadySignedUp(email)
        self._members.add(email)
        self._events.publish(SignedUp(email))


class Mailer:
    """Where a real one would speak SMTP, this one remembers."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def welcome(self, event: SignedUp) -> None:
        """Greet a new member."""
        self.sent.append(event.email)


def create_app(bus: EventBus, mailer: Mailer, *, background: bool | None = None) -> FastAPI:
    """Build a service of its own around a bus."""
    members: set[str] = set()
    bus.subscribe(SignedUp, mailer.welcome, name="mailer.welcome")
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus, background=background)

    @app.post("/members/{email}", status_code=201)
    async def sign_up(email: str) -> None:
        try:
            SignUp(bus, members).execute(email)
        except AlreadySignedUp:
            raise HTTPException(409, f"{email} has signed up already") from None

    @app.websocket("/chat")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            async with bus.context():  # a unit of work for each message, not for the connection
                bus.publish(Said(text))
            await websocket.send_text("heard")

    return app
