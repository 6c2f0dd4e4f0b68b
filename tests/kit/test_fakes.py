"""Fakes: nobody, a failure or a delay in the place of handlers, and everything restored."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import anyio
import pytest
import trio
import trio.testing
from anyio import create_task_group, to_thread
from fastapi import Depends

from eventkit import DispatchError, EventBus, HandlerTimeoutError
from eventkit.testing import EventCapture
from tests.kit.orders import OrderPlaced, ReceiptSent, Viewed
from tests.witness import assert_settled

pytestmark = pytest.mark.anyio


async def publish(bus: EventBus, *published: object) -> None:
    async with bus.context():
        bus.publish(*published)


async def test_recorded_events_are_handled_by_nobody(bus: EventBus, events: EventCapture) -> None:
    events.record_only()
    await publish(bus, OrderPlaced(1), Viewed("/"))

    assert events.published == [OrderPlaced(1), Viewed("/")]
    assert events.handled == []
    assert (bus.stats.published, bus.stats.accepted) == (2, 0)


async def test_recorded_events_obey_their_unit_of_work(bus: EventBus, events: EventCapture) -> None:
    events.record_only(OrderPlaced)
    with suppress(LookupError):
        async with bus.context() as unit:
            bus.publish(OrderPlaced(1))
            unit.release()
            bus.publish(OrderPlaced(2))
            raise LookupError

    assert events.published == [OrderPlaced(1)]
    assert events.discarded == [OrderPlaced(2)]


async def test_only_some_events_are_recorded_or_all_but_some(
    bus: EventBus, events: EventCapture
) -> None:
    with events.record_only(ReceiptSent):
        await publish(bus, OrderPlaced(1))
    assert events.handled == [OrderPlaced(1)]

    with events.record_only(except_=ReceiptSent):
        await publish(bus, OrderPlaced(2), ReceiptSent(2))
    assert events.handled == [OrderPlaced(1), ReceiptSent(2)]

    with events.record_only(except_=(OrderPlaced, ReceiptSent)):
        await publish(bus, OrderPlaced(3))
    assert events.handled == [OrderPlaced(1), ReceiptSent(2), OrderPlaced(3), ReceiptSent(3)]
    assert events.published == [
        *[OrderPlaced(1), ReceiptSent(1), OrderPlaced(2), ReceiptSent(2)],
        *[OrderPlaced(3), ReceiptSent(3)],
    ]


async def test_recording_ends_in_any_order(bus: EventBus, events: EventCapture) -> None:
    receipts, orders = events.record_only(ReceiptSent), events.record_only(OrderPlaced)
    receipts.end()
    receipts.end()
    await publish(bus, OrderPlaced(1), ReceiptSent(1))
    assert events.handled == [ReceiptSent(1)]

    orders.end()
    await publish(bus, OrderPlaced(2))
    assert events.handled == [ReceiptSent(1), OrderPlaced(2), ReceiptSent(2)]


async def test_a_class_is_refused_as_an_event_also_where_events_are_recorded(
    bus: EventBus, events: EventCapture
) -> None:
    events.record_only()
    async with bus.context():
        with pytest.raises(TypeError, match="an event is an instance"):
            bus.publish(OrderPlaced)
    with pytest.raises(TypeError, match="an event type is a class"):
        events.record_only(OrderPlaced(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an event type is a class"):
        events.record_only(except_="OrderPlaced")  # type: ignore[arg-type]


async def test_a_handler_fails_as_often_as_asked_and_that_fails_no_test(bus: EventBus) -> None:
    with EventCapture(bus) as events:
        error = ConnectionError("mail server gone")
        events.fail("send_receipt", error, times=2)
        for number in range(3):
            await publish(bus, OrderPlaced(number))

        assert [each.error for each in events.failures] == [error, error]
        assert events.handled == [OrderPlaced(2), ReceiptSent(2)]
        assert bus.stats.failed == 2


async def test_a_fake_failure_is_expected_and_another_is_not(bus: EventBus) -> None:
    async def fail_twice() -> None:
        with EventCapture(bus) as events:
            events.fail("archive", OSError)
            await publish(bus, OrderPlaced(1), OrderPlaced(13))

    with pytest.raises(ExceptionGroup) as caught:
        await fail_twice()

    assert [type(error) for error in caught.value.exceptions] == [ValueError]


async def test_a_class_of_errors_gives_a_new_one_each_time(
    bus: EventBus, events: EventCapture
) -> None:
    events.fail("archive", LookupError)
    await publish(bus, ReceiptSent(1), ReceiptSent(2))

    first, second = (each.error for each in events.failures)
    assert type(first) is type(second) is LookupError
    assert first is not second


async def test_a_failure_reaches_dispatch_and_ends_with_its_block(
    bus: EventBus, events: EventCapture
) -> None:
    with events.fail("archive", OSError("full")), pytest.raises(DispatchError) as caught:
        await bus.dispatch(ReceiptSent(1))
    await bus.dispatch(ReceiptSent(1))

    assert [str(error) for error in caught.value.exceptions] == ["full"]
    assert events.handled == [ReceiptSent(1)]


async def test_a_failure_reaches_a_delivery_that_waits_already(
    bus: EventBus, events: EventCapture
) -> None:
    async with bus.context():
        bus.publish(ReceiptSent(1))
        events.fail("archive", OSError)

    assert len(events.failures.by("archive")) == 1


async def test_a_failing_handler_has_its_dependencies_which_see_the_failure() -> None:
    bus = EventBus()
    seen: list[str] = []

    def session() -> Iterator[str]:
        try:
            yield "session"
        except OSError:
            seen.append("rolled back")
            raise

    async def handle(event: OrderPlaced, session: Annotated[str, Depends(session)]) -> None:
        seen.append(f"handled in a {session}")

    bus.on(OrderPlaced)(handle)
    with EventCapture(bus) as events:
        events.fail(handle, OSError, times=1)
        await publish(bus, OrderPlaced(1), OrderPlaced(2))

    assert seen == ["rolled back", "handled in a session"]


async def test_any_callable_can_be_faked_for_all_its_events(
    bus: EventBus, events: EventCapture
) -> None:
    class Mailer:
        async def send(self, event: object, subject: str = "") -> None: ...

        async def __call__(self, event: object) -> None: ...

    mailer = Mailer()
    partly: Any = partial(mailer.send, subject="Hello")
    for handler in (mailer.send, mailer, partly):
        bus.subscribe(Viewed, handler, name=f"views {handler}")
        bus.subscribe(OrderPlaced, handler, name=f"orders {handler}")
    for handler in (mailer.send, mailer, partly):
        with events.fail(handler, OSError):
            await publish(bus, Viewed("/"), OrderPlaced(1))
        assert len(events.failures.by(handler)) == 2
    await publish(bus, Viewed("/"))

    assert len(events.failures) == 6
    assert len(events.handled.of(Viewed)) == 2 * 3 + 3


async def test_fakes_of_one_handler_add_up_and_end_in_any_order(
    bus: EventBus, events: EventCapture
) -> None:
    slow, broken = events.delay("archive", 0), events.fail("archive", OSError)
    slow.end()
    await publish(bus, ReceiptSent(1))
    assert len(events.failures) == 1

    broken.end()
    await publish(bus, ReceiptSent(2))
    assert events.handled == [ReceiptSent(2)]


async def test_a_faked_subscription_says_who_it_is_and_can_be_cancelled(
    bus: EventBus, events: EventCapture
) -> None:
    async def handle(event: Viewed) -> None: ...

    subscription = bus.subscribe(Viewed, handle)
    fake = events.fail(handle, OSError)
    assert subscription.handler is handle
    subscription.cancel()
    assert bus.handlers_for(Viewed) == ()
    fake.end()

    with bus.subscribe(Viewed, handle):
        await publish(bus, Viewed("/"))
    assert events.handled == [Viewed("/")]


async def test_the_end_of_the_block_ends_all_fakes(bus: EventBus) -> None:
    async def fake_all() -> None:
        with EventCapture(bus) as events:
            events.record_only(ReceiptSent)
            events.fail("archive", OSError)
            events.delay("send_receipt", 3600)
            raise LookupError

    with pytest.raises(LookupError):
        await fake_all()
    await publish(bus, OrderPlaced(1))

    assert bus.stats.handled == 2


async def test_a_delay_counts_for_the_timeout(bus: EventBus, events: EventCapture) -> None:
    async def handle(event: Viewed) -> None: ...

    bus.subscribe(Viewed, handle, timeout=0.01)
    events.delay(handle, 3600)
    await publish(bus, Viewed("/"))

    (failure,) = events.failures
    assert isinstance(failure.error, HandlerTimeoutError)


async def test_delays_go_on_at_once_and_then_the_work_is_done(
    bus: EventBus, events: EventCapture
) -> None:
    def immediately(event: Viewed) -> None:
        done.append(f"{event.page} on the loop")

    async def soon(event: Viewed) -> None:
        done.append(f"{event.page} soon")

    done: list[str] = []
    bus.subscribe(Viewed, immediately, thread=False)
    bus.subscribe(Viewed, soon)
    events.delay(immediately, 0.001)
    events.delay(soon, 0.001)
    await publish(bus, Viewed("/"))

    assert sorted(done) == ["/ on the loop", "/ soon"]


@pytest.mark.parametrize("name", ["send_receipt", "archive"])
def test_an_hour_of_delay_takes_no_time_on_a_virtual_clock(name: str) -> None:
    bus = EventBus(handler_timeout=None)
    bus.subscribe(OrderPlaced, in_task, name="send_receipt")
    bus.subscribe(OrderPlaced, in_thread, name="archive")

    async def main() -> float:
        began = anyio.current_time()
        with EventCapture(bus) as events:
            events.delay(name, 3600)
            await publish(bus, OrderPlaced(1))
            assert events.handled == [OrderPlaced(1), OrderPlaced(1)]
        return anyio.current_time() - began

    clock = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(main, clock=clock) >= 3600


async def in_task(event: OrderPlaced) -> None: ...


def in_thread(event: OrderPlaced) -> None: ...


async def test_who_is_not_subscribed_cannot_be_faked(bus: EventBus, events: EventCapture) -> None:
    with pytest.raises(LookupError) as caught:
        events.fail("send_reciept", OSError)
    assert str(caught.value).startswith(
        "send_reciept is not subscribed to bus 'default'. The closest names are:\n"
        "  send_receipt for tests.kit.orders.OrderPlaced ("
    )
    with pytest.raises(LookupError, match=r"test_fakes:in_thread is not subscribed .* closest"):
        events.delay(in_thread, 1)
    with EventCapture(EventBus(name="empty")) as nothing, pytest.raises(LookupError) as caught:
        nothing.delay(in_thread, 1)
    assert str(caught.value) == (
        "tests.kit.test_fakes:in_thread is not subscribed to bus 'empty', and no other handler is"
    )


async def test_what_no_handler_could_raise_or_wait_is_refused(events: EventCapture) -> None:
    for error in ("oops", KeyboardInterrupt, KeyboardInterrupt()):
        with pytest.raises(TypeError, match=r"fail\(\) takes an exception .*, not "):
            events.fail("archive", error)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="times is at least 1, or None for every time, not 0"):
        events.fail("archive", OSError, times=0)
    for seconds in (-1, float("nan")):
        with pytest.raises(ValueError, match=r"delay\(\) takes seconds, 0 or more, not "):
            events.delay("archive", seconds)


async def test_a_thousand_deliveries_fail_exactly_as_often_as_asked(
    bus: EventBus, events: EventCapture
) -> None:
    events.fail("archive", OSError, times=10)
    async with create_task_group() as tasks:
        for number in range(100):
            receipts = [ReceiptSent(number)] * 10
            tasks.start_soon(publish, bus, *receipts)

    assert (len(events.failures), len(events.handled)) == (10, 990)
    events.fail("archive", OSError)
    with pytest.raises(DispatchError):
        await to_thread.run_sync(anyio.run, bus.dispatch, ReceiptSent(0))
    assert_settled(bus)
