"""Guidance as text: what is read, what is refused and how, and that nothing in it is ever run."""

from __future__ import annotations

import builtins
import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit.guidance import APG, CFG, Adaptive, Guidance, Interval, NoGuidance, Scheduled, parse, registry
from genkit.guidance.scheduled import SHAPES
from genkit.samplers.diffusion import SAMPLERS, find_sampler

FUZZ = settings(max_examples=250, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("CFG(3)", CFG(3)),
        ("  CFG( scale = 3.5 )\n", CFG(3.5)),
        ("CFG(\n  3.5,\n)", CFG(3.5)),
        ("CFG(-1e-3)", CFG(-1e-3)),
        ("CFG(+2)", CFG(2)),
        ("Interval(APG(4.0), 0.28, 5.42)", Interval(APG(4.0), 0.28, 5.42)),
        ("Interval(inner=CFG(2), high=inf, low=0)", Interval(CFG(2), 0, math.inf)),
        ("Interval(CFG(2), 1, 4, 'step')", Interval(CFG(2), 1, 4, "step")),
        ("APG(4.0, eta=0.5, momentum=-0.75, threshold=2.5)", APG(4.0, 0.5, -0.75, 2.5)),
        ('Scheduled(CFG(2), "v", preserve_mean=False)', Scheduled(CFG(2), "v", preserve_mean=False)),
        ("Interval(Adaptive(Scheduled(APG(4), 'sine')), 0, 2)", Interval(Adaptive(Scheduled(APG(4), "sine")), 0, 2)),
        ("NoGuidance()", NoGuidance()),
        ("NoGuidance", NoGuidance()),
        ("none", NoGuidance()),
        (" None ", NoGuidance()),
    ],
)
def test_reads(text: str, made: Guidance) -> None:
    assert parse(text) == made


