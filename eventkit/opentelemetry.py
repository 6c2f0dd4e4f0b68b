"""Owns what OpenTelemetry is told of a bus: spans of publishes and deliveries, and counters.

Needs OpenTelemetry's API alone, which does nothing until an application has set up an SDK. Knows
nothing of exporters. Names follow the semantic conventions of messaging:
https://opentelemetry.io/docs/specs/semconv/messaging/

Events are never written into a span, only their ids and the names of their classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any

from eventkit._core.bus import EventBus, state_of
from eventkit._core.events import Delivery
from eventkit._core.observers import Observation, Observer
from eventkit._core.state import BusState
from eventkit.exceptions import not_installed
from eventkit.wire import wire_name

try:
    from opentelemetry import context as contexts
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import (
        CallbackOptions,
        Histogram,
        Meter,
        MeterProvider,
        get_meter,
    )
    from opentelemetry.metrics import (
        Observation as Measurement,
    )
    from opentelemetry.propagate import extract, inject
    from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
except ModuleNotFoundError as missing:
    if not (missing.name or "").startswith("opentelemetry"):
        raise
    raise not_installed("eventkit.opentelemetry", "opentelemetry", "opentelemetry") from missing

__all__ = ["instrument"]

_SYSTEM = {"messaging.system": "eventkit"}
_SECONDS_OF_A_LOOK = 1.0  # for which one look into an outbox's table is enough
_ENDED = ("handled", "failed", "discarded", "undelivered", "requeued")
_KEPT = ("ready", "leased", "dead", "unreadable")

# Of a run from an outbox's table: the context that was kept with the row.
_kept: ContextVar[Context | None] = ContextVar("eventkit_opentelemetry_kept", default=None)


def instrument(
    bus: EventBus,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Observation:
    """Give OpenTelemetry spans and metrics of a bus, from now on.

        instrument(bus)  # once, where the application is wired

    **Spans.** `publish <event>` for each publish, and `process <event>` for each run of a handler,
    current in the handler and in what it awaits. The parent is the span in which the event was
    published, behind the response, too. A run from an outbox's table, and one of a message of
    another service, may be long after: it begins a trace of its own, with a link to the publisher's
    span. A message that FastStream's middleware has a span for is its child.

    **Metrics**, each with the bus's name:

    | name | kind | unit |
    |---|---|---|
    | `messaging.process.duration` | histogram, by event, handler and error | s |
    | `eventkit.events.published` | counter | events |
    | `eventkit.deliveries.accepted` | counter | deliveries |
    | `eventkit.deliveries.ended` | counter, by `eventkit.outcome` | deliveries |
    | `eventkit.deliveries.pending`, `eventkit.deliveries.running` | up-down counter | deliveries |
    | `eventkit.requests.held` | up-down counter | requests |
    | `eventkit.requests.refused` | counter | requests |
    | `eventkit.outbox.deliveries` | gauge, by `eventkit.state` and handler | deliveries |
    | `eventkit.outbox.oldest_due` | gauge | s |

    What is counted is read when it is collected. The outbox's two read its whole table then, with
    one statement for both, in the thread that collects: every process reports the same numbers.

    Args:
        bus: Whose.
        tracer_provider: By default the global one, also if it is set later.
        meter_provider: As above.

    Returns:
        The tie; `detach()` ends it. OpenTelemetry keeps the instruments, which report nothing then.

    Raises:
        TypeError: It is no EventBus.
    """
    if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"instrument() takes an EventBus, not {bus!r}")
    meter = get_meter("eventkit", meter_provider=meter_provider)
    tracer = trace.get_tracer("eventkit", tracer_provider=tracer_provider)
    counts = _Counts(state_of(bus))
    counts.register(meter)
    observation = bus.observe(_Tracing(bus.name, tracer, meter))

    def detach() -> None:
        counts.ended = True
        observation.detach()

    return Observation(detach)


class _Tracing(Observer):
    """Makes the spans, and measures the runs."""

    def __init__(self, bus: str, tracer: Tracer, meter: Meter) -> None:
        self._bus = bus
        self._tracer = tracer
        self._durations = meter.create_histogram(
            "messaging.process.duration", unit="s", description="Duration of processing operation."
        )
        self._of_publish: dict[type, tuple[str, dict[str, str]]] = {}
        self._of_run: dict[tuple[type, str], tuple[str, dict[str, str]]] = {}

    def published(self, event: object, deliveries: Sequence[Delivery]) -> None:
        """A span of no length: publishing waits for nothing."""
        known = self._of_publish.get(type(event))
        if known is None:
            known = self._describe(type(event), "publish", "send")
            self._of_publish[type(event)] = known
        name, attributes = known
        span = self._tracer.start_span(name, kind=SpanKind.PRODUCER, attributes=attributes)
        if span.is_recording():
            if deliveries:
                span.set_attribute("messaging.message.id", str(deliveries[0].event_id))
            span.set_attribute("eventkit.deliveries", len(deliveries))
        span.end()

    def headers(self, event: object) -> Mapping[str, str]:
        """What an outbox keeps beside the event, and a bridge sends with it."""
        carrier: dict[str, str] = {}
        inject(carrier)
        return carrier

    def restored(self, headers: Mapping[str, str]) -> None:
        """The next run is one from a table."""
        _kept.set(extract(headers, Context()))

    def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
        """A span around one run."""
        key = type(delivery.event), delivery.handler
        known = self._of_run.get(key)
        if known is None:
            name, attributes = self._describe(key[0], "process", "process")
            attributes["messaging.destination.subscription.name"] = delivery.handler
            known = self._of_run[key] = name, attributes
        return _Processing(delivery, self._tracer, self._durations, *known)

    def _describe(self, event_type: type, name: str, kind: str) -> tuple[str, dict[str, str]]:
        destination = wire_name(event_type)
        return f"{name} {destination}", _SYSTEM | {
            "messaging.destination.name": destination,
            "messaging.operation.name": name,
            "messaging.operation.type": kind,
            "eventkit.bus": self._bus,
        }


class _Processing:
    """One run of a handler: the span that is current in it, and how long it took."""

    __slots__ = (
        "_attributes",
        "_began",
        "_delivery",
        "_durations",
        "_name",
        "_restored",
        "_span",
        "_token",
        "_tracer",
    )

    def __init__(
        self,
        delivery: Delivery,
        tracer: Tracer,
        durations: Histogram,
        name: str,
        attributes: dict[str, str],
    ) -> None:
        self._delivery = delivery
        self._tracer = tracer
        self._durations = durations
        self._name = name
        self._attributes = attributes

    def __enter__(self) -> None:
        around, links = self._origin()
        # What the handler publishes is published here, and not by what was kept.
        self._restored: Token[Context | None] = _kept.set(None)
        self._span: Span = self._tracer.start_span(
            self._name,
            context=around,
            kind=SpanKind.CONSUMER,
            attributes=self._attributes,
            links=links,
        )
        if self._span.is_recording():
            self._span.set_attributes(self._facts())
        self._token = contexts.attach(trace.set_span_in_context(self._span, around))
        self._began = perf_counter()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = perf_counter() - self._began
        contexts.detach(self._token)
        _kept.reset(self._restored)
        attributes = self._attributes
        if exc is not None:
            kind = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
            attributes = attributes | {"error.type": kind}
            self._span.set_attribute("error.type", kind)
            self._span.record_exception(exc)
            self._span.set_status(Status(StatusCode.ERROR, kind))
        self._durations.record(seconds, attributes)
        self._span.end()

    def _origin(self) -> tuple[Context | None, Sequence[Link] | None]:
        """In which context the span begins, and what it is linked to; None for the current one."""
        found = _kept.get()
        received = self._delivery.received
        if found is None and received is not None and not _is_valid(trace.get_current_span()):
            found = extract(received, Context())
        elif found is not None and received is not None and not _span_of(found).is_valid:
            found = extract(received, found)
        if found is None:
            return None, None
        origin = _span_of(found)
        around = trace.set_span_in_context(trace.INVALID_SPAN, found)  # what else it has, it keeps
        return around, [Link(origin)] if origin.is_valid else None

    def _facts(self) -> dict[str, str | int]:
        delivery = self._delivery
        return {
            "messaging.message.id": str(delivery.event_id),
            "eventkit.delivery.id": str(delivery.id),
            "eventkit.delivery.attempt": delivery.attempt,
        }


class _Counts:
    """Reads the counters of a bus, and of its outbox, when they are collected.

    Attributes:
        ended: Whether nothing is reported any more.
    """

    def __init__(self, state: BusState) -> None:
        self.ended = False
        self._state = state
        self._bus = {"eventkit.bus": state.name}
        self._looked_at = -_SECONDS_OF_A_LOOK
        self._seen: Any = None  # Any: an `OutboxStats`, of a sibling of this module

    def register(self, meter: Meter) -> None:
        """Make the instruments."""
        counter, up_down = meter.create_observable_counter, meter.create_observable_up_down_counter
        counter("eventkit.events.published", [self._of("published")], "{event}")
        counter("eventkit.deliveries.accepted", [self._of("accepted")], "{delivery}")
        counter("eventkit.deliveries.ended", [self._outcomes], "{delivery}")
        up_down("eventkit.deliveries.pending", [self._of("pending")], "{delivery}")
        up_down("eventkit.deliveries.running", [self._of("running")], "{delivery}")
        up_down("eventkit.requests.held", [self._of("held")], "{request}")
        counter("eventkit.requests.refused", [self._of("refused")], "{request}")
        meter.create_observable_gauge("eventkit.outbox.deliveries", [self._rows], "{delivery}")
        meter.create_observable_gauge("eventkit.outbox.oldest_due", [self._oldest], "s")

    def _of(self, count: str) -> Callable[[CallbackOptions], Iterable[Measurement]]:
        def read(_: CallbackOptions) -> Iterable[Measurement]:
            if not self.ended:
                yield Measurement(getattr(self._state.tally.snapshot(), count), self._bus)

        return read

    def _outcomes(self, _: CallbackOptions) -> Iterable[Measurement]:
        if not self.ended:
            stats = self._state.tally.snapshot()
            for outcome in _ENDED:
                yield Measurement(
                    getattr(stats, outcome), self._bus | {"eventkit.outcome": outcome}
                )

    def _rows(self, _: CallbackOptions) -> Iterable[Measurement]:
        stats = self._look()
        for handler, kept in () if stats is None else stats.handlers.items():
            for state in _KEPT:
                attributes = {"eventkit.state": state, "eventkit.handler": handler}
                yield Measurement(getattr(kept, state), self._bus | attributes)

    def _oldest(self, _: CallbackOptions) -> Iterable[Measurement]:
        stats = self._look()
        if stats is not None:
            yield Measurement(stats.oldest_due or 0.0, self._bus)

    def _look(self) -> Any:
        """What is in the outbox's table; None where there is no outbox."""
        keeper = self._state.keeper
        if self.ended or keeper is None:
            return None
        if monotonic() - self._looked_at >= _SECONDS_OF_A_LOOK:
            self._seen = keeper.outbox.read_stats()
            self._looked_at = monotonic()
        return self._seen


def _span_of(context: Context) -> trace.SpanContext:
    return trace.get_current_span(context).get_span_context()


def _is_valid(span: Span) -> bool:
    return span.get_span_context().is_valid
