"""What is refused where a bridge is wired: whatever would lose messages, or have them go round."""

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, NatsRouter, PullSub
from faststream.rabbit import (
    ExchangeType,
    QueueType,
    RabbitBroker,
    RabbitExchange,
    RabbitQueue,
    RabbitRouter,
)
from faststream.redis import ListSub, RedisBroker, RedisRouter, StreamSub
from nats.js.api import AckPolicy as NatsAckPolicy
from nats.js.api import ConsumerConfig
from stamina import AsyncRetryingCaller

from eventkit import Durable, EventBus, named
from eventkit._core.bus import state_of
from eventkit.faststream import Bridge, BridgeError
from tests.faststream.services import (
    KINDS,
    NEEDS_AIOKAFKA,
    BillPaid,
    BillSent,
    Kind,
    OrderPlaced,
    Service,
    broker_of,
    publisher_of,
    stream_of,
    subscribers_of,
)


@named("shop.order.rush.v1")
@dataclass(frozen=True, slots=True)
class Rush(OrderPlaced):
    pass


@named("shop.order.raw.v1")
@dataclass(frozen=True, slots=True)
class Raw:
    content: bytes


@named("shop.order.copied.v1", formerly={"shop.bill.paid.v1": None})
@dataclass(frozen=True, slots=True)
class Copied:
    order_id: int


@dataclass(frozen=True, slots=True)
class Unnamed:
    order_id: int


def bridge_on(bus: EventBus | None = None) -> Bridge:
    return Bridge(bus or EventBus(), source="/billing")


def consuming(subscribers: Any, *event_types: type, **options: Any) -> str:
    """Why these cannot be consumed."""
    options.setdefault("dead_letter", publisher_of(NatsBroker(), "dead"))
    with pytest.raises(BridgeError) as caught:
        bridge_on().consume(subscribers, *(event_types or (OrderPlaced,)), **options)
    return str(caught.value)


def forwarding(publisher: Any, event_type: type = OrderPlaced) -> str:
    """Why this cannot be forwarded to."""
    with pytest.raises(BridgeError) as caught:
        bridge_on().forward(event_type, publisher)
    return str(caught.value)


# The bridge.


def test_a_bridge_takes_a_bus_and_the_name_of_a_service() -> None:
    with pytest.raises(TypeError, match=r"^Bridge\(\) takes an EventBus first, not 'bus'$"):
        Bridge("bus", source="/")  # type: ignore[arg-type]
    for source in ("", None, 7):
        with pytest.raises(ValueError, match=r'^source is the name of this service, as "/orders"'):
            Bridge(EventBus(), source=source)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_consumer_leaves_nothing_behind(kind: Kind) -> None:
    service = Service(kind)
    service.bridge.forward(BillSent, service.publisher("bills"))
    subscribers = subscribers_of(service.broker, "orders")
    dead = service.publisher("dead")
    with pytest.raises(BridgeError):
        service.bridge.consume(subscribers, OrderPlaced, BillSent, dead_letter=dead, durable=True)
    with pytest.raises(ValueError, match="others"):
        service.bridge.consume(
            subscribers,
            OrderPlaced,
            dead_letter=dead,
            others="x",  # type: ignore[arg-type]
        )

    assert state_of(service.bus).needs_keeper == ()
    service.bridge.consume(subscribers, OrderPlaced, dead_letter=dead)


# Classes.


def test_a_class_has_a_name_of_its_own() -> None:
    publisher = publisher_of(NatsBroker(), "orders")
    text = 'Unnamed has no name for the wire: decorate it with @named("shop.order.placed.v1")'

    assert forwarding(publisher, Unnamed) == text
    assert consuming(subscribers_of(NatsBroker(), "orders"), Unnamed) == text

    class Inherits(OrderPlaced):
        pass

    assert forwarding(publisher, Inherits).endswith(
        'Inherits has no name for the wire: decorate it with @named("shop.order.placed.v1")'
    )


def test_it_can_be_written_as_json() -> None:
    publisher = publisher_of(NatsBroker(), "orders")
    text = forwarding(publisher, Raw)

    assert text.startswith("Raw cannot be written as JSON: Raw.content: bytes cannot be stored")
    assert "\n" not in text
    assert consuming(subscribers_of(NatsBroker(), "orders"), Raw) == text


