"""An application starts a relay, and leaves nothing behind when it ends: no lease, no outcome."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from threading import Event as ThreadEvent
from threading import Thread
from threading import enumerate as threads
from typing import Annotated, Any

import anyio
import pytest
from fastapi import Depends, FastAPI, Request
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.testclient import TestClient

from eventkit import EventBus
from eventkit.exceptions import NoOutboxError, OutboxSchemaError
from eventkit.outbox import Outbox
from eventkit.outbox import _holdings as holdings_module
from eventkit.outbox import _relay as relay_module
from eventkit.outbox._store import State
from eventkit.starlette import EventContextMiddleware
from tests.outbox.processes import event, holdings_of, warned
from tests.outbox.scenes import Placed, Scene, until
from tests.witness import ignore

pytestmark = pytest.mark.anyio

GIVEN_BACK = "deliveries were given back to the table"


@pytest.fixture(autouse=True)
def quiet(bus: EventBus) -> None:
    bus.report_failure = ignore


@asynccontextmanager
async def lifespan_of(app: Any) -> AsyncGenerator[list[Any]]:
    """The application runs during the block, as a server has it; gives what it has said."""
    send_in, receive_in = anyio.create_memory_object_stream[Any](10)
    said: list[Any] = []
    started, ended = anyio.Event(), anyio.Event()

    async def send(message: Any) -> None:
        said.append(message["type"])
        started.set()

    async def serve() -> None:
        try:
            await app(
                {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}},
                receive_in.receive,
                send,
            )
        finally:
            started.set()
            ended.set()

    with send_in, receive_in:
        async with anyio.create_task_group() as tasks:
            await send_in.send({"type": "lifespan.startup"})
            tasks.start_soon(serve)
            await started.wait()
            try:
                yield said
            finally:
                if not ended.is_set():
                    await send_in.send({"type": "lifespan.shutdown"})
                    with anyio.CancelScope(shield=True):
                        await ended.wait()


def app_of(bus: EventBus, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    app.add_middleware(EventContextMiddleware, bus=bus, shutdown_timeout=0.05)
    return app


async def test_a_lifespan_runs_what_is_due_with_dependencies_of_the_application(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    seen: list[str] = []
    opened: list[str] = []

    async def mailer(app_name: Annotated[str, Depends(lambda: "shop")]) -> AsyncGenerator[str]:
        opened.append("open")
        yield f"mailer of {app_name}"
        opened.append("closed")

    def overridden() -> str:
        return "real"

    def tenant_of(request: Request) -> str:
        tenant: str = request.app.state.tenant
        return f"{tenant}, {request.state.pool}"

    @bus.on(Placed, durable=True, name="mail")
    async def mail(
        event: Placed,
        mailer: Annotated[str, Depends(mailer)],
        kind: Annotated[str, Depends(overridden)],
        tenant: Annotated[str, Depends(tenant_of)],
    ) -> None:
        seen.append(f"{event.name} by {mailer}, {kind}, {tenant}")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
        app.state.tenant = "acme"
        scene.table.insert(event("mail"))
        yield {"pool": "pool"}

    app = app_of(bus, lifespan=lifespan)
    app.dependency_overrides[overridden] = lambda: "fake"
    async with lifespan_of(app) as said:
        await until(lambda: not scene.table.rows())
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert seen == ["ada by mailer of shop, fake, acme, pool"]
    assert opened == ["open", "closed"]
    assert not scene.table.processes()


async def test_at_shutdown_what_runs_is_given_back_uncounted_and_the_process_has_gone(
    scene: Scene, bus: EventBus, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    begun: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        begun.append(event.name)
        await anyio.sleep_forever()

    caplog.set_level("INFO")
    scene.table.insert(*(event("mail") for _ in range(3)))
    async with lifespan_of(app_of(bus)):
        await until(lambda: len(begun) == 3)
        assert {owner for *_, owner in scene.table.rows().values()} == scene.table.processes()
    assert {*scene.table.rows().values()} == {(State.READY, 0, None)}
    assert not scene.table.processes()
    assert warned(caplog, "eventkit has stopped: bus=default left=0") == 1
    assert warned(caplog, " requeued=3 ") == 1
    assert bus.stats.undelivered == 0


async def test_what_waits_in_memory_is_given_back_and_counted_in_one_line(
    scene: Scene, bus: EventBus, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    begun: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        begun.append(event.name)
        await anyio.sleep_forever()

    caplog.set_level("INFO")
    async with lifespan_of(app_of(bus)):
        await until(lambda: outbox.healthy)
        for number in range(7):
            unit = bus.context(background=True)
            async with unit, scene.begun():
                unit.publish(Placed(str(number)))
        await until(lambda: len(begun) == 4)
        assert {(state, attempt) for state, attempt, _ in scene.table.rows().values()} == {
            (State.LEASED, 1)
        }
    assert {*scene.table.rows().values()} == {(State.READY, 0, None)}
    assert bus.stats.requeued == 7
    assert warned(caplog, f"{GIVEN_BACK}: bus=default deliveries=3") == 1
    assert warned(caplog, "eventkit has stopped: bus=default left=0") == 1


async def test_a_thread_that_cannot_be_stopped_keeps_its_row_which_lapses(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    begun, may_end = ThreadEvent(), ThreadEvent()

    @bus.on(Placed, durable=True, name="mail")
    def mail(event: Placed) -> None:
        begun.set()
        assert may_end.wait(30)

    scene.table.insert(event("mail"))
    lease = holdings_of(outbox).lease

    def release() -> None:
        wait_for(lambda: not lease.is_valid)  # the relay says goodbye
        may_end.set()

    async with lifespan_of(app_of(bus)):
        await until(begun.is_set)
        thread = Thread(target=release)
        thread.start()
    thread.join()
    assert scene.kept() == {"mail": (State.LEASED, 1)}
    assert len(scene.table.processes()) == 1


def wait_for(true: Callable[[], object]) -> None:
    """Wait in a thread until it is so."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_lifespan_that_fails_in_its_start_leaves_no_lease(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        raise LookupError("no configuration")  # before the relay begins
        yield

    app = app_of(bus, lifespan=lifespan)
    with pytest.raises(LookupError), TestClient(app):
        pass
    assert not scene.table.processes()
    assert not holdings_of(outbox).looking
    assert not holdings_of(outbox).lease.is_valid
    assert "eventkit-lease" not in {thread.name for thread in threads()}


