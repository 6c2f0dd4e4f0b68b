"""What `capevents` costs a test: the capture around a call of Starlette's `TestClient`.

Run with `python -m benchmarks.testing`. The goal is 5 % of the call at most.
"""

import statistics
import time
from contextlib import AbstractContextManager, nullcontext

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware
from eventkit.testing import EventCapture

ROUNDS = 200
CALLS = 5


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


def seconds_per_test(client: TestClient, bus: EventBus, *, captured: bool) -> float:
    """Processor time, of all threads, that a test takes which does one call."""
    began = time.process_time()
    for _ in range(CALLS):
        around: AbstractContextManager[object] = EventCapture(bus) if captured else nullcontext()
        with around:
            client.get("/")
    return (time.process_time() - began) / CALLS


def main() -> None:
    """Measure both in turn, and print the ratio of the medians."""
    bus, app = make_app()
    client = TestClient(app)
    seconds_per_test(client, bus, captured=True)
    plain: list[float] = []
    captured: list[float] = []
    for _ in range(ROUNDS):
        plain.append(seconds_per_test(client, bus, captured=False))
        captured.append(seconds_per_test(client, bus, captured=True))
    low, median, high = (
        more / less
        for more, less in zip(
            statistics.quantiles(captured, n=4), statistics.quantiles(plain, n=4), strict=True
        )
    )
    print(f"a call of TestClient: {statistics.median(plain) * 1e3:.2f} ms")
    print(f"with a capture around it: x{median:.3f} (quartiles x{low:.3f} and x{high:.3f})")


if __name__ == "__main__":
    main()