def test_it_is_a_class() -> None:
    publisher = publisher_of(NatsBroker(), "orders")

    refused = "forward() and consume() take classes of events, not "
    assert forwarding(publisher, "x") == f"{refused}'x'"  # type: ignore[arg-type]
    assert consuming(subscribers_of(NatsBroker(), "orders"), list[int]) == f"{refused}list[int]"


def test_two_classes_of_one_consumer_have_two_names() -> None:
    assert consuming(subscribers_of(NatsBroker(), "orders"), OrderPlaced, BillPaid, Copied) == (
        "BillPaid and Copied are both called 'shop.bill.paid.v1', so a message could be either: "
        "rename one of them"
    )
    bridge_on().consume(
        subscribers_of(NatsBroker(), "orders"),
        BillPaid,
        BillPaid,
        dead_letter=publisher_of(NatsBroker(), "dead"),
    )


def test_there_is_at_least_one_class_and_one_subscriber() -> None:
    dead = publisher_of(NatsBroker(), "dead")
    with pytest.raises(
        BridgeError,
        match=r"^consume\(\) takes at least one class of events, after the subscriber$",
    ):
        bridge_on().consume(subscribers_of(NatsBroker(), "orders"), dead_letter=dead)
    assert consuming([]) == "consume() needs a subscriber, and the list is empty"


@pytest.mark.parametrize("consumed_first", [False, True])
@pytest.mark.parametrize(
    ("consumed", "forwarded"), [(OrderPlaced, OrderPlaced), (Rush, OrderPlaced)]
)
def test_what_is_consumed_is_not_forwarded_on_one_bus(
    consumed: type, forwarded: type, *, consumed_first: bool
) -> None:
    service = Service("nats")
    bus, broker = service.bus, service.broker

    def consume() -> None:
        Bridge(bus, source="/").consume(
            subscribers_of(broker, "orders"), consumed, dead_letter=publisher_of(broker, "dead")
        )

    def forward() -> None:
        Bridge(bus, source="/").forward(forwarded, publisher_of(broker, "others"))

    first, second = (consume, forward) if consumed_first else (forward, consume)
    first()
    with pytest.raises(BridgeError) as caught:
        second()

    assert str(caught.value) == (
        f"{consumed.__qualname__} is consumed and forwarded on one bus, so its messages would go "
        "in a circle: forward an event of another class"
    )


def test_a_base_class_may_be_consumed_where_its_subclass_is_forwarded() -> None:
    service = Service("nats")
    service.consume(OrderPlaced)
    service.bridge.forward(Rush, service.publisher("rush"))
    other = Bridge(EventBus(), source="/")
    other.forward(OrderPlaced, service.publisher("orders"))


def test_a_bus_is_not_kept_alive_by_its_bridge() -> None:
    service = Service("nats")
    service.consume(OrderPlaced)
    service.bridge.forward(BillSent, service.publisher("bills"))
    bus = weakref.ref(service.bus)

    del service
    gc.collect()

    assert bus() is None


# Publishers and subscribers.


@pytest.mark.parametrize("kind", KINDS)
def test_a_publisher_and_a_subscriber_are_faststreams(kind: Kind) -> None:
    broker = broker_of(kind)
    (subscriber, *_), publisher = subscribers_of(broker, "orders"), publisher_of(broker, "bills")
    needed = "of FastStream's NATS, Kafka, RabbitMQ or Redis broker is needed, not "
    for wrong in (None, "orders", broker, subscriber, Rush, object()):
        assert forwarding(wrong).startswith(f"a publisher {needed}{wrong!r}")
        assert consuming(subscribers_of(broker, "others"), dead_letter=wrong).startswith(
            f"a publisher {needed}"
        )
    for wrong in (None, "orders", broker, publisher, Rush, object()):
        assert consuming(wrong) == f"a subscriber {needed}{wrong!r}"
        assert consuming([subscriber, wrong]).startswith(f"a subscriber {needed}")


