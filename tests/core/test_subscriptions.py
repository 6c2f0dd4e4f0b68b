"""Who receives an event, in which order, and for how long."""

import gc
import inspect
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar
from weakref import ref

import pytest
from anyio import create_task_group, to_thread
from fastapi import APIRouter, FastAPI

from eventkit import (
    DuplicateSubscriptionError,
    EventBus,
    EventRouter,
    InvalidEventTypeError,
    InvalidHandlerError,
    RouterClosedError,
    Subscription,
    current_delivery,
)
from eventkit._core.bus import registry_of
from tests.witness import assert_settled, calling, nothing, witnessed

pytestmark = pytest.mark.anyio

T = TypeVar("T")
HERE = str(Path(__file__))
TWICE = (
    "There are two usual causes. A function is called twice, for example an application factory: "
    "create the bus inside the function. Or a script is also imported: subscribe and include in a "
    "module that is only imported"
)
USELESS = "A second subscription has no use: a handler runs once for each event"


class Base:
    """Something happened."""


class Left(Base):
    """Something of one kind."""


class Right(Base):
    """Something of another kind."""


class Both(Left, Right):
    """Something of both kinds."""


class Noted:
    """Handlers that note who was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def handler(self, name: str) -> Callable[[object], None]:
        def handle(event: object) -> None:
            self.calls.append(name)

        handle.__qualname__ = name
        return handle


@pytest.fixture
def noted() -> Noted:
    """Calls, and handlers that make them."""
    return Noted()


@pytest.fixture
def bus() -> EventBus:
    """A bus without handlers."""
    return EventBus()


def line() -> int:
    """The line that it is called from."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def order_of(subscription: Subscription) -> int:
    return subscription.order


def names(bus: EventBus, event_type: type) -> list[str]:
    """Who receives events of this type."""
    return [subscription.name.partition(":")[2] for subscription in bus.handlers_for(event_type)]


# Resolution


@pytest.mark.parametrize(
    ("event", "called"),
    [
        (Base(), ["base", "everything"]),
        (Left(), ["base", "everything", "left"]),
        (Right(), ["base", "everything", "right"]),
        (Both(), ["base", "everything", "right", "left", "both"]),
        (None, ["everything"]),
        (True, ["int", "everything"]),
    ],
)
async def test_a_handler_receives_its_subclasses_and_one_for_object_everything(
    bus: EventBus, noted: Noted, event: object, called: list[str]
) -> None:
    for name, event_type in {
        "int": int,
        "base": Base,
        "everything": object,
        "right": Right,
        "left": Left,
        "both": Both,
    }.items():
        bus.subscribe(event_type, noted.handler(name), thread=False)

    await bus.dispatch(event)

    assert noted.calls == called
    assert names(bus, type(event)) == called


async def test_handlers_start_in_the_order_in_which_they_were_subscribed(
    bus: EventBus, noted: Noted
) -> None:
    expected = [f"{number}" for number in range(20)]
    for number, name in enumerate(expected):
        bus.subscribe((Both, Left, Base, object)[number % 4], noted.handler(name), thread=False)

    await bus.dispatch(Both())

    assert noted.calls == expected


async def test_a_handler_runs_once_per_event_however_many_of_its_types_match(
    bus: EventBus, noted: Noted
) -> None:
    first, second = noted.handler("first"), noted.handler("second")
    bus.subscribe(Base, first, thread=False)
    bus.subscribe(Left, second, thread=False)
    bus.on(Left, Right, object, thread=False)(first)

    await bus.dispatch(Both())

    assert noted.calls == ["first", "second"]  # where it was subscribed first
    assert bus.stats.accepted == 2


async def test_the_methods_of_two_objects_are_two_handlers(bus: EventBus) -> None:
    class Handles:
        def __init__(self) -> None:
            self.events: list[object] = []

        async def handle(self, event: object) -> None:
            self.events.append(event)

    one, other = Handles(), Handles()
    bus.subscribe(int, one.handle)
    bus.subscribe(int, other.handle)
    bus.subscribe(object, one.handle)

    await bus.dispatch(1)

    assert (one.events, other.events) == ([1], [1])


