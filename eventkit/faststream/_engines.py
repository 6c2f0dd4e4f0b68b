"""Owns how brokers differ: in sending, confirming, counting and keeping messages.

Knows nothing of buses. An *engine* is the code for one kind of broker. The engine of a publisher or
subscriber is found by the module of its class, so no unused client is imported. Publishers,
subscribers and messages are Any: each broker has its own classes.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from faststream import AckPolicy

from eventkit.wire import Wired

LONGEST_ID = 255  # bytes; the limit of RabbitMQ
_FIELD = b"__data__"  # the field of a Redis entry in which FastStream writes the message
_LOSING = {AckPolicy.ACK_FIRST: "ACK_FIRST", AckPolicy.MANUAL: "MANUAL"}


def plain(text: str, longest: int) -> str:
    """Return one line of printable ASCII: some brokers refuse or change other characters."""
    if len(text) <= longest and text.isascii() and text.isprintable():
        return text.strip()
    line = " ".join(text[:longest].split())
    return "".join(each if " " <= each <= "~" else _escaped(each) for each in line)[:longest]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class Engine(ABC):
    """One kind of broker. The methods here are right for most brokers.

    Attributes:
        name: The name of the broker, for messages.
        prefix: The prefix of headers that are attributes of CloudEvents.
        how_to_wait: For messages: the option for a longer wait of the broker, in brackets. Empty if
            there is none.
        parse: Parses a message, if FastStream's own parser would drop some messages.
    """

    name: str
    prefix: str = "ce-"
    how_to_wait: str = ""
    parse: Callable[..., Any] | None = None

    def options(self, publisher: Any, wired: Wired, headers: dict[str, str]) -> dict[str, Any]:
        """Return the arguments of `publish` for an event, without the body.

        Args:
            publisher: The publisher.
            wired: The event.
            headers: Further headers.
        """
        return {"headers": headers | wired.headers(self.prefix)}

    def dead_options(self, message: Any, headers: dict[str, str]) -> dict[str, Any]:
        """Return the arguments of `publish` for a dead letter, without the body."""
        return {"headers": headers}

    @abstractmethod
    def refusal(self, result: Any) -> str | None:
        """Return why the result of `publish` is no confirmation; None if it is one."""

    async def deliveries(self, message: Any, subscriber: Any) -> int | None:
        """Return how often the broker has given out the message; None if it does not count."""
        return None

    @abstractmethod
    def consumer(self, subscriber: Any) -> str:
        """Return the name that all processes of this consumer share."""

    @abstractmethod
    def comes_to(self, publisher: Any, subscriber: Any) -> bool:
        """Whether the subscriber receives the publisher's messages, as far as the wiring shows."""

    @abstractmethod
    def patience(self, subscriber: Any) -> float | None:
        """Return the seconds until the broker gives a message to another process; None if never."""

    def problem_of_publisher(self, publisher: Any) -> str | None:
        """Return why the publisher cannot be used, and the remedy; None if it can."""
        return None

    @abstractmethod
    def problem_of_subscriber(self, subscriber: Any) -> str | None:
        """Return why the subscriber cannot be used, and the remedy; None if it can."""

    def doubt_of_subscriber(self, subscriber: Any) -> str | None:
        """Return why handlers may run twice with this subscriber, and the remedy; or None."""
        return None

    def problem_of_subscribers(self, subscribers: Sequence[Any]) -> str | None:
        """Return why the subscribers cannot be used together, and the remedy; None if they can."""
        return None


