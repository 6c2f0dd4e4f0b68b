"""A process that runs durable deliveries until it is killed: `python -m benchmarks.killed`.

It is told by its arguments where the database is, and what to do. It prints a line when it is
ready, and one for each handler that has begun.
"""

from __future__ import annotations

import sys

import anyio
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from benchmarks.asgi import serving
from benchmarks.behind import answering, nothing
from benchmarks.durable import Order, OrderPlaced, engine_of, placed
from eventkit import EventBus
from eventkit.outbox import Outbox
from eventkit.starlette import EventContextMiddleware


async def main(url: str, schema: str, lease: float, role: str) -> None:
    """Publish one event and hang in its handler; or wait for such events, as an application does
    that also serves requests, or as a relay."""
    bus, engine = EventBus(), engine_of(make_url(url), schema or None)
    assert not isinstance(engine, AsyncEngine)

    @bus.on(OrderPlaced, name="benchmarks:handle", durable=True)
    async def handle(event: OrderPlaced) -> None:  # pyright: ignore[reportUnusedFunction]
        print("begun", flush=True)
        if role == "victim":
            await anyio.sleep_forever()

    with Outbox(bus, engine, lease=lease) as outbox:
        app = EventContextMiddleware(answering(nothing), bus)
        if role == "relay":
            print("ready", flush=True)
            await outbox.run()
        async with serving(app):
            print("ready", flush=True)
            if role == "victim":
                async with bus.context():
                    with Session(engine) as session, session.begin():
                        session.add(Order(note="new"))
                        bus.publish(placed())
            await anyio.sleep_forever()


if __name__ == "__main__":
    given_url, given_schema, given_lease, given_role = sys.argv[1:]
    anyio.run(main, given_url, given_schema, float(given_lease), given_role)
