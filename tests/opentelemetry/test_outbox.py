"""Runs from an outbox's table: linked to the publish, and what they publish is their child."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("greenlet")  # compiled: a new Python may be without it

from opentelemetry import baggage, context
from opentelemetry.trace import NoOpTracerProvider
from sqlalchemy import Engine, MetaData

from eventkit import Durable, EventBus, named
from eventkit.opentelemetry import instrument
from eventkit.outbox import Outbox, add_tables
from tests.databases import sqlite
from tests.opentelemetry.collected import Collected
from tests.witness import assert_settled, ignore

pytestmark = pytest.mark.anyio


@named("shop.placed")
@dataclass(frozen=True, slots=True)
class Placed:
    """An event without a field."""


@named("shop.paid")
@dataclass(frozen=True, slots=True)
class Paid:
    """Another one."""


@pytest.fixture
def engine(database: Path) -> Iterator[Engine]:
    """A database with the outbox's tables."""
    metadata = MetaData()
    add_tables(metadata)
    with sqlite(database) as engine:
        metadata.create_all(engine)
        yield engine


class Shop:
    """A process with an outbox. What its durable handler does is chosen by a test."""

    def __init__(self, engine: Engine, telemetry: Collected, *, relay: bool = True) -> None:
        self.bus = EventBus(name="shop")
        self.bus.report_failure = ignore
        self.errors: list[Exception] = []
        self.seen: list[object] = []

        @self.bus.on(Placed, durable=Durable(attempts=3), name="mail")
        async def mail(event: Placed) -> None:
            self.seen.append(baggage.get_baggage("tenant"))
            if self.errors:
                raise self.errors.pop()
            with telemetry.tracer.start_as_current_span("in mail"):
                self.bus.publish(Paid())

        @self.bus.on(Paid, name="count")
        async def count(event: Paid) -> None: ...

        self.outbox = Outbox(self.bus, engine, relay=relay)

    async def publish(self, telemetry: Collected, **carried: str) -> None:
        """As in a request, which has a span and perhaps some baggage."""
        around = context.get_current()
        for name, value in carried.items():
            around = baggage.set_baggage(name, value, around)
        token = context.attach(around)
        try:
            async with self.bus.context():
                with telemetry.tracer.start_as_current_span("request"):
                    self.bus.publish(Placed())
        finally:
            context.detach(token)


@pytest.fixture
def writer(engine: Engine, telemetry: Collected) -> Iterator[Shop]:
    """A process that only writes rows."""
    shop = Shop(engine, telemetry, relay=False)
    telemetry.instrument(shop.bus)
    with shop.outbox:
        yield shop


@pytest.fixture
def relay(engine: Engine, telemetry: Collected) -> Iterator[Shop]:
    """A process that runs them."""
    shop = Shop(engine, telemetry)
    with shop.outbox:
        yield shop


async def test_a_run_where_the_event_was_published_is_its_publishers_child(
    relay: Shop, telemetry: Collected
) -> None:
    telemetry.instrument(relay.bus)
    await relay.publish(telemetry)

    assert telemetry.parent_of("run mail") == "request"
    assert telemetry.linked_to("run mail") == []


async def test_a_run_from_the_table_begins_a_trace_with_a_link_to_its_publisher(
    writer: Shop, relay: Shop, telemetry: Collected
) -> None:
    telemetry.instrument(relay.bus)
    await writer.publish(telemetry)
    assert [span for span in telemetry.spans if span.name.startswith("process")] == []
    with telemetry.tracer.start_as_current_span("relay"):  # nothing of it is a row's
        await relay.outbox.run_due()

    assert telemetry.parent_of("run mail") is None
    assert telemetry.linked_to("run mail") == ["request"]
    assert telemetry.trace_of("run mail") != telemetry.trace_of("request")
    assert_settled(relay.bus)


async def test_what_such_a_run_publishes_is_its_child_and_has_no_link(
    writer: Shop, relay: Shop, telemetry: Collected
) -> None:
    telemetry.instrument(relay.bus)
    await writer.publish(telemetry)
    await relay.outbox.run_due()

    lineage = {
        "in mail": "run mail",
        "publish shop.paid": "in mail",
        "run count": "in mail",
    }
    assert {name: telemetry.parent_of(name) for name in lineage} == lineage
    assert [telemetry.linked_to(name) for name in lineage] == [[], [], []]
    assert len({telemetry.trace_of(name) for name in (*lineage, "run mail")}) == 1


