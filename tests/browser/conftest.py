"""A headless Chromium on the app. What holds for every test is checked after each: quiet console, quiet log, no other host."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:  # so that the tests are collected, and skipped, where playwright is not installed
    from playwright.sync_api import Browser, Locator, Page

    from tests.browser.server import Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: Milliseconds for one thing to happen on a busy machine.
PATIENCE = 60_000

TABS = ("Compare", "Trajectory", "Autoregressive", "Results")

Open = Callable[..., "Page"]


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """The browser; ends with this folder's tests, because Playwright keeps an event loop running in this thread."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"the app is not tested in a browser: there is no {BROWSERS[0]} (Debian, Ubuntu: apt install chromium)")
    if missing := [name for name in ("playwright", "axe_playwright_python", "gradio") if find_spec(name) is None]:
        pytest.skip(f"the app is not tested in a browser: {', '.join(missing)} not installed (pip install -e '.[all,dev]')")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.browser.server import Server

    started = Server(tmp_path_factory.mktemp("app"))
    yield started
    started.stop()


@pytest.fixture
def visit(chromium: Browser, server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Open]:
    """``visit(tab="Results", width=390, dark=True)``: a page on a tab, in a new profile."""
    contexts, wrong = [], list[str]()
    before = len(server.log())

    def noted(kind: str, text: str) -> None:
        wrong.append(f"{kind}: {text}")

    def visit(tab: str = "Compare", width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        size: Any = {"width": width, "height": height}
        context = chromium.new_context(viewport=size, color_scheme="dark" if dark else "light", accept_downloads=True)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("request", lambda r: None if own(r.url) else noted("request to another host", r.url))
        page = context.new_page()
        page.on("console", lambda m: noted("console", m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: noted("page error", str(error)))
        page.goto(server.url, wait_until="domcontentloaded")  # never "networkidle": a stream of events stays open
        page.locator("#compare-low-3").wait_for()  # the cards are drawn after the page has opened
        if tab != "Compare":
            choose_tab(page, tab)
        return page

    def own(url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme in ("data", "blob") or parts.netloc == urlsplit(server.url).netloc

    yield visit
    for number, context in enumerate(contexts):
        for page in context.pages:
            if "Traceback (most recent call last)" in page.content():
                noted("page", "shows a traceback")
            if request.node.stash.get(FAILED, False):
                page.screenshot(path=tmp_path / f"failed-{number}.png", full_page=True)
        context.close()
    log = server.log()[before:]
    if "Traceback" in log or "unexpected error" in log:
        noted("log of the app", log)
    assert not wrong, "\n".join(wrong)


def choose_tab(page: Page, name: str) -> None:
    """Show a tab; in a narrow window it may stand in the menu of those that have no room."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator("#tabs .overflow-menu > button").click()
        tab = page.locator("#tabs .overflow-dropdown").get_by_text(name, exact=True)
    tab.click()
    page.locator(f"#tab-{name.lower()}").wait_for()


def pick(control: Locator, option: str | re.Pattern[str]) -> None:
    """Choose from a list. An earlier list fades out slowly on a busy machine, and its options are found as well."""
    from playwright.sync_api import expect

    options = control.page.get_by_role("option")
    expect(options).to_have_count(0)
    control.click()
    control.page.get_by_role("option", name=option, exact=True).click()
    expect(options).to_have_count(0)


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if report.failed:
        item.stash[FAILED] = True
    elif report.skipped and "not tested in a browser" in report.longrepr[2]:
        report.longrepr = (__file__, 1, report.longrepr[2])  # of one place, so that pytest says it once
    return report
