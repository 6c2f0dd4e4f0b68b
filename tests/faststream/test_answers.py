"""What becomes of each message: acknowledged, handed back, or a dead letter. Never nothing."""

import logging
from asyncio import CancelledError
from contextlib import suppress
from inspect import signature
from typing import Any

import anyio
import pytest
import stamina
from faststream import BaseMiddleware
from faststream.exceptions import NackMessage, RejectMessage

from eventkit import current_delivery
from eventkit.exceptions import DispatchError, HandlerTimeoutError
from eventkit.faststream._engines import Engine
from eventkit.wire import Received, encode
from tests.faststream.conftest import Clock
from tests.faststream.services import (
    NEEDS_AIOKAFKA,
    BillPaid,
    Kind,
    OrderPlaced,
    Sent,
    Service,
)

pytestmark = pytest.mark.anyio

SECRET = "s3cret"


class Fails:
    """A handler that raises what it is given, one after the other; the last one again and again."""

    def __init__(self, service: Service, *errors: BaseException | None) -> None:
        self.errors: list[BaseException | None] = [*errors]
        self.attempts = 0
        service.bus.on(OrderPlaced)(self.handle)

    async def handle(self, event: OrderPlaced) -> None:
        self.attempts += 1
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        if error is not None:
            raise error


def told(sent: Sent) -> tuple[str, str]:
    """Why a message is dead: in a word, and in a sentence."""
    return sent.headers["eventkit-reason"], sent.headers["eventkit-error"]


def without_content_type(headers: dict[str, str]) -> dict[str, str]:
    """RabbitMQ has it beside the headers."""
    return {name: value for name, value in headers.items() if name != "content-type"}


# What others do with a message around the bridge.


class Swallows(BaseMiddleware[Any, Any]):
    """A middleware of the user's, which lets no error through."""

    async def consume_scope(self, call_next: Any, msg: Any) -> Any:
        with suppress(Exception):
            return await call_next(msg)


async def test_a_middleware_that_swallows_errors_loses_nothing(service: Service) -> None:
    service.broker.add_middleware(Swallows)
    service.consume(OrderPlaced)
    Fails(service, NackMessage())
    async with service.running():
        await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]


class Breaks(BaseMiddleware[Any, Any]):
    """A middleware of the user's that fails before it is the consumer's turn."""

    async def consume_scope(self, call_next: Any, msg: Any) -> Any:
        raise OSError("away")


async def test_what_a_middleware_fails_on_is_handed_back(service: Service) -> None:
    service.broker.add_middleware(Breaks)
    service.consume(OrderPlaced)
    async with service.running():
        with suppress(OSError):  # a broker in memory raises it to who publishes
            await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]


async def test_nobody_who_asks_for_an_answer_has_one(service: Service) -> None:
    service.watch.refuse["replies"] = OSError("away")
    service.consume(OrderPlaced)
    handler = Fails(service, None)
    async with service.running():
        asks: dict[str, Any] = {"reply_to": "replies"}
        if service.kind == "nats":  # whose own reply is where it acknowledges
            asks = {"headers": asks}
        await service.send(OrderPlaced(7), **asks)

    assert handler.attempts == 1
    assert service.answers == ["ACKED"]


# What cannot be read.


@pytest.mark.parametrize(
    ("headers", "body", "reason", "error"),
    [
        (
            {"ce-type": "shop.other.v1"},
            b"{}",
            "unknown",
            "nobody here consumes 'shop.other.v1', only 'shop.order.placed.v1'",
        ),
        (
            {},
            b'{"order_id": "x"}',
            "undecodable",
            "the body is no shop.order.placed.v1: order_id: Input should be a valid integer, "
            "unable to parse string as an integer",
        ),
        (
            {"ce-id": "", "ce-source": ""},
            b"{}",
            "foreign",
            "no CloudEvent: it lacks the attributes id, source",
        ),
    ],
)
async def test_what_cannot_be_read_is_a_dead_letter(
    service: Service, headers: dict[str, str], body: bytes, reason: str, error: str
) -> None:
    service.consume(OrderPlaced)
    given = {"ce-id": "1", "ce-type": "shop.order.placed.v1", "ce-source": "/"} | headers
    async with service.running():
        await service.send(headers=given, body=body)

    assert [told(sent) for sent in service.dead] == [(reason, error)]
    assert service.answers == ["ACKED"]
    assert service.bus.stats.published == 0


