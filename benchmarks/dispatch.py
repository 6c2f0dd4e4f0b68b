"""One event, several handlers: what running them costs beside the handlers themselves."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import aiosqlite
import anyio
from anyio import to_thread

from benchmarks.answering import MILLISECONDS, answering
from benchmarks.harness import (
    CLOCK,
    LOOPS,
    Case,
    Comparison,
    Contender,
    Effort,
    Results,
    Run,
    Verdict,
    clock,
    compare,
    missing_for,
    on_loop,
    ready,
)
from benchmarks.peers import ASYNCIO, PEERS, Handler, Ordered, awaited, load, on_trio
from benchmarks.report import Bar, Panel, drawing, grid, milliseconds, number, ratio, table
from eventkit import EventBus

PACKAGES = ("anyio", "trio", "uvloop", "aiosqlite", *(peer.name for peer in PEERS))

FLOOR = "for h in handlers: await h(event)"
ALONE = "one handler alone"
GATHER = "asyncio.gather"
TASK_GROUP = "asyncio.TaskGroup"
ANYIO = "AnyIO task group"
NOTHING = "a dictionary hit and a return"
DRAIN = "eventkit, drain"
DISPATCH = "eventkit, dispatch"

NONE = "none suspends"
ONE = "one suspends"
ALL = "all suspend once"
SOCKET = f"each asks a server that takes {MILLISECONDS} ms"
SQLITE = "each asks SQLite"
NOBODY = "no handler"
WAITING = (SOCKET, SQLITE)

# Limit and stretch, by number of handlers.
IN_A_DRAIN = {1: (12, 6), 10: (7, 5), 100: (6, 5)}

# Events per unit of work; fewer where each of them waits for something.
UNIT, WAITING_UNIT = 500, 10


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure all cases; those that wait first, because they are what users have."""
    sizes = {"smallest": (2,), "quick": (1, 3, 10), "full": (1, 3, 10, 100)}[effort.scale]
    with answering() as port:
        for loop in LOOPS:
            if reason := missing_for(loop):
                print(f"{loop} is left out: {reason}", flush=True)
                continue
            for waits in (SOCKET, SQLITE, NONE, ONE, ALL):
                if waits in WAITING and CLOCK != "wall":
                    continue
                for size in sizes:
                    if waits == ONE and size == 1:
                        continue  # the same as all
                    yield on_loop(loop, partial(_case, loop, waits, size, port, effort))
            yield on_loop(loop, partial(_nobody, loop, effort))


async def _case(loop: str, waits: str, size: int, port: int, effort: Effort) -> Comparison:
    few = waits in WAITING or effort.scale == "smallest"
    async with handlers_that(waits, size, port) as handlers:
        contenders = [
            ready(FLOOR, one_after_the_other(handlers)),
            *([ready(ALONE, one_after_the_other(handlers[:1]))] if waits in WAITING else []),
            *([ready(GATHER, gathered(handlers))] if loop in ASYNCIO else []),
            *([ready(TASK_GROUP, grouped_by_asyncio(handlers))] if loop in ASYNCIO else []),
            ready(ANYIO, grouped(handlers)),
            drained(handlers, WAITING_UNIT if few else UNIT),
            dispatched(handlers),
        ]
        return await _with_peers(
            {"loop": loop, "waiting": waits, "handlers": size},
            contenders,
            handlers,
            effort.fewer(3 if size > 10 else 5) if waits in WAITING else effort,
        )


async def _nobody(loop: str, effort: Effort) -> Comparison:
    """No handler at all."""
    plans: dict[type, object] = {}

    async def look_up(event: object) -> object:
        return plans.get(type(event))

    contenders = [ready(NOTHING, awaited(look_up)), dispatched([])]
    return await _with_peers(
        {"loop": loop, "waiting": NOBODY, "handlers": 0}, contenders, [], effort
    )


async def _with_peers(
    case: dict[str, str | int],
    contenders: Sequence[Contender],
    handlers: Sequence[Handler],
    effort: Effort,
) -> Comparison:
    missing = {peer.name: peer.missing(str(case["loop"])) for peer in PEERS}
    peers = [peer.contender(handlers) for peer in PEERS if not missing[peer.name]]
    absent = {name: reason for name, reason in missing.items() if reason}
    return await compare(case, [*contenders, *peers], effort, absent)


@asynccontextmanager
async def handlers_that(waits: str, size: int, port: int) -> AsyncGenerator[Sequence[Handler]]:
    """So many handlers that wait for something of their own."""

    def opened(number: int) -> AbstractAsyncContextManager[Handler]:
        if waits == SOCKET:
            return _asking(port)
        if waits == SQLITE:
            return _querying()
        # One that suspends stands in the middle, where neither end flatters anybody.
        suspends = waits == ALL or (waits == ONE and number == size // 2)
        return _suspending() if suspends else _busy()

    async with AsyncExitStack() as stack:
        handlers = [await stack.enter_async_context(opened(number)) for number in range(size)]
        for number, handler in enumerate(handlers):  # some libraries tell them apart by name
            assert isinstance(handler, FunctionType)
            handler.__name__ = handler.__qualname__ = f"handler_{number}"
        yield handlers


@asynccontextmanager
async def _busy() -> AsyncGenerator[Handler]:
    async def handle(event: object) -> None:
        pass

    yield handle


@asynccontextmanager
async def _suspending() -> AsyncGenerator[Handler]:
    """The cheapest that a loop has: AnyIO's checkpoint would hide what dispatch costs."""
    suspend: Callable[[], Any]
    suspend = load("trio").lowlevel.checkpoint if on_trio() else partial(asyncio.sleep, 0)

    async def handle(event: object) -> None:
        await suspend()

    yield handle


@asynccontextmanager
async def _asking(port: int) -> AsyncGenerator[Handler]:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:

        async def handle(event: object) -> None:
            await stream.send(b"?")
            await stream.receive(1)

        yield handle


@asynccontextmanager
async def _querying() -> AsyncGenerator[Handler]:
    """With aiosqlite and its thread per connection; on trio, where it does not run, without."""
    query = "SELECT name FROM users WHERE id = 500"
    with TemporaryDirectory() as folder:
        path = Path(folder, "users.db")
        with sqlite3.connect(path, check_same_thread=False) as plain:
            plain.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT)")
            plain.executemany("INSERT INTO users (name) VALUES (?)", [("Ada",)] * 1000)
            plain.commit()
        if on_trio():

            async def ask(event: object) -> None:
                await to_thread.run_sync(lambda: plain.execute(query).fetchall())

            yield ask
            plain.close()
            return
        plain.close()
        async with aiosqlite.connect(path) as connection:

            async def handle(event: object) -> None:
                await connection.execute_fetchall(query)

            yield handle


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


