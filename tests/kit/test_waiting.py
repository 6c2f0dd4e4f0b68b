"""Waiting until all has ended, or for one event: on any loop, in threads, and in vain."""

import math
import threading
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from types import FrameType
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio import CancelScope, create_task_group, to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from eventkit import Delivery, EventBus, EventContextUsageError, current_delivery
from eventkit._core.endings import abandon
from eventkit.starlette import EventContextMiddleware
from eventkit.testing import EventCapture
from eventkit.testing._stuck import told, where
from tests.kit.orders import OrderPlaced, ReceiptSent, Viewed
from tests.witness import assert_settled, entered, unit_of

pytestmark = pytest.mark.anyio

DEADLINE = 60  # seconds; what is stuck would hang for ever


async def publish(bus: EventBus, *published: object) -> None:
    async with bus.context():
        bus.publish(*published)


async def in_vain(wait: Awaitable[object]) -> str:
    """What a wait says that comes to nothing."""
    with pytest.raises(TimeoutError) as caught:
        await wait
    return str(caught.value)


class Gate:
    """A handler that waits until it is opened."""

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self._opened = anyio.Event()

    async def __call__(self, event: object) -> None:
        self.reached.set()
        await self._opened.wait()

    def open(self) -> None:
        self._opened.set()


async def test_idle_waits_until_all_that_was_caused_has_ended(
    bus: EventBus, events: EventCapture
) -> None:
    gate = Gate()
    bus.subscribe(ReceiptSent, gate)
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, OrderPlaced(1))
        await gate.reached.wait()
        assert bus.stats.running > 0
        tasks.start_soon(opening, gate)
        await events.idle()

        assert events.handled.by(gate) == [ReceiptSent(1)]
        assert_settled(bus)


async def opening(gate: Gate) -> None:
    await anyio.wait_all_tasks_blocked()
    gate.open()


async def test_idle_waits_for_units_of_work_that_others_hold_open(
    bus: EventBus, events: EventCapture
) -> None:
    staged, go_on = anyio.Event(), anyio.Event()

    async def request() -> None:
        async with bus.context():
            bus.publish(Viewed("/"))
            staged.set()
            await go_on.wait()

    async with create_task_group() as tasks:
        tasks.start_soon(request)
        await staged.wait()
        text = await in_vain(events.idle(timeout=0.01))
        go_on.set()
        await events.idle()
        assert text == "not idle:\n  Viewed(page='/') is in a unit of work that is still open"


async def test_nothing_to_wait_for_is_no_wait(bus: EventBus, events: EventCapture) -> None:
    await events.idle(timeout=0)
    await publish(bus, OrderPlaced(1))
    await events.idle(timeout=0)

    assert await events.wait_for(OrderPlaced, timeout=0) == OrderPlaced(1)


async def test_a_wait_for_the_unit_of_work_around_it_is_refused(
    bus: EventBus, events: EventCapture
) -> None:
    async with bus.context() as unit:
        await events.idle()
        bus.publish(OrderPlaced(1))
        with pytest.raises(EventContextUsageError) as caught:
            await events.idle()
        await unit.drain()
        await events.idle()

    assert str(caught.value) == (
        "idle() would wait for itself: the unit of work around it is open (pending: 1). Leave it "
        "first, or deliver its events with `await bus.current_context().drain()`"
    )


async def test_an_event_is_waited_for_until_its_unit_of_work_has_released_it(
    bus: EventBus, events: EventCapture
) -> None:
    found: list[object] = []

    async def wait() -> None:
        found.append(await events.wait_for(OrderPlaced, order_id=2))

    async with create_task_group() as tasks:
        tasks.start_soon(wait)
        async with bus.context() as unit:
            bus.publish(OrderPlaced(2))
            unit.discard()
            await anyio.wait_all_tasks_blocked()
            bus.publish(OrderPlaced(1), OrderPlaced(2))
            await anyio.wait_all_tasks_blocked()
            assert found == []
            unit.release()
            await anyio.wait_all_tasks_blocked()
            assert found == [OrderPlaced(2)]


