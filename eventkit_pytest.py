"""The pytest plugin: the fixture `capevents`, failures that no test hides, and clear messages.

The module is not inside the package, because pytest imports its plugins at each start, and an
import of `eventkit.x` imports `eventkit`. So eventkit is imported only if a test needs it. This
saves time, and coverage sees all lines of eventkit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from eventkit import EventBus
    from eventkit.testing import EventCapture

__all__ = ["capevents"]


_ALLOW = "eventkit_allow_failures"

_NO_BUS = """\
capevents needs the bus under test, and gets it from a fixture of yours that is named event_bus. \
Paste this into conftest.py. The fixture has to return the bus that your application publishes to:

    import pytest
    from eventkit import EventBus
    from shop import bus  # the module that has your bus

    @pytest.fixture
    def event_bus() -> EventBus:
        return bus
"""


@pytest.fixture
def capevents(request: pytest.FixtureRequest) -> Iterator[EventCapture]:
    """Watch the bus of the fixture `event_bus` during the test.

        def test_sign_up(client: TestClient, capevents: EventCapture) -> None:
            client.post("/users", json={"name": "Ada"})

            assert capevents.published == [UserCreated(1)]

    The fixture gives an `eventkit.testing.EventCapture`: lists of events, assertions, fakes, and
    methods that wait. After the test, the bus is in its earlier state. The test fails if a handler
    failed and the test did not look at `failures`.
    """
    from eventkit.testing import EventCapture

    with EventCapture(_bus_under_test(request)) as capture:
        if request.node.get_closest_marker(_ALLOW) is not None:
            capture.allow_failures()
        yield capture


@pytest.fixture
def _eventkit_watch(request: pytest.FixtureRequest) -> None:
    """Use `capevents` also in tests that use `event_bus` without it."""
    from eventkit import EventBus

    if isinstance(request.getfixturevalue("event_bus"), EventBus):  # not one of another library
        request.getfixturevalue("capevents")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", f"{_ALLOW}: handlers may fail in this test, and the test does not fail for it"
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Watch each test that uses the bus, from before its function-scoped fixtures are set up."""
    names: list[str] = getattr(item, "fixturenames", [])
    if "capevents" in names:
        names.remove("capevents")
        names.insert(_first_of_function(item, names), "capevents")
    elif "event_bus" in names and "_eventkit_watch" not in names:
        names.insert(_first_of_function(item, names), "_eventkit_watch")


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Explain how lists of events differ."""
    if "eventkit.testing" not in sys.modules:
        return None
    from eventkit.testing import explain

    return explain(op, left, right)


def _bus_under_test(request: pytest.FixtureRequest) -> EventBus:
    from eventkit import EventBus

    try:
        bus = request.getfixturevalue("event_bus")
    except pytest.FixtureLookupError as error:
        if error.argname != "event_bus":
            raise
        pytest.fail(_NO_BUS, pytrace=False)
    if not isinstance(bus, EventBus):
        pytest.fail(f"the fixture event_bus gave {bus!r}, not an EventBus", pytrace=False)
    return bus


def _first_of_function(item: pytest.Item, names: list[str]) -> int:
    """The index of the first function-scoped fixture; pytest has sorted the fixtures by scope."""
    # Any: pytest's scopes are private; AnyIO's plugin reads the same attribute.
    definitions: Any = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
    for index, name in enumerate(names):
        if name in definitions and definitions[name][-1].scope == "function":
            return index
    return len(names)
