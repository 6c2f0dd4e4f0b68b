"""What several files say of the project's habits agrees: Pythons, sessions, versions, pins."""

import ast
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import eventkit
from eventkit import _core
from tests.serving import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOXFILE = (ROOT / "noxfile.py").read_text()
PYTHONS: list[str] = ast.literal_eval(re.search(r"^PYTHONS = (.*)$", NOXFILE, re.M)[1])  # type: ignore[index]
SESSIONS: list[str] = re.findall(r"^@nox\.session.*\ndef (\w+)\(", NOXFILE, re.M)


def test_the_workflow_runs_each_python_and_sessions_that_there_are() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (checks,) = re.findall(r"^ +session: \[(.*)\]$", text, re.M)
    (first,) = re.findall(r"^ +python: \[(.*)\]$", text, re.M)
    more = re.findall(r"\{ os: \S+, python: (\S+) \}", text)

    assert sorted(each.strip('"') for each in [*first.split(", "), *more]) == PYTHONS
    assert {*checks.split(", "), *re.findall(r"nox -s (\w+)", text)} <= {*SESSIONS}


def test_the_same_pythons_are_named_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    classifiers = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    first, last = PYTHONS[0], PYTHONS[-1]
    youngest = re.search(r"^PYTHONS=\((.*)\)$", (ROOT / ".ci/debian-pythons").read_text(), re.M)

    assert classifiers == PYTHONS
    assert project["requires-python"] == f">={first}"
    assert youngest
    assert youngest[1].split() == PYTHONS[-2:]
    for page in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(r"Python (3\.\d+ to 3\.\d+)", (ROOT / page).read_text())
        assert {*named} == {f"{first} to {last}"}, page


def test_contributing_names_every_module_and_every_session() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    paths = [*eventkit.__path__, *_core.__path__]
    modules = {each.name for each in pkgutil.iter_modules(paths)}

    assert {"bus", "testing"} <= modules
    assert {"tests", "plugin"} <= {*SESSIONS}
    for name in (*modules, *SESSIONS):
        assert f"`{name}`" in contributing, f"CONTRIBUTING.md does not name {name}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_no_rights_of_its_own_and_pins_its_actions(path: Path) -> None:
    text = path.read_text()

    assert re.search(r"^permissions: \{\}$", text, re.M)
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v[\d.]+", comment), action


def test_pre_commit_runs_the_ruff_that_is_locked() -> None:
    (rev,) = re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    locked = tomllib.loads((ROOT / "uv.lock").read_text())["package"]

    assert [each["version"] for each in locked if each["name"] == "ruff"] == [rev]


def test_contributing_links_to_the_conduct_and_to_the_steps_of_a_release() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for name in ("CODE_OF_CONDUCT.md", "RELEASING.md"):
        assert (ROOT / name).exists()
        assert f"/blob/main/{name})" in contributing, name
