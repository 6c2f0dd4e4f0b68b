"""Sessions on a connection of their caller: in every mode, the events are those of the rows.

But for a session that has a savepoint of its own there, as in the usual fixture of tests: its
commit counts, although the transaction around it is rolled back in the end.
"""

from collections.abc import AsyncIterator
from contextlib import suppress
from inspect import isawaitable
from itertools import product
from typing import Any, Literal

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Engine, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit
from tests.databases import Row, to_await
from tests.witness import assert_settled

Mode = Literal["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
Around = Literal["nothing", "transaction", "savepoint"]

MODES: list[Mode] = [
    "conditional_savepoint",
    "rollback_only",
    "control_fully",
    "create_savepoint",
]
AROUND: list[Around] = ["nothing", "transaction", "savepoint"]
ENDS = ["commit", "rollback", "close"]
CASES = [*product(ENDS, ENDS, [True, False])]


class Failed(Exception):
    """What the unit of work ends with."""


@pytest.fixture
async def async_engine(engine: Engine, anyio_backend_name: str) -> AsyncIterator[AsyncEngine]:
    if anyio_backend_name != "asyncio":
        pytest.skip("SQLAlchemy's asynchronous engines are made for asyncio")
    engine_to_await = to_await(engine)
    yield engine_to_await
    await engine_to_await.dispose()


def has_savepoint(mode: Mode, around: Around) -> bool:
    """Whether a session begins one for itself on the connection."""
    if mode == "conditional_savepoint":
        return around == "savepoint"
    return mode == "create_savepoint" and around != "nothing"


async def done(step: Any) -> Any:
    """Have it done, by what blocks or what is awaited."""
    return await step if isawaitable(step) else step


async def use(
    connection: Any, bus: EventBus, mode: Mode, around: Around, in_session: str, at_last: str
) -> None:
    """Write before, in and after a session on the connection, and say so each time."""

    async def write(it: Any, name: str) -> None:
        await done(it.execute(insert(Row).values(name=name, note="")))
        bus.publish(name)

    if around != "nothing":
        await write(connection, "before")
    if around == "savepoint":
        await done(connection.begin_nested())
    make: Any = AsyncSession if hasattr(connection, "sync_connection") else Session
    session = make(connection, join_transaction_mode=mode)
    await write(session, "by statement")
    session.add(Row(name="by object"))
    bus.publish("by object")
    if in_session == "close" and not has_savepoint(mode, around):
        await done(session.flush())  # else it is not written, and its transaction may be committed
    await done(getattr(session, in_session)())
    await done(session.close())
    await write(connection, "after")
    await done(getattr(connection, at_last)())
    await done(connection.close())


def assert_delivered(
    delivered: set[str], engine: Engine, mode: Mode, around: Around, in_session: str
) -> None:
    with engine.begin() as connection:
        expected = set(connection.scalars(select(Row.name)))
        connection.execute(delete(Row))
    if has_savepoint(mode, around):
        own = {"by statement", "by object"}
        expected = expected | own if in_session == "commit" else expected - own
    assert delivered == expected


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.anyio
async def test_a_session_on_a_connection(mode: Mode, around: Around, engine: Engine) -> None:
    for in_session, at_last, success in CASES:
        bus, delivered = EventBus(), set[str]()
        bus.subscribe(str, delivered.add, name="remember", thread=False)
        deliver_on_commit(bus, engine)
        with suppress(Failed):
            async with bus.context():
                await use(engine.connect(), bus, mode, around, in_session, at_last)
                if not success:
                    raise Failed
        assert_settled(bus)
        assert_delivered(delivered, engine, mode, around, in_session)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.anyio
async def test_a_session_to_await_on_a_connection(
    mode: Mode, around: Around, engine: Engine, async_engine: AsyncEngine
) -> None:
    for in_session, at_last, success in CASES:
        bus, delivered = EventBus(), set[str]()
        bus.subscribe(str, delivered.add, name="remember", thread=False)
        deliver_on_commit(bus, async_engine)
        with suppress(Failed):
            async with bus.context():
                await use(await async_engine.connect(), bus, mode, around, in_session, at_last)
                if not success:
                    raise Failed
        assert_settled(bus)
        assert_delivered(delivered, engine, mode, around, in_session)
