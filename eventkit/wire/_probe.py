"""Owns what an event class may consist of: it is looked at once, before the first event.

What JSON never holds without loss is refused here, with the name of the field. For the rest comes
out a function that says whether a value is one of those which are known to come back as they were:
plain values of exactly the declared types. Any other value is compared with what comes back of it.
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

# Any: values and annotations are whatever the application has.
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


# Scalars, and which of their values both packages are known to give back.
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
    timedelta: _never,  # the largest ones are read with a limit that depends on the version
}


class Probe:
    """One look at an event class and all that it consists of.

    Attributes:
        fields: The names of all fields that were met. No other name of a place in an event is told.
        declared: Their types, by the class and the name of the field.
        fits: Whether an event is known to come back as it was, without a look at what comes back.
    """

    def __init__(self, event_type: type, language: Format) -> None:
        self.fields: set[str] = set()
        self._language = language
        self._by_msgspec = language.name == "msgspec"
        self._met: dict[object, Fits] = {}
        self.declared: dict[str, Hint] = {}
        self.fits: Fits = self._judge(event_type, event_type.__qualname__, {})

    def blame(self) -> list[str]:
        """List the fields that the package refuses, innermost first."""
        inner_first = reversed(self.declared.items())
        return [place for place, hint in inner_first if not self._language.knows(hint)]

    def _judge(self, hint: Hint, place: str, config: Config) -> Fits:
        """Refuse the type, or say which of its values are known to come back as they were."""
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
        """Go on with what a NewType, an alias, `Annotated` and the like stand for."""
        if hasattr(hint, "__supertype__"):
            return self._judge(inner, place, config)
        if hasattr(hint, "__value__"):
            if hint in self._met:  # an alias may be recursive
                return _never
            self._met[hint] = _never
        metadata = getattr(hint, "__metadata__", ())
        if not any(hasattr(each, "__get_pydantic_core_schema__") for each in metadata):
            self._judge(inner, place, config)
        return _never

    def _judge_form(self, hint: Hint, place: str, config: Config) -> Fits:
        """Go on with a type that has arguments."""
        origin, arguments = _origin_of(hint), typing.get_args(hint)
        if origin is Literal:
            return self._judge_members(hint, arguments, place)
        if origin in (Union, types.UnionType):
            return self._judge_union(arguments, place, config)
        if origin in _ONE_SHOT:
            _refuse(place, f"{hint!r} is no data: publish what it gives, as a list or a value")
        if not isinstance(origin, type):
            return self._judge_unknown(hint, place)
        if _is_any(origin, collections.abc.Mapping):
            self._refuse_keys(arguments[0], place)
        fits = [self._judge(each, place, config) for each in arguments if each is not Ellipsis]
        if (make := _CONTAINERS.get(origin)) is not None and fits:
            return make(hint, fits)
        if _kind_of(origin) is not None:
            self._judge(origin, place, config)  # a generic class; its fields' types are open
            return _never
        return self._judge_unknown(hint, place)

    def _judge_union(self, arguments: tuple[Hint, ...], place: str, config: Config) -> Fits:
        fits = [self._judge(each, place, config) for each in arguments]
        others = [
            each for each, hint in zip(fits, arguments, strict=True) if hint is not type(None)
        ]
        if len(others) > 1 or len(others) == len(fits):
            return _never  # one member may be read as another one
        (only,) = others
        return lambda value: value is None or only(value)

    def _judge_class(self, kind: Any, place: str, config: Config) -> Fits:
        """Go on with a class."""
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
                f"{kind.__qualname__} is {found.called}, which {other} writes, and "
                f"{self._language.name} the class around it: make both the same kind of class",
            )
        return self._judge_record(kind, found, place, config)

    def _judge_record(self, kind: Any, found: _Kind, place: str, config: Config) -> Fits:
        """Go on with the fields of a class."""
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
        """Ask what is known of a class only when a value is there: a class may contain itself."""

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
        """Try each member of an enum or a Literal: there are only so many."""
        for each in members:
            if not self._comes_back(hint, each):
                _refuse(
                    place, f"{each!r} of {_shown(hint)} would not come back as it is: {_MEMBERS}"
                )
        kinds = {type(each) for each in members}  # asked first, as another value may have no hash
        same = {(type(each), each) for each in members}
        return lambda value: type(value) in kinds and (type(value), value) in same

    def _comes_back(self, hint: Hint, value: object) -> bool:
        try:
            pair = self._language.open(hint)
            return loss_of(value, pair.load(pair.dump(value)), "") is None
        except Exception:  # noqa: BLE001 - whatever the package or the value's class raises
            return False

    def _judge_unknown(self, hint: Hint, place: str) -> Fits:
        """Leave it to the package; what it can write is compared each time."""
        if hasattr(hint, "get_secret_value"):
            _refuse(
                place,
                "a secret is not written into rows or messages: publish an id, and load the rest",
            )
        if hint in _ONE_SHOT or not self._language.knows(hint):
            _refuse(place, f"{_shown(hint)} cannot be stored as JSON: {_REMEDY}")
        return _never

    def _refuse_keys(self, hint: Hint, place: str) -> None:
        """Refuse what is no key of a JSON object, which is a string, and not read back from one."""
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
_MEMBERS = "give its members values that are str or int, all different as text"


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
    """Say which package writes a class: msgspec its own and those of attrs, pydantic all others."""
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
    """Say why no value of the class is stored, whatever its fields are."""
    if hasattr(kind, "__mapper__") or hasattr(kind, "_sa_class_manager"):
        return (
            f"{kind.__qualname__} is mapped by SQLAlchemy, and a row is not what has happened: "
            "publish its id and the values that handlers need"
        )
    if _is_any(kind, BaseException):
        return f"{kind.__qualname__} is an exception, which is not stored: {_REMEDY}"
    if inspect.isabstract(kind) and _kind_of(kind) is not None:
        return (
            f"{kind.__qualname__} is abstract, so nothing can be read as one: name the "
            "classes that are made"
        )
    return None


def _fields_of(kind: Any, found: _Kind, place: str) -> Iterable[tuple[str, Hint]]:
    """List the fields of a class with their types."""
    if found is _MODEL:
        return _fields_of_model(kind)
    try:
        hints = typing.get_type_hints(kind, include_extras=True, localns={kind.__name__: kind})
    except Exception as error:  # noqa: BLE001 - annotations are the application's code
        _refuse(
            place,
            f"the annotations of {kind.__qualname__} cannot be read ({error}): what they "
            "name has to be there when the module runs, not only while types are checked",
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
                "exclude=True leaves it out of what is stored: take it out of the class",
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
                "with init=False its factory would make another value when the event is read: use "
                "kw_only=True instead",
            )
        yield each.name, hints.get(each.name, Any)


def _is_made_anew(kind: type, field: dataclasses.Field[Any]) -> bool:
    made = field.default_factory is not dataclasses.MISSING
    return made and not field.init and not hasattr(kind, "__post_init__")


def _is_plain(kind: Any) -> bool:
    """Say whether nothing but its annotations decides how a dataclass is written and read."""
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
    "__parameters__",  # generic: its fields' types are open
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
    """Give what a NewType, an alias, `Annotated` and the like stand for; None for other types."""
    if hasattr(hint, "__supertype__"):
        return hint.__supertype__
    if _origin_of(hint) is Annotated:
        return hint.__origin__
    if str(_origin_of(hint)).rpartition(".")[2] in _TRANSPARENT:
        return typing.get_args(hint)[0]
    # An alias, or one with arguments, which passes on what it is asked.
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
