"""The example with SQLModel on the page about transactions does as it says."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.project.test_docs import FENCED, ROOT

pytest.importorskip("greenlet")
pytest.importorskip("sqlmodel", reason="pip install sqlmodel, for its tests")

TITLE = "# heroes.py\n"


@pytest.fixture
def heroes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program, with a database of its own. Any: a module that no type checker knows."""
    page = (ROOT / "docs" / "commits.md").read_text()
    (block,) = [each[1] for each in FENCED.finditer(page) if each[1].startswith(TITLE)]
    (tmp_path / "heroes.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.import_module("heroes")
    yield module
    del sys.modules["heroes"]
    module.engine.dispose()


def test_a_hero_of_sqlmodel_is_greeted_once_committed(
    heroes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = TestClient(heroes.app, raise_server_exceptions=False)

    assert client.post("/heroes/Ada").json() == {"name": "Ada"}
    assert client.post("/heroes/Ada").status_code == 500  # the name is taken
    assert capsys.readouterr().out == "welcome, Ada\n"
