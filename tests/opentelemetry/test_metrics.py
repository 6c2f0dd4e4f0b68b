"""What is counted: each metric, of several buses, for as long as they are instrumented."""

import gc
import weakref
from typing import Any

import anyio
import pytest
from anyio import create_task_group
from anyio.lowlevel import checkpoint
from opentelemetry import metrics
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    Sum,
)
from opentelemetry.semconv._incubating.attributes import messaging_attributes as conventions
from opentelemetry.semconv._incubating.metrics import messaging_metrics
from opentelemetry.semconv.attributes import error_attributes

from eventkit import EventBus
from eventkit import opentelemetry as ours
from eventkit._core.bus import state_of
from eventkit.opentelemetry import instrument
from tests.core.keepers import FakeKeeper
from tests.opentelemetry.collected import Collected
from tests.witness import ignore

pytestmark = pytest.mark.anyio

DURATION = messaging_metrics.MESSAGING_PROCESS_DURATION


@pytest.fixture
def bus() -> EventBus:
    """A bus with a handler for numbers, which fails for 0 and waits for ever for negative ones."""
    bus = EventBus(name="shop")
    bus.report_failure = ignore

    @bus.on(int, name="handle")
    async def handle(event: int) -> None:
        if event < 0:
            await anyio.sleep_forever()
        if event == 0:
            raise LookupError

    return bus


async def publish(bus: EventBus, *events: int) -> None:
    async with bus.context():
        bus.publish(*events)


async def test_what_a_bus_counts_is_reported(bus: EventBus, telemetry: Collected) -> None:
    telemetry.instrument(bus)
    async with bus.context() as unit:
        bus.publish(1, 2, 3)
        unit.discard()
    await publish(bus, 1, 0)
    async with create_task_group() as tasks:
        tasks.start_soon(publish, bus, -1, 4)
        while not bus.stats.running:
            await checkpoint()
        assert telemetry.values("eventkit.deliveries.running") == {"shop": 1}
        assert telemetry.values("eventkit.deliveries.pending") == {"shop": 1}
        tasks.cancel_scope.cancel()

    assert telemetry.values("eventkit.events.published") == {"shop": 7}
    assert telemetry.values("eventkit.deliveries.accepted") == {"shop": 7}
    assert telemetry.values("eventkit.deliveries.ended", "eventkit.outcome") == {
        "handled": 1,
        "failed": 1,
        "discarded": 3,
        "undelivered": 2,
        "requeued": 0,
    }
    assert telemetry.values("eventkit.deliveries.running") == {"shop": 0}
    assert telemetry.values("eventkit.deliveries.pending") == {"shop": 0}


async def test_requests_that_are_held_back_and_refused_are_reported(
    bus: EventBus, telemetry: Collected
) -> None:
    telemetry.instrument(bus)
    tally = state_of(bus).tally
    tally.shift("held", 2)
    tally.shift("refused", 3)

    assert telemetry.values("eventkit.requests.held") == {"shop": 2}
    assert telemetry.values("eventkit.requests.refused") == {"shop": 3}


async def test_kinds_and_units_are_those_of_what_is_counted(
    bus: EventBus, telemetry: Collected
) -> None:
    telemetry.instrument(bus)
    await publish(bus, 1)
    FakeKeeper(bus).outbox = Table()

    found = telemetry.metrics()

    kinds: dict[str, tuple[type, bool | None, str]] = {}
    for name, metric in found.items():
        data: Any = metric.data
        kinds[name] = type(data), getattr(data, "is_monotonic", None), metric.unit or ""
    assert kinds == {
        "messaging.process.duration": (Histogram, None, "s"),
        "eventkit.events.published": (Sum, True, "{event}"),
        "eventkit.deliveries.accepted": (Sum, True, "{delivery}"),
        "eventkit.deliveries.ended": (Sum, True, "{delivery}"),
        "eventkit.deliveries.pending": (Sum, False, "{delivery}"),
        "eventkit.deliveries.running": (Sum, False, "{delivery}"),
        "eventkit.requests.held": (Sum, False, "{request}"),
        "eventkit.requests.refused": (Sum, True, "{request}"),
        "eventkit.outbox.deliveries": (Gauge, None, "{delivery}"),
        "eventkit.outbox.oldest_due": (Gauge, None, "s"),
    }
    shown = ours.instrument.__doc__ or ""
    assert [name for name in kinds if f"`{name}`" not in shown] == []


