"""How the demo draws spans; and that the shop needs OpenTelemetry's SDK only where it is asked."""

import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from io import StringIO

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link
from rich.console import Console

from examples.demo.spans import Row, Span, drawn, edges, tree

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
HANDLER, ATTEMPT = "messaging.destination.subscription.name", "eventkit.delivery.attempt"


def fake(
    name: str,
    at_ms: float,
    parent: str = "",
    *,
    link: str = "",
    service: str = "shop",
    failed: bool = False,
    facts: Mapping[str, object] = {},
) -> Span:
    """A span of 1.5 ms, whose id is its name."""
    start = NOON + timedelta(milliseconds=at_ms)
    return Span(
        name=name,
        trace_id="b" if link else "a",
        span_id=name,
        start=start,
        end=start + timedelta(milliseconds=1.5),
        parent_id=parent,
        links=(link,) if link else (),
        service=service,
        failed=failed,
        attributes=facts,
    )


def run(name: str, at_ms: float, parent: str = "", *, link: str = "", attempt: int = 1) -> Span:
    """A run of the handler `mail`."""
    return fake(name, at_ms, parent, link=link, facts={HANDLER: "mail", ATTEMPT: attempt})


ROOT = fake("POST /orders", 0, facts={"http.status_code": 201})


def text_of(rows: list[Row]) -> list[str]:
    """What is printed, line by line."""
    console = Console(width=70, file=StringIO(), color_system=None)
    with console.capture() as printed:
        console.print(drawn(rows))
    return [line.rstrip() for line in printed.get().splitlines()]


def test_a_tree_has_children_in_order_of_time_and_traces_that_have_a_link() -> None:
    spans = [
        fake("send", 2000.5, "process again"),
        run("process again", 2000, link="POST /orders", attempt=2),
        run("process", 4, "POST /orders"),
        fake("insert", 2.25, "commit", facts={"db.statement": "insert into main.orders (id)"}),
        fake("commit", 2, "POST /orders", failed=True),
        fake("GET", 5, "process", facts={"http.url": "http://127.0.0.1:1234/stock"}),
        fake("POST /users", 1),
        ROOT,
    ]

    # Releases of rich share the width among columns in ways of their own.
    assert [" ".join(line.split()) for line in text_of(tree(spans, ROOT))] == [
        "from took",
        "POST /orders 201 0.0 1.5",
        "├─ commit failed 2.0 1.5",
        "│ └─ INSERT orders 2.2 1.5",
        "├─ process → mail 4.0 1.5",
        "│ └─ GET /stock 5.0 1.5",
        "└┄ process again → mail attempt 2 2000.0 1.5",
        "└─ send 2000.5 1.5",
    ]


def test_services_are_named_where_there_are_several() -> None:
    spans = [ROOT, fake("process", 1, "POST /orders", service="billing")]

    assert [line.split() for line in text_of(tree(spans, ROOT))[1:]] == [
        ["POST", "/orders", "shop", "201", "0.0", "1.5"],
        ["└─", "process", "billing", "1.0", "1.5"],
    ]


def test_a_tree_says_who_stands_below_whom_and_how_often() -> None:
    spans = [ROOT, *(run(f"process {number}", number, "POST /orders") for number in range(2))]

    assert edges(tree(spans, ROOT)) == {
        ("POST /orders", "process 0 → mail"): 1,
        ("POST /orders", "process 1 → mail"): 1,
    }


def test_a_span_is_read_as_the_sdk_writes_it() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({SERVICE_NAME: "shop"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("tests")
    with tracer.start_as_current_span("publisher") as publisher:
        tracer.start_span("run", Context(), links=[Link(publisher.get_span_context())]).end()
        with pytest.raises(OSError, match="gone"), tracer.start_as_current_span("child"):
            raise OSError("gone")

    written = [span.to_json(indent=None) for span in exporter.get_finished_spans()]
    linked, child, root = (Span.from_json(line) for line in written)

    assert (linked.parent_id, root.parent_id, child.parent_id) == ("", "", root.span_id)
    assert (linked.links, child.links) == ((root.span_id,), ())
    assert linked.trace_id != root.trace_id == child.trace_id
    assert (child.failed, root.failed) == (True, False)
    assert root.start <= child.start <= child.end <= root.end
    assert root.service == "shop"


def test_the_shop_needs_no_sdk_of_opentelemetry() -> None:
    pytest.importorskip("greenlet")  # compiled: a new Python may be without it
    without = "import sys; sys.modules |= dict.fromkeys(sys.argv[1:])"
    missing = ["opentelemetry.sdk", "opentelemetry.instrumentation"]

    subprocess.run(
        [sys.executable, "-c", f"{without}; import examples.shop.main", *missing], check=True
    )
