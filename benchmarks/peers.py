"""Other libraries that deliver an event to handlers, each set up as its documentation shows.

Each is given the same handlers, and an operation is over when all of them have ended. Where a
library has no way to wait for that, the last handler tells. What a library demands, an event of its
own class for instance, is made outside the clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import anyio

from benchmarks.harness import Contender, Run, clock, installed

Handler = Callable[[Any], Coroutine[Any, Any, None]]

ASYNCIO = frozenset({"asyncio", "uvloop"})
ANY_LOOP = ASYNCIO | {"trio"}


@dataclass(frozen=True, slots=True)
class Ordered:
    """The event, where a library takes anything."""

    number: int = 1


@dataclass(frozen=True, slots=True)
class Peer:
    """A library, and what it does with several handlers.

    Attributes:
        name: Of its distribution, too.
        note: How it runs the handlers of one event, and what a failing one does.
        loops: Where it can run them.
        connect: Gives it the handlers.
    """

    name: str
    note: str
    loops: frozenset[str]
    connect: Callable[[Sequence[Handler]], AbstractAsyncContextManager[Run]]

    def missing(self, loop: str) -> str:
        """Why it cannot take part; empty if it can."""
        if not installed(self.name):
            return "not installed"
        return "" if loop in self.loops else f"does not run on {loop}"

    def contender(self, handlers: Sequence[Handler]) -> Contender:
        """The peer with these handlers."""
        return Contender(self.name, partial(self.connect, handlers))


def load(module: str) -> Any:
    """Import what is installed only where benchmarks run, and therefore known to no checker."""
    return import_module(module)


def awaited(send: Callable[[Any], Awaitable[object]], event: object = Ordered()) -> Run:
    """One event after the other."""

    async def run(times: int) -> float:
        begun = clock()
        for _ in range(times):
            await send(event)
        return clock() - begun

    return run


def on_trio() -> bool:
    """Whether the running event loop is trio's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


class Latch:
    """Opens when all handlers of an event have ended.

    Attributes:
        missing: How many have not.
    """

    def __init__(self, handlers: int) -> None:
        self._handlers = handlers
        self.missing = 0
        self._opened = anyio.Event()

    def expect(self, handlers: int | None = None) -> None:
        """Close it for the next event, or for so many handlers of several."""
        self.missing = self._handlers if handlers is None else handlers
        self._opened = anyio.Event()

    def counting(self, handler: Handler) -> Handler:
        """The same handler, which tells when it has ended."""

        async def counted(event: object) -> None:
            await handler(event)
            self.arrive()

        return counted

    def arrive(self) -> None:
        """One handler has ended."""
        self.missing -= 1
        if not self.missing:
            self._opened.set()

    async def opened(self) -> None:
        """Wait until all have ended."""
        if self.missing:
            await self._opened.wait()


def emitted(emit: Callable[[Any], object], latch: Latch) -> Run:
    """One event after the other, each waited for by the latch."""
    event = Ordered()

    async def run(times: int) -> float:
        begun = clock()
        for _ in range(times):
            latch.expect()
            emit(event)
            await latch.opened()
        return clock() - begun

    return run


