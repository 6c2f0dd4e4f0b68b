"""FastAPI's dependencies in handlers: in requests, websockets, jobs and scripts."""

import inspect
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fastapi import (
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    Header,
    Path,
    Query,
    Request,
    Response,
    Security,
    WebSocket,
)
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.dependencies import utils
from fastapi.requests import HTTPConnection
from fastapi.security import HTTPBearer, SecurityScopes
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit import (
    BusLookupError,
    Delivery,
    DispatchError,
    EventBus,
    EventContext,
    EventKitError,
    EventRouter,
    HandlerTimeoutError,
    InvalidHandlerError,
    NoEventContextError,
    NoRequestError,
    current_delivery,
)
from eventkit._core import depends as adapter
from eventkit.fastapi import Bus, CurrentContext, get_bus
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Backend, Exchange, client_of, lifespan_of
from tests.dispatching import Boom, Ping, kinds_in
from tests.witness import assert_settled, ignore

pytestmark = pytest.mark.anyio


@pytest.fixture
def bus() -> EventBus:
    bus = EventBus()
    bus.report_failure = ignore
    return bus


@dataclass
class Session:
    """What a handler works with, and how that ended."""

    name: str
    steps: list[str] = field(default_factory=list[str])


opened: list[Session] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    opened.clear()


async def open_session() -> AsyncGenerator[Session]:
    session = Session("async")
    opened.append(session)
    try:
        yield session
    except BaseException as error:
        session.steps.append(f"rolled back after {type(error).__name__}")
        raise
    session.steps.append("committed")


def open_sync_session() -> Generator[Session]:
    session = Session("sync")
    opened.append(session)
    try:
        yield session
    except BaseException as error:
        session.steps.append(f"rolled back after {type(error).__name__}")
        raise
    session.steps.append("committed")


async def name_it(session: Annotated[Session, Depends(open_session)]) -> str:
    return f"named {session.name}"


def name_it_in_a_thread(session: Annotated[Session, Depends(open_session)]) -> str:
    return f"named {session.name}"


class Service:
    """A class is a dependency like any other."""

    def __init__(self, session: Annotated[Session, Depends(open_session)]) -> None:
        self.session = session


class Factory:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    def __call__(self) -> str:
        return self.answer


made_by_an_instance = Factory("made by an instance")
DbSession = Annotated[Session, Depends(open_session)]


# What `Depends` can do


async def taking_all(
    event: Ping,
    session: DbSession,
    service: Annotated[Service, Depends()],
    name: str = Depends(name_it),
    *,
    other: Annotated[str, Depends(name_it_in_a_thread)],
    made: Annotated[str, Depends(made_by_an_instance)],
    bound: Annotated[str, Depends(partial(Factory, "bound"))],
    times: int = 3,
) -> None:
    session.steps.append(f"handled {event.number}")
    assert service.session is session
    assert (name, other, made) == ("named async", "named async", "made by an instance")
    assert isinstance(bound, Factory)
    assert times == 3


def taking_all_in_a_thread(
    event: Ping,
    session: DbSession,
    service: Annotated[Service, Depends()],
    name: str = Depends(name_it),
    *,
    other: Annotated[str, Depends(name_it_in_a_thread)],
) -> None:
    session.steps.append(f"handled {event.number}")
    assert service.session is session
    assert (name, other) == ("named async", "named async")


@pytest.mark.parametrize("handler", [taking_all, taking_all_in_a_thread])
async def test_a_handler_takes_dependencies_in_every_way_that_an_endpoint_does(
    bus: EventBus, handler: Callable[..., object]
) -> None:
    bus.subscribe(Ping, handler)

    await bus.dispatch(Ping(1))
    await bus.dispatch(Ping(2))

    assert [session.steps for session in opened] == [
        ["handled 1", "committed"],
        ["handled 2", "committed"],
    ]


@pytest.mark.parametrize("provider", [open_session, open_sync_session])
@pytest.mark.parametrize("thread", [False, True])
async def test_clean_up_sees_what_the_handler_raised(
    bus: EventBus, provider: Callable[..., object], thread: bool
) -> None:
    def handler(event: Ping, session: Annotated[Session, Depends(provider)]) -> None:
        session.steps.append("failed")
        raise Boom

    bus.subscribe(Ping, handler, thread=thread)

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [Boom]
    assert [session.steps for session in opened] == [["failed", "rolled back after Boom"]]


async def test_clean_up_is_over_before_the_delivery_counts_as_handled(bus: EventBus) -> None:
    handled: list[int] = []

    async def counting() -> AsyncGenerator[None]:
        yield
        await checkpoint()
        handled.append(bus.stats.handled)

    @bus.on(Ping)
    async def handler(event: Ping, _: Annotated[None, Depends(counting)]) -> None: ...

    await bus.dispatch(Ping())

    assert (handled, bus.stats.handled) == ([0], 1)


async def test_a_commit_that_fails_fails_the_delivery(bus: EventBus) -> None:
    async def committing() -> AsyncGenerator[None]:
        yield
        raise Boom("at commit")

    @bus.on(Ping)
    async def handler(event: Ping, _: Annotated[None, Depends(committing)]) -> None: ...

    async with bus.context() as unit:
        unit.publish(Ping())

    assert (bus.stats.failed, bus.stats.handled) == (1, 0)


