"""The page about observability does as it says, with the real SDKs and without a network.

What a program of the page configures is its process's: OpenTelemetry's providers, Sentry's client,
structlog and `logging`. So each program runs in a process of its own, with a few lines after it
that use it and print what came of that.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What a process prints, and Grafana's JSON: nobody has types for them.
from typing import Any

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import REGISTRY, generate_latest
from sqlalchemy import MetaData, create_engine

from eventkit import EventBus, named
from eventkit.opentelemetry import instrument
from eventkit.outbox import Outbox, add_tables
from tests.project.messages import lines_of_log
from tests.project.pages import DOCS, RunPage, blocks
from tests.serving import run_python

PAGE = DOCS / "observability.md"
PARTS = blocks(PAGE)
DASHBOARD = DOCS / "observability" / "grafana.json"
WORD = re.compile(r"\b(?:eventkit|messaging|error)_\w+")


@dataclass(frozen=True, slots=True)
class Folder:
    """Where programs of the page are, and run."""

    path: Path

    def write(self, name: str, *parts: str) -> None:
        """Write a file of the page, or one of these parts."""
        (self.path / name).write_text("\n\n".join(parts or (PARTS[name],)))

    def run(self, program: str, *arguments: str) -> str:
        """Run a program in a process of its own, and return what it prints."""
        (self.path / "program.py").write_text(program)
        done = run_python("program.py", *arguments, cwd=self.path, patience=60)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


def objects(printed: str) -> list[Any]:
    """What was printed as JSON, one in a line."""
    return [json.loads(line) for line in printed.splitlines() if line.startswith(('{"', '["'))]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# OpenTelemetry

TREE = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)


def show():
    import json

    for span in exporter.get_finished_spans():
        handler = (span.attributes or {}).get("messaging.destination.subscription.name")
        print(json.dumps({
            "name": span.name,
            "id": span.context.span_id,
            "trace": span.context.trace_id,
            "parent": span.parent and span.parent.span_id,
            "handler": handler,
        }))
"""
PLACE_AN_ORDER = """
from starlette.testclient import TestClient

with TestClient(app) as client:
    client.post("/orders/7")
"""


def named_by(spans: list[Any], name: str) -> Any:
    [span] = [span for span in spans if span["name"] == name]
    return span


def runs(spans: list[Any]) -> dict[str, Any]:
    """The spans of handlers, by the handlers' names."""
    return {span["handler"]: span for span in spans if span["handler"] is not None}


def test_the_handlers_of_a_request_are_in_its_trace(folder: Folder) -> None:
    instrumented = PARTS["shop.py, its instrumentations"]
    folder.write("shop.py", PARTS["shop.py"], TREE, instrumented)

    spans = objects(folder.run(f"from shop import *\n{PLACE_AN_ORDER}\nshow()"))

    request = named_by(spans, "POST /orders/{number}")
    published = named_by(spans, "publish shop.order.placed.v1")
    assert runs(spans).keys() == {"receipt", "index"}
    for span in (published, *runs(spans).values()):
        assert span["parent"] == request["id"]
        assert span["trace"] == request["trace"]


def test_the_spans_of_the_page_are_printed(folder: Folder) -> None:
    folder.write("shop.py", PARTS["shop.py"], PARTS["shop.py, its spans"])

    printed = folder.run(f"from shop import *\n{PLACE_AN_ORDER}\nprovider.shutdown()")

    assert printed.count('"name": "process shop.order.placed.v1"') == 2


# Prometheus


@named("tests.paid.v1")
@dataclass(frozen=True, slots=True)
class Paid:
    number: int


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[str]:
    """What OpenTelemetry's exporter shows of a bus with an outbox that has a row."""
    reader = PrometheusMetricReader()
    provider = MeterProvider([reader])
    engine = create_engine(f"sqlite:///{tmp_path / 'paid.db'}")
    tables = MetaData()
    add_tables(tables)
    tables.create_all(engine)
    bus = EventBus(name="tests")

    @bus.on(Paid, name="fail")
    def fail(event: Paid) -> None:
        raise ValueError

    @bus.on(Paid, name="receipt", durable=True)
    def receipt(event: Paid) -> None: ...

    with Outbox(bus, engine, relay=False), instrument(bus, meter_provider=provider):
        with bus.context():
            bus.publish(Paid(7))
        yield generate_latest(REGISTRY).decode()
    provider.shutdown()
    engine.dispose()


