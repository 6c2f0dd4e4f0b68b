"""A server's side of ASGI, by hand: for clients that leave, and for what was sent when."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Literal, cast

import anyio
from anyio.lowlevel import checkpoint
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Scope, Send

from eventkit import Delivery, EventBus, Observer

# What the fixture `anyio_backend` gives.
Backend = tuple[str, dict[str, Any]]

FASTAPI = tuple(map(int, version("fastapi").split(".")[:2]))
# FastAPI 0.118 moved the exit of dependencies, and so a commit in one, behind the response.
DEPENDENCIES_END_BEHIND_THE_RESPONSE = FASTAPI >= (0, 118)


class Exchange:
    """One HTTP request and its response, for one call of an app.

    Args:
        path: The request's path.
        method: The request's method.
        spec_version: The version of ASGI that the server announces; None for none, as in-process
            clients do.
        leaves: The client leaves once it has the first part of the body. Then, as ASGI says, the
            server's `receive` tells it, and from version 2.4 on `send` raises an `OSError`.
        trace: Where to note what was sent, and how the app ended.
    """

    def __init__(
        self,
        path: str = "/",
        *,
        method: str = "GET",
        spec_version: str | None = None,
        leaves: bool = False,
        trace: list[str] | None = None,
    ) -> None:
        asgi = {"version": "3.0", "spec_version": spec_version or "2.0"}
        self.scope: Scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"host", b"testserver")],
            "client": ("testclient", 50000),
            "server": ("testserver", 80),
            **({"asgi": asgi} if spec_version else {}),
        }
        self.sent: list[Message] = []
        self.trace = [] if trace is None else trace
        self._raises = spec_version is not None and spec_version >= "2.4"
        self._leaves = leaves
        self._left = False
        self._over: anyio.Event | None = None
        self._asked = False

    @property
    def status(self) -> int:
        """The status that was sent."""
        (start,) = (m for m in self.sent if m["type"] == "http.response.start")
        status: int = start["status"]
        return status

    @property
    def body(self) -> bytes:
        """All parts of the body that were sent."""
        return b"".join(m.get("body", b"") for m in self.sent)

    async def run(self, app: ASGIApp) -> None:
        """Have the app answer; what it raises is raised."""
        self._over = anyio.Event()
        self._asked = False
        try:
            await app(self.scope, self._receive, self._send)
        except BaseException as error:
            self.trace.append(f"raised {type(error).__name__}")
            raise
        self.trace.append("returned")

    async def _receive(self) -> Message:
        assert self._over is not None
        await checkpoint()
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        assert self._over is not None
        await checkpoint()
        if self._left:
            if self._raises:
                raise OSError("the client has left")
            return
        self.sent.append(message)
        match message["type"]:
            case "http.response.start":
                self.trace.append(f"start {message['status']}")
            case "http.response.body" if message.get("more_body", False):
                self.trace.append(f"body {bytes(message['body']).decode()}")
                self._left = self._leaves
            case "http.response.body" | "http.response.pathsend":
                self.trace.append("end of body")
            case other:
                self.trace.append(other)
        if self._left or self.trace[-1] == "end of body":
            self._over.set()


class Lifespan:
    """One run of an app's lifespan, as a server does it.

    Args:
        app: The app to call.
        trace: Where to note what the app sent, and how it ended.

    Attributes:
        scope: The scope that the app is called with.
        error: What the app raised.
    """

    def __init__(self, app: ASGIApp, trace: list[str] | None = None) -> None:
        self.scope: Scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": {},
        }
        self.trace = [] if trace is None else trace
        self.error: BaseException | None = None
        self._app = app
        self._to_app, self._from_server = anyio.create_memory_object_stream[Message](2)
        self._started = anyio.Event()
        self._stopped = anyio.Event()

    async def run(self) -> None:
        """Call the app, and keep what it raises; only a cancellation passes."""
        with self._to_app, self._from_server:
            try:
                await self._app(self.scope, self._from_server.receive, self._send)
            except (Exception, SystemExit) as error:
                self.error = error
            finally:
                self._started.set()
                self._stopped.set()

    async def start(self) -> None:
        """Have the app start up, and wait until it has done so or ended."""
        self._say("lifespan.startup")
        await self._started.wait()
        if "startup.failed" in self.trace:
            await self.ended()

    async def stop(self) -> None:
        """Have the app shut down, and wait until it has answered or ended."""
        self._say("lifespan.shutdown")
        await self._stopped.wait()

    async def ended(self) -> None:
        """Wait until the app has ended by itself."""
        await self._stopped.wait()

    def _say(self, kind: str) -> None:
        if not self._stopped.is_set():
            self._to_app.send_nowait({"type": kind})

    async def _send(self, message: Message) -> None:
        await checkpoint()
        kind = message["type"].removeprefix("lifespan.")
        self.trace.append(kind)
        (self._started if kind.startswith("startup") else self._stopped).set()


@asynccontextmanager
async def lifespan_of(app: ASGIApp, trace: list[str] | None = None) -> AsyncGenerator[Lifespan]:
    """Keep the app's lifespan running during the block."""
    lifespan = Lifespan(app, trace)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifespan.run)
        await lifespan.start()
        yield lifespan
        await lifespan.stop()


async def order_of(app: ASGIApp, trace: list[str], path: str = "/", **options: Any) -> list[str]:
    """Make a POST request and return what was noted; what the app raises is noted, too.

    Args:
        app: The app to call.
        trace: What the app notes itself, and where to note the rest.
        path: The request's path.
        options: As `Exchange` takes them.
    """
    try:
        await Exchange(path, method="POST", trace=trace, **options).run(app)
    except Exception:
        assert trace[-1].startswith("raised ")
    return trace


class Tracer(Observer):
    """Notes which events were discarded, and which were not delivered."""

    def __init__(self, trace: list[str]) -> None:
        self.trace = trace

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        self.trace += [f"discarded {delivery.event}" for delivery in deliveries]

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        self.trace += [f"undelivered {delivery.event}" for delivery in deliveries]


def traced(bus: EventBus) -> list[str]:
    """Make a list of what becomes of each string that is published on the bus."""
    trace: list[str] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        trace.append(f"handling {event}")
        await checkpoint()
        trace.append(f"handled {event}")

    bus.observe(Tracer(trace))
    return trace


def client_of(app: ASGIApp, backend: Backend, *, raises: bool = True) -> TestClient:
    """Starlette's client, on the event loop that the fixture `anyio_backend` chose."""
    name, options = backend
    return TestClient(
        app,
        backend=cast(Literal["asyncio", "trio"], name),
        backend_options=options,
        raise_server_exceptions=raises,
    )


async def respond(send: Send, status: int = 200, body: Iterable[bytes] = (b"",)) -> None:
    """Send a whole response."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    parts = list(body)
    for number, part in enumerate(parts, 1):
        more = number < len(parts)
        await send({"type": "http.response.body", "body": part, "more_body": more})
