"""What others send and read, and what cannot be read."""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any
from uuid import uuid4

import aio_pika
import pytest
from aiokafka import AIOKafkaProducer
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings import http, kafka, rabbitmq
from faststream.rabbit import RabbitExchange

from eventkit import current_delivery
from tests.brokers.happenings import Placed, customer_of
from tests.brokers.kinds import Message
from tests.brokers.places import Place
from tests.brokers.seen import Seen
from tests.brokers.services import Service, logged

pytestmark = pytest.mark.anyio

SECRET = "hunter2"
GOOD = {"number": 7, "customer": "bob", "how": "", "total": "1.50"}


def message(place: Place, body: object, type_: str = "brokers.placed.v1") -> Message:
    """As a service without eventkit sends it."""
    attributes = {"specversion": "1.0", "id": str(uuid4()), "type": type_, "source": "/foreign"}
    headers = {f"{place.kind.prefix}{name}": value for name, value in attributes.items()}
    headers["content-type"] = "application/json"
    return Message(headers, body if isinstance(body, bytes) else json.dumps(body).encode())


UNREADABLE: Mapping[str, tuple[str, str]] = {
    "unknown": ("unknown", "nobody here consumes 'shop.other.v1', only 'brokers.placed.v1'"),
    "no JSON": ("undecodable", "the body is no brokers.placed.v1: "),
    "wrong field": (
        "undecodable",
        "the body is no brokers.placed.v1: number: Input should be a valid integer, unable to "
        "parse string as an integer",
    ),
    "no headers": ("foreign", "no CloudEvent: it lacks the attributes id, type, source"),
}


async def test_what_cannot_be_read_is_a_dead_letter_that_says_why_and_quotes_nothing(
    place: Place,
) -> None:
    sent = {
        "unknown": message(place, {"secret": SECRET}, "shop.other.v1"),
        "no JSON": message(place, f"{{{SECRET}".encode()),
        "wrong field": message(place, {**GOOD, "number": SECRET}),
        "no headers": Message({}, json.dumps({"bare": SECRET}).encode()),
    }
    billing = Service(place, "billing")
    billing.consume(Placed)
    seen = Seen[Placed]()
    billing.bus.on(Placed)(seen.add)
    with logged() as log:
        async with billing, place.read_dead() as dead:
            await place.send(*sent.values())
            await place.send(message(place, GOOD))
            letters = [await dead.next() for _ in sent]
            await seen.until(1)
        assert SECRET not in log()
    found = {each.body: each for each in letters}
    for name, original in sent.items():
        letter = found[original.body]
        reason, problem = UNREADABLE[name]
        assert letter.headers["eventkit-reason"] == reason, name
        assert letter.headers["eventkit-error"].startswith(problem), name
        assert not any(SECRET in each for each in letter.headers.values()), name
        assert original.headers.items() <= letter.headers.items(), name
    assert await place.unacknowledged() == 0


async def test_others_may_be_ignored(place: Place) -> None:
    billing = Service(place, "billing")
    billing.consume(Placed, others="ignore")
    seen = Seen[Placed]()
    billing.bus.on(Placed)(seen.add)
    async with billing, place.read_dead() as dead:
        other = message(place, {"x": 1}, "shop.other.v1")
        await place.send(other, message(place, GOOD))
        await seen.until(1)
    assert dead.waiting == 0
    assert await place.unacknowledged() == 0


async def test_what_a_foreign_producer_sends_is_handled(place: Place) -> None:
    billing = Service(place, "billing")
    billing.consume(Placed)
    seen = Seen[tuple[Placed, str]]()

    @billing.bus.on(Placed)
    async def handle(event: Placed) -> None:
        await seen.add((event, str(current_delivery().event_id)))

    sent = message(place, GOOD)
    async with billing:
        await place.send(sent)
        ((event, event_id),) = await seen.until(1)
    assert event == Placed(7, customer="bob", total=Decimal("1.50"))
    assert event_id == sent.headers[f"{place.kind.prefix}id"]


async def test_what_we_send_is_read_by_the_sdk_of_cloudevents(place: Place) -> None:
    orders = Service(place, "orders")
    orders.forward(Placed, key=customer_of)
    event = Placed(7)
    async with orders, place.read() as reader:
        await orders.bus.dispatch(event)
        found = await reader.next()
    read = by_the_sdk(place, found)
    assert read.get_id() == str(event.event_id)
    assert read.get_type() == "brokers.placed.v1"
    assert read.get_source() == "/orders"
    assert read.get_time() == event.occurred_at
    assert read.get_extension("partitionkey") == "ada"
    data = read.get_data()
    assert isinstance(data, dict)
    assert data["number"] == 7
    if place.kind.name == "kafka":
        assert found.key == "ada"


