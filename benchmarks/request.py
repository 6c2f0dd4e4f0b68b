"""One request with its events: in process, and on a real server under load.

In process the ASGI call is what is timed, and all that come after the response are in it: each
contender delivers before the call returns. On uvicorn eventkit delivers in tasks of its own.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

from anyio.lowlevel import checkpoint
from fastapi import BackgroundTasks as FastAPITasks
from fastapi import Depends, FastAPI
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.background import BackgroundTasks
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks import load as server
from benchmarks.harness import (
    FINE_SLACK,
    Case,
    Comparison,
    Effort,
    Figure,
    Results,
    Run,
    Spread,
    Verdict,
    clock,
    compare,
    installed,
    on_loop,
    ready,
)
from benchmarks.peers import Ordered, load
from benchmarks.report import Bar, Panel, drawing, grid, microseconds, number
from eventkit import EventBus
from eventkit.starlette import EventContextMiddleware

PACKAGES = ("anyio", "starlette", "fastapi", "uvicorn", "uvloop", "httptools", "fastapi-events")

NONE = "no middleware"
OURS = "eventkit"
TASKS = "BackgroundTasks"
PEER = "fastapi-events"

BARE, STARLETTE, FASTAPI = "bare ASGI", "Starlette", "FastAPI"
COUNTS = (0, 1, 10)
IN_PROCESS, ON_UVICORN = "in process", "uvicorn"

# Limit and stretch of the bare app, by the number of events.
LIMITS = {0: (5, 4), 1: (30, 15), 10: (80, 40)}

Tell = Callable[[], object]


async def handle(event: object) -> None:
    """The one handler of each event, and each background task."""


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure in process, then on the server."""
    for app in (BARE, STARLETTE, FASTAPI):
        for events in COUNTS:
            yield on_loop("asyncio", partial(_in_process, app, events, effort))
    for events in {"smallest": (1,), "quick": (1,), "full": COUNTS}[effort.scale]:
        yield _on_uvicorn(events, effort)


async def _in_process(app: str, events: int, effort: Effort) -> Comparison:
    makers: dict[str, Callable[[], ASGIApp]] = {
        NONE: partial(app_that, app, nothing),
        OURS: partial(with_eventkit, app, events),
    }
    if app != BARE and events:
        makers[TASKS] = partial(with_tasks, app, events)
    absent = {} if installed(PEER) else {PEER: "not installed"}
    if not absent:
        makers[PEER] = partial(with_fastapi_events, app, events)
    contenders = [ready(name, called(make())) for name, make in makers.items()]
    case: Case = {"where": IN_PROCESS, "app": app, "events": events}
    return await compare(case, contenders, effort, absent)


def called(app: ASGIApp) -> Run:
    """One request after the other, as an in-process client makes them."""

    async def run(times: int) -> float:
        took = 0
        for done in range(0, times, ROW):
            begun = clock()
            for _ in range(min(ROW, times - done)):
                await app(dict(SCOPE), receive, send)
            took += clock() - begun
            await checkpoint()  # as after any request, or timers that were cancelled pile up
        return took

    return run


# So many requests come one right after the other.
ROW = 50

SCOPE: Scope = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "path": "/orders",
    "raw_path": b"/orders",
    "root_path": "",
    "scheme": "http",
    "query_string": b"",
    "headers": [(b"host", b"benchmark"), (b"content-type", b"application/json")],
    "client": ("127.0.0.1", 50000),
    "server": ("127.0.0.1", 80),
}


async def receive() -> Message:
    """The whole body."""
    return {"type": "http.request", "body": b'{"number": 1}', "more_body": False}


async def send(message: Message) -> None:
    """To nobody."""


def nothing() -> None:
    """What an endpoint tells that has nothing to tell."""


class Wanted(BaseModel):
    """What is ordered."""

    number: int


async def user_of(request: Request) -> str:
    """Who orders: a dependency, as most endpoints have one."""
    return request.headers["host"]


def app_that(app: str, tell: Tell) -> Any:
    """An app of this kind, whose one endpoint calls `tell` and answers."""
    if app == BARE:
        return bare(tell)
    if app == STARLETTE:

        async def endpoint(_: Request) -> Response:
            tell()
            return JSONResponse("ordered")

        return Starlette(routes=[Route("/orders", endpoint, methods=["POST"])])
    made = FastAPI()

    @made.post("/orders")
    async def order(wanted: Wanted, user: Annotated[str, Depends(user_of)]) -> Wanted:
        tell()
        return wanted

    return made


