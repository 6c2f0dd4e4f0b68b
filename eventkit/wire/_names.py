"""Owns the names of event classes, and the functions that convert JSON stored under a former name.

The class keeps its name as an attribute. A registry would lose it: a decorator such as
`@dataclass(slots=True)` makes a new class, and copies the attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

C = TypeVar("C", bound=type)

# Any: what JSON holds.
Upcast = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes the fields that were stored under an older name, and returns those of the next name."""

_ATTRIBUTE = "__eventkit_names__"
_EXAMPLE = '@named("shop.order.placed")'


@dataclass(frozen=True, slots=True)
class Names:
    """The current name of a class, and its former names, oldest first."""

    current: str
    formerly: tuple[tuple[str, Upcast | None], ...] = ()

    def steps_from(self, name: str) -> list[tuple[str, Upcast]] | None:
        """List the functions that convert a former name; None if the class never had the name."""
        for index, (former, _) in enumerate(self.formerly):
            if former == name:
                return [(each, step) for each, step in self.formerly[index:] if step is not None]
        return None


def named(name: str, *, formerly: Mapping[str, Upcast | None] = {}) -> Callable[[C], C]:
    """Give an event class its name for stored rows and for the wire.

    Without `named`, the name is `module:qualname`. Then a class that is moved or renamed has
    another name, and nobody can read its old rows. A version is part of the name. A subclass does
    not inherit the name.

    `formerly` lists the former names of the class, oldest first. Each former name has a function,
    or None if only the name was changed. The function takes a dict that was stored under its name,
    and returns the dict of the next name in the list. The last function returns the dict of the
    current name. So a row with the oldest of two former names goes through two functions:

        def with_currency(stored: dict[str, Any]) -> dict[str, Any]:  # v1 -> v2
            return {**stored, "currency": "EUR"}

        def in_cents(stored: dict[str, Any]) -> dict[str, Any]:  # v2 -> v3
            return {"cents": round(stored["total"] * 100), "currency": stored["currency"]}

        @named(
            "shop.order.placed.v3",
            formerly={"shop.order.placed.v1": with_currency, "shop.order.placed.v2": in_cents},
        )
        @dataclass(frozen=True, slots=True)
        class OrderPlaced:
            cents: int
            currency: str

    For rows that are older than the decorator: `formerly={"shop.orders:OrderPlaced": None}`. The
    dicts have values of JSON: str, int, float, bool, None, list, dict.

    Args:
        name: The name. Printable, without spaces around it, and unique among all events.
        formerly: The former names, oldest first, each with its function or None.

    Returns:
        A decorator that returns the same class. It may stand above or below `@dataclass`,
        `@attrs.define` and similar decorators.

    Raises:
        TypeError: `name` or a key of `formerly` is no str, a value of `formerly` is neither
            callable nor None, or the decorated object is not a class of the application.
        ValueError: A name cannot be used or appears twice, or the class has a name already.
    """
    names = Names(_usable(name), _history(name, formerly))

    def decorate(event_type: C) -> C:
        if not isinstance(event_type, type):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{event_type!r} is no class: named() decorates event classes")
        if (before := _own(event_type)) is not None:
            raise ValueError(
                f"{event_type.__qualname__} is named {before.current!r} already: name it once, "
                "and list its former names in formerly="
            )
        try:
            setattr(event_type, _ATTRIBUTE, names)
        except TypeError:
            raise TypeError(
                f"{event_type.__qualname__} cannot be named, because it is not a class of the "
                "application: publish an event class of your own"
            ) from None
        return event_type

    return decorate


def wire_name(event_type: type) -> str:
    """Return the name of an event class in stored rows and on the wire.

    Returns:
        The name that `named` gave, or `module:qualname`.
    """
    return names_on(event_type).current


def names_of(event_type: type) -> tuple[str, ...]:
    """Return all names of an event class: the current one, then the former ones, oldest first."""
    names = names_on(event_type)
    return (names.current, *(former for former, _ in names.formerly))


def names_on(event_type: type) -> Names:
    """Return the names of a class, without names of its bases."""
    return _own(event_type) or Names(f"{event_type.__module__}:{event_type.__qualname__}")


def is_named(event_type: type) -> bool:
    """Return whether `named` decorates this class itself. A subclass does not count."""
    return _own(event_type) is not None


def _own(event_type: type) -> Names | None:
    return cast("Names | None", vars(event_type).get(_ATTRIBUTE))


def _usable(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of an event class is a str, not {name!r}: {_EXAMPLE}")
    if not name or not name.isprintable() or name != name.strip():
        raise ValueError(
            f"{name!r} is no name for an event class: it has to be printable, without spaces "
            f"around it: {_EXAMPLE}"
        )
    return name


def _history(
    name: str, formerly: Mapping[str, Upcast | None]
) -> tuple[tuple[str, Upcast | None], ...]:
    if not isinstance(formerly, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "formerly= maps each former name to a function or None, as in "
            f'formerly={{"shop.order.v1": from_v1}}; this is no mapping: {formerly!r}'
        )
    for former, step in formerly.items():
        if _usable(former) == name:
            raise ValueError(f"{name!r} is the current name: leave it out of formerly=")
        if step is not None and not callable(step):
            raise TypeError(
                f"formerly[{former!r}] has to be a function from the stored dict to the next "
                f"name's dict, or None where nothing changed, not {step!r}"
            )
    return tuple(formerly.items())
