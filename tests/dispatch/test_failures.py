"""Dispatch: what becomes of exceptions, and that nothing is kept alive by them."""

import asyncio
import functools
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import anyio
import pytest
from anyio import sleep_forever, to_thread
from anyio.lowlevel import checkpoint

from eventkit import Delivery, DispatchError, EventBus, HandlerCancelledError, Observer
from tests.dispatching import (
    Boom,
    Cancel,
    Deliver,
    NewBus,
    Ping,
    Pong,
    all_tasks_blocked,
    by_dispatch,
    by_drain,
    cancel_by_scope,
    kept_reports,
    outcomes,
)
from tests.witness import freed_by_anyio

pytestmark = pytest.mark.anyio


# Failures of handlers


async def test_a_dispatch_raises_every_failure_in_one_group(bus: EventBus) -> None:
    steps: list[str] = []

    @bus.on(Ping)
    async def fails_at_once(event: Ping) -> None:
        raise Boom("at once")

    @bus.on(Ping)
    async def works(event: Ping) -> None:
        await all_tasks_blocked()
        steps.append("works")

    @bus.on(Ping)
    async def fails_later(event: Ping) -> None:
        await checkpoint()
        raise ValueError("later")

    @bus.on(Ping)
    def fails_in_thread(event: Ping) -> None:
        raise LookupError("in thread")

    @bus.on(Ping)
    async def publishes(event: Ping) -> None:
        bus.publish(Pong())

    @bus.on(Pong)
    async def fails_afterwards(event: Pong) -> None:
        raise KeyError("afterwards")

    with pytest.RaisesGroup(Boom, ValueError, LookupError, KeyError) as caught:
        await bus.dispatch(Ping())

    assert type(caught.value) is DispatchError
    assert steps == ["works"]
    assert outcomes(bus) == (2, 4, 0)
    message = caught.value.message
    assert message == "handlers failed for tests.dispatching.Ping, tests.dispatching.Pong"


async def test_each_failure_has_a_note_that_names_handler_place_and_event(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping, name="mailer")
    async def fails(event: Ping) -> None:
        raise Boom

    (error,) = await deliver(bus, Ping())

    place = f"{__file__}:{fails.__code__.co_firstlineno}"
    assert error.__notes__ == [f"raised by the handler mailer ({place}) for tests.dispatching.Ping"]


async def test_parts_of_a_dispatch_error_are_dispatch_errors(bus: EventBus) -> None:
    @bus.on(Ping)
    async def one(event: Ping) -> None:
        raise Boom

    @bus.on(Ping)
    async def two(event: Ping) -> None:
        raise ValueError

    with pytest.raises(DispatchError) as caught:
        await bus.dispatch(Ping())
    matching, rest = caught.value.split(Boom)
    part = caught.value.subgroup(ValueError)

    assert [type(group) for group in (matching, rest, part)] == [DispatchError] * 3


async def test_failures_do_not_disturb_later_events(bus: EventBus, deliver: Deliver) -> None:
    seen: list[object] = []

    @bus.on(Ping)
    async def publishes(event: Ping) -> None:
        bus.publish(Pong(1), Pong(2))

    @bus.on(Pong)
    async def fails(event: Pong) -> None:
        seen.append(event)
        raise Boom

    assert len(await deliver(bus, Ping())) == 2
    assert seen == [Pong(1), Pong(2)]


async def test_one_exception_instance_may_be_raised_by_several_handlers(
    bus: EventBus, deliver: Deliver
) -> None:
    error = Boom()

    async def first(event: Ping) -> None:
        raise error

    async def second(event: Ping) -> None:
        raise error

    bus.subscribe(Ping, first)
    bus.subscribe(Ping, second)

    for _ in range(2):
        assert await deliver(bus, Ping()) == [error, error]
    assert len(error.__notes__) == 2


@dataclass(frozen=True)
class Frozen(Exception):
    reason: str


class Refusing(Exception):
    def add_note(self, note: str, /) -> None:
        raise RuntimeError("no notes")


class Strange(Exception):
    def __init__(self) -> None:
        self.__notes__ = 5  # type: ignore[assignment]


