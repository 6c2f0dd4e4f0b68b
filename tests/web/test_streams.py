"""Streams: what their readers get, what a slow one misses, and when they end."""

import os
import re
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, fail_after, to_thread

from eventkit import EventBus, InvalidEventTypeError, StreamOverflowError
from eventkit.streams import EventStream, end_at_shutdown, stream
from tests.witness import Number, assert_settled

pytestmark = pytest.mark.anyio

PATIENCE = 30.0  # far more than any of this takes; only what hangs meets it


class Text(str):
    """A subclass of an event type."""

    __slots__ = ()


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


async def read_all(events: EventStream[Any], into: list[Any]) -> None:
    async for event in events:  # one by one, to be seen in between
        into.append(event)  # noqa: PERF401


async def read(events: EventStream[Any], number: int) -> list[Any]:
    return [await anext(events) for _ in range(number)]


# What a reader gets


async def test_a_stream_gives_the_events_of_its_type_in_the_order_of_their_dispatch(
    bus: EventBus,
) -> None:
    async with stream(bus, str) as events:
        async with bus.context():
            bus.publish("a", Number(1), Text("b"))
        await bus.dispatch("c")

        assert await read(events, 3) == ["a", "b", "c"]


async def test_a_stream_of_objects_gives_everything(bus: EventBus) -> None:
    async with stream(bus, object) as events:
        async with bus.context():
            bus.publish("a", 1)

        assert await read(events, 2) == ["a", 1]


async def test_a_reader_waits_for_events_that_are_still_to_come(bus: EventBus) -> None:
    got: list[str] = []
    async with create_task_group() as tasks, stream(bus, str) as events:
        tasks.start_soon(read_all, events, got)
        for event in ("a", "b"):
            await anyio.wait_all_tasks_blocked()
            await bus.dispatch(event)
        await anyio.wait_all_tasks_blocked()

        assert got == ["a", "b"]


async def test_what_is_discarded_is_not_seen_and_what_a_handler_causes_is(bus: EventBus) -> None:
    @bus.on(int)
    async def cause(event: int) -> None:
        bus.publish("caused")

    async with stream(bus, str) as events:
        async with bus.context() as unit:
            bus.publish("dropped")
            unit.discard()
        await bus.dispatch(1)

        assert await read(events, 1) == ["caused"]


async def test_each_of_a_thousand_streams_gets_each_event(bus: EventBus) -> None:
    got: list[str] = []

    async def follow(opened: Callable[[], object]) -> None:
        async with stream(bus, str) as events:
            opened()
            got.append(await anext(events))

    async with create_task_group() as tasks:
        for _ in range(1000):
            tasks.start_soon(follow, lambda: None)
        await anyio.wait_all_tasks_blocked()
        await bus.dispatch("a")

    assert got == ["a"] * 1000
    assert bus.describe() == []
    assert_settled(bus)


async def test_several_readers_of_one_stream_share_its_events(bus: EventBus) -> None:
    got: list[str] = []
    async with create_task_group() as tasks, stream(bus, str) as events:
        for _ in range(3):
            tasks.start_soon(read_all, events, got)
        await anyio.wait_all_tasks_blocked()
        async with bus.context():
            bus.publish(*"abcdef")
        await anyio.wait_all_tasks_blocked()

    assert sorted(got) == [*"abcdef"]


# A reader that is too slow


