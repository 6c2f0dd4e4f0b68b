"""Units of work of each kind, with durable handlers: none leaves a row, whatever cancels it."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from types import coroutine
from typing import Any

import anyio
import pytest
from anyio import CancelScope, to_thread
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from eventkit import EventBus
from eventkit.outbox import Outbox
from eventkit.outbox._store import State
from eventkit.starlette import EventContextMiddleware
from tests.asgi import client_of
from tests.conftest import Backend
from tests.contract.bus import assert_settled
from tests.outbox.scenes import LIMIT, Paid, Placed, Scene, lapse, until
from tests.sqlalchemy.steps import put

LEASED = (State.LEASED, 1)


@pytest.fixture
def seen(bus: EventBus) -> list[str]:
    """What durable handlers have done."""
    seen: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        await checkpoint()
        seen.append(f"mail {event.name}")

    @bus.on(Placed, durable=True, name="stock")
    def stock(event: Placed) -> None:
        seen.append(f"stock {event.name}")

    return seen


async def place(scene: Scene, bus: EventBus, name: str = "ada") -> None:
    async with scene.begun() as session:
        await put(session, name)
        bus.publish(Placed(name))


# Kinds of units


@pytest.mark.anyio
async def test_a_job_leaves_no_rows(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    async with bus.context():
        await place(scene, bus)
        assert scene.kept() == {"mail": LEASED, "stock": LEASED}

    assert sorted(seen) == ["mail ada", "stock ada"]
    assert scene.kept() == {}


@pytest.mark.anyio
async def test_a_drain_midway_leaves_no_rows_of_what_was_published_before(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    async with bus.context() as unit:
        await place(scene, bus, "ada")
        report = await unit.drain()
        assert (report.handled, report.requeued) == (2, 0)
        assert scene.kept() == {}
        await place(scene, bus, "bob")
        assert scene.kept() == {"mail": LEASED, "stock": LEASED}

    assert sorted(seen) == ["mail ada", "mail bob", "stock ada", "stock bob"]
    assert scene.kept() == {}


@pytest.mark.anyio
async def test_a_unit_inside_of_another_one_leaves_its_rows_to_that_one(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    async with bus.context():
        async with bus.context():
            await place(scene, bus)
        assert seen == []
        assert scene.kept() == {"mail": LEASED, "stock": LEASED}

    assert scene.kept() == {}


@pytest.mark.anyio
async def test_a_unit_that_fails_after_its_commit_leaves_no_rows(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    with suppress(LookupError):
        async with bus.context():
            await place(scene, bus)
            raise LookupError

    assert sorted(seen) == ["mail ada", "stock ada"]
    assert scene.kept() == {}


def test_a_script_without_an_event_loop_leaves_no_rows(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str], anyio_backend_name: str
) -> None:
    if scene.awaits or anyio_backend_name == "trio":
        pytest.skip("without an event loop")
    with bus.context():
        with scene.session() as session:
            session.connection()
            bus.publish(Placed())
            session.commit()
        assert scene.kept() == {"mail": LEASED, "stock": LEASED}

    assert sorted(seen) == ["mail ada", "stock ada"]
    assert scene.kept() == {}


@pytest.mark.anyio
async def test_a_unit_in_a_worker_thread_leaves_no_rows(
    bus: EventBus, outbox: Outbox, scene: Scene, seen: list[str]
) -> None:
    if scene.awaits:
        pytest.skip("sessions that block")

    def work() -> None:
        with bus.context():
            with scene.session() as session:
                session.connection()
                bus.publish(Placed())
                session.commit()
            assert scene.kept() == {"mail": LEASED, "stock": LEASED}

    await to_thread.run_sync(work)

    assert sorted(seen) == ["mail ada", "stock ada"]
    assert scene.kept() == {}


# In applications


def app_of(scene: Scene, bus: EventBus, outbox: Outbox, kept: list[object]) -> Starlette:
    async def order(request: Request) -> Response:
        await place(scene, bus)
        return PlainTextResponse("placed")

    async def afterwards(request: Request) -> Response:
        return PlainTextResponse("later", background=BackgroundTask(place, scene, bus))

    async def stream(request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            yield "begun"
            await place(scene, bus)
            await bus.current_context().drain()
            if outbox.healthy:  # a relay writes soon, and nobody waits for it
                await until(lambda: not scene.kept())
            kept.append(scene.kept())
            yield "ended"

        return StreamingResponse(parts())

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        async with bus.context():
            await place(scene, bus)
        await websocket.send_text("placed")
        await websocket.close()

    return Starlette(
        routes=[
            Route("/order", order),
            Route("/afterwards", afterwards),
            Route("/stream", stream),
            WebSocketRoute("/socket", socket),
        ],
        middleware=[Middleware(EventContextMiddleware, bus=bus)],
    )


@pytest.mark.parametrize("path", ["/order", "/afterwards", "/stream", "/socket"])
@pytest.mark.parametrize("lifespan", [True, False], ids=["lifespan", "no lifespan"])
def test_an_application_leaves_no_rows(
    bus: EventBus,
    outbox: Outbox,
    scene: Scene,
    seen: list[str],
    anyio_backend: Backend,
    path: str,
    lifespan: bool,
) -> None:
    kept: list[object] = []
    client = client_of(app_of(scene, bus, outbox, kept), anyio_backend)
    if lifespan:
        client.__enter__()
    if path == "/socket":
        with client.websocket_connect(path) as websocket:
            assert websocket.receive_text() == "placed"
    else:
        assert client.get(path).status_code == 200
    if lifespan:
        client.__exit__(None, None, None)

    assert sorted(seen) == ["mail ada", "stock ada"]
    assert scene.kept() == {}
    assert kept == ([{}] if path == "/stream" else [])
    assert bus.stats.requeued == 0
    if lifespan:
        assert scene.table.processes() == set()


# Cancellation


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["scope", "task"])
async def test_a_job_that_is_cancelled_gives_its_deliveries_back_uncounted(
    bus: EventBus, outbox: Outbox, scene: Scene, how: str, anyio_backend_name: str
) -> None:
    if how == "task" and anyio_backend_name == "trio":
        pytest.skip("about asyncio alone")
    begun = anyio.Event()
    ended: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        begun.set()
        if len(ended) < 2:
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("mail")

    @bus.on(Paid, durable=True, name="bill")
    async def bill(event: Paid) -> None:
        ended.append("bill")

    async def job() -> None:
        async with bus.context(), scene.begun() as session:
            await put(session)
            bus.publish(Placed(), Paid())

    if how == "scope":
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(job)
            await begun.wait()
            tasks.cancel_scope.cancel()
    else:
        task = asyncio.ensure_future(job())
        await begun.wait()
        task.cancel()
        await asyncio.wait([task])

    assert ended == ["mail"]
    assert bus.stats.requeued == 2
    assert bus.stats.undelivered == 0
    assert scene.kept()["mail"] == (State.READY, 0)
    await to_thread.run_sync(lapse, outbox)
    assert scene.kept() == {"mail": (State.READY, 0), "bill": (State.READY, 0)}
    ended.append("mail")
    assert (await outbox.run_due()).handled == 2
    assert scene.kept() == {}


class Strike:
    """Cancels work where it waits for the time that this step says, from `arm` on."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.count = 0
        self.armed = False
        self.done = False
        self.looked = False

    def arm(self) -> None:
        self.armed = True

    @coroutine
    def during(
        self, work: Coroutine[Any, Any, None], cancel: Callable[[], object]
    ) -> Generator[Any, Any, None]:
        """Drive it, and cancel it once."""
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                trap = work.send(value) if error is None else work.throw(error)
            except StopIteration:
                return
            finally:
                error = None  # its traceback leads to this frame
            self.count += self.armed
            if self.count == self.step and not self.done:
                self.done = True
                cancel()
            try:
                value = yield trap
            except BaseException as raised:
                error = raised