class Stern(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")


@pytest.mark.parametrize(
    "make", [functools.partial(Frozen, "x"), Refusing, Strange, Stern], ids=repr
)
async def test_an_exception_that_takes_no_notes_is_a_failure_like_any_other(
    bus: EventBus, deliver: Deliver, make: Callable[[], Exception]
) -> None:
    error = make()

    @bus.on(Ping)
    async def fails(event: Ping) -> None:
        raise error

    @bus.on(Ping)
    async def works(event: Ping) -> None:
        await all_tasks_blocked()

    (failure,) = await deliver(bus, Ping())

    assert failure is error
    assert outcomes(bus) == (1, 1, 0)


async def test_stop_iteration_is_a_failure_wherever_it_is_raised(
    bus: EventBus, deliver: Deliver
) -> None:
    def stop(event: Ping) -> None:
        next(iter(()))

    @bus.on(Ping)
    async def on_loop(event: Ping) -> None:
        stop(event)

    bus.subscribe(Ping, functools.partial(stop))
    bus.subscribe(Ping, stop, thread=False)

    failures = await deliver(bus, Ping())

    assert [type(failure) for failure in failures] == [RuntimeError] * 3
    assert [type(failure.__cause__) for failure in failures] == [StopIteration] * 3


# What is no failure of a handler, but the end of the process


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("first_step", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize("sequential", [False, True])
async def test_what_ends_the_process_propagates_bare_and_cancels_the_siblings(
    new_bus: NewBus,
    deliver: Deliver,
    kind: type[BaseException],
    first_step: bool,
    sequential: bool,
) -> None:
    bus = new_bus(sequential=sequential)
    steps: list[str] = []

    @bus.on(Ping)
    async def earlier(event: Ping) -> None:
        if not sequential:
            await sleep_forever()

    @bus.on(Ping)
    async def ends(event: Ping) -> None:
        if not first_step:
            await all_tasks_blocked()
        raise kind

    @bus.on(Ping)
    async def sibling(event: Ping) -> None:
        await sleep_forever()
        steps.append("sibling")

    with pytest.raises(kind):
        await deliver(bus, Ping())

    assert steps == []
    assert outcomes(bus) == ((1, 0, 2) if sequential else (0, 0, 3))


async def test_what_ends_the_process_leaves_follow_ups_undelivered(new_bus: NewBus) -> None:
    bus = new_bus(sequential=True)

    @bus.on(Ping)
    async def publishes(event: Ping) -> None:
        bus.publish(Pong())

    @bus.on(Ping)
    async def ends(event: Ping) -> None:
        raise SystemExit

    @bus.on(Pong)
    async def follow(event: Pong) -> None:
        pytest.fail("the process is about to end")

    with pytest.raises(SystemExit):
        await bus.dispatch(Ping())

    assert outcomes(bus) == (1, 0, 2)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_it_propagates_from_threads_and_task_groups_too(
    bus: EventBus, deliver: Deliver, kind: type[BaseException]
) -> None:
    @bus.on(Ping)
    def in_thread(event: Ping) -> None:
        raise kind

    with pytest.raises(kind):
        await deliver(bus, Ping())

    @bus.on(Pong)
    async def mixture(event: Pong) -> None:
        raise BaseExceptionGroup("mixed", [kind(), Boom()])

    with pytest.RaisesGroup(kind, Boom):
        await deliver(bus, Pong())


async def test_the_first_of_several_is_the_one_that_propagates(
    bus: EventBus, deliver: Deliver
) -> None:
    @bus.on(Ping)
    async def second(event: Ping) -> None:
        try:
            await sleep_forever()
        finally:
            raise KeyboardInterrupt

    @bus.on(Ping)
    async def first(event: Ping) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        await deliver(bus, Ping())


async def test_failures_beside_it_are_reported(bus: EventBus, deliver: Deliver) -> None:
    reported = kept_reports(bus)

    @bus.on(Ping)
    async def fails(event: Ping) -> None:
        raise Boom

    @bus.on(Ping)
    async def ends(event: Ping) -> None:
        await all_tasks_blocked()
        raise SystemExit

    with pytest.raises(SystemExit):
        await deliver(bus, Ping())

    assert [type(error) for error in reported] == [Boom]
    assert outcomes(bus) == (0, 1, 1)


# What observers are told


async def test_observers_are_told_each_outcome_in_the_context_of_its_handler(
    new_bus: NewBus, deliver: Deliver
) -> None:
    bus = new_bus()
    told: dict[str, type[BaseException] | None] = {}

    class Watching(Observer):
        def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
            return self.around(delivery)

        @contextmanager
        def around(self, delivery: Delivery) -> Generator[None]:
            try:
                yield
            except BaseException as error:
                told[delivery.handler] = type(error)
                raise
            told[delivery.handler] = None

    @bus.on(Ping, name="works")
    async def works(event: Ping) -> None:
        pass

    @bus.on(Ping, name="fails")
    async def fails(event: Ping) -> None:
        raise Boom

    @bus.on(Ping, name="waits")
    async def waits(event: Ping) -> None:
        await sleep_forever()

    with bus.observe(Watching()):
        await cancel_by_scope(deliver, bus, Ping())

    cancelled = anyio.get_cancelled_exc_class()
    assert told == {"works": None, "fails": Boom, "waits": cancelled}


# What is kept alive


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def works(event: Ping) -> None:
    await checkpoint()


async def fails(event: Ping) -> None:
    await checkpoint()
    raise Boom


class Worse(Exception):
    pass


async def fails_from_a_cause(event: Ping) -> None:
    try:
        await fails(event)
    except Boom as error:
        raise Worse from error


async def fails_in_a_group(event: Ping) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fails, event)


async def takes_too_long(event: Ping) -> None:
    await sleep_forever()


async def makes_up_a_cancellation(event: Ping) -> None:
    kept: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await sleep_forever()
        except anyio.get_cancelled_exc_class() as error:
            kept.append(error)
    raise kept.pop()


async def makes_up_a_mixture(event: Ping) -> None:
    try:
        await makes_up_a_cancellation(event)
    except anyio.get_cancelled_exc_class() as error:
        raise BaseExceptionGroup("mixed", [error, Boom()]) from None


def fails_in_a_thread(event: Ping) -> None:
    raise Boom


async def dispatches(event: Ping) -> None:
    bus = EventBus()
    bus.subscribe(Ping, fails)
    await bus.dispatch(event)


ENDS: list[Callable[[Ping], Awaitable[None] | None]] = [
    works,
    fails,
    fails_from_a_cause,
    fails_in_a_group,
    takes_too_long,
    makes_up_a_cancellation,
    makes_up_a_mixture,
    fails_in_a_thread,
    dispatches,
]


async def other_work_in_all_threads(count: int) -> None:
    """An idle thread may not yet have let go of its last job when the result is there."""
    barrier = threading.Barrier(count, timeout=10)

    async def work() -> None:
        await to_thread.run_sync(barrier.wait)

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(work)


def tracked(*values: object) -> list[weakref.ref[object]]:
    return [weakref.ref(value) for value in values]


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("handler", ENDS)
@pytest.mark.parametrize("count", [1, 3])
async def test_events_and_failures_are_freed_without_the_garbage_collector(
    bus: EventBus, deliver: Deliver, handler: Callable[[Ping], object], count: int
) -> None:
    timeout = 0.01 if handler is takes_too_long else ...
    for number in range(count):
        bus.subscribe(Ping, functools.partial(handler), name=str(number), timeout=timeout)

    async def run() -> list[weakref.ref[object]]:
        event = Ping()
        return tracked(event, *await deliver(bus, event))

    references = await run()
    await all_tasks_blocked()
    await other_work_in_all_threads(count)

    assert len(references) == (1 if handler is works else 1 + count)
    assert [reference() for reference in references] == [None] * len(references)


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
async def test_a_dispatch_error_is_freed_without_the_garbage_collector(bus: EventBus) -> None:
    bus.subscribe(Ping, fails)

    async def run() -> list[weakref.ref[object]]:
        event = Ping()
        try:
            await bus.dispatch(event)
        except DispatchError as group:
            return tracked(event, group, *group.exceptions)
        return []

    references = await run()
    await all_tasks_blocked()

    assert [reference() for reference in references] == [None, None, None]


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
async def test_events_are_freed_without_the_garbage_collector_after_a_cancellation(
    bus: EventBus, deliver: Deliver, cancel: Cancel
) -> None:
    for handler in (works, fails, takes_too_long):
        bus.subscribe(Ping, handler)

    async def run() -> weakref.ref[Ping]:
        event = Ping()
        reference = weakref.ref(event)
        await cancel(deliver, bus, event)
        return reference

    reference = await run()
    await all_tasks_blocked()

    assert reference() is None


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
async def test_events_are_freed_without_the_garbage_collector_if_cancelled_before_any_handler(
    bus: EventBus, deliver: Deliver
) -> None:
    for _ in range(2):
        bus.subscribe(Ping, functools.partial(works))

    async def run() -> weakref.ref[Ping]:
        event = Ping()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await deliver(bus, event)
        return weakref.ref(event)

    reference = await run()
    await all_tasks_blocked()

    assert reference() is None
    assert outcomes(bus) == (0, 0, 2)


@freed_by_anyio
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("count", [1, 2])
async def test_events_are_freed_without_the_garbage_collector_after_a_keyboard_interrupt(
    bus: EventBus, deliver: Deliver, count: int
) -> None:
    async def interrupt(event: Ping) -> None:
        await checkpoint()
        raise KeyboardInterrupt

    for _ in range(count):
        bus.subscribe(Ping, functools.partial(interrupt))

    async def run() -> weakref.ref[Ping]:
        event = Ping()
        reference = weakref.ref(event)
        try:
            await deliver(bus, event)
        except KeyboardInterrupt:
            return reference
        raise AssertionError

    reference = await run()
    await all_tasks_blocked()

    assert reference() is None


@pytest.mark.usefixtures("on_asyncio")
async def test_a_made_up_cancellation_inside_a_dispatch_does_not_end_its_caller(
    bus: EventBus,
) -> None:
    @bus.on(Ping)
    async def handler(event: Ping) -> None:
        raise asyncio.CancelledError

    assert [type(error) for error in await by_dispatch(bus, Ping())] == [HandlerCancelledError]
    assert [type(error) for error in await by_drain(bus, Ping())] == [HandlerCancelledError]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
