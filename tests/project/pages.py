"""The README and the pages of the documentation: how tests read and run their programs."""

import ast
import inspect
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import anyio
import pytest
from sqlalchemy import Engine

from eventkit.outbox import Outbox
from tests.filters import filter_options
from tests.serving import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
# The reference is apart: its pages run nothing, and `fastapi.md` is no module of that name.
REFERENCE = DOCS / "reference"
PAGES = [
    README,
    *(page for page in sorted(DOCS.glob("**/*.md")) if REFERENCE not in page.parents),
]
FENCED = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# How a block begins that is a file of its own, or a part of one.
A_FILE = re.compile(r"# ([\w/]+\.py(?:, .*)?)\n")
# What pages import, and is compiled: a new Python may be without it.
COMPILED = {"greenlet": "sqlalchemy.ext.asyncio", "msgspec": "msgspec"}


class RunPage(Protocol):
    """The fixture `run_page`."""

    def __call__(self, page: Path, instead: Mapping[str, str] = ...) -> ModuleType:
        """Run all Python blocks of a page one after the other, as one module.

        Args:
            page: Its file.
            instead: What to run instead of some of its texts.
        """
        ...


def blocks(*pages: Path) -> dict[str, str]:
    """The blocks of pages that begin with the comment of a file, by that comment."""
    found = [block for page in pages for block in FENCED.findall(page.read_text())]
    return {comment[1]: block for block in found if (comment := A_FILE.match(block))}


def first_block(page: Path) -> str:
    block = FENCED.search(page.read_text())
    assert block
    return block[1]


def replaced(text: str, instead: Mapping[str, str]) -> str:
    for old, new in instead.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def execute(page: Path, module: ModuleType, instead: Mapping[str, str] = {}) -> None:
    """Run all Python blocks of a page in a module, except files of a project and their parts."""
    for package, imported in COMPILED.items():
        if re.search(rf"^(import|from) {re.escape(imported)}\b", page.read_text(), re.MULTILINE):
            pytest.importorskip(package)
    text = replaced(page.read_text(), instead)
    for block in FENCED.finditer(text):
        if A_FILE.match(block[1]):
            continue
        line = text.count("\n", 0, block.start(1))
        code = compile(
            "\n" * line + block[1], str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        if code.co_flags & inspect.CO_COROUTINE:
            namespace = vars(module)

            async def body(code: object = code, namespace: dict[str, object] = namespace) -> None:
                await eval(code, namespace)  # type: ignore[arg-type]

            anyio.run(body)
        else:
            exec(code, vars(module))


def close(opened: dict[str, Any]) -> None:  # Any: whatever a page has
    """Close what a page has opened, except async engines: these have opened nothing."""
    for name in ("outbox", "engine", "patient"):
        each = opened.get(name)
        if isinstance(each, Outbox):
            each.detach()
        elif isinstance(each, Engine):
            each.dispose()


def run_project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, passed: int) -> None:
    """Run the tests in the folder of `pytester`. A warning of a module there is an error."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    installed = any(each.name == "eventkit" for each in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "eventkit_pytest"]
    filters = filter_options(*(path.stem for path in pytester.path.glob("*.py")))

    unused = ["-p", "no:asyncio", "-p", "no:hypothesispytest"]  # the latter takes long to import
    result = pytester.runpytest_subprocess("-q", *unused, *filters, *plugin)
    result.assert_outcomes(passed=passed)
