"""Owns what a service of the demo tells OpenTelemetry. Imported where that is asked for."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor

from eventkit.opentelemetry import instrument
from examples.shop.telemetry import provider_for, trace_commits

# FastStream's telemetry, for each broker that the demo knows.
_MIDDLEWARES = {
    "nats": ("faststream.nats.opentelemetry", "NatsTelemetryMiddleware"),
    "rabbitmq": ("faststream.rabbit.opentelemetry", "RabbitTelemetryMiddleware"),
    "redis": ("faststream.redis.opentelemetry", "RedisTelemetryMiddleware"),
}


def instrument_service(service: ModuleType, name: str, spans: Path) -> None:
    """Have a service write its spans into a file: of requests, events, messages and statements."""
    provider = provider_for(name, spans)
    FastAPIInstrumentor.instrument_app(
        service.app, tracer_provider=provider, exclude_spans=["receive", "send"]
    )
    instrument(service.bus, tracer_provider=provider)
    SQLAlchemyInstrumentor().instrument(
        engine=service.engine.sync_engine,
        tracer_provider=provider,
        skip_dep_check=True,  # it knows of SQLAlchemy 2.0, and is right with 2.1, too
    )
    trace_commits(provider.get_tracer("examples.demo"))
    module, middleware = _MIDDLEWARES[os.environ["SHOP_BROKER"]]
    service.broker.client.add_middleware(
        getattr(import_module(module), middleware)(tracer_provider=provider)
    )
