"""Owns the question where a handler is: at which line it waits, in a task or in a thread.

Asked only for messages, so it looks at everything there is instead of keeping books: no delivery
pays for it.
"""

from __future__ import annotations

import gc
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, CoroutineType, FrameType
from typing import Any, cast

from eventkit._handlers import _layers

# Where nobody looks for a fault of his own.
_LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def where(function: Callable[..., object], event: object) -> str | None:
    """Where the handler waits that was called with this event; None where nothing is found.

    The innermost line of a coroutine that awaits, or of a thread that runs; one inside a library
    comes with the innermost line outside of it.
    """
    found = (getattr(layer, "__code__", None) for layer in _layers(function))
    codes = {code for code in found if isinstance(code, CodeType)}
    frames = _in_tasks(codes, event) or _in_threads(codes, event)
    if not frames:
        return None
    inner = frames[-1]
    own = next((frame for frame in reversed(frames) if not _is_library(frame)), inner)
    if own is inner:
        return _line(own)
    return f"{_line(own)}, in {inner.f_code.co_qualname} ({_place(inner)})"


def _in_tasks(codes: set[CodeType], event: object) -> list[FrameType]:
    """The frames of the coroutine that was called with the event, outermost first."""
    for candidate in gc.get_objects():
        if type(candidate) is not CoroutineType:
            continue
        coroutine = cast("CoroutineType[object, object, object]", candidate)
        frame = coroutine.cr_frame
        if frame is not None and coroutine.cr_code in codes and _has(frame, event):
            return list(_awaited(coroutine))
    return []


def _awaited(awaitable: object) -> Iterator[FrameType]:
    """The frames of a coroutine, of what it awaits, and so on."""
    while True:
        # Any: coroutines, generators and async generators call the same things differently.
        waiting = cast("Any", awaitable)
        for kind in ("cr", "gi", "ag"):
            frame = getattr(waiting, f"{kind}_frame", None)
            if frame is not None:
                yield frame
                awaitable = getattr(waiting, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
                break
        else:
            return


def _in_threads(codes: set[CodeType], event: object) -> list[FrameType]:
    """The frames of the thread that calls the function with the event, outermost first."""
    for innermost in sys._current_frames().values():  # noqa: SLF001 - public but for its name
        frames: list[FrameType] = []
        frame: FrameType | None = innermost
        while frame is not None:
            frames.append(frame)
            if frame.f_code in codes and _has(frame, event):
                return frames[::-1]
            frame = frame.f_back
    return []


def _has(frame: FrameType, event: object) -> bool:
    return any(value is event for value in frame.f_locals.values())


def _is_library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_LIBRARIES)


def _line(frame: FrameType) -> str:
    return f"{_place(frame)} in {frame.f_code.co_qualname}"


def _place(frame: FrameType) -> str:
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(filename: str) -> str:
    """The path from where the tests run, or from inside the library."""
    for root in (*_LIBRARIES, str(Path.cwd())):
        if filename.startswith(root):
            return filename[len(root) :].lstrip("/\\")
    return filename
