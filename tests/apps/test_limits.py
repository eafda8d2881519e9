"""Bounds: what is refused, at which field, in words that say what would work."""

import pytest
from genkit_apps.generation import Asked
from genkit_apps.limits import MAX_SEED, Limits, Refused
from genkit_apps.models import Models

LIMITS = Limits()


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0, 1,5-8", [0, 1, 5, 6, 7, 8]), (str(MAX_SEED), [MAX_SEED]), ([3, 1], [3, 1])]
)
def test_seeds(text, seeds):
    assert LIMITS.seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.5", "0-16", "5-2", str(MAX_SEED + 1), "0-99999999999999999999", "1;;drop", "²", None]
)
def test_wrong_seeds(text):
    with pytest.raises(Refused) as refused:
        LIMITS.seeds(text)
    assert refused.value.field == "seeds"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expression"),
        ("CFG(", "not an expression"),
        ("CFG(x)", "unknown name"),
        ("Cfg(3)", "did you mean CFG"),
        ("__import__('os').system('true')", "cannot be called|unknown name"),
        ("CFG(scale=().__class__)", "not allowed"),
        ("[CFG(1) for _ in range(9)]", "not allowed"),
        ("CFG(9**9**9)", "not allowed"),
        ("heun", "unknown name"),
        ("CFG(3.0)" + " " * 3000, "at most 2000"),
        ("ZeroInit(" * 30 + "CFG(2)" + ")" * 30, "nested"),
        ("SelfMinority(1.4, draws=100000)", "100 allowed"),
        ("Interval(MinorityPrompt(CFG(2.0), iterations=1e6), 0, 1)", "100 allowed"),
        (3.0, "no text"),
    ],
)
def test_wrong_guidance(text, words):
    with pytest.raises(Refused, match=words) as refused:
        LIMITS.guidance(text, "guidance 2")
    assert refused.value.field == "guidance 2"


@pytest.mark.parametrize("text", ["nope", "heun(", "restart(points=1e9)", "pcg(corrections=101)", "CFG(3)", "x" * 3000])
def test_wrong_sampler(text):
    with pytest.raises(Refused) as refused:
        LIMITS.sampler(text)
    assert refused.value.field == "sampler"


@pytest.mark.parametrize("steps", [0, 201, 2.5, None, True, "18", float("nan"), float("inf")])
def test_wrong_steps(steps):
    with pytest.raises(Refused, match="from 1 to 200"):
        LIMITS.step_count(steps)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model", {"model": "../../etc/passwd"}),
        ("model", {"model": "owner/name"}),
        ("classes", {"classes": []}),
        ("classes", {"classes": ["unicorn"]}),
        ("classes", {"classes": "10"}),
        ("seeds", {"classes": ["cat", "dog"], "seeds": "0-8"}),
    ],
)
def test_wrong_requests(models, field, changes):
    with pytest.raises(Refused) as refused:
        Asked(**{"model": "builtin/cifar10", "classes": ["cat"], **changes}).checked(models, LIMITS)
    assert refused.value.field == field
    assert len(refused.value.message) < 500


def test_each_class_goes_with_each_seed(models):
    request = Asked("builtin/cifar10", "cat, 8", seeds="4-5", sampler="heun(churn=40)", steps=3).checked(models, LIMITS)
    assert (request.classes, request.seeds, request.total) == ((3, 3, 8, 8), (4, 5, 4, 5), 3)


def test_no_model_is_loaded_that_was_not_named_at_the_start(models, tmp_path):
    with pytest.raises(KeyError):
        models.get(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        Models([str(tmp_path / "none.safetensors")])


def test_a_prompt_is_text_that_can_be_written():
    assert LIMITS.prompts(" a \ud800 cat ") == "a ? cat"
