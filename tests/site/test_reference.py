"""The reference has each public name and each exception, also to programs: `objects.inv`."""

import ast
import zlib

import griffe
import pytest

import zensical_docstrings
from tests.serving import ROOT
from tests.site.built import SITE

PUBLIC = [
    "eventkit",
    *sorted(
        f"eventkit.{path.name.removesuffix('.py')}"
        for path in (ROOT / "eventkit").iterdir()
        if not path.name.startswith("_") and (path.is_dir() or path.suffix == ".py")
    ),
    "eventkit_pytest",
]
# Public to Python alone: hooks of the package itself, and protocols of the interpreter's.
INSIDE = {
    "CommitTie.transaction_of",
    "DispatchError.derive",
    "Subscription.latest",
    "Subscription.refuse_twin",
    "UnexpectedFailures.derive",
}


def names_of(module: str) -> list[str]:
    """`__all__` of a module, which is not imported."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


@pytest.fixture(scope="module")
def inventory() -> set[str]:
    """All names that the reference has, as Sphinx and mkdocstrings read them."""
    head, _, packed = (SITE / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert head.startswith(b"# Sphinx inventory version 2")
    return {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}


@pytest.fixture(scope="module")
def package() -> griffe.Module:
    loaded = griffe.load("eventkit", search_paths=[str(ROOT)])
    assert isinstance(loaded, griffe.Module)
    return loaded


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_each_public_name(module: str, inventory: set[str]) -> None:
    assert {f"{module}.{name}" for name in names_of(module)} - inventory == set()


def test_the_reference_has_each_public_method(package: griffe.Module, inventory: set[str]) -> None:
    methods = {
        f"{module}.{name}.{member}"
        for module in PUBLIC
        if module != "eventkit_pytest"
        for name in names_of(module)
        for member, each in members_of(package, f"{module}.{name}").items()
        if not member.startswith("_")
        and f"{name}.{member}" not in INSIDE
        and (each.is_function or "property" in each.labels)
    }

    assert "eventkit.EventBus.on" in methods  # which it has from a private base
    assert methods - inventory == set()


def members_of(package: griffe.Module, path: str) -> dict[str, griffe.Object | griffe.Alias]:
    found = package[path.removeprefix("eventkit.")]
    return found.all_members if found.is_class else {}


def test_each_exception_is_in_the_tree_with_its_bases(package: griffe.Module) -> None:
    lines = (ROOT / "docs/reference/exceptions.md").read_text(encoding="utf-8").splitlines()
    for name in names_of("eventkit.exceptions"):
        exception = package[f"exceptions.{name}"]
        assert isinstance(exception, griffe.Class)
        base, *more = [str(each).partition("[")[0] for each in exception.bases]
        (line,) = [each for each in lines if each.lstrip().startswith(f"- [`{name}`][")]

        assert base == ("Exception" if name == "EventKitError" else "EventKitError")
        assert [each for each in more if f"`{each}`" not in line] == []


def test_the_pages_of_the_site_have_no_search_entry_of_a_private_name() -> None:
    text = (SITE / "search.json").read_text(encoding="utf-8")

    assert "deliver_on_commit" in text
    assert "_core.bus" not in text


DOCSTRING = """\
Does `release()`, as `EventBus.publish` and `Silent` do.

    code = `EventBus`

    more

See https://fastapi-eventkit.readthedocs.io/commits/#tests.

Args:
    events: Of `DomainEvent`.

    All of them.
"""

PREPARED = """\
Does [`release()`][eventkit.EventContext.release], as \
[`EventBus.publish`][eventkit.EventBus.publish] and `Silent` do.

```python
code = `EventBus`

more
```

See [https://fastapi-eventkit.readthedocs.io/commits/#tests](../commits.md#tests).

Args:
    events: Of [`DomainEvent`][eventkit.DomainEvent].

    All of them."""


def test_docstrings_are_prepared(package: griffe.Module) -> None:
    owner = package["EventContext"]
    assert isinstance(owner, griffe.Alias)
    names = zensical_docstrings.public_names(package)

    assert zensical_docstrings.prepared(DOCSTRING, owner.final_target, names) == PREPARED


def test_the_types_that_are_treated_apart_exist(package: griffe.Module) -> None:
    names = {each.name for each in zensical_docstrings.objects_of(package)}

    assert zensical_docstrings._READ_ALONE - names == set()
    assert zensical_docstrings._SPELLED.keys() - names == set()


def test_links_are_made_of_the_names_of_all_public_modules() -> None:
    assert {*zensical_docstrings.PUBLIC, "eventkit_pytest"} == {*PUBLIC}