async def test_an_event_without_a_handler_can_be_waited_for(
    bus: EventBus, events: EventCapture
) -> None:
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, Viewed("/"))
        assert await events.wait_for(Viewed, page="/") == Viewed("/")


async def test_an_event_that_does_not_come_is_told_with_those_that_did(
    bus: EventBus, events: EventCapture
) -> None:
    text = await in_vain(events.wait_for(OrderPlaced, timeout=0))
    assert text == "no OrderPlaced was published, nor anything else"

    gate = Gate()
    bus.subscribe(ReceiptSent, gate, name="gate")
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, OrderPlaced(1))
        await gate.reached.wait()
        text = await in_vain(events.wait_for(OrderPlaced, order_id=2, timeout=0))
        gate.open()

    first, *rest = text.splitlines()
    assert first == "no OrderPlaced(order_id=2) was published; instead, nearest first:"
    assert rest[:4] == [
        "  OrderPlaced(order_id=1)",
        "    order_id is 1, not 2",
        "  ReceiptSent(order_id=1)",
        "these have not ended:",
    ]
    assert "gate for ReceiptSent(order_id=1) is running, at " in rest[-1]


async def test_a_field_that_does_not_exist_is_not_waited_for(events: EventCapture) -> None:
    with pytest.raises(TypeError, match="Did you mean 'order_id'"):
        await events.wait_for(OrderPlaced, orderid=1)


class Unshown:
    """An event whose `repr` raises, as that of a detached mapped object does."""

    def __repr__(self) -> str:
        raise LookupError("detached")


async def test_an_event_that_cannot_be_shown_hides_no_timeout(
    bus: EventBus, events: EventCapture
) -> None:
    gate = Gate()
    bus.subscribe(Unshown, gate, name="gate")
    waited_for = idle = ""
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, Unshown())
        await gate.reached.wait()
        waited_for = await in_vain(events.wait_for(OrderPlaced, order_id=1, timeout=0))
        idle = await in_vain(events.idle(timeout=0))
        gate.open()

    shown = "<Unshown whose repr raised LookupError>"
    assert waited_for.startswith(
        f"no OrderPlaced(order_id=1) was published; instead, nearest first:\n  {shown}\n"
    )
    assert idle.startswith(f"not idle:\n  gate for {shown} is running, at ")
    assert events.caused_by(events.one(Unshown)).what == f"caused by {shown}"


def line_of(function: Callable[..., object], words: str) -> str:
    """The `file:line` in which a function says this."""
    code = function.__code__
    with open(code.co_filename) as file:  # noqa: PTH123 - from where it stands
        lines = file.read().splitlines()
    line = next(i for i, text in enumerate(lines) if i >= code.co_firstlineno and words in text)
    return f"tests/kit/test_waiting.py:{line + 1}"


async def outer(event: object) -> None:
    await inner()


async def inner() -> None:
    await anyio.sleep_forever()


async def in_a_group(event: object) -> None:
    async with create_task_group() as tasks:
        tasks.start_soon(inner)


def in_thread(event: object) -> None:
    thread_is_there.set()
    threads_may_end.wait()


thread_is_there, threads_may_end = threading.Event(), threading.Event()


async def stuck(bus: EventBus, events: EventCapture, *published: object) -> list[str]:
    """What a capture says while these events are handled, and for ever."""
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, *published)
        await anyio.wait_all_tasks_blocked()
        lines = (await in_vain(events.idle(timeout=0))).splitlines()
        tasks.cancel_scope.cancel()
        return lines
    raise AssertionError("cancelled from outside")


async def test_the_message_says_at_which_line_a_coroutine_waits(
    bus: EventBus, events: EventCapture
) -> None:
    bus.subscribe(Viewed, outer)
    bus.subscribe(Viewed, in_a_group)
    head, *lines = await stuck(bus, events, Viewed("/"), OrderPlaced(1))

    assert head == "not idle:"
    first, second, third = lines
    assert first.startswith(
        "  tests.kit.test_waiting:outer for Viewed(page='/') is running, at "
        f"{line_of(inner, 'sleep_forever')} in inner, in "
    )
    assert f"{line_of(in_a_group, 'create_task_group')} in in_a_group" in second
    assert third == "  send_receipt for OrderPlaced(order_id=1) waits for its turn"


