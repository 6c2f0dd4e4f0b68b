"""The site in a real browser: it renders, finds, turns dark, fits a phone, and asks nobody else."""

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Response, expect

from tests.site.built import in_nav, served_at

SOURCES = [*in_nav()]
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

Open = Callable[..., Page]


@pytest.fixture
def trouble() -> list[str]:
    """What went wrong in the browser."""
    return []


@pytest.fixture
def visit(browser: Browser, origin: str, trouble: list[str]) -> Iterator[Open]:
    """Open a page of the site in a window of its own; nothing may go wrong until the test ends."""
    contexts: list[BrowserContext] = []

    def visit(path: str, **options: object) -> Page:
        context = browser.new_context(**{"viewport": DESK, **options})  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        watch(context, page)
        page.goto(f"{origin}{path}", wait_until="networkidle")
        return page

    def watch(context: BrowserContext, page: Page) -> None:
        def asked(request: Request) -> None:
            if not request.url.startswith((f"{origin}/", "data:", "blob:")):
                trouble.append(f"left the site: {request.url}")

        def answered(response: Response) -> None:
            if response.status >= 400:
                trouble.append(f"{response.status}: {response.url}")

        context.on("request", asked)
        context.on("response", answered)
        context.on("requestfailed", lambda request: trouble.append(f"failed: {request.url}"))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "console",
            lambda message: trouble.append(message.text) if message.type == "error" else None,
        )

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.mark.parametrize("source", SOURCES)
def test_the_page_renders_and_fits_a_phone(source: str, visit: Open) -> None:
    page = visit(served_at(source))

    assert page.title().endswith("eventkit")
    expect(page.locator("h1:visible")).to_have_count(1)
    assert page.locator("h1").inner_text().strip()
    assert all(
        image.evaluate("image => image.complete && image.naturalWidth > 0")
        for image in page.locator("article img").all()
    )
    code = page.locator("article .highlight pre").count()
    assert (page.locator("article .md-code__button[data-md-type=copy]").count() > 0) == (code > 0)

    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window


def test_the_search_finds_a_name_and_leads_to_it(visit: Open, origin: str) -> None:
    page = visit("/")
    page.keyboard.press("Control+k")
    # Typed before this has the focus, the letters are shortcuts of the page.
    page.locator("dialog[aria-label=Search] input").first.fill("deliver_on_commit")
    results = page.locator("dialog[aria-label=Search] a")
    results.first.wait_for()
    found = [re.sub(r"\?[^#]*", "", result.get_attribute("href") or "") for result in results.all()]
    assert found[0] == f"{origin}/reference/sqlalchemy/#eventkit.sqlalchemy.deliver_on_commit"
    assert any(each.startswith(f"{origin}/commits/") for each in found[:5])

    page.keyboard.press("Enter")
    page.wait_for_url("**/reference/sqlalchemy/**")
    expect(page.locator("[id='eventkit.sqlalchemy.deliver_on_commit']")).to_be_in_viewport()


def test_the_switch_goes_from_the_systems_preference_to_light_and_to_dark(visit: Open) -> None:
    page = visit("/reference/bus/", color_scheme="light")
    body = page.locator("body")
    expect(body).to_have_attribute("data-md-color-scheme", "default")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)

    page.get_by_title("Switch to light mode").click()
    page.get_by_title("Switch to dark mode").click()
    expect(body).to_have_attribute("data-md-color-scheme", "slate")
    assert page.evaluate(background) != light

    page.reload(wait_until="networkidle")  # it is remembered
    expect(body).to_have_attribute("data-md-color-scheme", "slate")


def test_the_systems_preference_for_dark_is_kept(visit: Open) -> None:
    page = visit("/", color_scheme="dark")

    expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate")


def test_the_page_for_missing_pages_says_404(visit: Open) -> None:
    page = visit("/404.html")

    expect(page.get_by_role("heading", level=1)).to_contain_text("404")


def test_a_request_that_leaves_the_site_is_noticed(visit: Open, trouble: list[str]) -> None:
    page = visit("/")
    page.evaluate("fetch('http://127.0.0.1:9/elsewhere').catch(() => null)")

    assert any(each.startswith("left the site: http://127.0.0.1:9/") for each in trouble)
    page.context.close()  # what else the browser says of it has come then
    trouble.clear()
