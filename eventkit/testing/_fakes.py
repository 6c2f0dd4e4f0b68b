"""Owns the fakes for handlers in a test: no handler at all, a failure, or a delay.

Knows nothing of recorded events.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import count
from types import TracebackType
from typing import Self

import anyio
from anyio import from_thread

from eventkit._core.bus import EventBus, registry_of, state_of
from eventkit._core.events import type_name
from eventkit._core.handlers import Handler, name_of
from eventkit._core.subscriptions import Plan, Subscription, check_event_type

# A handler as a test names it: the callable that was subscribed, or its name.
Named = Callable[..., object] | str


class Fake:
    """A fake that replaces handlers, from the call that makes it until `end()`.

        with capevents.fail(send_receipt, ConnectionError):
            ...                              # here `send_receipt` raises

    `EventCapture.record_only`, `fail` and `delay` return it. As a context manager it ends with the
    block. Several fakes may be in use at once, and they may end in any order. The end of the test
    ends all of them.
    """

    __slots__ = ("_end",)

    def __init__(self, end: Callable[[Fake], None]) -> None:
        self._end = end

    def end(self) -> None:
        """End the fake: the handlers work again. Calling it again has no effect."""
        self._end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


# Makes the function that is called instead of the handler's function.
_Disguise = Callable[[Callable[..., object], bool], Callable[..., object]]


class Fakes:
    """All fakes of one bus."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._core = state_of(bus)
        self._plan_for = self._core.plan_for
        self._silent: dict[Fake, Callable[[object], bool]] = {}
        self._disguised: dict[Fake, tuple[list[Subscription], _Disguise]] = {}
        self._originals: dict[Subscription, Handler] = {}
        self._provoked: list[Exception] = []

    def record_only(
        self, event_types: Sequence[type], except_: type | tuple[type, ...] = ()
    ) -> Fake:
        """Call no handler for events of these types; without types, for no event."""
        spared = except_ if isinstance(except_, tuple) else (except_,)
        for event_type in (*event_types, *spared):
            check_event_type(event_type)
        silenced = tuple(event_types) or object
        fake = Fake(self._end)
        self._silent[fake] = lambda event: (
            isinstance(event, silenced) and not isinstance(event, spared)
        )
        self._core.plan_for = self._audible
        return fake

    def fail(self, handler: Named, error: Exception | type[Exception], times: int | None) -> Fake:
        """Make a handler raise instead of doing its work, `times` times, or every time."""
        kind = error if isinstance(error, type) else type(error)
        if not issubclass(kind, Exception):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"fail() takes an exception for the handler to raise, not {error!r}")
        if times is not None and times < 1:
            raise ValueError(f"times is at least 1, or None for every time, not {times!r}")
        calls = count(1)

        def disguise(function: Callable[..., object], in_thread: bool) -> Callable[..., object]:
            def fail(event: object, **values: object) -> object:
                if times is not None and next(calls) > times:
                    return function(event, **values)
                provoked = error if isinstance(error, Exception) else error()
                self._provoked.append(provoked)
                raise provoked

            return fail

        return self._disguise(handler, disguise)

    def delay(self, handler: Named, seconds: float) -> Fake:
        """Make a handler wait before it does its work."""
        if not seconds >= 0:  # this form refuses NaN, too
            raise ValueError(f"delay() takes seconds, 0 or more, not {seconds!r}")

        def disguise(function: Callable[..., object], in_thread: bool) -> Callable[..., object]:
            def delay_in_thread(event: object, **values: object) -> object:
                from_thread.run(anyio.sleep, seconds)
                return function(event, **values)

            async def delay(event: object, **values: object) -> None:
                await anyio.sleep(seconds)
                result = function(event, **values)
                if inspect.isawaitable(result):
                    await result

            return delay_in_thread if in_thread else delay

        return self._disguise(handler, disguise)

    def provoked(self, error: Exception) -> bool:
        """Whether a fake raised this error."""
        return any(error is each for each in self._provoked)

    def end_all(self) -> None:
        """End every fake."""
        for fake in [*self._silent, *self._disguised]:
            fake.end()

    def _audible(self, event: object) -> Plan:
        plan = self._plan_for(event)  # this also refuses objects that are not events
        return Plan.of(()) if any(silent(event) for silent in self._silent.values()) else plan

    def _disguise(self, handler: Named, disguise: _Disguise) -> Fake:
        fake = Fake(self._end)
        subscriptions = subscriptions_of(self._bus, handler)
        self._disguised[fake] = subscriptions, disguise
        self._dress(subscriptions)
        return fake

    def _end(self, fake: Fake) -> None:
        if self._silent.pop(fake, None) is not None and not self._silent:
            self._core.plan_for = self._plan_for
        subscriptions, _ = self._disguised.pop(fake, ((), None))
        self._dress(subscriptions)

    def _dress(self, subscriptions: Sequence[Subscription]) -> None:
        """Give each subscription its handler with the fakes around it, the latest one outermost."""
        for subscription in subscriptions:
            target = self._originals.setdefault(subscription, subscription.target)
            for subscribed, disguise in self._disguised.values():
                if subscription in subscribed:
                    function = disguise(target.function, target.in_thread)
                    target = replace(target, function=function)
            registry_of(self._bus).retarget(subscription, target)
            if target is self._originals[subscription]:
                del self._originals[subscription]


def subscriptions_of(bus: EventBus, handler: Named) -> list[Subscription]:
    """The subscriptions of a handler, given as the callable or by its name.

    Raises:
        LookupError: The handler is not subscribed. The message lists the closest names.
    """
    subscriptions = list(registry_of(bus))
    found = [each for each in subscriptions if handler in (each.handler, each.name)]
    if found:
        return found
    called = handler if isinstance(handler, str) else name_of(handler)
    names = {each.name: each for each in subscriptions}
    near = get_close_matches(called, names, n=3, cutoff=0.4)
    lines = [
        f"  {name} for {type_name(names[name].event_type)} ({names[name].location})"
        for name in near or [*names][:3]
    ]
    head = f"{called} is not subscribed to bus {bus.name!r}"
    raise LookupError(
        "\n".join([f"{head}. The closest names are:", *lines])
        if lines
        else f"{head}, and no other handler is"
    )
