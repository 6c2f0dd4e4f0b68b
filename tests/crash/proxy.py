"""What stands between one process and PostgreSQL, and can be cut."""

import socket
from threading import Lock, Thread

from sqlalchemy import make_url

from tests.crash.cluster import HOST


class Proxy:
    """Forwards connections to a port, until it is cut; then it refuses them. Thread-safe."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = Lock()
        self._is_cut = False
        self._open: set[socket.socket] = set()
        Thread(target=self._accept, daemon=True).start()

    def reach(self, url: str) -> str:
        """The URL of the same database by this way."""
        return make_url(url).set(port=self.port).render_as_string(False)

    def cut(self) -> None:
        """End all connections, and refuse new ones."""
        with self._lock:
            self._is_cut = True
            for each in self._open:
                end(each)

    def mend(self) -> None:
        with self._lock:
            self._is_cut = False

    def close(self) -> None:
        self.cut()
        end(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._is_cut:
                    client.close()
                    continue
                server = socket.create_connection((HOST, self._target))
                self._open |= {client, server}
            for source, target in ((client, server), (server, client)):
                Thread(target=self._forward, args=[source, target], daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while got := source.recv(65536):
                target.sendall(got)
        except OSError:
            pass
        end(target)
        with self._lock:
            self._open.discard(source)
        source.close()


def end(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
