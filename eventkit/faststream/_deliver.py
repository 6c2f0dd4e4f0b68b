"""Owns how the event of a message is delivered: to handlers that run now, or to an inbox.

Knows nothing of answers to brokers: `_consumer` gives them.
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


async def run_handlers(state: BusState, received: Received) -> list[Failure]:
    """Run the handlers of a received event once, and return their failures."""
    incoming = Incoming(received.event_id, received.headers)
    return await dispatch(state, received.event, incoming)


class _FailedError(Exception):
    """Raised for `retry`: handlers have failed, and may be tried again."""


class ToHandlers:
    """Runs the handlers. If one fails, all of them run again.

    The second attempt follows at once, the others after the pauses of `retry`. All attempts
    together take at most `within` seconds: later, the broker would give the message to another
    process.

    Args:
        state: The state of the bus that has the handlers.
        name: The name of the consumer.
        engine: The engine of the broker.
        within: Seconds for all attempts together.
        retry: The attempts after the first one.
        max_deliveries: How often the broker may give out a message.
    """

    def __init__(
        self,
        state: BusState,
        name: str,
        engine: Engine,
        within: float,
        retry: AsyncRetryingCaller,
        max_deliveries: int,
    ) -> None:
        self._state = state
        self._name = name
        self._engine = engine
        self._within = within
        self._retry = retry
        self._max_deliveries = max_deliveries

    async def refuse(self, message: Any, subscriber: Any) -> Problem | None:
        """Refuse a message that was given out too often: its handlers may kill their process."""
        times = await self._engine.deliveries(message, subscriber)
        if times is None or times <= self._max_deliveries:
            return None
        return Problem("crashed", f"delivered {times} times without an answer")

    async def __call__(self, received: Received, subscriber: Any) -> Problem | None:
        """Run the handlers until all have succeeded, or no attempt is left."""
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
        failures.clear()  # else a reference cycle of this frame and the tracebacks
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
        """Run the handlers again until none fails. `failures` has those of the last attempt."""

        async def attempt() -> None:
            if not subscriber.running:  # the process stops, and another process gets the message
                raise HandBackError
            failures[:] = await self._attempt(received)
            if failures:
                raise _FailedError(_told(failures))

        await self._retry(_FailedError, attempt)

    async def _attempt(self, received: Received) -> list[Failure]:
        """Run the handlers once, and return their failures.

        Raises:
            RejectMessage, NackMessage: A handler has raised it.
        """
        failures = await run_handlers(self._state, received)
        if not failures:
            return failures
        for answer in (RejectMessage, NackMessage):
            others = [each for each in failures if not _has(each, answer)]
            if len(others) < len(failures):
                failures.clear()  # else a reference cycle of this frame and the tracebacks
                for each in others:  # they are reported only here
                    self._state.report(each.delivery, each.error)
                others.clear()
                raise answer
        return failures


class ToKeeper:
    """Gives an event to an inbox, which stores it and drops messages that come again.

    An exception of the inbox counts as an outage, and not as a fault of the message. The inbox is
    tried again here for some seconds, so that messages keep their order. Then the message is handed
    back, any number of times.

    Args:
        state: The state of the bus.
        name: The name of the consumer.
        keep: Stores an event, and returns after the commit.
        patience: Seconds to try.
        poison: The exceptions of `keep` that are the fault of the event. They make a dead letter.
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
        """Refuse no message: the broker's count includes messages handed back in an outage."""
        return None

    async def __call__(self, received: Received, subscriber: Any) -> Problem | None:
        """Store the event, and try again while the inbox is not available."""
        last = current_time() + self._patience - PAUSE
        while True:
            try:
                await self._keep(received)
                return None
            except RejectMessage:
                return Problem("rejected", "deliver= has raised RejectMessage")
            except NackMessage:
                raise HandBackError from None
            except OSError as error:  # first, as a TLS certificate error is also a ValueError
                self._complain(error)
            except self._poison as error:
                return Problem("failed", _text_of(error))
            except Exception as error:  # noqa: BLE001 - of a database, or of its driver
                self._complain(error)
            if current_time() > last or not subscriber.running:
                raise HandBackError
            await sleep(PAUSE)

    def _complain(self, error: Exception) -> None:
        """Log the outage, at most once per minute."""
        now = current_time()
        if now - self._complained_at >= _SECONDS_BETWEEN_COMPLAINTS:
            self._complained_at = now
            log(
                logging.ERROR,
                "messages cannot be stored in the inbox, and wait at the broker",
                error=error,
                consumer=self._name,
                bus=self._state.name,
            )


def _has(failure: Failure, kind: type[Exception]) -> bool:
    return any(isinstance(each, kind) for each in _leaves([failure.error]))


def _leaves(errors: Sequence[BaseException]) -> Iterator[BaseException]:
    for error in errors:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(cast("BaseExceptionGroup[BaseException]", error).exceptions)
        else:
            yield error


def _told(failures: Sequence[Failure]) -> str:
    """Describe the failures in one line."""
    return "; ".join(_text_of(error) for error in _leaves([each.error for each in failures]))


def _text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__qualname__}: {error}"
    except Exception:  # noqa: BLE001 - `__str__` of an error is user code
        return type(error).__qualname__
