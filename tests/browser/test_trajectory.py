"""The tab that follows one image through its steps."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open

GUIDANCE = "Interval(CFG(3.0), 0.28, 5.42)"
WRITTEN = re.compile(r"^Interval\(CFG\(3\.0\), (\S+), (\S+)\)$")


def end(page: Page, which: str) -> float:
    """The upper or lower end of the interval, as the expression says."""
    found = WRITTEN.match(page.locator("#trajectory-guidance").get_by_role("textbox").input_value())
    assert found is not None
    return float(found[["lower", "upper"].index(which) + 1])


@pytest.mark.parametrize(("which", "key", "grows"), [("upper", "ArrowLeft", True), ("lower", "ArrowRight", False)])
def test_the_range_slider_moves_by_keyboard_and_rewrites_the_expression(visit: Open, which: str, key: str, grows: bool) -> None:
    page = visit("Trajectory")
    expression = page.locator("#trajectory-guidance").get_by_role("textbox")
    expect(expression).to_have_value(GUIDANCE)
    before = end(page, which)
    thumb = page.locator("#trajectory-interval").get_by_role("slider", name=re.compile(f"{which} end"))
    thumb.focus()
    for _ in range(20):
        thumb.press(key)
    told = page.locator("#trajectory-interval output")
    low, high = re.findall(r"[\d.]+", told.inner_text())
    expect(expression).to_have_value(re.compile(rf"^Interval\(CFG\(3\.0\), {low}(\.0)?, {high}(\.0)?\)$"))
    after = end(page, which)
    assert (after > before) == grows
    assert after == pytest.approx(before * (80 / 0.002) ** (0.02 if grows else -0.02), rel=0.02)  # a step is 1/1000 of the axis
    expect(told).to_contain_text(f"{after:g}")
    expect(page.locator("#trajectory-interval").get_by_label(f"{which} end", exact=True)).to_have_value(f"{after:g}")


def test_the_range_slider_moves_by_mouse(visit: Open) -> None:
    page = visit("Trajectory")
    before = end(page, "upper")
    thumb = page.locator("#trajectory-interval .gk-high")
    box = thumb.bounding_box()
    assert box is not None
    at = box["x"] + 9 + (1 - int(thumb.input_value()) / 1000) * (box["width"] - 18)  # large levels on the left
    page.mouse.move(at, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 9 + 0.1 * (box["width"] - 18), box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    expect(page.locator("#trajectory-guidance").get_by_role("textbox")).not_to_have_value(GUIDANCE)
    assert end(page, "upper") == pytest.approx(80 * (0.002 / 80) ** 0.1, rel=0.1)
    assert before == 5.42


def test_the_interval_follows_an_expression_that_is_typed(visit: Open) -> None:
    page = visit("Trajectory")
    expression = page.locator("#trajectory-guidance").get_by_role("textbox")
    expression.fill("Interval(APG(4.0), 1.0, 20.0)")
    expression.press("Enter")
    expect(page.locator("#trajectory-interval").get_by_label("upper end", exact=True)).to_have_value("20")
    expect(page.locator("#trajectory-interval").get_by_label("lower end", exact=True)).to_have_value("1")


def test_what_is_typed_counts_even_if_the_slider_was_there_before(visit: Open) -> None:
    page = visit("Trajectory")
    expression = page.locator("#trajectory-guidance").get_by_role("textbox")
    upper = page.locator("#trajectory-interval").get_by_label("upper end", exact=True)
    for level in ("7", "9"):
        upper.fill(level)
        upper.press("Enter")
        expect(expression).to_have_value(re.compile(rf", {level}(\.0)?\)$"))
    expression.fill("Interval(CFG(3.0), 0.28, 7.0)")
    expression.press("Enter")
    expect(upper).to_have_value("7")


def test_a_run_shows_every_step(visit: Open) -> None:
    page = visit("Trajectory")
    steps = page.locator("#trajectory-steps").get_by_role("spinbutton")
    steps.fill("4")
    page.locator("#trajectory-guidance").get_by_role("textbox").fill("CFG(3.0)")
    page.locator("#trajectory-run").click()
    expect(page.locator("#trajectory-status")).to_contain_text("CFG(3.0): 14 network evaluations, 4 steps")  # 7 by heun, twice
    preview = page.locator("#trajectory-preview img")
    expect(preview).to_be_visible()
    expect(page.locator("#trajectory-image img")).to_be_visible()
    expect(page.locator("#trajectory-plot").get_by_role("img").first).to_be_visible()
    slider = page.locator("#trajectory-step").get_by_role("slider")
    expect(slider).to_have_attribute("max", "4")
    sources = [preview.get_attribute("src")]
    for step in (2, 3, 4):
        slider.press("ArrowRight")
        expect(page.locator("#trajectory-told")).to_contain_text(f"Step {step} of 4")
        expect(preview).not_to_have_attribute("src", sources[-1] or "")
        sources.append(preview.get_attribute("src"))
    assert len(set(sources)) == 4


def test_a_wrong_seed_is_told_at_its_field(visit: Open) -> None:
    page = visit("Trajectory")
    page.locator("#trajectory-seed").get_by_role("textbox").fill("1-3")
    page.locator("#trajectory-run").click()
    expect(page.locator("#trajectory-seeds-error").get_by_role("alert")).to_contain_text("give one")
