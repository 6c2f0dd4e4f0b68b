"""The pages for those who come from elsewhere: both programs run, and what changes is compared."""

import gc
import inspect
import json
import re
import smtplib
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context, ContextVar
from dataclasses import dataclass
from email.message import EmailMessage
from enum import Enum, StrEnum
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Self, TypeVar, cast

import anyio
import anyio.lowlevel
import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Response, WebSocket
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient
from starlette.types import Scope

from eventkit import EventBus, EventKitError, InvalidEventTypeError, NoEventContextError
from eventkit.starlette import EventContextMiddleware
from tests.asgi import DEPENDENCIES_END_BEHIND_THE_RESPONSE
from tests.project.pages import DOCS, blocks, run_project

TASKS, EVENTS = DOCS / "from-background-tasks.md", DOCS / "from-fastapi-events.md"


Handler = TypeVar("Handler", bound=Callable[[Any], Awaitable[None]])


def joined(parts: dict[str, str], name: str) -> str:
    """A file of a project, of all its parts but those that are said to be for durable handlers."""
    of_it = re.compile(rf"{re.escape(name)}(?!.*, durable$)(, .*)?$")
    return "\n\n".join(part for title, part in parts.items() if of_it.match(title))


def load(project: Path, name: str, source: str) -> ModuleType:
    path = project / f"{name}.py"
    path.write_text(source)
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class World:
    """What the invoices' application talks to, and its database."""

    def __init__(self) -> None:
        self.mails: list[str] = []
        self.hooks: list[httpx.Request] = []
        self.mail_is_down = False
        self.hook_fails = 0

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.hooks.append(request)
        return httpx.Response(500 if len(self.hooks) <= self.hook_fails else 200)

    def rows(self, table: str) -> list[tuple[object, ...]]:
        connection = sqlite3.connect("shop.db")
        try:
            return connection.execute(f"select * from {table}").fetchall()
        finally:
            connection.close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()

    class Server:
        def __init__(self, host: str, port: int, timeout: float) -> None:
            if world.mail_is_down:
                raise ConnectionRefusedError("the mail server is away")

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exc_info: object) -> None: ...

        def send_message(self, message: EmailMessage) -> None:
            world.mails.append(f"{message['To']}: {message['Subject']}")

    monkeypatch.setattr(smtplib, "SMTP", Server)
    return world


def invoiced(module: ModuleType, world: World, **headers: str) -> int:
    """Have an invoice written; the status of the answer."""
    with TestClient(module.app, headers=headers, raise_server_exceptions=False) as client:
        module.app.state.client = world.client()
        answer = client.post("/invoices?email=bob@example.com&amount=3")
        return answer.status_code


@pytest.fixture(params=["before", "after"])
def invoices(request: pytest.FixtureRequest, project: Path) -> ModuleType:
    pytest.importorskip("greenlet")
    name: str = request.param
    return load(project, name, joined(blocks(TASKS), f"{name}.py"))


def test_both_programs_mail_audit_and_call_the_webhook(invoices: ModuleType, world: World) -> None:
    world.hook_fails = 2
    assert invoiced(invoices, world, **{"x-user": "ada"}) == 200

    assert world.mails == ["bob@example.com: invoice 1"]
    assert world.rows("invoices") == [(1, "bob@example.com", 3)]
    assert world.rows("audit") == [(1, "ada", "invoice 1 from testclient")]
    assert [hook.read() for hook in world.hooks] == [b'{"id":1,"amount":3}'] * 3


def test_both_programs_do_nothing_for_a_request_that_is_refused(
    invoices: ModuleType, world: World
) -> None:
    assert invoiced(invoices, world) == 401
    assert (world.mails, world.hooks, world.rows("invoices")) == ([], [], [])


def test_a_mail_server_that_is_away_costs_the_tasks_the_invoice_and_the_handlers_nothing(
    invoices: ModuleType, world: World
) -> None:
    world.mail_is_down = True
    assert invoiced(invoices, world, **{"x-user": "ada"}) == 200

    there = 1 if invoices.__name__ == "after" else 0
    written = there if DEPENDENCIES_END_BEHIND_THE_RESPONSE else 1
    assert [len(world.rows(table)) for table in ("invoices", "audit")] == [written, there]
    assert len(world.hooks) == there


