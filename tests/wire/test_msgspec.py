"""Structs and attrs classes, which msgspec writes: as they were, or refused."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID, uuid4

import attrs
import pytest

from eventkit.exceptions import EventEncodingError
from eventkit.wire import EventDecodingError, codec_for, named
from tests.wire.ids import shown
from tests.wire.test_codec import (
    NOT_UTF8,
    SECRET,
    Address,
    Arbitrary,
    Card,
    Cash,
    Colour,
    Level,
    Line,
    Options,
    OrderId,
    Point,
    Row,
    Size,
    assert_exact,
    attrs_class_of,
    codec_of,
    everything_about,
    refused,
    refused_class,
)

pytest.importorskip("msgspec")
import msgspec

T = TypeVar("T")


class Paid(msgspec.Struct, frozen=True, tag="paid"):
    amount: int


class Refunded(msgspec.Struct, frozen=True, tag="refunded"):
    amount: int


class Tree(msgspec.Struct):
    value: int
    children: "list[Tree]" = []


class Omitting(msgspec.Struct, omit_defaults=True, rename="camel"):
    order_id: int
    note_text: str = "none"


class Rows(msgspec.Struct, array_like=True):
    order_id: int


class Wrapped(msgspec.Struct, Generic[T]):
    content: T


class Normal(msgspec.Struct):
    name: str

    def __post_init__(self) -> None:
        self.name = self.name + "!"


@attrs.frozen
class Ordered:
    order_id: int
    lines: list[Line]
    tags: frozenset[str] = frozenset()


@attrs.define
class Internal:
    _internal: str = "x"


@attrs.define
class Late:
    net: int
    gross: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.gross = self.net * 2


@attrs.define
class Anew:
    net: int
    id: UUID = attrs.field(init=False, factory=uuid4)


@attrs.define
class Positive:
    net: int = attrs.field(validator=attrs.validators.gt(0), on_setattr=attrs.setters.NO_OP)


@attrs.define
class Converting:
    net: int = attrs.field(converter=int)


@attrs.define
class HoldsAttrs:
    inner: Ordered
    struct: Paid | Refunded


@dataclass
class HoldsStruct:
    inner: Paid


@dataclass
class HoldsAttrsInDataclass:
    inner: Ordered


@attrs.define
class HoldsModel:
    inner: Address


def struct_holding(hint: Any) -> Any:
    return named("struct")(msgspec.defstruct("Holding", [("value", hint)]))


def attrs_holding(hint: Any) -> Any:
    return named("attrs")(attrs_class_of("Holding", {"value": hint}))


KINDS = pytest.mark.parametrize("holding", [struct_holding, attrs_holding])


@KINDS
@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (datetime, datetime(2026, 1, 2, 3, 4, 5, 6, UTC)),
        (datetime, datetime(2026, 1, 2)),  # noqa: DTZ001 - naive on purpose
        (date, date(2026, 1, 2)),
        (time, time(1, 2, 3, 4)),
        (timedelta, timedelta(days=-1, microseconds=1)),
        (UUID, UUID(int=1)),
        (Decimal, Decimal("1E+40")),
        (Decimal, Decimal("1.10")),
        (int, 2**70),
        (Colour, Colour.RED),
        (Level, Level.LOW),
        (Literal["a", 1], 1),
        (OrderId, OrderId(1)),
        (int | None, None),
        (int | str | None, "1"),
        (bytes, NOT_UTF8),
        (dict[str, bytes], {"a": NOT_UTF8}),
        (set[int], {1, 2}),
        (frozenset[UUID], frozenset({UUID(int=1)})),
        (tuple[int, str], (1, "a")),
        (tuple[int, ...], (1, 2)),
        (dict[UUID, int], {UUID(int=1): 1}),
        (dict[Colour, int], {Colour.RED: 1}),
        (dict[int, int], {1: 1}),
        (dict[str, Any], {"a": [1, None, 2.5]}),
        (list[Line], [Line("a", Decimal("1.0"))]),
        (Point, Point(1, datetime(2026, 1, 2, tzinfo=UTC))),
        (Options, {"gift": True}),
        (Paid | Refunded, Refunded(1)),
        (Tree, Tree(1, [Tree(2)])),
        (Wrapped[int], Wrapped(1)),
        (Annotated[int, msgspec.Meta(gt=0)], 1),
        (float, 1e300),
        (msgspec.Raw, msgspec.Raw(b"1")),
    ],
    ids=shown,
)
def test_it_comes_back_as_it_was(holding: Any, hint: Any, value: Any) -> None:
    assert_exact(holding(hint)(value))
    assert_exact(holding(list[hint])([value, value]))


@KINDS
@pytest.mark.parametrize(
    ("hint", "value", "why"),
    [
        (dict[str, Any], {"at": datetime(2026, 1, 2, tzinfo=UTC)}, "would come back as str"),
        (Any, (1,), "tuple would come back as list"),
        (float, float("nan"), "the JSON of this float could not be read again: Expected `float`"),
        (int, True, "the JSON of this bool could not be read again: Expected `int`"),
        (int, "7", "the JSON of this str could not be read again: Expected `int`"),
        (Paid, Refunded(1), "could not be read again: it is not valid"),
        (Annotated[int, msgspec.Meta(gt=0)], 0, "Expected `int` >= 1"),
        (Literal["a"], "b", "it is not valid"),
        (list[Any], [object()], "object cannot be written as JSON"),
    ],
    ids=shown,
)
def test_what_would_change_is_refused_with_the_field(
    holding: Any, hint: Any, value: Any, why: str
) -> None:
    message = refused(holding(hint)(value))

    assert message.startswith("Holding.value"), message
    assert why in message


@KINDS
@pytest.mark.parametrize(
    ("hint", "why"),
    [
        (Cash | Card, "msgspec cannot store it: Type unions may not contain more than one"),
        (list[Cash | Card | None], "msgspec cannot store it"),
        (Arbitrary, "Arbitrary cannot be stored as JSON: make it a dataclass"),
        (Row, "is mapped by SQLAlchemy"),
        (Address, "Address is a pydantic model, which pydantic writes, in a class that msgspec"),
        (Size, "would not come back as it is"),
        (dict[tuple[int, int], int], "cannot be the key of a JSON object"),
        (complex, "complex cannot be stored"),
    ],
    ids=shown,
)
def test_what_json_cannot_hold_is_refused_at_once(holding: Any, hint: Any, why: str) -> None:
    message = refused_class(holding(hint))

    assert "Holding.value: " in message
    assert why in message


@pytest.mark.parametrize(
    "event",
    [
        Paid(1),
        Tree(1, [Tree(2, [Tree(3)])]),
        Omitting(1),
        Omitting(1, "x"),
        Rows(1),
        Wrapped([1, "a"]),
        Ordered(1, [Line("a", Decimal("1.0"))], frozenset({"a"})),
        Converting("7"),
        Late(1),
        Anew(1),
        Positive(1),
        HoldsAttrs(Ordered(1, []), Paid(2)),
    ],
    ids=shown,
)
def test_every_kind_of_class_comes_back(event: Any) -> None:
    assert_exact(event)


def test_what_is_computed_is_compared() -> None:
    changed = Positive(1)
    changed.net = -3

    assert "Normal.name: stored as JSON, this str" in refused(Normal("x"))
    assert "Wrapped.content: stored as JSON, UUID would" in refused(Wrapped(UUID(int=1)))
    assert "-3" not in refused(changed)
    late = Late(1)
    late.gross = 7
    assert "Late.gross: stored as JSON, this int" in refused(late)


def test_a_field_that_msgspec_leaves_out_is_refused_at_once() -> None:
    assert "Internal._internal: msgspec leaves out a field with an underscore" in refused_class(
        Internal
    )


def test_one_package_writes_a_whole_event() -> None:
    assert "HoldsStruct.inner: Paid is a msgspec.Struct, which msgspec writes, in a class" in (
        refused_class(HoldsStruct)
    )
    assert "HoldsAttrsInDataclass.inner: Ordered is an attrs class" in refused_class(
        HoldsAttrsInDataclass
    )
    assert "HoldsModel.inner: Address is a pydantic model" in refused_class(HoldsModel)


@pytest.mark.parametrize(
    ("hint", "payload"),
    [
        (int, f'{{"value": "{SECRET}"}}'),
        (UUID, f'{{"value": "{SECRET}"}}'),
        (Colour, f'{{"value": "{SECRET}"}}'),
        (Literal["a"], f'{{"value": "{SECRET}"}}'),
        (dict[str, int], f'{{"value": {{"{SECRET}": "{SECRET}"}}}}'),
        (int, f'{{"value": {SECRET}}}'),
        (int, f'{{"{SECRET}": 1}}'),
        (int, ""),
    ],
)
def test_no_error_of_decoding_carries_the_payload(hint: Any, payload: str) -> None:
    codec = codec_for(struct_holding(hint))
    with pytest.raises(EventDecodingError, match="this is no struct: ") as caught:
        codec.decode(payload, "struct")
    error = caught.value
    assert error.__traceback__ is not None

    assert SECRET not in everything_about(error.with_traceback(error.__traceback__.tb_next))


def test_an_error_says_where_and_why() -> None:
    codec = codec_for(struct_holding(list[Line]))
    with pytest.raises(EventDecodingError) as caught:
        codec.decode('{"value": [{"sku": "a", "price": 1.5}, {"sku": 7}]}', "struct")

    assert str(caught.value) == "this is no struct: value[...].sku: Expected `str`, got `int`"


def test_no_error_of_encoding_carries_the_value() -> None:
    event = struct_holding(dict[str, Any])({SECRET: {SECRET: {1}}})
    with pytest.raises(EventEncodingError) as caught:
        codec_of(event).encode(event)
    error = caught.value
    assert error.__traceback__ is not None

    assert error.field == "Holding.value[...][...]"
    assert SECRET not in everything_about(error.with_traceback(error.__traceback__.tb_next))
