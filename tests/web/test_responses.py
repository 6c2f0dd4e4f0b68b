"""Responses of every kind, and apps that send none: what the middleware makes of them."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware, Outcome, succeeded
from tests.asgi import Backend, Exchange, client_of, traced

pytestmark = pytest.mark.anyio

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def trace(bus: EventBus) -> list[str]:
    return traced(bus)


def sending(bus: EventBus, *messages: Message, error: BaseException | None = None) -> Asgi:
    """An app that publishes one event, sends these messages, and may raise."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        for message in messages:
            await send(message)
        if error is not None:
            raise error

    return app


def part(kind: str, **facts: Any) -> Message:
    """One message of a response."""
    return {"type": f"http.response.{kind}", **facts}


OK = part("start", status=200)


@pytest.mark.parametrize(
    ("messages", "complete"),
    [
        pytest.param([part("early_hint", links=[]), OK, part("body")], True, id="early hints"),
        pytest.param([part("start", status=304), part("body")], True, id="304"),
        pytest.param([OK, part("pathsend", path="/")], True, id="pathsend"),
        pytest.param([OK, part("zerocopysend", file=0)], True, id="zero copy"),
        pytest.param(
            [OK, part("zerocopysend", file=0, more_body=True)], False, id="zero copy, unfinished"
        ),
        pytest.param(
            [part("start", status=200, trailers=True), part("body"), part("trailers", headers=[])],
            True,
            id="trailers",
        ),
        pytest.param([OK, part("body", body=b"1", more_body=True)], False, id="unfinished"),
        pytest.param([OK], False, id="no body"),
    ],
)
async def test_unusual_responses_deliver_and_reach_the_server_unchanged(
    bus: EventBus, trace: list[str], messages: list[Message], complete: bool
) -> None:
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> bool:
        outcomes.append(outcome)
        return succeeded(outcome)

    exchange = Exchange()
    await exchange.run(EventContextMiddleware(sending(bus, *messages), bus, deliver_if=note))

    assert exchange.sent == messages
    assert outcomes == [Outcome(exchange.scope, exchange.status, complete, None)]
    assert trace == ["handling ordered", "handled ordered"]


def test_a_head_request_delivers(bus: EventBus, trace: list[str], anyio_backend: Backend) -> None:
    async def endpoint(_: Request) -> Response:
        bus.publish("ordered")
        return PlainTextResponse("body")

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(EventContextMiddleware, bus=bus)

    response = client_of(app, anyio_backend).head("/")

    assert (response.status_code, response.headers["content-length"]) == (200, "4")
    assert trace == ["handling ordered", "handled ordered"]


async def test_an_app_that_sends_nothing_discards(bus: EventBus, trace: list[str]) -> None:
    await Exchange().run(EventContextMiddleware(sending(bus), bus))

    assert trace == ["discarded ordered"]


@pytest.mark.parametrize("messages", [[], [OK, part("body")]], ids=["before", "after"])
@pytest.mark.parametrize(
    "error",
    [
        ExceptionGroup("two", [ValueError(), KeyError()]),
        BaseExceptionGroup("worse", [KeyboardInterrupt()]),
        KeyboardInterrupt(),
        GeneratorExit(),
    ],
    ids=repr,
)
async def test_whatever_the_app_raises_before_or_after_the_response_is_raised_unchanged(
    bus: EventBus, trace: list[str], messages: list[Message], error: BaseException
) -> None:
    app = EventContextMiddleware(sending(bus, *messages, error=error), bus)

    with pytest.raises(type(error)) as raised:
        await Exchange().run(app)

    assert raised.value is error
    assert trace == ["discarded ordered"]
    assert bus.stats.pending == 0