def test_the_tests_of_the_program_after_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("greenlet")
    parts = blocks(TASKS)
    (pytester.path / "after.py").write_text(joined(parts, "after.py"))
    (pytester.path / "test_after.py").write_text(parts["test_after.py"])

    run_project(pytester, monkeypatch, passed=1)


def durable_source(parts: dict[str, str]) -> str:
    """The program of the page about tasks, with a webhook that is durable."""
    source = joined(parts, "after.py")
    imports = "from eventkit import EventBus\nfrom eventkit.sqlalchemy import deliver_on_commit\n"
    new = {imports: parts["after.py, the imports, durable"]}
    for title in ("the event", "the bus", "the webhook"):
        new[parts[f"after.py, {title}"]] = parts[f"after.py, {title}, durable"]
    for old, part in new.items():
        assert old in source
        source = source.replace(old, part)
    return source


def test_the_durable_webhook_is_called_again_with_the_same_key(project: Path, world: World) -> None:
    pytest.importorskip("greenlet")
    source = durable_source(blocks(TASKS))
    module = load(project, "durable", source)
    world.hook_fails = 1

    with TestClient(module.app, headers={"x-user": "ada"}) as client:
        module.app.state.client = world.client()
        assert client.post("/invoices?email=bob@example.com&amount=3").status_code == 200
        assert client.portal is not None
        client.portal.call(partial(module.outbox.run_due, within=60))

    assert len(world.hooks) == 2
    assert len({hook.headers["idempotency-key"] for hook in world.hooks}) == 1
    assert world.rows("eventkit_outbox") == []


