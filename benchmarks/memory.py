"""What is kept in memory per subscription and per event, in bytes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import anyio

from benchmarks.harness import Comparison, Effort, Results, Verdict
from benchmarks.peers import Handler, Ordered
from benchmarks.report import number, table
from eventkit import EventBus

PACKAGES = ("anyio",)

SUBSCRIPTION = "a subscription"
QUEUED = "a queued delivery, besides its event"
KEPT = "a delivery that has ended"
LIMITS = {SUBSCRIPTION: 120, QUEUED: 250, KEPT: 0}


async def handle(event: Ordered) -> None:
    """The handler, which does not suspend."""


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure the three."""
    count = {"smallest": 10, "quick": 10_000, "full": 20_000}[effort.scale]
    queued, kept = anyio.run(queued_and_kept, count)
    found = {SUBSCRIPTION: subscription_bytes(count), QUEUED: queued, KEPT: kept}
    for what, taken in found.items():
        yield Comparison({"memory": what}, {"eventkit": [taken]}, unit="B")


def bus_for(events: int) -> EventBus:
    """A bus that takes so many, with one handler."""
    bus = EventBus(max_events=events)
    bus.subscribe(Ordered, handle)
    return bus


def subscription_bytes(count: int) -> float:
    """Of subscriptions to types that have ten each, resolved."""
    bus = EventBus()
    kinds: list[type] = [type(f"Event{number}", (), {}) for number in range(count // 10)]
    handlers = [_named(number) for number in range(count)]
    with traced() as taken:
        for number, handler in enumerate(handlers):
            bus.subscribe(kinds[number // 10], handler)
        for kind in kinds:
            bus.handlers_for(kind)
        return taken() / count


def _named(number: int) -> Handler:
    async def handle(event: object) -> None:
        """Each is a function of its own, as handlers are."""

    handle.__qualname__ = f"handler_{number}"
    return handle


async def queued_and_kept(count: int) -> tuple[float, float]:
    """Of deliveries that wait, each published by itself; and when their unit of work has ended."""
    bus = bus_for(count)
    events = [*map(Ordered, range(count))]

    async def unit(events: Sequence[Ordered], taken: Callable[[], int]) -> int:
        async with bus.context() as context:
            before = taken()
            for event in events:
                bus.publish(event)
            queued = taken() - before
            await context.drain()
        return queued

    with traced() as taken:
        await unit(events, taken)  # what is made once is made now
        before = taken()
        queued = await unit(events, taken)
        kept = taken() - before
    return queued / count, round(kept / count, 1)


@contextmanager
def traced() -> Generator[Callable[[], int]]:
    """Count the bytes that Python allocates in the block and that are still in use."""

    def in_use() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    before = in_use()
    try:
        yield lambda: in_use() - before
    finally:
        tracemalloc.stop()


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """Each has its limit."""
    for found in comparisons:
        what = str(found.case["memory"])
        yield Verdict(f"bytes: {what}", found.rounds["eventkit"][0], LIMITS[what])


def tables(results: Results) -> str:
    """Bytes."""
    rows = [
        [f"eventkit, {figure.case['memory']}", number(figure.value.median)]
        for figure in results.figures
        if figure.value is not None
    ]
    return table(["", "bytes"], rows)


def plots(results: Results) -> dict[str, str]:
    """Three numbers need no drawing."""
    return {}
