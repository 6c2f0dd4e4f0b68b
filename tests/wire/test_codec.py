"""What is written comes back equal and of the same types, or is refused with the field's name."""

import gc
import sys
import traceback
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import FrozenInstanceError, InitVar, dataclass, field, make_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum, auto
from ipaddress import IPv4Address
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    TypeVar,
    Unpack,
    cast,
)
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import attrs
import pydantic
import pytest
from freezegun import freeze_time
from pydantic_core import core_schema
from sqlalchemy import orm
from typing_extensions import TypeAliasType, TypedDict

from eventkit import DomainEvent
from eventkit.exceptions import EventEncodingError, EventKitError, InvalidEventTypeError
from eventkit.wire import Codec, EventDecodingError, codec_for, named
from eventkit.wire._loss import loss_of
from tests.wire.ids import shown

SECRET = "s3cret"
T = TypeVar("T")
OrderId = NewType("OrderId", int)
Ids = TypeAliasType("Ids", list[int])


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Status(StrEnum):
    PAID = auto()


class Right(Flag):
    READ = 1
    WRITE = 2


class Size(Enum):
    SMALL = (1, 2)


class Address(pydantic.BaseModel):
    street: str
    since: date | None = None


@dataclass(frozen=True, slots=True)
class Line:
    sku: str
    price: Decimal


@dataclass(frozen=True, slots=True)
class Cash:
    amount: int


@dataclass(frozen=True, slots=True)
class Card:
    amount: int


@dataclass(frozen=True, slots=True)
class Wire:
    iban: str


class Point(NamedTuple):
    x: int
    at: datetime


class Options(TypedDict):
    gift: bool
    note: NotRequired[str]


def holding(hint: Any, *, config: Any = None) -> Any:
    """Make an event class with one field of a type."""

    namespace = {} if config is None else {"__pydantic_config__": config}
    made = make_dataclass(
        "Holding", [("value", hint)], namespace=namespace, frozen=True, slots=True
    )
    return named("holding")(made)


def attrs_class_of(name: str, hints: dict[str, Any]) -> Any:
    made: Any = type(name, (), {})  # attrs.make_class of old versions keeps no annotations
    made.__annotations__ = hints
    return attrs.define(made)


def codec_of(event: Any) -> Codec[Any]:
    return codec_for(class_of(event))


def class_of(event: Any) -> Any:
    return cast("Any", type(event))


def there_and_back(event: Any) -> Any:
    codec = codec_of(event)
    return codec.decode(codec.encode(event), codec.name)


def assert_exact(event: Any) -> None:
    back = there_and_back(event)
    assert type(back) is type(event)
    assert loss_of(event, back, "") is None
    assert back == event


def refused(event: Any) -> str:
    with pytest.raises(EventEncodingError) as caught:
        codec_of(event).encode(event)
    return str(caught.value)


def refused_class(event_type: Any) -> str:
    with pytest.raises(InvalidEventTypeError) as caught:
        codec_for(event_type)
    return str(caught.value)


