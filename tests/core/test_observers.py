"""Observers, the reporter of failures, and the log: told everything, felt by nobody."""

import asyncio
import logging
import re
from collections.abc import Generator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
import structlog
from anyio import CancelScope, create_task_group
from anyio.lowlevel import checkpoint
from structlog.testing import LogCapture

from eventkit import Delivery, EventBus, HandlerTimeoutError, Observer, current_delivery
from tests.witness import Number, assert_settled, calling, witnessed

pytestmark = pytest.mark.anyio

HOOKS = ["published", "discarded", "undelivered", "delivery", "entering", "leaving"]
span: ContextVar[str] = ContextVar("span", default="none")


class Recorder(Observer):
    """Notes every call of every hook, and fails in one of them if asked to."""

    def __init__(self, name: str = "", *, failing: str = "") -> None:
        self.name = name
        self.calls: list[str] = []
        self.failing = failing

    def note(self, hook: str, told: object) -> None:
        self.calls.append(f"{self.name}{hook} {told}")
        if self.failing == hook:
            raise LookupError(hook)

    def published(self, event: object, deliveries: Sequence[Delivery]) -> None:
        self.note("published", f"{event} to {len(deliveries)}")

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        self.note("discarded", [delivery.event for delivery in deliveries])

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        self.note("undelivered", [delivery.event for delivery in deliveries])

    def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
        self.note("delivery", delivery.event)
        return self.surround(delivery)

    @contextmanager
    def surround(self, delivery: Delivery) -> Generator[None]:
        self.note("entering", delivery.event)
        outcome = "handled"
        try:
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self.note("leaving", f"{delivery.event}: {outcome}")


@pytest.fixture
def bus() -> EventBus:
    """A bus whose handler of strings fails for `bad` and waits for ever for `stuck`."""
    bus = EventBus()

    @bus.on(str, name="handle")
    async def handle(event: str) -> None:
        if event == "bad":
            raise ValueError(event)
        if event == "stuck":
            await anyio.sleep_forever()
        if event == "cause":
            bus.publish("caused")

    return bus


async def everything(bus: EventBus) -> None:
    """Let each hook be called."""
    with CancelScope() as scope:
        async with bus.context() as unit:
            bus.publish("dropped")
            unit.discard()
            bus.publish("cause", "bad")
            async with create_task_group() as tasks:
                bus.publish("stuck")
                tasks.start_soon(unit.drain)
                while bus.stats.failed == 0 or bus.stats.running == 0:
                    await checkpoint()
                scope.cancel()


async def test_observers_are_told_everything_in_order(bus: EventBus) -> None:
    recorder = Recorder()
    bus.observe(recorder)

    async with bus.context():
        bus.publish("cause", Number(1))
        with suppress(LookupError):
            async with bus.context():
                bus.publish("x", "y")
                raise LookupError

    assert recorder.calls == [
        "published cause to 1",
        "published 1 to 0",
        "published x to 1",
        "published y to 1",
        "discarded ['x', 'y']",
        "delivery cause",
        "entering cause",
        "published caused to 1",
        "leaving cause: handled",
        "delivery caused",
        "entering caused",
        "leaving caused: handled",
    ]


async def test_observers_are_told_of_a_dispatch_too(bus: EventBus) -> None:
    recorder = Recorder()
    bus.observe(recorder)

    await bus.dispatch("a")

    assert recorder.calls == [
        "published a to 1",
        "delivery a",
        "entering a",
        "leaving a: handled",
    ]


async def test_observers_are_told_the_outcome(bus: EventBus, anyio_backend_name: str) -> None:
    recorder = Recorder()
    bus.observe(recorder)

    await everything(bus)

    cancelled = {"asyncio": "CancelledError", "trio": "Cancelled"}[anyio_backend_name]
    assert [call for call in recorder.calls if call.startswith(("leaving", "un"))] == [
        "leaving cause: handled",
        "leaving bad: ValueError",
        f"leaving stuck: {cancelled}",
        "undelivered ['stuck']",
        "undelivered ['caused']",
    ]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(
    ("limit", "own_limit"), [pytest.param(None, 1e-9, id="own"), pytest.param(1e-9, ..., id="bus")]
)
async def test_observers_see_a_timeout_as_the_failure_it_is(
    limit: float | None, own_limit: Any, sequential: bool
) -> None:
    bus = EventBus(handler_timeout=limit, sequential=sequential)
    recorder = Recorder()
    bus.observe(recorder)

    @bus.on(str, timeout=own_limit)
    async def stuck(event: str) -> None:
        await anyio.sleep_forever()

    async with bus.context() as unit:
        bus.publish("a")
        report = await unit.drain()

    assert recorder.calls[-1] == "leaving a: HandlerTimeoutError"
    assert isinstance(report.failures[0].error, HandlerTimeoutError)


