"""What handlers in the test's own process have seen, and how a test waits for it."""

import asyncio
from typing import Generic, TypeVar

from tests.crash.nursery import PATIENCE

T = TypeVar("T")


class Seen(Generic[T]):
    """What handlers have seen, in their order."""

    def __init__(self) -> None:
        self.all: list[T] = []
        self._changed = asyncio.Condition()

    async def add(self, each: T) -> int:
        """Keep it; how often an equal one has come, this time included."""
        async with self._changed:
            self.all.append(each)
            self._changed.notify_all()
        return self.all.count(each)

    async def until(self, times: int) -> list[T]:
        """Wait until there are so many."""
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(lambda: len(self.all) >= times)
        return self.all
