"""The events of the tests: the contract of services that know nothing of each other."""

from dataclasses import dataclass
from decimal import Decimal

from eventkit import DomainEvent, named


@named("brokers.placed.v1")
@dataclass(frozen=True, slots=True)
class Placed(DomainEvent):
    """An order.

    Attributes:
        number: Of the order.
        customer: The name of the customer.
        how: What its handler does.
        total: Its price.
    """

    number: int
    customer: str = "ada"
    how: str = ""
    total: Decimal = Decimal("9.90")


@named("brokers.invoiced.v1")
@dataclass(frozen=True, slots=True)
class Invoiced(DomainEvent):
    """What a handler of an order publishes."""

    number: int


def customer_of(event: Placed) -> str:
    return event.customer
