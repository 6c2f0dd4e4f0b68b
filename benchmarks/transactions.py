"""Measures what `deliver_on_commit` adds to a small transaction, with and without events.

Each transaction runs in a unit of work of its own, on an engine that is tied to the bus and on one
that is not, in turns. A transaction waits for the disk or for the server. That is a part of what it
takes, so the clock is the wall's. The same is measured again in CPU time, which leaves the waiting
out: its ratios are higher, and do not suffer from a noisy machine.

PostgreSQL is found through `EVENTKIT_POSTGRES_URL`.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from sqlalchemy import URL, create_engine, make_url, select, update
from sqlalchemy.event import listen
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks.harness import (
    FINE_SLACK,
    Case,
    Comparison,
    Contender,
    Effort,
    Results,
    Run,
    Verdict,
    compare,
    on_loop,
)
from benchmarks.report import grid, microseconds
from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit

PACKAGES = ("anyio", "sqlalchemy")

NOT_TIED = "an engine that is not tied"
LISTENED = "listeners that do nothing"
EVENTS = ("before_cursor_execute", "commit", "rollback", "handle_error")
TIED = "eventkit, deliver_on_commit"
GOALS = {0: 1.05, 1: 1.07}  # by number of events
STRETCH = 1.05

ON_DISK = "SQLite, a file"
IN_MEMORY = "SQLite in memory"
POSTGRES = "PostgreSQL"
PLACES = (ON_DISK, POSTGRES, IN_MEMORY)
POSTGRES_URL = "postgresql://postgres@127.0.0.1:5432/test"

STATEMENTS = 100
GOAL_OF_STATEMENT = 1.0  # microsecond

# What is timed: what a user waits for, and what the process itself has to do for it.
CLOCKS: dict[str, Callable[[], int]] = {
    "wall clock": time.perf_counter_ns,
    "CPU time": time.process_time_ns,
}


class Base(DeclarativeBase):
    """The one table."""


class Row(Base):
    """Something kept."""

    __tablename__ = "eventkit_benchmark_rows"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str]


numbers = count(1)


def insert(session: Session) -> None:
    session.add(Row(id=next(numbers), note="new"))


def change(session: Session) -> None:
    session.scalars(select(Row).where(Row.id == 0)).one().note = str(next(numbers))


def execute(session: Session) -> None:
    session.execute(update(Row).where(Row.id == 0).values(note=str(next(numbers))))


def do_nothing(*_: object) -> None:
    pass


def read(session: Session) -> None:
    for _ in range(STATEMENTS):
        session.execute(select(Row.note).where(Row.id == 0))


TRANSACTIONS: dict[str, Callable[[Session], None]] = {
    "INSERT": insert,
    "SELECT, then UPDATE": change,
    "UPDATE alone": execute,
}
MANY = {f"{STATEMENTS} times SELECT": read}


@asynccontextmanager
async def transactions(
    place: str, clock: str, kind: str, events: int, contender: str
) -> AsyncGenerator[Run]:
    """Transactions that each do this and publish so many events."""
    bus, work, now = EventBus(), (TRANSACTIONS | MANY)[kind], CLOCKS[clock]

    @bus.on(str)
    async def handle(event: str) -> None: ...

    with TemporaryDirectory() as folder:
        engine = create_engine(url_of(place, Path(folder)))
        sessions = sessionmaker(engine)
        if contender == TIED:
            deliver_on_commit(bus, engine)
        elif contender == LISTENED:
            for name in EVENTS:
                listen(engine, name, do_nothing)
        Base.metadata.drop_all(engine)  # of a run before this one
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.merge(Row(id=0, note="first"))
            session.commit()

        async def run(times: int) -> float:
            begun = now()
            for _ in range(times):
                async with bus.context():
                    with sessions.begin() as session:
                        work(session)
                        for _ in range(events):
                            bus.publish("kept")
            return now() - begun

        yield run
        Base.metadata.drop_all(engine)
        engine.dispose()


def url_of(place: str, folder: Path) -> str | URL:
    """Where the database of this place is."""
    if place == POSTGRES:
        url = make_url(os.environ.get("EVENTKIT_POSTGRES_URL", POSTGRES_URL))
        return url.set(drivername="postgresql+psycopg")
    return "sqlite://" if place == IN_MEMORY else f"sqlite:///{folder / 'test.db'}"


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure each kind of transaction, longer than others are: a few per cent are what counts."""
    longer = replace(effort, rounds=2 * effort.rounds, seconds=4 * effort.seconds)
    for place in PLACES:
        for clock in CLOCKS:
            for kind in TRANSACTIONS:
                for events in GOALS:
                    yield on_loop(
                        "asyncio", partial(_transaction, place, clock, kind, events, longer)
                    )
    for kind in MANY:
        yield on_loop("asyncio", partial(_transaction, IN_MEMORY, "CPU time", kind, 0, longer))


async def _transaction(
    place: str, clock: str, kind: str, events: int, effort: Effort
) -> Comparison:
    opening = partial(transactions, place, clock, kind, events)
    names = (LISTENED, NOT_TIED, TIED) if kind in MANY else (NOT_TIED, TIED)
    contenders = [Contender(name, partial(opening, name)) for name in names]
    case: Case = {"database": place, "clock": clock, "transaction": kind, "events": events}
    return await compare(case, contenders, effort)


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """Each kind of transaction, with and without an event."""
    for found in comparisons:
        place, clock, kind, events = found.case.values()
        if kind in MANY and TIED in found.rounds:
            pairs = zip(found.rounds[TIED], found.rounds[found.floor], strict=True)
            added = median((tied - plain) / STATEMENTS / 1000 for tied, plain in pairs)
            name = f"a statement, {place}: what eventkit adds to {found.floor}, in microseconds"
            yield Verdict(name, added, GOAL_OF_STATEMENT)
        if place == IN_MEMORY or clock != "wall clock" or TIED not in found.rounds:
            continue
        goal, stretch = GOALS[int(events)], STRETCH if events else None
        name = f"{place}, {kind}, N = {events}: {TIED} / {found.floor}"
        yield Verdict(name, found.ratio(TIED).median, goal, stretch, slack=FINE_SLACK)


def tables(results: Results) -> str:
    """Microseconds per transaction."""
    return "\n\n".join(
        f"**{kind}, {place}**, microseconds of {clock} each, by number of events\n\n"
        + grid(
            results,
            {"database": place, "clock": clock, "transaction": kind},
            "events",
            microseconds,
        )
        for place in PLACES
        for kind in TRANSACTIONS
        for clock in CLOCKS
    )


def plots(results: Results) -> dict[str, str]:
    """A few per cent need no drawing."""
    return {}
