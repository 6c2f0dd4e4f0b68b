"""Delivery in the background: tasks of the application's lifespan, in process."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
import httpx
import pytest
import trio
from anyio import (
    CancelScope,
    Event,
    create_task_group,
    sleep,
    sleep_forever,
    wait_all_tasks_blocked,
)
from anyio.lowlevel import checkpoint
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware, Outcome
from tests.asgi import Backend, Exchange, Lifespan, client_of, lifespan_of, respond, traced
from tests.web.background import Asgi, Gate, publishing, request, wrapped
from tests.witness import assert_settled, virtual_time, witnessed

pytestmark = pytest.mark.anyio


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def trace(bus: EventBus) -> list[str]:
    return traced(bus)


# A lifespan runs, and a server asks.


async def test_the_call_returns_before_the_handlers_have_ended(bus: EventBus) -> None:
    trace: list[str] = []
    gate = Gate(bus, trace)
    app = wrapped(publishing(bus), bus)

    async with lifespan_of(app, trace):
        await request(app, "/1", trace=trace)
        await request(app, "/2", trace=trace)
        await gate.begun.wait()
        assert bus.stats.units_draining == 2
        gate.open.set()

    assert trace[:7] == ["startup.complete", *["start 200", "end of body", "returned"] * 2]
    assert sorted(trace[7:9]) == ["handled /1", "handled /2"]
    assert trace[9:] == ["shutdown.complete"]


def starlette_app(lifespan: Any, bus: EventBus) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        bus.publish(f"{request.state.database}")
        return PlainTextResponse()

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])], lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)
    return app


def fastapi_app(lifespan: Any, bus: EventBus) -> ASGIApp:
    app = FastAPI(lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)

    @app.post("/")
    async def endpoint(request: Request) -> None:
        bus.publish(f"{request.state.database}")

    return app


@pytest.mark.parametrize("make_app", [starlette_app, fastapi_app])
async def test_what_the_lifespan_closes_is_still_open_for_handlers(
    bus: EventBus, make_app: Callable[[Any, EventBus], ASGIApp]
) -> None:
    trace: list[str] = []
    gate = Gate(bus, trace)

    @asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncGenerator[dict[str, Any]]:
        trace.append("open")
        yield {"database": "the database"}
        trace.append("closed")

    app = make_app(lifespan, bus)
    async with create_task_group() as tasks, lifespan_of(app, trace) as running:
        exchange = Exchange(method="POST", spec_version="2.3")
        exchange.scope["state"] = running.scope["state"]
        await exchange.run(app)
        tasks.start_soon(running.stop)
        await wait_all_tasks_blocked()
        assert trace == ["open", "startup.complete"]
        gate.open.set()

    assert trace[2:] == ["handled the database", "closed", "shutdown.complete"]


async def test_at_the_deadline_the_application_closes_its_resources_and_the_server_is_answered(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    trace: list[str] = []
    seen = witnessed(bus)
    gate = Gate(bus)

    @asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncGenerator[None]:
        yield
        trace.append("closed")

    outer = Starlette(lifespan=lifespan)
    outer.mount("/", publishing(bus))
    app = wrapped(outer, bus, shutdown_timeout=0.01)
    async with lifespan_of(app, trace):
        await request(app, "/late")
        await gate.begun.wait()

    assert trace == ["startup.complete", "closed", "shutdown.complete"]
    assert seen == ["undelivered /late"]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[1:-2] == ["delivering before shutdown: bus=default left=1 handlers=gate x1"]
    assert messages[-1].startswith("eventkit has stopped: bus=default left=1 handlers=gate x1 ")
    assert_settled(bus)


@virtual_time
async def test_a_handler_that_cannot_be_ended_does_not_keep_the_server_waiting(
    bus: EventBus,
) -> None:
    @bus.on(str)
    async def stubborn(event: str) -> None:
        with CancelScope(shield=True):
            await sleep(3600)

    app = wrapped(publishing(bus), bus, shutdown_timeout=1)
    lifespan = Lifespan(app)
    async with create_task_group() as tasks:
        tasks.start_soon(lifespan.run)
        await lifespan.start()
        await request(app)
        begun = anyio.current_time()
        await lifespan.stop()
        assert anyio.current_time() - begun == 1.5
        assert lifespan.trace == ["startup.complete", "shutdown.complete"]

    assert lifespan.trace == ["startup.complete", "shutdown.complete"]
    assert_settled(bus)


async def test_a_request_in_its_tail_at_shutdown_is_waited_for(bus: EventBus) -> None:
    trace = traced(bus)
    commit = Event()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        await respond(send)
        await commit.wait()

    app = wrapped(serve_http_with(serve), bus)
    async with create_task_group() as tasks, lifespan_of(app, trace) as lifespan:
        tasks.start_soon(request, app)
        await wait_all_tasks_blocked()
        tasks.start_soon(lifespan.stop)
        await wait_all_tasks_blocked()
        assert trace == ["startup.complete"]
        commit.set()

    assert trace[1:] == ["handling ordered", "handled ordered", "shutdown.complete"]


def serve_http_with(serve: Asgi) -> Asgi:
    """An app with a proper lifespan and this for requests."""
    lifespan = Starlette()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (lifespan if scope["type"] == "lifespan" else serve)(scope, receive, send)

    return app


async def test_a_stream_that_has_published_nothing_does_not_hold_the_shutdown(
    bus: EventBus,
) -> None:
    trace = traced(bus)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await sleep_forever()

    app = wrapped(serve_http_with(serve), bus)
    async with create_task_group() as tasks:
        async with lifespan_of(app, trace):
            tasks.start_soon(request, app)
            await wait_all_tasks_blocked()
        assert trace == ["startup.complete", "shutdown.complete"]
        tasks.cancel_scope.cancel()


async def test_a_request_that_discards_its_events_and_goes_on_does_not_hold_the_shutdown(
    bus: EventBus,
) -> None:
    trace = traced(bus)
    gives_up, returns = Event(), Event()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        await gives_up.wait()
        bus.current_context().discard()
        await returns.wait()
        await respond(send)

    app = wrapped(serve_http_with(serve), bus)
    lifespan = Lifespan(app, trace)
    before_it_returns: list[str] = []
    async with create_task_group() as tasks:
        tasks.start_soon(lifespan.run)
        await lifespan.start()
        tasks.start_soon(request, app)
        await wait_all_tasks_blocked()
        tasks.start_soon(lifespan.stop)
        await wait_all_tasks_blocked()
        assert trace == ["startup.complete"]
        gives_up.set()
        await wait_all_tasks_blocked()
        before_it_returns = list(trace)
        returns.set()

    assert before_it_returns == ["startup.complete", "discarded ordered", "shutdown.complete"]


async def test_what_a_request_releases_after_the_lifespan_has_ended_is_undelivered(
    bus: EventBus,
) -> None:
    seen = witnessed(bus)
    traced(bus)
    go_on = Event()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        with suppress(Exception):
            bus.publish("late")
        await respond(send)

    app = wrapped(serve_http_with(serve), bus)
    async with create_task_group() as tasks:
        async with lifespan_of(app):
            tasks.start_soon(request, app)
            await wait_all_tasks_blocked()
        go_on.set()

    assert seen == []
    assert_settled(bus)


async def test_a_request_that_begins_after_the_last_delivery_delivers_by_itself(
    bus: EventBus,
) -> None:
    trace = traced(bus)
    ending, go_on = Event(), Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await publishing(bus)(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        ending.set()
        await go_on.wait()
        await send({"type": "lifespan.shutdown.complete"})

    wrapping = wrapped(app, bus)
    lifespan = Lifespan(wrapping)
    async with create_task_group() as tasks:
        tasks.start_soon(lifespan.run)
        await lifespan.start()
        tasks.start_soon(lifespan.stop)
        await ending.wait()
        await request(wrapping)
        assert trace == ["handling /", "handled /"]
        go_on.set()

    assert_settled(bus)


async def test_a_handler_that_fails_in_the_background_is_logged_and_the_next_request_served(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    trace = traced(bus)

    @bus.on(str)
    async def fail(event: str) -> None:
        raise RuntimeError("no mail today")

    app = wrapped(publishing(bus), bus)
    async with lifespan_of(app):
        for path in ("/1", "/2"):
            assert (await request(app, path)).status == 200

    assert bus.stats.failed == 2
    assert sorted(trace) == ["handled /1", "handled /2", "handling /1", "handling /2"]
    assert sum("no mail today" in str(record.exc_info) for record in caplog.records) == 2


async def test_nothing_delays_the_endpoints_own_error(bus: EventBus) -> None:
    gate = Gate(bus)
    app = wrapped(publishing(bus, error=ZeroDivisionError(), even_on_failure=True), bus)

    async with lifespan_of(app):
        with pytest.raises(ZeroDivisionError):
            await request(app, "/failed")
        assert gate.trace == []
        gate.open.set()

    assert gate.trace == ["handled /failed"]


async def test_a_stream_delivers_midway_by_itself_and_the_rest_in_the_background(
    bus: EventBus,
) -> None:
    trace = traced(bus)

    async def parts() -> AsyncIterator[str]:
        bus.publish("opened")
        await bus.current_context().drain()
        yield "one"
        bus.publish("closed")

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(parts())

    app = wrapped(Starlette(routes=[Route("/", endpoint, methods=["POST"])]), bus)
    async with lifespan_of(app):
        await request(app, trace=trace)

    assert trace == [
        "start 200",
        "handling opened",
        "handled opened",
        "body one",
        "end of body",
        "returned",
        "handling closed",
        "handled closed",
    ]


async def test_a_thousand_requests_at_once_are_all_delivered_few_at_a_time(bus: EventBus) -> None:
    at_once: list[int] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        at_once.append(bus.stats.units_draining)
        await checkpoint()

    app = wrapped(publishing(bus), bus, concurrency=3)
    async with lifespan_of(app), create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(request, app, f"/{number}")

    assert len(at_once) == 1000
    assert max(at_once) == 3
    assert_settled(bus)


# Several buses and several middlewares.


async def test_with_several_buses_each_is_delivered_and_the_shutdown_waits_for_all() -> None:
    buses = [EventBus(name=name) for name in ("orders", "users", "mails")]
    trace: list[str] = []
    gates = [Gate(bus, trace) for bus in buses]
    app = wrapped(publishing(*buses), *buses)

    async with create_task_group() as tasks, lifespan_of(app, trace) as lifespan:
        await request(app, "/all")
        tasks.start_soon(lifespan.stop)
        for gate in gates:
            await gate.begun.wait()
            await wait_all_tasks_blocked()
            assert "shutdown.complete" not in trace
            gate.open.set()

    assert trace == ["startup.complete", *["handled /all"] * 3, "shutdown.complete"]
    assert [bus.stats.handled for bus in buses] == [1, 1, 1]


async def test_the_same_bus_twice_has_one_crew(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    trace = traced(bus)
    app = wrapped(publishing(bus), bus, bus)

    async with lifespan_of(app, trace):
        await request(app, "/once")

    assert trace == [
        "startup.complete",
        "handling /once",
        "handled /once",
        "shutdown.complete",
    ]
    stops = [r for r in caplog.records if r.getMessage().startswith("eventkit has stopped")]
    assert len(stops) == 1


def strict(outcome: Outcome) -> bool:
    return outcome.status == 200


OTHER_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"concurrency": 8}, "concurrency=4 outside and concurrency=8 inside"),
    ({"max_pending": None}, "max_pending=10000 outside and max_pending=None inside"),
    ({"overload_timeout": 1}, "overload_timeout=5.0 outside and overload_timeout=1 inside"),
    ({"shutdown_timeout": 8}, "shutdown_timeout=20.0 outside and shutdown_timeout=8 inside"),
    ({"background": True}, "background=None outside and background=True inside"),
    (
        {"deliver_if": strict, "concurrency": 1},
        "deliver_if=eventkit.starlette:succeeded outside and "
        "deliver_if=tests.web.test_lifespan:strict inside, "
        "concurrency=4 outside and concurrency=1 inside",
    ),
]


@pytest.mark.parametrize("inner_app", [Starlette, FastAPI])
@pytest.mark.parametrize(("options", "difference"), OTHER_OPTIONS)
async def test_the_same_bus_twice_with_other_options_is_an_error_at_start_up(
    bus: EventBus,
    options: dict[str, Any],
    difference: str,
    inner_app: Callable[[], Starlette | FastAPI],
) -> None:
    app = inner_app()
    app.add_middleware(EventContextMiddleware, bus=bus, **options)
    app.add_middleware(EventContextMiddleware, bus=EventBus(name="another"))
    app.add_middleware(EventContextMiddleware, bus=bus)
    lifespan = Lifespan(app)

    await lifespan_fails(lifespan)

    assert lifespan.trace == ["startup.failed"]
    assert isinstance(lifespan.error, ValueError)
    assert str(lifespan.error) == (
        "EventContextMiddleware was added twice to one application for the bus 'default', with "
        f"different options: {difference}. Remove one of the two"
    )


async def lifespan_fails(lifespan: Lifespan) -> None:
    async with create_task_group() as tasks:
        tasks.start_soon(lifespan.run)
        await lifespan.start()
        tasks.cancel_scope.cancel()


async def test_a_middleware_around_an_app_that_has_it_too_is_the_same_bus_twice(
    bus: EventBus,
) -> None:
    app = Starlette()
    app.add_middleware(EventContextMiddleware, bus=bus, concurrency=8)
    lifespan = Lifespan(wrapped(app, bus))

    await lifespan_fails(lifespan)

    assert lifespan.trace == ["startup.failed"]
    assert isinstance(lifespan.error, ValueError)


async def test_a_mounted_app_with_other_options_shares_the_context(
    bus: EventBus, trace: list[str]
) -> None:
    inner = Starlette()
    inner.add_middleware(EventContextMiddleware, bus=bus, concurrency=8)
    inner.mount("/", publishing(bus))
    outer = Starlette()
    outer.add_middleware(EventContextMiddleware, bus=bus)
    outer.mount("/inner", inner)

    async with lifespan_of(outer):
        await request(outer, "/inner/once")

    assert trace == ["handling /inner/once", "handled /inner/once"]


def test_one_app_is_served_on_one_event_loop_after_the_other(bus: EventBus) -> None:
    trace = traced(bus)
    app = wrapped(publishing(bus), bus)

    async def serve(path: str) -> None:
        async with lifespan_of(app, trace):
            await request(app, path)
            await wait_all_tasks_blocked()
            trace.append("served")

    for backend in ("asyncio", "trio"):
        anyio.run(partial(serve, f"/{backend}"), backend=backend)
        assert trace == [
            "startup.complete",
            f"handling /{backend}",
            f"handled /{backend}",
            "served",
            "shutdown.complete",
        ]
        trace.clear()


def test_one_app_on_several_event_loops_at_once_delivers_each_request_on_its_own(
    bus: EventBus,
) -> None:
    at_home: list[bool] = []

    @bus.on(str)
    async def note(event: str) -> None:
        at_home.append(event == f"/{threading.get_ident()}")

    app = wrapped(publishing(bus), bus)
    backends = ["asyncio", "trio"] * 2
    together = threading.Barrier(len(backends))

    async def serve() -> None:
        async with lifespan_of(app):
            together.wait(10)
            for _ in range(3):
                await request(app, f"/{threading.get_ident()}")
            await wait_all_tasks_blocked()
            together.wait(10)

    def serve_on(backend: str) -> None:
        anyio.run(serve, backend=backend)

    with ThreadPoolExecutor(len(backends)) as threads:
        list(threads.map(serve_on, backends))

    assert at_home == [True] * 12
    assert_settled(bus)


IN_THE_REQUEST = ["start 200", "end of body", "handling /", "handled /", "returned"]
IN_THE_BACKGROUND = ["start 200", "end of body", "returned", "handling /", "handled /"]


async def way_of(app: ASGIApp, trace: list[str]) -> list[str]:
    """What is noted of one request, until it is delivered."""
    trace.clear()
    await request(app, trace=trace)
    await wait_all_tasks_blocked()
    return list(trace)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_lifespan_on_a_loop_that_stands_still_is_left_alone_by_other_loops_of_its_thread(
    bus: EventBus, trace: list[str], backend: str
) -> None:
    app = wrapped(publishing(bus), bus)
    lifespan = Lifespan(app)
    with asyncio.Runner() as still:
        running = still.get_loop().create_task(lifespan.run())
        still.run(lifespan.start())

        assert anyio.run(way_of, app, trace, backend=backend) == IN_THE_REQUEST
        assert still.run(way_of(app, trace)) == IN_THE_BACKGROUND

        still.run(lifespan.stop())
        still.get_loop().run_until_complete(running)
    assert anyio.run(way_of, app, trace, backend=backend) == IN_THE_REQUEST


async def as_guest(main: Callable[[], Awaitable[Any]]) -> Any:
    """What it returns, run by Trio as a guest on the loop of asyncio that runs the caller."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    trio.lowlevel.start_guest_run(
        main,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        done_callback=ended.set_result,
        host_uses_signal_set_wakeup_fd=True,
    )
    return (await ended).unwrap()