EXACT: list[tuple[Any, Any]] = [
    (datetime, datetime(2026, 3, 4, 5, 6, 7, 8, UTC)),
    (datetime, datetime(2026, 3, 4, 5, 6, 7, 8)),  # noqa: DTZ001 - naive on purpose
    (datetime, datetime(2026, 3, 4, tzinfo=timezone(timedelta(hours=-3, minutes=-30)))),
    (datetime, datetime(2026, 7, 4, tzinfo=ZoneInfo("Europe/Berlin"))),
    (datetime, datetime.min.replace(tzinfo=UTC)),
    (datetime, datetime.max.replace(tzinfo=UTC)),
    (date, date(2026, 3, 4)),
    (time, time(1, 2, 3, 4)),
    (time, time(1, 2, tzinfo=UTC)),
    (timedelta, timedelta(days=-3, seconds=5, microseconds=7)),
    (timedelta, timedelta(days=400, microseconds=-1)),
    (UUID, UUID(int=7)),
    (Decimal, Decimal("1.10")),
    (Decimal, Decimal("1E+40")),
    (Decimal, Decimal("-0.00")),
    (Decimal, Decimal("1" * 60 + ".1")),
    (float, 0.1 + 0.2),
    (float, -0.0),
    (float, 5e-324),
    (float, 1.7976931348623157e308),
    (int, 2**70),
    (int, -(2**63)),
    (bool, True),
    (complex, complex(2.0, 1.5)),
    (str, 'quo"te \\ \x00 \u2028 \U0001f600'),
    (None, None),
    (Colour, Colour.BLUE),
    (Level, Level.HIGH),
    (Status, Status.PAID),
    (Right, Right.READ | Right.WRITE),
    (Literal["a", 1, True, None], True),
    (Literal["a", 1, True, None], 1),
    (OrderId, OrderId(7)),
    (int | None, None),
    (Decimal | None, Decimal("1.0")),
    (list[int], []),
    (list[list[Decimal]], [[Decimal("1.0")], []]),
    (list[Line], [Line("a", Decimal("1.50"))]),
    (tuple[int, str], (1, "1")),
    (tuple[Colour, ...], (Colour.RED,)),
    (tuple[()], ()),
    (set[UUID], {UUID(int=1), UUID(int=2)}),
    (frozenset[int], frozenset({1, 2})),
    (frozenset[frozenset[int]], frozenset({frozenset({1}), frozenset({2, 3})})),
    (dict[UUID, int], {UUID(int=1): 2}),
    (dict[Colour, list[int]], {Colour.RED: [1]}),
    (dict[Level, int], {Level.LOW: 1}),
    (dict[int, str], {1: "a", -5: "b"}),
    (dict[date, str], {date(2026, 1, 2): "a"}),
    (dict[str, Any], {"a": [1, 2.5, None, True, "x", {"b": {}}]}),
    (dict[str, object], {"a": 1}),
    (Any, [1, {"a": None}]),
    (list, [1, "a"]),
    (int | str | None, 2**70),
    (int | str | None, "70"),
    (int | str | None, None),
    (int | float, 1),
    (int | float, 1.0),
    (Cash | Wire, Wire("DE00")),
    (Cash | Card, Cash(1)),
    (Address, Address(street="x", since=date(2026, 1, 2))),
    (list[Address], [Address(street="x")]),
    (Point, Point(1, datetime(2026, 1, 2, tzinfo=UTC))),
    (Options, {"gift": True}),
    (Options, {"gift": True, "note": "x"}),
    (Annotated[int, pydantic.Field(gt=3)], 4),
    (Annotated[int, "a note"], 4),
    (pydantic.Base64Bytes, b"\xff\x00"),
    (pydantic.JsonValue, {"a": [1, None, {"b": "x"}]}),
    (Ids, [1, 2]),
    (dict[int | Colour, str], {1: "a", Colour.RED: "b"}),
    (dict[Any, str], {"a": "b"}),
    (dict[OrderId, str], {OrderId(1): "b"}),
    (dict[Literal["a"], int], {"a": 1}),
    (Sequence[Line], [Line("a", Decimal(1))]),
    (list[str | None], ["a", None]),
    (IPv4Address, IPv4Address("10.0.0.1")),
    (Sequence[int], [1]),
    (deque[int], deque([1, 2])),
    (defaultdict[str, list[int]], defaultdict(list, a=[1])),
]


@pytest.mark.parametrize(("hint", "value"), EXACT, ids=shown)
def test_it_comes_back_as_it_was(hint: Any, value: Any) -> None:
    assert_exact(holding(hint)(value))


@pytest.mark.parametrize(("hint", "value"), EXACT, ids=shown)
def test_nested_in_a_list_it_comes_back_as_it_was_too(hint: Any, value: Any) -> None:
    assert_exact(holding(list[hint])([value, value]))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the type statement is of Python 3.12")
def test_an_alias_that_contains_itself_is_looked_at_once() -> None:
    namespace: dict[str, Any] = {"__name__": __name__}
    exec("type Tree = int | list[Tree]\ntype Raw = bytes | list[Raw]", namespace)

    assert_exact(holding(namespace["Tree"])([1, [2, [3]]]))
    assert "bytes cannot be stored" in refused_class(holding(namespace["Raw"]))


