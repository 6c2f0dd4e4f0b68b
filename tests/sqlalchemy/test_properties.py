"""Two sessions and a connection in one unit of work, in random steps, against two properties.

A. An event that is published right after its row was written, in the transaction that wrote it, is
   delivered if and only if the row is there afterwards.
B. Any other event is delivered if and only if the rules say so: `Page` reads them, from the words
   of docs/commits.md and of nothing else.

`EVENTKIT_EXAMPLES=20 pytest -o faulthandler_timeout=0` runs twenty times as many examples.

What the rules leave wrong is not done here: an object that is added while another transaction was
used last (a statement goes before it); objects that are changed or deleted and never flushed; a
`SELECT` that writes; textual COMMIT; a Core connection that goes on after a failed COMMIT, which
SQLite's driver leaves in a state of its own.
"""

import asyncio
import gc
import logging
import os
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from inspect import isawaitable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, delete, insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit
from tests.databases import Base, Row, obey, postgres, to_await
from tests.witness import assert_settled

FACTOR = int(os.environ.get("EVENTKIT_EXAMPLES", "1"))

SESSIONS = ("ann", "bob")
CONNECTION = "core"
OF_ALL = ("write", "write", "read", "orphan", "fail", "savepoint", "keep", "undo")
ENDS = ("commit", "commit", "rollback", "close", "forget")
STEPS = [
    *(f"{actor} {step}" for actor in (*SESSIONS, CONNECTION) for step in (*OF_ALL, *ENDS)),
    *(f"{actor} {step}" for actor in SESSIONS for step in ("begin", "add", "clash")),
    *["publish"] * 12,
]
# Without what leaves SQLAlchemy to terminate connections that are awaited.
STEPS_TO_AWAIT = [step for step in STEPS if not step.endswith("forget")]

End = Literal["committed", "kept", "rolled back", "closed"]
Verdict = Literal["delivered", "discarded", "committed", "nothing", "wait"]


@dataclass(eq=False)
class Part:
    """A transaction, or a savepoint in one."""

    of_session: bool
    around: "Part | None" = None
    wrote: bool = False
    end: End | None = None
    ended_at: int = 0


@dataclass(eq=False)
class Published:
    """An event, the parts of transactions that were open, and the transactions after it."""

    inside: list[Part]
    after: list[tuple[Part, bool]] = field(default_factory=list[tuple[Part, bool]])
    delivered: bool | None = None


