"""The report: complete, self-contained, and safe against what is written in it."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from genkit_eval.cli import invoke
from genkit_eval.extractors import Extractor
from genkit_eval.references import Reference
from genkit_eval.report.build import build_report
from genkit_eval.report.grid import class_grid, png_bytes, same_seeds
from genkit_eval.run import compare_sheet
from genkit_eval.table import columns_of, format_number, text_table
from PIL import Image

from tests.eval.standins import FakePipeline, Runner

TEXTS = ("none", "CFG(2.0)", "Interval(APG(4.0, momentum=-0.5), 0.28, 5.42)")


class Page(HTMLParser):
    """Addresses, image sources, headings and table cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.addresses += [found[key] or "" for key in ("src", "href", "action", "data", "poster") if key in found]
        if tag == "img":
            self.images.append(found["src"] or "")
            assert found["alt"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def made(extractor: Extractor, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report."""
    runner = Runner(extractor, reference, tmp_path_factory.mktemp("report") / "run")
    found = runner(FakePipeline(), *TEXTS)
    compare_sheet(runner.out, found)
    build_report(runner.out)
    return runner.out


@pytest.fixture
def page(made: Path, tmp_path: Path) -> tuple[str, Path]:
    """The report's text, and a copy of the run to change."""
    shutil.copytree(made, tmp_path / "copy")
    return (made / "report.html").read_text(encoding="utf-8"), tmp_path / "copy"


def test_it_holds_everything_and_asks_for_nothing(page: tuple[str, Path]) -> None:
    text, _ = page
    parsed = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert not {"link", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in text
    assert "url(" not in text
    # Four plots, the comparison, one grid for each guidance.
    assert len(parsed.images) == 4 + 1 + len(TEXTS)
    for image in parsed.images:
        Image.open(io.BytesIO(base64.b64decode(image.split(",", 1)[1]))).verify()


def test_the_table_has_every_guidance_and_number(page: tuple[str, Path]) -> None:
    text, out = page
    results = json.loads((out / "results.json").read_text())
    rows = Page(text).rows
    heading = rows[0]
    assert heading[0] == "Guidance"
    for title in (
        "FD-TINY",
        "KID-TINY",
        "Precision",
        "Recall",
        "Density",
        "Coverage",
        "Saturation",
        "Contrast",
        "NFE",
        "s/image",
    ):
        assert any(cell.startswith(title) for cell in heading), title
    for row, entry in zip(rows[1:4], results["guidances"], strict=True):
        assert row[0] == entry["label"]
        assert row[1].startswith(format_number(entry["metrics"]["frechet"]["value"]))
    for needed in ("f" * 64, "e" * 64, "a" * 64, "floor(127.5 x + 128)", "pr/exact/k3", "dc/exact/k5"):
        assert needed in text


def test_names_are_escaped(page: tuple[str, Path], plain_plots: None) -> None:
    _, out = page
    results = json.loads((out / "results.json").read_text())
    results["guidances"][0]["label"] = "<script>alert(1)</script>"
    results["command"] = "genkit-eval '<img src=x>'"
    (out / "results.json").write_text(json.dumps(results))
    text = build_report(out).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "<img src=x" not in text


def test_it_can_be_built_without_blocks_grids_or_intervals(page: tuple[str, Path]) -> None:
    _, out = page
    for path in [*out.glob("*/blocks/*"), *out.glob("**/*.png")]:
        path.unlink()
    results = json.loads((out / "results.json").read_text())
    results["status"] = "partial"
    for entry in results["guidances"]:
        entry["trace"] = []
        for metric in entry["metrics"].values():
            metric["interval"] = metric["difference"] = None
    del results["guidances"][1]["metrics"]["kid"]
    (out / "results.json").write_text(json.dumps(results))
    assert invoke(["report", str(out)]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "This run is not finished" in text
    assert len(Page(text).images) == 3


def test_text_table_marks_the_best(page: tuple[str, Path]) -> None:
    _, out = page
    results = json.loads((out / "results.json").read_text())
    lines = text_table(results).splitlines()
    assert len({len(line.rstrip()) for line in lines[2:]}) <= 2
    best = min(results["guidances"], key=lambda entry: entry["metrics"]["frechet"]["value"])
    starred = next(line for line in lines if line.startswith(best["label"]))
    assert f"{format_number(best['metrics']['frechet']['value'])}*" in starred
    first = columns_of(results["guidances"])[0]
    assert sum(cell.best for cell in first.cells) >= 1


def test_one_guidance_has_no_best(runner: Runner, pipe: FakePipeline, plain_plots: None) -> None:
    found = runner(pipe, "none")
    assert "*" not in text_table(found)
    build_report(runner.out)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (1.5e-5, "1.50e-05"), (0.01234, "0.0123"), (0.5, "0.500"), (12.345, "12.35"), (12345.6, "12346")],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert format_number(value) == text


def test_grids_show_the_right_pixels() -> None:
    pixels = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    pixels[:, 0] = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1) * 40
    sheet = class_grid(pixels, [0, 1, 0, 1, 0, 1], ["even", "odd", "never"], columns=2)
    margin = sheet.width - 2 * 10
    assert sheet.height == 2 * 10
    assert [sheet.getpixel((margin + 10 * c + 1, 10 * r + 1))[0] for r in range(2) for c in range(2)] == [0, 80, 40, 120]  # type: ignore[index]
    rows = same_seeds([("a", pixels), ("b", pixels[:3])], columns=4)
    assert rows.height == 20
    assert Image.open(io.BytesIO(png_bytes(rows))).size == rows.size
