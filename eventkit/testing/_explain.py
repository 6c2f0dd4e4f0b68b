"""Owns what a failing comparison says, for test runners that ask: lines of text, or nothing."""

from __future__ import annotations

import traceback
from typing import Any, cast

from eventkit._core.turns import Failure
from eventkit.testing._capture import FailureList
from eventkit.testing._matching import describe, difference, fields_of, nearest_first
from eventkit.testing._recorder import EventList


def explain(op: str, left: object, right: object) -> list[str] | None:
    """Say why an assertion about lists of events does not hold; None about anything else.

    What pytest's hook `pytest_assertrepr_compare` wants to know; the plugin asks.

    Args:
        op: The operator, `==` or `in`.
        left: What stands before it.
        right: What stands behind it.
    """
    if op == "==" and isinstance(left, FailureList) and isinstance(right, list):
        return [f"failures == expected, but {len(left)} failed", *map(_failure, left)]
    if op == "==" and isinstance(left, list) and isinstance(right, list):
        return _explain_equal(cast("list[object]", left), cast("list[object]", right))
    if op == "in" and isinstance(right, EventList):
        return _explain_in(cast("Any", left), cast("EventList[object]", right))  # Any: an event
    return None


def _explain_equal(left: list[object], right: list[object]) -> list[str] | None:
    if isinstance(left, EventList):
        return difference(left, right, left.what)
    if isinstance(right, EventList):
        return difference(right, left, right.what)
    return None


def _explain_in(event: object, events: EventList[object]) -> list[str]:
    head = f"{describe(event)} in {events.what}, but"
    if not events:
        return [f"{head} nothing is"]
    instead = nearest_first(events, type(event), fields_of(event))
    return [f"{head} these are, nearest first:", *instead]


def _failure(failure: Failure) -> str:
    delivery, error = failure.delivery, failure.error
    what = "".join(traceback.format_exception_only(error)).splitlines()[0]
    places = [f" ({f.filename}:{f.lineno})" for f in traceback.extract_tb(error.__traceback__)]
    return f"  {delivery.handler} for {describe(delivery.event)}: {what}{places[-1]}"
