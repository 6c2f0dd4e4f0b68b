"""An SDK of a test's own, whose spans and metrics stay in memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk")

from eventkit import EventBus
from tests.opentelemetry.collected import Collected


@pytest.fixture
def telemetry() -> Iterator[Collected]:
    """What an application has set up, and what came of it."""
    collected = Collected()
    yield collected
    collected.shutdown()


@pytest.fixture
def bus() -> EventBus:
    return EventBus(name="shop")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Where a test may have a database."""
    return tmp_path / "test.db"
