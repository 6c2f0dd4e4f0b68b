"""What differs between the brokers, one class each, all alike to the tests.

A channel is where the events of one type go. It is a stream with one subject in NATS, a fanout
exchange in RabbitMQ, a stream in Redis, a topic in Kafka. A queue is what one group reads of it.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module

# Clients and FastStream's brokers have types that differ from one to the next.
from typing import Any, Protocol

from tests.crash.nursery import PATIENCE

RETURNS_AFTER = 2.0
"""Seconds until a broker takes back what a dead process had: the least that all of them bear."""


@dataclass(frozen=True, slots=True)
class Message:
    """As a plain client of the broker sees it."""

    headers: dict[str, str]
    body: bytes
    key: str | None = None
    correlation_id: str | None = None


@dataclass(slots=True)
class Reader:
    """Messages as they come, from the first that the channel has."""

    _queue: asyncio.Queue[Message] = field(default_factory=asyncio.Queue[Message])

    async def next(self) -> Message:
        async with asyncio.timeout(PATIENCE):
            return await self._queue.get()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def add(self, message: Message) -> None:
        self._queue.put_nowait(message)


def import_clients() -> None:
    """Import all of FastStream's, once, before children are forked that use one."""
    for name in ("kafka", "nats", "rabbit", "redis"):
        import_module(f"faststream.{name}")


def untyped(name: str) -> Any:
    """A module of a client whose functions have no types, or not all of them."""
    return import_module(name)


class Kind(Protocol):
    """One kind of broker, which nothing is connected to."""

    name: str
    prefix: str
    """How the names of a CloudEvent's attributes begin in a message's headers."""
    counts_deliveries: bool
    """Whether a message tells how often it was handed out."""
    has_one_address: bool
    """Whether clients know of no other address than the one that they were given."""
    asks_one_by_one: bool
    """Whether a client has no more messages than it handles, all of whose time runs."""
    can_refuse: bool
    """Whether a place can be taken away, and does not come back by itself."""

    def broker(self, url: str) -> Any:
        """Make FastStream's broker, as its users would."""
        ...

    def publisher(self, broker: Any, channel: str) -> Any: ...

    def subscriber(
        self, broker: Any, channel: str, group: str, *, returns_after: float = RETURNS_AFTER
    ) -> Any:
        """What `consume` takes, with all that a careful user gives it."""
        ...

    def dead_letters(self, broker: Any, channel: str) -> Any:
        """A publisher to a channel that has one reader."""
        ...

    async def prepare(self, url: str, channel: str, *groups: str) -> None:
        """Make a channel, and what its groups read; one without groups is for dead letters."""
        ...

    async def remove(self, url: str, channel: str, *groups: str) -> None: ...

    async def take_away(self, url: str, channel: str) -> None:
        """Have nothing accepted where dead letters go, until that is prepared again."""
        ...

    async def send(self, url: str, channel: str, *messages: Message) -> None:
        """Send by a plain client."""
        ...

    def read(
        self, url: str, channel: str, group: str | None = None
    ) -> AbstractAsyncContextManager[Reader]:
        """Read by a plain client that leaves all in its place, except where it has a group."""
        ...

    async def left(self, url: str, channel: str, group: str) -> int:
        """How many messages a group has not acknowledged. To be asked while nobody consumes."""
        ...


