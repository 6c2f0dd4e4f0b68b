"""The contract of failures: each is told, none disturbs another, and a bare end is no failure."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import anyio
from anyio import sleep_forever
from anyio.lowlevel import checkpoint

from eventkit._core.events import Delivery, type_name
from eventkit._core.observers import Observer
from eventkit.exceptions import DispatchError
from tests.contract.bus import (
    Boom,
    BusContract,
    Ping,
    Pong,
    all_tasks_blocked,
    cancelled_by_scope,
    for_each,
    kept_reports,
    kinds_in,
    outcomes,
    raises,
)


@dataclass(frozen=True)
class Frozen(Exception):
    reason: str


def refuse(*_: object) -> NoReturn:
    """Be of no use."""
    raise RuntimeError("ask me nothing")


class Strange(Exception):
    def __init__(self) -> None:
        self.__notes__ = 5  # type: ignore[assignment]


def refusing(*methods: str) -> type[Exception]:
    """Make an exception that cannot be asked some things."""
    return type("Refusing", (Exception,), dict.fromkeys(methods, refuse))


TAKING_NO_NOTES: list[Callable[[], Exception]] = [
    partial(Frozen, "x"),
    Strange,
    refusing("add_note"),
    refusing("__str__", "__eq__", "__bool__", "__hash__"),
]


class FailureContract(BusContract):
    """What becomes of the exceptions of handlers."""

    # Failures of handlers

    async def test_a_dispatch_raises_every_failure_in_one_group(self) -> None:
        bus = self.new_bus()
        steps: list[str] = []

        @bus.on(Ping)
        async def fails_at_once(event: Ping) -> None:
            raise Boom("at once")

        @bus.on(Ping)
        async def works(event: Ping) -> None:
            await all_tasks_blocked()
            steps.append("works")

        @bus.on(Ping)
        async def fails_later(event: Ping) -> None:
            await checkpoint()
            raise ValueError("later")

        @bus.on(Ping)
        def fails_in_thread(event: Ping) -> None:
            raise LookupError("in thread")

        @bus.on(Ping)
        async def publishes(event: Ping) -> None:
            bus.publish(Pong())

        @bus.on(Pong)
        async def fails_afterwards(event: Pong) -> None:
            raise KeyError("afterwards")

        with raises(DispatchError) as caught:
            await bus.dispatch(Ping())

        assert set(kinds_in(caught.value)) == {Boom, ValueError, LookupError, KeyError}
        assert steps == ["works"]
        assert outcomes(bus) == (2, 4, 0)
        message = caught.value.message
        assert message == f"handlers failed for {type_name(Ping)}, {type_name(Pong)}"

    async def test_each_failure_has_a_note_that_names_handler_place_and_event(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping, name="mailer")
        async def fails(event: Ping) -> None:
            raise Boom

        (error,) = await self.deliver(bus, Ping())

        place = f"{__file__}:{fails.__code__.co_firstlineno}"
        (note,) = error.__notes__  # in debug mode it goes on
        assert note.startswith(f"raised by the handler mailer ({place}) for {type_name(Ping)}")

    async def test_parts_of_a_dispatch_error_are_dispatch_errors(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping)
        async def one(event: Ping) -> None:
            raise Boom

        @bus.on(Ping)
        async def two(event: Ping) -> None:
            raise ValueError

        with raises(DispatchError) as caught:
            await bus.dispatch(Ping())
        matching, rest = caught.value.split(Boom)
        part = caught.value.subgroup(ValueError)

        assert [type(group) for group in (matching, rest, part)] == [DispatchError] * 3

    async def test_failures_do_not_disturb_later_events(self) -> None:
        bus = self.new_bus()
        seen: list[object] = []

        @bus.on(Ping)
        async def publishes(event: Ping) -> None:
            bus.publish(Pong(1), Pong(2))

        @bus.on(Pong)
        async def fails(event: Pong) -> None:
            seen.append(event)
            raise Boom

        assert len(await self.deliver(bus, Ping())) == 2
        assert seen == [Pong(1), Pong(2)]

    async def test_one_exception_instance_may_be_raised_by_several_handlers(self) -> None:
        bus = self.new_bus()
        error = Boom()

        async def first(event: Ping) -> None:
            raise error

        async def second(event: Ping) -> None:
            raise error

        bus.subscribe(Ping, first)
        bus.subscribe(Ping, second)

        for _ in range(2):
            assert await self.deliver(bus, Ping()) == [error, error]
        assert len(error.__notes__) == 2

    @for_each(*TAKING_NO_NOTES)
    async def test_an_exception_that_takes_no_notes_is_a_failure_like_any_other(
        self, make: Callable[[], Exception]
    ) -> None:
        bus = self.new_bus()
        error = make()

        @bus.on(Ping)
        async def fails(event: Ping) -> None:
            raise error

        @bus.on(Ping)
        async def works(event: Ping) -> None:
            await all_tasks_blocked()

        (failure,) = await self.deliver(bus, Ping())

        assert failure is error
        assert outcomes(bus) == (1, 1, 0)

    async def test_stop_iteration_is_a_failure_wherever_it_is_raised(self) -> None:
        bus = self.new_bus()

        def stop(event: Ping) -> None:
            next(iter(()))

        @bus.on(Ping)
        async def on_loop(event: Ping) -> None:
            stop(event)

        bus.subscribe(Ping, partial(stop))
        bus.subscribe(Ping, stop, thread=False)

        failures = await self.deliver(bus, Ping())

        assert [type(failure) for failure in failures] == [RuntimeError] * 3
        assert [type(failure.__cause__) for failure in failures] == [StopIteration] * 3

    # What is no failure of a handler, but the end of the process

    @for_each(KeyboardInterrupt, SystemExit, GeneratorExit)
    @for_each(True, False)
    @for_each(False, True)
    async def test_what_ends_the_process_propagates_bare_and_cancels_the_siblings(
        self, sequential: bool, first_step: bool, kind: type[BaseException]
    ) -> None:
        bus = self.new_bus(sequential=sequential)

        @bus.on(Ping)
        async def earlier(event: Ping) -> None:
            if not sequential:
                await sleep_forever()

        @bus.on(Ping)
        async def ends(event: Ping) -> None:
            if not first_step:
                await all_tasks_blocked()
            raise kind

        @bus.on(Ping)
        async def sibling(event: Ping) -> None:
            await sleep_forever()

        with raises(kind):
            await self.deliver(bus, Ping())

        assert outcomes(bus) == ((1, 0, 2) if sequential else (0, 0, 3))

    async def test_what_ends_the_process_leaves_follow_ups_undelivered(self) -> None:
        bus = self.new_bus(sequential=True)

        @bus.on(Ping)
        async def publishes(event: Ping) -> None:
            bus.publish(Pong())

        @bus.on(Ping)
        async def ends(event: Ping) -> None:
            raise SystemExit

        followed: list[object] = []
        bus.subscribe(Pong, followed.append, thread=False)

        with raises(SystemExit):
            await bus.dispatch(Ping())

        assert followed == []
        assert outcomes(bus) == (1, 0, 2)

    @for_each(KeyboardInterrupt, SystemExit)
    async def test_it_propagates_from_threads_and_task_groups_too(
        self, kind: type[BaseException]
    ) -> None:
        bus = self.new_bus()

        @bus.on(Ping)
        def in_thread(event: Ping) -> None:
            raise kind

        with raises(kind):
            await self.deliver(bus, Ping())

        @bus.on(Pong)
        async def mixture(event: Pong) -> None:
            raise BaseExceptionGroup("mixed", [kind(), Boom()])

        with raises(BaseExceptionGroup) as caught:
            await self.deliver(bus, Pong())

        assert kinds_in(caught.value) == [kind, Boom]

    async def test_the_first_of_several_is_the_one_that_propagates(self) -> None:
        bus = self.new_bus()

        @bus.on(Ping)
        async def second(event: Ping) -> None:
            try:
                await sleep_forever()
            finally:
                raise KeyboardInterrupt

        @bus.on(Ping)
        async def first(event: Ping) -> None:
            raise SystemExit

        with raises(SystemExit):
            await self.deliver(bus, Ping())

    async def test_failures_beside_it_are_reported(self) -> None:
        bus = self.new_bus()
        reported = kept_reports(bus)

        @bus.on(Ping)
        async def fails(event: Ping) -> None:
            raise Boom

        @bus.on(Ping)
        async def ends(event: Ping) -> None:
            await all_tasks_blocked()
            raise SystemExit

        with raises(SystemExit):
            await self.deliver(bus, Ping())

        assert [type(error) for error in reported] == [Boom]
        assert outcomes(bus) == (0, 1, 1)

    # What observers are told

    async def test_observers_are_told_each_outcome_in_the_context_of_its_handler(self) -> None:
        bus = self.new_bus()
        told: dict[str, type[BaseException] | None] = {}

        class Watching(Observer):
            @contextmanager
            def delivery(self, delivery: Delivery) -> Generator[None]:
                try:
                    yield
                except BaseException as error:
                    told[delivery.handler] = type(error)
                    raise
                told[delivery.handler] = None

        @bus.on(Ping, name="works")
        async def works(event: Ping) -> None:
            pass

        @bus.on(Ping, name="fails")
        async def fails(event: Ping) -> None:
            raise Boom

        @bus.on(Ping, name="waits")
        async def waits(event: Ping) -> None:
            await sleep_forever()

        with bus.observe(Watching()):
            await cancelled_by_scope(partial(self.deliver, bus, Ping()))

        cancelled = anyio.get_cancelled_exc_class()
        assert told == {"works": None, "fails": Boom, "waits": cancelled}
