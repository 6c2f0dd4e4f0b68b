"""Measures what `deliver_on_commit` adds to a small transaction on SQLite, with and without events.

Each transaction runs in a unit of work of its own, on an engine that is tied to the bus and on one
that is not, in turns. A transaction waits for the disk, and that is a part of
what it takes: the clock is the wall's, not the process's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import create_engine, select, update
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
TIED = "eventkit, deliver_on_commit"
GOAL = 1.05

ON_DISK = "a file"
IN_MEMORY = "in memory"


class Base(DeclarativeBase):
    """The one table."""


class Row(Base):
    """Something kept."""

    __tablename__ = "rows"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str]


numbers = count(1)


def insert(session: Session) -> None:
    session.add(Row(id=next(numbers), note="new"))


def change(session: Session) -> None:
    session.scalars(select(Row).where(Row.id == 0)).one().note = str(next(numbers))


def execute(session: Session) -> None:
    session.execute(update(Row).where(Row.id == 0).values(note=str(next(numbers))))


TRANSACTIONS: dict[str, Callable[[Session], None]] = {
    "INSERT": insert,
    "SELECT, then UPDATE": change,
    "UPDATE alone": execute,
}


@asynccontextmanager
async def transactions(
    work: Callable[[Session], None], events: int, *, in_memory: bool, tied: bool
) -> AsyncGenerator[Run]:
    """Transactions that each do this and publish so many events."""
    bus = EventBus()

    @bus.on(str)
    async def handle(event: str) -> None: ...

    with TemporaryDirectory() as folder:
        file = "" if in_memory else f"/{Path(folder) / 'test.db'}"
        engine = create_engine(f"sqlite://{file}")
        sessions = sessionmaker(engine)
        if tied:
            deliver_on_commit(bus, engine)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(Row(id=0, note="first"))
            session.commit()

        async def run(times: int) -> float:
            begun = time.perf_counter_ns()
            for _ in range(times):
                async with bus.context():
                    with sessions.begin() as session:
                        work(session)
                        for _ in range(events):
                            bus.publish("kept")
            return time.perf_counter_ns() - begun

        yield run
        engine.dispose()


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure each kind of transaction, longer than others are: a few per cent are what counts."""
    longer = replace(effort, rounds=2 * effort.rounds, seconds=4 * effort.seconds)
    for place in (ON_DISK, IN_MEMORY):
        for kind in TRANSACTIONS:
            for events in (0, 1):
                yield on_loop("asyncio", partial(_transaction, place, kind, events, longer))


async def _transaction(place: str, kind: str, events: int, effort: Effort) -> Comparison:
    opening = partial(transactions, TRANSACTIONS[kind], events, in_memory=place == IN_MEMORY)
    contenders = [Contender(name, partial(opening, tied=name == TIED)) for name in (NOT_TIED, TIED)]
    case: Case = {"database": place, "transaction": kind, "events": events}
    return await compare(case, contenders, effort)


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """Each kind of transaction, with and without an event."""
    for found in comparisons:
        place, kind, events = found.case.values()
        name = f"SQLite {place}, {kind}, N = {events}: {TIED} / {found.floor}"
        yield Verdict(name, found.ratio(TIED).median, GOAL, slack=FINE_SLACK)


def tables(results: Results) -> str:
    """Microseconds per transaction."""
    return "\n\n".join(
        f"**{kind}, SQLite {place}**, wall-clock microseconds each, by number of events\n\n"
        + grid(results, {"database": place, "transaction": kind}, "events", microseconds)
        for place in (ON_DISK, IN_MEMORY)
        for kind in TRANSACTIONS
    )


def plots(results: Results) -> dict[str, str]:
    """A few per cent need no drawing."""
    return {}
