"""Runs contenders side by side and says what each took: the clock, the rounds, the medians.

All contenders of a case run in one process and one event loop, set up before the clock starts. In
each round every one of them is measured once, in an order drawn anew, so that whatever disturbs
the machine disturbs all alike. What counts are ratios taken within a round.

The clock is the CPU time of this process. Time that a handler waits costs the machine nothing, and
other programs on the machine do not add to it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

import anyio

# Nanoseconds.
clock: Callable[[], int] = time.process_time_ns

# Performs so many operations, and returns the nanoseconds that they took.
Run = Callable[[int], Awaitable[float]]
Case = dict[str, str | int]

LOOPS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: How often each contender is measured.
        seconds: How much CPU time one measurement of it takes, at least.
        scale: Which cases to measure.
    """

    rounds: int
    seconds: float
    scale: Literal["smallest", "quick", "full"]

    def fewer(self, rounds: int) -> Effort:
        """The same with at most so many rounds."""
        return replace(self, rounds=min(rounds, self.rounds))


FULL = Effort(rounds=15, seconds=0.02, scale="full")
QUICK = Effort(rounds=5, seconds=0.005, scale="quick")
# Nothing is learnt from it but that everything runs.
SMALLEST = Effort(rounds=1, seconds=1e-6, scale="smallest")


@dataclass(frozen=True, slots=True)
class Contender:
    """Who takes part in a comparison.

    Attributes:
        name: As it stands in tables.
        open: Sets it up, outside the clock, and takes it down.
        batch: How many operations it always performs at once; None where any number will do.
    """

    name: str
    open: Callable[[], AbstractAsyncContextManager[Run]]
    batch: int | None = None


def ready(name: str, run: Run, batch: int | None = None) -> Contender:
    """A contender with nothing to set up."""
    return Contender(name, lambda: nullcontext(run), batch)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one value; to four digits, which is more than any machine repeats."""
        low, high = values[0], values[0]
        if len(values) > 1:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(*(float(f"{value:.4g}") for value in (statistics.median(values), low, high)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case, measured.

    Attributes:
        case: What was measured, as words and numbers.
        rounds: Per contender what one operation took in each round, in `unit`; the first one is
            what the others are compared with.
        absent: Who took no part, and why.
        unit: Of the values.
    """

    case: Case
    rounds: dict[str, list[float]]
    absent: dict[str, str] = field(default_factory=dict[str, str])
    unit: str = "ns"

    @property
    def floor(self) -> str:
        """Who comes first."""
        return next(iter(self.rounds))

    def ratio(self, contender: str, to: str | None = None) -> Spread:
        """How many times as long one took as another in the same round; the floor if left out."""
        if contender == (to or self.floor):
            return Spread(1.0, 1.0, 1.0)
        pairs = zip(self.rounds[contender], self.rounds[to or self.floor], strict=True)
        return Spread.of([value / base for value, base in pairs])

    def figures(self) -> list[Figure]:
        """What is kept of it."""
        taken = [
            Figure(self.case, name, self.unit, Spread.of(values), self.ratio(name))
            for name, values in self.rounds.items()
        ]
        return taken + [
            Figure(self.case, name, self.unit, absent=why) for name, why in self.absent.items()
        ]


@dataclass(frozen=True, slots=True)
class Figure:
    """What one contender did in one case.

    Attributes:
        case: As in `Comparison`.
        contender: Who.
        unit: Of `value`.
        value: Per operation.
        ratio: To the floor of the case.
        absent: Why there is nothing.
    """

    case: Case
    contender: str
    unit: str
    value: Spread | None = None
    ratio: Spread | None = None
    absent: str = ""


