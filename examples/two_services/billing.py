"""Writes an invoice for each order. Knows nothing of the service that takes orders.

uvicorn examples.two_services.billing:app --port 8002
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from eventkit import EventBus
from eventkit.faststream import Bridge
from eventkit.outbox import Outbox, add_tables, complete_with
from eventkit.starlette import EventContextMiddleware
from examples.two_services.brokers import from_env, place
from examples.two_services.shop_events import OrderPlaced


class Base(DeclarativeBase):
    """The tables of this service."""


class Invoice(Base):
    """What a customer owes. Nothing here keeps an order from having two: the inbox does."""

    __tablename__ = "invoices"

    number: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    customer: Mapped[str]
    total_cents: Mapped[int]


add_tables(Base.metadata)  # of the outbox, and of the inbox

engine = create_async_engine(os.environ.get("BILLING_DATABASE", "sqlite+aiosqlite:///billing.db"))
sessions = async_sessionmaker(engine)
broker = from_env()
bus = EventBus(name="billing")
outbox = Outbox(bus, engine, lease=float(os.environ.get("OUTBOX_LEASE", "15")))

bridge = Bridge(bus, source="/billing")
bridge.consume(
    broker.subscribers(place("orders"), "billing"),
    OrderPlaced,
    dead_letter=broker.dead_letters(place("billing-dead")),
    durable=True,  # acknowledged when the inbox has it; one that comes again is dropped
)


@bus.on(OrderPlaced, name="billing.write_invoice", durable=True)
async def write_invoice(event: OrderPlaced) -> None:
    """Runs until it has ended well, in this process or in the next one."""
    async with sessions.begin() as session:
        complete_with(session)  # the invoice, and that this is done, are one commit
        session.add(
            Invoice(order_id=event.order_id, customer=event.customer, total_cents=event.total_cents)
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


app = FastAPI(title="Billing", lifespan=lifespan)
app.add_middleware(EventContextMiddleware, bus=bus)


@app.get("/invoices")
async def invoices() -> list[int]:
    """The orders that have an invoice."""
    async with sessions() as session:
        return [*await session.scalars(select(Invoice.order_id).order_by(Invoice.number))]


@app.get("/healthz")
async def healthz(response: Response) -> dict[str, bool]:
    """Whether orders can come in."""
    healthy = await broker.healthy()
    response.status_code = 200 if healthy else 503
    return {"broker": healthy}