async def test_an_event_may_be_of_an_abstract_or_a_generic_class(bus: EventBus) -> None:
    class Abstract(ABC):
        @abstractmethod
        def user(self) -> int: ...

    class Concrete(Abstract):
        def user(self) -> int:
            return 1

    class Holds(Generic[T]):
        pass

    class HoldsInt(Holds[int]):
        pass

    seen: list[object] = []
    bus.subscribe(Abstract, seen.append, thread=False)  # type: ignore[type-abstract]
    bus.subscribe(Holds, seen.append, thread=False)
    events = [Concrete(), Holds[str](), HoldsInt()]
    async with bus.context():
        bus.publish(*events)

    assert seen == events


async def test_no_handler_is_not_an_error(bus: EventBus) -> None:
    async with bus.context():
        bus.publish(Base())
    await bus.dispatch(Base())

    assert (bus.stats.published, bus.stats.accepted) == (2, 0)


async def test_what_is_subscribed_after_the_publish_does_not_see_the_event(
    bus: EventBus, noted: Noted
) -> None:
    bus.subscribe(Base, noted.handler("early"), thread=False)
    async with bus.context():
        bus.publish(Base())
        bus.subscribe(Base, noted.handler("late"), thread=False)

    assert noted.calls == ["early"]
    await bus.dispatch(Base())
    assert noted.calls == ["early", "early", "late"]


async def test_resolution_is_forgotten_when_someone_subscribes_or_cancels(
    bus: EventBus, noted: Noted
) -> None:
    assert names(bus, Both) == []
    base = bus.subscribe(Base, noted.handler("base"))
    assert names(bus, Both) == ["base"]
    bus.subscribe(object, noted.handler("everything"))
    assert names(bus, Both) == ["base", "everything"]
    base.cancel()
    assert names(bus, Both) == ["everything"]


def test_ten_thousand_types_resolve(bus: EventBus, noted: Noted) -> None:
    types: list[type] = [Base]
    for number in range(10_000):
        # A chain of 50 classes, then the next one.
        types.append(type(f"Event{number}", (Base if number % 50 == 0 else types[-1],), {}))
    for event_type in [Base, *types[1::100]]:
        bus.subscribe(event_type, noted.handler(event_type.__name__))

    with bus.context() as unit:
        bus.publish(*(event_type() for event_type in types[1:901]))
        assert len(unit.pending) == 900 + 450
        unit.discard()
    assert names(bus, types[-1]) == ["Base"]
    assert len(bus.describe()) == 101


# Cancelling


async def test_a_cancelled_subscription_receives_nothing_more(bus: EventBus, noted: Noted) -> None:
    subscription = bus.subscribe(Base, noted.handler("a"), thread=False)
    await bus.dispatch(Base())
    assert subscription.active
    subscription.cancel()
    subscription.cancel()
    await bus.dispatch(Base())

    assert noted.calls == ["a"]
    assert not subscription.active
    assert bus.describe() == []


async def test_a_subscription_is_a_context_manager_that_cancels(
    bus: EventBus, noted: Noted
) -> None:
    with bus.subscribe(Base, noted.handler("a"), thread=False) as subscription:
        await bus.dispatch(Base())
    await bus.dispatch(Base())

    assert noted.calls == ["a"]
    assert not subscription.active


async def test_a_subscription_cancelled_between_publish_and_delivery_counts_as_discarded(
    bus: EventBus, noted: Noted
) -> None:
    seen = witnessed(bus)
    skipped = bus.subscribe(str, noted.handler("skipped"), thread=False)
    bus.subscribe(str, noted.handler("kept"), thread=False)

    async with bus.context():
        bus.publish("a")
        skipped.cancel()

    assert noted.calls == ["kept"]
    assert seen == ["discarded a", "handled a"]
    assert_settled(bus)