class Nats:
    name = "nats"
    prefix = "ce-"
    counts_deliveries = True
    has_one_address = True
    asks_one_by_one = False
    can_refuse = True

    def broker(self, url: str) -> Any:
        from faststream.nats import NatsBroker

        return NatsBroker(url, max_reconnect_attempts=-1, logger=None)

    def publisher(self, broker: Any, channel: str) -> Any:
        return broker.publisher(f"{channel}.it", stream=self._stream(channel))

    def subscriber(
        self, broker: Any, channel: str, group: str, *, returns_after: float = RETURNS_AFTER
    ) -> Any:
        from nats.js.api import ConsumerConfig, DeliverPolicy

        return broker.subscriber(
            f"{channel}.it",
            stream=self._stream(channel),
            queue=group,  # also the name of its durable consumer
            deliver_policy=DeliverPolicy.ALL,
            config=ConsumerConfig(ack_wait=returns_after),
        )

    def dead_letters(self, broker: Any, channel: str) -> Any:
        return self.publisher(broker, channel)

    @staticmethod
    def _stream(channel: str) -> Any:
        from faststream.nats import JStream

        return JStream(channel, subjects=[f"{channel}.>"])

    async def prepare(self, url: str, channel: str, *groups: str) -> None:
        async with self._client(url) as stream:
            await stream.add_stream(name=channel, subjects=[f"{channel}.>"])

    async def remove(self, url: str, channel: str, *groups: str) -> None:
        from nats.js.errors import NotFoundError

        async with self._client(url) as stream:
            try:
                await stream.delete_stream(channel)
            except NotFoundError:
                pass

    async def take_away(self, url: str, channel: str) -> None:
        await self.remove(url, channel)

    async def send(self, url: str, channel: str, *messages: Message) -> None:
        async with self._client(url) as stream:
            for each in messages:
                await stream.publish(f"{channel}.it", each.body, headers=each.headers or None)

    @asynccontextmanager
    async def read(
        self, url: str, channel: str, group: str | None = None
    ) -> AsyncGenerator[Reader]:
        reader = Reader()

        async def take(message: Any) -> None:
            headers: dict[str, str] = message.headers or {}
            correlation = headers.get("correlation_id")
            reader.add(Message(headers, message.data, correlation_id=correlation))

        async with self._client(url) as stream:
            await stream.subscribe(f"{channel}.it", ordered_consumer=True, cb=take)
            yield reader

    async def left(self, url: str, channel: str, group: str) -> int:
        async with self._client(url) as stream:
            info = await stream.consumer_info(channel, group)
            return (info.num_pending or 0) + (info.num_ack_pending or 0)

    @asynccontextmanager
    async def _client(self, url: str) -> AsyncGenerator[Any]:
        client = await untyped("nats").connect(url)
        try:
            yield client.jetstream()
        finally:
            await client.close()


class NatsPull(Nats):
    """As FastStream would rather have it: one message at a time is asked for."""

    name = "nats-pull"
    asks_one_by_one = True

    def subscriber(
        self, broker: Any, channel: str, group: str, *, returns_after: float = RETURNS_AFTER
    ) -> Any:
        from faststream.nats import PullSub
        from nats.js.api import ConsumerConfig, DeliverPolicy

        return broker.subscriber(
            f"{channel}.it",
            stream=self._stream(channel),
            durable=group,
            pull_sub=PullSub(),
            deliver_policy=DeliverPolicy.ALL,
            config=ConsumerConfig(ack_wait=returns_after),
        )