async def test_each_run_is_measured_by_event_and_handler_and_error(
    bus: EventBus, telemetry: Collected
) -> None:
    telemetry.instrument(bus)
    await publish(bus, 1, 2, 0)

    found = telemetry.metrics()[DURATION]
    points: Any = found.data.data_points
    common = {
        conventions.MESSAGING_SYSTEM: "eventkit",
        conventions.MESSAGING_DESTINATION_NAME: "builtins:int",
        conventions.MESSAGING_DESTINATION_SUBSCRIPTION_NAME: "handle",
        conventions.MESSAGING_OPERATION_NAME: "process",
        conventions.MESSAGING_OPERATION_TYPE: "process",
        "eventkit.bus": "shop",
    }
    assert [(point.count, dict(point.attributes)) for point in points] == [
        (2, common),
        (1, common | {error_attributes.ERROR_TYPE: "LookupError"}),
    ]
    # As the conventions advise: the SDK's own are for milliseconds.
    assert points[0].explicit_bounds[:3] == (0.005, 0.01, 0.025)
    assert found.unit == "s"


async def test_the_longest_of_a_bucket_has_a_way_to_its_span(
    bus: EventBus, telemetry: Collected
) -> None:
    telemetry.instrument(bus)
    await publish(bus, 1)

    [point] = telemetry.values(DURATION).values()
    [exemplar] = point.exemplars
    span = telemetry["run handle"].context
    assert span is not None
    assert exemplar.span_id == span.span_id


# Several buses, and the ends of them


async def test_two_buses_of_one_sdk_are_both_reported(telemetry: Collected) -> None:
    orders, billing = EventBus(name="orders"), EventBus(name="billing")
    for bus in (orders, billing):
        bus.subscribe(int, nothing, name="handle")
        telemetry.instrument(bus)
    await publish(orders, 1)
    await publish(billing, 1, 2)

    assert telemetry.values("eventkit.events.published") == {"orders": 1, "billing": 2}
    counts = {name: point.count for name, point in telemetry.values(DURATION).items()}
    assert counts == {"orders": 1, "billing": 2}


async def nothing(event: object) -> None:
    """A handler."""


async def test_after_detach_nothing_is_reported_until_it_is_instrumented_anew(
    bus: EventBus, telemetry: Collected, caplog: pytest.LogCaptureFixture
) -> None:
    observation = telemetry.instrument(bus)
    assert telemetry.values("eventkit.events.published") == {"shop": 0}
    observation.detach()
    observation.detach()
    assert telemetry.values("eventkit.events.published") == {}
    telemetry.instrument(bus)
    assert telemetry.values("eventkit.events.published") == {"shop": 0}
    assert caplog.records == []


def test_a_bus_that_is_gone_is_kept_by_nobody(telemetry: Collected) -> None:
    def use_one() -> weakref.ref[EventBus]:
        bus = EventBus(name="gone")
        telemetry.instrument(bus)
        return weakref.ref(bus)

    gone = use_one()
    gc.collect()

    assert gone() is None
    assert telemetry.values("eventkit.events.published") == {}
    stays = EventBus(name="stays")
    telemetry.instrument(stays)
    assert telemetry.values("eventkit.events.published") == {"stays": 0}


