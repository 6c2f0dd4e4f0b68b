"""A service on a broker, as its users would write it: FastAPI on uvicorn, with a bridge.

It reads commands as lines of JSON, and says what it does as lines of JSON. Handlers do what the
event says: they fail, hang until they are released, or kill their process.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Protocol

import stamina
import uvicorn
from fastapi import FastAPI

from eventkit import EventBus, current_delivery
from eventkit.faststream import Bridge
from eventkit.starlette import EventContextMiddleware
from tests.brokers.happenings import Placed, customer_of
from tests.brokers.kinds import KINDS, import_clients
from tests.crash.worker import Lines, conservation, say

import_clients()


class Service:
    """What the process does: forwards, consumes, or both on a bus each."""

    def __init__(self, options: argparse.Namespace) -> None:
        kind = KINDS[options.kind]
        self.bus = EventBus(handler_timeout=None)
        self.broker = kind.broker(options.url)
        self.bridge = Bridge(self.bus, source=f"/{options.name}")
        self.healthy: bool = options.healthy
        self.go = asyncio.Event()
        self.attempts: Counter[int] = Counter()
        self.tasks: set[asyncio.Task[None]] = set()
        if options.group is None:
            self.bridge.forward(
                Placed,
                kind.publisher(self.broker, options.orders),
                key=customer_of,
                timeout=options.timeout,
            )
            return
        self.bridge.consume(
            kind.subscriber(
                self.broker, options.orders, options.group, returns_after=options.returns_after
            ),
            Placed,
            dead_letter=kind.dead_letters(self.broker, options.dead),
            within=0.75 * options.returns_after,
            max_deliveries=options.max_deliveries,
            retry=stamina.AsyncRetryingCaller(
                attempts=4,
                timeout=None,
                wait_initial=options.pause,
                wait_max=options.pause,
                wait_jitter=0.0,
            ),
        )
        self.bus.on(Placed)(self.handle)

    async def handle(self, event: Placed) -> None:
        self.attempts[event.number] += 1
        facts = {"number": event.number, "attempt": self.attempts[event.number]}
        say("begins", id=str(current_delivery().event_id), **facts)
        match event.how:
            case "fails twice" if facts["attempt"] < 3:
                raise RuntimeError("not yet")
            case "poison":
                raise RuntimeError("poison")
            case "fails here" if not self.healthy:
                raise RuntimeError("fails here")
            case "hangs" if not self.healthy:
                say("waits", **facts)
                await self.go.wait()
            case "kills":
                say("dies", **facts)
                os.kill(os.getpid(), signal.SIGKILL)
            case _:
                pass
        say("ends", **facts)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncGenerator[None]:
        try:
            async with self.broker:
                await self.broker.start()
                commands = asyncio.create_task(self.obey())
                say("ready", pid=os.getpid())
                yield
                commands.cancel()
        finally:  # the client of NATS refuses to close while it reconnects
            say("stopped", **conservation(self.bus))

    async def obey(self) -> None:
        async for command in commands():
            match command.pop("do"):
                case "go":
                    self.go.set()
                case "heal":
                    self.healthy = True
                case "stats":
                    say("stats", **conservation(self.bus))
                case "publish":
                    task = asyncio.create_task(self.publish(**command))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
                case other:
                    raise LookupError(other)

    async def publish(self, number: int, how: str = "", times: int = 1) -> None:
        """Send events one by one, and say of each whether the broker has it."""
        for each in range(number, number + times):
            try:
                await self.bus.dispatch(Placed(each, how=how))
            except Exception as error:
                say("published", number=each, taken=False, error=repr(error)[:300])
            else:
                say("published", number=each, taken=True)


async def commands() -> AsyncGenerator[dict[str, Any]]:
    """Lines of JSON from the standard input."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    while line := await lines.readline():
        yield json.loads(line)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=[*KINDS], required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--name", default="service")
    parser.add_argument("--orders", required=True, help="the channel of the events")
    parser.add_argument("--group", help="consume as this group, instead of forwarding")
    parser.add_argument("--dead", help="the channel of dead letters")
    parser.add_argument("--healthy", action="store_true", help="what fails elsewhere works here")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between attempts")
    parser.add_argument("--returns-after", type=float, default=2.0)
    parser.add_argument("--max-deliveries", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=10.0)
    options = parser.parse_args(arguments)
    stamina.instrumentation.set_on_retry_hooks([])  # they write to the standard output
    asyncio.run(serve(partial(Service, options)))


class Served(Protocol):
    """What a program is, beside its server."""

    bus: EventBus

    def lifespan(self, app: FastAPI) -> AbstractAsyncContextManager[None]: ...


async def serve(make: Callable[[], Served]) -> None:
    """Serve a service until a signal ends it. What eventkit logs is said, too."""
    logger = logging.getLogger("eventkit")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    service = make()
    app = FastAPI(lifespan=service.lifespan)
    app.add_middleware(EventContextMiddleware, bus=service.bus)
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=10)
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    main()
