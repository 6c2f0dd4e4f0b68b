"""Handlers with dependencies, beside FastAPI's solver alone, and without, beside none at all."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from textwrap import dedent
from typing import Annotated, Any, cast
from unittest.mock import patch

from fastapi import Depends, Request

from benchmarks.dispatch import DRAIN, dispatched, drained
from benchmarks.harness import (
    FINE_SLACK,
    LOOPS,
    SLACK,
    Case,
    Comparison,
    Contender,
    Effort,
    Results,
    Run,
    Verdict,
    clock,
    compare,
    missing_for,
    on_loop,
    ready,
)
from benchmarks.peers import Handler as Handled
from benchmarks.peers import Ordered
from benchmarks.report import grid
from eventkit._core import dispatch
from eventkit.fastapi import _private_functions, _shell

PACKAGES = ("anyio", "trio", "fastapi", "starlette")

BEFORE = "eventkit, drain, unable to have any"
SOLVER = "FastAPI's solver and the call"

NONE = "no dependency"
YIELD = "one async dependency with yield"

UNIT = 200


async def open_session() -> AsyncGenerator[object]:
    yield object()


async def taking_a_session(
    event: Ordered, session: Annotated[object, Depends(open_session)]
) -> None: ...


async def taking_nothing(event: Ordered) -> None: ...


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure both kinds of handler on each event loop."""
    unit = 2 if effort.scale == "smallest" else UNIT
    with_a_session = cast("Handled", taking_a_session)  # the bus gives it the rest
    for loop in LOOPS:
        if reason := missing_for(loop):
            print(f"{loop} is left out: {reason}", flush=True)
            continue
        for kind, contenders in (
            (NONE, [unable_to_have_any(unit), drained([taking_nothing], unit)]),
            (
                YIELD,
                [
                    ready(SOLVER, solved),
                    drained([with_a_session], unit),
                    dispatched([with_a_session]),
                ],
            ),
        ):
            case: Case = {"loop": loop, "handler": kind}
            yield on_loop(loop, partial(compare, case, contenders, effort))


def _without_asking() -> Callable[..., object]:
    """Make the dispatcher's loop over handlers, but without the question for dependencies."""
    source = dedent(inspect.getsource(dispatch._Worker._begin_handlers))
    changed = source.replace("if handler.solver is not None:", "if False:")
    assert changed != source
    namespace = dict(vars(dispatch))
    exec(changed, namespace)
    loop: Callable[..., object] = namespace["_begin_handlers"]
    return loop


def unable_to_have_any(unit: int) -> Contender:
    """The same drain, as it was before there were dependencies."""
    loop = _without_asking()

    @asynccontextmanager
    async def bus_of() -> AsyncGenerator[Run]:
        async with drained([taking_nothing], unit).open() as run:

            async def run_without(times: int) -> float:
                with patch.object(dispatch._Worker, "_begin_handlers", loop):
                    return await run(times)

            yield run_without

    return Contender(BEFORE, bus_of, batch=unit)


async def solved(times: int) -> float:
    """Have FastAPI make the dependency, call the handler, and have it cleaned up."""
    private = _private_functions()
    _, parameter = inspect.signature(taking_a_session, eval_str=True).parameters.values()
    dependant = private.get_dependant(path="/", call=_shell([parameter]))
    event = Ordered()
    begun = clock()
    for _ in range(times):
        async with AsyncExitStack() as request_stack, AsyncExitStack() as function_stack:
            scope: dict[str, Any] = {
                "type": "http",
                "query_string": b"",
                "headers": [],
                "fastapi_inner_astack": request_stack,
                "fastapi_function_astack": function_stack,
            }
            values, _ = await private.solve(Request(scope), dependant, None, request_stack)
            call: Callable[..., Awaitable[None]] = taking_a_session
            await call(event, **values)
    return clock() - begun


def verdicts(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
    """The goals, where both sides were measured."""
    limits: Mapping[object, tuple[str, float]] = {NONE: (BEFORE, 1.05), YIELD: (SOLVER, 1.3)}
    for found in comparisons:
        floor, limit = limits[found.case["handler"]]
        if found.case["loop"] != "uvloop" and {floor, DRAIN} <= found.rounds.keys():
            goal = f"{found.case['loop']}, {found.case['handler']}: {DRAIN} / {floor}"
            slack = FINE_SLACK if floor == BEFORE else SLACK
            yield Verdict(goal, found.ratio(DRAIN).median, limit, slack=slack)


def tables(results: Results) -> str:
    """Per kind of handler, ratios by event loop."""
    return "\n\n".join(
        f"**A handler with {kind}**, times the first, by event loop\n\n"
        f"{grid(results, {'handler': kind}, 'loop')}"
        for kind in (NONE, YIELD)
    )


def plots(results: Results) -> dict[str, str]:
    """Two numbers need no drawing."""
    return {}
