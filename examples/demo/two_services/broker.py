"""Owns the broker of the demo, found or started, and a neighbour that sends odd messages to it.

Knows nothing of the course of the demo. NATS is started if `nats-server` is in the path; else a
broker that runs already is used, and left as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import anyio
from anyio.abc import Process, SocketStream

from examples.demo.trace import clock_ns
from examples.two_services.brokers import BROKERS, Broker

_SECONDS_TO_ANSWER = 2.0
_SECONDS_TO_START = 10.0
_SECONDS_TO_ARRIVE = 10.0

MISSING = """\
Two services need a broker between them. The demo starts NATS by itself where `nats-server` is in
the path; `apt install nats-server` and `brew install nats-server` put it there. Or start one of
these, and run the demo again, for the last two with SHOP_BROKER=rabbitmq or SHOP_BROKER=redis:

  docker run --rm -p 4222:4222 nats -js
  docker run --rm -p 5672:5672 rabbitmq
  docker run --rm -p 6379:6379 redis

SHOP_BROKER_URL says where it is, if it is not there."""


class NoBroker(Exception):
    """There is no broker that the demo can use; the text says why.

    Attributes:
        was_named: Whether the environment asks for one.
    """

    def __init__(self, why: str, *, was_named: bool) -> None:
        super().__init__(why)
        self.was_named = was_named


@dataclass(frozen=True, slots=True)
class BrokerAtHand:
    """A broker that answers.

    Attributes:
        kind: A name in `BROKERS`.
        url: Its address.
        prefix: How the names of all places begin that the demo makes there.
        is_own: Whether the demo has started it, and ends it.
    """

    kind: str
    url: str
    prefix: str
    is_own: bool

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which the services find it."""
        return {
            "SHOP_BROKER": self.kind,
            "SHOP_BROKER_URL": self.url,
            "SHOP_PREFIX": self.prefix,
        }

    def __str__(self) -> str:
        where = urlsplit(self.url)
        whose = "of the demo's own" if self.is_own else "that was running"
        return f"the broker is {self.kind} at {where.hostname}:{where.port}, {whose}"


@asynccontextmanager
async def broker_at_hand(folder: Path) -> AsyncGenerator[BrokerAtHand]:
    """Start NATS with its files in a folder, or use a broker that runs.

    Raises:
        NoBroker: Neither is possible.
    """
    kind, url = os.environ.get("SHOP_BROKER", "nats"), os.environ.get("SHOP_BROKER_URL")
    was_named = not {"SHOP_BROKER", "SHOP_BROKER_URL"}.isdisjoint(os.environ)
    if kind not in _SWEEPS:
        raise NoBroker(f"the demo knows {', '.join(_SWEEPS)}, not {kind!r}", was_named=True)
    program = shutil.which("nats-server")
    if kind == "nats" and url is None and program is not None:
        async with _nats_server(program, folder) as own:
            yield BrokerAtHand(kind, own, "", is_own=True)
        return
    url = url or BROKERS[kind][1]
    if (problem := await _problem(kind, url)) is not None:
        raise NoBroker(problem, was_named=was_named)
    # Others may use it, this demo in another terminal too.
    found = BrokerAtHand(kind, url, f"eventkit-demo-{uuid4().hex[:8]}-", is_own=False)
    try:
        yield found
    finally:
        with anyio.move_on_after(_SECONDS_TO_START, shield=True):
            await _sweep(found)