async def test_a_guest_of_the_loop_that_a_lifespan_runs_on_is_a_loop_of_its_own(
    bus: EventBus, trace: list[str], anyio_backend: Backend
) -> None:
    if anyio_backend[0] != "asyncio":
        pytest.skip("the host is asyncio's")
    app = wrapped(publishing(bus), bus)

    async def serve() -> list[str]:
        async with lifespan_of(app):
            return await way_of(app, trace)

    async with lifespan_of(app):
        assert await as_guest(partial(way_of, app, trace)) == IN_THE_REQUEST
        assert await as_guest(serve) == IN_THE_BACKGROUND
        assert await way_of(app, trace) == IN_THE_BACKGROUND
    assert await as_guest(partial(way_of, app, trace)) == IN_THE_REQUEST


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_of_two_lifespans_on_one_loop_the_one_that_goes_on_delivers(
    bus: EventBus, trace: list[str], order: tuple[int, int]
) -> None:
    app = wrapped(publishing(bus), bus)
    lifespans = [Lifespan(app), Lifespan(app)]

    async with create_task_group() as tasks:
        for lifespan in lifespans:
            tasks.start_soon(lifespan.run)
            await lifespan.start()
        for ends in order:
            assert await way_of(app, trace) == IN_THE_BACKGROUND
            await lifespans[ends].stop()
            await wait_all_tasks_blocked()
    assert await way_of(app, trace) == IN_THE_REQUEST


