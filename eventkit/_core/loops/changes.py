"""Owns `Change`, for tasks that wait until something changes. Knows nothing of what changes."""

from __future__ import annotations

from anyio import Event

# How long the clean-up of cancelled tasks may delay a shutdown.
GRACE_SECONDS = 0.5


class Change:
    """A change that tasks of one event loop wait for, any number of times.

    For most changes no task waits. So the event exists only while a task waits.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: Event | None = None

    def announce(self) -> None:
        """Wake all tasks that wait now. Must be called on their event loop."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Wait for the next change."""
        self._event = self._event or Event()
        await self._event.wait()
