"""Which application `run_due` takes the dependencies of handlers from."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient
from sqlalchemy import Engine, MetaData, create_engine
from sqlalchemy.orm import Session

from eventkit import Durable, EventBus
from eventkit.outbox import Outbox, add_tables
from eventkit.starlette import EventContextMiddleware

HOUR = 3600.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    metadata = MetaData()
    add_tables(metadata)
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def app(engine: Engine, notes: list[str]) -> Iterator[FastAPI]:
    """An application whose handler fails once, and needs something that is on the application."""
    bus = EventBus()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        app.state.notes = notes
        app.state.failures = [OSError("the neighbour is away")]
        yield

    def get_app(request: Request) -> FastAPI:
        app: FastAPI = request.app
        return app

    @bus.on(int, name="note", durable=Durable(backoff=lambda attempt, error: HOUR / 2))
    async def note(event: int, app: Annotated[FastAPI, Depends(get_app)]) -> None:
        if app.state.failures:
            raise app.state.failures.pop()
        app.state.notes.append(f"handled {event}")

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.post("/{number}")
    def publish(number: int) -> None:
        with Session(engine) as session, session.begin():
            session.connection()
            bus.publish(number)

    @app.post("/due/now")
    async def run_due() -> int:
        return (await outbox.run_due(HOUR)).handled

    with Outbox(bus, engine) as outbox:
        app.state.outbox = outbox
        yield app


def test_a_test_client_runs_it_with_what_the_lifespan_has_opened(
    app: FastAPI, notes: list[str]
) -> None:
    with TestClient(app) as client:
        client.post("/1")
        assert client.portal is not None
        report = client.portal.call(app.state.outbox.run_due, HOUR)

    assert report.handled == 1
    assert notes == ["handled 1"]


def test_an_endpoint_runs_it_with_what_its_application_has(app: FastAPI, notes: list[str]) -> None:
    with TestClient(app) as client:
        client.post("/1")
        assert client.post("/due/now").json() == 1

    assert notes == ["handled 1"]


def test_without_an_application_a_dependency_with_a_request_fails(
    app: FastAPI, notes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with TestClient(app) as client:
        client.post("/1")
    caplog.clear()
    asyncio.run(app.state.outbox.run_due(HOUR))

    assert notes == []
    assert "NoRequestError" in caplog.text