@dataclass
class Page:
    """Predicts what is delivered, for one task and one unit of work.

    Where the page leaves room, both readings are tried, and both outcomes are right.

    Attributes:
        undone_counts: What was written in a savepoint that was rolled back was written, too, in
            the transaction around it.
        savepoints_use: To begin and end a savepoint is to use its transaction.
        by_begin: Of several transactions after the publish that have ended while it waited for
            one from before, the one that began first is the next; else the one that ended first.
        empty_commits_count: "Anything in the unit was committed": also where it wrote nothing.
        forgotten_is_open: A transaction whose session is gone stays open, until the unit ends;
            else it is closed at once.
    """

    undone_counts: bool
    savepoints_use: bool
    by_begin: bool
    empty_commits_count: bool
    forgotten_is_open: bool
    open: dict[str, list[Part]] = field(default_factory=dict[str, list[Part]])
    used: list[str] = field(default_factory=list[str])  # in the unit, the one used last first
    recent: list[str] = field(default_factory=list[str])  # the same, also outside of it
    unflushed: set[str] = field(default_factory=set[str])  # who has added objects
    events: dict[str, Published] = field(default_factory=dict[str, Published])
    in_unit: bool = False
    committed: bool = False
    clock: int = 0

    def begin(self, actor: str) -> None:
        """A session begins a transaction, or a connection with its first statement."""
        if actor not in self.open:
            self.open[actor] = [Part(actor in SESSIONS)]
            self.use(actor)

    def use(self, actor: str) -> None:
        """The one used last comes first."""
        self.recent = [actor, *(each for each in self.recent if each != actor)]
        self.take_part(actor)

    def take_part(self, actor: str) -> None:
        """It takes part in the unit in which it is used."""
        if self.in_unit:
            if actor not in self.used:
                for event in self.events.values():
                    event.after.append((self.open[actor][0], not self.committed))
            self.used = [each for each in self.recent if each in (actor, *self.used)]

    def send(self, actor: str, *, writes: bool) -> None:
        """It has written: a statement was sent that may change something."""
        self.begin(actor)
        self.use(actor)
        self.open[actor][-1].wrote |= writes
        self.unflushed.discard(actor)  # it goes first

    def add(self, actor: str) -> None:
        """It has written: an object is added, and not flushed yet."""
        self.begin(actor)
        self.open[actor][-1].wrote = True
        self.unflushed.add(actor)

    def look(self) -> None:
        """What began outside takes part if it has objects to flush."""
        for actor in self.recent:
            if actor in self.unflushed:
                self.take_part(actor)

    def savepoint(self, actor: str) -> None:
        self.begin(actor)
        self.touch(actor)
        stack = self.open[actor]
        stack.append(Part(actor in SESSIONS, stack[-1]))

    def touch(self, actor: str) -> None:
        if self.savepoints_use:
            self.use(actor)

    def keep(self, actor: str) -> None:
        """A savepoint that is kept is a part of what is around it."""
        self.touch(actor)
        part = self.open[actor].pop()
        self.close_part(part, "kept")
        self.open[actor][-1].wrote |= part.wrote

    def undo(self, actor: str) -> None:
        """A savepoint that is rolled back takes along what was published in it."""
        self.touch(actor)
        self.unflushed.discard(actor)
        part = self.open[actor].pop()
        self.close_part(part, "rolled back")
        self.open[actor][-1].wrote |= part.wrote and self.undone_counts

    def finish(self, actor: str, end: End) -> None:
        """A transaction ends, with the savepoints that are open in it."""
        if actor not in self.open:
            return
        self.unflushed.discard(actor)
        for part in reversed(self.open.pop(actor)):
            self.close_part(part, "kept" if part.around and end == "committed" else end)
            if part.around is not None:
                part.around.wrote |= part.wrote
            elif end == "committed" and actor in self.used:
                self.committed |= part.wrote or self.empty_commits_count
        if actor in self.used:
            self.used.remove(actor)

    def close_part(self, part: Part, end: End) -> None:
        self.clock += 1
        part.end, part.ended_at = end, self.clock
        self.settle()

    def forget(self, actor: str) -> None:
        """Nobody will ever end it."""
        if not self.forgotten_is_open:
            self.finish(actor, "closed")
        elif actor in self.open:
            self.unflushed.discard(actor)
            self.clock += 1
            ghost = f"{actor}, forgotten {self.clock}"
            self.open[ghost] = self.open.pop(actor)
            for order in (self.used, self.recent):
                if actor in order:
                    order[order.index(actor)] = ghost

    def publish(self, name: str) -> None:
        """Candidates are those that are open now, the one used last first."""
        self.look()
        self.events[name] = Published([self.open[actor][-1] for actor in self.used])

    def end_unit(self, *, success: bool) -> dict[str, bool]:
        """If no transaction has decided, the outcome of the unit does."""
        self.look()
        self.settle(last=True)
        return {
            name: success if event.delivered is None else event.delivered
            for name, event in self.events.items()
        }

    def settle(self, *, last: bool = False) -> None:
        for event in self.events.values():
            if event.delivered is None:
                verdict = self.of_those_inside(event, last=last)
                if verdict == "nothing":
                    verdict = self.of_those_after(event, last=last)
                if verdict in ("delivered", "discarded"):
                    event.delivered = verdict == "delivered"

    def of_those_inside(self, event: Published, *, last: bool) -> Verdict:
        """The first that has written decides; else, one that was committed delivers it."""
        committed = False
        for part in event.inside:
            verdict = self.word_of(part, last=last)
            if verdict in ("delivered", "discarded", "wait"):
                return verdict
            committed |= verdict == "committed"
        return "delivered" if committed else "nothing"

    def of_those_after(self, event: Published, *, last: bool) -> Verdict:
        """The next that writes: if it commits, or rolls back before anything was committed."""
        after = event.after
        if not self.by_begin:
            after = sorted(after, key=lambda each: each[0].ended_at or float("inf"))
        for part, may_discard in after:
            verdict = self.word_of(part, last=last)
            if verdict == "delivered" or (verdict == "discarded" and may_discard):
                return verdict
        return "wait"

    def word_of(self, part: Part, *, last: bool) -> Verdict:
        """What becomes of an event that was published in this part of a transaction."""
        while part.end is not None:
            undone = part.end in ("rolled back", "closed")
            on_purpose = part.end == "rolled back" and part.of_session and part.around is not None
            if undone and (part.wrote or on_purpose):
                return "discarded"
            if part.around is None:
                if part.end == "committed":
                    return "delivered" if part.wrote else "committed"
                return "nothing"
            part = part.around
        if not last:
            return "wait"
        (stack,) = (each for each in self.open.values() if part in each)
        return "discarded" if any(each.wrote for each in stack) else "nothing"


