"""The app under load: an event in each request, with handlers run by the contender that is named.

Its last line says how many events it took, and how many handlers had ended by then.
"""

import logging
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from anyio import Event, create_task_group, sleep
from fastapi import BackgroundTasks, FastAPI

DELAY = float(os.environ["LOAD_DELAY"])
HANDLERS = int(os.environ["LOAD_HANDLERS"])


@dataclass(frozen=True, slots=True)
class Ordered:
    """What every request publishes."""

    number: int


Handler = Callable[[Ordered], Coroutine[Any, Any, None]]

taken = 0
handled = 0
idle: Event | None = None  # set by the last handler, where somebody waits for it


def make_handler() -> Handler:
    """One of the event's handlers, each a function of its own, as handlers are."""

    async def handle(event: Ordered) -> None:
        """Take a while."""
        global handled
        if DELAY:
            await sleep(DELAY)
        handled += 1
        if idle is not None and handled == taken * HANDLERS:
            idle.set()

    return handle


handlers = [make_handler() for _ in range(HANDLERS)]


async def handle_at_once(event: Ordered) -> None:
    """Run all handlers in a task group of their own."""
    async with create_task_group() as tasks:
        for handle in handlers:
            tasks.start_soon(handle, event)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Keep a task group, and say in the end what became of everything."""
    async with create_task_group() as app.state.tasks:
        yield
    print(f"load: taken={taken} handled={handled}", flush=True)


def take() -> Ordered:
    """Count one event."""
    global taken
    taken += 1
    return Ordered(taken)


app = FastAPI(lifespan=lifespan)


@app.get("/cpu")
async def used() -> int:
    """Nanoseconds of CPU time of this process, as soon as all handlers have ended."""
    global idle
    if handled < taken * HANDLERS:
        idle = Event()
        await idle.wait()
        idle = None
    return time.process_time_ns()


match os.environ["LOAD_CONTENDER"].split(", concurrency="):
    case ["eventkit", *concurrency]:
        from eventkit import EventBus
        from eventkit.starlette import EventContextMiddleware

        bus = EventBus()
        for number, handle in enumerate(handlers):
            bus.subscribe(Ordered, handle, name=f"handler {number}")
        options: dict[str, Any] = {"concurrency": int(concurrency[0])} if concurrency else {}
        app.add_middleware(EventContextMiddleware, bus=bus, **options)
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")

        @app.post("/orders")
        async def order() -> str:
            """Publish the event."""
            bus.publish(take())
            return "ordered"

    case ["BackgroundTasks"]:

        @app.post("/orders")
        async def order_with_tasks(tasks: BackgroundTasks) -> str:
            """Add a task for each handler."""
            event = take()
            for handle in handlers:
                tasks.add_task(handle, event)
            return "ordered"

    case ["AnyIO task group"]:
        run_handlers = handlers[0] if HANDLERS == 1 else handle_at_once

        @app.post("/orders")
        async def order_with_group() -> str:
            """Start one task, which runs the handlers at the same time."""
            app.state.tasks.start_soon(run_handlers, take())
            return "ordered"

    case ["fastapi-events"]:
        # Any: it is installed only where this runs.
        middleware: Any = import_module("fastapi_events.middleware")
        dispatcher: Any = import_module("fastapi_events.dispatcher")
        local_handler: Any = import_module("fastapi_events.handlers.local").local_handler

        def unpacking(handle: Handler) -> Any:
            """A handler of what comes as a pair of name and payload."""

            async def handle_dispatched(event: Any) -> None:
                await handle(event[1]["event"])

            return handle_dispatched

        for handle in handlers:
            local_handler.register(event_name="ordered")(unpacking(handle))
        app.add_middleware(middleware.EventHandlerASGIMiddleware, handlers=[local_handler])

        @app.post("/orders")
        async def order_with_dispatch() -> str:
            """Dispatch the event."""
            dispatcher.dispatch("ordered", payload={"event": take()})
            return "ordered"

    case ["a plain endpoint"]:

        @app.post("/orders")
        async def order_only() -> str:
            """Only answer."""
            return "ordered"

    case other:
        raise ValueError(other)
