"""Runs a program: its handlers, who publishes, and what comes from outside."""

# Programs are JSON, whose values have no types.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import anyio
import trio
from anyio import CancelScope, create_task_group, from_thread, move_on_after, to_thread
from anyio.lowlevel import checkpoint

from eventkit import (
    Delivery,
    DispatchError,
    DrainInProgressError,
    EventBus,
    EventContext,
    Observer,
)
from eventkit._core.bus import state_of
from eventkit._core.context import context_of
from eventkit._core.drainer import Drainer
from eventkit._core.units import Unit
from eventkit._core.whereabouts import whereabouts
from tests.fuzz.programs import TYPES, Op, Program, ops_of
from tests.witness import entered, unit_of

WORKERS = ("eventkit handlers", "eventkit drains 'default'")
PATIENCE = 20.0  # seconds that a thread may take on a busy machine
HANG = 10_000.0  # seconds of virtual time; all steps of a program together take a tenth of that
LOOKS = {"uvloop": 100}  # in how many parts it passes, where it is real


class Boom(Exception):
    """A failure."""


class Closed(Exception):
    """The coroutine was closed from outside."""


class Worse(BaseException):
    """What ends everything, as `KeyboardInterrupt` does."""


FATAL = {"interrupt": KeyboardInterrupt, "exit": SystemExit, "worse": Worse}


@dataclass(frozen=True, eq=False)
class Event:
    """Something to handle.

    Attributes:
        uid: Says by whom it was published, as which one.
        unit: The unit of work in which it is delivered.
        publisher: The delivery that has published it.
    """

    uid: str
    unit: str
    publisher: str | None


KINDS: list[type[Event]] = [type(f"Event{number}", (Event,), {}) for number in range(TYPES)]


class Probe(Event):
    """What is dispatched at the end, to see whether the bus still works."""


@dataclass(eq=False)
class Record:
    """A delivery that has begun."""

    event: Event
    index: int
    begun: int
    time: float = 0.0
    end: str | None = None
    ended: int = 0
    error: BaseException | None = None
    marks: list[object] = field(default_factory=list[object])
    published: list[tuple[Event, bool]] = field(default_factory=list[tuple[Event, bool]])

    @property
    def key(self) -> str:
        return f"{self.event.uid}>{self.index}"


mine: ContextVar[str | None] = ContextVar("mine", default=None)
published_by: ContextVar[str | None] = ContextVar("published_by", default=None)
reached_natively: ContextVar[bool] = ContextVar("reached_natively", default=False)