def readings() -> list[Page]:
    """All ways to read the page."""
    choices = product([False, True], repeat=5)
    return [Page(one, two, three, four, five) for one, two, three, four, five in choices]


async def done(step: Any) -> Any:
    """Have it done, by what blocks or what is awaited."""
    return await step if isawaitable(step) else step


class Run:
    """One unit of work, and the steps in it."""

    def __init__(self, engine: Engine | AsyncEngine, bus: EventBus) -> None:
        self.engine = engine
        self.bus = bus
        self.dooms = engine.dialect.name == "postgresql"
        self.pages = readings()
        self.in_use: dict[str, Any] = {}
        self.failed: set[str] = set()  # a statement of theirs has failed
        self.doomed: set[str] = set()  # all that they send is refused
        self.last: str | None = None  # who has sent a statement last
        self.number = 0
        self.with_row: set[str] = set()

    def tell(self, what: str, *args: Any, **kwargs: Any) -> None:
        """Tell each page what happens."""
        for page in self.pages:
            getattr(page, what)(*args, **kwargs)

    async def take(self, step: str) -> None:
        actor, _, what = step.partition(" ")
        self.number += 1
        if what:
            await getattr(self, what)(actor)
            self.compare(actor)
        elif self.pages[0].in_unit:
            self.publish(f"event {self.number}")

    def compare(self, actor: str) -> None:
        """The pages know as many savepoints as SQLAlchemy does."""
        it = self.in_use.get(actor)
        stack = self.pages[0].open.get(actor, [])
        assert bool(stack) == (it is not None and it.in_transaction())
        assert (len(stack) > 1) == (it is not None and it.in_nested_transaction())

    def enter_unit(self) -> None:
        """What has begun before takes part from its first statement on."""
        for page in self.pages:
            page.in_unit = True
        self.last = None

    def publish(self, name: str, *, with_row: bool = False) -> None:
        if self.pages[0].in_unit:
            if with_row:
                self.with_row.add(name)
            self.tell("publish", name)
            self.bus.publish(name)

    async def it(self, actor: str) -> Any:
        """The actor's session or connection."""
        if actor not in self.in_use:
            if actor == CONNECTION:
                self.in_use[actor] = await done(self.engine.connect())
            elif isinstance(self.engine, AsyncEngine):
                self.in_use[actor] = AsyncSession(self.engine)
            else:
                self.in_use[actor] = Session(self.engine)
        return self.in_use[actor]

    async def flush(self, actor: str) -> None:
        """What was added goes first, so that it is known which statement fails."""
        session = await self.it(actor)
        if actor in SESSIONS and session.new:
            self.tell("send", actor, writes=True)
            self.last = actor
            try:
                await done(session.flush())
            except DBAPIError:
                await self.recover(actor)

    async def recover(self, actor: str) -> None:
        """A flush that fails has rolled back, and the session wants to be told so, too."""
        session = await self.it(actor)
        if (nested := session.get_nested_transaction()) is not None:
            await done(nested.rollback())
            self.tell("undo", actor)
            self.doomed.discard(actor)
        else:
            await self.rollback(actor)

    async def execute(self, actor: str, statement: Any, *, writes: bool) -> bool:
        """Whether it worked."""
        await self.flush(actor)
        it = await self.it(actor)
        self.tell("send", actor, writes=writes)
        self.last = actor
        try:
            await done(it.execute(statement))
        except DBAPIError:
            self.failed.add(actor)
            if self.dooms:
                self.doomed.add(actor)
            return False
        return True

    async def read(self, actor: str) -> None:
        await self.execute(actor, select(Row.name), writes=False)

    async def write(self, actor: str, parent: str | None = None) -> None:
        name = f"row {self.number}"
        if await self.execute(
            actor, insert(Row).values(name=name, note="", parent=parent), writes=True
        ):
            self.publish(name, with_row=True)

    async def orphan(self, actor: str) -> None:
        """One that cannot be committed."""
        await self.write(actor, parent="missing")

    async def fail(self, actor: str) -> None:
        await self.execute(actor, insert(Row).values(name="first", note=""), writes=True)

    async def add(self, actor: str) -> None:
        session = await self.it(actor)
        if session.in_transaction() and self.last != actor:
            await self.read(actor)
        name = f"row {self.number}"
        session.add(Row(name=name))
        self.tell("add", actor)
        self.last = actor
        self.publish(name, with_row=True)

    async def clash(self, actor: str) -> None:
        """A flush that fails."""
        await self.flush(actor)
        session = await self.it(actor)
        session.add(Row(name="first"))
        await self.flush(actor)

    async def begin(self, actor: str) -> None:
        session = await self.it(actor)
        if not session.in_transaction():
            self.tell("begin", actor)
            self.last = actor
            await done(session.begin())

    async def savepoint(self, actor: str) -> None:
        await self.flush(actor)
        it = await self.it(actor)
        if actor not in self.doomed:
            await done(it.begin_nested())
            self.tell("savepoint", actor)
            self.last = None

    async def keep(self, actor: str) -> None:
        await self.flush(actor)
        it = await self.it(actor)
        if (nested := it.get_nested_transaction()) is None:
            return
        self.last = None
        try:
            await done(nested.commit())
        except DBAPIError:  # as the end of a `with` block does; it sends nothing any more
            assert actor in self.doomed
            await done(nested.rollback())
            self.tell("undo", actor)
        else:
            self.tell("keep", actor)

    async def undo(self, actor: str) -> None:
        it = await self.it(actor)
        if (nested := it.get_nested_transaction()) is not None:
            await done(nested.rollback())
            self.tell("undo", actor)
            self.doomed.discard(actor)
            self.last = None

    async def commit(self, actor: str) -> None:
        it = await self.it(actor)
        if actor in self.failed and actor not in self.pages[0].used:
            await self.read(actor)  # a question before COMMIT is a use, or is none
        if actor in SESSIONS:
            self.tell("begin", actor)  # an empty one, if there is none
            if it.new:
                self.tell("send", actor, writes=True)
        try:
            await done(it.commit())
        except DBAPIError:
            await self.rollback(actor)
            if actor == CONNECTION:
                await self.close(actor)
        else:
            self.finish(actor, "rolled back" if actor in self.doomed else "committed")

    async def rollback(self, actor: str) -> None:
        it = await self.it(actor)
        await done(it.rollback())
        self.finish(actor, "rolled back")

    async def close(self, actor: str) -> None:
        it = await self.it(actor)
        await done(it.close())
        self.finish(actor, "closed")
        del self.in_use[actor]

    def finish(self, actor: str, end: End) -> None:
        self.tell("finish", actor, end)
        self.failed.discard(actor)
        self.doomed.discard(actor)
        self.last = None

    async def forget(self, actor: str) -> None:
        self.in_use.pop(actor, None)
        gc.collect()
        self.tell("forget", actor)
        self.failed.discard(actor)
        self.doomed.discard(actor)
        self.last = None