def test_those_of_a_broker_that_is_not_known_are_refused() -> None:
    class Publisher:
        """Of another broker of FastStream's."""

        async def publish(self) -> None: ...

    Publisher.__module__ = "faststream.mqtt.publisher.usecase"

    assert forwarding(Publisher()).startswith("a publisher of FastStream's NATS, Kafka, ")


def test_the_subscribers_of_one_consumer_are_of_one_broker() -> None:
    subscribers = [
        *subscribers_of(NatsBroker(), "orders"),
        *subscribers_of(RabbitBroker(), "orders"),
    ]

    assert consuming(subscribers) == (
        "the subscribers of one consumer belong to one broker: call consume() for each"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_subscriber_has_no_other_handler(kind: Kind) -> None:
    service = Service(kind)
    service.consume(OrderPlaced)

    assert consuming(service.subscribers) == (
        "this subscriber has a handler already: pass another one to consume(), with all of its "
        "event types in one call"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [AckPolicy.ACK_FIRST, AckPolicy.MANUAL])
def test_a_policy_that_loses_messages_is_refused(kind: Kind, policy: AckPolicy) -> None:
    options: dict[str, Any] = {"queue": "b", "durable": None, "pull_sub": False}
    subscribers = subscribers_of(
        broker_of(kind), "orders", ack_policy=policy, **(options if kind == "nats" else {})
    )

    told = "MANUAL" if kind == "nats" else policy.name  # what FastStream makes of it
    assert consuming(subscribers) == (
        f"the subscriber's ack_policy is {told}, which loses a message if a handler fails: use "
        "ack_policy=AckPolicy.NACK_ON_ERROR"
    )


@NEEDS_AIOKAFKA
def test_that_of_kafka_is_one_by_default() -> None:
    assert consuming(broker_of("kafka").subscriber("orders", group_id="billing")) == (
        "the subscriber's ack_policy is ACK_FIRST, which loses a message if a handler fails: use "
        "ack_policy=AckPolicy.NACK_ON_ERROR"
    )


class Codec:
    async def encode(self, message: Any, serializer: Any) -> tuple[bytes, str | None]:
        return b"", None

    async def decode(self, message: Any) -> Any:
        return message


@pytest.mark.parametrize("kind", KINDS)
def test_a_codec_is_refused(kind: Kind) -> None:
    """A sender's would write JSON as something else; with a reader's no broker starts."""
    broker = broker_of(kind, codec=Codec())
    text = (
        "this broker or subscriber has a codec=, but events are JSON already: use a broker without "
        "codec= for events"
    )

    assert forwarding(publisher_of(broker, "orders")) == text
    assert consuming(subscribers_of(broker, "orders")) == text
    assert consuming(subscribers_of(broker_of(kind), "orders", codec=Codec())) == text


def test_core_nats_is_refused() -> None:
    broker = NatsBroker()
    publisher = "this publisher uses core NATS, which stores and confirms no message: add stream="

    assert forwarding(broker.publisher("orders")) == publisher
    assert (
        consuming(subscribers_of(broker, "orders"), dead_letter=broker.publisher("dead"))
        == publisher
    )
    for subscriber in (broker.subscriber("orders"), broker.subscriber("orders", kv_watch="orders")):
        assert consuming(subscriber) == (
            "this subscriber uses core NATS, which stores no message and knows no "
            "acknowledgement: add stream="
        )


def test_batches_are_refused() -> None:
    text = "batch= cannot be used, because each message is one event: remove batch="
    stream = StreamSub("orders", group="b", consumer="1", batch=True)

    assert consuming(subscribers_of(NatsBroker(), "o", pull_sub=PullSub(batch=True))) == text
    assert consuming(RedisBroker().subscriber(stream=stream)) == text


@NEEDS_AIOKAFKA
def test_batches_of_kafka_are_refused_too() -> None:
    broker = broker_of("kafka")
    text = "batch= cannot be used, because each message is one event: remove batch="

    assert consuming(subscribers_of(broker, "orders", batch=True)) == text
    assert forwarding(broker.publisher("orders", batch=True)) == text


@NEEDS_AIOKAFKA
def test_a_subscriber_of_kafka_is_in_a_group() -> None:
    broker = broker_of("kafka")

    assert consuming(subscribers_of(broker, "orders", group_id=None)) == (
        "this subscriber has no group, so no record is acknowledged: add group_id= and "
        'auto_offset_reset="earliest"'
    )


def test_nats_is_not_to_drop_what_was_handed_out_often() -> None:
    for config in (ConsumerConfig(max_deliver=-1), ConsumerConfig()):
        bridge_on().consume(
            subscribers_of(NatsBroker(), "orders", config=config),
            OrderPlaced,
            dead_letter=publisher_of(NatsBroker(), "dead"),
        )

    assert consuming(
        subscribers_of(NatsBroker(), "orders", config=ConsumerConfig(max_deliver=5))
    ) == (
        "with ConsumerConfig(max_deliver=5) NATS drops a message after 5 deliveries: remove it, "
        "and pass max_deliveries= to consume()"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"ordered_consumer": True},
        {"config": ConsumerConfig(ack_policy=NatsAckPolicy.NONE)},
        {"config": ConsumerConfig(ack_policy=NatsAckPolicy.ALL)},
    ],
)
def test_nats_is_to_wait_for_each_acknowledgement(options: dict[str, Any]) -> None:
    subscriber = broker_of("nats").subscriber(
        "orders", stream=stream_of("orders"), queue="b", **options
    )

    assert consuming(subscriber) == (
        "this consumer does not acknowledge each message by itself: remove ordered_consumer= and "
        "ConsumerConfig(ack_policy=)"
    )


