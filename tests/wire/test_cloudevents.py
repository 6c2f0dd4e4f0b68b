"""An event as a message: what is written, what is read, and what is said of what cannot be read."""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Generic, TypeVar
from uuid import NAMESPACE_URL, UUID, uuid5

import attrs
import pydantic
import pytest
from anyio import to_thread
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from cloudevents.core.bindings.http import to_binary_event as to_http
from cloudevents.core.bindings.http import to_structured_event as to_structured_http
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event
from cloudevents.core.bindings.kafka import to_binary_event as to_kafka
from cloudevents.core.bindings.kafka import to_structured_event as to_structured_kafka
from cloudevents.core.bindings.rabbitmq import RabbitMQMessage, from_rabbitmq_event
from cloudevents.core.bindings.rabbitmq import to_binary_event as to_rabbitmq
from cloudevents.core.bindings.rabbitmq import to_structured_event as to_structured_rabbitmq
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from eventkit import DomainEvent
from eventkit.exceptions import BadMessageError, EventEncodingError, InvalidEventTypeError
from eventkit.wire import Received, decode, encode, named
from tests.wire.test_codec import SECRET, Line, class_of, everything_about

T = TypeVar("T")
AT = datetime(2026, 3, 4, 5, 6, 7, 8, UTC)
ID = UUID(int=7)


def from_v1(stored: dict[str, Any]) -> dict[str, Any]:
    return {"order_id": int(stored["id"])}


@named("shop.order.placed.v2", formerly={"shop.order.placed.v1": from_v1})
@dataclass(frozen=True, slots=True)
class OrderPlaced:
    order_id: int


@named("shop.order.paid.v1")
@dataclass(frozen=True, slots=True)
class OrderPaid(DomainEvent):
    order_id: int
    total: Decimal = Decimal("9.90")


@named("shop.order.lost.v1")
@dataclass(frozen=True, slots=True)
class OrderLost(DomainEvent):
    """Has nothing but an id and a time."""


@named("shop.order.moved.v1")
class OrderMoved(pydantic.BaseModel):
    order_id: int
    lines: list[str] = []


@named("shop.order.sent.v1")
@attrs.frozen
class OrderSent:
    order_id: int


@dataclass(frozen=True, slots=True)
class Unnamed:
    order_id: int


class Boxed(pydantic.BaseModel, Generic[T]):
    content: T


@named("shop.order.boxed.v1")
class BoxedOrder(Boxed[OrderPlaced]):
    """A generic class is an event where its parameter is given."""


def headers_of(event_type: str = "shop.order.placed.v2", **attributes: str) -> dict[str, str]:
    """The headers of a message of another service."""
    given = {"id": str(ID), "type": event_type, "source": "/orders"} | attributes
    return {f"ce-{name}": value for name, value in given.items()}


def structured(**parts: Any) -> tuple[dict[str, str], bytes]:
    """A message that is one JSON object."""
    given = {"specversion": "1.0", "id": str(ID), "type": "shop.order.placed.v2", "source": "/o"}
    return {"content-type": "application/cloudevents+json"}, json.dumps(given | parts).encode()


def bad(headers: dict[str, str], body: bytes, *types: type) -> tuple[str, str]:
    """Why a message cannot be read: in a word, and in a sentence."""
    with pytest.raises(BadMessageError) as caught:
        decode(headers, body, *types)
    return caught.value.reason, str(caught.value)


# Written.


def test_an_event_has_all_attributes_in_headers_and_its_json_as_the_body() -> None:
    wired = encode(OrderPlaced(7), source="/orders", id="1", key="ada", time=AT)

    assert wired.body == b'{"order_id":7}'
    assert wired.attributes == {
        "specversion": "1.0",
        "id": "1",
        "type": "shop.order.placed.v2",
        "source": "/orders",
        "time": "2026-03-04T05:06:07.000008+00:00",
        "partitionkey": "ada",
    }
    assert wired.headers() == {
        "ce-specversion": "1.0",
        "ce-id": "1",
        "ce-type": "shop.order.placed.v2",
        "ce-source": "/orders",
        "ce-time": "2026-03-04T05:06:07.000008+00:00",
        "ce-partitionkey": "ada",
        "content-type": "application/json",
    }


