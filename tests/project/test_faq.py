"""What the page of questions says: its messages exist, and each cause has the named symptom."""

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.lowlevel
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventkit import EventBus, EventContextClosedError, NoEventContextError
from eventkit.starlette import EventContextMiddleware
from tests.project.messages import texts, unsaid
from tests.project.test_docs import ROOT

PAGE = ROOT / "docs" / "faq.md"
# What reads like a message and is none, or is one of another library.
ELSEWHERE = {
    "from eventkit import named",
    "is bound to a different event loop",
    "database is locked",
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
    messages = [each for each in quoted(ROOT / "docs" / f"{page}.md") if each not in ELSEWHERE]
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


def test_an_exception_handler_for_all_exceptions_is_outside(bus: EventBus, got: list[int]) -> None:
    app, told = FastAPI(), list[str]()
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        try:
            bus.publish(Said(1))
        except NoEventContextError as refused:
            told.append(str(refused))
        async with bus.context():
            bus.publish(Said(2))
        return PlainTextResponse("sorry", 500)

    @app.get("/")
    async def fail() -> None:
        raise ValueError

    assert TestClient(app, raise_server_exceptions=False).get("/").text == "sorry"
    assert "no request or job surrounds the caller." in told[0]
    assert got == [2]


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


def test_each_place_without_a_unit_of_work_is_named_in_the_message(bus: EventBus) -> None:
    told: dict[str, str] = {}

    def attempt(name: str) -> None:
        try:
            bus.publish(Said())
        except NoEventContextError as refused:
            told[name] = str(refused)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        attempt("lifespan")
        yield

    app, other = FastAPI(lifespan=lifespan), EventBus(name="other")
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.get("/")
    async def leave() -> None:
        await asyncio.get_running_loop().run_in_executor(None, attempt, "executor")

    with TestClient(app) as client:
        client.get("/")
    thread = threading.Thread(target=attempt, args=["thread"])
    thread.start()
    thread.join()
    attempt("script")
    with other.context():
        attempt("other")

    away = "was started without its creator's context variables."
    assert away in told["executor"]
    assert away in told["thread"]
    assert "code at start-up and shutdown belongs to no request." in told["lifespan"]
    assert "this is start-up code, a script or a synchronous test." in told["script"]
    assert "this is a unit of work of another bus" in told["other"]


def test_a_task_that_has_outlived_its_request_is_told_so(bus: EventBus) -> None:
    app, told = FastAPI(), list[Exception]()
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.get("/")
    async def start() -> None:
        async def publish() -> None:
            await ended.wait()
            try:
                bus.publish(Said())
            except EventContextClosedError as refused:
                told.append(refused)

        app.state.task = asyncio.create_task(publish())

    @app.get("/end")
    async def end() -> None:
        ended.set()
        await app.state.task

    with TestClient(app) as client:
        ended = asyncio.Event()
        client.get("/")
        client.get("/end")
    assert "bus.context(independent=True)" in str(told[0])


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


def test_explain_says_why_nobody_is_reached(bus: EventBus) -> None:
    class Wide: ...

    class Narrow(Wide): ...

    async def handler(event: Narrow) -> None: ...

    namesake = type("Narrow", (), {})
    assert "reaches no handler of bus" in bus.explain(Wide)
    bus.subscribe(Narrow, handler)
    assert "Not called, because subscribed to a subclass of it:" in bus.explain(Wide)
    of_the_same_name = "Not called, because subscribed to another class of the same name:"
    assert of_the_same_name in bus.explain(namesake)


def test_any_asgi_application_can_be_wrapped(bus: EventBus, got: list[int]) -> None:
    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # and has no lifespan
        bus.publish(Said(5))
        await PlainTextResponse("hello")(scope, receive, send)

    with TestClient(EventContextMiddleware(plain, bus=bus)) as client:
        assert client.get("/").text == "hello"
    assert got == [5]


@pytest.mark.parametrize("background", [None, False])
def test_where_the_loop_stops_after_each_response_only_background_false_delivers_before(
    bus: EventBus, got: list[int], background: bool | None
) -> None:
    """As with a lifespan that is run by hand on AWS Lambda, where the loop runs per call."""
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus, background=background)

    @bus.on(Said)
    async def slow(event: Said) -> None:
        await anyio.lowlevel.checkpoint()
        got.append(-event.number)

    @app.get("/")
    async def publish() -> None:
        bus.publish(Said(5))

    asgi = {"version": "3.0", "spec_version": "2.0"}
    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [],
        "query_string": b"",
    }
    wanted: list[str] = []

    async def call() -> list[int]:
        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            wanted.append(message["type"])

        await app({**scope, "asgi": asgi}, receive, send)
        return [*got]

    async def serve() -> list[int]:
        messages = asyncio.Queue[Message]()
        started = asyncio.Event()

        async def send(message: Message) -> None:
            started.set()

        messages.put_nowait({"type": "lifespan.startup"})
        lifespan: Any = app({"type": "lifespan", "asgi": asgi}, messages.get, send)
        running = asyncio.create_task(lifespan)
        await started.wait()
        when_it_returned = await call()
        messages.put_nowait({"type": "lifespan.shutdown"})
        await running
        return when_it_returned

    assert asyncio.run(serve()) == ([] if background is None else [5, -5])
    assert sorted(got) == [-5, 5]


def test_the_page_has_a_heading_for_each_question_that_other_pages_send_to() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-")
        for line in PAGE.read_text().splitlines()
        if line.startswith("## ")
    }
    for page in (ROOT / "docs").glob("**/*.md"):
        for anchor in re.findall(r"faq\.md#([a-z0-9-]+)", page.read_text()):
            assert anchor in headings, f"{Path(page).name} links to faq.md#{anchor}"
