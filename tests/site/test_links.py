"""Each link and each anchor of the built site leads somewhere, and nothing comes from elsewhere."""

import re
import subprocess
from pathlib import Path
from urllib.parse import urljoin

import pytest

from tests.serving import ROOT
from tests.site.built import (
    RAW_URL,
    REPO_URL,
    SITE,
    SITE_URL,
    Page,
    css_urls,
    file_of,
    in_nav,
    problem_of,
    read,
    served_at,
)


def test_each_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    broken = [
        f"{path.relative_to(SITE)}: {link}: {problem}"
        for path, page in pages.items()
        for link in dict.fromkeys(page.links)
        if (problem := problem_of(urljoin(page.url, link), pages))
    ]

    assert len(pages) > 20
    assert not broken, "\n".join(broken)


def test_what_a_page_loads_is_a_file_of_the_site(pages: dict[Path, Page]) -> None:
    foreign = [
        f"{path.relative_to(SITE)}: {loaded}"
        for path, page in pages.items()
        for loaded in dict.fromkeys(page.loaded)
        if not is_ours(urljoin(page.url, loaded))
    ]

    assert all(page.loaded for page in pages.values())
    assert not foreign, "\n".join(foreign)


def test_what_a_style_sheet_loads_is_a_file_of_the_site() -> None:
    sheets = [*SITE.rglob("*.css")]
    foreign = [
        f"{path.relative_to(SITE)}: {loaded}"
        for path in sheets
        for loaded in css_urls(path.read_text(encoding="utf-8"))
        if not is_ours(urljoin(f"{SITE_URL}{path.relative_to(SITE).as_posix()}", loaded))
    ]

    assert sheets
    assert not foreign, "\n".join(foreign)


def is_ours(url: str) -> bool:
    return url.startswith(SITE_URL) and file_of(url.partition("#")[0]).is_file()


def test_each_page_is_in_the_navigation_once_or_linked_from_one_that_is(
    pages: dict[Path, Page],
) -> None:
    listed = [SITE / served_at(source)[1:] / "index.html" for source in in_nav()]
    linked = {
        file_of(urljoin(pages[path].url, link).partition("#")[0])
        for path in listed
        for link in pages[path].links
        if urljoin(pages[path].url, link).startswith(SITE_URL)
    }

    assert len({*listed}) == len(listed)
    assert {*pages} - {*listed} - linked == {SITE / "404.html"}


def test_what_files_of_the_project_name_on_the_site_and_in_the_repository_exists(
    pages: dict[Path, Page],
) -> None:
    command = ["git", "ls-files", "*.md", "*.py", "*.toml", "*.yaml", "*.yml"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    ours = "|".join(map(re.escape, (SITE_URL, f"{REPO_URL}/", RAW_URL)))
    addresses = re.compile(rf"(?:{ours})[^\s)\"'`>\]{{}}]*")
    broken = [
        f"{name}: {url}: {problem}"
        for name in listed.splitlines()
        if not name.startswith("tests/site/")
        for url in addresses.findall((ROOT / name).read_text(encoding="utf-8"))
        if (problem := problem_of(url.rstrip(".,;:"), pages))
    ]

    assert "README.md" in listed
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="../nowhere/">', "no such page"),
        ('<a href="#nowhere">', "no such anchor"),
        ('<a href="../changelog/#nowhere">', "no such anchor"),
        (f'<a href="{SITE_URL}nowhere/">', "no such page"),
        (f'<a href="{REPO_URL}/blob/main/nowhere.py">', "no such file"),
        (f'<a href="{REPO_URL}/tree/main/nowhere">', "no such folder"),
        (f'<a href="{REPO_URL}/blob/old/README.md">', "not the branch main"),
        (f'<a href="{REPO_URL}/isues">', "no page of the host"),
        (f'<a href="{RAW_URL}main/nowhere.svg">', "no such file"),
        ('<a href="ftp://example.org">', "neither on the site nor on another"),
        ('<a href="../changelog/#here" id="here">', "no such anchor"),
        ('<a href="#here" id="here">', None),
        ('<a href="../changelog/">', None),
        (f'<a href="{REPO_URL}/issues">', None),
        (f'<a href="{RAW_URL}main/docs/timeline.svg">', None),
    ],
)
def test_the_check_finds_a_link_that_leads_nowhere(
    html: str, problem: str | None, pages: dict[Path, Page]
) -> None:
    page = read(html, f"{SITE_URL}planted/")
    known = {**pages, SITE / "planted" / "index.html": page}
    (link,) = page.links

    assert problem_of(urljoin(page.url, link), known) == problem


@pytest.mark.parametrize(
    "html",
    [
        '<link rel="stylesheet" href="https://fonts.example.org/a.css">',
        '<link rel="preconnect" href="https://fonts.example.org">',
        '<script src="//example.org/a.js"></script>',
        '<img alt="" src="https://example.org/a.png">',
        '<img alt="" srcset="https://example.org/a.png 2x">',
        '<p style="background: url(https://example.org/a.png)">',
    ],
)
def test_the_check_finds_what_comes_from_another_host(html: str) -> None:
    page = read(html, f"{SITE_URL}planted/")
    (loaded,) = page.loaded

    assert not is_ours(urljoin(page.url, loaded))
