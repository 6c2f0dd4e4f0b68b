"""Whatever is done in whatever order, each delivery ends as a simple model says, and in its order.

The model knows no event loop, no locks and no cleverness: lists of events, and what the words mean.
"""

import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import anyio
import pytest
from anyio import CancelScope
from anyio.from_thread import BlockingPortal, start_blocking_portal
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from eventkit import (
    Delivery,
    DispatchError,
    EventBus,
    EventContext,
    EventContextClosedError,
    EventContextFullError,
    Observer,
    Subscription,
    current_delivery,
)
from tests.witness import ignore

Backend = tuple[str, dict[str, Any]]

MAX_EVENTS = 8
HANDLERS = ("h0", "h1", "h2", "h3")


@dataclass(frozen=True, eq=False)
class Event:
    """An event, and what each of its handlers does: publish, perhaps release, perhaps fail."""

    failing: frozenset[str]
    children: tuple[tuple["Event", bool], ...]  # each with its `even_on_failure`
    releases: bool


class Common(Event):
    """What most of them are."""


class Special(Common):
    """A subclass."""


class Cancels(Event):
    """Its only handler cancels the drain that it runs in."""


def make(kind: type[Event], *arguments: Any) -> Event:
    return kind(*arguments)


def events(children: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Event]:
    return st.builds(
        make,
        st.sampled_from([Common, Common, Special, Special, Cancels]),
        st.frozensets(st.sampled_from(HANDLERS), max_size=2),
        st.lists(st.tuples(children, st.booleans()), max_size=2).map(tuple)
        if children is not None
        else st.just(()),
        st.booleans(),
    )


EVENTS = events(events(events()))


# The model


@dataclass(eq=False)
class Waiting:
    """A published event, with the subscriptions that it had then, those of a handler together."""

    event: Event
    plan: list[list[Subscription]]
    even_on_failure: bool


@dataclass(eq=False)
class Unit:
    """A unit of work; `around` are the units that it was opened in, outermost first."""

    around: list["Unit"]
    staged: list[Waiting] = field(default_factory=list[Waiting])
    released: deque[Waiting] = field(default_factory=deque[Waiting])
    inside: list["Unit"] = field(default_factory=list["Unit"])
    closed: bool = False

    @property
    def outermost(self) -> "Unit":
        return self.around[0].outermost if self.around else self

    def load(self) -> int:
        """How many events wait here and in all units inside."""
        return len(self.staged) + len(self.released) + sum(unit.load() for unit in self.inside)

    def pending(self) -> list[Waiting]:
        return [*self.released, *self.staged]


class FullError(Exception):
    """More events than allowed would wait."""