async def test_a_message_without_attributes_or_body_is_a_dead_letter_as_it_came(
    service: Service,
) -> None:
    service.consume(OrderPlaced)
    async with service.running():
        await service.send(body=b"")

    (sent,) = service.dead
    assert sent.body == b""
    assert told(sent) == ("foreign", "no CloudEvent: it lacks the attributes id, type, source")
    assert not sent.options.get("content_type")


async def test_others_are_forgotten_where_they_are_to_be_ignored(service: Service) -> None:
    service.consume(OrderPlaced, others="ignore")
    async with service.running():
        await service.send(BillPaid(7))
        await service.send(OrderPlaced(7), body=b"{}")
        await service.send(body=b"{}")

    assert [told(sent)[0] for sent in service.dead] == ["undecodable", "foreign"]
    assert service.answers == ["ACKED", "ACKED", "ACKED"]


async def test_neither_a_header_nor_the_log_has_a_part_of_the_body(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.consume(OrderPlaced)
    async with service.running():
        await service.send(OrderPlaced(7), body=f'{{"order_id": "{SECRET}"}}'.encode())
        await service.send(BillPaid(7), body=f'"{SECRET}"'.encode())
        await service.send(body=f'"{SECRET}"'.encode())

    assert len(service.dead) == 3
    assert SECRET not in "".join(str(sent.headers) for sent in service.dead)
    assert SECRET not in caplog.text


# What fails.


async def test_what_fails_to_the_end_was_tried_five_times(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.consume(OrderPlaced)
    handler = Fails(service, RuntimeError("poison"))
    seen: list[object] = []

    @service.bus.on(OrderPlaced)
    async def note(event: OrderPlaced) -> None:
        seen.append(event)

    async with service.running():
        await service.send(OrderPlaced(7))
        handler.errors = [None]
        await service.send(OrderPlaced(8))

    assert handler.attempts == 6
    assert [told(sent) for sent in service.dead] == [("failed", "RuntimeError: poison")]
    assert service.answers == ["ACKED", "ACKED"]
    assert seen == [OrderPlaced(7)] * 5 + [OrderPlaced(8)]
    assert service.bus.stats.failed == 5
    failed = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage().partition(":")[0] for record in failed] == ["event handler failed"]
    levels = [
        (record.levelname, record.getMessage().partition(":")[0]) for record in caplog.records
    ]
    assert levels == [
        ("WARNING", "handlers of a message failed, and run again"),
        ("ERROR", "event handler failed"),
        ("ERROR", "a message has become a dead letter"),
    ]


async def test_what_succeeds_in_a_later_attempt_is_acknowledged(service: Service) -> None:
    service.consume(OrderPlaced)
    handler = Fails(service, RuntimeError(), RuntimeError(), None)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert handler.attempts == 3
    assert service.answers == ["ACKED"]
    assert service.dead == []


@pytest.mark.skipif(
    "cap" not in signature(stamina.set_testing).parameters, reason="this stamina always waits"
)
async def test_by_default_there_are_five_attempts(service: Service) -> None:
    service.consume(OrderPlaced, retry=None)
    handler = Fails(service, RuntimeError("poison"))
    async with service.running():
        with stamina.set_testing(True, attempts=100, cap=True):
            await service.send(OrderPlaced(7))

    assert handler.attempts == 5


async def test_each_attempt_has_the_same_event_id(service: Service) -> None:
    service.consume(OrderPlaced)
    ids: list[object] = []

    @service.bus.on(OrderPlaced)
    async def fail(event: OrderPlaced) -> None:
        ids.append(current_delivery().event_id)
        raise RuntimeError

    event = OrderPlaced(7)
    async with service.running():
        await service.send(event)

    assert ids == [event.event_id] * 5


async def test_all_that_failed_is_told_in_one_line(service: Service) -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise ValueError

    service.consume(OrderPlaced)
    Fails(service, ExceptionGroup("two", [OSError("a\n\nb"), ExceptionGroup("", [KeyError("c")])]))
    Fails(service, SilentError())

    @service.bus.on(OrderPlaced)
    async def go_on(event: OrderPlaced) -> None:
        service.bus.publish(BillPaid(7))

    @service.bus.on(BillPaid)
    async def follow(event: BillPaid) -> None:
        raise LookupError("follows")

    async with service.running():
        await service.send(OrderPlaced(7))

    ((reason, error),) = [told(sent) for sent in service.dead]
    assert reason == "failed"
    parts = ["OSError: a b", "KeyError: 'c'", f"{SilentError.__qualname__}", "LookupError: follows"]
    assert sorted(error.split("; ")) == sorted(parts)


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("x" * 10_000, f"RuntimeError: {'x' * 486}"),
        ("größe \ud800 \u2028 \x00", "RuntimeError: gr\\xf6\\xdfe \\ud800 \\x00"),
        ("ö" * 500, "RuntimeError: " + r"\xf6" * 121 + r"\x"),
        ("", "RuntimeError:"),
    ],
    ids=["long", "odd", "long and odd", "empty"],
)
async def test_an_error_is_written_so_that_each_broker_takes_it(
    service: Service, text: str, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1, "eventkit")  # xdist cannot send such lines
    service.consume(OrderPlaced)
    Fails(service, RuntimeError(text))
    async with service.running():
        await service.send(OrderPlaced(7))

    assert [told(sent)[1] for sent in service.dead] == [header]