async def test_an_observer_cannot_swallow_a_failure(bus: EventBus) -> None:
    class Swallower(Observer):
        def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
            return suppress(ValueError)

    bus.observe(Swallower())
    async with bus.context():
        bus.publish("bad")

    assert bus.stats.failed == 1


async def test_the_first_observer_is_outermost(bus: EventBus) -> None:
    calls: list[str] = []
    for name in ("1 ", "2 "):
        recorder = Recorder(name)
        recorder.calls = calls
        bus.observe(recorder)

    await bus.dispatch("a")

    assert [call for call in calls if "ing" in call] == [
        "1 entering a",
        "2 entering a",
        "2 leaving a: handled",
        "1 leaving a: handled",
    ]


@pytest.mark.parametrize("thread", [False, True])
async def test_what_an_observer_sets_is_visible_in_the_handler_and_nowhere_else(
    thread: bool,
) -> None:
    class Tracer(Observer):
        @contextmanager
        def delivery(self, delivery: Delivery) -> Generator[None]:
            token = span.set(f"{span.get()} > {delivery.handler}")
            yield
            span.reset(token)

    bus = EventBus()
    bus.observe(Tracer())
    spans: list[str] = []
    for name in ("first", "second"):
        bus.subscribe(int, calling(lambda: spans.append(span.get())), name=name, thread=thread)

    span.set("publisher")
    async with bus.context():
        bus.publish(1)
        span.set("later")

    assert sorted(spans) == ["publisher > first", "publisher > second"]
    assert span.get() == "later"


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_raising_observer_is_logged_and_never_felt(
    bus: EventBus, hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, broken = Recorder(), Recorder(failing=hook)
    bus.observe(broken)
    bus.observe(recorder)

    await everything(bus)

    assert [call.split()[0] for call in recorder.calls if call.startswith("undel")] == [
        "undelivered",
        "undelivered",
    ]
    stats = bus.stats
    assert (stats.handled, stats.failed, stats.discarded, stats.undelivered) == (1, 1, 1, 2)
    assert_settled(bus)
    lines = [line for line in caplog.records if line.message.startswith("an observer failed")]
    assert lines
    for line in lines:
        assert line.exc_info is not None
        assert isinstance(line.exc_info[1], LookupError)
        assert "test_observers.Recorder" in line.message


async def test_an_observer_whose_surrounding_fails_in_the_middle_is_logged(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    class Misfit(Observer):
        def delivery(self, delivery: Delivery) -> AbstractContextManager[object]:
            return 1  # type: ignore[return-value] # pyright: ignore[reportReturnType]

    bus.observe(Misfit())
    await bus.dispatch("a")

    assert bus.stats.handled == 1
    assert [line.message[:18] for line in caplog.records] == ["an observer failed"]


async def test_a_detached_observer_is_told_nothing_more(bus: EventBus) -> None:
    recorder, other = Recorder(), Recorder()
    with bus.observe(recorder) as observation:
        bus.observe(other)
        await bus.dispatch("a")
    observation.detach()
    await bus.dispatch("b")

    assert [call[:11] for call in recorder.calls] == [call[:11] for call in other.calls[:4]]
    assert len(other.calls) == 8


async def test_an_observer_attached_midway_is_told_from_then_on(bus: EventBus) -> None:
    recorder = Recorder()
    async with bus.context():
        bus.publish("a")
        bus.observe(recorder)

    assert recorder.calls == ["delivery a", "entering a", "leaving a: handled"]


async def test_a_delivery_that_runs_when_its_observer_is_detached_still_tells_its_end() -> None:
    bus = EventBus()
    recorder = Recorder()
    observation = bus.observe(recorder)
    bus.subscribe(int, calling(observation.detach), thread=False)

    await bus.dispatch(1)

    assert recorder.calls[-1] == "leaving 1: handled"


async def test_observing_twice_tells_twice_and_each_handle_ends_its_own(bus: EventBus) -> None:
    recorder = Recorder()
    bus.observe(recorder)
    second = bus.observe(recorder)
    await bus.dispatch("a")
    assert len(recorder.calls) == 8
    second.detach()
    second.detach()
    await bus.dispatch("b")

    assert len(recorder.calls) == 12


async def test_an_observer_needs_to_override_nothing(bus: EventBus) -> None:
    bus.observe(Observer())

    await everything(bus)

    assert_settled(bus)


@pytest.mark.parametrize("thing", [Observer, object(), print])
def test_only_an_instance_of_observer_can_observe(bus: EventBus, thing: Any) -> None:
    with pytest.raises(TypeError) as error:
        bus.observe(thing)
    assert str(error.value) == f"observe() takes an instance of eventkit.Observer, not {thing!r}"


# What becomes of failures that nobody awaits


class Secret:
    """An event whose payload must not be logged."""

    def __repr__(self) -> str:
        return "the payload"


@pytest.fixture
def failing() -> EventBus:
    """A bus whose only handler fails."""
    bus = EventBus(name="shop")

    @bus.on(Secret, name="mail")
    async def mail(event: Secret) -> None:
        raise ValueError("no connection")

    return bus


async def publish(bus: EventBus, event: object) -> None:
    async with bus.context():
        bus.publish(event)


async def test_a_failure_leaves_one_line_with_its_traceback_and_without_the_payload(
    failing: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    async with failing.context() as unit:
        failing.publish(Secret())
        delivery = unit.pending[0]

    [line] = caplog.records
    assert (line.name, line.levelno) == ("eventkit", logging.ERROR)
    kind = f"{Secret.__module__}.Secret"
    assert line.message == (
        f"event handler failed: event_type={kind} handler=mail delivery_id={delivery.id}"
    )
    assert vars(line)["eventkit"] == {
        "event_type": kind,
        "handler": "mail",
        "delivery_id": str(delivery.id),
    }
    assert line.exc_info is not None
    assert repr(line.exc_info[1]) == "ValueError('no connection')"
    assert "the payload" not in caplog.text
    assert 'raise ValueError("no connection")' in caplog.text


async def test_a_dispatch_raises_its_failures_instead_of_reporting_them(
    failing: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ExceptionGroup):
        await failing.dispatch(Secret())

    assert caplog.records == []


async def test_what_is_dropped_leaves_a_line_with_types_and_counts(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    class Text(str):
        __slots__ = ()

    with caplog.at_level(logging.INFO), CancelScope() as scope:
        async with bus.context() as unit:
            bus.publish("dropped", "too", Text())
            unit.discard()
            bus.publish("stuck")
            scope.cancel()

    text = f"{Text.__module__}.{Text.__qualname__}"
    assert [(line.levelname, line.message) for line in caplog.records] == [
        (
            "INFO",
            "deliveries discarded: bus=default deliveries=3 "
            f"event_types=builtins.str x2, {text} x1",
        ),
        (
            "ERROR",
            "deliveries undelivered: bus=default deliveries=1 event_types=builtins.str x1",
        ),
    ]


async def test_report_failure_can_be_replaced(
    failing: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, str]] = []

    def tell(delivery: Delivery, error: Exception) -> None:
        told.append((delivery.handler, repr(error)))

    failing.report_failure = tell
    await publish(failing, Secret())

    assert failing.report_failure is tell
    assert told == [("mail", "ValueError('no connection')")]
    assert caplog.records == []


async def test_a_raising_reporter_is_logged_and_so_is_what_it_was_to_report(
    failing: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(delivery: Delivery, error: Exception) -> None:
        raise KeyError("broken")

    failing.report_failure = broken
    await publish(failing, Secret())

    assert [line.message.split(": ")[0] for line in caplog.records] == [
        "report_failure failed",
        "event handler failed",
    ]
    assert failing.stats.failed == 1
    assert_settled(failing)


async def test_the_reporter_is_called_in_the_context_variables_of_the_handler() -> None:
    bus = EventBus()
    spans: list[str] = []

    def report(delivery: Delivery, error: Exception) -> None:
        spans.append(span.get())

    bus.report_failure = report

    @bus.on(Secret)
    async def fail(event: Secret) -> None:
        span.set("set by the handler")
        raise ValueError

    await publish(bus, Secret())

    assert spans == ["set by the handler"]


# structlog, where the application has configured it


@pytest.fixture
def structured() -> Generator[list[MutableMapping[str, Any]]]:
    """What structlog is given to write, once it is configured."""
    capture = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    try:
        yield capture.entries
    finally:
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()


async def test_where_structlog_is_configured_it_gets_the_line(
    failing: EventBus,
    structured: list[MutableMapping[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await publish(failing, Secret())

    [line] = structured
    error = line.pop("exc_info")
    assert repr(error) == "ValueError('no connection')"
    assert re.fullmatch("[0-9a-f-]{36}", line.pop("delivery_id"))
    assert line == {
        "event": "event handler failed",
        "log_level": "error",
        "event_type": f"{Secret.__module__}.Secret",
        "handler": "mail",
    }
    assert caplog.records == []


async def test_a_structured_line_without_an_error_carries_none(
    failing: EventBus, structured: list[MutableMapping[str, Any]]
) -> None:
    async with failing.context() as unit:
        unit.publish(Secret())
        unit.discard()

    [line] = structured
    assert line == {
        "event": "deliveries discarded",
        "log_level": "info",
        "bus": failing.name,
        "deliveries": 1,
        "event_types": f"{Secret.__module__}.Secret x1",
    }


async def test_what_a_handler_logs_says_which_event_and_handler_it_was(
    structured: list[MutableMapping[str, Any]],
) -> None:
    bus = EventBus()
    ids: list[str] = []

    @bus.on(Secret, name="mail")
    async def mail(event: Secret) -> None:
        ids.append(str(current_delivery().id))
        structlog.get_logger().info("sent")
        bus.publish("sent")

    @bus.on(str, name="archive", thread=True)
    def archive(event: str) -> None:
        ids.append(str(current_delivery().id))
        structlog.get_logger().info("archived")

    structlog.contextvars.bind_contextvars(request="r1")
    await publish(bus, Secret())
    structlog.get_logger().info("done")

    assert structured == [
        {
            "event": "sent",
            "log_level": "info",
            "request": "r1",
            "event_type": f"{Secret.__module__}.Secret",
            "handler": "mail",
            "delivery_id": ids[0],
        },
        {
            "event": "archived",
            "log_level": "info",
            "request": "r1",
            "event_type": "builtins.str",
            "handler": "archive",
            "delivery_id": ids[1],
        },
        {"event": "done", "log_level": "info", "request": "r1"},
    ]


async def test_what_a_handler_logs_and_its_failure_have_the_same_delivery_id(
    structured: list[MutableMapping[str, Any]],
) -> None:
    bus = EventBus()

    @bus.on(Secret, name="mail")
    async def mail(event: Secret) -> None:
        structlog.get_logger().info("sending")
        raise ValueError("no connection")

    await publish(bus, Secret())

    sending, failed = structured
    assert sending["delivery_id"] == failed["delivery_id"]


async def test_where_no_line_would_show_it_nothing_is_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To name the delivery costs more than a short handler."""
    bus = EventBus()
    bound: list[dict[str, Any]] = []
    bus.subscribe(Secret, calling(lambda: bound.append(structlog.contextvars.get_contextvars())))
    monkeypatch.setattr(Delivery, "id", property(lambda self: pytest.fail("an id was made")))
    await publish(bus, Secret())
    structlog.configure(processors=[LogCapture()])
    try:
        await publish(bus, Secret())
    finally:
        structlog.reset_defaults()

    assert bound == [{}, {}]


@pytest.mark.parametrize(
    "wrapper",
    [
        structlog.BoundLogger,
        structlog.stdlib.BoundLogger,
        structlog.make_filtering_bound_logger(logging.DEBUG),
    ],
)
async def test_each_kind_of_structlog_logger_will_do(
    failing: EventBus, wrapper: type, capsys: pytest.CaptureFixture[str]
) -> None:
    structlog.configure(
        wrapper_class=wrapper,
        processors=[structlog.processors.KeyValueRenderer()],
        logger_factory=structlog.PrintLoggerFactory(),
    )
    try:
        await publish(failing, Secret())
    finally:
        structlog.reset_defaults()

    assert "event='event handler failed'" in capsys.readouterr().out


def test_the_asynchronous_logger_of_structlog_will_do_too(
    failing: EventBus, capsys: pytest.CaptureFixture[str]
) -> None:
    structlog.configure(
        wrapper_class=structlog.stdlib.AsyncBoundLogger,
        processors=[structlog.processors.KeyValueRenderer()],
        logger_factory=structlog.PrintLoggerFactory(),
    )
    try:
        asyncio.run(publish(failing, Secret()))
    finally:
        structlog.reset_defaults()

    assert "event='event handler failed'" in capsys.readouterr().out


async def test_a_line_that_structlog_cannot_write_goes_to_the_standard_library(
    failing: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    def needs_a_request(logger: object, name: str, line: MutableMapping[str, Any]) -> str:
        return str(line["request_id"])

    seen = witnessed(failing)
    structlog.configure(processors=[needs_a_request])
    try:
        async with failing.context():
            failing.publish(Secret(), Secret())
    finally:
        structlog.reset_defaults()

    assert seen == ["failed the payload", "failed the payload"]
    assert_settled(failing)
    for line in caplog.records:
        assert line.message.startswith("event handler failed: ")
        assert line.message.endswith("structlog_failed=KeyError('request_id')")
    assert len(caplog.records) == 2


async def test_an_unconfigured_structlog_prints_nothing(
    failing: EventBus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not structlog.is_configured()
    await publish(failing, Secret())

    assert capsys.readouterr().out == ""


def test_a_bare_observer_surrounds_with_nothing_and_adds_nothing() -> None:
    delivery = Delivery(1, "handler", None, 0, 1, 0, (0, 0))

    assert isinstance(Observer().delivery(delivery), nullcontext)
    assert Observer().headers(1) == {}


class Deciding(Observer):
    """Notes what units of work decide about each event, and fails if asked to."""

    def __init__(self, *, failing: bool = False) -> None:
        self.decided: list[str] = []
        self._failing = failing

    def released(self, events: Sequence[object]) -> None:
        self.decided.append(f"released {list(events)}")
        if self._failing:
            raise LookupError

    def withdrawn(self, events: Sequence[object]) -> None:
        self.decided.append(f"withdrawn {list(events)}")
        if self._failing:
            raise LookupError


@pytest.mark.parametrize("failing", [False, True])
async def test_what_becomes_of_each_event_is_told_once_handler_or_not(
    bus: EventBus, failing: bool
) -> None:
    deciding = Deciding(failing=failing)
    with bus.observe(deciding):
        async with bus.context() as unit:
            bus.publish("good", Number(1))
            unit.release()
            bus.publish("cause", Number(2))
            async with bus.context() as inner:
                bus.publish("nested", Number(3))
                inner.release()
            with suppress(LookupError):
                async with bus.context():
                    bus.publish("lost", Number(4))
                    bus.publish(Number(5), even_on_failure=True)
                    raise LookupError

    assert deciding.decided == [
        "released ['good', 1]",
        "released ['nested', 3]",
        "withdrawn ['lost', 4]",
        "released ['cause', 2, 5]",
        "released ['caused']",
    ]
    assert_settled(bus)


async def test_events_that_nobody_handles_fill_no_unit_of_work_that_is_watched() -> None:
    bus = EventBus(max_events=1)
    bus.subscribe(str, calling(int))
    with bus.observe(Deciding()):
        async with bus.context() as unit:
            bus.publish(*map(Number, range(10)))
            unit.discard()
            bus.publish("one", *map(Number, range(10)))
            unit.release()
            await unit.drain()
            bus.publish("another")

    assert bus.stats.handled == 2