def test_without_more_it_has_a_random_id_and_the_present_time() -> None:
    before = datetime.now(UTC)
    one, other = (encode(OrderPlaced(7), source="/orders") for _ in range(2))

    assert UUID(one.attributes["id"]).version == 4
    assert one.attributes["id"] != other.attributes["id"]
    assert before <= datetime.fromisoformat(one.attributes["time"]) <= datetime.now(UTC)
    assert "partitionkey" not in one.attributes


def test_a_domain_event_brings_its_own_id_and_time() -> None:
    event = OrderPaid(7, event_id=ID, occurred_at=AT)
    attributes = encode(event, source="/orders").attributes

    assert (attributes["id"], attributes["time"]) == (str(ID), AT.isoformat())


def test_what_is_given_wins_over_what_a_domain_event_has() -> None:
    event = OrderPaid(7, event_id=ID, occurred_at=AT)
    later = AT + timedelta(hours=1)
    attributes = encode(event, source="/orders", id="1", time=later).attributes

    assert (attributes["id"], attributes["time"]) == ("1", later.isoformat())


def test_a_class_without_a_name_is_called_by_its_place() -> None:
    assert encode(Unnamed(7), source="/").attributes["type"] == f"{__name__}:Unnamed"


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("ada lovelace", "ada%20lovelace"),
        ('the "ada"', "the%20%22ada%22"),
        ("100%", "100%25"),
        ("größe", "gr%C3%B6%C3%9Fe"),
        ("a\r\nce-id: 2", "a%0D%0Ace-id:%202"),
        ("\U0001f600", "%F0%9F%98%80"),
        ("a/b?c=d&e;f,g+h~i'j", "a/b?c=d&e;f,g+h~i'j"),
    ],
)
def test_after_the_prefix_of_http_values_are_percent_encoded(key: str, written: str) -> None:
    wired = encode(OrderPlaced(7), source="/orders", key=key)

    assert wired.headers()["ce-partitionkey"] == written
    assert wired.headers("ce_")["ce_partitionkey"] == key
    for prefix in ("ce-", "ce_", "cloudEvents:", "cloudEvents_"):
        received = decode(wired.headers(prefix), wired.body, OrderPlaced)
        assert received.attributes["partitionkey"] == key


@pytest.mark.parametrize("name", ["source", "id", "key"])
@pytest.mark.parametrize("value", ["", 7, b"7"])
def test_a_source_an_id_and_a_key_are_texts_that_are_not_empty(name: str, value: Any) -> None:
    given: dict[str, Any] = {"source": "/orders"} | {name: value}

    with pytest.raises(ValueError, match=f"^{name} has to be a str that is not empty$"):
        encode(OrderPlaced(7), **given)


def test_what_cannot_be_written_is_refused_with_the_field() -> None:
    with pytest.raises(EventEncodingError, match=r"^OrderPlaced\.order_id: "):
        encode(OrderPlaced("7"), source="/")  # type: ignore[arg-type]
    with pytest.raises(InvalidEventTypeError):
        encode(object(), source="/")


# Read.


@pytest.mark.parametrize("prefix", ["ce-", "ce_", "cloudEvents:", "cloudEvents_", "CE-", "Ce_"])
def test_it_is_read_by_each_prefix(prefix: str) -> None:
    event = OrderPaid(7)
    wired = encode(event, source="/orders", key="ada")
    headers = wired.headers(prefix) | {"other": "x", "ce-": "x", "ce-not an attribute": "x"}
    received = decode(headers, wired.body, OrderPlaced, OrderPaid)

    assert received == Received(event, wired.attributes, headers)
    assert received.event == event
    assert received.id == str(event.event_id)
    assert received.event_id == event.event_id
    assert received.type == "shop.order.paid.v1"
    assert received.source == "/orders"
    assert received.unique_id == f"/orders {event.event_id}"


