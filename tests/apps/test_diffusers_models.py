"""Diffusers models in the app, one of text and one of classes, from folders. Everything is tiny and random."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from genkit_apps import app, generation, jobs
from genkit_apps.comparison import compare, plan
from genkit_apps.generation import BRIDGE, PREVIEW_SHARE, Asked
from genkit_apps.limits import Limits
from genkit_apps.models import Models
from genkit_apps.trajectories import follow
from gradio_client import Client
from PIL import Image
from transformers import T5Config, T5EncoderModel

from genkit.guidance import CFG, parse
from tests.pipelines.tiny_diffusers import dit, sd3, sd15, seeded, t5_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # in diffusers

ASKED = {"sd15": {"prompt": "a fox"}, "sd3": {"prompt": "a fox"}, "dit": {"classes": "1"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    pipes = {"sd15": sd15(), "sd3": sd3(), "dit": dit()}
    third = seeded(T5EncoderModel, T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    pipes["sd3"].register_modules(text_encoder_3=third, tokenizer_3=t5_tokenizer())  # diffusers loads it only whole
    for name, pipe in pipes.items():
        found[name] = str(tmp_path_factory.mktemp(name))
        pipe.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def models(folders):
    return Models(list(folders.values()))


@pytest.mark.parametrize("sampler", [BRIDGE, "heun"])
@pytest.mark.parametrize("name", ASKED)
def test_every_step_is_followed(models, folders, name, sampler):
    request = Asked(folders[name], **ASKED[name], seeds="3", sampler=sampler, steps=4).checked(models, Limits())
    seen, model = [], models.get(folders[name])
    path = follow(request, CFG(2.0), jobs.Job(), Limits())
    what = {"prompt": ["a fox"]} if "prompt" in ASKED[name] else {"class_labels": [1]}
    options = {"seeds": [3], "guidance": "CFG(2.0)", "sampler": sampler, "num_inference_steps": 4}
    want = model.pipe(**what, **options, callback=lambda info, result: seen.append(result.denoised))
    assert np.array_equal(np.asarray(path.image), np.asarray(want.images[0]))
    assert len(path.previews) == len(path.rows) == len(seen) == 4
    for preview, denoised in zip(path.previews, seen, strict=True):
        assert np.array_equal(np.asarray(preview), np.asarray(model.pipe.decode(denoised)[0]))
    last = np.asarray(path.previews[-1], int) - np.asarray(path.image, int)
    assert abs(last).max() <= 1  # the last step ends at what it believed
    assert path.nfe == want.nfe[0] == sum(row["rows"] for row in path.rows)
    assert all(row["cosine"] is not None for row in path.rows)
    assert path.plots.marked("what it shows", (0.28, 5.42), at=path.rows[0]["sigma"]).startswith("<img")


def test_large_latents_are_reduced_before_they_are_decoded(models, folders, monkeypatch):
    model, given = models.get(folders["sd15"]), []
    factor = model.pipe.pipe.vae_scale_factor
    monkeypatch.setattr(model.pipe, "decode", lambda latents: given.append(latents) or [Image.new("RGB", (60, 40))])
    latents = torch.arange(4 * 9 * 6.0).reshape(1, 4, 9, 6)
    assert model.pictures(latents, 9 * factor)[0].size == (9 * factor, 6 * factor)
    assert model.pictures(latents, 5 * factor)[0].size[0] == 5 * factor
    model.pictures(latents)
    assert [tuple(x.shape[2:]) for x in given] == [(9, 6), (5, 3), (9, 6)]
    assert given[1][0, 0, 0, 0] == latents[0, 0, :2, :2].mean()


def test_previews_of_models_that_decode_slowly_are_few(models, folders, monkeypatch):
    planned = plan(Asked(folders["dit"], "1", sampler="ddim", steps=60), ["none"], models, Limits())
    clock, slow, made = [0.0], models.get(folders["dit"]).pipe.decode, []

    def decode(latents):
        clock[0] += 1.0
        made.append(clock[0])
        return slow(latents)

    def check(job):
        clock[0] += 0.1  # a step

    monkeypatch.setattr(models.get(folders["dit"]).pipe, "decode", decode)
    monkeypatch.setattr(jobs.Job, "check", check)
    watch = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: clock[0])
    for module in (generation, jobs):
        monkeypatch.setattr(module, "time", watch)
    *_, end = compare(planned.request, planned.guidances, Limits(seconds=1e9))
    assert end.columns[0].seconds == pytest.approx(6.0)  # of the model alone
    assert len(made) == 1 + int(60 * 0.1 // PREVIEW_SHARE)


def test_over_the_api(models, folders):
    built = app.build(models)
    try:
        _, url, _ = app.serve(built, server_port=0, prevent_thread_lock=True)
        client = Client(url, verbose=False)
        out = client.predict(
            model=folders["sd15"], prompt="a fox", guidance="Interval(CFG(3.0), 0.1, 5.0)", sampler=BRIDGE, steps=3,
            api_name="/trajectory",
        )  # fmt: skip
        assert len(out["previews"]) == len(out["trace"]) == 3
        label, prompt, sampler, *_ = client.predict(folders["dit"], api_name="/trajectory_model")
        assert (label["visible"], prompt["visible"], sampler["value"]) == (True, False, BRIDGE)
        label, prompt, *_ = client.predict(folders["sd15"], api_name="/trajectory_model")
        assert (label["visible"], prompt["visible"]) == (False, True)
        ask = {"model": folders["sd15"], "prompt": "a fox", "sampler": BRIDGE, "steps": 2, "seeds": "4"}
        out = client.predict(**ask, guidances=["none", "CFG(2.0)"], api_name="/compare")
        assert [column["nfe"] for column in out["record"]["columns"]] == [[2], [4]]
        assert parse(out["record"]["columns"][1]["guidance"]) == CFG(2.0)
    finally:
        built.close()