def bare(tell: Tell) -> ASGIApp:
    """The least that answers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tell()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ordered"})

    return app


def with_eventkit(app: str, events: int) -> ASGIApp:
    """The middleware as it comes."""
    bus = EventBus()
    bus.subscribe(Ordered, handle)

    def publish() -> None:
        for index in range(events):
            bus.publish(Ordered(index))

    return wrapped(app_that(app, publish), EventContextMiddleware, bus=bus)


def with_fastapi_events(app: str, events: int) -> ASGIApp:
    """Its middleware and its local handler, as its documentation has them."""
    dispatch: Any = load("fastapi_events.dispatcher").dispatch
    local: Any = load("fastapi_events.handlers.local").LocalHandler()
    local.register(handle, event_name="ordered")

    def publish() -> None:
        for index in range(events):
            dispatch("ordered", payload={"number": index})

    middleware: Any = load("fastapi_events.middleware").EventHandlerASGIMiddleware
    return wrapped(app_that(app, publish), middleware, handlers=[local])


def wrapped(app: Any, middleware: Any, **options: Any) -> ASGIApp:
    """The app inside a middleware, in the way that it has for it."""
    if not isinstance(app, Starlette):
        made: ASGIApp = middleware(app, **options)
        return made
    app.add_middleware(middleware, **options)
    return app


def with_tasks(app: str, events: int) -> ASGIApp:
    """As many background tasks, which know no events."""
    if app == STARLETTE:

        async def endpoint(_: Request) -> Response:
            tasks = BackgroundTasks()
            for index in range(events):
                tasks.add_task(handle, Ordered(index))
            return JSONResponse("ordered", background=tasks)

        return Starlette(routes=[Route("/orders", endpoint, methods=["POST"])])
    made = FastAPI()

    @made.post("/orders")
    async def order(
        wanted: Wanted, user: Annotated[str, Depends(user_of)], tasks: FastAPITasks
    ) -> Wanted:
        for index in range(events):
            tasks.add_task(handle, Ordered(index))
        return wanted

    return made


def _on_uvicorn(events: int, effort: Effort) -> Comparison:
    """A FastAPI app in a process of its own, anew for each measurement, beside its clients."""
    names = [NONE, OURS, *([TASKS] if events else []), *([PEER] if installed(PEER) else [])]
    if effort.scale == "smallest":
        names = [OURS]
    seconds = {"smallest": 0.1, "quick": 1.0, "full": 2.0}[effort.scale]
    rounds: dict[str, list[float]] = {name: [] for name in names}
    draw = random.Random(0)
    for _ in range({"smallest": 1, "quick": 1, "full": 2}[effort.scale]):
        for name in draw.sample(names, len(names)):
            told = 0 if name == NONE else events
            found = server.measure(name, 0, seconds=seconds, connections=16, events=told)
            assert not found.lost, found
            rounds[name].append(1e9 / found.per_second)
    absent = {} if installed(PEER) else {PEER: "not installed"}
    return Comparison({"where": ON_UVICORN, "app": FASTAPI, "events": events}, rounds, absent)


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """What a request pays, and what its events add to it."""
    for found in comparisons:
        where, app, events = (found.case[key] for key in ("where", "app", "events"))
        if where != IN_PROCESS:
            continue
        name = f"{app}, N = {events}: {OURS} / {NONE}"
        if app == BARE:
            limit, stretch = LIMITS[int(events)]
            yield Verdict(name, found.ratio(OURS).median, limit, stretch)
        elif app == FASTAPI and events == 0:
            yield Verdict(name, found.ratio(OURS).median, 1.05, slack=FINE_SLACK)
        elif app == FASTAPI and events == 1 and PEER in found.rounds:
            yield Verdict(
                f"{app}, N = 1: what {OURS} adds / what {PEER} adds",
                added(found).median,
                1 / 5,
            )


def added(found: Comparison) -> Spread:
    """How much of what the peer adds to a request eventkit adds to it."""
    rounds = zip(*(found.rounds[name] for name in (NONE, OURS, PEER)), strict=True)
    return Spread.of([(ours - base) / (peer - base) for base, ours, peer in rounds])


def tables(results: Results) -> str:
    """Microseconds per request by app, and responses per second of the server."""
    parts = [
        f"**{app}, in process**, microseconds per request, by number of events\n\n"
        + grid(results, {"where": IN_PROCESS, "app": app}, "events", microseconds)
        for app in (BARE, STARLETTE, FASTAPI)
    ]
    parts.append(
        f"**{FASTAPI} on uvicorn**, responses per second with 16 connections, clients and server "
        "sharing the machine, by number of events\n\n"
        + grid(results, {"where": ON_UVICORN}, "events", per_second)
    )
    return "\n\n".join(parts)


def per_second(figure: Figure) -> str:
    """Of one server."""
    return "" if figure.value is None else number(1e9 / figure.value.median)


def plots(results: Results) -> dict[str, str]:
    """A request with one event."""
    panels: list[Panel] = []
    for app in (BARE, FASTAPI):
        bars = [
            Bar(figure.contender, figure.value, f"{number(figure.value.median / 1e3)} µs")
            for figure in results.figures
            if figure.value is not None
            and figure.case == {"where": IN_PROCESS, "app": app, "events": 1}
        ]
        panels.append(Panel(f"{app}, a request with one event", bars))
    return {"request.svg": drawing(panels)}
