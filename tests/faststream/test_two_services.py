"""The example of two services on brokers in memory, each with a database of its own."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

import httpx

from eventkit.testing import EventCapture
from eventkit.wire import encode
from examples.two_services.brokers import BROKERS
from examples.two_services.shop_events import OrderPlaced
from tests.asgi import lifespan_of
from tests.faststream.services import NEEDS_AIOKAFKA, in_memory

pytestmark = pytest.mark.anyio

ON_EACH = [pytest.param(name, marks=NEEDS_AIOKAFKA if name == "kafka" else ()) for name in BROKERS]
ADA = {"customer": "ada", "total_cents": 990}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio alone: FastStream and aiosqlite know no other event loop."""
    return "asyncio"


@dataclass(frozen=True, slots=True)
class Services:
    """Both services, running. Any: what the module of a service has."""

    orders: Any
    billing: Any
    ordered: EventCapture
    billed: EventCapture

    async def post(self, order_id: int) -> httpx.Response:
        async with _client(self.orders) as client:
            return await client.post(f"/orders/{order_id}", json=ADA)

    async def get(self, service: ModuleType, path: str) -> httpx.Response:
        async with _client(service) as client:
            return await client.get(path)

    async def invoices(self) -> list[int]:
        """The orders that have an invoice, once all that is at hand has ended."""
        await self.ordered.idle()
        await self.billed.idle()
        answer: list[int] = (await self.get(self.billing, "/invoices")).json()
        return answer

    async def send(self, event: OrderPlaced, alter: Callable[[bytes], bytes] = bytes) -> None:
        """Send a message as some other service would."""
        wired = encode(event, source="/orders")
        (publisher,) = self.orders.broker.client.publishers
        await publisher.publish(alter(wired.body), headers=wired.headers())


def _client(service: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(service.app), base_url="http://testserver"
    )


@pytest.fixture(params=["nats"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which broker; a test may ask for others."""
    name: str = request.param
    return name


@pytest.fixture
async def services(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Services]:
    """Give both services, made anew: a module of theirs is one service."""
    monkeypatch.setenv("SHOP_BROKER", kind)
    for name in ("orders", "billing"):
        monkeypatch.delitem(sys.modules, f"examples.two_services.{name}", raising=False)
        monkeypatch.setenv(f"{name.upper()}_DATABASE", f"sqlite+aiosqlite:///{tmp_path / name}.db")
    orders: Any = import_module("examples.two_services.orders")
    billing: Any = import_module("examples.two_services.billing")
    async with AsyncExitStack() as stack:
        for service in (orders, billing):
            stack.callback(service.outbox.detach)
        await stack.enter_async_context(in_memory(orders.broker.client, billing.broker.client))
        await stack.enter_async_context(lifespan_of(billing.app))
        await stack.enter_async_context(lifespan_of(orders.app))
        ordered = stack.enter_context(EventCapture(orders.bus))
        billed = stack.enter_context(EventCapture(billing.bus))
        yield Services(orders, billing, ordered, billed)


@pytest.mark.parametrize("kind", ON_EACH, indirect=True)
async def test_an_order_has_its_invoice(services: Services) -> None:
    response = await services.post(7)
    event = await services.ordered.wait_for(OrderPlaced)
    await services.billed.wait_for(OrderPlaced)

    assert response.status_code == 201
    assert event == OrderPlaced(7, "ada", 990)
    assert await services.invoices() == [7]
    assert services.billed.handled.by("billing.write_invoice") == [event]
    for service in (services.orders, services.billing):
        assert (await service.outbox.stats()).ready == 0
        assert (await services.get(service, "/healthz")).json() == {"broker": True}


async def test_an_order_that_exists_is_refused_and_nobody_hears_of_it(services: Services) -> None:
    await services.post(7)
    response = await services.post(7)
    await services.ordered.wait_for(OrderPlaced)
    await services.billed.wait_for(OrderPlaced)

    assert (response.status_code, response.json()) == (409, {"detail": "there is an order 7"})
    assert len(services.ordered.discarded) == 1
    assert await services.invoices() == [7]


@pytest.mark.parametrize("kind", ON_EACH, indirect=True)
async def test_a_message_that_comes_twice_is_one_invoice(services: Services) -> None:
    event = OrderPlaced(7, "ada", 990)
    await services.send(event)
    await services.send(event)

    assert await services.invoices() == [7]


@pytest.mark.parametrize("kind", ON_EACH, indirect=True)
async def test_what_cannot_be_read_is_a_dead_letter_and_no_invoice(services: Services) -> None:
    (dead_letters,) = services.billing.broker.client.publishers
    event = OrderPlaced(7, "ada", 990)
    await services.send(event, lambda body: body.replace(b'":990', b'":"some"'))

    assert dead_letters.mock.call_count == 1
    assert services.billed.published == []
    assert await services.invoices() == []


async def test_an_invoice_that_failed_is_written_later(services: Services) -> None:
    services.billed.fail("billing.write_invoice", ConnectionError("disk full"), times=1)
    await services.post(7)
    await services.billed.wait_for(OrderPlaced)
    assert await services.invoices() == []

    await services.billing.outbox.run_due(within=60)

    assert await services.invoices() == [7]


async def test_a_service_is_not_healthy_where_a_subscriber_has_stopped(services: Services) -> None:
    (subscriber, *_) = services.billing.broker.client.subscribers
    subscriber.running = False
    response = await services.get(services.billing, "/healthz")

    assert (response.status_code, response.json()) == (503, {"broker": False})


async def test_without_a_connection_a_service_is_not_healthy(services: Services) -> None:
    services.orders.broker.client.ping.return_value = False
    response = await services.get(services.orders, "/healthz")

    assert (response.status_code, response.json()) == (503, {"broker": False})
    assert (await services.post(7)).status_code == 201