async def test_a_failure_that_a_dependency_swallows_is_a_failure_all_the_same(
    bus: EventBus,
) -> None:
    async def swallowing() -> AsyncGenerator[None]:
        try:
            yield
        except Boom:
            pass

    @bus.on(Ping)
    async def handler(event: Ping, _: Annotated[None, Depends(swallowing)]) -> None:
        raise Boom

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [Boom]


async def test_concurrent_handlers_never_share_a_session(bus: EventBus) -> None:
    met = anyio.Event()
    seen: list[Session] = []

    async def handler(event: Ping, session: DbSession) -> None:
        seen.append(session)
        if len(seen) == 2:
            met.set()
        await met.wait()

    bus.subscribe(Ping, handler)
    bus.subscribe(Ping, partial(handler))

    await bus.dispatch(Ping())

    assert len(seen) == 2
    assert seen[0] is not seen[1]


async def test_use_cache_false_makes_one_for_each_use(bus: EventBus) -> None:
    @bus.on(Ping)
    async def handler(
        event: Ping,
        one: DbSession,
        other: Annotated[Session, Depends(open_session, use_cache=False)],
    ) -> None:
        assert one is not other

    await bus.dispatch(Ping())

    assert [session.steps for session in opened] == [["committed"], ["committed"]]


async def test_dependencies_are_cleaned_up_in_reverse_order(bus: EventBus) -> None:
    steps: list[str] = []

    async def first() -> AsyncGenerator[str]:
        yield "first"
        steps.append("first")

    async def second(_: Annotated[str, Depends(first)]) -> AsyncGenerator[str]:
        yield "second"
        steps.append("second")

    @bus.on(Ping)
    async def handler(event: Ping, _: Annotated[str, Depends(second)]) -> None: ...

    await bus.dispatch(Ping())

    assert steps == ["second", "first"]


async def test_what_was_made_is_cleaned_up_where_the_next_cannot_be_made(bus: EventBus) -> None:
    async def failing(session: DbSession) -> None:
        raise Boom

    @bus.on(Ping)
    async def handler(event: Ping, _: Annotated[None, Depends(failing)]) -> None: ...

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [Boom]
    assert [session.steps for session in opened] == [["rolled back after Boom"]]


async def test_a_dependency_may_publish_and_knows_its_delivery(bus: EventBus) -> None:
    seen: list[object] = []

    async def telling() -> AsyncGenerator[None]:
        bus.publish(f"before {current_delivery().event}")
        yield
        bus.publish("after")

    @bus.on(Ping)
    async def handler(event: Ping, _: Annotated[None, Depends(telling)]) -> None:
        bus.publish("during")

    @bus.on(str)
    async def hear(event: str) -> None:
        seen.append(event)

    await bus.dispatch(Ping())

    assert seen == ["before Ping(number=0)", "during", "after"]


# Older releases of FastAPI leave a plain `def` that was cancelled at its `yield` to the garbage
# collector, in endpoints too.
forgotten_by_fastapi = pytest.mark.skipif(
    "BaseException" not in inspect.getsource(contextmanager_in_threadpool),
    reason="this FastAPI does not clean up a plain def when it is cancelled",
)


@pytest.mark.parametrize(
    "provider", [open_session, pytest.param(open_sync_session, marks=forgotten_by_fastapi)]
)
async def test_a_handler_past_its_deadline_has_its_session_rolled_back(
    bus: EventBus, provider: Callable[..., object]
) -> None:
    @bus.on(Ping, timeout=0.01)
    async def handler(event: Ping, session: Annotated[Session, Depends(provider)]) -> None:
        await anyio.sleep_forever()

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    assert kinds_in(caught.value) == [HandlerTimeoutError]
    (session,) = opened
    assert session.steps == [f"rolled back after {anyio.get_cancelled_exc_class().__name__}"]


async def test_a_cancelled_dispatch_has_every_session_rolled_back(bus: EventBus) -> None:
    @bus.on(Ping)
    async def handler(event: Ping, session: DbSession) -> None:
        await anyio.sleep_forever()

    bus.subscribe(Ping, partial(handler))

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.dispatch, Ping())
            await anyio.wait_all_tasks_blocked()
            scope.cancel()

    cancelled = anyio.get_cancelled_exc_class().__name__
    assert [session.steps for session in opened] == [[f"rolled back after {cancelled}"]] * 2
    assert bus.stats.undelivered == 2
    assert_settled(bus)


async def test_a_thousand_deliveries_at_once_have_a_session_each(bus: EventBus) -> None:
    @bus.on(Ping)
    async def handler(event: Ping, session: DbSession) -> None:
        await checkpoint()
        session.steps.append("handled")

    async with anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(bus.dispatch, Ping(number))

    assert [session.steps for session in opened] == [["handled", "committed"]] * 1000
    assert_settled(bus)


# Annotations


