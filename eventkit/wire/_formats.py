"""Owns the use of pydantic and msgspec: a pair of functions for a type, and the reason of an error.

Each package is imported when the first type needs it. Error texts go into logs and tables, so they
must not quote values. A text of these packages is used only if it cannot quote one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

# Pydantic errors with a fixed text. The text may name the type of the value.
_TELLING = re.compile(r"missing|extra_forbidden|finite_number|json_invalid|[a-z_]+_(type|parsing)")
_QUOTING = {"uuid_parsing", "url_parsing"}  # exceptions: these quote a character of the value
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\w+|\[[^]]*\]")


class Pair(NamedTuple):
    """The functions that write and read values of one type."""

    dump: Callable[[object], bytes]
    load: Callable[[str | bytes], Any]  # Any: a value of the type


class Fault(NamedTuple):
    """The place and the reason of a value that could not be read.

    Attributes:
        steps: The path to the value: names of fields, indices, keys of dicts.
        reason: A sentence without the value.
    """

    steps: tuple[str | int, ...]
    reason: str


class Format(Protocol):
    """One of the two packages."""

    name: str

    def open(self, hint: Any) -> Pair:
        """Make the functions for a type. Raises the package's own error if it cannot."""
        ...

    def knows(self, hint: Any) -> bool:
        """Whether the package can read values of a class that eventkit does not know."""
        ...

    def explain(self, error: Exception) -> Fault:
        """Return where and why a value could not be read. The reason does not quote the value."""
        ...


class Pydantic:
    """Pydantic, for dataclasses and pydantic's models, and for the types of their fields."""

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
        # No warnings: the codec compares the written value itself.
        dump = partial(adapter.serializer.to_json, by_alias=True, warnings=False)
        return Pair(dump, adapter.validator.validate_json)

    def knows(self, hint: Any) -> bool:
        """Whether pydantic accepts the type."""
        try:
            self.open(hint)
        except Exception:  # noqa: BLE001 - any error of the class or of pydantic
            return False
        return True

    def explain(self, error: Exception) -> Fault:
        """Return where and why, from the first of pydantic's errors."""
        if not isinstance(error, self._package.ValidationError):
            return Fault((), type(error).__name__)
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        kind = first["type"]
        told = _TELLING.fullmatch(kind) is not None and kind not in _QUOTING
        return Fault(first["loc"], first["msg"] if told else _INVALID)


class Msgspec:
    """Msgspec, for its structs and attrs classes, and for the types of their fields."""

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
        """Whether msgspec has built-in support for the type."""
        inspect = self._package.inspect
        try:
            self.open(hint)
            return not isinstance(inspect.type_info(hint), inspect.CustomType)
        except Exception:  # noqa: BLE001 - any error of the class or of msgspec
            return False

    def explain(self, error: Exception) -> Fault:
        """Return where and why. Texts that quote unknown keys or enum values are left out."""
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
