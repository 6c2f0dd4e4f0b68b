"""The pytest plugin from outside: tests that a user might write, run by pytest itself."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.filters import filter_options

# Pytester forgets what its runs are the first to import, and later tests would have it twice.
for module in ("starlette.testclient", "eventkit.starlette"):
    import_module(module)

ROOT = Path(__file__).parent.parent.parent

CONFTEST = """
import pytest

from tests.filters import filter_options
from app import bus

@pytest.fixture(scope="session")
def event_bus():
    return bus
"""

APP = """
from dataclasses import dataclass
from eventkit import DomainEvent, EventBus
from eventkit.starlette import EventContextMiddleware
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

@dataclass(frozen=True, slots=True)
class OrderPlaced(DomainEvent):
    order_id: int
    email: str = "ada@example.org"

@dataclass(frozen=True, slots=True)
class ReceiptSent(DomainEvent):
    order_id: int

bus = EventBus()

@bus.on(OrderPlaced)
async def send_receipt(event):
    if event.order_id == 13:
        raise ValueError("no receipt for 13")
    bus.publish(ReceiptSent(event.order_id))

async def place(request):
    order_id = int(request.query_params["id"])
    bus.publish(OrderPlaced(order_id))
    return PlainTextResponse("placed", status_code=409 if order_id == 409 else 200)

app = Starlette(routes=[Route("/", place)])
app.add_middleware(EventContextMiddleware, bus=bus)
"""


@pytest.fixture(autouse=True)
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with an application, and with the plugin where eventkit is not installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(app=APP)
    pytester.makeconftest(CONFTEST)
    plugin = "" if is_installed() else "-p eventkit_pytest"
    pytester.makeini(
        f"[pytest]\naddopts = {plugin} -p no:cacheprovider -p no:randomly -p no:hypothesispytest\n"
    )


def is_installed() -> bool:
    """Whether pytest finds the plugin by its entry point."""
    return any(point.value == "eventkit_pytest" for point in entry_points(group="pytest11"))


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run the project's tests."""
    return pytester.runpytest_inprocess(*arguments, "-p", "no:faulthandler")


