"""The public API as type checkers see it: never run, only checked, by mypy and pyright strict.

A line with an ignore is a mistake that has to be found: once a checker accepts it, the ignore
is unused, which is an error.
"""
# One ignore serves both: mypy finds unused ones in strict mode, pyright where it is told to.
# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from inspect import Parameter
from typing import Annotated, Generic, TypeVar, assert_type
from uuid import UUID

from fastapi import Depends
from faststream.nats import NatsBroker
from stamina import AsyncRetryingCaller
from starlette.applications import Starlette

from eventkit import (
    Delivery,
    DispatchError,
    DomainEvent,
    DrainReport,
    Durable,
    EventBus,
    EventContext,
    EventRouter,
    Observation,
    Observer,
    Publisher,
    Resolver,
    Solver,
    Stats,
    Subscription,
    Wiring,
    current_delivery,
    named,
)
from eventkit.exceptions import BadMessageError
from eventkit.fastapi import Bus, CurrentContext, FastAPIResolver
from eventkit.faststream import Bridge, BridgeError
from eventkit.starlette import EventContextMiddleware, Origin, Outcome, succeeded
from eventkit.streams import EventStream, end_at_shutdown, stream
from eventkit.testing import (
    DeliveryList,
    EventCapture,
    EventList,
    EventRecorder,
    FailureList,
    Fake,
    assert_handles,
    assert_no_orphans,
)
from eventkit.wire import (
    Codec,
    Received,
    Wired,
    codec_for,
    decode,
    encode,
    is_named,
    names_of,
    wire_name,
)


@dataclass(frozen=True, slots=True)
class UserEvent(DomainEvent):
    user_id: int


@dataclass(frozen=True, slots=True)
class UserCreated(UserEvent):
    email: str


class OrderPaid:
    pass


class OrderSent:
    pass


class OrderLost:
    pass


bus = EventBus()
router = EventRouter()


# Events.

created = UserCreated(1, "ada@example.org")
assert_type(created.user_id, int)
assert_type(created.event_id, UUID)
assert_type(created.occurred_at, datetime)
UserCreated(1, "ada@example.org", occurred_at=datetime.now())  # noqa: DTZ005 - only its type counts
UserCreated(1)  # type: ignore[call-arg]
UserCreated("1", "")  # type: ignore[arg-type]
created.user_id = 2  # type: ignore[misc]


# `on` returns the function itself, with its signature.


@bus.on(UserCreated)
async def greet(event: UserCreated, salutation: str = "Hello") -> str:
    return f"{salutation} {event.email}"


@router.on(UserCreated, name="audit", thread=True, timeout=None)
def audit(event: UserEvent) -> None: ...


async def call_handlers() -> None:
    assert_type(await greet(created), str)
    await greet(created, "Good morning")
    await greet(created, salutation="Good morning")
    await greet(event=created)
    audit(UserEvent(1))
    audit(event=UserEvent(1))
    await greet(user=created)  # type: ignore[call-arg]
    await greet(created, 1)  # type: ignore[arg-type]
    await greet()  # type: ignore[call-arg]
    audit(created)
    audit(OrderPaid())  # type: ignore[arg-type]


# Stacked, for options of their own, it is checked by each, and keeps its signature.


@bus.on(OrderPaid, timeout=5)
@router.on(OrderSent, name="sent")
async def stacked(event: OrderPaid | OrderSent, times: int = 1) -> bool:
    return times > 1


@bus.on(OrderLost)  # type: ignore[arg-type]
@bus.on(OrderPaid)
async def stacked_wrongly(event: OrderPaid | OrderSent) -> None: ...


async def call_stacked() -> None:
    assert_type(await stacked(OrderPaid(), times=2), bool)
    assert_type(await stacked(event=OrderSent()), bool)
    await stacked(OrderLost())  # type: ignore[arg-type]


# Whatever is callable.


class Calls:
    async def __call__(self, event: OrderPaid) -> None: ...


T = TypeVar("T")


@bus.on(OrderPaid)
def generic(event: T) -> T:
    return event


bus.on(OrderPaid)(Calls())
bus.on(OrderSent)(Calls())  # type: ignore[arg-type]
bus.on(UserCreated)(partial(greet, salutation="Hi"))
bus.on(OrderPaid)(print)


