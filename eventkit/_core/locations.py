"""Owns the look-up of the user's line of code that has called eventkit."""

from __future__ import annotations

import sys
from types import FrameType

_IMPORTLIB = "<frozen importlib._bootstrap>"


def caller() -> str:
    """The nearest calling line outside of eventkit, and of contextlib, as `file:line`."""
    return place_of(*calling())


def place_of(file: str, line: int | None) -> str:
    return file if line is None else f"{file}:{line}"


def _is_ours(package: str | None) -> bool:
    return package is not None and (package == "eventkit" or package.startswith("eventkit."))


def calling() -> tuple[str, int | None]:
    """The file and the line of `caller`, as two values."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - `inspect` is far slower
    while frame is not None and (
        _is_ours(frame.f_globals.get("__package__"))
        or frame.f_globals.get("__name__") == "contextlib"
    ):
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame else ("unknown", None)


def importing() -> bool:
    """Whether the call comes from a module that is being imported."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - `inspect` is far slower
    while frame is not None and frame.f_code.co_filename != _IMPORTLIB:
        frame = frame.f_back
    return frame is not None