def test_the_names_of_attributes_are_read_in_lower_case() -> None:
    headers = {"CE-ID": "1", "Ce-Type": "shop.order.placed.v2", "cE-source": "/orders"}

    assert decode(headers, b'{"order_id": 7}', OrderPlaced).attributes == {
        "id": "1",
        "type": "shop.order.placed.v2",
        "source": "/orders",
    }


def test_bytes_that_are_no_utf_8_in_a_percent_encoded_value_are_replaced() -> None:
    received = decode(headers_of(subject="%FF%"), b'{"order_id": 7}', OrderPlaced)

    assert received.attributes["subject"] == "\ufffd%"


def test_a_former_name_is_read_as_todays_class() -> None:
    received = decode(headers_of("shop.order.placed.v1"), b'{"id": "7"}', OrderPlaced)

    assert received.event == OrderPlaced(7)
    assert received.type == "shop.order.placed.v1"


def test_an_id_that_is_no_uuid_gives_the_same_one_each_time() -> None:
    received = decode(headers_of(id="order 7"), b'{"order_id": 7}', OrderPlaced)

    assert received.id == "order 7"
    assert received.event_id == uuid5(NAMESPACE_URL, "/orders order 7")


@pytest.mark.parametrize(
    "body",
    [
        b'{"order_id": 7, "total": "1.10"}',
        b' {"order_id": 7, "total": "1.10", "of": [{"event_id": 1}]}',
        b'{"of": {"event_id": "x", "occurred_at": "y"}, "order_id": 7, "total": "1.10"}',
    ],
)
def test_a_foreign_domain_event_has_the_id_and_the_time_of_its_message(body: bytes) -> None:
    headers = headers_of("shop.order.paid.v1", time=AT.isoformat())
    event = decode(headers, body, OrderPaid).event

    assert event == OrderPaid(7, Decimal("1.10"))
    assert isinstance(event, OrderPaid)
    assert (event.event_id, event.occurred_at) == (ID, AT)


def test_where_the_id_is_no_uuid_it_has_the_one_that_a_delivery_has() -> None:
    headers = headers_of("shop.order.paid.v1", id="7", time=AT.isoformat())
    received = decode(headers, b'{"order_id": 7}', OrderPaid)

    assert isinstance(received.event, OrderPaid)
    assert received.event.event_id == received.event_id
    assert received.event.occurred_at == AT


def test_what_its_json_has_is_left_as_it_is() -> None:
    earlier = AT - timedelta(days=1)
    headers = headers_of("shop.order.paid.v1", time=AT.isoformat())
    body = f'{{"order_id": 7, "occurred_at": "{earlier.isoformat()}"}}'.encode()
    event = decode(headers, body, OrderPaid).event
    both = f'{{"occurred_at": "{earlier.isoformat()}", "order_id": 7, "event_id": "{UUID(int=8)}"}}'
    whole = decode(headers, both.encode(), OrderPaid).event

    assert isinstance(event, OrderPaid)
    assert isinstance(whole, OrderPaid)
    assert (event.event_id, event.occurred_at) == (ID, earlier)
    assert (whole.event_id, whole.occurred_at) == (UUID(int=8), earlier)


def test_one_without_fields_or_without_a_time_is_completed_too() -> None:
    before = datetime.now(UTC)
    event = decode(headers_of("shop.order.lost.v1"), b"{}", OrderLost).event

    assert isinstance(event, OrderLost)
    assert event.event_id == ID
    assert event.occurred_at >= before


@pytest.mark.parametrize("body", [b"[]", b"{", b"", b"[" * 100_000])
def test_what_is_no_object_is_not_completed(body: bytes) -> None:
    reason, problem = bad(headers_of("shop.order.paid.v1"), body, OrderPaid)

    assert reason == "undecodable"
    assert problem.startswith("the body is no shop.order.paid.v1: ")