def subscribe_given(
    exactly: Callable[[OrderPaid], None],
    anything: Callable[[object], int],
    other: Callable[[int], int],
) -> None:
    assert_type(bus.on(OrderPaid)(exactly), Callable[[OrderPaid], None])
    assert_type(bus.on(object)(anything), Callable[[object], int])
    assert_type(bus.on(OrderPaid, OrderSent)(anything)(1), int)
    bus.on(OrderPaid)(other)  # type: ignore[arg-type]


bus.on(OrderPaid)(1)  # type: ignore[call-overload]


# What a handler takes beside the event is its own affair; callers have to give it.


def get_number() -> int:
    return 1


@bus.on(UserCreated)
async def with_a_dependency(event: UserCreated, number: Annotated[int, Depends(get_number)]) -> str:
    return event.email * number


@router.on(UserCreated)
def with_aliases(event: UserEvent, it: Bus, unit: CurrentContext) -> None:
    assert_type(it, EventBus)
    assert_type(unit, EventContext)


async def call_handlers_with_dependencies() -> None:
    assert_type(await with_a_dependency(created, 2), str)
    await with_a_dependency(created)  # type: ignore[call-arg]
    await with_a_dependency(created, "2")  # type: ignore[arg-type]
    with_aliases(created, bus, bus.context())
    with_aliases(created, bus, bus)  # type: ignore[arg-type]


bus.subscribe(UserCreated, with_a_dependency)
bus.subscribe(OrderPaid, with_a_dependency)  # type: ignore[arg-type]


# A resolver is whatever has its two methods.


class Container:
    def provides(self, parameter: Parameter) -> bool:
        return parameter.annotation is int

    def compile(self, parameters: Sequence[Parameter]) -> Solver:
        return make_numbers


@asynccontextmanager
async def make_numbers(origin: object) -> AsyncGenerator[dict[str, int]]:
    yield {"number": 1}


container: Resolver = Container()
EventBus(resolver=container)
EventBus(resolver=FastAPIResolver())
EventBus(resolver=Container)  # type: ignore[arg-type]
EventBus(resolver=make_numbers)  # type: ignore[arg-type]
origin = Origin(None, {})
assert_type(origin.app, Starlette | None)


# A handler takes the event type, or a base of it.


@bus.on(UserCreated)
async def of_a_base(event: UserEvent) -> None: ...


@bus.on(UserCreated)
async def of_anything(event: object) -> None: ...


@bus.on(UserEvent)  # type: ignore[arg-type]
async def of_a_subclass(event: UserCreated) -> None: ...


@bus.on(UserCreated)  # type: ignore[arg-type]
async def of_something_else(event: OrderPaid) -> None: ...


@router.on(UserCreated)  # type: ignore[arg-type]
async def of_something_else_on_a_router(event: OrderPaid) -> None: ...


@bus.on(UserCreated)  # type: ignore[arg-type]
async def of_nothing() -> None: ...


@bus.on(object)
async def of_every_event(event: object) -> None: ...


# With several types it takes each of them.


@bus.on(OrderPaid, OrderSent)
async def of_both(event: OrderPaid | OrderSent) -> None: ...


@bus.on(OrderPaid, OrderSent)  # type: ignore[arg-type]
async def of_the_first(event: OrderPaid) -> None: ...


@bus.on(OrderPaid, OrderSent)  # type: ignore[arg-type]
async def of_the_second(event: OrderSent) -> None: ...


@router.on(OrderPaid, OrderSent, OrderLost)
async def of_three(event: OrderPaid | OrderSent | OrderLost) -> None: ...


@router.on(OrderPaid, OrderSent, OrderLost)  # type: ignore[arg-type]
async def of_two_of_three(event: OrderPaid | OrderSent) -> None: ...


@bus.on(OrderPaid, OrderSent, OrderLost, UserCreated)
async def of_four(event: OrderPaid | OrderSent | OrderLost | UserCreated) -> None: ...


@bus.on(OrderPaid, OrderSent, OrderLost, UserCreated)  # type: ignore[arg-type]
async def of_three_of_four(event: OrderPaid | OrderSent | OrderLost) -> None: ...


