"""What happens when in a request, from the endpoint to the last handler, as whole lists."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Generator

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from tests.asgi import order_of, traced

pytestmark = pytest.mark.anyio

# Before 0.121 FastAPI knows no function-scoped dependencies, and orders the others differently.
ordered = pytest.mark.skipif(
    "scope" not in inspect.signature(Depends).parameters,
    reason="FastAPI has function-scoped dependencies since 0.121",
)
either = pytest.mark.parametrize("path", ["/async", "/sync"])

Act = Callable[[BackgroundTasks], object]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class CommitError(Exception):
    pass


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def trace(bus: EventBus) -> list[str]:
    return traced(bus)


def unit(
    trace: list[str], name: str, *, commits: bool = True
) -> tuple[Callable[[], AsyncIterator[None]], Callable[[], Generator[None]]]:
    """A database session's part as a dependency, async and sync."""

    def in_thread() -> Generator[None]:
        try:
            yield
        except Exception as error:
            trace.append(f"{name} sees {type(error).__name__}")
            raise
        if not commits:
            trace.append(f"{name} fails to commit")
            raise CommitError
        trace.append(f"{name} commits")

    async def on_loop() -> AsyncIterator[None]:
        session = in_thread()
        next(session)
        try:
            yield
        except Exception as error:
            session.throw(error)
        next(session, None)

    return on_loop, in_thread


def shop(bus: EventBus, trace: list[str], act: Act, *, failing: str = "") -> FastAPI:
    """An app whose endpoints act, inside a request-scoped and a function-scoped session."""
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)
    request = unit(trace, "request scope", commits=failing != "request scope")
    function = unit(trace, "function scope", commits=failing != "function scope")

    @app.post(
        "/async",
        dependencies=[Depends(request[0]), Depends(function[0], scope="function")],
        response_model=None,
    )
    async def on_loop(tasks: BackgroundTasks) -> object:
        return act(tasks)

    @app.post(
        "/sync",
        dependencies=[Depends(request[1]), Depends(function[1], scope="function")],
        response_model=None,
    )
    def in_thread(tasks: BackgroundTasks) -> object:
        return act(tasks)

    return app


# What the dependencies, the endpoint and its response do.


@ordered
@either
async def test_handlers_run_after_the_response_the_background_tasks_and_the_commit(
    bus: EventBus, trace: list[str], path: str
) -> None:
    def act(tasks: BackgroundTasks) -> None:
        bus.publish("ordered")
        tasks.add_task(trace.append, "background task")
        trace.append("endpoint")

    assert await order_of(shop(bus, trace, act), trace, path) == [
        "endpoint",
        "function scope commits",
        "start 200",
        "end of body",
        "background task",
        "request scope commits",
        "handling ordered",
        "handled ordered",
        "returned",
    ]


@ordered
@either
async def test_a_returned_error_response_commits_and_its_events_are_discarded(
    bus: EventBus, trace: list[str], path: str
) -> None:
    def act(_: BackgroundTasks) -> JSONResponse:
        bus.publish("ordered")
        return JSONResponse({}, 409)

    assert await order_of(shop(bus, trace, act), trace, path) == [
        "function scope commits",
        "start 409",
        "end of body",
        "request scope commits",
        "discarded ordered",
        "returned",
    ]


@ordered
@either
async def test_an_http_exception_rolls_back_and_its_events_are_discarded(
    bus: EventBus, trace: list[str], path: str
) -> None:
    def act(_: BackgroundTasks) -> None:
        bus.publish("ordered")
        raise HTTPException(404)

    assert await order_of(shop(bus, trace, act), trace, path) == [
        "function scope sees HTTPException",
        "request scope sees HTTPException",
        "start 404",
        "end of body",
        "discarded ordered",
        "returned",
    ]


@ordered
@either
async def test_with_an_unhandled_error_events_are_discarded_before_the_500_is_sent(
    bus: EventBus, trace: list[str], path: str
) -> None:
    def act(_: BackgroundTasks) -> None:
        bus.publish("ordered")
        raise ZeroDivisionError

    assert await order_of(shop(bus, trace, act), trace, path) == [
        "function scope sees ZeroDivisionError",
        "request scope sees ZeroDivisionError",
        "discarded ordered",
        "start 500",
        "end of body",
        "raised ZeroDivisionError",
    ]


