"""A database of its own for each test, and workers on it; a PostgreSQL server for all of them."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from sqlalchemy import Engine, make_url, text

from tests.conftest import require
from tests.crash.cluster import Cluster, Missing, cluster, drop_database
from tests.crash.nursery import PATIENCE, Nursery
from tests.crash.processes import Process, Workers, workers
from tests.crash.soak import LOOPS
from tests.crash.tables import Count, count, engine_for, prepare

ALL = os.environ.get("EVENTKIT_DRIVERS") == "all"
DRIVERS = [*LOOPS] if ALL else ["pysqlite", "asyncpg"]


@pytest.fixture(scope="session")
def server() -> Iterator[Cluster]:
    """A PostgreSQL of the tests' own."""
    pytest.importorskip("psycopg")
    try:
        with cluster() as made:
            yield made
    except Missing as error:
        require(str(error))


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@dataclass(slots=True)
class Place:
    """A database with the tables, and the workers on it.

    Attributes:
        driver: The workers'.
        engine: The test's own.
        workers: All of this test.
        server: The PostgreSQL that it is on.
    """

    driver: str
    engine: Engine
    workers: Workers
    server: Cluster | None

    @property
    def is_sqlite(self) -> bool:
        return self.server is None

    def start(self, *options: str) -> Process:
        return self.workers.start(*options)

    def settle(self, *living: Process) -> None:
        """Wait until nothing is kept any more, and the dead are buried."""
        owners = {str(each.hear("ready")["owner"]) for each in living}
        self.wait_until(
            lambda: (
                not self.query("select id from eventkit_outbox where state <> 2")
                and not {owner for (owner,) in self.query("select owner from eventkit_process")}
                - owners
            )
        )

    def query(self, statement: str) -> list[tuple[object, ...]]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(statement))]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Ask the database until it is so; nobody tells of what other processes write."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            for process in self.workers.all:
                assert time.monotonic() < deadline, (
                    f"{self.query('select * from eventkit_process')} "
                    f"{self.query('select handler, state, attempt, owner from eventkit_outbox')} "
                    f"{process.story()}"
                )
            time.sleep(0.05)

    def count(self, handlers: str = "plain,exact") -> Count:
        return count(self.engine, handlers.split(","))


@contextmanager
def place_on(
    driver: str, tmp_path: Path, nursery: Nursery, server: Cluster | None
) -> Generator[Place]:
    pytest.importorskip({"pysqlite": "sqlite3"}.get(driver, driver))
    name = "" if server is None else server.new_database()
    url = f"sqlite:///{tmp_path / 'crash.db'}" if server is None else server.url(name)
    engine = engine_for(url)
    prepare(engine, keys=4)
    scheme = make_url(url).get_backend_name()
    address = make_url(url).set(drivername=f"{scheme}+{driver}")
    with workers(address.render_as_string(False), LOOPS[driver], nursery) as group:
        yield Place(driver, engine, group, server)
    if server is not None:
        drop_database(server.url("postgres"), name)


@pytest.fixture(params=DRIVERS)
def place(request: pytest.FixtureRequest, tmp_path: Path, nursery: Nursery) -> Iterator[Place]:
    """On SQLite and on PostgreSQL."""
    driver: str = request.param
    server = None if "sqlite" in driver else request.getfixturevalue("server")
    with place_on(driver, tmp_path, nursery, server) as made:
        yield made


@pytest.fixture(params=[each for each in DRIVERS if "sqlite" not in each])
def postgres(
    request: pytest.FixtureRequest, tmp_path: Path, nursery: Nursery, server: Cluster
) -> Iterator[Place]:
    """On PostgreSQL alone."""
    with place_on(request.param, tmp_path, nursery, server) as made:
        yield made


@pytest.fixture(params=[each for each in DRIVERS if "sqlite" in each])
def sqlite(request: pytest.FixtureRequest, tmp_path: Path, nursery: Nursery) -> Iterator[Place]:
    """On SQLite alone."""
    with place_on(request.param, tmp_path, nursery, None) as made:
        yield made