LOST: list[tuple[Any, Any, str]] = [
    (dict[str, Any], {"at": datetime(2026, 1, 2, tzinfo=UTC)}, "datetime would come back as str"),
    (dict[str, Any], {"of": (1, 2)}, "tuple would come back as list"),
    (dict[str, Any], {"of": Cash(1)}, "Cash would come back as dict"),
    (dict[str, Any], {"of": b"text"}, "bytes would come back as str"),
    (Any, {1: "a"}, "int would come back as str"),
    (Any, float("inf"), "float would come back as NoneType"),
    (float, float("nan"), "the JSON of this float could not be read again"),
    (float | None, float("inf"), "float would come back as NoneType"),
    (float, 2**70 + 1, "int would come back as float"),
    (Decimal, Decimal("NaN"), "the JSON of this Decimal could not be read again"),
    (Decimal, Decimal("-Infinity"), "the JSON of this Decimal could not be read again"),
    (int, True, "bool would come back as int"),
    (int, "7", "str would come back as int"),
    (int, Level.LOW, "Level would come back as int"),
    (str, Status.PAID, "Status would come back as str"),
    (str, "\ud800", "str cannot be written as JSON"),
    (date, datetime(2026, 1, 2, tzinfo=UTC), "datetime would come back as date"),
    (Colour, [1], "the JSON of this list could not be read again: it is not valid"),
    (complex, complex(-0.0, 1.5), "this complex would come back as another value"),
    (int | None, b"\x80", "bytes cannot be written as JSON"),
    (dict[str, Any], {"a": [b"\x80"]}, "bytes cannot be written as JSON"),
    (set[int], {True, 2}, "bool would come back as int"),
    (set[Any], {date(2026, 1, 2)}, "this date would come back as another value"),
    (set[Any], {date(2026, 1, 2), "2026-01-02"}, "this set would come back as another value"),
    (frozenset[Decimal], frozenset({Decimal("NaN")}), "could not be read again"),
    (set[int | float], {float("inf")}, "could not be read again"),
    (Cash | Card, Card(1), "Card would come back as Cash"),
    (int | Level, Level.LOW, "Level would come back as int"),
    (str | UUID, str(UUID(int=1)), "str would come back as UUID"),
    (dict[int | str, str], {1: "a", "1": "b"}, "this dict would come back as another value"),
    (Sequence[int], (1, 2), "tuple would come back as list"),
    (datetime, datetime(2026, 1, 2, fold=1), "this datetime would come back as another value"),  # noqa: DTZ001
    (time, time(1, tzinfo=ZoneInfo("Europe/Berlin")), "this time would come back as another"),
    (list[int], (1, 2), "tuple would come back as list"),
    (deque[int], deque([1], maxlen=3), "int would come back as NoneType"),
    (Options, {"gift": True, "more": 1}, "this dict would come back as another value"),
    (object, {1, 2}, "set would come back as list"),
    (list[Any], [object()], "object cannot be written as JSON"),
    (Line, Cash(1), "Cash cannot be written as JSON"),
    (Annotated[int, pydantic.Field(gt=3)], 2, "the JSON of this int could not be read again"),
    (pydantic.Json, [1], "could not be read again"),
]


@pytest.mark.parametrize(("hint", "value", "why"), LOST, ids=shown)
def test_what_would_change_is_refused_with_the_field(hint: Any, value: Any, why: str) -> None:
    message = refused(holding(hint)(value))

    assert message.partition("Holding.value")[2], message
    assert why in message


def test_a_place_deep_in_an_event_is_told_without_its_keys() -> None:
    event = holding(dict[str, list[dict[str, Any]]])({"secret": [{"hidden": {1}}]})

    assert "Holding.value[...][...][...]: stored as JSON, set would" in refused(event)
    assert "Holding.value[...].price:" in refused(
        holding(dict[str, Line])({"secret": Line("a", Decimal("NaN"))})
    )
    assert "Holding.value[...][...].sku: str cannot" in refused(
        holding(dict[str, list[Any]])({"secret": [Line("\ud800", Decimal(1))]})
    )


@pytest.mark.parametrize("fold", [0, 1])
def test_the_hour_that_a_zone_has_twice_keeps_its_offset(fold: int) -> None:
    at = datetime(2026, 10, 25, 2, 30, fold=fold, tzinfo=ZoneInfo("Europe/Berlin"))
    back = there_and_back(holding(datetime)(at)).value

    assert back.astimezone(UTC) == at.astimezone(UTC)
    assert back.utcoffset() == at.utcoffset() == timedelta(hours=2 - fold)


# What is seen when the class is looked at.


class Arbitrary:
    pass


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


@dataclass
class Square(Shape, ABC):
    side: float


class Email(str):
    __slots__ = ()


class Failed(Exception):
    pass


class Base(orm.DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)


class MappedBase(orm.MappedAsDataclass, orm.DeclarativeBase):
    pass


