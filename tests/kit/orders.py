"""A few events, and handlers of every kind for them."""

from dataclasses import dataclass

import anyio

from eventkit import DomainEvent, EventBus


@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    order_id: int


@dataclass(frozen=True, slots=True)
class ReceiptSent(DomainEvent):
    order_id: int


@dataclass(frozen=True, slots=True)
class Viewed(DomainEvent):
    """An event that nobody handles."""

    page: str


def make_bus() -> EventBus:
    """A bus on which an order has a receipt, which has a copy in the archive.

    For order 13 it fails, and for order 99 it takes for ever.
    """
    bus = EventBus()

    @bus.on(OrderPlaced, name="send_receipt")
    async def send_receipt(event: OrderPlaced) -> None:
        bus.publish(ReceiptSent(event.order_id))
        if event.order_id == 13:
            raise ValueError("no receipt")
        if event.order_id == 99:
            await anyio.sleep_forever()

    @bus.on(ReceiptSent, name="archive")
    def archive(event: ReceiptSent) -> None: ...

    return bus
