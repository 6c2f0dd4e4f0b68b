"""The app that servers serve with an outbox: its deliveries are kept in a SQLite file."""

import logging
import os
import sys
from dataclasses import dataclass

import anyio.lowlevel
from anyio import sleep_forever
from fastapi import FastAPI
from sqlalchemy import MetaData, create_engine
from sqlalchemy.orm import Session

from eventkit import EventBus, named
from eventkit.outbox import Outbox, add_tables
from eventkit.starlette import EventContextMiddleware


@named("servers.published")
@dataclass(frozen=True, slots=True)
class Published:
    name: str


engine = create_engine(os.environ["EVENTKIT_TEST_DATABASE"])
metadata = MetaData()
add_tables(metadata)
metadata.create_all(engine)

bus = EventBus()
outbox = Outbox(bus, engine, lease=3.0)
app = FastAPI()
app.add_middleware(
    EventContextMiddleware,
    bus=bus,
    concurrency=2,
    shutdown_timeout=float(os.environ["EVENTKIT_TEST_SHUTDOWN_TIMEOUT"]),
)


@bus.on(Published, durable=True, name="handle")
async def handle(event: Published) -> None:
    """Hang, unless a new process is to do all."""
    print(f"begins {event.name}", flush=True)
    if os.environ.get("EVENTKIT_TEST_HANGS"):
        await sleep_forever()
    await anyio.lowlevel.checkpoint()
    print(f"handled {event.name}", flush=True)


@app.post("/publish/{name}")
async def publish(name: str) -> str:
    """Publish an event in a transaction."""
    with Session(engine) as session, session.begin():
        bus.publish(Published(name))
    return "published"


@app.get("/healthy")
async def healthy() -> bool:
    """Whether the relay runs."""
    return outbox.healthy


logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s", force=True)