# Apps that have no lifespan, or a broken one.


async def raises_at_once(receive: Receive, send: Send) -> None:
    raise LookupError("only HTTP here")


async def returns_at_once(receive: Receive, send: Send) -> None:
    await checkpoint()


async def returns_when_started(receive: Receive, send: Send) -> None:
    await receive()


async def leaves_when_started(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})


async def says_no_farewell(receive: Receive, send: Send) -> None:
    await leaves_when_started(receive, send)
    await receive()


@pytest.mark.parametrize(
    ("lifespan", "farewell"),
    [
        (raises_at_once, True),
        (returns_at_once, True),
        (returns_when_started, True),
        (leaves_when_started, True),
        (says_no_farewell, False),
    ],
)
async def test_an_app_without_a_whole_lifespan_still_delivers_in_the_background(
    bus: EventBus, lifespan: Callable[[Receive, Send], Awaitable[None]], farewell: bool
) -> None:
    trace: list[str] = []
    gate = Gate(bus, trace)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        else:
            await publishing(bus)(scope, receive, send)

    outer = wrapped(app, bus)
    async with lifespan_of(outer, trace) as running:
        await request(outer, "/1", trace=trace)
        await gate.begun.wait()
        gate.open.set()

    assert trace == [
        "startup.complete",
        "start 200",
        "end of body",
        "returned",
        "handled /1",
        *(["shutdown.complete"] if farewell else []),
    ]
    assert running.error is None


