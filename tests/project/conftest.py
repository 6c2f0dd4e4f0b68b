"""What tests of pages share: a folder for the files of a page, and pages that are run."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from tests.project.pages import RunPage, close, execute


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def run_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPage]:
    """Run pages in a folder of their own, and leave nothing of them.

    Their names are given back: `benchmarks` is a package's, too.
    """
    monkeypatch.chdir(tmp_path)
    modules: list[ModuleType] = []

    def run(page: Path, instead: Mapping[str, str] = {}) -> ModuleType:
        module = ModuleType(page.stem)
        monkeypatch.setitem(sys.modules, page.stem, module)
        modules.append(module)
        execute(page, module, instead)
        return module

    yield run
    for module in modules:
        close(vars(module))
