"""What a capture knows of a bus: published, handled, failed, discarded, undelivered, and causes."""

import importlib
import sys
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest
from anyio import CancelScope, create_task_group, to_thread

from eventkit import Delivery, EventBus, EventRouter, Observer
from eventkit._core.endings import abandon
from eventkit.testing import EventCapture, UnexpectedFailures
from tests.kit.orders import OrderPlaced, ReceiptSent, Viewed
from tests.witness import assert_settled, entered, nothing, unit_of

pytestmark = pytest.mark.anyio


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


async def test_an_unnoticed_failure_is_no_news_where_the_block_fails_itself(bus: EventBus) -> None:
    async def fail() -> None:
        with EventCapture(bus):
            async with bus.context():
                bus.publish(OrderPlaced(13))
            raise LookupError

    with pytest.raises(LookupError):
        await fail()

    assert_settled(bus)


async def test_a_failure_that_was_looked_at_is_known_and_one_after_that_is_not(
    bus: EventBus,
) -> None:
    async def look_once() -> None:
        with EventCapture(bus) as events:
            async with bus.context():
                bus.publish(OrderPlaced(13))
            assert len(events.failures) == 1
            async with bus.context():
                bus.publish(OrderPlaced(13))

    with pytest.raises(UnexpectedFailures) as caught:
        await look_once()
    assert len(caught.value.exceptions) == 1
    assert caught.value.split(ValueError)[0] is not None


async def test_a_failure_that_dispatch_raises_has_been_told(bus: EventBus) -> None:
    with EventCapture(bus) as events, pytest.raises(ExceptionGroup):
        await bus.dispatch(OrderPlaced(13))

    assert [str(each.error) for each in events.failures] == ["no receipt"]


async def test_failures_may_be_allowed(bus: EventBus) -> None:
    with EventCapture(bus) as events:
        events.allow_failures()
        async with bus.context():
            bus.publish(OrderPlaced(13))


async def test_failures_still_reach_who_is_told_of_them(bus: EventBus) -> None:
    told: list[str] = []

    def tell(delivery: Delivery, error: Exception) -> None:
        told.append(f"{delivery.handler}: {error}")

    bus.report_failure = tell
    with EventCapture(bus) as events:
        events.allow_failures()
        async with bus.context():
            bus.publish(OrderPlaced(13))

    assert told == ["send_receipt: no receipt"]
    assert bus.report_failure is tell


async def test_what_came_of_an_event_is_found_at_any_depth(
    bus: EventBus, events: EventCapture
) -> None:
    def view(event: ReceiptSent) -> None:
        bus.publish(Viewed(f"/receipts/{event.order_id}"))

    bus.subscribe(ReceiptSent, view)
    async with bus.context():
        bus.publish(OrderPlaced(1), OrderPlaced(2))

    assert events.caused_by(OrderPlaced(1)) == [ReceiptSent(1), Viewed("/receipts/1")]
    assert events.caused_by(ReceiptSent(2)) == [Viewed("/receipts/2")]
    assert events.caused_by(Viewed("/receipts/2")) == []
    assert events.caused_by(OrderPlaced(1)).what == "caused by OrderPlaced(order_id=1)"


async def test_deliveries_are_asked_for_by_handler(bus: EventBus, events: EventCapture) -> None:
    async def audit(event: object) -> None: ...

    bus.subscribe(object, audit)
    async with bus.context():
        bus.publish(OrderPlaced(1), OrderPlaced(13))

    assert events.handled.by(audit) == [OrderPlaced(1), OrderPlaced(13), ReceiptSent(1)]
    assert events.handled.by("archive") == [ReceiptSent(1)]
    assert [each.handler for each in events.handled.by("archive").deliveries] == ["archive"]
    assert events.failures.by("archive") == []
    assert len(events.failures.by("send_receipt")) == 1
    with pytest.raises(LookupError, match=r"tests\.kit\.test_capture:nobody is not subscribed"):
        events.handled.by(nobody)


async def nobody(event: object) -> None: ...


async def test_an_event_that_was_discarded_is_pointed_at(
    bus: EventBus, events: EventCapture
) -> None:
    async with bus.context() as unit:
        bus.publish(OrderPlaced(1))
        unit.discard()
        bus.publish(OrderPlaced(2))

    with pytest.raises(AssertionError) as caught:
        events.one(OrderPlaced, order_id=1)
    assert str(caught.value) == (
        "expected one OrderPlaced(order_id=1), but none was published; instead, nearest first:\n"
        "  OrderPlaced(order_id=2)\n"
        "    order_id is 2, not 1\n"
        "  ReceiptSent(order_id=2)\n"
        "but discarded with its unit of work was:\n"
        "  OrderPlaced(order_id=1)"
    )


async def test_the_same_object_published_twice_counts_twice(
    bus: EventBus, events: EventCapture
) -> None:
    view = Viewed("/")
    with suppress(LookupError):
        async with bus.context() as unit:
            bus.publish(view)
            unit.release()
            bus.publish(view)
            raise LookupError

    assert (events.published, events.discarded) == ([view], [view])


