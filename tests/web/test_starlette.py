"""The middleware's part at the end of a request: what is delivered, and what may go wrong."""

import functools
import gc
import inspect
import logging
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from anyio import CancelScope, sleep_forever
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware, Outcome, succeeded
from tests.asgi import Backend, Exchange, client_of, respond, traced

pytestmark = pytest.mark.anyio

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

DELIVERED = ["handling ordered", "handled ordered"]
DISCARDED = ["discarded ordered"]


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def trace(bus: EventBus) -> list[str]:
    return traced(bus)


def publishing(
    bus: EventBus, *, status: int = 200, error: BaseException | None = None, **publish: Any
) -> Asgi:
    """An app that publishes one event, then raises or responds."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered", **publish)
        if error is not None:
            raise error
        await respond(send, status, (b"one", b"two"))

    return app


# What deliver_if is told, and what its answer does.


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((status, DELIVERED) for status in (200, 204, 304, 399)),
        *((status, DISCARDED) for status in (400, 404, 500)),
    ],
)
async def test_by_default_a_status_below_400_delivers(
    bus: EventBus, trace: list[str], status: int, expected: list[str]
) -> None:
    await Exchange().run(EventContextMiddleware(publishing(bus, status=status), bus))

    assert trace == expected


@pytest.mark.parametrize(
    ("status", "complete", "error", "expected"),
    [
        (200, True, None, True),
        (200, False, None, True),
        (399, True, None, True),
        (400, True, None, False),
        (200, True, ValueError(), False),
        (200, True, KeyboardInterrupt(), False),
        (None, False, None, False),
    ],
)
def test_the_default_is_public_and_looks_at_exception_and_status(
    status: int | None, complete: bool, error: BaseException | None, expected: bool
) -> None:
    assert succeeded(Outcome({}, status, complete, error)) is expected


ERROR = ZeroDivisionError()


@pytest.mark.parametrize(
    ("app", "exchange", "status", "complete", "error"),
    [
        pytest.param({}, {}, 200, True, None, id="responds"),
        pytest.param({"status": 409}, {}, 409, True, None, id="refuses"),
        pytest.param({"error": ERROR}, {}, None, False, ERROR, id="raises"),
        pytest.param(
            {}, {"leaves": True, "spec_version": "2.4"}, 200, False, None, id="client leaves"
        ),
    ],
)
async def test_deliver_if_is_told_how_the_request_ended(
    bus: EventBus,
    trace: list[str],
    app: dict[str, Any],
    exchange: dict[str, Any],
    status: int | None,
    complete: bool,
    error: BaseException | None,
) -> None:
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> bool:
        outcomes.append(outcome)
        return True

    request = Exchange(**exchange)
    wrapped = EventContextMiddleware(publishing(bus, **app), bus, deliver_if=note)
    with suppress(ZeroDivisionError, OSError):
        await request.run(wrapped)

    assert outcomes == [Outcome(request.scope, status, complete, error)]
    assert outcomes[0].scope is request.scope


async def test_deliver_if_is_told_of_a_client_that_has_left_before_the_response(
    bus: EventBus, trace: list[str]
) -> None:
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> bool:
        outcomes.append(outcome)
        return succeeded(outcome)

    async def gone(_: Message) -> None:
        await checkpoint()
        raise OSError("the client has left")

    scope = Exchange().scope
    wrapped = EventContextMiddleware(publishing(bus), bus, deliver_if=note)
    with pytest.raises(OSError, match="has left"):
        await wrapped(scope, checkpoint, gone)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

    assert outcomes == [Outcome(scope, 200, False, None)]
    assert trace == DELIVERED


async def test_that_a_client_has_left_is_forgotten_where_the_app_minds_it_not(
    bus: EventBus, trace: list[str]
) -> None:
    class Gone(OSError):
        """That the client has left."""

    raised: list[weakref.ref[Gone]] = []

    async def gone(_: Message) -> None:
        await checkpoint()
        error = Gone()
        raised.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        with suppress(OSError):
            await respond(send)

    wrapped = EventContextMiddleware(app, bus)
    gc.collect()
    gc.disable()
    try:
        await wrapped(Exchange().scope, checkpoint, gone)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        assert [error() for error in raised] == [None]
    finally:
        gc.enable()
    assert trace == DELIVERED


@pytest.mark.parametrize(("answer", "expected"), [(True, DELIVERED), (False, DISCARDED)])
@pytest.mark.parametrize("status", [200, 500])
async def test_the_answer_of_deliver_if_goes_before_the_status(
    bus: EventBus, trace: list[str], status: int, answer: bool, expected: list[str]
) -> None:
    app = publishing(bus, status=status)

    await Exchange().run(EventContextMiddleware(app, bus, deliver_if=lambda _: answer))

    assert trace == expected


async def test_a_deliver_if_that_raises_is_logged_and_counts_as_no(
    bus: EventBus, trace: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def deliver_if(_: Outcome) -> bool:
        raise LookupError("no such rule")

    exchange = Exchange()
    await exchange.run(EventContextMiddleware(publishing(bus), bus, deliver_if=deliver_if))

    assert exchange.status == 200
    assert trace == DISCARDED
    (error,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert error.getMessage().startswith(
        "deliver_if failed, so the request's events are discarded: bus=default"
    )
    assert error.exc_info is not None
    assert error.exc_info[0] is LookupError


def yields(_: Outcome) -> Generator[bool]:
    yield False


async def yields_later(_: Outcome) -> AsyncGenerator[bool]:
    yield False


@pytest.mark.parametrize("asked", [yields, yields_later])
async def test_a_deliver_if_that_returns_a_generator_is_logged_and_counts_as_no(
    bus: EventBus,
    trace: list[str],
    caplog: pytest.LogCaptureFixture,
    asked: Callable[[Outcome], Any],
) -> None:
    def deliver_if(outcome: Outcome) -> Any:
        return asked(outcome)

    await Exchange().run(EventContextMiddleware(publishing(bus), bus, deliver_if=deliver_if))

    assert trace == DISCARDED
    (line,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert line.exc_info is not None
    assert str(line.exc_info[1]).endswith(", which nobody iterates: it has to return a bool")


@pytest.mark.parametrize("status", [200, 500])
async def test_a_deliver_if_that_returns_a_coroutine_is_logged_and_counts_as_no(
    bus: EventBus, trace: list[str], caplog: pytest.LogCaptureFixture, status: int
) -> None:
    coroutines: list[Coroutine[object, object, bool]] = []

    def deliver_if(outcome: Outcome) -> Any:
        coroutines.append(ask_a_database(outcome))
        return coroutines[-1]

    exchange = Exchange()
    app = publishing(bus, status=status)
    await exchange.run(EventContextMiddleware(app, bus, deliver_if=deliver_if))

    assert exchange.status == status
    assert trace == DISCARDED
    (coroutine,) = coroutines
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
    (line,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert line.getMessage().startswith(
        "deliver_if failed, so the request's events are discarded: bus=default"
    )
    assert line.exc_info is not None
    assert str(line.exc_info[1]) == (
        f"deliver_if returned {coroutine!r}, which nobody awaits: it has to return a bool"
    )


class Later:
    """What can be awaited, and is no coroutine."""

    def __await__(self) -> Generator[object, None, bool]:
        return ask_a_database(Outcome({}, 200, True, None)).__await__()


async def test_a_deliver_if_that_returns_another_awaitable_counts_as_no(
    bus: EventBus, trace: list[str]
) -> None:
    later: Any = Later()

    await Exchange().run(EventContextMiddleware(publishing(bus), bus, deliver_if=lambda _: later))

    assert trace == DISCARDED


async def test_a_plain_function_that_wraps_an_async_one_may_be_the_rule(
    bus: EventBus, trace: list[str]
) -> None:
    @functools.wraps(ask_a_database)
    def rule(outcome: Outcome) -> bool:
        return outcome.status == 200

    await Exchange().run(EventContextMiddleware(publishing(bus), bus, deliver_if=rule))

    assert trace == DELIVERED


async def test_a_deliver_if_that_raises_does_not_mask_the_endpoints_error(
    bus: EventBus, trace: list[str]
) -> None:
    def deliver_if(_: Outcome) -> bool:
        raise LookupError

    app = publishing(bus, error=ERROR)
    with pytest.raises(ZeroDivisionError) as raised:
        await Exchange().run(EventContextMiddleware(app, bus, deliver_if=deliver_if))

    assert raised.value is ERROR
    assert trace == DISCARDED


@pytest.mark.parametrize("error", [None, ZeroDivisionError()])
async def test_what_is_published_even_on_failure_is_delivered_when_the_request_fails(
    bus: EventBus, trace: list[str], error: Exception | None
) -> None:
    app = EventContextMiddleware(
        publishing(bus, status=401, error=error, even_on_failure=True), bus
    )
    with suppress(ZeroDivisionError):
        await Exchange().run(app)

    assert trace == DELIVERED


# The endpoint decides before the outcome does.


@pytest.mark.parametrize("status", [200, 409])
@pytest.mark.parametrize("released", [True, False])
async def test_release_and_discard_in_the_endpoint_decide_over_the_status(
    bus: EventBus, trace: list[str], status: int, released: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("ordered")
        if released:
            bus.current_context().release()
        else:
            bus.current_context().discard()
        bus.publish("afterwards")
        await respond(send, status)

    await Exchange().run(EventContextMiddleware(app, bus))

    delivered, discarded = (["handling afterwards", "handled afterwards"], ["discarded afterwards"])
    assert sorted(trace) == sorted(
        [*(DELIVERED if released else DISCARDED), *(delivered if status == 200 else discarded)]
    )


async def test_an_endpoint_can_deliver_midway_whatever_becomes_of_the_request(
    bus: EventBus, trace: list[str]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("imported the first half")
        report = await bus.current_context().drain()
        assert (report.handled, report.failures) == (1, ())
        bus.publish("ordered")
        await respond(send, 409)

    await Exchange(trace=trace).run(EventContextMiddleware(app, bus))

    assert trace == [
        "handling imported the first half",
        "handled imported the first half",
        "start 409",
        "end of body",
        "discarded ordered",
        "returned",
    ]


# Handlers that go wrong.


@pytest.fixture
def failing(bus: EventBus) -> EventBus:
    @bus.on(str)
    async def fail(event: str) -> None:
        raise RuntimeError("no mail today")

    return bus


async def test_a_failing_handler_is_logged_and_never_reaches_the_client(
    failing: EventBus, trace: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    exchange = Exchange()

    await exchange.run(EventContextMiddleware(publishing(failing), failing))

    assert (exchange.status, exchange.body) == (200, b"onetwo")
    assert trace == DELIVERED
    assert failing.stats.failed == 1
    (failure,) = (record.getMessage() for record in caplog.records if record.exc_info)
    assert failure.startswith("event handler failed: event_type=builtins.str handler=")


async def test_a_failing_handler_does_not_mask_the_endpoints_error(
    failing: EventBus, trace: list[str]
) -> None:
    error = ZeroDivisionError()
    app = publishing(failing, error=error, even_on_failure=True)

    with pytest.raises(ZeroDivisionError) as raised:
        await Exchange().run(EventContextMiddleware(app, failing))

    assert raised.value is error
    assert error.__context__ is None
    assert failing.stats.failed == 1


def test_a_test_client_gets_the_500_and_the_events_are_discarded(
    bus: EventBus, trace: list[str], anyio_backend: Backend
) -> None:
    def endpoint(_: Request) -> Response:
        bus.publish("ordered")
        raise ZeroDivisionError

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(EventContextMiddleware, bus=bus)

    response = client_of(app, anyio_backend, raises=False).get("/")

    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert trace == DISCARDED


def test_a_test_client_sees_what_handlers_did_as_soon_as_it_has_the_response(
    bus: EventBus, trace: list[str], anyio_backend: Backend
) -> None:
    client = client_of(EventContextMiddleware(publishing(bus), bus), anyio_backend)

    assert client.get("/").text == "onetwo"
    assert trace == DELIVERED


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_a_handler_that_ends_the_process_does(
    bus: EventBus, error: type[BaseException]
) -> None:
    @bus.on(str)
    async def interrupt(event: str) -> None:
        raise error

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish("first", "second")
        await respond(send)

    exchange = Exchange()
    with pytest.raises(error):
        await exchange.run(EventContextMiddleware(app, bus))

    assert exchange.trace[:2] == ["start 200", "end of body"]
    stats = bus.stats
    assert (stats.accepted, stats.undelivered) == (2, 2)
    assert (stats.pending, stats.running) == (0, 0)


async def test_what_handlers_cannot_do_within_the_deadline_is_counted_and_logged_as_undelivered(
    bus: EventBus, trace: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    @bus.on(int)
    async def hang(event: int) -> None:
        await sleep_forever()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bus.publish(1)
        bus.publish("ordered")
        await respond(send)

    exchange = Exchange(trace=trace)
    await exchange.run(EventContextMiddleware(app, bus, shutdown_timeout=0.01))

    assert trace == ["start 200", "end of body", "undelivered 1", "undelivered ordered", "returned"]
    assert bus.stats.undelivered == 2
    lost = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert lost == [
        "deliveries undelivered: bus=default deliveries=1 event_types=builtins.int x1",
        "deliveries undelivered: bus=default deliveries=1 event_types=builtins.str x1",
    ]


async def test_a_cancellation_from_outside_does_not_reach_the_handlers(bus: EventBus) -> None:
    trace = traced(bus)

    with CancelScope() as scope:

        @bus.on(str)
        async def cancel(event: str) -> None:
            scope.cancel()
            await checkpoint()
            trace.append("not cancelled")

        await Exchange().run(EventContextMiddleware(publishing(bus), bus))
        await checkpoint()

    assert scope.cancelled_caught
    assert bus.stats.handled == 2
    assert sorted(trace) == ["handled ordered", "handling ordered", "not cancelled"]


async def test_after_a_cancelled_request_the_next_one_works(
    bus: EventBus, trace: list[str]
) -> None:
    with CancelScope() as scope:

        async def hang(_: Scope, receive: Receive, send: Send) -> None:
            bus.publish("cancelled")
            scope.cancel()
            await sleep_forever()

        await Exchange().run(EventContextMiddleware(hang, bus))
    await Exchange().run(EventContextMiddleware(publishing(bus), bus))

    assert trace == ["discarded cancelled", *DELIVERED]


# The line in the log.


def announcements(caplog: pytest.LogCaptureFixture) -> list[str]:
    """All lines that say a bus is ready."""
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    return [line for line in lines if line.startswith("eventkit is ready")]


def twice(bus: EventBus) -> Starlette:
    """An app with the same middleware twice, and once more in a mounted app."""

    async def endpoint(_: Request) -> Response:
        return Response()

    inner = Starlette(routes=[Route("/", endpoint)])
    app = Starlette(routes=[Route("/", endpoint), Mount("/inner", inner)])
    for each in (inner, app, app):
        each.add_middleware(EventContextMiddleware, bus=bus)
    return app


READY = "eventkit is ready: bus=default event_types=builtins.str handlers=1"


def test_the_wiring_is_logged_once_at_start_up(
    bus: EventBus, trace: list[str], anyio_backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")

    with client_of(twice(bus), anyio_backend) as client:
        assert announcements(caplog) == [READY]
        for path in ("/", "/inner/", "/"):
            client.get(path)

    assert announcements(caplog) == [READY]


def test_without_a_lifespan_the_wiring_is_logged_once_at_the_first_request(
    bus: EventBus, trace: list[str], anyio_backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    client = client_of(twice(bus), anyio_backend)

    assert announcements(caplog) == []
    for path in ("/inner/", "/", "/"):
        client.get(path)

    assert announcements(caplog) == [READY]


def test_each_bus_logs_its_own_wiring(
    anyio_backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    app = Starlette()
    for name in ("orders", "users"):
        app.add_middleware(EventContextMiddleware, bus=EventBus(name=name))

    with client_of(app, anyio_backend) as client:
        client.get("/")

    assert sorted(announcements(caplog)) == [
        "eventkit is ready: bus=orders event_types= handlers=0",
        "eventkit is ready: bus=users event_types= handlers=0",
    ]


def test_an_app_that_does_not_start_is_not_called_ready(
    bus: EventBus, anyio_backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventkit")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})
        raise LookupError("no database")

    client = client_of(EventContextMiddleware(app, bus), anyio_backend)
    with pytest.raises(LookupError, match="no database"), client:
        pass

    assert announcements(caplog) == []


# Misuse.


@pytest.mark.parametrize(
    ("bus", "named"),
    [
        (None, "None"),
        ("orders", "'orders'"),
        (EventBus, "<class 'eventkit.EventBus'>"),
        (EventBus().context(), "<EventContext of bus 'default', new, 0 pending>"),
    ],
    ids=["None", "str", "class", "context"],
)
def test_something_else_than_a_bus_is_refused(bus: Any, named: str) -> None:
    with pytest.raises(TypeError) as raised:
        EventContextMiddleware(respond, bus)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

    assert str(raised.value) == (
        f"EventContextMiddleware needs an EventBus, not {named}: "
        "app.add_middleware(EventContextMiddleware, bus=bus)"
    )


@pytest.mark.parametrize("timeout", [-1, 0, float("nan"), None, "20", True])
def test_a_deadline_that_is_no_time_is_refused(bus: EventBus, timeout: Any) -> None:
    with pytest.raises(ValueError, match="shutdown_timeout takes seconds above 0, not ") as raised:
        EventContextMiddleware(publishing(bus), bus, shutdown_timeout=timeout)

    assert str(raised.value).endswith(repr(timeout))


async def ask_a_database(_: Outcome) -> bool:
    return True


class AsksADatabase:
    """A rule that is an object, as those with settings of their own are."""

    async def __call__(self, outcome: Outcome) -> bool:
        return await ask_a_database(outcome)

    async def method(self, outcome: Outcome) -> bool:
        return await ask_a_database(outcome)


NO_PLAIN_FUNCTIONS = {
    "None": None,
    "bool": True,
    "async def": ask_a_database,
    "object": AsksADatabase(),
    "method": AsksADatabase().method,
    "partial": partial(ask_a_database),
    "partial of an object": partial(AsksADatabase()),
    "generator": yields,
    "async generator": yields_later,
    "class": AsksADatabase,
    "partial of a class": partial(AsksADatabase),
}


@pytest.mark.parametrize("deliver_if", NO_PLAIN_FUNCTIONS.values(), ids=NO_PLAIN_FUNCTIONS)
def test_a_deliver_if_that_is_no_plain_function_is_refused(bus: EventBus, deliver_if: Any) -> None:
    with pytest.raises(TypeError, match="deliver_if takes a plain function") as raised:
        EventContextMiddleware(publishing(bus), bus, deliver_if=deliver_if)

    assert str(raised.value).endswith(repr(deliver_if))