async def test_a_handler_may_cancel_subscriptions_to_later_events(
    bus: EventBus, noted: Noted
) -> None:
    seen = witnessed(bus)
    second = bus.subscribe(str, noted.handler("second"), thread=False)

    @bus.on(int)
    async def cancel(event: int) -> None:
        second.cancel()

    async with bus.context():
        bus.publish("a", 1, "b")

    assert seen == ["handled a", "handled 1", "discarded b"]
    assert_settled(bus)


@pytest.mark.parametrize("cancelled", [Base, Left])
async def test_a_handler_of_two_matching_types_runs_while_one_of_its_subscriptions_is_active(
    bus: EventBus, noted: Noted, cancelled: type
) -> None:
    handler = noted.handler("a")
    subscriptions: dict[type, Subscription] = {
        event_type: bus.subscribe(event_type, handler, thread=False) for event_type in (Base, Left)
    }
    async with bus.context():
        bus.publish(Left(), Base())
        subscriptions[cancelled].cancel()

    assert noted.calls == (["a"] if cancelled is Base else ["a", "a"])
    assert_settled(bus)


async def test_a_handler_runs_no_more_once_all_of_its_subscriptions_are_cancelled(
    bus: EventBus, noted: Noted
) -> None:
    handler = noted.handler("a")
    made = [bus.subscribe(each, handler, thread=False) for each in (Base, Left, object)]
    async with bus.context():
        bus.publish(Left())
        for subscription in made:
            subscription.cancel()

    assert noted.calls == []
    assert bus.stats.discarded == 1
    assert_settled(bus)


async def test_the_subscription_that_is_left_says_how_its_handler_is_called(
    bus: EventBus, noted: Noted
) -> None:
    seen = witnessed(bus)
    names_seen: list[str] = []

    async def handler(event: object) -> None:
        names_seen.append(current_delivery().handler)

    first = bus.subscribe(Base, handler, name="of the base")
    bus.subscribe(Left, handler, name="of the subclass", timeout=5)
    bus.subscribe(Left, noted.handler("b"), thread=False)
    async with bus.context() as unit:
        bus.publish(Left())
        ids = [delivery.id for delivery in unit.pending]
        first.cancel()

    assert names_seen == ["of the subclass"]
    assert noted.calls == ["b"]
    assert len(ids) == len(seen) == 2
    assert_settled(bus)


async def test_what_was_subscribed_after_the_publish_stands_in_for_nobody(
    bus: EventBus, noted: Noted
) -> None:
    handler = noted.handler("a")
    early = bus.subscribe(Base, handler, thread=False)
    async with bus.context():
        bus.publish(Left())
        bus.subscribe(Left, handler, thread=False)
        early.cancel()

    assert noted.calls == []
    assert_settled(bus)


async def test_a_cancelled_handler_may_be_subscribed_again_and_starts_last(
    bus: EventBus, noted: Noted
) -> None:
    first = noted.handler("first")
    bus.subscribe(Base, first, thread=False).cancel()
    bus.subscribe(Base, noted.handler("second"), thread=False)
    bus.subscribe(Base, first, thread=False)

    await bus.dispatch(Base())

    assert noted.calls == ["second", "first"]


# Twice


def test_subscribing_the_same_handler_twice_names_both_places(bus: EventBus, noted: Noted) -> None:
    handler = noted.handler("twice")
    first = line() + 1
    bus.subscribe(Base, handler)
    with pytest.raises(DuplicateSubscriptionError) as error:
        bus.subscribe(Base, handler)  # again
    again = line() - 1

    name = f"{__name__}:twice"
    assert str(error.value) == (
        f"{name} is already subscribed to {__name__}.Base: first at {HERE}:{first}, again at "
        f"{HERE}:{again}. Remove one of the two. {USELESS}"
    )
    assert error.value.handler == name
    assert error.value.first == f"{HERE}:{first}"
    assert error.value.second == f"{HERE}:{again}"


