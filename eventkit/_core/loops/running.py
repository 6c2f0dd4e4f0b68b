"""Owns the look-up of the event loop that code runs on. Knows nothing of events and handlers."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

from anyio.lowlevel import current_token

_running: object = None  # trio sets its `name` while trio runs, perhaps inside a task of asyncio
try:  # the event loop of a task, for releases of AnyIO that use sniffio
    from sniffio import current_async_library_cvar, thread_local
except ImportError:  # pragma: no cover - trio depends on it, newer releases of AnyIO do not
    library = ContextVar[str | None]("eventkit_library", default=None)
else:
    library, _running = current_async_library_cvar, thread_local


def current_loop() -> object:
    """The calling event loop.

    Raises:
        RuntimeError: No event loop runs here.
    """
    if getattr(_running, "name", None) == "trio":  # as `on_trio`; the call would double the cost
        token: object = current_token()
        return getattr(token, "native_token", token)  # newer releases of AnyIO wrap the token
    return asyncio.get_running_loop()


def on_trio() -> bool:
    """Whether trio runs here. If not, asking asyncio is ten times as fast as asking AnyIO."""
    return getattr(_running, "name", None) == "trio"


def on_event_loop() -> bool:
    """Whether the caller runs on an event loop, which must not be blocked."""
    try:
        current_token()
    except RuntimeError:
        return False
    return True
