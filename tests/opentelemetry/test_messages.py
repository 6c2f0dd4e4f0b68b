"""Messages between services: one trace with FastStream's middleware, and a link without it."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faststream")
pytest.importorskip("pydantic")
pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from faststream import BaseMiddleware
from opentelemetry import baggage, context
from opentelemetry.trace import NoOpTracerProvider
from sqlalchemy import MetaData

from eventkit import EventBus
from eventkit._core.ambient import carried
from eventkit.faststream import Bridge
from eventkit.opentelemetry import instrument
from eventkit.outbox import Outbox, add_tables
from tests.conftest import BACKENDS
from tests.databases import sqlite
from tests.faststream.services import (
    AT_ONCE,
    KINDS,
    BillSent,
    Kind,
    OrderPlaced,
    Sent,
    Watch,
    broker_of,
    in_memory,
    publisher_of,
    subscribers_of,
)
from tests.opentelemetry.collected import Collected

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    """Run on asyncio alone: FastStream knows no other event loop."""
    return BACKENDS["asyncio"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each of the brokers."""
    kind: Kind = request.param
    return kind


def middleware_of(kind: Kind, telemetry: Collected) -> Any:  # Any: each broker has its own class
    module = import_module(f"faststream.{kind}.opentelemetry")
    made = getattr(module, f"{kind.capitalize()}TelemetryMiddleware")
    return made(tracer_provider=telemetry.tracers, meter_provider=telemetry.meters)


class Apart(BaseMiddleware[Any, Any]):
    """Has a message handled as a broker does: not in the context of its sender."""

    async def consume_scope(self, call_next: Any, msg: Any) -> Any:
        token = context.attach(context.Context())
        try:
            return await call_next(msg)
        finally:
            context.detach(token)


class Services:
    """Two services and a broker: one forwards orders, the other one sends bills for them.

    Attributes:
        orders: The bus of the first one.
        billing: The bus of the other one.
        telemetry: Of both.
        seen: The tenants that the other one's handler has read from the baggage.
    """

    def __init__(
        self, kind: Kind, telemetry: Collected, *, middleware: bool, durable: bool = False
    ) -> None:
        self.orders, self.billing = EventBus(name="orders"), EventBus(name="billing")
        self.telemetry = telemetry
        self.seen: list[object] = []
        self._watch = Watch()
        middlewares: list[Any] = [self._watch, Apart]
        if middleware:
            middlewares.append(middleware_of(kind, telemetry))
        self._broker = broker_of(kind, middlewares=middlewares)
        sending, receiving = (
            Bridge(bus, source=f"/{bus.name}") for bus in (self.orders, self.billing)
        )
        publisher = publisher_of(self._broker, "orders")
        sending.forward(OrderPlaced, publisher, name="forward")
        receiving.consume(
            subscribers_of(self._broker, "orders"),
            OrderPlaced,
            dead_letter=publisher_of(self._broker, "dead"),
            durable=durable,
            retry=None if durable else AT_ONCE,
        )

        @self.billing.on(OrderPlaced, durable=durable, name="bill")
        async def bill(event: OrderPlaced) -> None:
            self.seen.append(baggage.get_baggage("tenant"))
            self.billing.publish(BillSent(event.order_id))

        @self.billing.on(BillSent, name="count")
        async def count(event: BillSent) -> None: ...

    @property
    def sent(self) -> Sent:
        """The one order that was sent."""
        (sent,) = [each for each in self._watch.sent if each.place == "orders"]
        return sent

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        async with in_memory(self._broker):
            yield

    async def order(self) -> None:
        """As a request does that has a span and some baggage."""
        token = context.attach(baggage.set_baggage("tenant", "acme"))
        try:
            with self.telemetry.tracer.start_as_current_span("request"):
                async with self.orders.context():
                    self.orders.publish(OrderPlaced(7))
        finally:
            context.detach(token)


