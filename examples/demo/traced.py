"""Owns the demo's third mode: what OpenTelemetry is told of an order, and what must be true."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import IO

import httpx
from rich.console import Console

from examples.demo.cases import (
    Check,
    Stage,
    until_its_mail_has_arrived,
    until_its_mail_is_on_its_way,
)
from examples.demo.neighbours import Neighbourhood, neighbourhood
from examples.demo.play import FOR_EVER, staged
from examples.demo.process import ShopDidNotStart, kill
from examples.demo.report import Report
from examples.demo.spans import TREE_LEGEND, Row, Span, SpanFile, drawn, edges, tree
from examples.demo.trace import Trace, clock_ns

_SECONDS_TO_FINISH = 5.0

# Who stands below whom. A name may stand below several of one name: then it is told how often.
Family = Mapping[str, Sequence[str]]

_TAKEN, _PLACED = "process shop.stock.taken.v1", "process shop.order.placed.v1"
_CREATED = "process shop.user.created.v1"
_AUDIT, _WELCOME = "audit.write_row", "users.send_welcome_mail"
_COMPLETED = "DELETE eventkit_outbox"

_ORDER: Family = {
    "POST /orders": [
        "UPDATE products",
        "publish shop.stock.taken.v1",
        "INSERT orders",
        "publish shop.order.placed.v1",
        "commit",
        f"{_TAKEN} → orders.tell_warehouse",
        f"{_TAKEN} → {_AUDIT}",
        f"{_PLACED} → orders.send_confirmation",
        f"{_PLACED} → orders.collect_payment",
        f"{_PLACED} → {_AUDIT}",
    ],
    f"{_TAKEN} → orders.tell_warehouse": ["POST /stock"],
    f"{_TAKEN} → {_AUDIT}": ["commit"],
    f"{_PLACED} → orders.send_confirmation": ["send mail"],
    f"{_PLACED} → orders.collect_payment": ["POST /charges", "commit"],
    f"{_PLACED} → {_AUDIT}": ["commit"],
    "commit": [
        "INSERT eventkit_outbox",
        *(["INSERT audit", _COMPLETED] * 2),
        *("INSERT payments", _COMPLETED),
    ],
}
_SIGN_UP: Family = {
    "POST /users": [
        "INSERT users",
        "publish shop.user.created.v1",
        "commit",
        f"{_CREATED} → {_AUDIT}",
        f"{_CREATED} → {_WELCOME}",
    ],
    f"{_CREATED} → {_AUDIT}": ["commit"],
    f"{_CREATED} → {_WELCOME}": ["send mail"],
    "commit": ["INSERT eventkit_outbox", "INSERT audit", _COMPLETED],
}


async def play_traced(console: Console) -> bool:
    """Show an order and a killed sign-up as spans; True if everything happened as told."""
    report = Report(console)
    with neighbourhood() as around:
        traced = replace(around, is_traced=True)
        spans = SpanFile(traced.spans)
        try:
            with around.log.open("w") as log:
                await _play(report, traced, spans, log)
        except* (ShopDidNotStart, httpx.HTTPError) as errors:
            gone = Check("the shop is there and answers", holds=False, found=repr(errors))
            report.results.append(("The shop", [gone]))
        return report.summary(around.log)


async def _play(report: Report, around: Neighbourhood, spans: SpanFile, log: IO[str]) -> None:
    trace, usual_delay = Trace(), around.mails.delay
    async with staged(around, trace, log) as (stage, process):
        report.opening(f"The shop runs in process {process.pid}.", TREE_LEGEND)
        # The first request of a process pays for what is imported when it is used.
        await stage.order("zoe", tea=1)
        await _show_order(report, stage, spans)
        around.mails.thinking.clear()
        around.mails.delay = FOR_EVER
        shot = await stage.start_sign_up("nora")
        on_its_way = await until_its_mail_is_on_its_way(stage, shot)
        # Of what has ended we hear before its span is written.
        await spans.until(_has_audited, seconds=_SECONDS_TO_FINISH)
        await kill(process)
    shot.story.cut_off(clock_ns())
    around.mails.delay = usual_delay
    async with staged(around, trace, log) as (stage, again):
        await until_its_mail_has_arrived(stage, shot)
        rows = await until_whole(spans, "POST /users", _SIGN_UP)
    _show_killed(
        report,
        rows,
        [
            Check(
                "the mail was on its way, and SIGKILL ended the shop",
                on_its_way and process.returncode == -signal.SIGKILL,
            ),
            family(rows, _SIGN_UP),
            whole(rows, spans.read()),
            Check("the new process ended on SIGTERM", again.returncode in (0, -signal.SIGTERM)),
        ],
    )


async def _show_order(report: Report, stage: Stage, spans: SpanFile) -> None:
    shot = await stage.order("ada", tea=2)
    rows = await until_whole(spans, "POST /orders", _ORDER)
    report.section(
        "1  An order",
        "The request's span ends with the answer. Its commit and its handlers come after, as its "
        "children.",
        drawn(rows) if rows else None,
        [
            Check("the answer is 201", shot.status == 201, str(shot.status)),
            family(rows, _ORDER),
            _after_the_commit(rows),
            whole(rows, spans.read()),
            Check("nothing has a link: all ran at once", not linked(rows)),
        ],
    )


def _show_killed(report: Report, rows: Sequence[Row], checks: Sequence[Check]) -> None:
    runs = ", ".join(f"{row.span.handler}, {row.span.note}" for row in linked(rows))
    report.section(
        "2  Killed, and run again from the outbox's table",
        "SIGKILL comes while a mail is on its way: a span that has not ended is lost. The run of "
        "the next\nprocess is a trace of its own, with a link to the request.",
        drawn(rows) if rows else None,
        [
            *checks,
            _after_the_commit(rows),
            Check(
                "one run has a link, and is the second attempt of the mail",
                runs == f"{_WELCOME}, attempt 2",
                runs or "none has one",
            ),
        ],
    )


def _has_audited(spans: Sequence[Span]) -> bool:
    return any(span.label == f"{_CREATED} → {_AUDIT}" for span in spans)


async def until_whole(spans: SpanFile, root: str, told: Family) -> list[Row]:
    """Wait until all spans have ended that are told below the last root, or for too long."""
    await spans.until(
        lambda all_: edges(_last(all_, root)) >= _counted(told), seconds=_SECONDS_TO_FINISH
    )
    return _last(spans.read(), root)


def family(rows: Sequence[Row], told: Family) -> Check:
    """Compare who stands below whom with what is told."""
    found, wanted = edges(rows), _counted(told)
    missing, more = wanted - found, found - wanted
    return Check(
        f"all {wanted.total()} spans are there, each below its parent",
        holds=not missing and not more,
        found=f"missing: {_in_words(missing)}; too many: {_in_words(more)}",
    )


def whole(rows: Sequence[Row], spans: Sequence[Span]) -> Check:
    """Nothing of these traces hangs in the air, or was counted twice."""
    shown = [row.span.span_id for row in rows]
    traces = {row.span.trace_id for row in rows}
    lost = [span for span in spans if span.trace_id in traces and span.span_id not in shown]
    return Check(
        "each span of these traces has its place in the tree, one",
        holds=not lost and len(set(shown)) == len(shown),
        found=", ".join(span.label for span in lost),
    )


def _last(spans: Sequence[Span], root: str) -> list[Row]:
    """The tree of the last request of a name; empty where none has ended."""
    roots = [span for span in spans if span.label == root and not span.parent_id]
    return tree(spans, max(roots, key=lambda span: span.start)) if roots else []


def _counted(told: Family) -> Counter[tuple[str, str]]:
    return Counter((parent, child) for parent, children in told.items() for child in children)


def _in_words(found: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{child} below {parent}" for parent, child in found.elements()) or "none"


def linked(rows: Sequence[Row]) -> list[Row]:
    """The rows that begin a trace of their own."""
    return [row for row in rows if row.is_linked]


def _after_the_commit(rows: Sequence[Row]) -> Check:
    """Compare times of one process, in the order in which it took them."""
    commits = [row.span.end for row in rows if row.span.label == "commit"]
    runs = [row.span.start for row in rows if row.span.handler]
    return Check(
        "no handler began before the commit had ended",
        holds=bool(commits and runs) and commits[0] <= min(runs),
    )