@asynccontextmanager
async def aiosignal(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    signal = load("aiosignal").Signal("benchmark")
    signal.extend(handlers)
    signal.freeze()
    yield awaited(signal.send)


@asynccontextmanager
async def blinker(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    signal = load("blinker").Signal()
    for handler in handlers:
        signal.connect(handler)
    yield awaited(signal.send_async)


@asynccontextmanager
async def psygnal(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    # Its queue belongs to one event loop; this is how its own tests leave one.
    queue: Any = load("psygnal._async")
    module = load("psygnal")

    class Orders:
        placed = module.Signal(object)

    latch = Latch(len(handlers))
    counted = [latch.counting(handler) for handler in handlers]  # it keeps weak references
    orders: Any = Orders()
    backend = module.set_async_backend("trio" if on_trio() else "asyncio")
    try:
        async with anyio.create_task_group() as tasks:
            if on_trio():
                tasks.start_soon(backend.run)
            await backend.running.wait()
            for handler in counted:
                orders.placed.connect(handler)
            yield emitted(orders.placed.emit, latch)
            tasks.cancel_scope.cancel()
    finally:
        queue.clear_async_backend()


@asynccontextmanager
async def pyee(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    latch = Latch(len(handlers))
    if on_trio():
        async with load("pyee.trio").TrioEventEmitter() as emitter:
            for handler in handlers:
                emitter.on("ordered", latch.counting(handler))
            yield emitted(partial(emitter.emit, "ordered"), latch)
        return
    emitter = load("pyee.asyncio").AsyncIOEventEmitter()
    for handler in handlers:
        emitter.on("ordered", handler)

    async def send(event: object) -> None:
        emitter.emit("ordered", event)
        await emitter.wait_for_complete()

    yield awaited(send)


@asynccontextmanager
async def django(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    signal = load("django.dispatch").Signal()
    # Its receivers are called with `sender`, `signal` and the rest by keyword.
    receivers = [_receiver(handler) for handler in handlers]
    for receiver in receivers:
        signal.connect(receiver)
    send = signal.asend

    async def run(times: int) -> float:
        event = Ordered()
        begun = clock()
        for _ in range(times):
            await send(None, event=event)
        return clock() - begun

    yield run


def _receiver(handler: Handler) -> Callable[..., Awaitable[None]]:
    async def receive(sender: object, event: object, **_: object) -> None:
        await handler(event)

    return receive


@asynccontextmanager
async def fastapi_events(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    local = load("fastapi_events.handlers.local").LocalHandler()
    for handler in handlers:
        local.register(handler, event_name="ordered")
    yield awaited(local.handle, ("ordered", {"number": 1}))


@asynccontextmanager
async def litestar(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    events = load("litestar.events")
    latch = Latch(len(handlers))
    listeners = [events.listener("ordered")(latch.counting(handler)) for handler in handlers]
    async with events.SimpleEventEmitter(listeners) as emitter:
        yield emitted(partial(emitter.emit, "ordered"), latch)


@asynccontextmanager
async def cqrs(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    module = load("cqrs")

    kind = event_class(module.DomainEvent)
    bound = module.EventMap()
    for handler in handlers:
        bound.bind(kind, _handler_class(module.EventHandler, handler))
    emitter = module.EventEmitter(event_map=bound, container=Container())
    yield awaited(emitter.emit, kind())


def _handler_class(base: Any, handler: Handler) -> type:
    class Handles(base):  # type: ignore[misc]
        async def handle(self, event: object) -> None:
            await handler(event)

    return Handles


class Container:
    """The least that python-cqrs takes for a container."""

    async def resolve(self, kind: Callable[[], Any]) -> Any:
        return kind()


@asynccontextmanager
async def bubus(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    module = load("bubus")
    bus = module.EventBus(parallel_handlers=True)
    kind = event_class(module.BaseEvent)
    for handler in handlers:
        bus.on(kind, handler)
    try:
        yield _once_each(bus.dispatch, kind)
    finally:
        await bus.stop(clear=True)


@asynccontextmanager
async def abxbus(handlers: Sequence[Handler]) -> AsyncGenerator[Run]:
    module = load("abxbus")
    bus = module.EventBus(event_handler_concurrency="parallel", max_history_drop=True)
    kind = event_class(module.BaseEvent)
    for handler in handlers:
        bus.on(kind, handler)
    try:
        yield _once_each(bus.emit, kind)
    finally:
        await bus.destroy(clear=True)


def event_class(base: Any) -> Any:
    """An event as a library wants it, with one field."""

    class PlacedEvent(base):  # type: ignore[misc]
        number: int = 1

    return PlacedEvent


def _once_each(emit: Callable[[Any], Awaitable[object]], kind: Callable[[], Any]) -> Run:
    """As `awaited`, with an event of its own for each operation, made before the clock starts."""

    async def run(times: int) -> float:
        events = [kind() for _ in range(times)]
        begun = clock()
        for event in events:
            await emit(event)
        return clock() - begun

    return run


PEERS: Sequence[Peer] = (
    Peer("aiosignal", "one after the other; the first failure ends it", ANY_LOOP, aiosignal),
    Peer("blinker", "one after the other; the first failure ends it", ANY_LOOP, blinker),
    Peer("psygnal", "one after the other, from a queue; failures are printed", ANY_LOOP, psygnal),
    Peer("pyee", "concurrently, in loose tasks on asyncio", ANY_LOOP, pyee),
    Peer("django", "concurrently; a failure cancels the others", ASYNCIO, django),
    Peer(
        "fastapi-events", "one after the other; the first failure ends it", ASYNCIO, fastapi_events
    ),
    Peer("litestar", "concurrently; failures are logged", ANY_LOOP, litestar),
    Peer("python-cqrs", "concurrently; failures are logged", ASYNCIO, cqrs),
    Peer("bubus", "concurrently; failures are kept in the event", ASYNCIO, bubus),
    Peer("abxbus", "concurrently; failures are kept in the event", ASYNCIO, abxbus),
)
