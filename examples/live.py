"""A live page: what happens in this process, pushed to browsers as server-sent events.

    uvicorn examples.live:app

Open http://127.0.0.1:8000/ in two windows and pay for an order in one of them.

It shows one process. A stream carries what is dispatched where it was opened: with `--workers 2`
a window sees half of the payments, those that its own worker served. For more than one process
the events have to travel between them, by a broker or a database.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from eventkit import DomainEvent, EventBus
from eventkit.starlette import EventContextMiddleware
from eventkit.streams import end_at_shutdown, stream


@dataclass(frozen=True, slots=True)
class OrderPaid(DomainEvent):
    order_id: int


bus = EventBus()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Let no window hold up the shutdown: uvicorn waits for responses, and these have no end."""
    with end_at_shutdown(bus):
        yield


app = FastAPI(title="Live orders", lifespan=lifespan)
app.add_middleware(EventContextMiddleware, bus=bus)


@app.post("/orders/{order_id}/pay", status_code=204)
async def pay(order_id: int) -> None:
    """Publish; every open window sees it once this request has succeeded."""
    bus.publish(OrderPaid(order_id))


@app.get("/orders/paid", response_class=EventSourceResponse)
async def paid() -> AsyncGenerator[ServerSentEvent]:
    """Push each payment; a window that cannot keep up misses the oldest ones."""
    async with stream(bus, OrderPaid, buffer=100) as orders:
        yield ServerSentEvent(comment="connected")
        async for order in orders:
            yield ServerSentEvent(
                data={"order_id": order.order_id}, event="paid", id=str(order.event_id)
            )


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    """A button, and a list that grows."""
    return PAGE


PAGE = """<!doctype html>
<title>Live orders</title>
<button onclick="fetch(`/orders/${Math.ceil(Math.random() * 1000)}/pay`, {method: 'POST'})">
Pay</button>
<ul id="paid"></ul>
<script>
new EventSource("/orders/paid").addEventListener("paid", (event) => {
  const line = document.createElement("li");
  line.textContent = `Order ${JSON.parse(event.data).order_id} is paid`;
  document.getElementById("paid").prepend(line);
});
</script>
"""
