"""Events that are sent: an ordinary handler, which a broker has to confirm."""

from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from faststream.nats import NatsBroker, NatsRouter
from structlog.contextvars import bound_contextvars

from eventkit import Durable, EventBus, current_delivery, named
from eventkit._core.ambient import carried
from eventkit.faststream import Bridge, BridgeError
from eventkit.faststream._forward import Forward
from eventkit.testing import EventCapture
from tests.core.keepers import FakeKeeper
from tests.faststream.services import (
    BillPaid,
    BillSent,
    Kind,
    OrderPlaced,
    Sent,
    Service,
    in_memory,
    stream_of,
)
from tests.wire.test_codec import class_of

pytestmark = pytest.mark.anyio


async def publish(bus: EventBus, *events: object) -> None:
    async with bus.context():
        bus.publish(*events)


def attributes_of(sent: Sent) -> dict[str, str]:
    return {
        name[3:]: value for name, value in sent.headers.items() if name.startswith(("ce-", "ce_"))
    }


async def test_an_event_is_sent_with_its_attributes_and_its_json(service: Service) -> None:
    event = OrderPlaced(7)
    service.bridge.forward(OrderPlaced, service.publisher("orders"))
    async with service.running():
        await publish(service.bus, event)

    (sent,) = service.watch.sent
    assert sent.place == "orders"
    assert (
        sent.body
        == (
            f'{{"event_id":"{event.event_id}","occurred_at":"'
            f'{event.occurred_at.isoformat().replace("+00:00", "Z")}","order_id":7}}'
        ).encode()
    )
    assert attributes_of(sent) == {
        "specversion": "1.0",
        "id": str(event.event_id),
        "type": "shop.order.placed.v1",
        "source": "/billing",
        "time": event.occurred_at.isoformat(),
    }
    content_type = sent.options.get("content_type") or sent.headers["content-type"]
    assert content_type == "application/json"
    assert service.bus.stats.handled == 1


async def test_its_id_and_key_are_told_to_brokers_that_have_a_place_for_them(
    service: Service, kind: Kind
) -> None:
    service.bridge.forward(OrderPlaced, service.publisher("orders"), key=lambda e: f"k{e.order_id}")
    event = OrderPlaced(7)
    async with service.running():
        await publish(service.bus, event)

    (sent,) = service.watch.sent
    assert attributes_of(sent)["partitionkey"] == "k7"
    id = str(event.event_id)
    match kind:
        case "nats":
            assert sent.headers["Nats-Msg-Id"] == f"{id} orders"
        case "rabbit":
            assert (sent.options["message_id"], sent.options["persist"]) == (id, True)
        case "kafka":
            assert sent.options["key"] == b"k7"
        case "redis":
            pass


async def test_two_forwards_of_one_event_send_the_same_id_and_time(service: Service) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"))
    service.bridge.forward(BillSent, service.publisher("copies"), name="copies")
    async with service.running():
        await publish(service.bus, BillSent(7), BillSent(7))

    first, copy, second, _ = map(attributes_of, service.watch.sent)
    assert first == copy
    assert first["id"] != second["id"]


async def test_nats_takes_it_for_sent_twice_only_where_it_goes_to_one_subject() -> None:
    service = Service("nats")
    for number, place in enumerate(("orders.new", "orders.new", "orders.audit")):
        service.bridge.forward(OrderPlaced, service.publisher(place), name=str(number))
    async with service.running():
        await publish(service.bus, OrderPlaced(7))

    ids = {sent.headers["Nats-Msg-Id"] for sent in service.watch.sent}
    assert len(service.watch.sent) == 3
    assert len(ids) == 2


async def test_one_publisher_may_send_events_of_several_classes(service: Service) -> None:
    publisher = service.publisher("orders")
    service.bridge.forward(BillSent, publisher)
    service.bridge.forward(OrderPlaced, publisher, key=lambda e: None)
    async with service.running():
        await publish(service.bus, BillSent(7), OrderPlaced(7))

    assert [attributes_of(sent)["type"] for sent in service.watch.sent] == [
        "shop.bill.sent.v1",
        "shop.order.placed.v1",
    ]
    assert "partitionkey" not in attributes_of(service.watch.sent[1])


async def test_a_forward_is_a_handler_like_any_other(service: Service) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"), timeout=3)
    seen: list[object] = []

    @service.bus.on(BillSent)
    async def note(event: BillSent) -> None:
        seen.append(event)

    with EventCapture(service.bus) as capture:
        async with service.running():
            await publish(service.bus, BillSent(7))

        assert capture.handled.by("forward:shop.bill.sent.v1") == [BillSent(7)]
    described, _ = service.bus.describe()
    assert described["handler"] == "forward:shop.bill.sent.v1"
    assert (described["timeout"], described["durable"]) == (3, False)
    assert "forward:shop.bill.sent.v1" in service.bus.explain(BillSent)
    assert seen == [BillSent(7)]


