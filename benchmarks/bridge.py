"""Events to and from brokers: what the bridge adds to plain FastStream, and that to a client.

A publish returns when the broker has confirmed it, and each message is acknowledged alone. What a
broker takes is no cost of this process, so the CPU time stands beside the wall clock.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from itertools import count
from typing import Any
from uuid import uuid4

import anyio

from benchmarks.brokers import BROKERS, Broker, Client, answering
from benchmarks.harness import (
    Case,
    Comparison,
    Contender,
    Effort,
    Figure,
    Results,
    Run,
    Spread,
    Verdict,
    asyncio_loop,
    compare,
    on_loop,
)
from benchmarks.peers import Latch, load
from benchmarks.report import grid, microseconds, milliseconds, number
from eventkit import DomainEvent, EventBus, named

PACKAGES = (
    "anyio",
    "uvloop",
    "pydantic",
    "faststream",
    *(broker.client for broker, _, _ in BROKERS.values()),
)

ONE_BY_ONE = "publish, one by one"
AT_ONCE = "publish, twenty at once"
CONSUME = "consume a backlog"
IDLE = "from the publish to the handler, idle"

PLAIN = "FastStream"
CLIENT = "the broker's client"
DISPATCH = "eventkit, dispatch"
UNIT = "eventkit, a unit of work"
OURS = "eventkit"

WALL, CPU = "wall clock", "CPU time"

ROW = 20
PAUSE = 0.002  # seconds until everything is idle again
GOAL, STRETCH = 2.0, 1 / 0.6  # times as long as FastStream: half of its throughput
GOAL_OF_DELAY = 0.2  # milliseconds more


@named("benchmarks.placed.v1")
@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    """What is sent."""

    order_id: int
    customer: str
    total: Decimal


def placed(orders: int) -> list[OrderPlaced]:
    """So many different events."""
    return [OrderPlaced(number, "ada", Decimal("9.90")) for number in range(orders)]


Publish = Callable[[OrderPlaced], Awaitable[object]]
Handle = Callable[[OrderPlaced], Awaitable[None]]


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure each broker that answers; of another, say why it is left out."""
    for name, (broker, _, _) in BROKERS.items():
        if broker.slow and effort.scale == "smallest":
            continue
        try:
            with answering(name) as url:
                for measured in (ONE_BY_ONE, AT_ONCE, CONSUME):
                    yield from _throughput(measured, broker, url, effort)
                yield on_loop(asyncio_loop(), partial(_idle, broker, url, effort))
        except LookupError as missing:
            yield Comparison({"measured": ONE_BY_ONE, "broker": name}, {}, {name: str(missing)})


def _throughput(measured: str, broker: Broker, url: str, effort: Effort) -> Iterator[Comparison]:
    """Both clocks in the same rounds."""
    taken: dict[str, list[float]] = {}
    found = on_loop(asyncio_loop(), partial(_compared, measured, broker, url, effort, taken))
    yield found
    in_cpu = {name: taken[name] for name in found.rounds}
    yield replace(found, case=found.case | {"clock": CPU}, rounds=in_cpu)


async def _compared(
    measured: str, broker: Broker, url: str, effort: Effort, taken: dict[str, list[float]]
) -> Comparison:
    messages = {"smallest": ROW, "quick": 100, "full": 300}[effort.scale]
    ends = ENDS if measured != CONSUME else {name: ENDS[name] for name in (PLAIN, CLIENT, DISPATCH)}
    ways: dict[str, Callable[[Opening, list[float]], AbstractAsyncContextManager[Run]]] = {
        ONE_BY_ONE: partial(publishing, _one_by_one),
        AT_ONCE: partial(publishing, _in_rows),
        CONSUME: backlog,
    }
    contenders: list[Contender] = []
    for name, end in ends.items():
        shown = OURS if measured == CONSUME and name == DISPATCH else name
        cpu = taken.setdefault(shown, [])
        opened = partial(ways[measured], partial(end, broker, url), cpu)
        contenders.append(Contender(shown, opened, messages))
    case: Case = {"measured": measured, "broker": broker.name, "clock": WALL}
    return await compare(case, contenders, replace(effort.fewer(9), seconds=1e-9))


class Watch:
    """Both clocks, from when it is made.

    Args:
        cpu: Takes the CPU time of one operation.
    """

    def __init__(self, cpu: list[float]) -> None:
        self._taken = cpu
        self._wall, self._cpu = time.perf_counter_ns(), time.process_time_ns()

    def stop(self, times: int) -> float:
        """The wall clock of all operations."""
        wall = time.perf_counter_ns() - self._wall
        self._taken.append((time.process_time_ns() - self._cpu) / times)
        return wall