@bus.on()  # type: ignore[call-overload, untyped-decorator]
async def of_no_type(event: object) -> None: ...


class Mailer:
    async def send(self, event: OrderPaid) -> None: ...


# `subscribe` checks alike.

subscription = bus.subscribe(OrderPaid, Mailer().send, name="mail", timeout=5)
assert_type(subscription, Subscription)
with subscription as entered_subscription:
    assert_type(entered_subscription, Subscription)
bus.subscribe(UserCreated, of_a_base)
bus.subscribe(UserCreated, Mailer().send)  # type: ignore[arg-type]
bus.subscribe(UserCreated, 1)  # type: ignore[call-overload]
bus.subscribe(created, of_a_base)  # type: ignore[call-overload]
bus.subscribe(UserCreated, call_handlers)  # type: ignore[arg-type]
bus.subscribe(UserCreated, greet)
bus.subscribe(UserCreated, lambda event: print(event.email))
bus.subscribe(UserCreated, lambda event: print(event.total))  # type: ignore[attr-defined]
bus.subscribe(OrderPaid, lambda: None)  # type: ignore[arg-type, misc]
bus.include(router)
bus.include(bus)  # type: ignore[arg-type]
assert_type(bus.handlers_for(UserCreated), tuple[Subscription, ...])
assert_type(bus.describe(), list[Wiring])
assert_type(bus.explain(UserCreated), str)
bus.explain(created)  # type: ignore[arg-type]
assert_type(bus.stats, Stats)


# Streams.


async def follow() -> None:
    async with stream(bus, UserCreated, buffer=10, overflow="raise") as events:
        assert_type(events, EventStream[UserCreated])
        async for event in events:
            assert_type(event, UserCreated)
            print(event.total)  # type: ignore[attr-defined]
    async with stream(bus, UserCreated, overflow="block"):  # type: ignore[arg-type]
        pass
    async with stream(bus, created):  # type: ignore[arg-type]
        pass
    async for _ in stream(bus, UserCreated):  # type: ignore[attr-defined]
        pass


with end_at_shutdown(bus):
    pass


# Publishers.

bus.publish()
bus.publish(created, OrderPaid(), even_on_failure=True)
bus.publish(created, True, eve_on_failure=True)  # type: ignore[call-arg]


class FakePublisher:
    def __init__(self) -> None:
        self.events: list[object] = []

    def publish(self, *events: object, even_on_failure: bool = False) -> None:
        self.events += events


class OneEventOnly:
    def publish(self, event: object) -> None: ...


class CreateUser:
    def __init__(self, events: Publisher) -> None:
        self._events = events

    def execute(self) -> None:
        self._events.publish(created)


CreateUser(bus)
CreateUser(bus.context())
CreateUser(bus.current_context())
CreateUser(FakePublisher())
CreateUser(OneEventOnly())  # type: ignore[arg-type]
CreateUser(router)  # type: ignore[arg-type]


# Units of work.


async def work() -> None:
    async with bus.context() as context:
        assert_type(context, EventContext)
        assert_type(context.pending, tuple[Delivery, ...])
        assert_type(await context.drain(), DrainReport)
        context.drain()  # type: ignore[unused-coroutine]
    bus.dispatch(created)  # type: ignore[unused-coroutine]
    try:
        await bus.dispatch(created)
    except DispatchError as failures:
        for error in failures.exceptions:
            assert_type(error, Exception | ExceptionGroup[Exception])


def job() -> None:
    with bus.context() as context:
        assert_type(context, EventContext)
        context.publish(created)
    assert_type(bus.context(independent=True, background=True), EventContext)
    bus.context(True)  # type: ignore[call-arg]
    delivery = current_delivery()
    assert_type(delivery.event, object)
    assert_type(delivery.received, Mapping[str, str] | None)
    delivery.attempt = 2  # type: ignore[misc]


async def always_ends() -> int:
    async with bus.context():
        return 1


# Observers.


class Watching(Observer):
    def published(self, event: object, deliveries: Sequence[Delivery]) -> None: ...

    @contextmanager
    def delivery(self, delivery: Delivery) -> Generator[None]:
        yield


