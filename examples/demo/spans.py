"""Owns the spans that processes have written, and how they look: a tree of who called whom.

A solid line leads to a child, a dotted one to a trace of its own that has a link. Knows nothing of
what should be true.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import anyio
from rich.table import Table
from rich.text import Text

_TABLE = re.compile(r"\b(?:into|update|from)\s+(?:main\.)?(\w+)", re.IGNORECASE)
_MILLISECOND = timedelta(milliseconds=1)
_SECONDS_BETWEEN_LOOKS = 0.02

TREE_LEGEND = Text.assemble(
    "─ a child   ",
    ("┄", "yellow"),
    " a trace of its own, with a link   times in ms since the request began",
    style="dim",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One span, as OpenTelemetry's `ReadableSpan.to_json` writes it.

    Attributes:
        parent_id: Empty where a trace begins.
        links: The ids of the spans that it has links to.
        service: Whose it is.
        failed: Whether its status is an error.
    """

    name: str
    trace_id: str
    span_id: str
    start: datetime
    end: datetime
    parent_id: str = ""
    links: tuple[str, ...] = ()
    service: str = ""
    failed: bool = False
    attributes: Mapping[str, object] = field(default_factory=dict[str, object])

    @classmethod
    def from_json(cls, line: str) -> Span:
        """Read one line."""
        read = json.loads(line)
        return cls(
            name=read["name"],
            trace_id=read["context"]["trace_id"],
            span_id=read["context"]["span_id"],
            start=datetime.fromisoformat(read["start_time"]),
            end=datetime.fromisoformat(read["end_time"]),
            parent_id=read["parent_id"] or "",
            links=tuple(link["context"]["span_id"] for link in read["links"]),
            service=read["resource"]["attributes"]["service.name"],
            failed=read["status"]["status_code"] == "ERROR",
            attributes=read["attributes"],
        )

    @property
    def handler(self) -> str:
        """Whose run it is; empty for another span."""
        return self._text("messaging.destination.subscription.name")

    @property
    def label(self) -> str:
        """Its name, with what tells it from others of that name."""
        if statement := self._text("db.statement", "db.query.text"):
            table = _TABLE.search(statement)
            return f"{statement.split()[0].upper()} {table[1] if table else ''}".rstrip()
        if url := self._text("http.url", "url.full"):
            return f"{self.name.split()[0]} {urlsplit(url).path}"
        return f"{self.name} → {self.handler}" if self.handler else self.name

    @property
    def note(self) -> str:
        """What else is to be known of it."""
        attempt = self.attributes.get("eventkit.delivery.attempt", 1)
        status = self._text("http.status_code", "http.response.status_code")
        return "failed" if self.failed else status if attempt == 1 else f"attempt {attempt}"

    def _text(self, *names: str) -> str:
        return next((str(self.attributes[name]) for name in names if name in self.attributes), "")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a tree.

    Attributes:
        span: Which span.
        parent: What it stands below; None at the top.
        lines: What is drawn before it.
        is_linked: Whether it is no child, but has a link.
    """

    span: Span
    parent: Span | None = None
    lines: str = ""
    is_linked: bool = False


def tree(spans: Iterable[Span], root: Span) -> list[Row]:
    """All that follows from a span: its children, and what has a link to it, in order of time."""
    ordered = sorted(spans, key=lambda span: span.start)

    def below(parent: Span, indent: str) -> Iterator[Row]:
        following = [each for each in ordered if parent.span_id in (each.parent_id, *each.links)]
        for each in following:
            is_last, is_linked = each is following[-1], parent.span_id != each.parent_id
            lines = ("└" if is_last else "├") + ("┄ " if is_linked else "─ ")
            yield Row(each, parent, indent + lines, is_linked)
            yield from below(each, indent + ("   " if is_last else "│  "))

    return [Row(root), *below(root, "")]


def drawn(rows: Sequence[Row]) -> Table:
    """Draw a tree, with the times when its spans began, and how long they took."""
    began = rows[0].span.start
    services = {row.span.service for row in rows}
    grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
    grid.add_column(ratio=1, no_wrap=True)
    for width in (8 if len(services) > 1 else 0, 9):
        grid.add_column(width=width, no_wrap=True)
    for _ in range(2):
        grid.add_column(width=7, no_wrap=True, justify="right")
    grid.add_row("", "", "", *(Text(heading, style="dim") for heading in ("from", "took")))
    for row in rows:
        span = row.span
        emphasis = "yellow" if row.is_linked else ""
        grid.add_row(
            Text.assemble((row.lines, emphasis or "dim"), (span.label, _style(span))),
            Text(span.service if len(services) > 1 else "", style="dim"),
            Text(span.note, style="red" if span.failed else emphasis),
            _milliseconds(span.start - began),
            _milliseconds(span.end - span.start),
        )
    return grid


def edges(rows: Iterable[Row]) -> Counter[tuple[str, str]]:
    """Who stands below whom, and how often."""
    return Counter((row.parent.label, row.span.label) for row in rows if row.parent is not None)


class SpanFile:
    """The file that processes write their spans to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Span]:
        """All that have ended so far, but those of a pool that gives a connection."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        spans = [Span.from_json(line) for line in lines if line.endswith("\n")]
        return [span for span in spans if span.name != "connect"]

    async def until(self, condition: Callable[[list[Span]], bool], *, seconds: float) -> bool:
        """Wait until it holds what is to come, or for too long."""
        with anyio.move_on_after(seconds):
            while not condition(self.read()):  # noqa: ASYNC110 - a file tells nobody that it grew
                await anyio.sleep(_SECONDS_BETWEEN_LOOKS)
            return True
        return False


def _style(span: Span) -> str:
    if span.failed:
        return "red"
    return "green" if span.handler else "" if span.parent_id else "bold"


def _milliseconds(length: timedelta) -> str:
    return f"{length / _MILLISECOND:.1f}"
