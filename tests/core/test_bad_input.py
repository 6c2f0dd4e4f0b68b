"""Misuse: each way has a clear error of its own, which names the remedy."""

import asyncio
import logging
import pickle
import re
import threading
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from functools import partial
from http import HTTPStatus
from types import SimpleNamespace, new_class
from typing import Annotated, Any, NamedTuple, NewType, Optional, TypeVar, Union
from unittest.mock import Mock
from uuid import UUID

import anyio
import pytest
from anyio import create_task_group, to_thread

from eventkit import (
    Delivery,
    DispatchError,
    DrainInProgressError,
    EventBus,
    EventContextClosedError,
    EventContextFullError,
    EventContextUsageError,
    EventDepthError,
    EventKitError,
    EventRouter,
    HandlerTimeoutError,
    InvalidEventTypeError,
    InvalidHandlerError,
    NoEventContextError,
)
from tests.witness import assert_settled, nothing, witnessed

pytestmark = pytest.mark.anyio

T = TypeVar("T")

NOWHERE = "no event context of bus 'shop' is active here: "
NO_MIDDLEWARE = (
    NOWHERE + "no request or job surrounds the caller. In a web application add the middleware: "
    "app.add_middleware(EventContextMiddleware, bus=bus). If it is there, this code runs outside "
    "of it: add it after the middleware that publishes, because a later one is further outside. In "
    "other code, and in an exception_handler(Exception), which runs outside of all middlewares, "
    "open a unit of work: `async with bus.context():`, or in a thread `with bus.context():`"
)
OVER = (
    "this event context of bus 'shop' has ended: its request or job is over, and its events were "
    "delivered or discarded. A task or thread that outlives the request or job needs its own unit "
    "of work: `async with bus.context(independent=True):`, or in a thread `with`"
)


@pytest.fixture
def bus() -> EventBus:
    """A bus with a handler of integers that does nothing."""
    bus = EventBus(name="shop", max_events=2, max_depth=2)
    bus.subscribe(int, nothing, thread=False)
    return bus


def refusal(error: type[EventKitError], call: Callable[..., object], *args: object) -> str:
    """The whole text of the error that the call raises."""
    with pytest.raises(error) as raised:
        call(*args)
    assert type(raised.value) is error
    return str(raised.value)


def raw_thread(call: Callable[[], str], name: str) -> str:
    """Call it in a thread that knows nothing of us."""
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(call()), name=name)
    thread.start()
    thread.join()
    return results[0]


# Publishing where there is no unit of work


async def test_publishing_without_a_unit_names_the_middleware(bus: EventBus) -> None:
    assert refusal(NoEventContextError, bus.publish, 1) == NO_MIDDLEWARE
    assert refusal(NoEventContextError, bus.current_context) == NO_MIDDLEWARE
    assert bus.stats.published == 0


async def test_publishing_without_a_unit_in_a_worker_thread_names_the_middleware(
    bus: EventBus,
) -> None:
    # What a synchronous endpoint does; its thread lacks nothing.
    told = await to_thread.run_sync(refusal, NoEventContextError, bus.publish, 1)

    assert told == NO_MIDDLEWARE


async def test_publishing_without_a_unit_in_a_cancelled_worker_thread_names_the_middleware(
    bus: EventBus,
) -> None:
    entered, go_on, told = anyio.Event(), threading.Event(), list[str]()

    def work() -> None:
        anyio.from_thread.run_sync(entered.set)
        go_on.wait()
        told.append(refusal(NoEventContextError, bus.publish, 1))

    async with create_task_group() as tasks:
        tasks.start_soon(to_thread.run_sync, work)
        await entered.wait()
        tasks.cancel_scope.cancel()
        go_on.set()

    assert told == [NO_MIDDLEWARE]


