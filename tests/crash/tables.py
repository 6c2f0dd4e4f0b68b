"""What workers write into the database, and what is counted from it afterwards."""

from collections import Counter
from dataclasses import dataclass

from sqlalchemy import Engine, Identity, Integer, String, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from eventkit.outbox import add_tables
from tests.crash.nursery import PATIENCE


class Base(DeclarativeBase):
    pass


class Business(Base):
    """Something that was done, and of which an event tells."""

    __tablename__ = "business"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    key: Mapped[str | None]
    number: Mapped[int] = mapped_column(default=0)  # of those with this key


class Effect(Base):
    """What a handler did, one row for each time it did so."""

    __tablename__ = "effects"

    # Ordered by time among those that cannot be written at the same time.
    place: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    handler: Mapped[str]
    id: Mapped[str]
    pid: Mapped[int]
    attempt: Mapped[int]


class Numbers(Base):
    """The number that was given last for a key."""

    __tablename__ = "numbers"

    key: Mapped[str] = mapped_column(String, primary_key=True)
    number: Mapped[int]


add_tables(Base.metadata)


@dataclass(frozen=True, slots=True)
class Count:
    """What became of what was committed.

    Attributes:
        business: How many business rows were committed.
        missing: Handler and id of effects that a committed business row should have had.
        phantom: Handler and id of effects, or of outbox rows, without a committed business row.
        twice: How often a handler did something again, by handler.
        rows: How many rows are left in the outbox, by handler, state and attempt.
        disordered: Keys whose effects are not in the order of the commits.
    """

    business: int
    missing: list[tuple[str, str]]
    phantom: list[tuple[str, str]]
    twice: Counter[str]
    rows: Counter[tuple[str, int, int]]
    disordered: list[str]


def count(engine: Engine, handlers: list[str]) -> Count:
    """Compare business rows with effects, whatever the workers believe they did."""
    with Session(engine) as session:
        done = {each.id: each for each in session.scalars(select(Business))}
        effects = session.scalars(select(Effect).order_by(Effect.place)).all()
        kept = session.execute(
            text("select handler, state, attempt, payload from eventkit_outbox")
        ).all()
    expected = {(handler, id_) for handler in handlers for id_ in done}
    times = Counter((each.handler, each.id) for each in effects)
    waiting = [(handler, payload.split('"')[3]) for handler, _, _, payload in kept]
    order: dict[str, list[int]] = {}
    for each in effects:
        if each.handler == "keyed" and each.id in done and (key := done[each.id].key) is not None:
            order.setdefault(key, []).append(done[each.id].number)
    return Count(
        business=len(done),
        missing=sorted(expected - times.keys()),
        phantom=sorted({*times, *waiting} - {*expected}),
        twice=Counter(
            {
                handler: sum(n - 1 for (name, _), n in times.items() if name == handler)
                for handler in handlers
            }
        ),
        rows=Counter((handler, state, attempt) for handler, state, attempt, _ in kept),
        disordered=[key for key, numbers in order.items() if numbers != sorted(set(numbers))],
    )


def engine_for(url: str) -> Engine:
    """A test's own, which waits as long as it has to where workers have SQLite's lock."""
    options = {"timeout": PATIENCE} if url.startswith("sqlite") else {}
    return create_engine(url, poolclass=NullPool, connect_args=options)


def prepare(engine: Engine, keys: int = 0) -> None:
    """Make the tables."""
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(Numbers(key=str(key), number=0) for key in range(keys))
        session.commit()
