"""Handlers that block the event loop, which debug mode names."""

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from functools import partial
from typing import Annotated

import anyio
import pytest
from anyio import CancelScope, wait_all_tasks_blocked
from anyio.lowlevel import checkpoint
from fastapi import Depends

from eventkit import DispatchError, EventBus
from eventkit._core.bus import state_of
from eventkit._core.whereabouts import whereabouts
from tests.dispatching import Boom, ignore
from tests.witness import freed_by_anyio

pytestmark = pytest.mark.anyio


class Clock:
    """A clock that stands still while nobody says that time passes."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def block(self, seconds: float = 0.25) -> None:
        """Keep the event loop busy for so many seconds."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What tells how long the steps of handlers take."""
    clock = Clock()
    monkeypatch.setattr("eventkit._core.blocking.perf_counter", clock)
    return clock


@pytest.fixture
def bus() -> EventBus:
    return EventBus(debug=True)


def named(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The handlers that are said to block, each with its seconds."""
    start = (
        "a handler blocked the event loop: make it a plain def, which runs in a thread, or have it "
        f"await what takes long: handler={__name__}:"
    )
    said: list[str] = []
    for record in caplog.records:
        if record.levelno == logging.WARNING:
            handler, location, seconds = record.getMessage().removeprefix(start).split(" ")
            assert location.startswith(f"location={__file__}:")
            said.append(f"{handler.rpartition('.')[2]} {seconds}")
    return said


Make = Callable[[Clock], Callable[..., object]]


def at_once(clock: Clock) -> Callable[..., object]:
    async def handler(event: object) -> None:
        clock.block()

    return handler


def later(clock: Clock) -> Callable[..., object]:
    async def handler(event: object) -> None:
        await checkpoint()
        clock.block()
        await checkpoint()

    return handler


def when_cancelled(clock: Clock) -> Callable[..., object]:
    async def handler(event: object) -> None:
        with CancelScope() as scope:
            scope.cancel()
            try:
                await checkpoint()
            finally:
                clock.block()

    return handler


def as_it_fails(clock: Clock) -> Callable[..., object]:
    async def handler(event: object) -> None:
        clock.block()
        raise Boom

    return handler


def in_a_partial(clock: Clock) -> Callable[..., object]:
    async def handler(event: object, seconds: float) -> None:
        clock.block(seconds)

    return partial(handler, seconds=0.25)


def in_what_it_awaits(clock: Clock) -> Callable[..., object]:
    async def wait() -> None:
        await checkpoint()
        clock.block()

    async def handler(event: object) -> None:
        await wait()

    return handler


def in_a_dependency(clock: Clock) -> Callable[..., object]:
    async def get() -> None:
        clock.block()

    async def handler(event: object, _: Annotated[None, Depends(get)]) -> None: ...

    return handler


def in_a_clean_up(clock: Clock) -> Callable[..., object]:
    async def get() -> AsyncGenerator[None]:
        yield
        clock.block()

    async def handler(event: object, _: Annotated[None, Depends(get)]) -> None: ...

    return handler


def beside_a_dependency(clock: Clock) -> Callable[..., object]:
    async def get() -> int:
        return 1

    async def handler(evt: object, event: Annotated[int, Depends(get)]) -> None:
        clock.block()

    return handler


def before_a_thread(clock: Clock) -> Callable[..., object]:
    async def get() -> None:
        clock.block()

    def handler(event: object, _: Annotated[None, Depends(get)]) -> None: ...

    return handler


BLOCKING = [
    at_once,
    later,
    when_cancelled,
    as_it_fails,
    in_a_partial,
    in_what_it_awaits,
    in_a_dependency,
    in_a_clean_up,
    beside_a_dependency,
    before_a_thread,
]


@pytest.mark.parametrize("make", BLOCKING)
async def test_a_handler_that_blocks_the_event_loop_is_named_once_with_how_long(
    bus: EventBus, clock: Clock, caplog: pytest.LogCaptureFixture, make: Make
) -> None:
    bus.subscribe(int, make(clock))

    for number in range(3):
        async with bus.context():
            bus.publish(number)

    assert named(caplog) == ["handler seconds=0.25"]


async def test_a_plain_function_on_the_event_loop_is_named_too_and_what_it_returns(
    bus: EventBus, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def wait() -> None:
        clock.block(0.5)

    def call(event: object) -> None:
        clock.block()

    def return_coroutine(event: object) -> Awaitable[None]:
        return wait()

    for function in (call, return_coroutine):
        bus.subscribe(int, function, thread=False)
    await bus.dispatch(1)

    assert sorted(named(caplog)) == ["call seconds=0.25", "return_coroutine seconds=0.5"]


async def test_what_waits_or_is_quick_or_is_in_a_thread_is_not_named(
    bus: EventBus, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = anyio.Event()

    async def waits(event: object) -> None:
        await go_on.wait()

    async def is_quick(event: object) -> None:
        clock.block(0.09)
        await checkpoint()
        clock.block(0.09)

    bus.subscribe(int, waits)
    bus.subscribe(int, is_quick)
    bus.subscribe(str, lambda _: clock.block(), thread=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bus.dispatch, 1)
        await wait_all_tasks_blocked()
        clock.block(3600)
        go_on.set()
    await bus.dispatch("in a thread")

    assert named(caplog) == []


@pytest.mark.parametrize("debug", [False, None])
async def test_without_debug_mode_and_under_pytest_nobody_is_named(
    clock: Clock, caplog: pytest.LogCaptureFixture, debug: bool | None
) -> None:
    bus = EventBus(debug=debug)
    bus.subscribe(int, at_once(clock))

    await bus.dispatch(1)

    assert named(caplog) == []


DEVELOPMENT = """
import asyncio
from eventkit import EventBus
from eventkit._core import blocking

now = [0.0]
blocking.perf_counter = lambda: now[0]
bus = EventBus()

@bus.on(int)
async def handler(event):
    now[0] += 0.25

asyncio.run(bus.dispatch(1))
"""


@pytest.mark.parametrize(("options", "said"), [(["-X", "dev"], 1), ([], 0)])
def test_in_pythons_development_mode_a_handler_that_blocks_is_named(
    options: list[str], said: int
) -> None:
    command = [sys.executable, *options, "-c", DEVELOPMENT]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)

    assert ended.stderr.count("a handler blocked the event loop") == said


class Later:
    """What can be awaited, and is no coroutine."""

    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def __await__(self) -> Generator[object, None, None]:
        yield from checkpoint().__await__()
        self._seen.append("awaited")


async def test_in_debug_mode_handlers_do_what_they_do_without(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    @bus.on(int)
    async def shielded(event: int) -> None:
        with CancelScope(shield=True):
            await checkpoint()
            seen.append("shielded")

    @bus.on(int)
    async def failing(event: int) -> None:
        await checkpoint()
        raise Boom

    bus.subscribe(int, lambda _: Later(seen), thread=False)
    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(1)

    assert sorted(seen) == ["awaited", "shielded"]
    assert [type(error) for error in caught.value.exceptions] == [Boom]
    assert bus.handlers_for(int)[0].handler is shielded
    assert named(caplog) == []


async def test_in_debug_mode_it_is_still_known_where_a_handler_waits(bus: EventBus) -> None:
    go_on = anyio.Event()

    @bus.on(int)
    async def waiting(event: int) -> None:
        await go_on.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bus.dispatch, 1)
        await wait_all_tasks_blocked()
        ((frame, *_),) = whereabouts(state_of(bus).tally).values()
        assert frame.f_code is waiting.__code__
        del frame
        go_on.set()


class Payload:
    """An event that can be watched as it goes."""


async def ends(event: object) -> None:
    await checkpoint()


async def fails(event: object) -> None:
    await checkpoint()
    raise Boom


def fails_at_once(event: object) -> None:
    raise Boom


async def takes_too_long(event: object) -> None:
    await anyio.sleep_forever()


@freed_by_anyio
@pytest.mark.parametrize("handler", [ends, fails, fails_at_once, takes_too_long])
async def test_in_debug_mode_events_are_freed_without_the_garbage_collector(
    handler: Callable[[object], object],
) -> None:
    bus = EventBus(debug=True, handler_timeout=0.001)
    bus.report_failure = ignore
    bus.subscribe(Payload, handler, thread=False if handler is fails_at_once else None)

    async def deliver() -> weakref.ref[Payload]:
        payload = Payload()
        async with bus.context():
            bus.publish(payload)
        return weakref.ref(payload)

    gc.disable()
    try:
        payload = await deliver()
        await wait_all_tasks_blocked()
        assert bus.stats.failed == (handler is not ends)
        assert payload() is None
    finally:
        gc.enable()


async def test_closing_a_handler_in_debug_mode_closes_its_coroutine(bus: EventBus) -> None:
    seen: list[str] = []

    async def handler(event: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("closed")

    bus.subscribe(int, handler)
    dispatching = bus.dispatch(1)
    dispatching.send(None)
    dispatching.close()

    assert seen == ["closed"]