def test_publishing_in_a_raw_thread_names_the_thread_and_the_remedy(bus: EventBus) -> None:
    with bus.context():
        told = raw_thread(partial(refusal, NoEventContextError, bus.publish, 1), "mailer")

    assert told == (
        NOWHERE + "the thread 'mailer' was started without its creator's context variables. Use "
        "anyio.to_thread.run_sync() or asyncio.to_thread(), which pass them on, or open a unit of "
        "work in the thread: `with bus.context():`"
    )


def test_publishing_in_an_executor_names_the_thread_and_the_remedy(bus: EventBus) -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(thread_name_prefix="pool") as pool:
            async with bus.context():
                return await loop.run_in_executor(
                    pool, refusal, NoEventContextError, bus.publish, 1
                )

    assert asyncio.run(main()) == (
        NOWHERE + "the thread 'pool_0' was started without its creator's context variables. Use "
        "anyio.to_thread.run_sync() or asyncio.to_thread(), which pass them on, or open a unit of "
        "work in the thread: `with bus.context():`"
    )


def test_publishing_in_start_up_code_without_a_loop_says_so(bus: EventBus) -> None:
    assert refusal(NoEventContextError, bus.publish, 1) == (
        NOWHERE + "this is start-up code, a script or a synchronous test. Open a unit of work: "
        "`with bus.context():`"
    )


async def test_publishing_in_the_handler_of_another_bus_says_so(bus: EventBus) -> None:
    other = EventBus(name="other")
    told: list[str] = []

    @other.on(int)
    async def handle(event: int) -> None:
        told.append(refusal(NoEventContextError, bus.publish, event))

    async with bus.context():
        await other.dispatch(1)

    assert told == [
        NOWHERE + "this is a unit of work of another bus, 'other', and none of this bus is around "
        "it. Publish to that bus, or open a unit of work of this bus: `async with bus.context():`. "
        "If an application has two buses, add the middleware for each bus, and give each bus a "
        "name: EventBus(name=...)"
    ]


async def test_the_error_keeps_the_name_of_the_bus(bus: EventBus) -> None:
    with pytest.raises(NoEventContextError) as error:
        bus.publish(1)

    assert error.value.bus == "shop"


# Publishing to a unit that takes nothing


async def test_publishing_to_a_unit_that_has_ended_says_so(bus: EventBus) -> None:
    go_on, told = anyio.Event(), list[str]()

    async def outlive() -> None:
        await go_on.wait()
        told.append(refusal(EventContextClosedError, bus.publish, 1))

    async with create_task_group() as tasks:
        async with bus.context() as unit:
            tasks.start_soon(outlive)
            await anyio.wait_all_tasks_blocked()
        told.append(refusal(EventContextClosedError, unit.publish, 1))
        go_on.set()

    assert told == [OVER, OVER]


def test_publishing_to_a_unit_that_is_not_open_yet_says_so(bus: EventBus) -> None:
    assert refusal(EventContextClosedError, bus.context().publish, 1) == (
        "this event context of bus 'shop' is not open yet: use `async with`"
    )


async def test_publishing_to_a_full_unit_names_the_limit_and_ways_out(bus: EventBus) -> None:
    async with bus.context() as unit:
        bus.publish(1, 2)
        with pytest.raises(EventContextFullError) as error:
            bus.publish(3)
        unit.discard()

    assert error.value.limit == 2
    assert str(error.value) == (
        "more than 2 events would wait in one event context of bus 'shop' (max_events). Publish "
        "one event for the whole batch, or raise EventBus(max_events=...). After a commit, and "
        "outside of handlers, you can also deliver the events that wait: `await "
        "bus.current_context().drain()`. Do not drain before the commit, because the transaction "
        "may still be rolled back"
    )


