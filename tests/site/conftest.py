"""What the tests of the documentation site share: the built site, a server, a browser."""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.conftest import require
from tests.serving import ROOT
from tests.site import built

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session", autouse=True)
def site() -> None:
    """The site is there, and newer than its sources."""
    index = built.SITE / "index.html"
    if not index.is_file():
        pytest.fail("there is no site yet: zensical build --clean --strict")
    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "eventkit").rglob("*.py")]
    since = index.stat().st_mtime
    newer = [str(each.relative_to(ROOT)) for each in sources if each.stat().st_mtime > since]
    if newer:
        pytest.fail(f"the site is older than {newer}: zensical build --clean --strict")


@pytest.fixture(scope="session")
def pages() -> dict[Path, built.Page]:
    """All pages of the site, read once."""
    return built.pages()


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site without a line for each request."""

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture(scope="session")
def origin() -> Iterator[str]:
    """Serve the site, and give its address."""
    handler = partial(Quiet, directory=str(built.SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium of the system's; see `require` where there is none."""
    found = [path for path in map(shutil.which, PROGRAMS) if path is not None]
    if not found:
        require(f"no browser in the path: {', '.join(PROGRAMS)}")
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found[0], args=["--no-sandbox"] if is_root else []
        )
        yield browser
        browser.close()
