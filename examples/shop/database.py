"""Owns the tables and the way to reach them. Knows nothing of events or HTTP."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, create_engine
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from eventkit.outbox import add_tables


class Base(DeclarativeBase):
    """All tables of the shop."""


class UserRow(Base):
    """Somebody who signed up."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str] = mapped_column(unique=True)


class ProductRow(Base):
    """Something on the shelf."""

    __tablename__ = "products"
    __table_args__ = (CheckConstraint("in_stock >= 0"),)

    sku: Mapped[str] = mapped_column(primary_key=True)
    price_cents: Mapped[int]
    in_stock: Mapped[int]


class OrderRow(Base):
    """Something sold."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    total_cents: Mapped[int]


class PaymentRow(Base):
    """What an order has brought in."""

    __tablename__ = "payments"

    order_id: Mapped[int] = mapped_column(primary_key=True)
    cents: Mapped[int]
    key: Mapped[UUID]


class WaitingRow(Base):
    """Somebody who wants something that was out of stock."""

    __tablename__ = "waiting"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    sku: Mapped[str]


class AuditRow(Base):
    """Something that happened. The event's id is the key, so that it is written once."""

    __tablename__ = "audit"

    event_id: Mapped[UUID] = mapped_column(primary_key=True)
    occurred_at: Mapped[datetime]
    kind: Mapped[str]
    payload: Mapped[str]


add_tables(Base.metadata)  # of the outbox: `create_all` and Alembic see them from here on


FIRST_STOCK = (
    {"sku": "tea", "price_cents": 450, "in_stock": 100},
    {"sku": "teapot", "price_cents": 3900, "in_stock": 1},
)


class Database:
    """One SQLite file, and the sessions that lead into it."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url)
        self.sessions = sessionmaker(self.engine)

    def open(self) -> None:
        """Create what is missing: tables, and something to sell."""
        with self.engine.begin() as connection:
            # Readers and a writer get along; SQLite remembers it in the file.
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            Base.metadata.create_all(connection)
            connection.execute(insert(ProductRow).on_conflict_do_nothing(), list(FIRST_STOCK))

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()
