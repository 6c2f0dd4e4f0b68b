"""What the shop owes to its neighbours and its books, and does although something fails first."""

from uuid import UUID

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import text

from eventkit.testing import EventCapture
from tests.databases import obey
from tests.project.shop.conftest import Shop

ADA = {"name": "Ada", "email": "ada@example.com"}
TEA = {"email": "bob@example.com", "lines": [{"sku": "tea", "quantity": 1}]}


def dead_letters(shop: Shop) -> dict[str, tuple[UUID, int]]:
    """The ids and attempts of what was given up, by handler."""
    found = shop.ask(shop.resources.outbox.deliveries)
    return {each.handler: (each.id, each.attempt) for each in found}


def test_what_has_ended_well_is_kept_no_longer(shop: Shop, capevents: EventCapture) -> None:
    shop.client.post("/users", json=ADA)
    shop.client.post("/orders", json=TEA)

    assert len(capevents.handled) == 7
    assert shop.kept == []


def test_a_warehouse_that_was_down_hears_of_it_later_and_once(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.warehouse.down = True
    shop.client.post("/orders", json=TEA)
    assert shop.kept == ["orders.tell_warehouse"]
    assert capevents.failures[0].delivery.attempt == 1

    shop.warehouse.down = False
    shop.run_due()

    assert shop.warehouse.reports == [{"sku": "tea", "taken": 1, "left": 99}]
    assert shop.kept == []


def test_a_mail_that_is_refused_each_time_is_a_dead_letter_that_can_be_sent_again(
    shop: Shop, capevents: EventCapture
) -> None:
    capevents.fail("users.send_welcome_mail", OSError("mailbox full"), times=25)
    shop.client.post("/users", json=ADA)
    shop.run_due()

    assert [failure.delivery.attempt for failure in capevents.failures] == [*range(1, 26)]
    (letter,) = dead_letters(shop).values()
    assert letter == (capevents.failures[0].delivery.id, 25)
    assert shop.mails.mails == []

    assert shop.ask(shop.resources.outbox.retry, [letter[0]]) == 1
    shop.run_due()

    assert [mail.subject for mail in shop.mails.mails] == ["Welcome, Ada!"]
    assert shop.kept == []


def test_a_payment_that_is_declined_is_not_asked_for_again_until_somebody_says_so(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.payments.declines = True
    shop.client.post("/orders", json=TEA)
    shop.run_due()

    assert len(capevents.failures) == len(shop.payments.requests) == 1
    (id_, attempt) = dead_letters(shop)["orders.collect_payment"]
    assert attempt == 1

    shop.payments.declines = False
    shop.ask(shop.resources.outbox.retry, [id_])
    shop.run_due()

    assert shop.payments.charges == {str(id_): {"order_id": 1, "cents": 450}}
    assert shop.column("SELECT order_id FROM payments") == [1]
    assert shop.kept == []


def test_money_that_was_taken_and_could_not_be_noted_is_noted_later_and_taken_once(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.execute(
        "CREATE TRIGGER full BEFORE INSERT ON payments BEGIN SELECT RAISE(ABORT, 'full'); END"
    )
    shop.client.post("/orders", json=TEA)
    assert len(shop.payments.charges) == 1
    assert shop.column("SELECT order_id FROM payments") == []
    assert len(capevents.failures) >= 1

    shop.execute("DROP TRIGGER full")
    shop.run_due()

    assert len(shop.payments.requests) >= 2
    assert len(shop.payments.charges) == 1
    assert shop.column("SELECT order_id FROM payments") == [1]
    assert shop.kept == []


def test_an_audit_row_and_the_end_of_its_delivery_are_one_commit(
    shop: Shop, capevents: EventCapture
) -> None:
    """Where its delivery cannot be completed, the row is not there either, so it is not doubled."""
    shop.execute(
        "CREATE TRIGGER stuck BEFORE DELETE ON eventkit_outbox WHEN old.handler = 'audit.write_row'"
        " BEGIN SELECT RAISE(ABORT, 'stuck'); END"
    )
    shop.client.post("/users", json=ADA)
    assert shop.column("SELECT kind FROM audit") == []
    assert shop.kept == ["audit.write_row"]
    assert len(capevents.failures) >= 1

    shop.execute("DROP TRIGGER stuck")
    shop.run_due()

    assert shop.column("SELECT kind FROM audit") == ["UserCreated"]
    assert shop.kept == []


def test_events_are_kept_by_names_that_outlive_their_classes(
    shop: Shop, capevents: EventCapture
) -> None:
    shop.warehouse.down = shop.payments.declines = True
    shop.client.post("/orders", json=TEA)
    assert len(capevents.failures) >= 2

    names = shop.column("SELECT DISTINCT event_type FROM eventkit_outbox ORDER BY event_type")
    assert names == ["shop.order.placed.v1", "shop.stock.taken.v1"]


def test_a_suite_that_rolls_everything_back_in_the_end_has_its_handlers_run_in_memory(
    shop: Shop, capevents: EventCapture
) -> None:
    database = shop.resources.database
    database.engine.dispose()
    obey(database.engine)

    with shop.resources.outbox.in_memory(), database.engine.connect() as connection:
        everything = connection.begin()
        database.sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
        shop.client.post("/users", json=ADA)
        audited = connection.scalars(text("SELECT kind FROM audit")).all()
        kept = connection.scalars(text("SELECT handler FROM eventkit_outbox")).all()
        everything.rollback()

    assert (audited, kept) == (["UserCreated"], [])
    assert len(capevents.handled) == 2
    assert [mail.subject for mail in shop.mails.mails] == ["Welcome, Ada!"]
    assert shop.column("SELECT kind FROM audit") == shop.kept == []