HOSTILE = [
    "__import__('os').system('touch {file}')",
    "__import__('pathlib').Path('{file}').touch()",
    "open('{file}', 'w')",
    'exec(\'open("{file}", "w")\')',
    'eval(\'open("{file}", "w")\')',
    "CFG(open('{file}', 'w'))",
    "CFG(scale=__import__('os').system('touch {file}'))",
    "CFG(3.0).__class__.__init__.__globals__['sys']",
    "CFG.__subclasses__()",
    "Interval(CFG(2).plan, 0, 1)",
    "(lambda: open('{file}', 'w'))()",
    "lambda: 0",
    "[open('{file}', 'w') for _ in (1,)]",
    "CFG([x for x in (1, 2)][0])",
    "CFG(sum(i for i in range(9)))",
    "{{'a': open('{file}', 'w')}}",
    "f\"{{open('{file}', 'w')}}\"",
    "CFG(f'{{1}}')",
    "CFG(**{{'scale': 2}})",
    "CFG(*[2])",
    "CFG(10**10**10)",
    "10**10**10",
    "CFG(1 + 1)",
    "CFG(2) + CFG(3)",
    "CFG(3 if True else 2)",
    "CFG(x := 3)",
    "CFG(3) and CFG(2)",
    "not CFG(3)",
    "-CFG(3)",
    "~3",
    "CFG(3)[0]",
    "CFG(3); import os",
    "import os",
    "x = CFG(3)",
    "del CFG",
    "await CFG(3)",
    "(yield)",
    "CFG(b'3')",
    "CFG(1j)",
    "CFG(...)",
    "CFG(-True)",
    "CFG(-'a')",
    "CFG(1 < 2)",
    "CFG('3'.upper())",
    "Guidance()",
    "_Combinator(CFG(3))",
    "Result(1)",
    "print(1)",
    "type('X', (), {{}})",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_python_is_refused_and_not_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the text was run")

    for owner, name in ((builtins, "eval"), (builtins, "exec"), (os, "system")):
        monkeypatch.setattr(owner, name, forbidden)
    file = tmp_path / "made"
    with pytest.raises(ValueError, match="guidance"):
        parse(text.format(file=file))
    assert not file.exists()


@pytest.mark.parametrize(
    "text",
    [
        "(" * 900 + "3" + ")" * 900,
        "[" * 900 + "]" * 900,
        "-" * 1900 + "1",
        "a" + ".a" * 900,
        "1" + "+1" * 900,
        "CFG(" * 400 + "1" + ")" * 400,
        "NoGuidance" + "()" * 900,
        "Adaptive(" * 21 + "CFG(2)" + ")" * 21,
        "CFG(1" + "0" * 400 + ")",
        "CFG(" + "9" * 1900 + ")",
        "CFG(1e999)",
        "CFG(2)" + " " * 5000 + "x",
        "(" * 49_000,
        "-" * 49_000 + "1",
        "a" + ".a" * 20_000,
        "1" + "+1" * 20_000,
        "CFG(" + "a=1," * 12_000 + ")",
        "CFG(**" * 8_000,
        "CFG('" + "x" * 49_000 + "')",
        "CFG(" + "x" * 49_000 + "=1)",
        "x" * 49_000,
        "[" + "1," * 20_000 + "]",
        "\n" * 49_000 + ")",
        "C" * 100_000,
        "\x00",
        "CFG(2)\x00",
        "\ud800",
        "CFG('\ud800')",
        "ＣＦＧ" + "３",
        "CFG(٣٫٥)",
        "🙂(3)",
        "CFG(3)\u202e",
        "",
        "   \n\t",
        ")",
        "CFG(",
        "CFG(3",
        "CFG(3))",
        "'",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_odd_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="guidance") as caught:
        parse(text)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("text", [None, 3.0, b"CFG(3)", ["CFG(3)"], CFG(3)])
def test_what_is_not_text_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"guidance=.* must be an expression such as 'Interval\(APG\(4\.0\), 0\.28, 5\.42\)'"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Intervall(CFG(2), 0, 1)", r"unknown name 'Intervall'; did you mean Interval\?"),
        ("cfg(3)", r"unknown name 'cfg'; did you mean CFG\?"),
        ("Interval(agp(3), 0, 1)", r"unknown name 'agp'; did you mean .*APG"),
        ("Frobnicate(3)", r"unknown name 'Frobnicate'; known names: APG, .*Adaptive, .*CFG"),
        ("CFG", r"CFG missing 1 required positional argument: 'scale'; write CFG\(scale\)"),
        ("Interval(CFG(2))", r"missing 2 required .*'low' and 'high'; write Interval\(inner, low, high, unit='sigma'\)"),
        ("Interval(CFG(2), lo=0, high=1)", r"unexpected keyword argument 'lo'; write Interval\(inner, low, high, unit='sigma'\)"),
        ("APG(1, 2, 3, 4, 5)", r"APG takes from 2 to 5 positional arguments but 6 were given; write APG\(scale, eta=0\.0, "),
        ("CFG(scale=2, scale=3)", r"scale is given twice in 'CFG\(scale=2, scale=3\)'"),
        ("CFG(3, scale=3)", r"CFG got multiple values for argument 'scale'"),
        ("Interval(CFG(2), 5.42, 0.28)", r"low=5\.42 is above high=0\.28.*Interval\(inner, 0\.28, 5\.42\)"),
        ("Interval(2, 0, 1)", r"Interval: inner=2 must be a guidance, for example CFG\(3\.0\)"),
        ("CFG('3')", r"CFG: scale='3' must be a finite number"),
        ("CFG(nan)", r"CFG: scale=nan must be a finite number"),
        ("CFG(CFG(3))", r"CFG: scale=CFG\(scale=3\.0\) must be a finite number"),
        ("Scheduled(CFG(2), 'linaer')", r"shape='linaer' is unknown; use one of constant, linear"),
        ("CFG(3", r"guidance='CFG\(3' is not an expression \(.*never closed\); write 'Interval"),
        ("CFG(2).plan", r"'CFG\(2\)\.plan' is not allowed; only names .*, numbers and strings are\. Known names: APG"),
        ("CFG(**{'scale': 2})", r"\* and \*\* are not allowed in .CFG\("),
        ("CFG(2)(3)", r"'CFG\(2\)' cannot be called; known names: APG"),
        ("3.0", r"guidance='3\.0' is a float, not a guidance; write for example 'CFG\(3\.0\)'"),
        ("'CFG(3)'", r"is a str, not a guidance"),
        ("[CFG(3)]", r"is a tuple, not a guidance"),
        ("x" * 50_001, r"guidance is 50001 characters long; at most 50000 are read"),
        ("Adaptive(" * 21 + "CFG(2)" + ")" * 21, r"is nested more than 20 deep"),
    ],
)
def test_message_says_what_came_and_what_would_work(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def refuses_cleanly(reader: Callable[[str], Any], text: str) -> None:
    with contextlib.suppress(ValueError):  # anything else fails the test
        reader(text)


WORDS = [*registry(), *SHAPES, "inner", "scale", "low", "unit", "inf", "nan", "None", "True"]
WORDS += ["lambda", "for", "in", "if", "else", "x", "__class__", "3.0", "0", "1e999"]
SIGNS = [*"()[]{},=*.-+:@#'", "**", ":=", '"', "f'", "\\", "\n", " "]
NUMBERS = st.one_of(st.integers(-9, 9), st.floats(-50, 50))


@FUZZ
@given(st.text(max_size=60))
def test_any_text_gives_a_guidance_or_a_value_error(text: str) -> None:
    refuses_cleanly(parse, text)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@FUZZ
@given(st.lists(st.sampled_from(WORDS + SIGNS), max_size=25).map("".join))
def test_any_mix_of_tokens_gives_a_guidance_or_a_value_error(text: str) -> None:
    refuses_cleanly(parse, text)
    refuses_cleanly(find_sampler, text)


UNUSUAL = st.sampled_from([math.inf, -math.inf, math.nan, 10**320, CFG(2.0)])
VALUES = st.one_of(NUMBERS, st.booleans(), st.none(), st.text(max_size=5), UNUSUAL)


@FUZZ
@given(st.sampled_from(sorted(registry())), st.lists(VALUES, max_size=5), st.sampled_from(sorted(SAMPLERS)))
def test_any_arguments_give_a_guidance_or_a_value_error(name: str, arguments: list[Any], sampler: str) -> None:
    written = ", ".join(repr(a) for a in arguments)
    refuses_cleanly(parse, f"{name}({written})")
    refuses_cleanly(find_sampler, f"{sampler}({written})")


def bounds(top: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(0, top), min_size=2, max_size=2).map(sorted)


def wrapped(inner: st.SearchStrategy[Guidance]) -> st.SearchStrategy[Guidance]:
    positive = st.floats(1e-3, 1e3)
    return st.one_of(
        st.builds(lambda g, b: Interval(g, *b), inner, bounds(1e6)),
        st.builds(lambda g, b: Interval(g, b[0], math.inf, "step"), inner, bounds(50)),
        st.builds(lambda g, b: Interval(g, *b, "fraction"), inner, bounds(1)),
        st.builds(Scheduled, inner, st.sampled_from(sorted(SHAPES)), positive, st.floats(0, 9), st.booleans()),
        st.builds(Adaptive, inner, st.floats(-1, 2)),
    )


METHODS = st.one_of(
    st.builds(NoGuidance),
    st.builds(CFG, NUMBERS),
    st.builds(CFG, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(APG, NUMBERS, st.floats(-2, 2), st.floats(-0.99, 0.99), st.one_of(st.floats(0, 1e9), st.just(math.inf))),
)


@FUZZ
@given(st.recursive(METHODS, wrapped, max_leaves=6))
def test_repr_of_anything_reads_back(made: Guidance) -> None:
    again = parse(repr(made))
    assert again == made
    assert hash(again) == hash(made)
    assert repr(again) == repr(made)
