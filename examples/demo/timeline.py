"""Owns how a request looks: what happened, drawn on one axis of milliseconds, or of seconds.

Everything is readable without colour. Knows nothing of how the times came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from examples.demo.axis import Axis
from examples.demo.cases import Shot
from examples.demo.trace import Run

_LABEL, _NOTE = 26, 30
_SENT, _COMMITTED, _MAIL = ("◇", "cyan"), ("◆", "yellow"), ("●", "magenta")
_OTHER = ("▲", "blue")
_THIN, _THICK = "╴╶─", "╸╺━"  # left half, right half, whole cell
_CELLS_PER_TICK = 7

LEGEND = Text.assemble(
    *(("─", "cyan"), " the client waits   "),
    *(_SENT, " response sent   "),
    *(_COMMITTED, " committed   "),
    *(("━", "green"), " handlers   "),
    *(_MAIL, " mail received"),
    style="dim",
)
JOURNEY_LEGEND = Text.assemble(
    *(("─", "cyan"), " the client waits   "),
    *(_COMMITTED, " committed   "),
    *(("━", "green"), " handlers   "),
    *(_OTHER, " what else happens"),
    style="dim",
)


class _Track:
    """One line of the chart, painted bars first and marks on top."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._cells = [(" ", "")] * axis.width
        self._marked: set[int] = set()

    def bar(self, start_ns: int, end_ns: int, pen: str, style: str) -> None:
        """Draw from one moment to another, to half a cell."""
        start, end = (round(self._axis.at(moment) * 2) for moment in (start_ns, end_ns))
        end = max(end, start + 1)
        for cell in range(start // 2, (end + 1) // 2):
            left, right = start <= cell * 2, cell * 2 + 1 < end
            self._cells[cell] = (pen[left + 2 * right - 1], style)

    def mark(self, at_ns: int, mark: tuple[str, str]) -> None:
        """Put a sign at a moment that has come, beside one that stands there already."""
        if not at_ns:
            return
        cell = int(self._axis.at(at_ns))
        while cell in self._marked and cell < self._axis.width - 1:
            cell += 1
        self._marked.add(cell)
        self._cells[cell] = mark

    def text(self) -> Text:
        return Text.assemble(*self._cells, no_wrap=True)


class Timeline:
    """One request, line by line: the answer, the commit, each handler, the mail.

    `moments` are what else happened meanwhile, each with a name.
    """

    def __init__(self, shot: Shot, moments: Mapping[str, int] | None = None) -> None:
        self._shot = shot
        self._moments = moments or {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shot = self._shot
        end_ns = max([shot.ended_ns, *self._moments.values()])
        axis = Axis(shot.begun_ns, end_ns, options.max_width - _LABEL - _NOTE - 2)
        grid = _grid(axis, f"  from     to  {axis.unit}")
        _add_answer(grid, axis, shot)
        for event, runs in groupby(shot.story.runs, key=lambda run: run.event):
            grid.add_row(Text(event, style="bold"))
            before = ""
            for run in runs:
                _add_run(grid, axis, run, again=run.delivery == before)
                before = run.delivery
        for mail in shot.mails:
            _add_moment(grid, axis, "mail received", mail.received_ns, _MAIL)
        for label, at_ns in sorted(self._moments.items(), key=lambda moment: moment[1]):
            _add_moment(grid, axis, label, at_ns, _OTHER)
        yield grid


class Journey:
    """What came of one thing in several processes, line by line, in the order of the calls.

    Args:
        begun_ns: Where the axis begins.
    """

    def __init__(self, begun_ns: int) -> None:
        self._begun_ns = begun_ns
        self._rows: list[_Row] = []

    def part(self, heading: str) -> None:
        """What follows belongs to this."""
        self._rows.append(_Row(heading))

    def waited(self, label: str, start_ns: int, end_ns: int, note: str) -> None:
        """Somebody waited for an answer."""
        self._rows.append(_Row(label, start_ns, end_ns, _THIN, "cyan", note))

    def moment(self, label: str, at_ns: int) -> None:
        """Something happened."""
        self._rows.append(_Row(label, at_ns, mark=_OTHER))

    def committed(self, label: str, at_ns: int) -> None:
        """A transaction was committed."""
        self._rows.append(_Row(label, at_ns, mark=_COMMITTED))

    def run(self, label: str, run: Run, note: str = "") -> None:
        """A handler ran, and may have committed something."""
        good = run.outcome == "ok"
        style, note = ("green", note) if good else ("red", run.error or run.outcome)
        self._rows.append(
            _Row(label, run.started_ns, run.ended_ns, _THICK, style, note, run.committed_ns)
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        end_ns = max(max(row.start_ns, row.end_ns) for row in self._rows)
        axis = Axis(self._begun_ns, end_ns, options.max_width - _LABEL - _NOTE - 2)
        grid = _grid(axis, f"  from     to  {axis.unit}")
        for row in self._rows:
            row.add_to(grid, axis)
        yield grid


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of a journey: a heading, a moment with its mark, or a bar with its pen."""

    label: str
    start_ns: int = 0
    end_ns: int = 0
    pen: str = ""
    style: str = ""
    note: str = ""
    committed_ns: int = 0
    mark: tuple[str, str] | None = None

    def add_to(self, grid: Table, axis: Axis) -> None:
        if self.mark is not None:
            _add_moment(grid, axis, f"  {self.label}", self.start_ns, self.mark)
        elif not self.pen:
            grid.add_row(Text(self.label, style="bold"))
        elif not self.end_ns:
            grid.add_row(Text(f"  {self.label}", style="dim"), "", Text("no end", style="yellow"))
        else:
            track = _Track(axis)
            track.bar(self.start_ns, self.end_ns, self.pen, self.style)
            track.mark(self.committed_ns, _COMMITTED)
            note = _from_to(axis, self.start_ns, self.end_ns, self.note)
            bad = self.style == "red"
            grid.add_row(f"  {self.label}", track.text(), Text(note, style="red" if bad else ""))


class Overview:
    """Many requests, one line each."""

    def __init__(self, shots: Iterable[Shot]) -> None:
        self._shots = sorted(shots, key=lambda shot: shot.received_ns)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        axis = Axis(
            min(shot.begun_ns for shot in self._shots),
            max(shot.ended_ns for shot in self._shots),
            options.max_width - _LABEL - _NOTE - 2,
        )
        grid = _grid(axis, f"answer   mail  {axis.unit}")
        for shot in self._shots:
            mailed_ns = max((mail.received_ns for mail in shot.mails), default=0)
            note = _from_to(axis, shot.received_ns, mailed_ns, str(shot.status))
            grid.add_row(f"{shot.line} {shot.name}", _whole_track(axis, shot), note)
        yield grid


def _grid(axis: Axis, heading: str) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=_LABEL, no_wrap=True)
    grid.add_column(width=axis.width, no_wrap=True)
    grid.add_column(width=_NOTE, no_wrap=True)
    grid.add_row("", _ticks(axis), Text(heading, style="dim"))
    return grid


def _ticks(axis: Axis) -> Text:
    """The axis's units, at round numbers."""
    line = ""
    for since in axis.rounds(at_most=axis.width // _CELLS_PER_TICK):
        cell = round(axis.position(since))
        if cell + len(str(since)) <= axis.width:
            line = f"{line:{cell}}{since}"
    return Text(line, style="dim", no_wrap=True)


def _add_answer(grid: Table, axis: Axis, shot: Shot) -> None:
    track = _Track(axis)
    track.bar(shot.begun_ns, shot.received_ns, _THIN, "cyan")
    note = _from_to(axis, shot.begun_ns, shot.received_ns, str(shot.status))
    grid.add_row(Text(shot.line, style="bold"), track.text(), note)
    _add_moment(grid, axis, "response sent", shot.story.sent_ns, _SENT)
    if shot.story.committed_ns:
        _add_moment(grid, axis, "committed", shot.story.committed_ns, _COMMITTED)
    else:
        grid.add_row("rolled back")


def _add_moment(grid: Table, axis: Axis, label: str, at_ns: int, mark: tuple[str, str]) -> None:
    track = _Track(axis)
    track.mark(at_ns, mark)
    grid.add_row(label, track.text(), f"{axis.label(at_ns):>6}")


def _add_run(grid: Table, axis: Axis, run: Run, *, again: bool) -> None:
    label = f"    attempt {run.attempt}" if again else f"  {run.handler}"
    if not run.ended_ns:
        grid.add_row(Text(label, style="dim"), "", Text(run.outcome or "no end", style="yellow"))
        return
    track = _Track(axis)
    style = "green" if run.outcome == "ok" else "red"
    track.bar(run.started_ns, run.ended_ns, _THICK, style)
    if run.committed_ns:
        track.mark(run.committed_ns, _COMMITTED)
    trouble = run.error or ("killed" if run.outcome == "killed" else "")
    note = _from_to(axis, run.started_ns, run.ended_ns, trouble)
    grid.add_row(label, track.text(), Text(note, style="red" if trouble else ""))


def _whole_track(axis: Axis, shot: Shot) -> Text:
    track = _Track(axis)
    track.bar(shot.begun_ns, shot.received_ns, _THIN, "cyan")
    runs = [run for run in shot.story.runs if run.ended_ns]
    if runs:
        start, end = min(run.started_ns for run in runs), max(run.ended_ns for run in runs)
        track.bar(start, end, _THICK, "green")
    track.mark(shot.story.sent_ns, _SENT)
    track.mark(shot.story.committed_ns, _COMMITTED)
    for mail in shot.mails:
        track.mark(mail.received_ns, _MAIL)
    return track.text()


def _from_to(axis: Axis, start_ns: int, end_ns: int, more: str = "") -> str:
    return f"{axis.label(start_ns):>6}{axis.label(end_ns):>7}  {more}".rstrip()
