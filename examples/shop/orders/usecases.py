"""Owns how something is sold. Knows no HTTP, no SQL and no handler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from eventkit import Publisher
from examples.shop.orders.events import OrderPlaced, PaymentDeclined, StockTaken, WaitingListJoined


class OutOfStock(Exception):
    """There is not enough of it on the shelf."""

    def __init__(self, sku: str) -> None:
        super().__init__(f"there is not enough {sku} in stock")


class Declined(Exception):
    """The order is above the credit limit."""


@dataclass(frozen=True, slots=True)
class Line:
    """How many of what."""

    sku: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken from the shelf, and what is left there."""

    price_cents: int
    left: int


class Orders(Protocol):
    """Where stock and orders are kept."""

    def take(self, line: Line) -> Taken:
        """Take it from the shelf.

        Raises:
            OutOfStock: There is not enough of it.
        """
        ...

    def add(self, email: str, total_cents: int) -> int:
        """Keep a new order and return its id."""
        ...


class PlaceOrder:
    """Sell something, and say what happened on the way.

    Each line is announced when it is taken. Should a later line be out of stock, the caller rolls
    back, and with the rows go the announcements.
    """

    def __init__(self, orders: Orders, events: Publisher, credit_limit_cents: int) -> None:
        self._orders = orders
        self._events = events
        self._credit_limit_cents = credit_limit_cents

    def execute(self, email: str, lines: Iterable[Line]) -> int:
        """Return the new order's id.

        Raises:
            OutOfStock: There is not enough of something.
            Declined: The order is above the credit limit.
        """
        total_cents = sum(self._take(line) for line in lines)
        if total_cents > self._credit_limit_cents:
            # That it was declined stays true although the order is rolled back.
            self._events.publish(PaymentDeclined(email, total_cents), even_on_failure=True)
            raise Declined(f"{total_cents / 100:.2f} is more than we can accept")
        order_id = self._orders.add(email, total_cents)
        self._events.publish(OrderPlaced(order_id, email, total_cents))
        return order_id

    def _take(self, line: Line) -> int:
        taken = self._orders.take(line)
        self._events.publish(StockTaken(line.sku, line.quantity, taken.left))
        return taken.price_cents * line.quantity


class Shelf(Protocol):
    """Where stock is kept, and who waits for it."""

    def take(self, line: Line) -> Taken:
        """Take it from the shelf.

        Raises:
            OutOfStock: There is not enough of it.
        """
        ...

    def wait(self, email: str, sku: str) -> None:
        """Keep that somebody wants it."""
        ...


class Reserve:
    """Put one piece aside for somebody, or somebody on the waiting list for it."""

    def __init__(self, shelf: Shelf, events: Publisher) -> None:
        self._shelf = shelf
        self._events = events

    def execute(self, email: str, sku: str) -> bool:
        """Return whether there was one left."""
        try:
            taken = self._shelf.take(Line(sku, 1))
        except OutOfStock:
            self._shelf.wait(email, sku)
            self._events.publish(WaitingListJoined(email, sku))
            return False
        self._events.publish(StockTaken(sku, 1, taken.left))
        return True