POSTPONED = "from __future__ import annotations"
SINCE_3_14 = pytest.mark.skipif(sys.version_info < (3, 14), reason="lazy since Python 3.14")
LAZINESS = pytest.mark.parametrize(
    "future",
    [pytest.param(POSTPONED, id="postponed"), pytest.param("", id="lazy", marks=SINCE_3_14)],
)

HEAD = """
from typing import TYPE_CHECKING, Annotated
from fastapi import Depends
if TYPE_CHECKING:
    from somewhere import Event, Session, sessions
"""

PROVIDER = """
async def provide() -> Session:
    return "provided"
"""

HANDLER = """
async def handler(
    event: Event,
    one: Annotated[Session, Depends(provide)],
    other: Annotated[dict[str, Session], Depends(provide)],
    optional: sessions.Session | None = None,
) -> sessions.Nothing:
    seen.extend([one, other, optional])
"""


def written(*parts: str, **names: object) -> dict[str, Any]:  # as exec fills it
    """Run a module of these parts, and give its names."""
    namespace: dict[str, Any] = {"__name__": "postponed", **names}
    exec(compile("".join(parts), "postponed.py", "exec", dont_inherit=True), namespace)
    return namespace


@LAZINESS
async def test_annotations_may_name_what_only_type_checkers_know(
    bus: EventBus, future: str
) -> None:
    seen: list[object] = []
    bus.subscribe(Ping, written(future, HEAD, HANDLER, PROVIDER, seen=seen)["handler"])

    await bus.dispatch(Ping())

    assert seen == ["provided", "provided", None]


@LAZINESS
def test_a_provider_that_only_type_checkers_know_is_refused(bus: EventBus, future: str) -> None:
    message = refusal(bus, written(future, HEAD, HANDLER)["handler"])

    assert message.startswith("postponed:handler (postponed.py:7): FastAPI cannot resolve 'one': ")
    assert "ForwardRef('provide'" in message


@LAZINESS
async def test_names_are_looked_up_where_the_handler_gets_its_bus(
    bus: EventBus, future: str
) -> None:
    """On a bus that is when it is subscribed, on a router when the router is included."""
    seen: list[object] = []
    source = HANDLER.replace("async def", "@on(Ping)\nasync def")

    with pytest.raises(InvalidHandlerError):
        written(future, HEAD, source, PROVIDER, seen=seen, on=bus.on, Ping=Ping)
    router = EventRouter()
    written(future, HEAD, source, PROVIDER, seen=seen, on=router.on, Ping=Ping)
    bus.include(router)
    await bus.dispatch(Ping())

    assert seen == ["provided", "provided", None]


FAILING = pytest.mark.parametrize("annotation", ["'Event' | None", "1 / 0"])


@FAILING
async def test_a_postponed_annotation_of_the_event_is_not_evaluated(
    bus: EventBus, annotation: str
) -> None:
    seen: list[object] = []
    source = HANDLER.replace("event: Event", f"event: {annotation}")
    bus.subscribe(Ping, written(POSTPONED, HEAD, source, PROVIDER, seen=seen)["handler"])

    await bus.dispatch(Ping())

    assert seen == ["provided", "provided", None]


@FAILING
def test_a_dependency_whose_postponed_annotation_fails_is_refused(
    bus: EventBus, annotation: str
) -> None:
    annotation = f"Annotated[{annotation}, Depends(provide)]"
    source = HANDLER.replace("one: Annotated[Session, Depends(provide)]", f"one: {annotation}")

    message = refusal(bus, written(POSTPONED, HEAD, source, PROVIDER)["handler"])

    assert message == (
        "postponed:handler (postponed.py:7) takes 'one', which is neither the event (the first "
        f"parameter) nor known to be a dependency: its annotation {annotation!r} cannot be "
        "evaluated. Define or import this name before the handler is subscribed or its router "
        "included, and not only for type checkers"
    )


@SINCE_3_14
@FAILING
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("event: Event", "event: {}"),
        ("one: Annotated[Session,", "one: Annotated[{},"),
        ("-> sessions.Nothing", "-> {}"),
    ],
)
@pytest.mark.parametrize("bound", [False, True])
def test_a_lazy_annotation_that_fails_is_refused(
    bus: EventBus, annotation: str, before: str, after: str, bound: bool
) -> None:
    source = HANDLER.replace(before, after.format(annotation))

    handler = written(HEAD, source, PROVIDER)["handler"]

    message = refusal(bus, partial(handler) if bound else handler)

    assert re.fullmatch(
        r"postponed:handler \(postponed\.py:7\): an annotation cannot be evaluated: "
        r"\w+Error\(.*\)\. Correct the annotation",
        message,
    )


@LAZINESS
def test_an_alias_that_is_defined_too_late_is_refused(bus: EventBus, future: str) -> None:
    source = HANDLER.replace("Annotated[Session, Depends(provide)]", "Provided")

    message = refusal(bus, written(future, HEAD, PROVIDER, source)["handler"])

    assert "its annotation 'Provided' cannot be evaluated. Define or import" in message


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs Python 3.12")
@LAZINESS
def test_an_alias_of_what_only_type_checkers_know_is_refused(bus: EventBus, future: str) -> None:
    alias = "type Provided = Annotated[Session, Depends(provide)]\n"
    source = HANDLER.replace("Annotated[Session, Depends(provide)]", "Provided")

    message = refusal(bus, written(future, HEAD, PROVIDER, alias, source)["handler"])

    assert message == "postponed:handler (postponed.py:11): name 'Session' is not defined"


