"""When too many deliveries wait: requests are held, then refused, and the log says so."""

import json
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import Event, create_task_group, wait_all_tasks_blocked
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, lifespan_of
from tests.web.background import Gate, publishing, request, wrapped
from tests.witness import assert_settled, virtual_time

pytestmark = pytest.mark.anyio


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@asynccontextmanager
async def overloaded(bus: EventBus, app: ASGIApp, gate: Gate) -> AsyncGenerator[None]:
    """One unit runs and one waits, which is as many as may."""
    async with lifespan_of(app):
        for path in ("/running", "/waiting"):
            assert (await request(app, path)).status == 200
        await gate.begun.wait()
        yield
        gate.open.set()


UNSAFE = ["POST", "PUT", "PATCH", "DELETE"]
SAFE = ["GET", "HEAD", "OPTIONS", "TRACE"]


@virtual_time
@pytest.mark.parametrize("method", UNSAFE)
async def test_when_too_much_waits_unsafe_requests_are_held_and_then_refused_before_the_endpoint(
    bus: EventBus, method: str
) -> None:
    gate = Gate(bus)
    app = wrapped(publishing(bus), bus, concurrency=1, max_pending=1, overload_timeout=2.5)

    async with overloaded(bus, app, gate):
        begun = anyio.current_time()
        exchange = await request(app, "/refused", method=method)
        assert anyio.current_time() - begun == 2.5
        assert exchange.status == 503
        assert (b"retry-after", b"3") in exchange.sent[0]["headers"]
        assert (b"content-type", b"application/json") in exchange.sent[0]["headers"]
        assert json.loads(exchange.body) == {
            "detail": "Too many events wait to be delivered. Try again later."
        }
        assert bus.stats.published == 2
        assert (bus.stats.held, bus.stats.refused) == (0, 1)

    assert gate.trace == ["handled /running", "handled /waiting"]
    assert_settled(bus)


class Turnstile:
    """A handler of strings that lets as many go on as it is told to."""

    def __init__(self, bus: EventBus) -> None:
        self._semaphore = anyio.Semaphore(0)
        bus.subscribe(str, self.handle, name="turnstile")

    async def handle(self, event: str) -> None:
        await self._semaphore.acquire()

    async def let_pass(self, number: int) -> None:
        for _ in range(number):
            self._semaphore.release()
            await wait_all_tasks_blocked()


def warnings_of_overload(caplog: pytest.LogCaptureFixture, slowest: str) -> list[str]:
    """What was said since the last look: "half" of what may wait does, or requests are "held"."""
    texts = {
        "half of max_pending deliveries wait": "half",
        "too many deliveries wait, so new requests are held and then answered 503": "held",
    }
    said: list[str] = []
    for record in caplog.records:
        if record.levelno == logging.WARNING:
            text, _, rest = record.getMessage().partition(": ")
            said.append(texts[text])
            advice, _, facts = rest.partition(": ")
            assert advice == "raise concurrency, or make the slowest handler faster"
            waiting = {"half": 2, "held": 4}[said[-1]]
            assert facts == (
                f"bus=default waiting={waiting} max_pending=4 concurrency=1 "
                f"slowest_handler={slowest}"
            )
    caplog.clear()
    return said