class Watcher(Observer):
    """Notes what it is told of each delivery."""

    def __init__(self) -> None:
        self.told: dict[str, list[str]] = defaultdict(list)

    def key(self, delivery: Delivery) -> str:
        assert isinstance(delivery.event, Event)
        return f"{delivery.event.uid}>{delivery.handler}"

    def published(self, event: object, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.told[self.key(delivery)].append("published")

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.told[self.key(delivery)].append("discarded")

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.told[self.key(delivery)].append("undelivered")

    @contextmanager
    def delivery(self, delivery: Delivery) -> Generator[None]:
        told = self.told[self.key(delivery)]
        told.append("begun")
        try:
            yield
        except Exception:
            told.append("failed")
            raise
        except BaseException:
            told.append("ended")
            raise
        else:
            told.append("handled")


class Counted:
    """Awaits something, and tells of each yield to the event loop."""

    def __init__(
        self, awaited: Awaitable[object], tell: Callable[[], None], close_at: int | None
    ) -> None:
        self._steps = awaited.__await__()
        self._tell = tell
        self._close_at = -1 if close_at is None else close_at

    def __await__(self) -> Generator[Any, Any, object]:
        steps = self._steps
        step: Callable[[], Any] = partial(next, steps)
        while True:
            try:
                trap = step()
            except StopIteration as end:
                return end.value
            self._tell()
            if self._close_at == 0:
                steps.close()
                raise Closed
            self._close_at -= 1
            try:
                value = yield trap
            except BaseException as error:
                step = partial(steps.throw, error)
            else:
                step = partial(steps.send, value)


class Play:
    """One program on its way, on one event loop."""

    def __init__(self, program: Program, loop: str) -> None:
        self.program = program
        self.loop = loop
        self.native = loop != "trio"
        self.scale = 0.001 if loop == "uvloop" else 1.0
        self.ops = ops_of(program)
        self.broken: list[str] = []
        self.records: list[Record] = []
        self.clock = count(1)
        self.counts = Counter[str]()
        self.gates: dict[tuple[str, int], anyio.Event] = defaultdict(anyio.Event)
        self.scope: CancelScope | None = None
        self.owner: CancelScope | None = None
        self.caller: Any = None
        self.tasks: Any = None
        self.drainer: Drainer | None = None
        self.staged: dict[str, list[tuple[int, list[Event]]]] = defaultdict(list)
        self.units: list[str] = []
        self.done: list[tuple[str, bool, int]] = []  # what was done from outside, soon, when
        self.reported = 0
        self.results: list[Any] = []
        self.told = 0
        self.natives = 0
        self.busy = False
        self.watchdog: asyncio.TimerHandle | None = None
        self.seen_tasks: dict[Any, int] = {}
        self.bus = EventBus(sequential=program["sequential"], handler_timeout=self.limit())
        self.bus.report_failure = self.report
        self.watcher = Watcher()
        if program["observed"]:
            self.bus.observe(self.watcher)
        for kind, handlers in enumerate(program["handlers"]):
            for index, handler in enumerate(handlers):
                make = self.thread_handler if handler["thread"] else self.handler
                limit: Any = handler["timeout"]
                if limit == "bus":
                    limit = ...
                elif limit is not None:
                    limit *= self.scale
                self.bus.subscribe(
                    KINDS[kind], make(index, handler["ops"]), name=f"{kind}-{index}", timeout=limit
                )
        for index in range(3):
            self.bus.subscribe(
                Probe, self.handler(index, [["check", index % 2]]), name=f"probe-{index}"
            )

    def limit(self) -> float | None:
        limit: float | None = self.program["limit"]
        return None if limit is None else limit * self.scale

    def report(self, delivery: Delivery, error: Exception) -> None:
        self.reported += 1

    def wrong(self, what: str) -> None:
        self.broken.append(what)

    # Handlers

    def handler(self, index: int, ops: list[Op]) -> Callable[[Event], Coroutine[Any, Any, None]]:
        async def handle(event: Event) -> None:
            record = self.begin(event, index)
            try:
                if ops:
                    await self.do_all(record, record.published, ops)
                if mine.get() != record.key:
                    self.wrong("context variables at the end")
            except BaseException as error:
                self.end(record, error)
                raise
            else:
                self.end(record, None)

        return handle

    def thread_handler(self, index: int, ops: list[Op]) -> Callable[[Event], None]:
        def handle(event: Event) -> None:
            record = self.begin(event, index, thread=True)
            try:
                for op in ops:
                    if op[0] == "raise":
                        raise Boom(record.key)
                    if op[0] == "back":
                        from_thread.run(checkpoint)
                    elif op[0] == "look":
                        self.look()
                    else:
                        self.publish(record, record.published, *op[1:])
                    if mine.get() != record.key:
                        self.wrong("context variables in a thread")
            except BaseException as error:
                self.end(record, error, thread=True)
                raise
            else:
                self.end(record, None, thread=True)

        return handle

    def begin(self, event: Event, index: int, *, thread: bool = False) -> Record:
        if mine.get() != event.publisher:
            self.wrong("context variables of the publisher, or of a sibling")
        if published_by.get() != event.uid:
            self.wrong("context variables of the publish")
        record = Record(event, index, next(self.clock))
        if not thread:
            record.time = anyio.current_time()
        self.records.append(record)
        mine.set(record.key)
        if not thread:
            self.tick("step")
        return record

    def end(self, record: Record, error: BaseException | None, *, thread: bool = False) -> None:
        if record.end is not None:
            self.wrong("ended twice")
        record.error = error
        record.end = "returned" if error is None else self.kind_of(error)
        record.ended = next(self.clock)
        if not thread:
            self.tick("step")

    def kind_of(self, error: BaseException) -> str:
        if isinstance(error, Exception):
            return "failed"
        if isinstance(error, BaseExceptionGroup):
            cancelled = (asyncio.CancelledError, trio.Cancelled)
            rest = error.split(cancelled)[1]
            return "cancelled" if rest is None else self.kind_of_rest(rest)
        if isinstance(error, asyncio.CancelledError | trio.Cancelled):
            return "cancelled"
        return "closed" if isinstance(error, GeneratorExit) else "fatal"

    def kind_of_rest(self, error: BaseException) -> str:
        return "failed" if isinstance(error, Exception) else "fatal"

    async def do_all(
        self, record: Record, published: list[tuple[Event, bool]], ops: list[Op]
    ) -> None:
        for op in ops:
            self.tick("step")
            await self.do(record, published, op)
            if mine.get() != record.key:
                self.wrong(f"context variables after {op[0]}")

    async def do(self, record: Record, published: list[tuple[Event, bool]], op: Op) -> None:
        name, *arguments = op
        more = partial(self.do_all, record, published)
        if name == "check":
            for _ in range(arguments[0]):
                await checkpoint()
                self.tick("step")
        elif name == "sleep":
            await anyio.sleep(arguments[0] * self.scale)
        elif name == "look":
            self.look()
        elif name == "set":
            self.gates[record.event.uid, arguments[0]].set()
        elif name == "wait":
            gate, seconds = arguments
            with move_on_after(seconds * self.scale) as scope:
                await self.gates[record.event.uid, gate].wait()
            record.marks.append(("waited in vain", gate, scope.cancelled_caught))
        elif name == "publish":
            self.publish(record, published, *arguments)
        elif name == "release":
            published[:] = [(event, True) for event, _ in published]
            self.bus.current_context().release()
        elif name == "dispatch":
            await self.dispatch(record, *arguments)
        elif name == "raise":
            self.throw(record, *arguments)
        elif name == "cancel self":
            task = asyncio.current_task()
            assert task is not None
            self.natives += task is self.caller
            self.done.append(("self", False, next(self.clock)))
            task.cancel()
            if arguments[0]:
                await checkpoint()
        elif name == "leave open":
            if arguments[0]:
                CancelScope().__enter__()
            else:
                await create_task_group().__aenter__()
            await checkpoint()
        elif name == "deadline":
            seconds, ops = arguments
            with move_on_after(seconds * self.scale) as scope:
                await more(ops)
            record.marks.append(("deadline", scope.cancelled_caught))
        elif name == "native":
            seconds, ops = arguments
            token = reached_natively.set(True)
            late = False
            try:
                async with asyncio.timeout(seconds * self.scale):
                    await more(ops)
            except TimeoutError:
                late = True
            finally:
                reached_natively.reset(token)
            record.marks.append(("native", late))
        elif name == "scope":
            with CancelScope() as scope:
                scope.cancel()
                await more(arguments[0])
            record.marks.append(("scope", scope.cancelled_caught))
        elif name == "shield":
            await self.shield(record, arguments[0])
        elif name == "group":
            async with create_task_group() as group:
                for ops in arguments[0]:
                    group.start_soon(self.do_all, Record(record.event, record.index, 0), [], ops)
        elif name == "swallow":
            try:
                await more(arguments[0])
            except (asyncio.CancelledError, trio.Cancelled):
                record.marks.append("swallowed")
        elif name == "cleanup":
            try:
                await more(arguments[0])
            finally:
                await self.shield(record, arguments[1])
        elif name == "in thread":
            await to_thread.run_sync(self.in_thread, arguments[0])
        elif name == "nested":
            await self.nested(record, published, *arguments)
        else:
            raise AssertionError(op)

    async def shield(self, record: Record, ops: list[Op]) -> None:
        complete = False
        try:
            with CancelScope(shield=True):
                await self.do_all(record, [], ops)
                complete = True
        except (asyncio.CancelledError, trio.Cancelled):
            if not self.reached_natively() and not complete:
                self.wrong("a shield did not hold")
            raise

    def reached_natively(self) -> bool:
        natively = any(action in ("native", "worker", "self") for action, _, _ in self.done)
        return natively or reached_natively.get() or (self.program["around"] or [""])[0] == "native"

    def in_thread(self, back: bool) -> None:
        self.look()
        if back:
            from_thread.run(checkpoint)

    def publish(
        self, record: Record, published: list[tuple[Event, bool]], kind: int, anyway: bool
    ) -> None:
        number = len(record.marks)
        record.marks.append(("published", kind))
        event = KINDS[kind](f"{record.key}.{number}", record.event.unit, record.key)
        published_by.set(event.uid)
        self.bus.publish(event, even_on_failure=anyway)
        published.append((event, anyway))

    async def nested(
        self, record: Record, published: list[tuple[Event, bool]], fails: bool, ops: list[Op]
    ) -> None:
        inner: list[tuple[Event, bool]] = []
        try:
            async with self.bus.context():
                await self.do_all(record, inner, ops)
                if fails:
                    raise Boom("nested")
        except BaseException as error:
            published += [(event, True) for event, decided in inner if decided]
            if not (fails and isinstance(error, Boom) and str(error) == "nested"):
                raise
        else:
            # What was released or is to be delivered anyway stays so in the unit around.
            published += inner

    async def dispatch(self, record: Record, kind: int) -> None:
        uid = f"{record.key}.{len(record.marks)}d"
        record.marks.append(("dispatched", kind))
        event = KINDS[kind](uid, uid, record.key)
        published_by.set(uid)
        self.staged[uid].append((next(self.clock), [event]))
        try:
            await self.bus.dispatch(event)
        except DispatchError as error:
            self.reported += len(error.exceptions)
            record.marks.append(("dispatch failed", len(error.exceptions)))

    def throw(self, record: Record, what: str) -> None:
        if what == "boom":
            raise Boom(record.key)
        if what == "group":
            raise ExceptionGroup("group", [Boom(), ValueError()])
        if what in FATAL:
            raise FATAL[what]
        if not self.native:
            raise Boom  # trio's cannot be made by hand
        made_up: BaseException = asyncio.CancelledError("made up")
        if what == "mixed":
            made_up = BaseExceptionGroup("mixed", [made_up, Boom()])
        raise made_up

    def look(self) -> None:
        """What can be asked at any time, and has to be right."""
        stats = self.bus.stats
        ended = stats.handled + stats.failed + stats.discarded + stats.undelivered
        if stats.accepted != ended + stats.pending + stats.running or stats.pending < 0:
            self.wrong(f"conservation: {stats}")
        whereabouts(state_of(self.bus).tally)

    # What comes from outside

    def tick(self, what: str) -> None:
        """One more of these has come: do what is to be done then."""
        at = self.counts[what]
        self.counts[what] += 1
        for trigger in self.program["triggers"]:
            if trigger["when"] == what and trigger["at"] == at:
                if trigger["soon"]:
                    self.soon(partial(self.act, trigger))
                else:
                    self.act(trigger)
        if self.native and self.program["triggers"]:
            for task in asyncio.all_tasks():
                self.seen_tasks.setdefault(task, len(self.seen_tasks))

    def soon(self, call: Callable[[], object]) -> None:
        if self.native:
            asyncio.get_running_loop().call_soon(call)
        else:
            trio.lowlevel.current_trio_token().run_sync_soon(call)

    def act(self, trigger: dict[str, Any]) -> None:
        if not self.busy:
            return
        action = trigger["action"]
        if action == "scope" and self.scope is not None:
            self.scope.cancel()
        elif action == "owner":
            assert self.owner is not None
            self.owner.cancel()
        elif action == "close":
            if self.tasks is None or self.owner is None or self.owner.cancel_called:
                return
            assert self.drainer is not None
            self.tasks.start_soon(self.drainer.close, trigger["seconds"] * self.scale)
        elif action == "native":
            self.natives += 1
            self.caller.cancel()
        elif action == "worker":
            workers = [task for task in asyncio.all_tasks() if task.get_name() in WORKERS]
            if not workers:
                return
            workers.sort(key=lambda task: self.seen_tasks.get(task, 10**6))
            task = workers[trigger["which"] % len(workers)]
            if inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_CREATED:
                action = "worker before its first step"
            task.cancel()
        else:
            return
        soon = trigger["soon"] or trigger["when"] in ("turn", "time")
        self.done.append((action, soon, next(self.clock)))
        if action == "owner":  # the guard is told by the event loop, and then stops what is drained
            self.soon(lambda: self.soon(lambda: self.soon(self.owner_was_cancelled)))

    def owner_was_cancelled(self) -> None:
        self.done.append(("owner", True, next(self.clock)))

    async def turns(self) -> None:
        for _ in range(60):
            await checkpoint()
            self.tick("turn")

    async def at_time(self, trigger: dict[str, Any]) -> None:
        await anyio.sleep(trigger["at"] * self.scale)
        self.act(trigger)

    # The whole

    async def main(self) -> None:
        with CancelScope() as everything:
            self.everything = everything
            if self.native:
                self.caller = asyncio.current_task()
                loop = asyncio.get_running_loop()
                loop.set_exception_handler(self.unhandled)
                self.watch(LOOKS.get(self.loop, 1))
                before = asyncio.all_tasks()
            else:
                trio.lowlevel.spawn_system_task(self.trio_watchdog)
                before = set()
            if self.program["way"] == "background":
                try:
                    await self.in_background()
                except asyncio.CancelledError:
                    if not self.natives:
                        raise
                self.busy = False
                self.drainer = None
                if self.native:
                    await self.soak()
                    self.count_requests()
            else:
                await self.awaited()
            await self.afterwards(before)
            if self.watchdog is not None:
                self.watchdog.cancel()
        if everything.cancelled_caught and not self.broken:
            self.wrong("cancelled as a whole")

    def watch(self, left: int) -> None:
        """Have it hang once so many parts of the time have passed.

        A busy machine may stop the process for longer than all of them. Only one passes then: what
        was to happen meanwhile happens before the next one.
        """
        if not left:
            self.hang()
            return
        seconds = HANG * self.scale / LOOKS.get(self.loop, 1)
        self.watchdog = asyncio.get_running_loop().call_later(seconds, self.watch, left - 1)

    async def trio_watchdog(self) -> None:
        began = time.monotonic()
        # Time jumps while a thread is at work, too.
        while time.monotonic() - began < PATIENCE:  # noqa: ASYNC110 - no event is set by time
            await trio.sleep(HANG)
        self.hang()

    def hang(self) -> None:
        if self.broken and self.broken[-1] == "hangs":
            return
        self.broken.insert(0, "hangs")
        self.everything.cancel()
        if self.native:
            for task in asyncio.all_tasks():
                task.cancel()
            asyncio.get_running_loop().call_later(HANG * self.scale, self.hang)

    def unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.wrong(f"told the event loop: {context}")

    async def awaited(self) -> None:
        unit = self.program["units"][0]
        others = self.program["triggers"]
        self.busy = True
        async with create_task_group() as self.outside:
            outside = self.outside
            if any(trigger["when"] == "turn" for trigger in others):
                outside.start_soon(self.turns)
            for trigger in others:
                if trigger["when"] == "time":
                    outside.start_soon(self.at_time, trigger)
            way = self.by_dispatch if self.program["way"] == "dispatch" else self.in_context
            try:
                await self.call(way, unit)
            except asyncio.CancelledError:
                around = (self.program["around"] or [""])[0]
                if not self.natives and not self.broken and around != "native":
                    self.wrong("a cancellation left the scopes that it was made by")
            self.busy = False
            if self.native:
                await self.soak()
                self.count_requests()
            outside.cancel_scope.cancel()

    async def soak(self) -> None:
        """Have what is still to come, come: a cancellation that nobody was told of."""
        for _ in range(3):
            try:
                with CancelScope(shield=True):
                    await checkpoint()
            except asyncio.CancelledError:
                self.told += 1

    def count_requests(self) -> None:
        """Whoever has made a request has taken it back, but for those from outside."""
        asked = self.caller.cancelling()
        if asked > self.natives:  # AnyIO takes back some in the place of its own
            self.wrong(f"the caller is asked {asked} times to cancel instead of {self.natives}")
        while self.caller.cancelling():
            self.caller.uncancel()

    async def call(
        self, way: Callable[[dict[str, Any]], Awaitable[None]], unit: dict[str, Any]
    ) -> None:
        """Do it within what is around the caller; note how it ends."""
        around = self.program["around"]
        with CancelScope() as self.scope:
            work = partial(self.noted, way, unit)
            if around is None:
                await work()
            elif around[0] == "deadline":
                with move_on_after(around[1] * self.scale):
                    await work()
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(around[1] * self.scale):
                        await work()

    async def noted(
        self, way: Callable[[dict[str, Any]], Awaitable[None]], unit: dict[str, Any]
    ) -> None:
        try:
            await Counted(way(unit), partial(self.tick, "yield"), self.program["closes"])
        except Closed:
            self.results.append("closed")
        except (asyncio.CancelledError, trio.Cancelled):
            self.results.append("cancelled")
            self.told += 1
            raise
        except DispatchError as error:
            self.reported += len(error.exceptions)
            self.results.append("failed")
        except BaseException as error:
            if self.kind_of(error) != "fatal":
                self.wrong(f"raised {error!r}")
            self.results.append("fatal")
        else:
            self.results.append("returned")

    def event(self, kind: int, number: int, unit: str) -> Event:
        return KINDS[kind](f"{unit}.{number}", unit, None)

    async def by_dispatch(self, unit: dict[str, Any]) -> None:
        lost = self.bus.stats.undelivered
        for number, (kind, _) in enumerate(each for chunk in unit["chunks"] for each in chunk):
            key = f"u{number}"
            event = self.event(kind, number, key)
            published_by.set(event.uid)
            self.staged[key].append((next(self.clock), [event]))
            self.units.append(key)
            try:
                await self.bus.dispatch(event)
            except DispatchError as error:
                self.reported += len(error.exceptions)
            self.results.append(("lost", self.bus.stats.undelivered - lost))

    async def in_context(self, unit: dict[str, Any]) -> None:
        numbers = count()
        self.units.append("u")
        drains = self.program["way"] == "drain"
        async with self.bus.context() as context:
            for chunk in unit["chunks"]:
                events: list[Event] = []
                for kind, _ in chunk:
                    event = self.event(kind, next(numbers), "u")
                    published_by.set(event.uid)
                    context.publish(event)
                    events.append(event)
                self.staged["u"].append((next(self.clock), events))
                if drains:
                    await self.drain(context)
            if self.program["beside"]:
                self.outside.start_soon(self.drain_beside, context)
                await checkpoint()
            lost = self.bus.stats.undelivered
        self.results.append(("lost", self.bus.stats.undelivered - lost))

    async def drain_beside(self, context: EventContext) -> None:
        """Drain it in a task of its own, wherever it is on its way to its end."""
        try:
            await context.drain()
        except DrainInProgressError:
            pass
        except BaseException as error:
            kind = self.kind_of(error)
            if kind == "fatal":
                self.results.append("fatal")
            elif kind != "cancelled":
                self.wrong(f"a drain raised {error!r}")
            else:
                raise

    async def drain(self, context: EventContext) -> None:
        lost = self.bus.stats.undelivered
        before, around = self.scope, self.program["around"]
        with CancelScope() as self.scope:
            try:
                report = await context.drain()
            except (asyncio.CancelledError, trio.Cancelled):
                self.results.append("drain cancelled")
                self.told += self.native and not self.scope.cancel_called
                raise
            else:
                self.results.append(("lost", self.bus.stats.undelivered - lost))
                del report, around
        self.scope = before

    async def in_background(self) -> None:
        program = self.program
        contexts: dict[int, Unit] = {}

        def publish(number: int) -> None:
            key = f"u{number}"
            context = unit_of(self.bus)
            with entered(context):
                events: list[Event] = []
                for position, (kind, anyway) in enumerate(program["units"][number]["chunks"][0]):
                    event = self.event(kind, position, key)
                    published_by.set(event.uid)
                    self.bus.publish(event, even_on_failure=anyway)
                    if anyway or program["units"][number]["success"]:
                        events.append(event)
            self.staged[key].append((next(self.clock), events))
            contexts[number] = context

        async with create_task_group() as tasks:
            self.tasks, self.owner = tasks, tasks.cancel_scope
            self.drainer = drainer = Drainer(
                state_of(self.bus), tasks, concurrency=program["concurrency"], max_pending=None
            )
            self.busy = True
            if any(trigger["when"] == "turn" for trigger in program["triggers"]):
                tasks.start_soon(self.turns)
            outside = CancelScope()

            async def at_time(trigger: dict[str, Any]) -> None:
                with outside:
                    await self.at_time(trigger)

            timed = [each for each in program["triggers"] if each["when"] == "time"]
            if timed:
                tasks.start_soon(at_time, timed[0])
            for number, unit in enumerate(program["units"]):
                if unit["early"]:
                    publish(number)
                    drainer.expect(contexts[number])
            try:
                for number, unit in enumerate(program["units"]):
                    kind, much = unit["pause"]
                    if kind == "sleep":
                        await anyio.sleep(much * self.scale)
                    for _ in range(much if kind == "check" else 0):
                        await checkpoint()
                    if number not in contexts:
                        publish(number)
                    if program["beside"]:
                        tasks.start_soon(self.drain_beside, context_of(contexts[number]))
                        if number % 2:
                            await checkpoint()
                    drainer.submit(contexts.pop(number), success=unit["success"])
                    self.units.append(f"u{number}")
                    self.tick("yield")
                close = program["close"]
                await drainer.close(math.inf if close is None else close * self.scale)
            finally:
                for number, context in contexts.items():
                    drainer.submit(context, success=program["units"][number]["success"])
                outside.cancel()
                self.tasks = None

    async def afterwards(self, before: set[Any]) -> None:
        self.look()
        stats = self.bus.stats
        if stats.pending or stats.running:
            self.wrong(f"not at rest: {stats}")
        if stats.units_draining or stats.units_waiting:
            self.wrong(f"units are left: {stats}")
        tally = state_of(self.bus).tally
        if tally.runs or tally.drainers:
            self.wrong("runs or drainers are left")
        if self.native:
            await self.soak()
            left = asyncio.all_tasks() - before
            if left:
                self.wrong(f"tasks are left: {left}")
            self.natives = 0
            self.count_requests()
        self.stats = stats
        self.judged = len(self.records)
        event = Probe("probe", "probe", None)
        published_by.set("probe")
        mine.set(None)
        try:
            await self.bus.dispatch(event)
        except BaseException as error:
            self.wrong(f"the bus is broken: {error!r}")
        if self.bus.stats.handled != stats.handled + 3:
            self.wrong(f"the bus is broken: {self.bus.stats}")