@ordered
@either
async def test_a_commit_that_fails_before_the_response_discards(
    bus: EventBus, trace: list[str], path: str
) -> None:
    def act(_: BackgroundTasks) -> None:
        bus.publish("ordered")

    app = shop(bus, trace, act, failing="function scope")

    assert await order_of(app, trace, path) == [
        "function scope fails to commit",
        "request scope sees CommitError",
        "discarded ordered",
        "start 500",
        "end of body",
        "raised CommitError",
    ]


@ordered
@either
async def test_a_commit_that_fails_after_the_response_discards(
    bus: EventBus, trace: list[str], path: str
) -> None:
    def act(_: BackgroundTasks) -> None:
        bus.publish("ordered")

    app = shop(bus, trace, act, failing="request scope")

    assert await order_of(app, trace, path) == [
        "function scope commits",
        "start 200",
        "end of body",
        "request scope fails to commit",
        "discarded ordered",
        "raised CommitError",
    ]


@ordered
@either
async def test_a_background_task_that_fails_after_the_response_discards(
    bus: EventBus, trace: list[str], path: str
) -> None:
    def fail() -> None:
        bus.publish("task failed")
        raise ZeroDivisionError

    def act(tasks: BackgroundTasks) -> None:
        bus.publish("ordered")
        tasks.add_task(fail)
        tasks.add_task(trace.append, "never")

    assert await order_of(shop(bus, trace, act), trace, path) == [
        "function scope commits",
        "start 200",
        "end of body",
        "request scope sees ZeroDivisionError",
        "discarded ordered",
        "discarded task failed",
        "raised ZeroDivisionError",
    ]


@ordered
@either
async def test_what_was_released_after_a_commit_is_delivered_although_the_request_fails(
    bus: EventBus, trace: list[str], path: str
) -> None:
    def act(tasks: BackgroundTasks) -> None:
        bus.publish("ordered")
        bus.current_context().release()
        bus.publish("thanked")
        tasks.add_task(divmod, 1, 0)

    assert await order_of(shop(bus, trace, act), trace, path) == [
        "function scope commits",
        "start 200",
        "end of body",
        "request scope sees ZeroDivisionError",
        "discarded thanked",
        "handling ordered",
        "handled ordered",
        "raised ZeroDivisionError",
    ]


async def test_a_validation_error_discards_what_dependencies_published(
    bus: EventBus, trace: list[str]
) -> None:
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)

    async def visit() -> None:
        bus.publish("visited")

    @app.post("/", dependencies=[Depends(visit)])
    async def endpoint(_number: int) -> None:
        trace.append("never")

    assert await order_of(app, trace) == [
        "start 422",
        "end of body",
        "discarded visited",
        "returned",
    ]


async def test_handlers_run_one_event_after_the_other_in_publish_order_then_what_they_caused(
    bus: EventBus, trace: list[str]
) -> None:
    @bus.on(str)
    async def follow(event: str) -> None:
        if event in {"first", "second"}:
            bus.publish(f"caused by {event}")

    async def endpoint(_: Request) -> Response:
        bus.publish("first")
        bus.publish("second")
        return Response()

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(EventContextMiddleware, bus=bus)

    assert [line for line in await order_of(app, trace) if line.startswith("handled")] == [
        "handled first",
        "handled second",
        "handled caused by first",
        "handled caused by second",
    ]


# Other middleware, mounted apps, several buses.


class Timing(BaseHTTPMiddleware):
    def __init__(self, app: ASGIApp, trace: list[str]) -> None:
        super().__init__(app)
        self.trace = trace

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        self.trace.append("request passes")
        response = await call_next(request)
        self.trace.append("response passes")
        return response


def acting(act: Callable[[], object], status: int = 200) -> Starlette:
    """An app with one endpoint."""

    async def endpoint(_: Request) -> Response:
        act()
        return PlainTextResponse("", status)

    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


