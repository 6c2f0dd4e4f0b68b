"""Delivered if and only if committed, in every way in which a FastAPI application can commit.

`python -m tests.sqlalchemy.test_commits` prints the table that docs/commits.md shows.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from inspect import isawaitable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from anyio import sleep_forever, wait_all_tasks_blocked
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy import Engine, delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from starlette.background import BackgroundTask

from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit
from eventkit.starlette import EventContextMiddleware
from tests.asgi import DEPENDENCIES_END_BEHIND_THE_RESPONSE, FASTAPI, Exchange
from tests.databases import Row, postgres, sqlite, to_await

DOCS = Path(__file__).parent.parent.parent / "docs" / "commits.md"

IN_ENDPOINT = "in the endpoint"
FUNCTION = "in a function-scoped dependency"
REQUEST = "in a request-scoped dependency"
NOWHERE = "no database"
PLACES = (IN_ENDPOINT, FUNCTION, REQUEST, NOWHERE)

# What happens after the event was published, and where then, of the places above, it is delivered.
DELIVERED = {
    "nothing else": {IN_ENDPOINT, FUNCTION, REQUEST, NOWHERE},
    "`HTTPException(409)`": {IN_ENDPOINT},
    "returned 409": {IN_ENDPOINT, FUNCTION, REQUEST},
    "unhandled error": {IN_ENDPOINT},
    "rollback, caught, 200": {NOWHERE},
    "failing `BackgroundTask`": {IN_ENDPOINT, FUNCTION},
    "failing commit": {NOWHERE},
    "client gone": {IN_ENDPOINT, FUNCTION, REQUEST, NOWHERE},
}
SITUATIONS = tuple(DELIVERED)


def table() -> str:
    """Say for each situation and place whether the event is delivered."""
    lines = [("and then", *PLACES), ("---",) * (1 + len(PLACES))]
    for situation, places in DELIVERED.items():
        cells = ("delivered" if place in places else "discarded" for place in PLACES)
        lines.append((situation, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Failed(Exception):
    """What nobody handles."""


def fail() -> None:
    raise Failed


async def body() -> AsyncIterator[bytes]:
    yield b"the first part, which is all that the client waits for"
    await sleep_forever()


AnyFactory = sessionmaker[Session] | async_sessionmaker[AsyncSession] | None


async def done(step: object) -> None:
    """Have it done, by a session of either kind."""
    if isawaitable(step):
        await step


def run(coroutine: Coroutine[Any, Any, Response]) -> Response:
    """Run what awaits nothing, as sessions are that block."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    response: Response = end.value.value
    return response


async def use_case(bus: EventBus, session: Any, place: str, situation: str) -> Response:
    """Keep a row, say so, and have happen what is to happen."""
    if session is not None:
        parent = "missing" if situation == "failing commit" else None
        session.add(Row(name=situation, parent=parent))
    bus.publish(situation)
    if session is not None and situation == "rollback, caught, 200":
        session.add(Row(name="taken"))
        try:
            await done(session.flush())
        except IntegrityError:
            await done(session.rollback())
    if session is not None and place == IN_ENDPOINT:
        await done(session.commit())
    match situation:
        case "`HTTPException(409)`":
            raise HTTPException(409)
        case "returned 409":
            return JSONResponse("conflict", 409)
        case "unhandled error":
            raise Failed
        case "client gone":
            return StreamingResponse(body())
        case "failing `BackgroundTask`":
            return JSONResponse("to be continued", background=BackgroundTask(fail))
        case _:
            return JSONResponse("well")