class Rabbit:
    name = "rabbitmq"
    prefix = "ce-"
    counts_deliveries = True
    has_one_address = True
    asks_one_by_one = True  # or as good as: a message that waits has no time limit
    can_refuse = True

    def broker(self, url: str) -> Any:
        from faststream.rabbit import Channel, RabbitBroker

        return RabbitBroker(url, default_channel=Channel(prefetch_count=10), logger=None)

    def publisher(self, broker: Any, channel: str) -> Any:
        return broker.publisher(exchange=self._exchange(channel))

    def subscriber(
        self, broker: Any, channel: str, group: str, *, returns_after: float = RETURNS_AFTER
    ) -> Any:
        from faststream.rabbit import QueueType, RabbitQueue

        queue = RabbitQueue(f"{channel}.{group}", durable=True, queue_type=QueueType.QUORUM)
        return broker.subscriber(queue, self._exchange(channel))

    def dead_letters(self, broker: Any, channel: str) -> Any:
        return broker.publisher(channel)

    @staticmethod
    def _exchange(channel: str) -> Any:
        from faststream.rabbit import ExchangeType, RabbitExchange

        return RabbitExchange(channel, type=ExchangeType.FANOUT, durable=True)

    async def prepare(self, url: str, channel: str, *groups: str) -> None:
        async with self._channel(url) as client:
            if not groups:
                await client.declare_queue(channel, durable=True)
                return
            exchange = await client.declare_exchange(channel, "fanout", durable=True)
            for group in groups:
                queue = await client.declare_queue(
                    f"{channel}.{group}", durable=True, arguments={"x-queue-type": "quorum"}
                )
                await queue.bind(exchange)

    async def remove(self, url: str, channel: str, *groups: str) -> None:
        async with self._channel(url) as client:
            for each in groups:
                await client.queue_delete(f"{channel}.{each}")
            if groups:
                await client.exchange_delete(channel)
            else:
                await client.queue_delete(channel)

    async def take_away(self, url: str, channel: str) -> None:
        await self.remove(url, channel)

    async def send(self, url: str, channel: str, *messages: Message) -> None:
        from aio_pika import Message as Sent

        async with self._channel(url) as client:
            exchange = await client.get_exchange(channel, ensure=False)
            for each in messages:
                headers: dict[str, Any] = {**each.headers}
                kind = headers.pop("content-type", None)
                sent = Sent(each.body, headers=headers, content_type=kind, delivery_mode=2)
                await exchange.publish(sent, routing_key="")

    @asynccontextmanager
    async def read(
        self, url: str, channel: str, group: str | None = None
    ) -> AsyncGenerator[Reader]:
        reader = Reader()

        async def take(message: Any) -> None:
            headers = {name: str(value) for name, value in message.headers.items()}
            if message.content_type is not None:
                headers["content-type"] = message.content_type
            correlation = message.correlation_id
            reader.add(Message(headers, message.body, correlation_id=correlation))

        async with self._channel(url) as client:
            name = channel if group is None else f"{channel}.{group}"
            queue = await client.get_queue(name, ensure=False)
            await queue.consume(take)  # what is not acknowledged goes back
            yield reader

    async def left(self, url: str, channel: str, group: str) -> int:
        async with self._channel(url) as client:
            queue = await client.declare_queue(f"{channel}.{group}", passive=True)
            count: int = queue.declaration_result.message_count
            return count

    @asynccontextmanager
    async def _channel(self, url: str) -> AsyncGenerator[Any]:
        import aio_pika

        async with await aio_pika.connect(url) as connection:
            yield await connection.channel()


class Redis:
    name = "redis"
    prefix = "ce-"
    counts_deliveries = True
    has_one_address = True
    asks_one_by_one = False
    can_refuse = True

    def broker(self, url: str) -> Any:
        from faststream.redis import RedisBroker

        options: dict[str, Any] = {"logger": None}  # which its types forget
        return RedisBroker(url, **options)

    def publisher(self, broker: Any, channel: str) -> Any:
        return broker.publisher(stream=channel)

    def subscriber(
        self, broker: Any, channel: str, group: str, *, returns_after: float = RETURNS_AFTER
    ) -> Any:
        from faststream.redis import StreamSub

        # A test has several consumers in one process: their names are not the pod's.
        consumer = f"{os.getpid()}-{id(broker)}"
        reads = StreamSub(channel, group=group, consumer=consumer, max_records=10)
        claims = StreamSub(
            channel, group=group, consumer=consumer, min_idle_time=int(returns_after * 1000)
        )
        return [broker.subscriber(stream=reads), broker.subscriber(stream=claims)]

    def dead_letters(self, broker: Any, channel: str) -> Any:
        return self.publisher(broker, channel)

    async def prepare(self, url: str, channel: str, *groups: str) -> None:
        async with self._client(url) as client:
            if not groups:
                await client.delete(channel)
            for group in groups:
                await client.xgroup_create(channel, group, id="0", mkstream=True)

    async def remove(self, url: str, channel: str, *groups: str) -> None:
        async with self._client(url) as client:
            await client.delete(channel)

    async def take_away(self, url: str, channel: str) -> None:
        async with self._client(url) as client:
            await client.delete(channel)
            await client.set(channel, "no stream")

    async def send(self, url: str, channel: str, *messages: Message) -> None:
        async with self._client(url) as client:
            for each in messages:
                # What FastStream reads beside its own binary format, and what bytes are to it.
                raw = each.body
                if each.headers:
                    whole = {"data": each.body.decode(), "headers": each.headers}
                    raw = json.dumps(whole).encode()
                await client.xadd(channel, {"__data__": raw})

    @asynccontextmanager
    async def read(
        self, url: str, channel: str, group: str | None = None
    ) -> AsyncGenerator[Reader]:
        from faststream.redis.parser import BinaryMessageFormatV1

        reader = Reader()

        async def follow(client: Any) -> None:
            last: Any = "0"
            while True:
                found: Any = await client.xread({channel: last}, block=1000)
                entries: list[Any] = found[0][1] if found else []
                for entry in entries:
                    last = entry[0]
                    body, headers = BinaryMessageFormatV1.parse(entry[1][b"__data__"])
                    correlation = headers.get("correlation_id")
                    reader.add(Message(headers, body, correlation_id=correlation))

        async with self._client(url) as client, asyncio.TaskGroup() as tasks:
            task = tasks.create_task(follow(client))
            yield reader
            task.cancel()

    async def left(self, url: str, channel: str, group: str) -> int:
        async with self._client(url) as client:
            for each in await client.xinfo_groups(channel):
                if each["name"] == group.encode():
                    left: int = each["pending"] + each["lag"]
                    return left
        raise LookupError(group)

    @asynccontextmanager
    async def _client(self, url: str) -> AsyncGenerator[Any]:
        client = untyped("redis.asyncio").from_url(url)
        try:
            yield client
        finally:
            await client.aclose()


