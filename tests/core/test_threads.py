"""Synchronous units of work: on which event loop their handlers run, and how that one ends."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from functools import partial
from textwrap import dedent
from typing import Any

import anyio
import pytest
import trio
from anyio import create_task_group, to_thread, wait_all_tasks_blocked
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eventkit import EventBus
from eventkit._core.loops import threads
from eventkit._core.loops.running import current_loop, library
from eventkit.starlette import EventContextMiddleware
from tests.asgi import Backend, Exchange, client_of, lifespan_of
from tests.witness import assert_settled, witnessed

pytestmark = pytest.mark.anyio


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture
def seen(bus: EventBus) -> Generator[list[str]]:
    """What became of each delivery; nothing may be left over at the end of the test."""
    yield witnessed(bus)
    assert_settled(bus)


@pytest.fixture
def pool() -> Generator[ThreadPoolExecutor]:
    """Threads that know nothing of their creator's context variables, as schedulers have them."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


class Places:
    """A handler of integers that notes on which event loop, and in which thread, it ran."""

    def __init__(self, bus: EventBus) -> None:
        self.loops: list[object] = []
        self.threads: list[threading.Thread] = []
        bus.subscribe(int, self.handle)

    async def handle(self, event: int) -> None:
        await anyio.lowlevel.checkpoint()
        self.loops.append(current_loop())
        self.threads.append(threading.current_thread())


@pytest.fixture
def places(bus: EventBus) -> Places:
    return Places(bus)


def publish(bus: EventBus, event: object = 1, **options: bool) -> None:
    """What a synchronous job does."""
    with bus.context(**options):
        bus.publish(event)


# A process without an event loop


def test_synchronous_units_in_a_row_have_one_event_loop(bus: EventBus, places: Places) -> None:
    publish(bus)
    publish(bus)

    assert places.loops[0] is places.loops[1]
    assert places.threads == [threading.current_thread()] * 2


def test_a_pooled_engine_serves_the_handlers_of_one_synchronous_unit_after_the_other(
    bus: EventBus, service_url: Callable[[str], str], seen: list[str]
) -> None:
    engine = create_async_engine(service_url("postgres"), pool_size=1, max_overflow=0)

    @bus.on(int)
    async def query(event: int) -> None:
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1

    @bus.on(str)
    async def close(event: str) -> None:
        await engine.dispose()

    thread = threading.Thread(target=publish, args=(bus, 2))
    publish(bus, 1)
    thread.start()
    thread.join()
    publish(bus, 3)
    publish(bus, "over")

    assert seen == ["handled 1", "handled 2", "handled 3", "handled over"]


def test_units_of_different_threads_run_on_one_loop_at_the_same_time(
    bus: EventBus, places: Places, pool: ThreadPoolExecutor, seen: list[str]
) -> None:
    arrived = list[str]()
    all_there = asyncio.Event()

    @bus.on(str)
    async def meet(event: str) -> None:
        arrived.append(event)
        bus.publish(len(arrived))
        if len(arrived) == 3:
            all_there.set()
        await all_there.wait()

    jobs = [pool.submit(publish, bus, event) for event in ("a", "b", "c")]
    for job in jobs:
        job.result(30)

    assert sorted(arrived) == ["a", "b", "c"]
    assert len({*places.loops}) == 1


def test_a_thread_whose_unit_is_over_leaves_the_loop_to_the_next(
    bus: EventBus, pool: ThreadPoolExecutor, seen: list[str]
) -> None:
    first, second, go_on = threading.Event(), threading.Event(), threading.Event()
    ended: list[str] = []

    @bus.on(str)
    async def handle(event: str) -> None:
        if event == "first":
            first.set()
            await to_thread.run_sync(second.wait)
        else:
            second.set()
            await to_thread.run_sync(go_on.wait)  # what ends in another thread still arrives
            ended.append(threading.current_thread().name)

    driving = pool.submit(publish, bus, "first")
    first.wait(30)
    names: list[str] = []

    def follow() -> None:
        names.append(threading.current_thread().name)
        publish(bus, "second")

    following = pool.submit(follow)
    driving.result(30)
    assert not following.done()
    go_on.set()
    following.result(30)

    assert ended == names
    assert seen == ["handled first", "handled second"]