class MappedRow(MappedBase):
    __tablename__ = "mapped_row"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)


REFUSED: list[tuple[Any, str]] = [
    (bytes, "bytes cannot be stored as JSON without loss: give the class `__pydantic_config__"),
    (bytearray, "bytearray cannot be stored as JSON without loss"),
    (bytes | None, "bytes cannot be stored as JSON without loss"),
    (dict[str, list[bytes]], "bytes cannot be stored as JSON without loss"),
    (Annotated[bytes, "a note"], "bytes cannot be stored as JSON without loss"),
    (Arbitrary, "Arbitrary cannot be stored as JSON: make it a dataclass"),
    (list[Arbitrary | None], "Arbitrary cannot be stored as JSON: make it a dataclass"),
    (Email, "Email cannot be stored as JSON: make it a dataclass"),
    (Shape, "Shape cannot be stored as JSON: make it a dataclass"),
    (Square, "Square is abstract, so it has no instances"),
    (Failed, "Failed is an exception, which is not stored"),
    (Row, "Row is mapped by SQLAlchemy"),
    (MappedRow, "MappedRow is mapped by SQLAlchemy"),
    (list[Row], "Row is mapped by SQLAlchemy"),
    (Size, "Size.SMALL"),
    (type[int], "is no data"),
    (type, "type cannot be stored"),
    (Callable[[], int], "is no data"),
    (Callable, "cannot be stored"),
    (Iterator[int], "is no data"),
    (dict[tuple[int, int], str], "cannot be the key of a JSON object"),
    (dict[Line, str], "Line cannot be the key of a JSON object"),
    (dict[None, str], "cannot be the key of a JSON object"),
    (dict[str | bytes, str], "bytes cannot be the key"),
    (Unpack[tuple[int]], "cannot be stored as JSON"),
    (Awaitable[int], "is no data"),
    (Coroutine[int, int, int], "cannot be stored as JSON"),
    (pydantic.SecretStr, "a secret is not written into rows"),
    (Literal[b"x"], "would not come back as it is"),
    (Literal[Colour.RED, "red"], "would not come back as it is"),
]


@pytest.mark.parametrize(("hint", "why"), REFUSED, ids=shown)
def test_what_json_cannot_hold_is_refused_at_once_with_the_field(hint: Any, why: str) -> None:
    message = refused_class(holding(hint))

    assert "Holding.value: " in message
    assert why in message


@pytest.mark.parametrize(
    ("event_type", "why"),
    [
        (Arbitrary, "Arbitrary: Arbitrary cannot be stored as JSON: make it a dataclass"),
        (Shape, "make it a dataclass"),
        (Square, "is abstract"),
        (Failed, "is an exception"),
        (Row, "is mapped by SQLAlchemy, and a mapped object cannot be stored"),
        (object, "is not a class of events that can be stored"),
        (list[int], "is not a class of events that can be stored"),
        ("Order", "is not a class of events that can be stored"),
        (bytes, "bytes cannot be stored"),
    ],
)
def test_a_class_that_cannot_be_stored_is_refused(event_type: Any, why: str) -> None:
    assert why in refused_class(event_type)


def test_a_class_of_a_function_needs_a_name() -> None:
    @dataclass
    class Order:
        id: int

    assert refused_class(Order) == (
        "Order is defined in a function, where no other process finds it: move it to the module, "
        'or give it a name, `@named("shop.order")`'
    )
    assert_exact(named("shop.order")(Order)(1))


class Unequal:
    """Is written as text, and raises where it is compared."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError(SECRET)

    __hash__ = object.__hash__

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(
            lambda _: cls(), serialization=core_schema.to_string_ser_schema()
        )


class Failing:
    """Raises what pydantic does not take for a mistake in the data."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        def fail(_: object) -> None:
            raise RuntimeError(SECRET)

        return core_schema.no_info_plain_validator_function(
            fail, serialization=core_schema.to_string_ser_schema()
        )


def test_code_of_a_class_that_fails_is_a_refusal() -> None:
    assert "this Unequal would come back as another value" in refused(holding(Unequal)(Unequal()))
    assert "could not be read again: RuntimeError. " in refused(holding(Failing)(Failing()))


def test_a_name_that_only_the_type_checker_knows_is_refused() -> None:
    @named("hidden")
    @dataclass
    class Hidden:
        value: "Missing"  # type: ignore[name-defined]  # noqa: F821

    assert "Hidden cannot be read (name 'Missing' is not defined): their names have to be" in (
        refused_class(Hidden)
    )


