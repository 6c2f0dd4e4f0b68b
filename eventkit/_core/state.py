"""Owns what all units of work of one bus share. Knows nothing of how they work."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eventkit._core.events import Delivery, type_name
from eventkit._core.log import log
from eventkit._core.loops.threads import Entrance
from eventkit._core.observers import Observer
from eventkit._core.queue import Envelope
from eventkit._core.stats import Tally
from eventkit._core.subscriptions import Plan


class Submit(Protocol):
    """Ends a unit of work, in the background."""

    def __call__(self, unit: Any, /, *, success: bool) -> None:  # Any: a `units.Unit`
        """End it; never blocks."""


class Decisions(Protocol):
    """Lets transactions decide what becomes of events: see `transactions`."""

    def look(self, unit: Any, /) -> None:  # Any: a `units.Unit`, here and below
        """Find out how the transactions in the unit stand."""

    def tag(self, unit: Any, envelopes: Sequence[Envelope], /) -> None:
        """Say who may decide what is being published. Needs the lock."""

    def settle(self, unit: Any, envelopes: Sequence[Envelope], /) -> None:
        """Decide what was published into a transaction that has ended."""

    def follow(self, unit: Any, receiver: Any, /) -> None:
        """The one unit hands its events to the other. Needs the lock."""

    def end(self, unit: Any, /) -> None:
        """The unit ends: its transactions have had their say."""

    def dispatching(self, state: BusState, event: object, /) -> None:
        """Warn of a dispatch inside a transaction that has written."""


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """A running application that delivers units of work of the bus in the background.

    Attributes:
        entrance: The event loop it runs on, for threads that have none.
        submit: Ends a unit of work: what there is to deliver is delivered later. Called on the
            event loop.
        origin: The origin of the units that are opened in it.
    """

    entrance: Entrance
    submit: Submit
    origin: object


@dataclass(slots=True, eq=False)
class BusState:
    """What all units of work of one bus share.

    The bus makes it and changes `observers` and `report_failure`; `add_host` and `remove_host`
    change `hosts`; drainers that close change `losses`; who ties a database to the bus sets
    `decisions`; everything else is fixed.
    """

    bus: object  # whose they are, for those above who know what it is
    name: str
    sequential: bool
    handler_timeout: float | None
    max_events: int
    max_depth: int
    debug: bool
    plan_for: Callable[[object], Plan]
    tally: Tally
    report_failure: Callable[[Delivery, Exception], None]
    observers: tuple[Observer, ...] = ()
    losses: tuple[Counter[str], ...] = ()  # of those who count what is undelivered, by handler
    hosts: tuple[Host, ...] = ()  # in the order in which they began
    decisions: Decisions | None = None  # where transactions decide

    def report(self, delivery: Delivery, error: Exception) -> None:
        """Tell the bus's owner of a failure that nobody awaits."""
        try:
            self.report_failure(delivery, error)
        except Exception as broken:  # noqa: BLE001 - a reporter is user code
            log(logging.ERROR, "report_failure failed", error=broken, bus=self.name)
            log_failure(delivery, error)

    def count_losses(self, lost: Counter[str]) -> None:
        """From now on, have it count what is undelivered, by handler. Thread-safe."""
        with self.tally.lock:
            self.losses = (*self.losses, lost)

    def count_losses_no_more(self, lost: Counter[str]) -> None:
        """Leave it as it is. Thread-safe."""
        with self.tally.lock:
            self.losses = tuple(other for other in self.losses if other is not lost)

    def add_host(self, host: Host) -> None:
        """From now on it delivers units of work in the background. Thread-safe."""
        with self.tally.lock:
            self.hosts = (*self.hosts, host)

    def remove_host(self, host: Host) -> None:
        """It does so no longer; nothing happens where that is so already. Thread-safe."""
        with self.tally.lock:
            self.hosts = tuple(other for other in self.hosts if other is not host)


def log_failure(delivery: Delivery, error: Exception) -> None:
    """Write the line that a failed delivery leaves by default: never the payload."""
    log(
        logging.ERROR,
        "event handler failed",
        error=error,
        event_type=type_name(type(delivery.event)),
        handler=delivery.handler,
        delivery_id=str(delivery.id),
    )