@pytest.mark.parametrize("method", [False, True])
def test_a_method_subscribed_twice_is_seen_through(bus: EventBus, method: bool) -> None:
    class Handles:
        async def handle(self, event: object) -> None: ...

    handles = Handles()
    one = partial(handles.handle) if not method else handles.handle
    bus.subscribe(Base, one)
    with pytest.raises(DuplicateSubscriptionError):
        bus.subscribe(Base, handles.handle if method else one)


def test_naming_a_type_twice_in_one_decorator_is_refused_and_subscribes_nothing(
    bus: EventBus, noted: Noted
) -> None:
    with pytest.raises(DuplicateSubscriptionError):
        bus.on(Left, Right, Left)(noted.handler("a"))

    assert bus.describe() == []


def test_a_decorator_that_fails_for_one_type_subscribes_to_none(
    bus: EventBus, noted: Noted
) -> None:
    handler = noted.handler("a")
    bus.subscribe(Right, handler)
    with pytest.raises(DuplicateSubscriptionError):
        bus.on(Left, Right)(handler)

    assert [entry["event_type"] for entry in bus.describe()] == [f"{__name__}.Right"]


def test_the_decorator_returns_the_function_itself(bus: EventBus) -> None:
    async def handle(event: Base) -> None: ...

    assert bus.on(Base)(handle) is handle
    assert EventRouter().on(Left, Right)(handle) is handle


async def test_stacked_decorators_subscribe_with_options_of_their_own(bus: EventBus) -> None:
    seen: list[object] = []

    @bus.on(Left, timeout=5)
    @bus.on(Right, name="right")
    async def handle(event: Left | Right) -> None:
        seen.append((type(event), current_delivery().handler.rpartition(".")[2]))

    await bus.dispatch(Left())
    await bus.dispatch(Right())

    assert seen == [(Left, "handle"), (Right, "right")]
    assert bus.handlers_for(Left)[0].timeout == 5


# Routers


async def test_routers_nest_and_keep_the_order_of_declaration(bus: EventBus, noted: Noted) -> None:
    inner, outer = EventRouter(), EventRouter()
    outer.on(Base, thread=False)(noted.handler("outer first"))
    inner.on(Left, Right, thread=False)(noted.handler("inner"))
    outer.include(inner)
    outer.on(object, thread=False)(noted.handler("outer last"))
    bus.subscribe(Both, noted.handler("bus first"), thread=False)
    bus.include(outer)
    bus.subscribe(Both, noted.handler("bus last"), thread=False)

    await bus.dispatch(Both())

    assert noted.calls == ["bus first", "outer first", "inner", "outer last", "bus last"]


async def test_a_router_serves_several_buses(noted: Noted) -> None:
    router = EventRouter()
    router.on(Base, thread=False)(noted.handler("a"))
    first, second = EventBus(), EventBus()
    first.include(router)
    second.include(router)
    first.handlers_for(Base)[0].cancel()

    await first.dispatch(Base())
    await second.dispatch(Base())

    assert noted.calls == ["a"]


@pytest.mark.parametrize("late", ["declare", "include"])
def test_a_router_is_closed_once_it_has_been_included(
    bus: EventBus, noted: Noted, late: str
) -> None:
    router, other = EventRouter(), EventRouter()
    other.on(Base)(noted.handler("late"))
    bus.include(router)
    declare, handler = router.on(Base), noted.handler("late")
    with pytest.raises(RouterClosedError) as error:
        declare(handler) if late == "declare" else router.include(other)

    assert str(error.value) == (
        f"{__name__}:late: declared on a router that has been included already, so nobody would "
        "call the handler. Declare all handlers of a router, and include other routers in it, "
        "before the router itself is included"
    )
    bus.include(other)
    assert names(bus, Base) == ["late"]


def test_including_an_empty_router_changes_nothing(bus: EventBus) -> None:
    router = EventRouter()
    router.include(EventRouter())
    bus.include(router)

    assert bus.describe() == []


