"""Owns the explanation of a failed comparison, for test runners that can show one."""

from __future__ import annotations

import traceback
from typing import Any, cast

from eventkit._core.turns import Failure
from eventkit.testing._capture import FailureList
from eventkit.testing._matching import describe, difference, fields_of, nearest_first
from eventkit.testing._recorder import EventList


def explain(op: str, left: object, right: object) -> list[str] | None:
    """Explain why an assertion about lists of events failed.

        assert capevents.published == [UserCreated(1)]    # the plugin calls `explain`

    The pytest plugin calls it in the hook `pytest_assertrepr_compare`.

    Args:
        op: The operator of the assertion, `==` or `in`.
        left: The value to the left of the operator.
        right: The value to the right of the operator.

    Returns:
        Lines of text; None for other operators, and for values that are not lists of events.
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
