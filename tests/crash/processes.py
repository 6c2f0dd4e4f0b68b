"""Workers as seen from outside: started, told, listened to, stopped, and killed by their pids."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any

from tests.crash.nursery import PATIENCE, ROOT, Nursery

LEASE = 1.5  # seconds, the least there is
# Where nobody is to be taken for dead: on a busy machine a heartbeat may be a second late.
LONG = 8.0
LOST = "the lease of a delivery was lost before its outcome was written"  # as far as a colon

Line = Mapping[str, Any]


class Process:
    """A worker process.

    Attributes:
        name: Of the worker, for messages.
        pid: The process's.
        lines: What it has said.
        told: What it was told.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], nursery: Nursery | None, env: Mapping[str, str]
    ) -> None:
        """Start it.

        Args:
            name: For messages.
            arguments: What the worker is given.
            nursery: Who makes it; None for a program of its own.
            env: More variables of a program of its own.
        """
        self.name = name
        self.lines: list[Line] = []
        self.told: list[str] = []
        self._heard = Condition()
        self._is_over = False
        stdin, self._stdin = os.pipe()
        stdout, write = os.pipe()
        self._started: subprocess.Popen[bytes] | None = None
        self._nursery = nursery
        if nursery is None:
            self._started = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.worker", *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **env},
                stdin=stdin,
                stdout=write,
            )
            self.pid = self._started.pid
        else:
            self.pid = nursery.start(arguments, stdin, write)
        os.close(stdin)
        os.close(write)
        self._reader = Thread(target=self._read, args=[stdout], daemon=True)
        self._reader.start()

    def _read(self, stdout: int) -> None:
        with os.fdopen(stdout, "rb") as lines:
            for line in lines:
                with self._heard:
                    self.lines.append(json.loads(line))
                    self._heard.notify_all()
        with self._heard:
            self._is_over = True
            self._heard.notify_all()

    @property
    def is_running(self) -> bool:
        return self.ended_within(0) is None

    def ended_within(self, patience: float) -> int | None:
        """Its exit code; None if it runs on so long."""
        if self._nursery is not None:
            return self._nursery.code(self.pid, patience)
        assert self._started is not None
        try:
            return self._started.wait(patience)
        except subprocess.TimeoutExpired:
            return None

    def tell(self, what: str, /, **arguments: object) -> None:
        """Give it a command. One that has died meanwhile hears nothing."""
        self.told.append(what)
        try:
            os.write(self._stdin, json.dumps({"do": what, **arguments}).encode() + b"\n")
        except BrokenPipeError:
            pass

    def said(self, what: str, /, **facts: object) -> list[Line]:
        """The lines of this kind that it has said so far."""
        return [line for line in self.lines if _is(line, what, facts)]

    def hear(self, what: str, times: int = 1, /, **facts: object) -> Line:
        """Wait until it has said this, so many times; give the last of those lines.

        Raises:
            AssertionError: It has ended without, or has not said it in much time.
        """
        with self._heard:
            found = self._heard.wait_for(
                lambda: self._is_over or len(self.said(what, **facts)) >= times, PATIENCE
            )
            lines = self.said(what, **facts)
        if len(lines) < times:
            how = "ended" if found else "did not say it in time"
            raise AssertionError(f"{self.name} {how}: no {what!r} {facts} in {self.story()}")
        return lines[times - 1]

    def in_flight(self, handler: str) -> tuple[set[str], int]:
        """The events that the handler had begun, and whose outcome was not written, at the end.

        Also how many they were at most. So many it may do again if the process is given up.
        """
        running, most = dict[str, str](), 0
        for line in self.lines:
            if _is(line, "begins", {"handler": handler}):
                running[line["delivery"]] = line["id"]
                most = max(most, len(running))
            elif line["say"] == "written":
                for each in line["deliveries"]:
                    running.pop(each, None)
        return {*running.values()}, most

    def lost(self) -> int:
        """How many deliveries it has finished that another process had been given, as it says."""
        return len(self.said("log", text=LOST))

    def stand_still(self) -> None:
        """Have it stop, with no transaction open. It goes on at SIGCONT."""
        self.tell("stand still")
        self.hear("stands still")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait until it has ended; its exit code, negative where a signal ended it."""
        code = self.ended_within(PATIENCE)
        assert code is not None, f"{self.name} did not end: {self.story()}"
        self._reader.join(PATIENCE)
        return code

    def stop(self) -> Line:
        """End it as one is ended that is not killed; what it says at last."""
        self.tell("stop")
        line = self.hear("stopped")
        assert self.wait() == 0, self.story()
        return line

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def discard(self) -> None:
        """End it, however it is."""
        if self.is_running:
            self.signal(signal.SIGKILL)
        self.wait()
        os.close(self._stdin)

    def story(self) -> str:
        return "\n".join(["", *(json.dumps(line) for line in self.lines[-60:])])


def _is(line: Line, what: str, facts: Mapping[str, object]) -> bool:
    return line["say"] == what and all(line.get(name) == fact for name, fact in facts.items())


class Workers:
    """All workers of a test, which end with it."""

    def __init__(self, url: str, loop: str, nursery: Nursery | None) -> None:
        self.url = url
        self.loop = loop
        self.all: list[Process] = []
        self._nursery = nursery

    def start(
        self, *options: str, url: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start one. It does not wait until the worker is ready."""
        arguments = ["--url", url or self.url, "--loop", self.loop, "--lease", str(LEASE), *options]
        name = f"worker {len(self.all) + 1}"
        process = Process(name, arguments, None if env else self._nursery, env or {})
        self.all.append(process)
        return process


@contextmanager
def workers(url: str, loop: str, nursery: Nursery | None) -> Generator[Workers]:
    """Workers on one database, which are ended by their pids after the block."""
    group = Workers(url, loop, nursery)
    try:
        yield group
    finally:
        for process in group.all:
            process.discard()
