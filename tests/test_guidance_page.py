"""docs/guidance.md is complete and true: every method and preset is on it, expressions parse, costs and defaults are real."""

from __future__ import annotations

import re
from dataclasses import MISSING
from functools import lru_cache
from typing import get_args

import pytest
import torch

import genkit
from genkit.guidance import PRESETS, Guidance, parse, preset, registry
from genkit.guidance.base import Need, arguments
from tests.test_docs import ROOT, python_of
from tests.toys import Run

PAGE = "docs/guidance.md"
NAMES = sorted(name for name, cls in registry().items() if cls.__module__.startswith("genkit."))
every_method = pytest.mark.parametrize("name", NAMES)


@lru_cache(maxsize=1)
def text() -> str:
    return (ROOT / PAGE).read_text(encoding="utf-8")


def entries() -> dict[str, str]:
    """The text under every heading of the third level."""
    parts = re.split(r"^### (.+)$", re.sub(r"^## .*$", "### end", text(), flags=re.MULTILINE), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(first: str) -> dict[str, list[str]]:
    """The cells of every row of the table whose first heading this is, by the first cell."""
    body = re.search(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text(), re.MULTILINE)
    assert body, f"no table begins with {first}"
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in body[1].splitlines()]
    return {row[0]: row[1:] for row in rows}


def field(entry: str, name: str) -> str:
    """What an entry says after ``Rows:``, ``Default:`` or ``Source:``."""
    found = re.search(rf"\b{name}:\s(.+?)(?=\.\s+(?:Default|Source):\s|\.?\s*\Z)", entry, re.DOTALL)
    assert found, f"the entry says nothing about {name}"
    return found[1]


def calls(pieces: list[str]) -> list[str]:
    """Those that call a method by its name."""
    return [piece for piece in (" ".join(p.split()) for p in pieces) if re.match(rf"({'|'.join(NAMES)})\(", piece)]


def expressions() -> list[str]:
    """Every guidance expression of the page, in its lines and in its Python."""
    lines = re.sub(r"^```.*?^```", "", text(), flags=re.MULTILINE | re.DOTALL)
    return calls(re.findall(r"`([^`]+)`", lines) + re.findall(r'"([^"\n]+)"', python_of(PAGE)))


def summary(name: str) -> list[str]:
    return table("method")[f"[`{name}`](#{name.lower()})"]


# ---- everything is there ----


@every_method
def test_every_method_has_an_entry(name: str) -> None:
    entry = entries()[name]
    assert field(entry, "Rows")
    assert field(entry, "Source")
    if name != "NoGuidance":
        assert any(f"{name}(" in call for call in calls(re.findall(r"`([^`]+)`", entry))), "an example"


def test_nothing_else_is_in_the_summary() -> None:
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", text(), re.MULTILINE)) == NAMES


def test_links_within_the_page_lead_to_headings() -> None:
    anchors = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text(), re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text())) <= anchors


# ---- what it says is so ----


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_expressions_parse(expression: str) -> None:
    assert isinstance(parse(expression), Guidance)


@every_method
def test_defaults_are_those_of_the_class(name: str) -> None:
    said = re.findall(r"`(\w+=[^`]+)`", field(entries()[name], "Default"))
    real = [f"{f.name}={f.default!r}" for f in arguments(registry()[name]) if f.default is not MISSING]
    assert said == real


@every_method
def test_rows_and_needs_are_those_of_a_run(name: str) -> None:
    made, (_, rows, needs) = parse(registry()[name].examples[0]), summary(name)
    assert {need for need in get_args(Need) if f"`{need}`" in needs} == made.needs
    if rows.isdigit():
        assert Run(made, "euler").nfe == [6 * int(rows)] * 4
    else:
        assert re.search(r"inner|branches|part|or|draws", rows)


def test_presets_are_all_listed_as_they_are() -> None:
    rows = table("name")
    assert rows == {f"`{p.name}`": [f"`{p.expression}`", p.model, p.source, p.metric or ""] for p in PRESETS}
    for name in re.findall(r'preset\("([^"]+)"\)', text()):
        assert isinstance(preset(name), Guidance)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Scheduled(Interval(CFG(3.0), 0.28, 5.42), 'linear')", "Interval(Scheduled(CFG(3.0), 'linear'), 0.28, 5.42)"),
        ("Adaptive(Interval(CFG(3.0), 0.2, 2.0), 0.98)", "Interval(Adaptive(CFG(3.0), 0.98), 0.2, 2.0)"),
        ("Scheduled(Sum(CFG(3.0), PAG(2.0)), 'linear')", "Sum(Scheduled(CFG(3.0), 'linear'), Scheduled(PAG(2.0), 'linear'))"),
        ("CADS(Interval(CFG(3.0), 0.2, 2.0))", "Interval(CADS(CFG(3.0)), 0.2, 2.0)"),
        ("Sum(CFG(3.0), CFG(4.0))", "CFG(6.0)"),
        ("Adaptive(PAG(3.0), -1.0)", "PAG(3.0)"),
    ],
)
def test_orders_said_to_be_the_same(one: str, other: str) -> None:
    a, b = Run(parse(one), "euler"), Run(parse(other), "euler")
    assert torch.allclose(a.out, b.out, rtol=0, atol=1e-12)
    assert a.nfe == b.nfe


@pytest.mark.parametrize(
    ("outside", "inside", "saved"),
    [
        ("ZeroInit(Sum(CFG(3.0), PAG(2.0)))", "Sum(ZeroInit(CFG(3.0)), PAG(2.0))", 2),
        ("CADS(Sum(CFG(3.0), PAG(2.0)))", "Sum(CADS(CFG(3.0)), PAG(2.0))", 2),
        ("Rescaled(Sum(CFG(5.0), PAG(3.0)))", "Sum(Rescaled(CFG(5.0)), PAG(3.0))", 0),
        ("Scheduled(MomentumGuidance(CFG(3.0)), 'linear')", "MomentumGuidance(Scheduled(CFG(3.0), 'linear'))", 0),
    ],
)
def test_orders_said_to_differ(outside: str, inside: str, saved: int) -> None:
    """In rows over six steps too: noise levels at which CADS acts begin two of them."""
    a, b = Run(parse(outside), "euler"), Run(parse(inside), "euler")
    assert not torch.allclose(a.out, b.out, rtol=0, atol=1e-3)
    assert [y - x for x, y in zip(a.nfe, b.nfe, strict=True)] == [saved] * 4


def test_python_runs() -> None:
    """What needs a download is only compiled; every public name in it exists."""
    blocks = re.findall(r"^```python\n(.*?)^```", text(), re.DOTALL | re.MULTILINE)
    for block in blocks:
        code = compile(block, PAGE, "exec")
        if "from_pretrained" not in block:
            exec(code, {})
        for name in re.findall(r"\bgenkit\.(\w+)\(", block):
            assert hasattr(genkit, name), f"genkit.{name} is on the page and does not exist"
    assert len(blocks) == 3
