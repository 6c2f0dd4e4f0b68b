"""Events that come from other services: who handles them, and what handlers see of the message."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import NAMESPACE_URL, uuid5

import anyio
import attrs
import pydantic
import pytest
from fast_depends.msgspec import MsgSpecSerializer
from fastapi import Depends, FastAPI, Request
from faststream.exceptions import NackMessage
from faststream.nats import NatsBroker, NatsRouter
from faststream.redis import RedisBroker, StreamSub
from faststream.specification import AsyncAPI
from structlog.contextvars import get_contextvars

from eventkit import Delivery, DomainEvent, EventBus, current_delivery, named
from eventkit.faststream import Bridge
from eventkit.starlette import EventContextMiddleware
from eventkit.testing import EventCapture
from eventkit.wire import encode
from tests.asgi import lifespan_of
from tests.faststream.services import (
    NEEDS_AIOKAFKA,
    BillPaid,
    BillSent,
    Kind,
    OrderPlaced,
    Service,
    in_memory,
    stream_of,
)

pytestmark = pytest.mark.anyio


def noting(bus: EventBus, *event_types: type) -> list[tuple[object, Delivery]]:
    """Note each event with its delivery."""
    seen: list[tuple[object, Delivery]] = []

    async def note(event: object) -> None:
        seen.append((event, current_delivery()))

    for event_type in event_types:
        bus.on(event_type)(note)
    return seen


async def test_what_comes_is_handled_and_acknowledged(service: Service) -> None:
    service.consume(OrderPlaced, BillPaid)
    seen = noting(service.bus, OrderPlaced, BillPaid)
    async with service.running():
        await service.send(OrderPlaced(7))
        await service.send(BillPaid(8))

    assert [event for event, _ in seen] == [OrderPlaced(7), BillPaid(8)]
    assert service.answers == ["ACKED", "ACKED"]
    assert service.dead == []


async def test_what_one_service_forwards_another_one_consumes(kind: Kind) -> None:
    service = Service(kind)
    service.consume(OrderPlaced)
    seen = noting(service.bus, OrderPlaced)
    orders, event = EventBus(name="orders"), OrderPlaced(7)
    sender = Bridge(orders, source="/orders")
    sender.forward(OrderPlaced, service.publisher("orders"), key=lambda e: f"größe {e.order_id}")
    async with service.running(), orders.context():
        orders.publish(event)
        async with orders.context(independent=True):
            orders.publish(event)

    first, second = [delivery for _, delivery in seen]
    assert [seen_event for seen_event, _ in seen] == [event, event]
    assert first.event_id == second.event_id == event.event_id
    assert first.received is not None
    prefix = "ce_" if kind == "kafka" else "ce-"
    assert first.received[f"{prefix}source"] == "/orders"
    assert orders.stats.handled == 2


async def test_the_delivery_has_the_id_and_the_headers_of_the_message(service: Service) -> None:
    service.consume(OrderPlaced, BillPaid)
    seen = noting(service.bus, OrderPlaced, BillPaid)
    wired = encode(BillPaid(7), source="/bank", id="no-7")
    async with service.running():
        await service.send(body=wired.body, headers=wired.headers() | {"tenant": "t1"})

    ((_, delivery),) = seen
    assert delivery.event_id == uuid5(NAMESPACE_URL, "/bank no-7")
    assert delivery.received is not None
    assert delivery.received["ce-id"] == "no-7"
    assert delivery.received["tenant"] == "t1"


async def test_what_its_handlers_publish_is_handled_too_and_was_not_received(
    service: Service,
) -> None:
    service.consume(OrderPlaced)
    seen = noting(service.bus, BillPaid)

    @service.bus.on(OrderPlaced)
    async def pay(event: OrderPlaced) -> None:
        service.bus.publish(BillPaid(event.order_id))

    event = OrderPlaced(7)
    async with service.running():
        await service.send(event)

    ((_, delivery),) = seen
    assert delivery.received is None
    assert delivery.event_id != event.event_id
    assert delivery.cause is not None
    assert delivery.cause.event_id == event.event_id


async def test_what_they_publish_is_forwarded_with_the_messages_correlation_and_trace(
    service: Service,
) -> None:
    service.consume(OrderPlaced)
    service.bridge.forward(BillSent, service.publisher("bills"))
    logged: list[object] = []

    @service.bus.on(OrderPlaced)
    async def bill(event: OrderPlaced) -> None:
        logged.append(get_contextvars().get("correlation_id"))
        service.bus.publish(BillSent(event.order_id))

    trace = {"traceparent": "00-1", "tracestate": "x=1", "baggage": "no"}
    async with service.running():
        await service.send(OrderPlaced(7), headers=trace, correlation_id="c-7")
        await service.send(OrderPlaced(8), correlation_id="c-8")

    first, second = [sent for sent in service.watch.sent if sent.place == "bills"]
    assert first.options["correlation_id"] == "c-7"
    assert first.headers["traceparent"] == "00-1"
    assert first.headers["tracestate"] == "x=1"
    assert "baggage" not in first.headers
    assert second.options["correlation_id"] == "c-8"
    assert "traceparent" not in second.headers
    assert logged == ["c-7", "c-8"]


async def test_messages_that_are_handled_at_once_keep_theirs_apart(service: Service) -> None:
    service.consume(OrderPlaced)
    service.bridge.forward(BillSent, service.publisher("bills"))

    @service.bus.on(OrderPlaced)
    async def bill(event: OrderPlaced) -> None:
        for _ in range(event.order_id % 3):
            await anyio.lowlevel.checkpoint()
        service.bus.publish(BillSent(event.order_id))

    async def send(number: int) -> None:
        trace = {"traceparent": f"t{number}"}
        await service.send(OrderPlaced(number), headers=trace, correlation_id=f"c{number}")

    async with service.running(), anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(send, number)

    bills = [sent for sent in service.watch.sent if sent.place == "bills"]
    told = {(s.body, s.options["correlation_id"], s.headers["traceparent"]) for s in bills}
    assert told == {
        (f'{{"order_id":{number}}}'.encode(), f"c{number}", f"t{number}") for number in range(10)
    }


async def test_an_event_without_handlers_is_acknowledged(service: Service) -> None:
    service.consume(OrderPlaced)
    with EventCapture(service.bus) as capture:
        async with service.running():
            await service.send(OrderPlaced(7))

        assert capture.published == [OrderPlaced(7)]
    assert service.answers == ["ACKED"]


async def test_the_structured_mode_is_read(service: Service) -> None:
    service.consume(OrderPlaced)
    seen = noting(service.bus, OrderPlaced)
    body = (
        b'{"specversion": "1.0", "id": "7", "type": "shop.order.placed.v1", "source": "/o", '
        b'"time": "2026-01-02T03:04:05Z", "data": {"order_id": 7}}'
    )
    content_type = "application/cloudevents+json"
    given: dict[str, Any] = (
        {"content_type": content_type}
        if service.kind == "rabbit"
        else {"headers": {"content-type": content_type}}
    )
    async with service.running():
        await service.send(body=body, **given)

    assert [event for event, _ in seen] == [OrderPlaced(7)]


async def test_two_consumers_on_one_bus_are_two_groups(service: Service) -> None:
    service.consume(OrderPlaced)
    service.consume(BillPaid, place="bills", dead_letter=service.publisher("dead bills"))
    seen = noting(service.bus, OrderPlaced, BillPaid)
    async with service.running():
        await service.send(OrderPlaced(7))
        await service.send(BillPaid(7), place="bills")
        await service.send(BillPaid(7))

    assert [event for event, _ in seen] == [OrderPlaced(7), BillPaid(7)]
    assert [sent.place for sent in service.watch.sent if "dead" in sent.place] == ["dead"]


async def test_headers_that_are_no_texts_are_read_as_texts() -> None:
    service = Service("rabbit")
    service.consume(OrderPlaced)
    seen = noting(service.bus, OrderPlaced)
    headers = {"retries": 3, "raw": b"\xff1", "nested": {"a": 1}, "none": None}
    async with service.running():
        await service.send(OrderPlaced(7), headers=headers)

    ((_, delivery),) = seen
    assert delivery.received is not None
    assert {name: delivery.received[name] for name in headers} == {
        "retries": "3",
        "raw": "\ufffd1",
        "nested": "{'a': 1}",
        "none": "None",
    }


@NEEDS_AIOKAFKA
@pytest.mark.parametrize("own_parser", [False, True])
async def test_records_of_kafka_with_null_headers_or_no_utf_8_are_handled(
    *, own_parser: bool
) -> None:
    from faststream.kafka import testing

    parsed: list[Any] = []

    async def parse(record: Any, original: Any) -> Any:
        parsed.append(record)
        return await original(record)

    service = Service("kafka", parser=parse) if own_parser else Service("kafka")
    service.consume(OrderPlaced)
    seen = noting(service.bus, OrderPlaced)
    wired = encode(OrderPlaced(7), source="/orders")
    kafka: Any = testing  # whose records are generic, and not said to be of what
    record = await kafka.build_message(
        wired.body, "orders", headers=wired.headers("ce_"), serializer=None
    )
    record.headers = [*record.headers, ("null", None), ("raw", b"\xff1")]
    async with service.running():
        await service.subscribers[0].process_message(record)

    ((event, delivery),) = seen
    assert event == OrderPlaced(7)
    assert delivery.received is not None
    assert (delivery.received["null"], delivery.received["raw"]) == ("", "\ufffd1")
    assert service.answers == ["ACKED"]
    assert parsed == [record] * own_parser


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ({b"__data__": b'{"data": "x", "headers": []}'}, b'{"data": "x", "headers": []}'),
        ({b"\xff": b"1", b"b": b"\xfe"}, rb'{"\\xff": "1", "b": "\\xfe"}'),
    ],
)
async def test_entries_of_redis_that_faststream_cannot_read_are_dead_letters(
    fields: dict[bytes, bytes], body: bytes
) -> None:
    """FastStream hands them back, and would do so each time that they are claimed."""
    service = Service("redis")
    service.consume(OrderPlaced)
    entry = {"type": "stream", "channel": "orders", "message_ids": [b"1-0"], "data": fields}
    async with service.running():
        await service.subscribers[0].process_message(entry)

    (sent,) = service.dead
    assert sent.headers["eventkit-reason"] == "foreign"
    assert sent.body == body
    assert service.answers == ["ACKED"]


async def decode_twice(message: Any, original: Any) -> Any:
    await original(message)
    return await original(message)


@pytest.mark.parametrize(
    "options",
    [
        {"serializer": MsgSpecSerializer()},
        {"serializer": None},
        {"apply_types": False},
        {"decoder": decode_twice},
    ],
    ids=["msgspec", "without FastDepends", "without types", "with a decoder"],
)
async def test_however_the_broker_converts_the_whole_message_comes(
    kind: Kind, options: dict[str, Any]
) -> None:
    service = Service(kind, **options)
    service.consume(OrderPlaced, BillPaid)
    seen = noting(service.bus, OrderPlaced)
    async with service.running():
        await service.send(OrderPlaced(7))
        await service.send(OrderPlaced(7), body=b'{"order_id": "x"}')

    assert [event for event, _ in seen] == [OrderPlaced(7)]
    assert service.answers == ["ACKED", "ACKED"]
    assert [sent.headers["eventkit-reason"] for sent in service.dead] == ["undecodable"]


async def test_a_parser_and_a_middleware_of_the_brokers_are_called(kind: Kind) -> None:
    async def parse(message: Any, original: Any) -> Any:
        parsed = await original(message)
        parsed.headers = {**parsed.headers, "parsed": "yes"}
        return parsed

    service = Service(kind, parser=parse)
    service.consume(OrderPlaced)
    seen = noting(service.bus, OrderPlaced)
    async with service.running():
        await service.send(OrderPlaced(7))

    ((_, delivery),) = seen
    assert delivery.received is not None
    assert delivery.received["parsed"] == "yes"
    assert len(service.messages) == 1


async def test_a_subscriber_of_a_router_is_one_too() -> None:
    bus, broker, router = EventBus(), NatsBroker(logger=None), NatsRouter(prefix="eu.")
    seen = noting(bus, OrderPlaced)
    Bridge(bus, source="/").consume(
        router.subscriber("orders", stream=stream_of("eu"), durable="b", pull_sub=True),
        OrderPlaced,
        dead_letter=router.publisher("dead", stream=stream_of("eu")),
    )
    broker.include_router(router)
    wired = encode(OrderPlaced(7), source="/")
    async with in_memory(broker):
        await broker.publish(wired.body, "eu.orders", headers=wired.headers(), stream="eu")

    assert [event for event, _ in seen] == [OrderPlaced(7)]


# The schema.


def schemas_of(service: Service) -> tuple[object, dict[str, Any]]:
    """What AsyncAPI says of the payload of what is consumed, and all schemas."""
    components: Any = AsyncAPI(service.broker).to_specification().to_jsonable()["components"]
    (payload,) = [
        message["payload"]
        for name, message in components["messages"].items()
        if name.endswith("SubscribeMessage")
    ]
    return payload, components["schemas"]


def consuming(*event_types: type) -> Service:
    service = Service("nats")
    service.consume(*event_types)
    return service


def test_the_schema_is_that_of_the_event() -> None:
    payload, schemas = schemas_of(consuming(OrderPlaced))

    assert payload == {"$ref": "#/components/schemas/OrderPlaced"}
    assert {*schemas["OrderPlaced"]["properties"]} == {"event_id", "occurred_at", "order_id"}


def test_subscribers_of_one_place_are_two_channels(recwarn: pytest.WarningsRecorder) -> None:
    broker = RedisBroker()
    new = StreamSub("orders", group="billing", consumer="one", max_records=10)
    left = StreamSub("orders", group="billing", consumer="one", min_idle_time=60_000)
    Bridge(EventBus(), source="/billing").consume(
        [broker.subscriber(stream=new), broker.subscriber(stream=left)],
        OrderPlaced,
        dead_letter=broker.publisher(stream="dead"),
    )
    channels: Any = AsyncAPI(broker).to_specification().to_jsonable()["channels"]

    assert {"orders:Consume", "orders:Consume2"} <= {*channels}
    assert not [each for each in recwarn if "Overwrite" in str(each.message)]


def test_the_schema_of_several_is_any_of_them() -> None:
    payload, schemas = schemas_of(consuming(OrderPlaced, BillPaid))

    assert payload == {"$ref": "#/components/schemas/Consume:Message:Payload"}
    assert schemas["Consume:Message:Payload"]["anyOf"] == [
        {"$ref": "#/components/schemas/OrderPlaced"},
        {"$ref": "#/components/schemas/BillPaid"},
    ]
    assert schemas["BillPaid"]["properties"] == {
        "order_id": {"title": "Order Id", "type": "integer"}
    }


@named("shop.order.moved.v1")
class OrderMoved(pydantic.BaseModel):
    order_id: int


@named("shop.order.sent.v1")
@attrs.frozen
class OrderSent:
    order_id: int


async def test_classes_of_pydantic_and_attrs_are_consumed_and_described(kind: Kind) -> None:
    service = Service(kind)
    service.consume(OrderMoved, OrderSent)
    seen = noting(service.bus, OrderMoved, OrderSent)
    async with service.running():
        await service.send(OrderMoved(order_id=7))
        await service.send(OrderSent(7))

    assert [event for event, _ in seen] == [OrderMoved(order_id=7), OrderSent(7)]
    payload, schemas = schemas_of(consuming(OrderMoved, OrderSent))
    assert schemas["Consume:Message:Payload"]["anyOf"] == [
        {"$ref": "#/components/schemas/OrderMoved"},
        {"title": "OrderSent", "type": "object"},
    ]
    assert payload == {"$ref": "#/components/schemas/Consume:Message:Payload"}


def test_one_class_that_pydantic_does_not_know_is_an_object() -> None:
    payload, schemas = schemas_of(consuming(OrderSent))

    assert payload == {"$ref": "#/components/schemas/Consume:Message:Payload"}
    assert schemas["Consume:Message:Payload"]["type"] == "object"


# In an application.


def title_of(request: Request) -> str:
    return str(request.app.title)


async def test_handlers_of_what_comes_have_the_application(service: Service) -> None:
    titles: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with service.running(), anyio.create_task_group() as tasks:
            tasks.start_soon(service.send, OrderPlaced(7))
            yield

    app = FastAPI(title="billing", lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=service.bus)
    service.consume(OrderPlaced)

    @service.bus.on(OrderPlaced)
    async def note(event: OrderPlaced, title: Annotated[str, Depends(title_of)]) -> None:
        titles.append(title)

    async with lifespan_of(app):
        await anyio.wait_all_tasks_blocked()

    assert titles == ["billing"]
    assert service.answers == ["ACKED"]


# A process that ends.


async def test_a_cancelled_consumer_hands_its_message_back(service: Service) -> None:
    service.consume(OrderPlaced)
    begun = anyio.Event()

    @service.bus.on(OrderPlaced)
    async def wait(event: OrderPlaced) -> None:
        begun.set()
        await anyio.sleep_forever()

    async with service.running():
        task = asyncio.ensure_future(service.send(OrderPlaced(7)))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert service.answers == ["NACKED"]
    assert service.bus.stats.undelivered == 1
    assert service.dead == []


async def test_it_hands_it_back_although_its_scope_is_cancelled(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.consume(OrderPlaced)
    answered: list[str] = []

    @service.bus.on(OrderPlaced)
    async def cancel(event: OrderPlaced) -> None:
        async def nack() -> None:
            await anyio.lowlevel.checkpoint()
            answered.append("nack")

        monkeypatch.setattr(service.messages[0], "nack", nack)
        scope.cancel()
        await anyio.sleep_forever()

    async with service.running():
        with anyio.CancelScope() as scope:
            await service.send(OrderPlaced(7))

    assert scope.cancelled_caught
    assert answered == ["nack"]


async def test_so_does_one_that_is_cancelled_in_a_pause(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.consume(OrderPlaced)
    monkeypatch.setattr("eventkit.faststream._consumer.sleep", cancelled_pause := Pause())

    @service.bus.on(OrderPlaced)
    async def later(event: OrderPlaced) -> None:
        raise NackMessage

    async with service.running():
        await cancelled_pause.end(service.send(OrderPlaced(7)))

    assert service.answers == ["NACKED"]


class Pause:
    """A pause that is cancelled."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()

    async def __call__(self, seconds: float) -> None:
        self.scope.cancel()
        await anyio.sleep_forever()

    async def end(self, sending: Awaitable[None]) -> None:
        with self.scope:
            await sending
        assert self.scope.cancelled_caught


