"""An observer that notes what becomes of each delivery, and the law that every bus obeys."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from eventkit import Delivery, EventBus, Observer


class Witness(Observer):
    """Notes the end of each delivery, in the order of the ends: `handled paid`, `failed paid`."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def delivery(self, delivery: Delivery) -> Generator[None]:
        try:
            yield
        except Exception:
            self.seen.append(f"failed {delivery.event}")
            raise
        self.seen.append(f"handled {delivery.event}")

    def discarded(self, deliveries: Sequence[Delivery]) -> None:
        self.seen += [f"discarded {delivery.event}" for delivery in deliveries]

    def undelivered(self, deliveries: Sequence[Delivery]) -> None:
        self.seen += [f"undelivered {delivery.event}" for delivery in deliveries]


def witnessed(bus: EventBus) -> list[str]:
    """What a new witness of the bus has seen, as it grows."""
    witness = Witness()
    bus.observe(witness)
    return witness.seen


def assert_settled(bus: EventBus) -> None:
    """Nothing waits and nothing runs, and each accepted delivery has ended in one way."""
    stats = bus.stats
    ended = stats.handled + stats.failed + stats.discarded + stats.undelivered
    assert (stats.pending, stats.running, ended) == (0, 0, stats.accepted)


def nothing(event: object) -> None:
    """Handle any event by doing nothing."""


def calling(call: Callable[[], object]) -> Callable[[object], None]:
    """Make a handler that calls this, and awaits nothing."""

    def handle(event: object) -> None:
        call()

    return handle


def ignore(delivery: Delivery, error: Exception) -> None:
    """Report a failure to nobody."""
