"""Owns how stock and orders are kept in the database. Commits nothing: the session's owner does."""

from __future__ import annotations

from sqlalchemy import update
from sqlalchemy.orm import Session

from examples.shop.database import OrderRow, ProductRow, WaitingRow
from examples.shop.orders.usecases import Line, OutOfStock, Taken


class SqlOrders:
    """Stock and orders in the transaction of a session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def take(self, line: Line) -> Taken:
        """Look and take in one statement, as two orders can come at once."""
        row = self._session.execute(
            update(ProductRow)
            .where(ProductRow.sku == line.sku, ProductRow.in_stock >= line.quantity)
            .values(in_stock=ProductRow.in_stock - line.quantity)
            .returning(ProductRow.price_cents, ProductRow.in_stock)
        ).one_or_none()
        if row is None:
            raise OutOfStock(line.sku)
        return Taken(price_cents=row.price_cents, left=row.in_stock)

    def add(self, email: str, total_cents: int) -> int:
        """Keep a new order and return its id."""
        row = OrderRow(email=email, total_cents=total_cents)
        self._session.add(row)
        self._session.flush()
        return row.id

    def wait(self, email: str, sku: str) -> None:
        """Keep that somebody wants it."""
        self._session.add(WaitingRow(email=email, sku=sku))