def test_events_of_pydantic_attrs_msgspec_and_generic_classes_go_there_and_back() -> None:
    msgspec = pytest.importorskip("msgspec")
    made = named("shop.order.packed.v1")(msgspec.defstruct("Packed", [("order_id", int)]))
    events: list[Any] = [
        OrderMoved(order_id=7, lines=["a"]),
        OrderSent(7),
        made(7),
        BoxedOrder(content=OrderPlaced(7)),
        Unnamed(7),
    ]
    for event in events:
        wired, event_type = encode(event, source="/orders"), class_of(event)
        assert decode(wired.headers(), wired.body, OrderPaid, event_type).event == event


@dataclass(frozen=True, slots=True)
class Usual:
    number: int
    text: str
    at: datetime
    total: Decimal
    lines: list[Line] = field(default_factory=list[Line])


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)


@given(
    event=st.builds(
        Usual,
        st.integers(),
        TEXT,
        st.datetimes(timezones=st.just(UTC)),
        st.decimals(allow_nan=False, allow_infinity=False),
        st.lists(
            st.builds(Line, TEXT, st.decimals(allow_nan=False, allow_infinity=False)), max_size=2
        ),
    ),
    source=TEXT,
    id=TEXT,
    key=st.none() | TEXT,
    prefix=st.sampled_from(["ce-", "ce_", "cloudEvents:", "cloudEvents_"]),
    minutes=st.integers(-1439, 1439),
)
def test_whatever_it_is_it_comes_back_with_all_its_attributes(
    event: Usual, source: str, id: str, key: str | None, prefix: str, minutes: int
) -> None:
    at = AT.astimezone(timezone(timedelta(minutes=minutes)))
    wired = encode(event, source=source, id=id, key=key, time=at)
    headers = wired.headers(prefix)
    received = decode(headers, wired.body, Line, Usual)

    assert received.event == event
    assert received.attributes == wired.attributes
    assert datetime.fromisoformat(received.attributes["time"]) == AT
    if prefix == "ce-":
        assert all(re.fullmatch(r"[\x21\x23-\x7e]+", value) for value in headers.values())


# The structured mode.


@pytest.mark.parametrize(
    "content_type",
    [
        "application/cloudevents+json",
        "application/cloudevents+json; charset=utf-8",
        "Application/CloudEvents+JSON",
    ],
)
@pytest.mark.parametrize("name", ["content-type", "Content-Type"])
def test_a_whole_event_in_one_object_is_read(name: str, content_type: str) -> None:
    _, body = structured(data={"order_id": 7}, subject=None, sequence=3)
    received = decode({name: content_type, "ce-id": "8"}, body, OrderPlaced)

    assert received.event == OrderPlaced(7)
    assert received.attributes == {
        "specversion": "1.0",
        "id": str(ID),
        "type": "shop.order.placed.v2",
        "source": "/o",
        "sequence": "3",
    }
    assert received.headers == {name: content_type, "ce-id": "8"}


def test_its_data_may_be_in_base_64() -> None:
    encoded = base64.b64encode(b'{"order_id": 7}').decode()

    assert decode(*structured(data_base64=encoded), OrderPlaced).event == OrderPlaced(7)


def test_a_domain_event_in_one_object_is_completed_too() -> None:
    headers, body = structured(data={"order_id": 7}, type="shop.order.paid.v1", time=AT.isoformat())
    event = decode(headers, body, OrderPaid).event

    assert isinstance(event, OrderPaid)
    assert (event.event_id, event.occurred_at) == (ID, AT)