# The ends of a channel


@dataclass(frozen=True, slots=True)
class End:
    """How events are sent to a channel and come from it.

    Attributes:
        publish: Returns when the broker has it.
        consume: Has the function called with each event, from now on.
    """

    publish: Publish
    consume: Callable[[Handle], AbstractAsyncContextManager[None]]


Opening = Callable[[], AbstractAsyncContextManager[End]]

_numbers = count()


def _name() -> str:
    """Of a channel, known to nobody else."""
    return f"eventkit_bench_{uuid4().hex[:8]}_{next(_numbers)}"


@asynccontextmanager
async def by_client(broker: Broker, url: str) -> AsyncGenerator[End]:
    """As one would write it: pydantic, and the broker's client."""
    adapter = load("pydantic").TypeAdapter(OrderPlaced)
    async with broker.channel(url, _name()) as client:

        async def publish(event: OrderPlaced) -> object:
            return await client.send(adapter.dump_json(event))

        yield End(publish, partial(_consumed, client, adapter.validate_json))


@asynccontextmanager
async def _consumed(client: Client, read: Any, handle: Handle) -> AsyncGenerator[None]:
    async def take(body: bytes) -> None:
        await handle(read(body))

    task = asyncio.create_task(client.consume(take))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def by_faststream(broker: Broker, url: str) -> AsyncGenerator[End]:
    """As its documentation shows."""
    channel = _name()
    async with broker.channel(url, channel):
        fast = broker.faststream(url)
        publisher = broker.publisher(fast, channel)
        reads, *_ = broker.subscribers(fast, channel)

        @asynccontextmanager
        async def consume(handle: Handle) -> AsyncGenerator[None]:
            async def consumer(event: OrderPlaced) -> None:
                await handle(event)

            consumer.__annotations__["event"] = OrderPlaced  # which FastStream looks up
            reads(consumer)
            await fast.start()
            yield

        async with fast:
            yield End(publisher.publish, consume)


@asynccontextmanager
async def by_bridge(way: str, broker: Broker, url: str) -> AsyncGenerator[End]:
    """Two buses, as of two services."""
    channel, made = _name(), load("eventkit.faststream").Bridge
    sending, receiving = EventBus(name="sending"), EventBus(name="receiving")
    async with broker.channel(url, channel):
        fast = broker.faststream(url)
        made(sending, source="/orders").forward(OrderPlaced, broker.publisher(fast, channel))

        async def in_a_unit(event: OrderPlaced) -> None:
            async with sending.context():
                sending.publish(event)

        @asynccontextmanager
        async def consume(handle: Handle) -> AsyncGenerator[None]:
            made(receiving, source="/billing").consume(
                broker.subscribers(fast, channel),
                OrderPlaced,
                dead_letter=broker.dead_letters(fast, channel),
            )
            receiving.subscribe(OrderPlaced, handle, name="handle")
            await fast.start()
            yield

        async with fast:
            yield End(sending.dispatch if way == DISPATCH else in_a_unit, consume)
        for bus in (sending, receiving):
            assert bus.stats.handled == bus.stats.accepted, bus.stats


ENDS: dict[str, Callable[[Broker, str], AbstractAsyncContextManager[End]]] = {
    PLAIN: by_faststream,
    CLIENT: by_client,
    DISPATCH: partial(by_bridge, DISPATCH),
    UNIT: partial(by_bridge, UNIT),
}


# What is measured


@asynccontextmanager
async def publishing(
    publish_all: Callable[[Publish, Sequence[OrderPlaced]], Awaitable[None]],
    opening: Opening,
    cpu: list[float],
) -> AsyncGenerator[Run]:
    """Events are sent, and nobody consumes."""

    async def run(end: End, taken: list[float], times: int) -> float:
        events = placed(times)
        watch = Watch(taken)
        await publish_all(end.publish, events)
        return watch.stop(times)

    async with opening() as end:
        await run(end, [], ROW)
        yield partial(run, end, cpu)


async def _one_by_one(publish: Publish, events: Sequence[OrderPlaced]) -> None:
    for event in events:
        await publish(event)


async def _in_rows(publish: Publish, events: Sequence[OrderPlaced]) -> None:
    for first in range(0, len(events), ROW):
        await asyncio.gather(*[publish(event) for event in events[first : first + ROW]])