class Failed(Exception):
    """What the unit of work ends with."""


async def check(
    engine: Engine | AsyncEngine, plain: Engine, before: list[str], steps: list[str], success: bool
) -> None:
    """Take the first steps outside of a unit of work, the others in it, and compare."""
    with plain.begin() as connection:
        connection.execute(delete(Row).where(Row.name != "first"))
    bus, delivered = EventBus(), set[str]()
    bus.subscribe(str, delivered.add, name="remember", thread=False)
    run = Run(engine, bus)
    with deliver_on_commit(bus, engine):
        for step in before:
            await run.take(step)
        with suppress(Failed):
            async with bus.context():
                run.enter_unit()
                for step in steps:
                    await run.take(step)
                if not success:
                    raise Failed
        for it in run.in_use.values():
            await done(it.close())
    assert_settled(bus)
    with plain.connect() as connection:
        rows = set(connection.scalars(select(Row.name))) & run.with_row
    assert delivered & run.with_row == rows, "property A"
    predicted = [page.end_unit(success=success) for page in run.pages]
    for name in run.pages[0].events:
        right = {each[name] for each in predicted}
        assert name not in run.with_row or right == {name in rows}, "the page is read as it is"
        assert (name in delivered) in right, f"property B, {name}"


@contextmanager
def running() -> Generator[Callable[[Awaitable[None]], None]]:
    """Run examples one after the other, each in a context of its own."""
    quiet = logging.getLogger("eventkit")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    gc.collect()  # what is there already, so that a forgotten session is soon found
    gc.freeze()
    with asyncio.Runner() as runner:

        def run(example: Any) -> None:
            runner.run(example, context=copy_context())

        yield run
    quiet.setLevel(level)


