"""Owns the policy: what becomes of what a handler raised. Knows neither tasks nor units of work.

Per delivery: an `Exception` is a failure and disturbs nobody. A cancellation that came from outside
ends the delivery and passes on; one that the handler made up is a failure. Anything else
(`KeyboardInterrupt`, `SystemExit`) ends the whole run and propagates.
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
    """What the handler failed with, or else what it was ended by.

    Args:
        error: What came out of it.
        handler: Which one.
        requests: How often the task had been asked to cancel when the handler began.
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
    """What is left of it without cancellations; None where it is nothing else.

    A task group of the handler's own, cancelled while its children failed, may raise both: the
    failures are news, and the cancellation comes again at the next checkpoint.
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
    """The failure of a handler that was past its time; its cause shows where the handler waited."""
    error = HandlerTimeoutError(handler.name, seconds)
    error.__cause__ = stopped
    return error


def add_note(error: Exception, delivery: Delivery, handler: Handler) -> None:
    """Say in its traceback which handler it came from; left out where it takes no notes."""
    event = type_name(type(delivery.event))
    note = f"raised by the handler {handler.name} ({handler.location}) for {event}"
    if delivery.published_from is not None:
        note = f"{note}, published at {delivery.published_from}"
    with suppress(Exception):  # a frozen dataclass has none, and `add_note` may be anybody's
        if note not in getattr(error, "__notes__", ()):  # one instance may be raised twice
            error.add_note(note)


def is_native(error: BaseException) -> bool:
    """Whether it is asyncio's own `Task.cancel()`; AnyIO's scopes mark theirs."""
    return isinstance(error, asyncio.CancelledError) and "cancel scope" not in str(error)


def in_cancelled_scope() -> bool:
    """Whether a cancel scope around the caller is cancelled, and no shield is in between."""
    return current_effective_deadline() == -math.inf


def is_asked_to_end(requests: int) -> bool:
    """Whether the caller is cancelled from outside, or was since it counted so many requests."""
    return in_cancelled_scope() or cancel_requests() > requests


def cancel_requests() -> int:
    """How often the calling task was asked to cancel, natively or by a scope; on trio 0.

    On asyncio anyone can raise `CancelledError`. Comparing this count with its value before is
    what tells a cancellation from an exception that merely looks like one.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # not asyncio
        return 0
    return task.cancelling() if task else 0
