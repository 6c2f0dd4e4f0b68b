"""What the tests of dispatch share: the implementations under test, events, and ways to deliver."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol, cast

import anyio
from anyio.lowlevel import checkpoint

from eventkit import Delivery, DispatchError, EventBus
from eventkit._dispatch import run_all

# Each has to pass every test in `tests/dispatch`.
IMPLEMENTATIONS = {"a-task-per-handler": run_all}


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Ping:
    number: int = 0


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Pong:
    number: int = 0


class Boom(Exception):
    """What a handler in these tests fails with."""


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


async def by_dispatch(bus: EventBus, event: object) -> list[Exception]:
    try:
        await bus.dispatch(event)
    except DispatchError as group:
        return list(group.exceptions)
    return []


async def by_drain(bus: EventBus, event: object) -> list[Exception]:
    async with bus.context() as unit:
        unit.publish(event)
        report = await unit.drain()
    return [failure.error for failure in report.failures]


async def cancel_by_scope(deliver: Deliver, bus: EventBus, event: object) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_all_wait, scope)
            await deliver(bus, event)
    assert scope.cancel_called


async def _cancel_when_all_wait(scope: anyio.CancelScope) -> None:
    await all_tasks_blocked()
    scope.cancel()


async def all_tasks_blocked() -> None:
    """As AnyIO's, which on asyncio overlooks what a finished task is about to wake up."""
    for _ in range(5):
        await checkpoint()
        await anyio.wait_all_tasks_blocked()


async def cancel_natively(deliver: Deliver, bus: EventBus, event: object) -> None:
    task = asyncio.create_task(deliver(bus, event))
    await all_tasks_blocked()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


def silent(delivery: Delivery, error: Exception) -> None:
    """Instead of the log, which pytest keeps with all tracebacks."""


def kept_reports(bus: EventBus) -> list[Exception]:
    """The failures that the bus will report from now on."""
    kept: list[Exception] = []

    def report(delivery: Delivery, error: Exception) -> None:
        kept.append(error)

    bus.report_failure = report
    return kept


def kinds_in(group: Exception) -> list[type[Exception]]:
    assert isinstance(group, ExceptionGroup)
    return [type(error) for error in cast("ExceptionGroup[Exception]", group).exceptions]


def assert_conserved(bus: EventBus) -> None:
    stats = bus.stats
    ended = stats.handled + stats.failed + stats.discarded + stats.undelivered
    assert stats.accepted == ended + stats.pending + stats.running


def outcomes(bus: EventBus) -> tuple[int, int, int]:
    """How many deliveries were handled, failed, and undelivered."""
    return bus.stats.handled, bus.stats.failed, bus.stats.undelivered
