"""Owns the course of the demo: puts everything up, plays case after case, takes it all down."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import IO

import anyio
import httpx
from anyio.abc import Process
from rich.console import Console

from examples.demo.cases import (
    CASES,
    Check,
    Shot,
    Stage,
    last_words,
    recovered,
    recovered_ns,
    until_its_mail_has_arrived,
    until_its_mail_is_on_its_way,
)
from examples.demo.neighbours import Neighbourhood, neighbourhood
from examples.demo.picture import picture
from examples.demo.process import ShopDidNotStart, kill, shop_process
from examples.demo.report import Report
from examples.demo.timeline import Overview, Timeline
from examples.demo.trace import Trace, clock_ns

FOR_EVER = 60.0  # seconds, which nobody waits for

Course = Callable[[Report, Neighbourhood, IO[str]], Awaitable[None]]


async def play(console: Console) -> bool:
    """Play all cases and show them; True if everything happened as told."""
    return await _shown(console, _play_all, _play_killed)


async def play_pictured(console: Console, path: Path) -> bool:
    """Play the first case alone, and write its timeline as a picture; True if all was as told."""
    return await _shown(console, partial(_play_pictured, path=path))


async def _shown(console: Console, *courses: Course) -> bool:
    report = Report(console)
    with neighbourhood() as around:
        try:
            with around.log.open("w") as log:
                for course in courses:
                    await course(report, around, log)
        except* (ShopDidNotStart, httpx.HTTPError) as errors:
            gone = Check("the shop is there and answers", holds=False, found=repr(errors))
            report.results.append(("The shop", [gone]))
        return report.summary(around.log)


async def _play_pictured(report: Report, around: Neighbourhood, log: IO[str], path: Path) -> None:
    trace = Trace()
    async with staged(around, trace, log) as (stage, process):
        report.opening(f"The shop runs at {_url(trace)} in process {process.pid}.")
        # The first request of a process pays for what is imported when it is used.
        await stage.sign_up("zoe")
        played = await CASES[0].play(stage)
    (shot,) = played.shots
    await anyio.Path(path).write_text(picture(shot), encoding="utf-8")
    written = f"{CASES[0].about} The picture is in {path}."
    report.section(CASES[0].title, written, Timeline(shot), played.checks)


async def _play_all(report: Report, around: Neighbourhood, log: IO[str]) -> None:
    """Play the cases, and end the shop as a server does that is asked to."""
    trace = Trace()
    shots: list[Shot] = []
    async with staged(around, trace, log) as (stage, process):
        report.opening(f"The shop runs at {_url(trace)} in process {process.pid}.")
        for number, case in enumerate(CASES, start=1):
            played = await case.play(stage)
            shots += played.shots
            one = len(played.shots) == 1
            drawing = Timeline(played.shots[0], played.moments) if one else Overview(played.shots)
            title = f"{number}  {case.title}"
            report.section(title, case.about, drawing, played.checks, played.said)
        shots.append(await stage.start_sign_up("zoe"))
        sigterm_ns = clock_ns()
    report.section(
        f"{len(CASES) + 1}  Told to end",
        "SIGTERM comes while a mail may still be on its way: it is waited for.",
        Timeline(shots[-1], {"SIGTERM": sigterm_ns, "the shop has ended": clock_ns()}),
        [
            *last_words(shots[-1]),
            Check("the shop ended on SIGTERM", process.returncode in (0, -signal.SIGTERM)),
            _nothing_lost(trace.stats, shots),
            _all_audited(around.database, shots),
            _nothing_kept(around.database),
        ],
    )


async def _play_killed(report: Report, around: Neighbourhood, log: IO[str]) -> None:
    """End the shop as a machine does that loses its power, and start it again."""
    trace = Trace()
    around.mails.delay, usual_delay = FOR_EVER, around.mails.delay
    async with staged(around, trace, log) as (stage, process):
        shot = await stage.start_sign_up("nora")
        on_its_way = await until_its_mail_is_on_its_way(stage, shot)
        killed_ns = clock_ns()
        await kill(process)
    shot.story.cut_off(killed_ns)
    kept, lapses_ns = _kept(around.database), _lapses_ns(around.database)
    around.mails.delay = usual_delay
    async with staged(around, trace, log) as (stage, again):
        started_ns = clock_ns()
        await until_its_mail_has_arrived(stage, shot)
    moments = {
        "SIGKILL": killed_ns,
        "the lease runs out": lapses_ns,
        "the shop is up again": started_ns,
        "recovery": recovered_ns(shot),
    }
    report.section(
        f"{len(CASES) + 2}  Killed, and started again",
        "SIGKILL comes while a mail is on its way. The database still has it, leased for 1.5 s.",
        Timeline(shot, moments),
        [
            Check("SIGKILL ended the shop", process.returncode == -signal.SIGKILL),
            Check("of all that was to do the mail alone was kept", on_its_way and kept == 1),
            *recovered(shot),
            Check("the new process ended on SIGTERM", again.returncode in (0, -signal.SIGTERM)),
            _nothing_kept(around.database),
        ],
    )


@asynccontextmanager
async def staged(
    around: Neighbourhood, trace: Trace, log: IO[str]
) -> AsyncGenerator[tuple[Stage, Process]]:
    """Run the shop during the block, with everything that cases need."""
    async with (
        shop_process(around.settings, trace, log) as process,
        httpx.AsyncClient(base_url=_url(trace)) as client,
    ):
        yield Stage(client, trace, around), process


def _url(trace: Trace) -> str:
    return f"http://127.0.0.1:{trace.port}"


def _nothing_lost(stats: dict[str, int], shots: Sequence[Shot]) -> Check:
    """Compare what the bus has counted with what was seen."""
    seen = sum(len(shot.story.runs) for shot in shots)
    ended = {name: stats.get(name, 0) for name in ("handled", "failed", "discarded")}
    counts = ", ".join(f"{count} {name}" for name, count in ended.items())
    return Check(
        f"none of {seen} attempts was lost: {counts}",
        holds=seen == stats.get("accepted") == sum(ended.values()),
        found=f"the bus has counted {stats}",
    )


def _all_audited(database: Path, shots: Sequence[Shot]) -> Check:
    """Look into the database for what every delivered event must have left there."""
    runs = [run for shot in shots for run in shot.story.of("audit.write_row")]
    audited = [run for run in runs if run.outcome == "ok"]
    rows = _scalar(database, "SELECT count(*) FROM audit")
    return Check(
        f"the audit log holds {len(audited)} rows, one for each event that was delivered",
        holds=rows == len(audited),
        found=f"{rows} rows",
    )


def _nothing_kept(database: Path) -> Check:
    kept = _kept(database)
    return Check("nothing is left in the outbox", kept == 0, f"{kept} deliveries")


def _kept(database: Path) -> int:
    """How many deliveries wait in the outbox, or are being run."""
    return int(_scalar(database, "SELECT count(*) FROM eventkit_outbox"))


def _lapses_ns(database: Path) -> int:
    """When the lease of the process ends that was killed, by `clock_ns`."""
    alive_until = _scalar(database, "SELECT max(alive_until) FROM eventkit_process")
    return clock_ns() + int((alive_until - time.time()) * 1e9)


def _scalar(database: Path, query: str) -> float:
    with closing(sqlite3.connect(database)) as connection:
        (value,) = connection.execute(query).fetchone()
    return float(value)
