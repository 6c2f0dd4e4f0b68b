"""Owns the OpenTelemetry spans and metrics of a bus.

Needs only the API of OpenTelemetry. The API does nothing until the application sets up an SDK. This
module knows no exporter. Names follow the semantic conventions of messaging:
https://opentelemetry.io/docs/specs/semconv/messaging/

A span has the id of an event and the name of its class, and never the event itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from functools import partial
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, ref

from eventkit._core.bus import EventBus, state_of
from eventkit._core.locks import new_lock
from eventkit._core.observers import Accepted, Begun, Insider, Observation, complain
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
        get_meter_provider,
    )
    from opentelemetry.metrics import (
        Observation as Measurement,
    )
    from opentelemetry.propagate import extract, inject
    from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
except ModuleNotFoundError as _missing:
    if not (_missing.name or "").startswith("opentelemetry"):
        raise
    raise not_installed("eventkit.opentelemetry", "opentelemetry", "opentelemetry") from _missing

__all__ = ["instrument"]

_SYSTEM = {"messaging.system": "eventkit"}
_SECONDS_OF_A_LOOK = 1.0  # for so long the result of one look into an outbox's table is used again
# The bounds of the conventions: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-metrics/
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_ENDED = ("handled", "failed", "discarded", "undelivered", "requeued")
_KEPT = ("ready", "leased", "dead", "unreadable")

# For a run from an outbox's table: the context that was stored with the row.
_kept: ContextVar[Context | None] = ContextVar("eventkit_opentelemetry_kept", default=None)


def instrument(
    bus: EventBus,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Observation:
    """Make OpenTelemetry spans and metrics of a bus, from now on.

        instrument(bus)  # once, where the application is wired

    **Spans.** There is a span `publish <event>` for each publish, and a span `process <event>` for
    each run of a handler. That span is the current span of the handler. Its parent is the span in
    which the event was published, also behind the response.

    Two kinds of runs may come much later: a run from an outbox's table, and a run for a message of
    another service. Such a run begins a trace of its own. Its span has a link to the span of the
    publisher. If FastStream's own middleware has made a span for the message, that span is the
    parent instead.

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

    Counters are read when the SDK collects them. The two gauges of the outbox read its whole table
    then, with one statement for both, in the thread that collects. So every process reports the
    same numbers.

    No span has the payload of an event. An exception is recorded with its message and its
    traceback, as other instrumentations do it. If a message has private data, the span has it, too.

    Safe to call from any thread.

    Args:
        bus: The bus to watch.
        tracer_provider: Makes the spans. By default the global provider, also if the application
            sets it later.
        meter_provider: Makes the metrics. By default the global provider, as above.

    Returns:
        The tie. Its `detach()` ends the spans and the metrics of this bus.

    Raises:
        TypeError: `bus` is no EventBus.
        ValueError: The bus has been instrumented with these providers before.
    """
    if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"instrument() takes an EventBus, not {bus!r}")
    state, providers = state_of(bus), (tracer_provider, meter_provider)
    for other in state.observers.everyone:
        if isinstance(other, _Tracing) and other.providers == providers:
            raise ValueError(
                f"{bus!r} is instrumented already: call instrument() once, where the bus is made, "
                "or detach() what it gave before"
            )
    meter = get_meter("eventkit", meter_provider=meter_provider)
    tracer = trace.get_tracer("eventkit", tracer_provider=tracer_provider)
    counts = _Counts(state)
    instruments = _instruments_of(meter_provider, meter)
    instruments.add(counts)
    observation = bus.observe(_Tracing(bus.name, tracer, meter, providers, counts))

    def detach() -> None:
        instruments.remove(counts)
        observation.detach()

    return Observation(detach)


class _Tracing(Insider):
    """Makes the spans, and measures the runs.

    Attributes:
        providers: The two arguments of `instrument`, to find a second call.
        tracer: Makes the spans.
        durations: The histogram of the runs.
    """

    def __init__(
        self,
        bus: str,
        tracer: Tracer,
        meter: Meter,
        providers: tuple[TracerProvider | None, MeterProvider | None],
        counts: _Counts,
    ) -> None:
        self.providers = providers
        self.tracer = tracer
        self.durations: Histogram = meter.create_histogram(
            "messaging.process.duration",
            unit="s",
            description="Duration of processing operation.",
            explicit_bucket_boundaries_advisory=_BOUNDS,
        )
        self._bus = bus
        self._counts = counts  # the only strong reference
        self._of_publish: dict[type, tuple[str, dict[str, str]]] = {}
        self._of_run: dict[tuple[type, str], tuple[str, dict[str, str]]] = {}

    def accepted(self, accepted: Accepted) -> None:
        """Make a span of no length: a publish waits for nothing."""
        event_type = type(accepted.event)
        known = self._of_publish.get(event_type)
        if known is None:
            known = self._of_publish[event_type] = self._describe(event_type, "publish", "send")
        name, attributes = known
        span = self.tracer.start_span(name, kind=SpanKind.PRODUCER, attributes=attributes)
        if span.is_recording():
            deliveries = accepted.deliveries()
            if deliveries:
                span.set_attribute("messaging.message.id", str(deliveries[0].event_id))
            span.set_attribute("eventkit.deliveries", len(deliveries))
            span.end()

    def headers(self, event: object) -> Mapping[str, str]:
        """Return the context as headers: an outbox stores them, and a bridge sends them."""
        carrier: dict[str, str] = {}
        inject(carrier)
        return carrier

    def restored(self, headers: Mapping[str, str]) -> None:
        """Note the context of the next run, which comes from a table."""
        _kept.set(extract(headers, Context()))

    def surround(self, begun: Begun, index: int) -> AbstractContextManager[object]:
        """Return a span around one run."""
        key = type(begun.event), begun.handlers[index].name
        known = self._of_run.get(key)
        if known is None:
            name, attributes = self._describe(key[0], "process", "process")
            attributes["messaging.destination.subscription.name"] = key[1]
            known = self._of_run[key] = name, attributes
        return _Processing(self, begun, index, known)

    def _describe(self, event_type: type, name: str, kind: str) -> tuple[str, dict[str, str]]:
        destination = wire_name(event_type)
        return f"{name} {destination}", _SYSTEM | {
            "messaging.destination.name": destination,
            "messaging.operation.name": name,
            "messaging.operation.type": kind,
            "eventkit.bus": self._bus,
        }


class _Processing:
    """One run of a handler: its current span, and its duration."""

    # Defaults of the class cost less than `__init__`: there is one object for each run.
    _restored: Token[Context | None] | None = None
    _token: Token[Context] | None = None
    _span: Span = trace.INVALID_SPAN
    _began: float | None = None

    def __init__(
        self, tracing: _Tracing, begun: Begun, index: int, known: tuple[str, dict[str, str]]
    ) -> None:
        self._tracing = tracing
        self._begun = begun
        self._index = index
        self._known = known

    def __enter__(self) -> None:
        try:
            around = links = None
            if _kept.get() is not None or self._begun.received is not None:
                around, links = self._origin()
            name, attributes = self._known
            self._span = span = self._tracing.tracer.start_span(
                name, around, SpanKind.CONSUMER, attributes, links
            )
            recording = span.is_recording()
            if recording:
                span.set_attributes(self._facts())
            if recording or around is not None or not _is_current(span):
                self._token = contexts.attach(trace.set_span_in_context(span, around))
            self._began = perf_counter()
        except Exception as error:  # noqa: BLE001 - an SDK and its plug-ins raise anything
            complain(self._tracing, error)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._began is not None:
                seconds = perf_counter() - self._began
                # The span has to be current here: an exemplar refers to it.
                attributes = self._known[1] if exc is None else self._fail(exc)
                self._tracing.durations.record(seconds, attributes)
            if self._token is not None:
                contexts.detach(self._token)
                self._span.end()
            if self._restored is not None:
                _kept.reset(self._restored)
        except Exception as error:  # noqa: BLE001 - as above
            complain(self._tracing, error)

    def _fail(self, exc: BaseException) -> dict[str, str]:
        """Note the failure in the span, and return the attributes of the measurement."""
        kind = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
        self._span.set_attribute("error.type", kind)
        self._span.record_exception(exc)
        self._span.set_status(Status(StatusCode.ERROR, kind))
        return self._known[1] | {"error.type": kind}

    def _origin(self) -> tuple[Context | None, Sequence[Link] | None]:
        """Return the context in which the span begins, and its links; None: the current context."""
        found, received = _kept.get(), self._begun.received
        if found is not None:
            # A publish in the handler belongs to this run, and not to the stored context.
            self._restored = _kept.set(None)
            if received is not None and not _span_of(found).is_valid:
                found = extract(received, found)
        elif received is not None and not _span_of(None).is_valid:
            found = extract(received, Context())
        if found is None:
            return None, None
        origin = _span_of(found)
        around = trace.set_span_in_context(trace.INVALID_SPAN, found)  # keeps baggage
        return around, [Link(origin)] if origin.is_valid else None

    def _facts(self) -> dict[str, str | int]:
        delivery = self._begun.delivery(self._index)
        return {
            "messaging.message.id": str(delivery.event_id),
            "eventkit.delivery.id": str(delivery.id),
            "eventkit.delivery.attempt": delivery.attempt,
        }


class _Counts:
    """Reads the counters of one bus and of its outbox, when the SDK collects them."""

    def __init__(self, state: BusState) -> None:
        self._state = state
        self._bus = {"eventkit.bus": state.name}
        self._looked_at = -_SECONDS_OF_A_LOOK
        self._seen: Any = None  # Any: an `OutboxStats`, which this module must not import

    def count(self, name: str) -> Iterator[Measurement]:
        """Read one of the counters."""
        yield Measurement(getattr(self._state.tally.snapshot(), name), self._bus)

    def outcomes(self) -> Iterator[Measurement]:
        """Count the ended deliveries, by outcome."""
        stats = self._state.tally.snapshot()
        for outcome in _ENDED:
            yield Measurement(getattr(stats, outcome), self._bus | {"eventkit.outcome": outcome})

    def rows(self) -> Iterator[Measurement]:
        """Count the deliveries in the outbox, by state."""
        stats = self._look()
        for handler, kept in () if stats is None else stats.handlers.items():
            for state in _KEPT:
                attributes = {"eventkit.state": state, "eventkit.handler": handler}
                yield Measurement(getattr(kept, state), self._bus | attributes)

    def oldest(self) -> Iterator[Measurement]:
        """Measure for how long the oldest due delivery of the outbox has been due."""
        stats = self._look()
        if stats is not None:
            yield Measurement(stats.oldest_due or 0.0, self._bus)

    def _look(self) -> Any:
        """Read the outbox's table; None if there is no outbox, or its database did not answer."""
        keeper = self._state.keeper
        if keeper is None:
            return None
        if monotonic() - self._looked_at >= _SECONDS_OF_A_LOOK:
            self._seen, self._looked_at = None, monotonic()
            try:
                self._seen = keeper.outbox.read_stats()
            finally:  # a database that is away may answer late: it is asked once, too
                self._looked_at = monotonic()
        return self._seen


