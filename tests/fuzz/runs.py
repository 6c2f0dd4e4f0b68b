"""Has programs run, one on each event loop, and beside it with a task per handler."""

# Programs are JSON, whose values have no types.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import asyncio
import selectors
import sys
import traceback
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import anyio
from trio._core import _run as trio_runner
from trio.testing import MockClock

from eventkit._core import endings
from tests.dispatching import IMPLEMENTATIONS
from tests.fuzz.laws import judge, may_cut_dispatches
from tests.fuzz.play import FATAL, Play
from tests.fuzz.programs import Program


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a time to come, has it come; threads have a moment before."""

    def __init__(self, patience: float) -> None:
        super().__init__()
        self.now = 0.0
        self.patience = patience

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if not timeout:
            return super().select(timeout)
        ready = super().select(self.patience * (100 if timeout > 1000 else 1))
        if not ready:
            self.now += timeout
        return ready


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, patience: float) -> None:
        self.selector = _JumpingSelector(patience)
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def _backend(loop: str, threads: bool) -> tuple[str, dict[str, Any]]:
    patience = 0.003 if threads else 0.0
    if loop == "trio":
        return "trio", {"clock": MockClock(autojump_threshold=patience)}
    if loop == "uvloop":
        return "asyncio", {"use_uvloop": True}

    def make() -> asyncio.AbstractEventLoop:
        virtual = _VirtualLoop(patience)
        if sys.version_info >= (3, 12) and loop == "asyncio-eager":
            virtual.set_task_factory(asyncio.eager_task_factory)
        return virtual

    return "asyncio", {"loop_factory": make}


def play(program: Program, loop: str, *, implementation: str = "continuation-stealing") -> Play:
    """Have a program run, and be judged."""
    played = Play(deepcopy(program), loop)
    threads = bool({"thread", "in thread"} & played.ops)
    backend, options = _backend(loop, threads)
    trio_runner._r.seed(1)
    try:
        with (
            patch.object(endings, "run_all", IMPLEMENTATIONS[implementation]),
            patch.object(trio_runner, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", RuntimeWarning)
            anyio.run(played.main, backend=backend, backend_options=options)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not played.records:
            raise
        where = "".join(traceback.format_exception(error)[-4:])
        played.wrong(f"it raised {error!r} {where}")
    if hasattr(played, "stats"):
        judge(played)
    return played


def sweep(program: Program, loop: str) -> Iterator[Program]:
    """The same, each time with one cancellation, at every moment in turn."""
    quiet = program | {"triggers": [], "around": None, "close": None, "closes": None}
    counts = play(quiet, loop).counts
    actions = ["owner", "close"] if program["way"] == "background" else ["scope"]
    if loop != "trio":
        actions += ["worker", "native"]
    for when, most in (("step", 80), ("yield", 40)):
        for at in range(min(counts[when], most)):
            for action in actions:
                for soon in (True, False):
                    trigger = {"when": when, "at": at, "soon": soon, "action": action}
                    for which in range(3 if action == "worker" else 1):
                        yield quiet | {"triggers": [trigger | {"which": which, "seconds": 0.0}]}


PLAIN = {"implementation": "a-task-per-handler"}


def compare(program: Program, played: Play, loop: str) -> list[str]:
    """What differs from a task per handler, where nothing comes from outside."""
    timed = {"sleep", "wait", "deadline", "native"} & played.ops
    raised = {f"raise {what}" for what in (*FATAL, "cancelled", "mixed")}
    threads = {"thread", "in thread"} & played.ops
    if (
        program["triggers"]
        or program["closes"] is not None
        or program["around"]
        or program["close"] is not None
        or (program["way"] == "background" and program["beside"])
        or (raised | {"cancel self", "leave open"}) & played.ops
        or may_cut_dispatches(program, played.ops)  # it reaches other handlers there
        or (timed and (loop == "uvloop" or threads))
    ):
        return []
    if program["way"] == "background":
        plain = [
            (f"u{number}", play(program | {"way": "context", "units": [unit]}, loop, **PLAIN))
            for number, unit in enumerate(program["units"])
            if unit["success"]
        ]
    else:
        plain = [("u", play(program, loop, **PLAIN))]
        if played.results != plain[0][1].results:
            return [f"results {played.results}, with a task per handler {plain[0][1].results}"]
    wrong = [f"a task per handler: {what}" for _, each in plain for what in each.broken]
    ours = {record.key: (record.end, record.marks) for record in played.records[: played.judged]}
    theirs = {
        unit + record.key[1:] if record.key.startswith("u") else record.key: (
            record.end,
            record.marks,
        )
        for unit, each in plain
        for record in each.records[: each.judged]
    }
    failing = {f"u{at}" for at, unit in enumerate(program["units"]) if not unit["success"]}
    if program["way"] == "background":
        ours = {key: each for key, each in ours.items() if key.split(".")[0] not in failing}
    wrong += [
        f"{key}: {ours.get(key)}, with a task per handler {theirs.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    return wrong[:3]


def run(program: Program, loop: str) -> tuple[list[str], Play]:
    """Have a program run; what is wrong then, and how it went."""
    played = play(program, loop)
    return [*played.broken, *([] if played.broken else compare(program, played, loop))], played