async def test_a_reader_that_never_reads_delays_nobody_and_misses_the_oldest(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    async with stream(bus, int, buffer=2) as slow, stream(bus, int) as quick:
        async with bus.context():
            bus.publish(1, 2, 3, 4, 5)

        assert (slow.dropped, quick.dropped) == (3, 0)
        assert await read(slow, 2) == [4, 5]
        assert await read(quick, 5) == [1, 2, 3, 4, 5]
    assert (bus.stats.handled, bus.stats.failed) == (10, 0)
    assert caplog.messages == [
        "a stream is read too slowly: bus=default event_type=builtins.int buffer=2 "
        "overflow=drop_oldest"
    ]


async def test_with_raise_the_reader_gets_what_was_kept_and_then_the_error(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    async with stream(bus, int, buffer=2, overflow="raise") as events:
        async with bus.context():
            bus.publish(1, 2, 3, 4)

        assert await read(events, 2) == [1, 2]
        for _ in range(2):
            with pytest.raises(StreamOverflowError) as error:
                await anext(events)
            assert error.value.buffer == 2
            assert str(error.value) == (
                "a stream of builtins.int had 2 events waiting (buffer) when one more came, so it "
                "has ended. Load the current state, then open a new stream. To prevent this, read "
                "faster, or use a larger buffer="
            )
        assert events.dropped == 1
        events.end()
        assert repr(events) == (
            "<EventStream of builtins.int, overflown, 0 of 2 waiting, 1 dropped>"
        )
    assert bus.stats.handled == 4
    assert len(caplog.messages) == 1


# When it ends


async def test_leaving_the_block_ends_the_subscription_and_whoever_still_reads(
    bus: EventBus,
) -> None:
    got: list[str] = []
    async with create_task_group() as tasks:
        async with stream(bus, str) as events:
            tasks.start_soon(read_all, events, got)
            await anyio.wait_all_tasks_blocked()
            await bus.dispatch("a")
        await bus.dispatch("b")
        assert [event async for event in events] == []

    assert bus.describe() == []
    assert "b" not in got


async def test_what_was_not_read_in_the_block_is_forgotten(bus: EventBus) -> None:
    async with stream(bus, str) as events:
        await bus.dispatch("a")

    assert [event async for event in events] == []


async def test_after_end_the_reader_gets_what_was_kept_and_nothing_that_comes(
    bus: EventBus,
) -> None:
    async with stream(bus, str) as events:
        await bus.dispatch("a")
        events.end()
        events.end()
        await bus.dispatch("b")

        assert [event async for event in events] == ["a"]


async def test_a_wait_that_is_cancelled_loses_no_event(bus: EventBus) -> None:
    got: list[str] = []
    async with stream(bus, str) as events:
        async with create_task_group() as tasks:
            tasks.start_soon(read_all, events, got)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
            with CancelScope(shield=True):
                await bus.dispatch("a")
        with CancelScope() as scope:
            scope.cancel()
            got.append(await anext(events))

        assert got == []
        assert await anext(events) == "a"


async def test_an_async_generator_may_open_a_stream_around_its_yield(bus: EventBus) -> None:
    async def body() -> AsyncGenerator[str]:
        async with stream(bus, str) as events:
            async for event in events:
                yield event

    async with create_task_group() as tasks, aclosing(body()) as lines:

        async def publish() -> None:
            await anyio.wait_all_tasks_blocked()
            await bus.dispatch("a")

        tasks.start_soon(publish)
        assert await anext(lines) == "a"
    assert bus.describe() == []


# Other loops and threads


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_events_that_are_dispatched_on_other_loops_wake_the_reader(
    bus: EventBus, other: str
) -> None:
    got: list[str] = []
    threads: list[threading.Thread] = []
    async with stream(bus, str) as events:
        for event in ("a", "b"):
            with fail_after(PATIENCE):
                async with create_task_group() as tasks:

                    async def wait() -> None:
                        got.append(await anext(events))

                    tasks.start_soon(wait)
                    await anyio.wait_all_tasks_blocked()
                    # Nobody waits for the thread: nothing but the event wakes this loop.
                    dispatch = partial(anyio.run, bus.dispatch, event, backend=other)
                    threads.append(threading.Thread(target=dispatch))
                    threads[-1].start()
    for thread in threads:
        thread.join()

    assert got == ["a", "b"]


async def test_threads_that_dispatch_at_once_lose_nothing_and_keep_their_orders(
    bus: EventBus,
) -> None:
    events_each = 200

    async def publish(name: str) -> None:
        for number in range(events_each):
            await bus.dispatch((name, number))

    async def publish_in_thread(name: str) -> None:
        await to_thread.run_sync(lambda: anyio.run(publish, name))

    async with stream(bus, object, buffer=3 * events_each) as events:
        async with create_task_group() as tasks:
            tasks.start_soon(publish_in_thread, "a")
            tasks.start_soon(publish_in_thread, "b")
            tasks.start_soon(publish, "c")
        got = await read(events, 3 * events_each)

    for name in "abc":
        assert [n for who, n in got if who == name] == [*range(events_each)]
    assert events.dropped == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_stream_whose_loop_has_gone_is_left_alone(bus: EventBus, backend: str) -> None:
    opened: list[EventStream[str]] = []

    async def leave_open() -> None:
        opened.append(EventStream(bus, str, 100, "drop_oldest"))
        bus.subscribe(str, opened[0]._put, thread=False)
        await bus.dispatch("a")

    anyio.run(leave_open, backend=backend)
    anyio.run(partial(bus.dispatch, "b"), backend=backend)

    [events] = opened
    assert repr(events) == "<EventStream of builtins.str, ended, 0 of 100 waiting, 0 dropped>"
    assert (bus.stats.handled, bus.stats.failed) == (2, 0)


# When the process is told to stop


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """The signals that reach whoever listened before us."""
    numbers: list[int] = []

    def catch(number: int, _: FrameType | None) -> None:
        numbers.append(number)

    before = {s: signal.signal(s, catch) for s in (signal.SIGINT, signal.SIGTERM)}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_streams_of_the_bus_and_is_handed_on(
    bus: EventBus, caught: list[int], number: signal.Signals
) -> None:
    other = EventBus()
    got: list[str] = []
    with end_at_shutdown(bus):
        async with stream(other, str) as unconcerned:
            with fail_after(PATIENCE):
                async with create_task_group() as tasks, stream(bus, str) as events:
                    tasks.start_soon(read_all, events, got)
                    await bus.dispatch("a")
                    await anyio.wait_all_tasks_blocked()
                    # From a thread that nobody waits for: nothing but the signal wakes the loop.
                    threading.Thread(target=os.kill, args=(os.getpid(), number)).start()
                    await read_all(events, got)
            async with stream(bus, str) as late:
                assert [event async for event in late] == []
            await other.dispatch("b")
            assert await anext(unconcerned) == "b"
        assert (got, caught) == (["a"], [number])

    async with stream(bus, str) as afterwards:
        await bus.dispatch("c")
        assert await anext(afterwards) == "c"
    signal.raise_signal(number)
    assert caught == [number, number]


async def test_the_end_of_the_block_ends_the_streams_too(bus: EventBus) -> None:
    async with stream(bus, str) as events:
        with end_at_shutdown(bus):
            await bus.dispatch("a")

        assert [event async for event in events] == ["a"]


async def test_outside_the_main_thread_only_the_end_of_the_block_counts(
    bus: EventBus, caught: list[int]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def elsewhere() -> None:
        with end_at_shutdown(bus):
            seen.append(signal.getsignal(signal.SIGTERM))

    async with stream(bus, str) as events:
        await to_thread.run_sync(elsewhere)

        assert [event async for event in events] == []
    assert seen == [before]


async def test_what_a_signal_does_by_default_it_still_does(bus: EventBus) -> None:
    ignored = signal.SIGWINCH  # by default nothing happens
    assert signal.getsignal(ignored) == signal.SIG_DFL
    async with stream(bus, str) as events:
        with end_at_shutdown(bus, signals=[ignored]):
            signal.raise_signal(ignored)

            assert signal.getsignal(ignored) == signal.SIG_DFL
            assert [event async for event in events] == []


async def test_a_signal_that_was_ignored_stays_so_for_others(bus: EventBus) -> None:
    before = signal.signal(signal.SIGWINCH, signal.SIG_IGN)
    try:
        async with stream(bus, str) as events:
            with end_at_shutdown(bus, signals=[signal.SIGWINCH]):
                signal.raise_signal(signal.SIGWINCH)
                assert [event async for event in events] == []
        assert signal.getsignal(signal.SIGWINCH) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGWINCH, before)


async def test_whoever_listens_on_top_of_us_stays_and_reaches_those_below(
    bus: EventBus, caught: list[int]
) -> None:
    with end_at_shutdown(bus):
        ours: Any = signal.getsignal(signal.SIGTERM)
        on_top = partial(ours)
        signal.signal(signal.SIGTERM, on_top)
    assert signal.getsignal(signal.SIGTERM) is on_top
    async with stream(bus, str) as events:
        signal.raise_signal(signal.SIGTERM)
        await bus.dispatch("a")

        assert await anext(events) == "a"
    assert caught == [signal.SIGTERM]


# Bad input


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"buffer": 0}, "buffer is how many events may wait, at least 1, not 0"),
        ({"overflow": "block"}, 'overflow is "drop_oldest" or "raise", not \'block\''),
    ],
)
async def test_wrong_options_say_what_is_right(
    bus: EventBus, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        async with stream(bus, str, **options):
            pass

    assert bus.describe() == []


async def test_what_is_no_bus_is_refused_with_the_right_call(bus: EventBus) -> None:
    wrong: Any = str
    with pytest.raises(TypeError) as swapped:
        async with stream(wrong, bus):  # type: ignore[arg-type]
            pass
    with pytest.raises(TypeError) as app, end_at_shutdown(wrong):
        pass

    refused = "takes an EventBus first, not <class 'str'>"
    assert str(swapped.value) == f"stream() {refused}: stream(bus, OrderPaid)"
    assert str(app.value) == f"end_at_shutdown() {refused}: end_at_shutdown(bus)"


async def test_a_stream_is_of_a_class(bus: EventBus) -> None:
    wrong: Any = "OrderPaid"
    with pytest.raises(InvalidEventTypeError, match="an event type is a class, not 'OrderPaid'"):
        async with stream(bus, wrong):
            pass


async def test_the_wiring_says_where_the_stream_was_opened(bus: EventBus) -> None:
    async with stream(bus, str):
        [wiring] = bus.describe()

    assert wiring["handler"] == "eventkit.streams:EventStream._put"
    assert wiring["subscribed_at"].startswith(f"{Path(__file__)}:")
