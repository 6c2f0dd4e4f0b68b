"""What was measured, for readers: tables in Markdown, and bars in SVG that suit light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.harness import Case, Figure, Results, Spread, Verdict


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A table whose first columns are text, and all others numbers."""
    marks = [*["---"] * text, *["---:"] * (len(head) - text)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def number(value: float) -> str:
    """To three digits or so, as people write it."""
    size = abs(value)
    digits = 0 if size >= 100 or value == 0 else 1 if size >= 10 else 2 if size >= 0.1 else 3
    return f"{value:,.{digits}f}"


def spread(values: Spread, scale: float = 1) -> str:
    """The median, and the quartiles if they say more."""
    median, low, high = (number(v * scale) for v in (values.median, values.low, values.high))
    return median if low == high else f"{median} ({low} to {high})"


def ratio(figure: Figure) -> str:
    """How many times as long as the floor."""
    return "" if figure.ratio is None else spread(figure.ratio)


def nanoseconds(figure: Figure) -> str:
    """Per operation."""
    return "" if figure.value is None else spread(figure.value)


def microseconds(figure: Figure) -> str:
    """Per operation."""
    return "" if figure.value is None else spread(figure.value, 1e-3)


def milliseconds(figure: Figure) -> str:
    """Per operation."""
    return "" if figure.value is None else spread(figure.value, 1e-6)


def grid(
    results: Results,
    case: Case,
    across: str,
    cell: Callable[[Figure], str] = ratio,
) -> str:
    """A row per contender, a column per value that one property of the case took.

    Who took no part in any of it has no row, but stands under the table with the reason.
    """
    figures = [f for f in results.figures if case.items() <= f.case.items()]
    columns = list(dict.fromkeys(figure.case[across] for figure in figures))
    taken = dict.fromkeys(figure.contender for figure in figures if not figure.absent)
    head = ["", *(f"{column:,}" if isinstance(column, int) else column for column in columns)]
    rows = [[name, *(cell_at(figures, name, across, c, cell) for c in columns)] for name in taken]
    absent: dict[str, list[str]] = {}
    for figure in figures:
        if figure.absent and figure.contender not in {*taken, *absent.get(figure.absent, ())}:
            absent.setdefault(figure.absent, []).append(figure.contender)
    left_out = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in absent.items())
    return table(head, rows) + (f"\n\nNot here: {left_out}." if left_out else "")


def cell_at(
    figures: Sequence[Figure],
    contender: str,
    key: str,
    value: str | int,
    cell: Callable[[Figure], str],
) -> str:
    """What a contender did where a property has a value; empty where it did nothing."""
    found = (f for f in figures if f.contender == contender and f.case.get(key) == value)
    figure = next(found, None)
    return "" if figure is None else cell(figure)


def goals(verdicts: Sequence[Verdict]) -> str:
    """The goals as a table."""
    rows = [
        [
            verdict.goal,
            number(verdict.measured),
            number(verdict.limit) + (f" ({number(verdict.stretch)})" if verdict.stretch else ""),
            verdict.word,
        ]
        for verdict in verdicts
    ]
    return table(["goal", "measured", "at most (stretch)", ""], rows)


def machine(about: dict[str, str]) -> str:
    """What it was measured on, as a sentence."""
    return ", ".join(f"{name} {value}" for name, value in about.items()) + "."


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar.

    Attributes:
        label: What stands before it.
        values: How long it is, and the range that is drawn over it.
        text: What stands behind it.
    """

    label: str
    values: Spread
    text: str

    @property
    def ours(self) -> bool:
        """Whether it is drawn in the colour of the house."""
        return self.label.startswith("eventkit")


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars on one scale, under a title."""

    title: str
    bars: Sequence[Bar]
    logarithmic: bool = False

    def width(self, value: float) -> float:
        """How far right a value lies, from 0 to 1."""
        values = [bar.values for bar in self.bars]
        most = max(v.high for v in values)
        if not self.logarithmic:
            return value / most
        least = min(v.low for v in values) / 2
        return math.log(value / least) / math.log(most / least)


STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.bar { fill: #8c959f } .ours { fill: #0969da }
.range { stroke: #1f2328; stroke-width: 1.5; opacity: 0.55 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .range { stroke: #e6edf3 }
  .bar { fill: #6e7681 } .ours { fill: #4493f8 }
}"""
LABELS, BARS, TEXTS = 250, 400, 150
LINE, GAP = 22, 18


def drawing(panels: Sequence[Panel]) -> str:
    """All panels, one under the other."""
    shapes: list[str] = []
    y = 0
    for panel in panels:
        y += LINE
        note = " (logarithmic)" if panel.logarithmic else ""
        shapes.append(f'<text class="title" x="8" y="{y}">{escape(panel.title + note)}</text>')
        y += 8
        for bar in panel.bars:
            shapes += _bar(bar, panel, y)
            y += LINE
        y += GAP
    width = LABELS + BARS + TEXTS
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}">'
    return "\n".join([head, f"<style>\n{STYLE}\n</style>", *shapes, "</svg>"]) + "\n"


def _bar(bar: Bar, panel: Panel, y: int) -> list[str]:
    end, low, high = (
        LABELS + round(BARS * panel.width(v), 1)
        for v in (bar.values.median, bar.values.low, bar.values.high)
    )
    kind = "bar ours" if bar.ours else "bar"
    middle = y + LINE // 2
    shapes = [
        f'<text x="{LABELS - 8}" y="{y + 15}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect class="{kind}" x="{LABELS}" y="{y + 3}" width="{end - LABELS:.1f}" height="16"/>',
        f'<text x="{max(end, high) + 8:.1f}" y="{y + 15}">{escape(bar.text)}</text>',
    ]
    if high - low > 1:
        shapes.append(f'<path class="range" d="M{low} {middle}H{high}"/>')
    return shapes