@asynccontextmanager
async def backlog(opening: Opening, cpu: list[float]) -> AsyncGenerator[Run]:
    """The first message waits in its handler until all have been sent; then the clock starts."""
    latch, gate = Latch(0), asyncio.Event()

    async def handle(event: OrderPlaced) -> None:
        if not gate.is_set():
            await gate.wait()
        latch.arrive()

    async def run(end: End, taken: list[float], times: int) -> float:
        gate.clear()
        latch.expect(times)
        await _in_rows(end.publish, placed(times))
        await asyncio.sleep(0.3)  # what is pushed has come
        watch = Watch(taken)
        gate.set()
        await latch.opened()
        return watch.stop(times)

    async with opening() as end, end.consume(handle):
        await run(end, [], ROW)
        yield partial(run, end, cpu)


async def _idle(broker: Broker, url: str, effort: Effort) -> Comparison:
    """One event after the other; of some of them the median."""
    events = {"smallest": 2, "quick": 50, "full": 200}[effort.scale]
    if broker.slow:
        events = max(2, events // 25)
    names = {PLAIN: PLAIN, CLIENT: CLIENT, DISPATCH: OURS}
    contenders = [
        Contender(shown, partial(idle, partial(ENDS[name], broker, url), events), 1)
        for name, shown in names.items()
    ]
    case: Case = {"measured": IDLE, "broker": broker.name}
    return await compare(case, contenders, replace(effort.fewer(9), seconds=1e-9))


@asynccontextmanager
async def idle(opening: Opening, events: int) -> AsyncGenerator[Run]:
    """Published when nothing else happens."""
    latch, begun = Latch(1), 0

    async def handle(event: OrderPlaced) -> None:
        nonlocal begun
        begun = time.perf_counter_ns()
        latch.arrive()

    async def run(end: End, events: int, times: int) -> float:
        delays: list[float] = []
        for event in placed(events):
            latch.expect()
            published = time.perf_counter_ns()
            await end.publish(event)
            await latch.opened()
            delays.append(begun - published)
            await anyio.sleep(PAUSE)
        return statistics.median(delays) * times

    async with opening() as end, end.consume(handle):
        await run(end, 2, 1)
        yield partial(run, end, events)


# What was found


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """By the wall clock, which is what a service gets done; Kafka's delays are the broker's."""
    for found in comparisons:
        measured, broker = str(found.case["measured"]), str(found.case["broker"])
        if PLAIN not in found.rounds or found.case.get("clock") == CPU:
            continue
        if measured == IDLE:
            if OURS in found.rounds and not BROKERS[broker][0].slow:
                pairs = zip(found.rounds[PLAIN], found.rounds[OURS], strict=True)
                added = statistics.median((ours - plain) / 1e6 for plain, ours in pairs)
                name = f"{broker}, {measured}: what {OURS} adds to {PLAIN}, milliseconds"
                yield Verdict(name, added, GOAL_OF_DELAY)
            continue
        for name in (DISPATCH, UNIT, OURS):
            if name in found.rounds:
                goal = f"{broker}, {measured}: {name} / {PLAIN}, time per event"
                yield Verdict(goal, found.ratio(name).median, GOAL, STRETCH)


def tables(results: Results) -> str:
    """Per second by the wall clock, then the CPU time; a column for each broker."""
    parts: list[str] = []
    for measured in (ONE_BY_ONE, AT_ONCE, CONSUME):
        for clock, what, cell in (
            (WALL, f"events per second, and the throughput beside {PLAIN}", _per_second),
            (CPU, "microseconds of CPU time per event", microseconds),
        ):
            case: Case = {"measured": measured, "clock": clock}
            if any(case.items() <= figure.case.items() for figure in results.figures):
                parts += [
                    f"**{measured.capitalize()}**, {what}",
                    grid(results, case, "broker", cell),
                ]
    if any(figure.case["measured"] == IDLE for figure in results.figures):
        parts += [
            f"**{IDLE.capitalize()}**, milliseconds, p50",
            grid(results, {"measured": IDLE}, "broker", milliseconds),
        ]
    absent = [f"{figure.contender}: {figure.absent}" for figure in results.figures if _away(figure)]
    return "\n\n".join([*parts, *([f"Left out: {'; '.join(absent)}."] if absent else [])])


def _away(figure: Figure) -> bool:
    """Whether it stands for a broker that does not answer."""
    return bool(figure.absent) and "clock" not in figure.case and figure.contender in BROKERS


def _per_second(figure: Figure) -> str:
    if figure.value is None or figure.ratio is None:
        return ""
    ratio, rate = figure.ratio, number(1e9 / figure.value.median)
    inverse = Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)
    if inverse.low == inverse.high:
        return rate
    return f"{rate}, {inverse.median:.2f} x ({inverse.low:.2f} to {inverse.high:.2f})"


def plots(results: Results) -> dict[str, str]:
    """The tables say it."""
    return {}