async def test_what_takes_too_long_is_cancelled(service: Service) -> None:
    service.consume(OrderPlaced, within=0.01)

    @service.bus.on(OrderPlaced)
    async def wait(event: OrderPlaced) -> None:
        await anyio.sleep_forever()

    async with service.running():
        await service.send(OrderPlaced(7))

    assert [told(sent) for sent in service.dead] == [
        ("failed", "the handlers did not end within 0.01 s")
    ]
    assert service.answers == ["ACKED"]
    assert service.bus.stats.undelivered == 1


async def test_what_takes_too_long_the_second_time_tells_what_failed_the_first_time(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.consume(OrderPlaced, within=0.05)
    attempts: list[object] = []

    @service.bus.on(OrderPlaced)
    async def wait(event: OrderPlaced) -> None:
        attempts.append(event)
        if len(attempts) == 1:
            raise RuntimeError("the first time")
        await anyio.sleep_forever()

    async with service.running():
        await service.send(OrderPlaced(7))

    assert [told(sent)[1] for sent in service.dead] == ["the handlers did not end within 0.05 s"]
    assert "RuntimeError: the first time" in caplog.text


async def test_a_handler_with_a_limit_of_its_own_fails_by_it(service: Service) -> None:
    service.consume(OrderPlaced)

    @service.bus.on(OrderPlaced, timeout=0.001)
    async def wait(event: OrderPlaced) -> None:
        await anyio.sleep_forever()

    async with service.running():
        await service.send(OrderPlaced(7))

    ((reason, error),) = [told(sent) for sent in service.dead]
    assert reason == "failed"
    assert error.startswith(f"{HandlerTimeoutError.__qualname__}: ")


# What handlers answer.


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_handler_may_reject_a_message(service: Service, *, grouped: bool) -> None:
    service.consume(OrderPlaced)
    error = RejectMessage()
    handler = Fails(service, ExceptionGroup("", [OSError(), error]) if grouped else error)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert handler.attempts == 1
    assert [told(sent) for sent in service.dead] == [
        ("rejected", "a handler has raised RejectMessage")
    ]
    assert service.answers == ["ACKED"]


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_handler_may_hand_a_message_back(
    service: Service, clock: Clock, *, grouped: bool
) -> None:
    service.consume(OrderPlaced)
    error = NackMessage()
    handler = Fails(service, ExceptionGroup("", [OSError(), error]) if grouped else error)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert handler.attempts == 1
    assert service.answers == ["NACKED"]
    assert service.dead == []
    assert clock.pauses == [1.0]


async def test_it_may_do_so_in_a_later_attempt(service: Service) -> None:
    service.consume(OrderPlaced)
    Fails(service, RuntimeError(), NackMessage())
    async with service.running():
        await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]


