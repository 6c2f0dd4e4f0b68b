"""The app under load: events with one handler in each request, by the contender that is named.

Its last line says how many events it took, and how many handlers had ended by then.
"""

import logging
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from anyio import sleep
from fastapi import BackgroundTasks, FastAPI

DELAY = float(os.environ["LOAD_DELAY"])
EVENTS = int(os.environ.get("LOAD_EVENTS", "1"))


@dataclass(frozen=True, slots=True)
class Ordered:
    """What every request publishes."""

    number: int


taken = 0
handled = 0


async def handle(event: Ordered) -> None:
    """Take a while."""
    global handled
    if DELAY:
        await sleep(DELAY)
    handled += 1


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Say in the end what became of everything."""
    yield
    print(f"load: taken={taken} handled={handled}", flush=True)


def take() -> Ordered:
    """Count one event."""
    global taken
    taken += 1
    return Ordered(taken)


app = FastAPI(lifespan=lifespan)

match os.environ["LOAD_CONTENDER"]:
    case "eventkit" | "eventkit, concurrency=1000" as name:
        from eventkit import EventBus
        from eventkit.starlette import EventContextMiddleware

        bus = EventBus()
        bus.subscribe(Ordered, handle)
        options: dict[str, Any] = {"concurrency": 1000} if "1000" in name else {}
        app.add_middleware(EventContextMiddleware, bus=bus, **options)
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")

        @app.post("/orders")
        async def order() -> str:
            """Publish the events."""
            for _ in range(EVENTS):
                bus.publish(take())
            return "ordered"

    case "BackgroundTasks":

        @app.post("/orders")
        async def order_with_task(tasks: BackgroundTasks) -> str:
            """Add as many tasks."""
            for _ in range(EVENTS):
                tasks.add_task(handle, take())
            return "ordered"

    case "fastapi-events":
        # Any: it is installed only where this runs.
        middleware: Any = import_module("fastapi_events.middleware")
        dispatcher: Any = import_module("fastapi_events.dispatcher")
        local_handler: Any = import_module("fastapi_events.handlers.local").local_handler

        async def handle_dispatched(event: Any) -> None:
            """Handle what comes as a pair of name and payload."""
            await handle(event[1]["event"])

        local_handler.register(event_name="ordered")(handle_dispatched)
        app.add_middleware(middleware.EventHandlerASGIMiddleware, handlers=[local_handler])

        @app.post("/orders")
        async def order_with_dispatch() -> str:
            """Dispatch the events."""
            for _ in range(EVENTS):
                dispatcher.dispatch("ordered", payload={"event": take()})
            return "ordered"

    case "no middleware":

        @app.post("/orders")
        async def order_only() -> str:
            """Only answer."""
            return "ordered"

    case other:
        raise ValueError(other)