Check = Callable[[list[str], list[str], bool], None]


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    """A database in a file, whose second writer is refused at once instead of waiting."""
    path: Path = tmp_path_factory.mktemp("properties") / "test.db"
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"check_same_thread": False, "timeout": 0},
        poolclass=NullPool,
    )
    obey(engine)
    Base.metadata.create_all(engine)
    with prepared(engine, engine) as check_on_it:
        yield check_on_it
    engine.dispose()


@pytest.fixture(scope="module")
def on_postgres(service_url: Callable[[str], str]) -> Iterator[Check]:
    with postgres(service_url("postgres")) as engine, prepared(engine, engine) as check_on_it:
        yield check_on_it


@pytest.fixture(scope="module")
def on_asyncpg(service_url: Callable[[str], str]) -> Iterator[Check]:
    with (
        postgres(service_url("postgres")) as engine,
        prepared(engine, to_await(engine)) as check_on_it,
    ):
        yield check_on_it


@contextmanager
def prepared(plain: Engine, engine: Engine | AsyncEngine) -> Generator[Check]:
    with plain.begin() as connection:
        connection.execute(insert(Row).values(name="first", note=""))
    with running() as run:
        yield lambda before, steps, success: run(check(engine, plain, before, steps, success))


def steps_of(steps: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(steps), max_size=25)


