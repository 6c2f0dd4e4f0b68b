"""Child processes that are forked while other threads are at work on the same bus."""

import gc
import os
import select
import signal
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest

from eventkit import EventBus
from eventkit._core.locks import _after_fork_in_child, _before_fork
from eventkit.testing import EventCapture
from tests.witness import assert_settled, calling, nothing

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

DEADLINE = 20  # seconds; a child that hangs would hang for ever
FORKS = 15


@contextmanager
def at_work(work: Callable[[], object]) -> Generator[None]:
    """Have a thread do it again and again, without a pause, during the block."""
    begun, done = threading.Event(), threading.Event()

    def repeat() -> None:
        while not done.is_set():
            work()
            begun.set()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        begun.wait()
        yield
    finally:
        done.set()
        thread.join()


def forked(work: Callable[[], object]) -> str:
    """Have a forked child do it; give what became of the child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(writing, b"done")
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        ended, _, _ = select.select([pipe], [], [], DEADLINE)  # its last words, or its end
        if not ended:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return pipe.read().decode() if ended else "hung"


def publish(bus: EventBus) -> None:
    with bus.context() as unit:
        bus.publish(1, 2)
        unit.discard()


def subscribe(bus: EventBus) -> None:
    bus.subscribe(str, calling(list), thread=False).cancel()  # a function of its own
    bus.handlers_for(str)


@pytest.fixture
def bus() -> EventBus:
    """A bus with a handler of integers."""
    bus = EventBus()
    bus.subscribe(int, nothing, thread=False)
    return bus


@pytest.mark.parametrize("work", [publish, subscribe])
def test_a_child_that_is_forked_while_a_thread_is_at_work_publishes_and_subscribes(
    bus: EventBus, work: Callable[[EventBus], None]
) -> None:
    def use() -> None:
        publish(bus)
        subscribe(bus)
        with bus.context():
            bus.publish(3)
        assert bus.stats.running == 0

    with at_work(lambda: work(bus)):
        ends = [forked(use) for _ in range(FORKS)]

    assert ends == ["done"] * FORKS
    assert_settled(bus)


def test_a_child_that_is_forked_while_a_thread_publishes_counts_no_half_of_a_publish(
    bus: EventBus,
) -> None:
    def count() -> None:
        stats = bus.stats
        assert stats.published == stats.accepted
        assert stats.published % 2 == 0

    with at_work(lambda: publish(bus)):
        ends = [forked(count) for _ in range(FORKS)]

    assert ends == ["done"] * FORKS


def test_a_child_that_is_forked_while_a_thread_is_captured_goes_on(bus: EventBus) -> None:
    with EventCapture(bus) as events, at_work(lambda: publish(bus)):

        def look() -> None:
            seen = len(events.discarded)
            publish(bus)
            assert len(events.discarded) == seen + 2

        ends = [forked(look) for _ in range(FORKS)]

    assert ends == ["done"] * FORKS


def test_a_child_that_is_forked_under_a_lock_may_leave_it(bus: EventBus) -> None:
    """As a signal handler or a finalizer would: it runs wherever the thread is."""

    def use() -> None:
        publish(bus)
        bus._state.tally.lock.__exit__(None, None, None)
        assert not in_thread(lambda: publish(bus)).is_alive()

    with bus._state.tally.lock:
        end = forked(use)

    assert end == "done"
    publish(bus)


def test_what_a_child_does_frees_each_lock_but_those_that_its_thread_had_before(
    bus: EventBus,
) -> None:
    """Here in this process, where coverage sees it: a child ends without telling."""
    other = EventBus()
    other.subscribe(int, nothing, thread=False)
    with bus._state.tally.lock:
        _before_fork()
        _after_fork_in_child()
        assert not in_thread(lambda: publish(other)).is_alive()
        waiting = threading.Thread(target=publish, args=[bus])
        waiting.start()
        assert bus.stats.published == 0
    waiting.join(DEADLINE)

    assert bus.stats.published == 2


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    return thread


def test_a_lock_that_is_not_free_in_time_does_not_stop_the_fork(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventkit._core.locks._PATIENCE", 0.01)
    locked, unlock = threading.Event(), threading.Event()

    def hold() -> None:
        with bus._state.tally.lock:
            locked.set()
            unlock.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    end = forked(lambda: publish(bus))
    unlock.set()
    thread.join()

    assert end == "done"
    publish(bus)
    assert_settled(bus)


def test_a_fork_keeps_no_bus_alive(bus: EventBus) -> None:
    gone = weakref.ref(EventBus())
    assert forked(lambda: None) == "done"
    gc.collect()

    assert gone() is None
