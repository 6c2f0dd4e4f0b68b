"""What the pages about requests, jobs and websockets promise beside what their blocks assert."""

import asyncio
import importlib
import json
import threading
from collections.abc import Callable, Generator, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest
import structlog
from anyio import CancelScope
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from sqlalchemy import StaticPool, create_engine, text
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket
from structlog.testing import LogCapture

from eventkit import EventBus, EventContextUsageError
from eventkit.sqlalchemy import deliver_on_commit
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, lifespan_of
from tests.project.pages import DOCS, RunPage, blocks
from tests.serving import HOST, PATIENCE, on_uvicorn, serving
from tests.witness import witnessed

JOBS, REQUESTS = DOCS / "jobs.md", DOCS / "requests.md"

Import = Callable[[str], ModuleType]
Layer = tuple[Any, dict[str, Any]]  # a middleware and its options


def write_files(page: Path, folder: Path) -> None:
    """Write the files of a page into a folder, without their further parts."""
    for name, block in blocks(page).items():
        if name.endswith(".py"):
            (folder / name).write_text(block)


# Requests: the order of middlewares.


def app_with(bus: EventBus, *middlewares: Layer) -> FastAPI:
    """An app whose last middleware is the outermost."""
    app = FastAPI()
    for middleware, options in middlewares:
        app.add_middleware(middleware, **options)

    @app.post("/orders")
    async def place() -> str:
        bus.publish("order")
        return "placed " * 200

    return app


def orders(ours: Layer, other: Layer, *, outside: bool) -> list[Layer]:
    """The two in their order, the other one outside of ours or inside."""
    return [ours, other] if outside else [other, ours]


def ignore(event: object) -> None:
    """Handle an event of any kind."""


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


