"""What holds on real servers, across a process and a socket."""

import importlib.util
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from tests.serving import Server, ask, on_uvicorn, serving

SERVERS = {
    f"uvicorn-{http}": on_uvicorn("tests.served:app", "--http", http)
    for http in ("h11", "httptools")
}


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    name: str = request.param
    if name.endswith("httptools") and importlib.util.find_spec("httptools") is None:
        pytest.skip("httptools is not installed")
    with serving(SERVERS[name]) as running:
        yield running


@pytest.fixture
def connection(server: Server) -> Iterator[HTTPConnection]:
    connection = server.connect()
    yield connection
    connection.close()


def test_a_slow_handler_delays_neither_the_response_nor_the_next_request_on_the_connection(
    connection: HTTPConnection,
) -> None:
    assert ask(connection, "POST", "/publish/slow") == "published"
    assert ask(connection, "POST", "/got-it/slow") == "told"

    assert ask(connection, "GET", "/story/slow") == [
        "handler waits for the client",
        "client has the response",
        "handler ends",
    ]


def test_a_failing_handler_leaves_the_connection_usable(
    server: Server, connection: HTTPConnection
) -> None:
    assert ask(connection, "POST", "/publish/failing") == "published"

    assert ask(connection, "GET", "/story/failing") == ["handler fails"]
    assert ask(connection, "GET", "/story/failing") == ["handler fails"]
    failure = "event handler failed: event_type=tests.served.Published handler=tests.served:handle"
    assert failure in server.output
    assert "RuntimeError: no mail today" in server.output
    assert "Exception in ASGI application" not in server.output
