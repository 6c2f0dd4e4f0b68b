"""Durable deliveries: what they add to a transaction, how soon they run, and how many per second.

A transaction waits for the disk or for the server, so the clock is the wall's, unless a case says
otherwise. Contenders take turns, each with tables of its own.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskStatus
from sqlalchemy import Connection
from sqlalchemy.orm import Session
from starlette.types import Receive, Scope, Send

from benchmarks.asgi import REQUEST, receive, send, serving
from benchmarks.durable import (
    EVENT_TYPE,
    IN_MEMORY,
    PLACES,
    PSYCOPG,
    SQLITE,
    TABLE,
    Database,
    Insert,
    OrderPlaced,
    database,
    empty,
    handler_name,
    outbox_of,
    placed,
    session_that_inserts,
    subscribe,
)
from benchmarks.harness import (
    FINE_SLACK,
    Case,
    Comparison,
    Contender,
    Effort,
    Figure,
    Results,
    Run,
    Spread,
    Verdict,
    compare,
    on_loop,
)
from benchmarks.load import ROOT
from benchmarks.peers import Latch
from benchmarks.queues import AT_ONCE, Package
from benchmarks.queues import PACKAGES as QUEUES
from benchmarks.report import grid, microseconds, milliseconds, number, spread
from eventkit import EventBus
from eventkit.outbox._store import Known, Store
from eventkit.sqlalchemy import deliver_on_commit
from eventkit.starlette import EventContextMiddleware

PACKAGES = (
    "anyio",
    "sqlalchemy",
    "psycopg",
    "asyncpg",
    "pydantic",
    *(package.name for package in QUEUES),
)

TRANSACTION = "a transaction"
BESIDE = "an event without durable handlers"
START = "from the commit to the handler"
BACKLOG = "a backlog"
CLAIM = "a claim of 100 rows"
RECOVERY = "after a SIGKILL"

PLAIN = "plain"
BARE = "plain, and the bare INSERT"
MEMORY = "eventkit, handlers in memory"
DURABLE = "eventkit, durable handlers"

OUTSIDE, INSIDE = "outside of a transaction", "in a transaction"
UNTIED = "eventkit, no database"
TIED = "eventkit, deliver_on_commit"
KEPT = "eventkit, Outbox"

RAW = "bare claim and DELETE, 100 rows at once"
RELAY = "eventkit, relay"

FEW, MANY = "10,000 rows wait", "1,000,000 rows wait"
LESS_MANY = "100,000 rows wait"

APPLICATION = "eventkit, an application"
PROCESS = "eventkit, a relay process"
LEASE = 3.0

WALL, CPU = "wall clock", "CPU time"
CLOCKS: dict[str, Callable[[], int]] = {
    WALL: time.perf_counter_ns,
    CPU: time.process_time_ns,
}

ROW = 8  # transactions, one right after the other
ROWS = (1, 3, 10)
GOAL_OF_TRANSACTION = 1.10  # to the plain one with the bare INSERT
GOAL_BESIDE = 1.0  # microsecond
GOAL_OF_START = 0.3  # milliseconds
GOAL_OF_RELAY = 0.24  # of the rows per second that bare statements make
GOAL_OF_CLAIM = 2.0


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure one after the other; the million rows last, which disturb others for a while."""
    yield from _transactions(effort)
    yield from _beside(effort)
    yield from _starts(effort)
    yield from _backlogs(effort)
    yield from _recoveries(effort)
    yield from _claims(effort)


# A transaction


def _transactions(effort: Effort) -> Iterator[Comparison]:
    longer = replace(effort, seconds=2.5 * effort.seconds)
    for clock in CLOCKS:
        for place in (SQLITE,) if effort.scale == "smallest" else PLACES:
            for rows in (3,) if effort.scale == "smallest" or clock == CPU else ROWS:
                yield on_loop("asyncio", partial(_transaction, place, clock, rows, longer))


