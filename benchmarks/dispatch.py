"""Events that the publisher waits for: one `dispatch`, and the drain of a unit of work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from types import FunctionType

import anyio

from benchmarks.harness import (
    Case,
    Comparison,
    Contender,
    Effort,
    Figure,
    Results,
    Run,
    Verdict,
    clock,
    compare,
    loops,
    on_loop,
    ready,
)
from benchmarks.peers import ASYNCIO, PEERS, Handler, Ordered, awaited
from benchmarks.report import Bar, Panel, drawing, grid, microseconds, number, ratio, table
from eventkit import EventBus

PACKAGES = ("anyio", "trio", "uvloop", *(peer.name for peer in PEERS))

FLOOR = "for h in handlers: await h(event)"
GATHER = "asyncio.gather"
GROUP = "AnyIO task group"
DRAIN = "eventkit, drain"
DISPATCH = "eventkit, dispatch"

NONE = "none waits"
EACH = "each waits 2 ms"
SECONDS = 0.002

# Events per unit of work; fewer where each of them waits for something.
UNIT, WAITING_UNIT = 500, 10

# The goal and the stretch on asyncio: who, among how many handlers that do what, beside whom.
GOALS: dict[tuple[str, int], tuple[str, str, float, float]] = {
    (EACH, 3): (DISPATCH, GROUP, 1.5, 1.2),
    (NONE, 1): (DISPATCH, GROUP, 0.9, 0.8),
    (NONE, 10): (DRAIN, FLOOR, 13, 10),
    (NONE, 100): (DRAIN, FLOOR, 12, 9),
}
# The other libraries take part in this case, on asyncio.
WITH_PEERS = (NONE, 10)


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure the cases of the goals on each event loop."""
    cases = [(NONE, 2)] if effort.scale == "smallest" else GOALS
    for loop in loops():
        for waits, size in cases:
            yield on_loop(loop, partial(_case, loop, waits, size, effort))


async def _case(loop: str, waits: str, size: int, effort: Effort) -> Comparison:
    handlers = handlers_that(waits, size)
    few = waits == EACH or effort.scale == "smallest"
    contenders = [
        ready(FLOOR, one_after_the_other(handlers)),
        *([ready(GATHER, gathered(handlers))] if loop in ASYNCIO else []),
        ready(GROUP, grouped(handlers)),
        drained(handlers, WAITING_UNIT if few else UNIT),
        dispatched(handlers),
    ]
    absent: dict[str, str] = {}
    if loop in ASYNCIO and (waits, size) == WITH_PEERS:
        absent = {peer.name: why for peer in PEERS if (why := peer.missing(loop))}
        contenders += [peer.contender(handlers) for peer in PEERS if peer.name not in absent]
    if waits == EACH:  # a sleeping process wakes up dearly or cheaply: more rounds, shorter ones
        effort = replace(effort, rounds=2 * effort.rounds, seconds=effort.seconds / 2)
    case: Case = {"loop": loop, "waiting": waits, "handlers": size}
    return await compare(case, contenders, effort, absent)


def handlers_that(waits: str, size: int) -> list[Handler]:
    """So many functions that do this."""
    handlers = [_waiting() if waits == EACH else _busy() for _ in range(size)]
    for index, handler in enumerate(handlers):  # some libraries tell them apart by name
        assert isinstance(handler, FunctionType)
        handler.__name__ = handler.__qualname__ = f"handler_{index}"
    return handlers


def _busy() -> Handler:
    async def handle(event: object) -> None:
        pass

    return handle


def _waiting() -> Handler:
    async def handle(event: object) -> None:
        await anyio.sleep(SECONDS)

    return handle


def one_after_the_other(handlers: Sequence[Handler]) -> Run:
    async def run(times: int) -> float:
        event = Ordered()
        begun = clock()
        for _ in range(times):
            for handler in handlers:
                await handler(event)
        return clock() - begun

    return run


def gathered(handlers: Sequence[Handler]) -> Run:
    async def run(times: int) -> float:
        event = Ordered()
        begun = clock()
        for _ in range(times):
            await asyncio.gather(*[handler(event) for handler in handlers])
        return clock() - begun

    return run


