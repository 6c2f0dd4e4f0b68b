"""The page about other services does as it says, on each broker."""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from faststream.exceptions import NackMessage, RejectMessage

from eventkit.wire import decode, encode
from tests.brokers.conftest import OwnServers
from tests.brokers.kinds import untyped
from tests.project.test_services import PARTS, Page, page, put
from tests.project.test_services import program as service
from tests.serving import Server, on_uvicorn, run_python, serving

__all__ = ["page"]

BROKERS = {"nats": "nats", "rabbit": "rabbitmq", "redis": "redis", "kafka": "kafka"}
URLS = {
    "nats": "nats://localhost:4222",
    "rabbit": "amqp://guest:guest@localhost:5672/",
    "redis": "redis://localhost:6379",
    "kafka": "localhost:9092",
}
PLACES = re.compile(r'"(orders|dead|billing|replay|report)(?=[".])')


class Services:
    """The page's two services, with places of their own on a broker."""

    def __init__(self, page: Page, kind: str, url: str, *, durable: bool = False) -> None:
        self.folder = page.folder
        self._kind = kind
        self._url = url
        self._suffix = f"-{uuid4().hex[:8]}"
        self._stack = ExitStack()
        (self.folder / "shop_events.py").write_text(PARTS["shop_events.py"])
        self.write("orders.py", service("orders.py", kind, durable=durable))
        self.write("billing.py", service("billing.py", kind, durable=durable))

    def write(self, name: str, text: str) -> None:
        """Write a file, with the names of this test's places."""
        text = PLACES.sub(rf'"\1{self._suffix}', text).replace(URLS[self._kind], self._url)
        text = text.replace("sqlite:///", f"sqlite:///{self.folder}/")
        (self.folder / name).write_text(text)

    def serve(self, name: str) -> Server:
        command = on_uvicorn(f"{name}:app", folder=self.folder)
        return self._stack.enter_context(serving(command))

    def run(self, name: str) -> str:
        """Run a program of the page to its end, and give what it prints."""
        self.write(name, PARTS[name])
        done = run_python(name, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """End what was started, and remove its places from the broker."""
        self._stack.close()
        if self._kind != "kafka":  # which ends with the tests
            asyncio.run(self._remove())

    async def _remove(self) -> None:
        orders, dead, billing = (f"{name}{self._suffix}" for name in ("orders", "dead", "billing"))
        if self._kind == "nats":
            client = await untyped("nats").connect(self._url)
            for each in (orders, dead):
                with suppress(untyped("nats.js.errors").NotFoundError):
                    await client.jetstream().delete_stream(each)
            await client.close()
        elif self._kind == "rabbit":
            async with await untyped("aio_pika").connect(self._url) as connection:
                channel = await connection.channel()
                for each in (billing, f"{dead}.billing"):
                    await channel.queue_delete(each)
                await channel.exchange_delete(orders)
        else:
            async with untyped("redis.asyncio").from_url(self._url) as redis:
                await redis.delete(orders, f"{dead}.billing")


Opened = Callable[..., Services]


@pytest.fixture
def services(page: Page, broker_url: Callable[[str], str]) -> Iterator[Opened]:
    opened: list[Services] = []

    def open_services(kind: str, *, durable: bool = False) -> Services:
        services = Services(page, kind, broker_url(BROKERS[kind]), durable=durable)
        opened.append(services)
        return services

    yield open_services
    for each in opened:
        each.close()


def get(server: Server, method: str, path: str) -> int:
    with closing(server.connect()) as connection:
        connection.request(method, path)
        return connection.getresponse().status


@pytest.mark.parametrize("durable", [False, True], ids=["in memory", "durable"])
@pytest.mark.parametrize("kind", BROKERS)
def test_an_order_becomes_an_invoice_also_where_billing_was_away(
    services: Opened, kind: str, durable: bool
) -> None:
    both = services(kind, durable=durable)
    billing = both.serve("billing")
    orders = both.serve("orders")

    assert get(orders, "POST", "/orders/7") == 200
    billing.wait_for("invoice for order 7: 9.90")
    assert get(billing, "GET", "/healthz") == 200

    billing.signal()
    billing.wait()
    assert get(orders, "POST", "/orders/8") == 200
    billing = both.serve("billing")
    billing.wait_for("invoice for order 8: 9.90")
    assert "order 7" not in billing.output


@pytest.mark.xdist_group("own nats")
def test_a_durable_order_outlives_an_outage_of_the_broker(
    page: Page, own_servers: OwnServers
) -> None:
    broker = own_servers.get("nats")
    both = Services(page, "nats", broker.url, durable=True)
    try:
        billing, orders = both.serve("billing"), both.serve("orders")
        broker.kill()
        assert get(orders, "POST", "/orders/7") == 200
        orders.wait_for("event handler failed")
        broker.start()
        billing.wait_for("invoice for order 7: 9.90")
    finally:
        broker.resume()
        both.close()


def test_what_is_foreign_is_read_and_what_is_sent_is_read_elsewhere(services: Opened) -> None:
    both = services("nats")
    billing = both.serve("billing")

    both.run("foreign_sender.py")
    billing.wait_for("invoice for order 8: 12.00")
    assert both.run("foreign_receiver.py") == "shop.order.placed.v1 8 12.00\n"


@pytest.mark.parametrize(
    ("kind", "program"), [("nats", "replay.py"), ("rabbit", "replay_rabbit.py")]
)
def test_a_dead_letter_is_replayed(services: Opened, kind: str, program: str) -> None:
    both = services(kind)
    text = (both.folder / "billing.py").read_text()
    handler = "    print(f"
    fails = "    raise RuntimeError('no printer')\n"
    failing = put(text, "^" + re.escape(handler), fails + handler)
    (both.folder / "billing.py").write_text(failing)
    billing, orders = both.serve("billing"), both.serve("orders")
    get(orders, "POST", "/orders/7")
    billing.wait_for("a message has become a dead letter")
    billing.signal()
    billing.wait()

    (both.folder / "billing.py").write_text(text)
    told = both.run(program)
    assert "'eventkit-reason': 'failed'" in told
    assert "RuntimeError: no printer" in told
    assert "no dead letter is left" in told
    billing = both.serve("billing")
    billing.wait_for("invoice for order 7: 9.90")


@pytest.mark.anyio
async def test_the_inbox_of_the_page_in_redis_runs_again_what_has_not_ended(
    page: Page, service_url: Callable[[str], str]
) -> None:
    url = service_url("redis")
    page.write()
    inbox = PARTS["billing.py, an inbox in Redis"].replace("Redis()", f"Redis.from_url({url!r})")
    path = page.folder / "billing.py"
    path.write_text(put(path.read_text(), r"^bridge\.consume\([^\n]*\)$", inbox))
    billing: Any = page.load("billing")
    order: object = billing.OrderPlaced(7, "ada", Decimal("9.90"))
    wired = encode(order, source="/orders")
    received = decode(wired.headers(), wired.body, billing.OrderPlaced)
    key = f"billing {received.unique_id}"
    runs: list[object] = []
    failing = True

    async def note(event: object) -> None:
        runs.append(event)
        if failing:
            raise RuntimeError("no printer")

    billing.bus.subscribe(type(order), note)
    async with billing.seen:
        with pytest.raises(RejectMessage):
            await billing.once(received)
        failing = False
        await billing.seen.set(key, "begun")  # as a process leaves it that has died
        with pytest.raises(NackMessage):
            await billing.once(received)
        await billing.seen.delete(key)
        await billing.once(received)
        await billing.once(received)
        await billing.seen.delete(key)
    assert len(runs) == 2
