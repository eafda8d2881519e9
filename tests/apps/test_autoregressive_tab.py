"""The tab of models that draw tokens: the token map, what the fields mean, and the events over the API."""

import re

import numpy as np
import pytest
from genkit_apps import jobs, plots
from genkit_apps.decoding import CHAIN, COPY, DRAFTS, DYNAMIC, TREE, Draft, Live, draw, two_wide
from genkit_apps.generation import Asked
from genkit_apps.limits import Limits, Refused
from genkit_apps.models import Models
from gradio_client.exceptions import AppError

from genkit.guidance import CFG
from genkit.pipelines.speculative import Speculative
from genkit.samplers.autoregressive.speculative import Exact, Lantern
from tests.apps.pages import errors, served

TOKEN, SCALE = "builtin/cifar10-next-token", "builtin/cifar10-next-scale"


@pytest.fixture(scope="module")
def models():
    return Models()


def drawn(models, name=TOKEN, job=None, **options):
    request = Asked(name, "horse", seeds="0").checked(models, Limits())
    return draw(request, CFG(2.0), Live(), job or jobs.Job(), Limits(), **{"drafted": None, "temperature": 1.0, **options})


def test_passes_from_how_many_tokens_there_were():
    assert plots.passes_of([1, 4, 5, 8]) == [0, 1, 1, 1, 2, 3, 3, 3]
    assert plots.passes_of([]) == []


def test_the_map_numbers_the_passes_and_shades_by_their_length():
    picture = plots.token_map([0, 1, 1, 1, 2], 3)
    cells = re.findall(r'<rect x="(\d+)" y="(\d+)" width="20" height="20" fill="(#\w+)"/><text[^>]*>(\d+)', picture)
    assert [(int(x) // 20, int(y) // 20, int(n)) for x, y, _, n in cells] == [
        (0, 0, 1),
        (1, 0, 2),
        (2, 0, 2),
        (0, 1, 2),
        (1, 1, 3),
    ]
    shades = [shade for _, _, shade, _ in cells]
    assert shades[0] == shades[4] != shades[1] == shades[2] == shades[3]
    assert "5 of 9 tokens by 3 passes" in picture


@pytest.mark.parametrize("drafted", [Speculative(Lantern(100, 0.1)), Speculative(Lantern(100, 0.2), tree=two_wide(3))])
def test_the_map_agrees_with_the_report(models, drafted):
    found = drawn(models, drafted=drafted)
    depth = found.report.depth[0].tolist()  # 0 where the network drew the token itself: the last of its pass
    number, passes = 0, []
    for d in depth:
        passes.append(number)
        number += d == 0
    assert plots.passes_of(found.counts) == passes
    assert len(found.counts) == int(found.report.passes[0]) + 1
    direct = models.get(TOKEN).pipe([7], [0], CFG(2.0), speculative=drafted)
    assert np.array_equal(np.asarray(found.image), np.asarray(direct.images[0]))
    assert found.nfe == direct.nfe[0]


def test_scale_by_scale(models):
    found = drawn(models, SCALE)
    assert (len(found.scales), found.tokens, found.counts) == (5, 103, ())
    assert np.array_equal(np.asarray(found.scales[-1]), np.asarray(found.image))


def test_a_cancelled_drawing_stops_at_the_next_token(models):
    stream = jobs.stream(lambda job: drawn(models, job=job), "me")
    first = next(stream)
    jobs.cancel("me")
    left = []
    with pytest.raises(jobs.Cancelled):
        left.extend(stream)
    assert first.step + len(left) < 20


def test_a_tree_with_two_draws_at_each_level():
    assert two_wide(3).choices == ((0,), (1,), (0, 0), (0, 1), (0, 0, 0), (0, 0, 1))


def test_what_the_fields_mean(models):
    model, limits = models.get(TOKEN), Limits()
    assert Draft(0, 100, CHAIN, 4).speculative(model, limits) == Speculative(Exact(), tree=4)
    rule = Draft(0.2, 50, TREE, 2).speculative(model, limits).acceptance
    assert (rule.k, rule.delta) == (50, 0.2)
    assert Draft(0, 100, COPY, 4).speculative(model, limits).drafter == "ngram"
    assert Draft(0, 100, DYNAMIC, 3).speculative(model, limits).tree.levels == 3


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ((0.1, 1023, CHAIN, 4), "k"),
        ((0.1, 0, CHAIN, 4), "k"),
        ((1.1, 10, CHAIN, 4), "budget"),
        ((float("nan"), 10, CHAIN, 4), "budget"),
        (("0.1", 10, CHAIN, 4), "budget"),
        ((0.1, 10, "oak", 4), "tree"),
        ((0.1, 10, TREE, 99), "length"),
        ((0.1, 10, TREE, 2.5), "length"),
    ],
)
def test_fields_out_of_range(models, fields, where):
    with pytest.raises(Refused) as told:
        Draft(*fields).speculative(models.get(TOKEN), Limits())
    assert told.value.field == where


@pytest.fixture(scope="module")
def client(models):
    with served("autoregressive", models) as found:
        yield found


def run(client, model=TOKEN, label="horse", guidance="CFG(2.0)", temperature=1.0, on=True, budget=0.2, seed="0"):
    draft = (on, budget, 100, DRAFTS[0], 4)
    return client.predict(model, label, "", seed, guidance, temperature, *draft, api_name="/autoregressive_draw")


def test_drawing_over_the_api_with_and_without_drafted_tokens(client):
    status, image, token_map, _, _, *rest = run(client)
    assert "mean accepted length" in status
    assert "64 of 64 tokens" in token_map
    assert "<img" in image
    assert not errors(rest)
    status, _, _, scales, runs, *_ = run(client, model=SCALE)
    assert "mean accepted length" not in status
    assert scales.count("<img") == 5
    assert re.findall(r">(one by one|speculative: [^<]*)<", runs) == [
        "one by one",
        "speculative: budget 0.2, k 100, chain of draws",
    ]


def test_the_endpoint_for_programs(client):
    out = client.predict(model="builtin/cifar10-next-token-cca", guidance="none", budget=0.3, api_name="/autoregressive")
    assert len(out["passes"]) == out["tokens"] == 64
    assert out["mean_length"] > 1
    with pytest.raises(AppError, match="budget: "):
        client.predict(budget=2, api_name="/autoregressive")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance": "CFG"}, "missing|required"),
        ({"guidance": "CADS(CFG(3.0))"}, "logits|noise|CADS"),
        ({"guidance": "MomentumGuidance(3.0)"}, "remember|earlier|Momentum"),
        ({"seed": "0-1"}, "give one seed"),
        ({"label": "unicorn"}, "is no class"),
    ],
)
def test_bad_input_is_told_at_its_field(client, changes, words):
    found = errors(run(client, **changes))
    assert len(found) == 1
    assert re.search(words, found[0])
    assert "Traceback" not in found[0]
