"""Transactions in requests: before the response, behind it, in middleware around and inside."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import to_thread, wait_all_tasks_blocked
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy import insert
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit import EventBus
from eventkit.sqlalchemy import CommitTie
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange
from tests.databases import Row
from tests.sqlalchemy.steps import Database, Warnings, blocking, done, inside, put

pytestmark = pytest.mark.anyio


async def write_and(end: str, database: Database, name: str = "log") -> None:
    async with inside(database.session()) as session:
        await put(session, name)
        await done(getattr(session, end)())


class Around:
    """A middleware that does something before or behind the app."""

    def __init__(
        self,
        app: ASGIApp,
        before: Callable[[], Awaitable[None]] | None = None,
        behind: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.app, self.before, self.behind = app, before, behind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.before is not None:
            await self.before()
        await self.app(scope, receive, send)
        if self.behind is not None:
            await self.behind()


def app_of(bus: EventBus, endpoint: Any, *inner: tuple[Any, dict[str, Any]]) -> FastAPI:
    app = FastAPI()
    app.post("/")(endpoint)
    for middleware, options in inner:
        app.add_middleware(middleware, **options)
    app.add_middleware(EventContextMiddleware, bus=bus)
    return app


async def post(app: ASGIApp) -> None:
    await Exchange("/", method="POST").run(app)
    await wait_all_tasks_blocked()


@pytest.mark.parametrize("status", [200, 409])
@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_a_background_task_decides_only_by_a_commit(
    end: str, status: int, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async def endpoint(background: BackgroundTasks) -> JSONResponse:
        bus.publish("ada")
        background.add_task(write_and, end, database)
        return JSONResponse("", status, background=background)

    await post(app_of(bus, endpoint))

    delivered = end == "commit" or status == 200
    assert seen == ["handled ada" if delivered else "discarded ada"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("status", [200, 409])
async def test_an_access_log_behind_the_response_decides_only_by_a_commit(
    status: int, end: str, bus: EventBus, database: Database, seen: list[str]
) -> None:
    async def endpoint() -> JSONResponse:
        bus.publish("ada")
        return JSONResponse("", status)

    async def log() -> None:
        await write_and(end, database)

    await post(app_of(bus, endpoint, (Around, {"behind": log})))

    delivered = end == "commit" or status == 200
    assert seen == ["handled ada" if delivered else "discarded ada"]


async def test_before_the_response_a_rollback_of_the_endpoint_discards(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    async def endpoint() -> PlainTextResponse:
        bus.publish("ada")
        await write_and("rollback", database)
        return PlainTextResponse("")

    await post(app_of(bus, endpoint))

    assert seen == ["discarded ada"]


async def test_a_session_that_a_dependency_in_a_thread_has_begun_is_the_endpoints(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    def session_of_request() -> Any:
        session = database.session()
        blocking(session).begin()
        return session

    depends: Any = Depends(session_of_request)

    async def endpoint(session: Any = depends) -> PlainTextResponse:
        async with inside(session):
            await put(session)
            bus.publish("ada")
            await done(session.rollback())
        return PlainTextResponse("")

    await post(app_of(bus, endpoint))

    assert seen == ["discarded ada"]


async def test_an_endpoint_in_a_thread_has_its_own_transaction(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    if database.awaits:
        pytest.skip("nothing can be awaited in a thread")

    def endpoint() -> PlainTextResponse:
        with database.session() as session:
            for name, end in (("ada", session.commit), ("bob", session.rollback)):
                session.add(Row(name=name))
                session.flush()
                bus.publish(name)
                end()
        return PlainTextResponse("", 409)

    await post(app_of(bus, endpoint))

    assert sorted(seen) == ["discarded bob", "handled ada"]


@pytest.mark.parametrize("order", ["inside", "outside"])
async def test_a_middleware_that_commits_goes_inside(
    order: str,
    bus: EventBus,
    database: Database,
    tie: CommitTie,
    seen: list[str],
    warnings: Warnings,
) -> None:
    open_sessions: list[Any] = []

    async def begin() -> None:
        open_sessions.append(database.session())

    async def commit() -> None:
        session = open_sessions.pop()
        await done(session.commit())
        await done(session.close())

    async def endpoint() -> PlainTextResponse:
        await put(open_sessions[0])
        bus.publish("ada")
        return PlainTextResponse("")

    app = FastAPI()
    app.post("/")(endpoint)
    options: dict[str, Any] = {"before": begin, "behind": commit}
    if order == "inside":
        app.add_middleware(Around, **options)
    app.add_middleware(EventContextMiddleware, bus=bus)
    if order == "outside":
        app.add_middleware(Around, **options)
    await post(app)

    assert database.names() == ["ada"]
    if order == "inside":
        assert (seen, warnings()) == (["handled ada"], [])
    else:
        assert seen == ["discarded ada"]
        (warning,) = warnings()
        assert warning.startswith("a transaction that has written was still open when its unit of")
        assert "A middleware that commits goes inside of EventContextMiddleware: add" in warning


async def test_a_session_that_is_used_in_a_thread_beside_the_request(
    bus: EventBus, database: Database, seen: list[str]
) -> None:
    if database.awaits:
        pytest.skip("nothing can be awaited in a thread")

    async def endpoint() -> PlainTextResponse:
        with database.session() as session:
            await to_thread.run_sync(session.execute, insert(Row).values(name="ada"))
            await to_thread.run_sync(bus.publish, "from a thread")
            bus.publish("from the endpoint")
            await to_thread.run_sync(session.rollback)
        return PlainTextResponse("")

    with suppress(Exception):
        await post(app_of(bus, endpoint))

    assert sorted(seen) == ["discarded from a thread", "discarded from the endpoint"]
