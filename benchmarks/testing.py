"""What `capevents` costs a test: the capture around a call of Starlette's `TestClient`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from benchmarks.harness import (
    FINE_SLACK,
    Comparison,
    Effort,
    Results,
    Run,
    Verdict,
    clock,
    compare,
    on_loop,
    ready,
)
from benchmarks.report import grid, microseconds
from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from eventkit.testing import EventCapture

PACKAGES = ("anyio", "starlette", "httpx2")

PLAIN = "a call of TestClient"
CAPTURED = "eventkit, the same captured"


def make_app() -> tuple[EventBus, Starlette]:
    """An application of fifty handlers, whose only endpoint publishes an event for one of them."""
    bus = EventBus()
    for number in range(50):
        event_type = str if number == 0 else type(f"Event{number}", (), {})

        async def handle(event: object) -> None: ...

        bus.subscribe(event_type, handle, name=f"handler {number}")

    def publish(request: Request) -> PlainTextResponse:
        bus.publish("published")
        return PlainTextResponse("")

    app = Starlette(routes=[Route("/", publish)])
    app.add_middleware(EventContextMiddleware, bus=bus)
    return bus, app


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure the one case, in many short rounds: a few per cent are what counts."""
    yield on_loop("asyncio", partial(_capture, replace(effort, rounds=4 * effort.rounds)))


async def _capture(effort: Effort) -> Comparison:
    bus, app = make_app()
    client = TestClient(app)
    contenders = [
        ready(PLAIN, called(client, nullcontext)),
        ready(CAPTURED, called(client, partial(EventCapture, bus))),
    ]
    return await compare({"calls": 1}, contenders, effort)


def called(client: TestClient, around: Callable[[], AbstractContextManager[object]]) -> Run:
    """A test that does one call; the client brings an event loop of its own, in a thread."""

    async def run(times: int) -> float:
        begun = clock()
        for _ in range(times):
            with around():
                client.get("/")
        return clock() - begun

    return run


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """What the capture adds."""
    for found in comparisons:
        ratio = found.ratio(CAPTURED).median
        yield Verdict(f"{CAPTURED} / {PLAIN}", ratio, 1.05, slack=FINE_SLACK)


def tables(results: Results) -> str:
    """Microseconds per test."""
    return (
        f"Microseconds per test, by number of calls\n\n{grid(results, {}, 'calls', microseconds)}"
    )


def plots(results: Results) -> dict[str, str]:
    """A few per cent need no drawing."""
    return {}