@pytest.mark.parametrize("pull", [False, True])
def test_nats_is_not_to_forget_a_consumer(*, pull: bool) -> None:
    subscriber = NatsBroker().subscriber("orders", stream=stream_of("orders"), pull_sub=pull)

    assert consuming(subscriber) == (
        "NATS forgets this consumer when its process ends, so messages are lost or come twice: add "
        "durable="
    )


def test_it_forgets_one_that_pulls_by_a_queue() -> None:
    with pytest.warns(RuntimeWarning, match="The `queue` option has no effect"):
        subscriber = NatsBroker().subscriber(
            "orders", stream=stream_of("orders"), queue="b", pull_sub=True
        )

    assert consuming(subscriber).startswith("NATS forgets this consumer when its process ends")


@pytest.mark.parametrize("option", [{"durable": False}, {"exclusive": True}, {"auto_delete": True}])
def test_a_queue_of_rabbitmq_outlives_its_consumer_and_the_broker(option: dict[str, Any]) -> None:
    broker = RabbitBroker()
    elsewhere = RabbitQueue("orders", declare=False, **option)

    assert consuming(broker.subscriber(RabbitQueue("orders", **option))) == (
        "RabbitQueue('orders') is deleted with its messages when its consumer or the broker stops: "
        "use durable=True, without exclusive= and auto_delete="
    )
    bridge_on().consume(
        broker.subscriber(elsewhere), OrderPlaced, dead_letter=publisher_of(broker, "dead")
    )


def test_nor_is_it_a_stream() -> None:
    queue = RabbitQueue("orders", queue_type=QueueType.STREAM, durable=True)

    assert consuming(RabbitBroker().subscriber(queue)) == (
        "RabbitQueue('orders') is a stream, which takes no message back, and does not know which "
        "messages were read: use another queue_type="
    )


def test_lists_and_channels_of_redis_are_refused() -> None:
    broker = RedisBroker()
    publisher = (
        "this publisher uses Redis pub/sub or a list, which have no acknowledgements: use stream="
    )

    assert forwarding(broker.publisher("orders")) == publisher
    assert forwarding(broker.publisher(list="orders")) == publisher
    for subscriber in (broker.subscriber("orders"), broker.subscriber(list=ListSub("orders"))):
        assert consuming(subscriber) == publisher.replace("publisher", "subscriber")


def redis(**options: Any) -> Any:
    given: Any = {"group": "billing", "consumer": "1", "max_records": 10} | options
    return RedisBroker().subscriber(stream=StreamSub("orders", **given))