class Nats(Engine):
    """NATS JetStream."""

    name = "NATS"
    how_to_wait = " (ConsumerConfig(ack_wait=))"

    def options(self, publisher: Any, wired: Wired, headers: dict[str, str]) -> dict[str, Any]:
        # JetStream drops a second message with this id in the same stream, within two minutes by
        # default. The id includes the subject, because an event may be sent to several subjects.
        once = f"{wired.attributes['id']} {publisher.subject.broker_address}"
        return super().options(publisher, wired, headers | {"Nats-Msg-Id": once})

    def refusal(self, result: Any) -> str | None:
        return None if getattr(result, "seq", None) is not None else "there is no acknowledgement"

    async def deliveries(self, message: Any, subscriber: Any) -> int | None:
        try:
            delivered: int | None = message.raw_message.metadata.num_delivered
        except Exception:  # noqa: BLE001 - a test broker's message has no metadata
            return None
        return delivered

    def consumer(self, subscriber: Any) -> str:
        return f"{subscriber.stream.name}/{subscriber.config.durable_name or subscriber.queue}"

    def comes_to(self, publisher: Any, subscriber: Any) -> bool:
        subject = publisher.subject.broker_address
        filters = [subscriber.subject.broker_address, *subscriber.filter_subjects]
        return any(_matches(subject, each) for each in filters if each)

    def patience(self, subscriber: Any) -> float | None:
        config = subscriber.config
        return min(config.backoff) if config.backoff else config.ack_wait or 30.0

    def problem_of_publisher(self, publisher: Any) -> str | None:
        if publisher.stream is None:
            return (
                "this publisher uses core NATS, which stores and confirms no message: add stream="
            )
        return None

    def problem_of_subscriber(self, subscriber: Any) -> str | None:
        if getattr(subscriber, "stream", None) is None:
            return (
                "this subscriber uses core NATS, which stores no message and knows no "
                "acknowledgement: add stream="
            )
        if "Batch" in type(subscriber).__name__:
            return _BATCH
        config = subscriber.config
        if subscriber.extra_options.get("ordered_consumer") or config.ack_policy != "explicit":
            return (
                "this consumer does not acknowledge each message by itself: remove "
                "ordered_consumer= and ConsumerConfig(ack_policy=)"
            )
        # NATS remembers a push consumer by its queue, but not a pull consumer.
        if not (config.durable_name or (subscriber.queue and not hasattr(subscriber, "pull_sub"))):
            return (
                "NATS forgets this consumer when its process ends, so messages are lost or come "
                "twice: add durable="
            )
        most = config.max_deliver
        if most is not None and most > 0:
            return (
                f"with ConsumerConfig(max_deliver={most}) NATS drops a message after {most} "
                "deliveries: remove it, and pass max_deliveries= to consume()"
            )
        return None

    def doubt_of_subscriber(self, subscriber: Any) -> str | None:
        # Measured: 60 messages of 0.1 s each, with ack_wait of 1 s, were handled 167 times.
        if "Push" not in type(subscriber).__name__ or subscriber.config.max_ack_pending:
            return None
        return (
            "a NATS push subscriber keeps up to 1000 messages in its client, and ack_wait runs for "
            "all of them, so slow handlers run twice: use pull_sub=True, or "
            "ConsumerConfig(max_ack_pending=10)"
        )


def _matches(subject: str, filter_: str) -> bool:
    """Whether a subject matches a filter of NATS, which may have wildcards."""
    parts, wanted = subject.split("."), filter_.split(".")
    if wanted[-1] == ">" and len(parts) >= len(wanted):
        parts, wanted = parts[: len(wanted) - 1], wanted[:-1]
    alike = all(want in ("*", part) for part, want in zip(parts, wanted, strict=False))
    return alike and len(parts) == len(wanted)


class Rabbit(Engine):
    """RabbitMQ."""

    name = "RabbitMQ"

    def options(self, publisher: Any, wired: Wired, headers: dict[str, str]) -> dict[str, Any]:
        return _properties(headers | wired.headers(self.prefix), wired.attributes["id"])

    def dead_options(self, message: Any, headers: dict[str, str]) -> dict[str, Any]:
        return _properties(headers, plain(message.message_id or "", LONGEST_ID) or None)

    def refusal(self, result: Any) -> str | None:
        # For a returned message there is no exception: the result has the broker's answer.
        answer = getattr(result, "delivery", result)
        if type(answer).__name__ == "Ack":
            return None
        return getattr(answer, "reply_text", None) or "there is no confirmation"

    async def deliveries(self, message: Any, subscriber: Any) -> int | None:
        returned = message.headers.get("x-delivery-count")  # only quorum queues count
        return returned + 1 if isinstance(returned, int) else None

    def consumer(self, subscriber: Any) -> str:
        prefix = subscriber.routing().removesuffix(subscriber.queue.routing())  # of a router
        return f"{prefix}{subscriber.queue.name}"

    def comes_to(self, publisher: Any, subscriber: Any) -> bool:
        exchange, key = publisher.exchange, publisher.routing()
        if not exchange.name:  # the default exchange routes to the queue with the key as its name
            return bool(key == self.consumer(subscriber))
        if exchange.name != subscriber.exchange.name:
            return False
        return bool(exchange.type.value == "fanout" or key == subscriber.routing())

    def patience(self, subscriber: Any) -> float | None:
        return None  # never, while the connection lasts

    def problem_of_subscriber(self, subscriber: Any) -> str | None:
        queue = subscriber.queue
        arguments: Mapping[str, Any] = queue.arguments or {}
        if arguments.get("x-queue-type") == "stream":
            return (
                f"RabbitQueue({queue.name!r}) is a stream, which takes no message back, and does "
                "not know which messages were read: use another queue_type="
            )
        if queue.declare and (not queue.durable or queue.exclusive or queue.auto_delete):
            return (
                f"RabbitQueue({queue.name!r}) is deleted with its messages when its consumer or "
                "the broker stops: use durable=True, without exclusive= and auto_delete="
            )
        return None


