"""Cards: every registered guidance goes through its controls, and through its text, unchanged."""

from itertools import product

import pytest
from genkit_apps import cards
from genkit_apps.card_view import start
from genkit_apps.limits import Limits
from genkit_apps.models import Models

from genkit.guidance import CFG, NoGuidance, parse, registry
from genkit.guidance.base import arguments
from genkit.guidance.presets import PRESETS
from genkit.pipelines import load
from genkit.pipelines.loading import BUILTIN

EXAMPLES = sorted({text for cls in registry().values() for text in cls.examples} | {p.expression for p in PRESETS})


@pytest.mark.parametrize("text", EXAMPLES)
def test_round_trip_through_controls_and_text(text):
    guidance = parse(text)
    method = cards.method_of(guidance)
    assert parse(cards.assemble(method, cards.values(guidance))) == guidance
    assert parse(cards.expression(guidance)) == guidance
    assert Limits().guidance(text) == guidance


@pytest.mark.parametrize("method", cards.methods())
def test_every_method_has_a_card(method):
    guidance = parse(cards.example(method))
    assert cards.method_of(guidance) == method
    controls = cards.controls(method)
    assert [c.name for c in controls] == [f.name for f in arguments(type(guidance))]
    assert all(c.info for c in controls), "the docstring of the class says nothing about an argument"
    assert all(
        value in c.choices for c, value in zip(controls, cards.values(guidance).values(), strict=True) if c.kind == "choice"
    )


@pytest.mark.parametrize("name", BUILTIN)
def test_what_cards_begin_with_works_on_each_kind_of_model(name):
    pipe = load(name)
    kind = Models().kind(name)
    more = {"steps": 8} if kind == "diffusion" else {}
    nfe = [sum(pipe(classes=[3], seeds=[0], guidance=text, **more).nfe) for text in cards.FIRST[kind]]
    assert all(nfe[0] < n for n in nfe[1:])  # each of the others guides


def test_what_cards_begin_with_follows_the_kind_of_model():
    for kind, other in product(cards.FIRST, cards.FIRST):
        assert tuple(cards.fitting(text, kind) for text in cards.FIRST[other]) == cards.FIRST[kind]
        assert cards.fitting("CFG(4.5)", kind) == "CFG(4.5)"


def test_kinds_of_controls_follow_the_annotations():
    kinds = {c.name: c.kind for m in ("Interval", "DynamicThresholding", "FDG", "SelfMinority") for c in cards.controls(m)}
    assert kinds["inner"] == "guidance"
    assert kinds["low"] == "number"
    assert kinds["unit"] == kinds["measure"] == "choice"
    assert kinds["per_channel"] == "check"
    assert kinds["scales"] == kinds["parallel"] == "text"
    assert kinds["draws"] == "whole"
    assert kinds["distance"] == "name"


def test_what_is_entered_becomes_the_expression():
    entered = cards.values(parse("Interval(CFG(3.0), 0.28, 5.42)"))
    assert entered == {"inner": "CFG(3.0)", "low": 0.28, "high": 5.42, "unit": "sigma"}
    changed = {**entered, "inner": "none", "low": 1, "unit": "step"}
    assert parse(cards.assemble("Interval", changed)) == parse("Interval(NoGuidance(), 1, 5.42, 'step')")
    assert parse(cards.assemble("SEG", {"scale": 2, "sigma": None, "layers": "()"})) == parse("SEG(2)")  # an empty number is inf
    assert parse(cards.assemble("ZeroInit", {"inner": "CFG(2)", "steps": 2.0})) == parse("ZeroInit(CFG(2), 2)")


def test_text_in_a_control_cannot_become_code():
    text = cards.assemble("Autoguidance", {"scale": 2.0, "model": "x') or __import__('os').system('true", "condition": "cond"})
    assert parse(text).model == "x') or __import__('os').system('true"
    with pytest.raises(ValueError, match=r"cannot be called|not allowed|unknown name"):
        parse(cards.assemble("Interval", {"inner": "__import__('os').system('true')", "low": 0.0, "high": 1.0, "unit": "sigma"}))


def test_short_expressions():
    assert cards.expression(parse("APG(scale=4.0, eta=0.0, momentum=-0.5)")) == "APG(4.0, momentum=-0.5)"
    assert cards.expression(NoGuidance()) == "none"
    assert cards.expression(parse("Interval(NoGuidance(), 0, 1)")) == "Interval(NoGuidance(), 0.0, 1.0)"


def test_a_method_that_wraps_another_keeps_what_was_there():
    assert parse(start("Interval", "CFG(7.0)")) == parse("Interval(CFG(7.0), 0.28, 5.42)")
    assert start("CFG", "APG(4.0)") == cards.example("CFG")
    assert parse(start("Interval", "not an expression")) == parse(cards.example("Interval"))
    assert parse(start("none", "CFG(2)")) == NoGuidance()
    assert isinstance(parse(start("CFG", "none")), CFG)