def test_a_stream_of_redis_is_read_by_a_group_that_acknowledges() -> None:
    text = "StreamSub('orders') acknowledges no entry: add group= and consumer=, and remove no_ack="

    assert consuming(redis(group=None, consumer=None)) == text
    assert consuming(redis(no_ack=True)) == text


def test_a_stream_of_redis_is_read_from_what_is_new() -> None:
    assert consuming(redis(last_id="0")) == (
        "StreamSub('orders', last_id='0') reads no new entry once its group exists: remove "
        "last_id=, and create the group with the id at which it has to start"
    )


def test_a_stream_of_redis_is_not_read_as_a_whole() -> None:
    assert consuming(redis(max_records=None)) == (
        "StreamSub('orders') reads the whole backlog into one consumer. If this consumer stops, "
        "the entries wait for min_idle_time: add max_records=10"
    )


def test_somebody_takes_over_what_a_killed_consumer_of_redis_had_read() -> None:
    nobody = (
        "no subscriber takes over entries that a killed consumer of the Redis stream 'orders' has "
        "read: pass [subscriber, another one with StreamSub(min_idle_time=60_000)]"
    )

    assert consuming(redis()) == nobody
    assert consuming([redis(), redis()]) == nobody
    assert consuming([redis(), redis(group="other", min_idle_time=60_000)]) == nobody
    for subscribers in (
        [redis(), redis(min_idle_time=60_000, max_records=None)],
        [redis(min_idle_time=60_000), redis()],
        redis(claim_min_idle_time=60_000),
    ):
        dead = publisher_of(RedisBroker(), "dead")
        bridge_on().consume(subscribers, OrderPlaced, dead_letter=dead)


def test_and_somebody_reads_what_is_new() -> None:
    assert consuming(redis(min_idle_time=60_000)) == (
        "no subscriber reads new entries of the Redis stream 'orders', as "
        "StreamSub(min_idle_time=) only takes over old ones: pass [subscriber, another one "
        "without it]"
    )


# Options of consumers.


def test_a_limit_is_shorter_than_the_broker_waits() -> None:
    slow = subscribers_of(NatsBroker(), "orders", config=ConsumerConfig(ack_wait=10))

    assert consuming(subscribers_of(NatsBroker(), "orders"), within=60) == (
        "the broker hands a message out again after 30 s, so it would be handled twice: within=60 "
        "has to be below that (ConsumerConfig(ack_wait=))"
    )
    assert consuming(slow).startswith("the broker hands a message out again after 10 s, ")
    assert "within=25 has to be below that" in consuming(slow)
    backing_off = ConsumerConfig(ack_wait=60, backoff=[5, 10])  # of which NATS takes the first
    assert "after 5 s" in consuming(subscribers_of(NatsBroker(), "orders", config=backing_off))
    assert consuming([redis(), redis(min_idle_time=500)], within=0.5) == (
        "the broker hands a message out again after 0.5 s, so it would be handled twice: "
        "within=0.5 has to be below that (StreamSub(min_idle_time=))"
    )


@NEEDS_AIOKAFKA
def test_that_of_kafka_is_five_minutes() -> None:
    broker = broker_of("kafka")
    less = subscribers_of(broker, "orders", max_poll_interval_ms=20_000)

    assert "after 300 s" in consuming(subscribers_of(broker, "orders"), within=300)
    assert consuming(less) == (
        "the broker hands a message out again after 20 s, so it would be handled twice: within=25 "
        "has to be below that (max_poll_interval_ms=)"
    )


@pytest.mark.parametrize("within", [0, -1, float("nan")])
def test_a_limit_is_above_0(within: float) -> None:
    with pytest.raises(ValueError, match=f"^within has to be above 0 seconds, not {within!r}$"):
        Service("rabbit").consume(OrderPlaced, within=within)


def test_there_is_at_least_one_delivery() -> None:
    with pytest.raises(ValueError, match=r"^max_deliveries is at least 1, not 0$"):
        Service("rabbit").consume(OrderPlaced, max_deliveries=0)


def test_others_are_dead_or_ignored() -> None:
    with pytest.raises(ValueError, match=r'^others is "dead" or "ignore"'):
        Service("rabbit").consume(OrderPlaced, others="drop")