async def test_publishing_past_the_depth_limit_shows_the_chain(bus: EventBus) -> None:
    errors: list[EventDepthError] = []

    @bus.on(str, name="again")
    async def again(event: str) -> None:
        try:
            bus.publish(event)
        except EventDepthError as error:
            errors.append(error)

    async with bus.context():
        bus.publish("a")

    [error] = errors
    step = "builtins.str -> again"
    assert error.limit == 2
    assert error.chain == (step, step, step)
    assert str(error) == (
        "builtins.str comes after a chain of more than 2 deliveries (max_depth), which is usually "
        f"a loop. The chain is:\n  {step}\n  {step}\n  {step}\n"
        "Break the loop, or raise EventBus(max_depth=...)"
    )
    assert_settled(bus)


async def test_dispatching_past_the_depth_limit_raises_the_same(bus: EventBus) -> None:
    depths: list[int] = []

    @bus.on(str)
    async def again(event: str) -> None:
        depths.append(len(event))
        await bus.dispatch(event + "a")

    with pytest.raises(ExceptionGroup) as raised:
        await bus.dispatch("a")

    assert depths == [1, 2, 3]
    assert raised.group_contains(EventDepthError)
    assert_settled(bus)


class UserId(int):
    """A class of somebody's own."""


class Text(str):
    """Another one."""

    __slots__ = ()


class Point(NamedTuple):
    """And a tuple with names."""

    x: int
    y: int


def executed() -> object:
    """An instance of a class that says that it is a built-in one."""
    namespace: dict[str, Any] = {}
    exec("class Executed: ...", namespace)
    return namespace["Executed"]()


class Meta(type):
    """A class of classes."""


class OfMeta(metaclass=Meta):
    """An event class that is not directly an instance of `type`."""


@pytest.mark.parametrize("event", [int, OfMeta, Meta, Delivery])
async def test_publishing_a_class_says_that_an_event_is_an_instance(
    bus: EventBus, event: type
) -> None:
    name = event.__name__
    told = f"an event is an instance, not a class: publish {name}(...), not {name}"
    async with bus.context():
        assert refusal(InvalidEventTypeError, bus.publish, event) == told
    with pytest.raises(InvalidEventTypeError, match=re.escape(told)):
        await bus.dispatch(event)

    assert bus.stats.published == 0


class Color(Enum):
    """What is no class of events."""

    RED = 1


def numbers() -> Generator[int]:
    yield 1


ITERABLES: list[object] = [numbers(), iter([1]), map(str, [1]), {}.values(), deque([1]), range(2)]
VALUES: list[object] = [
    "user.created",
    b"user.created",
    None,
    {"id": 1},
    defaultdict(int),
    True,
    1.5,
    Decimal(1),
    datetime.now(UTC),
    UUID(int=1),
    len,
    numbers,
    partial(len),
    SimpleNamespace(id=1),
]


@pytest.mark.parametrize("event", ITERABLES, ids=lambda event: type(event).__name__)
async def test_an_iterable_of_events_is_no_event(bus: EventBus, event: object) -> None:
    told = (
        f"an object of the type {type(event).__name__!r} is not an event, and no handler takes it: "
        "publish its elements, with publish(*events)"
    )
    async with bus.context():
        assert refusal(InvalidEventTypeError, bus.publish, event) == told
    with pytest.raises(InvalidEventTypeError, match=re.escape(told)):
        await bus.dispatch(event)

    assert bus.stats.published == 0


@pytest.mark.parametrize("event", VALUES, ids=lambda event: type(event).__name__)
async def test_a_name_or_a_value_is_no_event_where_nobody_handles_it(
    bus: EventBus, event: object
) -> None:
    told = (
        "an event is an instance of a class of yours, not of "
        f"{type(event).__name__!r}, and no handler takes this object. Define a class for the "
        "event, and publish an instance: publish(UserCreated(...))"
    )
    bus = EventBus()
    async with bus.context():
        assert refusal(InvalidEventTypeError, bus.publish, event) == told
        assert refusal(InvalidEventTypeError, bus.publish, event, {"id": 1}) == told
    with pytest.raises(InvalidEventTypeError, match=re.escape(told)):
        await bus.dispatch(event)
    assert bus.stats.published == 0

    bus.subscribe(type(event), nothing)
    await bus.dispatch(event)
    assert bus.stats.handled == 1


