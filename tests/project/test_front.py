"""What a newcomer sees first: the README, the first page of the site, the version."""

import re
import tomllib
from importlib.metadata import version
from types import ModuleType

import pytest
from starlette.testclient import TestClient

import eventkit
from tests.project.pages import DOCS, README, first_block
from tests.serving import ROOT


def test_the_readme_has_absolute_links_alone() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text())

    assert len(targets) > 10
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_first_program_answers_and_greets(capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("first")  # as the reader saves it
    exec(compile(first_block(README), "first.py", "exec"), vars(module))

    with TestClient(module.app) as client:
        assert client.post("/users/Ada").status_code == 201

    assert capsys.readouterr().out == "Welcome, Ada!\n"


def test_the_first_program_has_twelve_lines_beside_its_imports() -> None:
    first = first_block(README)
    lines = [line for line in first.splitlines() if line and not line.startswith("from ")]

    assert len(lines) == 12
    assert first_block(DOCS / "index.md") == first


def test_the_newcomers_commands_stand_in_the_readme() -> None:
    readme = README.read_text()

    for session in ("demo", "tests"):
        command = f".venv/bin/pip install -q nox && .venv/bin/nox -s {session}\n"
        assert f"\npython3 -m venv .venv && {command}" in readme


def test_the_version_is_said_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"] == {"path": "eventkit/__init__.py"}
    assert eventkit.__version__ == version("fastapi-eventkit")


def test_the_package_says_where_to_find_things() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]

    assert {*urls} == {"Documentation", "Source", "Changelog", "Issues", "Security"}
