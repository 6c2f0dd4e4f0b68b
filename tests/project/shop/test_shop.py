"""The shop as a whole, through its front door and out of all its back doors."""

from pathlib import Path
from uuid import UUID

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from fastapi.testclient import TestClient
from httpx import HTTPStatusError, TransportError
from sqlalchemy import create_engine

from eventkit.sqlalchemy import deliver_on_commit
from eventkit.testing import EventCapture, assert_handles
from examples.shop.app import create_app
from examples.shop.orders.events import OrderPlaced, PaymentDeclined, StockTaken, WaitingListJoined
from examples.shop.settings import Settings
from examples.shop.users.events import UserCreated
from tests.databases import obey

from .conftest import Shop

ADA = {"name": "Ada", "email": "ada@example.com"}


def order(*lines: tuple[str, int]) -> dict[str, object]:
    wanted = [{"sku": sku, "quantity": quantity} for sku, quantity in lines]
    return {"email": "bob@example.com", "lines": wanted}


def test_the_welcome_mail_leaves_after_the_commit(shop: Shop, capevents: EventCapture) -> None:
    response = shop.client.post("/users", json=ADA)

    assert capevents.published == [UserCreated(1, "ada@example.com", "Ada")]
    assert (response.status_code, response.json()) == (201, {"user_id": 1})
    assert [mail.subject for mail in shop.mails.to("ada@example.com")] == ["Welcome, Ada!"]
    assert shop.committed_at_mail == [1]


