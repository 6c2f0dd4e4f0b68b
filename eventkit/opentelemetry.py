"""Owns what OpenTelemetry is told of a bus: spans of publishes and deliveries, and counters.

Needs OpenTelemetry's API alone, which does nothing until an application has set up an SDK. Knows
nothing of exporters. Names follow the semantic conventions of messaging:
https://opentelemetry.io/docs/specs/semconv/messaging/

Events are never written into a span, only their ids and the names of their classes.
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
_SECONDS_OF_A_LOOK = 1.0  # for which one look into an outbox's table is enough
# Those that the conventions give: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-metrics/
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
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

    The payload is in no span. An exception is recorded as by other instrumentations, with its
    message and its traceback: what the message says is up to who raised it.

    Args:
        bus: Whose. Its events' spans and counters go to each SDK once.
        tracer_provider: By default the global one, also if it is set later.
        meter_provider: As above.

    Returns:
        The tie; `detach()` ends it. OpenTelemetry keeps the instruments, which report nothing then.

    Raises:
        TypeError: It is no EventBus.
        ValueError: It is instrumented already, with these providers.
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
        providers: Whose spans and metrics they are.
        tracer: Makes the spans.
        durations: Of the runs.
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
        self._counts = counts  # nobody else keeps them
        self._of_publish: dict[type, tuple[str, dict[str, str]]] = {}
        self._of_run: dict[tuple[type, str], tuple[str, dict[str, str]]] = {}

    def accepted(self, accepted: Accepted) -> None:
        """A span of no length: publishing waits for nothing."""
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
        """What an outbox keeps beside the event, and a bridge sends with it."""
        carrier: dict[str, str] = {}
        inject(carrier)
        return carrier

    def restored(self, headers: Mapping[str, str]) -> None:
        """The next run is one from a table."""
        _kept.set(extract(headers, Context()))

    def surround(self, begun: Begun, index: int) -> AbstractContextManager[object]:
        """A span around one run."""
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
    """One run of a handler: the span that is current in it, and how long it took."""

    # Here and not in `__init__`, for this is made once for every run.
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
        except Exception as error:  # noqa: BLE001 - of an SDK, or what was plugged into it
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
                # While the span is current, so that an exemplar leads to it.
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
        """Say so in the span, and in the attributes of what is measured."""
        kind = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
        self._span.set_attribute("error.type", kind)
        self._span.record_exception(exc)
        self._span.set_status(Status(StatusCode.ERROR, kind))
        return self._known[1] | {"error.type": kind}

    def _origin(self) -> tuple[Context | None, Sequence[Link] | None]:
        """In which context the span begins, and what it is linked to; None for the current one."""
        found, received = _kept.get(), self._begun.received
        if found is not None:
            # What the handler publishes is published here, and not by what was kept.
            self._restored = _kept.set(None)
            if received is not None and not _span_of(found).is_valid:
                found = extract(received, found)
        elif received is not None and not _span_of(None).is_valid:
            found = extract(received, Context())
        if found is None:
            return None, None
        origin = _span_of(found)
        around = trace.set_span_in_context(trace.INVALID_SPAN, found)  # what else it has, it keeps
        return around, [Link(origin)] if origin.is_valid else None

    def _facts(self) -> dict[str, str | int]:
        delivery = self._begun.delivery(self._index)
        return {
            "messaging.message.id": str(delivery.event_id),
            "eventkit.delivery.id": str(delivery.id),
            "eventkit.delivery.attempt": delivery.attempt,
        }


class _Counts:
    """Reads the counters of one bus, and of its outbox, when they are collected."""

    def __init__(self, state: BusState) -> None:
        self._state = state
        self._bus = {"eventkit.bus": state.name}
        self._looked_at = -_SECONDS_OF_A_LOOK
        self._seen: Any = None  # Any: an `OutboxStats`, of a sibling of this module

    def count(self, name: str) -> Iterator[Measurement]:
        """One of the counters."""
        yield Measurement(getattr(self._state.tally.snapshot(), name), self._bus)

    def outcomes(self) -> Iterator[Measurement]:
        """How many deliveries have ended in which way."""
        stats = self._state.tally.snapshot()
        for outcome in _ENDED:
            yield Measurement(getattr(stats, outcome), self._bus | {"eventkit.outcome": outcome})

    def rows(self) -> Iterator[Measurement]:
        """How many deliveries the outbox has, in which state."""
        stats = self._look()
        for handler, kept in () if stats is None else stats.handlers.items():
            for state in _KEPT:
                attributes = {"eventkit.state": state, "eventkit.handler": handler}
                yield Measurement(getattr(kept, state), self._bus | attributes)

    def oldest(self) -> Iterator[Measurement]:
        """For how long the oldest due delivery of the outbox has been due."""
        stats = self._look()
        if stats is not None:
            yield Measurement(stats.oldest_due or 0.0, self._bus)

    def _look(self) -> Any:
        """What is in the outbox's table; None where there is no outbox, or it was just away."""
        keeper = self._state.keeper
        if keeper is None:
            return None
        if monotonic() - self._looked_at >= _SECONDS_OF_A_LOOK:
            self._seen, self._looked_at = None, monotonic()
            try:
                self._seen = keeper.outbox.read_stats()
            finally:  # a database that is away may take its time to say so: asked once, too
                self._looked_at = monotonic()
        return self._seen


Read = Callable[[_Counts], Iterable[Measurement]]


class _Instruments:
    """The instruments of one meter provider, and the buses whose counters they report.

    An SDK takes an instrument's callbacks once, by its name: all buses have them together.
    """

    def __init__(self, meter: Meter) -> None:
        self._counts: tuple[ref[_Counts], ...] = ()  # of buses that somebody else has to keep
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
        """Report these from now on."""
        with self._lock:
            self._counts = (*(each for each in self._counts if each() is not None), ref(counts))

    def remove(self, counts: _Counts) -> None:
        """Report these no longer."""
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


_of_the_global: list[_Instruments] = []  # at most one: also of the provider that is set later
_of_others: WeakKeyDictionary[MeterProvider, _Instruments] = WeakKeyDictionary()
_making = new_lock()


def _instruments_of(provider: MeterProvider | None, meter: Meter) -> _Instruments:
    """Those that there are, or new ones; None for the global provider, whoever that will be."""
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
    """Whether a span that records nothing only stands for the one that is current, or for none."""
    if span is trace.INVALID_SPAN:
        return True
    return span.get_span_context() == trace.get_current_span().get_span_context()