async def deliver(_: object) -> None:
    """An inbox."""


def test_retries_are_the_outboxs_where_the_consumer_is_durable() -> None:
    subscribers = subscribers_of(RabbitBroker(), "orders")
    rest = (
        " and durable=True exclude each other: with durable=True the outbox retries, as "
        "Durable(...) of each handler says"
    )

    assert consuming(subscribers, durable=True, within=5) == f"within{rest}"
    assert consuming(
        subscribers,
        durable=True,
        within=5,
        retry=AsyncRetryingCaller(),
        max_deliveries=3,
        deliver=deliver,
    ) == (f"within, retry, max_deliveries, deliver{rest}")


def test_retries_are_the_inboxs_where_the_consumer_has_one() -> None:
    subscribers = subscribers_of(RabbitBroker(), "orders")

    assert consuming(subscribers, deliver=deliver, retry=AsyncRetryingCaller()) == (
        "retry and deliver= exclude each other: if deliver= raises, the message comes again, any "
        "number of times. Limit attempts and time inside of the function; to make a dead letter, "
        "raise RejectMessage there"
    )


# Dead letters.


def goes_round(subscribers: Any, dead_letter: Any) -> bool:
    try:
        bridge_on().consume(subscribers, OrderPlaced, dead_letter=dead_letter)
    except BridgeError as error:
        return "would come back to the same consumer, in an endless circle" in str(error)
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_dead_letters_do_not_go_where_they_are_consumed(kind: Kind) -> None:
    broker = broker_of(kind)
    name = {"nats": "orders/billing", "rabbit": "orders"}.get(kind, "orders/billing")

    assert consuming(
        subscribers_of(broker, "orders"), dead_letter=publisher_of(broker, "orders")
    ) == (
        f"dead letters of {name!r} would come back to the same consumer, in an endless circle: "
        "publish them to another place"
    )
    other = broker_of("rabbit" if kind == "nats" else "nats")
    assert not goes_round(subscribers_of(broker, "orders"), publisher_of(other, "orders"))


@pytest.mark.parametrize(
    ("subject", "read", "round_"),
    [
        ("orders.dead", "orders.>", True),
        ("orders", "orders.>", False),
        ("orders.dead", "orders.*", True),
        ("orders.dead.x", "orders.*", False),
        ("orders.dead.x", "orders.>", True),
        ("dead", ">", True),
        ("dead", "*", True),
        ("dead.orders", "*.orders", True),
        ("dead.orders", "orders.dead", False),
        ("orders", "orders.dead", False),
        ("orders.dead", "orders", False),
    ],
)
def test_a_wildcard_of_nats_reads_them_too(subject: str, read: str, *, round_: bool) -> None:
    stream = JStream("orders")
    subscribers = subscribers_of(NatsBroker(), read, stream=stream)

    assert goes_round(subscribers, publisher_of(NatsBroker(), subject, stream=stream)) == round_


def test_one_of_several_subjects_of_nats_reads_them_too() -> None:
    config = ConsumerConfig(filter_subjects=["orders", "dead.*"])
    subscribers = subscribers_of(NatsBroker(), "", config=config)

    assert goes_round(subscribers, publisher_of(NatsBroker(), "dead.x"))


@pytest.mark.parametrize(
    ("publisher", "round_"),
    [
        ({"queue": "billing"}, True),
        ({"routing_key": "billing"}, True),
        ({"queue": "orders.placed"}, False),
        ({"exchange": "orders", "routing_key": "orders.placed"}, True),
        ({"exchange": "orders", "routing_key": "dead"}, False),
        ({"exchange": "dead", "routing_key": "orders.placed"}, False),
        ({"exchange": RabbitExchange("orders", type=ExchangeType.FANOUT)}, True),
    ],
)
def test_an_exchange_of_rabbitmq_may_bring_them_back(
    publisher: dict[str, Any], *, round_: bool
) -> None:
    queue = RabbitQueue("billing", routing_key="orders.placed")
    subscriber = RabbitBroker().subscriber(queue, "orders")

    assert goes_round(subscriber, RabbitBroker().publisher(**publisher)) == round_


