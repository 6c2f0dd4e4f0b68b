"""Runs programs for as long as it is told, and makes those smaller that go wrong."""

# Programs are JSON, whose values have no types.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from random import Random
from typing import Any

from tests.fuzz.programs import LOOPS, Maker, Program
from tests.fuzz.runs import run, sweep

SWEPT = 60  # so many moments of a cancellation are tried with one program in twenty


def _smaller(program: Program) -> Iterator[Program]:
    for key, simple in (
        ("observed", False),
        ("sequential", False),
        ("around", None),
        ("beside", False),
        ("closes", None),
        ("limit", None),
        ("close", None),
        ("concurrency", 1),
    ):
        if program[key] != simple:
            yield program | {key: simple}
    for path in list(_lists(program, ())):
        found: Any = program
        for step in path:
            found = found[step]
        for position in reversed(range(len(found))):
            if path == ("handlers",):
                if not found[position]:
                    continue
                copy = deepcopy(program)
                copy["handlers"][position] = []
                yield copy
                continue
            copy = deepcopy(program)
            inner: Any = copy
            for step in path:
                inner = inner[step]
            removed = inner.pop(position)
            if path == ("units",) and not inner:
                continue
            yield copy
            if isinstance(removed, list) and removed and isinstance(removed[-1], list):
                copy = deepcopy(copy)
                inner = copy
                for step in path:
                    inner = inner[step]
                inside = removed[-1] if removed[0] != "group" else removed[-1][0]
                inner[position:position] = inside
                yield copy


def _lists(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Where there are lists of things that may be left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _lists(inner, (*path, key))
    elif isinstance(value, list):
        if not value or not isinstance(value[0], str | int):
            yield path
        for position, inner in enumerate(value):
            yield from _lists(inner, (*path, position))


def minimise(program: Program, loop: str, wrong: str, seconds: float = 60) -> Program:
    """The smallest program found that goes wrong in the same way."""
    length = 70 if wrong.startswith("it raised") else 25
    stop = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < stop:
        progress = False
        for smaller in _smaller(program):
            faulthandler.dump_traceback_later(60, exit=True)
            if time.monotonic() > stop:
                break
            try:
                broken, _ = run(smaller, loop)
            except Exception:  # a smaller one may make no sense
                continue
            if any(what[:length] == wrong[:length] for what in broken):
                program, progress = smaller, True
                break
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--failures", type=int, default=3, help="stop after so many")
    parser.add_argument("--patience", type=float, default=20, help="seconds to make one smaller")
    parser.add_argument("--big", action="store_true", help="do not make failing programs smaller")
    arguments = parser.parse_args()
    stop = time.monotonic() + 60 * arguments.minutes
    programs = deliveries = failures = 0
    began = time.process_time()
    seed = arguments.seed
    print(f"{arguments.loop} from seed {seed}", flush=True)
    while time.monotonic() < stop and failures < arguments.failures:
        first = Maker(seed, arguments.loop).program()
        swept = list(sweep(first, arguments.loop)) if seed % 20 == 0 else []
        swept = Random(seed).sample(swept, min(SWEPT, len(swept)))
        for program in chain([first], swept):
            faulthandler.dump_traceback_later(60, exit=True)
            broken, played = run(program, arguments.loop)
            programs += 1
            deliveries += len(played.records)
            if broken:
                failures += 1
                print(f"seed {seed}: {broken[:4]}", flush=True)
                if not arguments.big:
                    small = minimise(program, arguments.loop, broken[0], arguments.patience)
                    again, _ = run(small, arguments.loop)
                    print(f"  {json.dumps(small)}\n  {again[:4]}", flush=True)
                break
        seed += 1
    used = time.process_time() - began
    print(
        f"{arguments.loop}: seeds {arguments.seed} to {seed - 1}, {programs} programs, "
        f"{deliveries} deliveries begun, {failures} failures, {used:.0f} s of CPU time",
        flush=True,
    )
    gc.collect()
    sys.exit(failures > 0)


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    main()
