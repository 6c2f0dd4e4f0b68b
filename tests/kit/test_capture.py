"""What a capture knows of a bus: published, handled, failed, discarded, undelivered, and causes."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import anyio
import pytest
from anyio import CancelScope

from eventkit import DomainEvent, EventBus
from eventkit.testing import EventCapture, UnexpectedFailures

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    order_id: int


@dataclass(frozen=True, slots=True)
class ReceiptSent(DomainEvent):
    order_id: int


@dataclass(frozen=True, slots=True)
class Viewed(DomainEvent):
    """An event that nobody handles."""

    page: str


@pytest.fixture
def bus() -> EventBus:
    bus = EventBus()

    @bus.on(OrderPlaced, name="send_receipt")
    async def send_receipt(event: OrderPlaced) -> None:
        bus.publish(ReceiptSent(event.order_id))
        if event.order_id == 13:
            raise ValueError("no receipt")
        if event.order_id == 99:
            await anyio.sleep_forever()

    @bus.on(ReceiptSent, name="archive")
    def archive(event: ReceiptSent) -> None: ...

    return bus


@pytest.fixture
def events(bus: EventBus) -> Iterator[EventCapture]:
    with EventCapture(bus) as events:
        yield events


async def test_what_is_published_counts_while_its_unit_of_work_is_open(
    bus: EventBus, events: EventCapture
) -> None:
    async with bus.context():
        bus.publish(OrderPlaced(1), Viewed("/"))
        assert events.published == [OrderPlaced(1), Viewed("/")]

    assert events.published == [OrderPlaced(1), Viewed("/"), ReceiptSent(1)]
    assert events.handled == [OrderPlaced(1), ReceiptSent(1)]
    assert events.discarded == []


async def test_what_a_unit_of_work_discards_was_not_published_handler_or_not(
    bus: EventBus, events: EventCapture
) -> None:
    with suppress(LookupError):
        async with bus.context():
            bus.publish(OrderPlaced(1), Viewed("/"))
            raise LookupError

    assert events.published == []
    assert events.discarded == [OrderPlaced(1), Viewed("/")]
    assert events.handled == []


async def test_a_savepoint_discards_its_own_events_alone(
    bus: EventBus, events: EventCapture
) -> None:
    async with bus.context():
        bus.publish(Viewed("outer"))
        with suppress(LookupError):
            async with bus.context():
                bus.publish(Viewed("lost"), OrderPlaced(1))
                raise LookupError
        async with bus.context():
            bus.publish(Viewed("kept"))
        assert events.published == [Viewed("outer"), Viewed("kept")]

    assert events.published == [Viewed("outer"), Viewed("kept")]
    assert events.discarded == [Viewed("lost"), OrderPlaced(1)]


async def test_what_was_released_stays_published_whatever_follows(
    bus: EventBus, events: EventCapture
) -> None:
    with suppress(LookupError):
        async with bus.context() as unit:
            bus.publish(Viewed("before"), OrderPlaced(1))
            unit.release()
            bus.publish(Viewed("after"), OrderPlaced(2))
            bus.publish(Viewed("anyway"), even_on_failure=True)
            raise LookupError

    assert events.published == [Viewed("before"), OrderPlaced(1), Viewed("anyway"), ReceiptSent(1)]
    assert events.discarded == [Viewed("after"), OrderPlaced(2)]


async def test_a_failed_handlers_events_were_not_published(
    bus: EventBus, events: EventCapture
) -> None:
    async with bus.context():
        bus.publish(OrderPlaced(13))

    assert events.published == [OrderPlaced(13)]
    assert events.discarded == [ReceiptSent(13)]
    (failure,) = events.failures
    assert (failure.delivery.event, str(failure.error)) == (OrderPlaced(13), "no receipt")


async def test_what_a_cancellation_ends_is_undelivered(bus: EventBus, events: EventCapture) -> None:
    with CancelScope() as scope:
        async with bus.context():
            bus.publish(OrderPlaced(99), OrderPlaced(1))
            scope.cancel()

    assert events.published == [OrderPlaced(99), OrderPlaced(1)]
    assert events.undelivered == [OrderPlaced(99), OrderPlaced(1)]


async def test_an_unnoticed_failure_fails_the_block(bus: EventBus) -> None:
    with pytest.raises(UnexpectedFailures) as caught, EventCapture(bus):
        async with bus.context():
            bus.publish(OrderPlaced(13))

    assert [str(error) for error in caught.value.exceptions] == ["no receipt"]
