"""Owns how a request looks as a picture: the lines of `timeline.py`, on the same axis, as SVG.

The picture has its own background, for light and for dark, and says in words what it shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby

from examples.demo.axis import Axis
from examples.demo.cases import Shot

_LEFT, _WIDTH, _NOTE, _MARGIN = 230, 401, 120, 16  # pixels
_TOP, _LINE = 76, 27
_BAR, _MARK = 10, 6  # the height of a bar, and half of that of a mark
_PIXELS_PER_TICK = 60

_STYLE = """\
.paper { fill: #ffffff; stroke: #d0d7de }
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title, .event { font-weight: 600 } .title { font-size: 15px } .faint { fill: #59636e }
.grid { stroke: #d0d7de } .sent-line { stroke: #0969da; stroke-dasharray: 3 3 }
.waits { fill: #8c959f } .ok { fill: #1a7f37 } .failed { fill: #cf222e }
.sent { fill: #0969da } .committed { fill: #9a6700 } .mail { fill: #8250df }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117; stroke: #3d444d } text { fill: #e6edf3 } .faint { fill: #9198a1 }
  .grid { stroke: #3d444d } .sent-line { stroke: #4493f8 }
  .waits { fill: #6e7681 } .ok { fill: #3fb950 } .failed { fill: #f85149 }
  .sent { fill: #4493f8 } .committed { fill: #d29922 } .mail { fill: #ab7df8 }
}"""


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the picture: a heading, a moment with its mark, or a bar with its end.

    Attributes:
        kind: The class of what is drawn; empty where nothing is.
        end_ns: Where a bar ends; 0 where there is a mark, or nothing.
        note: What is said instead of the times.
    """

    label: str
    kind: str = ""
    start_ns: int = 0
    end_ns: int = 0
    note: str = ""

    def times(self, axis: Axis) -> str:
        """When it was, in words."""
        if self.note or not self.start_ns:
            return self.note
        ends = [self.start_ns, self.end_ns] if self.end_ns else [self.start_ns]
        return " to ".join(axis.label(end) for end in ends)


def picture(shot: Shot) -> str:
    """Draw what followed from one request, line by line, as an SVG file."""
    axis = Axis(shot.begun_ns, shot.ended_ns, _WIDTH)
    lines = [*_lines(shot)]
    width, bottom = _LEFT + _WIDTH + _NOTE, _TOP + len(lines) * _LINE
    height = bottom + _MARGIN
    drawn = [
        f'<rect class="paper" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="6"/>',
        _text(_MARGIN, 28, _title(shot), "title"),
        *_scale(axis, bottom),
        *_when_sent(axis, shot, bottom),
    ]
    for number, line in enumerate(lines):
        drawn += _drawn(axis, line, _TOP + number * _LINE + _LINE // 2)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(_title(shot))}</title>',
            f'<desc id="desc">{escape(_in_words(axis, lines))}</desc>',
            f"<style>\n{_STYLE}\n</style>",
            *drawn,
            "</svg>\n",
        ]
    )


def _title(shot: Shot) -> str:
    return f"{shot.line}, from the request to the last handler"


def _lines(shot: Shot) -> Iterator[_Line]:
    story = shot.story
    yield _Line("the client waits", "waits", shot.begun_ns, shot.received_ns)
    yield _Line("response sent", "sent", story.sent_ns)
    if story.committed_ns:
        yield _Line("transaction committed", "committed", story.committed_ns)
    else:
        yield _Line("transaction rolled back")
    for event, runs in groupby(story.runs, key=lambda run: run.event):
        yield _Line(f"handlers of {event}")
        for run in runs:
            if run.ended_ns:
                kind = "ok" if run.outcome == "ok" else "failed"
                yield _Line(f"\u2003{run.handler}", kind, run.started_ns, run.ended_ns)
            else:
                yield _Line(f"\u2003{run.handler}", note=run.outcome or "no end")
    for mail in shot.mails:
        yield _Line("mail received", "mail", mail.received_ns)


def _drawn(axis: Axis, line: _Line, middle: int) -> Iterator[str]:
    heading = not (line.kind or line.note)
    yield _text(_MARGIN, middle + 4, line.label, "event" if heading else "")
    if line.end_ns:
        start, end = axis.at(line.start_ns), axis.at(line.end_ns)
        box = f'x="{_LEFT + start:.1f}" y="{middle - _BAR // 2}" height="{_BAR}"'
        yield f'<rect class="{line.kind}" {box} width="{max(end - start, 1):.1f}" rx="2"/>'
    elif line.kind:
        corners = f"l{_MARK} {_MARK}-{_MARK} {_MARK}-{_MARK}-{_MARK}z"
        top = f"M{_LEFT + axis.at(line.start_ns):.1f} {middle - _MARK}"
        yield f'<path class="{line.kind}" d="{top}{corners}"/>'
    if times := line.times(axis):
        yield _text(_LEFT + _WIDTH + _MARGIN, middle + 4, times, "faint")


def _scale(axis: Axis, bottom: int) -> Iterator[str]:
    for since in axis.rounds(at_most=_WIDTH // _PIXELS_PER_TICK):
        x = _LEFT + axis.position(since)
        yield f'<path class="grid" d="M{x:.1f} {_TOP - 6}V{bottom}"/>'
        yield _text(x, _TOP - 14, f"{since}", "faint", "middle")
    yield _text(_LEFT + _WIDTH + _MARGIN, _TOP - 14, axis.unit, "faint")


def _when_sent(axis: Axis, shot: Shot, bottom: int) -> Iterator[str]:
    if shot.story.sent_ns:
        x = _LEFT + axis.at(shot.story.sent_ns)
        yield f'<path class="sent-line" d="M{x:.1f} {_TOP - 6}V{bottom}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text{kind} x="{x:.4g}" y="{y}"{anchor}>{escape(text)}</text>'


def _in_words(axis: Axis, lines: list[_Line]) -> str:
    """Say what the picture shows, for those who do not see it."""
    told = "; ".join(f"{line.label.strip()} {line.times(axis)}".rstrip() for line in lines)
    unit = {"ms": "Milliseconds", "s": "Seconds"}[axis.unit]
    return f"{unit} since the request began: {told}."
