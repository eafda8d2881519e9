"""The pictures of the app in README: two tabs after they have worked. Needs Chromium and playwright.

python benchmarks/screenshots.py [--out docs/images]
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTH = 1280
#: Milliseconds until the work of a tab is done.
PATIENCE = 180_000


def compare(page: Page) -> None:
    """Three guidances on the same classes and seeds."""
    page.locator("#compare-low-3").wait_for()
    page.locator("#compare-expression-3 textarea").fill("Interval(CFG(8.0), 0.28, 5.42)")
    page.locator("#compare-expression-2 textarea").fill("CFG(8.0)")
    page.locator("#compare-expression-2 textarea").blur()
    expect(page.locator("#compare-scale-2 input")).to_have_value("8")
    page.locator("#compare-generate").click()
    expect(page.locator("#compare-status")).to_have_text("Done.")


def trajectory(page: Page) -> None:
    """One image, looked at in the middle of its way."""
    page.get_by_role("tab", name="Trajectory").click()
    page.locator("#trajectory-run").click()
    expect(page.locator("#trajectory-status")).to_contain_text("network evaluations")
    slider = page.locator("#trajectory-step").get_by_role("slider")
    for _ in range(7):
        slider.press("ArrowRight")
    expect(page.locator("#trajectory-told")).to_contain_text("Step 8 of 18")


def shoot(page: Page, tab: str, path: Path) -> None:
    """The page down to the end of the tab, with a palette: a third of the bytes, and no difference to be seen."""
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.wait_for_timeout(500)  # movements of the page
    bottom = page.locator(f"#tab-{tab}").evaluate("tab => tab.getBoundingClientRect().bottom") + 12
    shot = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": bottom})
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    out = parser.parse_args().out
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    command = [sys.executable, "-m", "genkit_apps", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as app, sync_playwright() as playwright:
        try:
            assert app.stdout is not None
            found = next(filter(None, (re.search(r"http://\S+", line) for line in app.stdout)))
            arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
            chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
            expect.set_options(timeout=PATIENCE)
            page = chromium.new_page(viewport={"width": WIDTH, "height": 900})
            page.set_default_timeout(PATIENCE)
            page.goto(found[0], wait_until="domcontentloaded")
            for tab in (compare, trajectory):
                tab(page)
                shoot(page, tab.__name__, out / f"app_{tab.__name__}.png")
            chromium.close()
        finally:
            app.terminate()


if __name__ == "__main__":
    main()
