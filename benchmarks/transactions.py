"""Measures what `deliver_on_commit` adds to a small transaction on SQLite, with and without events.

Each transaction runs in a unit of work of its own, through a session factory that is tied to the
bus and through one that is not, in turns. `python -m benchmarks.transactions --quick` is enough
for a first look.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
from sqlalchemy import create_engine, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks.harness import Comparison, Contender, Effort, Run, clock, compare
from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit

GOAL = 1.05
FULL = Effort(rounds=21, seconds=0.2, scale="full")
QUICK = Effort(rounds=7, seconds=0.05, scale="quick")


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
            deliver_on_commit(bus, sessions)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(Row(id=0, note="first"))
            session.commit()

        async def run(times: int) -> float:
            begun = clock()
            for _ in range(times):
                async with bus.context():
                    with sessions.begin() as session:
                        work(session)
                        for _ in range(events):
                            bus.publish("kept")
            return clock() - begun

        yield run
        engine.dispose()


async def measure(name: str, events: int, in_memory: bool, effort: Effort) -> Comparison:
    """Compare sessions that are not tied with those that are."""
    opening = partial(transactions, TRANSACTIONS[name], events, in_memory=in_memory)
    contenders = [
        Contender("not tied", partial(opening, tied=False)),
        Contender("deliver_on_commit", partial(opening, tied=True)),
    ]
    return await compare({"transaction": name, "events": events}, contenders, effort)


def main() -> None:
    """Print one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--in-memory", action="store_true", help="nothing is written to a disk")
    options = parser.parse_args()
    effort = QUICK if options.quick else FULL
    print(f"{'transaction':<22}{'events':>8}{'µs':>8}{'tied':>8}   ratio (goal {GOAL})")
    for name in TRANSACTIONS:
        for events in (0, 1):
            found = anyio.run(measure, name, events, options.in_memory, effort)
            alone, tied = (figure.value for figure in found.figures())
            assert alone is not None
            assert tied is not None
            ratio = found.ratio("deliver_on_commit")
            print(
                f"{name:<22}{events:>8}{alone.median / 1000:>8.0f}{tied.median / 1000:>8.0f}   "
                f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            )


if __name__ == "__main__":
    main()
