"""Has one form of a test run with sessions that block and with sessions to await."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any

from sqlalchemy import Engine, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from tests.databases import Row

# What becomes of the events of four transactions that are ended so.
DECIDED = ["handled committed", "discarded rolled back", "discarded closed", "handled read"]
# What eventkit has warned of so far.
Warnings = Callable[[], list[str]]


class Wrong(Exception):
    """What goes wrong in these tests."""


@dataclass(slots=True, eq=False)
class Database:
    """A database, and the engine through which a test uses it.

    Attributes:
        plain: An engine that blocks, for a look from outside of any unit of work.
        engine: The engine to tie.
    """

    plain: Engine
    engine: Engine | AsyncEngine

    @property
    def kind(self) -> str:
        """The name of its dialect."""
        return self.plain.dialect.name

    @property
    def awaits(self) -> bool:
        """Whether its sessions are to be awaited."""
        return isinstance(self.engine, AsyncEngine)

    @property
    def driver(self) -> str:
        """The name of the driver that the tests use."""
        return self.engine.dialect.driver

    @property
    def hooks(self) -> Engine:
        """What listeners listen to."""
        return self.engine.sync_engine if isinstance(self.engine, AsyncEngine) else self.engine

    # Any: sessions and connections of either kind, whose methods have the same names.
    def sessions(self, **options: Any) -> Any:
        """A factory of sessions."""
        options = {"bind": self.engine, **options}
        make: Any = async_sessionmaker if self.awaits else sessionmaker
        return make(**options)

    def session(self, **options: Any) -> Any:
        """A session."""
        return self.sessions(**options)()

    def begun(self, **options: Any) -> Any:
        """A session that commits at the end of its block."""
        return inside(self.sessions(**options).begin())

    def connection(self) -> Any:
        """A connection for a block."""
        return inside(self.engine.connect())

    def clear(self) -> None:
        """Have one row in it."""
        with Session(self.plain) as session:
            session.execute(delete(Row))
            session.add(Row(name="first"))
            session.commit()

    def names(self) -> list[str]:
        """What was committed, without what was there before."""
        with Session(self.plain) as session:
            return sorted({*session.scalars(select(Row.name))} - {"first"})


# Any: the result of a step.
async def done(step: Any) -> Any:
    """Have it done, by a session of either kind."""
    return await step if isawaitable(step) else step


# Any: a session or connection of either kind.
async def put(used: Any, name: str = "ada") -> None:
    """Insert a row."""
    await done(used.execute(insert(Row).values(name=name)))


@asynccontextmanager
async def inside(manager: Any) -> AsyncGenerator[Any]:
    """Enter a context manager of either kind for a block."""
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


async def run(session: Any, work: Callable[[Any], Any]) -> Any:
    """Do what there is no method to await for, given the session or connection that blocks."""
    if hasattr(session, "run_sync"):
        return await session.run_sync(work)
    return work(session)


def blocking(thing: Any) -> Any:
    """The session or connection that blocks, which listeners are told."""
    for name in ("sync_session", "sync_connection"):
        if hasattr(thing, name):
            return getattr(thing, name)
    return thing