async def test_between_two_handlers_to_reject_is_more_than_to_hand_back(service: Service) -> None:
    service.consume(OrderPlaced)
    Fails(service, NackMessage())
    Fails(service, RejectMessage())
    async with service.running():
        await service.send(OrderPlaced(7))

    assert [told(sent)[0] for sent in service.dead] == ["rejected"]


@pytest.mark.parametrize("answer", [NackMessage(), RejectMessage()])
async def test_what_fails_beside_an_answer_is_reported(
    service: Service, answer: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    service.consume(OrderPlaced)
    Fails(service, answer)
    Fails(service, RuntimeError("beside it"))
    async with service.running():
        await service.send(OrderPlaced(7))

    assert "RuntimeError: beside it" in caplog.text


async def test_while_the_subscriber_stops_no_attempt_begins(service: Service, clock: Clock) -> None:
    service.consume(OrderPlaced)
    attempts: list[object] = []

    @service.bus.on(OrderPlaced)
    async def fail(event: OrderPlaced) -> None:
        attempts.append(event)
        service.subscribers[0].running = False
        raise RuntimeError

    async with service.running():
        await service.send(OrderPlaced(7))

    assert len(attempts) == 1
    assert service.answers == ["NACKED"]
    assert clock.pauses == []


# What was given out too often.


async def test_a_message_that_was_given_out_too_often_is_dead(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 10

    async def deliveries(*_: object) -> int:
        return times

    service.consume(OrderPlaced)
    handler = Fails(service, None)
    for each in Engine.__subclasses__():
        monkeypatch.setattr(each, "deliveries", deliveries)
    async with service.running():
        await service.send(OrderPlaced(7))
        times = 11
        await service.send(OrderPlaced(7))

    assert handler.attempts == 1
    assert [told(sent) for sent in service.dead] == [
        ("crashed", "delivered 11 times without an answer")
    ]
    assert service.answers == ["ACKED", "ACKED"]


async def test_how_often_it_may_be_is_an_option() -> None:
    service = Service("rabbit")
    service.consume(OrderPlaced, max_deliveries=1)
    async with service.running():
        await service.send(OrderPlaced(7), headers={"x-delivery-count": 1})

    ((sent),) = service.dead
    assert told(sent) == ("crashed", "delivered 2 times without an answer")
    assert "x-delivery-count" not in sent.headers


async def test_a_broker_that_cannot_tell_has_the_message_back(
    service: Service,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def deliveries(*_: object) -> int:
        raise ConnectionError("away")

    service.consume(OrderPlaced)
    for each in Engine.__subclasses__():
        monkeypatch.setattr(each, "deliveries", deliveries)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]
    assert clock.pauses == [1.0]
    assert "a message could not be handled, and is handed back" in caplog.text
    assert "ConnectionError: away" in caplog.text


# Dead letters.


async def test_a_dead_letter_is_the_message_as_it_came_and_says_why(
    service: Service, kind: Kind
) -> None:
    service.consume(OrderPlaced)
    Fails(service, RuntimeError("poison"))
    wired = encode(OrderPlaced(7), source="/orders", key="größe 7")
    headers = wired.headers("ce_" if kind == "kafka" else "ce-")
    given: dict[str, Any] = {"key": b"k"} if kind == "kafka" else {}
    if kind == "rabbit":
        given = {"message_id": "m-7", "content_type": headers.pop("content-type")}
    async with service.running():
        await service.send(
            headers=headers
            | {"tenant": "t1", "X-Tenant": "t2", "traceparent": "00-1"}
            | {"Nats-Msg-Id": "7", "x-death": "1", "x-first-death-queue": "q"},
            body=wired.body,
            correlation_id="c-7",
            **given,
        )

    (sent,) = service.dead
    consumer = service.dead[0].headers["eventkit-consumer"]
    assert consumer in ("orders", "orders/billing")
    assert sent.body == wired.body
    assert without_content_type(sent.headers) == without_content_type(headers) | {
        "tenant": "t1",
        "X-Tenant": "t2",
        "traceparent": "00-1",
        "eventkit-reason": "failed",
        "eventkit-error": "RuntimeError: poison",
        "eventkit-consumer": consumer,
        "eventkit-round": "1",
    }
    content_type = sent.options.get("content_type") or sent.headers["content-type"]
    assert content_type == "application/json"
    assert sent.options["correlation_id"] == "c-7"
    if kind == "kafka":
        assert sent.options["key"] == b"k"
    if kind == "rabbit":
        assert (sent.options["message_id"], sent.options["persist"]) == ("m-7", True)


async def test_headers_that_are_no_ascii_are_kept(service: Service) -> None:
    letters: list[Received] = []

    async def read(received: Received) -> None:
        letters.append(received)

    service.consume(OrderPlaced)
    service.consume(OrderPlaced, place="dead", deliver=read, dead_letter=service.publisher("x"))
    Fails(service, RejectMessage())
    given = "zoé".encode() if service.kind == "redis" else "zoé"  # which FastStream measures in one
    async with service.running():
        await service.send(OrderPlaced(7), headers={"tenant": given})

    (letter,) = letters
    assert letter.event == OrderPlaced(7)
    assert letter.headers["tenant"] == "zoé"


async def test_what_identifies_a_message_is_cut_where_rabbitmq_takes_no_more() -> None:
    service, rabbit = Service("nats"), Service("rabbit")
    service.consume(OrderPlaced, dead_letter=rabbit.publisher("dead"))
    async with service.running(), rabbit.running():
        await service.send(headers={"message_id": "m" * 300}, body=b"", correlation_id="c" * 300)

    (sent,) = rabbit.dead
    assert sent.options["message_id"] == "m" * 255
    assert sent.options["correlation_id"] == "c" * 255


async def test_a_dead_letter_that_is_not_accepted_stays_where_it_is(
    service: Service, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    service.consume(OrderPlaced)
    service.watch.refuse["dead"] = ConnectionError("away")
    async with service.running():
        await service.send(BillPaid(7))

    assert service.answers == ["NACKED"]
    assert clock.pauses == [2.0]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(
        "a dead letter was not accepted, so the message is handed back: reason=unknown "
    )
    assert "ConnectionError: away" in caplog.text


async def test_so_it_is_where_nobody_answers(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As RabbitMQ does not while it has too little memory."""

    class Hangs(BaseMiddleware[Any, Any]):
        async def publish_scope(self, call_next: Any, cmd: Any) -> Any:
            await (call_next(cmd) if cmd.destination == "orders" else anyio.sleep_forever())

    monkeypatch.setattr("eventkit.faststream._consumer._DEAD_WITHIN", 0.01)
    service.broker.add_middleware(Hangs)
    service.consume(OrderPlaced)
    async with service.running():
        await service.send(BillPaid(7))

    assert service.answers == ["NACKED"]
    assert "a dead letter was not accepted, so the message is handed back" in caplog.text


async def test_so_it_is_where_the_broker_does_not_confirm(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = service.publisher("dead")
    service.consume(OrderPlaced, dead_letter=publisher)
    async with service.running():
        monkeypatch.setattr(publisher, "is_test", False)
        await service.send(BillPaid(7))

    assert service.answers == ["NACKED"]
    assert "the broker has not accepted the message: there is no " in caplog.text


async def test_a_replayed_dead_letter_is_counted_and_one_that_goes_round_is_stopped(
    service: Service, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    service.consume(OrderPlaced)
    async with service.running():
        await service.send(BillPaid(7))
        for _ in range(10):
            last = service.dead[-1]
            await service.send(headers=last.headers, body=last.body)

    assert [sent.headers["eventkit-round"] for sent in service.dead] == [
        str(number) for number in range(1, 11)
    ]
    assert service.answers == ["ACKED"] * 10 + ["NACKED"]
    assert clock.pauses == [2.0]
    assert "the message was a dead letter 10 times: dead letters come back here" in caplog.text


@pytest.mark.parametrize(
    "headers",
    [
        {"eventkit-consumer": "another", "eventkit-round": "10"},
        {"eventkit-round": "10"},
        {"eventkit-consumer": "orders", "eventkit-round": "x"},
        {"eventkit-consumer": "orders", "eventkit-round": "²"},
        {"eventkit-consumer": "orders"},
    ],
)
async def test_a_dead_letter_of_another_consumer_begins_anew(headers: dict[str, str]) -> None:
    service = Service("rabbit")
    service.consume(OrderPlaced)
    async with service.running():
        await service.send(BillPaid(7), headers=headers)

    (sent,) = service.dead
    assert (sent.headers["eventkit-consumer"], sent.headers["eventkit-round"]) == ("orders", "1")


@NEEDS_AIOKAFKA
async def test_dead_letters_may_go_to_another_broker() -> None:
    service, other = Service("kafka"), Service("rabbit")
    service.consume(OrderPlaced, dead_letter=other.publisher("dead"))
    async with other.running(), service.running():
        await service.send(BillPaid(7))

    (sent,) = other.dead
    assert told(sent)[0] == "unknown"
    assert sent.headers["ce_type"] == "shop.bill.paid.v1"
    assert sent.options["content_type"] == "application/json"
    assert service.answers == ["ACKED"]


# Who keeps events himself.


class Inbox:
    """Keeps what it is given; raises what it is given, one after the other, and then nothing."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = [*errors]
        self.kept: list[Received] = []

    async def __call__(self, received: Received) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.kept.append(received)


async def test_an_inbox_of_ones_own_has_what_was_read_instead_of_the_bus(service: Service) -> None:
    inbox = Inbox()
    service.consume(OrderPlaced, deliver=inbox)
    event = OrderPlaced(7)
    async with service.running():
        await service.send(event)

    (received,) = inbox.kept
    assert received.event == event
    assert received.unique_id == f"/orders {event.event_id}"
    assert service.answers == ["ACKED"]
    assert service.bus.stats.published == 0


async def test_an_inbox_may_drop_what_it_has_seen(service: Service) -> None:
    seen: set[str] = set()
    handler = Fails(service, None)

    async def once(received: Received) -> None:
        if received.unique_id not in seen:
            seen.add(received.unique_id)
            await service.bridge.dispatch(received)

    service.consume(OrderPlaced, deliver=once)
    event = OrderPlaced(7)
    async with service.running():
        await service.send(event)
        await service.send(event)

    assert handler.attempts == 1
    assert service.answers == ["ACKED", "ACKED"]


async def test_an_inbox_dispatches_with_the_messages_id_and_headers(service: Service) -> None:
    seen: list[tuple[object, object]] = []

    @service.bus.on(OrderPlaced)
    async def handle(event: OrderPlaced) -> None:
        delivery = current_delivery()
        seen.append((delivery.event_id, delivery.received))
        raise RuntimeError("poison")

    async def keep(received: Received) -> None:
        with pytest.raises(DispatchError):
            await service.bridge.dispatch(received)
        assert seen == [(received.event_id, received.headers)]

    service.consume(OrderPlaced, deliver=keep)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert service.answers == ["ACKED"]


async def test_an_outage_of_the_inbox_is_waited_for_in_place(
    service: Service, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox(*[OSError("away")] * 3)
    service.consume(OrderPlaced, deliver=inbox)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert len(inbox.kept) == 1
    assert service.answers == ["ACKED"]
    assert clock.pauses == [1.0] * 3
    assert caplog.text.count("messages cannot be stored in the inbox, and wait") == 1


async def test_a_long_outage_hands_the_message_back_and_is_no_dead_letter(
    service: Service, kind: Kind, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def away(received: Received) -> None:
        raise OSError("away")

    service.consume(OrderPlaced, deliver=away)
    async with service.running():
        for _ in range(5):
            await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"] * 5
    assert service.dead == []
    # The half of NATS' 30 s, and 25 s for all that wait longer; then the pause that hands back.
    in_place = 15 if kind == "nats" else 25
    assert clock.pauses == [1.0] * (in_place + 1) * 5
    complaints = caplog.text.count("messages cannot be stored in the inbox, and wait")
    assert complaints == 1 + (clock.now - 1) // 60


async def test_a_cancellation_that_an_inbox_makes_up_does_not_end_the_subscriber(
    service: Service,
) -> None:
    """It would: a client whose connection is lost cancels those who wait for an answer."""

    async def away(received: Received) -> None:
        raise CancelledError

    service.consume(OrderPlaced, deliver=away)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]


async def test_so_it_is_with_the_place_of_dead_letters(service: Service) -> None:
    service.watch.refuse["dead"] = CancelledError()
    service.consume(OrderPlaced)
    async with service.running():
        await service.send(BillPaid(7))

    assert service.answers == ["NACKED"]


async def test_an_outage_does_not_hold_up_a_subscriber_that_stops(
    service: Service, clock: Clock
) -> None:
    async def stop(received: Received) -> None:
        service.subscribers[0].running = False
        raise OSError("away")

    service.consume(OrderPlaced, deliver=stop)
    async with service.running():
        await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]
    assert clock.pauses == []


async def test_an_inbox_may_reject_a_message_or_hand_it_back(
    service: Service, clock: Clock
) -> None:
    service.consume(OrderPlaced, deliver=Inbox(RejectMessage(), NackMessage()))
    async with service.running():
        await service.send(OrderPlaced(7))
        await service.send(OrderPlaced(8))

    assert [told(sent) for sent in service.dead] == [
        ("rejected", "deliver= has raised RejectMessage")
    ]
    assert service.answers == ["ACKED", "NACKED"]
    assert clock.pauses == [1.0]


async def test_how_often_the_broker_gave_it_out_does_not_matter_to_an_inbox() -> None:
    service, inbox = Service("rabbit"), Inbox()
    service.consume(OrderPlaced, deliver=inbox)
    async with service.running():
        await service.send(OrderPlaced(7), headers={"x-delivery-count": 1000})

    assert len(inbox.kept) == 1


async def test_what_fails_in_a_middleware_is_handed_back_and_not_dropped(kind: Kind) -> None:
    class Fails(BaseMiddleware[Any, Any]):
        async def consume_scope(self, call_next: Any, msg: Any) -> Any:
            raise RuntimeError("in a middleware")

    service = Service(kind)
    service.broker.add_middleware(Fails)
    service.consume(OrderPlaced)
    async with service.running():
        with pytest.raises(RuntimeError, match="in a middleware"):  # a test broker raises it
            await service.send(OrderPlaced(7))

    assert service.answers == ["NACKED"]
    assert service.dead == []
