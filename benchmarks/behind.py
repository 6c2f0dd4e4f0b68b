"""One request with one event, whose handlers run behind the response: CPU time in process.

No server is there: the ASGI app is called. Requests come in rows of eight, one right after the
other. Each says what has happened and is answered; then its handlers run, in the way of the
contender. A row is over when all its handlers have ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio
from anyio.lowlevel import checkpoint
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.asgi import REQUEST, receive, send, serving
from benchmarks.dispatch import EACH, NONE, SECONDS, check, described
from benchmarks.harness import (
    Comparison,
    Contender,
    Effort,
    Results,
    Run,
    Spread,
    Verdict,
    clock,
    compare,
    installed,
    loops,
    on_loop,
)
from benchmarks.peers import ASYNCIO, Handler, Latch, Ordered, load, on_trio
from benchmarks.report import Bar, Panel, drawing, grid, microseconds, number
from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware

PACKAGES = ("anyio", "starlette", "uvloop", "trio", "opentelemetry-api")

BARE = "no event, no handler"
AWAITED = "awaited one after the other"
NATIVE = "a native task per handler"
GROUP = "AnyIO task group"
OURS = "eventkit"
OBSERVED = "eventkit, observed"  # by OpenTelemetry, for which no SDK is set up

ROW = 8
# Units of work that are delivered at once: what the handlers wait for is then waited for at once.
CONCURRENCY = 64


@dataclass(frozen=True, slots=True)
class Work:
    """What a request has to have done.

    Attributes:
        handlers: How many its event has; none means that there is no event.
        waits: What each of them does.
    """

    handlers: int
    waits: str = NONE

    def __str__(self) -> str:
        return described(self.handlers, self.waits) if self.handlers else "no event"


CASES = (Work(3, EACH), Work(1, EACH), Work(3), Work(1), Work(0))

# The goal and the stretch, to the AnyIO task group.
GOALS = {
    str(Work(3, EACH)): (1.2, 1.0),
    str(Work(1, EACH)): (1.7, 1.5),
    str(Work(1)): (1.75, 1.4),
    str(Work(3)): (0.75, 0.6),
}
TRIO_GOALS = {str(Work(3, EACH)): (1.25, 1.0)}
# What the observer adds, in microseconds per delivery.
OBSERVED_GOAL = (5.0, 4.0)
# Without an event, in microseconds above the bare app.
NOTHING_GOAL = (3.0, 2.0)


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure each case on each event loop."""
    cases = (Work(3, EACH), Work(0)) if effort.scale == "smallest" else CASES
    for loop in loops():
        for work in cases:
            yield on_loop(loop, partial(_case, loop, work, effort))


async def _case(loop: str, work: Work, effort: Effort) -> Comparison:
    openings = {BARE: bare, OURS: with_eventkit}
    if work.handlers:
        openings = {
            BARE: bare,
            AWAITED: awaited,
            NATIVE: with_tasks,
            GROUP: with_group,
            OURS: with_eventkit,
            OBSERVED: with_observer,
        }
    absent: dict[str, str] = {}
    if OBSERVED in openings and not installed("opentelemetry-api"):
        del openings[OBSERVED]
        absent[OBSERVED] = "not installed"
    contenders = [Contender(name, partial(opened, work)) for name, opened in openings.items()]
    return await compare({"loop": loop, "request": str(work)}, contenders, effort, absent)