async def waits_for_the_server(receive: Receive) -> None:
    await receive()


async def gives_up_waiting(receive: Receive) -> None:
    """Ask for the server's message, and fail before it has come."""
    with CancelScope() as scope:
        scope.cancel()
        await receive()


@pytest.mark.parametrize("buses", [1, 2])
@pytest.mark.parametrize("asks", [waits_for_the_server, gives_up_waiting])
async def test_a_start_up_that_fails_without_saying_so_reaches_the_server(
    asks: Callable[[Receive], Awaitable[None]], buses: int
) -> None:
    error = LookupError("no database")
    trace: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asks(receive)
        raise error

    lifespan = Lifespan(wrapped(app, *(EventBus() for _ in range(buses))), trace)
    async with create_task_group() as tasks:
        tasks.start_soon(lifespan.run)
        if asks is waits_for_the_server:
            await lifespan.start()
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()

    assert lifespan.error is error
    assert trace == []


@pytest.mark.parametrize("error", [LookupError("no database"), SystemExit(3)])
async def test_a_start_up_that_fails_is_told_to_the_server_unchanged(
    bus: EventBus, error: BaseException
) -> None:
    @asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncGenerator[None]:
        await checkpoint()
        raise error
        yield

    async with lifespan_of(wrapped(Starlette(lifespan=lifespan), bus)) as running:
        assert running.trace == ["startup.failed"]

    assert running.error is error
    assert running.trace == ["startup.failed"]