Read = Callable[[_Counts], Iterable[Measurement]]


class _Instruments:
    """The instruments of one meter provider, and the buses that they report.

    An SDK takes the callbacks of an instrument only once for each name. So all buses share them.
    """

    def __init__(self, meter: Meter) -> None:
        self._counts: tuple[ref[_Counts], ...] = ()  # weak: the buses keep them
        self._lock = new_lock()
        counter, up_down = meter.create_observable_counter, meter.create_observable_up_down_counter
        gauge, of = meter.create_observable_gauge, self._count
        counter("eventkit.events.published", of("published"), "{event}")
        counter("eventkit.deliveries.accepted", of("accepted"), "{delivery}")
        counter("eventkit.deliveries.ended", self._each(_Counts.outcomes), "{delivery}")
        up_down("eventkit.deliveries.pending", of("pending"), "{delivery}")
        up_down("eventkit.deliveries.running", of("running"), "{delivery}")
        up_down("eventkit.requests.held", of("held"), "{request}")
        counter("eventkit.requests.refused", of("refused"), "{request}")
        gauge("eventkit.outbox.deliveries", self._each(_Counts.rows), "{delivery}")
        gauge("eventkit.outbox.oldest_due", self._each(_Counts.oldest), "s")

    def add(self, counts: _Counts) -> None:
        """Report these counters from now on."""
        with self._lock:
            self._counts = (*(each for each in self._counts if each() is not None), ref(counts))

    def remove(self, counts: _Counts) -> None:
        """Stop reporting these counters."""
        with self._lock:
            self._counts = tuple(each for each in self._counts if each() is not counts)

    def _count(self, name: str) -> list[Callable[[CallbackOptions], Iterable[Measurement]]]:
        return self._each(partial(_Counts.count, name=name))

    def _each(self, read: Read) -> list[Callable[[CallbackOptions], Iterable[Measurement]]]:
        def read_all(_: CallbackOptions) -> Iterator[Measurement]:
            for each in self._counts:
                counts = each()
                if counts is not None:
                    yield from read(counts)

        return [read_all]


_of_the_global: list[_Instruments] = []  # at most one; also for a provider that is set later
_of_others: WeakKeyDictionary[MeterProvider, _Instruments] = WeakKeyDictionary()
_making = new_lock()


def _instruments_of(provider: MeterProvider | None, meter: Meter) -> _Instruments:
    """Return the instruments of a provider, made at the first call; None: the global provider."""
    given = get_meter_provider() if provider is None else provider
    with _making:
        if given in _of_others:
            return _of_others[given]
        if provider is None or (_of_the_global and given is get_meter_provider()):
            if not _of_the_global:
                _of_the_global.append(_Instruments(meter))
            return _of_the_global[0]
        return _of_others.setdefault(given, _Instruments(meter))


def _span_of(context: Context | None) -> trace.SpanContext:
    return trace.get_current_span(context).get_span_context()


def _is_current(span: Span) -> bool:
    """Say whether a span that records nothing stands for the current span, or for none."""
    if span is trace.INVALID_SPAN:
        return True
    return span.get_span_context() == trace.get_current_span().get_span_context()
