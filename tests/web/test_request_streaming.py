"""Streaming responses, clients that leave, requests that are cancelled: what happens when."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import pytest
from anyio import CancelScope, Event, create_task_group, sleep_forever
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, order_of, respond, traced

pytestmark = pytest.mark.anyio

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def trace(bus: EventBus) -> list[str]:
    return traced(bus)


def streaming(bus: EventBus, trace: list[str], *, hangs: bool = False) -> Asgi:
    """An app that streams three parts, or hangs after the first."""

    async def parts() -> AsyncIterator[str]:
        bus.publish("opened")
        yield "one"
        if hangs:
            try:
                await sleep_forever()
            finally:
                trace.append("generator ends")
        bus.publish("half done")
        yield "two"
        yield "three"

    async def endpoint(_: Request) -> Response:
        bus.publish("asked")
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(EventContextMiddleware, bus=bus)
    return app


async def test_what_a_stream_publishes_is_delivered_after_its_last_part(
    bus: EventBus, trace: list[str]
) -> None:
    assert await order_of(streaming(bus, trace), trace) == [
        "start 200",
        "body one",
        "body two",
        "body three",
        "end of body",
        "handling asked",
        "handled asked",
        "handling opened",
        "handled opened",
        "handling half done",
        "handled half done",
        "returned",
    ]


async def test_a_stream_can_deliver_midway(bus: EventBus, trace: list[str]) -> None:
    async def parts() -> AsyncIterator[str]:
        bus.publish("opened")
        await bus.current_context().drain()
        yield "one"
        bus.publish("closed")

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(EventContextMiddleware, bus=bus)

    assert await order_of(app, trace) == [
        "start 200",
        "handling opened",
        "handled opened",
        "body one",
        "end of body",
        "handling closed",
        "handled closed",
        "returned",
    ]


async def test_a_cancelled_request_cancels_the_handlers_that_it_drains(bus: EventBus) -> None:
    begun = Event()

    @bus.on(int)
    async def hang(event: int) -> None:
        begun.set()
        await sleep_forever()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish(1)
        await bus.current_context().drain()

    async with create_task_group() as tasks:
        tasks.start_soon(Exchange().run, EventContextMiddleware(app, bus))
        await begun.wait()
        tasks.cancel_scope.cancel()

    assert (bus.stats.undelivered, bus.stats.running) == (1, 0)


async def test_a_stream_that_fails_discards(bus: EventBus, trace: list[str]) -> None:
    async def parts() -> AsyncIterator[str]:
        yield "one"
        bus.publish("half done")
        raise ZeroDivisionError

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(EventContextMiddleware, bus=bus)

    *before, end = await order_of(app, trace)

    assert before == ["start 200", "body one", "discarded half done"]
    # An older Starlette raises what its task group raises.
    assert end in {"raised ZeroDivisionError", "raised ExceptionGroup"}


@pytest.mark.parametrize("spec_version", [None, "2.0", "2.3"])
async def test_a_client_that_leaves_a_stream_does_not_make_the_request_fail(
    bus: EventBus, trace: list[str], spec_version: str | None
) -> None:
    app = streaming(bus, trace, hangs=True)

    assert await order_of(app, trace, spec_version=spec_version, leaves=True) == [
        "start 200",
        "body one",
        "generator ends",
        "handling asked",
        "handled asked",
        "handling opened",
        "handled opened",
        "returned",
    ]


@pytest.mark.skipif(
    "spec_version" not in inspect.getsource(StreamingResponse),
    reason="this Starlette knows no ASGI 2.4",
)
async def test_a_client_whose_leaving_is_an_error_does_not_make_the_request_fail(
    bus: EventBus, trace: list[str]
) -> None:
    class Parts:  # no generator, because Starlette would leave it unfinished
        def __aiter__(self) -> Self:
            return self

        async def __anext__(self) -> str:
            bus.publish("asked")
            return "part"

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(Parts())

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(EventContextMiddleware, bus=bus)

    assert await order_of(app, trace, spec_version="2.4", leaves=True) == [
        "start 200",
        "body part",
        "handling asked",
        "handled asked",
        "handling asked",
        "handled asked",
        "raised ClientDisconnect",
    ]


async def test_a_client_that_leaves_a_task_group_does_not_make_the_request_fail(
    bus: EventBus, trace: list[str]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("opened")
        async with create_task_group() as tasks:
            tasks.start_soon(respond, send, 200, (b"one", b"two"))
            tasks.start_soon(sleep_forever)

    wrapped = EventContextMiddleware(app, bus)

    assert await order_of(wrapped, trace, spec_version="2.4", leaves=True) == [
        "start 200",
        "body one",
        "handling opened",
        "handled opened",
        "raised ExceptionGroup",
    ]


@pytest.mark.parametrize("error", [OSError, ClientDisconnect, ZeroDivisionError])
async def test_an_error_beside_the_client_that_left_does_make_the_request_fail(
    bus: EventBus, trace: list[str], error: type[Exception]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        try:
            await respond(send, 200, (b"one", b"two"))
        except OSError:
            trace.append("client left")
        if error is not ClientDisconnect:
            raise error
        raise ExceptionGroup("", [ClientDisconnect(), ZeroDivisionError()])

    wrapped = EventContextMiddleware(app, bus)

    assert (await order_of(wrapped, trace, spec_version="2.4", leaves=True))[:-1] == [
        "start 200",
        "body one",
        "client left",
        "discarded ordered",
    ]


async def test_a_client_that_leaves_during_its_upload_makes_the_request_fail(
    bus: EventBus, trace: list[str]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def leave() -> dict[str, Any]:
            await checkpoint()
            return {"type": "http.disconnect"}

        bus.publish("uploading")
        await Request(scope, leave).body()

    assert await order_of(EventContextMiddleware(app, bus), trace) == [
        "discarded uploading",
        "raised ClientDisconnect",
    ]


async def test_a_request_that_is_cancelled_discards_and_still_delivers_what_was_released(
    bus: EventBus, trace: list[str]
) -> None:
    with CancelScope() as scope:

        async def app(_: Scope, receive: Receive, send: Send) -> None:
            bus.publish("ordered")
            bus.current_context().release()
            bus.publish("thanked")
            await respond(send)
            scope.cancel()
            await checkpoint()

        await order_of(EventContextMiddleware(app, bus), trace)

    assert scope.cancelled_caught
    assert trace[:-1] == [
        "start 200",
        "end of body",
        "discarded thanked",
        "handling ordered",
        "handled ordered",
    ]
