"""What arrives, how often, and in which order, where nothing is killed."""

import asyncio
from decimal import Decimal

import pytest
from faststream.exceptions import NackMessage, RejectMessage

from eventkit.wire import Received, encode
from tests.brokers.conftest import on_each
from tests.brokers.happenings import Invoiced, Placed, customer_of
from tests.brokers.kinds import Message
from tests.brokers.places import Place
from tests.brokers.seen import Seen
from tests.brokers.services import Service, connected

pytestmark = pytest.mark.anyio


async def test_fifty_events_arrive_once_in_order_and_equal_to_what_was_sent(place: Place) -> None:
    events = [Placed(each, total=Decimal(each) / 3) for each in range(50)]
    orders, billing = Service(place, "orders"), Service(place, "billing")
    orders.forward(Placed, key=customer_of)
    billing.consume(Placed)
    seen = Seen[Placed]()
    billing.bus.on(Placed)(seen.add)
    async with orders, billing:
        for event in events:
            await orders.bus.dispatch(event)
        arrived = await seen.until(50)
    assert arrived == events
    assert [each.event_id for each in arrived] == [each.event_id for each in events]
    assert [each.occurred_at for each in arrived] == [each.occurred_at for each in events]
    assert await place.unacknowledged() == 0


async def test_a_handler_that_fails_twice_has_handled_it_in_the_third_attempt(
    place: Place,
) -> None:
    orders, billing = connected(place)
    seen = Seen[Placed]()

    @billing.bus.on(Placed)
    async def fails_twice(event: Placed) -> None:
        if await seen.add(event) < 3 and event.how == "fails twice":
            raise RuntimeError("not yet")

    async with orders, billing:
        await orders.bus.dispatch(Placed(1, how="fails twice"))
        await orders.bus.dispatch(Placed(2))
        arrived = await seen.until(4)
        assert [each.number for each in sorted(arrived, key=by_number)] == [1, 1, 1, 2]
    assert len(seen.all) == 4
    assert await place.unacknowledged() == 0


async def test_poison_is_a_dead_letter_after_five_attempts_and_the_next_is_handled(
    place: Place,
) -> None:
    orders, billing = connected(place)
    seen = Seen[Placed]()

    @billing.bus.on(Placed)
    async def handle(event: Placed) -> None:
        await seen.add(event)
        if event.how == "poison":
            raise RuntimeError("poison")

    poison = Placed(1, how="poison")
    async with orders, billing, place.read_dead() as dead:
        async with place.read() as all_orders:
            await orders.bus.dispatch(poison)
            original = await all_orders.next()
        await orders.bus.dispatch(Placed(2))
        letter = await dead.next()
        await seen.until(6)
        assert letter.headers["eventkit-reason"] == "failed"
        assert letter.headers["eventkit-error"] == "RuntimeError: poison"
        prefix = place.kind.prefix
        assert letter.headers[f"{prefix}id"] == str(poison.event_id)
        assert ce_headers(place, letter.headers) == ce_headers(place, original.headers)
        assert letter.body == original.body
        assert letter.headers["content-type"] == "application/json"
    numbers = [each.number for each in seen.all]
    assert numbers.count(1) == 5
    assert numbers.count(2) == 1
    assert dead.waiting == 0
    assert await place.unacknowledged() == 0


async def test_a_service_has_each_event_and_so_has_another(place: Place) -> None:
    orders = Service(place, "orders")
    orders.forward(Placed)
    consumers: list[tuple[Service, Seen[int]]] = []
    for group in ("billing", "stock"):
        service, seen = Service(place, group), Seen[int]()
        service.consume(Placed, group=group)

        @service.bus.on(Placed)
        async def handle(event: Placed, seen: Seen[int] = seen) -> None:
            await seen.add(event.number)

        consumers.append((service, seen))
    (billing, first), (stock, second) = consumers
    async with orders, billing, stock:
        for each in range(20):
            await orders.bus.dispatch(Placed(each))
        await first.until(20)
        await second.until(20)
    assert first.all == second.all == [*range(20)]


