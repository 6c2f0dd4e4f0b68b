"""The outbox's connections: a twin of each kind of engine, used from threads and event loops."""

import asyncio
import gc
import os
import sqlite3
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import to_thread
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import (
    AssertionPool,
    NullPool,
    Pool,
    SingletonThreadPool,
    StaticPool,
)
from sqlalchemy.util import await_only

from eventkit.outbox._database import Database, _Awaiting
from tests.outbox.engines import KINDS, Place, place_of, processed_apart

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
SECONDS = 20  # that a test waits for another thread before it fails


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, service_url: Callable[[str], str]
) -> Iterator[Place]:
    """A database with an empty table, reached by each driver."""
    with place_of(request.param, tmp_path, service_url) as place:
        yield place


@pytest.fixture
def opened() -> Iterator[Callable[..., Database]]:
    """Make databases that are closed after the test."""
    made: list[Database] = []

    def make(*arguments: Any, **options: Any) -> Database:
        made.append(Database(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def database(place: Place, opened: Callable[..., Database]) -> Database:
    """A twin of an engine that nobody has used."""
    return opened(place.engine())


class Connections:
    """How many the engine's pool and its twin's have open."""

    def __init__(self, engine: Engine | AsyncEngine) -> None:
        self.open = 0
        self.most = 0
        self.opened = 0
        sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        event.listen(sync, "connect", self._count)
        event.listen(sync, "close", self._uncount)
        event.listen(sync, "close_detached", self._uncount)

    def _count(self, *_: object) -> None:
        self.opened += 1
        self.open += 1
        self.most = max(self.most, self.open)

    def _uncount(self, *_: object) -> None:
        self.open -= 1


def runs_here(place: Place, anyio_backend_name: str) -> None:
    if place.awaits and anyio_backend_name == "trio":
        pytest.skip("asyncio's driver")


# Transactions


def test_a_call_is_committed(database: Database, place: Place) -> None:
    database.call(place.insert("a"))

    assert database.call(place.names, writes=False) == ["a"]
    assert database.awaits is place.awaits


def test_a_call_that_raises_is_rolled_back(database: Database, place: Place) -> None:
    def fail(connection: Connection) -> None:
        place.insert("a")(connection)
        raise LookupError

    with pytest.raises(LookupError):
        database.call(fail)

    assert database.call(place.names) == []


@pytest.mark.anyio
async def test_a_run_is_committed_and_its_error_comes_out(
    database: Database, place: Place, anyio_backend_name: str
) -> None:
    runs_here(place, anyio_backend_name)

    def fail(connection: Connection) -> None:
        place.insert("b")(connection)
        raise LookupError

    await database.run(place.insert("a"))
    with pytest.raises(LookupError):
        await database.run(fail)

    assert await database.run(place.names, writes=False) == ["a"]


@pytest.mark.anyio
async def test_an_engine_that_is_awaited_is_refused_on_trio(
    tmp_path: Path, opened: Callable[..., Database], on_trio: None
) -> None:
    pytest.importorskip("aiosqlite")
    database = opened(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}"))

    with pytest.raises(RuntimeError, match="works on asyncio only: on trio use a blocking"):
        await database.run(lambda connection: None)


def test_it_works_while_the_event_loop_is_blocked(database: Database, place: Place) -> None:
    async def block() -> list[str]:
        database.call(place.insert("a"))
        return database.call(place.names)

    assert asyncio.run(block()) == ["a"]


@pytest.mark.anyio
async def test_a_run_that_is_cancelled_midway_goes_on_and_its_caller_does_not_wait(
    database: Database, place: Place, anyio_backend_name: str
) -> None:
    runs_here(place, anyio_backend_name)
    begun, go_on, ended = anyio.Event(), threading.Event(), threading.Event()
    hold = holding(place, begun_in_loop(begun), go_on, ended)

    async with anyio.create_task_group() as group:
        group.start_soon(database.run, hold)
        await begun.wait()
        group.cancel_scope.cancel()
    assert not ended.is_set()
    go_on.set()
    await to_thread.run_sync(ended.wait, SECONDS)

    await to_thread.run_sync(database.close)  # waits for it
    assert await database.run(place.names) == ["a"]


def begun_in_loop(begun: anyio.Event) -> Callable[[], None]:
    """Set it from the thread that the transaction is in."""
    if asyncio_runs():
        loop = asyncio.get_running_loop()
        return lambda: void(loop.call_soon_threadsafe(begun.set))
    import trio

    token = trio.lowlevel.current_trio_token()
    return lambda: token.run_sync_soon(begun.set)


def void(_: object) -> None: ...


def asyncio_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def holding(
    place: Place, begin: Callable[[], None], go_on: threading.Event, ended: threading.Event
) -> Callable[[Connection], None]:
    """A transaction that writes, says so, and goes on when it is told."""

    def hold(connection: Connection) -> None:
        place.insert("a")(connection)
        begin()
        assert go_on.wait(SECONDS)
        ended.set()

    return hold


@pytest.mark.anyio
async def test_a_run_that_is_cancelled_before_it_has_begun_never_begins(
    place: Place, opened: Callable[..., Database], anyio_backend_name: str
) -> None:
    runs_here(place, anyio_backend_name)
    database = opened(place.engine())
    release: Future[None] = Future()
    held = threading.Semaphore(0)

    def hold(_: Connection) -> None:
        held.release()
        if place.awaits:
            await_only(asyncio.wrap_future(release))
        else:
            release.result(SECONDS)

    with ThreadPoolExecutor(2) as threads:
        holders = [threads.submit(database.call, hold, writes=False) for _ in range(2)]
        for _ in holders:
            assert await to_thread.run_sync(partial(held.acquire, timeout=SECONDS))
        with anyio.move_on_after(0.01) as scope:
            await database.run(place.insert("late"))
        release.set_result(None)
    for each in holders:
        each.result()

    assert scope.cancelled_caught
    await to_thread.run_sync(database.close)
    assert await database.run(place.names) == []


# Connections


def busy(database: Database) -> None:
    """Use it from many threads at once, and on the reserved connection."""
    with ThreadPoolExecutor(8) as threads:
        done = [
            threads.submit(
                database.call,
                lambda connection: connection.exec_driver_sql("SELECT 1").scalar_one(),
                writes=False,
                reserved=number % 4 == 0,
            )
            for number in range(40)
        ]
    assert [each.result() for each in done] == [1] * 40


def test_at_most_three_connections_are_open_whatever_the_pool_has_room_for(
    place: Place, opened: Callable[..., Database]
) -> None:
    engine = place.engine(pool_size=20)
    counted = Connections(engine)
    database = opened(engine)

    busy(database)
    database.close()

    assert 1 <= counted.most <= 3
    assert counted.open == 0


@pytest.mark.parametrize("reserved", [False, True])
def test_two_are_for_all_and_one_is_reserved(
    place: Place, opened: Callable[..., Database], reserved: bool
) -> None:
    if place.awaits:
        pytest.skip("transactions that block take turns in one thread")
    database, release = opened(place.engine()), threading.Event()
    inside = threading.Barrier(3 if not reserved else 2, timeout=SECONDS)

    def hold(_: Connection) -> None:
        inside.wait()
        release.wait(SECONDS)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(1 if reserved else 2):
            threads.submit(database.call, hold, writes=False, reserved=reserved)
        inside.wait()
        answer = database.call(lambda _: "here", writes=False, reserved=not reserved)
        release.set()

    assert answer == "here"


POOLS: dict[str, dict[str, Any]] = {
    "one": {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.001},
    "two": {"pool_size": 1, "max_overflow": 1, "pool_timeout": 0.001},
    "unlimited": {"pool_size": 0},
    "null": {"poolclass": NullPool},
    "static": {"poolclass": StaticPool},
    "assertion": {"poolclass": AssertionPool},
    "singleton": {"poolclass": SingletonThreadPool},
}


@pytest.mark.parametrize("pool", POOLS)
def test_any_pool_will_do(place: Place, opened: Callable[..., Database], pool: str) -> None:
    if place.awaits and pool in {"assertion", "singleton"}:
        pytest.skip("made for threads")
    options = dict(POOLS[pool])
    if place.kind == "pysqlite":
        options["connect_args"] = {"check_same_thread": False}
    engine = place.engine(**options)
    counted = Connections(engine)
    database = opened(engine)

    busy(database)
    database.close()

    assert counted.most <= {"one": 1, "two": 2, "static": 1, "assertion": 1}.get(pool, 3)
    assert counted.open == 0


def test_a_pool_of_one_that_the_user_holds_is_not_waited_for(
    tmp_path: Path, opened: Callable[..., Database]
) -> None:
    engine = create_engine(
        f"sqlite:///{tmp_path / 'x.db'}", pool_size=1, max_overflow=0, pool_timeout=0.001
    )
    database = opened(engine)

    with engine.connect():
        busy(database)
    engine.dispose()


def test_the_twin_has_the_listeners_of_the_pool_and_adds_none(
    place: Place, opened: Callable[..., Database]
) -> None:
    engine = place.engine()
    pool = engine.pool
    Connections(engine)
    before = listeners(pool)
    database = opened(engine)

    database.call(lambda connection: None)

    assert listeners(pool) == before
    assert engine.pool is pool
    assert pool.checkedin() == pool.checkedout() == 0  # type: ignore[attr-defined]


def listeners(pool: Pool) -> dict[str, list[object]]:
    names = ["connect", "first_connect", "checkout", "checkin", "close", "reset", "invalidate"]
    return {name: [*getattr(pool.dispatch, name)] for name in names}


def test_an_option_engine_leads_to_its_root_and_its_options_are_not_applied(
    tmp_path: Path, opened: Callable[..., Database]
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'x.db'}", hide_parameters=True)
    option = engine.execution_options(schema_translate_map={None: "elsewhere"}, note=1)
    database = opened(option.execution_options(more=2))

    options, hidden = database.call(
        lambda connection: (connection.get_execution_options(), connection.engine.hide_parameters)
    )

    assert options == {}
    assert hidden


def test_an_engine_of_the_users_own_is_used_as_it_is(
    place: Place, opened: Callable[..., Database]
) -> None:
    own = place.engine(execution_options={"note": 1})
    counted = Connections(own)
    database = opened(place.engine(), own)

    note = database.call(lambda connection: connection.get_execution_options()["note"])
    database.call(place.insert("a"))
    database.close()

    assert note == 1
    assert counted.most == 1
    assert counted.open == 0


@pytest.mark.anyio
async def test_a_lost_connection_costs_one_error(
    place: Place, opened: Callable[..., Database], anyio_backend_name: str
) -> None:
    if place.schema is None:
        pytest.skip("needs a server")
    runs_here(place, anyio_backend_name)
    database = opened(place.engine())
    number = await database.run(
        lambda connection: connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    )
    killer = create_engine(place.url.replace("asyncpg", "psycopg"), poolclass=NullPool)
    with killer.connect() as connection:
        connection.exec_driver_sql(f"SELECT pg_terminate_backend({number}, 5000)")

    with pytest.raises(DBAPIError):
        await database.run(place.names)

    assert await database.run(place.names) == []


@pytest.mark.parametrize("level", ["SERIALIZABLE", "repeatable_read", "READ COMMITTED", None])
def test_the_twin_runs_read_committed_on_postgresql(
    place: Place, opened: Callable[..., Database], level: str | None
) -> None:
    if place.schema is None:
        pytest.skip("about PostgreSQL")
    engine = place.engine() if level is None else place.engine(isolation_level=level)
    database = opened(engine)

    for _ in range(2):
        found = database.call(
            lambda connection: connection.exec_driver_sql(
                "SELECT current_setting('transaction_isolation')"
            ).scalar_one()
        )
        assert found == "read committed"


# SQLite


def begin_by_hand(connection: Any, _: object) -> None:
    connection.isolation_level = None


def no_autocommit(connection: Any, _: object) -> None:
    connection.autocommit = False


def first_statements(
    database: Database, set_up: Callable[..., None] | None, engine: Engine
) -> list[str]:
    """What SQLite is given in one transaction that writes."""
    seen: list[str] = []

    def trace(connection: sqlite3.Connection, _: object) -> None:
        connection.set_trace_callback(seen.append)

    if set_up is not None:
        event.listen(engine, "connect", set_up)
    event.listen(engine, "connect", trace)
    database.call(lambda connection: connection.exec_driver_sql("INSERT INTO things VALUES ('a')"))
    database.close()
    return seen


MODES: dict[str, Callable[..., None] | None] = {"legacy": None, "BEGIN recipe": begin_by_hand}
if sys.version_info >= (3, 12):
    MODES["autocommit=False"] = no_autocommit


@pytest.mark.parametrize("mode", MODES)
def test_a_transaction_that_writes_on_sqlite_takes_the_lock_as_it_begins(
    tmp_path: Path, opened: Callable[..., Database], mode: str
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE things (name text)")
    engine.dispose()
    database = opened(engine)

    seen = first_statements(database, MODES[mode], engine)

    begun = [each for each in seen if each.startswith("BEGIN")]
    assert ("BEGIN IMMEDIATE" in begun) is (mode != "autocommit=False")
    assert any(each.startswith("INSERT") for each in seen)
    assert (
        opened(engine).call(
            lambda connection: connection.exec_driver_sql(
                "SELECT count(*) FROM things"
            ).scalar_one()
        )
        == 1
    )


def test_a_transaction_that_reads_on_sqlite_does_not_wait_for_one_that_writes(
    place: Place, opened: Callable[..., Database]
) -> None:
    if place.schema is not None:
        pytest.skip("about SQLite")
    database = opened(place.engine(), busy_timeout=0)
    path = place.url.split("///")[1]
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")

    assert database.call(place.names, writes=False) == []
    writer.rollback()
    writer.close()


def test_the_busy_timeout_is_raised_and_never_lowered(
    place: Place, opened: Callable[..., Database]
) -> None:
    if place.schema is not None:
        pytest.skip("about SQLite")

    def timeout(database: Database) -> object:
        return database.call(
            lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        )

    engine = place.engine(connect_args={"timeout": 10})

    assert timeout(opened(engine, busy_timeout=12.5)) == 12_500
    assert timeout(opened(engine, busy_timeout=1)) == 10_000


@pytest.mark.filterwarnings("ignore:Selection of the SingletonThreadPool")
@pytest.mark.parametrize(
    ("url", "in_memory"),
    [
        ("sqlite://", True),
        ("sqlite:///:memory:", True),
        ("sqlite:///file::memory:?uri=true", True),
        ("sqlite:///file:x?mode=memory&cache=shared&uri=true", True),
        ("sqlite:///{path}", False),
        ("sqlite:///file:{path}?mode=rwc&uri=true", False),
        ("sqlite+aiosqlite://", True),
        ("sqlite+aiosqlite:///{path}", False),
    ],
)
def test_it_tells_a_database_in_memory(
    tmp_path: Path, opened: Callable[..., Database], url: str, in_memory: bool
) -> None:
    url = url.format(path=tmp_path / "x.db")
    if "aiosqlite" in url:
        pytest.importorskip("aiosqlite")
    database = opened(create_async_engine(url) if "aio" in url else create_engine(url))

    assert database.is_in_memory is in_memory
    assert database.is_in_memory is in_memory


def test_a_creator_that_opens_a_file_is_not_in_memory(
    tmp_path: Path, opened: Callable[..., Database]
) -> None:
    engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(tmp_path / "x.db"))

    assert not opened(engine).is_in_memory


# What is refused


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "autocommit"])
def test_an_engine_that_commits_each_statement_is_refused(level: str) -> None:
    plain = create_engine("sqlite://")
    for engine in (
        create_engine("sqlite://", isolation_level=level),
        plain.execution_options(isolation_level=level),
    ):
        with pytest.raises(ValueError, match="nothing would be atomic"):
            Database(engine)
        with pytest.raises(ValueError, match="nothing would be atomic"):
            Database(plain, engine)