def by_the_sdk(place: Place, found: Message) -> BaseCloudEvent:
    """Read it by the binding of the broker; NATS and Redis, which have none, by that of HTTP."""
    match place.kind.name:
        case "kafka":
            headers = {name: value.encode() for name, value in found.headers.items()}
            return kafka.from_binary_event(kafka.KafkaMessage(headers, found.key, found.body))
        case "rabbitmq":
            attributes = dict(found.headers)
            content_type = attributes.pop("content-type")
            return rabbitmq.from_binary_event(
                rabbitmq.RabbitMQMessage(attributes, content_type, found.body)
            )
        case _:
            return http.from_binary_event(http.HTTPMessage(found.headers, found.body))


@pytest.mark.parametrize("place", ["kafka"], indirect=True)
async def test_headers_that_are_no_text_do_not_keep_a_message_of_kafka_from_its_handler(
    place: Place,
) -> None:
    billing = Service(place, "billing")
    billing.consume(Placed)
    seen = Seen[int]()

    @billing.bus.on(Placed)
    async def handle(event: Placed) -> None:
        await seen.add(event.number)

    producer: Any = AIOKafkaProducer(bootstrap_servers=place.url)  # it has no types
    async with billing, producer as client:
        for number, odd in enumerate([b"\xff\xfe", None]):
            sent = message(place, {**GOOD, "number": number})
            headers: list[tuple[str, bytes | None]] = [
                *((name, value.encode()) for name, value in sent.headers.items()),
                ("odd", odd),
            ]
            await client.send_and_wait(place.orders, sent.body, headers=headers)
        await seen.until(2)
    assert seen.all == [0, 1]


@pytest.mark.parametrize("place", ["redis"], indirect=True)
async def test_entries_of_redis_that_faststream_cannot_read_are_dead_letters(place: Place) -> None:
    billing = Service(place, "billing")
    billing.consume(Placed)
    async with billing, place.kind.read(place.url, place.dead) as dead:
        client = await billing.broker.connect()
        await client.xadd(place.orders, {b"odd": b"\xff"})
        letter = await dead.next()

    assert letter.headers["eventkit-reason"] == "foreign"
    assert letter.body == rb'{"odd": "\\xff"}'
    assert await place.kind.left(place.url, place.orders, "billing") == 0


@pytest.mark.parametrize("place", ["rabbitmq"], indirect=True)
async def test_what_rabbitmq_cannot_route_or_does_not_take_fails_the_forward(place: Place) -> None:
    orders = Service(place, "orders")
    full = f"{place.orders}.full"
    async with await aio_pika.connect(place.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(
            full, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}, durable=True
        )
        try:
            await channel.default_exchange.publish(aio_pika.Message(b"the one"), full)
            orders.bridge.forward(Placed, orders.broker.publisher(full), name="forward:full")
            nowhere = RabbitExchange(f"{place.orders}.nowhere", auto_delete=True)
            orders.bridge.forward(
                Placed, orders.broker.publisher(exchange=nowhere), name="forward:nowhere"
            )
            async with orders:
                with pytest.raises(ExceptionGroup) as failed:
                    await orders.bus.dispatch(Placed(1))
        finally:
            await channel.queue_delete(full)
            await channel.exchange_delete(f"{place.orders}.nowhere")
    texts = sorted(str(each) for each in failed.value.exceptions)
    assert any("NO_ROUTE" in each for each in texts)
    assert len(texts) == 2
    assert orders.bus.stats.failed == 2


@pytest.mark.parametrize("place", ["nats"], indirect=True)
async def test_one_event_goes_to_two_subjects_of_one_stream_of_nats(place: Place) -> None:
    from faststream.nats import JStream

    sender = Service(place)
    stream = JStream(place.orders, subjects=[f"{place.orders}.>"])
    audited = sender.broker.publisher(f"{place.orders}.audit", stream=stream)
    sender.forward(Placed)
    sender.bridge.forward(Placed, audited, name="audit")
    async with sender:
        await sender.bus.dispatch(Placed(7))
        stored = await sender.broker.connection.jetstream().stream_info(place.orders)

    assert stored.state.messages == 2
