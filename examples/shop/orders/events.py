"""Owns what can happen while something is sold. For the names see `users/events.py`."""

from __future__ import annotations

from dataclasses import dataclass

from eventkit import DomainEvent, named


@named("shop.stock.taken.v1")
@dataclass(frozen=True, slots=True)
class StockTaken(DomainEvent):
    """Something was taken from the shelf for an order."""

    sku: str
    quantity: int
    left: int


@named("shop.order.placed.v1")
@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    """An order is complete."""

    order_id: int
    email: str
    total_cents: int


@named("shop.waitinglist.joined.v1")
@dataclass(frozen=True, slots=True)
class WaitingListJoined(DomainEvent):
    """Somebody wants something that was out of stock."""

    email: str
    sku: str


@named("shop.payment.declined.v1")
@dataclass(frozen=True, slots=True)
class PaymentDeclined(DomainEvent):
    """An order was too large for us to trust."""

    email: str
    total_cents: int
