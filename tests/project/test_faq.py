"""What the page of questions says: its messages exist, and each cause has the named symptom."""

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from anyio.lowlevel import checkpoint
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit import EventBus, NoEventContextError
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, lifespan_of
from tests.project.messages import texts, unsaid
from tests.project.pages import DOCS

PAGE = DOCS / "faq.md"
# What reads like a message and is none, or is one of another library.
ELSEWHERE = {
    "from eventkit import named",
    "is bound to a different event loop",
    "database is locked",
    "python -X dev",
}
WORD = re.compile(r"([A-Za-z'-]+[:,.]?|\.\.\.)")


def quoted(path: Path) -> Iterator[str]:
    """The messages on a page: blocks of text, and code that consists of three words or more."""
    page = path.read_text()
    for block in re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        words = code.split()
        if len(words) > 2 and all(map(WORD.fullmatch, words)):
            yield code


@pytest.mark.parametrize(
    ("page", "at_least"),
    [("faq", 25), ("from-background-tasks", 3), ("from-fastapi-events", 1), ("from-signals", 0)],
)
def test_the_quoted_messages_are_those_of_the_source(page: str, at_least: int) -> None:
    messages = [each for each in quoted(DOCS / f"{page}.md") if each not in ELSEWHERE]
    assert len(messages) >= at_least
    assert unsaid(messages) == []


def test_the_body_of_a_503_is_quoted() -> None:
    body = "Too many events wait to be delivered. Try again later."
    assert body in PAGE.read_text()
    assert body in texts()


@dataclass(frozen=True, slots=True)
class Said:
    number: int = 0


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def got(bus: EventBus) -> list[int]:
    numbers: list[int] = []

    @bus.on(Said)
    async def note(event: Said) -> None:
        numbers.append(event.number)

    return numbers


class Publishing(BaseHTTPMiddleware):
    """Publishes before and after what is inside."""

    def __init__(self, app: ASGIApp, bus: EventBus) -> None:
        super().__init__(app)
        self.bus = bus

    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        self.bus.publish(Said(1))
        response = await call_next(request)
        self.bus.publish(Said(3))
        return response


@pytest.mark.parametrize("outside", ["ours", "publishing"])
def test_a_middleware_of_starlettes_base_class_may_publish_inside_of_ours(
    bus: EventBus, got: list[int], outside: str
) -> None:
    app = FastAPI()
    if outside == "ours":
        app.add_middleware(Publishing, bus=bus)
    app.add_middleware(EventContextMiddleware, bus=bus)
    if outside == "publishing":
        app.add_middleware(Publishing, bus=bus)

    @app.get("/")
    async def publish() -> None:
        bus.publish(Said(2))

    if outside == "ours":
        assert TestClient(app).get("/").status_code == 200
        assert got == [1, 2, 3]
    else:
        with pytest.raises(NoEventContextError, match="no request or job surrounds the caller"):
            TestClient(app).get("/")


@pytest.mark.parametrize("where", ["main", "mounted"])
def test_a_mounted_application_uses_the_middleware_of_the_main_one(
    bus: EventBus, got: list[int], where: str
) -> None:
    main, mounted = FastAPI(), FastAPI()
    main.mount("/mounted", mounted)
    {"main": main, "mounted": mounted}[where].add_middleware(EventContextMiddleware, bus=bus)

    @main.get("/")
    @mounted.get("/")
    async def publish() -> None:
        bus.publish(Said())

    assert TestClient(main).get("/mounted/").status_code == 200
    assert got == [0]
    if where == "mounted":
        with pytest.raises(NoEventContextError, match="no request or job surrounds the caller"):
            TestClient(main).get("/")


def test_a_factory_that_runs_twice_for_one_bus_subscribes_an_inner_function_twice() -> None:
    bus, got = EventBus(), list[int]()

    def create_app() -> None:
        @bus.on(Said)
        async def note(event: Said) -> None:
            got.append(event.number)

    create_app()
    create_app()
    with bus.context():
        bus.publish(Said(7))

    assert got == [7, 7]
    places = re.findall(r"subscribed to this class itself, at (\S+)", bus.explain(Said))
    assert len(places) == 2
    assert len({*places}) == 1


def test_any_asgi_application_can_be_wrapped(bus: EventBus, got: list[int]) -> None:
    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # and has no lifespan
        bus.publish(Said(5))
        await PlainTextResponse("hello")(scope, receive, send)

    with TestClient(EventContextMiddleware(plain, bus=bus)) as client:
        assert client.get("/").text == "hello"
    assert got == [5]


@pytest.mark.anyio
@pytest.mark.parametrize("background", [None, False])
async def test_where_the_loop_stops_after_each_response_only_background_false_delivers_before(
    bus: EventBus, got: list[int], background: bool | None
) -> None:
    """As with a lifespan that is run by hand on AWS Lambda, where the loop runs per call."""
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus, background=background)

    @bus.on(Said)
    async def slow(event: Said) -> None:
        await checkpoint()
        got.append(-event.number)

    @app.get("/")
    async def publish() -> None:
        bus.publish(Said(5))

    async with lifespan_of(app):
        await Exchange(spec_version="2.0").run(app)
        when_it_returned = [*got]

    assert when_it_returned == ([] if background is None else [5, -5])
    assert sorted(got) == [-5, 5]