@pytest.mark.parametrize("event", [Color.RED, HTTPStatus.OK], ids=str)
async def test_a_member_of_an_enum_is_no_event_where_nobody_handles_it(
    event: Enum,
) -> None:
    bus = EventBus()
    told = (
        "an event is an instance of a class of yours, not a member of the enum "
        f"{type(event).__name__!r}, and no handler takes this object. Define a class for the "
        "event, and publish an instance: publish(UserCreated(...))"
    )
    async with bus.context():
        assert refusal(InvalidEventTypeError, bus.publish, event) == told
        with bus.subscribe(type(event), nothing):
            bus.publish(event)


async def test_a_coroutine_is_no_event_and_the_remedy_is_to_await_it(bus: EventBus) -> None:
    async def look_up() -> Point:
        raise NotImplementedError

    event = look_up()
    async with bus.context():
        assert refusal(InvalidEventTypeError, bus.publish, event) == (
            "an object of the type 'coroutine' is not an event, and no handler takes it: await it, "
            "and publish its result"
        )
    event.close()


@pytest.mark.parametrize(
    "event",
    [ValueError(), UserId(1), Point(1, 2), Mock(), executed(), new_class("Made")()],
    ids=lambda event: type(event).__name__,
)
async def test_an_exception_and_an_instance_of_ones_own_class_are_events(
    bus: EventBus, event: object
) -> None:
    bus = EventBus()
    async with bus.context():
        bus.publish(event)
    await bus.dispatch(event)

    assert bus.stats.published == 2


async def test_what_once_had_a_handler_stays_an_event() -> None:
    """Or a stream of texts would make `publish` raise whenever its last reader has left."""
    bus = EventBus()
    bus.subscribe(str, nothing).cancel()
    bus.subscribe(object, nothing).cancel()  # says nothing about any type
    async with bus.context():
        bus.publish("a", Text("b"))
        with pytest.raises(InvalidEventTypeError):
            bus.publish(1)

    assert bus.stats.published == 2


@pytest.mark.parametrize("collection", [list, tuple, set, frozenset])
async def test_a_collection_is_an_event_only_where_somebody_handles_it(
    bus: EventBus, collection: type
) -> None:
    events = collection([1, 2])
    told = (
        f"an object of the type {collection.__name__!r} is not an event, and no handler takes it: "
        "publish its elements, with publish(*events)"
    )
    async with bus.context():
        assert refusal(InvalidEventTypeError, bus.publish, events) == told
        assert refusal(InvalidEventTypeError, bus.publish, events) == told
    seen = list[object]()
    with bus.subscribe(collection, seen.append, thread=False):
        await bus.dispatch(events)

    assert seen == [events]
    assert bus.stats.published == 1


@pytest.mark.parametrize("ask", ["explain", "handlers_for"])
@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
async def test_a_collection_is_refused_whoever_asked_about_its_type_before(
    bus: EventBus, kind: type, ask: str
) -> None:
    getattr(bus, ask)(kind)
    async with bus.context():
        with pytest.raises(InvalidEventTypeError):
            bus.publish(kind([1]))
        bus.handlers_for(kind)
        with pytest.raises(InvalidEventTypeError):
            await bus.dispatch(kind([1]))

    assert bus.stats.published == 0


