"""Processes of their own: programs that run to their end, and servers.

A server is started by a command, is ready once it accepts connections, and is ended by its pid.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
# Far more than any of this takes; only a server that is stuck meets it.
PATIENCE = 30.0


@dataclass(frozen=True, slots=True, eq=False)
class Server:
    """A running server.

    Attributes:
        process: Its process; children of it are the server's own business.
        port: Where on 127.0.0.1 it listens.
        log: The file that its output goes to.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def output(self) -> str:
        """What it wrote so far, to both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until it has written this.

        Raises:
            AssertionError: It has not, in much time; the message has its output.
        """
        eventually(lambda: text in self.output, lambda: f"no {text!r} in:\n{self.output}")

    def connect(self) -> HTTPConnection:
        """A connection that stays open between requests, and fails rather than waits for ever."""
        return HTTPConnection(HOST, self.port, timeout=PATIENCE)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and go on."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait until it has ended; returns its exit code, negative where a signal ended it.

        Raises:
            AssertionError: It is still there; the message has its output.
        """
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end:\n{self.output}") from None


def run_python(
    *words: str, cwd: Path = ROOT, patience: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end in a process of its own, which can import what is in the repository.

    Args:
        words: The command line behind `python`.
        cwd: The folder that it is run in.
        patience: Seconds until it counts as stuck.

    Raises:
        subprocess.TimeoutExpired: It is stuck, and was killed.
    """
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )


def on_uvicorn(app: str, *options: str, folder: Path = ROOT) -> Callable[[int], list[str]]:
    """The command that serves an application on uvicorn, for `serving`.

    Args:
        app: Where it is, as `module:name`.
        options: More options of uvicorn.
        folder: Where its module is.
    """

    def command(port: int) -> list[str]:
        where = ["--app-dir", str(folder), "--host", HOST, "--port", str(port)]
        return [sys.executable, "-m", "uvicorn", app, *where, *options]

    return command


@contextmanager
def serving(
    command: Callable[[int], Sequence[str]],
    *,
    env: Mapping[str, str] = {},
    cwd: Path = ROOT,
) -> Generator[Server]:
    """Start a server, wait until it accepts connections, and end it after the block.

    Args:
        command: Given a free port, the command line.
        env: More environment variables of the server. `PYTHONPATH` is the root of the repository,
            unless it is among them.
        cwd: The folder that it is run in.

    Raises:
        AssertionError: It ended or did not accept connections; the message has its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        log = Path(folder, "output")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(port),
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": str(ROOT), **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        server = Server(process, port, log)
        try:
            wait_until_ready(server)
            yield server
            if process.poll() is None:
                server.signal()
            server.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers that a supervisor has left
            process.wait()


def ask(connection: HTTPConnection, method: str, path: str) -> Any:
    """Make a request and return its answer; the connection has to be the same each time."""
    before = connection.sock
    connection.request(method, path)
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, f"{method} {path} was answered {response.status}"
    assert connection.sock is not None, "the server closed the connection"
    assert before in (None, connection.sock), "the server had closed the connection"
    return answer


def eventually(holds: Callable[[], object], said: Callable[[], str]) -> None:
    """Wait until a condition holds that another process brings about.

    Args:
        holds: Whether the condition holds. It is asked a hundred times a second.
        said: The message, if the condition does not come to hold.

    Raises:
        AssertionError: The condition did not hold in much time.
    """
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)  # another process, so there is nothing to await


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_ready(server: Server) -> None:
    """Return as soon as it accepts a connection."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            socket.create_connection((HOST, server.port), timeout=PATIENCE).close()
        except ConnectionRefusedError:
            time.sleep(0.02)  # another process, so there is nothing to await
        else:
            return
    raise AssertionError(f"the server did not start:\n{server.output}")
