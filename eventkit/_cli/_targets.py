"""Owns the search for `module:attr`: an outbox, or an ASGI app with its outboxes."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, cast

from starlette.types import ASGIApp

from eventkit._cli._problems import Mistake, in_one_line
from eventkit._core.bus import all_buses

if TYPE_CHECKING:
    from eventkit.outbox import Outbox


class Target(NamedTuple):
    """The object behind `module:attr`.

    Attributes:
        outboxes: The outbox, or for an app all outboxes of this process. At least one.
        app: The app; None for an outbox.
    """

    outboxes: Sequence[Outbox]
    app: ASGIApp | None


def outbox_of(name: str) -> Outbox:
    """Return the outbox of a name, or of a named app.

    Raises:
        Mistake: There is no outbox, or there are several.
    """
    outbox, *others = find(name).outboxes
    if others:
        buses = ", ".join(repr(each.bus.name) for each in (outbox, *others))
        raise Mistake(
            f"{name} has several outboxes, of the buses {buses}: name one of them as module:attr"
        )
    return outbox


def find(name: str) -> Target:
    """Import a name, also from the current directory.

    Raises:
        Mistake: The name leads to nothing with an outbox.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise Mistake(f"'{name}' is not of the form module:attr, such as shop.main:outbox")
    module = _imported(module_name)
    try:
        found: object = reduce(getattr, path.split("."), module)
    except AttributeError:
        raise Mistake(f"{module_name} has no '{path}'{_instead(module)}") from None
    return _target(name, found)


def _imported(name: str) -> ModuleType:
    """Import a module; its prints go to stderr, and not into the output of the command."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise Mistake(_import_failed(name, error)) from error
        raise Mistake(
            f"there is no module '{error.name}': give its dotted name, as in an import statement, "
            "and start the command in a directory where this import works"
        ) from None
    except (Exception, SystemExit) as error:
        raise Mistake(_import_failed(name, error)) from error


def _import_failed(name: str, error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name} cannot be imported: {in_one_line(error)} ({last.filename}:{last.lineno})"


def _instead(module: ModuleType) -> str:
    """List the outboxes of a module."""
    from eventkit.outbox import Outbox

    names = [name for name, value in vars(module).items() if isinstance(value, Outbox)]
    return f"; its outboxes: {', '.join(names)}" if names else ""


def _target(name: str, found: object) -> Target:
    try:
        from eventkit.outbox import Outbox
        from eventkit.outbox._outbox import outbox_of as found_on
    except ModuleNotFoundError as missing:  # an app may need no outbox
        raise Mistake(str(missing)) from None
    if isinstance(found, Outbox):
        return Target([found], None)
    if not _is_app(found):
        raise Mistake(
            f"{name} is neither an Outbox nor an ASGI app, but of class {type(found).__name__}: "
            "name the outbox, or the application itself"
        )
    outboxes = [each for each in map(found_on, all_buses()) if each is not None]
    if not outboxes:
        raise Mistake(
            f"{name} has no outbox: make one with Outbox(bus, engine), in a module that the "
            "application imports"
        )
    return Target(outboxes, cast("ASGIApp", found))


def _is_app(found: object) -> bool:
    """Say whether it takes the three arguments of ASGI; a factory of apps does not."""
    if not callable(found) or isinstance(found, type):
        return False
    try:
        inspect.signature(found).bind(None, None, None)
    except (TypeError, ValueError):
        return False
    return True
