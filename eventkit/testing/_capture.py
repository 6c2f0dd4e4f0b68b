"""Owns the watching of one bus during a test: what became of events, waiting, and tidying up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Self, TypeVar

from anyio.lowlevel import checkpoint

from eventkit._core.bus import EventBus, registry_of, state_of
from eventkit._core.events import Delivery
from eventkit._core.loops.running import on_event_loop
from eventkit._core.stats import Outcome, Stats, Tally
from eventkit._core.turns import Failure
from eventkit.exceptions import EventContextUsageError, NoEventContextError
from eventkit.testing._fakes import Fake, Fakes, Named, subscriptions_of
from eventkit.testing._ledger import Fate, Ledger
from eventkit.testing._matching import describe, expectation, nearest_first
from eventkit.testing._recorder import EventList, Recording
from eventkit.testing._waiting import Patience, block_until, until, what_goes_on

E = TypeVar("E")

# How often a thread looks whether a drain has taken its last steps.
_GLANCE_SECONDS = 0.0005


class DeliveryList(EventList[object]):
    """Events as they were delivered: one entry for each run of a handler, in the order of ends.

    Attributes:
        deliveries: The deliveries, in the same order.
    """

    __slots__ = ("_names_of", "deliveries")

    def __init__(
        self,
        deliveries: Iterable[Delivery],
        /,
        *,
        what: str,
        names_of: Callable[[Named], set[str]],
    ) -> None:
        self.deliveries: tuple[Delivery, ...] = tuple(deliveries)
        super().__init__([delivery.event for delivery in self.deliveries], what=what)
        self._names_of = names_of

    def by(self, handler: Named) -> DeliveryList:
        """Those of one handler, given as the callable that was subscribed or by its name.

        Raises:
            LookupError: It is not subscribed; the message names the nearest that are.
        """
        names = self._names_of(handler)
        return DeliveryList(
            [each for each in self.deliveries if each.handler in names],
            what=self.what,
            names_of=self._names_of,
        )


class FailureList(list[Failure]):
    """Deliveries that failed, with their errors, in the order of failing."""

    __slots__ = ("_names_of",)

    def __init__(
        self, failures: Iterable[Failure], /, *, names_of: Callable[[Named], set[str]]
    ) -> None:
        super().__init__(failures)
        self._names_of = names_of

    def by(self, handler: Named) -> FailureList:
        """Those of one handler, given as the callable that was subscribed or by its name.

        Raises:
            LookupError: It is not subscribed; the message names the nearest that are.
        """
        names = self._names_of(handler)
        found = [each for each in self if each.delivery.handler in names]
        return FailureList(found, names_of=self._names_of)


class UnexpectedFailures(ExceptionGroup[Exception]):
    """Handlers failed during a test that did not ask about it. An `ExceptionGroup` of theirs."""

    def derive(  # type: ignore[override]
        self,
        excs: Sequence[Exception],  # pyright: ignore[reportIncompatibleMethodOverride]
        /,
    ) -> Self:
        """Keep the class when `split` and `subgroup` make a smaller group."""
        return type(self)(self.message, excs)


class EventCapture(Recording):
    """Watches a bus while a test runs, and leaves it as it was: what the fixture `capevents` is.

        with EventCapture(bus) as events:
            client.post("/users", json={"name": "Ada"})
            assert events.published == [UserCreated(1)]

    An event counts as published from `publish` on, with or without a handler, until its unit of
    work drops it: then, and for good, it counts as discarded. So inside an open unit of work what
    was published so far is there, and after a rollback it is not. Each list is a new one, as of
    that moment. Thread-safe, and for any number of event loops.

    The end of the block waits for deliveries that go on elsewhere, and leaves all as it was:
    subscriptions made or cancelled in it, fakes, counters, `report_failure`.

    Args:
        bus: The bus to watch.
        timeout: Seconds of real time that may be waited, at the end and where no other is given.

    Raises:
        TypeError: `bus` is none.
        UnexpectedFailures: At the end: a handler failed in a drain, not by a fake, and nobody has
            looked at `failures` since, or called `allow_failures`.
        AssertionError: At the end: an outbox has kept deliveries in a transaction of the test's
            own that was not committed, so nobody would ever run them.
        TimeoutError: At the end: deliveries still go on.
    """

    def __init__(self, bus: EventBus, *, timeout: float = 5.0) -> None:
        if not isinstance(bus, EventBus):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"EventCapture takes an EventBus, not {bus!r}")
        self.bus = bus
        self.timeout = timeout
        self._fakes = Fakes(bus)
        self._ledger = Ledger()
        self._unexpected: list[Exception] = []
        self._failures_allowed = False
        self._in_flight_before = 0
        self._unseen_before = Counter[str]()
        self._restore: list[Callable[[], object]] = []

    @property
    def published(self) -> EventList[object]:
        """The events that were published and not discarded, in the order of publishing."""
        ledger = self._ledger
        with ledger.changed:
            kept = [each.event for each in ledger.records if each.fate is not Fate.WITHDRAWN]
            return EventList(kept, what="published", dropped=ledger.dropped)

    @property
    def discarded(self) -> EventList[object]:
        """The events that their units of work dropped, with or without handlers."""
        with self._ledger.changed:
            return EventList(self._ledger.dropped, what="discarded")

    @property
    def handled(self) -> DeliveryList:
        """The events whose handlers ended well, one entry for each delivery."""
        with self._ledger.changed:
            return DeliveryList(self._ledger.successes, what="handled", names_of=self._names_of)

    @property
    def undelivered(self) -> DeliveryList:
        """The events that did not reach a handler, or not to its end: one for each delivery."""
        with self._ledger.changed:
            return DeliveryList(self._ledger.losses, what="undelivered", names_of=self._names_of)

    @property
    def requeued(self) -> DeliveryList:
        """The events that an outbox keeps for later, or for another process: one per delivery."""
        with self._ledger.changed:
            return DeliveryList(self._ledger.returns, what="requeued", names_of=self._names_of)

    @property
    def failures(self) -> FailureList:
        """The deliveries that failed, with their errors, in the order of failing.

        Looking at it says that the test knows of them.
        """
        self._unexpected.clear()
        with self._ledger.changed:
            return FailureList(self._ledger.failures, names_of=self._names_of)

    def allow_failures(self) -> None:
        """Let handlers fail without failing the test."""
        self._failures_allowed = True

    def caused_by(self, event: object) -> EventList[object]:
        """The published events that came of this one, or of one equal to it, at any depth."""
        with self._ledger.changed:
            kept = [each for each in self._ledger.records if each.fate is not Fate.WITHDRAWN]
        caused = [each.event for each in kept if each.comes_of(event)]
        return EventList(caused, what=f"caused by {describe(event)}")

    def record_only(self, *event_types: type, except_: type | tuple[type, ...] = ()) -> Fake:
        """Record events, and have nobody handle them.

        They obey their units of work as ever; no deliveries are counted. In force from now on,
        until the test ends, or the block that the result is used for as a context manager.

        Args:
            event_types: Of these types and their subclasses; of all types where none is given.
            except_: But not of these.

        Raises:
            InvalidEventTypeError: One of them is not a class.
        """
        return self._fakes.record_only(event_types, except_)

    def fail(
        self, handler: Named, error: Exception | type[Exception], *, times: int | None = None
    ) -> Fake:
        """Have a handler raise an error instead of doing its work.

        Deliveries that wait already are included. The failure is counted, observed and reported
        as any other, and does not fail the test. In force as long as `record_only` says.

        Args:
            handler: The callable that was subscribed, or its name.
            error: What to raise; of a class, a new instance each time.
            times: Fail so often, then work again; None for each time.

        Raises:
            LookupError: Nobody subscribed it; the message names the nearest that are.
            TypeError: `error` is no exception.
            ValueError: `times` is below 1.
        """
        return self._fakes.fail(handler, error, times)

    def delay(self, handler: Named, seconds: float) -> Fake:
        """Have a handler wait before it does its work, by the clock of its event loop.

        Under a virtual clock, trio's `MockClock` for instance, that takes no time. It counts for
        the handler's timeout. In force as long as `record_only` says.

        Args:
            handler: The callable that was subscribed, or its name.
            seconds: How long.

        Raises:
            LookupError: Nobody subscribed it; the message names the nearest that are.
            ValueError: `seconds` is no such number.
        """
        return self._fakes.delay(handler, seconds)

    async def idle(self, *, timeout: float | None = None) -> None:
        """Wait until everything has ended: all deliveries, and all that came of them.

        That is so when no unit of work has events that are undecided, waiting or running.

        Args:
            timeout: Seconds of real time, whatever the clock of the event loop says; left out,
                the capture's own.

        Raises:
            TimeoutError: Saying what goes on, and at which line.
            EventContextUsageError: It would wait for the unit of work that it is called in.
        """
        __tracebackhide__ = True
        self._refuse_waiting_for_self()
        with self._patience(timeout) as patience:
            await until(self._ledger, self._is_idle, patience, self._busy)
            while self._last_steps() and not patience.over:
                await checkpoint()

    def idle_sync(self, *, timeout: float | None = None) -> None:
        """As `idle`, for synchronous tests, whose application runs in another thread.

        As it does under Starlette's `TestClient`, used as a context manager.

        Raises:
            TimeoutError: Saying what goes on, and at which line.
            RuntimeError: It would block the event loop.
        """
        __tracebackhide__ = True
        self._refuse_blocking("idle()")
        self._refuse_waiting_for_self()
        with self._patience(timeout) as patience:
            block_until(self._ledger, self._is_idle, patience, self._busy)
            self._settle(patience)

    async def wait_for(
        self, event_type: type[E], /, *, timeout: float | None = None, **fields: object
    ) -> E:
        """Wait until such an event is published, and its unit of work has released it.

        One that was published before counts. Its handlers may still be running: `idle` waits for
        them.

        Args:
            event_type: Its class, or a base of it.
            timeout: As for `idle`.
            fields: Values that its fields have to have.

        Returns:
            The first such event.

        Raises:
            TimeoutError: Listing what was published instead, and saying what goes on.
            TypeError: The type has no such field.
        """
        __tracebackhide__ = True
        find = partial(self._find, event_type, fields)
        explain = partial(self._missing, event_type, fields)
        with self._patience(timeout) as patience:
            return (await until(self._ledger, find, patience, explain))[0]

    def wait_for_sync(
        self, event_type: type[E], /, *, timeout: float | None = None, **fields: object
    ) -> E:
        """As `wait_for`, for synchronous tests, whose application runs in another thread.

        Raises:
            TimeoutError: Listing what was published instead, and saying what goes on.
            TypeError: The type has no such field.
            RuntimeError: It would block the event loop.
        """
        __tracebackhide__ = True
        self._refuse_blocking("wait_for(...)")
        find = partial(self._find, event_type, fields)
        explain = partial(self._missing, event_type, fields)
        with self._patience(timeout) as patience:
            return block_until(self._ledger, find, patience, explain)[0]

    def __enter__(self) -> Self:
        bus, core = self.bus, state_of(self.bus)
        self._unseen_before = core.unseen.copy()
        report, stats = bus.report_failure, bus.stats
        self._in_flight_before = stats.pending + stats.running
        self._restore = [
            bus.observe(self._ledger).detach,
            partial(setattr, bus, "report_failure", report),
            self._fakes.end_all,
            registry_of(bus).keep(),
            partial(_rewind, core.tally, stats),
            partial(setattr, core, "unseen", self._unseen_before),
        ]

        def note(delivery: Delivery, error: Exception) -> None:
            if not self._fakes.provoked(error):
                self._unexpected.append(error)
            report(delivery, error)

        bus.report_failure = note
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        late = None if exc else self._wait_for_end()
        unseen = state_of(self.bus).unseen - self._unseen_before
        for restore in self._restore:
            restore()
        if exc is not None:
            return
        if self._unexpected and not self._failures_allowed:
            raise UnexpectedFailures(
                "handlers failed, and the test did not expect it. If it should, look at "
                "`failures`, provoke them with `fail`, or call `allow_failures()`, in pytest "
                "@pytest.mark.eventkit_allow_failures",
                self._unexpected,
            ) from late
        if unseen:
            raise AssertionError(_unseen(unseen)) from late
        if late is not None:
            raise late

    def __repr__(self) -> str:
        return f"<EventCapture of {self.bus!r}, {len(self.published)} published>"

    def _find(self, event_type: type[E], fields: Mapping[str, object]) -> tuple[E] | None:
        """The first released event that matches, boxed."""
        with self._ledger.changed:
            released = [each.event for each in self._ledger.records if each.fate is Fate.RELEASED]
        found = EventList(released).of(event_type, **fields)
        return (found[0],) if found else None

    def _is_idle(self) -> Literal[True] | None:
        return True if self._ledger.idle else None

    def _refuse_blocking(self, call: str) -> None:
        if on_event_loop():
            raise RuntimeError(f"this would block the event loop: `await capevents.{call}`")

    def _patience(self, timeout: float | None) -> Patience:
        return Patience(self.timeout if timeout is None else timeout, self._ledger)

    def _wait_for_end(self) -> TimeoutError | None:
        """Wait for what goes on without the test; returns why that was in vain.

        Units of work that are still open are their owners' business. On an event loop there is no
        waiting.
        """
        if self._ledger.quiet and not self._last_steps():
            return None
        explain = partial(self._busy, "the test is over, but these go on; wait with `idle()`:")
        with self._patience(0 if on_event_loop() else None) as patience:
            try:
                block_until(self._ledger, lambda: self._ledger.quiet or None, patience, explain)
            except TimeoutError as error:
                return error
            self._settle(patience)
        return None

    def _settle(self, patience: Patience) -> None:
        while self._last_steps() and not patience.over:
            time.sleep(_GLANCE_SECONDS)

    def _last_steps(self) -> bool:
        """Whether deliveries have ended for observers, and are still being counted and reported."""
        stats = self.bus.stats
        left = self._in_flight_before + len(self._ledger.pending)
        return stats.pending + stats.running > left or stats.units_draining > 0

    def _refuse_waiting_for_self(self) -> None:
        """Refuse to wait for the end of the caller's own unit of work."""
        try:
            unit = self.bus.current_context()
        except NoEventContextError:
            return
        if unit.pending:
            raise EventContextUsageError(
                "idle() would wait for the unit of work that surrounds it, which has "
                f"{len(unit.pending)} deliveries pending. Leave that first, or deliver them with "
                "`await bus.current_context().drain()`"
            )

    def _busy(self, head: str = "not idle:") -> str:
        return "\n".join([head, *what_goes_on(self._ledger, self.bus)])

    def _missing(self, event_type: type, fields: Mapping[str, object]) -> str:
        """What was published instead, and what has not ended."""
        head = f"no {expectation(event_type, fields)} was published"
        lines = [f"{head}, nor anything else"]
        if published := self.published:
            instead = nearest_first(published, event_type, fields)
            lines = [f"{head}; instead, nearest first:", *instead]
        if busy := what_goes_on(self._ledger, self.bus):
            lines += ["these have not ended:", *busy]
        return "\n".join(lines)

    def _names_of(self, handler: Named) -> set[str]:
        return {each.name for each in subscriptions_of(self.bus, handler)}


def _unseen(by_handler: Counter[str]) -> str:
    handlers = ", ".join(f"{name} x{times}" for name, times in by_handler.items())
    return (
        "deliveries were kept in a transaction that began outside of their session and was not "
        f"committed, so nobody would ever run them: {handlers}. Where a test rolls back an outer "
        "transaction, run it in `with outbox.in_memory():`"
    )


def _rewind(tally: Tally, then: Stats) -> None:
    """Count on from a moment before, as if only what is in flight now had come since."""
    with tally.lock:
        counted = sum(run.handled for run in [*tally.runs])  # they go on from there
        in_flight = tally.accepted - counted - tally.handled - sum(tally.ended.values())
        tally.published = then.published
        for outcome in Outcome:
            tally.ended[outcome] = getattr(then, outcome.value)
        tally.handled = -counted
        tally.accepted = sum(tally.ended.values()) + in_flight
        tally.background["refused"] = then.refused