def test_a_test_client_may_run_the_lifespan_twice(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)

    app = app_of(bus)
    for name in ("ada", "bob"):
        scene.table.insert(event("mail", name=name))
        with TestClient(app):
            wait_for(lambda: not scene.table.rows())
        assert seen[-1] == name
        assert not scene.table.processes()
    assert seen == ["ada", "bob"]


def test_two_event_loops_have_one_owner_and_the_last_one_says_goodbye(
    scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)

    app = app_of(bus)
    holdings = holdings_of(outbox)
    with TestClient(app, backend="asyncio" if scene.awaits else "trio"):
        with TestClient(app):
            wait_for(lambda: len(holdings.looking) == 2 and outbox.healthy)
            assert len(scene.table.processes()) == 1
            scene.table.insert(*(event("mail", name=str(number)) for number in range(20)))
            holdings.wake()
            wait_for(lambda: not scene.table.rows())
        assert len(scene.table.processes()) == 1
        assert outbox.healthy
        scene.table.insert(event("mail", name="last"))
        holdings.wake()
        wait_for(lambda: not scene.table.rows())
    assert not scene.table.processes()
    assert not outbox.healthy
    assert sorted(seen) == sorted([*map(str, range(20)), "last"])


# Refused, away


def only_one_of(error: Exception) -> Exception:
    """What a task group has wrapped, maybe more than once."""
    while inner := getattr(error, "exceptions", ()):
        (error,) = inner
    return error


async def started(app: Any) -> tuple[list[Any], list[Exception]]:
    """What an application says that does not start, and what it raises."""
    said: list[Any] = []
    raised: list[Exception] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        said.append(message)

    try:
        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    except Exception as error:
        raised.append(only_one_of(error))
    return said, raised


