"""A bus with handlers for orders, and what is captured on it."""

from collections.abc import Iterator

import pytest

from eventkit import EventBus
from eventkit.testing import EventCapture
from tests.kit.orders import make_bus


@pytest.fixture
def bus() -> EventBus:
    return make_bus()


@pytest.fixture
def events(bus: EventBus) -> Iterator[EventCapture]:
    with EventCapture(bus) as events:
        yield events
