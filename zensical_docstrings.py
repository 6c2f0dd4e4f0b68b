"""Prepares docstrings for the reference. `zensical.toml` names this file, and Griffe loads it.

In the source a docstring is plain text. On the site a block of code is highlighted, and a public
name that is written as code is a link, as is the address of a page.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import griffe

# Modules with public names. A name that two of them have belongs to the first one.
PUBLIC = [
    "eventkit",
    "eventkit.exceptions",
    "eventkit.starlette",
    "eventkit.fastapi",
    "eventkit.sqlalchemy",
    "eventkit.outbox",
    "eventkit.streams",
    "eventkit.wire",
    "eventkit.faststream",
    "eventkit.opentelemetry",
    "eventkit.testing",
]

_SECTION = re.compile(r"[A-Z]\w+:$")
_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)(\(\))?`(?!`)")
_ADDRESS = re.compile(r"(?<![<(`])https://fastapi-eventkit\.readthedocs\.io/([\w-]+)/(#[\w-]+)?")


# What eventkit makes and users only read: how it is made is of no interest to them.
_READ_ALONE = {
    "CommitTie",
    "Declaration",
    "Delivery",
    "DrainReport",
    "EventContext",
    "EventStream",
    "Failure",
    "Observation",
    "Outcome",
    "Origin",
    "OutboxStats",
    "Received",
    "Stats",
    "StoredDelivery",
    "Subscription",
    "Wired",
}
_LABELS = {"dataclass", "module-attribute"}
# Types that have a name in the source alone.
_SPELLED = {
    "_Sessions": "sessionmaker | async_sessionmaker | scoped_session | async_scoped_session",
}


class Docstrings(griffe.Extension):
    """Highlights the code of docstrings, and links names and pages."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Change all docstrings of the package, once all of it is loaded."""
        if pkg.path == "eventkit":
            names = public_names(pkg)
            for each in objects_of(pkg):
                if each.docstring is not None:
                    each.docstring.value = prepared(each.docstring.value, each, names)
                each.labels -= _LABELS
                simplify(each)


def public_names(package: griffe.Module) -> dict[str, str]:
    """Public names and their members, as docstrings write them; each with its full name."""
    names: dict[str, str] = {}
    for path in PUBLIC:
        module = package if path == "eventkit" else package[path.removeprefix("eventkit.")]
        for export in module.exports or ():
            name = str(export)
            target = module[name]
            names.setdefault(name, f"{path}.{name}")
            names.setdefault(f"{path}.{name}", names[name])
            if target.is_class:
                for member, each in target.all_members.items():
                    if not member.startswith("_"):  # an attribute alone is told of by its class
                        full = f"{names[name]}.{member}" if each.has_docstring else names[name]
                        names.setdefault(f"{name}.{member}", full)
    return names


def objects_of(module: griffe.Object) -> list[griffe.Object]:
    """The module and all that is in it, imported names left out."""
    found = [module]
    for member in module.members.values():
        if isinstance(member, griffe.Object):
            found += objects_of(member)
    return found


def simplify(owner: griffe.Object) -> None:
    """Leave out of a signature what helps no user."""
    if isinstance(owner, griffe.Class):
        if owner.name in _READ_ALONE or owner.name.endswith(("Error", "UnexpectedFailures")):
            owner.members.pop("__init__", None)
            owner.decorators.clear()  # or Griffe makes one for a dataclass
        for each in owner.attributes.values():
            if "default_factory" in str(each.value):
                each.value = "..."
    if isinstance(owner, griffe.Function):
        for parameter in owner.parameters:
            for name, spelled in _SPELLED.items():
                if name in str(parameter.annotation):
                    parameter.annotation = str(parameter.annotation).replace(name, spelled)


def prepared(text: str, owner: griffe.Object, names: Mapping[str, str]) -> str:
    """The docstring as the site has it."""
    return "\n".join(
        line if is_code else linked(line, owner, names)
        for line, is_code in marked(text.splitlines())
    )


def marked(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Put fences around the code: what is indented, and stands in no section as `Args:`.

    Yields each line, and whether it belongs to code.
    """
    in_section = in_code = False
    blank: list[str] = []
    for line in lines:
        if not line.strip():
            blank.append(line)
            continue
        if not line.startswith("    "):
            in_section = _SECTION.match(line) is not None
        starts = line.startswith("    ") and not in_section
        if in_code and not starts:
            yield "```", True
        yield from ((each, True) for each in blank)
        blank.clear()
        if starts and not in_code:
            yield "```python", True
        in_code = starts
        yield line.removeprefix("    ") if in_code else line, in_code
    if in_code:
        yield "```", True


def linked(line: str, owner: griffe.Object, names: Mapping[str, str]) -> str:
    """Make links of public names that are written as code, and of addresses of the site."""

    near = owner if owner.is_class else owner.parent
    made = owner.members.get("__init__", owner) if owner.is_class else owner
    arguments = {each.name for each in getattr(made, "parameters", ())}

    def link_name(found: re.Match[str]) -> str:
        name, call = found[1], found[2]
        if near is not None and near.is_class and name not in arguments:
            member = f"{near.name}.{name}"
            name = member if member in names else name
        if name not in names or not (name[0].isupper() or {*"._"} & {*name} or call):
            return found[0]
        if names[name].endswith(f".{near.name}.{owner.name}" if near is not None else owner.name):
            return found[0]  # itself
        return f"[{found[0]}][{names[name]}]"

    line = _ADDRESS.sub(lambda found: f"[{found[0]}](../{found[1]}.md{found[2] or ''})", line)
    return _NAME.sub(link_name, line)
