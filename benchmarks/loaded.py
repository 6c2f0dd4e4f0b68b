"""The app under load: one event per request with one handler, by the contender that is named.

Its last line says how many events it took, and how many handlers had ended by then.
"""

import logging
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from anyio import sleep
from fastapi import BackgroundTasks, FastAPI

DELAY = float(os.environ["LOAD_DELAY"])


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
    case "eventkit":
        from eventkit import EventBus
        from eventkit.starlette import EventContextMiddleware

        bus = EventBus()
        bus.subscribe(Ordered, handle)
        app.add_middleware(EventContextMiddleware, bus=bus)
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")

        @app.post("/orders")
        async def order() -> str:
            """Publish one event."""
            bus.publish(take())
            return "ordered"

    case "BackgroundTasks":

        @app.post("/orders")
        async def order_with_task(tasks: BackgroundTasks) -> str:
            """Add one task."""
            tasks.add_task(handle, take())
            return "ordered"

    case "fastapi-events":
        from fastapi_events.dispatcher import dispatch
        from fastapi_events.handlers.local import local_handler
        from fastapi_events.middleware import EventHandlerASGIMiddleware
        from fastapi_events.typing import Event

        app.add_middleware(EventHandlerASGIMiddleware, handlers=[local_handler])

        @local_handler.register(event_name="ordered")
        async def handle_dispatched(event: Event) -> None:
            """Handle what comes as a pair of name and payload."""
            await handle(event[1]["event"])

        @app.post("/orders")
        async def order_with_dispatch() -> str:
            """Dispatch one event."""
            dispatch("ordered", payload={"event": take()})
            return "ordered"

    case other:
        raise ValueError(other)
