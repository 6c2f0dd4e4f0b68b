"""A PostgreSQL server of the tests' own, which they may end as if its machine had failed."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.crash.nursery import PATIENCE

USER = "postgres"
HOST = "127.0.0.1"


class Missing(Exception):
    """What is not installed on this machine."""


class Cluster:
    """A server, with a folder and a port of its own."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.port = free_port()
        self._binaries = binaries
        self._folder = folder
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        # It refuses to run as root, and so it is given to a user that every package of it makes.
        self._user = USER if os.geteuid() == 0 else None
        folder.chmod(0o700)
        if self._user is not None:
            shutil.chown(folder, self._user, self._user)
        made = self._run(
            "initdb", "-D", str(folder / "data"), "-U", USER, "--auth=trust", "-E", "UTF8"
        )
        if made.returncode:
            raise RuntimeError(made.stdout.decode())

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._binaries / "postgres"),
                    *("-D", str(self._folder / "data"), "-p", str(self.port)),
                    *("-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="),
                    *("-c", "max_connections=200", "-c", "max_prepared_transactions=10"),
                ],
                user=self._user,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        waited = self._run("pg_isready", "-h", HOST, "-p", str(self.port), "-q")
        engine = create_engine(self.url("postgres"), poolclass=NullPool)
        for _ in range(int(PATIENCE * 10)):
            if waited.returncode == 0:
                break
            if self._process.poll() is not None:
                raise RuntimeError(self._log.read_text())
            # Another process, which tells nobody.
            try:
                self._process.wait(0.1)
            except subprocess.TimeoutExpired:
                pass
            waited = self._run("pg_isready", "-h", HOST, "-p", str(self.port), "-q")
        engine.connect().close()

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it by its pid. SIGQUIT is what `restart -m immediate` sends: it cleans up nothing."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE)
            self._process = None

    def restart_at_once(self) -> None:
        self.stop(signal.SIGQUIT)
        self.start()

    def url(self, name: str, driver: str = "psycopg") -> str:
        return f"postgresql+{driver}://{USER}@{HOST}:{self.port}/{name}"

    def new_database(self) -> str:
        """Make a database; its name."""
        return new_database(self.url("postgres"))

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [str(self._binaries / program), *arguments],
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )


def new_database(url: str) -> str:
    name = f"eventkit_{uuid4().hex}"
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    return name


def drop_database(url: str, name: str) -> None:
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def free_port() -> int:
    """One below those that the system gives to connections, which could take it meanwhile."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind((HOST, port))
            return port


def binaries() -> Path:
    """Where the server's programs are.

    Raises:
        Missing: They are not installed.
    """
    found: Sequence[Path] = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if (asked := shutil.which("pg_config")) is not None:
        said = subprocess.run([asked, "--bindir"], capture_output=True, text=True, check=False)
        found = [Path(said.stdout.strip()), *found]
    for folder in found:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise Missing("no PostgreSQL server: neither pg_config nor /usr/lib/postgresql/*/bin has one")


@contextmanager
def cluster() -> Generator[Cluster]:
    """A server that is stopped after the block, and whose folder is removed.

    Raises:
        Missing: It is not installed.
    """
    programs = binaries()
    with tempfile.TemporaryDirectory(prefix="eventkit_pg_") as name:
        server = Cluster(programs, Path(name))
        server.start()
        try:
            yield server
        finally:
            server.stop()