def test_an_awaited_engine_that_commits_each_statement_is_refused() -> None:
    pytest.importorskip("aiosqlite")
    engine = create_async_engine("sqlite+aiosqlite://", isolation_level="AUTOCOMMIT")

    with pytest.raises(ValueError, match="nothing would be atomic"):
        Database(engine)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="SQLite's driver has no such mode")
def test_a_driver_that_commits_each_statement_is_refused_as_it_connects(
    tmp_path: Path, opened: Callable[..., Database]
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'x.db'}", connect_args={"autocommit": True})

    with pytest.raises(ValueError, match="nothing would be atomic"):
        opened(engine).call(lambda connection: None)


def test_another_database_is_refused() -> None:
    engine = create_engine("mysql+pymysql://root:secret@127.0.0.1/test")

    with pytest.raises(ValueError, match="use deliver_on_commit") as refused:
        Database(engine)

    assert "secret" not in str(refused.value)


def test_a_database_that_is_too_old_is_refused_as_it_connects(
    place: Place, opened: Callable[..., Database]
) -> None:
    engine = place.engine()
    database = opened(engine)
    sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine

    def grow_old(connection: Connection) -> None:
        connection.dialect.server_version_info = (3, 34, 1)

    opened(engine).call(grow_old)
    assert sync.dialect.server_version_info == (3, 34, 1)

    with pytest.raises(ValueError, match=r"and this is 3\.34\.1: use deliver_on_commit"):
        database.call(lambda connection: None)


