"""The tab of models that draw tokens."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.conftest import Open, pick


def draw(page: Page) -> None:
    page.locator("#ar-run").click()
    expect(page.locator("#ar-status")).to_contain_text(re.compile(r"\d+ tokens in .* tokens/s"))


def test_speculative_decoding_draws_an_image_and_its_accepted_lengths(visit: Open) -> None:
    page = visit("Autoregressive")
    expect(page.get_by_label("Speculative decoding")).to_be_checked()
    draw(page)
    expect(page.locator("#ar-status")).to_contain_text("mean accepted length")
    expect(page.locator("#ar-image img")).to_be_visible()
    told = page.locator("#ar-map").get_by_role("img").get_attribute("aria-label") or ""
    passes = re.match(r"64 of 64 tokens by (\d+) passes", told)
    assert passes is not None, told
    assert 8 < int(passes[1]) < 60  # a pass settles up to 5 tokens
    expect(page.locator("#ar-runs")).to_contain_text("speculative: exact")


def test_without_speculative_decoding_a_pass_settles_one_token(visit: Open) -> None:
    page = visit("Autoregressive")
    page.get_by_label("Speculative decoding").uncheck()
    expect(page.locator("#ar-budget")).to_be_hidden()
    draw(page)
    expect(page.locator("#ar-status")).not_to_contain_text("mean accepted length")
    expect(page.locator("#ar-runs")).to_contain_text("one by one")


def test_a_next_scale_model_shows_its_scales(visit: Open) -> None:
    page = visit("Autoregressive")
    pick(page.locator("#ar-model").get_by_role("combobox"), "builtin/cifar10-next-scale")
    expect(page.get_by_label("Speculative decoding")).to_be_hidden()
    draw(page)
    expect(page.locator("#ar-scales img").first).to_be_visible()
