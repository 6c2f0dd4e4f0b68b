"""Events that were read from messages of other services, and what goes along with them."""

from collections.abc import Mapping
from uuid import UUID

import pytest

from eventkit import Delivery, DomainEvent, EventBus, Observer, current_delivery
from eventkit._core.ambient import carried
from eventkit._core.bus import state_of
from eventkit._core.context import dispatch
from eventkit._core.events import Incoming
from eventkit._core.units import active_unit

pytestmark = pytest.mark.anyio

MESSAGE = Incoming(UUID(int=7), {"ce-id": "7", "ce-source": "/orders"})


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


Seen = list[tuple[object, UUID, Mapping[str, str] | None]]


class Placed(DomainEvent):
    """Has an id of its own."""


def noting(seen: Seen, bus: EventBus, *event_types: type) -> None:
    """Note of which event, and of which message, each delivery is."""

    async def note(event: object) -> None:
        delivery = current_delivery()
        seen.append((event, delivery.event_id, delivery.received))

    for event_type in event_types:
        bus.on(event_type)(note)


async def test_a_unit_of_work_inside_a_handler_is_part_of_its_delivery(bus: EventBus) -> None:
    seen: list[tuple[Delivery, Delivery]] = []

    @bus.on(int)
    async def open_one(event: int) -> None:
        outside = current_delivery()
        async with bus.context():
            seen.append((outside, current_delivery()))

    await bus.dispatch(7)

    ((outside, inside),) = seen
    assert inside is outside


@pytest.mark.parametrize("event", [Placed(), 7], ids=["with an id", "without"])
async def test_a_delivery_has_the_headers_and_the_id_of_the_message(
    bus: EventBus, event: object
) -> None:
    seen: Seen = []
    noting(seen, bus, object)

    assert await dispatch(state_of(bus), event, MESSAGE) == []

    assert seen == [(event, UUID(int=7), {"ce-id": "7", "ce-source": "/orders"})]


async def test_so_has_one_that_is_published_in_a_unit_of_work(bus: EventBus) -> None:
    told: list[Delivery] = []

    class Watcher(Observer):
        def published(self, event: object, deliveries: object) -> None:
            told.extend(active_unit(state_of(bus)).queue.pending[0].deliveries())

    seen: Seen = []
    noting(seen, bus, int)
    bus.observe(Watcher())
    async with bus.context() as unit:
        active_unit(state_of(bus)).publish((1, 2), False, MESSAGE)
        (first, _) = unit.pending

    assert seen == [(1, MESSAGE.event_id, MESSAGE.headers), (2, MESSAGE.event_id, MESSAGE.headers)]
    assert {delivery.event_id for delivery in [first, *told]} == {MESSAGE.event_id}
    assert first.id != first.event_id


async def test_what_its_handlers_publish_is_not_received_and_has_an_id_of_its_own(
    bus: EventBus,
) -> None:
    seen: Seen = []
    noting(seen, bus, str, Placed)
    own = Placed()

    @bus.on(int)
    async def go_on(event: int) -> None:
        bus.publish("from a handler", own)

    await dispatch(state_of(bus), 7, MESSAGE)

    (text, text_id, of_text), placed = seen
    assert (text, of_text) == ("from a handler", None)
    assert text_id != MESSAGE.event_id
    assert placed == (own, own.event_id, None)


async def test_what_is_published_here_is_not_received(bus: EventBus) -> None:
    seen: Seen = []
    noting(seen, bus, int)

    async with bus.context():
        bus.publish(1)
    await bus.dispatch(2)

    assert [(event, received) for event, _, received in seen] == [(1, None), (2, None)]


async def test_a_dispatch_of_a_message_returns_what_failed(bus: EventBus) -> None:
    @bus.on(int)
    async def fail(event: int) -> None:
        raise RuntimeError

    (failure,) = await dispatch(state_of(bus), 7, MESSAGE)

    assert failure.delivery.received == MESSAGE.headers


async def test_headers_are_carried_along_with_all_that_an_event_causes(bus: EventBus) -> None:
    seen: list[tuple[object, Mapping[str, str]]] = []

    @bus.on(object)
    async def note(event: object) -> None:
        seen.append((event, carried.get()))

    @bus.on(int)
    async def go_on(event: int) -> None:
        bus.publish("follows")

    token = carried.set({"traceparent": "00-1"})
    async with bus.context():
        bus.publish(7)
        carried.reset(token)
    async with bus.context():
        bus.publish("another")

    trace = {"traceparent": "00-1"}
    assert seen == [(7, trace), ("follows", trace), ("another", {})]
