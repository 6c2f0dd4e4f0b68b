"""A server that answers each byte after a while, as a database across the network does.

It runs in a process of its own, so that what it costs is not the contenders' time.
"""

import asyncio
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

MILLISECONDS = 2


class Answer(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(MILLISECONDS / 1000, self._transport.write, data)


async def serve() -> None:
    """Answer until the process that started this one closes its end of the pipe."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def answering() -> Generator[int]:
    """Run the server; gives its port."""
    command = [sys.executable, "-m", "benchmarks.answering"]
    root = Path(__file__).parent.parent
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate()


if __name__ == "__main__":
    asyncio.run(serve())
