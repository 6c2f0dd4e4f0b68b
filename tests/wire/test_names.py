"""How event classes are called, and how what was stored under a former name is read."""

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

import attrs
import pydantic
import pytest
from typing_extensions import TypedDict

from eventkit.wire import EventDecodingError, codec_for, named, names_of, wire_name
from tests.wire.test_codec import SECRET, codec_of, everything_about


class Plain:
    pass


@named("shop.order.placed")
@dataclass(frozen=True, slots=True)
class Above:
    id: int


@dataclass(frozen=True, slots=True)
@named("shop.order.placed")
class Below:
    id: int


@named("shop.order.placed")
@attrs.define
class AttrsAbove:
    id: int


@attrs.define
@named("shop.order.placed")
class AttrsBelow:
    id: int


@pydantic.dataclasses.dataclass(slots=True)
@named("shop.order.placed")
class CheckedBelow:
    id: int


@named("shop.order.placed")
class Model(pydantic.BaseModel):
    id: int


@named("shop.order.placed")
class Pair(NamedTuple):
    id: int


@named("shop.order.placed")
class Fields(TypedDict):
    id: int


@named("shop.order.placed")
class Colour(Enum):
    RED = "red"


class Derived(Above):
    pass


def test_a_class_is_called_by_its_module_and_its_qualified_name() -> None:
    assert wire_name(Plain) == "tests.wire.test_names:Plain"
    assert names_of(Plain) == ("tests.wire.test_names:Plain",)
    assert wire_name(int) == "builtins:int"


@pytest.mark.parametrize(
    "event_type",
    [Above, Below, AttrsAbove, AttrsBelow, CheckedBelow, Model, Pair, Fields, Colour],
)
def test_a_name_is_kept_wherever_the_decorator_stands(event_type: type) -> None:
    assert wire_name(event_type) == "shop.order.placed"
    assert codec_for(event_type).name == "shop.order.placed"


@pytest.mark.parametrize("event_type", [Above, Below, AttrsAbove, AttrsBelow, CheckedBelow])
def test_and_the_class_works_as_before(event_type: Callable[[int], Any]) -> None:
    event = event_type(1)
    codec = codec_of(event)

    assert not hasattr(event, "__dict__")
    assert json.loads(codec.encode(event)) == {"id": 1}
    assert codec.decode('{"id": 1}', "shop.order.placed") == event


def test_an_undecorated_subclass_of_a_dataclass_comes_back_too() -> None:
    event = Derived(1)
    codec = codec_of(event)
    back = codec.decode(codec.encode(event), "tests.wire.test_names:Derived")

    assert type(back) is Derived
    assert back == event


def test_a_struct_is_named_too() -> None:
    msgspec = pytest.importorskip("msgspec")
    event_type = named("shop.order.placed")(msgspec.defstruct("Order", [("id", int)]))

    assert codec_for(event_type).name == "shop.order.placed"


def test_a_subclass_has_a_name_of_its_own() -> None:
    assert wire_name(Derived) == "tests.wire.test_names:Derived"
    assert wire_name(named("derived")(type("Other", (Above,), {}))) == "derived"
    assert wire_name(Above) == "shop.order.placed"


def with_currency(stored: dict[str, Any]) -> dict[str, Any]:
    return {**stored, "currency": "EUR"}


def in_cents(stored: dict[str, Any]) -> dict[str, Any]:
    return {"cents": round(stored["total"] * 100), "currency": stored["currency"]}


def broken(stored: dict[str, Any]) -> dict[str, Any]:
    raise ValueError(f"cannot read {stored}")


def forgetful(stored: dict[str, Any]) -> Any:
    stored["cents"] = 1


def no_json(stored: dict[str, Any]) -> dict[str, Any]:
    return {**stored, "cents": Decimal(1)}


@named(
    "placed.v3",
    formerly={
        "tests:OrderPlaced": None,
        "placed.v1": with_currency,
        "placed.v2": in_cents,
        "placed.v2b": None,
    },
)
@dataclass(frozen=True, slots=True)
class OrderPlaced:
    cents: int
    currency: str


