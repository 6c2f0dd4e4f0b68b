"""Measures what background delivery leaves of SQLAlchemy's default pool to the requests.

A burst of requests publishes one event each, whose handlers hold a session each for a while; a few
clients meanwhile go on asking for something that needs a session too. Printed for each value of
`concurrency`: how many handlers and how many requests got no connection in time, how long
requests took, and how long the burst did.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from starlette.types import Receive, Scope, Send

from benchmarks.asgi import REQUEST, receive, send, serving
from eventkit import Delivery, EventBus
from eventkit.starlette import EventContextMiddleware

CONCURRENCIES = (1, 2, 4, 5, 8, 10, 15, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class Ordered:
    """What each request of the burst publishes."""


@dataclass(slots=True)
class Clients:
    """What became of the requests beside the burst."""

    latencies: list[float] = field(default_factory=list[float])
    timeouts: int = 0


async def use(engine: AsyncEngine, seconds: float) -> None:
    """Take a connection of the pool, and hold it for a while, as a query does."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await anyio.sleep(seconds)


async def burst(engine: AsyncEngine, concurrency: int, options: argparse.Namespace) -> str:
    """Run one burst; returns what is found as cells of a table."""
    bus = EventBus(handler_timeout=None)
    bus.report_failure = ignore
    for number in range(options.handlers):

        async def handle(_: Ordered) -> None:
            await use(engine, options.hold)

        bus.subscribe(Ordered, handle, name=f"handler {number}")

    async def publish(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        bus.publish(Ordered())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app = EventContextMiddleware(publish, bus, concurrency=concurrency)
    clients = Clients()
    took = 0.0
    async with serving(app), anyio.create_task_group() as tasks:
        for _ in range(options.clients):
            tasks.start_soon(partial(ask, engine, clients, seconds=options.query))
        await anyio.sleep(0.1)
        begun = time.perf_counter()
        for _ in range(options.units):
            await app(dict(REQUEST), receive, send)
        while bus.stats.units_waiting or bus.stats.units_draining:  # noqa: ASYNC110 - as a user can
            await anyio.sleep(0.01)
        took = time.perf_counter() - begun
        tasks.cancel_scope.cancel()
    p50 = statistics.median(clients.latencies) * 1000
    p99 = statistics.quantiles(clients.latencies, n=100)[98] * 1000
    return (
        f"{bus.stats.failed} of {bus.stats.accepted} | {clients.timeouts} | "
        f"{p50:.0f} | {p99:.0f} | {took:.1f}"
    )


async def ask(engine: AsyncEngine, clients: Clients, *, seconds: float) -> None:
    """Be one client: ask for something that needs a connection, again and again."""
    while True:
        begun = time.perf_counter()
        try:
            await use(engine, seconds)
        except PoolTimeout:
            clients.timeouts += 1
        clients.latencies.append(time.perf_counter() - begun)


def ignore(_: Delivery, error: Exception) -> None:
    """Failures are counted, and one in time is what is measured."""
    if not isinstance(error, PoolTimeout):
        raise error


async def measure(options: argparse.Namespace) -> None:
    """Print the table."""
    print(
        "| concurrency | handlers without a connection | requests without a connection "
        "| p50 of the requests, ms | p99, ms | time until all handlers have ended, s |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for concurrency in options.concurrency:
        with TemporaryDirectory() as folder:
            url = f"sqlite+aiosqlite:///{Path(folder, 'pool.db')}"
            engine = create_async_engine(url, pool_timeout=options.pool_timeout)
            try:
                cells = await burst(engine, concurrency, options)
            finally:
                await engine.dispose()
        print(f"| {concurrency} | {cells} |", flush=True)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=100, help="requests in the burst")
    parser.add_argument("--handlers", type=int, default=3, help="per event, with a session each")
    parser.add_argument("--hold", type=float, default=0.1, help="seconds, by each handler")
    parser.add_argument("--clients", type=int, default=3, help="that ask meanwhile")
    parser.add_argument("--query", type=float, default=0.01, help="seconds, by each of them")
    parser.add_argument("--pool-timeout", type=float, default=1.0, help="seconds")
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCIES)
    anyio.run(measure, parser.parse_args())


if __name__ == "__main__":
    main()
