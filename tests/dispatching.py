"""What the tests of dispatch share beside the contract: the implementations, and ways to cancel."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Protocol

from eventkit import EventBus
from eventkit._core.awaited import run_all
from tests.contract.bus import (
    Boom,
    Ping,
    Pong,
    all_tasks_blocked,
    assert_settled,
    by_dispatch,
    by_drain,
    cancelled_by_scope,
    ignore,
    kept_reports,
    kinds_in,
    outcomes,
)

__all__ = [
    "IMPLEMENTATIONS",
    "Boom",
    "Cancel",
    "Deliver",
    "NewBus",
    "Ping",
    "Pong",
    "all_tasks_blocked",
    "assert_settled",
    "by_dispatch",
    "by_drain",
    "cancel_by_scope",
    "cancel_natively",
    "cancelled_natively",
    "ignore",
    "kept_reports",
    "kinds_in",
    "outcomes",
]
from tests import task_per_handler

# Each has to pass every test in `tests/core/dispatch`.
IMPLEMENTATIONS = {
    "continuation-stealing": run_all,
    "a-task-per-handler": task_per_handler.run_all,
}


class NewBus(Protocol):
    def __call__(
        self,
        *,
        sequential: bool = False,
        handler_timeout: float | None = None,
        max_depth: int = 16,
    ) -> EventBus: ...


Deliver = Callable[[EventBus, object], Coroutine[None, None, list[Exception]]]
Cancel = Callable[[Deliver, EventBus, object], Awaitable[None]]


async def cancelled_natively(work: Callable[[], Awaitable[object]]) -> None:
    """Begin the work, and cancel its task when all tasks wait."""
    task = asyncio.ensure_future(work())
    await all_tasks_blocked()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def cancel_by_scope(deliver: Deliver, bus: EventBus, event: object) -> None:
    await cancelled_by_scope(partial(deliver, bus, event))


async def cancel_natively(deliver: Deliver, bus: EventBus, event: object) -> None:
    await cancelled_natively(partial(deliver, bus, event))
