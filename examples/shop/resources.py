"""Owns what an app holds for its whole life, and how endpoints and handlers get at it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated

import httpx
from fastapi import Depends, Request
from sqlalchemy.orm import Session

from eventkit import EventBus, Publisher
from eventkit.outbox import Outbox
from examples.shop.database import Database
from examples.shop.mail import Mailer
from examples.shop.payments import Payments
from examples.shop.settings import Settings


class Resources:
    """One of everything, per app: nothing is shared between two apps in one process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bus = EventBus(name="shop")
        self.database = Database(settings.database_url)
        self.outbox = Outbox(self.bus, self.database.engine, lease=settings.lease_seconds)
        self.mailer = Mailer(settings.smtp_host, settings.smtp_port)
        self.http = httpx.AsyncClient(timeout=5.0)
        self.blocking_http = httpx.Client(timeout=5.0)
        self.payments = Payments(self.blocking_http, settings.payments_url)

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[None]:
        """Open what needs opening, and close everything at the end."""
        self.database.open()
        try:
            yield
        finally:
            await self.http.aclose()
            self.blocking_http.close()
            self.outbox.detach()
            self.database.close()


async def get_resources(request: Request) -> Resources:
    """What `create_app` put on the app: an endpoint's request has it, and a handler's."""
    resources: Resources = request.app.state.resources
    return resources


FromApp = Annotated[Resources, Depends(get_resources)]


async def get_publisher(resources: FromApp) -> Publisher:
    """Whom a use case tells what happened. It need not know that this is a bus."""
    return resources.bus


def get_session(resources: FromApp) -> Iterator[Session]:
    """A transaction for one request or delivery: committed at its end, rolled back if it failed.

    FastAPI leaves a `yield` dependency after the response was sent, so this commit comes later
    than the answer; eventkit starts handlers later still, each with a transaction of its own.
    A session blocks, so whoever takes one is a plain `def`, and runs in a worker thread.
    """
    with resources.database.sessions.begin() as session:
        yield session


async def get_mailer(resources: FromApp) -> Mailer:
    """Who sends mail."""
    return resources.mailer


async def get_payments(resources: FromApp) -> Payments:
    """Who collects money."""
    return resources.payments


Events = Annotated[Publisher, Depends(get_publisher)]
Transaction = Annotated[Session, Depends(get_session)]
Post = Annotated[Mailer, Depends(get_mailer)]
Till = Annotated[Payments, Depends(get_payments)]