def test_the_durable_test_of_the_page_about_tasks_runs(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("greenlet")
    parts = blocks(TASKS)
    (pytester.path / "after.py").write_text(durable_source(parts))
    tests = parts["test_after.py"] + parts["test_after.py, durable"]
    (pytester.path / "test_after.py").write_text(tests)

    run_project(pytester, monkeypatch, passed=2)


@pytest.mark.parametrize("how", ["with the endpoint's session", "durable"])
def test_the_audit_line_that_must_exist_is_written_in_both_ways_that_the_page_has(
    project: Path, world: World, how: str
) -> None:
    pytest.importorskip("greenlet")
    parts = blocks(TASKS)
    source = durable_source(parts)
    handler = source[source.index("@bus.on(InvoiceCreated)\nasync def write_audit") :]
    handler = handler[: handler.index("\n\n\n")]
    if how == "durable":
        new = handler.replace("@bus.on(InvoiceCreated)", "@bus.on(InvoiceCreated, durable=True)")
        new = new.replace("    session.add", "    complete_with(session)\n    session.add")
        source = source.replace(handler, new).replace("Outbox,", "Outbox, complete_with,")
    else:
        source = source.replace(handler, "").replace(
            "    bus.publish(",
            '    session.add(Audit(who=user, what=f"invoice {invoice.id} from {host}"))\n'
            "    bus.publish(",
        )
    module = load(project, "durable", source)

    assert invoiced(module, world, **{"x-user": "ada"}) == 200
    assert world.rows("audit") == [(1, "ada", "invoice 1 from testclient")]
    assert world.rows("eventkit_outbox") == []


# ---- fastapi-events: both programs, and each row of the table of what changes.


def theirs() -> tuple[FastAPI, Any]:  # Any: fastapi-events may be missing
    """An application of fastapi-events, and its handlers."""
    local = pytest.importorskip("fastapi_events.handlers.local").LocalHandler()
    middleware = pytest.importorskip("fastapi_events.middleware").EventHandlerASGIMiddleware
    app = FastAPI()
    app.add_middleware(middleware, handlers=[local])
    return app, local


def registering(local: Any, name: str) -> Callable[[Handler], Handler]:
    return cast("Callable[[Handler], Handler]", local.register(event_name=name))


def dispatch(*arguments: object, **options: object) -> None:
    import_module("fastapi_events.dispatcher").dispatch(*arguments, **options)


def ours() -> tuple[FastAPI, EventBus]:
    app, bus = FastAPI(), EventBus()
    app.add_middleware(EventContextMiddleware, bus=bus)
    return app, bus


@dataclass(frozen=True)
class Said:
    name: str = "said"
    payload: object = None


@pytest.fixture(params=["theirs", "ours"])
def library(request: pytest.FixtureRequest) -> "Library":
    return Library(request.param)


class Library:
    """One of the two, with handlers that note what they get, for the same program in both."""

    def __init__(self, name: str) -> None:
        self.is_theirs = name == "theirs"
        self.log: list[str] = []
        self.local: Any = None
        if self.is_theirs:
            self.app, self.local = theirs()
        else:
            self.app, self.bus = ours()

    def on(self, handler: Any) -> Any:
        if self.is_theirs:
            return self.local.register(event_name="*")(handler)
        return self.bus.on(Said)(handler)

    def say(self, name: str = "said") -> None:
        if self.is_theirs:
            dispatch(name, {})
        else:
            self.bus.publish(Said(name))

    def get(self, path: str = "/") -> int:
        with TestClient(self.app, raise_server_exceptions=False) as client:
            return client.get(path).status_code

    def note(self) -> None:
        @self.on
        async def note(event: object) -> None:
            self.log.append("noted")


def test_the_same_requests_reach_these_handlers_before_and_after(project: Path) -> None:
    pytest.importorskip("fastapi_events")
    before = load(project, "before", blocks(EVENTS)["before.py"])
    for method, path in (
        ("POST", "/users?email=ada@example.com"),
        ("DELETE", "/users/1"),
        ("POST", "/carts/1/checkout"),
        ("POST", "/carts/2/checkout?fail=1"),
    ):
        TestClient(before.app).request(method, path)

    assert [(who, str(event[0])) for who, event in before.seen] == [
        ("all", "Events.USER_CREATED"),  # and neither "welcome" nor "audit"
        ("audit", "user.deleted"),
        ("all", "user.deleted"),
        ("all", "Events.CART_CHECKED_OUT"),
        ("all", "Events.CART_CHECKED_OUT"),  # of the 409
    ]


class Plain(Enum):
    USER_CREATED = "user.created"


class OfText(str, Enum):  # noqa: UP042 - as applications have it
    USER_CREATED = "user.created"


class Text(StrEnum):
    USER_CREATED = "user.created"


@pytest.mark.parametrize("names", [Plain, OfText, Text])
def test_a_text_reaches_a_member_there_if_the_member_is_text(
    names: type[Plain | OfText | Text],
) -> None:
    app, local = theirs()
    member = names.USER_CREATED
    got: list[str] = []

    def noting(label: str, name: Any) -> None:
        @registering(local, name)
        async def note(event: object) -> None:
            got.append(label)

    for label, name in (("text", "user.created"), ("pattern", "user.*"), ("member", member)):
        noting(label, name)

    @app.get("/")
    async def say() -> None:
        dispatch(member, {})

    TestClient(app).get("/")
    assert sorted(got) == (["member"] if names is Plain else ["member", "pattern", "text"])


def test_a_call_that_has_moved_in_half_is_refused_unless_a_handler_takes_each_object() -> None:
    bus, got = EventBus(), list[object]()

    async def note(event: object) -> None:
        got.append(event)

    def publish() -> None:
        with bus.context():
            bus.publish("user.created", {"user_id": 1})

    bus.subscribe(Said, note)
    with pytest.raises(InvalidEventTypeError, match="an instance of a class of yours"):
        publish()
    assert got == []
    bus.subscribe(object, note)
    publish()
    assert got == ["user.created", {"user_id": 1}]


def test_a_dispatch_that_nobody_awaits_calls_no_handler_and_is_a_warning() -> None:
    bus, got = EventBus(), list[object]()

    @bus.on(Said)
    async def note(event: Said) -> None:
        got.append(event)

    with pytest.warns(RuntimeWarning, match="coroutine 'EventBus.dispatch' was never awaited"):
        bus.dispatch(Said())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    assert got == []


@pytest.mark.parametrize("how", ["raised", "returned", "error", "commit"])
def test_a_failed_request_delivers_there_and_not_here(library: Library, how: str) -> None:
    library.note()

    async def commit() -> AsyncIterator[None]:
        yield
        if how == "commit":
            raise RuntimeError("the commit fails")

    @library.app.get("/", dependencies=[Depends(commit)])
    async def fail() -> Response:
        library.say()
        if how == "raised":
            raise HTTPException(409)
        if how == "error":
            raise RuntimeError("a fault")
        return Response(status_code=409 if how == "returned" else 200)

    library.get()
    assert library.log == (["noted"] if library.is_theirs else [])


def test_a_failing_handler_there_skips_the_next_one_and_leaves_the_application(
    library: Library,
) -> None:
    @library.on
    async def fail(event: object) -> None:
        raise ValueError("no mail today")

    library.note()
    library.app.get("/")(library.say)
    if library.is_theirs:
        with pytest.raises(ValueError, match="no mail today"):
            TestClient(library.app).get("/")
        assert library.log == []
    else:
        assert TestClient(library.app).get("/").status_code == 200
        assert library.log == ["noted"]


def test_events_run_at_the_same_time_there_and_handlers_here(library: Library) -> None:
    def waits(name: str) -> None:
        async def handler(event: Any) -> None:
            library.log.append(f"{name} begins")
            await anyio.lowlevel.checkpoint()
            library.log.append(f"{name} ends")

        library.on(handler)

    waits("first")
    waits("second")

    @library.app.get("/")
    async def say_two() -> None:
        library.say("one")
        library.say("two")

    library.get()
    of_two_events = ["first begins", "first begins"]
    of_one_event = ["first begins", "second begins"]
    assert library.log[:2] == (of_two_events if library.is_theirs else of_one_event)


def test_a_plain_def_there_gets_neither_its_dependency_nor_context_variables(
    library: Library,
) -> None:
    variable = ContextVar("variable", default="nothing")
    got: list[object] = []

    async def five() -> int:
        return 5

    @library.on
    def plain(event: object, number: object = Depends(five)) -> None:
        got.extend([number, variable.get()])

    @library.app.get("/")
    async def say() -> None:
        variable.set("set")
        library.say()

    library.get()
    if library.is_theirs:
        assert [repr(got[0]).partition("(")[0], got[1]] == ["Depends", "nothing"]
    else:
        assert got == [5, "set"]


def test_dependencies_there_know_no_annotated_no_yield_and_no_overrides(library: Library) -> None:
    got: list[object] = []

    async def five() -> int:
        return 5

    async def yields() -> AsyncIterator[int]:
        yield 6

    @library.on
    async def by_default(event: object, number: object = Depends(five)) -> None:
        got.append(number)

    @library.on
    async def by_yield(event: object, number: object = Depends(yields)) -> None:
        got.append(number)

    @library.on
    async def annotated(event: object, number: Annotated[int, Depends(five)]) -> None:
        got.append(number)

    async def seven() -> int:
        return 7

    library.app.dependency_overrides[five] = seven
    library.app.get("/")(library.say)
    if library.is_theirs:
        with pytest.raises(TypeError, match="number"):
            TestClient(library.app).get("/")
        assert got[0] == 5
        assert inspect.isasyncgen(got[1])
    else:
        assert library.get() == 200
        assert sorted(map(str, got)) == ["6", "7", "7"]


def test_an_event_of_a_handler_is_waited_for_here_alone(library: Library) -> None:
    @library.on
    async def follow(event: Any) -> None:
        name = event[0] if library.is_theirs else event.name
        library.log.append(f"{name} begins")
        if name == "said":
            library.say("followed")
        if name == "followed" and library.is_theirs:
            await anyio.sleep_forever()  # the request would hang if it were waited for
        for _ in range(500):
            await anyio.lowlevel.checkpoint()
        library.log.append(f"{name} ends")

    library.app.get("/")(library.say)
    TestClient(library.app).get("/")
    assert ("followed ends" in library.log) is not library.is_theirs


def test_a_websocket_delivers_there_when_it_is_closed_and_here_per_message(
    library: Library,
) -> None:
    library.note()

    @library.app.websocket("/")
    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            if library.is_theirs:
                library.say()
            else:
                with pytest.raises(NoEventContextError, match="Open one for each message"):
                    library.say()
                async with library.bus.context():
                    library.say()
            await socket.send_json(library.log)

    messages = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "hello"},
        {"type": "websocket.disconnect", "code": 1000},
    ]
    sent: list[Any] = []  # messages, as ASGI defines them

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "websocket",
        "path": "/",
        "headers": [],
        "query_string": b"",
        "asgi": {},
    }
    anyio.run(library.app, scope, receive, send)
    assert json.loads(sent[-1]["text"]) == ([] if library.is_theirs else ["noted"])
    assert library.log == ["noted"]


