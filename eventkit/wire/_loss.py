"""Owns the comparison of a value with the value that was read back: equal, and of the same types.

Knows nothing of JSON. Values are compared part by part, because `==` is not enough: `1 == True`,
and a dataclass may exclude fields from `==`. Texts name fields and types, and never values. The
keys of a dict count as values.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple, cast
from uuid import UUID
from weakref import WeakKeyDictionary

Part = tuple[str, object]

REMEDY = "Declare the field with the exact type of its value, or convert the value before"

_EASY = {str, int, bool, type(None), bytes, UUID, date}  # for two of the same type, `==` is enough
_SETS = (set, frozenset)
_SEQUENCES = (list, tuple, set, frozenset, deque)
_ABSENT = object()  # stands for a field without a value


class Loss(NamedTuple):
    """The place of a difference, and its description."""

    path: str
    problem: str


def loss_of(sent: object, back: object, path: str) -> Loss | None:
    """Return the first difference between two values, or between their types; None if equal."""
    if type(sent) is type(back) and type(sent) in _EASY:
        return None if sent == back else _other_value(sent, path)
    if type(sent) is not type(back) and not _is_accepted(sent, back):
        return Loss(
            path,
            f"stored as JSON, {kind_of(sent)} would come back as {kind_of(back)}. {REMEDY}",
        )
    if isinstance(sent, _SETS):
        return _loss_of_set(cast("set[object]", sent), cast("set[object]", back), path)
    mine = parts_of(sent)
    if mine is None:
        return None if _same(sent, back) else _other_value(sent, path)
    others = list(parts_of(back) or ())
    if len(mine) != len(others):
        return _other_value(sent, path)
    for (step, part), (_, other) in zip(mine, others, strict=True):
        if (loss := loss_of(part, other, path + step)) is not None:
            return loss
    return None


def kind_of(value: object) -> str:
    """Return the name of a value's type, for messages."""
    return "no value" if value is _ABSENT else type(value).__name__


def first_leaf(
    value: object, path: str, fails: Callable[[str, object], bool]
) -> tuple[str, object]:
    """Find the innermost part for which `fails` is true, and its path. It may be `value` itself."""
    for step, part in parts_of(value) or ():
        if part is not _ABSENT and fails(path + step, part):
            return first_leaf(part, path + step, fails)
    return path, value


def parts_of(value: object) -> list[Part] | None:
    """List the parts of a value, each with its step in the path; None if it has no parts."""
    kind: Any = type(value)  # Any: a class of an optional package
    if issubclass(kind, dict):
        return [*_parts_of_dict(cast("dict[object, object]", value))]
    if issubclass(kind, _SEQUENCES) and not hasattr(cast("Any", kind), "_fields"):
        parts = [("[...]", part) for part in cast("Iterable[object]", value)]
        return [*parts, (".maxlen", value.maxlen)] if isinstance(value, deque) else parts
    names = _names_of(cast("type", kind))
    return (
        None if names is None else [(f".{each}", getattr(value, each, _ABSENT)) for each in names]
    )


def _parts_of_dict(value: dict[object, object]) -> Iterator[Part]:
    for key, part in value.items():
        yield "{key}", key
        yield "[...]", part
    if isinstance(value, defaultdict):
        yield ".default_factory", value.default_factory


_names: WeakKeyDictionary[type, tuple[str, ...] | None] = WeakKeyDictionary()  # only a cache


def _names_of(kind: type) -> tuple[str, ...] | None:
    try:
        return _names[kind]
    except KeyError:
        names = _names[kind] = _fields_of(cast("Any", kind))
        return names


def _fields_of(kind: Any) -> tuple[str, ...] | None:  # Any: a class of an optional package
    if dataclasses.is_dataclass(kind):
        return tuple(each.name for each in dataclasses.fields(kind))
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(each.name for each in kind.__attrs_attrs__)
    if hasattr(kind, "__struct_fields__"):
        return tuple(kind.__struct_fields__)
    if hasattr(kind, "model_fields"):
        return (*kind.model_fields, "__pydantic_extra__", "__pydantic_private__")
    return tuple(kind._fields) if hasattr(kind, "_fields") else None


def _is_accepted(sent: object, back: object) -> bool:
    """Whether a difference in type is accepted.

    - An int in a field of type float (PEP 484) comes back as an equal float.
    - A package that freezes the time in tests has its own subclass of datetime. It counts every
      datetime as an instance of this subclass.
    """
    if type(sent) is int:
        return type(back) is float and sent == back
    kind: type = type(back)
    return isinstance(sent, date) and isinstance(sent, kind) and isinstance(back, type(sent))


def _same(sent: Any, back: Any) -> bool:  # Any: two values without parts, of an accepted type
    if isinstance(sent, (float, complex)):
        return repr(sent) == repr(cast("object", back))  # -0.0 is not 0.0
    if isinstance(sent, Decimal):
        return sent.as_tuple() == cast("Decimal", back).as_tuple()
    if isinstance(sent, (datetime, time)):
        return _same_time(sent, back)
    if isinstance(sent, Enum):
        return sent is back
    try:
        return bool(sent == back)
    except Exception:  # noqa: BLE001 - code of the value's class
        return False


def _same_time(sent: Any, back: Any) -> bool:
    """Compare the local time and the offset.

    The name of a time zone is not kept. `==` cannot be used: it is false in the hour that a time
    zone has twice (PEP 495).
    """
    if (sent.tzinfo is None) != (back.tzinfo is None) or sent.utcoffset() != back.utcoffset():
        return False
    if sent.tzinfo is None and sent.fold != back.fold:
        return False
    naive: bool = sent.replace(tzinfo=None) == back.replace(tzinfo=None)
    return naive


def _loss_of_set(sent: set[object], back: set[object], path: str) -> Loss | None:
    found = {each: each for each in back}
    if len(sent) != len(found):
        return _other_value(sent, path)
    for each in sent:
        other = found.get(each, _ABSENT)
        if other is _ABSENT:
            return _other_value(each, f"{path}[...]")
        if (loss := loss_of(each, other, f"{path}[...]")) is not None:
            return loss
    return None


def _other_value(sent: object, path: str) -> Loss:
    return Loss(
        path,
        f"stored as JSON, this {kind_of(sent)} would come back as another value. {REMEDY}",
    )