@named(
    "broken",
    formerly={"b": broken, "f": forgetful, "j": no_json},
)
@dataclass
class Broken:
    cents: int


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("tests:OrderPlaced", '{"total": 12.5}'),
        ("placed.v1", '{"total": 12.5}'),
        ("placed.v2", '{"total": 12.5, "currency": "EUR"}'),
        ("placed.v2b", '{"cents": 1250, "currency": "EUR"}'),
        ("placed.v3", '{"cents": 1250, "currency": "EUR"}'),
    ],
)
def test_from_a_former_name_on_all_functions_run_in_order(name: str, payload: str) -> None:
    assert codec_for(OrderPlaced).decode(payload, name) == OrderPlaced(1250, "EUR")


def test_the_current_name_comes_first_and_the_former_ones_as_they_were_listed() -> None:
    assert names_of(OrderPlaced) == (
        "placed.v3",
        "tests:OrderPlaced",
        "placed.v1",
        "placed.v2",
        "placed.v2b",
    )


def test_what_is_stored_is_exact_through_a_function() -> None:
    @named("big", formerly={"small": dict})
    @dataclass
    class Big:
        number: int
        at: Decimal
        ids: tuple[int, ...]

    payload = f'{{"number": {2**70}, "at": "1.10", "ids": [1, 2]}}'

    assert codec_for(Big).decode(payload, "small") == Big(2**70, Decimal("1.10"), (1, 2))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("b", r"formerly\['b'\] of broken failed: ValueError at .*test_names.py:\d+$"),
        ("f", r"formerly\['f'\] of broken failed: TypeError at "),
        ("j", r"formerly\['j'\] of broken failed: TypeError at "),
        ("other", "Broken never had the name 'other'"),
    ],
)
def test_a_function_that_fails_is_named_without_what_was_stored(name: str, why: str) -> None:
    with pytest.raises(EventDecodingError, match=why) as caught:
        codec_for(Broken).decode(f'{{"{SECRET}": "{SECRET}"}}', name)
    error = caught.value
    assert error.__traceback__ is not None

    assert SECRET not in everything_about(error.with_traceback(error.__traceback__.tb_next))
    assert error.__context__ is None


@pytest.mark.parametrize("payload", ["[1]", "7", "{", "", '"x"'])
def test_only_an_object_is_given_to_a_function(payload: str) -> None:
    with pytest.raises(EventDecodingError, match="failed: "):
        codec_for(OrderPlaced).decode(payload, "placed.v1")


@pytest.mark.parametrize(
    ("name", "error", "why"),
    [
        ("", ValueError, "'' is no name for an event class"),
        (" x", ValueError, "without spaces around it"),
        ("x\n", ValueError, "has to be printable"),
        ("x\x00y", ValueError, "has to be printable"),
        (7, TypeError, "the name of an event class is a str, not 7"),
        (Plain, TypeError, "the name of an event class is a str"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_at_once(
    name: Any, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        named(name)
    with pytest.raises(error, match=why):
        named("ok", formerly={name: None})


@pytest.mark.parametrize(
    ("formerly", "error", "why"),
    [
        (["a"], TypeError, "this is no mapping"),
        (None, TypeError, "this is no mapping"),
        ({"a": "b"}, TypeError, r"formerly\['a'\] has to be a function"),
        ({"x": None}, ValueError, "'x' is the current name"),
    ],
)
def test_a_history_that_cannot_be_used_is_refused_at_once(
    formerly: Any, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        named("x", formerly=formerly)


def test_any_mapping_is_a_history() -> None:
    history = MappingProxyType({"old": None})

    assert names_of(named("x", formerly=history)(type("X", (), {}))) == ("x", "old")


def test_only_a_class_of_ones_own_is_named_and_once() -> None:
    def function() -> None:
        """Stand for something that is no class."""

    with pytest.raises(TypeError, match="is no class"):
        named("x")(function)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="int cannot be named, because it is not a class"):
        named("x")(int)
    with pytest.raises(ValueError, match=r"Above is named 'shop.order.placed' already"):
        named("x")(Above)


def test_no_registry_keeps_a_class() -> None:
    event_type: Any = named("x")(dataclass(type("X", (), {})))
    codec_for(event_type)
    kept = weakref.ref(event_type)
    del event_type
    gc.collect()

    assert kept() is None
