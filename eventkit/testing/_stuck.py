"""Owns the look-up of the line at which a handler waits, in a task or in a thread.

Only messages use it. It costs deliveries nothing.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType

from eventkit._core.bus import EventBus, registry_of, state_of
from eventkit._core.events import Delivery
from eventkit._core.handlers import layers
from eventkit._core.whereabouts import whereabouts

# Folders of libraries. A message names a line of the user's own code, too.
_LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def where(delivery: Delivery, bus: EventBus) -> str | None:
    """The line at which the handler waits; None if it is not found.

    It is the innermost line of the coroutine, or of the thread. If it is in a library, the text
    also has the innermost line outside of libraries.
    """
    frames = whereabouts(state_of(bus).tally).get(delivery, [])
    for subscription in registry_of(bus):
        if subscription.name == delivery.handler:
            for function in (subscription.handler, subscription.target.function):
                frames = _in_threads(function, delivery.event) or frames
    return told(frames) if frames else None


def told(frames: Sequence[FrameType]) -> str:
    """Text with the innermost frame, and the innermost frame that is not in a library."""
    inner = frames[-1]
    own = next((frame for frame in reversed(frames) if not _is_library(frame)), inner)
    if own is inner:
        return _line(own)
    return f"{_line(own)}, in {inner.f_code.co_qualname} ({_place(inner)})"


def _in_threads(function: Callable[..., object], event: object) -> list[FrameType]:
    """The frames of the thread that calls the function with the event, outermost first."""
    found = (getattr(layer, "__code__", None) for layer in layers(function))
    codes = {code for code in found if isinstance(code, CodeType)}
    for innermost in sys._current_frames().values():  # noqa: SLF001 - public but for its name
        frames: list[FrameType] = []
        frame: FrameType | None = innermost
        while frame is not None:
            frames.append(frame)
            if frame.f_code in codes and any(v is event for v in frame.f_locals.values()):
                return frames[::-1]
            frame = frame.f_back
    return []


def _is_library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_LIBRARIES)


def _line(frame: FrameType) -> str:
    return f"{_place(frame)} in {frame.f_code.co_qualname}"


def _place(frame: FrameType) -> str:
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(filename: str) -> str:
    """The path relative to the working directory, or to the library's folder."""
    for root in (*_LIBRARIES, str(Path.cwd())):
        if filename.startswith(root):
            return filename[len(root) :].lstrip("/\\")
    return filename