def test_outside_of_a_request_there_is_an_error_in_both(library: Library) -> None:
    library.note()
    with pytest.raises(LookupError if library.is_theirs else NoEventContextError):
        Context().run(library.say)


def test_the_innermost_middleware_gets_the_event_there_whatever_its_id() -> None:
    app, inner = theirs()
    handlers = import_module("fastapi_events.handlers.local")
    middleware = import_module("fastapi_events.middleware").EventHandlerASGIMiddleware
    outer, got = handlers.LocalHandler(), list[str]()
    app.add_middleware(middleware, handlers=[outer], middleware_id=7)

    @registering(inner, "*")
    async def in_inner(event: object) -> None:
        got.append("inner")

    @registering(outer, "*")
    async def in_outer(event: object) -> None:
        got.append("outer")

    @app.get("/")
    async def say() -> None:
        dispatch("said", {}, middleware_id=7)

    TestClient(app).get("/")
    assert got == ["inner"]


def test_a_schema_there_drops_defaults_and_is_found_by_its_own_kind_of_name() -> None:
    app, local = theirs()
    registry_of = import_module("fastapi_events.registry.payload_schema")
    registry, got = registry_of.EventPayloadSchemaRegistry(), list[object]()

    class Names(Enum):
        SAID = "said"

    class Schema(BaseModel):
        number: int
        unit: str = "EUR"

    registry.register(Schema, event_name=Names.SAID)

    @registering(local, "*")
    async def note(event: tuple[object, object]) -> None:
        got.append(event[1])

    @app.get("/{number}")
    async def say(number: str, text: bool = False) -> None:
        name = Names.SAID.value if text else Names.SAID
        dispatch(name, {"number": number}, payload_schema_registry=registry)

    client = TestClient(app)
    client.get("/3")
    client.get("/no-number?text=1")  # and nobody checks it
    with pytest.raises(ValidationError):
        client.get("/no-number")
    assert got == [{"number": 3}, {"number": "no-number"}]


