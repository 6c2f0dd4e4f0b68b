"""Where the event context of a request is seen, and where there is none."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from anyio import create_task_group, to_thread
from anyio.lowlevel import checkpoint
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from eventkit import (
    EventBus,
    EventContext,
    EventContextClosedError,
    NoDeliveryError,
    NoEventContextError,
    current_delivery,
)
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Backend, Exchange, client_of, respond, traced
from tests.witness import Number


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def trace(bus: EventBus) -> list[str]:
    return traced(bus)


def serving(act: Callable[[Request], object], *buses: EventBus) -> Starlette:
    """An app with one endpoint, and a middleware for each bus, the first one innermost."""

    async def endpoint(request: Request) -> Response:
        answer = act(request)
        return answer if isinstance(answer, Response) else Response()

    app = Starlette(routes=[Route("/", endpoint)])
    for bus in buses:
        app.add_middleware(EventContextMiddleware, bus=bus)
    return app


# Seen everywhere inside a request.


def test_all_parts_of_a_request_see_the_same_context(bus: EventBus, anyio_backend: Backend) -> None:
    seen: dict[str, EventContext] = {}

    def note(where: str) -> None:
        seen[where] = bus.current_context()

    async def async_dependency() -> None:
        note("async dependency")

    def sync_dependency() -> None:
        note("sync dependency")

    async def async_yield() -> AsyncIterator[None]:
        note("async yield dependency, before")
        yield
        note("async yield dependency, after")

    def sync_yield() -> Iterator[None]:
        note("sync yield dependency, before")
        yield
        note("sync yield dependency, after")

    class ClassDependency:
        def __init__(self) -> None:
            note("class as dependency")

    async def async_task() -> None:
        note("async background task")

    def sync_task() -> None:
        note("sync background task")

    async def async_stream() -> AsyncIterator[str]:
        note("async stream")
        yield "part"

    def sync_stream() -> Iterator[str]:
        note("sync stream")
        yield "part"

    async def child() -> None:
        note("child task")

    app = FastAPI(
        dependencies=[
            Depends(async_dependency),
            Depends(sync_dependency),
            Depends(async_yield),
            Depends(sync_yield),
            Depends(ClassDependency),
        ]
    )
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.get("/async")
    async def async_endpoint(tasks: BackgroundTasks) -> StreamingResponse:
        note("async endpoint")
        await to_thread.run_sync(note, "anyio.to_thread")
        async with create_task_group() as children:
            children.start_soon(child)
        tasks.add_task(async_task)
        return StreamingResponse(async_stream(), background=tasks)

    @app.get("/sync")
    def sync_endpoint(tasks: BackgroundTasks) -> StreamingResponse:
        note("sync endpoint")
        tasks.add_task(sync_task)
        return StreamingResponse(sync_stream(), background=tasks)

    client = client_of(app, anyio_backend)

    client.get("/async")
    first, seen = seen, {}
    client.get("/sync")

    assert first.keys() | seen.keys() == {
        "anyio.to_thread",
        "async background task",
        "async dependency",
        "async endpoint",
        "async stream",
        "async yield dependency, after",
        "async yield dependency, before",
        "child task",
        "class as dependency",
        "sync background task",
        "sync dependency",
        "sync endpoint",
        "sync stream",
        "sync yield dependency, after",
        "sync yield dependency, before",
    }
    (one,) = set(first.values())
    (other,) = set(seen.values())
    assert one is not other


@pytest.mark.anyio
async def test_asyncio_to_thread_sees_the_context(
    bus: EventBus, trace: list[str], anyio_backend_name: str
) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio.to_thread needs asyncio")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.to_thread(bus.publish, "from a thread")
        await respond(send)

    await Exchange().run(EventContextMiddleware(app, bus))

    assert trace == ["handling from a thread", "handled from a thread"]


@pytest.mark.anyio
@pytest.mark.parametrize("inside", [True, False])
async def test_a_base_http_middleware_inside_sees_the_context_and_one_outside_does_not(
    bus: EventBus, trace: list[str], inside: bool
) -> None:
    class Publishing(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            bus.publish("before")
            response = await call_next(request)
            bus.publish("after")
            return response

    app = serving(lambda _: bus.publish("ordered"))
    if inside:
        app.add_middleware(Publishing)
    app.add_middleware(EventContextMiddleware, bus=bus)
    if not inside:
        app.add_middleware(Publishing)
        with pytest.raises(NoEventContextError, match=OUTSIDE):
            await Exchange().run(app)
        return

    await Exchange().run(app)

    assert trace[1::2] == ["handled before", "handled ordered", "handled after"]


OUTSIDE = (
    "add the middleware: .* If it is there, this code runs outside of it: add it after the "
    "middleware that publishes, because a later one is further outside"
)


@pytest.mark.anyio
async def test_a_handler_of_all_exceptions_is_outside_and_is_told_so_and_may_open_a_unit(
    bus: EventBus, trace: list[str]
) -> None:
    async def apologise(request: Request, error: Exception) -> Response:
        with pytest.raises(
            NoEventContextError, match=r"in an exception_handler\(Exception\), which"
        ):
            bus.publish("failed")
        async with bus.context():
            bus.publish("failed")
        return Response(status_code=500)

    def fail(request: Request) -> None:
        raise ZeroDivisionError

    app = serving(fail)
    app.add_exception_handler(Exception, apologise)
    app.add_middleware(EventContextMiddleware, bus=bus)
    exchange = Exchange()

    with pytest.raises(ZeroDivisionError):
        await exchange.run(app)

    assert exchange.status == 500
    assert trace == ["handling failed", "handled failed"]


@pytest.mark.anyio
@pytest.mark.parametrize("installed_again", [True, False])
async def test_a_mounted_app_shares_the_context_whether_or_not_it_has_the_middleware_too(
    bus: EventBus, installed_again: bool
) -> None:
    seen: list[EventContext] = []

    async def middle(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(bus.current_context())
        await inner(scope, receive, send)
        assert not bus.current_context().closed

    inner = FastAPI()

    @inner.get("/")
    def endpoint() -> None:
        seen.append(bus.current_context())

    if installed_again:
        inner.add_middleware(EventContextMiddleware, bus=bus)
    app = Starlette(routes=[Mount("/inner", middle)])
    app.add_middleware(EventContextMiddleware, bus=bus)

    await Exchange("/inner/").run(app)

    assert seen[0] is seen[1]
    assert seen[0].closed


@pytest.mark.anyio
async def test_an_exception_handler_sees_the_context_but_the_one_for_unhandled_errors_does_not(
    bus: EventBus, trace: list[str]
) -> None:
    def refuse(request: Request, _: Exception) -> Response:
        bus.publish("refused", even_on_failure=True)
        return PlainTextResponse("", 400)

    def give_up(request: Request, error: Exception) -> Response:
        with pytest.raises(NoEventContextError):
            bus.publish("never")
        return PlainTextResponse("given up", 500)

    def act(request: Request) -> None:
        raise {"GET": KeyError, "HEAD": ZeroDivisionError}[request.method]

    app = serving(act, bus)
    app.add_exception_handler(KeyError, refuse)
    app.add_exception_handler(Exception, give_up)
    refused = Exchange()
    unhandled = Exchange(method="HEAD")

    await refused.run(app)
    with pytest.raises(ZeroDivisionError):
        await unhandled.run(app)

    assert (refused.status, unhandled.status) == (400, 500)
    assert unhandled.body == b"given up"
    assert trace == ["handling refused", "handled refused"]


@pytest.mark.anyio
async def test_publishing_after_the_request_has_ended_says_that_it_is_over(bus: EventBus) -> None:
    contexts: list[EventContext] = []

    def act(_: Request) -> None:
        contexts.append(bus.current_context())

    await Exchange().run(serving(act, bus))

    with pytest.raises(EventContextClosedError, match="its request or job is over"):
        contexts[0].publish(Number(1))


# Each request its own.


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "end"),
    [(200, ["handling ordered", "handled ordered"]), (404, ["discarded ordered"])],
)
async def test_a_request_made_inside_a_context_is_still_a_unit_of_its_own(
    bus: EventBus, trace: list[str], status: int, end: list[str]
) -> None:
    def act(_: Request) -> Response:
        bus.publish("ordered")
        return Response(status_code=status)

    app = serving(act, bus)

    async def fail_around_it() -> None:
        async with bus.context() as ambient:
            bus.publish("ambient")
            await Exchange().run(app)
            assert trace == end
            assert len(ambient.pending) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_around_it()

    assert trace == [*end, "discarded ambient"]


def test_a_test_clients_request_inside_a_context_is_still_a_unit_of_its_own(
    bus: EventBus, trace: list[str], anyio_backend: Backend
) -> None:
    app = serving(lambda _: bus.publish("ordered"), bus)

    with bus.context() as ambient:
        client_of(app, anyio_backend).get("/")
        assert trace == ["handling ordered", "handled ordered"]
        assert ambient.pending == ()


@pytest.mark.anyio
async def test_a_context_of_another_bus_around_the_client_is_not_seen_in_the_request(
    bus: EventBus,
) -> None:
    other = EventBus(name="other")

    def act(_: Request) -> None:
        with pytest.raises(NoEventContextError, match="unit of work of another bus, 'default'"):
            other.publish("ordered")

    async with other.context():
        await Exchange().run(serving(act, bus))


@pytest.mark.anyio
async def test_a_request_made_by_a_handler_is_no_part_of_the_delivery(
    bus: EventBus, trace: list[str]
) -> None:
    def act(request: Request) -> None:
        with pytest.raises(NoDeliveryError):
            current_delivery()
        bus.publish("inner")

    app = serving(act, bus)

    @bus.on(int)
    async def call(event: int) -> None:
        await Exchange(trace=trace).run(app)

    async with bus.context():
        bus.publish(1)

    assert bus.stats.failed == 0
    assert trace == ["start 200", "end of body", "handling inner", "handled inner", "returned"]


@pytest.mark.anyio
async def test_a_scope_that_is_used_again_gets_new_contexts(bus: EventBus) -> None:
    other = EventBus(name="other")
    handled: list[str] = []
    contexts: list[EventContext] = []

    @bus.on(str)
    @other.on(str)
    async def handle(event: str) -> None:
        handled.append(event)

    def act(_: Request) -> None:
        contexts.extend([bus.current_context(), other.current_context()])
        bus.publish("ordered")
        other.publish("ordered, too")

    app = serving(act, bus, other)
    exchange = Exchange()

    await exchange.run(app)
    await exchange.run(app)

    assert len(set(contexts)) == 4
    assert handled == ["ordered", "ordered, too"] * 2


@dataclass(frozen=True, slots=True)
class Ordered:
    request: int
    item: int


@pytest.mark.anyio
async def test_a_thousand_requests_at_once_lose_no_event_and_see_none_of_another(
    bus: EventBus,
) -> None:
    handled: dict[int, list[int]] = {number: [] for number in range(1000)}

    @bus.on(Ordered)
    async def handle(event: Ordered) -> None:
        await checkpoint()
        handled[event.request].append(event.item)
        if event.item == 0:
            bus.publish(Ordered(event.request, 3))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        number = int(scope["path"][1:])
        for item in range(3):
            bus.publish(Ordered(number, item))
            await checkpoint()
        waiting = [delivery.event for delivery in bus.current_context().pending]
        assert waiting == [Ordered(number, item) for item in range(3)]
        await respond(send, 409 if number % 2 else 200)

    wrapped = EventContextMiddleware(app, bus)
    async with create_task_group() as clients:
        for number in handled:
            clients.start_soon(Exchange(f"/{number}").run, wrapped)

    assert handled == {number: [] if number % 2 else [0, 1, 2, 3] for number in handled}
    stats = bus.stats
    assert (stats.accepted, stats.handled, stats.discarded) == (3500, 2000, 1500)
    assert (stats.pending, stats.running, stats.failed, stats.undelivered) == (0, 0, 0, 0)


# Several buses.


@pytest.mark.anyio
async def test_two_buses_have_a_context_each_and_the_scope_names_both(bus: EventBus) -> None:
    other = EventBus(name="other")
    seen: list[EventContext] = []

    def act(request: Request) -> None:
        seen.extend([bus.current_context(), other.current_context()])
        assert {*request.scope["eventkit"]} == {bus, other}

    await Exchange().run(serving(act, bus, other))

    assert seen[0] is not seen[1]
    assert [context.closed for context in seen] == [True, True]


@pytest.mark.anyio
async def test_a_handler_publishes_to_another_bus_of_the_request_in_a_context_of_its_own(
    bus: EventBus, trace: list[str]
) -> None:
    other = EventBus(name="other")

    @other.on(str)
    async def forward(event: str) -> None:
        with pytest.raises(NoEventContextError, match="unit of work of another bus, 'other'"):
            bus.publish(event)
        async with bus.context():
            bus.publish(f"forwarded {event}")
        assert trace[-1] == f"handled forwarded {event}"

    def act(_: Request) -> None:
        other.publish("ordered")

    await Exchange().run(serving(act, bus, other))

    assert other.stats.handled == 1
    assert trace == ["handling forwarded ordered", "handled forwarded ordered"]


# No context: websockets, start-up and shutdown.


def test_a_websocket_has_no_context_and_opens_one_per_message(
    bus: EventBus, trace: list[str], anyio_backend: Backend
) -> None:
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        try:
            bus.publish("never")
        except NoEventContextError as error:
            await socket.send_text(str(error))
        async for message in socket.iter_text():
            async with bus.context():
                bus.publish(message)
            await socket.send_text(trace[-1])

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    app.add_middleware(EventContextMiddleware, bus=bus)

    with bus.context(), client_of(app, anyio_backend).websocket_connect("/") as socket:
        assert socket.receive_text() == (
            "no event context of bus 'default' is active here: a websocket has no event context "
            "of its own, because it would be open for hours. Open one for each message: "
            "`async with bus.context():`, or `async with bus.context(background=True):` if the "
            "websocket must not wait for the handlers"
        )
        for message in ("first", "second"):
            socket.send_text(message)
            assert socket.receive_text() == f"handled {message}"


def test_start_up_and_shutdown_have_no_context_and_can_open_one(
    bus: EventBus, trace: list[str], anyio_backend: Backend
) -> None:
    refusals: list[str] = []

    async def publish(event: str) -> None:
        try:
            bus.publish(event)
        except NoEventContextError as error:
            refusals.append(str(error))
        async with bus.context():
            bus.publish(event)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[dict[str, Any]]:
        await publish("started")
        yield {"mailer": "a mailer"}
        await publish("stopped")

    async def endpoint(request: Request) -> Response:
        bus.publish("ordered")
        return PlainTextResponse(request.state.mailer)

    app = Starlette(routes=[Route("/", endpoint)], lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)

    with bus.context(), client_of(app, anyio_backend) as client:
        assert client.get("/").text == "a mailer"

    assert trace[1::2] == ["handled started", "handled ordered", "handled stopped"]
    refusal = (
        "no event context of bus 'default' is active here: code at start-up and shutdown belongs "
        "to no request. Open a unit of work: `async with bus.context():`"
    )
    assert refusals == [refusal, refusal]


def test_requests_do_not_join_a_context_that_start_up_code_holds_open(
    bus: EventBus, trace: list[str], anyio_backend: Backend
) -> None:
    @asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncGenerator[None]:
        async with bus.context():
            bus.publish("started")
            yield

    async def endpoint(_: Request) -> Response:
        bus.publish("ordered")
        return Response()

    app = Starlette(routes=[Route("/", endpoint)], lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)

    with client_of(app, anyio_backend) as client:
        client.get("/")
        assert trace == ["handling ordered", "handled ordered"]

    assert trace[2:] == ["handling started", "handled started"]
