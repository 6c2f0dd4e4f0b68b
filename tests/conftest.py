"""The event loops that every async test runs on, and the services that a few tests need."""

import asyncio
import gc
import importlib
import os
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest

pytest_plugins = ["pytester"]

# As the plugin does, which comes later here; conftests below import what is to be rewritten.
pytest.register_assert_rewrite("tests.contract")

# What AnyIO's plugin takes as a backend: its name and the options of its runner.
Backend = tuple[str, dict[str, Any]]

SERVICES = {
    "postgres": (
        "EVENTKIT_POSTGRES_URL",
        "postgresql+asyncpg://postgres@127.0.0.1:5432/test",
    ),
    "mariadb": (
        "EVENTKIT_MARIADB_URL",
        "mysql+pymysql://root@127.0.0.1:3306/test",
    ),
    "nats": ("EVENTKIT_NATS_URL", "nats://127.0.0.1:4222"),
    "rabbitmq": ("EVENTKIT_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672/"),
    "redis": ("EVENTKIT_REDIS_URL", "redis://127.0.0.1:6379"),
}


def eager_loop() -> asyncio.AbstractEventLoop:
    """Make a loop that starts each task at once, in the middle of `create_task`."""
    loop = asyncio.new_event_loop()
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    return loop


BACKENDS: dict[str, Backend] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "asyncio-eager": ("asyncio", {"loop_factory": eager_loop}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
CHOSEN = os.environ.get("EVENTKIT_BACKENDS", "asyncio,trio").split(",")
# Loops that this Python does not have, each with the reason.
LEFT_OUT = {
    **({"asyncio-eager": "needs Python 3.12"} if sys.version_info < (3, 12) else {}),
    **({"uvloop": "not installed"} if find_spec("uvloop") is None else {}),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", type=float, default=12.0, metavar="SECONDS", help="how long each soak takes"
    )


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """Tell what soaks have counted, also where they have passed."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == "soak":
                    terminalreporter.write_line(str(value))


def pytest_configure(config: pytest.Config) -> None:
    """Load the project's own plugin where the project is not installed."""
    if not config.pluginmanager.has_plugin("eventkit"):
        config.pluginmanager.register(importlib.import_module("eventkit_pytest"), "eventkit")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep what has been imported and collected out of every collection of garbage to come.

    Many tests collect garbage, or look at every object. Of those, most belong to the suite itself.
    """
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """Name the event loops of this run in pytest's first lines."""
    running = [name for name in CHOSEN if name not in LEFT_OUT]
    missing = [f"{name} left out, {LEFT_OUT[name]}" for name in CHOSEN if name in LEFT_OUT]
    return "event loops: " + ", ".join([*running, *missing])


@pytest.fixture(
    scope="module",
    params=[pytest.param(BACKENDS[name], id=name) for name in CHOSEN if name not in LEFT_OUT],
)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """Run the test once on each event loop that EVENTKIT_BACKENDS names."""
    backend: Backend = request.param
    return backend


def require(what: str) -> NoReturn:
    """Skip the test for want of something; with EVENTKIT_REQUIRE_SERVICES=1 fail, as CI does."""
    if os.environ.get("EVENTKIT_REQUIRE_SERVICES") == "1":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def service_url() -> Callable[[str], str]:
    """Give the URL of a service by name; see `require` for one that does not answer."""

    def find(name: str) -> str:
        variable, default = SERVICES[name]
        url = os.environ.get(variable, default)
        address = urlsplit(url)
        try:
            socket.create_connection((address.hostname, address.port), timeout=2).close()
        except OSError as error:
            require(f"no {name} at {address.hostname}:{address.port} ({error}); set {variable}")
        return url

    return find


@pytest.fixture(scope="session")
def soak_seconds(request: pytest.FixtureRequest) -> float:
    """How long each soak takes."""
    given: float = request.config.getoption("--soak")  # pyright: ignore[reportAssignmentType]
    return given


@pytest.fixture
def on_asyncio(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("about asyncio alone")


@pytest.fixture
def on_trio(anyio_backend_name: str) -> None:
    if anyio_backend_name != "trio":
        pytest.skip("about trio alone")
