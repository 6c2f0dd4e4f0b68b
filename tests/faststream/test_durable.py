"""Consumers that hand their messages to the bus's outbox, and what is said where there is none."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from ssl import SSLCertVerificationError
from typing import Any
from uuid import UUID

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from faststream.rabbit import RabbitRouter
from sqlalchemy import Engine, MetaData, text
from starlette.applications import Starlette

from eventkit import NoOutboxError, current_delivery
from eventkit._core.bus import state_of
from eventkit.outbox import Outbox, add_tables
from eventkit.starlette import EventContextMiddleware
from eventkit.wire import encode
from tests.asgi import lifespan_of
from tests.core.keepers import FakeKeeper
from tests.databases import sqlite
from tests.faststream.conftest import Clock
from tests.faststream.services import BillPaid, BillSent, OrderPlaced, Service

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database with the outbox's tables."""
    metadata = MetaData()
    add_tables(metadata)
    with sqlite(tmp_path / "test.db") as engine:
        metadata.create_all(engine)
        yield engine


def rows(engine: Engine, table: str) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        found = connection.execute(text(f"select * from {table}"))
        return [dict(row) for row in found.mappings()]


class Rows:
    """The outbox of a bus, as far as a consumer uses it; in memory."""

    def __init__(self, service: Service) -> None:
        self.received: list[dict[str, Any]] = []
        self.errors: list[Exception] = []
        FakeKeeper(service.bus).outbox = self

    async def receive(
        self,
        event: object,
        *,
        consumer: str,
        message_id: str,
        headers: Mapping[str, str],
        event_id: UUID,
    ) -> bool:
        if self.errors:
            raise self.errors.pop(0)
        self.received.append(
            {
                "event": event,
                "consumer": consumer,
                "message_id": message_id,
                "headers": headers,
                "event_id": event_id,
            }
        )
        return True


async def test_the_outbox_has_what_was_read(service: Service) -> None:
    kept = Rows(service)
    service.consume(OrderPlaced, durable=True)
    event = OrderPlaced(7)
    async with service.running():
        await service.send(event)

    (received,) = kept.received
    name = "orders" if service.kind == "rabbit" else "orders/billing"
    prefix = "ce_" if service.kind == "kafka" else "ce-"
    assert received["event"] == event
    assert received["consumer"] == name
    assert received["message_id"] == f"/orders {event.event_id}"
    assert received["event_id"] == event.event_id
    assert received["headers"][f"{prefix}source"] == "/orders"
    assert state_of(service.bus).needs_keeper == (name,)
    assert service.answers == ["ACKED"]


async def test_routers_that_are_included_by_two_prefixes_have_an_inbox_each(
    engine: Engine,
) -> None:
    """As two services may that have one database: neither drops what the other has received."""
    event, seen = OrderPlaced(7), list[str]()
    for prefix in ("eu_", "us_"):
        service, router = Service("rabbit"), RabbitRouter()

        @service.bus.on(OrderPlaced)
        async def note(event: OrderPlaced, prefix: str = prefix) -> None:
            seen.append(prefix)

        with Outbox(service.bus, engine):
            service.bridge.consume(
                router.subscriber("billing"),
                OrderPlaced,
                dead_letter=service.publisher("dead"),
                durable=True,
            )
            service.broker.include_router(router, prefix=prefix)
            async with service.running():
                await service.send(event, place=f"{prefix}billing")

    assert seen == ["eu_", "us_"]
    assert [row["consumer"] for row in rows(engine, "eventkit_inbox")] == [
        "eu_billing",
        "us_billing",
    ]


async def test_an_outage_of_the_database_is_waited_for(service: Service, clock: Clock) -> None:
    kept = Rows(service)
    kept.errors = [OSError("away")] * 2
    service.consume(OrderPlaced, durable=True)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert len(kept.received) == 1
    assert clock.pauses == [1.0, 1.0]
    assert service.answers == ["ACKED"]
    assert service.dead == []


async def test_so_is_one_that_is_a_value_error_too(service: Service) -> None:
    """As it is while the database has a certificate that is out of date."""
    kept = Rows(service)
    kept.errors = [SSLCertVerificationError("expired")]
    service.consume(OrderPlaced, durable=True)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert len(kept.received) == 1
    assert service.dead == []