@pytest.mark.parametrize("asked", [False, True])
async def test_an_event_that_nobody_handles_is_no_error_and_leaves_one_line_per_type(
    bus: EventBus, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    caplog.set_level(logging.INFO, "eventkit")
    if asked:
        assert bus.handlers_for(OfMeta) == ()
        assert "reaches no handler" in bus.explain(OfMeta)
    async with bus.context():
        bus.publish(OfMeta(), OfMeta())
        bus.subscribe(str, nothing).cancel()  # as whoever opens and closes a stream does
        bus.publish(OfMeta())

    [record] = caplog.records
    assert record.getMessage().startswith("nobody handles these events")
    assert record.__dict__["eventkit"] == {"event_type": f"{__name__}.OfMeta", "bus": "shop"}


# Draining


async def test_draining_twice_at_once_says_who_is_at_it(bus: EventBus) -> None:
    seen = witnessed(bus)
    go_on, entered = anyio.Event(), anyio.Event()

    @bus.on(str)
    async def wait(event: str) -> None:
        entered.set()
        await go_on.wait()

    async with bus.context() as unit, create_task_group() as tasks:
        bus.publish("a")
        tasks.start_soon(unit.drain)
        await entered.wait()
        bus.publish("b")
        with pytest.raises(DrainInProgressError) as error:
            await unit.drain()
        assert str(error.value) == (
            "this event context of bus 'shop' is being drained by another task: call drain() when "
            "that drain has ended"
        )
        unit.discard()
        go_on.set()

    assert seen == ["discarded b", "handled a"]  # the refused drain had released nothing


@pytest.mark.parametrize("nested", [False, True])
async def test_draining_inside_a_handler_says_what_to_do_instead(
    bus: EventBus, nested: bool
) -> None:
    told: list[str] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        async with AsyncExitStack() as stack:
            if nested:
                await stack.enter_async_context(bus.context())
            with pytest.raises(DrainInProgressError) as error:
                await bus.current_context().drain()
        told.append(str(error.value))

    async with bus.context():
        bus.publish("a")

    assert told == [
        "a handler of bus 'shop' cannot drain its own unit of work: the events that it publishes "
        "are delivered when all handlers of its own event have ended. To wait for handlers, use "
        "`await bus.dispatch(event)`"
    ]


# Opening


async def test_a_synchronous_unit_inside_a_running_loop_says_how_to_open_it(
    bus: EventBus,
) -> None:
    told = refusal(EventContextUsageError, bus.context().__enter__)

    assert told == (
        "`with bus.context()` would block the running event loop while it drains: use "
        "`async with bus.context()`"
    )
    refusal(NoEventContextError, bus.current_context)


async def test_a_unit_that_is_opened_twice_says_so(bus: EventBus) -> None:
    told = "an event context can be opened only once: call bus.context() for each unit of work"
    async with bus.context() as unit:
        with pytest.raises(EventContextUsageError) as error:
            async with unit:
                pass
        assert str(error.value) == told
        assert bus.current_context() is unit
        bus.publish(1)
    with pytest.raises(EventContextUsageError, match=re.escape(told)):
        async with unit:
            pass

    assert bus.stats.handled == 1


# Subscribing


async def generate(event: object) -> AsyncGenerator[None]:
    yield


def generate_in_thread(event: object) -> Generator[None]:
    yield


async def takes_two(event: object, other: object) -> None: ...


async def takes_none() -> None: ...


async def takes_keywords(*, event: object) -> None: ...


def place(function: Callable[..., object]) -> str:
    """How a message names the function."""
    code = function.__code__
    return f"{__name__}:{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"


class Target:
    """A class, which is no handler."""


NO_SIGNATURE = "It needs a positional parameter for the event"


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        ("mail", "a handler is a callable that takes the event, not 'mail'"),
        (None, "a handler is a callable that takes the event, not None"),
        (
            takes_two,
            f"{place(takes_two)} takes 'other', which is neither the event (the first parameter) "
            "nor a dependency, and has no default. A handler has no request, so it has no query, "
            "no path and no body. Put what the handler needs into the event, or declare a "
            "dependency, with FastAPI `other: Annotated[..., Depends(...)]`",
        ),
        (
            takes_none,
            f"{place(takes_none)} cannot be called with an event: its signature is "
            f"() -> None. {NO_SIGNATURE}",
        ),
        (
            takes_keywords,
            f"{place(takes_keywords)} cannot be called with an event: its signature is "
            f"(*, event: object) -> None. {NO_SIGNATURE}",
        ),
        (
            generate,
            f"{place(generate)} is a generator function: calling it runs none of its body. "
            "Remove the yield",
        ),
        (
            generate_in_thread,
            f"{place(generate_in_thread)} is a generator function: calling it runs none of its "
            "body. Remove the yield",
        ),
        (
            Target,
            f"{__name__}:Target is a class: an event would only create an instance of it. "
            "Subscribe an instance with __call__, or a method of an instance",
        ),
    ],
)
@pytest.mark.parametrize("how", ["subscribe", "on", "router"])
def test_what_cannot_handle_an_event_is_refused_when_subscribing(
    bus: EventBus, handler: Any, told: str, how: str
) -> None:
    def on_a_router() -> None:
        router = EventRouter()
        router.on(str)(handler)
        bus.include(router)

    ways: dict[str, Callable[[], object]] = {
        "subscribe": lambda: bus.subscribe(str, handler),
        "on": lambda: bus.on(str)(handler),
        "router": on_a_router,
    }

    assert refusal(InvalidHandlerError, ways[how]) == told
    assert len(bus.describe()) == 1


