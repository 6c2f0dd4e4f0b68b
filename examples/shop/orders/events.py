"""Owns what can happen while something is sold."""

from __future__ import annotations

from dataclasses import dataclass

from eventkit import DomainEvent


@dataclass(frozen=True, slots=True)
class StockTaken(DomainEvent):
    """Something was taken from the shelf for an order."""

    sku: str
    quantity: int
    left: int


@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    """An order is complete."""

    order_id: int
    email: str
    total_cents: int


@dataclass(frozen=True, slots=True)
class WaitingListJoined(DomainEvent):
    """Somebody wants something that was out of stock."""

    email: str
    sku: str


@dataclass(frozen=True, slots=True)
class PaymentDeclined(DomainEvent):
    """An order was too large for us to trust."""

    email: str
    total_cents: int