async def test_two_processes_of_a_service_share_its_events(place: Place) -> None:
    orders = Service(place, "orders")
    orders.forward(Placed)
    seen = Seen[int]()

    async def handle(event: Placed) -> None:
        await seen.add(event.number)

    pods = [Service(place, "billing") for _ in range(2)]
    for each in pods:
        each.consume(Placed)
        each.bus.on(Placed)(handle)
    async with orders, pods[0], pods[1]:
        for number in range(20):
            await orders.bus.dispatch(Placed(number))
        await seen.until(20)
    assert sorted(seen.all) == [*range(20)]
    assert await place.unacknowledged() == 0


async def test_what_a_handler_publishes_has_the_correlation_id_of_the_message(
    place: Place,
) -> None:
    orders, billing = connected(place)
    # To any place that has one reader.
    billing.bridge.forward(Invoiced, place.kind.dead_letters(billing.broker, place.dead))

    @billing.bus.on(Placed)
    async def invoice(event: Placed) -> None:
        billing.bus.publish(Invoiced(event.number))

    async with (
        orders,
        billing,
        place.read() as placed,
        place.read_dead() as invoiced,
    ):
        await orders.bus.dispatch(Placed(1))
        first, second = await placed.next(), await invoiced.next()
    assert second.headers[f"{place.kind.prefix}type"] == "brokers.invoiced.v1"
    assert first.correlation_id
    assert second.correlation_id == first.correlation_id


async def test_what_a_handler_publishes_has_the_trace_of_the_message(place: Place) -> None:
    billing = Service(place, "billing")
    billing.consume(Placed)
    billing.bridge.forward(Invoiced, place.kind.dead_letters(billing.broker, place.dead))

    @billing.bus.on(Placed)
    async def invoice(event: Placed) -> None:
        billing.bus.publish(Invoiced(event.number))

    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    wired = encode(Placed(1), source="/orders")
    sent = Message(wired.headers(place.kind.prefix) | trace, wired.body)
    async with billing, place.kind.read(place.url, place.dead) as invoiced:
        await place.kind.send(place.url, place.orders, sent)
        found = await invoiced.next()
    assert found.headers[f"{place.kind.prefix}type"] == "brokers.invoiced.v1"
    assert trace.items() <= found.headers.items()


async def test_an_inbox_has_a_message_run_once_that_comes_twice(place: Place) -> None:
    orders, billing = Service(place, "orders"), Service(place, "billing")
    orders.forward(Placed)
    seen, started = Seen[str](), Seen[int]()
    known: set[str] = set()

    async def deliver(received: Received) -> None:
        if received.unique_id not in known:
            known.add(received.unique_id)
            await billing.bus.dispatch(received.event)
        await seen.add(received.unique_id)

    billing.consume(Placed, deliver=deliver)

    @billing.bus.on(Placed)
    async def handle(event: Placed) -> None:
        await started.add(event.number)

    event = Placed(1)
    async with place.read() as reader, orders:
        await orders.bus.dispatch(event)
        message = await reader.next()
    # By a plain client, which gives NATS nothing that it could drop it by.
    await place.send(Message(ce_headers(place, message.headers), message.body))
    async with billing:
        await seen.until(2)
    assert seen.all[0] == seen.all[1]
    assert started.all == [1]
    assert await place.unacknowledged() == 0


async def test_who_hands_it_back_has_it_again_and_no_dead_letter_comes_of_it(
    place: Place,
) -> None:
    orders, billing = connected(place, returns_after=2.0)
    seen = Seen[int]()

    @billing.bus.on(Placed)
    async def handle(event: Placed) -> None:
        if await seen.add(event.number) < 3:
            raise NackMessage

    async with orders, billing, place.read_dead() as dead:
        await orders.bus.dispatch(Placed(1))
        await seen.until(3)
    assert seen.all == [1, 1, 1]
    assert dead.waiting == 0
    assert await place.unacknowledged() == 0


async def test_who_rejects_it_has_it_once_and_it_is_a_dead_letter(place: Place) -> None:
    orders, billing = connected(place)
    seen = Seen[int]()

    @billing.bus.on(Placed)
    async def handle(event: Placed) -> None:
        await seen.add(event.number)
        raise RejectMessage

    async with orders, billing, place.read_dead() as dead:
        await orders.bus.dispatch(Placed(1))
        letter = await dead.next()
    assert letter.headers["eventkit-reason"] == "rejected"
    assert seen.all == [1]
    assert await place.unacknowledged() == 0


