"""Owns how the event of a message is delivered: to handlers that run now, or to who keeps it.

Knows nothing of answers to brokers: see the consumer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, cast

from anyio import current_time, move_on_after, sleep
from faststream.exceptions import NackMessage, RejectMessage
from stamina import AsyncRetryingCaller

from eventkit._core.context import dispatch
from eventkit._core.events import Incoming
from eventkit._core.log import log
from eventkit._core.state import BusState
from eventkit._core.turns import Failure
from eventkit.faststream._consumer import PAUSE, HandBackError, Problem
from eventkit.faststream._engines import Engine
from eventkit.wire import Received

_SECONDS_BETWEEN_COMPLAINTS = 60.0


class _FailedError(Exception):
    """Handlers have failed, and may be tried again."""


class ToHandlers:
    """Runs the handlers at once, and again where some fail: all of them each time.

    The first attempt is followed by one at once, and then by what `retry` says. All of it takes
    `within` seconds at most: longer, and the broker would give the message to another process.

    Args:
        state: Of the bus.
        name: The consumer's.
        engine: The broker's.
        within: Seconds.
        retry: Says how often, and when.
        most: How often the broker may give out a message.
    """

    def __init__(
        self,
        state: BusState,
        name: str,
        engine: Engine,
        within: float,
        retry: AsyncRetryingCaller,
        most: int,
    ) -> None:
        self._state = state
        self._name = name
        self._engine = engine
        self._within = within
        self._retry = retry
        self._most = most

    async def refuse(self, message: Any, subscriber: Any) -> Problem | None:
        """Refuse what was given out too often: it ends each process that has it."""
        times = await self._engine.deliveries(message, subscriber)
        if times is None or times <= self._most:
            return None
        return Problem("crashed", f"delivered {times} times without an end")

    async def __call__(self, received: Received, subscriber: Any) -> Problem | None:
        """Run them to the end."""
        failures: list[Failure] = []
        try:
            with move_on_after(self._within) as scope:
                failures += await self._attempt(received)
                if failures:
                    self._say_again(failures)
                    await self._again(received, subscriber, failures)
                    failures.clear()
        except RejectMessage:
            problem = Problem("rejected", "a handler has raised RejectMessage")
        except NackMessage:
            raise HandBackError from None
        except _FailedError:
            problem = Problem("failed", _told(failures))
        else:
            if not scope.cancelled_caught:
                return None
            problem = Problem("failed", f"the handlers did not end within {self._within:g} s")
        for failure in failures:
            self._state.report(failure.delivery, failure.error)
        failures.clear()  # or this frame and the tracebacks keep each other alive
        return problem

    def _say_again(self, failures: Sequence[Failure]) -> None:
        log(
            logging.WARNING,
            "handlers of a message failed, and run again",
            error=None,
            failed_with=_told(failures),
            consumer=self._name,
            bus=self._state.name,
        )

    async def _again(self, received: Received, subscriber: Any, failures: list[Failure]) -> None:
        """Try it again until nothing fails; leaves what has failed last."""

        async def attempt() -> None:
            if not subscriber.running:  # the process ends, and another one is to go on
                raise HandBackError
            failures[:] = await self._attempt(received)
            if failures:
                raise _FailedError(_told(failures))

        await self._retry(_FailedError, attempt)

    async def _attempt(self, received: Received) -> list[Failure]:
        """Run the handlers once, and return what failed.

        Raises:
            RejectMessage, NackMessage: A handler did.
        """
        incoming = Incoming(received.event_id, received.headers)
        failures = await dispatch(self._state, received.event, incoming)
        if not failures:
            return failures
        leaves = [*_leaves([failure.error for failure in failures])]
        for answer in (RejectMessage, NackMessage):
            if any(isinstance(each, answer) for each in leaves):
                raise answer
        return failures


class ToKeeper:
    """Gives an event to who keeps it: an inbox, which drops what it has seen.

    What that raises is an outage, and no fault of the message. It is tried again here for some
    seconds, so that messages keep their order, and then handed back, as often as it takes.

    Args:
        state: Of the bus.
        name: The consumer's.
        keep: Returns when it is kept.
        patience: Seconds to try.
        poison: What `keep` raises where the event is at fault.
    """

    def __init__(
        self,
        state: BusState,
        name: str,
        keep: Callable[[Received], Awaitable[object]],
        patience: float,
        poison: tuple[type[Exception], ...] = (),
    ) -> None:
        self._state = state
        self._name = name
        self._keep = keep
        self._patience = patience
        self._poison = poison
        self._complained_at = -math.inf

    async def refuse(self, message: Any, subscriber: Any) -> Problem | None:
        """Refuse none: each time that it was handed back counts, too."""
        return None

    async def __call__(self, received: Received, subscriber: Any) -> Problem | None:
        """Give it away."""
        last = current_time() + self._patience - PAUSE
        while True:
            try:
                await self._keep(received)
                return None
            except RejectMessage:
                return Problem("rejected", "deliver= has raised RejectMessage")
            except NackMessage:
                raise HandBackError from None
            except OSError as error:  # some are a ValueError, too: that of TLS certificates
                self._complain(error)
            except self._poison as error:
                return Problem("failed", _text_of(error))
            except Exception as error:  # noqa: BLE001 - of a database, or of its driver
                self._complain(error)
            if current_time() > last or not subscriber.running:
                raise HandBackError
            await sleep(PAUSE)

    def _complain(self, error: Exception) -> None:
        """Say so once per minute."""
        now = current_time()
        if now - self._complained_at >= _SECONDS_BETWEEN_COMPLAINTS:
            self._complained_at = now
            log(
                logging.ERROR,
                "messages cannot be taken in, and wait with their broker",
                error=error,
                consumer=self._name,
                bus=self._state.name,
            )


def _leaves(errors: Sequence[BaseException]) -> Iterator[BaseException]:
    for error in errors:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(cast("BaseExceptionGroup[BaseException]", error).exceptions)
        else:
            yield error


def _told(failures: Sequence[Failure]) -> str:
    """What failed, in one line."""
    return "; ".join(_text_of(error) for error in _leaves([each.error for each in failures]))


def _text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__qualname__}: {error}"
    except Exception:  # noqa: BLE001 - its `__str__` is user code
        return type(error).__qualname__