def _properties(headers: dict[str, str], message_id: str | None) -> dict[str, Any]:
    """Return the properties of AMQP. The content type is a property there, and not a header."""
    return {
        "content_type": headers.pop("content-type", None),
        "headers": headers,
        "message_id": message_id,
        "persist": True,
    }


async def _read_at_all(entry: Any, parse: Callable[[Any], Awaitable[Any]]) -> Any:
    """Parse an entry of a stream. FastStream would hand back an unreadable entry forever."""
    try:
        return await parse(entry)
    except Exception:  # noqa: BLE001 - any error of the parser
        fields: Mapping[bytes, bytes] = entry["data"]
        message = await parse({**entry, "data": {_FIELD: b"?"}})
        texts = {_escape(name): _escape(value) for name, value in fields.items()}
        message.body = fields.get(_FIELD) or json.dumps(texts).encode()
        return message


def _escape(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


class Redis(Engine):
    """Redis streams."""

    name = "Redis"
    how_to_wait = " (StreamSub(min_idle_time=))"
    parse = staticmethod(_read_at_all)

    def dead_options(self, message: Any, headers: dict[str, str]) -> dict[str, Any]:
        # FastStream writes the length of a `str` in characters, and reads the length in bytes.
        return {"headers": {_measured(name): _measured(headers[name]) for name in headers}}

    def refusal(self, result: Any) -> str | None:
        return None if result else "there is no id of an entry"

    async def deliveries(self, message: Any, subscriber: Any) -> int | None:
        if "delivery_counts" in message.raw_message:  # XREADGROUP CLAIM
            claimed: int = message.raw_message["delivery_counts"][0]
            return claimed + 1
        if subscriber.min_idle_time is None:  # this subscriber reads new entries only
            return 1
        counted: int = await message.get_delivery_count()
        return counted

    def consumer(self, subscriber: Any) -> str:
        return f"{subscriber.stream_sub.name}/{subscriber.stream_sub.group}"

    def comes_to(self, publisher: Any, subscriber: Any) -> bool:
        return bool(publisher.stream.name == subscriber.stream_sub.name)

    def patience(self, subscriber: Any) -> float | None:
        stream = subscriber.stream_sub
        idle = stream.min_idle_time or stream.claim_min_idle_time
        return None if idle is None else idle / 1000

    def problem_of_publisher(self, publisher: Any) -> str | None:
        if not hasattr(publisher, "stream"):
            return (
                "this publisher uses Redis pub/sub or a list, which have no acknowledgements: use "
                "stream="
            )
        return None

    def problem_of_subscriber(self, subscriber: Any) -> str | None:
        stream = getattr(subscriber, "stream_sub", None)
        if stream is None:
            return (
                "this subscriber uses Redis pub/sub or a list, which have no acknowledgements: use "
                "stream="
            )
        if stream.batch:
            return _BATCH
        if not stream.group or stream.no_ack:
            return (
                f"StreamSub({stream.name!r}) acknowledges no entry: add group= and consumer=, and "
                "remove no_ack="
            )
        if stream.last_id != ">":
            return (
                f"StreamSub({stream.name!r}, last_id={stream.last_id!r}) reads no new entry once "
                "its group exists: remove last_id=, and create the group with the id at which it "
                "has to start"
            )
        if stream.min_idle_time is None and stream.max_records is None:
            return (
                f"StreamSub({stream.name!r}) reads the whole backlog into one consumer. If this "
                "consumer stops, the entries wait for min_idle_time: add max_records=10"
            )
        return None

    def problem_of_subscribers(self, subscribers: Sequence[Any]) -> str | None:
        new = [each for each in subscribers if each.stream_sub.min_idle_time is None]
        read = {self.consumer(each): each.stream_sub.name for each in new}
        claiming = [each for each in subscribers if self.patience(each) is not None]
        claimed = {self.consumer(each): each.stream_sub.name for each in claiming}
        for consumer in read.keys() - claimed.keys():
            return (
                "no subscriber takes over entries that a killed consumer of the Redis stream "
                f"{read[consumer]!r} has read: pass [subscriber, another one with "
                "StreamSub(min_idle_time=60_000)]"
            )
        for consumer in claimed.keys() - read.keys():
            return (
                f"no subscriber reads new entries of the Redis stream {claimed[consumer]!r}, as "
                "StreamSub(min_idle_time=) only takes over old ones: pass [subscriber, another "
                "one without it]"
            )
        return None


def _measured(text: str) -> str | bytes:
    return text if text.isascii() else text.encode()


async def _repaired(record: Any, parse: Callable[[Any], Awaitable[Any]]) -> Any:
    """Parse a record of Kafka. FastStream drops a record if a header is null or not in UTF-8."""
    record.headers = tuple((name, _utf8(value)) for name, value in record.headers)
    return await parse(record)


def _utf8(value: bytes | None) -> bytes:
    return b"" if value is None else value.decode(errors="replace").encode()


class Kafka(Engine):
    """Kafka, by aiokafka."""

    name = "Kafka"
    prefix = "ce_"
    how_to_wait = " (max_poll_interval_ms=)"
    parse = staticmethod(_repaired)

    def options(self, publisher: Any, wired: Wired, headers: dict[str, str]) -> dict[str, Any]:
        key = wired.attributes.get("partitionkey")
        record_key = None if key is None else key.encode()
        return {**super().options(publisher, wired, headers), "key": record_key}

    def dead_options(self, message: Any, headers: dict[str, str]) -> dict[str, Any]:
        return {"headers": headers, "key": getattr(message.raw_message, "key", None)}

    def refusal(self, result: Any) -> str | None:
        return None if getattr(result, "offset", -1) >= 0 else "there is no offset of a record"

    def consumer(self, subscriber: Any) -> str:
        topics: Sequence[str] = subscriber.topic_names
        return f"{','.join(sorted(topics))}/{subscriber.group_id}"

    def comes_to(self, publisher: Any, subscriber: Any) -> bool:
        pattern = subscriber.pattern
        if pattern is not None and re.match(pattern.broker_address, publisher.topic):
            return True
        partitions = [each.topic for each in subscriber.partitions]
        return publisher.topic in [*subscriber.topic_names, *partitions]

    def patience(self, subscriber: Any) -> float | None:
        options: Mapping[str, Any] = subscriber._connection_args  # noqa: SLF001
        milliseconds: float = options["max_poll_interval_ms"]
        return milliseconds / 1000

    def problem_of_publisher(self, publisher: Any) -> str | None:
        return _BATCH if "Batch" in type(publisher).__name__ else None

    def problem_of_subscriber(self, subscriber: Any) -> str | None:
        if "Batch" in type(subscriber).__name__:
            return _BATCH
        if subscriber.group_id is None:
            return (
                "this subscriber has no group, so no record is acknowledged: add group_id= and "
                'auto_offset_reset="earliest"'
            )
        return None


_BATCH = "batch= cannot be used, because each message is one event: remove batch="
_ENGINES: Mapping[str, Engine] = {
    "nats": Nats(),
    "rabbit": Rabbit(),
    "redis": Redis(),
    "kafka": Kafka(),
}


def engine_of(endpoint: object, kind: Literal["publisher", "subscriber"]) -> Engine | None:
    """Return the engine of a publisher or subscriber of FastStream; None if it is unknown."""
    if not hasattr(endpoint, "publish" if kind == "publisher" else "calls"):
        return None
    for each in type(endpoint).__mro__:
        package, _, _ = each.__module__.removeprefix("faststream.").partition(".")
        if f"faststream.{package}.{kind}" in each.__module__ and package in _ENGINES:
            return _ENGINES[package]
    return None


def problem_of_policy(subscriber: Any) -> str | None:
    """Return why the subscriber's `ack_policy` loses messages, and the remedy; or None."""
    policy = _LOSING.get(subscriber.ack_policy)
    if policy is None:
        return None
    return (
        f"the subscriber's ack_policy is {policy}, which loses a message if a handler fails: use "
        "ack_policy=AckPolicy.NACK_ON_ERROR"
    )


def problem_of_codec(endpoint: Any) -> str | None:
    """Return why a `codec=` of a broker or subscriber corrupts events, and the remedy; or None."""
    own = getattr(getattr(endpoint, "_call_options", None), "codec", None)
    if own is None and getattr(endpoint._outer_config, "broker_codec", None) is None:  # noqa: SLF001
        return None
    return (
        "this broker or subscriber has a codec=, but events are JSON already: use a broker without "
        "codec= for events"
    )
