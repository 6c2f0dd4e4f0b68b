"""Saying that something happened: what `publish` costs the code that calls it."""

from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from benchmarks.harness import (
    Comparison,
    Contender,
    Effort,
    Results,
    Run,
    Verdict,
    clock,
    compare,
    installed,
    on_loop,
    ready,
)
from benchmarks.peers import Ordered, load
from benchmarks.report import Bar, Panel, drawing, grid, nanoseconds, number
from eventkit import EventBus, EventContext

PACKAGES = ("anyio", "fastapi-events")

FLOOR = "deque.append"
BUS = "eventkit, bus.publish"
CONTEXT = "eventkit, context.publish"
NOBODY = "eventkit, bus.publish, no handler"
PEER = "fastapi-events, dispatch"

# Events per unit of work: the most that a bus takes as it comes.
UNIT = 1000


async def handle(event: Ordered) -> None:
    """The one handler."""


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure the one case."""
    yield on_loop("asyncio", partial(_publish, effort))


async def _publish(effort: Effort) -> Comparison:
    contenders = [
        ready(FLOOR, appended, batch=UNIT),
        ready(BUS, published(by_bus=True, handlers=1), batch=UNIT),
        ready(CONTEXT, published(by_bus=False, handlers=1), batch=UNIT),
        ready(NOBODY, published(by_bus=True, handlers=0), batch=UNIT),
    ]
    if installed("fastapi-events"):
        return await compare(
            {"handlers": 1}, [*contenders, Contender(PEER, fastapi_events, UNIT)], effort
        )
    return await compare({"handlers": 1}, contenders, effort, {PEER: "not installed"})


async def appended(times: int) -> float:
    """What a list of things to do costs, without any promise."""
    queue: deque[object] = deque()
    event = Ordered()
    begun = clock()
    for _ in range(times):
        queue.append(event)
    return clock() - begun


def published(*, by_bus: bool, handlers: int) -> Run:
    """In an open unit of work, which is discarded outside the clock."""
    bus = EventBus()
    if handlers:
        bus.subscribe(Ordered, handle)

    async def run(times: int) -> float:
        event = Ordered()
        async with bus.context() as context:
            publisher: EventBus | EventContext = bus if by_bus else context
            begun = clock()
            for _ in range(times):
                publisher.publish(event)
            took = clock() - begun
            context.discard()
        return took

    return run


@asynccontextmanager
async def fastapi_events() -> AsyncGenerator[Run]:
    """In a request, as its middleware sees one; the handlers run outside the clock."""
    dispatch: Any = load("fastapi_events.dispatcher").dispatch
    local: Any = load("fastapi_events.handlers.local").LocalHandler()
    middleware: Any = load("fastapi_events.middleware").EventHandlerASGIMiddleware

    async def ignore(event: object) -> None:
        pass

    local.register(ignore, event_name="ordered")
    took = 0.0

    async def app(scope: dict[str, Any], receive: object, send: object) -> None:
        nonlocal took
        payload = {"number": 1}
        begun = clock()
        for _ in range(scope["times"]):
            dispatch("ordered", payload)
        took = clock() - begun

    request = middleware(app, handlers=[local])

    async def run(times: int) -> float:
        await request({"type": "http", "times": times}, None, None)
        return took

    yield run


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """Against both ends."""
    for found in comparisons:
        yield Verdict(f"{BUS} / {FLOOR}", found.ratio(BUS).median, 40)
        if PEER in found.rounds:
            yield Verdict(f"{BUS} / {PEER}", found.ratio(BUS, PEER).median, 1 / 20)


def tables(results: Results) -> str:
    """Nanoseconds."""
    return f"Nanoseconds per event\n\n{grid(results, {}, 'handlers', nanoseconds)}"


def plots(results: Results) -> dict[str, str]:
    """All of them."""
    bars = [
        Bar(figure.contender, figure.value, f"{number(figure.value.median)} ns")
        for figure in results.figures
        if figure.value is not None
    ]
    return {
        "publish.svg": drawing([Panel("Publish: nanoseconds per event", bars, logarithmic=True)])
    }
