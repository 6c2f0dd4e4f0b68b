"""Owns one run of a handler with observers, which see how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from eventkit._core.handlers import Handler
from eventkit._core.limits import Delivered, run_in_time
from eventkit._core.observers import Begun, Observer, watched
from eventkit._core.policy import failures_in, timeout_of, verdict_on


class Attempted(Begun, Delivered, Protocol):
    """An event whose handlers run.

    Attributes:
        observers: The observers to call.
    """

    observers: tuple[Observer, ...]

    @property
    def handlers(self) -> Sequence[Handler]:
        """The handlers of the event."""
        ...


class Timed(Protocol):
    """Enforces one time limit for all handlers of an event together."""

    @property
    def late(self) -> bool:
        """Whether the handlers are cancelled because of this time limit."""
        ...


async def attempt(
    turn: Attempted, index: int, limit: float | None, requests: int, timed_by: Timed | None = None
) -> None:
    """Run one handler of any kind, within its time limit, with the observers around it.

    Args:
        turn: The event.
        index: Index of the handler.
        limit: Time limit in seconds, if the handler has no own limit.
        requests: How many cancel requests of the task are known.
        timed_by: Enforces the limit, if all handlers of the event share one.
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
                del verdict  # otherwise this frame and its traceback keep each other alive