def test_a_commit_outside_is_too_late_for_events_that_transactions_decide(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    """The order is wrong, so nothing is delivered, and the log says what is right."""
    engine = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    deliver_on_commit(bus, engine)
    seen = witnessed(bus)
    bus.subscribe(str, print)

    class Commit:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            with engine.connect() as connection:
                scope["state"] = {"connection": connection}
                await self._app(scope, receive, send)
                connection.commit()

    ours: Layer = (EventContextMiddleware, {"bus": bus})
    with engine.begin() as connection:
        connection.execute(text("create table orders (number integer)"))
    for outside in (False, True):
        app = app_with(bus, *orders(ours, (Commit, {}), outside=outside))

        @app.post("/rows")
        async def add_row(request: Request) -> None:
            request.state.connection.execute(text("insert into orders values (7)"))
            bus.publish("row")

        assert TestClient(app).post("/rows").status_code == 200

    assert seen == ["handled row", "discarded row"]
    assert "A middleware that commits goes inside of EventContextMiddleware" in caplog.text
    with engine.connect() as connection:
        assert connection.execute(text("select count(*) from orders")).scalar_one() == 2
    engine.dispose()


@pytest.mark.anyio
@pytest.mark.parametrize("cors_is_outside", [True, False])
async def test_other_origins_can_read_the_503_if_cors_is_outside(
    bus: EventBus, cors_is_outside: bool
) -> None:
    begun, gate = anyio.Event(), anyio.Event()

    @bus.on(str)
    async def wait(event: str) -> None:
        begun.set()
        await gate.wait()

    bounds = {"concurrency": 1, "max_pending": 1, "overload_timeout": 1e-3, "background": True}
    ours = (EventContextMiddleware, {"bus": bus, **bounds})
    cors = (CORSMiddleware, {"allow_origins": ["*"]})
    app = app_with(bus, *orders(ours, cors, outside=cors_is_outside))

    async def post() -> Exchange:
        exchange = Exchange("/orders", method="POST", spec_version="2.3")
        exchange.scope["headers"].append((b"origin", b"https://a.b"))
        await exchange.run(app)
        return exchange

    async with lifespan_of(app):
        for _ in range(2):
            assert (await post()).status == 200
        await begun.wait()
        refused = await post()
        gate.set()

    assert refused.status == 503
    headers = dict(refused.sent[0]["headers"])
    assert (b"access-control-allow-origin" in headers) is cors_is_outside


class CorrelationId:
    """Gives each request an id, for the log lines of this request alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with structlog.contextvars.bound_contextvars(request_id="r-1"):
            await self._app(scope, receive, send)


@pytest.fixture
def lines() -> Generator[list[MutableMapping[str, Any]]]:
    capture = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    yield capture.entries
    structlog.reset_defaults()


@pytest.mark.parametrize("is_outside", [True, False])
def test_the_last_lines_of_a_request_have_the_correlation_id_if_it_is_outside(
    bus: EventBus, is_outside: bool, lines: list[MutableMapping[str, Any]]
) -> None:
    @bus.on(str, thread=False)
    def log(event: str) -> None:
        structlog.get_logger().info("handling")

    ours: Layer = (EventContextMiddleware, {"bus": bus})
    app = app_with(bus, *orders(ours, (CorrelationId, {}), outside=is_outside))

    @app.post("/refuse")
    async def refuse() -> Response:
        bus.publish("refused")
        return PlainTextResponse("no", 409)

    client = TestClient(app)
    client.post("/orders")
    client.post("/refuse")

    (handling,) = [line for line in lines if line["event"] == "handling"]
    (discarded,) = [line for line in lines if line["event"].startswith("deliveries discarded")]
    assert handling["request_id"] == "r-1"
    assert ("request_id" in discarded) is is_outside


@pytest.mark.parametrize("is_outside", [True, False])
def test_a_middleware_that_changes_the_status_counts_if_it_is_inside(
    bus: EventBus, is_outside: bool
) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, ignore, thread=False)

    async def refuse(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.status_code = 409
        return response

    ours = (EventContextMiddleware, {"bus": bus})
    changes = (BaseHTTPMiddleware, {"dispatch": refuse})
    app = app_with(bus, *orders(ours, changes, outside=is_outside))

    assert TestClient(app).post("/orders").status_code == 409
    assert seen == [f"{'handled' if is_outside else 'discarded'} order"]


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@pytest.mark.parametrize("is_outside", [True, False])
@pytest.mark.parametrize(
    "other",
    [(GZipMiddleware, {}), (BaseHTTPMiddleware, {"dispatch": pass_on}), "session"],
    ids=["gzip", "base", "session"],
)
def test_for_other_middlewares_the_place_makes_no_difference(
    bus: EventBus, other: Any, is_outside: bool
) -> None:
    if other == "session":
        pytest.importorskip("itsdangerous", reason="Starlette's sessions need it")
        from starlette.middleware.sessions import SessionMiddleware

        other = (SessionMiddleware, {"secret_key": "secret"})
    seen = witnessed(bus)
    bus.subscribe(str, ignore, thread=False)
    ours = (EventContextMiddleware, {"bus": bus})
    app = app_with(bus, *orders(ours, other, outside=is_outside))

    assert TestClient(app).post("/orders").json() == "placed " * 200
    assert seen == ["handled order"]


def test_the_stricter_rule_of_the_requests_page_discards_after_a_redirect(
    run_page: RunPage,
) -> None:
    page = run_page(REQUESTS)
    seen = witnessed(page.strict_bus)
    page.strict_bus.subscribe(str, ignore, thread=False)

    app: FastAPI = page.strict_app

    @app.get("/{status}")
    async def answer(status: int) -> Response:
        page.strict_bus.publish(str(status))
        return RedirectResponse("/200", status) if status != 200 else PlainTextResponse("here")

    client = TestClient(app, follow_redirects=False)
    for status in (200, 303):
        assert client.get(f"/{status}").status_code == status

    assert seen == ["handled 200", "discarded 303"]


# Requests: GraphQL and AWS Lambda.


TWO_ORDERS = {"query": "mutation { a: placeOrder(number: 1) b: placeOrder(number: 0) }"}


def test_a_failed_mutation_is_a_200_and_the_page_tells_how_to_discard_its_events(
    project: Path,
) -> None:
    strawberry = pytest.importorskip("strawberry", reason="pip install strawberry-graphql")
    integration = pytest.importorskip("strawberry.fastapi")
    write_files(REQUESTS, project)
    page = importlib.import_module("graphql_app")
    exec(blocks(REQUESTS)["graphql_app.py, the other extension"], vars(page))
    seen = witnessed(page.bus)
    page.bus.subscribe(page.OrderPlaced, ignore, thread=False)

    def outcome(*extensions: object) -> list[str]:
        schema = strawberry.Schema(page.Query, page.Mutation, extensions=extensions)
        app = FastAPI()
        app.add_middleware(EventContextMiddleware, bus=page.bus)
        app.include_router(integration.GraphQLRouter(schema), prefix="/graphql")
        return ask(app)

    def ask(app: FastAPI) -> list[str]:
        seen.clear()
        answer = TestClient(app).post("/graphql", json=TWO_ORDERS)
        assert answer.status_code == 200
        assert answer.json()["errors"][0]["message"] == "orders begin with 1"
        return sorted(line.replace("OrderPlaced(number=", "").rstrip(")") for line in seen)

    assert outcome() == ["handled 0", "handled 1"]
    assert ask(page.app) == ["discarded 0", "handled 1"]
    assert outcome(page.AllOrNothing) == ["discarded 0", "discarded 1"]
    assert TestClient(page.app).post("/graphql", json={"query": "{ version }"}).json() == {
        "data": {"version": 1}
    }


INVOCATION: dict[str, Any] = {
    "version": "2.0",
    "routeKey": "$default",
    "rawPath": "/orders/7",
    "rawQueryString": "",
    "headers": {"host": "shop.example"},
    "requestContext": {
        "http": {
            "method": "POST",
            "path": "/orders/7",
            "sourceIp": "192.0.2.1",
            "protocol": "HTTP/1.1",
        },
        "domainName": "shop.example",
    },
    "isBase64Encoded": False,
}


@pytest.fixture
def loop_of_the_thread() -> Generator[None]:
    """Mangum runs the current event loop of the thread, for a moment at a time."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.usefixtures("loop_of_the_thread")
def test_on_aws_lambda_handlers_have_ended_when_the_response_is_returned(
    project: Path,
) -> None:
    pytest.importorskip("mangum", reason="pip install mangum")
    write_files(REQUESTS, project)
    page = importlib.import_module("lambda_app")
    seen = witnessed(page.bus)
    page.bus.subscribe(page.OrderPlaced, waits_for_a_moment)
    try:
        assert page.handler(INVOCATION, {})["statusCode"] == 200
        assert seen == ["handled OrderPlaced(number=7)"]
    finally:
        page.lifespan.__exit__(None, None, None)


async def waits_for_a_moment(event: object) -> None:
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


@pytest.mark.usefixtures("loop_of_the_thread")
def test_on_aws_lambda_only_a_lifespan_run_by_hand_leaves_handlers_behind(bus: EventBus) -> None:
    mangum = pytest.importorskip("mangum", reason="pip install mangum")
    protocols = pytest.importorskip("mangum.protocols")
    seen = witnessed(bus)
    bus.subscribe(str, waits_for_a_moment)
    app = app_with(bus, (EventContextMiddleware, {"bus": bus}))
    invocation = json.loads(json.dumps(INVOCATION).replace("/orders/7", "/orders"))

    for lifespan in ("auto", "off"):
        assert mangum.Mangum(app, lifespan=lifespan)(invocation, {})["statusCode"] == 200
        assert seen == ["handled order"]
        seen.clear()
    with protocols.LifespanCycle(app, "on"):
        assert mangum.Mangum(app, lifespan="off")(invocation, {})["statusCode"] == 200
        assert seen == []
    assert seen == ["handled order"]


# Jobs.


@pytest.fixture
def import_job(project: Path) -> Import:
    write_files(JOBS, project)
    return importlib.import_module


@pytest.fixture
def shop(import_job: Import) -> ModuleType:
    return import_job("shop")


def test_the_command_of_click_reminds(import_job: Import, shop: ModuleType) -> None:
    pytest.importorskip("click")
    from click.testing import CliRunner

    assert CliRunner().invoke(import_job("shop_click").remind, ["7"]).exit_code == 0
    assert shop.reminded == [7]


def test_the_command_of_typer_reminds(import_job: Import, shop: ModuleType) -> None:
    testing = pytest.importorskip("typer.testing", reason="pip install typer")

    assert testing.CliRunner().invoke(import_job("shop_typer").app, ["7"]).exit_code == 0
    assert shop.reminded == [7]


class Met:
    """A handler that another thread can wait for."""

    def __init__(self, shop: ModuleType) -> None:
        self._met = threading.Event()
        self.loops = list[object]()
        shop.bus.subscribe(shop.InvoiceDue, self.handle, name="met")

    async def handle(self, event: object) -> None:
        self.loops.append(asyncio.get_running_loop())
        self._met.set()

    def wait(self) -> None:
        assert self._met.wait(PATIENCE)
        self._met.clear()


def test_a_job_of_apscheduler_reminds_on_the_loop_of_the_application(
    import_job: Import, shop: ModuleType
) -> None:
    pytest.importorskip("apscheduler", reason="pip install 'apscheduler<4'")
    page, met = import_job("scheduled"), Met(shop)
    app: FastAPI = page.app

    @app.get("/")
    async def loop() -> int:
        return id(asyncio.get_running_loop())

    with TestClient(page.app) as client:
        (job,) = page.scheduler.get_jobs()
        job.modify(next_run_time=datetime.now(UTC))
        met.wait()
        assert [*map(id, met.loops)] == [client.get("/").json()]

    assert not page.scheduler.running
    assert shop.reminded == [1]


def test_jobs_of_apscheduler_in_threads_remind_on_the_loop_of_the_application(
    import_job: Import, shop: ModuleType
) -> None:
    schedulers = pytest.importorskip(
        "apscheduler.schedulers.background", reason="pip install 'apscheduler<4'"
    )
    page, met = import_job("scheduled"), Met(shop)
    app: FastAPI = page.app
    background: Any = schedulers.BackgroundScheduler(timezone="UTC")

    def remind() -> None:
        with shop.bus.context():
            shop.bus.publish(shop.InvoiceDue(2))

    @app.get("/")
    async def loop() -> int:
        return id(asyncio.get_running_loop())

    with TestClient(page.app) as client:
        background.start()
        for scheduler in (background, page.scheduler):
            scheduler.add_job(remind)
            met.wait()
        background.shutdown()
        assert {*map(id, met.loops)} == {client.get("/").json()}

    assert shop.reminded == [2, 2]


def test_the_shutdown_of_apscheduler_cancels_a_job_and_discards_its_events(
    import_job: Import, shop: ModuleType
) -> None:
    pytest.importorskip("apscheduler", reason="pip install 'apscheduler<4'")
    page, begun = import_job("scheduled"), threading.Event()
    seen = witnessed(shop.bus)

    async def hang() -> None:
        async with shop.bus.context(background=True):
            shop.bus.publish(shop.InvoiceDue(3))
            begun.set()
            await anyio.sleep_forever()

    with TestClient(page.app):
        page.scheduler.add_job(hang)
        assert begun.wait(PATIENCE)

    assert seen == ["discarded InvoiceDue(invoice_id=3)"]


@pytest.fixture
def celery(import_job: Import, shop: ModuleType) -> Generator[ModuleType]:
    state: Any = pytest.importorskip("celery._state", reason="pip install celery")
    shared = {*state._on_app_finalizers}
    page = import_job("celery_worker")
    yield page
    page.celery.close()
    # Celery shares each task with all applications of the process, also with the next test's.
    state._on_app_finalizers.clear()
    state._on_app_finalizers.update(shared)


def test_a_task_of_celery_delivers_before_it_ends(celery: ModuleType, shop: ModuleType) -> None:
    for _ in range(2):
        celery.close_day.apply(args=["Monday"]).get()
    assert shop.reminded == [1, 2, 1, 2]


def ignore_settings(**settings: object) -> None:
    """Configure no logging."""


def test_a_handler_hands_over_to_a_worker_of_celery(
    celery: ModuleType, import_job: Import, shop: ModuleType
) -> None:
    worker = pytest.importorskip("celery.contrib.testing.worker")
    setup_logging = pytest.importorskip("celery.signals").setup_logging
    import_job("celery_sender")
    met = Met(shop)
    setup_logging.connect(ignore_settings)  # or Celery takes the handlers of the root logger away
    try:
        with worker.start_worker(celery.celery, pool="solo", perform_ping_check=False):
            with shop.bus.context():
                shop.bus.publish(shop.DayEnded("Monday"))
            met.wait()
    finally:
        setup_logging.disconnect(ignore_settings)

    assert shop.bus.stats.failed == 0
    assert shop.reminded[:1] == [1]


def test_an_eager_task_of_celery_on_an_event_loop_is_refused(
    celery: ModuleType, shop: ModuleType
) -> None:
    celery.celery.conf.task_always_eager = True

    async def call() -> object:
        result: object = celery.close_day.delay("Monday").result
        return result

    async def call_in_a_thread() -> object:
        result: object = (await anyio.to_thread.run_sync(celery.close_day.delay, "Monday")).result
        return result

    assert isinstance(anyio.run(call), EventContextUsageError)
    assert anyio.run(call_in_a_thread) is None
    assert shop.reminded == [1, 2]


def test_a_task_of_taskiq_is_a_unit_of_its_own_also_in_the_process_that_calls_it(
    import_job: Import, shop: ModuleType
) -> None:
    pytest.importorskip("taskiq", reason="pip install taskiq")
    page = import_job("taskiq_worker")

    async def call() -> None:
        async with shop.bus.context():  # as the middleware opens it for a request
            task = await page.close_day.kiq("Monday")
            assert not (await task.wait_result(timeout=PATIENCE)).is_err
            shop.bus.current_context().discard()  # as the middleware does after a 4xx

    asyncio.run(call())
    assert shop.reminded == [1, 2]


def test_a_plain_task_of_taskiq_delivers_too(import_job: Import, shop: ModuleType) -> None:
    pytest.importorskip("taskiq", reason="pip install taskiq")
    broker = import_job("taskiq_worker").broker

    @broker.task  # type: ignore[untyped-decorator]
    def remind() -> None:
        with shop.bus.context():
            shop.bus.publish(shop.InvoiceDue(5))

    async def call() -> None:
        task = await remind.kiq()
        assert not (await task.wait_result(timeout=PATIENCE)).is_err

    asyncio.run(call())
    assert shop.reminded == [5]


def test_a_cell_that_is_run_again_subscribes_again_unless_it_cancels(bus: EventBus) -> None:
    cell = "@bus.on(str)\nasync def note(event): ..."
    for number in (1, 2):
        exec(compile(cell, f"<cell {number}>", "exec"), {"bus": bus, "__name__": "__main__"})
    assert len(bus.handlers_for(str)) == 2


# Websockets.


@pytest.mark.anyio
async def test_an_endpoint_that_is_cancelled_says_goodbye_in_the_background(bus: EventBus) -> None:
    seen = witnessed(bus)
    bus.subscribe(str, waits_for_a_moment)
    begun = anyio.Event()
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.websocket("/")
    async def chat(socket: WebSocket) -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            async with bus.context(background=True):
                bus.publish("bye")

    async def nothing(*_: object) -> Any:
        await anyio.sleep_forever()

    scope: Scope = {
        "type": "websocket",
        "path": "/",
        "headers": [],
        "query_string": b"",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    async with lifespan_of(app), anyio.create_task_group() as tasks:
        with_scope = CancelScope()

        async def serve() -> None:
            with with_scope:
                await app(scope, nothing, nothing)

        tasks.start_soon(serve)
        await begun.wait()
        with_scope.cancel()

    assert seen == ["handled bye"]


def test_a_message_that_fails_takes_its_own_events_and_a_handler_that_fails_takes_nothing(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    seen = witnessed(bus)

    @bus.on(str, thread=False)
    def handle(event: str) -> None:
        if event == "broken":
            raise ValueError(event)

    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.websocket("/")
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        async for message in socket.iter_text():
            try:
                async with bus.context():
                    bus.publish(message)
                    if message == "wrong":
                        raise LookupError
            except LookupError:
                await socket.send_text("refused")
            else:
                await socket.send_text("done")

    with TestClient(app).websocket_connect("/") as socket:
        for message, answer in (("a", "done"), ("wrong", "refused"), ("broken", "done")):
            socket.send_text(message)
            assert socket.receive_text() == answer
        socket.send_text("b")
        assert socket.receive_text() == "done"

    assert seen == ["handled a", "discarded wrong", "failed broken", "handled b"]
    assert "event handler failed" in caplog.text


SOCKET_APP = """
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware

bus = EventBus()


@bus.on(str)
async def say(event: str) -> None:
    print(event, flush=True)


@asynccontextmanager
async def lifespan(_: FastAPI):
    yield
    print("resources are closed", flush=True)


app = FastAPI(lifespan=lifespan)
app.add_middleware(EventContextMiddleware, bus=bus)


@app.websocket("/")
async def chat(socket: WebSocket) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text)
    async with bus.context(background=True):
        bus.publish("the browser has left")
"""


def test_uvicorn_closes_a_websocket_at_shutdown_and_its_last_events_are_delivered(
    tmp_path: Path,
) -> None:
    client = pytest.importorskip("websockets.sync.client", reason="pip install websockets")
    (tmp_path / "socket_app.py").write_text(SOCKET_APP)

    command = on_uvicorn("socket_app:app", folder=tmp_path)
    with serving(command) as server, client.connect(f"ws://{HOST}:{server.port}/") as socket:
        socket.send("hello")
        assert socket.recv(timeout=PATIENCE) == "hello"
        server.signal()
        with pytest.raises(Exception, match="1012"):
            socket.recv(timeout=PATIENCE)
        server.wait()
        said = server.output
    assert said.index("the browser has left") < said.index("resources are closed")