def run_alone(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run the project's tests in a process of their own, as users do."""
    return pytester.runpytest_subprocess(*arguments)


HEAD = """
import pytest

from tests.filters import filter_options
from app import *
from starlette.testclient import TestClient

def place(order_id):
    return TestClient(app).get("/", params={"id": order_id})
"""


def test_a_project_of_three_lines_records_asserts_and_leaks_nothing(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        HEAD
        + """
def test_published(capevents):
    assert bus.stats.published == 0
    place(1)
    assert capevents.published == [OrderPlaced(1), ReceiptSent(1)]
    assert capevents.handled.by(send_receipt) == [OrderPlaced(1)]

def test_nothing_is_left_of_the_other_tests(capevents):
    assert bus.stats.published == 0
    assert capevents.published == []
    bus.subscribe(OrderPlaced, print)
    capevents.fail(send_receipt, OSError)

def test_a_request_that_failed_published_nothing(capevents):
    assert place(409).status_code == 409
    assert capevents.published == []
    assert capevents.discarded == [OrderPlaced(409)]

def test_nor_of_this_one_although_it_asks_for_the_bus_alone(event_bus):
    place(1)
    assert event_bus.stats.handled == 1
    event_bus.subscribe(OrderPlaced, print)

def test_which_was_restored_too(event_bus):
    assert event_bus.stats.published == 0
    assert [each.handler for each in event_bus.handlers_for(OrderPlaced)] == [send_receipt]

def test_that_needs_nothing_of_it():
    pass

class TestClass:
    def test_in_a_class(self, capevents):
        place(1)
        capevents.one(OrderPlaced)
"""
    )
    filters = filter_options("app", "conftest", "test_.*")
    run_alone(pytester, "-q", "--strict-markers", *filters).assert_outcomes(passed=7)


def test_failures_explain_themselves(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        HEAD
        + """
def test_equal(capevents):
    place(1)
    assert capevents.published == [OrderPlaced(2), ReceiptSent(1), ReceiptSent(2)]

def test_one(capevents):
    place(1)
    capevents.one(OrderPlaced, order_id=2)

def test_in(capevents):
    place(1)
    assert ReceiptSent(2) in capevents.published

def test_failures(capevents):
    place(13)
    assert capevents.failures == []

def test_other_comparisons():
    assert [1] == [2]
"""
    )
    result = run(pytester)
    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines(
        [
            "E       AssertionError: assert published == expected, but for 1 missing (-), "
            "1 different (~)",
            "E         ~ OrderPlaced(order_id=1, email='ada@example.org')",
            "E             order_id is 1, expected 2",
            "E           (1 as expected)",
            "E         - ReceiptSent(order_id=2)",
            ">       capevents.one(OrderPlaced, order_id=2)",
            "E       AssertionError: expected one OrderPlaced(order_id=2), but none was published; "
            "instead, nearest first:",
            "E         OrderPlaced(order_id=1, email='ada@example.org')",
            "E           order_id is 1, not 2",
            "E         ReceiptSent(order_id=1)",
            "",
            "test_failures_explain_themselves.py:*: AssertionError",
            "E       AssertionError: assert ReceiptSent(order_id=2) in published, but these are, "
            "nearest first:",
            "E           ReceiptSent(order_id=1)",
            "E             order_id is 1, not 2",
            "E           OrderPlaced(order_id=1, email='ada@example.org')",
            "E       AssertionError: assert failures == expected, but 1 failed",
            "E           app:send_receipt for OrderPlaced(order_id=13, email='ada@example.org'): "
            "ValueError: no receipt for 13 (*app.py:*)",
            "E       assert [1] == [2]",
        ]
    )


def test_a_handler_that_fails_unnoticed_fails_the_test_with_its_traceback(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        HEAD
        + """
def test_unnoticed(capevents):
    place(13)

def test_unnoticed_by_who_asks_for_the_bus_alone(event_bus):
    place(13)

def test_looked_at(capevents):
    place(13)
    assert "no receipt" in str(capevents.failures[0].error)

@pytest.mark.eventkit_allow_failures
def test_allowed(capevents):
    place(13)

def test_provoked(capevents):
    capevents.fail(send_receipt, OSError)
    place(1)

def test_without_the_bus_nobody_looks():
    place(13)
"""
    )
    result = run(pytester, "--strict-markers")
    result.assert_outcomes(passed=6, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_unnoticed *",
            "*UnexpectedFailures: handlers failed, and the test did not expect it. If the failures "
            "are expected: read `failures`, or provoke them with `fail()`, or call "
            "`allow_failures()`, or mark the test with @pytest.mark.eventkit_allow_failures "
            "(1 sub-exception)",
            "*File *app.py*, line *, in send_receipt",
            '*raise ValueError("no receipt for 13")',
            "*raised by the handler app:send_receipt (*app.py:*) for app.OrderPlaced*",
        ]
    )


def test_without_a_bus_the_error_has_the_lines_to_paste(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("")
    pytester.makepyfile("def test_it(capevents): ...")
    result = run(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "capevents needs the bus under test, and gets it from a fixture of yours*event_bus.*",
            "    import pytest",
            "    from eventkit import EventBus",
            "    from shop import bus  # the module that has your bus",
            "    @pytest.fixture",
            "    def event_bus() -> EventBus:",
            "        return bus",
        ]
    )


def test_a_bus_that_is_none_or_cannot_be_made_is_told_as_such(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_other="""
import pytest

from tests.filters import filter_options

@pytest.fixture
def event_bus():
    return "another library's"

def test_with_it(event_bus):
    assert event_bus == "another library's"

def test_asking_for_ours(capevents): ...
""",
        test_missing="""
import pytest

from tests.filters import filter_options

@pytest.fixture
def event_bus(nobody_has_this): ...

def test_it(capevents): ...
""",
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*fixture 'nobody_has_this' not found",
            'the fixture event_bus gave "another library\'s", not an EventBus',
        ]
    )


