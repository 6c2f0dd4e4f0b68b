"""The documentation as it was built into `site/`: its pages, and what they link to and load."""

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from tests.serving import ROOT

SITE = ROOT / "site"
CONFIG: dict[str, Any] = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))[
    "project"
]
SITE_URL: str = CONFIG["site_url"]
REPO_URL: str = CONFIG["repo_url"]
RAW_URL = f"{REPO_URL.replace('github.com', 'raw.githubusercontent.com')}/"
# Pages that the host of the repository makes.
MADE_BY_THE_HOST = {"discussions", "issues", "security/advisories/new"}

# What a `<link>` only says, and no browser loads.
SAID = {"alternate", "canonical", "next", "prev"}
LOADING = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
}
# In style sheets, and in the style of an element.
CSS_URL = re.compile(r"""url\(\s*["']?(?!data:)([^"')]+)|@import\s+["']([^"']+)""")


@dataclass
class Page:
    """One page of the site.

    Attributes:
        url: Where it is served.
        anchors: What a link can lead to in it.
        links: What its reader can follow, as it is written.
        loaded: What the browser loads with it, as it is written.
    """

    url: str
    anchors: set[str] = field(default_factory=set[str])
    links: list[str] = field(default_factory=list[str])
    loaded: list[str] = field(default_factory=list[str])


class _Reader(HTMLParser):
    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page = page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.page.anchors |= {given[name] for name in ("id", "name") if name in given}
        if "style" in given:
            self.page.loaded += css_urls(given["style"])
        if tag == "link" and {*given.get("rel", "").split()} <= SAID:
            self.page.links.append(given["href"])
            return
        if tag in ("a", "area") and "href" in given:
            self.page.links.append(given["href"])
        for name in LOADING.get(tag, ()):
            if name in given:
                candidates = given[name].split(",") if name == "srcset" else [given[name]]
                self.page.loaded += [each.split()[0] for each in candidates]


def css_urls(text: str) -> list[str]:
    """What a style sheet loads."""
    return [one or other for one, other in CSS_URL.findall(text)]


def read(html: str, url: str) -> Page:
    """Read a page that is served at this address."""
    page = Page(url)
    reader = _Reader(page)
    reader.feed(html)
    reader.close()
    return page


def pages() -> dict[Path, Page]:
    """Read all pages of the site, each by its file."""
    return {
        path: read(path.read_text(encoding="utf-8"), address_of(path))
        for path in sorted(SITE.rglob("*.html"))
    }


def address_of(path: Path) -> str:
    """Where a file of the site is served."""
    return urljoin(SITE_URL, path.relative_to(SITE).as_posix().removesuffix("index.html"))


def file_of(url: str) -> Path:
    """Which file is served under an address of the site."""
    path = SITE / unquote(url.removeprefix(SITE_URL).partition("?")[0])
    return path / "index.html" if url.endswith("/") or url == SITE_URL else path


def problem_of(url: str, known: dict[Path, Page]) -> str | None:
    """Say why a link leads nowhere, as far as this can be known without a network."""
    address, anchor = urldefrag(url)
    if address.startswith(SITE_URL):
        path = file_of(address)
        if path not in known and not path.is_file():
            return "no such page"
        if anchor and path in known and unquote(anchor) not in known[path].anchors:
            return "no such anchor"
    elif address.startswith(f"{REPO_URL}/"):
        return problem_in_repository(address.removeprefix(f"{REPO_URL}/"))
    elif address.startswith(RAW_URL):
        return problem_in_repository(f"raw/{address.removeprefix(RAW_URL)}")
    elif not address.startswith(("https://", "http://", "mailto:")):
        return "neither on the site nor on another"
    return None


def problem_in_repository(rest: str) -> str | None:
    """Say what is wrong with a link into the repository, by the files that are here."""
    kind, _, path = rest.partition("/")
    branch, _, path = path.partition("/")
    if kind not in {"blob", "edit", "raw", "tree"}:
        return None if rest in MADE_BY_THE_HOST else "no page of the host"
    if branch != "main":
        return "not the branch main"
    target = ROOT / unquote(path)
    exists = target.is_dir() if kind == "tree" else target.is_file()
    return None if exists else f"no such {'folder' if kind == 'tree' else 'file'}"


def in_nav(entries: Iterable[Any] | None = None) -> Iterator[str]:
    """The source files of the navigation, in its order."""
    for entry in CONFIG["nav"] if entries is None else entries:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from in_nav([value] if isinstance(value, str) else value)


def served_at(source: str) -> str:
    """The path under which a page of `docs/` is served."""
    stem = source.removesuffix(".md")
    return f"/{stem.removesuffix('index')}" if stem.endswith("index") else f"/{stem}/"