@NEEDS_AIOKAFKA
def test_a_pattern_or_a_partition_of_kafka_reads_them_too() -> None:
    from faststream.kafka import TopicPartition

    broker = broker_of("kafka")
    options: Any = {"group_id": "billing", "ack_policy": AckPolicy.NACK_ON_ERROR}

    def by_pattern() -> Any:
        return broker.subscriber(pattern="orders.*", **options)

    def by_partition() -> Any:
        return broker.subscriber(partitions=[TopicPartition("dead", 0)], **options)

    assert goes_round(by_pattern(), broker.publisher("orders.dead"))
    assert not goes_round(by_pattern(), broker.publisher("dead"))
    assert goes_round(by_partition(), broker.publisher("dead"))
    assert not goes_round(by_partition(), broker.publisher("orders"))


# What a consumer is called.


def names_of(*subscribers: Any) -> list[str]:
    names: list[str] = []
    for each in subscribers:
        bus = EventBus()
        bridge_on(bus).consume(
            each, OrderPlaced, dead_letter=publisher_of(NatsBroker(), "dead"), durable=True
        )
        names += state_of(bus).needs_keeper
    return names


def test_a_consumer_of_nats_is_called_by_its_stream_and_its_durable_name() -> None:
    broker = NatsBroker()
    config = ConsumerConfig(durable_name="b", filter_subjects=["orders.placed"])

    assert names_of(
        broker.subscriber("orders.placed", stream=stream_of("orders"), durable="b", pull_sub=True),
        broker.subscriber("orders.placed", stream=stream_of("orders"), queue="b"),
        broker.subscriber(stream=stream_of("orders"), pull_sub=True, config=config),
    ) == ["orders/b", "orders/b", "orders/b"]


def test_one_of_a_router_is_called_by_the_routers_prefix_too() -> None:
    queue = RabbitQueue("billing", routing_key="orders.*")
    exchange = RabbitExchange("orders", type=ExchangeType.TOPIC)
    rabbit, redis, nats = RabbitRouter("eu_"), RedisRouter("eu_"), NatsRouter("eu.")
    stream = StreamSub("orders", group="b", consumer="1", max_records=1, claim_min_idle_time=60_000)

    assert names_of(
        rabbit.subscriber(queue, exchange),
        RabbitBroker().subscriber(queue, exchange),
        redis.subscriber(stream=stream),
        nats.subscriber("orders", stream=stream_of("orders"), queue="b"),
    ) == ["eu_billing", "billing", "eu_orders/b", "orders/b"]


@NEEDS_AIOKAFKA
def test_one_of_kafka_is_called_by_its_topics_and_its_group() -> None:
    broker, options = broker_of("kafka"), {"ack_policy": AckPolicy.NACK_ON_ERROR, "group_id": "b"}

    assert names_of(
        broker.subscriber("b", "a", **options), broker.subscriber(pattern="a.*", **options)
    ) == ["a,b/b", "a.*/b"]


def test_a_durable_forward_is_checked_as_a_handler_is() -> None:
    service = Service("nats")
    with pytest.raises(TypeError):
        service.bridge.forward(OrderPlaced, service.publisher("o"), durable="yes")  # type: ignore[arg-type]
    service.bridge.forward(OrderPlaced, service.publisher("o"), durable=Durable(attempts=1))


@pytest.mark.filterwarnings("ignore:The JetStream Push consumer:RuntimeWarning")
def test_a_push_subscriber_of_nats_that_hoards_messages_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = NatsBroker()
    stream = JStream("orders", subjects=["orders.>"])
    few = ConsumerConfig(max_ack_pending=10)
    for subject, config in (("orders.many", None), ("orders.few", few)):
        subscriber = broker.subscriber(subject, stream=stream, queue=subject, config=config)
        Bridge(EventBus(), source="/billing").consume(
            subscriber, OrderPlaced, dead_letter=broker.publisher("dead", stream=stream)
        )

    (line,) = caplog.messages
    assert "so slow handlers run twice: use pull_sub=True" in line
    assert line.endswith("consumer=orders/orders.many")
