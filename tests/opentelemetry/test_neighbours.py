"""The instrumentations of others: of FastAPI, of ASGI, and of SQLAlchemy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("greenlet")  # compiled: a new Python may be without it
pytest.importorskip("opentelemetry.instrumentation.fastapi")
pytest.importorskip("opentelemetry.instrumentation.sqlalchemy")

from fastapi import FastAPI
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.trace import SpanKind
from sqlalchemy import select
from sqlalchemy.orm import Session

from eventkit import EventBus
from eventkit.sqlalchemy import deliver_on_commit
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Exchange, lifespan_of
from tests.databases import Row, sqlite
from tests.opentelemetry.collected import Collected

pytestmark = pytest.mark.anyio

DURATION = ("http.server.request.duration", "http.server.duration")


@pytest.fixture
def app(bus: EventBus) -> FastAPI:
    """An application whose one endpoint publishes; `app.state.ended` says that the handler may."""
    app = FastAPI()
    app.state.may_end = anyio.Event()

    @app.post("/orders")
    async def order() -> None:
        bus.publish(1)

    @bus.on(int, name="mail")
    async def mail(event: int) -> None:
        await app.state.may_end.wait()

    app.add_middleware(EventContextMiddleware, bus=bus)
    return app


async def post(app: Any, *, after: anyio.Event, telemetry: Collected) -> dict[str, Any]:
    """Have a request answered, then its handlers run; what was measured when it was answered."""
    async with lifespan_of(app):
        exchange = Exchange("/orders", method="POST", spec_version="2.3")
        await exchange.run(app)
        assert exchange.status == 200
        measured = dict(telemetry.metrics())
        assert [span.kind for span in telemetry.spans if span.name.startswith("process")] == []
        after.set()
    return measured


async def test_fastapis_span_is_the_parent_and_does_not_wait_for_handlers(
    bus: EventBus, app: FastAPI, telemetry: Collected
) -> None:
    telemetry.instrument(bus)
    providers: Any = {"tracer_provider": telemetry.tracers, "meter_provider": telemetry.meters}
    FastAPIInstrumentor.instrument_app(app, **providers)
    measured = await post(app, after=app.state.may_end, telemetry=telemetry)

    # It was measured, and its span has ended, while the handler was still waiting.
    assert [name for name in DURATION if name in measured]
    request, run = telemetry["POST /orders"], telemetry["run mail"]
    assert telemetry.parent_of("run mail") == "POST /orders"
    assert telemetry.parent_of("publish builtins:int") == "POST /orders"
    assert request.kind is SpanKind.SERVER
    assert request.end_time is not None
    assert run.end_time is not None
    assert request.end_time < run.end_time


async def test_a_middleware_for_asgi_does_so_too(
    bus: EventBus, app: FastAPI, telemetry: Collected
) -> None:
    telemetry.instrument(bus)
    wrapped = OpenTelemetryMiddleware(
        app, tracer_provider=telemetry.tracers, meter_provider=telemetry.meters
    )
    measured = await post(wrapped, after=app.state.may_end, telemetry=telemetry)

    assert [name for name in DURATION if name in measured]
    parent = telemetry.parent_of("run mail")
    assert parent is not None
    assert telemetry[parent].kind is SpanKind.SERVER


@pytest.fixture
def instrumented(telemetry: Collected) -> Iterator[Any]:
    instrumentor = SQLAlchemyInstrumentor()
    yield instrumentor
    instrumentor.uninstrument()


async def test_statements_of_a_handler_are_children_of_its_run(
    bus: EventBus, telemetry: Collected, tmp_path: Path, instrumented: Any
) -> None:
    telemetry.instrument(bus)
    with sqlite(tmp_path / "test.db") as engine, deliver_on_commit(bus, engine):
        instrumented.instrument(
            engine=engine, tracer_provider=telemetry.tracers, skip_dep_check=True
        )

        @bus.on(int, name="count")
        async def count(event: int) -> None:
            with Session(engine) as session:
                session.scalars(select(Row)).all()

        with telemetry.tracer.start_as_current_span("request"):
            async with bus.context():
                with Session(engine) as session, session.begin():
                    session.add(Row(name="ada"))
                    bus.publish(1)

    statements = {
        span.name.partition(" ")[0]: span for span in telemetry.spans if "db.system" in _of(span)
    }
    request, run = telemetry["request"].context, telemetry["run count"].context
    inserted, selected = statements["INSERT"].parent, statements["SELECT"].parent
    assert inserted is not None
    assert selected is not None
    assert request is not None
    assert run is not None
    assert inserted.span_id == request.span_id
    assert selected.span_id == run.span_id
    assert telemetry.parent_of("run count") == "request"


def _of(span: Any) -> Any:
    return span.attributes or {}