# Requests, websockets, lifespans, jobs and scripts: which application


def provide() -> str:
    return "provided"


def depend(provided: Annotated[str, Depends(provide)]) -> str:
    return f"nested {provided}"


def override() -> str:
    return "overridden"


@pytest.fixture
def seen(bus: EventBus) -> list[object]:
    """What a handler has of the application: dependencies, the app itself, and its state."""
    seen: list[object] = []

    @bus.on(Ping)
    async def handler(
        event: Ping,
        request: Request,
        provided: Annotated[str, Depends(provide)],
        nested: Annotated[str, Depends(depend)],
    ) -> None:
        seen.extend([provided, nested])
        if event.number:
            seen.extend([request.app, request.state.name])

    return seen


@pytest.fixture
def app(bus: EventBus) -> FastAPI:
    """An app that publishes in every way, with a dependency overridden."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
        yield {"name": "the state"}

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)
    app.dependency_overrides[provide] = override

    @app.post("/publish")
    async def publish(request: Request) -> None:
        request.state.name = "something of this request"
        bus.publish(Ping(1))

    @app.post("/drain")
    async def drain() -> None:
        async with bus.context() as unit:
            unit.publish(Ping(1))
            report = await unit.drain()
        report.raise_for_failures()

    @app.post("/dispatch")
    async def dispatch() -> None:
        await bus.dispatch(Ping(1))

    @app.post("/sync")
    def sync() -> None:
        with bus.context():
            bus.publish(Ping(1))

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        async with bus.context():
            bus.publish(Ping(1))
        await websocket.send_text("done")
        await websocket.close()

    return app


@pytest.mark.parametrize("path", ["/publish", "/drain", "/dispatch", "/sync"])
def test_a_request_brings_its_application_and_the_state_of_the_lifespan(
    bus: EventBus, app: FastAPI, seen: list[object], path: str, anyio_backend: Backend
) -> None:
    with client_of(app, anyio_backend) as client:
        assert client.post(path).status_code == 200

    assert seen == ["overridden", "nested overridden", app, "the state"]
    assert bus.stats.failed == 0


def test_a_websocket_brings_its_application(
    app: FastAPI, seen: list[object], anyio_backend: Backend
) -> None:
    with client_of(app, anyio_backend) as client, client.websocket_connect("/socket") as socket:
        assert socket.receive_text() == "done"

    assert seen == ["overridden", "nested overridden", app, "the state"]


async def test_a_background_drain_keeps_the_application(
    bus: EventBus, app: FastAPI, seen: list[object]
) -> None:
    async with lifespan_of(app):
        await Exchange("/publish", method="POST", spec_version="2.3").run(app)

    assert seen == ["overridden", "nested overridden", app, "the state"]
    assert_settled(bus)


async def test_a_job_that_the_lifespan_started_brings_its_application(
    bus: EventBus, seen: list[object]
) -> None:
    async def job() -> None:
        async with bus.context():
            bus.publish(Ping(1))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
        async with anyio.create_task_group() as jobs:
            jobs.start_soon(job)
            yield {"name": "the state"}

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)
    app.dependency_overrides[provide] = override

    async with lifespan_of(app):
        await anyio.wait_all_tasks_blocked()

    assert seen == ["overridden", "nested overridden", app, "the state"]


async def test_a_script_has_no_application_and_so_no_overrides(
    bus: EventBus, seen: list[object]
) -> None:
    await bus.dispatch(Ping(0))

    assert seen == ["provided", "nested provided"]


def test_a_synchronous_job_has_dependencies_too(bus: EventBus, seen: list[object]) -> None:
    with bus.context():
        bus.publish(Ping(0))

    assert seen == ["provided", "nested provided"]


def wrapped_by_hand(app: FastAPI, bus: EventBus) -> ASGIApp:
    """A middleware of another kind, and then ours, around an app."""

    class Other:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

    return EventContextMiddleware(Other(app), bus)


@pytest.mark.parametrize("lifespan", [True, False])
async def test_an_application_that_was_wrapped_by_hand_is_found(
    bus: EventBus, seen: list[object], lifespan: bool
) -> None:
    inner = FastAPI()
    inner.dependency_overrides[provide] = override

    @inner.post("/")
    async def publish() -> None:
        bus.publish(Ping())

    app = wrapped_by_hand(inner, bus)
    if lifespan:
        async with lifespan_of(app):
            await Exchange(method="POST").run(app)
    else:
        await Exchange(method="POST").run(app)

    assert seen == ["overridden", "nested overridden"]


async def test_an_app_that_leads_back_to_itself_is_nobodys_application(
    bus: EventBus, seen: list[object]
) -> None:
    class Endless:
        @property
        def app(self) -> "Endless":
            return self

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            bus.publish(Ping())
            await Response()(scope, receive, send)

    await Exchange(method="POST").run(EventContextMiddleware(Endless(), bus))

    assert seen == ["provided", "nested provided"]


async def test_without_a_lifespan_the_state_is_what_the_request_came_with(
    bus: EventBus, app: FastAPI, seen: list[object]
) -> None:
    exchange = Exchange("/publish", method="POST")
    exchange.scope["state"] = {"name": "of the server"}

    await exchange.run(app)

    assert seen == ["overridden", "nested overridden", app, "of the server"]


async def test_an_application_of_starlette_has_no_overrides(bus: EventBus) -> None:
    seen: list[object] = []

    @bus.on(Ping)
    async def handler(
        event: Ping, connection: HTTPConnection, provided: Annotated[str, Depends(provide)]
    ) -> None:
        seen.extend([connection.app, provided])

    app = Starlette()
    app.add_middleware(EventContextMiddleware, bus=bus)

    async def publish(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish(Ping())
        await Response()(scope, receive, send)

    app.mount("/", publish)
    await Exchange(method="POST").run(app)

    assert seen == [app, "provided"]


async def test_what_a_handler_does_to_its_state_nobody_else_sees(bus: EventBus) -> None:
    seen: list[object] = []

    async def handler(event: Ping, request: Request) -> None:
        seen.append(getattr(request.state, "mark", None))
        request.state.mark = "set"

    bus.subscribe(Ping, handler)
    bus.subscribe(Ping, partial(handler))
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.post("/")
    async def publish() -> None:
        bus.publish(Ping())

    async with lifespan_of(app):
        await Exchange(method="POST").run(app)

    assert seen == [None, None]


async def test_a_handlers_failure_after_an_override_that_needs_a_request_says_so(
    bus: EventBus, app: FastAPI, seen: list[object]
) -> None:
    def of_the_query(name: str) -> str:
        return name

    def of_the_body(names: Annotated[list[str], Body()]) -> str:
        return names[0]

    def of_the_response(response: Response) -> str:
        return response.headers["x-name"]

    errors: list[str] = []

    def report(delivery: Delivery, error: Exception) -> None:
        errors.append(str(error))

    bus.report_failure = report

    for overriding in (of_the_query, of_the_body, of_the_response):
        app.dependency_overrides[provide] = overriding
        await Exchange("/publish", method="POST").run(app)

    assert [error.partition(":")[0] for error in errors] == [
        "a handler's Request has no query parameters",
        "a handler's Request has no valid parameters for an overriding dependency",
        "a handler's Request has no response",
    ]


# A handler's `Request`


def headers_of(request: Request) -> object:
    return request.headers["x-tenant"]


READS: dict[str, Callable[[Request], object]] = {
    "headers": headers_of,
    "query parameters": lambda request: request.query_params.get("page"),
    "path parameters": lambda request: list(request.path_params),
    "cookies": lambda request: len(request.cookies),
    "method": lambda request: request.method,
    "path": lambda request: request.url,
    "app": lambda request: request.app,
    "session": lambda request: request.session,
    "auth": lambda request: request.auth,
    "user": lambda request: request.user,
    "state.user": lambda request: request.state.user,
}

PUT_INTO_EVENT = (
    "a handler runs after its request, or without a request. Put what the handler needs into the "
    "event"
)
REASONS = {
    "app": "the handler's unit of work was not opened in a request or in the lifespan of an "
    "application that has EventContextMiddleware for this bus",
    "state.user": f"{PUT_INTO_EVENT}, or have the lifespan yield it",
}


@pytest.mark.parametrize("part", [*READS, "multi-headers", "body"])
async def test_a_handlers_request_says_what_it_has_not(bus: EventBus, part: str) -> None:
    @bus.on(Ping)
    async def handler(event: Ping, request: Request) -> None:
        if part == "body":
            await request.body()
        elif part == "multi-headers":
            request.headers.getlist("x-tenant")
        else:
            READS[part](request)

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    (error,) = caught.value.exceptions
    assert isinstance(error, NoRequestError)
    missing = "headers" if part == "multi-headers" else part
    assert error.missing == missing
    reason = REASONS.get(missing, PUT_INTO_EVENT)
    assert str(error) == f"a handler's Request has no {missing}: {reason}"


async def test_a_dependency_that_reads_the_state_of_a_request_says_what_a_handler_has_not(
    bus: EventBus,
) -> None:
    def get_user(request: Request) -> str:
        user: str = request.state.user
        return user

    @bus.on(Ping)
    async def handler(event: Ping, user: Annotated[str, Depends(get_user)]) -> None: ...

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())

    (error,) = caught.value.exceptions
    assert isinstance(error, NoRequestError)
    assert error.missing == "state.user"


async def test_asking_whether_the_state_has_something_is_answered_as_in_an_endpoint(
    bus: EventBus,
) -> None:
    answers: list[object] = []

    @bus.on(Ping)
    async def handler(event: Ping, connection: HTTPConnection) -> None:
        state: Any = connection.state
        answers.extend([hasattr(state, "user"), getattr(state, "user", None), connection.state])
        with pytest.raises(KeyError) as missing:
            state["user"]
        answers.append(str(missing.value).partition(":")[0])
        state.user = "ada"
        answers.extend([state.user, state["user"], connection.state.user])
        del state.user

    await bus.dispatch(Ping())

    assert answers[:2] == [False, None]
    assert isinstance(answers[2], State)
    assert answers[3:] == ["a handler's Request has no state.user", *["ada"] * 3]


async def test_a_default_that_a_request_replaces_is_replaced(bus: EventBus) -> None:
    seen: list[object] = []

    @bus.on(Ping)
    async def handler(event: Ping, request: Request = None) -> None:  # type: ignore[assignment]
        seen.append(request.state)

    await bus.dispatch(Ping())

    assert seen


# The classes where the aliases were meant.

NO_FIELD = (
    "FastAPI cannot read a field of the type {} from a request. In an endpoint, a dependency or a "
    "handler declare `{}: {}`: from eventkit.fastapi import {}. In a model of Pydantic set "
    "arbitrary_types_allowed=True"
)
NO_BUS = NO_FIELD.format("EventBus", "events", "Bus", "Bus")
NO_UNIT = NO_FIELD.format("EventContext", "unit", "CurrentContext", "CurrentContext")


async def takes_the_bus(events: EventBus) -> None: ...
async def takes_the_unit(unit: EventContext) -> None: ...
async def depends_on_the_bus(it: Annotated[None, Depends(takes_the_bus)]) -> None: ...
async def takes_any_bus(events: EventBus | None) -> None: ...


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        (takes_the_bus, NO_BUS),
        (takes_any_bus, NO_BUS),
        (depends_on_the_bus, NO_BUS),
        (takes_the_unit, NO_UNIT),
    ],
)
def test_an_endpoint_that_takes_the_class_is_refused_in_words_that_name_the_alias(
    endpoint: Callable[..., object], told: str
) -> None:
    with pytest.raises(TypeError) as caught:
        FastAPI().post("/")(endpoint)

    assert str(caught.value) == told


def test_a_model_may_have_a_bus_where_arbitrary_types_are_allowed(bus: EventBus) -> None:
    class Settings(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)

        bus: EventBus
        unit: EventContext | None = None

    assert Settings(bus=bus, unit=bus.context()).bus is bus
    with pytest.raises(ValidationError, match="instance of EventBus"):
        Settings.model_validate({"bus": "orders"})


async def handler_of_the_bus(event: Ping, events: EventBus) -> None: ...
async def handler_of_the_unit(event: Ping, unit: EventContext) -> None: ...


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (handler_of_the_bus, f"FastAPI cannot resolve 'events': {NO_BUS}"),
        (handler_of_the_unit, f"FastAPI cannot resolve 'unit': {NO_UNIT}"),
    ],
)
def test_a_handler_that_takes_the_class_is_refused_in_words_that_name_the_alias(
    bus: EventBus, handler: Callable[..., object], told: str
) -> None:
    assert refusal(bus, handler) == f"{place(handler)}: {told}"


async def test_a_handler_may_have_a_bus_as_its_default(bus: EventBus) -> None:
    seen: list[object] = []

    @bus.on(Ping)
    async def handler(event: Ping, other: EventBus = bus) -> None:
        seen.append(other)

    await bus.dispatch(Ping())

    assert seen == [bus]


# What a dependency leaves to a middleware, which a handler has not.

LEFT = (
    "a dependency left something in the request.state of a handler, which no middleware commits or "
    "closes: use a dependency that cleans up by itself (yield)"
)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


class Resource:
    """Stands for what has to be closed."""


def provide_session(request: Request) -> Resource:
    """As advanced-alchemy does it: its middleware commits, and closes."""
    if not hasattr(request.state, "session"):
        request.state.session = Resource()
    session: Resource = request.state.session
    return session


async def yield_session(request: Request) -> AsyncGenerator[Resource]:
    request.state.session = Resource()
    yield request.state.session
    del request.state.session


async def replace_name(request: Request) -> None:
    request.state.name = "another name"
    request.state.mark = "a mark"


def left_by(handler: Callable[..., object], names: str) -> str:
    return f"{LEFT}: handler={__name__}:{handler.__qualname__} left={names}"


async def test_what_a_dependency_leaves_in_the_state_is_told_once_for_each_handler(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    @bus.on(Ping)
    async def save(event: Ping, session: Annotated[Resource, Depends(provide_session)]) -> None: ...

    @bus.on(Ping)
    def fail(event: Ping, session: Annotated[Resource, Depends(provide_session)]) -> None:
        raise Boom

    for number in range(2):
        async with bus.context():
            bus.publish(Ping(number))

    assert sorted(warnings_in(caplog)) == [left_by(fail, "session"), left_by(save, "session")]


async def test_what_replaces_the_lifespans_state_for_a_handler_is_told(
    bus: EventBus, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    @bus.on(Ping)
    async def rename(event: Ping, _: Annotated[None, Depends(replace_name)]) -> None: ...

    async with lifespan_of(app) as lifespan:
        exchange = Exchange("/publish", method="POST")
        exchange.scope["state"] = lifespan.scope["state"]
        await exchange.run(app)

    assert warnings_in(caplog) == [left_by(rename, "name, mark")]


async def test_what_a_dependency_takes_away_again_or_a_handler_sets_is_not_told(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    @bus.on(Ping)
    async def save(event: Ping, session: Annotated[Resource, Depends(yield_session)]) -> None: ...

    @bus.on(Ping)
    async def mark(event: Ping, request: Request) -> None:
        request.state.mark = "set"

    await bus.dispatch(Ping())

    assert warnings_in(caplog) == []


# Refusals


def refusal(bus: EventBus, handler: Callable[..., object]) -> str:
    with pytest.raises(InvalidHandlerError) as caught:
        bus.subscribe(Ping, handler)
    assert bus.describe() == []
    return str(caught.value)


def place(function: Callable[..., object]) -> str:
    return f"{__name__}:{function.__qualname__} ({__file__}:{function.__code__.co_firstlineno})"


bearer = HTTPBearer()


async def path_parameter(event: Ping, it: Annotated[int, Path()]) -> None: ...
async def query_parameter(event: Ping, it: Annotated[int, Query()]) -> None: ...
async def query_default(event: Ping, it: int = Query(1)) -> None: ...
async def header(event: Ping, it: Annotated[str, Header()]) -> None: ...
async def cookie(event: Ping, it: str = Cookie("")) -> None: ...
async def body(event: Ping, it: Annotated[dict[str, str], Body()]) -> None: ...
async def response(event: Ping, it: Response) -> None: ...
async def websocket(event: Ping, it: WebSocket) -> None: ...
async def background(event: Ping, it: BackgroundTasks) -> None: ...
async def scopes(event: Ping, it: SecurityScopes) -> None: ...


@pytest.mark.parametrize(
    ("handler", "what"),
    [
        (path_parameter, "the path parameter 'it'"),
        (query_parameter, "the query parameter 'it'"),
        (query_default, "the query parameter 'it'"),
        (header, "the header 'it'"),
        (cookie, "the cookie 'it'"),
        (body, "the body 'it'"),
        (response, "the Response 'it'"),
        (websocket, "the WebSocket 'it'"),
        (background, "the BackgroundTasks 'it'"),
        (scopes, "the SecurityScopes 'it'"),
    ],
)
def test_what_only_a_request_has_is_refused(
    bus: EventBus, handler: Callable[..., object], what: str
) -> None:
    assert refusal(bus, handler) == (
        f"{place(handler)}: 'it' needs {what}, which only a request has. A handler runs after its "
        "request, or without a request: put what the handler needs into the event, or use another "
        "dependency"
    )


def page(number: int = 1) -> int:
    return number


def paging(number: Annotated[int, Depends(page)]) -> int:
    return number


async def test_a_dependency_with_a_query_parameter_is_refused_where_it_is_used(
    bus: EventBus,
) -> None:
    async def handler(event: Ping, it: Annotated[int, Depends(paging)]) -> None: ...

    assert refusal(bus, handler) == (
        f"{place(handler)}: 'it' needs the query parameter 'number' of {place(page)}, which only a "
        "request has. A handler runs after its request, or without a request: put what the handler "
        "needs into the event, or use another dependency"
    )


def test_a_security_scheme_is_refused(bus: EventBus) -> None:
    async def handler(event: Ping, it: Annotated[object, Security(bearer)]) -> None: ...

    assert "'it' needs the credentials of fastapi.security.http:HTTPBearer" in refusal(bus, handler)


def test_a_provider_that_cannot_be_called_is_refused(bus: EventBus) -> None:
    async def handler(event: Ping, it: str = Depends("provider")) -> None: ...  # type: ignore[arg-type]

    told = f"{place(handler)}: FastAPI cannot resolve 'it': 'provider' is not a callable object"
    assert refusal(bus, handler) == told


def test_a_parameter_without_a_source_is_refused(bus: EventBus) -> None:
    async def handler(event: Ping, page: Annotated[int, Field(gt=0)]) -> None: ...

    assert refusal(bus, handler).startswith(
        f"{place(handler)} takes 'page', "
        "which is neither the event (the first parameter) nor a dependency"
    )


def test_a_router_is_refused_when_it_is_included(bus: EventBus) -> None:
    router = EventRouter()
    router.on(Ping)(query_parameter)

    with pytest.raises(InvalidHandlerError, match="query parameter"):
        bus.include(router)

    assert bus.describe() == []


def test_a_default_of_pydantics_is_a_plain_default(bus: EventBus) -> None:
    @bus.on(Ping)
    async def handler(event: Ping, attempts: Annotated[int, Field(gt=0)] = 3) -> None: ...

    assert len(bus.describe()) == 1


# Aliases for the bus and the current context


def test_an_endpoint_takes_the_bus_and_its_context(bus: EventBus, anyio_backend: Backend) -> None:
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)
    pings: list[object] = []
    bus.subscribe(Ping, pings.append, thread=False)

    @app.post("/async")
    async def publish(it: Bus, context: CurrentContext) -> None:
        assert it is bus
        assert context is bus.current_context()
        context.publish(Ping())

    @app.post("/sync")
    def publish_in_a_thread(it: Bus) -> None:
        it.publish(Ping())

    with client_of(app, anyio_backend) as client:
        assert client.post("/async").status_code == client.post("/sync").status_code == 200

    assert pings == [Ping(), Ping()]


def test_a_websocket_takes_the_bus_and_has_no_context_yet(
    bus: EventBus, anyio_backend: Backend
) -> None:
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)
    pings: list[object] = []
    bus.subscribe(Ping, pings.append, thread=False)

    @app.websocket("/bus")
    async def take_bus(websocket: WebSocket, it: Bus) -> None:
        await websocket.accept()
        async with it.context():
            it.publish(Ping())
        await websocket.close()

    @app.websocket("/context")
    async def take_context(websocket: WebSocket, context: CurrentContext) -> None: ...

    client = client_of(app, anyio_backend)
    with client.websocket_connect("/bus"):
        pass
    with (
        pytest.raises(NoEventContextError, match="a websocket has no event context of its own"),
        client.websocket_connect("/context"),
    ):
        pass

    assert pings == [Ping()]


async def test_a_handler_takes_its_own_bus_and_the_unit_that_its_delivery_is() -> None:
    buses = [EventBus(name="one"), EventBus(name="other")]
    seen: list[object] = []

    for bus in buses:

        @bus.on(Ping)
        async def handler(event: Ping, it: Bus, context: CurrentContext) -> None:
            seen.append(it)
            context.publish(event.number)
            assert context is it.current_context()

        bus.subscribe(int, seen.append, thread=False)
        await bus.dispatch(Ping(3))

    assert seen == [buses[0], 3, buses[1], 3]


def app_with(*buses: EventBus) -> FastAPI:
    app = FastAPI()
    for bus in buses:
        app.add_middleware(EventContextMiddleware, bus=bus)

    @app.post("/")
    async def publish(it: Bus) -> None: ...

    return app


def test_two_buses_in_one_application_need_aliases_of_their_own(anyio_backend: Backend) -> None:
    client = client_of(app_with(EventBus(name="orders"), EventBus(name="users")), anyio_backend)

    with pytest.raises(BusLookupError) as caught:
        client.post("/")

    assert str(caught.value) == (
        "this application has 2 buses, 'users', 'orders', but Bus and CurrentContext need exactly "
        "one. Write your own aliases:\n"
        "    async def get_orders_bus() -> EventBus:\n"
        "        return orders_bus\n"
        "    OrdersBus = Annotated[EventBus, Depends(get_orders_bus)]\n"
        "For the context, write an alias in the same way that returns orders_bus.current_context()"
    )


def test_without_the_middleware_there_is_no_bus(anyio_backend: Backend) -> None:
    with pytest.raises(BusLookupError) as caught:
        client_of(app_with(), anyio_backend).post("/")

    assert str(caught.value) == (
        "this request has not passed an EventContextMiddleware. Add one: "
        "app.add_middleware(EventContextMiddleware, bus=bus)"
    )


def test_an_alias_can_be_overridden(anyio_backend: Backend) -> None:
    app, fake = app_with(), EventBus()

    async def get_fake() -> EventBus:
        return fake

    app.dependency_overrides[get_bus] = get_fake

    assert client_of(app, anyio_backend).post("/").status_code == 200


# FastAPI, as far as it is private


@pytest.fixture
def _probing() -> Generator[None]:
    adapter._private_functions.cache_clear()
    yield
    adapter._private_functions.cache_clear()


@pytest.mark.usefixtures("_probing")
def test_functions_that_fastapi_has_moved_are_named(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(utils, "solve_dependencies")

    with pytest.raises(EventKitError) as caught:
        bus.on(Ping)(taking_all)

    assert "has moved or changed what eventkit uses to resolve the dependencies" in str(
        caught.value
    )
    assert "solve_dependencies" in str(caught.value)


@pytest.mark.usefixtures("_probing")
def test_functions_that_fastapi_has_changed_are_named(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def solve(*, dependant: object, request: object) -> None: ...

    monkeypatch.setattr(utils, "solve_dependencies", solve)

    with pytest.raises(EventKitError, match=r"no \['dependency_overrides_provider', 'response'\]"):
        bus.on(Ping)(taking_all)


@pytest.mark.usefixtures("_probing")
async def test_what_fastapi_has_moved_is_no_concern_of_plain_defaults(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(utils, "solve_dependencies")

    @bus.on(Ping)
    async def handler(event: Ping, times: int = 3) -> None: ...

    await bus.dispatch(Ping())

    assert bus.stats.handled == 1


IMPORTS = """
import sys
from typing import Annotated
from eventkit import EventBus
bus = EventBus()

@bus.on(int)
async def handler(event: int, times: int = 3) -> None: ...

assert "fastapi" not in sys.modules
import fastapi
assert "eventkit._core.depends" not in sys.modules

@bus.on(int)
async def other(event: int, it: Annotated[int, fastapi.Depends(lambda: 3)]) -> None: ...

assert "eventkit._core.depends" in sys.modules
"""


def test_fastapi_is_imported_by_the_first_handler_that_has_dependencies() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
