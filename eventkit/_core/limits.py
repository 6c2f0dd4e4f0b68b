"""Owns the time limit of one handler that is run by itself."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Protocol

from anyio import CancelScope, current_time

from eventkit._core.handlers import Handler
from eventkit._core.policy import timeout_of


class Delivered(Protocol):
    """What a handler is run for. Not the event itself: frames of tracebacks show local variables.

    Attributes:
        event: What is delivered.
    """

    event: object

    @property
    def origin(self) -> object:
        """Where the unit of work comes from."""
        ...


async def run_in_time(handler: Handler, turn: Delivered, limit: float | None) -> None:
    """Run it, for at most so many seconds; a call in a thread takes as long as it takes."""
    if limit is None:  # and no scope is made
        awaitable = await handler.start(turn.event, turn.origin, nullcontext)
        if awaitable is not None:
            await awaitable
        return
    scope = CancelScope()
    awaitable = await handler.start(turn.event, turn.origin, partial(_untimed, scope, limit))
    if awaitable is None:
        return
    stopped: BaseException | None = None
    try:
        scope.deadline = current_time() + limit
        with scope:
            try:
                await awaitable
            except BaseException as error:
                stopped = error
                raise
        if scope.cancelled_caught:
            raise timeout_of(handler, limit, stopped)
    finally:
        del stopped  # or this frame and its traceback keep each other alive


@contextmanager
def _untimed(scope: CancelScope, limit: float) -> Generator[None]:
    """Suspend the deadline of the scope in the block; the whole limit begins anew after it."""
    scope.deadline = math.inf
    try:
        yield
    finally:
        scope.deadline = current_time() + limit
