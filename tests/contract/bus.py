"""Owns the bus under test: how an implementation is plugged in, driven, watched and judged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Concatenate, Generic, ParamSpec, TypedDict, TypeVar, Unpack, cast

import anyio
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from eventkit._core.bus import EventBus
from eventkit._core.events import Delivery
from eventkit._core.observers import Observer
from eventkit.exceptions import DispatchError

E = TypeVar("E", bound=BaseException)
Suite = TypeVar("Suite")
V = TypeVar("V")
P = ParamSpec("P")
# Any: what a coroutine yields and is sent is the event loop's.
Running = Coroutine[Any, Any, None]


class BusOptions(TypedDict, total=False):
    """What a test may ask of the bus it is given; the meaning is that of `EventBus`."""

    name: str
    sequential: bool
    handler_timeout: float | None
    max_events: int
    max_depth: int


class BusContract:
    """What every part of the contract shares: override these hooks to plug an implementation in.

    Each test makes its buses with `make_bus`, has events handled with `deliver`, and cancels with
    `cancel`. When it has ended, every bus has to be at rest, with no delivery lost:
    `teardown_method`, which pytest and unittest call by themselves, sees to that.
    """

    def make_bus(self, **options: Unpack[BusOptions]) -> EventBus:
        """Make a bus that runs on the implementation under test."""
        return EventBus(**options)

    async def deliver(self, bus: EventBus, event: object) -> list[Exception]:
        """Have one event handled, and all that it causes; give the failures.

        By `bus.dispatch`; `by_drain` is the other way.
        """
        return await by_dispatch(bus, event)

    async def cancel(self, work: Callable[[], Awaitable[object]]) -> None:
        """Begin the work, and cancel it from outside when all tasks wait.

        By the cancel scope around it.
        """
        await cancelled_by_scope(work)

    def teardown_method(self) -> None:
        """Have every bus at rest, with each accepted delivery ended in one way."""
        buses, self._buses = self._buses, []  # pytest keeps each test's object to the end
        for bus in buses:
            assert_settled(bus)

    def tearDown(self) -> None:
        """As `teardown_method`, by the name that unittest calls."""
        self.teardown_method()

    def new_bus(self, **options: Unpack[BusOptions]) -> EventBus:
        """Make a bus of which nobody hears but the test, and which has to end at rest."""
        bus = self.make_bus(**options)
        bus.report_failure = ignore
        self._buses.append(bus)
        return bus

    def watched_bus(self) -> tuple[EventBus, list[str]]:
        """A bus whose handler of strings fails for bad ones, and what a witness of it has seen."""
        bus = self.new_bus()

        @bus.on(str)
        async def handle(event: str) -> None:
            await checkpoint()
            if "bad" in event:
                raise ValueError(event)

        return bus, witnessed(bus)

    @cached_property
    def _buses(self) -> list[EventBus]:
        return []


def for_each(
    *values: V,
) -> Callable[
    [Callable[Concatenate[Suite, V, P], Running]], Callable[Concatenate[Suite, P], Running]
]:
    """Run a test once for each value, which it takes as its first argument."""

    def decorate(
        test: Callable[Concatenate[Suite, V, P], Running],
    ) -> Callable[Concatenate[Suite, P], Running]:
        async def run(suite: Suite, /, *args: P.args, **kwargs: P.kwargs) -> None:
            for value in values:
                try:
                    await test(suite, value, *args, **kwargs)
                except Exception as error:
                    error.add_note(f"with {getattr(value, '__name__', repr(value))}")
                    raise

        # `functools.wraps` would show runners the arguments, and they would look for fixtures.
        run.__name__, run.__qualname__, run.__doc__ = test.__name__, test.__qualname__, test.__doc__
        return run

    return decorate


# Events, and what handles them


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Ping:
    number: int = 0


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Pong:
    number: int = 0


class Boom(Exception):
    """What a handler in these tests fails with."""


class Gate:
    """Holds a handler up until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self.opened = anyio.Event()

    async def __call__(self, event: object) -> None:
        self.reached.set()
        await self.opened.wait()


def nothing(event: object) -> None:
    """Handle any event by doing nothing."""


def calling(call: Callable[[], object]) -> Callable[[object], None]:
    """Make a handler that calls this, and awaits nothing."""

    def handle(event: object) -> None:
        call()

    return handle


