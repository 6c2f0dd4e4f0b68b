"""Use cases alone: no HTTP, no database, no bus; a publisher is anything that can be told."""

from collections.abc import Mapping

import pytest

from eventkit import Publisher
from eventkit.testing import EventRecorder
from examples.shop.orders.events import OrderPlaced, PaymentDeclined, StockTaken
from examples.shop.orders.usecases import Declined, Line, OutOfStock, PlaceOrder, Taken
from examples.shop.users.events import UserCreated
from examples.shop.users.usecases import CreateUser, EmailTaken

TEA, TEAPOT = 450, 3900


class UsersInMemory:
    def __init__(self) -> None:
        self._emails: list[str] = []

    def add(self, name: str, email: str) -> int:
        if email in self._emails:
            raise EmailTaken(email)
        self._emails.append(email)
        return len(self._emails)


class OrdersInMemory:
    def __init__(self, stock: Mapping[str, int]) -> None:
        self._stock = dict(stock)
        self._prices = {"tea": TEA, "teapot": TEAPOT}

    def take(self, line: Line) -> Taken:
        if self._stock[line.sku] < line.quantity:
            raise OutOfStock(line.sku)
        self._stock[line.sku] -= line.quantity
        return Taken(self._prices[line.sku], self._stock[line.sku])

    def add(self, email: str, total_cents: int) -> int:
        return 1


@pytest.fixture
def told() -> EventRecorder:
    return EventRecorder()


def place_order(events: Publisher, credit_limit_cents: int = 10_000) -> PlaceOrder:
    return PlaceOrder(OrdersInMemory({"tea": 5, "teapot": 1}), events, credit_limit_cents)


def test_creating_a_user_says_so(told: EventRecorder) -> None:
    user_id = CreateUser(UsersInMemory(), told).execute("Ada", "ada@example.com")

    assert told.published == [UserCreated(user_id, "ada@example.com", "Ada")]


def test_a_taken_address_is_refused_in_silence(told: EventRecorder) -> None:
    create_user = CreateUser(UsersInMemory(), told)
    create_user.execute("Ada", "ada@example.com")

    with pytest.raises(EmailTaken, match=r"ada@example\.com has signed up already"):
        create_user.execute("Another Ada", "ada@example.com")

    assert told.published == [UserCreated(1, "ada@example.com", "Ada")]


def test_an_order_says_what_was_taken_and_then_that_it_is_placed(told: EventRecorder) -> None:
    order_id = place_order(told).execute("bob@example.com", [Line("tea", 2), Line("teapot", 1)])

    assert told.published == [
        StockTaken("tea", 2, left=3),
        StockTaken("teapot", 1, left=0),
        OrderPlaced(order_id, "bob@example.com", 2 * TEA + TEAPOT),
    ]


def test_an_order_out_of_stock_says_what_it_took_and_leaves_the_rest_to_the_rollback(
    told: EventRecorder,
) -> None:
    with pytest.raises(OutOfStock, match="not enough teapot"):
        place_order(told).execute("bob@example.com", [Line("tea", 2), Line("teapot", 5)])

    assert told.published == [StockTaken("tea", 2, left=3)]
    assert told.even_on_failure == []


def test_that_a_payment_was_declined_is_said_for_good(told: EventRecorder) -> None:
    with pytest.raises(Declined, match=r"9\.00 is more than we can accept"):
        place_order(told, credit_limit_cents=800).execute("bob@example.com", [Line("tea", 2)])

    assert told.even_on_failure == [PaymentDeclined("bob@example.com", 2 * TEA)]
