"""Owns the check of an event class and its fields. It runs once, before the first event.

- A type that JSON cannot hold without loss is refused. The error names the field.
- For every other type, the check makes a function of a value. The function returns True if the
  value is known to be read back equal: a plain value of exactly the declared type.

If the function returns False, the codec reads the written JSON back and compares.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from math import isfinite
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union
from uuid import UUID

from eventkit.exceptions import InvalidEventTypeError
from eventkit.wire._formats import Format
from eventkit.wire._loss import loss_of

# Any: values and annotations of the application.
Fits = Callable[[Any], bool]
Hint = Any
Config = Mapping[str, Any]

_INT64 = 2**63
_TEXTUAL = {"base64", "hex"}
_BYTES = (bytes, bytearray, memoryview)
_TRANSPARENT = {"Final", "NotRequired", "ReadOnly", "Required"}
_ONE_SHOT: tuple[Any, ...] = (
    typing.get_origin(Callable[..., Any]),
    collections.abc.Iterator,
    collections.abc.Generator,
    collections.abc.Awaitable,
    collections.abc.AsyncIterator,
    collections.abc.AsyncGenerator,
    type,
)


def _never(_: object) -> bool:
    return False


def _of(kind: type) -> Fits:
    return lambda value: type(value) is kind


# Scalars. For each: whether both packages are known to read a value back equal.
_SCALARS: dict[type, Fits] = {
    type(None): lambda value: value is None,
    str: _of(str),
    bool: _of(bool),
    UUID: _of(UUID),
    date: _of(date),
    int: lambda value: type(value) is int and -_INT64 <= value < _INT64,
    float: lambda value: type(value) is float and isfinite(value),
    Decimal: lambda value: type(value) is Decimal and value.is_finite(),
    datetime: lambda value: (
        type(value) is datetime
        and (value.tzinfo is UTC or (value.tzinfo is None and not value.fold))
    ),
    time: lambda value: type(value) is time and value.tzinfo is None and not value.fold,
    timedelta: _never,  # the limit for large values depends on the version of the package
}


class Probe:
    """The check of an event class and of all types in it.

    Methods `_judge...` refuse a type, or return its function of a value.

    Attributes:
        fields: The names of all fields that were found. Only these names are shown in the path of
            an error.
        declared: The types of the fields, by class and name, such as "Order.total".
        fits: Whether an event is known to be read back equal. If not, it has to be compared.
    """

    def __init__(self, event_type: type, language: Format) -> None:
        self.fields: set[str] = set()
        self._language = language
        self._by_msgspec = language.name == "msgspec"
        self._met: dict[object, Fits] = {}
        self.declared: dict[str, Hint] = {}
        self.fits: Fits = self._judge(event_type, event_type.__qualname__, {})

    def blame(self) -> list[str]:
        """Return the fields that the package refuses, innermost first."""
        inner_first = reversed(self.declared.items())
        return [place for place, hint in inner_first if not self._language.knows(hint)]

    def _judge(self, hint: Hint, place: str, config: Config) -> Fits:
        """Refuse the type, or return its function of a value."""
        if hint is None:
            return _SCALARS[type(None)]
        if hint in (Any, object) or isinstance(hint, TypeVar):
            return _never
        if isinstance(hint, type) and _origin_of(hint) is None:
            return self._judge_class(hint, place, config)
        if (inner := _unwrapped(hint)) is not None:
            return self._judge_alias(hint, inner, place, config)
        return self._judge_form(hint, place, config)

    def _judge_alias(self, hint: Hint, inner: Hint, place: str, config: Config) -> Fits:
        """Judge the type inside a NewType, an alias, `Annotated` or similar."""
        if hasattr(hint, "__supertype__"):
            return self._judge(inner, place, config)
        if hasattr(hint, "__value__"):
            if hint in self._met:  # a recursive alias
                return _never
            self._met[hint] = _never
        metadata = getattr(hint, "__metadata__", ())
        if not any(hasattr(each, "__get_pydantic_core_schema__") for each in metadata):
            self._judge(inner, place, config)
        return _never

    def _judge_form(self, hint: Hint, place: str, config: Config) -> Fits:
        """Judge a type with arguments."""
        origin, arguments = _origin_of(hint), typing.get_args(hint)
        if origin is Literal:
            return self._judge_members(hint, arguments, place)
        if origin in (Union, types.UnionType):
            return self._judge_union(arguments, place, config)
        if origin in _ONE_SHOT:
            _refuse(place, f"{hint!r} is no data: publish its result, as a list or a value")
        if not isinstance(origin, type):
            return self._judge_unknown(hint, place)
        if _is_any(origin, collections.abc.Mapping):
            self._refuse_keys(arguments[0], place)
        fits = [self._judge(each, place, config) for each in arguments if each is not Ellipsis]
        if (make := _CONTAINERS.get(origin)) is not None and fits:
            return make(hint, fits)
        if _kind_of(origin) is not None:
            self._judge(origin, place, config)  # a generic class: its fields have type variables
            return _never
        return self._judge_unknown(hint, place)

    def _judge_union(self, arguments: tuple[Hint, ...], place: str, config: Config) -> Fits:
        fits = [self._judge(each, place, config) for each in arguments]
        others = [
            each for each, hint in zip(fits, arguments, strict=True) if hint is not type(None)
        ]
        if len(others) > 1 or len(others) == len(fits):
            return _never  # a value may be read back as another member of the union
        (only,) = others
        return lambda value: value is None or only(value)

    def _judge_class(self, kind: Any, place: str, config: Config) -> Fits:
        """Judge a class without arguments."""
        if kind in _SCALARS:
            return _SCALARS[kind]
        if _is_any(kind, *_BYTES):
            return self._judge_bytes(kind, place, config)
        if _is_any(kind, Enum):
            members = tuple(kind.__members__.values())
            fits = self._judge_members(kind, members, place)
            return _never if _is_any(kind, Flag) else fits
        if (reason := _reason_against(kind)) is not None:
            _refuse(place, reason)
        if kind in _CONTAINERS or kind in _ONE_SHOT:
            return _never if kind in _CONTAINERS else self._judge_unknown(kind, place)
        found = _kind_of(kind)
        if found is None:
            return self._judge_unknown(kind, place)
        if self._language.name not in found.languages:
            other = " or ".join(found.languages)
            _refuse(
                place,
                f"{kind.__qualname__} is {found.called}, which {other} writes, in a class that "
                f"{self._language.name} writes: make both the same kind of class",
            )
        return self._judge_record(kind, found, place, config)

    def _judge_record(self, kind: Any, found: _Kind, place: str, config: Config) -> Fits:
        """Judge the fields of a class."""
        own = getattr(kind, "model_config", None) or getattr(kind, "__pydantic_config__", None)
        config = config if own is None else own
        key = kind, _keeps_bytes(config)
        if key in self._met:
            return self._later(key)
        self._met[key] = _never
        fits: dict[str, Fits] = {}
        for name, hint in _fields_of(kind, found, place):
            self.fields.add(name)
            inside = f"{kind.__qualname__}.{name}"
            if found.leaves_out_private and name.startswith("_") and self._by_msgspec:
                _refuse(inside, "msgspec leaves out a field with an underscore: rename the field")
            self.declared[inside] = hint
            fits[name] = self._judge(hint, inside, config)
        if not self._by_msgspec and not config and _is_plain(kind):
            self._met[key] = _record(kind, fits)
        return self._met[key]

    def _later(self, key: object) -> Fits:
        """Return a function that looks up the result later, as a class may contain itself."""

        def fits(value: Any) -> bool:
            return self._met[key](value)

        return fits

    def _judge_bytes(self, kind: type, place: str, config: Config) -> Fits:
        if not self._by_msgspec and not _keeps_bytes(config):
            _refuse(
                place,
                f"{kind.__name__} cannot be stored as JSON without loss: give the class "
                "`__pydantic_config__ = {'ser_json_bytes': 'base64', 'val_json_bytes': 'base64'}` "
                "(a pydantic model: the same in its `model_config`)",
            )
        return _never

    def _judge_members(self, hint: Hint, members: tuple[object, ...], place: str) -> Fits:
        """Write and read each member of an enum or a Literal. Refuse one that is changed by it."""
        for each in members:
            if not self._comes_back(hint, each):
                _refuse(
                    place, f"{each!r} of {_shown(hint)} would not come back as it is: {_MEMBERS}"
                )
        kinds = {type(each) for each in members}  # checked first: another value may have no hash
        same = {(type(each), each) for each in members}
        return lambda value: type(value) in kinds and (type(value), value) in same

    def _comes_back(self, hint: Hint, value: object) -> bool:
        try:
            pair = self._language.open(hint)
            return loss_of(value, pair.load(pair.dump(value)), "") is None
        except Exception:  # noqa: BLE001 - any error of the package or of the value's class
            return False

    def _judge_unknown(self, hint: Hint, place: str) -> Fits:
        """Refuse a type that the package does not know. Else each value has to be compared."""
        if hasattr(hint, "get_secret_value"):
            _refuse(
                place,
                "a secret is not written into rows or messages: publish an id, and load the rest",
            )
        if hint in _ONE_SHOT or not self._language.knows(hint):
            _refuse(place, f"{_shown(hint)} cannot be stored as JSON: {_REMEDY}")
        return _never

    def _refuse_keys(self, hint: Hint, place: str) -> None:
        """Refuse a type of dict keys that is not read back from a str: keys in JSON are strings."""
        while (inner := _unwrapped(hint)) is not None:
            hint = inner
        if hint in (Any, object) or isinstance(hint, TypeVar) or _origin_of(hint) is Literal:
            return
        if _origin_of(hint) in (Union, types.UnionType):
            for each in typing.get_args(hint):
                self._refuse_keys(each, place)
        elif not _is_key(hint):
            _refuse(
                place,
                f"{_shown(hint)} cannot be the key of a JSON object, which is a string: use a str, "
                "or a list of pairs",
            )


_REMEDY = (
    "make it a dataclass, a pydantic model, a msgspec.Struct or an attrs class of such values, or "
    "publish an id and load the rest"
)
_MEMBERS = "use str or int values for its members, all different as text"


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of class that has fields."""

    called: str
    languages: tuple[str, ...]
    leaves_out_private: bool = False


