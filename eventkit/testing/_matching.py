"""Owns how events are compared, and how messages describe them. Knows nothing of buses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any, cast

# How many events a message lists; it only counts the others.
_LISTED = 10
# Longest description of one event, in characters.
_LONG = 300
# Two lists that need more comparisons than this are compared by index, without an alignment.
_ALIGNED = 250_000


def matches(event: object, event_type: type, fields: Mapping[str, object]) -> bool:
    """Whether the event is an instance of the type, and its fields have these values.

    An exception from reading or comparing a field is raised: then nobody knows if it matches.
    """
    return isinstance(event, event_type) and all(
        _is_value(getattr(event, name, _NOTHING), expected) for name, expected in fields.items()
    )


def check_fields(event_type: type, fields: Mapping[str, object], events: Iterable[object]) -> None:
    """Refuse the name of a field that neither the type nor one of these events has.

    Raises:
        TypeError: The message names the field, and the field with the closest name.
    """
    __tracebackhide__ = True
    seen = [event for event in events if isinstance(event, event_type)]
    declared = _declared(event_type)
    if not declared and not seen:
        return  # the fields of this class are set in `__init__`, so they are not known yet
    for name in fields:
        if hasattr(event_type, name) or any(hasattr(event, name) for event in seen):
            continue
        known = declared or tuple({name: None for event in seen for name in _names(event)})
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known)}"
            raise TypeError(f"{event_type.__qualname__} has no field {name!r}. {hint}")


def expectation(event_type: type, fields: Mapping[str, object]) -> str:
    """The event that is looked for, written as a call: `OrderPlaced(order_id=1)`."""
    if not fields:
        return event_type.__qualname__
    pairs = ", ".join(f"{name}={shown(value)}" for name, value in fields.items())
    return f"{event_type.__qualname__}({pairs})"


def shown(value: object) -> str:
    """Its `repr`; a placeholder if `repr` raises, so that the message is shown all the same."""
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001 - a `repr` is user code
        return f"<{type(value).__qualname__} whose repr raised {type(error).__name__}>"


def describe(event: object) -> str:
    """Its `repr`; for a dataclass, without the fields that are not compared."""
    cls = type(event)
    # The generated `__repr__` of a dataclass has `__wrapped__`; one that a user wrote has not.
    if dataclasses.is_dataclass(cls) and hasattr(cls.__repr__, "__wrapped__"):
        names = [f.name for f in dataclasses.fields(cls) if f.repr and f.compare]
        pairs = ", ".join(f"{name}={shown(_read(event, name))}" for name in names)
        text = f"{cls.__qualname__}({pairs})"
    else:
        text = shown(event)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def fields_of(event: object) -> dict[str, object]:
    """The fields that are compared, with their values."""
    return {name: _read(event, name) for name in _names(event)}


def listed(events: Sequence[object]) -> list[str]:
    """One indented line for each event, and one line that counts the rest."""
    lines = [f"  {describe(event)}" for event in events[:_LISTED]]
    return [*lines, *_more(events)]


def nearest_first(
    events: Sequence[object], event_type: type, fields: Mapping[str, object]
) -> list[str]:
    """One line for each event, with the fields that differ; the events that nearly match first."""
    name = event_type.__qualname__

    def distance(event: object) -> tuple[bool, float, int]:
        alike = SequenceMatcher(None, name, type(event).__qualname__).ratio()
        differing = len(_differing(event, fields))
        return not isinstance(event, event_type), -alike, differing

    lines: list[str] = []
    for event in sorted(events, key=distance)[:_LISTED]:
        lines.append(f"  {describe(event)}")
        if isinstance(event, event_type):
            lines += [
                f"    {name} is {found}, not {shown(fields[name])}"
                for name, found in _differing(event, fields).items()
            ]
    return [*lines, *_more(events)]


def difference(found: Sequence[object], expected: Sequence[object], what: str) -> list[str]:
    """Lines that explain how a list of events differs from the expected list.

    Args:
        found: The list of events.
        expected: The expected list.
        what: Name of the list for the message, such as `published`.
    """
    lines: list[str] = []
    equal = missing = extra = differing = 0
    for have, want in [*_aligned(found, expected), (_NOTHING, _NOTHING)]:
        if have is not _NOTHING and want is not _NOTHING and _equal(have, want):
            equal += 1
            continue
        if equal:
            lines.append(f"  ({equal} as expected)")
            equal = 0
        if want is not _NOTHING and have is _NOTHING:
            missing += 1
            lines.append(f"- {describe(want)}")
        elif have is not _NOTHING and want is _NOTHING:
            extra += 1
            lines.append(f"+ {describe(have)}")
        elif want is not have:
            differing += 1
            lines.append(f"~ {describe(have)}")
            lines += [f"    {line}" for line in _why_unequal(have, want)]
    counts = {"- missing": missing, "+ not expected": extra, "~ different": differing}
    summary = ", ".join(
        f"{count} {word[2:]} ({word[0]})" for word, count in counts.items() if count
    )
    return [f"{what} == expected, but for {summary}", *lines]


class _Nothing:
    """The value of a field that does not exist."""

    def __repr__(self) -> str:
        return "<not there>"


class _Unreadable:
    """The value of a field that raised an error when it was read."""

    def __init__(self, error: Exception) -> None:
        self._error = type(error).__name__

    def __repr__(self) -> str:
        return f"<not readable, it raised {self._error}>"


_NOTHING = _Nothing()


def _read(event: object, name: str) -> object:
    """The value of a field, for a message."""
    try:
        return getattr(event, name, _NOTHING)
    except Exception as error:  # noqa: BLE001 - a property is user code
        return _Unreadable(error)


def _aligned(found: Sequence[object], expected: Sequence[object]) -> list[tuple[object, object]]:
    """Pair equal events, in order; between these pairs, pair events of the same type."""
    pairs: list[tuple[object, object]] = []
    at = to = 0
    for i, j in [*_common(found, expected), (len(found), len(expected))]:
        pairs += _paired(found[at:i], expected[to:j])
        if i < len(found):
            pairs.append((found[i], expected[j]))
        at, to = i + 1, j + 1
    return pairs


def _common(found: Sequence[object], expected: Sequence[object]) -> list[tuple[int, int]]:
    """The longest common subsequence. It uses only `==`, because events may be unhashable."""
    rows, columns = len(found), len(expected)
    if rows * columns > _ALIGNED:
        return [(i, i) for i in range(min(rows, columns)) if _equal(found[i], expected[i])]
    equal = [[_equal(have, want) for want in expected] for have in found]
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            best[i][j] = (
                best[i + 1][j + 1] + 1 if equal[i][j] else max(best[i + 1][j], best[i][j + 1])
            )
    common: list[tuple[int, int]] = []
    i = j = 0
    while i < rows and j < columns:
        if equal[i][j]:
            common.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return common


def _paired(found: Sequence[object], expected: Sequence[object]) -> list[tuple[object, object]]:
    """Pair events of the same type in their order; an event without a partner stays alone."""
    pairs: list[tuple[object, object]] = []
    wanted = list(expected)
    for have in found:
        partner = next((i for i, want in enumerate(wanted) if type(want) is type(have)), None)
        if partner is None:
            pairs.append((have, _NOTHING))
            continue
        pairs += [(_NOTHING, want) for want in wanted[:partner]]
        pairs.append((have, wanted[partner]))
        del wanted[: partner + 1]
    return [*pairs, *((_NOTHING, want) for want in wanted)]


def _why_unequal(have: object, want: object) -> list[str]:
    """The fields in which two events of one type differ."""
    fields = fields_of(want)
    lines = [
        f"{name} is {found}, expected {shown(fields[name])}"
        for name, found in _differing(have, fields).items()
    ]
    if lines:
        return lines
    if type(have).__eq__ is object.__eq__:
        return [
            f"{type(have).__qualname__} is compared by identity: make it a dataclass, or define "
            "__eq__"
        ]
    return [f"expected {describe(want)}"]


def _differing(event: object, fields: Mapping[str, object]) -> dict[str, str]:
    """The fields whose value differs in the event, with this value as text."""
    found = {name: _read(event, name) for name in fields}
    return {
        name: "not there" if value is _NOTHING else shown(value)
        for name, value in found.items()
        if value is _NOTHING or not _equal(fields[name], value)
    }


def _is_value(found: object, expected: object) -> bool:
    return found is not _NOTHING and (expected is found or bool(expected == found))


def _equal(one: object, other: object) -> bool:
    """Compare as `in` and lists do: an object is always equal to itself."""
    try:
        return one is other or bool(one == other)
    except Exception:  # noqa: BLE001 - an `==` is user code
        return False


def _declared(event_type: type) -> tuple[str, ...]:
    """The fields that are compared, for the kinds of classes that declare their fields."""
    if dataclasses.is_dataclass(event_type):
        return tuple(field.name for field in dataclasses.fields(event_type) if field.compare)
    known = cast("Any", event_type)  # Any: each library has attributes of its own
    if hasattr(known, "__attrs_attrs__"):
        return tuple(field.name for field in known.__attrs_attrs__ if field.eq)
    for names in ("model_fields", "__struct_fields__", "_fields"):  # pydantic, msgspec, tuples
        if hasattr(known, names):
            return tuple(getattr(known, names))
    return ()


def _names(event: object) -> tuple[str, ...]:
    return _declared(type(event)) or tuple(getattr(event, "__dict__", ()))


def _more(events: Sequence[object]) -> list[str]:
    return [f"  ... and {len(events) - _LISTED} more"] if len(events) > _LISTED else []