def test_an_engine_that_asks_its_server_just_now_is_looked_at_later(
    place: Place, opened: Callable[..., Database]
) -> None:
    database = opened(place.engine())
    known: list[Any] = []

    def forget(connection: Connection) -> None:
        known.append(connection.dialect.server_version_info)
        connection.dialect.server_version_info = None

    def find_out(connection: Connection) -> None:
        connection.dialect.server_version_info = (3, 34) if place.schema is None else (11, 22)

    opened(database._engine).call(forget)
    database.call(find_out)

    with pytest.raises(ValueError, match="use deliver_on_commit"):
        database.call(lambda connection: None)
    assert known[0] is not None


# Its end


def test_it_may_be_closed_twice_and_used_again(database: Database, place: Place) -> None:
    database.close()
    database.call(place.insert("a"))
    threads = outbox_threads()
    database.close()
    database.close()

    assert len(threads) == place.awaits
    assert outbox_threads() == []
    assert database.call(place.names) == ["a"]


def outbox_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "eventkit-outbox"]


def test_one_that_is_garbage_ends_its_thread_and_its_connections(place: Place) -> None:
    engine = place.engine()
    counted = Connections(engine)
    database = Database(engine)
    database.call(place.names)
    gone = weakref.ref(database)

    del database
    gc.collect()

    assert gone() is None
    assert outbox_threads() == []
    assert counted.open == 0


