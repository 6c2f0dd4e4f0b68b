"""Looking at a bus: what explains who gets an event, names, and what a debugger shows."""

import gc
import logging
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from eventkit import (
    Delivery,
    DispatchError,
    DuplicateNameError,
    EventBus,
    EventRouter,
    InvalidEventTypeError,
    Observer,
    Publisher,
    current_delivery,
)
from eventkit._core.events import type_name
from eventkit.starlette import EventContextMiddleware
from tests.witness import nothing

pytestmark = pytest.mark.anyio


class OrderEvent:
    """What happens to orders."""


class OrderPaid(OrderEvent):
    """An event whose payload is long, secret, and broken."""

    def __repr__(self) -> str:
        raise LookupError("the payload")


class OrderPaidTwice(OrderPaid):
    """A subclass."""


ELSEWHERE: type[Any] = type("OrderPaid", (), {"__module__": "old.shop"})


async def send_receipt(event: OrderPaid) -> None: ...


async def count(event: object) -> None: ...


def write_line(event: OrderEvent) -> None: ...


def place(function: Any) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    facts: dict[str, object] = record.__dict__["eventkit"]
    return facts


def declared_at(bus: EventBus, handler: str) -> str:
    [wiring] = [w for w in bus.describe() if w["handler"].endswith(handler)]
    return wiring["subscribed_at"]


# Explaining


@pytest.mark.parametrize(
    ("sequential", "how"),
    [(False, "concurrently, and start in"), (True, "one after the other, in")],
)
def test_explain_says_who_gets_an_event_and_why_and_where_and_for_how_long(
    sequential: bool, how: str
) -> None:
    bus = EventBus(name="shop", sequential=sequential)
    router = EventRouter()
    router.on(OrderPaid)(send_receipt)
    router.on(OrderEvent)(write_line)
    bus.include(router)
    bus.subscribe(object, count, timeout=None)
    bus.subscribe(OrderPaid, nothing, name="fast", thread=False, timeout=0.5)

    assert bus.explain(OrderPaid) == (
        f"{__name__}.OrderPaid reaches 4 handlers of bus 'shop'. They run {how} this order:\n"
        f"1. {__name__}:send_receipt, at {place(send_receipt)}\n"
        f"   subscribed to this class itself, at {declared_at(bus, 'send_receipt')}\n"
        "   runs on the event loop, for at most 30 s in a drain (the bus's handler_timeout)\n"
        f"2. {__name__}:write_line, at {place(write_line)}\n"
        f"   subscribed to its base class {__name__}.OrderEvent, at "
        f"{declared_at(bus, 'write_line')}\n"
        "   runs in a worker thread, which no timeout can stop\n"
        f"3. {__name__}:count, at {place(count)}\n"
        f"   subscribed to object, so to every event, at {declared_at(bus, 'count')}\n"
        "   runs on the event loop, for any time (timeout=None)\n"
        f"4. fast, at {place(nothing)}\n"
        f"   subscribed to this class itself, at {declared_at(bus, 'fast')}\n"
        "   runs on the event loop, for at most 0.5 s (timeout=)"
    )


def test_explain_knows_a_bus_without_a_handler_timeout_and_a_single_handler() -> None:
    bus = EventBus(handler_timeout=None)
    bus.subscribe(OrderEvent, send_receipt)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType, reportCallIssue]

    assert bus.explain(OrderEvent) == (
        f"{__name__}.OrderEvent reaches 1 handler of bus 'default'.\n"
        f"1. {__name__}:send_receipt, at {place(send_receipt)}\n"
        f"   subscribed to this class itself, at {declared_at(bus, 'send_receipt')}\n"
        "   runs on the event loop, for any time in a drain (the bus's handler_timeout)"
    )


def test_explain_names_what_might_have_been_meant_where_nothing_is_reached() -> None:
    bus = EventBus()
    bus.subscribe(OrderPaidTwice, write_line, thread=False)
    bus.subscribe(ELSEWHERE, count)
    bus.subscribe(str, nothing)

    assert bus.explain(OrderPaid) == (
        f"{__name__}.OrderPaid reaches no handler of bus 'default'.\n"
        "Not called, because subscribed to a subclass of it:\n"
        f"- {__name__}:write_line, at {place(write_line)}, for {__name__}.OrderPaidTwice\n"
        "Not called, because subscribed to another class of the same name:\n"
        f"- {__name__}:count, at {place(count)}, for old.shop.OrderPaid"
    )


