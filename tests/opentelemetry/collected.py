"""Spans and metrics in memory, and what tests ask of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from eventkit import EventBus, Observation
from eventkit.opentelemetry import instrument

Attributes = Mapping[str, Any]  # Any: a text or a number


class Collected:
    """An SDK, and what it was told.

    Attributes:
        tracers: Its provider of tracers.
        meters: Its provider of meters.
        tracer: For spans of the test's own.
    """

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer: Tracer = self.tracers.get_tracer("tests")

    def shutdown(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()

    def instrument(self, bus: EventBus) -> Observation:
        """As an application does, whose SDK this is."""
        return instrument(bus, tracer_provider=self.tracers, meter_provider=self.meters)

    # Spans

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """Those that have ended, in that order."""
        found: Sequence[ReadableSpan] = self._spans.get_finished_spans()
        return found

    @property
    def names(self) -> list[str]:
        """What they are called, in alphabetical order."""
        return sorted(span.name for span in self.spans)

    def __getitem__(self, name: str) -> ReadableSpan:
        [span] = [span for span in self.spans if called(span) == name]
        return span

    def attributes(self, name: str) -> Attributes:
        """Those of a span."""
        return dict(self[name].attributes or {})

    def parent_of(self, name: str) -> str | None:
        """What a span's parent is called."""
        parent = self[name].parent
        return None if parent is None else self._called(parent.span_id)

    def linked_to(self, name: str) -> list[str]:
        """What the spans are called that a span has links to."""
        return [self._called(link.context.span_id) for link in self[name].links]

    def trace_of(self, name: str) -> int:
        """The number of the trace that a span is part of."""
        context = self[name].context
        assert context is not None
        number: int = context.trace_id
        return number

    def texts(self) -> str:
        """All that spans and metrics have, as one text."""
        return " ".join([*(span.to_json() for span in self.spans), repr(self._reading())])

    def _called(self, span_id: int) -> str:
        [name] = [
            called(span)
            for span in self.spans
            if span.context is not None and span.context.span_id == span_id
        ]
        return name

    # Metrics

    def metrics(self) -> dict[str, Metric]:
        """What is collected now, by name."""
        return {metric.name: metric for metric in self._reading()}

    def values(self, name: str, *by: str) -> dict[Any, Any]:  # Any: as the metric has them
        """The values of a metric, by the values of these attributes; by the bus's name if none."""
        found: dict[Any, Any] = {}
        for point in self._points(name):
            values: list[Any] = [point.attributes[each] for each in by or ("eventkit.bus",)]
            key: Any = values[0] if len(values) == 1 else tuple(values)
            assert key not in found
            found[key] = getattr(point, "value", point)
        return found

    def _points(self, name: str) -> Sequence[Any]:  # Any: numbers, or histograms
        metric = self.metrics().get(name)
        return () if metric is None else metric.data.data_points

    def _reading(self) -> list[Metric]:
        read = self._reader.get_metrics_data()
        if read is None:
            return []
        return [
            metric
            for resource in read.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]


def called(span: ReadableSpan) -> str:
    """A span's name; of a run of a handler, `run` and the handler's."""
    name: str = span.name
    handler = (span.attributes or {}).get("messaging.destination.subscription.name")
    return name if handler is None else f"run {handler}"
