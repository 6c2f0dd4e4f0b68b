"""What holds on every server: nobody waits for handlers, and a shutdown waits for all of them."""

import re
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.serving import HOST, PATIENCE, Server, ask, serving

APP = "tests.servers.app:app"

# What the command line of each server is, but for its address.
UVICORN = ["uvicorn", APP, "--log-level", "warning"]
HYPERCORN = ["hypercorn", APP]
SERVERS: Mapping[str, Sequence[str]] = {
    "uvicorn-h11": [*UVICORN, "--http", "h11", "--loop", "asyncio"],
    "uvicorn-httptools-uvloop": [*UVICORN, "--http", "httptools", "--loop", "uvloop"],
    "uvicorn-graceful-1s": [*UVICORN, "--timeout-graceful-shutdown", "1"],
    "uvicorn-two-workers": [*UVICORN, "--workers", "2"],
    # The connection and its request: nothing beside them may count.
    "uvicorn-limit-concurrency": [*UVICORN, "--limit-concurrency", "2"],
    "gunicorn": ["gunicorn", APP, "--worker-class", "uvicorn_worker.UvicornWorker"],
    "hypercorn-asyncio": [*HYPERCORN, "--worker-class", "asyncio"],
    "hypercorn-trio": [*HYPERCORN, "--worker-class", "trio"],
    "granian": ["granian", APP, "--interface", "asgi"],
}
# Where something depends on the server itself, and not on how it was configured.
KINDS = [
    "uvicorn-h11",
    "uvicorn-graceful-1s",
    "gunicorn",
    "hypercorn-asyncio",
    "hypercorn-trio",
    "granian",
]

# What servers do beside waiting for us: supervisors look after their workers once a second, and
# two noisy cores start and end nine kinds of processes.
ALLOWANCE = 4.0


def command(name: str, port: int) -> Sequence[str]:
    """How to start a server of the matrix."""
    program, *options = SERVERS[name]
    if program in ("gunicorn", "hypercorn"):
        address = ["--bind", f"{HOST}:{port}"]
    else:
        address = ["--host", HOST, "--port", str(port)]
    return [sys.executable, "-m", program, *options, *address]


Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Once this file is there, handlers that wait go on."""
    return tmp_path / "release"


@pytest.fixture
def start(release: Path) -> Start:
    """Start a server by its name."""

    def start(name: str, *, shutdown_timeout: float = PATIENCE) -> AbstractContextManager[Server]:
        return serving(
            partial(command, name),
            env={
                "EVENTKIT_TEST_RELEASE": str(release),
                "EVENTKIT_TEST_SHUTDOWN_TIMEOUT": str(shutdown_timeout),
                "PYTHONUNBUFFERED": "1",
            },
        )

    return start


@contextmanager
def connected(server: Server) -> Generator[Callable[[str, str], Any]]:
    """One connection, by which all requests of the block have to go."""
    connection = server.connect()
    yield partial(ask, connection)
    connection.close()


def farewell(output: str) -> dict[str, int]:
    """The counters in the last line of the process that had something to deliver."""
    lines = re.findall(r"^eventkit has stopped: .*$", output, re.MULTILINE)
    counters = [
        {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)} for line in lines
    ]
    (said,) = [each for each in counters if each["accepted"]]
    ended = ("handled", "failed", "discarded", "undelivered", "pending", "running")
    assert said["accepted"] == sum(said[key] for key in ended)
    return said


@pytest.fixture(params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    server: str = request.param
    return server


def test_handlers_delay_nobody_failures_close_nothing_and_a_shutdown_delivers_all(
    name: str, start: Start, release: Path
) -> None:
    with start(name) as server:
        with connected(server) as ask:
            assert "spec_version" in ask("GET", "/asgi")  # what tells servers from test clients
            assert ask("POST", "/fail/first") == "published"
            server.wait_for("no mail today")
            for number in range(3):
                assert ask("POST", f"/wait/{number}") == "published"
            server.wait_for("begins 0")
            assert "spec_version" in ask("GET", "/asgi")  # the next request on the connection
            assert "handled" not in server.output

        server.signal()
        server.wait_for("delivering before shutdown: bus=default left=3 ")
        release.touch()
        server.wait()
        output = server.output

    assert re.findall(r"^(?:begins|handled) \d.*$", output, re.MULTILINE) == [
        line
        for number in range(3)
        for line in (f"begins {number}", f"handled {number}, resources open")
    ]
    assert output.rindex("handled") < output.rindex("resources closed")
    said = farewell(output)
    assert (said["handled"], said["failed"], said["left"]) == (3, 1, 0)
    assert "Exception in ASGI application" not in output


def test_what_takes_longer_than_the_deadline_is_named_and_the_process_ends(
    name: str, start: Start
) -> None:
    with start(name, shutdown_timeout=1) as server:
        with connected(server) as ask:
            for number in range(2):
                assert ask("POST", f"/hang/{number}") == "published"
            server.wait_for("begins 0")

        begun = time.monotonic()
        server.signal()
        server.wait()
        took = time.monotonic() - begun
        output = server.output

    assert took < 1 + ALLOWANCE
    assert " left=2 handlers=tests.servers.app:handle x2 still_running= " in output
    assert output.rindex("left=2") < output.rindex("resources closed")
    said = farewell(output)
    assert (said["handled"], said["undelivered"]) == (0, 2)


@pytest.mark.parametrize("name", KINDS)
def test_what_follows_a_response_is_waited_for_and_a_second_signal_changes_nothing(
    name: str, start: Start, release: Path
) -> None:
    with start(name) as server, closing(server.connect()) as idle:
        idle.connect()
        with connected(server) as ask:
            assert ask("POST", "/wait/running") == "published"
            server.wait_for("begins running")
            assert ask("POST", "/late/order") == "published"
            server.wait_for("commit begins")

        # The second signal is lost if the first one is still pending: wait for what a server does
        # after the first one.
        server.signal()
        if name == "granian":  # shuts the lifespan down beside requests that have responded
            server.wait_for("delivering before shutdown: bus=default left=2 ")
        else:
            assert idle.sock.recv(1) == b""  # the others close connections that are idle
        server.signal()
        release.touch()
        server.wait()
        output = server.output

    assert "commit ends" in output
    assert "handled running, resources open" in output
    assert "handled order, resources open" in output
    said = farewell(output)
    assert (said["handled"], said["left"]) == (2, 0)


@pytest.mark.parametrize("name", KINDS)
def test_a_plain_def_that_hangs_is_named_at_the_end_and_the_application_goes_down_without_it(
    name: str, start: Start, release: Path
) -> None:
    with start(name, shutdown_timeout=0.1) as server:
        with connected(server) as ask:
            assert ask("POST", "/block/thread") == "published"
            server.wait_for("begins thread")
            assert "spec_version" in ask("GET", "/asgi")  # the API goes on

        server.signal()
        server.wait_for("still_running=tests.servers.app:block x1 ")
        server.wait_for("resources closed")
        assert "handled thread" not in server.output
        release.touch()
        server.wait()
