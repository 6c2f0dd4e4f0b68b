"""Owns what all units of work of one bus share. Knows nothing of how they work."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from anyio.abc import TaskGroup

from eventkit._core.events import Delivery, type_name
from eventkit._core.log import log
from eventkit._core.loops.threads import Entrance
from eventkit._core.observers import NOBODY, Audience
from eventkit._core.queue import Envelope
from eventkit._core.stats import Tally
from eventkit._core.subscriptions import Declaration, Plan


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


class Keeper(Protocol):
    """Keeps the deliveries of durable handlers in a table: see `eventkit.outbox`.

    Attributes:
        outbox: What users have of it. Any: an `Outbox`, which is a floor above.
    """

    outbox: Any

    def admit(self, declarations: Sequence[Declaration], /) -> None:
        """Refuse durable handlers of events that cannot be stored."""

    def accept(self, envelope: Envelope, /) -> None:
        """Give an event that is being published its rows, which are not written yet.

        Raises:
            EventEncodingError: The event cannot be stored.
        """

    async def write(self, envelopes: Sequence[Envelope], /) -> None:
        """Write the rows of what no transaction has decided; where that fails, take them away."""

    def settle(self) -> Coroutine[Any, Any, None]:
        """Write down what has become of deliveries. Is not cancelled, and ends in time."""
        ...

    def serve(self, host: Host, tasks: TaskGroup, /, *, concurrency: int) -> Service:
        """Run what is due on the event loop that calls, from the service's start on."""
        ...


class Service(Protocol):
    """Runs deliveries that are kept, on the event loop of one application."""

    @property
    def patience(self) -> float | None:
        """Seconds that deliveries may go on at shutdown; None where the application says so."""
        ...

    async def start(self) -> None:
        """Begin.

        Raises:
            EventKitError: The tables are not as they should be.
        """

    def stop(self) -> None:
        """Begin nothing more."""

    async def leave(self) -> None:
        """Write down all outcomes, and give back what was not run. Ends in time."""


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """A running application that delivers units of work of the bus in the background.

    Attributes:
        entrance: The event loop it runs on, for threads that have none.
        submit: Ends a unit of work: what there is to deliver is delivered later. Called on the
            event loop.
        origin: The origin of the units that are opened in it.
        is_crowded: Whether more than half as many deliveries wait as may.
        begin: Delivers what an ending gives, beside the units that are submitted.
    """

    entrance: Entrance
    submit: Submit
    origin: object
    is_crowded: Callable[[], bool]
    begin: Callable[[Any], None]  # Any: a `units.Ending`


@dataclass(slots=True, eq=False)
class BusState:
    """What all units of work of one bus share.

    The bus makes it and changes `observers` and `report_failure`; `add_host` and `remove_host`
    change `hosts`; drainers that close change `losses`; who ties a database to the bus sets
    `decisions`; an outbox sets `keeper` and changes `unseen`; `need_keeper` changes `needs_keeper`;
    everything else is fixed.
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
    observers: Audience = NOBODY
    losses: tuple[Counter[str], ...] = ()  # of those who count what is undelivered, by handler
    hosts: tuple[Host, ...] = ()  # in the order in which they began
    decisions: Decisions | None = None  # where transactions decide
    keeper: Keeper | None = None  # where durable deliveries are kept
    needs_keeper: tuple[str, ...] = ()  # the consumers that hand their messages to an outbox
    told_of_no_keeper: bool = False
    # By handler, the rows in transactions of callers that were not committed: nobody sees them.
    unseen: Counter[str] = field(default_factory=Counter[str])

    def report(self, delivery: Delivery, error: Exception) -> None:
        """Tell the bus's owner of a failure that nobody awaits."""
        try:
            self.report_failure(delivery, error)
        except Exception as broken:  # noqa: BLE001 - a reporter is user code
            log(logging.ERROR, "report_failure failed", error=broken, bus=self.name)
            log_failure(delivery, error)

    def need_keeper(self, consumer: str) -> None:
        """Have no application of the bus start without an outbox: this one hands it messages.

        The name is for the error's text.
        """
        self.needs_keeper = (*self.needs_keeper, consumer)

    def miss_keeper(self) -> None:
        """Warn once that durable handlers run in memory, for want of an outbox."""
        if not self.told_of_no_keeper:
            self.told_of_no_keeper = True
            if "PYTEST_VERSION" not in os.environ:  # tests need no outbox
                log(
                    logging.WARNING,
                    "durable handlers run in memory, and a crash loses what is pending: the bus "
                    "has no outbox. Outbox(bus, engine), where the application is wired",
                    bus=self.name,
                )

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
    """Write the line that a failed delivery leaves by default: never the payload.

    While a durable delivery has attempts left, it is a warning.
    """
    again = delivery.attempt < delivery.attempts
    kept = delivery.attempts > 1
    log(
        logging.WARNING if again else logging.ERROR,
        "event handler failed",
        error=error,
        event_type=type_name(type(delivery.event)),
        handler=delivery.handler,
        delivery_id=str(delivery.id),
        **({"attempt": f"{delivery.attempt} of {delivery.attempts}"} if kept else {}),
    )
