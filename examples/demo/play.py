"""Owns the course of the demo: puts everything up, plays case after case, takes it all down."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import httpx
from rich.console import Console

from examples.demo.cases import CASES, Check, Shot, Stage, last_words
from examples.demo.neighbours import Neighbourhood, neighbourhood
from examples.demo.process import ShopDidNotStart, shop_process
from examples.demo.report import Report
from examples.demo.timeline import Overview, Timeline
from examples.demo.trace import Trace, clock_ns


async def play(console: Console) -> bool:
    """Play all cases and show them; True if everything happened as told."""
    report = Report(console)
    with neighbourhood() as around:
        try:
            await _play_all(report, around)
        except* (ShopDidNotStart, httpx.HTTPError) as errors:
            gone = Check("the shop is there and answers", holds=False, found=repr(errors))
            report.results.append(("The shop", [gone]))
        return report.summary(around.log)


async def _play_all(report: Report, around: Neighbourhood) -> None:
    trace = Trace()
    shots: list[Shot] = []
    with around.log.open("w") as log:
        async with shop_process(around.settings, trace, log) as process:
            url = f"http://127.0.0.1:{trace.port}"
            report.opening(f"The shop runs at {url} in process {process.pid}.")
            async with httpx.AsyncClient(base_url=url) as client:
                stage = Stage(client, trace, around.mails, around.warehouse)
                for number, case in enumerate(CASES, start=1):
                    played = await case.play(stage)
                    shots += played.shots
                    one = len(played.shots) == 1
                    drawing = Timeline(played.shots[0]) if one else Overview(played.shots)
                    report.section(f"{number}  {case.title}", case.about, drawing, played.checks)
                shots.append(await stage.start_sign_up("zoe"))
            sigterm_ns = clock_ns()
    report.section(
        "The end",
        "The shop is told to end while a mail may still be on its way.",
        Timeline(shots[-1], {"SIGTERM": sigterm_ns, "the shop has ended": clock_ns()}),
        [
            *last_words(shots[-1]),
            Check("the shop ended on SIGTERM", process.returncode in (0, -signal.SIGTERM)),
            _nothing_lost(trace.stats, shots),
            _all_audited(around.database, shots),
        ],
    )


def _nothing_lost(stats: dict[str, int], shots: Sequence[Shot]) -> Check:
    """Compare what the bus has counted with what was seen."""
    seen = sum(len(shot.story.runs) for shot in shots)
    ended = {name: stats.get(name, 0) for name in ("handled", "failed", "discarded")}
    counts = ", ".join(f"{count} {name}" for name, count in ended.items())
    return Check(
        f"none of {seen} deliveries was lost: {counts}",
        holds=seen == stats.get("accepted") == sum(ended.values()),
        found=f"the bus has counted {stats}",
    )


def _all_audited(database: Path, shots: Sequence[Shot]) -> Check:
    """Look into the database for what every delivered event must have left there."""
    runs = [run for shot in shots for run in shot.story.runs]
    audited = [run for run in runs if run.handler == "audit.write_row" and run.outcome == "ok"]
    with closing(sqlite3.connect(database)) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM audit").fetchone()
    return Check(
        f"the audit log holds {len(audited)} rows, one for each event that was delivered",
        holds=rows == len(audited),
        found=f"{rows} rows",
    )