_DATACLASS = _Kind("a dataclass", ("pydantic", "msgspec"), leaves_out_private=True)
_MODEL = _Kind("a pydantic model", ("pydantic",))
_STRUCT = _Kind("a msgspec.Struct", ("msgspec",))
_ATTRS = _Kind("an attrs class", ("msgspec",), leaves_out_private=True)
_NAMED_TUPLE = _Kind("a NamedTuple", ("pydantic", "msgspec"))
_TYPED_DICT = _Kind("a TypedDict", ("pydantic", "msgspec"))


def language_of(event_type: Any) -> str:
    """Return the package for a class: "msgspec" for structs and attrs classes, else "pydantic"."""
    return "msgspec" if _kind_of(event_type) in (_STRUCT, _ATTRS) else "pydantic"


def _kind_of(kind: Any) -> _Kind | None:
    if hasattr(kind, "__struct_fields__"):
        return _STRUCT
    if hasattr(kind, "__attrs_attrs__"):
        return _ATTRS
    if hasattr(kind, "model_fields") and not dataclasses.is_dataclass(kind):
        return _MODEL
    if dataclasses.is_dataclass(kind):
        return _DATACLASS
    if _is_any(kind, tuple) and hasattr(kind, "_fields"):
        return _NAMED_TUPLE
    return _TYPED_DICT if _is_any(kind, dict) and hasattr(kind, "__total__") else None


