"""The page as a whole: how it opens, in narrow windows, with the keyboard, for screen readers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import TABS, Open, choose_tab

#: What must have a name in the tree that screen readers get.
CONTROLS = {
    *("button", "checkbox", "combobox", "link", "listbox", "option", "radio"),
    *("searchbox", "slider", "spinbutton", "switch", "tab", "textbox"),
}


def test_the_page_opens_fast_and_keeps_to_itself(visit: Open, record_property: Callable[[str, object], None]) -> None:
    page = visit()  # console, log and requests to other hosts: see the fixture
    timing = page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
    loaded = timing["loadEventEnd"] / 1000
    record_property("seconds until loaded", round(loaded, 2))
    assert 0 < loaded < 10  # 2 on a quiet machine
    assert page.title() == "genkit"
    assert page.get_by_role("tab").all_inner_texts() == list(TABS)


@pytest.mark.parametrize("tab", TABS)
def test_in_a_phone_s_window_all_is_in_reach(visit: Open, tab: str) -> None:
    page = visit(tab, width=390, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    buttons = page.locator(f"#tab-{tab.lower()}").get_by_role("button").all()
    assert buttons
    for button in buttons:
        if button.is_visible() and button.is_enabled():
            button.scroll_into_view_if_needed()
            box = button.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390, button.inner_text()


def test_generate_is_reached_and_started_by_keyboard(visit: Open) -> None:
    page = visit()
    page.get_by_label("Steps", exact=True).fill("1")
    page.get_by_label("Seeds", exact=True).fill("0")
    written = [page.get_by_label(f"Expression {k}", exact=True).input_value() for k in (1, 2, 3)]
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "compare-generate":
            break
    expect(page.locator("#compare-generate")).to_be_focused()
    outline = page.evaluate("(e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).boxShadow])(document.activeElement)")
    assert outline != ["none", "none"]  # what has the focus is seen
    page.keyboard.press("Enter")
    columns = page.locator("#compare-board section header code")
    expect(columns).to_have_text(written)  # passing by a field changes nothing
    expect(page.locator("#compare-status")).to_have_text("Done.")


def test_tabs_change_by_keyboard(visit: Open) -> None:
    page = visit()
    page.get_by_role("tab", name="Results").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#results-open")).to_be_visible()


@pytest.mark.parametrize("tab", TABS)
def test_every_control_has_a_name(visit: Open, tab: str) -> None:
    page = visit(tab)
    fill(page, tab)
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    seen = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in tree
        if not node["ignored"] and node["role"]["value"] in CONTROLS
    ]
    assert len(seen) >= 8, seen
    assert not [role for role, name in seen if not name]
    assert not [name for _, name in seen if not any(map(str.isalnum, name)) and name != "#"]  # "▲" is no name


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(visit: Open, dark: bool) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = visit(dark=dark)
    assert page.evaluate("document.body.classList.contains('dark')") == dark
    found = []
    for tab in TABS:
        choose_tab(page, tab)
        for filled in (False, True):
            if filled:
                fill(page, tab)
            for violation in Axe().run(page).response["violations"]:
                where = [f"{node['target'][0]}: {node['failureSummary']}" for node in violation["nodes"]]
                if violation["impact"] in ("serious", "critical"):
                    found.append(f"{tab}: {violation['id']} ({violation['impact']}) at {where}")
    assert not found, "\n".join(dict.fromkeys(found))


def fill(page: Page, tab: str) -> None:
    """Bring a tab's results on the page, and a message."""
    if tab == "Compare":
        page.get_by_label("Seeds", exact=True).fill("0")
        page.get_by_label("Steps", exact=True).fill("2")
        page.locator("#compare-generate").click()
        expect(page.locator("#compare-status")).to_have_text("Done.")
        page.get_by_label("Expression 1", exact=True).fill("CFG(")
        page.get_by_label("Expression 1", exact=True).blur()
        page.locator("#compare-expression-1-error").get_by_role("alert").wait_for()
    elif tab == "Trajectory":
        page.locator("#trajectory-steps").get_by_role("spinbutton").fill("2")
        page.locator("#trajectory-run").click()
        page.locator("#trajectory-image img").wait_for()
    elif tab == "Autoregressive":
        page.locator("#ar-run").click()
        page.locator("#ar-image img").wait_for()
        expect(page.locator("#ar-status")).to_contain_text("tokens/s")
    else:
        page.locator("#results-open").click()
        page.locator("#results-plot").get_by_role("img").first.wait_for()