async def test_an_app_that_exits_before_it_answers_is_not_spoken_for(bus: EventBus) -> None:
    error = SystemExit(3)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    async with lifespan_of(wrapped(app, bus)) as running:
        assert running.error is error
    assert running.trace == []


async def test_a_shutdown_that_fails_is_told_to_the_server_unchanged(bus: EventBus) -> None:
    error = LookupError("the database is gone")
    trace = traced(bus)

    @asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncGenerator[None]:
        yield
        raise error

    outer = Starlette(lifespan=lifespan)
    outer.mount("/", publishing(bus))
    app = wrapped(outer, bus)
    async with lifespan_of(app, trace) as running:
        await request(app, "/1")

    assert running.error is error
    assert trace == ["startup.complete", "handling /1", "handled /1", "shutdown.failed"]


async def test_a_lifespan_that_breaks_midway_delivers_what_there_is_and_later_requests_do_so_inline(
    bus: EventBus,
) -> None:
    error = LookupError("the heartbeat has failed")
    fails = Event()
    trace = traced(bus)
    http = publishing(bus)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await http(scope, receive, send)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await fails.wait()
        raise error

    outer = wrapped(app, bus)
    lifespan = Lifespan(outer, trace)
    async with create_task_group() as tasks:
        tasks.start_soon(lifespan.run)
        await lifespan.start()
        await request(outer, "/before")
        fails.set()
        await lifespan.ended()
        await request(outer, "/after", trace=trace)

    assert lifespan.error is error
    assert trace == [
        "startup.complete",
        "handling /before",
        "handled /before",
        "start 200",
        "end of body",
        "handling /after",
        "handled /after",
        "returned",
    ]


