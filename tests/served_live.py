"""A stream as the live page has it, but nobody ends it at shutdown: what servers do then."""

from collections.abc import AsyncGenerator

from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from eventkit.streams import stream

bus = EventBus()
app = FastAPI()
app.add_middleware(EventContextMiddleware, bus=bus)


@app.get("/orders/paid", response_class=EventSourceResponse)
async def paid() -> AsyncGenerator[ServerSentEvent]:
    """Push what nobody publishes."""
    async with stream(bus, object) as events:
        yield ServerSentEvent(comment="connected")
        async for event in events:
            yield ServerSentEvent(data=str(event))