def called(app: ASGIApp, latch: Latch) -> Run:
    """Rows of requests, each waited for by the latch."""

    async def run(times: int) -> float:
        rows = -(-times // ROW)
        begun = clock()
        for _ in range(rows):
            latch.expect()
            for _ in range(ROW):
                await app(dict(REQUEST), receive, send)
            await latch.opened()
            await checkpoint()  # what comes after the last handler is a part of the cost
            await checkpoint()
        return (clock() - begun) * times / (rows * ROW)

    return run


def handlers_of(work: Work) -> tuple[list[Handler], Latch]:
    """The handlers, and the latch that they open when those of a row have all ended."""
    latch = Latch(ROW * work.handlers)
    return [_handler(work.waits == EACH, latch.arrive) for _ in range(work.handlers)], latch


def _handler(waits: bool, ended: Callable[[], None]) -> Handler:
    async def handle(event: object) -> None:
        if waits:
            await anyio.sleep(SECONDS)
        ended()

    return handle


def answering(tell: Callable[[], object]) -> ASGIApp:
    """An app that says what has happened, and answers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        tell()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ordered"})

    return app


def nothing() -> None:
    """What an app says to whom nothing has happened."""


async def one_by_one(handlers: Sequence[Handler], event: Ordered) -> None:
    """Await the handlers one after the other."""
    for handler in handlers:
        await handler(event)


async def at_once(handlers: Sequence[Handler], event: Ordered) -> None:
    """Await the handlers at the same time."""
    async with anyio.create_task_group() as tasks:
        for handler in handlers:
            tasks.start_soon(handler, event)


@asynccontextmanager
async def spawning() -> AsyncGenerator[Callable[..., object]]:
    """Start tasks of the event loop's own kind, in the way that its documentation shows."""
    if on_trio():
        import trio

        async with trio.open_nursery() as nursery:
            yield nursery.start_soon
        return
    tasks = set[asyncio.Task[None]]()

    def spawn(handler: Handler, event: object) -> None:
        task = asyncio.create_task(handler(event))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    yield spawn


@asynccontextmanager
async def bare(_: Work) -> AsyncGenerator[Run]:
    """The app that only answers."""
    yield called(answering(nothing), Latch(0))


@asynccontextmanager
async def awaited(work: Work) -> AsyncGenerator[Run]:
    """In the request's own task, after the response.

    A server has such a task for each request, so that those in a row wait at the same time. Here
    each request that waits is therefore given one.
    """
    handlers, latch = handlers_of(work)
    answered = answering(nothing)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answered(scope, receive, send)
        await one_by_one(handlers, Ordered())

    async with spawning() as spawn:
        waiting = answering(lambda: spawn(partial(one_by_one, handlers), Ordered()))
        yield called(waiting if work.waits == EACH else app, latch)


@asynccontextmanager
async def with_tasks(work: Work) -> AsyncGenerator[Run]:
    """A task per handler, and nobody who waits for the tasks of a request together."""
    handlers, latch = handlers_of(work)
    async with spawning() as spawn:

        def tell() -> None:
            event = Ordered()
            for handler in handlers:
                spawn(handler, event)

        yield called(answering(tell), latch)


@asynccontextmanager
async def with_group(work: Work) -> AsyncGenerator[Run]:
    """A task per request in a group of the app's; for several handlers the task opens a group."""
    handlers, latch = handlers_of(work)
    run_handlers = handlers[0] if len(handlers) == 1 else partial(at_once, handlers)
    async with anyio.create_task_group() as tasks:
        yield called(answering(lambda: tasks.start_soon(run_handlers, Ordered())), latch)


@asynccontextmanager
async def with_eventkit(work: Work) -> AsyncGenerator[Run]:
    """The middleware, with a lifespan that runs."""
    async with _on_a_bus(EventBus(), work) as run:
        yield run


@asynccontextmanager
async def with_observer(work: Work) -> AsyncGenerator[Run]:
    """The same, and the observer for OpenTelemetry, for which no SDK is set up."""
    bus = EventBus()
    load("eventkit.opentelemetry").instrument(bus)
    async with _on_a_bus(bus, work) as run:
        yield run


@asynccontextmanager
async def _on_a_bus(bus: EventBus, work: Work) -> AsyncGenerator[Run]:
    handlers, latch = handlers_of(work)
    for handler in handlers:
        bus.subscribe(Ordered, handler)
    app = answering((lambda: bus.publish(Ordered())) if handlers else nothing)
    wrapped = EventContextMiddleware(app, bus, concurrency=CONCURRENCY)
    async with serving(wrapped):
        yield called(wrapped, latch)
    check(bus)


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """What eventkit takes beside an AnyIO task group, and beside nothing where it does nothing."""
    for found in comparisons:
        loop, request = str(found.case["loop"]), str(found.case["request"])
        goals = GOALS if loop in ASYNCIO else TRIO_GOALS
        if request in goals:
            name = f"{loop}, {request}: {OURS} / {GROUP}"
            yield Verdict(name, found.ratio(OURS, GROUP).median, *goals[request])
        elif request == str(Work(0)) and loop in ASYNCIO:
            name = f"{loop}, {request}: what {OURS} adds, in microseconds"
            yield Verdict(name, added(found, OURS, BARE).median, *NOTHING_GOAL)
        if request == str(Work(1)) and loop in ASYNCIO and OBSERVED in found.rounds:
            name = f"{loop}, {request}: what the observer adds, in microseconds"
            yield Verdict(name, added(found, OBSERVED, OURS).median, *OBSERVED_GOAL)


def added(found: Comparison, contender: str, to: str) -> Spread:
    """Microseconds above another one."""
    rounds = zip(found.rounds[to], found.rounds[contender], strict=True)
    return Spread.of([(value - base) / 1e3 for base, value in rounds])


def tables(results: Results) -> str:
    """Per event loop."""
    return "\n\n".join(
        f"**{loop}**, microseconds of CPU time per request, by what its event has\n\n"
        + grid(results, {"loop": loop}, "request", microseconds)
        for loop in dict.fromkeys(figure.case["loop"] for figure in results.figures)
    )


def plots(results: Results) -> dict[str, str]:
    """A panel per case, on asyncio."""
    loop = results.figures[0].case["loop"]
    panels: list[Panel] = []
    for request in dict.fromkeys(figure.case["request"] for figure in results.figures):
        bars = [
            Bar(figure.contender, figure.value, f"{number(figure.value.median / 1e3)} µs")
            for figure in results.figures
            if figure.value is not None and figure.case == {"loop": loop, "request": request}
        ]
        panels.append(Panel(f"{request}: CPU time per request", bars))
    return {"behind.svg": drawing(panels)}