async def test_the_message_says_at_which_line_a_thread_is(
    bus: EventBus, events: EventCapture
) -> None:
    for event in (thread_is_there, threads_may_end):
        event.clear()
    bus.subscribe(Viewed, in_thread)
    line = ""
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, Viewed("/"))
        await to_thread.run_sync(thread_is_there.wait)
        _, line = (await in_vain(events.idle(timeout=0))).splitlines()
        threads_may_end.set()

    assert "  tests.kit.test_waiting:in_thread for Viewed(page='/') is running, at " in line
    assert f"{line_of(in_thread, 'thread')[:-1]}" in line
    assert " in in_thread" in line


async def test_a_delayed_handler_is_where_the_fake_is(bus: EventBus, events: EventCapture) -> None:
    events.delay("archive", 3600)
    events.delay("send_receipt", 3600)
    _, line = await stuck(bus, events, OrderPlaced(1))

    assert "eventkit/testing/_fakes.py:" in line


async def test_also_a_handler_that_has_gone_by_is_found(
    bus: EventBus, events: EventCapture
) -> None:
    async def shy(event: object) -> None:
        del event
        await anyio.sleep_forever()

    line = ""
    with bus.subscribe(Viewed, shy, name="shy") as subscription:
        async with create_task_group() as tasks:
            tasks.start_soon(publish, bus, Viewed("/"))
            await anyio.wait_all_tasks_blocked()
            subscription.cancel()
            _, line = (await in_vain(events.idle(timeout=0))).splitlines()
            tasks.cancel_scope.cancel()
    assert line.startswith("  shy for Viewed(page='/') is running, at tests/kit/test_waiting.py:")


async def test_a_delivery_that_nothing_is_found_of_is_running_without_a_line(
    bus: EventBus, events: EventCapture
) -> None:
    seen = list[Delivery]()

    @bus.on(Viewed)
    async def look(event: Viewed) -> None:
        seen.append(current_delivery())

    await bus.dispatch(Viewed("/"))
    assert where(seen[0], bus) is None


async def test_many_are_counted_not_listed(bus: EventBus, events: EventCapture) -> None:
    lines = await stuck(bus, events, *(OrderPlaced(99 + number) for number in range(30)))

    assert lines[-1] == "  ... and 21 more"  # its receipt is undecided


async def test_a_wait_that_is_cancelled_leaves_nothing_behind(
    bus: EventBus, events: EventCapture
) -> None:
    before, timers = {*threading.enumerate()}, list[threading.Timer]()
    gate = Gate()
    bus.subscribe(Viewed, gate)
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, Viewed("/"))
        await gate.reached.wait()
        async with create_task_group() as waiting:
            waiting.start_soon(partial(events.idle, timeout=3600))
            waiting.start_soon(partial(events.wait_for, OrderPlaced, timeout=3600))
            await anyio.wait_all_tasks_blocked()
            begun = {*threading.enumerate()} - before
            timers = [each for each in begun if isinstance(each, threading.Timer)]
            waiting.cancel_scope.cancel()
        gate.open()
    await publish(bus, OrderPlaced(1))

    assert len(timers) == 2
    for timer in timers:
        timer.join(DEADLINE)
        assert not timer.is_alive()
    with CancelScope() as scope:
        scope.cancel()
        await events.idle()
    assert scope.cancelled_caught


async def test_a_change_on_another_event_loop_ends_the_wait(
    bus: EventBus, events: EventCapture
) -> None:
    gate = threading.Event()

    async def elsewhere() -> None:
        await to_thread.run_sync(gate.wait)
        await publish(bus, OrderPlaced(1))

    async with create_task_group() as tasks:
        run: Callable[[], None] = partial(anyio.run, elsewhere, backend="trio")
        tasks.start_soon(to_thread.run_sync, run)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(to_thread.run_sync, gate.set)
        assert await events.wait_for(ReceiptSent) == ReceiptSent(1)
        await events.idle()
        assert_settled(bus)


