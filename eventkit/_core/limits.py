"""Owns the time limit of a handler that has its own limit."""

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
    """Has the event. Passed instead of the event, because tracebacks can show local variables.

    Attributes:
        event: The event.
    """

    event: object

    @property
    def origin(self) -> object:
        """The application that the unit of work was opened in."""
        ...


async def run_in_time(handler: Handler, turn: Delivered, limit: float | None) -> None:
    """Run a handler for at most `limit` seconds; a call in a thread has no limit."""
    if limit is None:  # then no scope is needed
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
        del stopped  # otherwise this frame and its traceback keep each other alive


@contextmanager
def _untimed(scope: CancelScope, limit: float) -> Generator[None]:
    """Suspend the deadline of the scope in the block; after it, the whole limit begins again."""
    scope.deadline = math.inf
    try:
        yield
    finally:
        scope.deadline = current_time() + limit
