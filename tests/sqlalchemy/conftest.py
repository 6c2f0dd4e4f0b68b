"""A bus that is tied to a database, in all the ways in which a database can be used."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from eventkit import EventBus
from eventkit.sqlalchemy import CommitTie, deliver_on_commit
from tests.databases import mariadb, postgres, sqlite, to_await
from tests.sqlalchemy.steps import Database
from tests.witness import witnessed

# Thousands of scenarios: `nox -s coverage` runs them with all drivers, by EVENTKIT_DRIVERS=all.
MORE = ("asyncpg", "pymysql", "aiomysql") if os.environ.get("EVENTKIT_DRIVERS") == "all" else ()
KINDS = ["sqlite", "aiosqlite", "psycopg", *MORE]
# Drivers that are awaited know asyncio alone, and those that block know no event loop.
ON_OTHER_LOOPS = ["sqlite"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run each scenario only where there is something to see."""
    items[:] = [item for item in items if _is_worth_it(item)]


def _is_worth_it(item: pytest.Item) -> bool:
    chosen = getattr(item, "callspec", None)
    if chosen is None or not {"used_database", "anyio_backend"} <= chosen.params.keys():
        return True
    loop, _ = chosen.params["anyio_backend"]
    return loop == "asyncio" or chosen.params["used_database"] in ON_OTHER_LOOPS


@pytest.fixture(scope="module", params=KINDS)
def used_database(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    service_url: Callable[[str], str],
) -> Iterator[Database]:
    """A database of each kind, used through each driver."""
    awaits = request.param.startswith("a")
    if request.param in ("psycopg", "asyncpg"):
        opened = postgres(service_url("postgres"), QueuePool)
    elif request.param in ("pymysql", "aiomysql"):
        opened = mariadb(service_url("mariadb"), QueuePool)
    else:
        opened = sqlite(tmp_path_factory.mktemp("rules") / "test.db")
    with opened as engine:
        yield Database(engine, to_await(engine) if awaits else engine)


@pytest.fixture
def database(used_database: Database) -> Database:
    """A database with one row in it."""
    used_database.clear()
    return used_database


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database of its own, on SQLite."""
    with sqlite(tmp_path / "test.db") as engine:
        yield engine


@pytest.fixture
def async_engine(engine: Engine, anyio_backend_name: str) -> AsyncEngine:
    """The same database, for those who await."""
    if anyio_backend_name != "asyncio":
        pytest.skip("SQLAlchemy's asynchronous engines are made for asyncio")
    return to_await(engine)


@pytest.fixture
def bus() -> EventBus:
    """A bus with one handler of strings."""
    bus = EventBus()

    @bus.on(str)
    async def handle(event: str) -> None: ...

    return bus


@pytest.fixture
def tie(bus: EventBus, database: Database) -> Iterator[CommitTie]:
    """The transactions of the database decide."""
    with deliver_on_commit(bus, database.engine) as tie:
        yield tie


@pytest.fixture
def seen(bus: EventBus, tie: CommitTie) -> list[str]:
    """What became of each event, in the order of its end."""
    return witnessed(bus)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What eventkit has warned of so far."""
    return lambda: [
        record.getMessage() for record in caplog.records if record.name.startswith("eventkit")
    ]
