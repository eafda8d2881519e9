"""The download: running its Python gives its images, pixel for pixel."""

import ast
import json
import zipfile

import numpy as np
import pytest
from genkit_apps.board import board, difference
from genkit_apps.bundle import snippet, write_bundle
from genkit_apps.comparison import as_plain, compare, plan
from genkit_apps.generation import Asked, Column
from genkit_apps.limits import Limits
from genkit_apps.models import Models
from PIL import Image

import genkit
from genkit.guidance import parse

LIMITS = Limits()
ASKED = {
    "builtin/cifar10": {"sampler": "heun(churn=10)", "steps": 2},
    "builtin/cifar10-next-token": {},
    "builtin/cifar10-next-scale": {},
}


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.mark.parametrize("name", ASKED)
def test_the_python_in_the_zip_makes_the_images_in_the_zip(name, models, tmp_path, monkeypatch):
    # A guidance that this model cannot have, between two that it can: numbers of columns must not shift.
    wrong = "ClassifierGuidance(2.0)" if name == "builtin/cifar10" else "Adaptive(CFG(2.0), 0.99, measure='x0')"
    planned = plan(Asked(name, ["cat"], seeds="3, 5", **ASKED[name]), ["none", "CFG(3.0)"], models, LIMITS)
    *_, last = compare(planned.request, planned.guidances, LIMITS)
    columns = (last.columns[0], Column(wrong, error="does not work"), last.columns[1])
    folder = tmp_path / "made"
    folder.mkdir()
    with zipfile.ZipFile(write_bundle(tmp_path, planned.request, columns)) as archive:
        archive.extractall(tmp_path / "zip")
    monkeypatch.chdir(folder)
    exec(compile((tmp_path / "zip" / "reproduce.py").read_text(), "reproduce.py", "exec"), {})
    made = sorted(folder.glob("*.png"))
    assert [p.name for p in made] == [f"column{c}-image{k:02d}.png" for c in (1, 3) for k in (1, 2)]
    for path in made:
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / "zip" / path.name)))


def test_the_json_in_the_zip_makes_the_images_in_the_zip(models, tmp_path):
    planned = plan(Asked("builtin/cifar10", "1,2", seeds="7", sampler="dpmpp_2m", steps=2), ["CFG(2.0)"], models, LIMITS)
    *_, last = compare(planned.request, planned.guidances, LIMITS)
    with zipfile.ZipFile(write_bundle(tmp_path, planned.request, last.columns)) as archive:
        archive.extractall(tmp_path)
    record = json.loads((tmp_path / "comparison.json").read_text())
    pipe = genkit.load(record["model"])
    assert record["fingerprint"] == pipe.fingerprint
    for column in record["columns"]:
        out = pipe(record["classes"], record["seeds"], column["guidance"], sampler=record["sampler"], steps=record["steps"])
        assert column["nfe"] == out.nfe == [4, 4]
        for image, name in zip(out.images, column["images"], strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / name)))


def test_text_in_the_snippet_stays_text(models):
    planned = plan(Asked("builtin/cifar10", "cat", seeds="0", steps=1), ["none"], models, LIMITS)
    text = 'Autoguidance(2.0, model="\'\\n]; import os #")'
    assert text not in snippet(planned.request, {1: text})
    tree = ast.parse(snippet(planned.request, {1: text}))
    assert [n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)] == ["genkit"]


def test_a_guidance_that_fails_in_the_run_says_why_and_the_next_goes_on(models):
    planned = plan(
        Asked("builtin/cifar10", "cat", seeds="0", sampler="euler", steps=1),
        ["SelfMinority(1.4, distance='nope')", "CFG(2)"],
        models,
        LIMITS,
    )
    *_, last = compare(planned.request, planned.guidances, LIMITS)
    assert "nope" in last.columns[0].error
    assert not last.columns[0].images
    assert len(last.columns[1].images) == 1
    assert as_plain(planned.request, last.columns)["record"]["columns"][0]["error"] == last.columns[0].error


@pytest.mark.parametrize(
    ("name", "guidance", "words"),
    [
        (
            "builtin/cifar10-next-token",
            "Interval(CFG(3.0), 0.28, 5.42)",
            "Interval(CFG(3.0), 0.28, 5.42) is bound to noise levels",
        ),
        ("builtin/cifar10-next-scale", "DynamicThresholding(8.0)", "logits"),
        ("builtin/cifar10-next-token", "Autoguidance(2.0)", "'weak'"),
        ("builtin/cifar10", "ClassifierGuidance(2.0)", "'classifier'"),
        ("builtin/cifar10", "Interval(Autoguidance(2.0, model='other'), 0, 1)", "'other'"),
        ("builtin/cifar10", "PredictorCorrector(CFG(2.0))", "corrector"),
    ],
)
def test_what_a_model_cannot_have_is_said_at_its_card_before_anything_runs(name, guidance, words, models):
    planned = plan(Asked(name, "cat", seeds="0", sampler="heun", steps=2), ["none", guidance], models, LIMITS)
    assert planned.request is None
    assert list(planned.problems) == ["guidance 2"]
    assert words in planned.problems["guidance 2"]


def test_all_messages_come_at_once(models):
    planned = plan(Asked("builtin/cifar10", "cat", seeds="x"), ["CFG(", "CFG(2)", "nope"], models, LIMITS)
    assert sorted(planned.problems) == ["guidance 1", "guidance 3", "seeds"]


def test_difference_is_absolute_and_amplified():
    first, other = Image.new("RGB", (2, 2), (10, 200, 30)), Image.new("RGB", (2, 2), (15, 100, 30))
    image, mean = difference(other, first, 4.0)
    assert image.getpixel((0, 0)) == (20, 255, 0)
    assert mean == pytest.approx(35.0)


def test_the_board_names_every_image_and_escapes_what_users_wrote(models):
    planned = plan(Asked("builtin/cifar10", ["cat", "dog"], seeds="4", steps=1), ["none"], models, LIMITS)
    image = Image.new("RGB", (32, 32))
    columns = [Column("none", (image, image), (1, 1), 1, 0.5), Column("<b onload=x>", error="<script>alert(1)</script>")]
    page = board(planned.request, columns, 4.0)
    assert 'alt="cat, seed 4, none"' in page
    assert "1 NFE" in page
    assert "0.25 s" in page
    assert "<script>" not in page
    assert "<b onload" not in page
    assert parse(columns[0].guidance) is not None