def test_both_event_loops_of_anyios_plugin_run_it_as_it_is(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        HEAD
        + """
import anyio

@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param

@pytest.mark.anyio
async def test_waiting(capevents):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bus.dispatch, OrderPlaced(1))
        assert await capevents.wait_for(ReceiptSent) == ReceiptSent(1)
        await capevents.idle()
    assert len(capevents.handled) == 1
"""
    )
    run(pytester, "-q", "-p", "no:asyncio").assert_outcomes(passed=2)


def test_everything_that_lives_as_long_as_a_test_is_inside_of_what_is_watched(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        HEAD
        + """
@pytest.fixture(scope="module")
def wiring():
    bus.subscribe(ReceiptSent, print)

@pytest.fixture
def client():
    bus.subscribe(OrderPlaced, print)
    yield TestClient(app)
    TestClient(app).get("/", params={"id": 13})

def test_the_client_goes_before_the_bus(wiring, client, capevents):
    capevents.allow_failures()
    assert [each.handler for each in bus.handlers_for(OrderPlaced)] == [send_receipt, print]

def test_what_lives_longer_stays(wiring, event_bus):
    assert [each.handler for each in bus.handlers_for(OrderPlaced)] == [send_receipt]
    assert [each.handler for each in bus.handlers_for(ReceiptSent)] == [print]
"""
    )
    run(pytester, "-q").assert_outcomes(passed=2)


def test_two_hundred_tests_that_share_an_app_leak_nothing_in_any_order_and_in_any_process(
    pytester: pytest.Pytester,
) -> None:
    """In a shuffled order, on two processes of pytest-xdist."""
    pytester.makeconftest(
        CONFTEST
        + """
import random

def pytest_collection_modifyitems(items):
    random.Random(7).shuffle(items)  # the same in each process, as xdist wants it
"""
    )
    pytester.makepyfile(
        HEAD
        + """
@pytest.mark.parametrize("number", range(200))
def test_one_of_many(capevents, number):
    assert bus.stats.accepted == 0
    assert [each.handler for each in bus.handlers_for(OrderPlaced)] == [send_receipt]
    fakes = [
        lambda: capevents.fail(send_receipt, OSError),
        lambda: capevents.record_only(OrderPlaced),
        lambda: capevents.delay(send_receipt, 0),
        lambda: bus.subscribe(OrderPlaced, lambda event: None, thread=False),
        lambda: bus.handlers_for(OrderPlaced)[0].cancel(),
    ]
    fakes[number % 5]()
    place(1)
    assert capevents.published[0] == OrderPlaced(1)
    assert bus.stats.published == len(capevents.published)
"""
    )
    run_alone(pytester, "-q", "-n", "2").assert_outcomes(passed=200)


def test_the_plugin_imports_nothing_before_it_is_needed() -> None:
    script = """
import sys
before = set(sys.modules)
import pytest

from tests.filters import filter_options
import eventkit_pytest
eventkit_pytest.pytest_assertrepr_compare("==", [1], [2])
print({name.partition(".")[0] for name in sys.modules} & {"eventkit", "starlette", "structlog"})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True, cwd=ROOT
    )

    assert done.stdout == "set()\n"


@pytest.mark.skipif(find_spec("pytest_asyncio") is None, reason="needs pytest-asyncio")
def test_it_works_beside_pytest_asyncio(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        HEAD
        + """
@pytest.mark.asyncio
async def test_there(capevents):
    await bus.dispatch(OrderPlaced(1))
    await capevents.idle()
    assert capevents.published == [OrderPlaced(1), ReceiptSent(1)]

@pytest.mark.anyio
async def test_beside_anyio(capevents):
    await bus.dispatch(OrderPlaced(1))
    assert await capevents.wait_for(ReceiptSent) == ReceiptSent(1)
"""
    )
    run_alone(pytester, "-q").assert_outcomes(passed=3)