def test_an_include_is_all_or_nothing_and_may_be_tried_again(bus: EventBus, noted: Noted) -> None:
    handler = noted.handler("a")
    router = EventRouter()
    router.on(Left)(noted.handler("new"))
    router.on(Right)(handler)
    in_the_way = bus.subscribe(Right, handler)
    with pytest.raises(DuplicateSubscriptionError):
        bus.include(router)

    assert names(bus, Both) == ["a"]
    in_the_way.cancel()
    router.on(Base)(noted.handler("newer"))
    bus.include(router)
    assert names(bus, Both) == ["new", "a", "newer"]


def test_a_handler_declared_twice_on_routers_names_both_places(noted: Noted) -> None:
    handler = noted.handler("a")
    router, inner = EventRouter(), EventRouter()
    router.on(Base)(handler)
    with pytest.raises(DuplicateSubscriptionError):
        router.on(Base)(handler)
    inner.on(Base)(handler)
    inner.on(Left)(handler)
    with pytest.raises(DuplicateSubscriptionError) as error:
        router.include(inner)

    assert error.value.first != error.value.second
    assert repr(router) == "<EventRouter with 1 declarations>"


def test_a_router_included_twice_names_the_declaration_and_the_second_include(
    bus: EventBus, noted: Noted
) -> None:
    router = EventRouter()
    router.on(Base)(noted.handler("a"))
    declared = line() - 1
    bus.include(router)
    with pytest.raises(DuplicateSubscriptionError) as error:
        bus.include(router)

    included = line() - 2
    assert str(error.value) == (
        f"{__name__}:a is already subscribed to {__name__}.Base: its router was included twice. "
        f"The handler is declared at {HERE}:{declared}, and the router was included again at "
        f"{HERE}:{included}. Include a router once, directly or through another one. {TWICE}. "
        f"{USELESS}"
    )
    assert error.value.first == f"{HERE}:{declared}"
    assert error.value.second == f"{HERE}:{included}"


def test_a_router_included_through_two_others_is_said_to_be_included_twice(
    bus: EventBus, noted: Noted
) -> None:
    inner, one, other = EventRouter(), EventRouter(), EventRouter()
    inner.on(Base)(noted.handler("a"))
    one.include(inner)
    other.include(inner)
    bus.include(one)
    with pytest.raises(DuplicateSubscriptionError, match="its router was included twice"):
        bus.include(other)
    outer = EventRouter()
    outer.include(inner)
    with pytest.raises(DuplicateSubscriptionError, match="its router was included twice"):
        outer.include(inner)


def test_a_router_included_twice_in_a_router_is_told_so_also_where_that_one_is_included(
    bus: EventBus, noted: Noted
) -> None:
    router, outer = EventRouter(), EventRouter()
    router.on(Base)(noted.handler("a"))

    outer.include(router)
    bus.include(outer)
    with pytest.raises(DuplicateSubscriptionError, match="a script is also imported"):
        outer.include(router)


def test_a_line_that_subscribes_twice_is_told_so(bus: EventBus, noted: Noted) -> None:
    handler = noted.handler("twice")

    def create_app() -> None:
        bus.subscribe(Base, handler)

    create_app()
    with pytest.raises(DuplicateSubscriptionError) as error:
        create_app()

    place = f"{HERE}:{line() - 6}"
    assert str(error.value) == (
        f"{__name__}:twice is already subscribed to {__name__}.Base: the line at {place} has run "
        f"twice. {TWICE}. {USELESS}"
    )
    assert error.value.first == error.value.second == place


def test_naming_a_type_twice_in_one_decorator_says_so_of_the_line(
    bus: EventBus, noted: Noted
) -> None:
    with pytest.raises(DuplicateSubscriptionError, match="names the same event type twice"):
        bus.on(Left, Left)(noted.handler("a"))
    with pytest.raises(DuplicateSubscriptionError, match="names the same event type twice"):
        EventRouter().on(Left, Left)(noted.handler("a"))


