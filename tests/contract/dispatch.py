"""The contract of dispatch: what runs when, where, in which order and in which variables."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextvars import ContextVar
from functools import partial, wraps

import anyio
from anyio import (
    CancelScope,
    create_task_group,
    fail_after,
    from_thread,
    get_current_task,
    get_running_tasks,
    move_on_after,
    sleep_forever,
    to_thread,
)
from anyio.lowlevel import checkpoint

from eventkit import current_delivery
from eventkit.exceptions import DispatchError, EventDepthError, InvalidHandlerError
from tests.contract.bus import (
    Boom,
    BusContract,
    Ping,
    Pong,
    all_tasks_blocked,
    by_dispatch,
    for_each,
    kinds_in,
    outcomes,
    raises,
)

Record = Callable[[object], None]

value: ContextVar[str] = ContextVar("value", default="unset")


class Recorder:
    """Handlers of all kinds that tell `record` once they really ran."""

    def __init__(self, record: Record) -> None:
        self.record = record

    async def __call__(self, event: object) -> None:
        await checkpoint()
        self.record(event)

    async def method(self, event: object) -> None:
        await checkpoint()
        self.record(event)

    def plain(self, event: object) -> None:
        self.record(event)

    async def second(self, first: str, event: object) -> None:
        await self.method(event)

    @classmethod
    async def of_class(cls, record: Record, event: object) -> None:
        await cls(record).method(event)


class Later:
    """An awaitable that is no coroutine."""

    def __init__(self, recorder: Recorder, event: object) -> None:
        self._wait = recorder.method(event)

    def __await__(self) -> Generator[object, None, None]:
        yield from self._wait.__await__()


def wrapped(recorder: Recorder) -> Callable[[object], object]:
    @wraps(recorder.method)
    def wrapper(event: object) -> object:
        return recorder.method(event)

    return wrapper


def returning(recorder: Recorder) -> Callable[[object], object]:
    return lambda event: Later(recorder, event)


def plain_closure(recorder: Recorder) -> Callable[[object], None]:
    def closure(event: object) -> None:
        recorder.plain(event)

    return closure


KINDS: dict[str, Callable[[Recorder], Callable[[object], object]]] = {
    "async method": lambda recorder: recorder.method,
    "plain method": lambda recorder: recorder.plain,
    "plain function": plain_closure,
    "callable object": lambda recorder: recorder,
    "class method": lambda recorder: partial(Recorder.of_class, recorder.record),
    "partial": lambda recorder: partial(recorder.second, "first"),
    "partial of a partial": lambda recorder: partial(partial(recorder)),
    "partial of an object": partial,
    "wrapped": wrapped,
    "lambda returning an awaitable": returning,
    "built-in": lambda recorder: recorder.record,
}


class DispatchContract(BusContract):
    """How the handlers of one event run: together, in order, each in its own context."""

    # Concurrency and order

    @for_each(True, False)
    async def test_a_handler_may_wait_for_a_sibling_whichever_was_subscribed_first(
        self, waiter_first: bool
    ) -> None:
        bus = self.new_bus()
        done = anyio.Event()

        async def waits(event: Ping) -> None:
            await done.wait()

        async def works(event: Ping) -> None:
            await checkpoint()
            done.set()

        for handler in (waits, works) if waiter_first else (works, waits):
            bus.subscribe(Ping, handler)

        assert await self.deliver(bus, Ping()) == []
        assert outcomes(bus) == (2, 0, 0)

    async def test_handlers_may_wait_for_each_other_several_times(self) -> None:
        bus = self.new_bus()
        to_left, to_right = (anyio.create_memory_object_stream[int](0) for _ in range(2))

        async def left(event: Ping) -> None:
            for turn in range(3):
                await to_right[0].send(turn)
                assert await to_left[1].receive() == turn

        async def right(event: Ping) -> None:
            for turn in range(3):
                assert await to_right[1].receive() == turn
                await to_left[0].send(turn)

        bus.subscribe(Ping, left)
        bus.subscribe(Ping, right)

        assert await self.deliver(bus, Ping()) == []
        for end in (*to_left, *to_right):
            end.close()

    @for_each(False, True)
    async def test_handlers_start_in_the_order_of_subscription(self, sequential: bool) -> None:
        bus = self.new_bus(sequential=sequential)
        started: list[int] = []
        for number in range(20):

            async def handler(event: Ping, number: int = number) -> None:
                started.append(number)
                if number % 3:
                    await checkpoint()

            bus.subscribe(Ping, handler)

        await self.deliver(bus, Ping())

        assert started == list(range(20))

    async def test_dispatch_returns_when_every_handler_has_ended(self) -> None:
        bus = self.new_bus()
        release, returned = anyio.Event(), anyio.Event()

        @bus.on(Ping)
        async def slow(event: Ping) -> None:
            await release.wait()

        @bus.on(Ping)
        async def quick(event: Ping) -> None:
            pass

        async def run() -> None:
            await self.deliver(bus, Ping())
            returned.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await all_tasks_blocked()
            assert not returned.is_set()
            assert (bus.stats.running, bus.stats.handled) == (1, 1)
            release.set()

        assert returned.is_set()

    async def test_sequential_handlers_run_one_after_the_other(self) -> None:
        bus = self.new_bus(sequential=True)
        steps: list[str] = []
        for name in "abc":

            async def handler(event: Ping, name: str = name) -> None:
                steps.append(f"{name} starts")
                for _ in range(5):
                    await checkpoint()
                steps.append(f"{name} ends")

            bus.subscribe(Ping, handler)

        await self.deliver(bus, Ping())

        assert steps == ["a starts", "a ends", "b starts", "b ends", "c starts", "c ends"]

    async def test_a_failure_does_not_stop_the_next_of_sequential_handlers(self) -> None:
        bus = self.new_bus(sequential=True)
        ran: list[str] = []

        @bus.on(Ping)
        async def fails(event: Ping) -> None:
            await checkpoint()
            ran.append("fails")
            raise Boom

        @bus.on(Ping)
        async def works(event: Ping) -> None:
            ran.append("works")

        failures = await self.deliver(bus, Ping())

        assert ran == ["fails", "works"]
        assert [type(failure) for failure in failures] == [Boom]

    async def test_a_thousand_handlers_run_at_once_and_one_failure_is_one_failure(self) -> None:
        bus = self.new_bus()
        everyone = anyio.Event()
        arrived = 0

        async def meet(event: Ping, number: int) -> None:
            nonlocal arrived
            arrived += 1
            if arrived == 1000:
                everyone.set()
            await everyone.wait()
            if number == 500:
                raise Boom

        for number in range(1000):
            bus.subscribe(Ping, partial(meet, number=number))

        failures = await self.deliver(bus, Ping())

        assert [type(failure) for failure in failures] == [Boom]
        assert outcomes(bus) == (999, 1, 0)

    async def test_what_handlers_publish_follows_breadth_first_in_handler_order(self) -> None:
        bus = self.new_bus()
        second_done = anyio.Event()
        seen: list[int] = []

        @bus.on(Ping)
        async def ends_last(event: Ping) -> None:
            await second_done.wait()
            bus.publish(Pong(1), Pong(2))

        @bus.on(Ping)
        async def ends_first(event: Ping) -> None:
            bus.publish(Pong(3))
            second_done.set()

        @bus.on(Pong)
        async def follow(event: Pong) -> None:
            seen.append(event.number)
            if event.number < 10:
                bus.publish(Pong(event.number * 10))

        await self.deliver(bus, Ping())

        assert seen == [1, 2, 3, 10, 20, 30]

    async def test_a_bus_serves_several_dispatches_at_once(self) -> None:
        bus = self.new_bus()
        seen: list[int] = []
        release = anyio.Event()

        @bus.on(Ping)
        async def handler(event: Ping) -> None:
            await release.wait()
            seen.append(event.number)

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(by_dispatch, bus, Ping(number))
            await all_tasks_blocked()
            assert bus.stats.running == 10
            release.set()

        assert sorted(seen) == list(range(10))

    # Context variables and tasks

    @for_each(0, 1, 2, 10)
    async def test_each_handler_has_context_variables_of_its_own(self, count: int) -> None:
        bus = self.new_bus()
        seen: list[str] = []
        for number in range(count):

            async def handler(event: Ping, number: int = number) -> None:
                seen.append(value.get())
                value.set(f"handler {number}")
                await checkpoint()
                seen.append(value.get())

            bus.subscribe(Ping, handler)
        value.set("caller")

        await self.deliver(bus, Ping())

        own = [f"handler {number}" for number in range(count)]
        assert sorted(seen) == ["caller"] * count + sorted(own)
        assert value.get() == "caller"

    async def test_a_delivery_sees_the_context_variables_as_of_its_publish(self) -> None:
        bus = self.new_bus()
        seen: list[tuple[int, str]] = []

        @bus.on(Ping)
        async def look(event: Ping) -> None:
            seen.append((event.number, value.get()))
            value.set(f"handler {event.number}")
            if event.number < 10:
                bus.publish(Ping(10 + event.number))

        async with bus.context() as unit:
            for number in (1, 2):
                value.set(f"publish {number}")
                unit.publish(Ping(number))
            value.set("drain")
            await unit.drain()

        assert seen == [(1, "publish 1"), (2, "publish 2"), (11, "handler 1"), (12, "handler 2")]

    @for_each(1, 2, 5)
    async def test_a_handler_is_in_the_same_task_before_and_after_each_suspension(
        self, count: int
    ) -> None:
        bus = self.new_bus()
        tasks_of: list[set[int]] = []

        async def handler(event: Ping, number: int) -> None:
            tasks = {get_current_task().id}
            tasks_of.append(tasks)
            for _ in range(number + 1):
                await checkpoint()
                tasks.add(get_current_task().id)
            with anyio.CancelScope():
                await checkpoint()
                tasks.add(get_current_task().id)

        for number in range(count):
            bus.subscribe(Ping, partial(handler, number=number))

        await self.deliver(bus, Ping())

        assert [len(tasks) for tasks in tasks_of] == [1] * count

    @for_each(False, True)
    async def test_no_task_outlives_the_dispatch(self, cancel: bool) -> None:
        bus = self.new_bus()
        before = {task.id for task in get_running_tasks()}
        released, all_there = anyio.Event(), anyio.Event()

        async def child() -> None:
            await released.wait()

        async def handler(event: Ping, number: int) -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child)
                if number == 4:
                    all_there.set()

        for number in range(5):
            bus.subscribe(Ping, partial(handler, number=number))

        with anyio.CancelScope() as scope:

            async def end() -> None:
                await all_there.wait()
                await all_tasks_blocked()
                if cancel:
                    scope.cancel()
                else:
                    released.set()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(end)
                await self.deliver(bus, Ping())

        assert {task.id for task in get_running_tasks()} == before
        assert outcomes(bus) == ((0, 0, 5) if cancel else (5, 0, 0))

    async def test_threads_that_a_handler_uses_see_its_context(self) -> None:
        bus = self.new_bus()
        seen: list[object] = []

        def in_thread() -> None:
            seen.extend([value.get(), current_delivery().event])
            bus.publish(Pong(1))
            from_thread.run_sync(bus.publish, Pong(2))

        @bus.on(Ping)
        async def hop(event: Ping) -> None:
            value.set("handler")
            await to_thread.run_sync(in_thread)

        @bus.on(Pong)
        async def follow(event: Pong) -> None:
            seen.append(event)

        await self.deliver(bus, Ping(7))

        assert seen == ["handler", Ping(7), Pong(1), Pong(2)]

    # Where handlers run, and what is a handler

    async def test_a_plain_function_runs_in_a_worker_thread_with_its_context(self) -> None:
        bus = self.new_bus()
        seen: list[object] = []

        @bus.on(Ping)
        def plain(event: Ping) -> None:
            seen.append(threading.get_ident() != loop_thread)
            seen.extend([value.get(), current_delivery().event])
            bus.publish(Pong())
            value.set("thread")

        @bus.on(Pong)
        async def follow(event: Pong) -> None:
            seen.append(event)

        loop_thread = threading.get_ident()
        value.set("caller")

        assert await self.deliver(bus, Ping(3)) == []
        assert seen == [True, "caller", Ping(3), Pong()]
        assert value.get() == "caller"

    async def test_worker_threads_of_one_event_run_at_the_same_time(self) -> None:
        bus = self.new_bus()
        barrier = threading.Barrier(3, timeout=10)

        def meet(event: Ping) -> None:
            barrier.wait()

        for _ in range(3):
            bus.subscribe(Ping, partial(meet))

        assert await self.deliver(bus, Ping()) == []

    async def test_a_plain_function_with_thread_false_runs_on_the_loop(self) -> None:
        bus = self.new_bus()
        threads: list[int] = []

        @bus.on(Ping, thread=False)
        def plain(event: Ping) -> None:
            threads.append(threading.get_ident())

        await self.deliver(bus, Ping())

        assert threads == [threading.get_ident()]

    @for_each(True, False)
    async def test_what_a_plain_function_returns_is_awaited_on_the_loop(self, thread: bool) -> None:
        bus = self.new_bus()
        threads: list[bool] = []
        loop_thread = threading.get_ident()

        async def rest() -> None:
            await checkpoint()
            threads.append(threading.get_ident() == loop_thread)

        def plain(event: Ping) -> Awaitable[None]:
            threads.append(threading.get_ident() == loop_thread)
            return rest()

        bus.subscribe(Ping, plain, thread=thread)

        assert await self.deliver(bus, Ping()) == []
        assert threads == [not thread, True]

    @for_each(*KINDS)
    @for_each(None, False)
    async def test_every_kind_of_callable_is_called_and_awaited(
        self, thread: bool | None, kind: str
    ) -> None:
        bus = self.new_bus()
        seen: list[object] = []
        bus.subscribe(Ping, KINDS[kind](Recorder(seen.append)), thread=thread)

        assert await self.deliver(bus, Ping(5)) == []
        assert seen == [Ping(5)]

    @for_each(None, False)
    async def test_a_generator_as_result_is_a_failure(self, thread: bool | None) -> None:
        bus = self.new_bus()

        async def numbers() -> AsyncGenerator[int]:
            yield 1

        numbered = numbers()
        await anext(numbered)

        def generator(event: Ping) -> object:
            return os.walk("")

        def asynchronous(event: Ping) -> object:
            return numbered

        bus.subscribe(Ping, generator, name="generator", thread=thread)
        bus.subscribe(Ping, asynchronous, name="asynchronous", thread=thread)

        failures = await self.deliver(bus, Ping())

        assert {type(failure) for failure in failures} == {InvalidHandlerError}
        assert sorted(str(failure).split()[0] for failure in failures) == [
            "asynchronous",
            "generator",
        ]

    @for_each(0, "", object, NotImplemented)
    async def test_any_other_result_means_nothing(self, result: object) -> None:
        bus = self.new_bus()

        def handler(event: Ping) -> object:
            return result

        bus.subscribe(Ping, handler, thread=False)

        assert await self.deliver(bus, Ping()) == []

    # Scopes of a handler's own

    @for_each(1, 2, 5)
    async def test_timeouts_inside_handlers_work(self, count: int) -> None:
        bus = self.new_bus()
        steps: list[str] = []

        async def handler(event: Ping, number: int) -> None:
            await checkpoint()
            with move_on_after(0) as scope:
                await sleep_forever()
            assert scope.cancelled_caught
            await checkpoint()
            with raises(TimeoutError), fail_after(0):
                await sleep_forever()
            await checkpoint()
            steps.append("went on")

        for number in range(count):
            bus.subscribe(Ping, partial(handler, number=number))

        assert await self.deliver(bus, Ping()) == []
        assert steps == ["went on"] * count

    @for_each(True, False)
    async def test_a_scope_across_suspensions_ends_its_own_block_alone(
        self, cancelling_first: bool
    ) -> None:
        bus = self.new_bus()
        scope = CancelScope()
        waiting, cancelled = anyio.Event(), anyio.Event()
        steps: list[str] = []

        async def has_scope(event: Ping) -> None:
            with scope:
                await checkpoint()
                waiting.set()
                await sleep_forever()
            await checkpoint()
            steps.append("has_scope")

        async def cancelling(event: Ping) -> None:
            await waiting.wait()
            scope.cancel()
            cancelled.set()
            await checkpoint()
            steps.append("cancelling")

        async def sibling(event: Ping) -> None:
            await cancelled.wait()
            await checkpoint()
            steps.append("sibling")

        handlers = [has_scope, cancelling, sibling]
        for handler in reversed(handlers) if cancelling_first else handlers:
            bus.subscribe(Ping, handler)

        assert await self.deliver(bus, Ping()) == []
        assert sorted(steps) == ["cancelling", "has_scope", "sibling"]

    async def test_task_groups_inside_handlers_end_for_themselves(self) -> None:
        bus = self.new_bus()
        ended: list[str] = []

        async def fail() -> None:
            await checkpoint()
            raise Boom

        @bus.on(Ping)
        async def failing(event: Ping) -> None:
            async with create_task_group() as tasks:
                tasks.start_soon(fail)
                tasks.start_soon(sleep_forever)

        @bus.on(Ping)
        async def cancelled(event: Ping) -> None:
            async with create_task_group() as tasks:
                tasks.start_soon(sleep_forever)
                await checkpoint()
                tasks.cancel_scope.cancel()
            ended.append("cancelled")

        @bus.on(Ping)
        async def working(event: Ping) -> None:
            async with create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(checkpoint)
            await all_tasks_blocked()
            ended.append("working")

        (group,) = await self.deliver(bus, Ping())

        assert kinds_in(group) == [Boom]
        assert sorted(ended) == ["cancelled", "working"]

    # Dispatch inside handlers

    @for_each(False, True)
    async def test_an_awaited_dispatch_may_nest_up_to_the_depth_limit(
        self, sequential: bool
    ) -> None:
        bus = self.new_bus(sequential=sequential, max_depth=3)
        depths: list[int] = []

        @bus.on(Ping)
        async def deeper(event: Ping) -> None:
            depths.append(current_delivery().depth)
            await checkpoint()
            await bus.dispatch(Ping())

        @bus.on(Ping)
        async def beside(event: Ping) -> None:
            await checkpoint()

        failures = await self.deliver(bus, Ping())
        while isinstance(failures[0], DispatchError):
            failures = list(failures[0].exceptions)

        assert depths == [0, 1, 2, 3]
        (error,) = failures
        assert isinstance(error, EventDepthError)
        assert error.limit == 3
        assert len(error.chain) == 4
        assert outcomes(bus) == (4, 4, 0)

    async def test_an_awaited_dispatch_has_ended_before_the_handler_goes_on(self) -> None:
        bus = self.new_bus()
        steps: list[str] = []

        @bus.on(Ping)
        async def outer(event: Ping) -> None:
            bus.publish(Pong(2))
            await bus.dispatch(Pong(1))
            steps.append("outer goes on")

        @bus.on(Pong)
        async def inner(event: Pong) -> None:
            await checkpoint()
            steps.append(f"pong {event.number}")

        await self.deliver(bus, Ping())

        assert steps == ["pong 1", "outer goes on", "pong 2"]

    async def test_a_failed_awaited_dispatch_reaches_the_handler_that_awaits_it(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping)
        async def outer(event: Ping) -> None:
            with raises(DispatchError) as caught:
                await bus.dispatch(Pong())
            assert [type(error) for error in caught.value.exceptions] == [Boom]

        @bus.on(Pong)
        async def inner(event: Pong) -> None:
            raise Boom

        assert await self.deliver(bus, Ping()) == []
        assert outcomes(bus) == (1, 1, 0)

    async def test_handlers_that_dispatch_to_each_other_concurrently_do_not_mix(self) -> None:
        bus = self.new_bus()
        seen: list[tuple[int, int]] = []

        async def outer(event: Ping, number: int) -> None:
            value.set(str(number))
            await bus.dispatch(Pong(number))

        for number in range(5):
            bus.subscribe(Ping, partial(outer, number=number))

        @bus.on(Pong)
        async def inner(event: Pong) -> None:
            await checkpoint()
            seen.append((event.number, int(value.get())))

        await self.deliver(bus, Ping())

        assert sorted(seen) == [(number, number) for number in range(5)]