# Ways to deliver, and to be interrupted


async def by_dispatch(bus: EventBus, event: object) -> list[Exception]:
    """Dispatch the event."""
    try:
        await bus.dispatch(event)
    except DispatchError as group:
        return list(group.exceptions)
    return []


async def by_drain(bus: EventBus, event: object) -> list[Exception]:
    """Publish the event in a unit of work, and drain that."""
    async with bus.context() as unit:
        unit.publish(event)
        # Not kept in a local variable: a handler's traceback leads to its callers, and so to it.
        return [failure.error for failure in (await unit.drain()).failures]


async def cancelled_by_scope(work: Callable[[], Awaitable[object]]) -> None:
    """Begin the work, and cancel the scope around it when all tasks wait."""
    with CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_all_wait, scope)
            await work()
    assert scope.cancel_called


async def _cancel_when_all_wait(scope: CancelScope) -> None:
    await all_tasks_blocked()
    scope.cancel()


async def all_tasks_blocked() -> None:
    """As AnyIO's, which on asyncio overlooks what a finished task is about to wake up."""
    for _ in range(5):
        await checkpoint()
        await anyio.wait_all_tasks_blocked()


# What became of it


class Witness(Observer):
    """Notes the end of each delivery, in the order of the ends: `handled paid`, `failed paid`."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def delivery(self, delivery: Delivery) -> Generator[None]:
        """Note how it ends."""
        try:
            yield
        except Exception:
            self.seen.append(f"failed {delivery.event}")
            raise
        self.seen.append(f"handled {delivery.event}")

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        """Note that they were dropped."""
        self.seen += [f"discarded {delivery.event}" for delivery in deliveries]

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        """Note that they will not run, or not to their end."""
        self.seen += [f"undelivered {delivery.event}" for delivery in deliveries]

    def requeued(self, deliveries: Sequence[Delivery]) -> None:
        """Note that they run later, or elsewhere."""
        self.seen += [f"requeued {delivery.event}" for delivery in deliveries]


def witnessed(bus: EventBus) -> list[str]:
    """What a new witness of the bus has seen, as it grows."""
    witness = Witness()
    bus.observe(witness)
    return witness.seen


def ignore(delivery: Delivery, error: Exception) -> None:
    """Report a failure to nobody: the log would keep it, and all that its traceback leads to."""


def kept_reports(bus: EventBus) -> list[Exception]:
    """The failures that the bus will report from now on."""
    kept: list[Exception] = []

    def report(delivery: Delivery, error: Exception) -> None:
        kept.append(error)

    bus.report_failure = report
    return kept


def outcomes(bus: EventBus) -> tuple[int, int, int]:
    """How many deliveries were handled, failed, and undelivered."""
    return bus.stats.handled, bus.stats.failed, bus.stats.undelivered


def assert_conserved(bus: EventBus) -> None:
    """Each accepted delivery waits, runs, or has ended in one way."""
    stats = bus.stats
    ended = stats.handled + stats.failed + stats.discarded + stats.undelivered + stats.requeued
    assert stats.accepted == ended + stats.pending + stats.running, f"not conserved: {stats}"
    assert stats.pending >= 0, f"ended more than once: {stats}"


def assert_settled(bus: EventBus) -> None:
    """Nothing waits and nothing runs, and each accepted delivery has ended in one way."""
    assert_conserved(bus)
    assert (bus.stats.pending, bus.stats.running) == (0, 0), f"not at rest: {bus.stats}"


@dataclass(slots=True)
class Raised(Generic[E]):
    """Holds what was raised in a block of `raises`, once it has been left."""

    errors: list[E]

    @property
    def value(self) -> E:
        """The exception itself."""
        return self.errors[0]


@contextmanager
def raises(kind: type[E]) -> Generator[Raised[E]]:
    """Pass if the block raises an exception of this kind, and fail if it raises none."""
    raised = Raised[E]([])
    try:
        yield raised
    except kind as error:
        raised.errors.append(error)
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


def kinds_in(group: BaseException) -> list[type[BaseException]]:
    """The types of the exceptions in a group."""
    assert isinstance(group, BaseExceptionGroup)
    members = cast("BaseExceptionGroup[BaseException]", group).exceptions
    return [type(error) for error in members]
