"""Owns what is asked of pydantic and msgspec: a pair of functions for a type, and why one failed.

Each is imported when the first type needs it. What they say of an error is passed on only where it
cannot quote the value: error texts go into logs and tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

# What these errors of pydantic say is a fixed text, which may name the type of what was found.
_TELLING = re.compile(r"missing|extra_forbidden|finite_number|json_invalid|[a-z_]+_(type|parsing)")
_QUOTING = {"uuid_parsing", "url_parsing"}  # says which character it has found
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\w+|\[[^]]*\]")


class Pair(NamedTuple):
    """How values of one type are written, and read back."""

    dump: Callable[[object], bytes]
    load: Callable[[str | bytes], Any]  # Any: what the type says


class Fault(NamedTuple):
    """Why a value could not be read, and where: names of fields, indices, keys of dicts."""

    steps: tuple[str | int, ...]
    reason: str


class Format(Protocol):
    """One of the two packages."""

    name: str

    def open(self, hint: Any) -> Pair:
        """Make the functions for a type; raises what the package raises where it cannot."""
        ...

    def knows(self, hint: Any) -> bool:
        """Say whether the package can read values of a class that eventkit does not know."""
        ...

    def explain(self, error: Exception) -> Fault:
        """Say where and why a value could not be read; the reason tells nothing of the value."""
        ...


class Pydantic:
    """Dataclasses, pydantic's models, and what they consist of."""

    name = "pydantic"

    def __init__(self) -> None:
        try:
            import pydantic
        except ModuleNotFoundError as missing:
            raise _not_installed("pydantic", "fastapi-eventkit[outbox]") from missing
        self._package = pydantic

    def open(self, hint: Any) -> Pair:
        """Make the functions for a type."""
        adapter = self._package.TypeAdapter[Any](hint)  # Any: of the type that is asked for
        # What its warnings would find is found by comparing.
        dump = partial(adapter.serializer.to_json, by_alias=True, warnings=False)
        return Pair(dump, adapter.validator.validate_json)

    def knows(self, hint: Any) -> bool:
        """Say whether pydantic can make anything of it."""
        try:
            self.open(hint)
        except Exception:  # noqa: BLE001 - whatever the class or pydantic raises
            return False
        return True

    def explain(self, error: Exception) -> Fault:
        """Say where and why, from the first of pydantic's reasons."""
        if not isinstance(error, self._package.ValidationError):
            return Fault((), type(error).__name__)
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        kind = first["type"]
        told = _TELLING.fullmatch(kind) is not None and kind not in _QUOTING
        return Fault(first["loc"], first["msg"] if told else _INVALID)


class Msgspec:
    """Structs and attrs classes, and what they consist of."""

    name = "msgspec"

    def __init__(self) -> None:
        try:
            import msgspec
            import msgspec.inspect
            import msgspec.json
        except ModuleNotFoundError as missing:
            raise _not_installed("msgspec", "msgspec") from missing
        self._package = msgspec

    def open(self, hint: Any) -> Pair:
        """Make the functions for a type."""
        json = self._package.json
        return Pair(json.Encoder().encode, json.Decoder[Any](hint).decode)

    def knows(self, hint: Any) -> bool:
        """Say whether it is a type of msgspec's own."""
        inspect = self._package.inspect
        try:
            self.open(hint)
            return not isinstance(inspect.type_info(hint), inspect.CustomType)
        except Exception:  # noqa: BLE001 - whatever the class or msgspec raises
            return False

    def explain(self, error: Exception) -> Fault:
        """Say where and why; msgspec quotes unknown keys and enum values, which are left out."""
        if not isinstance(error, self._package.ValidationError):
            return Fault((), type(error).__name__)
        found = _AT.fullmatch(str(error))
        what, path = found.group("what", "path") if found is not None else ("", None)
        steps = _STEP.findall((path or "").lstrip("$"))
        told = what.startswith(("Expected `", "Object missing required field"))
        return Fault(tuple(steps), what if told else _INVALID)


_INVALID = "it is not valid"


def _not_installed(package: str, install: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"storing events of this type needs {package}, which is not installed: install {install}",
        name=package,
    )
