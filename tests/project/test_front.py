"""What a newcomer sees first: the README, the first page of the site, the links, the version."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from starlette.testclient import TestClient

import eventkit
from tests.project.test_docs import FENCED, ROOT

SITE = "https://fastapi-eventkit.readthedocs.io/"
REPOSITORY = "https://github.com/fastapi-eventkit/fastapi-eventkit"
RAW = "https://raw.githubusercontent.com/fastapi-eventkit/fastapi-eventkit/main/"
# Pages that the host of the repository makes.
MADE_BY_THE_HOST = {"", "/issues", "/security/advisories/new", "/discussions"}
LINKING = [
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "*.toml", "docs/**/*.md", ".github/**/*.*")
    for path in sorted(ROOT.glob(pattern))
]


def file_of(url: str) -> tuple[Path, str] | None:
    """The file and the anchor that a link of ours leads to; None where the host makes the page."""
    url, _, anchor = url.partition("#")
    if url.startswith(SITE):
        name = url.removeprefix(SITE).strip("/") or "index"
        page = ROOT / "docs" / f"{name}.md"
        return (page if page.exists() else ROOT / "docs" / name / "index.md"), anchor
    if url.startswith(RAW):
        return ROOT / url.removeprefix(RAW), anchor
    path = url.removeprefix(REPOSITORY).removesuffix(".git")
    if path.rstrip("/") in MADE_BY_THE_HOST:
        return None
    kind, _, name = path.removeprefix("/").partition("/main/")
    assert kind in ("blob", "tree", "edit"), url
    assert (kind == "tree") == (ROOT / name).is_dir(), f"{url} has the wrong kind"
    return ROOT / name, anchor


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", each).strip().lower()) for each in headings
    }


@pytest.mark.parametrize("name", LINKING)
def test_every_absolute_link_to_ourselves_leads_to_a_file(name: str) -> None:
    for url in re.findall(rf"(?:{SITE}|{REPOSITORY}|{RAW})[^\s\"')>`]*", (ROOT / name).read_text()):
        if found := file_of(url):
            file, anchor = found
            assert file.exists(), f"{name} links to {url}"
            assert not anchor or anchor in anchors(file), f"{name} links to {url}"


def test_the_readme_has_absolute_links_alone() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", readme)

    assert len(targets) > 10
    assert [target for target in targets if not target.startswith("https://")] == []


def first_program(page: Path) -> ModuleType:
    """Run the first block of a page alone, as the module that a reader saves."""
    block = FENCED.search(page.read_text())
    assert block
    module = ModuleType("first")
    exec(compile(block[1], "first.py", "exec"), vars(module))
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_program_answers_and_greets(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(first_program(ROOT / page).app) as client:
        assert client.post("/users/Ada").status_code == 201

    assert capsys.readouterr().out == "Welcome, Ada!\n"


def test_the_first_program_has_twelve_lines_beside_its_imports() -> None:
    first, *_ = FENCED.findall((ROOT / "README.md").read_text())
    lines = [line for line in first.splitlines() if line and not line.startswith("from ")]

    assert len(lines) == 12
    assert FENCED.findall((ROOT / "docs/index.md").read_text())[0] == first


def test_the_newcomers_commands_stand_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()

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