def test_a_handler_may_wait_for_a_thread_with_a_unit_of_its_own(
    bus: EventBus, places: Places, pool: ThreadPoolExecutor
) -> None:
    @bus.on(str)
    async def handle(event: str) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(pool, publish, bus)  # which brings no context variables
        assert places.loops == [loop]

    publish(bus, "a")

    assert bus.stats.handled == 2


def test_a_plain_handler_runs_in_each_of_two_units(bus: EventBus, seen: list[str]) -> None:
    threads: list[threading.Thread] = []

    @bus.on(int)
    def handle(event: int) -> None:
        threads.append(threading.current_thread())

    publish(bus)
    publish(bus)

    assert threading.current_thread() not in threads
    assert seen == ["handled 1"] * 2


def test_an_interrupt_of_a_handler_reaches_its_own_thread_alone(
    bus: EventBus, pool: ThreadPoolExecutor, seen: list[str]
) -> None:
    first, go_on = threading.Event(), threading.Event()

    @bus.on(str)
    async def handle(event: str) -> None:
        if event == "exits":
            raise SystemExit(3)
        first.set()
        await to_thread.run_sync(go_on.wait)

    driving = pool.submit(publish, bus, "waits")
    first.wait(30)
    with pytest.raises(SystemExit):
        publish(bus, "exits")
    go_on.set()
    driving.result(30)

    assert seen == ["undelivered exits", "handled waits"]


def test_variables_of_another_kind_of_loop_do_not_confuse_the_units_loop(
    bus: EventBus, places: Places, seen: list[str]
) -> None:
    async def main() -> None:
        # What AnyIO's older releases set for a whole run.
        library.set("trio")
        thread = threading.Thread(target=copy_context().run, args=(publish, bus))
        thread.start()
        await trio.to_thread.run_sync(thread.join)

    trio.run(main)

    assert isinstance(places.loops[0], asyncio.AbstractEventLoop)
    assert seen == ["handled 1"]


