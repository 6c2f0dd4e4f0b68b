"""An observer that notes what becomes of each delivery, and the law that every bus obeys."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

import pytest

from eventkit import Delivery, EventBus, Observer

# Looked at on 4.5, whose task groups and worker threads keep exceptions in rings of their own.
freed_by_anyio = pytest.mark.skipif(
    tuple(map(int, version("anyio").split(".")[:2])) < (4, 12),
    reason="older releases of AnyIO keep exceptions, and what they lead to, in rings",
)


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