def test_signing_up_twice_is_a_conflict_that_nobody_else_hears_of(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.client.post("/users", json=ADA)
    response = shop.client.post("/users", json=ADA)

    assert response.status_code == 409
    assert response.json() == {"detail": "ada@example.com has signed up already"}
    capevents.one(UserCreated)
    assert len(shop.mails.mails) == 1


def test_an_order_in_a_plain_def_endpoint_reaches_every_handler(
    shop: Shop, capevents: EventCapture
) -> None:
    response = shop.client.post("/orders", json=order(("tea", 2), ("teapot", 1)))

    assert (response.status_code, response.json()) == (201, {"order_id": 1})
    assert len(capevents.handled) == 7
    assert shop.warehouse.reports == [
        {"sku": "tea", "taken": 2, "left": 98},
        {"sku": "teapot", "taken": 1, "left": 0},
    ]
    assert [mail.subject for mail in shop.mails.to("bob@example.com")] == ["Your order 1"]
    kinds = shop.column("SELECT kind FROM audit ORDER BY occurred_at")
    assert kinds == ["StockTaken", "StockTaken", "OrderPlaced"]


def test_an_order_in_conflict_takes_its_events_back_with_its_rows(
    shop: Shop, capevents: EventCapture
) -> None:
    response = shop.client.post("/orders", json=order(("tea", 2), ("teapot", 5)))

    assert response.status_code == 409
    assert shop.column("SELECT in_stock FROM products ORDER BY sku") == [100, 1]
    assert capevents.published == []
    assert capevents.discarded == [StockTaken("tea", 2, left=98)]
    assert (shop.warehouse.reports, shop.mails.mails) == ([], [])
    assert shop.column("SELECT kind FROM audit") == []


def test_an_order_that_is_only_checked_is_rolled_back_and_nobody_hears_of_it(
    shop: Shop, capevents: EventCapture
) -> None:
    for teapots, possible in ((1, True), (5, False)):
        response = shop.client.post("/orders/check", json=order(("tea", 2), ("teapot", teapots)))
        assert (response.status_code, response.json()) == (200, {"possible": possible})

    assert capevents.handled == []
    assert shop.column("SELECT in_stock FROM products ORDER BY sku") == [100, 1]
    assert shop.column("SELECT kind FROM audit") == []
    assert (shop.warehouse.reports, shop.mails.mails) == ([], [])


def test_an_order_that_could_not_be_paid_is_declined_when_it_is_checked(shop: Shop) -> None:
    assert shop.client.post("/orders/check", json=order(("tea", 90))).status_code == 402


def test_who_comes_too_late_is_on_the_waiting_list_although_the_answer_is_an_error(
    shop: Shop, capevents: EventCapture
) -> None:
    form = {"email": "bob@example.com", "sku": "teapot"}
    answers = [shop.client.post("/reservations", json=form) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [201, 409]
    assert answers[1].json() == {"reserved": False, "waiting": True}
    assert shop.column("SELECT email FROM waiting") == ["bob@example.com"]
    capevents.one(WaitingListJoined, sku="teapot")
    assert shop.column("SELECT kind FROM audit ORDER BY occurred_at") == [
        "StockTaken",
        "WaitingListJoined",
    ]


def test_a_commit_is_one_also_in_a_tests_transaction_that_is_rolled_back_in_the_end(
    shop: Shop, capevents: EventCapture
) -> None:
    capevents.record_only()
    engine = create_engine(f"sqlite:///{shop.database}")
    obey(engine)

    with engine.connect() as connection, deliver_on_commit(shop.bus, engine):
        everything = connection.begin()
        shop.resources.database.sessions.configure(
            bind=connection, join_transaction_mode="create_savepoint"
        )
        shop.client.post("/reservations", json={"email": "bob@example.com", "sku": "teapot"})
        shop.client.post("/orders/check", json=order(("tea", 2)))
        everything.rollback()
    engine.dispose()

    assert capevents.published == [StockTaken("teapot", 1, left=0)]
    assert shop.column("SELECT in_stock FROM products WHERE sku = 'teapot'") == [1]


def test_a_declined_order_is_rolled_back_and_audited_all_the_same(
    shop: Shop, capevents: EventCapture
) -> None:
    response = shop.client.post("/orders", json=order(("tea", 90)))

    assert response.status_code == 402
    assert shop.column("SELECT in_stock FROM products WHERE sku = 'tea'") == [100]
    assert capevents.published == [PaymentDeclined("bob@example.com", 40_500)]
    assert shop.column("SELECT kind FROM audit") == ["PaymentDeclined"]
    assert (shop.warehouse.reports, shop.mails.mails) == ([], [])


def test_a_warehouse_that_is_down_stops_neither_the_mail_nor_the_audit(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.warehouse.down = True

    response = shop.client.post("/orders", json=order(("tea", 1)))

    assert response.status_code == 201
    assert len(shop.mails.to("bob@example.com")) == 1
    assert sorted(shop.column("SELECT kind FROM audit")) == ["OrderPlaced", "StockTaken"]
    failure, *_ = capevents.failures  # it is tried again
    assert failure.delivery.handler == "orders.tell_warehouse"
    assert isinstance(failure.error, HTTPStatusError)


def test_a_mail_that_is_refused_once_holds_up_no_other_and_is_sent_again(
    shop: Shop, capevents: EventCapture
) -> None:
    capevents.fail("orders.send_confirmation", OSError("mailbox full"), times=1)

    for _ in range(2):
        shop.client.post("/orders", json=order(("tea", 1)))

    assert "Your order 2" in [mail.subject for mail in shop.mails.to("bob@example.com")]
    assert [placed.order_id for placed in capevents.of(OrderPlaced)] == [1, 2]
    shop.run_due()
    assert sorted(mail.subject for mail in shop.mails.to("bob@example.com")) == [
        "Your order 1",
        "Your order 2",
    ]


def test_what_happens_in_the_shop_is_handled_by_whom_it_concerns(shop: Shop) -> None:
    assert_handles(shop.bus, UserCreated, "users.send_welcome_mail", "audit.write_row")
    assert_handles(
        shop.bus,
        OrderPlaced,
        "orders.send_confirmation",
        "orders.collect_payment",
        "audit.write_row",
    )
    assert_handles(shop.bus, StockTaken, "orders.tell_warehouse", "audit.write_row")


def test_a_payment_that_is_declined_is_rolled_back_beside_an_audit_that_is_committed(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.payments.declines = True

    response = shop.client.post("/orders", json=order(("tea", 1)))

    assert response.status_code == 201
    (failure,) = capevents.failures
    assert failure.delivery.handler == "orders.collect_payment"
    assert shop.column("SELECT order_id FROM payments") == []
    assert "OrderPlaced" in shop.column("SELECT kind FROM audit")


def test_an_answer_that_is_lost_has_the_payment_asked_for_again_and_taken_once(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.payments.answers_to_lose = 1

    shop.client.post("/orders", json=order(("tea", 1)))

    key, again = shop.payments.requests
    assert again == key
    assert shop.payments.charges == {key: {"order_id": 1, "cents": 450}}
    assert shop.column("SELECT key FROM payments") == [UUID(key).hex]
    assert capevents.failures == []


def test_two_orders_alike_are_two_payments(shop: Shop) -> None:
    for _ in range(2):
        shop.client.post("/orders", json=order(("tea", 1)))

    assert list(shop.payments.charges.values()) == [
        {"order_id": 1, "cents": 450},
        {"order_id": 2, "cents": 450},
    ]


def test_a_provider_that_gives_no_answer_is_asked_three_times(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.payments.answers_to_lose = 1000

    shop.client.post("/orders", json=order(("tea", 1)))

    failure, *_ = capevents.failures  # it is tried again
    assert isinstance(failure.error, TransportError)
    first, *others = shop.payments.requests
    assert others[:2] == [first, first]
    assert shop.column("SELECT order_id FROM payments") == []


def test_a_mail_server_that_is_gone_delays_the_mail_and_nothing_else(tmp_path: Path) -> None:
    settings = Settings(database_url=f"sqlite:///{tmp_path / 'shop.db'}", smtp_port=1)
    app = create_app(settings)

    with EventCapture(app.state.resources.bus) as events, TestClient(app) as client:
        response = client.post("/users", json=ADA)
        failure, *_ = events.failures

    assert response.status_code == 201
    assert failure.delivery.handler == "users.send_welcome_mail"
    assert len(events.handled.by("audit.write_row")) == 1


def test_two_shops_in_one_process_share_nothing(
    shop: Shop, capevents: EventCapture, tmp_path: Path
) -> None:
    other = create_app(Settings(database_url=f"sqlite:///{tmp_path / 'other.db'}"))

    with EventCapture(other.state.resources.bus) as others:
        shop.client.post("/users", json=ADA)

        capevents.one(UserCreated)
        others.none()


def test_settings_survive_the_way_through_the_environment() -> None:
    settings = Settings(
        "sqlite:///elsewhere.db",
        "mail.example",
        25,
        "http://far.example",
        "http://bank.example",
        credit_limit_cents=1,
        lease_seconds=2.5,
    )

    assert Settings.from_env(settings.to_env()) == settings
    assert Settings.from_env({}) == Settings()
