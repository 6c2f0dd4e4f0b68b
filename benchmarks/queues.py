"""Other packages that keep work in a table, each set up as its documentation shows.

An application that has a session gives them its connection, so that their rows are written in its
transaction. Each is then given a worker in this process, which is woken by the database where the
package can do that. All run ten handlers at once; everything else is left as it comes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import anyio
from sqlalchemy import MetaData

from benchmarks.durable import ASYNCPG, PSYCOPG, Database, placed
from benchmarks.harness import installed
from benchmarks.peers import load

AT_ONCE = 10

BODY = {key: str(value) for key, value in asdict(placed()).items()}


@dataclass(frozen=True, slots=True)
class Queue:
    """What a package is asked to do.

    Attributes:
        add: Writes a row for each of so many handlers, in the transaction of a session.
        fill: Commits so many rows for the first handler.
        working: Has its worker run in the block.
    """

    add: Callable[[Any, int], Awaitable[object]]
    fill: Callable[[int], Awaitable[object]]
    working: Callable[[], AbstractAsyncContextManager[object]]


@dataclass(frozen=True, slots=True)
class Package:
    """One of them.

    Attributes:
        name: Of its distribution, too.
        place: The database and the driver that it is used with here.
        open: Makes its tables beside those of the application. Its handlers call what it is given.
    """

    name: str
    place: str
    open: Callable[[Database, Callable[[], object]], AbstractAsyncContextManager[Queue]]

    @property
    def missing(self) -> str:
        """Why it cannot take part; empty if it can."""
        return "" if installed(self.name) else "not installed"


def name_of(handler: int) -> str:
    """What a handler's queue, topic or task is called."""
    return f"handler_{handler}"


def _dsn(database: Database) -> str:
    return database.url.set(drivername="postgresql").render_as_string(hide_password=False)


async def _raw(session: Any) -> Any:
    """The driver's connection of a session that is awaited."""
    connection = await session.connection()
    return (await connection.get_raw_connection()).driver_connection


@asynccontextmanager
async def txoutbox(database: Database, ended: Callable[[], object]) -> AsyncGenerator[Queue]:
    package: Any = load("txoutbox")
    adapter: Any = load("txoutbox.adapters.postgres")
    found = {"search_path": database.schema}
    async with load("asyncpg").create_pool(_dsn(database), server_settings=found) as pool:
        outbox = adapter.PostgresStorage(
            pool, schema=database.schema, notify_channel=f"{database.schema}_outbox"
        )
        await outbox.create_schema()

        async def add(session: Any, handlers: int) -> None:
            connection = await _raw(session)
            for handler in range(handlers):
                await outbox.insert(connection, name_of(handler), BODY)

        async def fill(rows: int) -> None:
            async with pool.acquire() as connection, connection.transaction():
                for _ in range(rows):
                    await outbox.insert(connection, name_of(0), BODY)

        async def publish(message: Any) -> None:
            message.json()
            ended()

        @asynccontextmanager
        async def working() -> AsyncGenerator[None]:
            relay = package.Relay(outbox, publish, config=package.RelayConfig(concurrency=AT_ONCE))
            async with await outbox.listen(relay.wake), relay:
                yield

        yield Queue(add, fill, working)


@asynccontextmanager
async def pgqueuer(database: Database, ended: Callable[[], object]) -> AsyncGenerator[Queue]:
    driver: Any = load("pgqueuer.db").AsyncpgDriver
    queries: Any = load("pgqueuer.queries").Queries
    connect: Any = load("asyncpg").connect
    found = {"search_path": database.schema}
    own = await connect(_dsn(database), server_settings=found)
    await queries(driver(own)).install()

    async def add(session: Any, handlers: int) -> None:
        names = [name_of(handler) for handler in range(handlers)]
        body = load("json").dumps(BODY).encode()
        await queries(driver(await _raw(session))).enqueue(names, [body] * handlers, [0] * handlers)

    async def fill(rows: int) -> None:
        body = load("json").dumps(BODY).encode()
        await queries(driver(own)).enqueue([name_of(0)] * rows, [body] * rows, [0] * rows)

    @asynccontextmanager
    async def working() -> AsyncGenerator[None]:
        connection = await connect(_dsn(database), server_settings=found)
        worker = load("pgqueuer").PgQueuer(driver(connection))

        async def process(job: Any) -> None:
            load("json").loads(job.payload)
            ended()

        worker.entrypoint(name_of(0))(process)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            await anyio.sleep(0.5)  # it listens then
            yield
            worker.shutdown.set()
        await connection.close()

    yield Queue(add, fill, working)
    await own.close()


@asynccontextmanager
async def faststream_outbox(
    database: Database, ended: Callable[[], object]
) -> AsyncGenerator[Queue]:
    package: Any = load("faststream_outbox")
    sessions: Any = load("sqlalchemy.ext.asyncio").async_sessionmaker(database.engine)
    metadata = MetaData()
    table = package.make_outbox_table(metadata, table_name="faststream_rows")
    await database.call(metadata.create_all)
    # By default it writes two lines to the log for each row.
    broker = package.OutboxBroker(database.engine, outbox_table=table, logger=None)

    async def handle(body: dict[str, str]) -> None:
        ended()

    broker.subscriber(name_of(0), max_workers=AT_ONCE)(handle)

    async def add(session: Any, handlers: int) -> None:
        for handler in range(handlers):
            await broker.publish(BODY, queue=name_of(handler), session=session)

    async def fill(rows: int) -> None:
        async with sessions.begin() as session:
            await broker.publish_batch(*[BODY] * rows, queue=name_of(0), session=session)

    @asynccontextmanager
    async def working() -> AsyncGenerator[None]:
        await broker.start()
        try:
            yield
        finally:
            await broker.stop()

    await broker.connect()
    yield Queue(add, fill, working)


@asynccontextmanager
async def procrastinate(database: Database, ended: Callable[[], object]) -> AsyncGenerator[Queue]:
    package: Any = load("procrastinate")
    options = {"kwargs": {"options": f"-c search_path={database.schema}"}}

    def app_with(connector: Any) -> tuple[Any, list[Any]]:
        app = package.App(connector=connector(conninfo=_dsn(database), **options))

        async def process(**body: str) -> None:
            ended()

        return app, [app.task(name=name_of(n), queue="rows")(process) for n in range(AT_ONCE)]

    app, tasks = app_with(package.PsycopgConnector)
    blocking, blocking_tasks = app_with(package.SyncPsycopgConnector)

    async def add(session: Any, handlers: int) -> None:
        connection = session.connection().connection.driver_connection
        for handler in range(handlers):
            blocking_tasks[handler].configure(connection=connection).defer(**BODY)

    async def fill(rows: int) -> None:
        await tasks[0].batch_defer_async(*[BODY] * rows)

    @asynccontextmanager
    async def working() -> AsyncGenerator[None]:
        async with anyio.create_task_group() as group:

            async def work() -> None:
                await app.run_worker_async(concurrency=AT_ONCE, install_signal_handlers=False)

            group.start_soon(work)
            await anyio.sleep(0.5)  # it listens then
            yield
            group.cancel_scope.cancel()

    with blocking.open():
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            yield Queue(add, fill, working)


PACKAGES = (
    Package("txoutbox", ASYNCPG, txoutbox),
    Package("pgqueuer", ASYNCPG, pgqueuer),
    Package("faststream-outbox", ASYNCPG, faststream_outbox),
    Package("procrastinate", PSYCOPG, procrastinate),
)