@pytest.mark.skipif(
    "close_recv_stream_on_response_sent" in inspect.getsource(BaseHTTPMiddleware),
    reason="this Starlette lets the app inside go on before the last part was sent",
)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("status", "end"),
    [(200, ["handling ordered", "handled ordered"]), (404, ["discarded ordered"])],
)
async def test_a_base_http_middleware_inside_or_outside_changes_nothing(
    bus: EventBus, trace: list[str], inside: bool, status: int, end: list[str]
) -> None:
    app = acting(lambda: bus.publish("ordered"), status)
    if inside:
        app.add_middleware(Timing, trace=trace)
    app.add_middleware(EventContextMiddleware, bus=bus)
    if not inside:
        app.add_middleware(Timing, trace=trace)

    assert [line for line in await order_of(app, trace) if not line.startswith("body")] == [
        "request passes",
        "response passes",
        f"start {status}",
        "end of body",
        *end,
        "returned",
    ]


async def test_with_a_base_http_middleware_inside_an_unhandled_error_is_the_endpoints_own(
    bus: EventBus, trace: list[str]
) -> None:
    def act() -> None:
        bus.publish("ordered")
        raise ZeroDivisionError

    app = acting(act)
    app.add_middleware(Timing, trace=trace)
    app.add_middleware(EventContextMiddleware, bus=bus)

    assert await order_of(app, trace) == [
        "request passes",
        "discarded ordered",
        "start 500",
        "end of body",
        "raised ZeroDivisionError",
    ]


@pytest.mark.parametrize("installed_again", [True, False])
async def test_a_mounted_app_delivers_when_the_outer_request_ends(
    bus: EventBus, trace: list[str], installed_again: bool
) -> None:
    inner = acting(lambda: bus.publish("ordered"))
    if installed_again:
        inner.add_middleware(EventContextMiddleware, bus=bus)

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("arrived")
        await inner(scope, receive, send)
        trace.append("inner app returned")

    app = Starlette(routes=[Mount("/inner", around)])
    app.add_middleware(EventContextMiddleware, bus=bus)

    assert await order_of(app, trace, "/inner/") == [
        "start 200",
        "end of body",
        "inner app returned",
        "handling arrived",
        "handled arrived",
        "handling ordered",
        "handled ordered",
        "returned",
    ]


@ordered
async def test_a_mounted_fastapi_app_delivers_after_its_own_dependencies(
    bus: EventBus, trace: list[str]
) -> None:
    inner = FastAPI()

    @inner.post("/", dependencies=[Depends(unit(trace, "inner")[0])])
    async def endpoint() -> None:
        bus.publish("ordered")

    app = FastAPI()
    app.mount("/inner", inner)
    app.add_middleware(EventContextMiddleware, bus=bus)

    assert await order_of(app, trace, "/inner/") == [
        "start 200",
        "end of body",
        "inner commits",
        "handling ordered",
        "handled ordered",
        "returned",
    ]


async def test_an_app_mounted_without_a_middleware_outside_delivers_before_it_returns(
    bus: EventBus, trace: list[str]
) -> None:
    inner = acting(lambda: bus.publish("ordered"))
    inner.add_middleware(EventContextMiddleware, bus=bus)

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)
        trace.append("inner app returned")

    app = Starlette(routes=[Mount("/inner", around)])

    assert await order_of(app, trace, "/inner/") == [
        "start 200",
        "end of body",
        "handling ordered",
        "handled ordered",
        "inner app returned",
        "returned",
    ]


async def test_with_two_buses_the_inner_ones_events_come_first(
    bus: EventBus, trace: list[str]
) -> None:
    other = EventBus(name="other")

    @other.on(str)
    async def handle(event: str) -> None:
        trace.append(f"other handles {event}")

    def act() -> None:
        bus.publish("ordered")
        other.publish("ordered")

    app = acting(act)
    app.add_middleware(EventContextMiddleware, bus=other)
    app.add_middleware(EventContextMiddleware, bus=bus)

    assert await order_of(app, trace) == [
        "start 200",
        "end of body",
        "other handles ordered",
        "handling ordered",
        "handled ordered",
        "returned",
    ]
