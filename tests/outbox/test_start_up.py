"""When the outbox begins to work in an application: once that has started up itself."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from anyio import Event, create_task_group
from anyio.abc import TaskGroup
from fastapi import Depends, FastAPI, Request
from sqlalchemy import Engine, MetaData, create_engine, event
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit import Durable, EventBus
from eventkit.exceptions import NoOutboxError, OutboxSchemaError
from eventkit.outbox import Outbox, add_tables
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Lifespan, lifespan_of

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class OrderPlaced:
    number: int


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    yield engine
    engine.dispose()


@pytest.fixture
def tables(engine: Engine) -> MetaData:
    metadata = MetaData()
    add_tables(metadata)
    return metadata


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


async def started(app: ASGIApp) -> Lifespan:
    """A start of the app that fails, or is followed by its end."""
    lifespan = Lifespan(app)
    async with create_task_group() as tasks:
        tasks.start_soon(lifespan.run)
        await lifespan.start()
        await lifespan.stop()
    return lifespan


def served(bus: EventBus, lifespan: object = None) -> FastAPI:
    app = FastAPI(lifespan=lifespan)  # type: ignore[arg-type]
    app.add_middleware(EventContextMiddleware, bus=bus)
    return app


async def test_the_lifespan_may_make_the_tables(
    bus: EventBus, engine: Engine, tables: MetaData
) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        tables.create_all(engine)
        yield

    with Outbox(bus, engine):
        async with lifespan_of(served(bus, lifespan)) as running:
            assert running.trace == ["startup.complete"]


async def test_the_lifespan_may_make_the_outbox(
    bus: EventBus, engine: Engine, tables: MetaData
) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        with Outbox(bus, engine):
            yield

    @bus.on(OrderPlaced, name="shop:receipt", durable=True)
    async def receipt(event: OrderPlaced) -> None: ...

    tables.create_all(engine)
    async with lifespan_of(served(bus, lifespan)) as running:
        assert running.trace == ["startup.complete"]


async def test_what_was_left_runs_with_what_the_lifespan_has_opened(
    bus: EventBus, engine: Engine, tables: MetaData
) -> None:
    done = Event()
    sent: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
        yield {"mailer": "the mailer"}

    def mailer(request: Request) -> str:
        opened: str = request.state.mailer
        return opened

    @bus.on(OrderPlaced, name="shop:receipt", durable=True)
    async def receipt(event: OrderPlaced, mailer: Annotated[str, Depends(mailer)]) -> None:
        sent.append(mailer)
        done.set()

    tables.create_all(engine)
    writer = EventBus()
    writer.subscribe(OrderPlaced, receipt, name="shop:receipt", durable=True)
    with Outbox(writer, engine, relay=False):
        async with writer.context():
            with Session(engine) as session, session.begin():
                writer.publish(OrderPlaced(1))

    with Outbox(bus, engine):
        async with lifespan_of(served(bus, lifespan)):
            await done.wait()

    assert sent == ["the mailer"]
    assert bus.stats.failed == 0


async def test_without_tables_the_application_closes_what_it_has_opened(
    bus: EventBus, engine: Engine
) -> None:
    opened: list[TaskGroup] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with create_task_group() as tasks:
            opened.append(tasks)
            try:
                yield
            finally:
                opened.clear()

    with Outbox(bus, engine):
        failed = await started(served(bus, lifespan))

    assert failed.trace == ["startup.failed"]
    assert isinstance(failed.error, OutboxSchemaError)
    assert not opened


async def test_a_handler_that_the_lifespan_subscribes_needs_an_outbox(bus: EventBus) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        bus.subscribe(OrderPlaced, receipt, name="shop:receipt", durable=True)
        yield

    async def receipt(event: OrderPlaced) -> None: ...

    failed = await started(served(bus, lifespan))

    assert failed.trace == ["startup.failed"]
    assert isinstance(failed.error, NoOutboxError)


async def test_an_app_without_a_lifespan_is_refused_too(bus: EventBus) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"

    async def receipt(event: OrderPlaced) -> None: ...

    bus.subscribe(OrderPlaced, receipt, name="shop:receipt", durable=True)
    failed = await started(EventContextMiddleware(app, bus))

    assert failed.trace == ["startup.failed"]
    assert isinstance(failed.error, NoOutboxError)


async def test_a_process_that_only_writes_keeps_no_connection(
    bus: EventBus, engine: Engine, tables: MetaData
) -> None:
    opened: list[object] = []
    tables.create_all(engine)
    engine.dispose()

    @event.listens_for(engine, "connect")
    def note_open(connection: object, record: object) -> None:
        opened.append(connection)

    @event.listens_for(engine, "close")
    def note_close(connection: object, record: object) -> None:
        opened.remove(connection)

    with Outbox(bus, engine, relay=False) as outbox:
        async with lifespan_of(served(bus)):
            assert opened == []
            assert not outbox.healthy


async def test_the_table_that_has_the_outboxs_name_is_missed_first(
    bus: EventBus, engine: Engine
) -> None:
    with Outbox(bus, engine):
        failed = await started(served(bus))

    assert str(failed.error) == (
        "there is no table eventkit_outbox in schema 'main': add_tables(Base.metadata), then run "
        "your migrations or create_all"
    )


async def test_a_failure_says_which_attempt_it_was(
    bus: EventBus, engine: Engine, tables: MetaData, caplog: pytest.LogCaptureFixture
) -> None:
    async def receipt(event: OrderPlaced) -> None:
        raise ConnectionError

    tables.create_all(engine)
    bus.subscribe(OrderPlaced, receipt, name="shop:receipt", durable=Durable(attempts=2))
    with Outbox(bus, engine) as outbox:
        async with bus.context():
            with Session(engine) as session, session.begin():
                bus.publish(OrderPlaced(1))
        await outbox.run_due(within=3600)

    said = [
        (record.levelname, record.getMessage().rpartition(" attempt=")[2])
        for record in caplog.records
        if record.getMessage().startswith("event handler failed")
    ]
    assert said == [("WARNING", "1 of 2"), ("ERROR", "2 of 2")]