def test_hours_of_a_virtual_clock_are_no_time(bus: EventBus) -> None:
    async def main() -> None:
        with EventCapture(bus) as events:
            events.delay("send_receipt", 25)
            events.delay("archive", 3600)
            async with create_task_group() as tasks:
                tasks.start_soon(publish, bus, OrderPlaced(1))
                await events.wait_for(ReceiptSent)
                await events.idle()
            assert events.handled == [OrderPlaced(1), ReceiptSent(1)]

    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(main, clock=clock)


@pytest.fixture(params=[True, False], ids=["loop-goes-on", "loop-stopped"])
def stopped_clock(request: pytest.FixtureRequest) -> Generator[None]:
    """No clock that Python code can read goes on; that of asyncio's loop does, where said."""
    freezegun = pytest.importorskip("freezegun", reason="the plugins' session is without it")
    with freezegun.freeze_time("2026-01-01", real_asyncio=request.param):
        yield


@pytest.mark.usefixtures("stopped_clock")
async def test_a_clock_that_the_test_has_stopped_makes_no_wait_longer(
    bus: EventBus, events: EventCapture
) -> None:
    gate = Gate()
    bus.subscribe(Viewed, gate, name="gate")
    waited_for = idle = ""
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, Viewed("/"))
        await gate.reached.wait()
        waited_for = await in_vain(events.wait_for(OrderPlaced, timeout=0.01))
        idle = await in_vain(events.idle(timeout=0.01))
        gate.open()

    assert waited_for.startswith("no OrderPlaced was published; instead")
    assert idle.startswith("not idle:\n  gate for Viewed(page='/') is running")


