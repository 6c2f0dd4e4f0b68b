"""Time limits of handlers on clocks that stand still while code runs, and jump while all waits."""

import asyncio
import selectors
from collections.abc import Callable
from typing import Annotated, Any, cast

import anyio
import pytest
import trio
from anyio import create_task_group, sleep, sleep_forever
from anyio.lowlevel import checkpoint
from fastapi import Depends
from trio.testing import MockClock

from eventkit import Delivery, EventBus, HandlerTimeoutError, Observer
from eventkit._core.bus import state_of
from eventkit._core.drainer import Drainer
from tests.witness import assert_settled, entered, unit_of


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a time to come, has it come."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0 if timeout else timeout)
        if timeout and not ready:
            self.now += timeout
        return ready


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop of asyncio whose clock is that of its selector."""

    def __init__(self) -> None:
        self.selector = _JumpingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize(
        "anyio_backend",
        [
            pytest.param(("asyncio", {"loop_factory": _VirtualLoop}), id="asyncio"),
            pytest.param(("trio", {"clock": MockClock(autojump_threshold=0)}), id="trio"),
        ],
    ),
]


def compute(seconds: float) -> None:
    """Let time pass in which the event loop has no turn."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        cast("MockClock", trio.lowlevel.current_clock()).jump(seconds)
    else:
        cast("_VirtualLoop", loop).selector.now += seconds


async def test_time_jumps_while_all_waits_and_passes_while_one_computes() -> None:
    begun = anyio.current_time()
    await sleep(3600)
    compute(0.5)
    assert anyio.current_time() - begun == pytest.approx(3600.5)


class Failures:
    """What is reported, by the type of the error."""

    def __init__(self, bus: EventBus) -> None:
        self.types: list[type[Exception]] = []
        bus.report_failure = self.report

    def report(self, delivery: Delivery, error: Exception) -> None:
        self.types.append(type(error))


def nobody_watches(bus: EventBus) -> None: ...


def an_observer_watches(bus: EventBus) -> None:
    bus.observe(Observer())


@pytest.mark.parametrize("watch", [nobody_watches, an_observer_watches])
async def test_an_observer_does_not_change_how_long_a_handler_may_take(
    watch: Callable[[EventBus], object],
) -> None:
    bus = EventBus(handler_timeout=0.3)
    failures = Failures(bus)

    @bus.on(str)
    async def waits(event: str) -> None:
        await sleep(0.5)

    @bus.on(str)
    async def computes(event: str) -> None:
        compute(0.4)

    watch(bus)
    async with bus.context():
        bus.publish("event")

    assert failures.types == []
    assert (bus.stats.handled, bus.stats.failed) == (2, 0)


async def hangs() -> None:
    await sleep_forever()


def plain(event: str, _: Annotated[None, Depends(hangs)]) -> None: ...
async def coroutine(event: str, _: Annotated[None, Depends(hangs)]) -> None: ...


@pytest.mark.parametrize(
    "handler",
    [coroutine, plain],
)
async def test_a_dependency_that_hangs_is_ended_at_the_handlers_deadline_and_others_go_on(
    handler: Callable[..., Any],
) -> None:
    bus = EventBus(handler_timeout=5)
    failures = Failures(bus)
    bus.subscribe(str, handler)

    @bus.on(int)
    async def follows(event: int) -> None:
        await checkpoint()

    async with create_task_group() as tasks:
        drainer = Drainer(state_of(bus), tasks, concurrency=1, max_pending=None)
        for event in ("hangs", 1):
            context = unit_of(bus)
            with entered(context):
                bus.publish(event)
            drainer.submit(context, success=True)
        await drainer.close(100)

    assert failures.types == [HandlerTimeoutError]
    assert (bus.stats.handled, bus.stats.failed, bus.stats.undelivered) == (1, 1, 0)
    assert_settled(bus)
