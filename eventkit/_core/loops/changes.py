"""Owns how tasks wait for a change of what others do. Knows nothing of what changes."""

from __future__ import annotations

from anyio import Event

# How long the clean-up of what was cancelled at the end may hold up a shutdown.
GRACE_SECONDS = 0.5


class Change:
    """Something that tasks of one event loop wait for, again and again.

    Most changes are awaited by nobody. So the event is there only while somebody waits.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: Event | None = None

    def announce(self) -> None:
        """Have all go on that wait now. Called on their event loop."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Wait for the next one."""
        self._event = self._event or Event()
        await self._event.wait()