@asynccontextmanager
async def _nats_server(program: str, folder: Path) -> AsyncGenerator[str]:
    """Run a server of our own, and give its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"nats://127.0.0.1:{port}"
    command = [program, "-js", "-a", "127.0.0.1", "-p", str(port), "-sd", str(folder / "nats")]
    async with await anyio.open_process(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            await _until_it_answers(program, url, process)
            yield url
        finally:
            if process.returncode is None:
                process.terminate()
            with anyio.CancelScope(shield=True):
                await process.wait()


async def _until_it_answers(program: str, url: str, process: Process) -> None:
    deadline = anyio.current_time() + _SECONDS_TO_START
    while (problem := await _problem("nats", url)) is not None:
        if process.returncode is not None or anyio.current_time() > deadline:
            raise NoBroker(f"{program} did not start: {problem}", was_named=True)
        await anyio.sleep(0.05)


async def _problem(kind: str, url: str) -> str | None:
    """Why a broker cannot be used; None if it answers."""
    where = urlsplit(url)
    host, port = where.hostname or "127.0.0.1", where.port or urlsplit(BROKERS[kind][1]).port
    try:
        with anyio.fail_after(_SECONDS_TO_ANSWER):
            async with await anyio.connect_tcp(host, port or 0) as stream:
                if kind != "nats" or await _has_jetstream(stream):
                    return None
    except (OSError, TimeoutError, anyio.EndOfStream):
        return f"no {kind} answers at {host}:{port}"
    return f"NATS at {host}:{port} keeps nothing: start it with -js"


async def _has_jetstream(stream: SocketStream) -> bool:
    """Whether a server of NATS has JetStream, by its greeting."""
    said = await stream.receive()
    while b"\n" not in said:
        said += await stream.receive()
    _, _, info = said.partition(b" ")
    return bool(json.loads(info.splitlines()[0]).get("jetstream"))


async def _sweep(found: BrokerAtHand) -> None:
    """Remove what the demo has made in a broker that is not its own."""
    broker = BROKERS[found.kind][0](found.url)
    async with broker.client:
        await _SWEEPS[found.kind](
            broker.client, f"{found.prefix}orders", f"{found.prefix}billing-dead"
        )


async def _sweep_nats(client: Any, orders: str, dead: str) -> None:
    connection = await client.connect()
    for stream in (orders, dead):
        await connection.jetstream().delete_stream(stream)


async def _sweep_rabbitmq(client: Any, orders: str, dead: str) -> None:
    connection = await client.connect()
    async with connection.channel() as channel:
        await channel.exchange_delete(orders)
        for queue in (f"{orders}.billing", dead):
            await channel.queue_delete(queue)


async def _sweep_redis(client: Any, orders: str, dead: str) -> None:
    connection = await client.connect()
    await connection.delete(orders, dead)


_SWEEPS: Mapping[str, Callable[[Any, str, str], Any]] = {
    "nats": _sweep_nats,
    "rabbitmq": _sweep_rabbitmq,
    "redis": _sweep_redis,
}


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, and when it was seen."""

    headers: Mapping[str, str]
    body: bytes
    seen_ns: int


class Neighbour:
    """A plain client without a bus: sends messages, and reads dead letters.

    Attributes:
        letters: The dead letters that were read.
    """

    def __init__(self, broker: Broker, at_hand: BrokerAtHand) -> None:
        self.letters: list[Letter] = []
        self._orders = broker.publisher(f"{at_hand.prefix}orders")
        for each in _readers(broker, at_hand.kind, f"{at_hand.prefix}billing-dead"):
            each(self._read, decoder=_whole)
        self._news = anyio.Event()

    async def send(self, name: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Send a message on behalf of a request; returns when."""
        at_ns = clock_ns()
        await self._orders.publish(body, headers={**headers}, correlation_id=name)
        return at_ns

    async def until_letters(self, count: int) -> None:
        """Wait until so many were read, or for too long."""
        with anyio.move_on_after(_SECONDS_TO_ARRIVE):
            while len(self.letters) < count:
                await self._news.wait()

    async def _read(self, message: Any) -> None:  # Any: a decoder gives it as it came
        self.letters.append(Letter(message.headers, message.body, clock_ns()))
        self._news.set()
        self._news = anyio.Event()


@asynccontextmanager
async def neighbour(at_hand: BrokerAtHand) -> AsyncGenerator[Neighbour]:
    """Have a neighbour during the block."""
    broker = BROKERS[at_hand.kind][0](at_hand.url)
    someone = Neighbour(broker, at_hand)
    async with broker.opened():
        yield someone


def _readers(broker: Broker, kind: str, place: str) -> list[Any]:
    if kind != "rabbitmq":
        return broker.subscribers(place, "reader")
    from faststream.rabbit import RabbitQueue

    return [broker.client.subscriber(RabbitQueue(place, durable=True))]


async def _whole(message: object) -> object:
    """Decode nothing: these are the messages that cannot be."""
    return message