def test_the_loop_is_not_made_the_current_one_of_the_thread(
    bus: EventBus, pool: ThreadPoolExecutor, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_loop = threads._OwnLoop()
    monkeypatch.setattr(threads, "_own_loop", own_loop)

    def job() -> None:
        publish(bus)
        with pytest.raises(RuntimeError):
            asyncio.get_event_loop()

    pool.submit(job).result(30)
    own_loop.close()

    assert isinstance(places.loops[0], asyncio.AbstractEventLoop)
    assert places.loops[0].is_closed()


# Ctrl-C


@pytest.fixture(autouse=True)
def _heard() -> Generator[None]:
    """Ctrl-C is heard, also where the shell has started the tests to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    """As a terminal does: the main thread gets the signal."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


class Endless:
    """A handler of strings that begins, waits without end, and says that it was cancelled."""

    def __init__(self, bus: EventBus) -> None:
        self.begun = threading.Event()
        self.steps: list[str] = []
        bus.subscribe(str, self.handle, name="endless")

    async def handle(self, event: str) -> None:
        self.begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.steps.append(f"cleaned up {event}")


def pressing(begun: threading.Event) -> threading.Thread:
    """A thread that presses Ctrl-C once that has begun."""

    def press() -> None:
        begun.wait(30)
        press_ctrl_c()
        # A signal that comes just before the loop goes to sleep is seen as the loop wakes up.
        if threads._own_loop._loop is not None:
            threads._own_loop._loop.call_soon_threadsafe(lambda: None)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_ctrl_c_ends_the_handlers_of_the_unit_that_the_main_thread_waits_for(
    bus: EventBus, places: Places, seen: list[str]
) -> None:
    endless = Endless(bus)
    thread = pressing(endless.begun)

    with pytest.raises(KeyboardInterrupt):
        publish(bus, "a")
    thread.join()

    assert endless.steps == ["cleaned up a"]
    publish(bus)
    assert seen == ["undelivered a", "handled 1"]


def test_ctrl_c_ends_them_also_where_another_thread_drives_the_loop(
    bus: EventBus, pool: ThreadPoolExecutor, seen: list[str]
) -> None:
    first, go_on = threading.Event(), threading.Event()

    @bus.on(float)
    async def drive(event: float) -> None:
        first.set()
        await to_thread.run_sync(go_on.wait)

    driving = pool.submit(publish, bus, 0.5)
    first.wait(30)
    endless = Endless(bus)
    thread = pressing(endless.begun)
    with pytest.raises(KeyboardInterrupt):
        publish(bus, "a")
    thread.join()

    assert endless.steps == ["cleaned up a"]
    go_on.set()
    driving.result(30)
    assert seen == ["undelivered a", "handled 0.5"]


def test_ctrl_c_ends_them_on_the_loop_of_an_application_too(
    bus: EventBus, anyio_backend: Backend, seen: list[str]
) -> None:
    endless = Endless(bus)
    app = Starlette()
    app.add_middleware(EventContextMiddleware, bus=bus)

    with client_of(app, anyio_backend):
        thread = pressing(endless.begun)
        with pytest.raises(KeyboardInterrupt):
            publish(bus, "a")
        thread.join()
        assert endless.steps == ["cleaned up a"]

    assert seen == ["undelivered a"]


async def test_a_call_that_is_cancelled_before_its_first_step_ends_at_its_first_wait() -> None:
    steps: list[str] = []

    async def function() -> None:
        steps.append("begun")
        await anyio.lowlevel.checkpoint()
        steps.append("went on")

    call = threads._Call(function, threading.Condition())
    call.start()
    call.cancel()
    await wait_all_tasks_blocked()

    assert call.over
    assert steps == ["begun"]


async def test_a_call_that_is_cancelled_before_it_is_started_never_starts() -> None:
    steps: list[str] = []

    async def function() -> None:
        steps.append("begun")

    call = threads._Call(function, threading.Condition())
    call.cancel()
    assert call.over
    call.start()
    await wait_all_tasks_blocked()

    assert steps == []


def test_a_thread_that_waits_looks_again_and_again_whether_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "_LOOK_SECONDS", 0.01)
    looks: list[str] = []

    async def function() -> None: ...

    def go_on() -> bool:
        looks.append("go on")
        if len(looks) == 3:
            call.cancel()
        return True

    call = threads._Call(function, threading.Condition(threading.RLock()))
    call.wait_while(go_on)

    assert len(looks) == 3


def test_ctrl_c_as_the_loop_of_another_thread_ends_is_raised_at_once() -> None:
    class Ending:
        """The token of a loop of trio that ends as somebody presses Ctrl-C."""

        def run_sync_soon(self, function: Callable[[], None]) -> None:
            if function.__name__ == "start":
                raise KeyboardInterrupt
            raise RuntimeError

    async def function() -> None: ...

    with pytest.raises(KeyboardInterrupt):
        threads.reach(Ending(), function)


