"""The tab that opens runs of genkit-eval."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open, pick
from tests.browser.server import GUIDANCES, RUN


def column(page: Page, heading: str) -> list[str]:
    """The texts of a column."""
    headings = [text.splitlines()[0] for text in page.locator("#results-table th").all_inner_texts()]
    place = next(k for k, text in enumerate(headings, 1) if text.startswith(heading))
    return [text.splitlines()[0] for text in page.locator(f"#results-table tbody td:nth-child({place})").all_inner_texts()]


@pytest.fixture
def opened(visit: Open) -> Page:
    page = visit("Results")
    page.locator("#results-open").click()
    page.locator("#results-table tbody tr").first.wait_for()
    return page


def test_a_run_is_shown_with_table_plot_and_grids(opened: Page) -> None:
    expect(opened.locator("#results-folder input")).to_have_value(RUN)
    assert column(opened, "guidance") == list(GUIDANCES)
    expect(opened.locator("#results-plot").get_by_role("img").first).to_be_visible()
    expect(opened.locator("#results-grids img")).to_have_count(len(GUIDANCES))


def test_a_click_on_a_heading_sorts_by_number(opened: Page) -> None:
    unsorted = [float(text) for text in column(opened, "FD")]
    heading = opened.locator("#results-table th button").filter(has_text=re.compile("^FD"))
    for rising in (True, False):
        heading.press("Enter") if rising else heading.click()
        expect(opened.locator("#results-table th[aria-sort]")).to_have_attribute(
            "aria-sort", "ascending" if rising else "descending"
        )
        assert [float(text) for text in column(opened, "FD")] == sorted(unsorted, reverse=not rising)
    assert sorted(column(opened, "guidance")) == sorted(GUIDANCES)


def test_the_plot_follows_its_axes(opened: Page) -> None:
    plot = opened.locator("#results-plot").get_by_role("img").first
    before = plot.get_attribute("alt") or plot.get_attribute("aria-label")
    pick(opened.get_by_label("Across"), re.compile("^NFE"))
    pick(opened.get_by_label("Up"), re.compile("^recall", re.IGNORECASE))
    plot = opened.get_by_role("img", name=re.compile("recall.* over NFE", re.IGNORECASE)).first
    expect(plot).to_be_visible()
    assert before is not None


@pytest.mark.parametrize("name", ["../..", "/etc", "no-such-run"])
def test_what_is_no_run_is_told_at_the_field(visit: Open, name: str) -> None:
    page = visit("Results")
    page.get_by_label("Run folder").fill(name)
    page.get_by_label("Run folder").press("Enter")
    page.locator("#results-open").click()
    expect(page.locator("#results-folder-error").get_by_role("alert")).to_be_visible()
