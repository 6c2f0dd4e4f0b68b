"""What several files say of the project's habits agrees: Pythons, sessions, versions, pins."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOXFILE = (ROOT / "noxfile.py").read_text()


def test_the_workflow_runs_each_python_and_sessions_that_there_are() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    pythons: list[str] = ast.literal_eval(re.search(r"^PYTHONS = (.*)$", NOXFILE, re.M)[1])  # type: ignore[index]
    sessions = re.findall(r"^@nox\.session.*\ndef (\w+)\(", NOXFILE, re.M)
    (checks,) = re.findall(r"^ +session: \[(.*)\]$", text, re.M)
    (first,) = re.findall(r"^ +python: \[(.*)\]$", text, re.M)
    more = re.findall(r"\{ os: \S+, python: (\S+) \}", text)

    assert sorted(each.strip('"') for each in [*first.split(", "), *more]) == pythons
    assert {*checks.split(", "), *re.findall(r"nox -s (\w+)", text)} <= {*sessions}


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