class Counting(Observer):
    def delivery(self, delivery: Delivery) -> AbstractContextManager[int]:
        raise NotImplementedError


class Mistaken(Observer):
    def discarded(self, deliveries: Delivery) -> None: ...  # type: ignore[override]


assert_type(bus.observe(Watching()), Observation)
with bus.observe(Counting()) as observation:
    assert_type(observation, Observation)
bus.observe(Watching)  # type: ignore[arg-type]


def count_failure(delivery: Delivery, error: Exception) -> None: ...


bus.report_failure = count_failure
bus.report_failure = greet  # type: ignore[assignment]


# The middleware.


def lenient(outcome: Outcome) -> bool:
    assert_type(outcome.status, int | None)
    assert_type(outcome.exception, BaseException | None)
    return succeeded(outcome) or outcome.status == 409


async def asking(outcome: Outcome) -> bool:
    return True


app = Starlette()
app.add_middleware(EventContextMiddleware, bus=bus)
app.add_middleware(EventContextMiddleware, bus=bus, deliver_if=lenient, shutdown_timeout=5)
app.add_middleware(EventContextMiddleware)  # type: ignore[call-arg]
app.add_middleware(EventContextMiddleware, bus=EventBus)  # type: ignore[arg-type]
EventContextMiddleware(app, bus, deliver_if=asking)  # type: ignore[arg-type]
check: Callable[[Outcome], bool] = succeeded


# The testing kit.

recorder = EventRecorder()
CreateUser(recorder)
assert_type(recorder.published, EventList[object])
assert_type(recorder.of(UserCreated), EventList[UserCreated])
assert_type(recorder.one(UserCreated, user_id=1), UserCreated)
assert_type(recorder.one(UserCreated).email, str)
assert_type(recorder.in_order(UserCreated, OrderPaid), tuple[UserCreated, OrderPaid])
assert_type(
    recorder.in_order(UserCreated, OrderPaid, OrderSent), tuple[UserCreated, OrderPaid, OrderSent]
)
assert_type(recorder.in_order(created, OrderPaid), tuple[object, ...])
recorder.one("UserCreated")  # type: ignore[arg-type]
recorder.one(created)  # type: ignore[arg-type]
no_field = recorder.one(UserCreated).phone  # type: ignore[attr-defined]


async def captured() -> None:
    with EventCapture(bus) as events:
        assert_type(events, EventCapture)
        assert_type(events.published.of(OrderPaid), EventList[OrderPaid])
        assert_type(events.failures, FailureList)
        assert_type(events.handled.by(greet), DeliveryList)
        assert_type(await events.wait_for(OrderPaid, paid=True), OrderPaid)
        assert_type(events.wait_for_sync(OrderPaid), OrderPaid)
        with events.record_only(OrderPaid, except_=OrderSent) as fake:
            assert_type(fake, Fake)
        events.fail(greet, ValueError("no"), times=2)
        events.fail("greet", ValueError)
        events.delay(greet, 1)
        events.record_only(created)  # type: ignore[arg-type]
        events.fail(greet, "no")  # type: ignore[arg-type]
        events.fail(greet, KeyboardInterrupt)  # type: ignore[arg-type]
        events.delay(1, 1)  # type: ignore[arg-type]
        events.idle()  # type: ignore[unused-coroutine]
        CreateUser(events)  # type: ignore[arg-type]


assert_handles(bus, UserCreated, greet, "audit")
assert_handles(bus, created, greet)  # type: ignore[arg-type]
assert_no_orphans(bus, [UserCreated, OrderPaid])
assert_no_orphans(bus, UserCreated)  # type: ignore[arg-type]


def upcast(stored: dict[str, object]) -> dict[str, object]:
    return stored


@named("shop.order.placed.v2", formerly={"shop.order.placed.v1": upcast, "shop:Placed": None})
@dataclass(frozen=True, slots=True)
class NamedAbove(DomainEvent):
    order_id: int


@dataclass(frozen=True, slots=True)
@named("shop.order.paid")
class NamedBelow(Generic[T]):
    content: T