async def test_when_the_lifespan_is_cancelled_everything_is_accounted_for(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    seen = witnessed(bus)
    Gate(bus)
    app = wrapped(publishing(bus), bus, concurrency=1)

    async with create_task_group() as tasks:
        lifespan = Lifespan(app)
        tasks.start_soon(lifespan.run)
        await lifespan.start()
        for path in ("/1", "/2"):
            await request(app, path)
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()

    assert sorted(seen) == ["undelivered /1", "undelivered /2"]
    assert caplog.messages[-1].startswith("eventkit has stopped: bus=default left=")
    assert " undelivered=2 requeued=0 pending=0 running=0 " in caplog.messages[-1]
    assert_settled(bus)


async def test_a_background_task_of_the_lifespan_that_fails_during_the_close_ends_it(
    bus: EventBus,
) -> None:
    seen = witnessed(bus)
    Gate(bus)
    fails = Event()

    async def heartbeat() -> None:
        await fails.wait()
        raise LookupError("the heartbeat has failed")

    @asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncGenerator[None]:
        async with create_task_group() as tasks:
            tasks.start_soon(heartbeat)
            yield

    outer = Starlette(lifespan=lifespan)
    outer.mount("/", publishing(bus))
    app = wrapped(outer, bus)
    async with create_task_group() as tasks, lifespan_of(app) as running:
        await request(app, "/1")
        tasks.start_soon(running.stop)
        await wait_all_tasks_blocked()
        fails.set()

    assert seen == ["undelivered /1"]
    assert isinstance(running.error, ExceptionGroup)
    assert_settled(bus)


@pytest.mark.parametrize("steps", range(0, 60, 4))
async def test_wherever_the_lifespan_is_cancelled_every_delivery_is_accounted_for(
    bus: EventBus, steps: int
) -> None:
    traced(bus)
    app = wrapped(publishing(bus), bus, concurrency=1)

    async def serve() -> None:
        async with lifespan_of(app):
            for path in ("/1", "/2", "/3"):
                await request(app, path)

    async with create_task_group() as tasks:
        tasks.start_soon(serve)
        for _ in range(steps):
            await checkpoint()
        tasks.cancel_scope.cancel()

    assert_settled(bus)
    before = bus.stats.handled
    await Exchange().run(app)
    assert bus.stats.handled == before + 1


# Handing over.


async def test_a_scope_that_was_cancelled_does_not_take_the_events_of_a_request_that_succeeded(
    bus: EventBus,
) -> None:
    trace = traced(bus)
    scopes: list[CancelScope] = []

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        await respond(send)
        scopes[0].cancel()

    app = wrapped(serve_http_with(serve), bus)
    async with lifespan_of(app):
        with CancelScope() as scope:
            scopes.append(scope)
            await request(app)
            await checkpoint()
        assert scope.cancelled_caught

    assert trace == ["handling ordered", "handled ordered"]


@pytest.mark.parametrize("background", [True, False])
async def test_a_native_cancellation_does_not_take_them_where_there_is_a_lifespan(
    bus: EventBus, background: bool, anyio_backend: Backend
) -> None:
    if anyio_backend[0] != "asyncio":
        pytest.skip("native cancellation is asyncio's")
    seen = witnessed(bus)
    traced(bus)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        await respond(send)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    app = wrapped(serve_http_with(serve), bus, background=background)
    async with lifespan_of(app):
        task = asyncio.ensure_future(request(app))
        await asyncio.wait([task])

    # A shield stops scopes only: without a task of its own delivery ends with the request's.
    assert seen == ["handled ordered" if background else "undelivered ordered"]
    assert task.cancelled() is not background or task.done()
    assert_settled(bus)


async def test_a_request_that_is_closed_from_outside_holds_no_shutdown(bus: EventBus) -> None:
    seen = witnessed(bus)
    traced(bus)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        raise GeneratorExit

    app = wrapped(serve_http_with(serve), bus)
    async with lifespan_of(app):
        with pytest.raises(GeneratorExit):
            await request(app)

    assert seen == ["discarded ordered"]


# In-process clients see everything done.


@pytest.mark.parametrize("lifespan", [True, False])
def test_a_test_client_sees_everything_done_with_a_lifespan_and_without(
    bus: EventBus, trace: list[str], anyio_backend: Backend, lifespan: bool
) -> None:
    client = client_of(wrapped(publishing(bus), bus), anyio_backend)

    if not lifespan:
        client.post("/1")
        assert trace == ["handling /1", "handled /1"]
        return
    with client:
        client.post("/1")
        assert trace == ["handling /1", "handled /1"]
        client.post("/2")
        assert trace[2:] == ["handling /2", "handled /2"]


@pytest.mark.parametrize("lifespan", [True, False])
async def test_httpx_sees_everything_done_with_an_explicit_lifespan_and_without(
    bus: EventBus, trace: list[str], lifespan: bool
) -> None:
    app = wrapped(publishing(bus), bus)
    transport = httpx.ASGITransport(app)  # pyright: ignore[reportArgumentType]

    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        if not lifespan:
            await client.post("/1")
            assert trace == ["handling /1", "handled /1"]
            return
        async with lifespan_of(app):
            await client.post("/1")
            assert trace == ["handling /1", "handled /1"]


def test_with_background_true_a_test_client_has_the_response_first(
    bus: EventBus, anyio_backend: Backend
) -> None:
    trace: list[str] = []
    goes_on = threading.Event()

    @bus.on(str)
    def handle(event: str) -> None:
        assert goes_on.wait(10)
        trace.append(f"handled {event}")

    app = wrapped(publishing(bus), bus, background=True)
    with client_of(app, anyio_backend) as client:
        assert client.post("/1").status_code == 200
        assert trace == []
        goes_on.set()
    assert trace == ["handled /1"]

    client_of(app, anyio_backend).post("/2")  # no lifespan, so it does so itself
    assert trace == ["handled /1", "handled /2"]


async def test_with_background_true_a_client_without_the_mark_does_not_wait(bus: EventBus) -> None:
    gate = Gate(bus)
    app = wrapped(publishing(bus), bus, background=True)

    async with lifespan_of(app):
        await Exchange("/1").run(app)
        assert gate.trace == []
        gate.open.set()

    assert gate.trace == ["handled /1"]


async def test_with_background_false_a_server_waits_too(bus: EventBus, trace: list[str]) -> None:
    app = wrapped(publishing(bus), bus, background=False)

    async with lifespan_of(app):
        await request(app, "/1")
        assert trace == ["handling /1", "handled /1"]


async def test_without_a_lifespan_a_server_waits_too(bus: EventBus, trace: list[str]) -> None:
    await request(wrapped(publishing(bus), bus), "/1")

    assert trace == ["handling /1", "handled /1"]
