"""The contract of timeouts: how long a handler may take, and what then becomes of it."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Awaitable, Sequence
from functools import partial

import anyio
from anyio import CancelScope, create_task_group, fail_after, sleep_forever
from anyio.lowlevel import checkpoint

from eventkit._core.events import Delivery
from eventkit.exceptions import HandlerTimeoutError
from tests.contract.bus import (
    Boom,
    BusContract,
    Ping,
    Pong,
    by_drain,
    for_each,
    kinds_in,
    outcomes,
)

TINY = 0.01


def timed_out(failures: Sequence[Exception]) -> list[float]:
    """How long each of them was allowed."""
    assert all(isinstance(failure, HandlerTimeoutError) for failure in failures), failures
    return sorted(getattr(failure, "timeout", 0.0) for failure in failures)


async def takes(seconds: float, event: object) -> None:
    """Handle an event in this time."""
    await anyio.sleep(seconds)


class TimeoutContract(BusContract):
    """What becomes of handlers that take longer than they may."""

    @for_each(1, 3)
    async def test_a_handler_past_its_time_is_cancelled_and_its_siblings_are_not(
        self, count: int
    ) -> None:
        bus = self.new_bus()
        cancelled = anyio.Event()

        async def slow(event: Ping, number: int) -> None:
            try:
                await sleep_forever()
            finally:
                if number == 0:
                    cancelled.set()

        for number in range(count):
            bus.subscribe(Ping, partial(slow, number=number), timeout=TINY)

        @bus.on(Ping)
        async def sibling(event: Ping) -> None:
            await cancelled.wait()
            await checkpoint()

        assert timed_out(await self.deliver(bus, Ping())) == [TINY] * count
        assert outcomes(bus) == (1, count, 0)

    async def test_a_timeout_error_shows_where_the_handler_was_waiting(self) -> None:
        bus = self.new_bus()

        async def waits_here() -> None:
            await sleep_forever()

        @bus.on(Ping, name="slow", timeout=TINY)
        async def slow(event: Ping) -> None:
            await waits_here()

        (error,) = await self.deliver(bus, Ping())

        assert isinstance(error, HandlerTimeoutError)
        assert (error.handler, error.timeout) == ("slow", TINY)
        assert str(error).startswith("slow was cancelled after 0.01 s.")
        assert error.__cause__ is not None
        frames = [frame.name for frame in traceback.extract_tb(error.__cause__.__traceback__)]
        assert "waits_here" in frames

    async def test_a_timeout_error_of_the_handlers_own_stays_one(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping, timeout=3600)
        async def raises_its_own(event: Ping) -> None:
            raise TimeoutError("mine")

        @bus.on(Ping, timeout=3600)
        async def has_limit(event: Ping) -> None:
            with fail_after(0):
                await sleep_forever()

        failures = await self.deliver(bus, Ping())

        assert [type(failure) for failure in failures] == [TimeoutError, TimeoutError]

    async def test_an_awaitable_that_a_plain_function_returns_is_timed(self) -> None:
        bus = self.new_bus(handler_timeout=TINY)

        @bus.on(Ping)
        def plain(event: Ping) -> Awaitable[None]:
            return sleep_forever()

        assert timed_out(await by_drain(bus, Ping())) == [TINY]

    async def test_a_plain_function_in_a_thread_has_no_timeout(self) -> None:
        bus = self.new_bus(handler_timeout=TINY)
        other_timed_out = threading.Event()

        def report(delivery: Delivery, error: Exception) -> None:
            other_timed_out.set()

        bus.report_failure = report

        @bus.on(Ping)
        def in_thread(event: Ping) -> None:
            assert other_timed_out.wait(10)

        bus.subscribe(Ping, partial(takes, 3600))

        assert timed_out(await by_drain(bus, Ping())) == [TINY]
        assert outcomes(bus) == (1, 1, 0)

    async def test_a_shielded_handler_that_outlives_its_time_and_ends_well_is_handled(self) -> None:
        bus = self.new_bus(handler_timeout=TINY)
        numbers: list[int] = []
        other_timed_out = anyio.Event()

        def report(delivery: Delivery, error: Exception) -> None:
            other_timed_out.set()

        bus.report_failure = report

        @bus.on(Ping)
        async def shielded(event: Ping) -> None:
            with CancelScope(shield=True):
                await other_timed_out.wait()
            numbers.append(event.number)

        @bus.on(Ping)
        async def slow(event: Ping) -> None:
            if event.number == 1:
                await sleep_forever()

        @bus.on(Pong)
        async def follow(event: Pong) -> None:
            await checkpoint()

        async with bus.context() as unit:
            unit.publish(Ping(1), Ping(2), Pong())
            drained = await unit.drain()

        assert numbers == [1, 2]
        assert (drained.handled, len(drained.failures)) == (4, 1)

    async def test_a_handler_that_swallows_its_timeout_and_ends_well_is_handled(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping, timeout=TINY)
        async def swallows(event: Ping) -> None:
            try:
                await sleep_forever()
            except anyio.get_cancelled_exc_class():
                pass

        assert await self.deliver(bus, Ping()) == []
        assert outcomes(bus) == (1, 0, 0)

    async def test_a_handler_that_fails_when_timed_out_has_that_failure(self) -> None:
        bus = self.new_bus()

        async def child() -> None:
            try:
                await sleep_forever()
            finally:
                raise Boom

        @bus.on(Ping, timeout=TINY)
        async def broken_cleanup(event: Ping) -> None:
            await child()

        @bus.on(Ping, timeout=TINY)
        async def broken_child(event: Ping) -> None:
            async with create_task_group() as tasks:
                tasks.start_soon(child)
                await sleep_forever()

        alone, group = sorted(
            await self.deliver(bus, Ping()), key=lambda error: type(error).__name__
        )

        assert type(alone) is Boom
        assert kinds_in(group) == [Boom]

    async def test_an_infinite_timeout_is_none(self) -> None:
        bus = self.new_bus()
        bus.subscribe(Ping, partial(takes, 0), timeout=float("inf"))

        assert await self.deliver(bus, Ping()) == []