def test_explain_names_namesakes_also_where_something_else_is_reached() -> None:
    bus = EventBus()
    bus.subscribe(object, count)
    bus.subscribe(ELSEWHERE, write_line)

    assert bus.explain(OrderPaid).splitlines()[4:] == [
        "Not called, because subscribed to another class of the same name:",
        f"- {__name__}:write_line, at {place(write_line)}, for old.shop.OrderPaid",
    ]
    assert "Not called, because" not in bus.explain(object)


def test_explain_says_what_to_look_at_where_nothing_comes_close() -> None:
    bus = EventBus()
    bus.subscribe(str, nothing)

    assert bus.explain(OrderPaid) == (
        f"{__name__}.OrderPaid reaches no handler of bus 'default'.\n"
        "None of its 1 subscriptions is for a similar class. Is the module that declares the "
        "handler imported, and its router included: bus.include(router)?"
    )


def test_explain_takes_a_class() -> None:
    event: Any = OrderEvent()
    with pytest.raises(InvalidEventTypeError, match="Give its class: OrderEvent"):
        EventBus().explain(event)


# Names


def clash(name: str, first: object, second: object) -> str:
    return (
        f"two handlers have the name {name!r}, the one at {place(first)} and the one at "
        f"{place(second)}. Logs and counters identify a handler by its name: give one of the two "
        "another name="
    )


def test_two_handlers_of_the_same_name_are_refused_naming_both() -> None:
    bus = EventBus()
    bus.subscribe(OrderPaid, send_receipt, name="mail")
    with pytest.raises(DuplicateNameError) as error:
        bus.subscribe(str, count, name="mail")

    assert str(error.value) == clash("mail", send_receipt, count)
    assert error.value.name == "mail"
    assert (error.value.first, error.value.second) == (place(send_receipt), place(count))
    assert len(bus.describe()) == 1


def test_a_router_refuses_a_name_twice_and_so_does_who_includes_it() -> None:
    router, other = EventRouter(), EventRouter()
    router.on(str, name="mail")(count)
    with pytest.raises(DuplicateNameError):
        router.on(OrderPaid, name="mail")(send_receipt)
    other.on(OrderEvent, name="mail")(write_line)
    with pytest.raises(DuplicateNameError) as error:
        router.include(other)
    assert str(error.value) == clash("mail", count, write_line)

    bus = EventBus()
    bus.include(router)
    with pytest.raises(DuplicateNameError):
        bus.include(other)
    assert len(bus.describe()) == 1


def test_one_handler_may_have_its_name_for_several_types() -> None:
    bus = EventBus()
    bus.on(OrderPaid, str, name="count")(count)
    last = bus.subscribe(int, count, name="count")

    with pytest.raises(DuplicateNameError):
        bus.subscribe(int, nothing, name="count")
    last.cancel()
    with pytest.raises(DuplicateNameError):
        bus.subscribe(int, nothing, name="count")


def test_a_name_is_free_again_when_its_subscriptions_have_ended() -> None:
    bus = EventBus()
    bus.subscribe(str, count, name="mail").cancel()
    bus.subscribe(OrderPaid, send_receipt, name="mail")

    assert [wiring["handler"] for wiring in bus.describe()] == ["mail"]


def test_the_methods_of_two_objects_may_share_the_name_that_nobody_gave_them() -> None:
    class Mailer:
        async def send(self, event: OrderPaid) -> None: ...

    bus = EventBus()
    bus.subscribe(OrderPaid, Mailer().send)
    bus.subscribe(OrderPaid, Mailer().send)

    assert len({wiring["handler"] for wiring in bus.describe()}) == 1


# In a debugger


async def test_a_delivery_shows_what_it_is_and_never_the_payload() -> None:
    bus = EventBus()
    shown: list[str] = []

    @bus.on(OrderPaid, name="ship")
    async def ship(event: OrderPaid) -> None:
        bus.publish("shipped")

    @bus.on(str, OrderPaid, name="note")
    async def note(event: object) -> None:
        shown.append(repr(current_delivery()))

    async with bus.context() as unit:
        bus.publish(OrderPaid())
        [first, _] = unit.pending

    paid = f"{__name__}.OrderPaid"
    assert shown == [
        f"<Delivery {paid} -> note>",
        f"<Delivery builtins.str -> note, caused by {paid} -> ship>",
    ]
    again = Delivery(
        event=first.event,
        handler=first.handler,
        cause=None,
        depth=0,
        attempt=2,
        _published_ns=0,
        _number=(0, 0),
    )
    assert repr(again) == f"<Delivery {paid} -> ship, attempt 2>"