def test_a_trace_is_written_into_the_payload_there() -> None:
    app, _ = theirs()
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    payload: dict[str, object] = {"user_id": 1}

    @app.get("/")
    async def say() -> None:
        with trace.TracerProvider().get_tracer("test").start_as_current_span("request"):
            dispatch("said", payload)

    TestClient(app).get("/")
    assert [*payload] == ["user_id", "traceparent"]


def test_not_all_errors_there_are_exceptions() -> None:
    errors = pytest.importorskip("fastapi_events.errors")
    assert not issubclass(errors.MissingEventNameDuringDispatch, Exception)
    assert issubclass(EventKitError, Exception)


def test_both_libraries_side_by_side_run_each_handler_once(project: Path) -> None:
    pytest.importorskip("fastapi_events")
    moving = load(project, "moving", blocks(EVENTS)["moving.py"])
    with TestClient(moving.app) as client:
        client.delete("/users/1")
        assert sorted(moving.seen) == ["audit 1", "goodbye 1"]
        moving.seen.clear()
        client.delete("/users/2?fail=1")
        assert moving.seen == ["goodbye 2"]


def test_a_handler_of_theirs_may_tell_both_and_its_failure_takes_no_event_along(
    project: Path,
) -> None:
    pytest.importorskip("fastapi_events")
    moving = load(project, "moving", blocks(EVENTS)["moving.py"])

    @registering(moving.local_handler, "cart.emptied")
    async def delete_and_fail(event: object) -> None:
        moving.dispatch("user.deleted", {"user_id": 3})
        raise ValueError("no mail today")

    app: FastAPI = moving.app

    @app.get("/empty")
    async def empty() -> None:
        dispatch("cart.emptied", {})

    @app.get("/fail")
    async def fail() -> None:
        moving.dispatch("user.deleted", {"user_id": 4})
        raise RuntimeError("a fault")

    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/empty").status_code == 200
        assert "audit 3" in moving.seen
        assert client.get("/fail").status_code == 500
        assert "goodbye 4" in moving.seen
        assert "audit 4" not in moving.seen


