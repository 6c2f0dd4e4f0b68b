"""Takes orders, and sends an event for each. Knows nothing of the services that consume it.

uvicorn examples.two_services.orders:app --port 8001
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from eventkit import EventBus
from eventkit.faststream import Bridge
from eventkit.outbox import Outbox, add_tables
from eventkit.starlette import EventContextMiddleware
from examples.two_services.brokers import from_env, place
from examples.two_services.shop_events import OrderPlaced


class Base(DeclarativeBase):
    """The tables of this service."""


class Order(Base):
    """Something that a customer wants."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    customer: Mapped[str]
    total_cents: Mapped[int]


add_tables(Base.metadata)  # of the outbox

engine = create_async_engine(os.environ.get("ORDERS_DATABASE", "sqlite+aiosqlite:///orders.db"))
sessions = async_sessionmaker(engine)
broker = from_env()
bus = EventBus(name="orders")
outbox = Outbox(bus, engine, lease=float(os.environ.get("OUTBOX_LEASE", "15")))

bridge = Bridge(bus, source="/orders")
bridge.forward(
    OrderPlaced,
    broker.publisher(place("orders")),
    durable=True,  # until the broker has confirmed it, whatever dies
    key=lambda event: event.customer,  # those of one customer leave in the order of their commits
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Have tables and broker while the app runs."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        async with broker.opened():
            yield
    finally:
        await engine.dispose()


app = FastAPI(title="Orders", lifespan=lifespan)
app.add_middleware(EventContextMiddleware, bus=bus)


class NewOrder(BaseModel):
    """What a customer sends."""

    customer: str
    total_cents: int


@app.post("/orders/{order_id}", status_code=201)
async def place_order(order_id: int, new: NewOrder) -> None:
    """Write the order and its event, in one transaction."""
    try:
        async with sessions.begin() as session:
            session.add(Order(id=order_id, customer=new.customer, total_cents=new.total_cents))
            bus.publish(OrderPlaced(order_id, new.customer, new.total_cents))
    except IntegrityError:
        raise HTTPException(409, f"there is an order {order_id}") from None


@app.get("/healthz")
async def healthz(response: Response) -> dict[str, bool]:
    """Whether events can be sent. Orders are taken all the same: the outbox keeps their events."""
    healthy = await broker.healthy()
    response.status_code = 200 if healthy else 503
    return {"broker": healthy}