def app_of(bus: EventBus, sessions: AnyFactory, place: str) -> FastAPI:
    """An application that commits at that place; `/2` is the third of the situations."""

    async def session_to_await() -> AsyncIterator[AsyncSession]:
        assert isinstance(sessions, async_sessionmaker)
        async with sessions() as session:
            yield session
            if place != IN_ENDPOINT:
                await session.commit()

    def session_that_blocks() -> Iterator[Session | None]:
        if sessions is None:
            yield None
            return
        assert isinstance(sessions, sessionmaker)
        with sessions() as session:
            yield session
            if place != IN_ENDPOINT:
                session.commit()

    get_session = (
        session_to_await if isinstance(sessions, async_sessionmaker) else session_that_blocks
    )
    # FastAPI knows this scope from 0.121 on; what is left out is the request's.
    scope: dict[str, Any] = {"scope": "function"} if place == FUNCTION else {}
    session_of_request = Depends(get_session, **scope)
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.post("/async/{number}")
    async def act(number: int, session: Any = session_of_request) -> Response:
        return await use_case(bus, session, place, SITUATIONS[number])

    @app.post("/sync/{number}")
    def act_in_thread(number: int, session: Any = session_of_request) -> Response:
        return run(use_case(bus, session, place, SITUATIONS[number]))

    return app


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def engine(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    service_url: Callable[[str], str],
) -> Iterator[Engine]:
    """A database of each kind."""
    if request.param == "sqlite":
        database = sqlite(tmp_path_factory.mktemp("commits") / "test.db")
    else:
        database = postgres(service_url("postgres"))
    with database as engine:
        yield engine


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def delivered(bus: EventBus) -> set[str]:
    """The events that have been delivered."""
    delivered: set[str] = set()
    bus.subscribe(str, delivered.add, name="remember", thread=False)
    return delivered


async def request_all(app: FastAPI, endpoint: str) -> None:
    """Have everything happen, one after the other."""
    for number, situation in enumerate(SITUATIONS):
        leaves = situation == "client gone"
        exchange = Exchange(
            f"/{endpoint}/{number}", method="POST", leaves=leaves, spec_version="2.3"
        )
        with suppress(Failed, IntegrityError):
            await exchange.run(app)
        await wait_all_tasks_blocked()


def expected(place: str) -> set[str]:
    return {situation for situation, places in DELIVERED.items() if place in places}


@pytest.mark.anyio
@pytest.mark.parametrize("place", [IN_ENDPOINT, FUNCTION, REQUEST])
@pytest.mark.parametrize(
    ("endpoint", "sessions_are"),
    [("async", "to await"), ("async", "blocking"), ("sync", "blocking")],
)
async def test_what_is_delivered_is_what_was_committed(
    bus: EventBus,
    delivered: set[str],
    engine: Engine,
    place: str,
    endpoint: str,
    sessions_are: str,
    anyio_backend_name: str,
) -> None:
    if sessions_are == "to await" and anyio_backend_name != "asyncio":
        pytest.skip("SQLAlchemy's asynchronous sessions are made for asyncio")
    if place == FUNCTION and FASTAPI < (0, 121):
        pytest.skip("this FastAPI has no function-scoped dependencies")
    with Session(engine) as session:
        session.execute(delete(Row))
        session.add(Row(name="taken"))
        session.commit()
    sessions = (
        async_sessionmaker(to_await(engine)) if sessions_are == "to await" else sessionmaker(engine)
    )
    deliver_on_commit(bus, sessions)

    await request_all(app_of(bus, sessions, place), endpoint)

    with Session(engine) as session:
        committed = set(session.scalars(select(Row.name))) - {"taken"}
    assert delivered == committed
    if DEPENDENCIES_END_BEHIND_THE_RESPONSE or place == IN_ENDPOINT:
        assert delivered == expected(place)


@pytest.mark.anyio
@pytest.mark.parametrize("endpoint", ["async", "sync"])
async def test_without_a_database_the_outcome_of_the_request_decides(
    bus: EventBus, delivered: set[str], endpoint: str
) -> None:
    await request_all(app_of(bus, None, NOWHERE), endpoint)

    assert delivered == expected(NOWHERE)


def test_the_table_in_the_docs_is_the_tested_one() -> None:
    assert table() in DOCS.read_text(), (
        f"paste the output of `python -m tests.sqlalchemy.test_commits` into {DOCS.name}"
    )


if __name__ == "__main__":
    print(table())
