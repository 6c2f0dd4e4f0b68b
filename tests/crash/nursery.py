"""Makes workers by forking: what a worker imports takes longer than most of the tests.

`Nursery` is what tests have. Run as a program with the number of a socket, it imports the worker's
module, and forks one child for each request, which runs the module's `main`. It has no threads, no
engine and no event loop, so a child is as new as a process that was started. It tells of each
child's pid and exit code.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from threading import Condition, Thread
from typing import Any

ROOT = Path(__file__).parents[2]
# Ten times of what anything takes here. Only what is stuck meets it.
PATIENCE = float(os.environ.get("EVENTKIT_CRASH_PATIENCE", "60"))


class Nursery:
    """The program, as seen by tests. Thread-safe."""

    def __init__(self, worker: str = "tests.crash.worker") -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.nursery", str(other.fileno()), worker],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            pass_fds=[other.fileno()],
        )
        other.close()
        self._told = Condition()
        self._pids: list[int] = []
        self._codes: dict[int, int] = {}
        self._is_over = False
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while got := self._socket.recv(65536):
            what, pid, code = json.loads(got)
            with self._told:
                if what == "born":
                    self._pids.append(pid)
                else:
                    self._codes[pid] = code
                self._told.notify_all()
        with self._told:
            self._is_over = True
            self._told.notify_all()

    def start(self, arguments: Sequence[str], stdin: int, stdout: int) -> int:
        """Have a worker begin, with copies of these files; its pid. Not from two threads."""
        with self._told:
            request = [json.dumps([*arguments]).encode()]
            socket.send_fds(self._socket, request, [stdin, stdout])
            self._told.wait_for(lambda: self._is_over or self._pids, PATIENCE)
            return self._pids.pop()

    def code(self, pid: int, patience: float) -> int | None:
        """The exit code of a worker, as `Popen.returncode`; None if it runs on so long."""
        with self._told:
            self._told.wait_for(lambda: self._is_over or pid in self._codes, patience)
            return self._codes.get(pid)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self._socket.close()


def serve(sock: socket.socket, worker: str) -> None:
    main = import_module(worker).main

    def tell(what: str, pid: int, code: int) -> None:
        sock.send(json.dumps([what, pid, code]).encode())

    def bury(*_: object) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            tell("dead", pid, os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGCHLD, bury)
    while True:
        message, files, _, _ = socket.recv_fds(sock, 65536, 2)
        if not message:
            return
        # Not in the middle of `tell`, and never before it is told that the child was born.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            sock.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            arguments: Any = json.loads(message)
            main(arguments)
            return
        for file in files:
            os.close(file)
        tell("born", pid, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
