"""What is paid once per event, or once per process: the lookup, the event itself, the import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio import run_process

from benchmarks.harness import (
    Comparison,
    Effort,
    Results,
    Run,
    Verdict,
    clock,
    compare,
    installed,
    on_loop,
    ready,
)
from benchmarks.peers import event_class, load
from benchmarks.report import grid, milliseconds, nanoseconds
from eventkit import DomainEvent, EventBus
from eventkit._core.bus import state_of

PACKAGES = ("anyio", "structlog", "pydantic", "bubus", "python-cqrs")

DEPTH = 50

DICT = "a function with a dictionary hit"
PLAN = "eventkit, the handlers of an event"

PLAIN = "a frozen slotted dataclass"
DOMAIN = "eventkit.DomainEvent"

ALONE = "what it imports, alone"
IMPORT = "import eventkit"
IN_A_PROCESS = "in a process of its own"


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure the three."""
    types = {"smallest": 100, "quick": 10_000, "full": 10_000}[effort.scale]
    yield on_loop("asyncio", partial(_lookup, types, effort))
    yield on_loop("asyncio", partial(_creation, effort))
    yield on_loop("asyncio", partial(_importing, effort))


async def _lookup(types: int, effort: Effort) -> Comparison:
    bus = EventBus()
    events = [kind() for kind in hierarchies(types)]

    async def handle(event: object) -> None:
        pass

    bus.subscribe(object, handle)
    plan_for = state_of(bus).plan_for
    table: dict[type, object] = {type(event): plan_for(event) for event in events}

    def look(event: object) -> object:
        return table[type(event)]

    contenders = [
        ready(DICT, looked_up(look, events), batch=types),
        ready(PLAN, looked_up(plan_for, events), batch=types),
    ]
    return await compare({"event types": types, "depth": DEPTH}, contenders, effort)


def hierarchies(types: int) -> list[type]:
    """So many classes, each at the end of a line of ancestors of its own or of its neighbours'."""
    found: list[type] = []
    while len(found) < types:
        kind: type = object
        for depth in range(DEPTH - 1):  # `object` is one, too
            kind = type(f"Event{len(found)}_{depth}", (kind,), {})
        found += [type(f"Leaf{len(found) + n}", (kind,), {}) for n in range(100)]
    return found[:types]


def looked_up(look: Callable[[object], object], events: Sequence[object]) -> Run:
    async def run(times: int) -> float:
        begun = clock()
        for event in events:
            look(event)
        return clock() - begun

    return run


@dataclass(frozen=True, slots=True)
class Plain:
    """An event without anything."""

    number: int


@dataclass(frozen=True, slots=True)
class Placed(DomainEvent):
    """The same, with an id and the time."""

    number: int


async def _creation(effort: Effort) -> Comparison:
    makers: dict[str, Callable[[int], object]] = {PLAIN: Plain, DOMAIN: Placed}
    absent: dict[str, str] = {}
    for name, module, base in (
        ("pydantic.BaseModel", "pydantic", "BaseModel"),
        ("bubus.BaseEvent", "bubus", "BaseEvent"),
        ("cqrs.DomainEvent", "cqrs", "DomainEvent"),
    ):
        if installed({"cqrs": "python-cqrs"}.get(module, module)):
            kind = event_class(getattr(load(module), base))
            makers[name] = partial(by_keyword, kind)
        else:
            absent[name] = "not installed"
    contenders = [ready(name, made(make)) for name, make in makers.items()]
    return await compare({"making": "an event"}, contenders, effort, absent)


def by_keyword(kind: Callable[..., object], number: int) -> object:
    """As these classes want it."""
    return kind(number=number)


def made(make: Callable[[int], object]) -> Run:
    async def run(times: int) -> float:
        begun = clock()
        for number in range(times):
            make(number)
        return clock() - begun

    return run


async def _importing(effort: Effort) -> Comparison:
    loaded = await output_of(LOADED)
    contenders = [
        ready(ALONE, imported(loaded.split()), batch=1),
        ready(IMPORT, imported(["eventkit"]), batch=1),
    ]
    return await compare({"importing": IN_A_PROCESS}, contenders, effort)


def imported(modules: Sequence[str]) -> Run:
    """Each time in a process of its own, which says how long it took."""

    async def run(times: int) -> float:
        return sum([float(await output_of(IMPORTING, *modules)) for _ in range(times)])

    return run


async def output_of(script: str, *arguments: str) -> str:
    """What a script prints in a process of its own."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", script, *arguments]
    return (await run_process(command, cwd=root)).stdout.decode()


# What of others `import eventkit` loads; what the standard library loads for itself is its own.
LOADED = """
import sys
import eventkit
known = {*sys.stdlib_module_names, "eventkit", "__main__"}
print(*(name for name in sys.modules if name.partition(".")[0] not in known))
"""
IMPORTING = """
import sys, time
from importlib import import_module
begun = time.process_time_ns()
for name in sys.argv[1:]:
    import_module(name)
print(time.process_time_ns() - begun)
"""


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """A lookup, and an import."""
    for found in comparisons:
        for contender, limit in ((PLAN, 1.5), (IMPORT, 1.3)):
            if contender in found.rounds:
                name = f"{contender} / {found.floor}"
                yield Verdict(name, found.ratio(contender).median, limit)


def tables(results: Results) -> str:
    """One for each."""
    types = next(f.case["event types"] for f in results.figures if "event types" in f.case)
    return "\n\n".join(
        [
            f"Nanoseconds per lookup, among {types:,} event types {DEPTH} classes deep",
            grid(results, {"depth": DEPTH}, "depth", nanoseconds),
            "Nanoseconds per event made",
            grid(results, {"making": "an event"}, "making", nanoseconds),
            "Milliseconds per import, in a process of its own",
            grid(results, {"importing": IN_A_PROCESS}, "importing", milliseconds),
        ]
    )


def plots(results: Results) -> dict[str, str]:
    """None: a few numbers."""
    return {}