async def _transaction(place: str, clock: str, rows: int, effort: Effort) -> Comparison:
    contenders = [
        Contender(name, partial(own_transactions, place, clock, rows, name))
        for name in (PLAIN, BARE, MEMORY, DURABLE)
    ]
    absent: dict[str, str] = {}
    for package in QUEUES:
        if place != package.place:
            continue
        if package.missing:
            absent[package.name] = package.missing
        else:
            opening = partial(transactions_with, package, clock, rows)
            contenders.append(Contender(package.name, opening))
    case: Case = {"measured": TRANSACTION, "database": place, "clock": clock, "rows": rows}
    return await compare(case, contenders, effort, absent)


@asynccontextmanager
async def own_transactions(
    place: str, clock: str, rows: int, contender: str
) -> AsyncGenerator[Run]:
    """Transactions that insert an order, and say so to so many handlers, or write their rows.

    They come in rows of eight, one right after the other, each in a unit of work of its own. Then
    the handlers of the row are run, and what was written is deleted.
    """
    bus, now = EventBus(), CLOCKS[clock]
    handlers = [_nothing_to_do() for _ in range(rows)]
    subscribe(bus, handlers, durable=contender == DURABLE)
    async with database(place) as opened, AsyncExitStack() as stack:
        kind: type[Session] = Session
        if contender == BARE:
            kind = session_that_inserts(Insert(opened, rows, leased=True))
        elif contender == MEMORY:
            stack.enter_context(deliver_on_commit(bus, opened.engine))
        elif contender == DURABLE:
            stack.enter_context(outbox_of(bus, opened))
        transact = opened.transactions(kind)
        publish: Callable[[], object] = _nothing
        if contender in (MEMORY, DURABLE):
            publish = partial(bus.publish, placed())

        async def unit(over: anyio.Event, *, task_status: TaskStatus[int]) -> None:
            async with bus.context():  # which runs the handlers in the end
                begun = now()
                await transact(publish, None)
                task_status.started(now() - begun)
                await over.wait()

        async def run(times: int) -> float:
            took, row = 0.0, min(ROW, times)
            rows = -(-times // row)
            for _ in range(rows):
                over = anyio.Event()
                async with anyio.create_task_group() as tasks:
                    for _ in range(row):
                        took += await tasks.start(unit, over)
                    over.set()
                if contender == BARE:
                    await opened.call(empty)
            return took * times / (rows * row)

        yield run


@asynccontextmanager
async def transactions_with(package: Package, clock: str, rows: int) -> AsyncGenerator[Run]:
    """The same transactions, in which another package writes as many rows."""
    now = CLOCKS[clock]
    async with database(package.place) as opened, package.open(opened, _nothing) as queue:
        transact = opened.transactions(Session)

        async def add(session: Any) -> None:
            await queue.add(session, rows)

        async def run(times: int) -> float:
            begun = now()
            for _ in range(times):
                await transact(_nothing, add)
            return now() - begun

        yield run


def _nothing() -> None:
    pass


def _nothing_to_do() -> Callable[[OrderPlaced], Any]:
    async def handle(event: OrderPlaced) -> None: ...

    return handle


# An event without durable handlers


def _beside(effort: Effort) -> Iterator[Comparison]:
    longer = replace(effort, rounds=4 * effort.rounds)
    for where in (OUTSIDE, INSIDE):
        yield on_loop("asyncio", partial(_event_beside, where, longer))


async def _event_beside(where: str, effort: Effort) -> Comparison:
    names = (UNTIED, TIED, KEPT)
    contenders = [Contender(name, partial(events_beside, where, name)) for name in names]
    return await compare({"measured": BESIDE, "where": where}, contenders, effort)


@asynccontextmanager
async def events_beside(where: str, contender: str) -> AsyncGenerator[Run]:
    """Units of work with one event, whose handler is not durable; CPU time."""
    bus, now, event = EventBus(), CLOCKS[CPU], placed()
    subscribe(bus, [_nothing_to_do()], durable=False)
    async with database(IN_MEMORY) as opened, AsyncExitStack() as stack:
        if contender == TIED:
            stack.enter_context(deliver_on_commit(bus, opened.engine))
        elif contender == KEPT:
            stack.enter_context(outbox_of(bus, opened))
        transact = opened.transactions(Session)

        async def run(times: int) -> float:
            begun = now()
            for _ in range(times):
                async with bus.context():
                    bus.publish(event)
            return now() - begun

        async def run_in_transactions(times: int) -> float:
            begun = now()
            for _ in range(times):
                async with bus.context():
                    await transact(partial(bus.publish, event), None)
            return now() - begun

        yield run if where == OUTSIDE else run_in_transactions


# From the commit to the handler


def _starts(effort: Effort) -> Iterator[Comparison]:
    for place in (SQLITE,) if effort.scale == "smallest" else PLACES:
        for percentile in (50, 99):
            yield on_loop("asyncio", partial(_start, place, percentile, effort))


async def _start(place: str, percentile: int, effort: Effort) -> Comparison:
    """One request after the other, and of some of them the percentile."""
    requests = {"smallest": 4, "quick": 100, "full": 200}[effort.scale]
    case: Case = {"measured": START, "database": place, "percentile": f"p{percentile}"}
    contenders = [
        Contender(name, partial(requests_of, place, name, percentile, requests), batch=1)
        for name in (MEMORY, DURABLE)
    ]
    return await compare(case, contenders, replace(effort.fewer(5), seconds=1e-9))


@asynccontextmanager
async def requests_of(
    place: str, contender: str, percentile: int, requests: int
) -> AsyncGenerator[Run]:
    """Requests whose one event has a handler, which runs behind the response."""
    bus, latch = EventBus(), Latch(1)
    committed = started = 0

    async def handle(event: OrderPlaced) -> None:
        nonlocal started
        started = time.perf_counter_ns()
        latch.arrive()

    async with database(place) as opened, AsyncExitStack() as stack:
        subscribe(bus, [handle], durable=contender == DURABLE)
        if contender == DURABLE:
            stack.enter_context(outbox_of(bus, opened))
        else:
            stack.enter_context(deliver_on_commit(bus, opened.engine))
        transact, event = opened.transactions(Session), placed()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal committed
            await transact(partial(bus.publish, event), None)
            committed = time.perf_counter_ns()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ordered"})

        wrapped = EventContextMiddleware(_with_lifespan(app), bus)

        async def run(times: int) -> float:
            delays: list[float] = []
            for _ in range(requests):
                latch.expect()
                await wrapped(dict(REQUEST), receive, send)
                await latch.opened()
                delays.append(started - committed)
            return statistics.quantiles(delays, n=100)[percentile - 1] * times

        async with serving(wrapped):
            await run(1)
            yield run


def _with_lifespan(app: Any) -> Any:
    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    return served


# A backlog


def _backlogs(effort: Effort) -> Iterator[Comparison]:
    for place in (SQLITE,) if effort.scale == "smallest" else PLACES:
        yield on_loop("asyncio", partial(_backlog, place, effort))


async def _backlog(place: str, effort: Effort) -> Comparison:
    rows = {"smallest": 20, "quick": 1000, "full": 4000}[effort.scale]
    contenders = [
        Contender(RAW, partial(bare_backlog, place), rows),
        Contender(RELAY, partial(relayed_backlog, place), rows),
    ]
    absent: dict[str, str] = {}
    for package in QUEUES:
        if place == package.place and package.missing:
            absent[package.name] = package.missing
        elif place == package.place:
            opening = partial(backlog_of, package)
            contenders.append(Contender(package.name, opening, rows // 8))
    case: Case = {"measured": BACKLOG, "database": place}
    return await compare(case, contenders, effort.fewer(5), absent)


@asynccontextmanager
async def bare_backlog(place: str) -> AsyncGenerator[Run]:
    """Two statements and two transactions per hundred rows, which nothing is done with."""
    async with database(place) as opened:
        fill = partial(_fill, Insert(opened, 1, leased=False))
        claim, delete = bare_statements(opened)

        async def run(times: int) -> float:
            await opened.call(partial(fill, rows=times))
            begun = time.perf_counter_ns()
            while ids := await opened.call(claim):
                await opened.call(partial(delete, ids=ids))
            return time.perf_counter_ns() - begun

        yield run


def bare_statements(
    opened: Database,
) -> tuple[Callable[[Connection], list[Any]], Callable[..., None]]:
    """A claim of a hundred rows, as plain as it can be, and their deletion."""
    is_sqlite = opened.schema is None
    skip = "" if is_sqlite else " for update skip locked"
    claim_text = (
        f"update {TABLE} set state = 1, attempt = 1, owner = 'a process' where id in (select id"
        f" from {TABLE} where state in (0, 3, 4) order by due_at limit 100{skip}) returning *"
    )

    def claim(connection: Connection) -> list[Any]:
        return [row[0] for row in connection.exec_driver_sql(claim_text)]

    def delete(connection: Connection, ids: list[Any]) -> None:
        if is_sqlite:
            marks = ", ".join("?" * len(ids))
            connection.exec_driver_sql(f"delete from {TABLE} where id in ({marks})", tuple(ids))
        elif opened.url.drivername.endswith("asyncpg"):
            connection.exec_driver_sql(f"delete from {TABLE} where id = any($1)", (ids,))
        else:
            connection.exec_driver_sql(f"delete from {TABLE} where id = any(%s)", (ids,))

    return claim, delete


def _fill(insert: Insert, connection: Connection, rows: int) -> None:
    for _ in range(rows):
        insert(connection)


@asynccontextmanager
async def relayed_backlog(place: str) -> AsyncGenerator[Run]:
    """A relay that runs already, and a handler with nothing to do."""
    bus, latch = EventBus(), Latch(0)

    async def handle(event: OrderPlaced) -> None:
        latch.arrive()

    subscribe(bus, [handle], durable=True)
    async with database(place) as opened:
        fill = partial(_fill, Insert(opened, 1, leased=False))
        with outbox_of(bus, opened, concurrency=AT_ONCE) as outbox:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(outbox.run)

                async def run(times: int) -> float:
                    latch.expect(times)
                    await opened.call(partial(fill, rows=times))
                    begun = time.perf_counter_ns()
                    await outbox.retry([])  # it looks into the table then
                    await latch.opened()
                    await outbox.settle()
                    return time.perf_counter_ns() - begun

                yield run
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def backlog_of(package: Package) -> AsyncGenerator[Run]:
    """Another package's worker, which runs already; over when the last handler has ended."""
    latch = Latch(0)
    async with (
        database(package.place) as opened,
        package.open(opened, latch.arrive) as queue,
        queue.working(),
    ):

        async def run(times: int) -> float:
            latch.expect(times)
            await queue.fill(times)
            begun = time.perf_counter_ns()
            await latch.opened()
            return time.perf_counter_ns() - begun

        yield run


# After a SIGKILL


def _recoveries(effort: Effort) -> Iterator[Comparison]:
    for place in (SQLITE,) if effort.scale == "smallest" else (SQLITE, PSYCOPG):
        yield on_loop("asyncio", partial(_recovery, place, effort))


async def _recovery(place: str, effort: Effort) -> Comparison:
    """Kill a process while its handler runs, and wait for another one to run it; some times."""
    kills = {"smallest": 1, "quick": 1, "full": 4}[effort.scale]
    lease = 1.5 if effort.scale == "smallest" else LEASE
    roles = {APPLICATION: "application", PROCESS: "relay"}
    rounds: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    for name, role in [*roles.items()][effort.scale == "smallest" :]:
        try:
            async with database(place) as opened:
                rounds[name] = _kill(opened, lease, role, kills)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    case: Case = {"measured": RECOVERY, "database": place, "lease": f"{lease:g} s"}
    return Comparison(case, rounds, absent)


def _kill(opened: Database, lease: float, role: str, times: int) -> list[float]:
    draw = random.Random(0)
    took: list[float] = []
    with _process(opened, lease, role) as rescuer:
        time.sleep(2 * lease)  # only one that was alive for a lease may say that others are dead
        for _ in range(times):
            with _process(opened, lease, "victim") as victim:
                _line(victim)
                time.sleep(draw.uniform(0, lease))
                victim.kill()
                begun = time.perf_counter_ns()
                _line(rescuer)
                took.append(time.perf_counter_ns() - begun)
    return took


@contextmanager
def _process(opened: Database, lease: float, role: str) -> Generator[subprocess.Popen[str]]:
    """One that is ready; it is killed in the end."""
    url = opened.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.killed", url, opened.schema or "", str(lease), role],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        _line(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen[str]) -> None:
    """Wait until it says something."""
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError("the process has ended")


# A claim


def _claims(effort: Effort) -> Iterator[Comparison]:
    for place in (SQLITE,) if effort.scale == "smallest" else (SQLITE, PSYCOPG):
        found = on_loop("asyncio", partial(_claim, place, effort))
        for percentile in (50, 99):
            rounds = {name: [_percentile(v, percentile)] for name, v in found.rounds.items()}
            yield Comparison(found.case | {"percentile": f"p{percentile}"}, rounds, found.absent)


async def _claim(place: str, effort: Effort) -> Comparison:
    name, rows = (MANY, 1_000_000) if effort.scale == "full" else (LESS_MANY, 100_000)
    few = 10_000
    if effort.scale == "smallest":
        few, rows = 200, 400
    contenders = [
        Contender(f"eventkit, {FEW}", partial(claims, place, few), 1),
        Contender(f"eventkit, {name}", partial(claims, place, rows), 1),
    ]
    often = replace(effort, rounds=20 * effort.rounds, seconds=1e-9)
    return await compare({"measured": CLAIM, "database": place}, contenders, often)


def _percentile(values: Sequence[float], percentile: int) -> float:
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100)[percentile - 1]


@asynccontextmanager
async def claims(place: str, rows: int) -> AsyncGenerator[Run]:
    """Claims alone; what was claimed is deleted afterwards, and as many rows are added."""
    known = Known((handler_name(0),), (EVENT_TYPE,))
    async with database(place) as opened:
        store = Store(opened.sync_engine.dialect, opened.schema)
        await opened.call(partial(_flood, rows=rows))
        await opened.call(lambda connection: connection.exec_driver_sql(f"analyze {TABLE}"))
        fill = partial(_fill, Insert(opened, 1, leased=False))
        claim = partial(store.claim, owner="a process", known=known, limit=100)

        async def run(times: int) -> float:
            took = 0.0
            for _ in range(times):
                begun = time.perf_counter_ns()
                claimed = await opened.call(claim)
                took += time.perf_counter_ns() - begun
                done = [(each.id, each.attempt) for each in claimed]
                await opened.call(partial(store.complete, owner="a process", done=done))
                await opened.call(partial(fill, rows=len(done)))
            return took

        yield run


def _flood(connection: Connection, rows: int) -> None:
    """So many rows that are due, the older ones first."""
    if connection.dialect.name == "sqlite":
        series = "with recursive s(n) as (select 1 union all select n + 1 from s where n < {0})"
        id_, source = "lower(hex(randomblob(16)))", "s"
    else:
        series, id_, source = "", "gen_random_uuid()", "generate_series(1, {0}) as s(n)"
    connection.exec_driver_sql(
        f"insert into {TABLE} (id, event_id, event_type, handler, position, payload, depth,"
        f" published_at, state, attempt, due_at) {series.format(rows)} select {id_}, {id_},"
        f" '{EVENT_TYPE}', '{handler_name(0)}', 0, '{{}}', 0, 1.7e9, 0, 0, 1.7e9 + n"
        f" from {source.format(rows)}"
    )


# What was found


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """All but the recovery, which is told and not judged: the lease decides it."""
    for found in comparisons:
        measured = str(found.case["measured"])
        where = ", ".join(str(value) for value in [*found.case.values()][1:])
        if measured == TRANSACTION and found.case["clock"] == WALL:
            if {BARE, DURABLE} <= found.rounds.keys():
                place, rows = found.case["database"], found.case["rows"]
                name = f"{place}, {rows} rows: {DURABLE} / {BARE}"
                ratio = found.ratio(DURABLE, BARE).median
                yield Verdict(name, ratio, GOAL_OF_TRANSACTION, slack=FINE_SLACK)
        elif measured == BESIDE and where == OUTSIDE:
            added = statistics.median(
                (kept - tied) / 1000
                for tied, kept in zip(found.rounds[TIED], found.rounds[KEPT], strict=True)
            )
            name = f"{measured}, {where}: what {KEPT} adds to {TIED}, in microseconds"
            yield Verdict(name, added, GOAL_BESIDE)
        elif measured == START and found.case["percentile"] == "p50" and DURABLE in found.rounds:
            delay = Spread.of(found.rounds[DURABLE]).median / 1e6
            yield Verdict(f"{measured}, {where}, milliseconds", delay, GOAL_OF_START)
        elif measured == BACKLOG and {RAW, RELAY} <= found.rounds.keys():
            name = f"{measured}, {where}: {RELAY} / {RAW}, time per row"
            yield Verdict(name, found.ratio(RELAY, RAW).median, 1 / GOAL_OF_RELAY)
        elif measured == CLAIM and found.case["percentile"] == "p99" and len(found.rounds) == 2:
            few, many = found.rounds
            yield Verdict(
                f"{measured}, {where}: {many} / {few}", found.ratio(many).median, GOAL_OF_CLAIM
            )


def tables(results: Results) -> str:
    """A table per thing that was measured, and per place where there are several columns."""
    parts: list[str] = []
    for clock in CLOCKS:
        for place in PLACES:
            case: Case = {"measured": TRANSACTION, "database": place, "clock": clock}
            if any(case.items() <= figure.case.items() for figure in results.figures):
                parts += [
                    f"**A transaction with one INSERT, {place}**, microseconds of {clock}, by "
                    "rows that it writes beside",
                    grid(results, case, "rows", microseconds),
                ]
    for measured, across, title, cell in (
        (BESIDE, "where", "microseconds of CPU time per unit of work", microseconds),
        (BACKLOG, "database", "rows per second", _per_second),
    ):
        parts += [
            f"**{measured.capitalize()}**, {title}",
            grid(results, {"measured": measured}, across, cell),
        ]
    for measured, title in ((START, "milliseconds"), (CLAIM, "milliseconds")):
        for percentile in ("p50", "p99"):
            parts += [
                f"**{measured.capitalize()}**, {title}, {percentile}",
                grid(
                    results,
                    {"measured": measured, "percentile": percentile},
                    "database",
                    milliseconds,
                ),
            ]
    leases = [f.case["lease"] for f in results.figures if f.case["measured"] == RECOVERY]
    parts += [
        f"**{RECOVERY[0].upper()}{RECOVERY[1:]}**, seconds until another process begins the "
        f"handler; the lease is {leases[0]}",
        grid(results, {"measured": RECOVERY}, "database", _seconds),
    ]
    return "\n\n".join(parts)


def _per_second(figure: Figure) -> str:
    return "" if figure.value is None else number(1e9 / figure.value.median)


def _seconds(figure: Figure) -> str:
    return "" if figure.value is None else spread(figure.value, 1e-9)


def plots(results: Results) -> dict[str, str]:
    """The tables say it."""
    return {}
