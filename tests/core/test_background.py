"""Units of work whose block does not wait for handlers: the lifespan's tasks deliver them."""

import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import pytest
from anyio import CancelScope, Event, create_task_group, to_thread, wait_all_tasks_blocked
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Backend, Exchange, client_of, lifespan_of
from tests.contract.bus import ignore
from tests.witness import assert_settled, witnessed

pytestmark = pytest.mark.anyio


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


class Gate:
    """A handler of strings that lets nothing go on before it is open, and what became of all."""

    def __init__(self, bus: EventBus) -> None:
        self.begun = Event()
        self.open = Event()
        self.seen = witnessed(bus)
        bus.subscribe(str, self.handle, name="gate")

    async def handle(self, event: str) -> None:
        self.begun.set()
        await self.open.wait()


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that has no lifespan of its own, and answers nothing."""
    assert scope["type"] == "lifespan"
    raise RuntimeError


async def test_with_a_lifespan_the_block_ends_before_the_handlers(bus: EventBus) -> None:
    gate = Gate(bus)

    async with lifespan_of(EventContextMiddleware(silent, bus)):
        async with bus.context(background=True) as unit:
            bus.publish("a")
        await gate.begun.wait()
        assert gate.seen == []
        assert not unit.closed
        with suppress(LookupError):
            async with bus.context(background=True):
                bus.publish("b")
                raise LookupError
        assert gate.seen == ["discarded b"]
        async with bus.context(background=True) as empty:
            pass
        assert empty.closed
        gate.open.set()

    assert gate.seen == ["discarded b", "handled a"]
    assert_settled(bus)


async def test_the_shutdown_waits_for_what_is_left_to_the_background(bus: EventBus) -> None:
    gate, trace = Gate(bus), list[str]()
    app = EventContextMiddleware(silent, bus)

    async with create_task_group() as tasks, lifespan_of(app, trace):
        async with bus.context(background=True):
            bus.publish("a")
        await gate.begun.wait()

        async def open_later() -> None:
            await wait_all_tasks_blocked()
            assert trace == ["startup.complete"]
            gate.open.set()

        tasks.start_soon(open_later)

    assert gate.seen == ["handled a"]
    assert trace == ["startup.complete", "shutdown.complete"]


async def test_without_a_lifespan_the_exit_waits(bus: EventBus) -> None:
    seen = witnessed(bus)

    @bus.on(str)
    async def handle(event: str) -> None:
        await wait_all_tasks_blocked()

    async with bus.context(background=True):
        bus.publish("a")

    assert seen == ["handled a"]


async def test_shutdown_code_that_follows_the_drain_waits_for_its_own_handlers(
    bus: EventBus,
) -> None:
    seen = witnessed(bus)

    @bus.on(str)
    async def handle(event: str) -> None:
        await wait_all_tasks_blocked()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        async with bus.context(background=True):
            bus.publish("bye")
        assert seen == ["handled bye"]

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)
    async with lifespan_of(app) as running:
        pass
    assert running.error is None
    async with bus.context(background=True):
        bus.publish("later")

    assert seen == ["handled bye", "handled later"]


async def test_a_cancellation_after_the_block_does_not_reach_the_handlers(bus: EventBus) -> None:
    gate = Gate(bus)

    async with lifespan_of(EventContextMiddleware(silent, bus)):
        with CancelScope() as scope:
            async with bus.context(background=True):
                bus.publish("a")
                scope.cancel()  # no checkpoint follows in the block
            await gate.begun.wait()
        assert scope.cancelled_caught
        await gate.begun.wait()
        assert gate.seen == []
        gate.open.set()

    assert gate.seen == ["handled a"]


async def test_inside_another_unit_the_outer_one_decides_when(bus: EventBus) -> None:
    seen = witnessed(bus)

    @bus.on(str)
    async def handle(event: str) -> None:
        await wait_all_tasks_blocked()

    async with lifespan_of(EventContextMiddleware(silent, bus)):
        async with bus.context() as outer:
            async with bus.context(background=True):
                bus.publish("a")
            assert [delivery.event for delivery in outer.pending] == ["a"]
        assert seen == ["handled a"]  # the outer one has waited

        with suppress(LookupError):
            async with bus.context():
                async with bus.context(background=True):
                    bus.publish("b")
                raise LookupError

    assert seen == ["handled a", "discarded b"]


async def test_an_independent_unit_in_a_unit_goes_to_the_background_by_itself(
    bus: EventBus,
) -> None:
    gate = Gate(bus)

    async with lifespan_of(EventContextMiddleware(silent, bus)):
        with suppress(LookupError):
            async with bus.context():
                async with bus.context(independent=True, background=True):
                    bus.publish("a")
                await gate.begun.wait()
                raise LookupError
        assert gate.seen == []
        gate.open.set()

    assert gate.seen == ["handled a"]


async def test_in_a_handler_it_is_a_savepoint_unless_it_is_independent(bus: EventBus) -> None:
    gate = Gate(bus)

    @bus.on(int)
    async def handle(event: int) -> None:
        async with bus.context(background=True):
            bus.publish("nested")
        async with bus.context(independent=True, background=True):
            bus.publish("independent")
        await gate.begun.wait()
        assert gate.seen == []
        gate.open.set()
        raise ValueError

    bus.report_failure = ignore
    async with lifespan_of(EventContextMiddleware(silent, bus)), bus.context():
        bus.publish(1)

    assert sorted(gate.seen) == ["discarded nested", "failed 1", "handled independent"]


async def test_more_units_than_concurrency_wait_in_line(bus: EventBus) -> None:
    gate = Gate(bus)

    async with lifespan_of(EventContextMiddleware(silent, bus, concurrency=1)):
        for event in ("a", "b"):
            async with bus.context(background=True):
                bus.publish(event)
        await gate.begun.wait()
        assert (bus.stats.units_draining, bus.stats.units_waiting) == (1, 1)
        gate.open.set()

    assert gate.seen == ["handled a", "handled b"]


async def test_in_a_worker_thread_the_block_ends_before_the_handlers(bus: EventBus) -> None:
    gate, loops = Gate(bus), list[threading.Thread]()

    @bus.on(str)
    async def where(event: str) -> None:
        loops.append(threading.current_thread())

    def job() -> None:
        with bus.context(background=True):
            bus.publish("a")

    async with lifespan_of(EventContextMiddleware(silent, bus)):
        await to_thread.run_sync(job)
        await gate.begun.wait()
        await wait_all_tasks_blocked()
        assert gate.seen == ["handled a"]  # by the other handler
        gate.open.set()

    assert gate.seen == ["handled a"] * 2
    assert loops == [threading.current_thread()]


def test_in_a_script_the_exit_waits(bus: EventBus) -> None:
    seen = witnessed(bus)

    @bus.on(str)
    async def handle(event: str) -> None:
        await wait_all_tasks_blocked()

    with bus.context(background=True):
        bus.publish("a")

    assert seen == ["handled a"]


# Several applications


async def test_of_several_apps_on_a_loop_the_one_that_opened_the_unit_delivers(
    bus: EventBus,
) -> None:
    gate, jobs = Gate(bus), dict[str, Event]()

    def app_of(name: str) -> ASGIApp:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
            async def job() -> None:
                await jobs.setdefault(name, Event()).wait()
                async with bus.context(background=True):
                    bus.publish(name)

            async with create_task_group() as tasks:
                tasks.start_soon(job)
                yield

        app = FastAPI(lifespan=lifespan)
        app.add_middleware(EventContextMiddleware, bus=bus, concurrency=1)
        return app

    async with lifespan_of(app_of("first")), lifespan_of(app_of("second")):
        await wait_all_tasks_blocked()
        for name in ("first", "second", "first"):
            jobs[name].set()
            await wait_all_tasks_blocked()
        assert bus.stats.units_draining == 2  # one in each, for neither delivers two at once
        async with bus.context(background=True):
            bus.publish("outside")
        assert bus.stats.units_waiting == 1  # in the last one that has begun
        gate.open.set()

    assert sorted(gate.seen) == ["handled first", "handled outside", "handled second"]


async def test_a_lifespan_on_another_event_loop_is_not_asked_by_code_on_this_one(
    bus: EventBus, anyio_backend: Backend
) -> None:
    seen, here = witnessed(bus), threading.current_thread()
    threads: list[threading.Thread] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        threads.append(threading.current_thread())

    app = Starlette()
    app.add_middleware(EventContextMiddleware, bus=bus)
    started, stop = threading.Event(), threading.Event()

    def serve() -> None:
        with client_of(app, anyio_backend):
            started.set()
            stop.wait()

    async with create_task_group() as tasks:
        tasks.start_soon(to_thread.run_sync, serve)
        await to_thread.run_sync(started.wait)
        async with bus.context(background=True):
            bus.publish("a")
        assert seen == ["handled a"]
        stop.set()

    assert threads == [here]


# Requests and websockets


class Socket:
    """A client of a websocket, as a server brings it to the app."""

    def __init__(self, *texts: str, spec_version: str | None) -> None:
        asgi = {"version": "3.0", **({"spec_version": spec_version} if spec_version else {})}
        self.scope: Scope = {"type": "websocket", "asgi": asgi, "path": "/", "headers": []}
        self._messages: list[Message] = [
            {"type": "websocket.connect"},
            *({"type": "websocket.receive", "text": text} for text in texts),
            {"type": "websocket.disconnect", "code": 1000},
        ]
        self.sent: list[str] = []

    async def run(self, app: ASGIApp) -> None:
        """Have the app serve it until the client leaves."""
        await app(self.scope, self._receive, self._send)

    async def _receive(self) -> Message:
        return self._messages.pop(0)

    async def _send(self, message: Message) -> None:
        if "text" in message:
            self.sent.append(message["text"])


def socket_app(bus: EventBus, seen: list[str], **options: object) -> ASGIApp:
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            async with bus.context(background=True):
                bus.publish(text)
            await socket.send_text(f"{text} after {seen}")

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    app.add_middleware(EventContextMiddleware, bus=bus, **options)  # type: ignore[arg-type]
    return app


async def test_the_client_of_a_websocket_does_not_wait_for_handlers(bus: EventBus) -> None:
    gate = Gate(bus)
    app = socket_app(bus, gate.seen)
    client = Socket("a", "b", spec_version="2.3")

    async with lifespan_of(app):
        await client.run(app)
        assert client.sent == ["a after []", "b after []"]
        await gate.begun.wait()
        gate.open.set()

    assert sorted(gate.seen) == ["handled a", "handled b"]


@pytest.mark.parametrize(
    ("spec_version", "options", "waits"),
    [
        (None, {}, True),
        (None, {"background": True}, False),
        ("2.3", {"background": False}, True),
    ],
)
async def test_a_websocket_waits_where_a_request_would(
    bus: EventBus, spec_version: str | None, options: dict[str, bool], waits: bool
) -> None:
    gate, client = Gate(bus), Socket("a", spec_version=spec_version)
    app = socket_app(bus, gate.seen, **options)

    async with lifespan_of(app), create_task_group() as tasks:
        tasks.start_soon(client.run, app)
        await gate.begun.wait()
        await wait_all_tasks_blocked()
        gate.open.set()

    assert client.sent == (["a after ['handled a']"] if waits else ["a after []"])


async def test_another_bus_that_waits_does_not_make_this_one_wait(bus: EventBus) -> None:
    gate, client = Gate(bus), Socket("a", spec_version="2.3")
    app = socket_app(bus, gate.seen)
    app = EventContextMiddleware(app, EventBus(name="other"), background=False)

    async with lifespan_of(app):
        await client.run(app)
        await gate.begun.wait()
        gate.open.set()

    assert client.sent == ["a after []"]


def test_a_test_client_finds_what_its_websocket_published_delivered(
    bus: EventBus, anyio_backend: Backend
) -> None:
    seen = witnessed(bus)

    @bus.on(str)
    async def handle(event: str) -> None:
        await wait_all_tasks_blocked()

    app = socket_app(bus, seen)
    with client_of(app, anyio_backend) as client, client.websocket_connect("/") as socket:
        socket.send_text("a")
        assert socket.receive_text() == "a after ['handled a']"


@pytest.mark.parametrize("spec_version", [None, "2.3"])
async def test_a_request_decides_for_the_units_inside_it(
    bus: EventBus, spec_version: str | None
) -> None:
    gate, steps = Gate(bus), list[str]()

    async def endpoint(_: Request) -> Response:
        async with bus.context(background=True):
            bus.publish("nested")
        async with bus.context(independent=True, background=True):
            bus.publish("independent")
        steps.append(f"after {gate.seen}")
        return Response(status_code=404)

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(EventContextMiddleware, bus=bus)

    async with lifespan_of(app), create_task_group() as tasks:
        tasks.start_soon(Exchange(spec_version=spec_version).run, app)
        await gate.begun.wait()
        await wait_all_tasks_blocked()
        gate.open.set()

    assert steps == (["after []"] if spec_version else ["after ['handled independent']"])
    assert sorted(gate.seen) == ["discarded nested", "handled independent"]


async def test_a_mounted_app_uses_the_lifespan_of_the_app_around_it(bus: EventBus) -> None:
    gate, client = Gate(bus), Socket("a", spec_version="2.3")
    inner = socket_app(bus, gate.seen)
    app = Starlette(routes=[Mount("/", inner)])
    app.add_middleware(EventContextMiddleware, bus=bus)

    async with lifespan_of(app), create_task_group() as tasks:
        tasks.start_soon(client.run, app)
        await gate.begun.wait()
        await wait_all_tasks_blocked()
        gate.open.set()

    assert client.sent == ["a after []"]
    assert_settled(bus)