async def test_with_faststreams_middleware_all_is_one_trace(
    kind: Kind, telemetry: Collected
) -> None:
    services = Services(kind, telemetry, middleware=True)
    telemetry.instrument(services.orders)
    telemetry.instrument(services.billing)
    async with services.running():
        await services.order()

    assert len({span.context.trace_id for span in telemetry.spans if span.context}) == 1
    [root] = [span for span in telemetry.spans if span.parent is None]
    assert root.name == "request"
    assert not any(span.links for span in telemetry.spans)
    assert telemetry.parent_of("run forward") == "request"
    consumed = telemetry.parent_of("run bill")
    assert consumed is not None
    assert consumed.endswith("orders process")  # FastStream's
    assert telemetry.parent_of("run count") == "run bill"


async def test_without_it_the_handlers_of_a_message_are_linked_to_who_sent_it(
    kind: Kind, telemetry: Collected
) -> None:
    services = Services(kind, telemetry, middleware=False)
    telemetry.instrument(services.orders)
    telemetry.instrument(services.billing)
    async with services.running():
        await services.order()

    assert telemetry.trace_of("run forward") == telemetry.trace_of("request")
    assert telemetry.linked_to("run bill") == ["run forward"]
    assert telemetry.parent_of("run bill") is None
    assert telemetry.parent_of("run count") == "run bill"
    assert telemetry.linked_to("run count") == []
    assert services.seen == ["acme"]


async def test_a_message_of_a_sender_without_a_trace_begins_one_without_a_link(
    kind: Kind, telemetry: Collected
) -> None:
    services = Services(kind, telemetry, middleware=False)
    telemetry.instrument(services.billing)
    async with services.running():
        await services.order()

    assert telemetry.parent_of("run bill") is None
    assert telemetry.linked_to("run bill") == []


@pytest.mark.parametrize("middleware", [True, False])
async def test_what_an_outbox_keeps_of_a_message_is_linked(
    kind: Kind, telemetry: Collected, middleware: bool, database: Path
) -> None:
    services = Services(kind, telemetry, middleware=middleware, durable=True)
    telemetry.instrument(services.orders)
    telemetry.instrument(services.billing)
    add_tables(metadata := MetaData())
    with sqlite(database) as engine:
        metadata.create_all(engine)
        with Outbox(services.billing, engine, relay=False):
            async with services.running():
                await services.order()
            assert services.seen == []
        with Outbox(services.billing, engine) as outbox:
            await outbox.run_due()

    assert telemetry.parent_of("run bill") is None
    [linked] = telemetry.linked_to("run bill")
    assert linked.endswith("orders process") if middleware else linked == "run forward"
    assert telemetry.parent_of("run count") == "run bill"


async def test_a_service_without_an_sdk_hands_the_trace_on(
    kind: Kind, telemetry: Collected
) -> None:
    services = Services(kind, telemetry, middleware=False)
    instrument(services.orders, tracer_provider=NoOpTracerProvider())
    before = carried.set({"traceparent": f"00-{1:032x}-{1:016x}-01", "tracestate": "a=b"})
    async with services.running(), services.orders.context():
        services.orders.publish(OrderPlaced(7))
    carried.reset(before)

    assert services.sent.headers["traceparent"] == f"00-{1:032x}-{1:016x}-01"
    assert services.sent.headers["tracestate"] == "a=b"


async def test_the_state_of_another_trace_is_not_sent_with_this_one(
    kind: Kind, telemetry: Collected
) -> None:
    services = Services(kind, telemetry, middleware=False)
    telemetry.instrument(services.orders)
    before = carried.set({"traceparent": f"00-{1:032x}-{1:016x}-01", "tracestate": "a=b"})
    async with services.running(), services.orders.context():
        services.orders.publish(OrderPlaced(7))
    carried.reset(before)

    number = f"{telemetry.trace_of('run forward'):032x}"
    assert services.sent.headers["traceparent"].split("-")[1] == number
    assert "tracestate" not in services.sent.headers