def names_of(exposition: str) -> set[str]:
    """The names of all series."""
    lines = [line for line in exposition.splitlines() if not line.startswith("#")]
    return {re.split(r"[{ ]", line)[0] for line in lines}


def queries() -> list[str]:
    """The queries of the dashboard, and of the page's alerts."""
    dashboard = json.loads(DASHBOARD.read_text())
    alerts = PAGE.read_text().partition("## What to alert on")[2]
    return [
        *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"]),
        *(each["definition"] for each in dashboard["templating"]["list"] if "definition" in each),
        *(each for each in re.findall(r"`([^`]*)`", alerts) if WORD.search(each)),
    ]


def test_every_query_names_metrics_that_there_are(exported: str) -> None:
    there_are = names_of(exported)
    labels = {*re.findall(r'(\w+)="', exported)}

    words = {word for query in queries() for word in WORD.findall(query)}

    assert len(queries()) > 20
    assert words <= there_are | labels
    assert {name for name in there_are if name.startswith("eventkit_")} <= words


def test_every_line_of_the_alerts_is_in_the_tables_of_the_log() -> None:
    pages = [DOCS / f"{name}.md" for name in ("wiring", "durable-operations", "services")]
    alerts = PAGE.read_text().partition("## What to alert on")[2]

    named = re.findall(r"the line `([^`]*)`", alerts)

    assert len(named) > 3
    assert {*named} <= {line for page in pages for line in lines_of_log(page)}


