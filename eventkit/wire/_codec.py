"""Owns the codec of an event class. A codec is made once, and its class keeps it.

A codec loses nothing. If the types of an event do not guarantee it, the codec reads the written
JSON again and compares. No error has the event: not in its text, its cause or its frames.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from eventkit.exceptions import EventEncodingError, EventKitError, InvalidEventTypeError
from eventkit.wire._formats import Fault, Format, Msgspec, Pair, Pydantic
from eventkit.wire._loss import REMEDY, Loss, first_leaf, kind_of, loss_of
from eventkit.wire._names import Upcast, is_named, names_on
from eventkit.wire._probe import Probe, language_of

E = TypeVar("E")

_ATTRIBUTE = "__eventkit_codec__"
_BUILTIN: dict[type, Codec[Any]] = {}  # for classes that accept no new attribute, such as `int`


class EventDecodingError(EventKitError, ValueError):
    """The stored JSON is no event of this class. The text has nothing of the JSON."""


class Codec(Generic[E]):
    """Writes the events of one class as JSON, and reads them. Safe to use from any thread.

    Attributes:
        event_type: The class.
        name: The name of the class in stored rows and on the wire.
    """

    __slots__ = ("_dump", "_fits", "_format", "_load", "_probe", "event_type", "name")

    def __init__(self, event_type: type[E], language: Format, probe: Probe, pair: Pair) -> None:
        self.event_type: type[E] = event_type
        self.name: str = names_on(event_type).current
        self._format = language
        self._probe = probe
        self._fits = probe.fits
        self._dump = pair.dump
        self._load = pair.load

    def __repr__(self) -> str:
        return f"<Codec {self.name}>"

    def encode(self, event: E) -> str:
        """Write an event as JSON.

        Args:
            event: An event of exactly this class, not of a subclass.

        Raises:
            EventEncodingError: The event could not be read back equal and of the same types. The
                error names the field and the type.
        """
        loss = self._loss_of_type(event)
        if loss is None:
            payload, loss = self._written(event)
            if loss is None:
                return payload.decode()
            del payload
        del event  # else the traceback shows it: a traceback keeps the locals of its frames
        raise EventEncodingError(self.event_type.__qualname__, loss.path, loss.problem)

    def decode(self, payload: str, name: str) -> E:
        """Read an event.

        Args:
            payload: The JSON that was stored.
            name: The name that it was stored under; may be a former one.

        Raises:
            EventDecodingError: `payload` is no JSON of such an event, the class never had this
                name, or a function of `formerly` failed.
        """
        event, problem = self._decoded(payload, name)
        if problem is None:
            return cast("E", event)
        del payload  # else the traceback shows it: a traceback keeps the locals of its frames
        raise EventDecodingError(problem)

    def _loss_of_type(self, event: object) -> Loss | None:
        if type(event) is self.event_type:
            return None
        kind = type(event).__qualname__
        return Loss(
            kind,
            f"only events of {self.event_type.__qualname__} itself are stored here, not of its "
            f"subclasses: subscribe to {kind}",
        )

    def _written(self, event: object) -> tuple[bytes, Loss | None]:
        try:
            payload = self._dump(event)
            if self._fits(event):
                return payload, None
        except Exception as error:  # noqa: BLE001 - code of the event's class may run
            return b"", self._unwritable(event, type(error).__name__)
        back, fault = self._read(payload)
        path = self.event_type.__qualname__
        if fault is not None:
            part = _part_at(event, fault.steps)
            found = "its JSON" if part is None else f"the JSON of this {kind_of(part)}"
            problem = f"{found} could not be read again: {fault.reason}. {REMEDY}"
            return b"", Loss(path + self._shown(fault.steps), problem)
        return payload, loss_of(event, back, path)

    def _unwritable(self, event: object, error: str) -> Loss:
        """Find the innermost part that cannot be written."""
        path = self.event_type.__qualname__
        try:
            path, part = first_leaf(event, path, self._cannot_write)
        except RecursionError:
            return Loss(path, "it contains itself, or is nested too deeply")
        return Loss(path, f"{kind_of(part)} cannot be written as JSON ({error}). {REMEDY}")

    def _cannot_write(self, path: str, part: object) -> bool:
        """Whether a part alone cannot be written: by its own type, or by its declared type."""
        declared = self._probe.declared.get(path, object)
        if isinstance(part, bytes | bytearray) and "bytes" in str(declared):
            return False  # the class around it decides how bytes are written
        for hint in (object, declared):
            try:
                self._format.open(hint).dump(part)
            except Exception:  # noqa: BLE001 - as above
                return True
        return False

    def _decoded(self, payload: str, name: str) -> tuple[object, str | None]:
        """Return the event, or a sentence about the bad JSON."""
        steps = [] if name == self.name else names_on(self.event_type).steps_from(name)
        if steps is None:
            return None, f"{self.event_type.__qualname__} never had the name {name!r}"
        if steps:
            payload, problem = self._converted(payload, steps)
            if problem is not None:
                return None, problem
        event, fault = self._read(payload)
        if fault is None:
            return event, None
        place = self._shown(fault.steps).lstrip(".")
        return None, f"this is no {self.name}: {place and f'{place}: '}{fault.reason}"

    def _read(self, payload: str | bytes) -> tuple[object, Fault | None]:
        try:
            return self._load(payload), None
        except Exception as error:  # noqa: BLE001 - code of the event's class may run
            return None, self._format.explain(error)

    def _shown(self, steps: tuple[str | int, ...]) -> str:
        """Show a place in an event without the keys of its dicts, because keys count as values."""
        fields = self._probe.fields
        return "".join(f".{each}" if each in fields else "[...]" for each in steps)

    def _converted(self, payload: str, steps: list[tuple[str, Upcast]]) -> tuple[str, str | None]:
        """Call the functions of `formerly` on the stored JSON; return JSON, or a problem."""
        after = "the stored JSON"
        try:
            stored = json.loads(payload)
            for former, step in steps:
                after = f"formerly[{former!r}] of {self.name}"
                stored = _a_dict(step(_a_dict(stored)))
            return json.dumps(stored, allow_nan=False), None
        except Exception as error:  # noqa: BLE001 - the application's functions run
            return "", f"{after} failed: {type(error).__name__}{_place_of(error)}"


def codec_for(event_type: type[E]) -> Codec[E]:
    """Return the codec of an event class. It is made at the first call, and kept on the class.

    Msgspec writes `msgspec.Struct` and attrs classes. Pydantic writes dataclasses, its own models,
    NamedTuple, TypedDict and built-in types.

    Three things are not kept: the name of a time zone (its offset is kept), which fields of a model
    were set, and attributes that are no fields. An int in a field of type float is read back as an
    equal float.

    Raises:
        InvalidEventTypeError: JSON cannot hold a field of the class without loss, or no other
            process could find the class. The error names the field and the remedy.
        ModuleNotFoundError: Pydantic or msgspec is needed, and not installed.
    """
    known = vars(event_type).get(_ATTRIBUTE) if _is_class(event_type) else None
    if isinstance(known, Codec):
        codec = cast("Codec[E]", known)
        if codec.event_type is event_type:  # a decorator that makes a new class copies the codec
            return codec
    return _BUILTIN.get(event_type) or _made(event_type)


def _made(event_type: type[E]) -> Codec[E]:
    _refuse_what_nobody_finds(event_type)
    language = _LANGUAGES[language_of(event_type)]()
    probe = Probe(event_type, language)
    codec = Codec(event_type, language, probe, _opened(event_type, language, probe))
    try:
        setattr(event_type, _ATTRIBUTE, codec)
    except TypeError:
        _BUILTIN[event_type] = codec
    return codec


_LANGUAGES: dict[str, Callable[[], Format]] = {"pydantic": Pydantic, "msgspec": Msgspec}


def _is_class(event_type: object) -> bool:
    return isinstance(event_type, type)


def _refuse_what_nobody_finds(event_type: type) -> None:
    if not _is_class(event_type) or event_type is object:
        raise InvalidEventTypeError(
            f"{event_type!r} is not a class of events that can be stored: use a dataclass, a "
            "pydantic model, a msgspec.Struct or an attrs class"
        )
    if "<locals>" in event_type.__qualname__ and not is_named(event_type):
        name = event_type.__name__
        raise InvalidEventTypeError(
            f"{name} is defined in a function, where no other process finds it: move it to the "
            f'module, or give it a name, `@named("shop.{name.lower()}")`'
        )


def _opened(event_type: type, language: Format, probe: Probe) -> Pair:
    try:
        return language.open(event_type)
    except Exception as error:
        place = next(iter(probe.blame()), event_type.__qualname__)
        reason = str(error).partition("\n")[0]
        raise InvalidEventTypeError(
            f"{place}: {language.name} cannot store it: {reason}"
        ) from error


def _a_dict(stored: object) -> dict[str, Any]:
    if not isinstance(stored, dict):
        raise TypeError
    return cast("dict[str, Any]", stored)


def _place_of(error: BaseException) -> str:
    """Return where an error was raised, without its message: that may quote the stored JSON."""
    *_, innermost = traceback.walk_tb(error.__traceback__)
    frame, line = innermost
    return f" at {frame.f_code.co_filename}:{line}"


def _part_at(event: Any, steps: tuple[str | int, ...]) -> object | None:  # Any: any event
    """Find the part of an event at a place of its JSON; None if the place cannot be followed."""
    part = event
    for step in steps:
        try:
            part = part[step] if type(part) in (dict, list, tuple) else getattr(part, str(step))
        except (AttributeError, LookupError, TypeError):
            return None
    return cast("object", part)