# Steps that random ones come upon too rarely; those left of the bar go before the unit of work.
WRITTEN = """
ann write, bob read, publish, ann rollback
bob read, ann write, publish, bob commit, ann commit
bob read, publish, ann write, ann rollback, bob commit
bob read, publish, ann write, ann rollback, bob write, bob commit
ann write, ann commit, publish, bob write, bob rollback
ann write, ann commit, publish, ann read, ann rollback
publish, ann write, ann rollback
publish, ann write
publish, ann read, ann close, bob write, bob commit
publish, ann write, bob write, bob commit, ann rollback
publish, core write, core rollback, ann write, ann commit
publish, core write, core commit, ann write, ann rollback
publish, ann read, ann commit
publish, ann orphan, core write, core commit, ann commit
ann begin, publish, ann commit
ann read, publish, ann commit
core read, publish, core commit
ann write, ann fail, ann commit
core write, core fail, core commit
ann write, ann savepoint, ann fail, ann undo, ann write, publish, ann commit
core write, core savepoint, core fail, core undo, core write, publish, core commit
ann savepoint, ann fail, ann keep, publish, ann commit
ann write, ann savepoint, ann write, ann clash, publish, ann commit
ann write, ann savepoint, publish, ann undo, ann commit
core write, core savepoint, publish, core undo, core commit
core write, core savepoint, core write, publish, core undo, core commit
core write, core savepoint, core write, publish, core keep, core commit
core savepoint, core write, core savepoint, core write, publish, core keep, core undo, core commit
core savepoint, core write, core savepoint, core write, publish, core undo, core keep, core commit
core savepoint, core write, core keep, core savepoint, core write, core undo, core commit
core savepoint, core write, core undo, publish, core write, core commit
ann savepoint, ann write, ann savepoint, ann write, publish, ann keep, ann undo, ann commit
ann write, ann savepoint, ann write, ann savepoint, ann write, ann commit
ann savepoint, ann write, ann close
ann orphan, ann commit, ann write, ann commit
ann orphan, publish, ann rollback, ann write, ann commit
core orphan, core commit, publish, ann write, ann rollback
core orphan, core commit, core write, core commit
ann write, bob write, ann write, bob rollback, ann commit
ann write, bob write, ann read, publish, bob rollback, ann commit
ann write, bob write, ann read, publish, ann rollback, bob commit
ann write, core write, publish, ann rollback, core commit
ann add, ann close
ann add, ann savepoint, ann add, ann undo, ann commit
ann add, publish, ann rollback
ann write, ann forget, ann write, publish, ann commit
core write, core forget, core write, publish, core commit
ann add, ann forget
ann write, ann commit, ann read, publish, ann forget
ann write | ann read, publish, ann commit
ann write | publish, ann read, ann rollback
core write | publish, ann write, ann commit, core write, core rollback
ann begin, bob write | ann read, publish, ann close, bob commit
ann add | publish
ann add | publish, ann rollback
ann add | bob write, publish, bob rollback, ann commit
ann add | bob write, publish, ann commit, bob rollback
ann add, bob add | publish, bob rollback, ann commit
""".strip().splitlines()


def written(test: Callable[..., None]) -> Callable[..., None]:
    """Take the written steps, too, in a unit that succeeds and in one that fails."""
    for line in reversed(WRITTEN):
        before, bar, steps = line.rpartition(" | ")
        for success in (True, False):
            add: Callable[..., Callable[..., None]] = example(
                before=before.split(", ") if bar else [], steps=steps.split(", "), success=success
            )
            test = add(test)
    return test


def examples(number: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=number * FACTOR,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def random_steps(names: list[str]) -> Callable[[Any], Any]:
    """Before the unit of work and in it, which succeeds or not."""
    return given(
        before=st.lists(st.sampled_from(names), max_size=4),
        steps=steps_of(names),
        success=st.booleans(),
    )


@written
@random_steps(STEPS)
@examples(100)
def test_what_is_delivered_on_sqlite(
    on_sqlite: Check, before: list[str], steps: list[str], success: bool
) -> None:
    on_sqlite(before, steps, success)


@written
@random_steps(STEPS)
@examples(30)
def test_what_is_delivered_on_postgres(
    on_postgres: Check, before: list[str], steps: list[str], success: bool
) -> None:
    on_postgres(before, steps, success)


@random_steps(STEPS_TO_AWAIT)
@examples(15)
def test_what_is_delivered_on_postgres_by_those_who_await(
    on_asyncpg: Check, before: list[str], steps: list[str], success: bool
) -> None:
    on_asyncpg(before, steps, success)
