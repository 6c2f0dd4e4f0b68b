"""Owns `EventCapture`, which watches one bus during a test, and restores the bus afterwards."""

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

# Seconds between two checks of a thread whether a drain has taken its last steps.
_GLANCE_SECONDS = 0.0005


class DeliveryList(EventList[object]):
    """The events of deliveries: one entry for each run of a handler, in the order of their ends.

        assert capevents.handled.by(send_receipt) == [OrderPaid(7)]

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
        """Return the deliveries of one handler.

        Args:
            handler: The callable that was subscribed, or its name.

        Raises:
            LookupError: The handler is not subscribed. The message lists the closest names.
        """
        names = self._names_of(handler)
        return DeliveryList(
            [each for each in self.deliveries if each.handler in names],
            what=self.what,
            names_of=self._names_of,
        )


class FailureList(list[Failure]):
    """The deliveries that failed, with their errors, in the order of their failures.

        [failure] = capevents.failures.by(send_receipt)
        assert isinstance(failure.error, ConnectionError)

    `by` selects the failures of one handler.
    """

    __slots__ = ("_names_of",)

    def __init__(
        self, failures: Iterable[Failure], /, *, names_of: Callable[[Named], set[str]]
    ) -> None:
        super().__init__(failures)
        self._names_of = names_of

    def by(self, handler: Named) -> FailureList:
        """Return the failures of one handler.

        Args:
            handler: The callable that was subscribed, or its name.

        Raises:
            LookupError: The handler is not subscribed. The message lists the closest names.
        """
        names = self._names_of(handler)
        found = [each for each in self if each.delivery.handler in names]
        return FailureList(found, names_of=self._names_of)


class UnexpectedFailures(ExceptionGroup[Exception]):
    """Handlers failed during a test that did not expect it: an `ExceptionGroup` of the failures."""

    def derive(  # type: ignore[override]
        self,
        excs: Sequence[Exception],  # pyright: ignore[reportIncompatibleMethodOverride]
        /,
    ) -> Self:
        """Keep the class when `split` and `subgroup` make a smaller group."""
        return type(self)(self.message, excs)


class EventCapture(Recording):
    """Watches a bus during a test, and restores the bus afterwards.

        with EventCapture(bus) as events:
            client.post("/users", json={"name": "Ada"})
            assert events.published == [UserCreated(1)]

    The pytest fixture `capevents` is an `EventCapture`.

    An event is in `published` from its publish on, with or without a handler. If its unit of work
    drops it, the event moves to `discarded`, and stays there. So inside an open unit of work
    `published` has the events so far, and after a rollback it does not have them. Each access
    returns a new list with the current contents. All methods are thread-safe, and work with any
    number of event loops.

    The end of the block waits for deliveries that still go on. Then it restores the bus: the
    subscriptions that were made or cancelled in the block, the handlers behind fakes, the counters,
    and `report_failure`.

    Args:
        bus: The bus to watch.
        timeout: How long to wait, in seconds of real time: at the end of the block, and in each
            method that waits and gets no `timeout`.

    Raises:
        TypeError: `bus` is not an `EventBus`.
        UnexpectedFailures: At the end of the block: a handler failed in a drain, not because of a
            fake, and the test has neither read `failures` since nor called `allow_failures`.
        AssertionError: At the end of the block: an outbox has stored deliveries in a transaction of
            the test that was not committed, so no process would ever run them.
        TimeoutError: At the end of the block: deliveries still go on after `timeout` seconds.
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
        """The events that their units of work have dropped, with or without a handler."""
        with self._ledger.changed:
            return EventList(self._ledger.dropped, what="discarded")

    @property
    def handled(self) -> DeliveryList:
        """The events of the deliveries that succeeded: one entry for each delivery."""
        with self._ledger.changed:
            return DeliveryList(self._ledger.successes, what="handled", names_of=self._names_of)

    @property
    def undelivered(self) -> DeliveryList:
        """The events of deliveries that did not run to their end: one entry for each delivery."""
        with self._ledger.changed:
            return DeliveryList(self._ledger.losses, what="undelivered", names_of=self._names_of)

    @property
    def requeued(self) -> DeliveryList:
        """The events that an outbox stores for later, or for another process: one per delivery."""
        with self._ledger.changed:
            return DeliveryList(self._ledger.returns, what="requeued", names_of=self._names_of)

    @property
    def failures(self) -> FailureList:
        """The deliveries that failed, with their errors, in the order of their failures.

        If the test reads this list, the failures so far do not fail the test.
        """
        self._unexpected.clear()
        with self._ledger.changed:
            return FailureList(self._ledger.failures, names_of=self._names_of)

    def allow_failures(self) -> None:
        """Allow handlers to fail: the test does not fail for it."""
        self._failures_allowed = True

    def caused_by(self, event: object) -> EventList[object]:
        """Return the published events that this event has caused, at any depth.

        Args:
            event: The event that is the cause, or an event that is equal to it.
        """
        with self._ledger.changed:
            kept = [each for each in self._ledger.records if each.fate is not Fate.WITHDRAWN]
        caused = [each.event for each in kept if each.comes_of(event)]
        return EventList(caused, what=f"caused by {describe(event)}")

    def record_only(self, *event_types: type, except_: type | tuple[type, ...] = ()) -> Fake:
        """Record events, but call no handlers for them.

        Units of work decide about these events as always. No deliveries are counted. It applies
        from now on, until the end of the test. As a context manager it ends with the block.

        Args:
            event_types: The types of the events, including subclasses; none given, all events.
            except_: Event types whose handlers are called as always.

        Returns:
            The fake; `end()` ends it.

        Raises:
            InvalidEventTypeError: One of the types is not a class.
        """
        return self._fakes.record_only(event_types, except_)

    def fail(
        self, handler: Named, error: Exception | type[Exception], *, times: int | None = None
    ) -> Fake:
        """Make a handler raise an error instead of doing its work.

        Deliveries that already wait are included. The failure is counted, observed and reported
        like every failure, but it does not fail the test. It applies from now on, until the end of
        the test. As a context manager it ends with the block.

        Args:
            handler: The callable that was subscribed, or its name.
            error: The exception to raise. For a class, a new instance is raised each time.
            times: How often the handler fails before it works again; None for every time.

        Returns:
            The fake; `end()` ends it.

        Raises:
            LookupError: The handler is not subscribed. The message lists the closest names.
            TypeError: `error` is not an exception.
            ValueError: `times` is below 1.
        """
        return self._fakes.fail(handler, error, times)

    def delay(self, handler: Named, seconds: float) -> Fake:
        """Make a handler wait before it does its work, by the clock of its event loop.

        With a virtual clock, such as trio's `MockClock`, this takes no real time. The wait counts
        for the handler's time limit. It applies from now on, until the end of the test. As a
        context manager it ends with the block.

        Args:
            handler: The callable that was subscribed, or its name.
            seconds: How long the handler waits.

        Returns:
            The fake; `end()` ends it.

        Raises:
            LookupError: The handler is not subscribed. The message lists the closest names.
            ValueError: `seconds` is below 0, or NaN.
        """
        return self._fakes.delay(handler, seconds)

    async def idle(self, *, timeout: float | None = None) -> None:
        """Wait until all deliveries have ended, and all deliveries that they have caused.

        Then every published event is decided, and no delivery waits or runs.

        Args:
            timeout: How long to wait, in seconds of real time, also with a virtual clock. By
                default it is the `timeout` of the capture.

        Raises:
            TimeoutError: The time is over. The message lists what still goes on, and at which line.
            EventContextUsageError: The surrounding unit of work has deliveries that wait, so the
                call would wait for itself.
        """
        __tracebackhide__ = True
        self._refuse_waiting_for_self()
        with self._patience(timeout) as patience:
            await until(self._ledger, self._is_idle, patience, self._busy)
            while self._last_steps() and not patience.over:
                await checkpoint()

    def idle_sync(self, *, timeout: float | None = None) -> None:
        """Do the same as `idle`, in a synchronous test whose application runs in another thread.

        An example is Starlette's `TestClient`, used as a context manager.

        Args:
            timeout: As for `idle`.

        Raises:
            TimeoutError: The time is over. The message lists what still goes on, and at which line.
            EventContextUsageError: As for `idle`.
            RuntimeError: It was called on an event loop, which it would block.
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
        """Wait until a matching event is published, and its unit of work has released it.

            placed = await capevents.wait_for(OrderPlaced, order_id=1)

        An event that was published before the call counts, too. Its handlers may still run: `idle`
        waits for them.

        Args:
            event_type: The class of the event, or a base class.
            timeout: As for `idle`.
            fields: Values that fields of the event must have.

        Returns:
            The first matching event.

        Raises:
            TimeoutError: The time is over. The message lists the events that were published
                instead, and what still goes on.
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
        """Do the same as `wait_for`, in a synchronous test whose application runs in a thread.

        Args:
            event_type: The class of the event, or a base class.
            timeout: As for `idle`.
            fields: Values that fields of the event must have.

        Returns:
            The first matching event.

        Raises:
            TimeoutError: The time is over. The message lists the events that were published
                instead, and what still goes on.
            TypeError: The type has no such field.
            RuntimeError: It was called on an event loop, which it would block.
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
                "handlers failed, and the test did not expect it. If the failures are expected: "
                "read `failures`, or provoke them with `fail()`, or call `allow_failures()`, or "
                "mark the test with @pytest.mark.eventkit_allow_failures",
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
            raise RuntimeError(
                f"this would block the event loop. Use `await capevents.{call}` instead"
            )

    def _patience(self, timeout: float | None) -> Patience:
        return Patience(self.timeout if timeout is None else timeout, self._ledger)

    def _wait_for_end(self) -> TimeoutError | None:
        """Wait for deliveries that go on by themselves; return the error if they do not end.

        It does not wait for units of work that are still open, and not at all on an event loop.
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
        """Whether deliveries whose end observers have seen are still being counted and reported."""
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
                "idle() would wait for itself: the unit of work around it is open (pending: "
                f"{len(unit.pending)}). Leave it first, or deliver its events with "
                "`await bus.current_context().drain()`"
            )

    def _busy(self, head: str = "not idle:") -> str:
        return "\n".join([head, *what_goes_on(self._ledger, self.bus)])

    def _missing(self, event_type: type, fields: Mapping[str, object]) -> str:
        """The message of `wait_for`: the events that were published, and what has not ended."""
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
        "deliveries were stored in a transaction that began outside of their session and was not "
        f"committed, so no process would ever run them: {handlers}. If the test rolls back an "
        "outer transaction on purpose, run it in `with outbox.in_memory():`"
    )


def _rewind(tally: Tally, then: Stats) -> None:
    """Set the counters back to `then`, plus the deliveries that are in flight now."""
    with tally.lock:
        counted = sum(run.handled for run in [*tally.runs])  # these runs go on counting
        in_flight = tally.accepted - counted - tally.handled - sum(tally.ended.values())
        tally.published = then.published
        for outcome in Outcome:
            tally.ended[outcome] = getattr(then, outcome.value)
        tally.handled = -counted
        tally.accepted = sum(tally.ended.values()) + in_flight
        tally.background["refused"] = then.refused