def test_half_a_surrogate_pair_in_an_attribute_is_replaced() -> None:
    received = decode(*structured(id="\ud800", data={"order_id": 7}), OrderPlaced)
    binary = decode(headers_of(id="\ud800"), b'{"order_id": 7}', OrderPlaced)

    assert received.id == binary.id == "?"
    assert received.event_id == uuid5(NAMESPACE_URL, "/o ?")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_what_is_no_object_is_no_event(body: bytes) -> None:
    assert bad({"content-type": "application/cloudevents+json"}, body, OrderPlaced) == (
        "foreign",
        "no CloudEvent: it lacks the attributes id, type, source",
    )


@pytest.mark.parametrize("parts", [{"data_base64": "*"}, {"data_base64": "{}"}, {"data": None}, {}])
def test_data_that_is_broken_or_missing_is_undecodable(parts: dict[str, Any]) -> None:
    reason, problem = bad(*structured(**parts), OrderPlaced)

    assert reason == "undecodable"
    assert problem.startswith("the body is no shop.order.placed.v2: ")


# What cannot be read.


@pytest.mark.parametrize(
    ("headers", "missing"),
    [
        ({}, "id, type, source"),
        ({"ce-id": "1"}, "type, source"),
        ({"ce-id": "1", "ce-type": "", "ce-source": "/"}, "type"),
        ({"id": "1", "type": "x", "source": "/"}, "id, type, source"),
        ({"xce-id": "1", "ce-type": "x", "ce-source": "/"}, "id"),
    ],
)
def test_a_message_without_attributes_is_foreign(headers: dict[str, str], missing: str) -> None:
    assert bad(headers, b"{}", OrderPlaced) == (
        "foreign",
        f"no CloudEvent: it lacks the attributes {missing}",
    )


def test_a_type_that_nobody_consumes_is_unknown() -> None:
    headers = headers_of("shop.other.v1")

    assert bad(headers, b"{}", OrderPlaced) == (
        "unknown",
        "nobody here consumes 'shop.other.v1', only 'shop.order.placed.v2'",
    )
    assert bad(headers, b"{}", OrderPlaced, OrderPaid)[1] == (
        "nobody here consumes 'shop.other.v1', only 'shop.order.placed.v2', 'shop.order.paid.v1'"
    )
    assert bad(headers, b"{}")[1] == "nobody here consumes 'shop.other.v1', only nothing"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            b'{"order_id": "x"}',
            "the body is no shop.order.placed.v2: order_id: Input should be a valid integer, "
            "unable to parse string as an integer",
        ),
        (b"{}", "the body is no shop.order.placed.v2: order_id: Field required"),
        (b'{"order_id": "\xff"}', "the body is no shop.order.placed.v2: it is not in UTF-8"),
    ],
)
def test_a_body_that_is_no_such_event_is_undecodable(body: bytes, problem: str) -> None:
    assert bad(headers_of(), body, OrderPlaced) == ("undecodable", problem)