class Model:
    """What the words of the contract mean."""

    def __init__(self) -> None:
        self.subscriptions: list[Subscription] = []  # those that are not cancelled, in order
        self.started: list[tuple[Event, str]] = []
        self.ended: Counter[tuple[str, Event, str]] = Counter()
        self.dropped: list[tuple[str, Event, str]] = []
        self.published = 0
        self.accepted = 0

    def open(self, around: Sequence[Unit]) -> Unit:
        unit = Unit([outer for outer in around if not outer.closed])
        if unit.around:
            unit.outermost.inside.append(unit)
        return unit

    def publish(self, unit: Unit, event: Event, even_on_failure: bool) -> None:
        plan: dict[str, list[Subscription]] = {}
        for subscription in self.subscriptions:
            if isinstance(event, subscription.event_type):
                plan.setdefault(subscription.name, []).append(subscription)
        if plan and unit.outermost.load() >= MAX_EVENTS:
            raise FullError
        self.published += 1
        self.accepted += len(plan)
        if plan:
            unit.staged.append(Waiting(event, [*plan.values()], even_on_failure))

    def release(self, unit: Unit) -> None:
        unit.released += unit.staged
        unit.staged = []

    def discard(self, unit: Unit) -> None:
        kept, dropped = self.split(unit.staged)
        unit.released += kept
        unit.staged = []
        self.drop("discarded", dropped)

    def split(self, staged: list[Waiting]) -> tuple[list[Waiting], list[Waiting]]:
        kept = [waiting for waiting in staged if waiting.even_on_failure]
        return kept, [waiting for waiting in staged if not waiting.even_on_failure]

    def drop(self, outcome: str, dropped: Sequence[Waiting]) -> None:
        for waiting in dropped:
            self.dropped += [(outcome, waiting.event, group[0].name) for group in waiting.plan]

    def leave(self, unit: Unit, succeeded: bool) -> None:
        heir = next((outer for outer in reversed(unit.around) if not outer.closed), None)
        if succeeded:
            decided, undecided, dropped = [*unit.released], unit.staged, list[Waiting]()
        else:
            kept, dropped = self.split(unit.staged)
            decided, undecided = [*unit.released, *kept], []
        self.drop("discarded", dropped)
        unit.staged, unit.released = [], deque()
        if heir is not None:
            for waiting in decided:
                waiting.even_on_failure = True
            heir.staged += decided + undecided
        else:
            unit.released = deque(decided + undecided)
            self.deliver(unit)
            self.drop("undelivered", unit.released)
            unit.released = deque()
        unit.closed = True

    def deliver(self, unit: Unit) -> Counter[str]:
        """Deliver what is released, until there is nothing left or it is cancelled."""
        results: Counter[str] = Counter()
        while unit.released:
            waiting = unit.released.popleft()
            running: list[str] = []
            for group in waiting.plan:
                if any(subscription in self.subscriptions for subscription in group):
                    running.append(group[0].name)
                else:
                    self.dropped.append(("discarded", waiting.event, group[0].name))
            deliveries = [(name, Unit([unit])) for name in running]
            unit.inside += [delivery for _, delivery in deliveries]
            outcomes = [self.run(waiting.event, *delivery) for delivery in deliveries]
            for (name, delivery), outcome in zip(deliveries, outcomes, strict=True):
                unit.inside.remove(delivery)
                kept, dropped = delivery.staged, list[Waiting]()
                if outcome != "handled":
                    kept, dropped = self.split(delivery.staged)
                self.drop("discarded", dropped)
                unit.released += [*delivery.released, *kept]
                self.ended[outcome, waiting.event, name] += 1
                results[outcome] += 1
            if "undelivered" in outcomes:
                self.dropped += [("undelivered", waiting.event, name) for name in running]
                break
        return results

    def run(self, event: Event, name: str, delivery: Unit) -> str:
        """Run one handler."""
        self.started.append((event, name))
        try:
            for child, even_on_failure in event.children:
                self.publish(delivery, child, even_on_failure)
                if event.releases:
                    self.release(delivery)
        except FullError:
            return "failed"
        if isinstance(event, Cancels):
            return "undelivered"
        return "failed" if name in event.failing else "handled"


# The real thing