# Bytes


BASE64 = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}
NOT_UTF8 = bytes(range(256))


@pytest.mark.parametrize("encoding", ["base64", "hex"])
def test_bytes_come_back_where_the_class_says_how_they_are_written(encoding: str) -> None:
    config = {"ser_json_bytes": encoding, "val_json_bytes": encoding}

    assert_exact(holding(bytes, config=config)(NOT_UTF8))
    assert_exact(holding(list[bytes], config=config)([b"", NOT_UTF8]))
    assert_exact(holding(bytes | None, config=config)(b"\xfb\xff"))


def test_half_of_the_configuration_is_not_enough() -> None:
    event_type = holding(bytes, config={"ser_json_bytes": "base64"})

    assert "bytes cannot be stored" in refused_class(event_type)


def test_bytes_are_not_blamed_for_another_field() -> None:
    fields = [("raw", bytes), ("more", Any)]
    made = make_dataclass("Two", fields, namespace={"__pydantic_config__": BASE64})

    assert refused(named("two")(made)(NOT_UTF8, object())).startswith("Two.more: object cannot")


@dataclass
class Blob:
    __pydantic_config__: ClassVar[Any] = BASE64
    raw: bytes


@dataclass
class HoldsBlob:
    blob: Blob


class BlobModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    raw: bytes


def test_bytes_of_a_nested_class_come_back() -> None:
    assert_exact(HoldsBlob(Blob(NOT_UTF8)))
    assert_exact(BlobModel(raw=NOT_UTF8))
    assert_exact(holding(BlobModel)(BlobModel(raw=NOT_UTF8)))


def test_bytes_where_anything_may_be_are_refused_whatever_the_class_says() -> None:
    assert "Holding.value" in refused(holding(Any, config=BASE64)(b"abc"))


# Dataclasses and their kin


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    order_id: int
    note: str = "none"
    tags: list[str] = field(default_factory=list[str])
    total: ClassVar[int] = 7


@dataclass
class Computed:
    net: int
    gross: int = field(init=False)

    def __post_init__(self) -> None:
        self.gross = self.net * 2


@dataclass
class Random:
    net: int
    id: UUID = field(init=False)

    def __post_init__(self) -> None:
        self.id = uuid4()


@dataclass
class Doubling:
    net: int

    def __post_init__(self) -> None:
        self.net *= 2


@dataclass(frozen=True, slots=True)
class Node:
    value: int
    children: "list[Node]" = field(default_factory=list["Node"])
    parent: "Node | None" = None


@dataclass(frozen=True, slots=True)
class Box(Generic[T]):
    content: T


@dataclass(frozen=True, slots=True)
class Boxes:
    number: Box[int]
    when: Box[datetime]


@dataclass
class Loose:
    name: str
    state: str = field(default="new", init=False)


@dataclass
class MadeAnew:
    name: str
    id: UUID = field(default_factory=uuid4, init=False)


@dataclass
class WithInitVar:
    name: str
    source: InitVar[str]

    def __post_init__(self, source: str) -> None:
        self.name = f"{source}:{self.name}"


@dataclass
class WithFinal:
    name: Final[str]


@dataclass(frozen=True, slots=True)
class Placed(DomainEvent):
    order_id: int
    total: Decimal


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    name: str = pydantic.Field(alias="theName")
    address: Address


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    name: str


class Private(pydantic.BaseModel):
    name: str
    _seen: int = 0


class Excluding(pydantic.BaseModel):
    name: str = pydantic.Field(exclude=True)


class Uneven(pydantic.BaseModel):
    name: str = pydantic.Field(serialization_alias="a", validation_alias="b")


class Total(pydantic.BaseModel):
    net: int

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def gross(self) -> int:
        return self.net * 2


class Numbers(pydantic.RootModel[list[int]]):
    pass


@pydantic.dataclasses.dataclass
class Checked:
    net: int

    @pydantic.field_validator("net")
    @classmethod
    def above_zero(cls, net: int) -> int:
        if net <= 0:
            raise ValueError(f"{net} is not above zero")
        return net


ModelT = TypeVar("ModelT")


class Page(pydantic.BaseModel, Generic[ModelT]):
    items: list[ModelT]


