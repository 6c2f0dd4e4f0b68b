"""What tests share: a witness of what becomes of deliveries, the law of every bus, handlers."""

from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version

import pytest
from trio.testing import MockClock

from eventkit import EventBus
from eventkit._core.bus import state_of
from eventkit._core.units import Unit
from tests.contract.bus import (
    Witness,
    assert_settled,
    calling,
    ignore,
    nothing,
    witnessed,
)

__all__ = [
    "Number",
    "Witness",
    "assert_settled",
    "calling",
    "entered",
    "freed_by_anyio",
    "ignore",
    "nothing",
    "unit_of",
    "virtual_time",
    "witnessed",
]

# Task groups and worker threads of old releases keep exceptions in rings of their own.
freed_by_anyio = pytest.mark.skipif(
    tuple(map(int, version("anyio").split(".")[:2])) < (4, 12),
    reason="older releases of AnyIO keep exceptions, and what they lead to, in rings",
)

# Trio's clock, which jumps to the next deadline as soon as everything waits.
virtual_time = pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("trio", {"clock": MockClock(autojump_threshold=0)}), id="trio-virtual-time")],
)


class Number(int):
    """An event that most buses have no handler for, and that shows itself as the number it is."""


def unit_of(bus: EventBus) -> Unit:
    """A unit of work as the middleware makes one."""
    return Unit(state_of(bus))


@contextmanager
def entered(unit: Unit) -> Generator[None]:
    """The unit of work is the active one during the block, as in a request, and goes on after."""
    unit.enter(None, None)
    try:
        yield
    finally:
        unit.leave()