def test_ctrl_c_just_before_a_call_is_started_leaves_its_unit_undelivered(
    bus: EventBus, places: Places, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(bus)
    loop = threads._own_loop._loop
    assert loop is not None
    call_soon, calls = loop.call_soon_threadsafe, list[str]()

    def interrupted(*args: Any, **options: Any) -> asyncio.Handle:
        calls.append(args[0].__name__)
        if calls == ["start"]:
            raise KeyboardInterrupt
        return call_soon(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publish(bus, 2)

    assert calls[:2] == ["start", "cancel"]
    publish(bus, 3)
    assert seen == ["handled 1", "undelivered 2", "handled 3"]


# An application's event loop


def application(bus: EventBus, **options: float) -> Starlette:
    app = Starlette()
    app.add_middleware(EventContextMiddleware, bus=bus, **options)  # type: ignore[arg-type]
    return app


async def test_a_thread_without_variables_delivers_on_the_loop_of_the_lifespan(
    bus: EventBus, places: Places, pool: ThreadPoolExecutor
) -> None:
    async with lifespan_of(application(bus)):
        for _ in range(2):
            await to_thread.run_sync(pool.submit(publish, bus).result)
        assert places.loops == [current_loop()] * 2

    assert places.threads == [threading.current_thread()] * 2


async def in_asyncios_thread(function: Callable[[], None]) -> None:
    """Run it as asyncio or trio does by itself."""
    if isinstance(current_loop(), asyncio.AbstractEventLoop):
        await asyncio.to_thread(function)
    else:
        await trio.to_thread.run_sync(function)


async def in_a_thread_with_variables(function: Callable[[], None]) -> None:
    """Run it in a thread that knows nothing but its creator's context variables."""
    thread = threading.Thread(target=copy_context().run, args=(function,))
    thread.start()
    await to_thread.run_sync(thread.join)


async def test_a_thread_of_asyncio_or_trio_delivers_on_the_loop_of_the_lifespan(
    bus: EventBus, places: Places
) -> None:
    async with lifespan_of(application(bus)):
        await in_asyncios_thread(partial(publish, bus))

    assert places.loops == [current_loop()]


both_threads = pytest.mark.parametrize(
    "in_thread", [in_asyncios_thread, in_a_thread_with_variables]
)
InThread = Callable[[Callable[[], None]], Any]


@both_threads
async def test_a_thread_in_a_unit_delivers_on_the_loop_of_that_unit(
    bus: EventBus, places: Places, in_thread: InThread
) -> None:
    async with bus.context():
        await in_thread(partial(publish, bus, independent=True))
        assert places.loops == [current_loop()]
        await in_thread(partial(publish, bus))
        assert len(places.loops) == 1  # a savepoint

    assert places.loops == [current_loop()] * 2


async def test_a_thread_that_outlives_its_unit_delivers_on_the_loop_of_that_unit(
    bus: EventBus, places: Places
) -> None:
    go_on = threading.Event()

    def job() -> None:
        go_on.wait(30)
        publish(bus)

    async with create_task_group() as tasks:
        async with bus.context():
            tasks.start_soon(in_a_thread_with_variables, job)
            await anyio.lowlevel.checkpoint()
        go_on.set()

    assert places.loops == [current_loop()]


@both_threads
async def test_a_thread_in_a_handler_delivers_on_the_loop_of_that_handler(
    bus: EventBus, places: Places, in_thread: InThread
) -> None:
    @bus.on(str)
    async def handle(event: str) -> None:
        await in_thread(partial(publish, bus, independent=True))
        assert places.loops == [current_loop()]

    await bus.dispatch("a")

    assert len(places.loops) == 1


async def test_a_thread_in_a_request_delivers_on_the_loop_of_the_request(
    bus: EventBus, places: Places
) -> None:
    async def endpoint(_: Request) -> Response:
        await in_a_thread_with_variables(partial(publish, bus, independent=True))
        return Response()

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(EventContextMiddleware, bus=bus)
    await Exchange().run(app)

    assert places.loops == [current_loop()]


async def test_a_thread_of_trio_that_was_cancelled_leaves_its_unit_undelivered(
    bus: EventBus, places: Places, seen: list[str], on_trio: None
) -> None:
    entered, go_on = anyio.Event(), threading.Event()

    def job() -> None:
        with bus.context():
            bus.publish(1)
            trio.from_thread.run_sync(entered.set)
            go_on.wait(30)

    async with create_task_group() as tasks:
        tasks.start_soon(in_asyncios_thread, job)
        await entered.wait()
        tasks.cancel_scope.cancel()
        go_on.set()

    assert seen == ["undelivered 1"]


def test_of_several_lifespans_the_one_that_the_variables_are_of_is_asked_else_the_last(
    bus: EventBus, places: Places, anyio_backend: Backend
) -> None:
    loops: dict[str, object] = {}
    variables: dict[str, Context] = {}

    def app_of(name: str) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
            loops[name], variables[name] = current_loop(), copy_context()
            yield

        app = FastAPI(lifespan=lifespan)
        app.add_middleware(EventContextMiddleware, bus=bus)
        return app

    with client_of(app_of("first"), anyio_backend), client_of(app_of("last"), anyio_backend):
        variables["first"].run(publish, bus)
        variables["last"].run(publish, bus)
        publish(bus)

    assert loops["first"] is not loops["last"]
    assert places.loops == [loops["first"], loops["last"], loops["last"]]


async def test_a_synchronous_unit_is_left_to_the_background_from_any_thread(
    bus: EventBus, pool: ThreadPoolExecutor, seen: list[str]
) -> None:
    go_on = anyio.Event()

    @bus.on(str)
    async def handle(event: str) -> None:
        await go_on.wait()

    async with lifespan_of(application(bus)):
        await to_thread.run_sync(pool.submit(publish, bus, "a", background=True).result)
        await in_asyncios_thread(partial(publish, bus, "b", background=True))
        await wait_all_tasks_blocked()
        assert seen == []
        go_on.set()

    assert sorted(seen) == ["handled a", "handled b"]


async def test_an_interrupt_of_a_handler_is_its_threads_and_not_the_loops(
    bus: EventBus, pool: ThreadPoolExecutor, seen: list[str]
) -> None:
    @bus.on(str)
    async def handle(event: str) -> None:
        raise SystemExit(3)

    async with lifespan_of(application(bus)):
        with pytest.raises(SystemExit):
            await to_thread.run_sync(pool.submit(publish, bus, "a").result)

    assert seen == ["undelivered a"]


# Its shutdown


async def test_the_shutdown_waits_for_what_threads_deliver_before_the_app_closes_anything(
    bus: EventBus, pool: ThreadPoolExecutor, seen: list[str]
) -> None:
    begun, go_on = anyio.Event(), anyio.Event()

    @bus.on(str)
    async def handle(event: str) -> None:
        begun.set()
        await go_on.wait()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        assert seen == ["handled a"]
        job.result(30)  # blocks the event loop, as the `shutdown()` of schedulers does

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)

    async def open_later() -> None:
        await wait_all_tasks_blocked()
        go_on.set()

    async with create_task_group() as tasks, lifespan_of(app) as running:
        job = pool.submit(publish, bus, "a")
        await begun.wait()
        tasks.start_soon(open_later)

    assert running.error is None


async def test_at_the_deadline_of_the_shutdown_what_threads_deliver_is_cancelled(
    bus: EventBus, pool: ThreadPoolExecutor, seen: list[str]
) -> None:
    begun = anyio.Event()

    @bus.on(str)
    async def handle(event: str) -> None:
        begun.set()
        await anyio.sleep_forever()

    async with lifespan_of(application(bus, shutdown_timeout=0.01)):
        job = pool.submit(publish, bus, "a")
        await begun.wait()

    await to_thread.run_sync(job.result)
    assert seen == ["undelivered a"]


async def test_after_the_drain_of_the_shutdown_no_thread_waits_for_the_applications_loop(
    bus: EventBus, places: Places, pool: ThreadPoolExecutor
) -> None:
    go_on = threading.Event()

    def work() -> None:
        with bus.context():
            bus.publish(1)
            go_on.wait(30)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        job = pool.submit(work)
        yield
        go_on.set()
        job.result(30)  # blocks the event loop

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(EventContextMiddleware, bus=bus)
    async with lifespan_of(app) as running:
        pass

    assert running.error is None
    assert places.loops != [current_loop()]
    assert bus.stats.handled == 1


async def test_who_comes_to_an_entrance_as_it_is_closed_goes_elsewhere() -> None:
    entrance, ran = threads.Entrance(), list[str]()

    async def function() -> None:
        ran.append("ran")

    assert await to_thread.run_sync(entrance.run, function)
    await entrance.close(1)
    assert not await to_thread.run_sync(entrance.run, function)

    assert ran == ["ran"]


async def test_two_may_close_an_entrance_and_both_see_the_last_call_leave() -> None:
    entrance, go_on, steps = threads.Entrance(), anyio.Event(), list[str]()

    async def close() -> None:
        await entrance.close(math.inf)
        steps.append("closed")

    with anyio.fail_after(30):
        async with create_task_group() as tasks:
            tasks.start_soon(to_thread.run_sync, entrance.run, go_on.wait)
            while not entrance._calls:
                await wait_all_tasks_blocked()
            tasks.start_soon(close)
            tasks.start_soon(close)
            await wait_all_tasks_blocked()
            assert steps == []
            go_on.set()

    assert steps == ["closed", "closed"]


# The end of other event loops


def test_a_thread_whose_units_loop_has_ended_delivers_elsewhere(
    bus: EventBus, places: Places, anyio_backend: Backend
) -> None:
    async def main() -> Context:
        async with bus.context():
            return copy_context()

    variables = anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])
    variables.run(publish, bus)

    assert bus.stats.handled == 1
    publish(bus)
    assert places.loops[0] is places.loops[1]


