"""What the core knows of durable handlers, without a database."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware

from eventkit import (
    DuplicateNameError,
    Durable,
    EventBus,
    EventRouter,
    InvalidHandlerError,
    NoOutboxError,
)
from eventkit._core.bus import registry_of, state_of
from eventkit._core.durable import doubling
from eventkit._core.stats import Stats
from eventkit.starlette import EventContextMiddleware
from tests.asgi import client_of, lifespan_of
from tests.conftest import Backend
from tests.core.keepers import FakeKeeper
from tests.witness import Number, assert_settled, witnessed


def handle(event: object) -> None:
    """A durable handler."""


def other(event: object) -> None:
    """Another one."""


_LAMBDA: Callable[[Number], None] = lambda event: None  # noqa: E731


class Callable_:  # noqa: N801
    def __call__(self, event: Number) -> None: ...


def durables(bus: EventBus) -> list[Durable | None]:
    return [subscription.durable for subscription in registry_of(bus)]


# Subscribing


def test_a_handler_is_durable_by_each_way_to_subscribe() -> None:
    given = Durable(attempts=3)
    bus, router = EventBus(), EventRouter()
    bus.on(Number, durable=True)(handle)
    bus.subscribe(str, partial(other), name="partial", durable=given)
    router.on(Number, durable=given)(other)
    router.on(bytes)(other)
    bus.include(router)

    assert durables(bus) == [Durable(), given, given, None]
    assert [entry["durable"] for entry in bus.describe()] == [True, True, True, False]


def test_explain_says_what_becomes_of_durable_deliveries() -> None:
    bus = EventBus()
    bus.on(Number, durable=Durable(attempts=3, key=str))(handle)
    bus.on(Number, durable=True)(other)
    bus.on(Number)(handle_in_memory)

    assert bus.explain(Number).count("the bus has no outbox, so it runs in memory") == 2
    FakeKeeper(bus)
    text = bus.explain(Number)
    assert "kept until it is done, for at most 3 attempts, in order of its key" in text
    assert "kept until it is done, for at most 25 attempts\n" in text
    assert text.count("   durable:") == 2


def handle_in_memory(event: Number) -> None: ...


@pytest.mark.parametrize("value", [None, 1, 0, "yes", Durable])
def test_durable_takes_a_bool_or_a_durable(value: Any) -> None:
    bus, router = EventBus(), EventRouter()

    with pytest.raises(TypeError, match="durable takes True, False or a Durable"):
        bus.subscribe(Number, handle, durable=value)
    with pytest.raises(TypeError, match="durable takes True, False or a Durable"):
        router.on(Number, durable=value)(handle)

    assert durables(bus) == []


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (TypeError, {"attempts": 2.0}),
        (TypeError, {"attempts": True}),
        (ValueError, {"attempts": 0}),
        (TypeError, {"backoff": 3}),
        (TypeError, {"key": "order_id"}),
        (TypeError, {"formerly": "shop:receipt"}),
        (TypeError, {"formerly": {"shop:receipt"}}),
        (TypeError, {"formerly": [7]}),
    ],
    ids=str,
)
def test_bad_values_are_refused_where_they_are_written(
    error: type[Exception], options: dict[str, Any]
) -> None:
    (name,) = options

    with pytest.raises(error, match=name):
        Durable(**options)


def test_pauses_double_up_to_an_hour_thirteen_hours_in_all() -> None:
    pauses = [doubling(attempt, LookupError()) for attempt in range(1, 25)]

    assert pauses[:5] == [1, 2, 4, 8, 16]
    assert pauses[-1] == 3600
    assert doubling(10_000, LookupError()) == 3600
    assert 12 * 3600 < sum(pause or 0 for pause in pauses) < 14 * 3600


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: _LAMBDA, "a lambda"),
        (lambda: partial(handle), "a partial"),
        (lambda: Callable_(), "an object with __call__"),  # noqa: PLW0108
        (lambda: closure(), "defined in a function"),  # noqa: PLW0108
    ],
    ids=["lambda", "partial", "object", "closure"],
)
def test_a_durable_handler_is_found_by_its_name_in_another_process(
    make: Callable[[], Any], kind: str
) -> None:
    bus = EventBus()

    with pytest.raises(InvalidHandlerError, match=f"{kind}.*Give it a name that never changes"):
        bus.subscribe(Number, make(), durable=True)
    bus.subscribe(Number, make(), durable=True, name="shop:receipt")

    assert [subscription.name for subscription in registry_of(bus)] == ["shop:receipt"]


def closure() -> Callable[[Number], None]:
    def receipt(event: Number) -> None: ...

    return receipt


def twin() -> Callable[[Number], None]:
    """Another handler with the name of `handle`."""

    def handle(event: Number) -> None: ...

    handle.__qualname__ = "handle"
    return handle


def test_two_durable_handlers_have_two_names() -> None:
    bus = EventBus()
    bus.subscribe(Number, handle, durable=True)
    bus.subscribe(str, handle, durable=True)  # the same handler of another event

    with pytest.raises(DuplicateNameError):
        bus.subscribe(Number, other, durable=True, name=f"{__name__}:handle")
    with pytest.raises(DuplicateNameError):
        bus.subscribe(Number, twin(), durable=True)
    subscription = bus.subscribe(Number, twin())  # whose deliveries nobody has to find
    subscription.cancel()
    for each in [*registry_of(bus)]:
        each.cancel()
    bus.subscribe(Number, twin(), durable=True)


def test_an_outbox_is_asked_before_anything_is_subscribed() -> None:
    bus = EventBus()
    keeper = FakeKeeper(bus)

    def refuse(declarations: object) -> None:
        raise LookupError

    bus.subscribe(Number, handle, durable=True)
    keeper.admit = refuse  # type: ignore[method-assign]
    with pytest.raises(LookupError):
        bus.subscribe(Number, other, durable=True)

    assert keeper.told == [f"admit {__name__}:handle"]
    assert len(durables(bus)) == 1


def test_the_front_door_imports_nothing_that_an_outbox_needs() -> None:
    heavy = "{'sqlalchemy', 'pydantic', 'msgspec'}"
    script = f"import eventkit, sys; print(sorted({heavy} & {{*sys.modules}}))"

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.strip() == "[]"


# Without an outbox


@pytest.mark.anyio
async def test_without_an_outbox_durable_handlers_run_in_memory_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = EventBus()
    bus.on(Number, durable=True)(handle)
    other_bus = EventBus(name="other")
    other_bus.on(Number, durable=True)(handle)

    async with bus.context():
        bus.publish(Number(1))
    assert caplog.text == ""  # tests need no outbox
    monkeypatch.delenv("PYTEST_VERSION")
    for each in (bus, other_bus, other_bus):
        async with each.context():
            each.publish(Number(1))

    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert "Outbox(bus, engine)" in line.getMessage()
    assert "bus=other" in line.getMessage()
    assert (bus.stats.handled, other_bus.stats.handled) == (2, 2)


@pytest.mark.anyio
async def test_an_application_with_durable_handlers_does_not_start_without_an_outbox() -> None:
    bus = EventBus(name="shop")
    bus.on(Number, durable=True)(handle)
    bus.on(str, durable=True)(handle)
    app = Starlette(middleware=[Middleware(EventContextMiddleware, bus=bus)])

    trace: list[str] = []
    async with lifespan_of(app, trace) as lifespan:
        pass

    assert trace == ["startup.failed"]
    assert isinstance(lifespan.error, NoOutboxError)
    assert str(lifespan.error) == (
        f"bus 'shop' has durable handlers ({__name__}:handle) but no outbox. Create one where you "
        "set up the application: Outbox(bus, engine)"
    )


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("is_durable", "needs"),
    [
        (False, "durable consumers (billing, stock)"),
        (True, f"durable handlers ({__name__}:handle) and durable consumers (billing, stock)"),
    ],
)
async def test_nor_does_one_whose_consumers_hand_messages_to_an_outbox(
    is_durable: bool, needs: str
) -> None:
    bus = EventBus(name="shop")
    bus.on(Number, durable=is_durable)(handle)
    for consumer in ("billing", "stock", "billing"):
        state_of(bus).need_keeper(consumer)
    app = Starlette(middleware=[Middleware(EventContextMiddleware, bus=bus)])

    async with lifespan_of(app, []) as lifespan:
        pass

    assert isinstance(lifespan.error, NoOutboxError)
    assert str(lifespan.error) == (
        f"bus 'shop' has {needs} but no outbox. Create one where you set up the application: "
        "Outbox(bus, engine)"
    )


@pytest.mark.anyio
async def test_an_application_whose_outbox_cannot_run_does_not_start() -> None:
    bus = EventBus()
    keeper = FakeKeeper(bus)
    keeper.error = RuntimeError("on trio use a blocking engine")
    app = Starlette(middleware=[Middleware(EventContextMiddleware, bus=bus)])

    trace: list[str] = []
    async with lifespan_of(app, trace) as lifespan:
        pass

    assert trace == ["startup.failed"]
    assert lifespan.error is keeper.error


def test_a_service_lives_as_long_as_the_application(anyio_backend: Backend) -> None:
    bus = EventBus()
    keeper = FakeKeeper(bus)
    bus.on(Number, durable=True)(handle)
    app = Starlette(middleware=[Middleware(EventContextMiddleware, bus=bus, concurrency=7)])
    keeper.told.clear()

    with client_of(app, anyio_backend):
        assert keeper.told == ["serve 7", "start"]

    assert [*dict.fromkeys(keeper.told)] == ["serve 7", "start", "stop", "leave"]


# Failures


@pytest.mark.anyio
async def test_a_failure_is_a_warning_while_attempts_are_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = EventBus()
    for name, durable in (("in memory", False), ("kept", True), ("last", Durable(attempts=1))):

        @bus.on(Number, durable=durable, name=name)
        async def fail(event: Number) -> None:
            raise LookupError

    FakeKeeper(bus)
    async with bus.context():
        bus.publish(Number(1))

    levels = {
        name: record.levelno
        for record in caplog.records
        for name in ("in memory", "kept", "last")
        if f"handler={name}" in record.getMessage()
    }
    assert levels == {"in memory": logging.ERROR, "kept": logging.WARNING, "last": logging.ERROR}
    assert "attempt=1 of 25" in caplog.text


# What is kept


def test_what_is_requeued_is_a_counter_of_its_own() -> None:
    bus = EventBus()

    assert isinstance(bus.stats, Stats)
    assert bus.stats.requeued == 0


@pytest.fixture
def kept() -> Iterator[tuple[EventBus, FakeKeeper, list[str]]]:
    """A bus with a durable handler and one in memory, its keeper, and what a witness sees."""
    bus = EventBus()
    bus.subscribe(Number, lambda event: None, durable=True, name="kept", thread=False)
    bus.subscribe(Number, lambda event: None, name="memory", thread=False)
    yield bus, FakeKeeper(bus), witnessed(bus)
    assert_settled(bus)


@pytest.mark.anyio
async def test_what_may_not_run_here_is_requeued_and_its_siblings_run(
    kept: tuple[EventBus, FakeKeeper, list[str]],
) -> None:
    bus, keeper, seen = kept
    keeper.may_run = False

    async with bus.context() as unit:
        bus.publish(Number(1))
        unit.release()
        report = await unit.drain()

    assert (report.handled, report.failures, report.requeued) == (1, (), 1)
    assert seen == ["requeued 1", "handled 1"]
    assert (bus.stats.handled, bus.stats.requeued) == (1, 1)
    assert keeper.told[0] == "write 1"
    assert keeper.told[-1] == "settle"


@pytest.mark.anyio
async def test_what_is_kept_outlives_its_subscription(
    kept: tuple[EventBus, FakeKeeper, list[str]],
) -> None:
    bus, keeper, seen = kept

    async with bus.context() as unit:
        bus.publish(Number(1))
        (envelope,) = state_units(bus, unit)
        envelope.rows.written = True
        for subscription in [*registry_of(bus)]:
            subscription.cancel()

    assert seen == ["discarded 1", "requeued 1"]
    assert "kept" not in " ".join(keeper.told)


def state_units(bus: EventBus, unit: Any) -> Any:
    """The envelopes that wait in the unit of work."""
    assert unit._unit.state is state_of(bus)
    return unit._unit.queue.staged


@pytest.mark.anyio
async def test_what_is_discarded_was_never_kept(
    kept: tuple[EventBus, FakeKeeper, list[str]],
) -> None:
    bus, keeper, seen = kept

    with suppress(LookupError):
        async with bus.context():
            bus.publish(Number(1))
            raise LookupError

    assert seen == ["discarded 1", "discarded 1"]
    assert keeper.told == []


@pytest.mark.anyio
async def test_a_dispatch_keeps_nothing(kept: tuple[EventBus, FakeKeeper, list[str]]) -> None:
    bus, keeper, seen = kept

    await bus.dispatch(Number(1))

    assert seen == ["handled 1", "handled 1"]
    assert not [each for each in keeper.told if each.startswith(("write", "handled"))]
