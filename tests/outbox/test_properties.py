"""Random steps of two sessions and a connection: rows are there for what was committed alone.

Each event is published right after its business row was written, in the same transaction. After
each step the outbox has a row for exactly the business rows that are committed; afterwards each of
their deliveries has ended once. `EVENTKIT_EXAMPLES=20` runs twenty times as many examples.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, delete, insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from eventkit import EventBus
from eventkit.outbox import Outbox
from tests.databases import Base, Row, obey, postgres, to_await
from tests.outbox.scenes import Placed, Scene, make_tables, scene_on
from tests.sqlalchemy.steps import done
from tests.witness import assert_settled

FACTOR = int(os.environ.get("EVENTKIT_EXAMPLES", "1"))
ACTORS = ("ann", "bob", "core")
OF_ALL = ("place", "place", "add", "orphan", "clash", "savepoint", "keep", "undo")
ENDS = ("commit", "commit", "commit", "rollback", "close")
STEPS = [
    f"{actor} {step}"
    for actor in ACTORS
    for step in (*OF_ALL, *ENDS)
    if actor != "core" or step != "add"
]


class Run:
    """Takes steps in one unit of work."""

    def __init__(self, scene: Scene, bus: EventBus) -> None:
        self.scene = scene
        self.bus = bus
        self.in_use: dict[str, Any] = {}
        self.number = 0

    async def take(self, step: str) -> None:
        actor, _, what = step.partition(" ")
        try:
            await getattr(self, what)(actor)
        except DBAPIError:
            await self.give_up(actor)

    async def it(self, actor: str) -> Any:
        """The session or connection of this name."""
        if actor not in self.in_use:
            made: Any = self.scene.engine.connect() if actor == "core" else self.scene.session()
            if actor == "core" and self.scene.awaits:
                made = await made.start()
            self.in_use[actor] = made
        return self.in_use[actor]

    def named(self) -> str:
        self.number += 1
        return f"row {self.number}"

    async def place(self, actor: str) -> None:
        """Write a row, and publish."""
        name = self.named()
        await done((await self.it(actor)).execute(insert(Row).values(name=name, note="")))
        self.bus.publish(Placed(name))

    async def add(self, actor: str) -> None:
        """Add an object, flush it, and publish."""
        name = self.named()
        session = await self.it(actor)
        session.add(Row(name=name))
        await done(session.flush())
        self.bus.publish(Placed(name))

    async def orphan(self, actor: str) -> None:
        """Write a row without its parent, so that the commit fails."""
        name = self.named()
        values = {"name": name, "note": "", "parent": "nobody"}
        await done((await self.it(actor)).execute(insert(Row).values(**values)))
        self.bus.publish(Placed(name))

    async def clash(self, actor: str) -> None:
        """Write a row that is there already."""
        await done((await self.it(actor)).execute(insert(Row).values(name="first", note="")))

    async def savepoint(self, actor: str) -> None:
        await done((await self.it(actor)).begin_nested())

    async def keep(self, actor: str) -> None:
        nested = (await self.it(actor)).get_nested_transaction()
        if nested is not None:
            await done(nested.commit())

    async def undo(self, actor: str) -> None:
        nested = (await self.it(actor)).get_nested_transaction()
        if nested is not None:
            await done(nested.rollback())

    async def commit(self, actor: str) -> None:
        await done((await self.it(actor)).commit())

    async def rollback(self, actor: str) -> None:
        await done((await self.it(actor)).rollback())

    async def close(self, actor: str) -> None:
        if actor in self.in_use:
            await done(self.in_use.pop(actor).close())

    async def give_up(self, actor: str) -> None:
        """What users do whose statement or commit has failed."""
        await self.rollback(actor)
        await self.close(actor)


class Failed(Exception):
    """What the unit of work ends with."""


async def check(scene: Scene, steps: list[str], success: bool) -> None:
    """Take the steps, and compare after each of them."""
    with scene.plain.begin() as connection:
        connection.execute(delete(Row).where(Row.name != "first"))
    scene.table.clear()
    bus = EventBus()
    handled: list[str] = []
    for name in ("mail", "stock"):

        @bus.on(Placed, durable=True, name=name)
        def handle(event: Placed) -> None:
            handled.append(event.name)

    with Outbox(bus, scene.engine, schema=scene.schema):
        run = Run(scene, bus)
        try:
            async with bus.context():
                for step in steps:
                    await run.take(step)
                    assert stored(scene) == committed(scene), f"after {step}"
                for actor in [*run.in_use]:
                    await run.close(actor)
                assert stored(scene) == committed(scene)
                if not success:
                    raise Failed
        except Failed:
            pass
        assert_settled(bus)
        assert sorted(handled) == sorted(2 * committed_names(scene))
        assert stored(scene) == []


def stored(scene: Scene) -> list[str]:
    """The events of the rows of the outbox."""
    return sorted(scene.payloads())


def committed(scene: Scene) -> list[str]:
    """What should be there, for two handlers."""
    return sorted(f'{{"name":"{name}"}}' for name in 2 * committed_names(scene))


def committed_names(scene: Scene) -> list[str]:
    with Session(scene.plain) as session:
        return [*session.scalars(select(Row.name).where(Row.name != "first"))]


Check = Callable[[list[str], bool], None]


@contextmanager
def prepared(scene: Scene) -> Generator[Check]:
    make_tables(scene.plain)
    scene.clear()
    quiet = logging.getLogger("eventkit")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    with asyncio.Runner() as runner:
        yield lambda steps, success: runner.run(
            check(scene, steps, success), context=copy_context()
        )
    quiet.setLevel(level)


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
    with prepared(scene_on(engine, engine)) as check_on_it:
        yield check_on_it
    engine.dispose()


@pytest.fixture(scope="module")
def on_postgres(service_url: Callable[[str], str]) -> Iterator[Check]:
    yield from of_postgres(service_url, lambda engine: engine)


@pytest.fixture(scope="module")
def on_asyncpg(service_url: Callable[[str], str]) -> Iterator[Check]:
    yield from of_postgres(service_url, to_await)


def of_postgres(
    service_url: Callable[[str], str], used: Callable[[Engine], Any]
) -> Generator[Check]:
    with (
        postgres(service_url("postgres")) as engine,
        prepared(scene_on(engine, used(engine))) as check_on_it,
    ):
        yield check_on_it


# Steps that random ones come upon too rarely.
WRITTEN = """
ann place, ann commit
ann place, ann rollback
ann add, ann commit
core place, core commit
ann orphan, ann commit, ann place, ann commit
core orphan, core commit, core place, core commit
ann place, ann clash, ann place, ann commit
ann savepoint, ann place, ann undo, ann commit
ann savepoint, ann place, ann keep, ann commit
ann place, ann savepoint, ann place, ann undo, ann place, ann commit
ann savepoint, ann place, ann keep, ann rollback
core place, core savepoint, core place, core undo, core commit
core savepoint, core place, core keep, core commit
ann place, ann savepoint, ann clash, ann undo, ann commit
ann place, ann commit, ann place, ann rollback
ann place, bob place, bob rollback, ann commit
ann place, core place, core rollback, ann commit
ann place, ann close, bob place, bob commit
""".strip().splitlines()


def written(test: Callable[..., None]) -> Callable[..., None]:
    """Take the written steps, too, in a unit that succeeds and in one that fails."""
    for number, line in enumerate(WRITTEN):
        add: Callable[..., Callable[..., None]] = example(
            steps=line.split(", "), success=number % 2 == 0
        )
        test = add(test)
    return test


def examples(number: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=number * FACTOR,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


random_steps = given(
    steps=st.lists(st.sampled_from(STEPS), max_size=20),
    success=st.booleans(),
)


@written
@random_steps
@examples(60)
def test_rows_on_sqlite_are_those_of_committed_rows(
    on_sqlite: Check, steps: list[str], success: bool
) -> None:
    on_sqlite(steps, success)


@written
@random_steps
@examples(20)
def test_rows_on_postgres_are_those_of_committed_rows(
    on_postgres: Check, steps: list[str], success: bool
) -> None:
    on_postgres(steps, success)


@random_steps
@examples(15)
def test_rows_on_postgres_are_those_of_committed_rows_for_those_who_await(
    on_asyncpg: Check, steps: list[str], success: bool
) -> None:
    on_asyncpg(steps, success)
