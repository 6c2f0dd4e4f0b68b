"""Owns the names of handlers: each name is unique, but a file that runs again replaces its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from eventkit._core.log import log
from eventkit._core.subscriptions import Declaration
from eventkit.exceptions import DuplicateNameError

D = TypeVar("D", bound="Declaration")


class Names:
    """The names of handlers. One handler may have its name for several event types."""

    __slots__ = ("_given",)

    def __init__(self) -> None:
        self._given: dict[str, dict[type, Declaration]] = {}

    def refuse_clashes(self, declarations: Iterable[Declaration]) -> None:
        """Raise if two different handlers would have the same name.

        Raises:
            DuplicateNameError: The message names both handlers.
        """
        firsts: dict[str, Declaration] = {}
        for declaration in _with_given_name(declarations):
            handler, name = declaration.declared, declaration.declared.name
            holders = [firsts.setdefault(name, declaration)]
            if name in self._given:
                holders.append(next(iter(self._given[name].values())))
            for holder in holders:
                known = holder.declared
                if known.identity != handler.identity and not handler.comes_again(known):
                    raise DuplicateNameError(name, holder.declared.location, handler.location)

    def add(self, declarations: Iterable[Declaration]) -> None:
        """Add the names of these declarations."""
        for declaration in _with_given_name(declarations):
            types = self._given.setdefault(declaration.declared.name, {})
            types[declaration.event_type] = declaration

    def remove(self, declaration: Declaration) -> None:
        """Remove the name of a declaration."""
        if _claims(declaration):
            types = self._given[declaration.declared.name]
            del types[declaration.event_type]
            if not types:
                del self._given[declaration.declared.name]


def _claims(declaration: Declaration) -> bool:
    """Whether its name must be unique: an explicit name, or that of a durable handler."""
    return declaration.declared.named or declaration.declared.durable is not None


def _with_given_name(declarations: Iterable[Declaration]) -> Iterator[Declaration]:
    return (declaration for declaration in declarations if _claims(declaration))


class Reruns:
    """Finds handlers whose file was executed again, and warns about them once."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def earlier(self, declaration: Declaration, known: Iterable[D]) -> D | None:
        """The known declaration that this one replaces, if there is one."""
        handler = declaration.declared
        return next((each for each in known if handler.comes_again(each.declared)), None)

    def warn(self, earlier: Declaration, later: Declaration) -> None:
        """Log the replacement, once for each pair of modules."""
        modules = earlier.declared.defined_in, later.declared.defined_in
        if modules not in self._told:
            self._told.add(modules)
            log(
                logging.WARNING,
                "a module has run twice, and its handlers were replaced",
                first_as=modules[0],
                again_as=modules[1],
                file=later.declared.location.rpartition(":")[0],
            )