def _reason_against(kind: Any) -> str | None:
    """Return why the class is refused, independent of its fields; None if it is not."""
    if hasattr(kind, "__mapper__") or hasattr(kind, "_sa_class_manager"):
        return (
            f"{kind.__qualname__} is mapped by SQLAlchemy, and a mapped object cannot be stored: "
            "publish its id and the values that handlers need"
        )
    if _is_any(kind, BaseException):
        return f"{kind.__qualname__} is an exception, which is not stored: {_REMEDY}"
    if inspect.isabstract(kind) and _kind_of(kind) is not None:
        return (
            f"{kind.__qualname__} is abstract, so it has no instances: use its concrete subclasses"
        )
    return None


def _fields_of(kind: Any, found: _Kind, place: str) -> Iterable[tuple[str, Hint]]:
    """Return the fields of a class with their types."""
    if found is _MODEL:
        return _fields_of_model(kind)
    try:
        hints = typing.get_type_hints(kind, include_extras=True, localns={kind.__name__: kind})
    except Exception as error:  # noqa: BLE001 - annotations are the application's code
        _refuse(
            place,
            f"the annotations of {kind.__qualname__} cannot be read ({error}): their names have "
            "to be defined at run time, not only for the type checker",
        )
    if found is _DATACLASS:
        return _fields_of_dataclass(kind, hints)
    if found is _TYPED_DICT:
        return list(hints.items())
    names: Iterable[str] = (
        (each.name for each in kind.__attrs_attrs__)
        if found is _ATTRS
        else kind.__struct_fields__
        if found is _STRUCT
        else kind._fields
    )
    return [(name, hints.get(name, Any)) for name in names]


def _fields_of_model(kind: Any) -> Iterator[tuple[str, Hint]]:
    for name, each in kind.model_fields.items():
        if each.exclude:
            _refuse(
                f"{kind.__qualname__}.{name}",
                "exclude=True leaves it out of the stored JSON: remove the field from the class",
            )
        hint = each.annotation
        yield name, Annotated[hint, *each.metadata] if each.metadata else hint


