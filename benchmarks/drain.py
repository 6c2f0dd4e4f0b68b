"""Many events in one unit of work: time per event, however many there are, and memory."""

from __future__ import annotations

import gc
import statistics
import tracemalloc
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import anyio

from benchmarks.harness import (
    Comparison,
    Effort,
    Figure,
    Results,
    Run,
    Verdict,
    clock,
    compare,
    on_loop,
    ready,
)
from benchmarks.peers import Handler, Ordered
from benchmarks.report import Bar, Panel, drawing, grid, number, table
from eventkit import EventBus
from eventkit._core.bus import state_of

PACKAGES = ("anyio",)

FLOOR = "deque.popleft, await handler(event)"
DRAIN = "eventkit, drain"
BOTH = "eventkit, publish and drain"

SUBSCRIPTION = "a subscription"
QUEUED = "a queued delivery, besides its event"
KEPT = "a delivery that has ended"
LIMITS = {SUBSCRIPTION: 120, QUEUED: 250, KEPT: 0}


async def handle(event: Ordered) -> None:
    """The handler, which does not suspend."""


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure each length, then memory."""
    most = {"smallest": 10, "quick": 10_000, "full": 1_000_000}[effort.scale]
    for length in (10**power for power in range(7)):
        if length <= most:
            rounds = effort.rounds if length <= 10_000 else 3 if length <= 100_000 else 1
            yield on_loop("asyncio", partial(_lengths, length, effort.fewer(rounds)))
    count = {"smallest": 10, "quick": 10_000, "full": 20_000}[effort.scale]
    queued, kept = anyio.run(queued_and_kept, count)
    found = {SUBSCRIPTION: subscription_bytes(count), QUEUED: queued, KEPT: kept}
    for what, taken in found.items():
        yield Comparison({"memory": what}, {"eventkit": [taken]}, unit="B")


async def _lengths(length: int, effort: Effort) -> Comparison:
    contenders = [
        ready(FLOOR, one_after_the_other(handle), batch=length),
        ready(DRAIN, drained(length, publishing=False), batch=length),
        ready(BOTH, drained(length, publishing=True), batch=length),
    ]
    return await compare({"loop": "asyncio", "events": length}, contenders, effort)


def one_after_the_other(handler: Handler) -> Run:
    async def run(times: int) -> float:
        events = deque(map(Ordered, range(times)))
        begun = clock()
        while events:
            await handler(events.popleft())
        return clock() - begun

    return run


def drained(length: int, *, publishing: bool) -> Run:
    bus = bus_for(length)

    async def run(times: int) -> float:
        events = [*map(Ordered, range(times))]
        async with bus.context() as context:
            begun = clock()
            for event in events:
                bus.publish(event)
            begun = begun if publishing else clock()
            await context.drain()
            return clock() - begun

    return run


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
            state_of(bus).plan_for(kind())
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
    """Time per event is flat from ten events on, and memory is bounded."""
    lengths: dict[int, float] = {}
    for found in comparisons:
        if what := found.case.get("memory"):
            yield Verdict(f"bytes: {what}", found.rounds["eventkit"][0], LIMITS[str(what)])
        else:
            lengths[int(found.case["events"])] = statistics.median(found.rounds[DRAIN])
    flat = [value for length, value in lengths.items() if length >= 10]
    if len(flat) > 1:
        longest = max(lengths)
        yield Verdict(
            f"time per event from 10 to {longest:,} events: the most / the least",
            max(flat) / min(flat),
            2,
        )


def tables(results: Results) -> str:
    """Events per second by length, and bytes."""
    lengths = grid(results, {"loop": "asyncio"}, "events", per_second)
    memory = table(
        ["bytes of", "eventkit"],
        [
            [str(figure.case["memory"]), number(figure.value.median)]
            for figure in results.figures
            if "memory" in figure.case and figure.value is not None
        ],
    )
    return (
        "**asyncio, one handler that does not suspend**, events per second, by how many are "
        f"published before the drain\n\n{lengths}\n\n{memory}"
    )


def per_second(figure: Figure) -> str:
    """In thousands, from nanoseconds per event."""
    return "" if figure.value is None else f"{number(1e6 / figure.value.median)} k"


def plots(results: Results) -> dict[str, str]:
    """Time per event by length, which is to be flat."""
    bars = [
        Bar(
            f"eventkit, {figure.case['events']:,} events",
            figure.value,
            number(figure.value.median / 1e3),
        )
        for figure in results.figures
        if figure.contender == DRAIN and figure.value is not None
    ]
    return {"drain.svg": drawing([Panel("Drain: microseconds per event", bars)])}
