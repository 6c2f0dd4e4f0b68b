"""An ASGI server's part, as far as calling an app in this process needs one."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from starlette.types import ASGIApp, Message, Scope

# With `asgi`, as a server makes it: events are then delivered in the background.
REQUEST: Scope = {
    "type": "http",
    "method": "POST",
    "path": "/orders",
    "headers": [],
    "asgi": {"spec_version": "2.3"},
}


async def receive() -> Message:
    """The whole body, which is empty."""
    return {"type": "http.request"}


async def send(_: Message) -> None:
    """To nobody."""


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncGenerator[None]:
    """Keep the app's lifespan running, as a server does."""
    begun, over = anyio.Event(), anyio.Event()
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        kind = next(messages)
        if kind == "lifespan.shutdown":
            await over.wait()
        return {"type": kind}

    async def send(_: Message) -> None:
        begun.set()

    async def run() -> None:
        await app({"type": "lifespan"}, receive, send)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await begun.wait()
        yield
        over.set()
