"""Owns the state that all units of work of one bus share. Knows nothing of how they work."""

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
        """Update the state of the transactions in the unit."""

    def tag(self, unit: Any, envelopes: Sequence[Envelope], /) -> None:
        """Note which transactions may decide the events of a publish. Needs the lock."""

    def settle(self, unit: Any, envelopes: Sequence[Envelope], /) -> None:
        """Decide events that were published into a transaction that has ended."""

    def follow(self, unit: Any, receiver: Any, /) -> None:
        """Note that `unit` hands its events to `receiver`. Needs the lock."""

    def end(self, unit: Any, /) -> None:
        """Decide all events of a unit that ends."""

    def dispatching(self, state: BusState, event: object, /) -> None:
        """Warn about a dispatch inside a transaction that has written."""


class Keeper(Protocol):
    """Stores the deliveries of durable handlers in a table: see `eventkit.outbox`.

    Attributes:
        outbox: The user's `Outbox`. Any: its class is in a layer above.
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
        """Write the rows of events that no transaction has decided; if it fails, drop the rows."""

    def settle(self) -> Coroutine[Any, Any, None]:
        """Write the outcomes of deliveries. It is not cancelled, and has a time limit."""
        ...

    def serve(self, host: Host, tasks: TaskGroup, /, *, concurrency: int) -> Service:
        """Return a service that runs due deliveries on the calling event loop once it starts."""
        ...


class Service(Protocol):
    """Runs stored deliveries on the event loop of one application."""

    @property
    def patience(self) -> float | None:
        """Seconds that deliveries may go on at shutdown; None if the application decides it."""
        ...

    async def start(self) -> None:
        """Begin.

        Raises:
            EventKitError: The tables are missing, or have another version.
        """

    def stop(self) -> None:
        """Start no more deliveries."""

    async def leave(self) -> None:
        """Write all outcomes, and give back deliveries that did not run. It has a time limit."""


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """A running application that delivers units of work of the bus in the background.

    Attributes:
        entrance: The way to its event loop, for threads that have none.
        submit: Ends a unit of work; its events are delivered later. Called on the event loop.
        origin: The origin of the units that are opened in it.
        is_crowded: Whether more than half of `max_pending` deliveries wait.
        begin: Delivers the events of an ending, in addition to the submitted units.
    """

    entrance: Entrance
    submit: Submit
    origin: object
    is_crowded: Callable[[], bool]
    begin: Callable[[Any], None]  # Any: a `units.Ending`


@dataclass(slots=True, eq=False)
class BusState:
    """The state that all units of work of one bus share.

    | changed by | attributes |
    |---|---|
    | the bus | `observers`, `report_failure` |
    | `add_host`, `remove_host` | `hosts` |
    | drainers that close | `losses` |
    | the tie to a database | `decisions` |
    | an outbox | `keeper`, `unseen` |
    | `need_keeper` | `needs_keeper` |
    | `miss_keeper` | `told_of_no_keeper` |

    Everything else is fixed.
    """

    bus: object  # the `EventBus`, for the layers above
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
    losses: tuple[Counter[str], ...] = ()  # counters of undelivered deliveries, by handler
    hosts: tuple[Host, ...] = ()  # in the order in which they began
    decisions: Decisions | None = None  # set if transactions decide
    keeper: Keeper | None = None  # set if an outbox stores durable deliveries
    needs_keeper: tuple[str, ...] = ()  # the consumers that store their messages in an outbox
    told_of_no_keeper: bool = False
    # By handler: rows in callers' transactions that were not committed, so no process sees them.
    unseen: Counter[str] = field(default_factory=Counter[str])

    def report(self, delivery: Delivery, error: Exception) -> None:
        """Report a failure that no code awaits."""
        try:
            self.report_failure(delivery, error)
        except Exception as broken:  # noqa: BLE001 - a reporter is user code
            log(logging.ERROR, "report_failure failed", error=broken, bus=self.name)
            log_failure(delivery, error)

    def need_keeper(self, consumer: str) -> None:
        """Note that this consumer needs an outbox: without one, an application does not start.

        The name of the consumer is for the error message.
        """
        self.needs_keeper = (*self.needs_keeper, consumer)

    def miss_keeper(self) -> None:
        """Warn once that durable handlers run in memory, because there is no outbox."""
        if not self.told_of_no_keeper:
            self.told_of_no_keeper = True
            if "PYTEST_VERSION" not in os.environ:  # tests need no outbox
                log(
                    logging.WARNING,
                    "durable handlers run in memory, and a crash loses the pending deliveries: the "
                    "bus has no outbox. Create one where you set up the application: "
                    "Outbox(bus, engine)",
                    bus=self.name,
                )

    def count_losses(self, lost: Counter[str]) -> None:
        """Count undelivered deliveries by handler in `lost` from now on. Thread-safe."""
        with self.tally.lock:
            self.losses = (*self.losses, lost)

    def count_losses_no_more(self, lost: Counter[str]) -> None:
        """Stop counting in `lost`. Thread-safe."""
        with self.tally.lock:
            self.losses = tuple(other for other in self.losses if other is not lost)

    def add_host(self, host: Host) -> None:
        """Let the application deliver units of work in the background. Thread-safe."""
        with self.tally.lock:
            self.hosts = (*self.hosts, host)

    def remove_host(self, host: Host) -> None:
        """Remove the application; no effect if it was removed already. Thread-safe."""
        with self.tally.lock:
            self.hosts = tuple(other for other in self.hosts if other is not host)


def log_failure(delivery: Delivery, error: Exception) -> None:
    """Write the default log line for a failed delivery, without the payload.

    If a durable delivery has attempts left, the line is a warning, else an error.
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
