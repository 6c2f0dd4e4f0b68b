"""Owns what the demo says in words: one section per case, and at the end what came of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from examples.demo.cases import Check
from examples.demo.command import Said
from examples.demo.timeline import LEGEND

_LOG_LINES = 30


class Report:
    """Prints as the demo goes on, and remembers for the summary."""

    def __init__(self, console: Console) -> None:
        self.results: list[tuple[str, Sequence[Check]]] = []
        self._console = console

    def opening(self, text: str, legend: Text = LEGEND) -> None:
        """Say what has been put up, and how to read what follows."""
        self._console.print("", text, legend, sep="\n")

    def section(
        self,
        title: str,
        about: str,
        drawing: RenderableType | None,
        checks: Sequence[Check],
        said: Sequence[Said] = (),
    ) -> None:
        """Show one case: what it is about, what happened, what was said, what was checked."""
        self.results.append((title, checks))
        self._heading(title)
        self._console.print(about, *(() if drawing is None else ("", drawing)), "", sep="\n")
        for each in said:
            self._console.print(Text(f"$ {each.line}", "bold"))
            for line in each.output.splitlines():
                self._console.print(Text(line, "dim"), no_wrap=True, overflow="ellipsis")
            self._console.print()
        for check in checks:
            self._console.print(_line(check))

    def summary(self, log: Path) -> bool:
        """Say what came of all cases, and show the shop's log if something went wrong.

        Returns:
            Whether every check held.
        """
        self._heading("All together")
        for title, checks in self.results:
            broken = [check for check in checks if not check.holds]
            self._console.print(_sign(not broken) + title)
            for check in broken:
                self._console.print(Padding(_line(check), (0, 0, 0, 5)))
        held = [check.holds for _, checks in self.results for check in checks]
        if all(held):
            verdict = Text(f"Everything happened as told: {len(held)} checks.", "bold green")
        else:
            verdict = Text("Not everything happened as told.", "bold red")
            self._show_end_of(log)
        self._console.print("", verdict, sep="\n")
        return all(held)

    def _heading(self, title: str) -> None:
        self._console.print()
        self._console.rule(Text(title, "bold"), align="left", style="dim")

    def _show_end_of(self, log: Path) -> None:
        lines = log.read_text(encoding="utf-8").splitlines()[-_LOG_LINES:]
        if lines:
            self._console.print("", "The last lines of the log:", sep="\n")
            self._console.print(*lines, sep="\n", markup=False, soft_wrap=True)


def _line(check: Check) -> Text:
    if check.holds:
        return _sign(True) + check.text
    found = f" (but: {check.found})" if check.found else ""
    return _sign(False) + Text(f"not so: {check.text}{found}", "red")


def _sign(good: bool) -> Text:
    return Text("✓ ", "green") if good else Text("✗ ", "bold red")