async def struck_by_scope(strike: Strike, work: Coroutine[Any, Any, None]) -> None:
    with CancelScope() as scope:
        await strike.during(work, scope.cancel)


async def struck_by_task_cancel(strike: Strike, work: Coroutine[Any, Any, None]) -> None:
    async def run() -> None:
        me = asyncio.current_task()
        assert me is not None
        await strike.during(work, me.cancel)

    task = asyncio.ensure_future(run())
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


@pytest.mark.anyio
@pytest.mark.parametrize("publishes", ["inside", "outside"])
@pytest.mark.parametrize("strike", [struck_by_scope, struck_by_task_cancel])
async def test_a_cancellation_at_any_await_of_a_drain_loses_and_repeats_nothing(
    scene: Scene,
    publishes: str,
    strike: Callable[[Strike, Coroutine[Any, Any, None]], Awaitable[None]],
    anyio_backend_name: str,
) -> None:
    """What was committed, what has ended, and what is kept agree, wherever it strikes."""
    if strike is struck_by_task_cancel and anyio_backend_name == "trio":
        pytest.skip("about asyncio alone")
    bus = EventBus()
    outbox = scene.outbox(bus)
    ended: list[str] = []

    @bus.on(Placed, durable=True, name="mail")
    async def mail(event: Placed) -> None:
        await checkpoint()
        await checkpoint()
        ended.append(f"mail {event.name}")

    @bus.on(Placed, durable=True, name="stock")
    async def stock(event: Placed) -> None:
        ended.append(f"stock {event.name}")

    async def unit(name: str, arm: Callable[[], None]) -> None:
        async with bus.context():
            if publishes == "inside":
                await place(scene, bus, name)
            else:
                bus.publish(Placed(name))
            arm()

    step = 0
    with anyio.fail_after(2 * LIMIT):
        while True:
            step += 1
            at = Strike(step)
            await strike(at, unit(f"unit {step}", at.arm))
            if not at.done:
                break
            assert_settled(bus)
            # What `Task.cancel()` has struck may still be on its way into the table.
            while "LEASED" in {state for _, state in scene.counted()} or not at.looked:
                await to_thread.run_sync(lapse, outbox)
                at.looked = True
                gc.collect()  # older releases of AnyIO leave cancellations in reference cycles
            await outbox.run_due()
            assert scene.kept() == {}, f"at step {step}"
            done_here = sorted(each for each in ended if each.endswith(f" {step}"))
            both = [f"mail unit {step}", f"stock unit {step}"]
            assert done_here == both or (publishes == "outside" and done_here == []), (
                f"at step {step}"
            )

    assert step > 3
    assert publishes == "outside" or bus.stats.undelivered == 0
    assert (await outbox.stats()).lost == 0