async def test_each_attempt_is_a_trace_with_a_link(relay: Shop, telemetry: Collected) -> None:
    telemetry.instrument(relay.bus)
    relay.errors = [LookupError(), LookupError()]
    await relay.publish(telemetry)
    await relay.outbox.run_due(within=1e6)

    runs = [span for span in telemetry.spans if span.name == "process shop.placed"]
    assert [(span.attributes or {})["eventkit.delivery.attempt"] for span in runs] == [1, 2, 3]
    assert [len(span.links) for span in runs] == [0, 1, 1]
    assert len({str((span.attributes or {})["eventkit.delivery.id"]) for span in runs}) == 1
    assert len({span.context.trace_id for span in runs if span.context is not None}) == 3
    # Each was put back into the table, where it is another process's as well.
    outcomes = telemetry.values("eventkit.deliveries.ended", "eventkit.outcome")
    assert (outcomes["failed"], outcomes["handled"]) == (2, 2)


async def test_baggage_comes_along(writer: Shop, relay: Shop, telemetry: Collected) -> None:
    telemetry.instrument(relay.bus)
    await writer.publish(telemetry, tenant="acme")
    await relay.outbox.run_due()

    assert relay.seen == ["acme"]
    assert baggage.get_baggage("tenant") is None


async def test_a_row_of_a_publisher_without_a_span_begins_a_trace_without_a_link(
    engine: Engine, relay: Shop, telemetry: Collected
) -> None:
    telemetry.instrument(relay.bus)
    with Shop(engine, telemetry, relay=False).outbox as outbox:  # nobody watches it
        async with outbox.bus.context():
            outbox.bus.publish(Placed())
        with telemetry.tracer.start_as_current_span("relay"):
            await relay.outbox.run_due()

    assert telemetry.parent_of("run mail") is None
    assert telemetry.linked_to("run mail") == []


@pytest.mark.parametrize("tracing", [True, False])
async def test_a_message_that_was_received_is_linked_to_its_publisher(
    relay: Shop, telemetry: Collected, tracing: bool
) -> None:
    """Also where it is kept in the table in between, and nothing else has a span of it."""
    telemetry.instrument(relay.bus)
    headers: dict[str, str] = {}
    if tracing:
        with telemetry.tracer.start_as_current_span("sender") as sender:
            number = sender.get_span_context()
            headers["traceparent"] = f"00-{number.trace_id:032x}-{number.span_id:016x}-01"
    relay.errors = [LookupError()]
    await relay.outbox.receive(Placed(), consumer="shop", message_id="1", headers=headers)
    await relay.outbox.run_due(within=60)

    runs = [span for span in telemetry.spans if span.name == "process shop.placed"]
    assert len(runs) == 2
    assert [span.parent for span in runs] == [None, None]
    assert [len(span.links) for span in runs] == [int(tracing)] * 2


async def test_without_a_recorder_rows_run_as_ever(
    writer: Shop, relay: Shop, telemetry: Collected
) -> None:
    instrument(relay.bus, tracer_provider=NoOpTracerProvider(), meter_provider=telemetry.meters)
    await writer.publish(telemetry, tenant="acme")
    await relay.outbox.run_due()

    assert relay.seen == ["acme"]
    assert telemetry.parent_of("in mail") is None


async def test_what_is_in_the_table_is_reported(writer: Shop, telemetry: Collected) -> None:
    await writer.publish(telemetry)

    by_state = telemetry.values("eventkit.outbox.deliveries", "eventkit.handler", "eventkit.state")
    assert by_state == {
        ("mail", "ready"): 1,
        ("mail", "leased"): 0,
        ("mail", "dead"): 0,
        ("mail", "unreadable"): 0,
    }
    oldest: Any = telemetry.values("eventkit.outbox.oldest_due")
    assert oldest["shop"] >= 0
    assert telemetry.values("eventkit.deliveries.ended", "eventkit.outcome")["requeued"] == 1


def write_and_die(database: str) -> None:
    """Be a process that publishes in a span, prints its trace, and is killed."""

    async def write() -> None:
        with sqlite(Path(database)) as engine:
            telemetry = Collected()
            shop = Shop(engine, telemetry, relay=False)
            telemetry.instrument(shop.bus)
            await shop.publish(telemetry)
            print(telemetry.trace_of("request"), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    anyio.run(write)


async def test_the_rows_of_a_process_that_was_killed_are_linked_to_its_spans(
    database: Path, relay: Shop, telemetry: Collected
) -> None:
    telemetry.instrument(relay.bus)
    code = f"from {__name__} import write_and_die; write_and_die({str(database)!r})"
    root = Path(__file__).parent.parent.parent
    killed = await anyio.run_process([sys.executable, "-c", code], check=False, cwd=root)
    await relay.outbox.run_due()

    [link] = telemetry["run mail"].links
    assert killed.returncode == -signal.SIGKILL
    assert link.context.trace_id == int(killed.stdout)
