"""An observer for OpenTelemetry: what `Observer.delivery` is told suffices for its spans."""

from collections.abc import Awaitable, Generator
from contextlib import contextmanager
from functools import partial

import anyio
import pytest
from anyio import to_thread
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanKind, StatusCode, Tracer
from starlette.types import Receive, Scope, Send

from eventkit import Delivery, EventBus, Observer
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, lifespan_of, respond
from tests.witness import ignore

pytestmark = pytest.mark.anyio


class Tracing(Observer):
    """Gives each delivery a span: a child of its publisher's, or linked to it.

    A delivery may begin when its publisher's span has ended long ago; a trace of its own with a
    link shows that better where the two are far apart.
    """

    def __init__(self, tracer: Tracer, *, linked: bool = False) -> None:
        self._tracer = tracer
        self._linked = linked

    @contextmanager
    def delivery(self, delivery: Delivery) -> Generator[None]:
        publisher = trace.get_current_span().get_span_context()
        with self._tracer.start_as_current_span(
            f"process {delivery.handler}",
            context=Context() if self._linked else None,
            links=[Link(publisher)] if self._linked and publisher.is_valid else [],
            kind=SpanKind.CONSUMER,
            attributes={"messaging.message.id": str(delivery.id)},
        ):
            yield


class Collected:
    """The spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = provider.get_tracer("tests")

    def __getitem__(self, name: str) -> ReadableSpan:
        [span] = [span for span in self._exporter.get_finished_spans() if span.name == name]
        return span

    def parent_of(self, name: str) -> str | None:
        """The name of a span's parent."""
        parent = self[name].parent
        return None if parent is None else self._named(parent.span_id)

    def linked_to(self, name: str) -> list[str]:
        """The names of the spans that it has links to."""
        return [self._named(link.context.span_id) for link in self[name].links]

    def trace_of(self, name: str) -> int:
        """The number of the trace that a span is part of."""
        context = self[name].context
        assert context is not None
        number: int = context.trace_id
        return number

    def _named(self, span_id: int) -> str:
        [name] = [
            span.name
            for span in self._exporter.get_finished_spans()
            if span.context is not None and span.context.span_id == span_id
        ]
        return name


@pytest.fixture
def spans() -> Collected:
    return Collected()


@pytest.fixture
def bus(spans: Collected) -> EventBus:
    """A bus with a chain of three handlers, each with a span of its own inside."""
    bus = EventBus()

    @bus.on(int, name="first")
    async def first(event: int) -> None:
        with spans.tracer.start_as_current_span("in first"):
            await anyio.lowlevel.checkpoint()
            bus.publish("caused")

    @bus.on(int, name="thread")
    def thread(event: int) -> None:
        spans.tracer.start_span("in thread").end()

    @bus.on(str, name="second")
    async def second(event: str) -> None:
        spans.tracer.start_span("in second").end()

    return bus


async def in_a_job(bus: EventBus, publish: partial[None]) -> None:
    async with bus.context():
        publish()


async def from_a_thread(bus: EventBus, publish: partial[None]) -> None:
    async with bus.context():
        await to_thread.run_sync(publish)


async def behind_a_response(bus: EventBus, publish: partial[None]) -> None:
    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        publish()
        await respond(send)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await endpoint(scope, receive, send)
        else:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    served = EventContextMiddleware(app, bus, background=True)
    async with lifespan_of(served):
        await Exchange(method="POST", spec_version="2.3").run(served)


class Publish:
    """Publish within a span that ends at once."""

    def __init__(self, bus: EventBus, tracer: Tracer) -> None:
        self._bus = bus
        self._tracer = tracer

    def __call__(self) -> None:
        with self._tracer.start_as_current_span("publisher"):
            self._bus.publish(1)


Where = partial[Awaitable[None]]
EVERYWHERE = pytest.mark.parametrize("where", [in_a_job, from_a_thread, behind_a_response])


@EVERYWHERE
async def test_a_deliverys_span_is_current_in_its_handler_and_a_child_of_its_publishers(
    bus: EventBus, spans: Collected, where: Where
) -> None:
    bus.observe(Tracing(spans.tracer))
    await where(bus, partial(Publish(bus, spans.tracer)))

    assert {name: spans.parent_of(name) for name in LINEAGE} == LINEAGE
    assert len({spans.trace_of(name) for name in LINEAGE}) == 1
    assert spans["process first"].kind is SpanKind.CONSUMER


LINEAGE = {
    "publisher": None,
    "process first": "publisher",
    "in first": "process first",
    "process thread": "publisher",
    "in thread": "process thread",
    "process second": "in first",
    "in second": "process second",
}


@EVERYWHERE
async def test_a_deliverys_span_may_begin_a_trace_that_is_linked_to_its_publishers(
    bus: EventBus, spans: Collected, where: Where
) -> None:
    bus.observe(Tracing(spans.tracer, linked=True))
    await where(bus, partial(Publish(bus, spans.tracer)))

    for name, publisher in (
        ("first", "publisher"),
        ("thread", "publisher"),
        ("second", "in first"),
    ):
        assert spans.parent_of(f"process {name}") is None
        assert spans.linked_to(f"process {name}") == [publisher]
        assert spans.parent_of(f"in {name}") == f"process {name}"


async def test_a_failure_is_in_the_span_of_its_delivery_and_in_no_other(
    bus: EventBus, spans: Collected
) -> None:
    bus.observe(Tracing(spans.tracer))
    bus.report_failure = ignore

    @bus.on(int, name="fails")
    async def fails(event: int) -> None:
        raise ValueError("no mail today")

    async with bus.context() as unit:
        bus.publish(1)
        number = {d.handler: str(d.id) for d in unit.pending}

    failed = spans["process fails"]
    assert failed.status.status_code is StatusCode.ERROR
    assert [event.name for event in failed.events] == ["exception"]
    assert failed.attributes == {"messaging.message.id": number["fails"]}
    assert spans["process first"].status.status_code is StatusCode.UNSET
    assert trace.get_current_span() is trace.INVALID_SPAN