def grouped_by_asyncio(handlers: Sequence[Handler]) -> Run:
    async def run(times: int) -> float:
        event = Ordered()
        begun = clock()
        for _ in range(times):
            async with asyncio.TaskGroup() as tasks:
                for handler in handlers:
                    tasks.create_task(handler(event))
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
    """The goals, as far as they were measured."""
    for found in comparisons:
        loop, waits, size = (found.case[key] for key in ("loop", "waiting", "handlers"))
        goals = list(_goals(str(loop), str(waits), int(size)))
        for contender, to, limit, stretch in goals:
            if contender in found.rounds and to in found.rounds:
                yield Verdict(
                    f"{loop}, N = {size}, {waits}: {contender} / {to}",
                    found.ratio(contender, to).median,
                    limit,
                    stretch,
                )


def _goals(loop: str, waits: str, size: int) -> Iterator[tuple[str, str, float, float | None]]:
    """Who is held against whom, the limit, and a harder one."""
    if loop == "uvloop":
        return
    if waits == NONE and size in IN_A_DRAIN:
        more = 1.3 if loop == "trio" else 1
        limit, stretch = IN_A_DRAIN[size]
        yield DRAIN, FLOOR, limit * more, stretch * more
    if loop == "trio":
        return
    match waits, size:
        case "none suspends", 1:
            yield DISPATCH, FLOOR, 20, None
        case "none suspends", 10 | 100:
            yield DISPATCH, FLOOR, {10: 14, 100: 7}[size], None
            yield DRAIN, GATHER, 1 / 4, None
            yield DRAIN, ANYIO, 1 / 12, None
        case "one suspends", 10 | 100:
            yield DRAIN, GATHER, {10: 0.8, 100: 0.25}[size], None
        case "all suspend once", 1:
            yield DRAIN, FLOOR, 3, None
        case "all suspend once", _:
            yield DRAIN, ANYIO, 1.15, 0.7
        case "no handler", _:
            yield DISPATCH, NOTHING, 10, None
        case _ if waits == SOCKET and size == 3:
            yield DRAIN, ALONE, 1.15, None
            yield DISPATCH, ALONE, 1.15, None
        case _:
            pass


def tables(results: Results) -> str:
    """Per event loop and kind of handler: milliseconds of what waits, ratios of the rest."""
    parts = [_peers()]
    for loop in LOOPS:
        found = [_table(results, loop, waits) for waits in (SOCKET, SQLITE, NONE, ONE, ALL, NOBODY)]
        text = "\n\n".join(filter(None, found))
        if loop != "asyncio":
            text = f"<details>\n<summary>The same on {loop}</summary>\n\n{text}\n\n</details>"
        parts.append(text)
    return "\n\n".join(parts)


def _peers() -> str:
    rows = [[peer.name, peer.note] for peer in PEERS]
    return table(["library", "the handlers of one event"], rows, text=2)


def _table(results: Results, loop: str, waits: str) -> str:
    case: Case = {"loop": loop, "waiting": waits}
    if not any(case.items() <= figure.case.items() for figure in results.figures):
        return ""
    timed = waits in WAITING
    what = "ms per event" if timed else "times the floor"
    cells = grid(results, case, "handlers", milliseconds if timed else ratio)
    return f"**{loop}, {waits}**, {what}, by number of handlers\n\n{cells}"


def plots(results: Results) -> dict[str, str]:
    """The first row of the README, and what dispatch alone costs."""
    io: Case = {"loop": "asyncio", "waiting": SOCKET, "handlers": 3}
    busy: Case = {"loop": "asyncio", "waiting": NONE, "handlers": 10}
    first = _panel(
        results,
        io,
        f"Three handlers, each with a socket's round trip of {MILLISECONDS} ms: ms per event",
    )
    rest = _panel(results, busy, "Ten handlers, none suspends: times the floor", relative=True)
    return {"dispatch-waiting.svg": drawing([first]), "dispatch-busy.svg": drawing([rest])}


def _panel(results: Results, case: Case, title: str, *, relative: bool = False) -> Panel:
    bars: list[Bar] = []
    for figure in results.figures:
        if figure.case == case and figure.value is not None and figure.ratio is not None:
            values = figure.ratio if relative else figure.value
            text = number(values.median) + "x" if relative else number(values.median / 1e6)
            bars.append(Bar(figure.contender, values, text))
    return Panel(title, sorted(bars, key=lambda bar: bar.values.median), logarithmic=relative)
