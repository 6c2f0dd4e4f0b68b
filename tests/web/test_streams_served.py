"""The live page on a real server: windows that come, are slow, and go, and a server that ends."""

import json
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from tests.serving import on_uvicorn, serving

pytest.importorskip("fastapi.sse", reason="FastAPI has it since 0.135")


def open_window(connection: HTTPConnection) -> HTTPResponse:
    """Connect, and return when the stream is open."""
    connection.request("GET", "/orders/paid")
    response = connection.getresponse()
    assert response.status == 200
    assert response.getheader("content-type", "").startswith("text/event-stream")
    assert response.readline() == b": connected\n"
    return response


def next_payment(window: HTTPResponse) -> Any:
    """The data of the next event."""
    while not (line := window.readline()).startswith(b"data: "):
        assert line, "the response has ended"
    return json.loads(line.removeprefix(b"data: "))


def pay(connection: HTTPConnection, order_id: int) -> None:
    connection.request("POST", f"/orders/{order_id}/pay")
    response = connection.getresponse()
    response.read()
    assert response.status == 204


def test_windows_see_what_is_paid_one_that_leaves_disturbs_nobody_and_a_signal_ends_them() -> None:
    with serving(on_uvicorn("examples.live:app")) as server:
        customer = server.connect()
        leaving, staying = server.connect(), server.connect()
        windows = [open_window(leaving), open_window(staying)]
        pay(customer, 1)
        assert [next_payment(window) for window in windows] == [{"order_id": 1}] * 2

        windows[0].close()
        leaving.close()
        pay(customer, 2)
        pay(customer, 3)
        assert [next_payment(windows[1]) for _ in range(2)] == [{"order_id": 2}, {"order_id": 3}]

        server.signal()
        assert b"data" not in windows[1].read()  # returns when the response has ended well
        customer.close()
        staying.close()
        server.wait()
        assert "Application shutdown complete" in server.output
        assert "Traceback" not in server.output


def test_without_end_at_shutdown_uvicorn_waits_for_the_window_to_close() -> None:
    with serving(on_uvicorn("tests.served_live:app")) as server:
        connection = server.connect()
        window = open_window(connection)

        server.signal()
        server.wait_for("Waiting for connections to close")
        assert server.process.poll() is None
        assert "Waiting for application shutdown" not in server.output
        window.close()
        connection.close()
        server.wait()


def test_without_it_a_graceful_timeout_of_uvicorn_ends_the_response_too() -> None:
    command = on_uvicorn("tests.served_live:app", "--timeout-graceful-shutdown", "1")
    with serving(command) as server:
        connection = server.connect()
        window = open_window(connection)

        server.signal()
        server.wait()
        assert "Cancel 1 running task(s)" in server.output
        assert "Application shutdown complete" in server.output
        window.close()
        connection.close()
