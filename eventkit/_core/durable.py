"""Owns `Durable`, the options of a durable handler. The tables are in `eventkit.outbox`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

# With the default of 25 attempts, all pauses together are 13 hours.
_LONGEST_PAUSE = 3600.0


def doubling(attempt: int, error: BaseException) -> float | None:
    """Return the seconds until the next attempt: 1, 2, 4 and so on, up to an hour."""
    return min(_LONGEST_PAUSE, 2.0 ** min(attempt - 1, 32))


@dataclass(frozen=True, slots=True)
class Durable:
    """Options of a durable handler: how often and when its deliveries are tried again.

        @bus.on(OrderPlaced, durable=Durable(attempts=3, key=lambda event: str(event.order_id)))
        async def reserve(event: OrderPlaced) -> None: ...

    `durable=True` is the same as `durable=Durable()`. `Durable` is for pauses of minutes and hours.
    For retries within seconds, retry inside the handler, for example with stamina.

    Attributes:
        attempts: Highest number of tries, the first one included. After the last failed try the
            delivery is dead: it stays in the table, and is not tried again by itself.
        backoff: Called with the number of the failed attempt, from 1 on, and with its exception.
            Returns the seconds until the next attempt, or None to give up at once. The outbox
            varies the seconds by up to 20 %. The default is 1, 2, 4 and so on, up to one hour. With
            25 attempts, that is 13 hours in total.
        key: Called with the event at publish. Returns a text, or None for no key. Deliveries of
            this handler with the same key run one at a time. If their transactions commit one after
            the other, they run in this order. A dead delivery, and one whose event cannot be read,
            does not hold up the next.
        formerly: Earlier names of the handler. It runs the deliveries that are stored under them.

    Raises:
        TypeError: An argument has the wrong type.
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
    """Convert the argument `durable=` of a subscription; None if deliveries are not stored.

    Raises:
        TypeError: It is neither a bool nor a `Durable`.
    """
    if isinstance(durable, Durable):
        return durable
    if not isinstance(durable, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"durable takes True, False or a Durable(...), not {durable!r}")
    return Durable() if durable else None
