"""Owns one run of a handler under the eyes of observers, who are told how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from eventkit._core.handlers import Handler
from eventkit._core.limits import Delivered, run_in_time
from eventkit._core.observers import Begun, Observer, watched
from eventkit._core.policy import failures_in, timeout_of, verdict_on


class Attempted(Begun, Delivered, Protocol):
    """An event on its way.

    Attributes:
        observers: Whom to tell.
    """

    observers: tuple[Observer, ...]

    @property
    def handlers(self) -> Sequence[Handler]:
        """Whom it is delivered to."""
        ...


class Timed(Protocol):
    """Who sees to the time limit that all handlers of an event have together."""

    @property
    def late(self) -> bool:
        """Whether they are cancelled because the time is up."""
        ...


async def attempt(
    turn: Attempted, index: int, limit: float | None, requests: int, timed_by: Timed | None = None
) -> None:
    """Run one handler of any kind, in time, under the eyes of the observers.

    Args:
        turn: The event.
        index: Which of its handlers.
        limit: Seconds that it may take, if it does not say so itself.
        requests: How often the task was asked to cancel, as far as it knows.
        timed_by: Who sees to the limit, which all handlers of the event have together then.
    """
    handler = turn.handlers[index]
    if handler.timeout is not ...:
        limit = handler.timeout
    with watched(turn.observers, turn, index):
        try:
            if timed_by is None:
                await run_in_time(handler, turn, limit)
            elif handler.solver is None:  # as without observers
                await handler.function(turn.event)
            else:
                await handler.with_dependencies(handler.solver, turn.origin, turn.event)
        except Exception:
            raise
        except BaseException as error:  # noqa: BLE001 - the policy
            verdict = verdict_on(error, handler, requests)
            if timed_by is not None and timed_by.late and failures_in(verdict) is None:
                verdict = timeout_of(handler, cast("float", limit), error)
            try:
                raise verdict from verdict.__cause__
            finally:
                del verdict  # or this frame and its traceback keep each other alive
