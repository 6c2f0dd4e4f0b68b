"""A handler with a dependency, beside FastAPI's solver alone."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from benchmarks.dispatch import DRAIN, dispatched, drained
from benchmarks.harness import (
    Comparison,
    Effort,
    Results,
    Verdict,
    clock,
    compare,
    loops,
    on_loop,
    ready,
)
from benchmarks.peers import Handler as Handled
from benchmarks.peers import Ordered
from benchmarks.report import grid
from eventkit._core.depends import _private_functions, _shell

PACKAGES = ("anyio", "trio", "fastapi", "starlette")

SOLVER = "FastAPI's solver and the call"

HANDLER = "one async dependency with yield"

UNIT = 200


async def open_session() -> AsyncGenerator[object]:
    yield object()


async def taking_a_session(
    event: Ordered, session: Annotated[object, Depends(open_session)]
) -> None: ...


def measure(effort: Effort) -> Iterator[Comparison]:
    """Measure on each event loop."""
    unit = 2 if effort.scale == "smallest" else UNIT
    handlers = [cast("Handled", taking_a_session)]  # the bus gives it the rest
    contenders = [ready(SOLVER, solved), drained(handlers, unit), dispatched(handlers)]
    for loop in loops():
        yield on_loop(loop, partial(compare, {"loop": loop}, contenders, effort))


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
    """The goal, on each event loop."""
    for found in comparisons:
        goal = f"{found.case['loop']}, {HANDLER}: {DRAIN} / {SOLVER}"
        yield Verdict(goal, found.ratio(DRAIN).median, 1.3)


def tables(results: Results) -> str:
    """Ratios by event loop."""
    return f"**A handler with {HANDLER}**, times the first\n\n{grid(results, {}, 'loop')}"


def plots(results: Results) -> dict[str, str]:
    """Two numbers need no drawing."""
    return {}