class Global:
    """Stands for the global meter provider, of which a process has one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(ours, "_of_the_global", [])
        self.set(metrics.NoOpMeterProvider())

    def set(self, provider: metrics.MeterProvider) -> None:
        def get_meter(name: str, meter_provider: Any = None) -> metrics.Meter:
            return (meter_provider or provider).get_meter(name)

        self._monkeypatch.setattr(ours, "get_meter_provider", lambda: provider)
        self._monkeypatch.setattr(ours, "get_meter", get_meter)


@pytest.mark.parametrize("named", [True, False])
def test_buses_that_name_the_global_sdk_and_buses_that_do_not_are_all_reported(
    telemetry: Collected, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    Global(monkeypatch).set(telemetry.meters)
    one, other = EventBus(name="one"), EventBus(name="other")
    instrument(one, meter_provider=telemetry.meters if named else None)
    instrument(other, meter_provider=None if named else telemetry.meters)

    assert telemetry.values("eventkit.events.published") == {"one": 0, "other": 0}


def test_buses_without_an_sdk_share_what_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Global(monkeypatch)
    buses = [EventBus(), EventBus()]
    for bus in buses:
        instrument(bus)

    assert len(ours._of_the_global) == 1


def test_an_sdk_that_is_set_later_reports_buses_that_came_before_and_after(
    pytester: pytest.Pytester,
) -> None:
    script = pytester.makepyfile("""
        from eventkit import EventBus
        from eventkit.opentelemetry import instrument
        from opentelemetry import metrics, trace
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        import anyio

        before, after = EventBus(name="before"), EventBus(name="after")

        async def nothing(event: int) -> None: ...

        instrument(before)
        reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
        metrics.set_meter_provider(MeterProvider([reader]))
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        instrument(after, meter_provider=metrics.get_meter_provider())
        for bus in (before, after):
            bus.subscribe(int, nothing, name="handle")
            anyio.run(bus.dispatch, 1)
        print(sorted(
            (metric.name.rpartition(".")[2], point.attributes["eventkit.bus"])
            for resource in reader.get_metrics_data().resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
            if metric.name.endswith(("published", "duration"))
        ))
        print(len(exporter.get_finished_spans()))
    """)
    ran = pytester.runpython(script)

    found = [(name, bus) for name in ("duration", "published") for bus in ("after", "before")]
    assert ran.outlines == [str(found), "4"]
    assert "Traceback" not in ran.stderr.str()


# The outbox


class Handled:
    """What an outbox has of a handler."""

    ready, leased, dead, unreadable = 1, 2, 3, 4


class Table:
    """An outbox, as far as its numbers are read."""

    def __init__(self, oldest_due: float | None = 7.5) -> None:
        self.looks = 0
        self.away = False
        self.handlers = {"mail": Handled}
        self.oldest_due = oldest_due

    def read_stats(self) -> "Table":
        self.looks += 1
        if self.away:
            raise OSError("the database is away")
        return self


@pytest.mark.parametrize(("oldest", "told"), [(7.5, 7.5), (None, 0.0)])
def test_what_an_outbox_keeps_is_read_once_for_all_that_is_reported_of_it(
    bus: EventBus, telemetry: Collected, oldest: float | None, told: float
) -> None:
    FakeKeeper(bus).outbox = table = Table(oldest)
    telemetry.instrument(bus)

    by_state = telemetry.values("eventkit.outbox.deliveries", "eventkit.handler", "eventkit.state")
    assert by_state == {
        ("mail", "ready"): 1,
        ("mail", "leased"): 2,
        ("mail", "dead"): 3,
        ("mail", "unreadable"): 4,
    }
    assert telemetry.values("eventkit.outbox.oldest_due") == {"shop": told}
    assert table.looks == 1


def test_without_an_outbox_nothing_is_reported_of_one(bus: EventBus, telemetry: Collected) -> None:
    telemetry.instrument(bus)

    assert telemetry.values("eventkit.outbox.deliveries") == {}
    assert telemetry.values("eventkit.outbox.oldest_due") == {}


def test_a_database_that_is_away_is_asked_once_and_hides_nothing_else(
    bus: EventBus,
    telemetry: Collected,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    FakeKeeper(bus).outbox = table = Table()
    table.away = True
    telemetry.instrument(bus)

    assert "eventkit.events.published" in telemetry.metrics()
    assert telemetry.values("eventkit.outbox.oldest_due") == {}
    assert table.looks == 1
    assert caplog.records  # the SDK says so

    table.away = False
    monkeypatch.setattr(ours, "_SECONDS_OF_A_LOOK", 0.0)
    assert telemetry.values("eventkit.outbox.oldest_due") == {"shop": 7.5}
