"""Owns an event as a message: CloudEvents 1.0 in headers, and the event's JSON as the body.

Knows no broker. CloudEvents have two modes. In the binary mode, attributes are headers. In the
structured mode, the whole event is one JSON object. `encode` writes the binary mode. `decode` reads
both.
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import quote, unquote
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from eventkit._core.events import DomainEvent
from eventkit.exceptions import BadMessageError
from eventkit.wire._codec import Codec, EventDecodingError, codec_for
from eventkit.wire._names import names_of, wire_name

JSON = "application/json"
_STRUCTURED = "application/cloudevents+json"
_REQUIRED = ("id", "type", "source")
# The prefixes of headers: of HTTP, NATS and RabbitMQ; of Kafka; of AMQP 1.0, in two spellings. The
# values of the first one are percent-encoded.
_ESCAPING = "ce-"
_PREFIXES = ("ce-", "ce_", "cloudevents:", "cloudevents_")
_ATTRIBUTE = re.compile(f"(?:{'|'.join(_PREFIXES)})([a-z0-9]+)")
# HTTP's binding does not encode these: printable ASCII without the space, `"` and `%`.
_SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
_UNSAFE = re.compile(r"[^!#$&-~]")
# The start of a `DomainEvent` that this package wrote. Such JSON needs no second parse.
_COMPLETE = re.compile(r'\{"event_id":"[^"]*","occurred_at":"')


@dataclass(frozen=True, slots=True)
class Wired:
    """An event as it is sent.

    Attributes:
        attributes: The attributes of CloudEvents: `specversion`, `id`, `type`, `source`, `time`,
            and `partitionkey` if there is a key.
        body: The event's JSON.
    """

    attributes: Mapping[str, str]
    body: bytes

    def headers(self, prefix: str = "ce-") -> dict[str, str]:
        """Return the headers of the message, `content-type` included.

        Args:
            prefix: "ce-" for NATS, RabbitMQ, Redis and HTTP, "ce_" for Kafka, "cloudEvents:" for
                AMQP 1.0. Values after "ce-" are percent-encoded, by the HTTP binding of
                CloudEvents.
        """
        headers = {f"{prefix}{name}": value for name, value in self.attributes.items()}
        if prefix == _ESCAPING:
            for name, value in headers.items():
                if _UNSAFE.search(value) is not None:
                    headers[name] = quote(value, _SAFE)
        headers["content-type"] = JSON
        return headers


@dataclass(frozen=True, slots=True)
class Received:
    """An event as it was received.

    Attributes:
        event: The event.
        attributes: The attributes of CloudEvents, by their lower-case names.
        headers: All headers of the message, as they came.
    """

    event: object
    attributes: Mapping[str, str]
    headers: Mapping[str, str]

    @property
    def id(self) -> str:
        """The message's id, as its sender wrote it."""
        return self.attributes["id"]

    @property
    def type(self) -> str:
        """The name of the event's class as it was sent; may be a former name of the class."""
        return self.attributes["type"]

    @property
    def source(self) -> str:
        """The name of the service that sent the message."""
        return self.attributes["source"]

    @property
    def unique_id(self) -> str:
        """Source and id. Together they are unique, by CloudEvents: the key of an inbox."""
        return f"{self.source} {self.id}"

    @property
    def event_id(self) -> UUID:
        """The id as a UUID. If the id is no UUID: a UUID of version 5, of source and id."""
        return _uuid_of(self.attributes)


def encode(
    event: object,
    *,
    source: str,
    id: str | None = None,
    key: str | None = None,
    time: datetime | None = None,
) -> Wired:
    """Write an event as a message.

        wired = encode(OrderPlaced(7), source="/orders")
        await client.publish("orders", wired.body, headers=wired.headers())

    The attribute `type` is the name that `named` gave, else `module:qualname`. Knows no broker and
    needs no event loop; safe to use from any thread.

    Args:
        event: An event, of a class that `codec_for` takes.
        source: The name of the sending service, a URI reference such as "/orders".
        id: The id of the event. If an event is sent twice, give the same id twice. By default the
            `event_id` of a `DomainEvent`, else a random UUID.
        key: The attribute `partitionkey`. Events with an equal key belong together.
        time: The time of the event, an aware datetime. By default the `occurred_at` of a
            `DomainEvent`, else now.

    Returns:
        The message. Its `headers(prefix)` take a prefix, which depends on the protocol.

    Raises:
        ValueError: `source`, `id` or `key` is empty, or no `str`.
        EventEncodingError: The event would not be read back equal. The error names the field.
        InvalidEventTypeError: The class of the event cannot be written as JSON.
    """
    texts: dict[str, object] = {"source": source, "id": id, "key": key}
    for name, value in texts.items():
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError(f"{name} has to be a str that is not empty")
    codec = codec_for(type(event))
    body = codec.encode(event).encode()
    if isinstance(event, DomainEvent):
        id, time = id or str(event.event_id), time or event.occurred_at
    attributes = {
        "specversion": "1.0",
        "id": id or str(uuid4()),
        "type": codec.name,
        "source": source,
        "time": (time or datetime.now(UTC)).isoformat(),
    }
    if key is not None:
        attributes["partitionkey"] = key
    return Wired(attributes, body)


