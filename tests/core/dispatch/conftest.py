"""Puts each implementation of dispatch through every test of this folder."""

from collections.abc import Iterator

import pytest

from eventkit import EventBus
from eventkit._core import endings
from tests.dispatching import (
    IMPLEMENTATIONS,
    Cancel,
    Deliver,
    NewBus,
    assert_settled,
    by_dispatch,
    by_drain,
    cancel_by_scope,
    cancel_natively,
    ignore,
)


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put one implementation of dispatch under the test, and give its name."""
    name: str = request.param
    monkeypatch.setattr(endings, "run_all", IMPLEMENTATIONS[name])
    return name


@pytest.fixture
def new_bus() -> Iterator[NewBus]:
    """Make buses that have to be at rest, with no delivery lost, when the test has ended."""
    buses: list[EventBus] = []

    def make(
        *, sequential: bool = False, handler_timeout: float | None = None, max_depth: int = 16
    ) -> EventBus:
        bus = EventBus(sequential=sequential, handler_timeout=handler_timeout, max_depth=max_depth)
        bus.report_failure = ignore
        buses.append(bus)
        return bus

    yield make
    for bus in buses:
        assert_settled(bus)


@pytest.fixture
def bus(new_bus: NewBus) -> EventBus:
    return new_bus()


@pytest.fixture(params=["dispatch", "drain"])
def deliver(request: pytest.FixtureRequest) -> Deliver:
    """Each way to have one event handled; gives what failed."""
    return {"dispatch": by_dispatch, "drain": by_drain}[request.param]


@pytest.fixture(params=["scope", "native"])
def cancel(request: pytest.FixtureRequest, anyio_backend_name: str) -> Cancel:
    """Each way to deliver one event and cancel that from outside, once all that runs waits."""
    if request.param == "native" and anyio_backend_name != "asyncio":
        pytest.skip("only on asyncio tasks can be cancelled natively")
    return {"scope": cancel_by_scope, "native": cancel_natively}[request.param]