async def test_an_outage_of_what_delivers_loses_nothing_and_makes_no_dead_letter(
    place: Place,
) -> None:
    orders, billing = Service(place, "orders"), Service(place, "billing")
    orders.forward(Placed)
    tries, seen = Seen[int](), Seen[int]()

    async def deliver(received: Received) -> None:
        assert isinstance(received.event, Placed)
        if await tries.add(received.event.number) < 4:
            raise ConnectionError("the database is away")
        if received.event.number not in seen.all:  # those that wait may be handed out again
            await seen.add(received.event.number)

    billing.consume(Placed, deliver=deliver, returns_after=2.0)
    async with orders, billing, place.read_dead() as dead:
        for each in range(3):
            await orders.bus.dispatch(Placed(each))
        await seen.until(3)
    assert sorted(seen.all) == [0, 1, 2]
    assert dead.waiting == 0
    assert await place.unacknowledged() == 0


@on_each("can_refuse")
async def test_a_message_stays_while_its_dead_letter_is_not_accepted(place: Place) -> None:
    orders, billing = connected(place, returns_after=4.0)
    seen = Seen[int]()

    @billing.bus.on(Placed)
    async def handle(event: Placed) -> None:
        await seen.add(event.number)
        raise RuntimeError("poison")

    async with orders, billing:
        await place.kind.take_away(place.url, place.dead)
        await orders.bus.dispatch(Placed(1))
        await seen.until(6)  # once more than it is tried at one time
        await place.kind.prepare(place.url, place.dead)
        async with place.read_dead() as dead:
            letter = await dead.next()
    assert letter.headers["eventkit-reason"] == "failed"
    assert len(seen.all) % 5 == 0
    assert dead.waiting == 0
    assert await place.unacknowledged() == 0


@on_each("asks_one_by_one")
async def test_a_backlog_that_takes_longer_than_the_brokers_patience_is_handled_once(
    place: Place,
) -> None:
    orders, billing = connected(place, returns_after=2.0)
    seen = Seen[int]()

    @billing.bus.on(Placed)
    async def handle(event: Placed) -> None:
        await asyncio.sleep(0.3)  # what it does takes this long
        await seen.add(event.number)

    async with orders:
        for each in range(12):
            await orders.bus.dispatch(Placed(each))
    async with billing:
        await seen.until(12)
    assert sorted(seen.all) == [*range(12)]
    assert await place.unacknowledged() == 0


async def test_handlers_that_do_not_end_in_time_are_cancelled_and_it_is_a_dead_letter(
    place: Place,
) -> None:
    orders, billing = connected(place, within=0.5)
    ended = Seen[str]()

    @billing.bus.on(Placed)
    async def hangs(event: Placed) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await ended.add("cancelled")

    async with orders, billing, place.read_dead() as dead:
        await orders.bus.dispatch(Placed(1))
        letter = await dead.next()
        await ended.until(1)
    assert letter.headers["eventkit-reason"] == "failed"
    assert letter.headers["eventkit-error"] == "the handlers did not end within 0.5 s"
    assert billing.bus.stats.undelivered == 1
    assert await place.unacknowledged() == 0


async def test_an_event_sent_twice_is_one_for_nats_and_one_id_for_the_others(
    place: Place,
) -> None:
    orders = Service(place, "orders")
    orders.forward(Placed)
    event, last = Placed(1), Placed(2)
    async with orders, place.read() as reader:
        for each in (event, event, last):
            await orders.bus.dispatch(each)
        found = [await reader.next()]
        while found[-1].headers[f"{place.kind.prefix}id"] != str(last.event_id):
            found.append(await reader.next())
    ids = [each.headers[f"{place.kind.prefix}id"] for each in found[:-1]]
    times = 1 if place.kind.name.startswith("nats") else 2
    assert ids == [str(event.event_id)] * times


def by_number(event: Placed) -> int:
    return event.number


def ce_headers(place: Place, headers: dict[str, str]) -> dict[str, str]:
    """Those that are the event's."""
    return {name: each for name, each in headers.items() if name.startswith(place.kind.prefix)}