def test_routers_cannot_include_each_other(noted: Noted) -> None:
    inner, middle, outer = EventRouter(), EventRouter(), EventRouter()
    inner.on(Base)(noted.handler("a"))
    middle.include(inner)
    outer.include(middle)
    told = "a router cannot be included into itself"
    through_others = (
        "two routers cannot include each other: the router that is included here already includes "
        "this router. Remove one of the two include() calls"
    )

    for target, included, text in (
        (outer, outer, told),
        (middle, outer, through_others),
        (inner, outer, through_others),
    ):
        with pytest.raises(InvalidHandlerError) as error:
            target.include(included)
        assert str(error.value) == text


def test_include_takes_routers_only(bus: EventBus) -> None:
    thing: Any = print
    for target in (bus, EventRouter()):
        with pytest.raises(InvalidHandlerError) as error:
            target.include(thing)
        assert str(error.value) == f"include() takes an EventRouter, not {print!r}"


@pytest.mark.parametrize("application", [FastAPI, APIRouter])
def test_an_application_that_includes_a_router_of_events_is_told_that_the_bus_does_it(
    application: Callable[[], FastAPI | APIRouter],
) -> None:
    router: Any = EventRouter()
    with pytest.raises(AttributeError) as error:
        application().include_router(router)

    assert str(error.value) == (
        f"an EventRouter has no attribute {error.value.name!r}. It has event handlers, not "
        "routes: include it in the bus with bus.include(router), not in the application"
    )
    assert error.value.obj is router
    assert not hasattr(router, "routes")
    assert repr(router) == "<EventRouter with 0 declarations>"


# Looking at it


def test_a_subscription_says_what_it_ties(bus: EventBus) -> None:
    async def handle(event: Base) -> None: ...

    subscription = bus.subscribe(Base, handle, timeout=5)
    defined = handle.__code__.co_firstlineno

    name = f"{__name__}:test_a_subscription_says_what_it_ties.<locals>.handle"
    assert isinstance(subscription, Subscription)
    assert subscription.event_type is Base
    assert subscription.handler is handle
    assert subscription.name == name
    assert subscription.location == f"{HERE}:{defined}"
    assert subscription.timeout == 5
    assert not subscription.thread
    told = f"<Subscription {__name__}.Base -> {name} {HERE}:{defined}"
    assert repr(subscription) == f"{told}>"
    subscription.cancel()
    assert repr(subscription) == f"{told} (cancelled)>"


def test_describe_gives_the_whole_wiring_as_plain_data() -> None:
    def in_thread(event: object) -> None: ...

    async def on_loop(event: object) -> None: ...

    bus = EventBus(handler_timeout=7)
    router = EventRouter()
    router.on(Left, timeout=None)(on_loop)
    declared = line() - 1
    bus.subscribe(Base, on_loop, name="by name")
    bus.subscribe(Right, in_thread)
    bus.include(router)

    def told(handler: Callable[[object], object]) -> tuple[str, str]:
        place = f"{HERE}:{handler.__code__.co_firstlineno}"
        return f"{__name__}:{handler.__qualname__}", place

    assert bus.describe() == [
        {
            "event_type": f"{__name__}.Base",
            "handler": "by name",
            "location": told(on_loop)[1],
            "subscribed_at": f"{HERE}:{declared + 2}",
            "thread": False,
            "timeout": 7,
            "durable": False,
        },
        {
            "event_type": f"{__name__}.Right",
            "handler": told(in_thread)[0],
            "location": told(in_thread)[1],
            "subscribed_at": f"{HERE}:{declared + 3}",
            "thread": True,
            "timeout": None,
            "durable": False,
        },
        {
            "event_type": f"{__name__}.Left",
            "handler": told(on_loop)[0],
            "location": told(on_loop)[1],
            "subscribed_at": f"{HERE}:{declared}",
            "thread": False,
            "timeout": None,
            "durable": False,
        },
    ]