@pytest.mark.parametrize(
    "event",
    [
        Defaults(order_id=1),
        Defaults(order_id=1, note="x", tags=["a"]),
        Computed(3),
        Node(1, [Node(2), Node(3, [Node(4)])], Node(5)),
        Box(1),
        Box("x"),
        Box([1, None]),
        Boxes(Box(1), Box(datetime(2026, 1, 2, tzinfo=UTC))),
        Loose("x"),
        WithFinal("x"),
        Placed(1, Decimal("2.50")),
        Strict(theName="x", address=Address(street="y")),
        Open.model_validate({"name": "x", "more": [1, "a"]}),
        Private(name="x"),
        Total(net=3),
        Numbers([1, 2]),
        Checked(3),
        Page[Decimal](items=[Decimal("1.0")]),
        Address(street="x"),
        Point(1, datetime(2026, 1, 2, tzinfo=UTC)),
        Colour.RED,
        7,
        "x",
    ],
    ids=shown,
)
def test_every_kind_of_class_comes_back(event: Any) -> None:
    if class_of(event).__name__ == "Page[Decimal]":
        named("page")(class_of(event))
    assert_exact(event)


def test_a_domain_event_keeps_its_id_and_its_time() -> None:
    event = Placed(1, Decimal("2.50"))
    back: Placed = there_and_back(event)

    assert (back.event_id, back.occurred_at) == (event.event_id, event.occurred_at)
    assert back.occurred_at.tzinfo is not None
    with pytest.raises(FrozenInstanceError):
        back.order_id = 2  # type: ignore[misc]


def test_what_is_computed_is_compared() -> None:
    changed = Computed(3)
    changed.gross = 7
    moved = Loose("x")
    moved.state = "paid"
    seen = Private(name="x")
    seen._seen = 3

    assert "Computed.gross: stored as JSON, this int" in refused(changed)
    assert "Loose.state: stored as JSON, this str" in refused(moved)
    assert "Private.__pydantic_private__[...]: stored as JSON, this int" in refused(seen)
    assert "Random.id: stored as JSON, this UUID" in refused(Random(1))
    assert "Doubling.net: stored as JSON, this int" in refused(Doubling(1))
    assert "Box.content: stored as JSON, Decimal would come back as str" in refused(Box(Decimal(1)))
    assert "Open.__pydantic_extra__[...]: stored as JSON, datetime" in refused(
        Open.model_validate({"name": "x", "at": datetime(2026, 1, 2, tzinfo=UTC)})
    )


def test_a_model_that_was_changed_without_validation_is_refused() -> None:
    checked = Checked(3)
    checked.net = -3
    message = refused(checked)

    assert "Checked.net: the JSON of this int could not be read again: it is not valid" in message
    assert "-3" not in message
    assert "Uneven" in refused(Uneven.model_validate({"b": "x"}))


def test_a_field_that_would_be_left_out_is_refused_at_once() -> None:
    assert "Excluding.name: exclude=True leaves it out" in refused_class(Excluding)
    assert "MadeAnew.id: with init=False, its factory" in refused_class(MadeAnew)
    assert "WithInitVar.source: an InitVar is not kept" in refused_class(WithInitVar)


@dataclass(frozen=True, slots=True)
class Rush(Placed):
    hours: int = 1


def test_a_subclass_is_not_taken_for_its_base() -> None:
    rush = Rush(1, Decimal(2), 3)

    assert_exact(rush)
    with pytest.raises(EventEncodingError, match="only events of Placed itself are") as caught:
        codec_for(Placed).encode(rush)
    assert str(caught.value).startswith("Rush: ")
    assert "Holding.value: stored as JSON, Rush would come back as Placed" in refused(
        holding(Placed)(rush)
    )


def test_an_int_for_a_float_comes_back_as_an_equal_float() -> None:
    back = there_and_back(holding(float)(3))

    assert back.value == 3
    assert type(back.value) is float


def test_what_contains_itself_or_is_too_deep_is_refused() -> None:
    around: list[Any] = []
    around.append(around)
    deep = Node(0)
    for _ in range(5000):
        deep = Node(0, parent=deep)

    assert "it contains itself, or is nested too deeply" in refused(holding(list[Any])(around))
    assert refused(deep).startswith("Node")


def test_a_frozen_clock_does_not_matter() -> None:
    with freeze_time("2026-01-02"):
        event = Placed(1, Decimal("2.50"))
        assert there_and_back(event).occurred_at == event.occurred_at
        assert_exact(Placed(1, Decimal("2.50"), occurred_at=datetime.now(UTC)))
    assert there_and_back(event).occurred_at == event.occurred_at


