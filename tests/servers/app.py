"""The app that every server of the matrix serves: what it does, it prints, and a file releases it.

Its options come from environment variables, because each server starts it by its name alone.
"""

import logging
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from anyio import sleep, sleep_forever
from fastapi import Depends, FastAPI, Request

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware

RELEASE = Path(os.environ["EVENTKIT_TEST_RELEASE"])


@dataclass(frozen=True, slots=True)
class Published:
    """Attributes: what its handler is to do, and what to call it."""

    action: str
    name: str


@dataclass(frozen=True, slots=True)
class Blocking:
    """What to call it."""

    name: str


def tell(line: str) -> None:
    """Print a line, also into a file, at once."""
    print(line, flush=True)


def released_already() -> bool:
    """Whether the test has said so."""
    return RELEASE.exists()


async def released() -> None:
    """Wait until the test says so, which has no better means than a file."""
    while not released_already():  # noqa: ASYNC110 - nothing else comes from outside
        await sleep(0.01)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Hold something that handlers need."""
    app.state.open = True
    yield
    app.state.open = False
    tell("resources closed")


bus = EventBus()
app = FastAPI(lifespan=lifespan)
app.add_middleware(
    EventContextMiddleware,
    bus=bus,
    concurrency=1,
    shutdown_timeout=float(os.environ["EVENTKIT_TEST_SHUTDOWN_TIMEOUT"]),
)


@bus.on(Published)
async def handle(event: Published) -> None:
    """Do what the event says."""
    tell(f"begins {event.name}")
    match event.action:
        case "wait":
            await released()
        case "hang":
            await sleep_forever()
        case _:
            raise RuntimeError("no mail today")
    tell(f"handled {event.name}, resources {'open' if app.state.open else 'closed'}")


@bus.on(Blocking)
def block(event: Blocking) -> None:
    """A plain function that nobody can end."""
    tell(f"begins {event.name}")
    while not released_already():
        time.sleep(0.01)
    tell(f"handled {event.name}")


async def commits_late() -> AsyncGenerator[None]:
    """A dependency whose end comes after the response, as a commit would."""
    yield
    tell("commit begins")
    await released()
    tell("commit ends")


@app.post("/late/{name}")
async def publish_and_commit_late(name: str, _: Annotated[None, Depends(commits_late)]) -> str:
    """Publish an event, and be in the request's tail for a while."""
    bus.publish(Published("wait", name))
    return "published"


@app.post("/block/{name}")
async def publish_blocking(name: str) -> str:
    """Publish an event whose handler runs in a thread."""
    bus.publish(Blocking(name))
    return "published"


@app.post("/{action}/{name}")
async def publish(action: str, name: str) -> str:
    """Publish an event."""
    bus.publish(Published(action, name))
    return "published"


@app.get("/asgi")
async def asgi(request: Request) -> dict[str, Any]:
    """What the server says of the ASGI it speaks."""
    announced: dict[str, Any] = request.scope["asgi"]
    return announced


logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s", force=True)
