"""Owns the output of the command: tables on a terminal, plain columns elsewhere, and JSON.

Plain columns have one line for each row, and no colours. Control characters of stored texts are
escaped: a key may come from a client.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from eventkit.outbox import OutboxStats, StoredDelivery

_MANY = 1000  # deliveries in one statement; a progress bar helps with more
_COUNTS = ("ready", "leased", "unreadable", "dead", "unknown")
_COLOURS = {"dead": "red", "unreadable": "yellow", "leased": "cyan", "ready": "green"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def as_json(document: object) -> None:
    """Write one JSON document."""
    click.echo(json.dumps(document, indent=2))


def stats_document(stats: OutboxStats) -> dict[str, Any]:  # Any: a count, a time or documents
    """Return the JSON of `stats`, without `lost`: each process counts its own."""
    counts = {name: getattr(stats, name) for name in _COUNTS}
    return {**counts, "oldest_due": stats.oldest_due}


def delivery_document(delivery: StoredDelivery, *, payload: bool) -> dict[str, object]:
    """Return the JSON of one delivery in `list` and `show`."""
    facts = {name: _plainly(value) for name, value in asdict(delivery).items()}
    if not payload:
        del facts["payload"]
    return facts


def _plainly(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, int) else str(value)


def show_stats(stats: OutboxStats) -> None:
    """Print one line for each handler, and one for all."""
    everything = {"all handlers": stats}
    rows = [
        [
            _clean(name),
            *(str(getattr(each, count)) for count in _COUNTS),
            "" if each.oldest_due is None else _span(each.oldest_due),
        ]
        for name, each in {**stats.handlers, **everything}.items()
    ]
    _show_table(["handler", *_COUNTS, "oldest due"], rows, right=_COUNTS)


def show_counts(counts: Mapping[tuple[str, str], int]) -> None:
    """Print the counts on stderr."""
    rows = [[_clean(handler), state, str(n)] for (handler, state), n in counts.items()]
    _show_table(["handler", "state", "deliveries"], rows, right=["deliveries"], err=True)


def show_list(deliveries: Iterable[StoredDelivery]) -> None:
    """Print a row for each; a terminal has the handler and the error below the id."""
    now = datetime.now(UTC)
    rows = [
        [
            str(each.id),
            each.state,
            str(each.attempt),
            _when((each.due_at - now).total_seconds()),
            _clean(each.handler),
            _clean(each.event_type),
            _clean(each.key or ""),
            _clean(each.error or ""),
        ]
        for each in deliveries
    ]
    columns = ["delivery", "state", "attempt", "due"]
    if _console().is_terminal:
        stacked = [["\n".join(filter(None, [row[0], *row[4:]])), *row[1:4]] for row in rows]
        _show_table(columns, stacked, right=["attempt"], leading=True)
    else:
        _show_table([*columns, "handler", "event", "key", "error"], rows, right=["attempt"])


def show_delivery(delivery: StoredDelivery, *, payload: bool) -> None:
    """Print one line for each known fact."""
    facts = delivery_document(delivery, payload=payload)
    width = max(map(len, facts))
    for name, value in facts.items():
        if value is not None:
            click.echo(f"{name:{width}}  {_clean(str(value))}")


def _show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Iterable[str] = (),
    err: bool = False,
    leading: bool = False,
) -> None:
    """Write rows below their columns.

    Args:
        columns: The headings.
        rows: The cells of each row.
        right: The columns that are set flush right.
        err: Whether to write to stderr.
        leading: Whether an empty line stands between rows.
    """
    flush_right = [name in {*right} for name in columns]
    console = _console(err=err)
    if not console.is_terminal:
        click.echo(_in_columns([columns, *rows], flush_right), err=err)
        return
    table = Table(box=box.SIMPLE_HEAD, leading=int(leading), pad_edge=False)
    for name, is_right in zip(columns, flush_right, strict=True):
        table.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    console.print(table)


def _in_columns(rows: Sequence[Sequence[str]], flush_right: Sequence[bool]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, flush_right, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


@contextmanager
def progress(what: str, total: int) -> Generator[Callable[[int], object]]:
    """Show a progress bar on stderr, if it is a terminal and there are many deliveries."""
    console = _console(err=True)
    if total <= _MANY or not console.is_interactive:
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda done: bars.update(bar, completed=done)


def _console(*, err: bool = False) -> Console:
    """Make a console. It reads the stream and NO_COLOR when it is made, so none is kept."""
    return Console(stderr=err, highlight=False)


def _clean(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _when(seconds: float) -> str:
    return f"in {_span(seconds)}" if seconds > 0 else f"{_span(-seconds)} ago"


def _span(seconds: float) -> str:
    """Return a time in its largest unit, rounded down: 90 s is 1 m."""
    whole = math.floor(seconds)
    for unit, size in _UNITS:
        if whole >= size:
            return f"{whole // size} {unit}"
    return "0 s"
