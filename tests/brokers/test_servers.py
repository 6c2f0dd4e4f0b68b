"""FastStream alone on the brokers that tests kill: what the bridge can build on."""

from typing import Any

import anyio
import pytest

from tests.brokers.conftest import on_each_own
from tests.brokers.kinds import Message
from tests.brokers.places import Place
from tests.brokers.seen import Seen

pytestmark = pytest.mark.anyio


def consume(place: Place, broker: Any, seen: Seen[bytes]) -> None:
    async def handle(body: bytes) -> None:  # nothing that is JSON, which FastStream reads
        if body not in seen.all:  # a broker may be killed before it reads that it was handled
            await seen.add(body)

    subscriber: Any = place.kind.subscriber(broker, place.orders, "billing")
    for each in subscriber if isinstance(subscriber, list) else [subscriber]:  # pyright: ignore[reportUnknownVariableType]
        each(handle)


async def test_a_broker_that_was_killed_has_what_it_confirmed_and_consumers_go_on(
    own_place: Place,
) -> None:
    server = own_place.server
    assert server is not None
    broker, seen = own_place.kind.broker(own_place.url), Seen[bytes]()
    consume(own_place, broker, seen)
    async with broker:
        await broker.start()
        await own_place.send(Message({}, b"first"))
        await seen.until(1)
        await anyio.to_thread.run_sync(server.restart)
        if not server.keeps:
            await own_place.prepare()
        await own_place.send(Message({}, b"second"))
        await seen.until(2)
    assert seen.all == [b"first", b"second"]


@on_each_own("closes_connections")
async def test_consumers_go_on_when_the_broker_has_closed_all_connections(
    own_place: Place,
) -> None:
    server = own_place.server
    assert server is not None
    broker, seen = own_place.kind.broker(own_place.url), Seen[bytes]()
    consume(own_place, broker, seen)
    async with broker:
        await broker.start()
        for times, body in enumerate([b"first", b"second", b"third"], start=1):
            await own_place.send(Message({}, body))
            await seen.until(times)
            await anyio.to_thread.run_sync(server.close_connections)
        await own_place.send(Message({}, b"last"))
        await seen.until(4)
    assert seen.all == [b"first", b"second", b"third", b"last"]