async def test_a_bus_a_unit_and_a_subscription_show_themselves_with_broken_payloads() -> None:
    bus = EventBus()
    subscription = bus.subscribe(OrderPaid, send_receipt)
    async with bus.context() as unit:
        bus.publish(OrderPaid(), OrderPaid())

        assert repr(bus) == "<EventBus 'default', 1 subscriptions, 2 pending>"
        assert repr(unit) == "<EventContext of bus 'default', open, 2 pending>"
    assert repr(subscription) == (
        f"<Subscription {__name__}.OrderPaid -> {__name__}:send_receipt {place(send_receipt)}>"
    )


# In debug mode


async def fail(event: object) -> None:
    raise ValueError


def line_of_caller() -> str:
    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class PlaceOrder:
    """A use case that knows no bus."""

    def __init__(self, events: Publisher) -> None:
        self._events = events

    def execute(self) -> str:
        self._events.publish(OrderPaid())
        return line_of_caller()


def note(event_type: str, place: str | None) -> list[str]:
    published = "" if place is None else f", published at {place}"
    where = f"{fail.__code__.co_filename}:{fail.__code__.co_firstlineno}"
    return [f"raised by the handler {__name__}:fail ({where}) for {event_type}{published}"]


def lines_up(place: str, lines: int) -> str:
    file, _, line = place.rpartition(":")
    return f"{file}:{int(line) - lines}"


async def test_in_debug_mode_the_note_of_a_failure_says_where_the_event_was_published() -> None:
    bus = EventBus(debug=True)
    bus.subscribe(OrderPaid, fail)
    async with bus.context() as unit:
        place = PlaceOrder(bus).execute()
        report = await unit.drain()

    [failure] = report.failures
    assert failure.delivery.published_from == lines_up(place, 1)
    assert failure.error.__notes__ == note(f"{__name__}.OrderPaid", lines_up(place, 1))


async def test_in_debug_mode_the_place_is_that_of_a_dispatch_or_of_a_handler_that_publishes() -> (
    None
):
    bus = EventBus(debug=True)
    bus.subscribe(str, fail)
    places: list[str] = []

    @bus.on(int)
    async def publish(event: int) -> None:
        bus.publish("a")
        places.append(line_of_caller())

    with pytest.raises(DispatchError) as caused:
        await bus.dispatch(1)
    places.append(line_of_caller())
    with pytest.raises(DispatchError) as direct:
        await bus.dispatch("a")

    assert caused.value.exceptions[0].__notes__ == note("builtins.str", lines_up(places[0], 1))
    assert direct.value.exceptions[0].__notes__ == note("builtins.str", lines_up(places[1], -2))


async def test_out_of_debug_mode_nobody_looks_where_an_event_was_published() -> None:
    bus = EventBus(debug=False)
    bus.subscribe(str, fail)
    async with bus.context() as unit:
        bus.publish("a")
        report = await unit.drain()

    [failure] = report.failures
    assert failure.delivery.published_from is None
    assert failure.error.__notes__ == note("builtins.str", None)


@pytest.mark.parametrize(
    ("dev_mode", "pytest_runs", "debug"),
    [(False, False, False), (True, False, True), (False, True, True)],
)
def test_debug_mode_is_that_of_python_or_a_run_of_pytest(
    monkeypatch: pytest.MonkeyPatch, dev_mode: bool, pytest_runs: bool, debug: bool
) -> None:
    flags = SimpleNamespace(dev_mode=dev_mode)
    monkeypatch.setattr("eventkit._core.bus.sys", SimpleNamespace(flags=flags))
    monkeypatch.setattr("os.environ", {"PYTEST_VERSION": "9"} if pytest_runs else {})
    bus = EventBus()
    bus.subscribe(str, nothing, thread=False)
    with bus.context() as unit:
        unit.publish("a")
        [delivery] = unit.pending

    assert (delivery.published_from is not None) is debug


def test_an_observation_detached_by_many_threads_at_once_is_detached_once() -> None:
    bus = EventBus()
    kept = bus.observe(Observer())
    observation = bus.observe(Observer())
    detach = observation._detach[0]
    reentered: list[None] = []

    def detach_and_again() -> None:
        observation.detach()  # as another thread would in this very moment
        reentered.append(None)
        detach()

    observation._detach[0] = detach_and_again
    observation.detach()
    observation.detach()

    assert reentered == [None]
    kept.detach()
    assert bus._state.observers.everyone == ()


# Where nobody handles an event


