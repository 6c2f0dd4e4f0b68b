"""Owns what the shop tells OpenTelemetry. Imported where that is asked for, and nowhere else.

pip install opentelemetry-sdk opentelemetry-instrumentation-{fastapi,httpx,sqlalchemy}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, Tracer, get_current_span
from sqlalchemy.event import listen
from sqlalchemy.orm import Session

from eventkit.opentelemetry import instrument
from examples.shop.mail import Mailer
from examples.shop.resources import Resources

_COMMIT = "examples.shop.telemetry"  # where a session has the span of its commit


def instrument_shop(app: FastAPI, resources: Resources, spans: Path) -> None:
    """Have a shop write its spans into a file: of requests, events, statements, calls and mails."""
    provider = provider_for("shop", spans)
    tracer = provider.get_tracer("examples.shop")
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=provider, exclude_spans=["receive", "send"]
    )
    instrument(resources.bus, tracer_provider=provider)
    # The outbox has an engine of its own for its looks into the table, which are not traced.
    SQLAlchemyInstrumentor().instrument(
        engine=resources.database.engine,
        tracer_provider=provider,
        skip_dep_check=True,  # it knows of SQLAlchemy 2.0, and is right with 2.1, too
    )
    trace_commits(tracer)
    for client in (resources.http, resources.blocking_http):
        HTTPXClientInstrumentor.instrument_client(client, tracer_provider=provider)
    settings = resources.settings
    resources.mailer = _TracedMailer(settings.smtp_host, settings.smtp_port, tracer=tracer)


def provider_for(service: str, spans: Path) -> TracerProvider:
    """Where spans go: a line of JSON for each that has ended, at once.

    A service would have `BatchSpanProcessor(OTLPSpanExporter())` here, and a collector.
    """
    exporter = ConsoleSpanExporter(
        out=spans.open("a", encoding="utf-8", buffering=1),
        formatter=lambda span: f"{span.to_json(indent=None)}\n",
    )
    provider = TracerProvider(resource=Resource({SERVICE_NAME: service}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def trace_commits(tracer: Tracer) -> None:
    """Give each commit of a session a span, around what is written by it; SQLAlchemy's has none."""

    def begin(session: Session) -> None:
        span = session.info[_COMMIT] = tracer.start_as_current_span("commit")
        span.__enter__()

    def end(session: Session) -> None:
        if (span := session.info.pop(_COMMIT, None)) is not None:
            span.__exit__(None, None, None)

    def fail(session: Session) -> None:
        if _COMMIT in session.info:
            get_current_span().set_status(StatusCode.ERROR)
            end(session)

    # First of all listeners: the outbox writes its rows in another one.
    listen(Session, "before_commit", begin, insert=True)
    listen(Session, "after_commit", end)
    listen(Session, "after_rollback", fail)


@dataclass(frozen=True, kw_only=True)
class _TracedMailer(Mailer):
    """The mailer, with a span for each mail: the standard library's client makes none."""

    tracer: Tracer

    def send(self, to: str, subject: str, text: str, *, key: UUID) -> None:
        with self.tracer.start_as_current_span("send mail", kind=SpanKind.CLIENT):
            super().send(to, subject, text, key=key)