def _fields_of_dataclass(kind: Any, hints: Mapping[str, Hint]) -> Iterator[tuple[str, Hint]]:
    for name, each in kind.__dataclass_fields__.items():
        if isinstance(hints.get(name), dataclasses.InitVar) and each.default is dataclasses.MISSING:
            _refuse(
                f"{kind.__qualname__}.{name}",
                "an InitVar is not kept, so it is missing when the event is read: make it a "
                "field, or give it a default",
            )
    for each in dataclasses.fields(kind):
        if _is_made_anew(kind, each):
            _refuse(
                f"{kind.__qualname__}.{each.name}",
                "with init=False, its factory makes another value when the event is read: use "
                "kw_only=True instead",
            )
        yield each.name, hints.get(each.name, Any)


def _is_made_anew(kind: type, field: dataclasses.Field[Any]) -> bool:
    made = field.default_factory is not dataclasses.MISSING
    return made and not field.init and not hasattr(kind, "__post_init__")


def _is_plain(kind: Any) -> bool:
    """Whether only the annotations of a dataclass decide how it is written and read."""
    if _kind_of(kind) is not _DATACLASS or any(hasattr(kind, each) for each in _HOOKS):
        return False
    return all(
        each.init and not each.metadata and "pydantic" not in type(each.default).__module__
        for each in dataclasses.fields(kind)
    )


_HOOKS = (
    "__post_init__",
    "__pydantic_decorators__",
    "__get_pydantic_core_schema__",
    "__parameters__",  # a generic class: its fields have type variables
)


def _record(kind: type, fits: Mapping[str, Fits]) -> Fits:
    if _never in fits.values():
        return _never
    pairs = tuple(fits.items())

    def fits_all(value: Any) -> bool:
        if type(value) is not kind:
            return False
        for name, each in pairs:  # noqa: SIM110 - all() would take twice the time
            if not each(getattr(value, name)):
                return False
        return True

    return fits_all


def _elements(hint: Hint, fits: list[Fits]) -> Fits:
    kind, (only, *_) = _origin_of(hint), fits
    return lambda value: type(value) is kind and all(map(only, value))


def _tuple(hint: Hint, fits: list[Fits]) -> Fits:
    if Ellipsis in typing.get_args(hint):
        return _elements(hint, fits)
    is_tuple = _of(tuple)

    def fits_all(value: Any) -> bool:
        if not is_tuple(value) or len(value) != len(fits):
            return False
        return all(each(part) for each, part in zip(fits, value, strict=True))

    return fits_all


def _dict(_: Hint, fits: list[Fits]) -> Fits:
    fits_key, fits_part = fits
    is_dict = _of(dict)

    def fits_all(value: Any) -> bool:
        return is_dict(value) and all(map(fits_key, value)) and all(map(fits_part, value.values()))

    return fits_all


_CONTAINERS: dict[type, Callable[[Hint, list[Fits]], Fits]] = {
    list: _elements,
    set: _elements,
    frozenset: _elements,
    tuple: _tuple,
    dict: _dict,
}


def _unwrapped(hint: Hint) -> Hint | None:
    """Return the type inside a NewType, an alias, `Annotated` or similar; None for other types."""
    if hasattr(hint, "__supertype__"):
        return hint.__supertype__
    if _origin_of(hint) is Annotated:
        return hint.__origin__
    if str(_origin_of(hint)).rpartition(".")[2] in _TRANSPARENT:
        return typing.get_args(hint)[0]
    # `type X = ...`. With arguments, it is a generic alias that passes on `__value__`.
    return None if isinstance(hint, type) else getattr(hint, "__value__", None)


def _origin_of(hint: Hint) -> Any:
    return typing.get_origin(hint)


def _is_any(kind: Any, *classes: type) -> bool:
    return issubclass(kind, classes)


def _keeps_bytes(config: Config) -> bool:
    written = config.get("ser_json_bytes")
    return written in _TEXTUAL and config.get("val_json_bytes") == written


def _is_key(hint: Hint) -> bool:
    if not isinstance(hint, type) or hint is type(None):
        return False
    return hint in _SCALARS or _is_any(hint, Enum)


def _shown(hint: Hint) -> str:
    return hint.__qualname__ if isinstance(hint, type) else str(hint)


def _refuse(place: str, reason: str) -> NoReturn:
    raise InvalidEventTypeError(f"{place}: {reason}")
