"""Owns what differs between brokers. Take the function of yours, and forget the others.

A place is where the events of a service go: a stream of NATS or Redis, an exchange of RabbitMQ, a
topic of Kafka. A group is a service that reads there, in however many processes.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from anyio import fail_after

# Also what Redis knows this process by: in Kubernetes the pod's name, which a restart keeps.
_HOST = socket.gethostname()

# FastStream's own prints a line for each message; this one goes where the others go.
_log = logging.getLogger("shop.broker")

_SECONDS_TO_ANSWER = 10.0


async def _nothing() -> None:
    """Most brokers need no preparation."""


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker as the services use it. Any: FastStream has classes of its own for each.

    Attributes:
        client: FastStream's broker.
        publisher: Takes a place.
        subscribers: Takes a place and a group. Several, where one cannot do it all.
        dead_letters: As `publisher`, for a place that keeps what nobody reads yet.
        prepare: Makes what FastStream does not, before it starts.
    """

    client: Any
    publisher: Callable[[str], Any]
    subscribers: Callable[[str, str], list[Any]]
    dead_letters: Callable[[str], Any]
    prepare: Callable[[], Awaitable[None]] = _nothing

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[None]:
        """Start it, and stop it at the end of the block, once what it has at hand has ended.

        Raises:
            ConnectionError: It does not answer. The service ends then, and is started again.
        """
        try:
            # The client of NATS would try for ever, and say nothing.
            with fail_after(_SECONDS_TO_ANSWER):
                await self.client.connect()
        except TimeoutError:
            raise ConnectionError("the broker does not answer") from None
        async with self.client:
            await self.prepare()
            await self.client.start()
            yield

    async def healthy(self) -> bool:
        """Whether events can be sent and received: both checks are needed.

        NATS can give up its connection while `running` of its subscribers is true. A subscriber can
        have stopped, because its Redis stream is gone, while the broker answers. Neither check sees
        that a stream of NATS was deleted.
        """
        return bool(await self.client.ping(1)) and all(
            each.running for each in self.client.subscribers
        )


def nats(url: str) -> Broker:
    """NATS JetStream: `pip install "faststream[nats]"`."""
    from faststream.nats import NatsBroker
    from nats.js.api import DeliverPolicy

    # By default it gives up after 60 attempts to connect again, and nobody is told.
    broker = NatsBroker(url, max_reconnect_attempts=-1, logger=_log)

    def publisher(place: str) -> Any:
        return broker.publisher(place, stream=place)

    def subscribers(place: str, group: str) -> list[Any]:
        # `durable=` is NATS's word for a group that it remembers; who pulls shares its messages.
        return [
            broker.subscriber(
                place,
                stream=place,
                durable=group,
                pull_sub=True,
                deliver_policy=DeliverPolicy.ALL,
            )
        ]

    return Broker(broker, publisher, subscribers, dead_letters=publisher)


def rabbitmq(url: str) -> Broker:
    """RabbitMQ: `pip install "faststream[rabbit]"`."""
    from faststream.rabbit import (
        Channel,
        ExchangeType,
        QueueType,
        RabbitBroker,
        RabbitExchange,
        RabbitQueue,
    )

    # Without a limit the whole queue would come at once.
    broker = RabbitBroker(url, default_channel=Channel(prefetch_count=10), logger=_log)
    dead: list[RabbitQueue] = []

    def exchange(place: str) -> RabbitExchange:
        return RabbitExchange(place, type=ExchangeType.FANOUT, durable=True)

    def publisher(place: str) -> Any:
        return broker.publisher(exchange=exchange(place))

    def subscribers(place: str, group: str) -> list[Any]:
        # RabbitMQ 4 drops what was handed back 20 times, unless it is told to keep it.
        queue = RabbitQueue(
            f"{place}.{group}",
            durable=True,
            queue_type=QueueType.QUORUM,
            arguments={"x-delivery-limit": -1},
        )
        return [broker.subscriber(queue, exchange(place))]

    def dead_letters(place: str) -> Any:
        dead.append(RabbitQueue(place, durable=True))
        return broker.publisher(dead[-1])

    async def prepare() -> None:
        for queue in dead:  # nobody reads them yet, so nobody else makes them
            await broker.declare_queue(queue)

    return Broker(broker, publisher, subscribers, dead_letters, prepare)


def redis(url: str) -> Broker:
    """Streams of Redis: `pip install "faststream[redis]"`."""
    from faststream.redis import RedisBroker, StreamSub
    from redis.exceptions import ResponseError

    broker = RedisBroker(url, logger=_log)
    groups: list[tuple[str, str]] = []

    def publisher(place: str) -> Any:
        return broker.publisher(stream=place)

    def subscribers(place: str, group: str) -> list[Any]:
        groups.append((place, group))
        # The second one takes over what a process has read that was killed.
        return [
            broker.subscriber(stream=StreamSub(place, group=group, consumer=_HOST, max_records=10)),
            broker.subscriber(
                stream=StreamSub(place, group=group, consumer=_HOST, min_idle_time=60_000)
            ),
        ]

    async def prepare() -> None:
        connection = await broker.connect()
        for place, group in groups:
            try:  # FastStream's own groups begin at the end, and miss what was sent before
                await connection.xgroup_create(place, group, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    return Broker(broker, publisher, subscribers, publisher, prepare)


def kafka(url: str) -> Broker:
    """Kafka: `pip install "faststream[kafka]"`."""
    from faststream import AckPolicy
    from faststream.kafka import KafkaBroker

    broker = KafkaBroker(url, logger=_log)

    def publisher(place: str) -> Any:
        return broker.publisher(place)

    def subscribers(place: str, group: str) -> list[Any]:
        return [
            broker.subscriber(
                place,
                group_id=group,
                auto_offset_reset="earliest",
                ack_policy=AckPolicy.NACK_ON_ERROR,
            )
        ]

    return Broker(broker, publisher, subscribers, dead_letters=publisher)


BROKERS: dict[str, tuple[Callable[[str], Broker], str]] = {
    "nats": (nats, "nats://127.0.0.1:4222"),
    "rabbitmq": (rabbitmq, "amqp://guest:guest@127.0.0.1:5672/"),
    "redis": (redis, "redis://127.0.0.1:6379"),
    "kafka": (kafka, "127.0.0.1:9092"),
}


def from_env() -> Broker:
    """The broker that `SHOP_BROKER` names, at `SHOP_BROKER_URL`; by default NATS, on this host."""
    make, url = BROKERS[os.environ.get("SHOP_BROKER", "nats")]
    return make(os.environ.get("SHOP_BROKER_URL", url))


def place(name: str) -> str:
    """What a place is called: `SHOP_PREFIX` keeps two shops apart that share a broker."""
    return f"{os.environ.get('SHOP_PREFIX', '')}{name}"
