"""What holds on every server with an outbox: a shutdown gives back what it could not do."""

import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from tests.serving import HOST, Server, ask, eventually, serving

APP = "tests.servers.kept:app"
SERVERS = {
    "uvicorn": ["uvicorn", APP, "--log-level", "warning"],
    "uvicorn-reload": ["uvicorn", APP, "--log-level", "warning", "--reload"],
    "gunicorn": ["gunicorn", APP, "--worker-class", "uvicorn_worker.UvicornWorker"],
    "hypercorn-trio": ["hypercorn", APP, "--worker-class", "trio"],
    "granian": ["granian", APP, "--interface", "asgi"],
}
SHUTDOWN_TIMEOUT = 0.5
ALLOWANCE = 6.0  # supervisors look after their workers once a second, on two noisy cores

Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    server: str = request.param
    return server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kept.db"


@pytest.fixture
def start(name: str, file: Path, tmp_path: Path) -> Start:
    def start(*, hangs: bool) -> AbstractContextManager[Server]:
        program, *options = SERVERS[name]
        if name == "uvicorn-reload":
            options = [*options, "--reload-dir", str(tmp_path)]

        def command(port: int) -> Sequence[str]:
            if program in ("gunicorn", "hypercorn"):
                address = ["--bind", f"{HOST}:{port}"]
            else:
                address = ["--host", HOST, "--port", str(port)]
            return [sys.executable, "-m", program, *options, *address]

        return serving(
            command,
            env={
                "EVENTKIT_TEST_DATABASE": f"sqlite:///{file}",
                "EVENTKIT_TEST_HANGS": "yes" if hangs else "",
                "EVENTKIT_TEST_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT),
                "PYTHONUNBUFFERED": "1",
            },
        )

    return start


def publish(server: Server, *names: str) -> None:
    with closing(server.connect()) as connection:
        for name in names:
            assert ask(connection, "POST", f"/publish/{name}") == "published"


def rows(file: Path) -> list[tuple[int, int, str | None]]:
    return look(file, "select state, attempt, owner from eventkit_outbox")


def look(file: Path, statement: str) -> list[tuple[int, int, str | None]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(statement).fetchall()


def counted(output: str, word: str) -> int:
    return sum(int(number) for number in re.findall(rf"\b{word}=(\d+)", output))


def test_a_shutdown_in_the_midst_gives_all_back_and_the_next_process_does_it(
    start: Start, file: Path
) -> None:
    names = [str(number) for number in range(7)]
    with start(hangs=True) as server:
        publish(server, *names)
        server.wait_for("begins 1")
        assert {(state, attempt) for state, attempt, _ in rows(file)} == {(1, 1)}
        assert len(look(file, "select 1, 1, owner from eventkit_process")) == 1

        begun = time.monotonic()
        server.signal()
        server.wait()
        took = time.monotonic() - begun
        output = server.output

    assert took < SHUTDOWN_TIMEOUT + ALLOWANCE
    assert rows(file) == [(0, 0, None)] * 7
    assert look(file, "select 1, 1, owner from eventkit_process") == []
    (closing_line,) = re.findall(r"^eventkit has stopped: .*$", output, re.MULTILINE)
    assert counted(closing_line, "requeued") == 7
    assert counted(closing_line, "left") == 0
    assert "were given back to the table: bus=default deliveries=" in output
    assert "Traceback" not in output

    with start(hangs=False) as server:
        for each in names:
            server.wait_for(f"handled {each}")
        eventually(lambda: not rows(file), lambda: f"rows are left: {rows(file)}")


def test_after_a_kill_in_the_midst_of_a_shutdown_the_next_process_does_all(
    start: Start, file: Path, name: str
) -> None:
    if name != "uvicorn":
        pytest.skip("supervisors look after their workers by themselves")
    with start(hangs=True) as server:
        publish(server, "one", "two")
        server.wait_for("begins two")
        server.signal()
        server.wait_for("delivering before shutdown")
        server.signal(signal.SIGKILL)
        server.wait()
        assert [state for state, *_ in rows(file)] == [1, 1]

    with start(hangs=False) as server:
        server.wait_for("handled one")
        server.wait_for("handled two")


def test_a_reload_leaves_no_row_to_nobody(
    start: Start, file: Path, tmp_path: Path, name: str
) -> None:
    if name != "uvicorn-reload":
        pytest.skip("about reloads alone")
    changed = tmp_path / "changed.py"
    changed.touch()
    with start(hangs=True) as server:
        publish(server, "one")
        server.wait_for("begins one")
        os.utime(changed, (time.time() + 10, time.time() + 10))
        server.wait_for("eventkit has stopped")
        eventually(lambda: server.output.count("begins one") >= 2, lambda: server.output)
        ((state, attempt, owner),) = rows(file)
        assert (state, attempt) == (1, 1)
        assert look(file, "select 1, 1, owner from eventkit_process") == [(1, 1, owner)]