class Kafka:
    name = "kafka"
    prefix = "ce_"
    counts_deliveries = False
    has_one_address = False
    asks_one_by_one = True  # or as good as: a message that waits has no time limit
    can_refuse = False

    def broker(self, url: str) -> Any:
        from faststream.kafka import KafkaBroker

        return KafkaBroker(url, logger=None)

    def publisher(self, broker: Any, channel: str) -> Any:
        return broker.publisher(channel)

    def subscriber(
        self, broker: Any, channel: str, group: str, *, returns_after: float = RETURNS_AFTER
    ) -> Any:
        from faststream import AckPolicy

        # Tansu has the first member of a group wait for half of it.
        session = min(returns_after, 4.0)
        return broker.subscriber(
            channel,
            group_id=f"{channel}.{group}",
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.NACK_ON_ERROR,
            session_timeout_ms=int(session * 1000),
            heartbeat_interval_ms=int(session * 250),
        )

    def dead_letters(self, broker: Any, channel: str) -> Any:
        return self.publisher(broker, channel)

    async def prepare(self, url: str, channel: str, *groups: str) -> None:
        async with self._admin(url) as client:
            topic = untyped("aiokafka.admin").NewTopic(channel, 1, 1)
            await client.create_topics([topic])

    @asynccontextmanager
    async def _admin(self, url: str) -> AsyncGenerator[Any]:
        client = untyped("aiokafka.admin").AIOKafkaAdminClient(bootstrap_servers=url)
        await client.start()
        try:
            yield client
        finally:
            await client.close()

    async def remove(self, url: str, channel: str, *groups: str) -> None:
        """It ends with the tests."""

    async def take_away(self, url: str, channel: str) -> None:
        async with self._admin(url) as client:
            await client.delete_topics([channel])

    async def send(self, url: str, channel: str, *messages: Message) -> None:
        async with untyped("aiokafka").AIOKafkaProducer(bootstrap_servers=url) as client:
            for each in messages:
                headers = [(name, value.encode()) for name, value in each.headers.items()]
                await client.send_and_wait(channel, each.body, headers=headers)

    @asynccontextmanager
    async def read(
        self, url: str, channel: str, group: str | None = None
    ) -> AsyncGenerator[Reader]:
        reader = Reader()

        async def follow(client: Any) -> None:
            async for each in client:
                headers = {name: value.decode() for name, value in each.headers}
                key = None if each.key is None else each.key.decode()
                reader.add(Message(headers, each.value, key, headers.get("correlation_id")))

        client = untyped("aiokafka").AIOKafkaConsumer(
            channel, bootstrap_servers=url, auto_offset_reset="earliest"
        )
        async with client, asyncio.TaskGroup() as tasks:
            task = tasks.create_task(follow(client))
            yield reader
            task.cancel()

    async def left(self, url: str, channel: str, group: str) -> int:
        aiokafka = untyped("aiokafka")
        place = aiokafka.TopicPartition(channel, 0)
        async with aiokafka.AIOKafkaConsumer(
            bootstrap_servers=url, group_id=f"{channel}.{group}", enable_auto_commit=False
        ) as client:
            client.assign([place])
            end: int = (await client.end_offsets([place]))[place]
            done: int | None = await client.committed(place)
            return end - (done or 0)


KINDS: Mapping[str, Kind] = {
    each.name: each for each in (Nats(), NatsPull(), Rabbit(), Redis(), Kafka())
}
