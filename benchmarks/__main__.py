"""Runs the benchmarks, all or those named: `python -m benchmarks dispatch --quick`.

With `--out docs/benchmarks` what was measured is kept in that folder: per topic a file of JSON, one
of tables, and plots. `nox -s bench` runs this with all contenders installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from benchmarks.harness import FULL, QUICK, Comparison, Effort, Results, Verdict, about, busy
from benchmarks.report import goals, machine

TOPICS = (
    "behind",
    "served",
    "dispatch",
    "publish",
    "memory",
    "lookup",
    "dependencies",
    "transactions",
    "outbox",
    "bridge",
    "testing",
)


class Topic(Protocol):
    """What a module has that measures something.

    Attributes:
        PACKAGES: Distributions whose versions matter.
    """

    PACKAGES: Sequence[str]

    def measure(self, effort: Effort) -> Iterator[Comparison]:
        """Measure one case after the other."""
        ...

    def verdicts(self, comparisons: Sequence[Comparison]) -> Iterable[Verdict]:
        """Hold what was measured against the goals."""
        ...

    def tables(self, results: Results) -> str:
        """The results in Markdown."""
        ...

    def plots(self, results: Results) -> dict[str, str]:
        """The results as SVG, by the name of the file."""
        ...


def topic(name: str) -> Topic:
    """The module of this name, loaded when it is run: what it needs may not be installed."""
    return cast(Topic, import_module(f"benchmarks.{name}"))


def run(name: str, effort: Effort) -> Results:
    """Measure one topic."""
    module = topic(name)
    begun, before = time.perf_counter(), busy()
    comparisons: list[Comparison] = []
    for comparison in module.measure(effort):
        comparisons.append(comparison)
        case = ", ".join(f"{key}: {value}" for key, value in comparison.case.items())
        print(f"{name} at {time.perf_counter() - begun:.0f} s, {case}")
        show(comparison)
    return Results(
        about(*module.PACKAGES) | {"load average": f"{before} before and {busy()} after"},
        list(module.verdicts(comparisons)),
        [figure for comparison in comparisons for figure in comparison.figures()],
    )


def show(comparison: Comparison) -> None:
    """Print one case, a line per contender."""
    for figure in comparison.figures():
        if figure.value is None or figure.ratio is None:
            print(f"    {figure.contender:<36} {figure.absent}")
            continue
        value, ratio = figure.value, figure.ratio
        print(
            f"    {figure.contender:<36} {value.median:>12,.4g} {figure.unit}"
            f" {ratio.median:>10.3f} x ({ratio.low:.3f} to {ratio.high:.3f})"
        )
    sys.stdout.flush()


def keep(name: str, results: Results, out: Path) -> None:
    """Write what was found to files: as data, as tables, and drawn."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(results.text())
    (out / f"{name}.md").write_text(page(name, results))
    for file, drawn in topic(name).plots(results).items():
        (out / file).write_text(drawn)


def page(name: str, results: Results) -> str:
    """The tables of a topic, and what was held against its goals."""
    parts = [
        f"# Measured: {name}",
        f"`nox -s bench -- {name}` measures this anew; [the page](../benchmarks.md) explains it.",
        machine(results.about),
        topic(name).tables(results),
        *([goals(results.verdicts)] if results.verdicts else []),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write, and judge; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("topics", nargs="*", metavar="topic", help=f"of {', '.join(TOPICS)}")
    parser.add_argument("--quick", action="store_true", help="a minute or two, and less exact")
    parser.add_argument("--out", type=Path, help="a folder for JSON, tables and plots")
    parser.add_argument(
        "--redraw", action="store_true", help="measure nothing, show what --out has"
    )
    parser.add_argument("--check", action="store_true", help="fail if a goal is missed")
    options = parser.parse_args(arguments)
    if unknown := set(options.topics) - set(TOPICS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose of {', '.join(TOPICS)}")
    out: Path | None = options.out
    if options.redraw and out is None:
        parser.error("--redraw needs --out, the folder where the measurements are")
    verdicts: list[Verdict] = []
    for name in options.topics or TOPICS:
        if options.redraw and out is not None:
            results = Results.read((out / f"{name}.json").read_text())
        else:
            results = run(name, QUICK if options.quick else FULL)
        verdicts += results.verdicts
        if out is not None:
            keep(name, results, out)
    for verdict in verdicts:
        print(verdict)
    missed = sum(not verdict.holds for verdict in verdicts)
    print(f"{len(verdicts) - missed} of {len(verdicts)} goals hold")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    # Several contenders log what others do not; a terminal is nobody's cost.
    logging.getLogger().addHandler(logging.NullHandler())
    sys.exit(main())
