"""Where a test takes place: channels of its own on a broker, and the processes that use them."""

import asyncio
from collections.abc import Callable, Generator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from uuid import uuid4

from tests.brokers.kinds import Kind, Message, Reader
from tests.brokers.servers import Server
from tests.crash.nursery import Nursery
from tests.crash.processes import Process

GROUPS = ("billing", "stock")


@dataclass(slots=True)
class Place:
    """Channels on a broker.

    Attributes:
        kind: The broker's.
        url: The broker's.
        orders: The channel of events.
        dead: The channel of dead letters.
        server: The broker, if the test may kill it.
        nursery: Who makes processes.
        processes: All that the test has started.
    """

    kind: Kind
    url: str
    nursery: Callable[[], Nursery]
    server: Server | None = None
    orders: str = field(default_factory=lambda: f"orders-{uuid4().hex[:12]}")
    dead: str = field(default_factory=lambda: f"dead-{uuid4().hex[:12]}")
    processes: list[Process] = field(default_factory=list[Process])

    def start(self, *options: str, url: str | None = None) -> Process:
        """Start a process. It does not wait until it is ready."""
        name = f"{self.kind.name} {len(self.processes) + 1}"
        channels = ["--orders", self.orders, "--dead", self.dead]
        arguments = ["--kind", self.kind.name, "--url", url or self.url, *channels, *options]
        process = Process(name, arguments, self.nursery(), {})
        self.processes.append(process)
        return process

    def consumer(self, *options: str, group: str = "billing", url: str | None = None) -> Process:
        """Start one that consumes, and wait until it does."""
        process = self.start("--group", group, *options, url=url)
        process.hear("ready")
        return process

    def publisher(self, *options: str, url: str | None = None) -> Process:
        """Start one that forwards, and wait until it does."""
        process = self.start(*options, url=url)
        process.hear("ready")
        return process

    async def unacknowledged(self, group: str = "billing") -> int:
        """How many messages a group has not acknowledged. To be asked while nobody consumes."""
        return await self.kind.left(self.url, self.orders, group)

    async def send(self, *messages: Message) -> None:
        """Send to the channel of events by a plain client."""
        await self.kind.send(self.url, self.orders, *messages)

    def read(self) -> AbstractAsyncContextManager[Reader]:
        """Read the channel of events by a plain client, and leave the messages to the services."""
        return self.kind.read(self.url, self.orders, "stock")

    def read_dead(self) -> AbstractAsyncContextManager[Reader]:
        """Read the dead letters by a plain client, and leave them where they are."""
        return self.kind.read(self.url, self.dead)

    # For tests that wait for processes, and so have no event loop

    def dead_letters(self, times: int) -> list[Message]:
        """Wait until there are so many dead letters."""

        async def read() -> list[Message]:
            async with self.read_dead() as reader:
                return [await reader.next() for _ in range(times)]

        return asyncio.run(read())

    def left(self, group: str = "billing") -> int:
        """As `unacknowledged`."""
        return asyncio.run(self.unacknowledged(group))

    async def prepare(self) -> None:
        await self.kind.prepare(self.url, self.orders, *GROUPS)
        await self.kind.prepare(self.url, self.dead)

    async def remove(self) -> None:
        await self.kind.remove(self.url, self.orders, *GROUPS)
        await self.kind.remove(self.url, self.dead)


@contextmanager
def place_on(
    kind: Kind, url: str, nursery: Callable[[], Nursery], server: Server | None = None
) -> Generator[Place]:
    """Channels that are removed after the block, and processes that are ended by their pids."""
    place = Place(kind, url, nursery, server)
    asyncio.run(place.prepare())
    try:
        yield place
    finally:
        for process in place.processes:
            process.discard()
        asyncio.run(place.remove())