async def test_a_bus_without_an_outbox_keeps_an_application_from_its_start(bus: EventBus) -> None:
    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None: ...

    said, (error,) = await started(app_of(bus))
    assert isinstance(error, NoOutboxError)
    assert [each["type"] for each in said] == ["lifespan.startup.failed"]
    assert said[0]["message"] == str(error)
    assert "mail" in str(error)
    assert "Outbox(bus, engine)" in str(error)


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        ("alter table {p}eventkit_outbox rename column depth to deepness", "depth"),
        ("alter table {p}eventkit_process rename to {new}", "eventkit_process"),
    ],
)
async def test_missing_tables_and_columns_keep_an_application_from_its_start(
    damage: str, missing: str, scene: Scene, bus: EventBus, outbox: Outbox
) -> None:
    new = "eventkit_moved"
    scene.table.sql(damage.replace("{new}", new))
    try:
        said, (error,) = await started(app_of(bus))
    finally:
        if missing == "depth":
            scene.table.sql("alter table {p}eventkit_outbox rename column deepness to depth")
        else:
            scene.table.sql(f"alter table {{p}}{new} rename to eventkit_process")
    assert isinstance(error, OutboxSchemaError)
    assert missing in str(error)
    assert "add_tables(Base.metadata), then run your migrations or create_all" in str(error)
    assert [each["type"] for each in said] == ["lifespan.startup.failed"]


@pytest.mark.parametrize("error", [RuntimeError("on trio"), ValueError("too old")])
async def test_whatever_keeps_an_outbox_from_its_start_is_said_to_the_server(
    error: Exception, scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> bool:
        raise error

    monkeypatch.setattr(relay_module, "examine", fail)
    said, (raised,) = await started(app_of(bus))
    assert raised is error
    assert said == [{"type": "lifespan.startup.failed", "message": str(error)}]


async def test_an_async_engine_on_trio_is_refused(on_trio: None, bus: EventBus) -> None:
    asyncpg = pytest.importorskip("sqlalchemy.ext.asyncio")
    engine = asyncpg.create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none")
    with Outbox(bus, engine) as outbox:
        with pytest.raises(RuntimeError, match="on trio use a blocking engine"):
            await outbox.run()
        said, (error,) = await started(app_of(bus))
        assert "on trio use a blocking engine" in str(error)
        assert [each["type"] for each in said] == ["lifespan.startup.failed"]


async def test_with_sqlite_in_memory_an_application_starts_and_ends_in_silence(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        seen.append(event.name)

    with Outbox(bus, create_engine("sqlite://")):
        async with lifespan_of(app_of(bus)), bus.context() as unit:
            unit.publish(Placed())
    assert seen == ["ada"]
    assert not [each for each in caplog.records if each.levelno > 20]


async def test_a_database_that_is_away_at_the_end_does_not_hold_up_a_shutdown(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun = anyio.Event()

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        begun.set()
        await anyio.sleep_forever()

    def fail(*_: object) -> None:
        raise OperationalError("select 1", None, ConnectionRefusedError("nobody there"))

    monkeypatch.setattr(relay_module, "_SECONDS_TO_LEAVE", 0.2)
    monkeypatch.setattr(holdings_module, "_SECONDS_TO_WRITE", 0.2)
    scene.table.insert(event("mail"))
    database: Any = holdings_of(outbox).database
    async with lifespan_of(app_of(bus)) as said:
        await begun.wait()
        monkeypatch.setattr(database, "_transact", fail)
    assert said[-1] == "lifespan.shutdown.complete"
    assert scene.kept() == {"mail": (State.LEASED, 1)}
    assert bus.stats.requeued == 1


async def test_a_farewell_that_fails_is_told(
    scene: Scene,
    bus: EventBus,
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OperationalError("update", None, ConnectionRefusedError("nobody there"))

    store: Any = holdings_of(outbox).store
    monkeypatch.setattr(store, "farewell", fail)
    async with lifespan_of(app_of(bus)):
        await until(lambda: outbox.healthy)
    assert warned(caplog, "deliveries could not be given back, and wait until") == 1


async def test_leaving_twice_is_leaving_once(
    scene: Scene, bus: EventBus, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    farewells = 0
    store: Any = holdings_of(outbox).store
    real = store.farewell

    def farewell(*args: Any, **options: Any) -> Any:
        nonlocal farewells
        farewells += 1
        return real(*args, **options)

    monkeypatch.setattr(store, "farewell", farewell)
    async with lifespan_of(app_of(bus)):
        await until(lambda: outbox.healthy)
    assert farewells == 1