@pytest.mark.parametrize("error", [ValueError("no text"), TypeError("no text")])
async def test_what_no_table_can_hold_is_a_dead_letter(service: Service, error: Exception) -> None:
    kept = Rows(service)
    kept.errors = [error]
    service.consume(OrderPlaced, durable=True)
    async with service.running():
        await service.send(OrderPlaced(7))

    (sent,) = service.dead
    assert sent.headers["eventkit-reason"] == "failed"
    assert sent.headers["eventkit-error"] == f"{type(error).__name__}: no text"
    assert service.answers == ["ACKED"]


async def test_what_cannot_be_read_is_a_dead_letter_here_too(service: Service) -> None:
    kept = Rows(service)
    service.consume(OrderPlaced, durable=True)
    async with service.running():
        await service.send(BillPaid(7))

    assert kept.received == []
    assert [sent.headers["eventkit-reason"] for sent in service.dead] == ["unknown"]


# With an outbox.


async def test_a_message_is_handled_once_however_often_it_comes(
    service: Service, engine: Engine
) -> None:
    seen: list[tuple[object, object, object]] = []
    prefix = "ce_" if service.kind == "kafka" else "ce-"

    @service.bus.on(OrderPlaced, durable=True, name="bill")
    async def bill(event: OrderPlaced) -> None:
        delivery = current_delivery()
        assert delivery.received is not None
        seen.append((event, delivery.event_id, delivery.received[f"{prefix}source"]))

    event = OrderPlaced(7)
    with Outbox(service.bus, engine):
        service.consume(OrderPlaced, durable=True)
        async with service.running():
            await service.send(event)
            await service.send(event)

    assert seen == [(event, event.event_id, "/orders")]
    assert service.answers == ["ACKED", "ACKED"]
    assert [row["message_id"] for row in rows(engine, "eventkit_inbox")] == [
        f"/orders {event.event_id}"
    ]
    assert rows(engine, "eventkit_outbox") == []


async def test_what_fails_stays_in_the_outbox_and_is_no_dead_letter(
    service: Service, engine: Engine
) -> None:
    @service.bus.on(OrderPlaced, durable=True, name="bill")
    async def bill(event: OrderPlaced) -> None:
        raise RuntimeError("poison")

    with Outbox(service.bus, engine):
        service.consume(OrderPlaced, durable=True)
        async with service.running():
            await service.send(OrderPlaced(7))

    (row,) = rows(engine, "eventkit_outbox")
    assert row["handler"] == "bill"
    assert service.answers == ["ACKED"]
    assert service.dead == []


async def test_an_id_that_no_table_can_hold_is_a_dead_letter(
    service: Service, engine: Engine
) -> None:
    wired = encode(OrderPlaced(7), source="/orders", id="a\x00b")
    with Outbox(service.bus, engine):
        service.consume(OrderPlaced, durable=True)
        async with service.running():
            await service.send(body=wired.body, headers=wired.headers())

    (sent,) = service.dead
    assert sent.headers["eventkit-error"].startswith(
        r"ValueError: the message_id '/orders a\x00b' "
    )
    assert service.answers == ["ACKED"]


async def test_a_durable_forward_is_kept_until_the_broker_has_it(
    service: Service, engine: Engine
) -> None:
    with Outbox(service.bus, engine):
        service.bridge.forward(BillSent, service.publisher("bills"), durable=True)
        service.watch.refuse["bills"] = ConnectionError("away")
        async with service.running():
            async with service.bus.context():
                service.bus.publish(BillSent(7))
            kept = rows(engine, "eventkit_outbox")
            service.watch.refuse.clear()
            async with service.bus.context():
                service.bus.publish(BillSent(8))

    assert [row["handler"] for row in kept] == ["forward:shop.bill.sent.v1"]
    assert [sent.body for sent in service.watch.sent] == [b'{"order_id":8}']
    assert len(rows(engine, "eventkit_outbox")) == 1


# Without one.


async def test_an_application_does_not_start_without_an_outbox() -> None:
    service = Service("nats")
    service.consume(OrderPlaced, durable=True)
    app = Starlette()
    app.add_middleware(EventContextMiddleware, bus=service.bus)

    async with lifespan_of(app) as failed:
        pass

    assert isinstance(failed.error, NoOutboxError)
    assert "durable consumers (orders/billing)" in str(failed.error)


async def test_a_message_that_comes_all_the_same_is_handed_back_and_the_log_says_why(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.consume(OrderPlaced, durable=True)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]
    assert service.dead == []
    assert "messages cannot be stored in the inbox, and wait at the broker" in caplog.text
    assert (
        "BridgeError: consume(..., durable=True) needs an outbox: Outbox(bus, engine), where the "
        "application is wired"
    ) in caplog.text
