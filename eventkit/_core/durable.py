"""Owns what a user says about a durable handler. Knows nothing of tables: see `eventkit.outbox`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

# Thirteen hours in all, with the 25 attempts that are the default.
_LONGEST_PAUSE = 3600.0


def doubling(attempt: int, error: BaseException) -> float | None:
    """Return the seconds until the next attempt: 1, 2, 4 and so on, up to an hour."""
    return min(_LONGEST_PAUSE, 2.0 ** min(attempt - 1, 32))


@dataclass(frozen=True, slots=True)
class Durable:
    """How a durable handler's deliveries are kept and tried again; `durable=True` is `Durable()`.

        @bus.on(OrderPlaced, durable=Durable(attempts=3, key=lambda event: str(event.order_id)))
        async def reserve(event: OrderPlaced) -> None: ...

    A retry within an attempt, for seconds, is the handler's own: stamina does it well. `Durable`
    is for minutes and hours between attempts.

    Attributes:
        attempts: How often a delivery is tried before it is dead, the first time included.
        backoff: Called with the number of the attempt that failed, from 1 on, and its exception.
            Returns the seconds until the next attempt, which the outbox varies by up to 20 %, or
            None to give up at once. By default 1, 2, 4 and so on, up to an hour: 13 hours in all.
        key: Called with the event at publish. Deliveries of this handler whose key is equal run
            one at a time, in the order of their commits; None for no key. A dead one, and one that
            cannot be read, does not hold up the next.
        formerly: Names that the handler had before. Deliveries that were kept for them run here.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `attempts` is below 1.
    """

    attempts: int = 25
    backoff: Callable[[int, BaseException], float | None] = doubling
    key: Callable[[Any], str | None] | None = None  # Any: the handler's own event type
    formerly: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"attempts takes a whole number, not {self.attempts!r}")
        if self.attempts < 1:
            raise ValueError(f"attempts is at least 1, not {self.attempts!r}")
        if not callable(self.backoff):
            raise TypeError(
                "backoff takes a function from the attempt and its error to seconds, not "
                f"{self.backoff!r}"
            )
        if self.key is not None and not callable(self.key):
            raise TypeError(f"key takes a function from the event to a text, not {self.key!r}")
        names: object = self.formerly
        if (
            isinstance(names, str)
            or not isinstance(names, Sequence)  # pyright: ignore[reportUnnecessaryIsInstance]
            or not all(isinstance(each, str) for each in cast("Sequence[object]", names))
        ):
            raise TypeError(
                f"formerly takes a sequence of names, such as ('shop:receipt',), not "
                f"{self.formerly!r}"
            )


def as_durable(durable: bool | Durable) -> Durable | None:
    """What `durable=` of a subscription means; None for a handler whose deliveries are not kept.

    Raises:
        TypeError: It is neither a bool nor a `Durable`.
    """
    if isinstance(durable, Durable):
        return durable
    if not isinstance(durable, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"durable takes True, False or a Durable(...), not {durable!r}")
    return Durable() if durable else None