@pytest.mark.usefixtures("stopped_clock")
async def test_a_drains_last_steps_are_not_waited_for_for_ever_under_a_stopped_clock(
    bus: EventBus, events: EventCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_last_steps", lambda: True)
    await events.idle(timeout=0.01)
    await to_thread.run_sync(partial(events.idle_sync, timeout=0.01))


@pytest.mark.usefixtures("stopped_clock")
def test_a_synchronous_wait_ends_under_a_stopped_clock_too(bus: EventBus) -> None:
    context = unit_of(bus)
    events = EventCapture(bus, timeout=0.01).__enter__()
    with entered(context):
        bus.publish(OrderPlaced(1))
        context.release()
        with pytest.raises(TimeoutError, match="no Viewed was published; instead"):
            events.wait_for_sync(Viewed)
    with pytest.raises(TimeoutError, match="not idle"):
        events.idle_sync()
    with pytest.raises(TimeoutError, match="the test is over, but these go on"):
        events.__exit__(None, None, None)
    abandon(context)


def test_a_wait_without_end_is_ended_by_what_it_waits_for(bus: EventBus) -> None:
    async def main() -> None:
        with EventCapture(bus, timeout=math.inf) as events:
            async with create_task_group() as tasks:
                tasks.start_soon(events.wait_for, ReceiptSent)
                in_thread = partial(events.wait_for_sync, ReceiptSent)
                tasks.start_soon(partial(to_thread.run_sync, in_thread))
                await anyio.wait_all_tasks_blocked()
                await publish(bus, OrderPlaced(1))

    anyio.run(main)


@pytest.fixture
def app(bus: EventBus) -> Starlette:
    """An application that leaves delivery to its lifespan, also for in-process clients."""

    async def order(request: Request) -> Response:
        bus.publish(OrderPlaced(int(request.query_params["id"])))
        return Response()

    app = Starlette(routes=[Route("/", order, methods=["POST"])])
    app.add_middleware(EventContextMiddleware, bus=bus, background=True)
    return app


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_synchronous_test_waits_for_what_goes_on_behind_the_client(
    app: Starlette, bus: EventBus, events: EventCapture, backend: Any
) -> None:
    events.delay("send_receipt", 0.01)
    with TestClient(app, backend=backend) as client:
        client.post("/", params={"id": 1})
        assert events.wait_for_sync(OrderPlaced) == OrderPlaced(1)
        events.idle_sync()
        assert events.handled == [OrderPlaced(1), ReceiptSent(1)]
        assert_settled(bus)

        client.post("/", params={"id": 2})
        portal = client.portal
        assert portal is not None
        portal.call(events.idle)
        assert events.handled[2:] == [OrderPlaced(2), ReceiptSent(2)]


def test_a_synchronous_wait_in_vain_says_why(
    app: Starlette, bus: EventBus, events: EventCapture
) -> None:
    for event in (thread_is_there, threads_may_end):
        event.clear()
    with TestClient(app) as client:
        client.post("/", params={"id": 1})
        events.idle_sync()
        with pytest.raises(TimeoutError, match=r"no Viewed was published; instead"):
            events.wait_for_sync(Viewed, timeout=0)
        with bus.subscribe(OrderPlaced, in_thread, name="thread"):
            client.post("/", params={"id": 2})
            try:
                with pytest.raises(TimeoutError, match=r"thread for OrderPlaced.* is running"):
                    events.idle_sync(timeout=0.01)
            finally:
                threads_may_end.set()
        events.idle_sync()


async def test_a_synchronous_wait_on_the_event_loop_is_refused(events: EventCapture) -> None:
    with pytest.raises(RuntimeError, match=r"`await capevents\.idle\(\)`"):
        events.idle_sync()
    with pytest.raises(RuntimeError, match=r"`await capevents\.wait_for\(\.\.\.\)`"):
        events.wait_for_sync(OrderPlaced)


def test_the_end_of_a_synchronous_test_waits_for_what_it_caused(
    app: Starlette, bus: EventBus
) -> None:
    with TestClient(app) as client:
        with EventCapture(bus) as events:
            events.delay("send_receipt", 0.01)
            client.post("/", params={"id": 1})
        assert events.handled == [OrderPlaced(1), ReceiptSent(1)]
        with pytest.raises(ExceptionGroup, match="handlers failed"), EventCapture(bus) as events:
            client.post("/", params={"id": 13})


async def test_what_goes_on_when_a_test_ends_fails_it(bus: EventBus) -> None:
    gate = Gate()

    async def end_early() -> None:
        with EventCapture(bus) as events:
            bus.subscribe(Viewed, gate, name="gate")
            tasks.start_soon(publish, bus, OrderPlaced(13), Viewed("/"))
            await gate.reached.wait()
            assert len(events.failures) == 1

    async with create_task_group() as tasks:
        text = await in_vain(end_early())
        assert text.startswith(
            "the test is over, but these go on; wait with `idle()`:\n"
            "  gate for Viewed(page='/') is running, at "
        )
        gate.open()


async def test_a_failure_comes_before_what_goes_on(bus: EventBus) -> None:
    gate = Gate()

    async def end_early() -> None:
        with EventCapture(bus):
            bus.subscribe(Viewed, gate)
            tasks.start_soon(publish, bus, OrderPlaced(13), Viewed("/"))
            await gate.reached.wait()

    async with create_task_group() as tasks:
        with pytest.raises(ExceptionGroup, match="handlers failed") as caught:
            await end_early()
        assert isinstance(caught.value.__cause__, TimeoutError)
        gate.open()


async def test_many_waits_end_at_once(bus: EventBus, events: EventCapture) -> None:
    found: list[object] = []

    async def wait(number: int) -> None:
        found.append(await events.wait_for(ReceiptSent, order_id=number))
        await events.idle()

    async with create_task_group() as tasks:
        for number in range(100, 120):
            tasks.start_soon(wait, number)
        await anyio.wait_all_tasks_blocked()
        await publish(bus, *map(OrderPlaced, range(100, 120)))

    assert len(found) == 20


def pause() -> Generator[None]:
    yield


def frame_of(generator: Any) -> FrameType:  # its type does not tell
    frame: FrameType = generator.gi_frame
    return frame


def test_a_line_of_ones_own_is_told_as_it_is_and_one_from_elsewhere_with_its_path() -> None:
    waiting = pause()
    next(waiting)
    assert told([frame_of(waiting)]) == f"{line_of(pause, 'yield')} in pause"

    source = "\n\ndef pause(): yield\n"
    namespace: dict[str, Any] = {}
    exec(compile(source, "/elsewhere/app.py", "exec"), namespace)
    waiting = namespace["pause"]()
    next(waiting)
    assert told([frame_of(waiting)]) == "/elsewhere/app.py:3 in pause"