# Threads


async def test_threads_subscribe_and_cancel_while_others_publish(bus: EventBus) -> None:
    rounds, threads = 100, 3
    started = threading.Barrier(threads + 1)
    kept: list[Subscription] = []

    def subscribe() -> None:
        started.wait()
        for _ in range(rounds):
            kept.append(bus.subscribe(Base, calling(list), thread=False))
            bus.subscribe(Left, calling(list), thread=False).cancel()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        async with create_task_group() as tasks:
            for _ in range(threads):
                tasks.start_soon(to_thread.run_sync, subscribe)
            await to_thread.run_sync(started.wait)
            async with bus.context():
                for _ in range(rounds):
                    bus.publish(Left())
    finally:
        sys.setswitchinterval(interval)

    assert bus.handlers_for(Left) == tuple(sorted(kept, key=order_of))
    assert len(kept) == rounds * threads
    assert_settled(bus)


def test_threads_subscribe_while_others_publish_what_nobody_handles(bus: EventBus) -> None:
    kinds = [type(f"Kind{number}", (), {}) for number in range(200)]
    mistakes: list[Any] = [[1], (1,), {1}, frozenset([1])]
    done, failed = threading.Event(), list[BaseException]()

    def subscribe() -> None:
        try:
            while not done.is_set():
                bus.subscribe(Base, nothing, thread=False).cancel()
        except BaseException as error:
            failed.append(error)
            raise

    subscribing = threading.Thread(target=subscribe)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    subscribing.start()
    try:
        for _ in range(20):
            with bus.context():
                for kind in kinds:
                    bus.publish(kind())
                    for mistake in mistakes:
                        with pytest.raises(InvalidEventTypeError):
                            bus.publish(mistake)
    finally:
        done.set()
        subscribing.join()
        sys.setswitchinterval(interval)

    assert failed == []
    assert bus.stats.published == 20 * len(kinds)


def test_a_subscription_may_be_cancelled_by_a_finalizer_at_any_moment(bus: EventBus) -> None:
    """The garbage collector runs finalizers in the middle of a resolution, in its thread."""
    held = bus.subscribe(Base, nothing)

    with registry_of(bus)._lock:
        held.cancel()  # as if the collector ran here: the same thread, with the lock held

    assert bus.handlers_for(Base) == ()


def test_a_finalizer_may_publish_what_nobody_handles_while_somebody_subscribes(
    bus: EventBus,
) -> None:
    published = 0
    armed = True

    class Leaving:
        """Publishes an event of a new type when the collector finds it, and leaves an heir."""

        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            nonlocal published
            if armed:
                bus.publish(type("Left", (), {})())
                published += 1
                Leaving()

    threshold = gc.get_threshold()
    try:
        with bus.context():
            bus.publish(Base())
            Leaving()
            gc.set_threshold(1)  # collect wherever that is possible
            for _ in range(20):
                bus.subscribe(Base, nothing).cancel()
            armed = False
    finally:
        gc.set_threshold(*threshold)

    assert published > 0
    assert bus.stats.published == published + 1


async def test_a_subscription_cancelled_after_one_that_a_finalizer_cancelled_does_not_run(
    bus: EventBus, noted: Noted
) -> None:
    """The finalizer runs while the first event of a type is looked up."""
    by_finalizer = bus.subscribe(Right, noted.handler("by the finalizer"), thread=False)
    later = bus.subscribe(object, noted.handler("later"), thread=False)

    class Looked(type):
        def __getattribute__(cls, name: str) -> Any:
            if name == "__mro__":
                by_finalizer.cancel()
            return super().__getattribute__(name)

    class Event(metaclass=Looked):
        pass

    async with bus.context():
        bus.publish(Event())
        assert not by_finalizer.active
        later.cancel()

    assert noted.calls == []
    assert bus.stats.discarded == 1


# Types that come and go