async def test_it_is_subscribed_where_it_was_wired(service: Service) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"))

    (described,) = service.bus.describe()
    assert described["subscribed_at"].partition(":")[0].endswith("test_forward.py")


async def test_it_fails_alone_where_the_broker_is_away(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"))
    service.bridge.forward(BillSent, service.publisher("copies"), name="copies")
    service.watch.refuse["bills"] = ConnectionError("away")
    async with service.running():
        await publish(service.bus, BillSent(7))

    assert [sent.place for sent in service.watch.sent] == ["copies"]
    assert (service.bus.stats.handled, service.bus.stats.failed) == (1, 1)
    assert "handler=forward:shop.bill.sent.v1" in caplog.text


async def test_it_has_a_name_of_its_own_and_can_be_cancelled(service: Service) -> None:
    subscription = service.bridge.forward(BillSent, service.publisher("bills"), name="send bills")

    assert [entry["handler"] for entry in service.bus.describe()] == ["send bills"]
    subscription.cancel()
    assert service.bus.describe() == []


async def test_it_is_durable_where_it_is_told_to_be(service: Service) -> None:
    bridge, publisher = service.bridge, service.publisher("bills")
    keeper = FakeKeeper(service.bus)
    bridge.forward(BillSent, publisher, durable=True)
    keyed = bridge.forward(
        OrderPlaced, publisher, durable=Durable(attempts=3), key=lambda e: f"k{e.order_id}"
    )
    bridge.forward(BillPaid, publisher, durable=Durable(key=lambda e: "k"))

    assert [entry["durable"] for entry in service.bus.describe()] == [True, True, True]
    assert keeper.told == [
        "admit forward:shop.bill.sent.v1",
        "admit forward:shop.order.placed.v1",
        "admit forward:shop.bill.paid.v1",
    ]
    options = keyed.declared.durable
    assert options is not None
    assert options.attempts == 3
    assert options.key is not None
    assert options.key(OrderPlaced(7)) == "k7"


def test_a_key_is_a_function_and_is_given_once(service: Service) -> None:
    def key(event: BillSent) -> str:
        return "k"

    with pytest.raises(TypeError, match="key has to be a function that takes the event, not 'id'"):
        service.bridge.forward(BillSent, service.publisher("bills"), key="id")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"key is given twice: to forward\(\), and to Durable\(\)"):
        service.bridge.forward(
            BillSent, service.publisher("bills"), key=key, durable=Durable(key=key)
        )
    service.bridge.forward(BillSent, service.publisher("bills"), key=key)


@pytest.mark.parametrize("key", ["", 7])
async def test_a_key_that_is_no_text_fails_that_delivery(service: Service, key: Any) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"), key=lambda _: key)
    async with service.running():
        (failure,) = await failures_of(service.bus, BillSent(7))

    assert str(failure) == "key has to be a str that is not empty"


async def failures_of(bus: EventBus, event: object) -> list[Exception]:
    try:
        await bus.dispatch(event)
    except ExceptionGroup as group:
        return [*group.exceptions]
    return []


async def test_a_subclass_is_not_forwarded_by_the_name_of_its_base(service: Service) -> None:
    @named("shop.order.rush.v1")
    @dataclass(frozen=True, slots=True)
    class Rush(OrderPlaced):
        pass

    service.bridge.forward(OrderPlaced, service.publisher("orders"))
    service.bridge.forward(Rush, service.publisher("rush"))
    async with service.running():
        (failure,) = await failures_of(service.bus, Rush(7))

    assert isinstance(failure, BridgeError)
    assert str(failure).endswith(
        ".Rush is a subclass of OrderPlaced: forward the subclass under its own name"
    )
    assert [sent.place for sent in service.watch.sent] == ["rush"]


async def test_an_event_that_cannot_be_written_fails(service: Service) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"))
    async with service.running():
        (failure,) = await failures_of(service.bus, BillSent("7"))  # type: ignore[arg-type]

    assert str(failure).startswith("BillSent.order_id: ")


async def test_a_broker_that_is_not_started_is_told(service: Service) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"))

    (failure,) = await failures_of(service.bus, BillSent(7))

    assert isinstance(failure, BridgeError)
    assert str(failure) == (
        "the broker is not started: await broker.start() in the application's lifespan"
    )


