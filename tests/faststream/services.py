"""Services on brokers in memory: what the tests of the bridge have in common."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import pytest
from faststream import AckPolicy, BaseMiddleware
from faststream.nats import JStream, NatsBroker
from faststream.rabbit import RabbitBroker, RabbitQueue
from faststream.redis import RedisBroker, StreamSub
from stamina import AsyncRetryingCaller

from eventkit import DomainEvent, EventBus, named
from eventkit.faststream import Bridge
from eventkit.wire import encode

Kind = Literal["nats", "rabbit", "redis", "kafka"]
NEEDS_AIOKAFKA = pytest.mark.skipif(
    find_spec("aiokafka") is None, reason="needs aiokafka, which is not installed"
)
KINDS: Sequence[Any] = ("nats", "rabbit", "redis", pytest.param("kafka", marks=NEEDS_AIOKAFKA))
AT_ONCE = AsyncRetryingCaller(attempts=4, wait_initial=0, wait_max=0, wait_jitter=0)


@named("shop.order.placed.v1")
@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    order_id: int


@named("shop.bill.sent.v1")
@dataclass(frozen=True, slots=True)
class BillSent:
    order_id: int


@named("shop.bill.paid.v1")
@dataclass(frozen=True, slots=True)
class BillPaid:
    order_id: int


@dataclass(slots=True)
class Sent:
    """A message that was published: where to, with what."""

    place: str
    body: Any
    headers: dict[str, str]
    options: dict[str, Any]


@dataclass(slots=True)
class Watch:
    """Notes what goes through a broker.

    Attributes:
        sent: What was published, in that order.
        came: What came, by the subscriber.
        refuse: Places that take nothing, each with what is raised.
    """

    sent: list[Sent] = field(default_factory=list[Sent])
    came: list[tuple[Any, Any]] = field(default_factory=list[tuple[Any, Any]])
    refuse: dict[str, BaseException] = field(default_factory=dict[str, BaseException])

    def __call__(self, message: Any, *, context: Any) -> BaseMiddleware[Any, Any]:
        watch = self

        class Middleware(BaseMiddleware[Any, Any]):
            async def consume_scope(self, call_next: Any, msg: Any) -> Any:
                watch.came.append((self.context.get_local("handler_"), msg))
                return await call_next(msg)

            async def publish_scope(self, call_next: Any, cmd: Any) -> Any:
                if cmd.destination in watch.refuse:
                    raise watch.refuse[cmd.destination]
                options = {
                    "correlation_id": cmd.correlation_id,
                    "key": getattr(cmd, "key", None),
                    **getattr(cmd, "message_options", {}),
                }
                watch.sent.append(Sent(cmd.destination, cmd.body, dict(cmd.headers), options))
                return await call_next(cmd)

        return Middleware(message, context=context)


class Service:
    """A bus, a bridge, and a broker in memory.

    Attributes:
        dead: The dead letters.
        messages: What came to consumers.
        answers: How that was answered.
    """

    def __init__(self, kind: Kind, **options: Any) -> None:
        self.kind: Kind = kind
        self.watch = Watch()
        self.bus = EventBus()
        self.bridge = Bridge(self.bus, source="/billing")
        self.broker = broker_of(kind, middlewares=[self.watch], **options)
        self.subscribers: list[Any] = []

    def publisher(self, place: str, **options: Any) -> Any:
        return publisher_of(self.broker, place, **options)

    def consume(self, *event_types: type, place: str = "orders", **options: Any) -> None:
        subscribers = subscribers_of(self.broker, place)
        self.subscribers += subscribers
        options.setdefault("dead_letter", self.publisher("dead"))
        if not {"durable", "deliver"} & set(options):
            options.setdefault("retry", AT_ONCE)
        self.bridge.consume(subscribers, *event_types, **options)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        async with in_memory(self.broker):
            yield

    async def send(
        self,
        event: object = None,
        *,
        headers: dict[str, Any] | None = None,
        body: bytes | None = None,
        place: str = "orders",
        **options: Any,
    ) -> None:
        """Have an event arrive as a message of another service; headers and body replace its own.

        Returns when it was answered.
        """
        if event is not None:
            wired = encode(event, source="/orders")
            headers = wired.headers("ce_" if self.kind == "kafka" else "ce-") | (headers or {})
            body = wired.body if body is None else body
        where: dict[str, Any] = {"stream": place} if self.kind == "redis" else {}
        arguments = () if self.kind == "redis" else (place,)
        await self.broker.publish(body, *arguments, headers=headers or {}, **where, **options)

    @property
    def dead(self) -> list[Sent]:
        return [each for each in self.watch.sent if each.place == "dead"]

    @property
    def messages(self) -> list[Any]:
        return [
            message for subscriber, message in self.watch.came if subscriber in self.subscribers
        ]

    @property
    def answers(self) -> list[str | None]:
        return [each.committed and each.committed.value for each in self.messages]


def broker_of(kind: Kind, **options: Any) -> Any:
    options["logger"] = None
    match kind:
        case "nats":
            return NatsBroker(**options)
        case "rabbit":
            return RabbitBroker(**options)
        case "redis":
            return RedisBroker(**options)
        case "kafka":
            from faststream.kafka import KafkaBroker

            return KafkaBroker(**options)


def kind_of(broker: Any) -> str:
    _, kind, _ = type(broker).__module__.split(".", 2)
    return str(kind)


def in_memory(*brokers: Any) -> Any:
    """The brokers as a context manager, in which they reach nobody but their own subscribers."""
    module = import_module(f"faststream.{kind_of(brokers[0])}")
    return getattr(module, f"Test{type(brokers[0]).__name__}")(*brokers)


def publisher_of(broker: Any, place: str, **options: Any) -> Any:
    match kind_of(broker):
        case "nats":
            return broker.publisher(place, **{"stream": stream_of(place)} | options)
        case "redis":
            return broker.publisher(**{"stream": place} | options)
        case _:
            return broker.publisher(place, **options)


def subscribers_of(broker: Any, place: str, group: str = "billing", **options: Any) -> list[Any]:
    given: Any
    match kind_of(broker):
        case "nats":
            given = {"stream": stream_of(place), "durable": group, "pull_sub": True} | options
            return [broker.subscriber(place, **given)]
        case "rabbit":
            return [broker.subscriber(RabbitQueue(place, durable=True), **options)]
        case "redis":
            stream = StreamSub(
                place, group=group, consumer="1", max_records=10, claim_min_idle_time=60_000
            )
            return [broker.subscriber(stream=stream, **options)]
        case _:
            given = {"group_id": group, "ack_policy": AckPolicy.NACK_ON_ERROR} | options
            return [broker.subscriber(place, **given)]


def stream_of(place: str) -> JStream:
    return JStream(place.partition(".")[0], subjects=[place])