class Watcher(Observer):
    """Notes what is dropped."""

    def __init__(self) -> None:
        self.dropped: list[tuple[str, Event, str]] = []

    def note(self, outcome: str, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            assert isinstance(delivery.event, Event)
            self.dropped.append((outcome, delivery.event, delivery.handler))

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        self.note("discarded", deliveries)

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        self.note("undelivered", deliveries)


Step = tuple[Callable[[], Awaitable[Any]], list[Any], anyio.Event]


class Worker:
    """One task on an event loop, which does what it is told."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal
        self._steps, steps = portal.call(self._open)
        self._ended = portal.start_task_soon(self._work, steps)

    async def _open(self) -> Any:
        return anyio.create_memory_object_stream[Step](1)

    async def _work(self, steps: MemoryObjectReceiveStream[Step]) -> None:
        with steps:
            async for step, result, done in steps:
                try:
                    result.append(await step())
                except Exception as error:
                    result.append(error)
                done.set()

    async def _ask(self, step: Callable[[], Awaitable[Any]]) -> Any:
        result: list[Any] = []
        done = anyio.Event()
        await self._steps.send((step, result, done))
        await done.wait()
        return result.pop()

    def do(self, step: Callable[[], Awaitable[Any]]) -> Any:
        """Have it done, and return what it returned, or the exception that it raised."""
        return self._portal.call(self._ask, step)

    def close(self) -> None:
        self._portal.call(self._steps.aclose)
        self._ended.result()


class BusMachine(RuleBasedStateMachine):
    """Does everything that one may do, in any order."""

    def __init__(self, portal: BlockingPortal) -> None:
        super().__init__()
        self.worker = Worker(portal)
        self.bus = EventBus(max_events=MAX_EVENTS)
        self.bus.report_failure = ignore
        self.watcher = Watcher()
        self.bus.observe(self.watcher)
        self.started: list[tuple[Event, str]] = []
        self.scope: CancelScope | None = None  # that of the step that is being done
        self.model = Model()
        self.units: list[tuple[EventContext, Unit]] = []  # open ones, the innermost last
        self.over: list[EventContext] = []
        self.handlers = {name: self.handler(name) for name in HANDLERS}
        cancelling = self.bus.subscribe(Cancels, self.handler("cancel"), name="cancel")
        self.model.subscriptions.append(cancelling)

    def handler(self, name: str) -> Callable[[Event], Awaitable[None]]:
        async def handle(event: Event) -> None:
            self.started.append((event, name))
            assert current_delivery().handler == name
            for child, even_on_failure in event.children:
                self.bus.publish(child, even_on_failure=even_on_failure)
                if event.releases:
                    self.bus.current_context().release()
            if isinstance(event, Cancels) and self.scope is not None:
                self.scope.cancel()
            await checkpoint()
            if name in event.failing:
                raise ValueError

        return handle

    def do(self, step: Callable[[], Awaitable[Any]]) -> Any:
        """Do it where a handler can cancel it; None where one did."""

        async def cancellable() -> Any:
            with CancelScope() as self.scope:
                return await step()

        return self.worker.do(cancellable)

    def teardown(self) -> None:
        try:
            while self.units:
                self.leave(0, True)
            self.agree()
            self.conserve()
            assert self.bus.stats.pending == 0
        finally:
            self.worker.close()

    # Subscribing

    @rule(name=st.sampled_from(HANDLERS), event_type=st.sampled_from([Common, Special]))
    def subscribe(self, name: str, event_type: type[Event]) -> None:
        if any((s.name, s.event_type) == (name, event_type) for s in self.model.subscriptions):
            return
        subscription = self.bus.subscribe(event_type, self.handlers[name], name=name)
        self.model.subscriptions.append(subscription)

    @precondition(lambda self: len(self.model.subscriptions) > 2)
    @rule(which=st.integers(1, 20))
    def cancel(self, which: int) -> None:
        subscriptions = self.model.subscriptions
        subscriptions.pop(1 + which % (len(subscriptions) - 1)).cancel()

    # Units of work

    @precondition(lambda self: len(self.units) < 4)
    @rule()
    def open(self) -> None:
        async def step() -> EventContext:
            return await self.bus.context().__aenter__()

        unit = self.model.open([model for _, model in self.units])
        self.units.append((self.worker.do(step), unit))

    @precondition(lambda self: self.units)
    @rule(which=st.integers(0, 3), succeeded=st.booleans())
    def leave(self, which: int, succeeded: bool) -> None:
        unit, model = self.units.pop(which % len(self.units))
        error = None if succeeded else ValueError()

        async def step() -> None:
            await unit.__aexit__(None if succeeded else ValueError, error, None)

        assert self.do(step) is None
        self.model.leave(model, succeeded)
        assert unit.closed
        self.over.append(unit)

    @precondition(lambda self: self.over)
    @rule(event=EVENTS)
    def publish_too_late(self, event: Event) -> None:
        with pytest.raises(EventContextClosedError):
            self.over[-1].publish(event)

    @precondition(lambda self: self.units)
    @rule(which=st.integers(0, 3), event=EVENTS, even_on_failure=st.booleans())
    def publish(self, which: int, event: Event, even_on_failure: bool) -> None:
        unit, model = self.units[which % len(self.units)]

        async def step() -> None:
            unit.publish(event, even_on_failure=even_on_failure)

        result = self.worker.do(step)
        try:
            self.model.publish(model, event, even_on_failure)
        except FullError:
            assert isinstance(result, EventContextFullError)
        else:
            assert result is None

    @precondition(lambda self: self.units)
    @rule(which=st.integers(0, 3))
    def release(self, which: int) -> None:
        unit, model = self.units[which % len(self.units)]
        unit.release()
        self.model.release(model)

    @precondition(lambda self: self.units)
    @rule(which=st.integers(0, 3))
    def discard(self, which: int) -> None:
        unit, model = self.units[which % len(self.units)]
        unit.discard()
        self.model.discard(model)

    @precondition(lambda self: self.units)
    @rule(which=st.integers(0, 3))
    def drain(self, which: int) -> None:
        unit, model = self.units[which % len(self.units)]
        report = self.do(unit.drain)
        self.model.release(model)
        results = self.model.deliver(model)
        if results["undelivered"]:
            assert report is None
        else:
            assert report.handled == results["handled"]
            assert len(report.failures) == results["failed"]

    @rule(event=EVENTS)
    def dispatch(self, event: Event) -> None:
        async def step() -> None:
            await self.bus.dispatch(event)

        result = self.do(step)
        unit = Unit([])
        self.model.publish(unit, event, False)
        self.model.release(unit)
        results = self.model.deliver(unit)
        self.model.drop("undelivered", unit.released)
        if results["failed"] and not results["undelivered"]:
            assert isinstance(result, DispatchError)
            assert len(result.exceptions) == results["failed"]
        else:
            assert result is None

    # What is always true

    @invariant()
    def agree(self) -> None:
        assert self.started == self.model.started
        assert self.watcher.dropped == self.model.dropped

    @invariant()
    def wait_for_the_same(self) -> None:
        for unit, model in self.units:
            assert [(delivery.event, delivery.handler) for delivery in unit.pending] == [
                (waiting.event, group[0].name)
                for waiting in model.pending()
                for group in waiting.plan
            ]

    @invariant()
    def conserve(self) -> None:
        stats = self.bus.stats
        ended: Counter[str] = Counter()
        for (outcome, _, _), times in self.model.ended.items():
            ended[outcome] += times
        ended["discarded"] = sum(outcome == "discarded" for outcome, _, _ in self.model.dropped)
        ended["undelivered"] = len(self.model.dropped) - ended["discarded"]
        assert stats.published == self.model.published
        assert stats.accepted == self.model.accepted
        assert stats.handled == ended["handled"]
        assert stats.failed == ended["failed"]
        assert stats.discarded == ended["discarded"]
        assert stats.undelivered == ended["undelivered"]
        assert stats.running == 0
        # Derived from the other counters there; counted one by one here.
        assert stats.pending == sum(len(unit.pending) for unit, _ in self.units)
        assert stats.accepted == ended.total() + stats.pending


def test_each_delivery_ends_as_the_model_says_and_in_its_order(anyio_backend: Backend) -> None:
    with start_blocking_portal(*anyio_backend) as portal:
        run_state_machine_as_test(
            cast("type[BusMachine]", partial(BusMachine, portal)),  # any callable will do
            settings=settings(
                deadline=None,
                derandomize=bool(os.environ.get("CI")),
                max_examples=100,
                stateful_step_count=40,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )
