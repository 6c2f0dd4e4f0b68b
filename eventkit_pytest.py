"""The pytest plugin: the fixture `capevents`, honest tests, and messages that explain.

A module beside the package and not in it: pytest imports its plugins at each start, and whoever
imports a module of a package imports the package. So nothing of eventkit is imported before a
test needs it, which costs no time where nothing does, and hides nothing from coverage.
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
capevents needs to know the bus under test, from a fixture of yours named event_bus. Paste this \
into conftest.py, and have it return the bus that your application publishes to:

    import pytest
    from eventkit import EventBus
    from shop import bus  # wherever yours is

    @pytest.fixture
    def event_bus() -> EventBus:
        return bus
"""


@pytest.fixture
def capevents(request: pytest.FixtureRequest) -> Iterator[EventCapture]:
    """What happens on the bus of the fixture `event_bus` during the test.

    An `eventkit.testing.EventCapture`: lists of events, assertions that explain, fakes, waiting.
    Afterwards the bus is as it was, and a handler that failed unnoticed fails the test.
    """
    from eventkit.testing import EventCapture

    with EventCapture(_bus_under_test(request)) as capture:
        if request.node.get_closest_marker(_ALLOW) is not None:
            capture.allow_failures()
        yield capture


@pytest.fixture
def _eventkit_watch(request: pytest.FixtureRequest) -> None:
    """Watch a test that uses `event_bus` and does not ask for `capevents`."""
    from eventkit import EventBus

    if isinstance(request.getfixturevalue("event_bus"), EventBus):  # or another library's
        request.getfixturevalue("capevents")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", f"{_ALLOW}: handlers may fail in this test, which does not look at failures"
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have each test that uses the bus watched, around all fixtures that live as long as it."""
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
        pytest.fail(f"the fixture event_bus gave {bus!r}, which is no EventBus", pytrace=False)
    return bus


def _first_of_function(item: pytest.Item, names: list[str]) -> int:
    """Where the fixtures begin that live as long as one test; pytest has sorted them by scope."""
    # Any: what pytest knows of the scopes is private; AnyIO's plugin reads the same attribute.
    definitions: Any = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
    for index, name in enumerate(names):
        if name in definitions and definitions[name][-1].scope == "function":
            return index
    return len(names)