async def test_a_unit_that_is_abandoned_has_published_what_it_released(
    bus: EventBus, events: EventCapture
) -> None:
    unit = unit_of(bus)
    with entered(unit):
        bus.publish(OrderPlaced(1), Viewed("kept"))
        unit.release()
        bus.publish(OrderPlaced(2), Viewed("lost"))
    abandon(unit)

    assert events.published == [OrderPlaced(1), Viewed("kept")]
    assert events.discarded == [OrderPlaced(2), Viewed("lost")]
    assert events.undelivered == [OrderPlaced(1)]


async def test_a_cancelled_subscription_takes_no_event_back(
    bus: EventBus, events: EventCapture
) -> None:
    subscription = bus.subscribe(Viewed, nothing)
    async with bus.context():
        bus.publish(Viewed("/"))
        subscription.cancel()

    assert (events.published, events.handled, events.discarded) == ([Viewed("/")], [], [])
    assert bus.stats.discarded == 1


async def test_a_hundred_threads_publish_and_every_event_is_there_once(
    bus: EventBus, events: EventCapture
) -> None:
    async with bus.context(), create_task_group() as tasks:
        for number in range(100, 200):
            tasks.start_soon(to_thread.run_sync, bus.publish, Viewed("/"), OrderPlaced(number))

    assert len(events.of(Viewed)) == len(events.of(OrderPlaced)) == 100
    assert sorted(each.order_id for each in events.of(ReceiptSent)) == [*range(100, 200)]


async def test_a_publish_that_is_told_after_what_became_of_it_is_put_right(bus: EventBus) -> None:
    class Late(Observer):
        """Has a thread wait between a publish and the telling of it, until all is over."""

        def __init__(self) -> None:
            self.published_now, self.over = Event(), Event()

        def published(self, event: object, deliveries: object) -> None:
            if event in (OrderPlaced(1), Viewed("late")):
                self.published_now.set()
                self.over.wait(5)

    late = Late()
    bus.observe(late)
    with EventCapture(bus) as events:
        async with bus.context() as unit:
            thread = Thread(target=unit.publish, args=[OrderPlaced(1)])
            thread.start()
            await to_thread.run_sync(late.published_now.wait)
            await unit.drain()
            late.over.set()
            await to_thread.run_sync(thread.join)

        assert events.handled == [OrderPlaced(1), ReceiptSent(1)]
        assert events.published == [ReceiptSent(1), OrderPlaced(1)]
        await events.idle()


async def test_afterwards_the_bus_is_as_it_was(bus: EventBus) -> None:
    router = EventRouter()
    router.on(Viewed)(nothing)
    (receipt,) = bus.handlers_for(OrderPlaced)
    async with bus.context():
        bus.publish(OrderPlaced(1), OrderPlaced(13))
    before = (bus.describe(), bus.stats)

    with EventCapture(bus) as events:
        bus.include(router)
        receipt.cancel()
        late = bus.subscribe(OrderPlaced, nothing)
        async with bus.context() as unit:
            bus.publish(Viewed("/"), OrderPlaced(1))
            unit.discard()
            bus.publish(Viewed("/"), OrderPlaced(1))

    assert events.handled == [Viewed("/"), OrderPlaced(1)]
    assert (bus.describe(), bus.stats) == before
    assert bus.handlers_for(OrderPlaced) == (receipt,)
    assert receipt.active
    assert not late.active
    late.cancel()
    bus.include(router)
    receipt.cancel()
    assert bus.handlers_for(OrderPlaced) == ()


async def test_what_is_in_flight_at_the_end_stays_on_the_books(bus: EventBus) -> None:
    async with bus.context():
        with EventCapture(bus) as events:
            bus.publish(OrderPlaced(1), Viewed("/"))
        assert events.published == [OrderPlaced(1), Viewed("/")]
        assert (bus.stats.accepted, bus.stats.pending, bus.stats.published) == (1, 1, 0)

    assert_settled(bus)
    assert bus.stats.handled == 2


async def test_subscriptions_of_a_module_imported_meanwhile_stay(
    bus: EventBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_meanwhile.py").write_text(
        "from tests.kit.test_capture import buses\n\n"
        "@buses[0].on(object, name='meanwhile')\n"
        "def handle(event): ...\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setitem(globals(), "buses", [bus])
    with EventCapture(bus):
        bus.subscribe(Viewed, nothing)
        importlib.import_module("imported_meanwhile")
        bus.subscribe(OrderPlaced, nothing)

    assert [each.name for each in bus.handlers_for(Viewed)] == ["meanwhile"]
    del sys.modules["imported_meanwhile"]


buses: list[EventBus] = []


async def test_a_capture_outlives_its_block_and_keeps_nothing_of_the_bus_busy(
    bus: EventBus,
) -> None:
    with EventCapture(bus) as events:
        pass
    async with bus.context():
        bus.publish(OrderPlaced(1))

    assert events.published == []
    assert repr(events) == (
        "<EventCapture of <EventBus 'default', 2 subscriptions, 0 pending>, 0 published>"
    )


def test_a_capture_is_of_a_bus() -> None:
    with pytest.raises(TypeError, match="EventCapture takes an EventBus, not 'bus'"):
        EventCapture("bus")  # type: ignore[arg-type]