def test_a_body_that_cannot_be_converted_from_its_former_name_is_undecodable() -> None:
    reason, problem = bad(headers_of("shop.order.placed.v1"), b'{"id": "x"}', OrderPlaced)

    assert reason == "undecodable"
    assert problem.startswith(
        "formerly['shop.order.placed.v1'] of shop.order.placed.v2 failed: ValueError at "
    )


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, SECRET.encode()),
        ({"content-type": "application/cloudevents+json"}, SECRET.encode()),
        ({"content-type": "application/cloudevents+json"}, f'{{"data": "{SECRET}"}}'.encode()),
        structured(data=SECRET),
        structured(data={"order_id": SECRET}, note=SECRET),
        structured(data_base64=SECRET),
        structured(data=SECRET, type="shop.other.v1"),
        (headers_of("shop.other.v1"), SECRET.encode()),
        (headers_of(), SECRET.encode()),
        (headers_of(), f'{{"order_id": "{SECRET}"}}'.encode()),
        (headers_of(), f'{{"{SECRET}": 7}}'.encode()),
        (headers_of(), f"{SECRET}\xff".encode("latin-1")),
        (headers_of("shop.order.placed.v1"), f'{{"id": "{SECRET}"}}'.encode()),
        (headers_of("shop.order.paid.v1"), f'{{"order_id": "{SECRET}"}}'.encode()),
        (headers_of("shop.order.paid.v1"), f'["{SECRET}"]'.encode()),
    ],
)
def test_no_error_carries_a_part_of_the_body(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(BadMessageError) as caught:
        decode(headers, body, OrderPlaced, OrderPaid)
    error = caught.value
    assert error.__traceback__ is not None
    ours = error.with_traceback(error.__traceback__.tb_next)  # without the frame of this test

    assert SECRET not in everything_about(ours)
    assert SECRET not in repr(error.args)
    assert error.__cause__ is None
    assert error.__context__ is None


# Other readers and writers of CloudEvents.


def test_others_read_what_is_written() -> None:
    event = OrderPaid(7, event_id=ID, occurred_at=AT)
    wired = encode(event, source="/orders", key="größe 7 %")
    plain = encode(event, source="/orders", key="ada")
    kafka = {name: value.encode() for name, value in wired.headers("ce_").items()}
    rabbit = plain.headers()
    readings = [
        (from_http_event(HTTPMessage(wired.headers(), wired.body)), "größe 7 %"),
        (from_kafka_event(KafkaMessage(kafka, None, wired.body)), "größe 7 %"),
        # It does not know percent-encoding.
        (
            from_rabbitmq_event(RabbitMQMessage(rabbit, rabbit.pop("content-type"), plain.body)),
            "ada",
        ),
    ]

    for read, key in readings:
        assert read.get_id() == str(ID)
        assert read.get_type() == "shop.order.paid.v1"
        assert read.get_source() == "/orders"
        assert read.get_specversion() == "1.0"
        assert read.get_time() == AT
        assert read.get_datacontenttype() == "application/json"
        assert read.get_extension("partitionkey") == key
        assert read.get_data() == json.loads(wired.body)


FOREIGN: list[Callable[[CloudEvent], tuple[dict[str, str], bytes]]] = [
    lambda event: (to_http(event).headers, to_http(event).body),
    lambda event: (to_structured_http(event).headers, to_structured_http(event).body),
    lambda event: (texts(to_kafka(event).headers), to_kafka(event).value),
    lambda event: (texts(to_structured_kafka(event).headers), to_structured_kafka(event).value),
    lambda event: (to_rabbitmq(event).headers, to_rabbitmq(event).body),
    lambda event: (
        {"content-type": to_structured_rabbitmq(event).content_type or ""},
        to_structured_rabbitmq(event).body,
    ),
]


def texts(headers: dict[str, bytes]) -> dict[str, str]:
    return {name: value.decode() for name, value in headers.items()}


@pytest.mark.parametrize("written", FOREIGN, ids=range(len(FOREIGN)))
def test_what_others_write_is_read(
    written: Callable[[CloudEvent], tuple[dict[str, str], bytes]],
) -> None:
    event = CloudEvent(
        attributes={
            "specversion": "1.0",
            "id": "no-7",
            "type": "shop.order.paid.v1",
            "source": "/ärger",
            "time": AT,
            "datacontenttype": "application/json",
            "partitionkey": "ada lovelace",
        },
        data={"order_id": 7, "total": "1.10"},
    )
    received = decode(*written(event), OrderPaid)

    assert received.event == OrderPaid(7, Decimal("1.10"))
    assert isinstance(received.event, OrderPaid)
    assert received.event.occurred_at == AT
    assert received.event.event_id == received.event_id == uuid5(NAMESPACE_URL, "/ärger no-7")
    assert received.attributes["partitionkey"] == "ada lovelace"


# Where there is no event loop, and on any.


def there_and_back() -> None:
    wired = encode(OrderPlaced(7), source="/orders")
    assert decode(wired.headers(), wired.body, OrderPlaced).event == OrderPlaced(7)


@pytest.mark.anyio
async def test_it_needs_no_event_loop_and_works_on_any() -> None:
    there_and_back()
    await to_thread.run_sync(there_and_back)
