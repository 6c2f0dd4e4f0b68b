"""Whatever a field's type and value are: it comes back exactly, or it is refused. No third way."""

import dataclasses
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, Optional
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from eventkit.exceptions import EventEncodingError, InvalidEventTypeError
from eventkit.wire import codec_for, named
from tests.wire.test_codec import (
    Address,
    Card,
    Cash,
    Colour,
    Level,
    Line,
    Node,
    Status,
    Wire,
    attrs_class_of,
    codec_of,
)

# A type and values of it.
Kind = tuple[Any, SearchStrategy[Any]]

ZONES = st.one_of(
    st.none(),
    st.just(UTC),
    st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    st.timezones(),
)
TEXT = st.text(max_size=5)
DECIMALS = st.one_of(
    st.decimals().filter(lambda number: not number.is_snan()),  # has no hash
    st.integers(-(10**40), 10**40).map(Decimal),
    st.tuples(st.integers(-99, 99), st.integers(-6000, 6000)).map(
        lambda d: Decimal(d[0]).scaleb(d[1])
    ),
)
SCALARS: list[Kind] = [
    (int, st.integers()),
    (str, TEXT),
    (str, st.text(st.characters(exclude_categories=()), max_size=3)),
    (bool, st.booleans()),
    (float, st.floats()),
    (Decimal, DECIMALS),
    (UUID, st.uuids()),
    (datetime, st.datetimes(timezones=ZONES)),
    (date, st.dates()),
    (time, st.times(timezones=ZONES)),
    (timedelta, st.timedeltas()),
    (Colour, st.sampled_from(Colour)),
    (Level, st.sampled_from(Level)),
    (Status, st.sampled_from(Status)),
    (Literal["a", 1, True, None], st.sampled_from(["a", 1, True, None])),
    (bytes, st.binary(max_size=4)),
    (type(None), st.none()),
    (Line, st.builds(Line, TEXT, DECIMALS)),
    (Cash, st.builds(Cash, st.integers())),
    (Card, st.builds(Card, st.integers())),
    (Wire, st.builds(Wire, TEXT)),
    (Node, st.builds(Node, st.integers(), st.lists(st.builds(Node, st.integers()), max_size=2))),
    (Address, st.builds(Address, street=TEXT, since=st.none() | st.dates())),
    (complex, st.complex_numbers()),
]
VALUES = st.one_of([values for _, values in SCALARS])
ANYTHING: SearchStrategy[Any] = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(TEXT, inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=5,
)


def of(form: Any, *arguments: Any) -> Any:
    first, *others = arguments
    return form[first, *others] if others else form[first]


def is_hashable(kind: Kind) -> bool:
    return isinstance(kind[0], type) and kind[0] not in (Any, Address, Node)


def containers(inner: SearchStrategy[Kind]) -> SearchStrategy[Kind]:
    def union(kinds: list[Kind]) -> Kind:
        hint = kinds[0][0]
        for other, _ in kinds[1:]:
            hint |= other
        return hint, st.one_of([values for _, values in kinds])

    keys = inner.filter(is_hashable)
    return st.one_of(
        inner.map(lambda k: (of(list, k[0]), st.lists(k[1], max_size=3))),
        inner.map(lambda k: (of(tuple, k[0], ...), st.lists(k[1], max_size=3).map(tuple))),
        st.tuples(inner, inner).map(
            lambda k: (of(tuple, k[0][0], k[1][0]), st.tuples(k[0][1], k[1][1]))
        ),
        keys.map(lambda k: (of(set, k[0]), st.sets(k[1], max_size=3))),
        keys.map(lambda k: (of(frozenset, k[0]), st.frozensets(k[1], max_size=3))),
        st.tuples(keys, inner).map(
            lambda k: (of(dict, k[0][0], k[1][0]), st.dictionaries(k[0][1], k[1][1], max_size=3))
        ),
        inner.map(lambda k: (of(Optional, k[0]), st.none() | k[1])),
        st.lists(inner, min_size=2, max_size=3).map(union),
    )