async def test_a_broker_that_is_gone_by_then_is_no_trouble(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.consume(OrderPlaced)

    @service.bus.on(OrderPlaced)
    async def cancel(event: OrderPlaced) -> None:
        async def nack() -> None:
            raise ConnectionError

        monkeypatch.setattr(service.messages[0], "nack", nack)
        scope.cancel()
        await anyio.sleep_forever()

    async with service.running():
        with anyio.CancelScope() as scope:
            await service.send(OrderPlaced(7))

    assert scope.cancelled_caught


async def test_a_handler_that_ends_the_process_hands_the_message_back(service: Service) -> None:
    service.consume(OrderPlaced)

    @service.bus.on(OrderPlaced)
    async def leave(event: OrderPlaced) -> None:
        raise SystemExit(3)

    async with service.running():
        with pytest.raises(SystemExit):
            await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]
    assert service.dead == []


@named("shop.parcel.v1")
@dataclass(frozen=True, slots=True)
class Parcel(DomainEvent):
    order_id: int


async def test_another_service_may_call_its_class_as_it_likes(service: Service) -> None:
    @named("shop.parcel.v2", formerly={"shop.parcel.v1": None})
    @dataclass(frozen=True, slots=True)
    class Ours(DomainEvent):
        order_id: int

    service.consume(Ours)
    seen = noting(service.bus, Ours)
    parcel = Parcel(7)
    async with service.running():
        await service.send(parcel)

    ((event, delivery),) = seen
    assert event == Ours(7)
    assert isinstance(event, Ours)
    assert event.event_id == delivery.event_id == parcel.event_id