def test_transactions_that_do_not_end_are_cancelled_as_it_is_closed(
    tmp_path: Path, opened: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiosqlite")
    monkeypatch.setattr("eventkit.outbox._database._PATIENCE", 0.5)
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}")
    database, begun = opened(engine), threading.Event()

    def hang(connection: Connection) -> None:
        begun.set()
        await_only(asyncio.Event().wait())

    link = database._link()
    assert isinstance(link, _Awaiting)
    # Not by `call` in threads: one that is late would open connections anew.
    waiting = [link.submit(hang, reserved=False) for _ in range(3)]
    late = link.submit(lambda connection: None, reserved=False)
    assert begun.wait(SECONDS)
    late.cancel()
    (thread,) = outbox_threads()
    database.close()
    for each in waiting:
        with pytest.raises(RuntimeError, match="were closed during this call"):
            each.result(SECONDS)

    thread.join(SECONDS)  # `close` may have waited in vain
    assert not thread.is_alive()


def test_it_may_be_closed_by_the_thread_that_works_for_it(place: Place) -> None:
    """As the garbage collector does, which runs in any thread."""
    if not place.awaits:
        pytest.skip("works in the thread that calls")
    database = Database(place.engine())

    def close(connection: Connection) -> list[threading.Thread]:
        place.insert("a")(connection)
        database.close()
        return outbox_threads()

    (thread,) = database.call(close)
    thread.join(SECONDS)

    assert not thread.is_alive()
    assert database.call(place.names) == ["a"]
    database.close()


