"""What differs between the brokers, where one in memory does not show it."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiormq.abc import DeliveredMessage
from faststream.nats.parser import NatsParser
from faststream.redis.message import RedisStreamMessage
from nats.aio.msg import Msg
from pamqp import commands
from pamqp.header import ContentHeader

from eventkit.faststream._engines import Kafka, Nats, Rabbit, Redis

pytestmark = pytest.mark.anyio


def delivered(answer: Any) -> DeliveredMessage:
    channel: Any = SimpleNamespace()
    return DeliveredMessage(delivery=answer, header=ContentHeader(), body=b"", channel=channel)


NO_ROUTE = commands.Basic.Return(reply_code=312, reply_text="NO_ROUTE", exchange="e")


@pytest.mark.parametrize(
    ("result", "refusal"),
    [
        (commands.Basic.Ack(), None),
        (delivered(NO_ROUTE), "NO_ROUTE"),
        (NO_ROUTE, "NO_ROUTE"),
        (commands.Basic.Nack(), "there is no confirmation"),
        (None, "there is no confirmation"),
    ],
)
def test_rabbitmq_has_taken_what_it_acknowledges_and_does_not_return(
    result: Any, refusal: str | None
) -> None:
    assert Rabbit().refusal(result) == refusal


def test_the_others_have_taken_what_has_a_place_in_their_log() -> None:
    assert Nats().refusal(SimpleNamespace(stream="orders", seq=1)) is None
    assert Nats().refusal(None) == "there is no acknowledgement"
    assert Redis().refusal(b"1-0") is None
    assert Redis().refusal(None) == "there is no id of an entry"
    assert Kafka().refusal(SimpleNamespace(offset=0)) is None
    assert Kafka().refusal(SimpleNamespace(offset=-1)) == "there is no offset of a record"
    assert Kafka().refusal(None) == "there is no offset of a record"


async def test_nats_counts_what_it_hands_out_and_a_test_broker_does_not() -> None:
    client: Any = SimpleNamespace(_is_closed=False)
    parse = NatsParser(pattern="", is_ack_disabled=False).parse_message
    reply = "$JS.ACK.orders.billing.11.1.1.1700000000000000000.0"
    handed_out = await parse(Msg(client, "orders", reply, b"", {}))
    in_memory = await parse(Msg(client, "orders", "", b"", {}))

    assert await Nats().deliveries(handed_out, None) == 11
    assert await Nats().deliveries(in_memory, None) is None


@pytest.mark.parametrize(
    ("headers", "times"),
    [({"x-delivery-count": 3}, 4), ({"x-delivery-count": "3"}, None), ({}, None)],
)
async def test_quorum_queues_of_rabbitmq_count_what_comes_back(
    headers: dict[str, Any], times: int | None
) -> None:
    assert await Rabbit().deliveries(SimpleNamespace(headers=headers), None) == times


class Pending:
    """A stream of Redis that has handed out its entries three times."""

    async def xpending_range(self, **_: object) -> list[dict[str, Any]]:
        return [{"times_delivered": 3}]


async def test_redis_counts_what_is_taken_over() -> None:
    raw: Any = {"type": "stream", "channel": "orders", "message_ids": [b"1-0"], "data": {}}
    consumer: Any = Pending()
    message = RedisStreamMessage(raw, b"", consumer=consumer, group="billing")
    new, claiming = SimpleNamespace(min_idle_time=None), SimpleNamespace(min_idle_time=60_000)

    assert await Redis().deliveries(message, new) == 1
    assert await Redis().deliveries(message, claiming) == 3
    raw["delivery_counts"] = [4]
    assert await Redis().deliveries(message, new) == 5


async def test_kafka_does_not_count() -> None:
    assert await Kafka().deliveries(SimpleNamespace(), None) is None
