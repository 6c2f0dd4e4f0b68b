"""A served request with one event: what the event adds to the CPU time of the server's process.

Each contender is a FastAPI app on a uvicorn of its own. This process is the client: it asks on 64
keep-alive connections, always one server at a time, with the same number of requests in each
round. A server's CPU time counts until all its handlers have ended. Servers listen on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import cast

import anyio

from benchmarks.dispatch import EACH, SECONDS, described
from benchmarks.harness import (
    LOOPS,
    Comparison,
    Effort,
    Figure,
    Results,
    Spread,
    Verdict,
    asyncio_loop,
    installed,
)
from benchmarks.load import REQUEST, length_of, server
from benchmarks.report import Bar, Panel, drawing, grid, microseconds, number

PACKAGES = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "anyio", "fastapi-events")

# As `benchmarks.loaded` knows them.
PLAIN = "a plain endpoint"
TASKS = "BackgroundTasks"
GROUP = "AnyIO task group"
PEER = "fastapi-events"
OURS = "eventkit, concurrency=64"

CONNECTIONS = 64
QUESTION = b"GET /cpu HTTP/1.1\r\nHost: load\r\n\r\n"

# The goal and the stretch, by the number of handlers: beside what another one adds.
GOALS = {1: (PEER, 0.4, 0.25), 3: (GROUP, 1.05, 0.9)}


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure with one handler, then with three."""
    backend, options = LOOPS[asyncio_loop()]
    for handlers in (3,) if effort.scale == "smallest" else GOALS:
        yield anyio.run(_case, handlers, effort, backend=backend, backend_options=options)


async def _case(handlers: int, effort: Effort) -> Comparison:
    """Start all servers, then load one after the other, in an order drawn anew in each round."""
    names = [PLAIN, TASKS, GROUP, *([PEER] if installed(PEER) else []), OURS]
    if effort.scale == "smallest":
        names = [PLAIN, GROUP, OURS]
    requests = {"smallest": 1, "quick": 10, "full": 30}[effort.scale] * CONNECTIONS
    absent = {} if installed(PEER) else {PEER: "not installed"}
    rounds: dict[str, list[float]] = {name: [] for name in names}
    draw = random.Random(0)
    with ExitStack() as stack:
        ports: dict[str, int] = {}
        for name in names:
            _, ports[name] = stack.enter_context(server(name, SECONDS, handlers))
        with modest():
            for port in ports.values():
                await cost_of(requests, port)  # it warms up
            for _ in range(2 * effort.rounds):
                for name in draw.sample(names, len(names)):
                    rounds[name].append(await cost_of(requests, ports[name]))
    return Comparison({"handlers": handlers}, rounds, absent)


@contextmanager
def modest() -> Generator[None]:
    """Have this process wait until the server has no more to do, where the system can do that.

    Each answer wakes the client. Where the two share a processor, the client would interrupt the
    server more than once per request.
    """
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


async def cost_of(requests: int, port: int) -> float:
    """What one of so many requests costs the server of this port, in nanoseconds."""
    async with connected(port) as connections:
        begun = await cpu_time(connections[0])
        async with asyncio.TaskGroup() as tasks:
            for connection in connections:
                tasks.create_task(connection.ask(REQUEST, requests // CONNECTIONS))
        return (await cpu_time(connections[0]) - begun) / requests


async def cpu_time(connection: Connection) -> int:
    """The server's CPU time so far, in nanoseconds, when all its handlers have ended."""
    return int(await connection.ask(QUESTION))


class Connection(asyncio.Protocol):
    """A keep-alive connection, which asks again as soon as it is answered.

    It costs the client much less than a request costs the server, so that the server is busy all
    the time. A server that waits for its client pays for falling asleep and for waking up.
    """

    def __init__(self) -> None:
        self._received = b""
        self._left = 0
        self._last = asyncio.Future[bytes]()
        self._question = b""

    async def ask(self, question: bytes, times: int = 1) -> bytes:
        """Ask so often; returns the body of the last answer."""
        self._question, self._left = question, times
        self._last = asyncio.Future[bytes]()
        self._transport.write(question)
        return await self._last

    def close(self) -> None:
        """Ask no more."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or len(body) < length_of(head):
            return
        self._received = b""
        self._left -= 1
        if not head.startswith(b"HTTP/1.1 200"):
            self._last.set_exception(RuntimeError(f"the server answered {head!r}"))
        elif self._left:
            self._transport.write(self._question)
        else:
            self._last.set_result(body)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._last.done():
            self._last.set_exception(exc or ConnectionError("the server closed the connection"))


@asynccontextmanager
async def connected(port: int) -> AsyncGenerator[list[Connection]]:
    """Connections to a server."""
    loop = asyncio.get_running_loop()
    opened: list[Connection] = []
    try:
        for _ in range(CONNECTIONS):
            _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
            opened.append(connection)
        yield opened
    finally:
        for connection in opened:
            connection.close()


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """What eventkit adds to a plain request, beside what another one adds."""
    for found in comparisons:
        handlers = int(found.case["handlers"])
        to, limit, stretch = GOALS[handlers]
        if to in found.rounds:
            name = f"{described(handlers, EACH)}: what {OURS}, adds / what {to} adds"
            yield Verdict(name, added(found, to).median, limit, stretch)


def added(found: Comparison, to: str) -> Spread:
    """How much of what another contender adds to a plain request eventkit adds to it."""
    rounds = zip(*(found.rounds[name] for name in (PLAIN, to, OURS)), strict=True)
    return Spread.of([(ours - plain) / (other - plain) for plain, other, ours in rounds])


def tables(results: Results) -> str:
    """A request as a whole, and what its event adds."""
    text = "microseconds of the server's CPU time per request, by number of handlers"
    above = partial(above_plain, results)
    return (
        f"**{EACH}**, {text}\n\n{grid(results, {}, 'handlers', microseconds)}\n\n"
        f"**{EACH}**, what the event adds to the plain request, {text}\n\n"
        f"{grid(results, {}, 'handlers', above)}"
    )


def above_plain(results: Results, figure: Figure) -> str:
    """Microseconds above the plain endpoint's median."""
    added = extra(results, figure)
    return "" if added is None or figure.contender == PLAIN else number(added)


def extra(results: Results, figure: Figure) -> float | None:
    """The same, as a number; None where there is nothing."""
    for other in results.figures:
        if (other.case, other.contender) == (figure.case, PLAIN) and other.value and figure.value:
            return (figure.value.median - other.value.median) / 1e3
    return None


def plots(results: Results) -> dict[str, str]:
    """A panel per number of handlers."""
    panels: list[Panel] = []
    for handlers in dict.fromkeys(int(figure.case["handlers"]) for figure in results.figures):
        bars = [
            Bar(figure.contender, Spread(added, added, added), f"+{number(added)} µs")
            for figure in results.figures
            if figure.case["handlers"] == handlers
            and figure.contender != PLAIN
            and (added := extra(results, figure)) is not None
        ]
        title = f"{described(handlers, EACH)}: CPU time added to a served request"
        panels.append(Panel(title, bars))
    return {"served.svg": drawing(panels)}
