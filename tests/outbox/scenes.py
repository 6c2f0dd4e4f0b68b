"""A bus with an outbox on a database of a test's own, used in all ways in which one can be."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import anyio
from sqlalchemy import Engine, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine

from eventkit import EventBus, named
from eventkit.outbox import Outbox
from eventkit.outbox._store import State, Store, add_tables
from tests.contract.bus import Witness, assert_settled
from tests.outbox import rows
from tests.sqlalchemy import steps

LIMIT = 30  # seconds after which a test that hangs has failed


@named("shop.placed")
@dataclass(frozen=True, slots=True)
class Placed:
    name: str = "ada"


@named("shop.paid")
@dataclass(frozen=True, slots=True)
class Paid:
    name: str = "ada"


@named("shop.basket")
@dataclass
class Basket:
    """An event that can be changed after its publish."""

    names: list[str] = field(default_factory=list[str])


@dataclass(slots=True, eq=False)
class Scene(steps.Database):
    """A database with the outbox's tables, and the engine through which a test uses it.

    Attributes:
        table: What is in the outbox's tables, for a look from outside of any unit of work.
        schema: Where the tables are; None for the one that there is.
        is_counted: Whether nobody sets back the counters of its buses, as a capture does.
    """

    table: rows.Database
    schema: str | None
    is_counted: bool = True
    _outboxes: list[tuple[EventBus, Outbox, Witness]] = field(
        default_factory=list[tuple[EventBus, Outbox, Witness]]
    )

    def outbox(self, bus: EventBus, **options: Any) -> Outbox:
        """An outbox of the bus, which is detached after the test."""
        options = {"schema": self.schema, **options}
        outbox = Outbox(bus, options.pop("engine", self.engine), **options)
        bus.observe(witness := Witness())
        self._outboxes.append((bus, outbox, witness))
        return outbox

    def close(self) -> None:
        """Detach all outboxes."""
        for _, outbox, _ in self._outboxes:
            outbox.detach()

    def check(self) -> None:
        """The law of every bus: each accepted delivery has ended in one way, and was told so."""
        outboxes, self._outboxes = self._outboxes, []
        is_counted, self.is_counted = self.is_counted, True
        for bus, _, witness in outboxes:
            assert_settled(bus)
            if not is_counted:
                continue
            stats = bus.stats
            told = Counter(each.split()[0] for each in witness.seen)
            for outcome in ("handled", "failed", "discarded", "undelivered", "requeued"):
                assert told[outcome] == getattr(stats, outcome), (outcome, stats, witness.seen)

    def kept(self) -> dict[str, tuple[State, int]]:
        """State and attempt of each row, by its handler, of which none has two."""
        found = self.table.sql("select handler, state, attempt from {p}eventkit_outbox")
        names = [handler for handler, _, _ in found]
        assert len(names) == len({*names}), f"several rows: {sorted(names)}"
        return {handler: (State(state), attempt) for handler, state, attempt in found}

    def counted(self) -> Counter[tuple[str, str]]:
        """How many rows there are of each handler in each state."""
        found = self.table.sql("select handler, state from {p}eventkit_outbox")
        return Counter((handler, State(state).name) for handler, state in found)

    def ids(self) -> set[UUID]:
        """Of all rows."""
        return {*self.table.rows()}

    def payloads(self) -> list[str]:
        """Of all rows, in the order of publish."""
        found = self.table.sql("select payload from {p}eventkit_outbox order by published_at, id")
        return [payload for (payload,) in found]


def scene_on(plain: Engine, engine: Engine | AsyncEngine) -> Scene:
    """Use the database of the one engine through the other."""
    schema = schema_of(plain)
    table = rows.Database(plain, Store(plain.dialect, schema), schema, no_coroutine)
    return Scene(plain, engine, table, schema)


def schema_of(engine: Engine) -> str | None:
    """Where `tests.databases` has made its tables."""
    translated: dict[None, str] = engine.get_execution_options().get("schema_translate_map", {})
    return translated.get(None)


def no_coroutine(coroutine: object) -> object:
    raise AssertionError(f"an engine that blocks has nothing to await: {coroutine!r}")


def make_tables(engine: Engine) -> None:
    """Make the outbox's tables, where those of `tests.databases` are."""
    metadata = MetaData()
    add_tables(metadata, schema=schema_of(engine))
    metadata.create_all(engine)


@asynccontextmanager
async def relaying(outbox: Outbox) -> AsyncGenerator[None]:
    """A relay of the outbox runs during the block, and ends as that of a process does."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox.run)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()


async def until(true: Callable[[], object]) -> None:
    """Wait until this is so. A database tells nobody, so it is asked again and again."""
    with anyio.fail_after(LIMIT):
        while not true():  # noqa: ASYNC110 - see above
            await anyio.sleep(0.01)


def lapse(outbox: Outbox) -> None:
    """Have the lease give back what nobody here knows, as two heartbeats do a third apart."""
    lease = outbox._holdings.lease
    clock = lease._clock
    lease.beat()
    lease._clock = lambda: clock() + lease.seconds / 3
    lease.beat()
    lease._clock = clock
