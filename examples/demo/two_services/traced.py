"""Owns what OpenTelemetry is told of an order on its way through both services."""

from __future__ import annotations

from rich.console import Console

from examples.demo.cases import Check
from examples.demo.process import until_up
from examples.demo.report import Report
from examples.demo.spans import TREE_LEGEND, drawn
from examples.demo.traced import Family, family, linked, until_whole, whole
from examples.demo.two_services.broker import BrokerAtHand
from examples.demo.two_services.play import Stage, put_up

_EVENT = "shop.order.placed.v1"
_FORWARD = f"forward:{_EVENT}"
_INVOICE = f"process {_EVENT} → billing.write_invoice"


async def play_traced(console: Console) -> bool:
    """Show an order as spans; True if everything happened as told, or if there is no broker."""
    return await put_up(console, _play, traced=True)


async def _play(report: Report, stage: Stage) -> None:
    async with stage.orders.running() as taking, stage.billing.running() as writing:
        await until_up(stage.orders.trace)
        await until_up(stage.billing.trace)
        report.opening(
            f"orders is process {taking.pid}, billing {writing.pid}; {stage.at_hand}.", TREE_LEGEND
        )
        # The first request of a process pays for what is imported when it is used.
        await stage.finish(await stage.place("zoe", 0))
        way = await stage.place("ada", 1)
        told = _told(stage.at_hand)
        rows = await until_whole(stage.spans, "POST /orders/1", told)
    forwards = [row.span for row in linked(rows)]
    traces = {span.trace_id for span in forwards}
    report.section(
        "1  An order, and its invoice",
        "The forward runs from the outbox's table, as those of one customer go one by one. The "
        "spans of the\nplace `orders` are FastStream's; its message takes the trace to billing.",
        drawn(rows) if rows else None,
        [
            Check("the answer is 201", way.status == 201, str(way.status)),
            family(rows, told),
            Check(
                "the forward is a trace of its own, and has a link to the request",
                [span.handler for span in forwards] == [_FORWARD],
                ", ".join(span.label for span in forwards) or "nothing has one",
            ),
            Check(
                "both services are part of its trace",
                {row.span.service for row in rows if row.span.trace_id in traces}
                == {"orders", "billing"},
            ),
            whole(rows, stage.spans.read()),
        ],
    )


def _told(at_hand: BrokerAtHand) -> Family:
    place = f"{at_hand.prefix}orders"
    if at_hand.kind == "rabbitmq":
        place += "."  # an exchange and a routing key, which is empty
    return {
        "POST /orders/1": [f"publish {_EVENT}", "commit", f"process {_EVENT} → {_FORWARD}"],
        f"process {_EVENT} → {_FORWARD}": [f"{place} create"],
        f"{place} create": [f"{place} publish", f"{place} process"],
        f"{place} process": [f"publish {_EVENT}", _INVOICE],
        _INVOICE: ["commit"],
        "commit": [
            *("INSERT orders", "INSERT eventkit_outbox"),
            *("INSERT invoices", "DELETE eventkit_outbox"),
        ],
    }
