"""The page about transactions: its example with SQLModel runs, and its warnings are written."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData
from starlette.testclient import TestClient

from tests.project.messages import unsaid
from tests.project.pages import DOCS, blocks

PAGE = DOCS / "commits.md"


@pytest.fixture
def heroes(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program, with a database of its own. Any: a module that no type checker knows."""
    pytest.importorskip("greenlet")
    sqlmodel = pytest.importorskip("sqlmodel", reason="pip install sqlmodel, for its tests")
    # An example has a table of this name, too.
    monkeypatch.setattr(sqlmodel.SQLModel, "metadata", MetaData())
    (project / "heroes.py").write_text(blocks(PAGE)["heroes.py"])
    module = importlib.import_module("heroes")
    yield module
    module.engine.dispose()


def test_a_hero_of_sqlmodel_is_greeted_once_committed(
    heroes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = TestClient(heroes.app, raise_server_exceptions=False)

    assert client.post("/heroes/Ada").json() == {"name": "Ada"}
    assert client.post("/heroes/Ada").status_code == 500  # the name is taken
    assert capsys.readouterr().out == "welcome, Ada\n"


def test_the_warnings_of_the_page_are_those_of_the_package() -> None:
    page = PAGE.read_text()
    section = page[page.index("## The warnings") : page.index("## Tests in a transaction")]
    warnings = re.findall(r"^`(.*)`$", section, re.MULTILINE)

    assert len(warnings) == 4
    assert unsaid(warnings) == []