async def test_an_overload_is_told_once_with_its_limits_and_the_slowest_handler_and_early(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Turnstile(bus)
    app = wrapped(publishing(bus), bus, concurrency=1, max_pending=4, overload_timeout=math.inf)

    async with create_task_group() as tasks, lifespan_of(app):
        for episode in range(2):
            said: list[list[str]] = []
            for number in range(5):
                await request(app, f"/{episode}/{number}")
                await wait_all_tasks_blocked()
                said.append(warnings_of_overload(caplog, "turnstile"))
            assert said == [[], [], ["half"], [], []]

            for _ in range(3):
                tasks.start_soon(request, app, "/held")
            await wait_all_tasks_blocked()
            assert (bus.stats.held, bus.stats.units_waiting) == (3, 4)
            assert warnings_of_overload(caplog, "turnstile") == ["held"]

            await handler.let_pass(4)
            await request(app, "/once more")
            tasks.start_soon(request, app, "/held again")
            await wait_all_tasks_blocked()
            assert (bus.stats.held, bus.stats.units_waiting) == (1, 4)
            assert warnings_of_overload(caplog, "turnstile") == []  # the same episode goes on
            await handler.let_pass(6)
            assert bus.stats.pending == bus.stats.running == 0


async def test_the_slowest_handler_is_the_one_that_most_of_what_runs_belongs_to(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Event()

    @bus.on(str)
    async def quick(event: str) -> None: ...

    @bus.on(str)
    async def waits_sometimes(event: str) -> None:
        if event == "/0":
            await opened.wait()

    @bus.on(str)
    async def waits_always(event: str) -> None:
        await opened.wait()

    app = wrapped(publishing(bus), bus, concurrency=2, max_pending=6)
    async with lifespan_of(app):
        for number in range(3):
            await request(app, f"/{number}")
            await wait_all_tasks_blocked()
        opened.set()

    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.endswith(
        f"concurrency=2 slowest_handler=tests.web.test_overload:{waits_always.__qualname__}"
    )


@virtual_time
async def test_where_no_handler_has_begun_an_overload_names_none(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(bus)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(2):
            bus.publish(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    class AtOnce(Exchange):
        async def _send(self, message: Message) -> None:
            self.sent.append(message)

    app = wrapped(serve, bus, concurrency=1, max_pending=4)
    async with lifespan_of(app):
        for number in range(2):
            await AtOnce(f"/{number}", method="POST", spec_version="2.3").run(app)
        assert bus.stats.running == 0
        gate.open.set()

    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.endswith("concurrency=1 slowest_handler=none has begun")


@pytest.mark.parametrize("method", SAFE)
async def test_when_too_much_waits_safe_requests_pass(bus: EventBus, method: str) -> None:
    gate = Gate(bus)
    app = wrapped(publishing(bus), bus, concurrency=1, max_pending=1, overload_timeout=math.inf)

    async with overloaded(bus, app, gate):
        assert (await request(app, "/passes", method=method)).status == 200
        assert bus.stats.published == 3

    assert gate.trace[2:] == ["handled /passes"]


async def test_a_request_that_is_held_goes_on_as_soon_as_there_is_room(bus: EventBus) -> None:
    gate = Gate(bus)
    statuses: list[int] = []
    app = wrapped(publishing(bus), bus, concurrency=1, max_pending=1, overload_timeout=math.inf)

    async def ask() -> None:
        statuses.append((await request(app, "/held")).status)

    async with overloaded(bus, app, gate), create_task_group() as tasks:
        tasks.start_soon(ask)
        await wait_all_tasks_blocked()
        assert (bus.stats.held, bus.stats.published, statuses) == (1, 2, [])
        gate.open.set()

    assert statuses == [200]
    assert (bus.stats.held, bus.stats.refused) == (0, 0)
    assert gate.trace == ["handled /running", "handled /waiting", "handled /held"]


async def test_a_request_whose_client_leaves_while_it_is_held_never_reaches_the_endpoint(
    bus: EventBus,
) -> None:
    gate = Gate(bus)
    app = wrapped(publishing(bus), bus, concurrency=1, max_pending=1, overload_timeout=math.inf)

    async with overloaded(bus, app, gate):
        async with create_task_group() as tasks:
            tasks.start_soon(request, app, "/left")
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert (bus.stats.held, bus.stats.published) == (0, 2)


async def test_without_max_pending_nobody_is_held(bus: EventBus) -> None:
    gate = Gate(bus)
    app = wrapped(publishing(bus), bus, concurrency=1, max_pending=None, overload_timeout=math.inf)

    async with overloaded(bus, app, gate):
        for number in range(100):
            assert (await request(app, f"/{number}")).status == 200
        assert bus.stats.units_waiting == 101

    assert len(gate.trace) == 102


async def test_requests_that_deliver_themselves_are_not_held(bus: EventBus) -> None:
    gate = Gate(bus)
    app = wrapped(publishing(), bus, concurrency=1, max_pending=1, overload_timeout=math.inf)
    full = wrapped(publishing(bus), bus, concurrency=1, max_pending=1, overload_timeout=math.inf)

    async with overloaded(bus, full, gate):
        exchange = Exchange(method="POST")
        await exchange.run(app)
        assert exchange.status == 200


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"max_pending": 0}])
def test_a_bound_of_nothing_is_refused(bus: EventBus, options: Any) -> None:
    with pytest.raises(ValueError, match="concurrency and max_pending are at least 1, not "):
        EventContextMiddleware(publishing(bus), bus, **options)


@pytest.mark.parametrize("timeout", [-1, 0, float("nan"), None, "5"])
def test_an_overload_timeout_that_is_no_time_is_refused(bus: EventBus, timeout: Any) -> None:
    with pytest.raises(ValueError, match="overload_timeout takes seconds above 0, not "):
        EventContextMiddleware(publishing(bus), bus, overload_timeout=timeout)