def test_a_failing_handler_of_theirs_takes_events_along_without_a_rule() -> None:
    app, local = theirs()
    bus, got = EventBus(), list[object]()
    app.add_middleware(EventContextMiddleware, bus=bus)

    @registering(local, "said")
    async def fail(event: object) -> None:
        raise ValueError("no mail today")

    @bus.on(Said)
    async def note(event: Said) -> None:
        got.append(event)

    @app.get("/")
    async def say() -> None:
        bus.publish(Said())
        dispatch("said", {})

    assert TestClient(app, raise_server_exceptions=False).get("/").status_code == 200
    assert got == []


def test_a_handler_here_that_dispatches_there_is_lost() -> None:
    app, local = theirs()
    bus, got = EventBus(), list[str]()
    app.add_middleware(EventContextMiddleware, bus=bus)

    @registering(local, "*")
    async def note(event: object) -> None:
        got.append("theirs")

    @bus.on(Said)
    async def dispatch_there(event: Said) -> None:
        got.append("ours")
        dispatch("followed", {})

    @app.get("/")
    async def say() -> None:
        bus.publish(Said())

    TestClient(app).get("/")
    assert got == ["ours"]


# ---- blinker. What the page says of Django needs Django, which is too much for these tests.


@pytest.fixture
def signal() -> Any:  # blinker may be missing
    return pytest.importorskip("blinker").Signal()


def test_blinker_forgets_an_inner_function_and_calls_a_receiver_once_that_is_connected_twice(
    signal: Any,
) -> None:
    got: list[str] = []

    def receiver(sender: object) -> None:
        got.append("receiver")

    def connect_what_nobody_holds() -> None:
        def inner(sender: object) -> None:
            got.append("inner")

        signal.connect(inner)

    signal.connect(receiver)
    signal.connect(receiver)
    connect_what_nobody_holds()
    gc.collect()
    signal.send()
    assert got == ["receiver"]


def test_blinker_returns_values_and_stops_at_the_first_failure(signal: Any) -> None:
    def five(sender: object) -> int:
        return 5

    called: list[str] = []

    def fail(sender: object) -> None:
        called.append("fail")
        raise ValueError("no mail today")

    def fail_too(sender: object) -> None:
        called.append("fail_too")
        raise ValueError("no mail today")

    signal.connect(five)
    assert signal.send() == [(five, 5)]
    signal.connect(fail)
    signal.connect(fail_too)
    with pytest.raises(ValueError, match="no mail today"):
        signal.send()
    assert len(called) == 1


def test_blinker_refuses_receivers_of_both_kinds(signal: Any) -> None:
    async def waits(sender: object) -> None: ...
    def blocks(sender: object) -> None: ...

    signal.connect(waits)
    with pytest.raises(RuntimeError, match="coroutine function"):
        signal.send()
    signal.connect(blocks)
    with pytest.raises(RuntimeError, match="non-coroutine function"):
        anyio.run(signal.send_async)


def test_a_receiver_of_a_signal_publishes_into_the_request_or_the_job(signal: Any) -> None:
    app, bus = ours()
    got: list[str] = []

    @bus.on(Said)
    async def note(event: Said) -> None:
        got.append(event.name)

    def republish(sender: object, name: str) -> None:
        bus.publish(Said(name))

    signal.connect(republish)

    @app.get("/")
    async def send(fail: bool = False) -> None:
        signal.send(name="in a request")
        if fail:
            raise HTTPException(409)

    TestClient(app).get("/?fail=1")
    assert got == []
    TestClient(app).get("/")
    with bus.context():
        signal.send(name="in a job")
    assert got == ["in a request", "in a job"]
