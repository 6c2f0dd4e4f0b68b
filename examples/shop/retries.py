"""Owns when the shop asks its neighbours again, and when it gives up. Knows nothing of events."""

from __future__ import annotations

import httpx

_PASSING = {408, 425, 429}  # of the 4xx: too slow, too early, too often
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 3600.0


def unless_refused(attempt: int, error: BaseException) -> float | None:
    """The seconds until the next attempt: 0.5, 1, 2 and so on, up to an hour.

    None where a neighbour has understood us and said no: to ask again is no use. The delivery is
    dead then, and waits for somebody to look at it.
    """
    if isinstance(error, httpx.HTTPStatusError):
        response = error.response
        if response.is_client_error and response.status_code not in _PASSING:
            return None
    return min(_FIRST_PAUSE * 2.0 ** (attempt - 1), _LONGEST_PAUSE)