def test_what_a_thread_delivers_on_a_loop_that_ends_is_undelivered(
    bus: EventBus, anyio_backend: Backend, seen: list[str]
) -> None:
    endless = Endless(bus)
    threads: list[threading.Thread] = []

    async def main() -> None:
        async with bus.context():
            job = partial(publish, bus, "a", independent=True)
            threads.append(threading.Thread(target=copy_context().run, args=(job,)))
            threads[0].start()
            await to_thread.run_sync(endless.begun.wait)

    anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])
    (thread,) = threads
    thread.join(30)

    assert not thread.is_alive()
    assert endless.steps == ["cleaned up a"]
    assert seen == ["undelivered a"]


def test_a_thread_that_waits_for_a_loop_that_was_closed_is_told(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_LOOK_SECONDS", 0.01)
    called, steps = threading.Event(), list[str]()

    class Loop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(  # type: ignore[override]
            self, *args: Any, **options: Any
        ) -> asyncio.Handle:
            handle = super().call_soon_threadsafe(*args, **options)
            called.set()
            return handle

    async def function() -> None:
        steps.append("never")

    def stop_with_the_call_in_the_queue() -> None:
        jobs.append(pool.submit(threads.reach, loop, function))
        called.wait(30)
        loop.stop()

    loop, jobs = Loop(), list[Future[bool]]()
    loop.call_soon(stop_with_the_call_in_the_queue)
    loop.run_forever()
    loop.close()

    with pytest.raises(RuntimeError, match="the event loop was closed"):
        jobs[0].result(30)
    assert steps == []


@pytest.mark.usefixtures("on_asyncio")
async def test_a_call_whose_task_is_cancelled_before_its_first_step_was_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threads._Call.start

    def start_and_cancel(call: threads._Call) -> None:
        start(call)
        assert call._task is not None
        call._task.cancel()

    async def function() -> None:
        raise AssertionError

    monkeypatch.setattr(threads._Call, "start", start_and_cancel)
    assert not await to_thread.run_sync(threads.reach, current_loop(), function)


def test_a_trio_that_is_about_to_end_takes_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise RuntimeError("Nursery is closed to new arrivals")

    async def function() -> None:
        raise AssertionError

    async def main() -> bool:
        return await to_thread.run_sync(threads.reach, current_loop(), function)

    monkeypatch.setattr(trio.lowlevel, "spawn_system_task", closed)
    assert not anyio.run(main, backend="trio")


def test_a_thread_that_waits_for_a_trio_that_has_crashed_is_told(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_LOOK_SECONDS", 0.01)

    async def function() -> None:
        raise AssertionError

    answers = iter([True, False, False])  # it takes the call, and then it has ended

    def call_soon(*_: object) -> bool:
        return next(answers)

    monkeypatch.setattr(threads, "_call_soon", call_soon)
    job = pool.submit(threads.reach, "trio's token", function)

    with pytest.raises(RuntimeError, match="the event loop was closed"):
        job.result(30)


def test_a_unit_whose_loop_was_closed_before_its_end_began_is_undelivered(
    bus: EventBus, places: Places, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise RuntimeError("the event loop was closed")

    monkeypatch.setattr(threads._OwnLoop, "run", closed)
    with pytest.raises(RuntimeError):
        publish(bus)

    assert seen == ["undelivered 1"]


# The end of the process


def script(code: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, with all warnings, which fail it as they do here."""
    head = """
    import gc, os, sys, threading
    import anyio
    from anyio import to_thread
    from eventkit import EventBus

    bus = EventBus()

    @bus.on(int)
    async def handle(event):
        await anyio.lowlevel.checkpoint()
        print("handled", event, flush=True)

    @bus.on(str)
    def in_thread(event):
        print("handled", event, flush=True)

    def publish(*events):
        with bus.context():
            bus.publish(*events)
    """
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", dedent(head) + dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_ends_without_a_trace_of_its_loop() -> None:
    ended = script("""
    publish(1, "a")
    thread = threading.Thread(target=publish, args=(2, "b"))
    thread.start()
    thread.join()
    publish(3)
    """)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split("\n")[:-1] == [f"handled {event}" for event in (1, "a", 2, "b", 3)]


def test_what_handlers_have_left_on_the_loop_is_cancelled_at_the_end_of_the_process() -> None:
    ended = script("""
    import asyncio

    tasks = []

    @bus.on(float)
    async def leave(event):
        async def later():
            try:
                await asyncio.sleep(3600)
            finally:
                print("cancelled", flush=True)

        tasks.append(asyncio.create_task(later()))
        await asyncio.sleep(0)

    publish(0.5)
    print("ends", flush=True)
    """)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "ends\ncancelled\n"


def test_a_unit_at_the_end_of_the_process_is_delivered() -> None:
    ended = script("""
    import atexit

    publish(1)
    atexit.register(publish, 2)
    """)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "handled 1\nhandled 2\n"


def test_a_daemon_thread_that_drives_the_loop_does_not_hold_the_end_of_the_process() -> None:
    ended = script("""
    begun = threading.Event()

    @bus.on(float)
    async def wait(event):
        begun.set()
        await anyio.sleep_forever()

    threading.Thread(target=publish, args=(0.5,), daemon=True).start()
    begun.wait()
    print("ends", flush=True)
    """)

    assert ended.returncode == 0
    assert ended.stdout == "ends\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_child_process_has_a_loop_of_its_own_and_leaves_the_parents_alone() -> None:
    ended = script("""
    publish(0)
    child = os.fork()
    if child == 0:
        publish(1, "child")
        gc.collect()
        sys.exit()
    os.waitpid(child, 0)
    publish("parent")  # whose thread wakes the loop, if the child has not closed that
    """)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split("\n")[:-1] == [
        f"handled {event}" for event in (0, 1, "child", "parent")
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_child_of_a_process_that_had_no_loop_yet_has_one() -> None:
    ended = script("""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    publish(0 if child else 1)
    """)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "handled 1\nhandled 0\n"
