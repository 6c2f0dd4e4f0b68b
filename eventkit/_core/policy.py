"""Owns the policy: the meaning of an exception of a handler. Knows no tasks and no units of work.

| the handler raises | consequence |
|---|---|
| an `Exception` | a failure of this delivery; other deliveries go on |
| a cancellation from outside | the delivery ends, and the cancellation propagates |
| a cancellation that nobody has requested | a failure of this delivery |
| another exception: `KeyboardInterrupt`, `SystemExit` | the whole run ends, and it propagates |
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import cast

from anyio import current_effective_deadline, get_cancelled_exc_class

from eventkit._core.events import Delivery, type_name
from eventkit._core.handlers import Handler
from eventkit.exceptions import HandlerCancelledError, HandlerTimeoutError


def verdict_on(error: BaseException, handler: Handler, requests: int) -> BaseException:
    """The exception that the handler failed with, or that ended it.

    Args:
        error: The exception that the handler raised.
        handler: The handler.
        requests: How many cancel requests the task had when the handler began.
    """
    failures = failures_in(error)
    if failures is not None:
        return failures
    if is_asked_to_end(requests):
        return error
    made_up = HandlerCancelledError(handler.name)
    made_up.__cause__ = error
    return made_up


def failures_in(error: BaseException) -> BaseException | None:
    """The exception without its cancellations; None if it has nothing else.

    A task group in the handler may raise failures and a cancellation together. The failures are
    kept, and the cancellation comes again at the next checkpoint.
    """
    cancelled = get_cancelled_exc_class()
    if isinstance(error, cancelled):
        return None
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).split(cancelled)[1]
    return error


def timeout_of(
    handler: Handler, seconds: float, stopped: BaseException | None
) -> HandlerTimeoutError:
    """The failure of a handler that exceeded its time limit; its cause shows where it waited."""
    error = HandlerTimeoutError(handler.name, seconds)
    error.__cause__ = stopped
    return error


def add_note(error: Exception, delivery: Delivery, handler: Handler) -> None:
    """Add a note that names the handler to the exception, if the exception accepts notes."""
    event = type_name(type(delivery.event))
    note = f"raised by the handler {handler.name} ({handler.location}) for {event}"
    if delivery.published_from is not None:
        note = f"{note}, published at {delivery.published_from}"
    with suppress(Exception):  # a frozen dataclass refuses notes; `add_note` may be user code
        if note not in getattr(error, "__notes__", ()):  # one instance may be raised twice
            error.add_note(note)


def is_native(error: BaseException) -> bool:
    """Whether it comes from asyncio's own `Task.cancel()`; AnyIO's scopes mark their exceptions."""
    return isinstance(error, asyncio.CancelledError) and "cancel scope" not in str(error)


def in_cancelled_scope() -> bool:
    """Whether a cancel scope around the caller is cancelled, without a shield in between."""
    return current_effective_deadline() == -math.inf


def is_asked_to_end(requests: int) -> bool:
    """Whether the caller is cancelled, or got a cancel request since it had `requests` of them."""
    return in_cancelled_scope() or cancel_requests() > requests


def cancel_requests() -> int:
    """How many cancel requests the calling task has, by `Task.cancel()` or a scope; on trio 0.

    On asyncio any code can raise `CancelledError`. If this count has grown, the exception is a real
    cancellation.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # not asyncio
        return 0
    return task.cancelling() if task else 0
