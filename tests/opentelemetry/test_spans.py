"""Spans of publishes and of runs: whose children they are, and what they say."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import anyio
import pytest
from anyio import CancelScope, to_thread
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import messaging_attributes as conventions
from opentelemetry.semconv.attributes import error_attributes
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode
from starlette.types import Receive, Scope, Send

from eventkit import Delivery, DomainEvent, EventBus, Observer, current_delivery, named
from eventkit.opentelemetry import instrument
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, lifespan_of, respond
from tests.opentelemetry.collected import Collected
from tests.witness import assert_settled, ignore

pytestmark = pytest.mark.anyio


@named("shop.order.placed")
class OrderPlaced(DomainEvent):
    """An event whose payload nobody may see."""

    def __repr__(self) -> str:
        return "a secret"


Publish = Callable[[], None]


def in_a_span(bus: EventBus, telemetry: Collected, event: object) -> Publish:
    """Publish within a span that ends at once."""

    def publish() -> None:
        with telemetry.tracer.start_as_current_span("publisher"):
            bus.publish(event)

    return publish


async def in_a_job(bus: EventBus, publish: Publish) -> None:
    async with bus.context():
        publish()


async def from_a_thread(bus: EventBus, publish: Publish) -> None:
    async with bus.context():
        await to_thread.run_sync(publish)


async def behind_a_response(bus: EventBus, publish: Publish) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            publish()
            await respond(send)

    served = EventContextMiddleware(app, bus)
    async with lifespan_of(served):
        await Exchange(method="POST", spec_version="2.3").run(served)


Where = Callable[[EventBus, Publish], Awaitable[None]]


@pytest.mark.parametrize("where", [in_a_job, from_a_thread, behind_a_response])
async def test_a_runs_span_is_current_in_its_handler_and_a_child_of_its_publishers(
    bus: EventBus, telemetry: Collected, where: Where
) -> None:
    @bus.on(int, name="first")
    async def first(event: int) -> None:
        with telemetry.tracer.start_as_current_span("in first"):
            await anyio.lowlevel.checkpoint()
            bus.publish("caused")

    @bus.on(int, name="thread")
    def thread(event: int) -> None:
        telemetry.tracer.start_span("in thread").end()

    @bus.on(str, name="second")
    async def second(event: str) -> None:
        telemetry.tracer.start_span("in second").end()

    telemetry.instrument(bus)
    await where(bus, in_a_span(bus, telemetry, 1))

    lineage = {
        "publisher": None,
        "publish builtins:int": "publisher",
        "run first": "publisher",
        "in first": "run first",
        "run thread": "publisher",
        "in thread": "run thread",
        "publish builtins:str": "in first",
        "run second": "in first",
        "in second": "run second",
    }
    assert {name: telemetry.parent_of(name) for name in lineage} == lineage
    assert len(telemetry.spans) == len(lineage)
    assert len({telemetry.trace_of(name) for name in lineage}) == 1
    assert not any(span.links for span in telemetry.spans)
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_a_dispatch_is_a_publish_and_its_runs(bus: EventBus, telemetry: Collected) -> None:
    @bus.on(int, name="handle")
    async def handle(event: int) -> None: ...

    telemetry.instrument(bus)
    with telemetry.tracer.start_as_current_span("publisher"):
        await bus.dispatch(1)

    assert telemetry.parent_of("publish builtins:int") == "publisher"
    assert telemetry.parent_of("run handle") == "publisher"


async def test_a_publish_is_a_span_whatever_becomes_of_it(
    bus: EventBus, telemetry: Collected
) -> None:
    telemetry.instrument(bus)
    bus.subscribe(int, ignore_event, name="handle")
    async with bus.context() as unit:
        bus.publish(1)
        unit.discard()
        bus.publish(OrderPlaced())  # nobody handles it

    assert telemetry.names == ["publish builtins:int", "publish shop.order.placed"]
    assert "messaging.message.id" in telemetry.attributes("publish builtins:int")
    assert telemetry.attributes("publish shop.order.placed") == {
        conventions.MESSAGING_SYSTEM: "eventkit",
        conventions.MESSAGING_DESTINATION_NAME: "shop.order.placed",
        conventions.MESSAGING_OPERATION_NAME: "publish",
        conventions.MESSAGING_OPERATION_TYPE: "send",
        "eventkit.bus": "shop",
        "eventkit.deliveries": 0,
    }


async def ignore_event(event: object) -> None:
    """A handler."""


async def test_spans_are_called_and_described_as_the_conventions_say(
    bus: EventBus, telemetry: Collected
) -> None:
    ids: list[UUID] = []

    @bus.on(OrderPlaced, name="mail")
    async def mail(event: OrderPlaced) -> None:
        ids.append(current_delivery().id)

    telemetry.instrument(bus)
    event = OrderPlaced()
    async with bus.context():
        bus.publish(event)

    kinds = conventions.MessagingOperationTypeValues
    common = {
        conventions.MESSAGING_SYSTEM: "eventkit",
        conventions.MESSAGING_DESTINATION_NAME: "shop.order.placed",
        conventions.MESSAGING_MESSAGE_ID: str(event.event_id),
        "eventkit.bus": "shop",
    }
    assert telemetry.names == ["process shop.order.placed", "publish shop.order.placed"]
    assert telemetry["publish shop.order.placed"].kind is SpanKind.PRODUCER
    assert telemetry.attributes("publish shop.order.placed") == common | {
        conventions.MESSAGING_OPERATION_NAME: "publish",
        conventions.MESSAGING_OPERATION_TYPE: kinds.SEND.value,
        "eventkit.deliveries": 1,
    }
    assert telemetry["run mail"].kind is SpanKind.CONSUMER
    assert telemetry.attributes("run mail") == common | {
        conventions.MESSAGING_OPERATION_NAME: "process",
        conventions.MESSAGING_OPERATION_TYPE: kinds.PROCESS.value,
        conventions.MESSAGING_DESTINATION_SUBSCRIPTION_NAME: "mail",
        "eventkit.delivery.id": str(ids[0]),
        "eventkit.delivery.attempt": 1,
    }


async def test_a_failure_is_in_the_span_of_its_run_and_in_no_other(
    bus: EventBus, telemetry: Collected
) -> None:
    bus.report_failure = ignore
    bus.subscribe(int, ignore_event, name="ends well")

    class NoMailError(Exception):
        """Of the application."""

    @bus.on(int, name="fails")
    async def fails(event: int) -> None:
        raise NoMailError("today")

    telemetry.instrument(bus)
    async with bus.context():
        bus.publish(1)

    failed = telemetry["run fails"]
    kind = f"{__name__}.{NoMailError.__qualname__}"
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, kind)
    assert telemetry.attributes("run fails")[error_attributes.ERROR_TYPE] == kind
    [event] = failed.events
    assert event.attributes is not None
    assert (event.name, event.attributes["exception.message"]) == ("exception", "today")
    assert telemetry["run ends well"].status.status_code is StatusCode.UNSET
    assert error_attributes.ERROR_TYPE not in telemetry.attributes("run ends well")


async def test_a_run_that_takes_too_long_says_so(telemetry: Collected) -> None:
    bus = EventBus(handler_timeout=1e-9)
    bus.report_failure = ignore

    @bus.on(int, name="stuck")
    async def stuck(event: int) -> None:
        await anyio.sleep_forever()

    telemetry.instrument(bus)
    async with bus.context():
        bus.publish(1)

    kind = "eventkit.exceptions.HandlerTimeoutError"
    assert telemetry.attributes("run stuck")[error_attributes.ERROR_TYPE] == kind


async def test_a_run_that_is_cancelled_says_so(
    bus: EventBus, telemetry: Collected, anyio_backend_name: str
) -> None:
    with CancelScope() as scope:

        @bus.on(int, name="stuck")
        async def stuck(event: int) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        telemetry.instrument(bus)
        async with bus.context():
            bus.publish(1)

    kind = {"asyncio": "CancelledError", "trio": "Cancelled"}[anyio_backend_name]
    assert telemetry["run stuck"].status.status_code is StatusCode.ERROR
    found: str = telemetry.attributes("run stuck")[error_attributes.ERROR_TYPE]
    assert found.endswith(f".{kind}")
    assert_settled(bus)


async def test_the_payload_is_nowhere(bus: EventBus, telemetry: Collected) -> None:
    bus.report_failure = ignore
    bus.subscribe(OrderPlaced, ignore_event, name="ends well")

    @bus.on(OrderPlaced, name="fails")
    async def fails(event: OrderPlaced) -> None:
        raise LookupError

    telemetry.instrument(bus)
    async with bus.context():
        bus.publish(OrderPlaced())

    told = telemetry.texts()
    assert "LookupError" in told
    assert "shop.order.placed" in told
    assert "a secret" not in told


async def test_after_detach_nothing_is_told(bus: EventBus, telemetry: Collected) -> None:
    bus.subscribe(int, ignore_event, name="handle")
    with telemetry.instrument(bus) as observation:
        await bus.dispatch(1)
    observation.detach()
    await bus.dispatch(1)

    assert len(telemetry.spans) == 2


async def test_each_bus_has_spans_of_its_own(telemetry: Collected) -> None:
    for name in ("orders", "billing"):
        bus = EventBus(name=name)
        bus.subscribe(int, ignore_event, name=f"of {name}")
        telemetry.instrument(bus)
        await bus.dispatch(1)

    assert telemetry.attributes("run of orders")["eventkit.bus"] == "orders"
    assert telemetry.attributes("run of billing")["eventkit.bus"] == "billing"


async def test_a_bus_is_instrumented_once_for_each_sdk(bus: EventBus, telemetry: Collected) -> None:
    other = Collected()
    first = telemetry.instrument(bus)
    other.instrument(bus)
    with pytest.raises(ValueError, match=r"'shop'.* is instrumented already: call instrument"):
        telemetry.instrument(bus)
    bus.subscribe(int, ignore_event, name="handle")
    await bus.dispatch(1)
    first.detach()
    telemetry.instrument(bus)
    await bus.dispatch(1)

    assert [len(each.spans) for each in (telemetry, other)] == [4, 4]
    other.shutdown()


@pytest.mark.parametrize("thing", [EventBus, object(), None])
def test_only_a_bus_can_be_instrumented(thing: Any) -> None:
    with pytest.raises(TypeError) as error:
        instrument(thing)
    assert str(error.value) == f"instrument() takes an EventBus, not {thing!r}"


# Where no span is recorded


@pytest.mark.parametrize(
    "recorder", [None, NoOpTracerProvider(), TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)]
)
async def test_where_nothing_is_recorded_handlers_run_as_ever(
    bus: EventBus, telemetry: Collected, recorder: Any
) -> None:
    bus.report_failure = ignore
    seen: list[trace.Span] = []

    @bus.on(int, name="handle")
    async def handle(event: int) -> None:
        seen.append(trace.get_current_span())
        raise LookupError

    instrument(bus, tracer_provider=recorder, meter_provider=telemetry.meters)
    async with bus.context():
        bus.publish(1)

    assert not seen[0].is_recording()
    assert telemetry.spans == ()
    [point] = telemetry.values("messaging.process.duration").values()
    assert point.count == 1
    assert_settled(bus)


async def test_a_tracer_that_does_nothing_leaves_the_spans_of_others_current(
    bus: EventBus, telemetry: Collected
) -> None:
    seen: list[trace.Span] = []

    @bus.on(int, name="handle")
    async def handle(event: int) -> None:
        seen.append(trace.get_current_span())

    instrument(bus, tracer_provider=NoOpTracerProvider(), meter_provider=telemetry.meters)
    with telemetry.tracer.start_as_current_span("publisher") as publisher:
        await bus.dispatch(1)

    assert seen == [publisher]


async def test_what_is_not_sampled_is_not_sampled_further_on(
    bus: EventBus, telemetry: Collected
) -> None:
    unsampled = TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)

    @bus.on(int, name="handle")
    async def handle(event: int) -> None:
        telemetry.tracer.start_span("in handle").end()

    instrument(bus, tracer_provider=unsampled, meter_provider=telemetry.meters)
    await bus.dispatch(1)

    assert telemetry.spans == ()  # their sampler asks the parent


class Broken(TracerProvider):
    """Has tracers, or spans, that fail."""

    def __init__(self, *, at_start: bool) -> None:
        super().__init__(shutdown_on_exit=False)
        self.add_span_processor(self)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        self.at_start = at_start

    def on_start(self, *_: object, **__: object) -> None:
        if self.at_start:
            raise LookupError

    def on_end(self, *_: object) -> None:
        if not self.at_start:
            raise LookupError

    def _on_ending(self, *_: object) -> None: ...


@pytest.mark.parametrize("at_start", [True, False])
async def test_an_sdk_that_fails_is_logged_and_never_felt(
    bus: EventBus, telemetry: Collected, at_start: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(at_start=at_start)
    bus.subscribe(int, ignore_event, name="handle")
    instrument(bus, tracer_provider=broken, meter_provider=telemetry.meters)
    async with bus.context():
        bus.publish(1)

    assert bus.stats.handled == 1
    assert [line.message[:18] for line in caplog.records] == ["an observer failed"] * 2
    assert_settled(bus)


async def test_an_observer_beside_it_is_told_as_ever(bus: EventBus, telemetry: Collected) -> None:
    told: list[object] = []

    class Watcher(Observer):
        def published(self, event: object, deliveries: Any) -> None:
            told.append((event, [str(each) for each in deliveries]))

        def delivery(self, delivery: Delivery) -> Any:
            told.append((str(delivery), trace.get_current_span().is_recording()))
            return super().delivery(delivery)

    bus.subscribe(int, ignore_event, name="handle")
    telemetry.instrument(bus)
    bus.observe(Watcher())
    await bus.dispatch(1)

    assert told == [
        (1, ["builtins.int -> handle"]),
        ("builtins.int -> handle", True),
    ]
    assert len(telemetry.spans) == 2