# Nothing of the value gets out.


def everything_about(error: BaseException) -> str:
    """What a log could show of an error: also the locals of the package's frames."""
    shown = "".join(
        traceback.TracebackException.from_exception(error, capture_locals=True).format()
    )
    return f"{shown}{error!r}{error.__cause__!r}{error.__context__!r}{vars(error)!r}"


@pytest.mark.parametrize(
    "event",
    [
        holding(int)(SECRET),
        holding(UUID)(SECRET),
        holding(Colour)(SECRET),
        holding(datetime)(SECRET),
        holding(Literal["a"])(SECRET),
        holding(dict[str, Any])({SECRET: {SECRET}}),
        holding(dict[str, int])({SECRET: SECRET}),
        holding(list[Any])([SECRET, object()]),
        holding(Cash | Wire)(SECRET),
        holding(str)(f"{SECRET}\ud800"),
    ],
    ids=lambda event: class_of(event.value).__name__,
)
def test_no_error_of_encoding_carries_the_value(event: Any) -> None:
    codec = codec_of(event)
    with pytest.raises(EventEncodingError) as caught:
        codec.encode(event)
    error = caught.value
    assert error.__traceback__ is not None
    ours = error.with_traceback(error.__traceback__.tb_next)  # without the frame of this test

    assert SECRET not in everything_about(ours)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert error.event == type(event).__qualname__
    assert error.field.startswith(error.event)


@pytest.mark.parametrize(
    ("hint", "payload"),
    [
        (int, f'{{"value": "{SECRET}"}}'),
        (UUID, f'{{"value": "{SECRET}"}}'),
        (Colour, f'{{"value": "{SECRET}"}}'),
        (Literal["a"], f'{{"value": "{SECRET}"}}'),
        (datetime, f'{{"value": "{SECRET}"}}'),
        (dict[str, int], f'{{"value": {{"{SECRET}": "{SECRET}"}}}}'),
        (int, f'{{"value": {SECRET}}}'),
        (int, f'{{"{SECRET}": 1}}'),
        (int, f'"{SECRET}"'),
        (int, ""),
        (int, "null"),
    ],
)
def test_no_error_of_decoding_carries_the_payload(hint: Any, payload: str) -> None:
    codec = codec_for(holding(hint))
    with pytest.raises(EventDecodingError, match="this is no holding: ") as caught:
        codec.decode(payload, "holding")
    error = caught.value
    assert error.__traceback__ is not None
    ours = error.with_traceback(error.__traceback__.tb_next)

    assert SECRET not in everything_about(ours)
    assert error.__context__ is None


def test_an_error_of_decoding_says_where_and_why() -> None:
    codec = codec_for(holding(list[Line]))
    with pytest.raises(EventDecodingError) as caught:
        codec.decode('{"value": [{"sku": "a"}]}', "holding")

    assert str(caught.value) == "this is no holding: value[...].price: Field required"
    assert isinstance(caught.value, EventKitError)


# The codec itself


def test_a_codec_is_made_once_and_goes_with_its_class() -> None:
    event_type = holding(int)
    codec = weakref.ref(codec_for(event_type).event_type)

    assert codec_for(event_type) is codec_for(event_type)
    assert codec_for(int) is codec_for(int)
    assert repr(codec_for(event_type)) == "<Codec holding>"
    del event_type
    gc.collect()
    assert codec() is None


def test_a_class_that_is_made_anew_has_a_codec_of_its_own() -> None:
    @named("shop.order")
    class Order:
        id: int

    plain = dataclass(Order)
    before = codec_for(plain)
    slotted = dataclass(slots=True)(plain)

    assert slotted is not plain
    assert codec_for(slotted) is not before
    assert_exact(slotted(id=1))  # type: ignore[call-arg]


def test_plain_values_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    event = Placed(1, Decimal("2.50"))
    codec = codec_for(Placed)

    def compare(*_: object) -> None:
        raise AssertionError("was compared")

    monkeypatch.setattr("eventkit.wire._codec.loss_of", compare)
    codec.encode(event)
    with pytest.raises(AssertionError, match="was compared"):
        codec.encode(Placed(1, Decimal("2.50"), occurred_at=datetime.now(ZoneInfo("Asia/Tokyo"))))