def test_the_dashboard_takes_its_data_source_from_a_variable() -> None:
    dashboard = json.loads(DASHBOARD.read_text())

    panels = dashboard["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert [each["name"] for each in dashboard["templating"]["list"]] == ["datasource", "bus"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_page_names_every_metric_as_the_exporter_does(exported: str) -> None:
    table = re.findall(r"^\| `([\w.]+)` \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    suffixes = re.compile("_(bucket|count|sum|created)$")
    there_are = {
        suffixes.sub("", name)
        for name in names_of(exported)
        if name.startswith(("eventkit_", "messaging_"))
    }

    assert {name for _, name in table} == there_are
    assert instrument.__doc__ is not None
    assert {*re.findall(r"`((?:eventkit|messaging)\.[\w.]+)`", instrument.__doc__)} >= {
        name for name, _ in table
    }
    for name, of_the_exporter in table:
        assert of_the_exporter.startswith(name.replace(".", "_"))


def test_the_collector_of_the_page_has_the_exporters_names(
    exported: str, run_page: RunPage
) -> None:
    own = names_of(generate_latest(run_page(PAGE).registry).decode())

    ours = {name for name in names_of(exported) if name.startswith("eventkit_")}
    assert {name for name in own if not name.endswith("_created")} == ours - {
        "eventkit_outbox_deliveries"  # which has no row here
    }


def test_the_shop_of_the_page_shows_its_metrics_to_prometheus(folder: Folder) -> None:
    folder.write("shop.py", PARTS["shop.py"], PARTS["shop.py, with Prometheus"])

    printed = folder.run(
        f"from shop import *\n{PLACE_AN_ORDER}\n    print(client.get('/metrics').text)"
    )

    assert re.search(r'^eventkit_deliveries_ended_total\{.*"handled".*\} 2.0$', printed, re.M)


# Sentry

CLIENT = """
import json
import logging
import sys

import sentry_sdk
import structlog
from fastapi import FastAPI
from sentry_sdk.transport import Transport
from starlette.testclient import TestClient


class Printing(Transport):
    def capture_envelope(self, envelope):
        for item in envelope.items:
            if item.type == "event":
                print(json.dumps(item.payload.json, default=str))


real = sentry_sdk.init
sentry_sdk.init = lambda **options: real(**options, transport=Printing)

stdlib = structlog.stdlib
LOGS = {
    "unconfigured": {},
    "printing": {"processors": [structlog.processors.KeyValueRenderer()]},
    "to-logging": {
        "processors": [stdlib.render_to_log_kwargs],
        "logger_factory": stdlib.LoggerFactory(),
        "wrapper_class": stdlib.BoundLogger,
    },
    "to-a-formatter": {
        "processors": [stdlib.ProcessorFormatter.wrap_for_formatter],
        "logger_factory": stdlib.LoggerFactory(),
        "wrapper_class": stdlib.BoundLogger,
    },
}
if LOGS[sys.argv[1]]:
    structlog.configure(**LOGS[sys.argv[1]])

from wiring import bus
from eventkit.starlette import EventContextMiddleware

class Placed: ...


@bus.on(Placed, name="first")
async def first(event):
    sentry_sdk.set_tag("of", "first")
    raise ValueError("first")


@bus.on(Placed, name="second")
def second(event):
    sentry_sdk.set_tag("too", "second")
    raise KeyError("second")


app = FastAPI()
app.add_middleware(EventContextMiddleware, bus=bus)


@app.post("/publish")
async def publish():
    sentry_sdk.set_tag("endpoint", "yes")
    bus.publish(Placed())
    return sentry_sdk.get_traceparent()


@app.post("/dispatch")
async def dispatch():
    await bus.dispatch(Placed())


client = TestClient(app, raise_server_exceptions=False)
"""
LOGS = ["unconfigured", "printing", "to-logging", "to-a-formatter"]


def write_sentry(folder: Folder, rate: str = "None") -> None:
    folder.write("reporting.py")
    wiring = PARTS["wiring.py"].replace("=0.1", f"={rate}")
    assert f"traces_sample_rate={rate}" in wiring
    folder.write("wiring.py", wiring)


def trace_in(printed: str) -> str:
    """The trace id of the traceparent that an endpoint has returned."""
    [traceparent] = [each["traceparent"] for each in objects(printed) if "traceparent" in each]
    trace_id: str = traceparent.split("-")[0]
    return trace_id


def events(printed: str) -> list[Any]:
    """What Sentry was sent, without the lines that structlog has printed."""
    return [each for each in objects(printed) if "event_id" in each and "platform" in each]


def write_sentry_alone(folder: Folder) -> None:
    """An application that tells Sentry nothing of its bus."""
    wiring = PARTS["wiring.py"]
    alone = wiring.replace("from reporting import group_lines, report_to_sentry\n", "")
    alone = alone.replace("    before_send=group_lines,\n", "")
    alone = alone.replace("report_to_sentry(bus)\n", "")
    assert "report" not in alone
    folder.write("wiring.py", alone)


PUBLISH = """
with client:
    client.post("/publish")
"""


def test_sentry_alone_sees_no_failure_that_structlog_prints(folder: Folder) -> None:
    write_sentry_alone(folder)

    assert events(folder.run(CLIENT + PUBLISH, "printing")) == []


def test_with_sentry_alone_the_handlers_of_a_request_share_a_scope(folder: Folder) -> None:
    write_sentry_alone(folder)
    crumb = 'sentry_sdk.add_breadcrumb(message="first")\n    raise ValueError("first")'
    crumbs = CLIENT.replace('raise ValueError("first")', crumb)

    _, second = events(folder.run(crumbs + PUBLISH, "unconfigured"))

    assert second["exception"]["values"][0]["type"] == "KeyError"
    assert second["tags"]["of"] == "first"
    assert "first" in [each["message"] for each in second["breadcrumbs"]["values"]]


@pytest.mark.parametrize(
    ("logs", "rate"), [*((logs, "None") for logs in LOGS), ("printing", "1.0")]
)
def test_two_failing_handlers_are_two_events_in_sentry(
    folder: Folder, logs: str, rate: str
) -> None:
    write_sentry(folder, rate)
    publish = """
with client:
    print(json.dumps({"traceparent": client.post("/publish").json()}))
"""

    printed = folder.run(CLIENT + publish, logs)

    first, second = sorted(events(printed), key=lambda event: str(event["tags"]["handler"]))
    for event, name, error in ((first, "first", "ValueError"), (second, "second", "KeyError")):
        assert event["tags"]["handler"] == name
        assert [each["type"] for each in event["exception"]["values"]] == [error]
        assert event["contexts"]["trace"]["trace_id"] == trace_in(printed)
        assert event["request"]["url"].endswith("/publish")
    assert first["tags"].keys() - {"delivery_id", "handler"} == {"endpoint", "of"}
    assert second["tags"].keys() - {"delivery_id", "handler"} == {"endpoint", "too"}
    assert first["tags"]["delivery_id"] != second["tags"]["delivery_id"]


def test_what_a_dispatch_raises_is_one_event_of_the_request(folder: Folder) -> None:
    write_sentry(folder)

    [event] = events(
        folder.run(CLIENT + 'with client:\n    client.post("/dispatch")', "unconfigured")
    )

    assert event["transaction"] == "/dispatch"
    assert "DispatchError" in {each["type"] for each in event["exception"]["values"]}


@pytest.mark.parametrize("logs", ["unconfigured", "to-a-formatter"])
def test_lines_of_one_kind_are_one_issue_in_sentry(folder: Folder, logs: str) -> None:
    write_sentry(folder)
    lines = """
from eventkit._core.log import log

for number in (1, 2):
    log(logging.ERROR, "deliveries undelivered", deliveries=number)
"""

    lines_of = [event["logentry"]["message"] for event in events(folder.run(CLIENT + lines, logs))]

    assert len(lines_of) == 2
    assert len({*lines_of}) == 1
    assert lines_of[0].startswith("deliveries undelivered")


def test_a_durable_handler_fails_in_the_trace_of_its_request(folder: Folder) -> None:
    """Only its last attempt is an event, and that of another process."""
    write_sentry(folder)
    durable = """
from dataclasses import dataclass

import anyio
from sqlalchemy import MetaData, create_engine
from sqlalchemy.orm import Session

from eventkit import Durable, named
from eventkit.outbox import Outbox, add_tables


@named("tests.paid.v1")
@dataclass(frozen=True, slots=True)
class Paid: ...


@bus.on(Paid, name="receipt", durable=Durable(attempts=2, backoff=lambda attempt, error: 0))
async def receipt(event):
    raise ValueError


engine = create_engine("sqlite:///paid.db")
tables = MetaData()
add_tables(tables)
tables.create_all(engine)


@app.post("/pay")
def pay():
    with Session(engine) as session, session.begin():
        bus.publish(Paid())
    return sentry_sdk.get_traceparent()


"""
    publish = """
outbox = Outbox(bus, engine, relay=False)
with client:
    print(json.dumps({"traceparent": client.post("/pay").json()}))
"""
    run = "anyio.run(Outbox(bus, engine).run_due)"

    before = folder.run(CLIENT + durable + publish, "printing")
    after = folder.run(CLIENT + durable + run, "printing")

    assert events(before) == []
    [event] = events(after)
    assert event["tags"]["handler"] == "receipt"
    assert event["contexts"]["trace"]["trace_id"] == trace_in(before)


def test_a_message_that_nobody_can_handle_is_one_event_in_sentry(folder: Folder) -> None:
    pytest.importorskip("faststream")
    write_sentry(folder)
    consume = """
from dataclasses import dataclass

import anyio
import stamina
from faststream.nats import JStream, NatsBroker, TestNatsBroker

from eventkit import named
from eventkit.faststream import Bridge
from eventkit.wire import encode


@named("tests.paid.v1")
@dataclass(frozen=True, slots=True)
class Paid: ...


@bus.on(Paid, name="invoice")
async def invoice(event):
    raise ValueError


async def receive():
    broker = NatsBroker(logger=None)
    paid = broker.subscriber("paid", stream=JStream("s"), durable="billing", pull_sub=True)
    dead = broker.publisher("dead", stream=JStream("s"))
    Bridge(bus, source="/billing").consume(paid, Paid, dead_letter=dead)
    message = encode(Paid(), source="/orders", id="1")
    async with TestNatsBroker(broker):
        await broker.publish(message.body, "paid", headers=message.headers("ce-"))


with stamina.set_testing(True, attempts=2):
    anyio.run(receive)
"""

    sent = events(folder.run(CLIENT + consume, "to-a-formatter"))

    failures = [event for event in sent if "exception" in event]
    assert [event["tags"]["handler"] for event in failures] == ["invoice"]
    dead = [event["logentry"]["message"] for event in sent if "exception" not in event]
    assert dead == ["a message has become a dead letter"]


# Logs

SHOP = """
import sys
from dataclasses import dataclass

import anyio
from fastapi import FastAPI
from sqlalchemy import MetaData, create_engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from eventkit import EventBus, named
from eventkit.outbox import Outbox, add_tables
from eventkit.starlette import EventContextMiddleware


@named("tests.paid.v1")
@dataclass(frozen=True, slots=True)
class Paid: ...


engine = create_engine("sqlite:///paid.db")
tables = MetaData()
add_tables(tables)
tables.create_all(engine)
bus = EventBus()
outbox = Outbox(bus, engine, relay=False)
app = FastAPI()
app.add_middleware(EventContextMiddleware, bus=bus)


@bus.on(Paid, name="fail")
async def fail(event):
    info("sending")
    raise ValueError("no mail today")


@bus.on(Paid, name="receipt", durable=True)
async def receipt(event):
    info("writing")


@app.post("/pay")
def pay():
    info("paid")
    with Session(engine) as session, session.begin():
        bus.publish(Paid())


if "later" in sys.argv:
    anyio.run(outbox.run_due)
else:
    with TestClient(app) as client:
        client.post("/pay", headers={"x-request-id": "r1"})
"""
STRUCTURED = """
from structured import RequestId, structlog

info = structlog.get_logger().info
"""
PLAIN = """
from plain import RequestIds, logging, request_id

info = logging.getLogger("shop").info


class RequestId:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        request_id.set(dict(scope.get("headers", ())).get(b"x-request-id", b"").decode())
        await self.app(scope, receive, send)
"""


def shop_that_logs(folder: Folder, kind: str) -> str:
    """The program, with structlog or without."""
    if kind == "structured":
        folder.write("structured.py")
        head, more = STRUCTURED, "app.add_middleware(RequestId)"
    else:
        folder.write("plain.py")
        head, more = PLAIN, "app.add_middleware(RequestId)\nbus.observe(RequestIds())"
    return head + SHOP.replace("\nif ", f"\n{more}\n\nif ")


def said(line: Any) -> str:
    """The message of a line, of whichever kind."""
    text: str = line.get("event") or line["message"]
    return text.split(":", maxsplit=1)[0]


@pytest.mark.parametrize("kind", ["structured", "plain"])
def test_lines_of_handlers_have_the_request_id_and_the_delivery_id_also_after_a_restart(
    folder: Folder, kind: str
) -> None:
    program = shop_that_logs(folder, kind)
    before = {said(line): line for line in objects(folder.run(program))}
    after = {said(line): line for line in objects(folder.run(program, "later"))}

    paid, sending, failed = before["paid"], before["sending"], before["event handler failed"]
    assert [line["request_id"] for line in (paid, sending, failed)] == ["r1"] * 3
    assert "delivery_id" not in paid
    assert sending["handler"] == failed["handler"] == "fail"
    assert sending["delivery_id"] == failed["delivery_id"]
    assert "no mail today" in json.dumps(failed["exception"])
    assert "writing" not in before
    assert after["writing"]["request_id"] == "r1"
    assert after["writing"]["handler"] == "receipt"
    assert after["writing"]["delivery_id"] != sending["delivery_id"]