def made_at_run_time(number: int) -> type[Any]:
    """A class of events, as a plug-in or a schema has it made."""
    return make_dataclass(f"Made{number}", ["payload"], bases=(Base,))


def as_a_module(number: int) -> type[Any]:
    """One of a module that is imported, and thrown out again."""
    module = ModuleType("plugin")
    module.__dict__["Base"] = Base
    sys.modules["plugin"] = module
    try:
        exec("class Made(Base):\n    def __init__(self, payload): ...", module.__dict__)
        made: type[Any] = module.__dict__["Made"]
        return made
    finally:
        del sys.modules["plugin"]


@pytest.mark.parametrize("make", [made_at_run_time, as_a_module])
@pytest.mark.parametrize("handled_as", [None, object, Base])
async def test_types_made_at_run_time_are_freed_once_their_events_are_delivered(
    bus: EventBus, make: Callable[[int], type[Any]], handled_as: type | None
) -> None:
    if handled_as is not None:
        bus.subscribe(handled_as, nothing, thread=False)
    kept: list[ref[type]] = []

    async def use(event_type: type[Any]) -> None:
        kept.append(ref(event_type))
        bus.publish(event_type(1))
        await bus.dispatch(event_type(2))
        bus.explain(event_type)

    async with bus.context():
        for number in range(5):
            await use(make(number))
    gc.collect()

    assert [each() for each in kept] == [None] * 5
    assert_settled(bus)


async def test_types_made_at_run_time_are_freed_once_their_subscriptions_are_cancelled(
    bus: EventBus,
) -> None:
    kept: list[ref[type]] = []

    async def use(event_type: type[Any]) -> None:
        kept.append(ref(event_type))
        with bus.subscribe(event_type, nothing, name="counted", thread=False):
            await bus.dispatch(event_type(1))
        await bus.dispatch(event_type(2))

    for number in range(5):
        await use(made_at_run_time(number))
    gc.collect()

    assert [each() for each in kept] == [None] * 5


async def test_what_waits_while_the_garbage_collector_runs_is_delivered_all_the_same(
    bus: EventBus, noted: Noted
) -> None:
    bus.subscribe(Base, noted.handler("a"), thread=False)
    cancelled = bus.subscribe(Base, noted.handler("cancelled"), thread=False)
    async with bus.context():
        bus.publish(Left())
        gc.collect()
        bus.publish(Left())
        cancelled.cancel()

    assert noted.calls == ["a", "a"]
    assert bus.stats.discarded == 2
    assert_settled(bus)


def test_types_stay_while_another_thread_changes_subscriptions_and_are_freed_the_next_time(
    bus: EventBus,
) -> None:
    locked, unlock = threading.Event(), threading.Event()

    def change() -> None:
        with bus._registry._lock:
            locked.set()
            unlock.wait()

    event_type = made_at_run_time(1)
    kept = ref(event_type)
    with bus.context():
        bus.publish(event_type(1))
    del event_type
    changing = threading.Thread(target=change)
    changing.start()
    locked.wait()
    gc.collect()
    assert kept() is not None
    unlock.set()
    changing.join()
    gc.collect()

    assert kept() is None


def test_types_are_let_go_too_where_python_starts_partial_collections_only(bus: EventBus) -> None:
    gc.disable()
    try:
        with bus.context():
            bus.publish(made_at_run_time(1)(1))
        assert len(bus._registry._plans) == 1
        for _ in range(1000):
            gc.collect(0)
    finally:
        gc.enable()

    assert bus._registry._plans == {}


def test_the_garbage_collector_knows_eventkit_no_more_when_python_ends() -> None:
    """It would call into a module that has been taken apart."""
    script = """
import atexit, gc, sys
atexit.register(lambda: print(any("eventkit" in each.__module__ for each in gc.callbacks)))
import eventkit
print(any("eventkit" in each.__module__ for each in gc.callbacks))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert run.stdout.split() == ["True", "False"]
    assert run.stderr == ""
