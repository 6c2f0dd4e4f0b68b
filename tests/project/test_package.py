"""What the package promises as a whole: its front door, its docstrings, what importing it costs."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import eventkit

MODULES = sorted(Path(eventkit.__file__).parent.rglob("*.py"))
# rich is left out: structlog imports it where it is installed.
OPTIONAL = {
    "aiosqlite",
    "click",
    "fastapi",
    "faststream",
    "httpx",
    "msgspec",
    "pydantic",
    "pytest",
    "sqlalchemy",
    "stamina",
    "trio",
    "uvicorn",
}


def test_the_front_door_lists_each_public_name_once_in_order() -> None:
    public = {
        name
        for name, value in vars(eventkit).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }

    assert eventkit.__all__ == sorted(public)


@pytest.mark.parametrize("name", eventkit.__all__)
def test_each_public_name_and_each_public_method_has_a_docstring(name: str) -> None:
    public = getattr(eventkit, name)
    members = vars(public).items() if inspect.isclass(public) else ()
    described = {
        name: public,
        **{
            f"{name}.{member}": value
            for member, value in members
            if not member.startswith("_")
            and (inspect.isroutine(value) or isinstance(value, property))
        },
    }

    # A dataclass without a docstring gets its signature as one.
    missing = [
        name
        for name, value in described.items()
        if (value.__doc__ or f"{name}(").startswith(f"{name}(")
    ]

    assert missing == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_each_module_says_in_its_first_line_what_it_owns(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))

    assert docstring is not None
    assert docstring.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize(
    "name",
    ["eventkit", "eventkit.starlette", "eventkit.testing", "eventkit._cli", "eventkit.__main__"],
)
def test_importing_what_is_for_everybody_pulls_in_nothing_optional(name: str) -> None:
    script = f"import json, sys, {name}; print(json.dumps(list(sys.modules)))"
    imported = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )

    assert OPTIONAL & set(json.loads(imported.stdout)) == set()


@pytest.mark.parametrize(
    ("extra", "package"),
    [
        ("fastapi", "fastapi"),
        ("faststream", "faststream"),
        ("faststream", "pydantic"),
        ("faststream", "stamina"),
        ("sqlalchemy", "sqlalchemy"),
    ],
)
def test_importing_an_adapter_without_its_extra_names_the_extra(extra: str, package: str) -> None:
    if extra != package:  # the package is looked for after those that are missing anyhow
        pytest.importorskip(extra)
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing)\n"
        f"try:\n    import eventkit.{extra}\n"
        "except ModuleNotFoundError as error:\n    print(error.name, error, sep=': ')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )

    assert ended.stdout.strip() == (
        f"{package}: eventkit.{extra} needs {package}, which is not installed: "
        f"install fastapi-eventkit[{extra}]"
    )


def test_the_bridge_imports_no_client_of_a_broker() -> None:
    pytest.importorskip("faststream")
    script = (
        "import sys; sys.modules['nats'] = sys.modules['faststream.nats'] = None\n"
        "import eventkit.faststream\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] in "
        "('aio_pika', 'aiokafka', 'redis')))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )

    assert ended.stdout.strip() == "[]"
