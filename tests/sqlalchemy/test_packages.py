"""Packages that make sessions and engines themselves: what they commit counts like all else."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import wait_all_tasks_blocked
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import Engine, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange
from tests.databases import Row
from tests.sqlalchemy.steps import DECIDED, Wrong
from tests.witness import witnessed

pytestmark = pytest.mark.anyio


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    """What became of each event, in the order of its end."""
    return witnessed(bus)


SQLMODEL = "pip install sqlmodel, for its tests"
ADVANCED_ALCHEMY = "pip install advanced-alchemy, for its tests"
FASTAPI_SQLA = "pip install fastapi-sqla, for its tests; it holds FastAPI back"


async def test_sessions_of_sqlmodel_count(bus: EventBus, engine: Engine, seen: list[str]) -> None:
    sqlmodel = pytest.importorskip("sqlmodel", reason=SQLMODEL)
    deliver_on_commit(bus, engine)

    base: Any = sqlmodel.SQLModel

    class Hero(base, table=True):  # type: ignore[call-arg, misc]  # as Any
        __tablename__ = "rows"
        metadata = sqlmodel.MetaData()
        name: str = sqlmodel.Field(primary_key=True)
        note: str = ""

    with suppress(Wrong):
        async with bus.context():
            with sqlmodel.Session(engine) as session:
                session.add(Hero(name="committed"))
                bus.publish("committed")
                session.commit()
            raise Wrong
    async with bus.context():
        with sqlmodel.Session(engine) as session:
            session.exec(sqlmodel.insert(Hero).values(name="rolled back"))
            bus.publish("rolled back")
            session.rollback()
        with sqlmodel.Session(engine) as session:
            session.exec(sqlmodel.update(Hero).values(note="changed"))
            bus.publish("closed")
        with sqlmodel.Session(engine) as session:
            assert session.exec(sqlmodel.select(Hero)).one().note == ""
            bus.publish("read")

    assert seen == DECIDED


async def test_sessions_to_await_of_sqlmodel_count(
    bus: EventBus, async_engine: AsyncEngine, seen: list[str]
) -> None:
    session_module = pytest.importorskip("sqlmodel.ext.asyncio.session", reason=SQLMODEL)
    deliver_on_commit(bus, async_engine)

    with suppress(Wrong):
        async with bus.context():
            async with session_module.AsyncSession(async_engine) as session:
                session.add(Row(name="committed"))
                bus.publish("committed")
                await session.commit()
            raise Wrong
    async with bus.context():
        async with session_module.AsyncSession(async_engine) as session:
            await session.exec(insert(Row).values(name="rolled back"))
            bus.publish("rolled back")
            await session.rollback()
        async with session_module.AsyncSession(async_engine) as session:
            await session.exec(insert(Row).values(name="closed"))
            bus.publish("closed")
        async with session_module.AsyncSession(async_engine) as session:
            await session.exec(select(Row))
            bus.publish("read")

    assert seen == DECIDED


# What an endpoint does, the status that comes of it, and what becomes of its event where the
# package commits what ends well, and rolls back what does not.
ENDPOINTS = {
    "well": (200, "handled well"),
    "conflict": (409, "discarded conflict"),
    "committed": (409, "handled committed"),
    "read": (200, "handled read"),
}


def add_endpoints(app: FastAPI, bus: EventBus, get_session: Callable[..., Any]) -> None:
    """Endpoints with a session to await."""
    of_request = Depends(get_session)

    @app.post("/well")
    async def well(session: Any = of_request) -> None:
        session.add(Row(name="well"))
        bus.publish("well")

    @app.post("/conflict")
    async def conflict(session: Any = of_request) -> None:
        session.add(Row(name="conflict"))
        await session.flush()
        bus.publish("conflict")
        raise HTTPException(409)

    @app.post("/committed")
    async def committed(session: Any = of_request) -> None:
        session.add(Row(name="committed"))
        bus.publish("committed")
        await session.commit()
        raise HTTPException(409)

    @app.post("/read")
    async def read(session: Any = of_request) -> None:
        await session.scalars(select(Row))
        bus.publish("read")


def add_blocking_endpoints(app: FastAPI, bus: EventBus, get_session: Callable[..., Any]) -> None:
    """Endpoints with a session that blocks."""
    of_request = Depends(get_session)

    @app.post("/well")
    def well(session: Any = of_request) -> None:
        session.add(Row(name="well"))
        bus.publish("well")

    @app.post("/conflict")
    def conflict(session: Any = of_request) -> None:
        session.add(Row(name="conflict"))
        session.flush()
        bus.publish("conflict")
        raise HTTPException(409)

    @app.post("/committed")
    def committed(session: Any = of_request) -> None:
        session.add(Row(name="committed"))
        bus.publish("committed")
        session.commit()
        raise HTTPException(409)

    @app.post("/read")
    async def read(session: Any = of_request) -> None:
        session.scalars(select(Row)).all()
        bus.publish("read")


async def request_all(app: FastAPI, seen: list[str]) -> None:
    """Call each endpoint, and look what has become of its event."""
    for path, (status, line) in ENDPOINTS.items():
        await (exchange := Exchange(f"/{path}", method="POST")).run(app)
        await wait_all_tasks_blocked()
        assert (exchange.status, seen) == (status, [line])
        seen.clear()


def rows(engine: Engine) -> set[str]:
    with Session(engine) as session:
        return set(session.scalars(select(Row.name)))


@pytest.mark.parametrize("tied", ["get_engine", "create_session_maker"])
async def test_an_application_with_advanced_alchemy_that_awaits(
    tied: str, bus: EventBus, engine: Engine, async_engine: AsyncEngine, seen: list[str]
) -> None:
    extension = pytest.importorskip("advanced_alchemy.extensions.fastapi", reason=ADVANCED_ALCHEMY)
    config = extension.SQLAlchemyAsyncConfig(engine_instance=async_engine, commit_mode="autocommit")
    deliver_on_commit(bus, getattr(config, tied)())
    app = FastAPI()
    alchemy = extension.AdvancedAlchemy(config=config, app=app)
    app.add_middleware(EventContextMiddleware, bus=bus)  # last, and so outside of theirs
    add_endpoints(app, bus, alchemy.provide_session())

    async with app.router.lifespan_context(app):
        await request_all(app, seen)

    assert rows(engine) == {"well", "committed"}


@pytest.mark.parametrize("tied", ["get_engine", "create_session_maker"])
async def test_an_application_with_advanced_alchemy_that_blocks(
    tied: str, bus: EventBus, engine: Engine, seen: list[str]
) -> None:
    extension = pytest.importorskip("advanced_alchemy.extensions.fastapi", reason=ADVANCED_ALCHEMY)
    config = extension.SQLAlchemySyncConfig(engine_instance=engine, commit_mode="autocommit")
    deliver_on_commit(bus, getattr(config, tied)())
    app = FastAPI()
    alchemy = extension.AdvancedAlchemy(config=config, app=app)
    app.add_middleware(EventContextMiddleware, bus=bus)
    add_blocking_endpoints(app, bus, alchemy.provide_session())

    async with app.router.lifespan_context(app):
        await request_all(app, seen)

    assert rows(engine) == {"well", "committed"}


async def test_a_service_of_advanced_alchemy_commits_for_its_endpoint(
    bus: EventBus, engine: Engine, async_engine: AsyncEngine, seen: list[str]
) -> None:
    extension = pytest.importorskip("advanced_alchemy.extensions.fastapi", reason=ADVANCED_ALCHEMY)
    app = FastAPI()
    alchemy = extension.AdvancedAlchemy(
        config=extension.SQLAlchemyAsyncConfig(engine_instance=async_engine), app=app
    )
    deliver_on_commit(bus, alchemy.get_engine())
    app.add_middleware(EventContextMiddleware, bus=bus)

    repository: Any = extension.repository.SQLAlchemyAsyncRepository
    service: Any = extension.service.SQLAlchemyAsyncRepositoryService

    class Rows(repository):  # type: ignore[misc]  # as Any
        model_type = Row
        id_attribute = "name"

    class RowService(service):  # type: ignore[misc]
        repository_type = Rows

    of_request = Depends(alchemy.provide_service(RowService))

    @app.post("/{name}")
    async def create(name: str, rows: Any = of_request) -> None:
        await rows.create({"name": name}, auto_commit=name == "committed")
        bus.publish(name)
        if name == "failed":
            raise HTTPException(409)

    for name in ("committed", "failed"):
        await Exchange(f"/{name}", method="POST").run(app)
        await wait_all_tasks_blocked()

    assert seen == ["handled committed", "discarded failed"]
    assert rows(engine) == {"committed"}


async def test_a_middleware_that_commits_outside_of_eventkits_is_named_in_the_log(
    bus: EventBus, engine: Engine, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    extension = pytest.importorskip("advanced_alchemy.extensions.fastapi", reason=ADVANCED_ALCHEMY)
    config = extension.SQLAlchemySyncConfig(engine_instance=engine, commit_mode="autocommit")
    deliver_on_commit(bus, config.get_engine())
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)
    alchemy = extension.AdvancedAlchemy(config=config, app=app)  # it should have been the first
    add_blocking_endpoints(app, bus, alchemy.provide_session())

    await Exchange("/well", method="POST").run(app)
    await wait_all_tasks_blocked()

    assert seen == ["discarded well"]
    assert rows(engine) == {"well"}
    assert "A middleware that commits goes inside of EventContextMiddleware" in caplog.text


@pytest.fixture
def sqla_app(
    engine: Engine, bus: EventBus, monkeypatch: pytest.MonkeyPatch, anyio_backend_name: str
) -> Callable[[str, bool], AbstractAsyncContextManager[FastAPI]]:
    """Make an application as fastapi-sqla says."""
    fastapi_sqla = pytest.importorskip("fastapi_sqla", reason=FASTAPI_SQLA)
    if anyio_backend_name != "asyncio":
        pytest.skip("fastapi-sqla commits in a thread of asyncio's")

    @asynccontextmanager
    async def make(driver: str, outside: bool) -> AsyncGenerator[FastAPI]:
        monkeypatch.setenv("sqlalchemy_url", f"{driver}:///{engine.url.database}")

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
            await fastapi_sqla.startup()
            if "aio" in driver:
                async with fastapi_sqla.open_async_session() as session:
                    deliver_on_commit(bus, session.bind)
            else:
                with fastapi_sqla.open_session() as session:
                    deliver_on_commit(bus, session.bind)
            yield
            dispose = session.bind.dispose()
            if "aio" in driver:
                await dispose

        app = FastAPI(lifespan=lifespan)
        if not outside:
            app.add_middleware(EventContextMiddleware, bus=bus)
        fastapi_sqla.setup_middlewares(app)
        if outside:
            app.add_middleware(EventContextMiddleware, bus=bus)
        async with app.router.lifespan_context(app):
            yield app

    return make


@pytest.mark.parametrize("outside", [True, False])
async def test_an_application_with_fastapi_sqla_that_awaits(
    outside: bool, sqla_app: Any, engine: Engine, bus: EventBus, seen: list[str]
) -> None:
    fastapi_sqla = pytest.importorskip("fastapi_sqla", reason=FASTAPI_SQLA)
    async with sqla_app("sqlite+aiosqlite", outside) as app:
        add_endpoints(app, bus, fastapi_sqla.AsyncSessionDependency())
        await request_all(app, seen)

    assert rows(engine) == {"well", "committed"}


@pytest.mark.parametrize("outside", [True, False])
async def test_an_application_with_fastapi_sqla_that_blocks(
    outside: bool, sqla_app: Any, engine: Engine, bus: EventBus, seen: list[str]
) -> None:
    fastapi_sqla = pytest.importorskip("fastapi_sqla", reason=FASTAPI_SQLA)
    async with sqla_app("sqlite", outside) as app:
        add_blocking_endpoints(app, bus, fastapi_sqla.SessionDependency())
        await request_all(app, seen)

    assert rows(engine) == {"well", "committed"}