@pytest.mark.parametrize(("debug", "level"), [(True, logging.WARNING), (False, logging.INFO)])
async def test_that_nobody_handles_an_event_is_a_warning_in_debug_mode(
    caplog: pytest.LogCaptureFixture, debug: bool, level: int
) -> None:
    class Unheard: ...

    caplog.set_level(logging.INFO, "eventkit")
    bus = EventBus(name="shop", debug=debug)
    EventBus(name="audit").subscribe(object, nothing)  # handles every event, so not this one
    async with bus.context():
        bus.publish(Unheard(), Unheard())
    await bus.dispatch(Unheard())

    [record] = caplog.records
    assert record.levelno == level
    assert facts_of(record) == {"event_type": type_name(Unheard), "bus": "shop"}


async def test_that_nobody_handles_an_event_names_the_other_buses_that_have_a_handler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Base: ...

    class Sent(Base): ...

    caplog.set_level(logging.INFO, "eventkit")
    here = EventBus(name="shop")
    others = [EventBus(name=name) for name in ("mail", "shop", "audit", "billing", "mail")]
    others[4].subscribe(Sent, nothing)
    others[0].subscribe(Sent, nothing)
    others[1].subscribe(Base, nothing)
    others[2].subscribe(object, nothing)
    others[3].subscribe(Sent, nothing).cancel()
    await here.dispatch(Sent())

    [record] = caplog.records
    assert facts_of(record)["handled_by"] == "another bus 'mail', another bus 'shop'"


async def test_a_bus_that_is_gone_is_named_no_more(caplog: pytest.LogCaptureFixture) -> None:
    class Sent: ...

    caplog.set_level(logging.INFO, "eventkit")
    other = EventBus(name="mail")
    other.subscribe(Sent, nothing)
    gone = ref(other)
    del other
    gc.collect()
    await EventBus(name="shop").dispatch(Sent())

    assert gone() is None
    assert "handled_by" not in facts_of(caplog.records[0])


# Subscribing again and again


AGAIN = "one place subscribes in each unit of work, and never cancels"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [facts_of(each) for each in caplog.records if each.getMessage().startswith(AGAIN)]


@pytest.mark.parametrize("how", ["subscribe", "on", "include"])
def test_an_endpoint_that_subscribes_is_told_so_once(
    caplog: pytest.LogCaptureFixture, how: str
) -> None:
    bus = EventBus(name="shop")
    app = FastAPI()
    app.add_middleware(EventContextMiddleware, bus=bus)
    places: list[str] = []

    @app.post("/")
    def endpoint() -> None:
        async def mail(event: OrderPaid) -> None: ...

        if how == "subscribe":
            bus.subscribe(OrderPaid, mail)
        elif how == "on":
            bus.on(OrderPaid)(mail)
        else:
            router = EventRouter()
            router.on(OrderPaid)(mail)
            bus.include(router)
        places.append(bus.handlers_for(OrderPaid)[-1].subscribed_at)

    client = TestClient(app)
    client.post("/")
    assert warnings_of(caplog) == []
    for _ in range(3):
        client.post("/")

    handler = f"{__name__}:{mail_in(endpoint)}"
    assert warnings_of(caplog) == [
        {
            "subscribed_at": places[0],
            "handler": handler,
            "event_type": type_name(OrderPaid),
            "bus": "shop",
        }
    ]
    assert caplog.records[0].levelno == logging.WARNING
    assert len(bus.describe()) == 4


def mail_in(endpoint: Any) -> str:
    return f"{endpoint.__qualname__}.<locals>.mail"


async def test_a_handler_that_subscribes_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()

    @bus.on(str)
    async def handle(event: str) -> None:
        bus.subscribe(int, partial(count))

    for _ in range(3):
        await bus.dispatch("a")

    assert len(warnings_of(caplog)) == 1


async def test_who_subscribes_in_a_unit_of_work_and_cancels_is_told_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = EventBus()

    async def follow(left: list[int]) -> None:
        """As requests do whose responses overlap, each with a subscription of its own."""
        async with bus.context():
            with bus.subscribe(int, partial(count)):
                if left:
                    await follow(left[1:])

    for _ in range(3):
        await follow([1, 2, 3])

    assert warnings_of(caplog) == []


async def test_who_subscribes_several_handlers_in_one_unit_of_work_or_outside_is_told_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = EventBus()
    async with bus.context():
        for _ in range(5):
            bus.subscribe(int, partial(count))
    for _ in range(5):
        bus.subscribe(int, partial(count))
        async with bus.context():
            pass

    assert warnings_of(caplog) == []


async def test_each_place_is_told_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    for _ in range(3):
        async with bus.context():
            bus.subscribe(int, partial(count))
            bus.subscribe(int, partial(count))

    first, second = warnings_of(caplog)
    assert first["subscribed_at"] != second["subscribed_at"]