def names_and_codecs() -> None:
    assert_type(NamedAbove(1).order_id, int)
    assert_type(NamedBelow("x"), NamedBelow[str])
    NamedAbove("x")  # type: ignore[arg-type]
    NamedAbove(1).order_id = 2  # type: ignore[misc]
    assert_type(wire_name(NamedAbove), str)
    assert_type(names_of(NamedAbove), tuple[str, ...])
    codec = codec_for(NamedAbove)
    assert_type(codec, Codec[NamedAbove])
    assert_type(codec.encode(NamedAbove(1)), str)
    assert_type(codec.decode("{}", "shop:Placed"), NamedAbove)
    codec.encode(created)  # type: ignore[arg-type]
    named("x")(upcast)  # type: ignore[type-var]
    named("x", formerly={"y": "z"})  # type: ignore[dict-item]


# Other services.


def messages() -> None:
    wired = encode(created, source="/users", id="1", key="ada", time=datetime.now())  # noqa: DTZ005
    assert_type(wired, Wired)
    assert_type(wired.headers(), dict[str, str])
    assert_type(wired.headers("ce_"), dict[str, str])
    assert_type(wired.attributes, Mapping[str, str])
    assert_type(wired.body, bytes)
    wired.body = b""  # type: ignore[misc]
    received = decode(wired.headers(), wired.body, UserCreated, OrderPaid)
    assert_type(received, Received)
    assert_type(received.event, object)
    assert_type(received.id, str)
    assert_type(received.event_id, UUID)
    assert_type(received.unique_id, str)
    assert_type(received.headers, Mapping[str, str])
    assert_type(BadMessageError("foreign", "no event").reason, str)
    assert_type(BridgeError("away"), BridgeError)
    assert_type(current_delivery().received, Mapping[str, str] | None)
    assert_type(is_named(UserCreated), bool)
    encode(created)  # type: ignore[call-arg]
    encode(created, source="/users", key=1)  # type: ignore[arg-type]
    decode({"ce-id": 1}, b"")  # type: ignore[dict-item]
    decode({}, "")  # type: ignore[arg-type]
    decode({}, b"", created)  # type: ignore[arg-type]


async def keep(received: Received) -> bool:
    return received.id == ""


def by_user(event: UserEvent) -> str | None:
    return str(event.user_id)


def by_order(event: OrderPaid) -> str:
    return ""


def bridging() -> None:
    broker = NatsBroker()
    bridge = Bridge(bus, source="/users")
    publisher = broker.publisher("users", stream="users")
    subscriber = broker.subscriber("orders", stream="orders")
    assert_type(bridge.forward(UserCreated, publisher), Subscription)
    bridge.forward(UserCreated, publisher, key=by_user, name="users", timeout=3, durable=True)
    bridge.forward(UserCreated, publisher, key=lambda event: event.email)
    bridge.forward(UserCreated, publisher, durable=Durable(attempts=3))
    bridge.consume(subscriber, OrderPaid, OrderSent, dead_letter=publisher)
    bridge.consume(
        [subscriber],
        OrderPaid,
        dead_letter=publisher,
        others="ignore",
        within=5,
        retry=AsyncRetryingCaller(attempts=3),
        max_deliveries=3,
    )
    bridge.consume(subscriber, OrderPaid, dead_letter=publisher, durable=True)
    bridge.consume(subscriber, OrderPaid, dead_letter=publisher, deliver=keep)
    Bridge(bus)  # type: ignore[call-arg]
    Bridge("bus", source="/users")  # type: ignore[arg-type]
    bridge.forward(created, publisher)  # type: ignore[arg-type]
    bridge.forward(UserCreated, publisher, key=by_order)  # type: ignore[arg-type]
    bridge.forward(UserCreated, publisher, key=lambda event: event.phone)  # type: ignore[attr-defined]
    bridge.forward(UserCreated, publisher, timeout=None)  # type: ignore[arg-type]
    bridge.consume(subscriber, OrderPaid)  # type: ignore[call-arg]
    bridge.consume(subscriber, created, dead_letter=publisher)  # type: ignore[arg-type]
    bridge.consume(subscriber, OrderPaid, dead_letter=publisher, others="drop")  # type: ignore[arg-type]
    bridge.consume(subscriber, OrderPaid, dead_letter=publisher, deliver=by_order)  # type: ignore[arg-type]
