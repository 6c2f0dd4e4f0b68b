"""The façade: what it is made with, what it tells of itself, and that no loop owns it."""

import asyncio
import threading
from typing import Any

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint

from eventkit import EventBus, Stats
from tests.witness import assert_settled, calling, ignore, nothing

bus = EventBus(name="module level")
handled: list[tuple[str, object]] = []


@bus.on(str)
async def on_loop(event: str) -> None:
    await checkpoint()
    handled.append(("loop", event))
    if event.startswith("begin"):
        bus.publish("caused")


@bus.on(str, thread=True)
def in_thread(event: str) -> None:
    handled.append(("thread", event))


async def use_it() -> None:
    """Use all that needs a loop."""
    async with bus.context() as unit:
        bus.publish("begin")
        await unit.drain()
        bus.publish("more")
    await bus.dispatch("begin directly")


def test_one_bus_serves_two_loops_of_asyncio_and_then_trio() -> None:
    handled.clear()
    before = bus.stats.handled

    asyncio.run(use_it())
    asyncio.run(use_it())
    trio.run(use_it)
    with bus.context():
        bus.publish("without a loop")

    assert bus.stats.handled - before == 3 * 10 + 2
    assert handled.count(("loop", "caused")) == handled.count(("thread", "caused")) == 6
    assert_settled(bus)


def test_one_bus_serves_two_loops_at_once() -> None:
    before = bus.stats.handled
    both = threading.Barrier(2)
    errors: list[BaseException] = []

    async def often() -> None:
        both.wait()
        for _ in range(20):
            await use_it()

    def run(backend: str) -> None:
        try:
            anyio.run(often, backend=backend)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("asyncio", "trio")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert bus.stats.handled - before == 2 * 20 * 10
    assert_settled(bus)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True])
def test_a_handler_timeout_is_seconds_above_0(timeout: Any) -> None:
    with pytest.raises(ValueError, match="handler_timeout") as error:
        EventBus(handler_timeout=timeout)
    assert str(error.value) == f"handler_timeout takes seconds above 0, not {timeout!r}"


@pytest.mark.parametrize(("max_events", "max_depth"), [(0, 1), (1, 0), (-1, -1)])
def test_limits_are_at_least_1(max_events: int, max_depth: int) -> None:
    with pytest.raises(ValueError, match="at least 1") as error:
        EventBus(max_events=max_events, max_depth=max_depth)
    assert str(error.value) == (
        f"max_events and max_depth are at least 1, not {max_events!r} and {max_depth!r}"
    )


def test_options_are_keywords_only() -> None:
    with pytest.raises(TypeError):
        EventBus("shop")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


def test_a_bus_says_who_it_is() -> None:
    shop = EventBus(name="shop")
    shop.subscribe(str, nothing, thread=False)

    assert shop.name == "shop"
    with shop.context():
        shop.publish("a")
        assert repr(shop) == "<EventBus 'shop', 1 subscriptions, 1 pending>"
    assert repr(EventBus()) == "<EventBus 'default', 0 subscriptions, 0 pending>"


class Unheard:
    """An event without a handler."""


def test_stats_count_every_delivery_once() -> None:
    shop = EventBus()
    shop.report_failure = ignore
    running: list[Stats] = []

    @shop.on(str)
    async def handle(event: str) -> None:
        running.append(shop.stats)
        if event == "bad":
            raise ValueError

    cancelled = shop.subscribe(int, calling(list), thread=False)
    shop.subscribe(int, nothing, name="other", thread=False)
    with shop.context() as unit:
        shop.publish("a", "bad", 1, Unheard())
        assert shop.stats == stats(published=4, accepted=4, pending=4)
        cancelled.cancel()
        unit.release()
        shop.publish("dropped")
        unit.discard()
        assert shop.stats == stats(published=5, accepted=5, pending=4, discarded=1)

    assert running == [
        stats(published=5, accepted=5, pending=3, discarded=1, running=1),
        stats(published=5, accepted=5, pending=2, discarded=1, handled=1, running=1),
    ]
    assert shop.stats == stats(published=5, accepted=5, discarded=2, handled=2, failed=1)


def stats(published: int, accepted: int, **others: int) -> Stats:
    """Counters that are 0 unless given."""
    names = ("handled", "failed", "discarded", "undelivered", "requeued", "pending", "running")
    background = ("units_waiting", "units_draining", "held", "refused")
    return Stats(
        published=published,
        accepted=accepted,
        **{**dict.fromkeys(names + background, 0), **others},
    )