def ignore(event: object) -> None: ...


@pytest.mark.parametrize(
    "event_type",
    [
        int | str,
        Union[int, str],  # noqa: UP007 - the old spelling is refused too
        Optional[int],  # noqa: UP045
        list[int],
        Annotated[int, "positive"],
        NewType("UserId", int),
        1,
        None,
        T,
        Any,
    ],
)
def test_what_is_no_class_is_refused_as_an_event_type(bus: EventBus, event_type: Any) -> None:
    told = (
        f"an event type is a class, not {event_type!r}. For several event types, give each of "
        "them: on(A, B). For a generic class, give the class without its parameters"
    )

    assert refusal(InvalidEventTypeError, bus.subscribe, event_type, ignore) == told
    assert refusal(InvalidEventTypeError, bus.on, int, event_type) == told
    assert refusal(InvalidEventTypeError, EventRouter().on, event_type) == told
    assert refusal(InvalidEventTypeError, bus.handlers_for, event_type) == told


def test_the_name_of_a_class_is_no_event_type(bus: EventBus) -> None:
    subscribe: Any = bus.subscribe

    assert refusal(InvalidEventTypeError, subscribe, "UserCreated", ignore) == (
        "an event type is a class, not 'UserCreated'. Give the class itself instead of its name"
    )


def test_a_decorator_without_event_types_is_refused(bus: EventBus) -> None:
    on: Any = bus.on
    told = "on() needs at least one event type: on(UserCreated)"

    assert refusal(InvalidEventTypeError, on) == told


def test_a_decorator_without_its_parentheses_is_told_of_them(bus: EventBus) -> None:
    on: Any = bus.on
    told = (
        f"an event type is a class, not {ignore!r}. Give the event type first. As a decorator: "
        "@bus.on(UserCreated). As a call: subscribe(UserCreated, handler)"
    )

    assert refusal(InvalidEventTypeError, on, ignore) == told
    assert refusal(InvalidEventTypeError, bus.subscribe, ignore, Target) == told


def test_an_instance_as_event_type_is_told_its_class(bus: EventBus) -> None:
    event = Target()

    assert refusal(InvalidEventTypeError, bus.subscribe, event, ignore) == (
        f"an event type is a class, not {event!r}. Give its class: Target"
    )


# Errors travel


@pytest.mark.parametrize(
    "error",
    [
        HandlerTimeoutError("shop:mail", 1.5),
        EventDepthError("Looped", 16, ["Looped -> again"]),
        EventContextFullError("shop", 10),
        DispatchError("handlers failed", [ValueError("no mail")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling_with_their_facts(error: EventKitError) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