# What is measured on shared machines differs by so much from one run to the next; ratios of two
# things that are nearly the same, by less.
SLACK, FINE_SLACK = 1.05, 1.02


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal, and what was measured.

    Attributes:
        goal: What is held, in words.
        measured: The figure that is not to exceed the limit.
        limit: The goal.
        stretch: A harder one that was set beside it.
        slack: What noise may add to the limit, as a factor.
    """

    goal: str
    measured: float
    limit: float
    stretch: float | None = None
    slack: float = SLACK

    @property
    def holds(self) -> bool:
        """Whether it is reached, with the slack that noise needs."""
        return self.measured <= self.limit * self.slack

    @property
    def word(self) -> str:
        """What to say of it."""
        if self.measured <= self.limit:
            return "holds"
        return "within noise" if self.holds else "missed"

    def __str__(self) -> str:
        stretch = ""
        if self.stretch is not None:
            reached = "reached" if self.measured <= self.stretch else "not reached"
            stretch = f" (stretch {self.stretch:g}: {reached})"
        return f"{self.word:<13}{self.measured:>10.4g} <= {self.limit:<6.3g} {self.goal}{stretch}"


@dataclass(frozen=True, slots=True)
class Results:
    """What one topic found, as it is written to a file."""

    about: dict[str, str]
    verdicts: list[Verdict]
    figures: list[Figure]

    def text(self) -> str:
        """As JSON, with a line for each verdict and each figure, so that changes can be read."""

        def lines(values: Sequence[Verdict] | Sequence[Figure]) -> str:
            kept = (json.dumps(_without_empty(asdict(value))) for value in values)
            return "[\n  " + ",\n  ".join(kept) + "\n ]"

        about = json.dumps(self.about, indent=2).replace("\n}", "\n }")
        return (
            f'{{\n "about": {about},\n "verdicts": {lines(self.verdicts)},\n'
            f' "figures": {lines(self.figures)}\n}}\n'
        )

    @classmethod
    def read(cls, text: str) -> Self:
        """From what `text` gave."""
        data = json.loads(text)
        spreads = ("value", "ratio")
        figures = [
            Figure(**(kept | {key: Spread(*kept[key]) for key in spreads if key in kept}))
            for kept in data["figures"]
        ]
        return cls(data["about"], [Verdict(**kept) for kept in data["verdicts"]], figures)


def _without_empty(kept: dict[str, Any]) -> dict[str, Any]:
    """Leave out what says nothing, and the names in spreads: there are thousands of them."""
    return {
        key: list(value.values()) if key in ("value", "ratio") else value
        for key, value in kept.items()
        if value not in (None, "")
    }


async def compare(
    case: Case,
    contenders: Sequence[Contender],
    effort: Effort,
    absent: Mapping[str, str] | None = None,
) -> Comparison:
    """Measure all contenders in turns.

    One that fails while it is set up or tried out is left out, and the reason kept.
    """
    draw = random.Random(0)
    missing = dict(absent or {})
    async with AsyncExitStack() as stack:
        runs: dict[str, Run] = {}
        counts: dict[str, int] = {}
        for contender in contenders:
            name = contender.name
            try:
                run = await stack.enter_async_context(contender.open())
                counts[name] = contender.batch or await enough(run, effort.seconds)
            except Exception as error:
                missing[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            else:
                runs[name] = run
        rounds: dict[str, list[float]] = {name: [] for name in runs}
        gc.collect()  # what set-up left behind is nobody's cost; afterwards it runs as it does
        for _ in range(effort.rounds):
            for name in draw.sample(list(runs), len(runs)):
                took = times = 0.0
                while took < effort.seconds * 1e9:
                    took += await runs[name](counts[name])
                    times += counts[name]
                rounds[name].append(took / times)
    return Comparison(case, rounds, missing)


async def enough(run: Run, seconds: float) -> int:
    """How many operations take so long, roughly; tried out, which also warms it up."""
    times = 1
    while (took := await run(times)) < seconds * 1e9 / 4:
        times *= 4 if took == 0 else min(4, max(2, int(seconds * 1e9 / 2 / took)))
    return times


def on_loop(loop: str, main: Callable[[], Coroutine[Any, Any, Comparison]]) -> Comparison:
    """Run it on the event loop of this name."""
    backend, options = LOOPS[loop]
    return anyio.run(main, backend=backend, backend_options=options)


def loops() -> list[str]:
    """The event loops to measure on: asyncio's, as servers run it, and trio's where installed."""
    return [asyncio_loop(), *(["trio"] if installed("trio") else [])]


def asyncio_loop() -> str:
    """The loop that uvicorn takes: uvloop where it is installed."""
    return "uvloop" if installed("uvloop") else "asyncio"


def installed(distribution: str) -> str:
    """The version of a distribution; empty where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def busy() -> str:
    """How many processes wanted to run in the last minute, this one included."""
    return f"{os.getloadavg()[0]:.1f}"


def about(*distributions: str) -> dict[str, str]:
    """What was measured on, and with what."""
    versions = {name: installed(name) for name in distributions}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{os.cpu_count()} x {processor()}",
        "system": platform.system(),
        "python": platform.python_version(),
        "garbage collector": "on" if gc.isenabled() else "off",
        **{name: number for name, number in versions.items() if number},
    }


def processor() -> str:
    """The name of the machine's processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.machine()