def grouped(handlers: Sequence[Handler]) -> Run:
    async def run(times: int) -> float:
        event = Ordered()
        begun = clock()
        for _ in range(times):
            async with anyio.create_task_group() as tasks:
                for handler in handlers:
                    tasks.start_soon(handler, event)
        return clock() - begun

    return run


def drained(handlers: Sequence[Handler], unit: int) -> Contender:
    """The drain of one unit of work; publishing is a topic of its own."""

    @asynccontextmanager
    async def bus_of() -> AsyncGenerator[Run]:
        bus = bus_with(handlers)

        async def run(times: int) -> float:
            event = Ordered()
            async with bus.context() as context:
                for _ in range(times):
                    context.publish(event)
                begun = clock()
                await context.drain()
                return clock() - begun

        yield run
        check(bus)

    return Contender(DRAIN, bus_of, batch=unit)


def dispatched(handlers: Sequence[Handler]) -> Contender:
    @asynccontextmanager
    async def bus_of() -> AsyncGenerator[Run]:
        bus = bus_with(handlers)
        yield awaited(bus.dispatch)
        check(bus)

    return Contender(DISPATCH, bus_of)


def bus_with(handlers: Sequence[Handler]) -> EventBus:
    """A bus as it comes, with these handlers."""
    bus = EventBus()
    for handler in handlers:
        bus.subscribe(Ordered, handler)
    return bus


def check(bus: EventBus) -> None:
    """What fails may be fast, and is no result."""
    stats = bus.stats
    assert stats.handled == stats.accepted, stats


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """The goals, which are asyncio's."""
    for found in comparisons:
        loop, waits, size = (found.case[key] for key in ("loop", "waiting", "handlers"))
        goal = GOALS.get((str(waits), int(size)))
        if loop in ASYNCIO and goal is not None:
            who, to, limit, stretch = goal
            name = f"{loop}, {described(int(size), str(waits))}: {who} / {to}"
            yield Verdict(name, found.ratio(who, to).median, limit, stretch)


def described(handlers: int, waits: str) -> str:
    """In words."""
    if handlers == 1:
        return "1 handler that does not wait" if waits == NONE else "1 handler that waits 2 ms"
    return f"{handlers} handlers, {waits}"


def tables(results: Results) -> str:
    """Per event loop: microseconds of what waits, ratios of the rest."""
    parts = [
        table(["library", "the handlers of one event"], [[p.name, p.note] for p in PEERS], text=2)
    ]
    for loop in dict.fromkeys(figure.case["loop"] for figure in results.figures):
        for waits, what, cell in (
            (EACH, "microseconds of CPU time per event", microseconds),
            (NONE, "times the first row", ratio),
        ):
            case: Case = {"loop": loop, "waiting": waits}
            if any(case.items() <= figure.case.items() for figure in results.figures):
                cells = grid(results, case, "handlers", cell)
                parts.append(f"**{loop}, {waits}**, {what}, by number of handlers\n\n{cells}")
    return "\n\n".join(parts)


def plots(results: Results) -> dict[str, str]:
    """Three handlers that wait, and the case that the other libraries take part in."""
    loop = results.figures[0].case["loop"]
    waiting = _panel(results.figures, {"loop": loop, "waiting": EACH, "handlers": 3})
    busy = _panel(results.figures, {"loop": loop, "waiting": NONE, "handlers": 10})
    return {"dispatch.svg": drawing([panel for panel in (waiting, busy) if panel.bars])}


def _panel(figures: Sequence[Figure], case: Case) -> Panel:
    bars = [
        Bar(figure.contender, figure.value, f"{number(figure.value.median / 1e3)} µs")
        for figure in figures
        if figure.case == case and figure.value is not None
    ]
    what = described(int(case["handlers"]), str(case["waiting"]))
    ordered = sorted(bars, key=lambda bar: bar.values.median)
    return Panel(f"{what}: CPU time per event", ordered, logarithmic=case["waiting"] == NONE)
