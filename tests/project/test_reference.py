"""What the reference says of the command and of versions is so. `tests/site` sees it built."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

import eventkit
from tests.project.pages import FENCED, REFERENCE

if TYPE_CHECKING:
    from click import Command

# The public names of the first release, each as `module.name` or `module.Class.member`.
FIRST = {*(Path(__file__).parent / "names_0_1.txt").read_text().splitlines()}
ADDED = re.compile(r"\bAdded in version \d+\.\d+\.")
MODULES = [
    "eventkit",
    *(
        f"eventkit.{each.name}"
        for each in pkgutil.iter_modules(eventkit.__path__)
        if not each.name.startswith("_")
    ),
    "eventkit_pytest",
]


@pytest.mark.parametrize("page", sorted(REFERENCE.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_of_the_reference_has_no_program_that_nobody_runs(page: Path) -> None:
    assert FENCED.findall(page.read_text()) == []


def test_the_first_page_has_each_name_of_the_front_door() -> None:
    named = re.findall(r"\]\[eventkit\.(\w+)\]", (REFERENCE / "index.md").read_text())
    values = {name: getattr(eventkit, name) for name in eventkit.__all__}
    exceptions = {
        name
        for name, each in values.items()
        if inspect.isclass(each) and issubclass(each, Exception)
    }

    assert sorted(named) == sorted({*values} - exceptions)


@pytest.mark.parametrize("name", MODULES)
def test_a_name_that_came_after_the_first_release_says_when(name: str) -> None:
    names = names_of(imported(name))

    unsaid = [full for full in names if full not in FIRST and not ADDED.search(names[full])]
    assert unsaid == [], "write `Added in version X.Y.`; names of 0.1 stand in names_0_1.txt"


def test_the_names_of_the_first_release_are_still_there() -> None:
    missing = {*FIRST}.difference(*(names_of(imported(name)) for name in MODULES))

    assert missing == set(), "a name that is removed leaves names_0_1.txt, and is in the changelog"


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def names_of(module: ModuleType) -> dict[str, str]:
    """The public names of a module and of its classes, each with what is said of it."""
    found: dict[str, str] = {}
    for public in vars(module)["__all__"]:
        value = getattr(module, public)
        said = inspect.getdoc(value) or ""
        found[f"{module.__name__}.{public}"] = f"{said}\n{said_below(module, public)}"
        for member in dir(value) if inspect.isclass(value) else ():
            owner = next((each for each in value.__mro__ if member in vars(each)), object)
            if not member.startswith("_") and owner.__module__.split(".")[0] == "eventkit":
                static = inspect.getattr_static(value, member)
                is_data = not (inspect.isroutine(static) or isinstance(static, property))
                told = said_of_attribute(said, member) if is_data else inspect.getdoc(static)
                found[f"{module.__name__}.{public}.{member}"] = told or ""
    return found


def said_below(module: ModuleType, name: str) -> str:
    """The text below an assignment, by which an alias is described."""
    body = ast.parse(inspect.getsource(module)).body
    for assigned, below in pairwise(body):
        if isinstance(assigned, ast.Assign) and ast.unparse(assigned.targets[0]) == name:
            return ast.unparse(below)
    return ""


def said_of_attribute(docstring: str, name: str) -> str:
    """What a class says of an attribute, up to the next one."""
    found = re.search(rf"^    {name}: .*(?:\n {{8}}.*)*", docstring, re.MULTILINE)
    return found[0] if found else ""


def test_what_is_new_and_does_not_say_since_when_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    names = names_of(importlib.import_module("planted"))
    monkeypatch.delitem(sys.modules, "planted")

    assert [full for full in names if not ADDED.search(names[full])] == [
        "planted.Silent",
        "planted.silent",
        "planted.Told.quiet",
        "planted.Told.silent",
    ]


PLANTED = '''
__all__ = ["Alias", "Silent", "silent", "told", "Told"]
Alias = int | str
"""A number or a text. Added in version 0.2."""
Silent = int | str


def silent() -> None:
    """Do something."""


def told() -> None:
    """Do something.

    Added in version 0.2.
    """


class Told:
    """Something.

    Added in version 0.2.

    Attributes:
        loud: A number.
            Added in version 0.3.
        quiet: A number.
    """

    __module__ = "eventkit"
    __slots__ = ("loud", "quiet")

    def silent(self) -> None:
        """Do nothing."""
'''


def test_the_page_about_the_command_has_each_command_and_each_option() -> None:
    commands = pytest.importorskip("eventkit._cli._commands", reason="the command needs its extra")
    import click

    text = (REFERENCE / "command.md").read_text()
    told: dict[str, str] = dict(re.findall(r"^## `(eventkit .*)`\n((?:(?!## ).*\n)+)", text, re.M))
    found = dict(leaves("eventkit", commands.eventkit))

    assert {*told} == {*found}
    for path, command in found.items():
        options = {each.opts[-1]: each for each in command.params if isinstance(each, click.Option)}
        rows = dict(re.findall(r"^\| `(--[a-z-]+)` (\|.*\|)$", told[path], re.M))
        assert [*rows] == [*options], path
        for name, option in options.items():
            choices = option.type.choices if isinstance(option.type, click.Choice) else ()
            shown = [option.default, *choices] if option.show_default else choices
            assert [each for each in shown if f"`{each}`" not in rows[name]] == [], (path, name)
        usage = " ".join([path, *command.collect_usage_pieces(click.Context(command))])
        assert f"```text\n{usage}\n```" in told[path]


def leaves(path: str, command: Command) -> Iterator[tuple[str, Command]]:
    """All commands below one, each with its words."""
    below: dict[str, Command] = getattr(command, "commands", {})
    for name, each in below.items():
        yield from leaves(f"{path} {name}", each)
    if not below:
        yield path, command