KINDS: SearchStrategy[Kind] = st.recursive(
    st.sampled_from([*SCALARS, (Any, ANYTHING), (dict[str, Any], st.dictionaries(TEXT, ANYTHING))]),
    containers,
    max_leaves=4,
)
SLOW = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def canonical(value: Any) -> Any:
    """The oracle: a text per leaf, with its type; independent of what the package compares."""
    kind = type(value).__name__
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, datetime | time):
        return kind, value.isoformat(), value.fold if value.tzinfo is None else 0
    if dataclasses.is_dataclass(value) or isinstance(value, Address):
        names = getattr(value, "__dataclass_fields__", None) or Address.model_fields
        return kind, [(name, canonical(getattr(value, name))) for name in names]
    if kind == "dict":
        return kind, [(canonical(key), canonical(part)) for key, part in value.items()]
    if kind in {"list", "tuple"}:
        return kind, [canonical(part) for part in value]
    if kind in {"set", "frozenset"}:
        return kind, sorted(repr(canonical(part)) for part in value)
    return kind, repr(value)


def event_of(hints: list[Any], values: list[Any]) -> Any:
    fields = [(f"field{index}", hint) for index, hint in enumerate(hints)]
    made: Any = named("made")(dataclasses.make_dataclass("Made", fields, frozen=True, slots=True))
    return made(*values)


def there_and_back(event: Any) -> tuple[Any, str | None]:
    """Give what comes back, or why it is refused."""
    try:
        codec = codec_of(event)
        payload = codec.encode(event)
    except (InvalidEventTypeError, EventEncodingError) as error:
        return None, str(error)
    return codec.decode(payload, "made"), None


def assert_exact_or_refused(event: Any) -> None:
    back, refusal = there_and_back(event)
    if refusal is None:
        assert canonical(back) == canonical(event)
    else:
        assert ".field" in refusal or "Line." in refusal, refusal


@SLOW
@given(data=st.data(), kinds=st.lists(KINDS, min_size=1, max_size=3))
def test_a_value_of_the_declared_type_comes_back_or_is_refused(
    data: st.DataObject, kinds: list[Kind]
) -> None:
    values = [data.draw(values) for _, values in kinds]

    assert_exact_or_refused(event_of([hint for hint, _ in kinds], values))


@SLOW
@given(kind=KINDS, value=ANYTHING)
def test_a_value_of_another_type_comes_back_or_is_refused(kind: Kind, value: Any) -> None:
    event = event_of([kind[0]], [value])
    back, refusal = there_and_back(event)
    if refusal is not None:
        assert ".field" in refusal or "Line." in refusal, refusal
    elif canonical(back) != canonical(event):
        assert "float" in repr(kind[0])  # where an int may stand, and comes back as an equal float
        assert back == event


@dataclass(frozen=True, slots=True)
class Usual:
    number: int
    text: str
    at: datetime
    total: Decimal
    id: UUID
    colour: Colour
    lines: list[Line]
    note: str | None
    day: date
    ratio: float
    by_id: dict[UUID, int]


@SLOW
@given(
    event=st.builds(
        Usual,
        st.integers(),
        TEXT,
        st.datetimes(timezones=st.just(UTC)),
        st.decimals(allow_nan=False, allow_infinity=False),
        st.uuids(),
        st.sampled_from(Colour),
        st.lists(
            st.builds(Line, TEXT, st.decimals(allow_nan=False, allow_infinity=False)), max_size=2
        ),
        st.none() | TEXT,
        st.dates(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.dictionaries(st.uuids(), st.integers(), max_size=2),
    )
)
def test_usual_values_are_never_refused_and_are_not_compared(event: Usual) -> None:
    codec = codec_for(Usual)
    payload = codec.encode(event)

    assert canonical(codec.decode(payload, codec.name)) == canonical(event)
    assert (
        codec._fits(event)
        or not -(2**63) <= event.number < 2**63
        or any(not -(2**63) <= each < 2**63 for each in event.by_id.values())
    )


@SLOW
@given(data=st.data(), kinds=st.lists(KINDS, min_size=1, max_size=3), by_attrs=st.booleans())
def test_so_it_is_with_msgspec(data: st.DataObject, kinds: list[Kind], *, by_attrs: bool) -> None:
    msgspec = pytest.importorskip("msgspec")
    hints = {f"field{index}": hint for index, (hint, _) in enumerate(kinds)}
    made: Any = named("made")(
        attrs_class_of("Made", hints)
        if by_attrs
        else msgspec.defstruct("Made", list(hints.items()))
    )
    event = made(*[data.draw(values) for _, values in kinds])
    back, refusal = there_and_back(event)
    if refusal is None:
        for name in hints:
            assert canonical(getattr(back, name)) == canonical(getattr(event, name))
    else:
        assert ".field" in refusal or "Line." in refusal, refusal