def test_connections_that_cannot_be_closed_do_not_keep_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiosqlite")
    own = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}", poolclass=NullPool)
    database = Database(own, own)
    database.call(lambda connection: None)

    async def fail(*_: object) -> None:
        raise OSError("the server is away")

    monkeypatch.setattr(AsyncEngine, "dispose", fail)
    database.close()

    assert outbox_threads() == []


AT_EXIT = """
import logging
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from eventkit.outbox._database import Database

logging.getLogger("asyncio").setLevel(logging.ERROR)  # a busy machine is told of slow steps
engine = {make}({url!r})
database = Database(engine)
print(database.call(lambda connection: connection.exec_driver_sql("SELECT 1").scalar_one()))
"""


def test_a_process_that_has_not_closed_it_ends_in_silence(place: Place) -> None:
    make = "create_async_engine" if place.awaits else "create_engine"

    assert processed_apart(AT_EXIT.format(make=make, url=place.url), "-X", "dev") == "1\n"


FORKING = """
import os
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from eventkit.outbox._database import Database

engine, own = {make}({url!r}), {make}({url!r})
for database in (Database(engine), Database(engine, own)):
    def insert(connection):
        connection.exec_driver_sql("INSERT INTO {table} VALUES ('a')")
        return id(connection.connection.driver_connection)

    used = {{database.call(insert)}}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 2 if database.call(insert) in used else 0
            database.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert database.call(insert) in used
    child = os.fork()
    if child == 0:
        raise SystemExit  # with all that runs at an exit
    assert os.waitpid(child, 0)[1] == 0
    assert database.call(insert) in used
    print(database.call(lambda connection: connection.exec_driver_sql(
        "SELECT count(*) FROM {table}").scalar_one()))
"""


@forks
def test_a_forked_child_connects_anew_and_leaves_its_parents_connections_alone(
    place: Place,
) -> None:
    make = "create_async_engine" if place.awaits else "create_engine"
    script = FORKING.format(make=make, url=place.url, table=place.table)

    assert processed_apart(script, "-W", "ignore") == "4\n8\n"
