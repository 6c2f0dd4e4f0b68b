"""Owns the question on which event loop code runs. Knows nothing of events and handlers."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

from anyio.lowlevel import current_token

_running: object = None  # whose `name` trio sets while it runs, maybe inside of a task of asyncio's
try:  # which event loop a task runs on, where AnyIO leaves that to sniffio
    from sniffio import current_async_library_cvar, thread_local
except ImportError:  # pragma: no cover - trio depends on it, newer releases of AnyIO do not
    library = ContextVar[str | None]("eventkit_library", default=None)
else:
    library, _running = current_async_library_cvar, thread_local


def current_loop() -> object:
    """The event loop that calls.

    Raises:
        RuntimeError: There is none.
    """
    if getattr(_running, "name", None) == "trio":  # as `on_trio`, whose call costs as much again
        token: object = current_token()
        return getattr(token, "native_token", token)  # which newer releases of AnyIO wrap
    return asyncio.get_running_loop()


def on_trio() -> bool:
    """Whether it is trio that calls; else one may ask asyncio, ten times as fast as AnyIO."""
    return getattr(_running, "name", None) == "trio"


def on_event_loop() -> bool:
    """Whether the caller is called by an event loop, which must not be blocked."""
    try:
        current_token()
    except RuntimeError:
        return False
    return True
