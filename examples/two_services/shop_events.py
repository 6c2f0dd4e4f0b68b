"""Owns what the services say to each other: a package that both install.

Knows no broker and no bus. The name is the contract, and the fields are its JSON; the class may
move, and each service may have a copy of its own.
"""

from dataclasses import dataclass

from eventkit import DomainEvent, named


@named("shop.order.placed.v1")
@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    """A customer has ordered, and is to pay."""

    order_id: int
    customer: str
    total_cents: int