async def test_what_the_broker_does_not_confirm_has_failed(
    service: Service, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = service.publisher("bills")
    service.bridge.forward(BillSent, publisher)
    reasons = {
        "nats": "there is no acknowledgement",
        "rabbit": "there is no confirmation",
        "redis": "there is no id of an entry",
        "kafka": "there is no offset of a record",
    }
    async with service.running():
        monkeypatch.setattr(publisher, "is_test", False)
        (failure,) = await failures_of(service.bus, BillSent(7))

    assert isinstance(failure, BridgeError)
    assert str(failure) == f"the broker has not accepted the message: {reasons[kind]}"


async def test_what_it_confirms_is_handled(
    service: Service, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ack:
        """What brokers answer: of NATS, of Kafka, and by its name of RabbitMQ."""

        seq = 1
        offset = 0

    async def publish(*_: object, **options: object) -> Ack:
        return Ack()

    publisher = service.publisher("bills")
    service.bridge.forward(BillSent, publisher)
    monkeypatch.setattr(class_of(publisher), "publish", publish)

    assert await failures_of(service.bus, BillSent(7)) == []


def test_on_trio_it_says_that_faststream_is_asyncio_only() -> None:
    service = Service("nats")
    service.bridge.forward(BillSent, service.publisher("bills"))
    failed: list[Exception] = []

    async def main() -> None:
        failed.extend(await failures_of(service.bus, BillSent(7)))

    anyio.run(main, backend="trio")

    (failure,) = failed
    assert isinstance(failure, BridgeError)
    assert str(failure) == (
        "FastStream works on asyncio only: on trio, send the result of eventkit.wire.encode() with "
        "a client of your own"
    )


async def test_a_correlation_id_of_the_log_and_what_is_carried_go_along(service: Service) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"))
    async with service.running():
        with bound_contextvars(request_id="r-7"):
            token = carried.set({"traceparent": "00-1"})
            await publish(service.bus, BillSent(1))
            carried.reset(token)
        with bound_contextvars(request_id="r-7", correlation_id=8):
            await publish(service.bus, BillSent(2))
        await publish(service.bus, BillSent(3))

    first, second, third = service.watch.sent
    assert first.options["correlation_id"] == "r-7"
    assert first.headers["traceparent"] == "00-1"
    assert second.options["correlation_id"] == "8"
    assert "traceparent" not in second.headers
    assert third.options["correlation_id"]  # FastStream makes one


async def test_an_id_that_anybody_may_have_written_is_sent_so_that_each_broker_takes_it(
    service: Service,
) -> None:
    """RabbitMQ takes 255 bytes, and FastStream's format for Redis is spoilt by what is no ASCII."""
    service.bridge.forward(BillSent, service.publisher("bills"))
    async with service.running():
        for id_ in ("é\r\nNats-Msg-Id: 7", "x" * 300):
            token = carried.set({"traceparent": id_})
            with bound_contextvars(correlation_id=id_):
                await publish(service.bus, BillSent(1))
            carried.reset(token)

    odd, long = service.watch.sent
    assert odd.options["correlation_id"] == odd.headers["traceparent"] == r"\xe9 Nats-Msg-Id: 7"
    assert long.options["correlation_id"] == "x" * 255


async def test_a_publisher_of_a_router_is_one_too() -> None:
    bus, broker, router = EventBus(), NatsBroker(logger=None), NatsRouter(prefix="eu.")
    Bridge(bus, source="/").forward(BillSent, router.publisher("bills", stream=stream_of("eu")))
    broker.include_router(router)
    came: list[object] = []

    @broker.subscriber("eu.bills", stream=stream_of("eu"))
    async def note(message: dict[str, int]) -> None:
        came.append(message)

    async with in_memory(broker):
        await publish(bus, BillSent(7))

    assert came == [{"order_id": 7}]


async def test_two_bridges_of_one_bus_have_names_of_their_own(service: Service) -> None:
    service.bridge.forward(BillSent, service.publisher("bills"))
    other = Bridge(service.bus, source="/other")
    other.forward(BillSent, service.publisher("others"), name="others")
    async with service.running():
        await publish(service.bus, BillSent(7))

    assert [attributes_of(sent)["source"] for sent in service.watch.sent] == ["/billing", "/other"]


async def test_a_handler_sees_no_message_in_an_event_of_its_own_service(service: Service) -> None:
    seen: list[object] = []

    @service.bus.on(BillSent)
    async def note(event: BillSent) -> None:
        seen.append(current_delivery().received)

    await publish(service.bus, BillSent(7))

    assert seen == [None]


def test_it_shows_itself_by_name_and_broker() -> None:
    service = Service("nats")
    subscription = service.bridge.forward(BillSent, service.publisher("bills"))
    forward: Any = subscription.declared.function

    assert repr(forward.__self__) == "<Forward of shop.bill.sent.v1 to NATS>"
    assert isinstance(forward.__self__, Forward)
    assert repr(service.bridge) == f"<Bridge of {service.bus!r} as '/billing'>"