def decode(headers: Mapping[str, str], body: bytes, *types: type) -> Received:
    """Read a message.

        received = decode(message.headers, message.data, OrderPlaced)

    Reads headers that begin with "ce-", "ce_", "cloudEvents:" or "cloudEvents_". Reads the
    structured mode, too, if `content-type` is `application/cloudevents+json`. If the JSON of a
    `DomainEvent` lacks `event_id` or `occurred_at`, the event takes them from the message. Knows no
    broker and needs no event loop; safe to use from any thread.

    Args:
        headers: The headers of the message.
        body: The body of the message.
        types: The classes that are accepted, under each of their names, also the former ones. A
            subclass has to be listed itself.

    Returns:
        The event, the attributes, and the headers as they came.

    Raises:
        BadMessageError: The message is no CloudEvent, has another type, or has a body that is not
            the JSON of its type. The text of the error has nothing of the body.
    """
    attributes, payload = _opened(headers, body)
    event, bad = _read(attributes, payload, types)
    if bad is None:
        return Received(event, attributes, dict(headers))
    attributes, body, payload = {}, b"", b""  # the traceback keeps the locals of this frame
    raise BadMessageError(*bad)


def _read(
    attributes: Mapping[str, str], payload: bytes, types: tuple[type, ...]
) -> tuple[object, tuple[str, str] | None]:
    """Return the event, or a reason and a sentence about the bad message."""
    if missing := [name for name in _REQUIRED if not attributes.get(name)]:
        return None, ("foreign", f"no CloudEvent: it lacks the attributes {', '.join(missing)}")
    name = attributes["type"]
    for event_type in types:
        codec: Codec[Any] = codec_for(event_type)
        if name == codec.name or name in names_of(event_type):
            break
    else:
        known = ", ".join(repr(wire_name(each)) for each in types) or "nothing"
        return None, ("unknown", f"nobody here consumes {name!r}, only {known}")
    event, problem = _decoded(codec, attributes, payload)
    return event, None if problem is None else ("undecodable", problem)


def _opened(headers: Mapping[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    """Return the attributes, and the JSON of the event."""
    attributes: dict[str, str] = {}
    for name, value in headers.items():
        lower = name.lower()
        if lower == "content-type" and _media_type(value) == _STRUCTURED:
            return _structured(body)
        if lower.startswith(_PREFIXES) and (found := _ATTRIBUTE.fullmatch(lower)) is not None:
            escaped = "%" in value and lower.startswith(_ESCAPING)
            attributes[found[1]] = _whole(unquote(value) if escaped else value)
    return attributes, body


def _whole(text: str) -> str:
    """Replace lone surrogates: JSON may have them, and UTF-8 cannot."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _structured(body: bytes) -> tuple[dict[str, str], bytes]:
    try:
        envelope: object = json.loads(body)
    except (ValueError, RecursionError):
        return {}, b""
    if not isinstance(envelope, dict):
        return {}, b""
    parts = cast("dict[str, object]", envelope)
    data, encoded = parts.pop("data", None), parts.pop("data_base64", None)
    attributes = {name: _whole(str(value)) for name, value in parts.items() if value is not None}
    if not isinstance(encoded, str):
        return attributes, json.dumps(data).encode()
    try:
        return attributes, base64.b64decode(encoded, validate=True)
    except ValueError:
        return attributes, b""


def _decoded(
    codec: Codec[Any], attributes: Mapping[str, str], payload: bytes
) -> tuple[object, str | None]:
    """Return the event, or a sentence about the bad body."""
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return None, f"the body is no {codec.name}: it is not in UTF-8"
    if issubclass(codec.event_type, DomainEvent):
        text = _completed(text, attributes)
    try:
        return codec.decode(text, attributes["type"]), None
    except EventDecodingError as error:
        return None, str(error).replace("this is no ", "the body is no ", 1)


def _completed(payload: str, attributes: Mapping[str, str]) -> str:
    """Add the id and the time of the message to an event that lacks them."""
    if _COMPLETE.match(payload):
        return payload
    try:
        fields: object = json.loads(payload)
    except (ValueError, RecursionError):
        return payload
    if not isinstance(fields, dict):
        return payload
    given = {"event_id": str(_uuid_of(attributes)), "occurred_at": attributes.get("time")}
    return json.dumps({name: value for name, value in given.items() if value} | fields)


def _uuid_of(attributes: Mapping[str, str]) -> UUID:
    try:
        return UUID(attributes["id"])
    except ValueError:
        return uuid5(NAMESPACE_URL, f"{attributes['source']} {attributes['id']}")
