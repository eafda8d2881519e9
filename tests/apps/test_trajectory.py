"""The trajectory tab: what is kept of every step, the band on the axis, and the events over the API."""

import io
import math
import re
from base64 import b64decode

import httpx
import numpy as np
import pytest
from genkit_apps import jobs, plots
from genkit_apps.generation import Asked
from genkit_apps.limits import Limits, Refused
from genkit_apps.models import Models
from genkit_apps.trajectories import LARGEST, band, follow, limited
from gradio_client.exceptions import AppError
from PIL import Image

import genkit
from genkit.guidance import CFG, Interval, parse
from tests.apps.pages import errors, served


@pytest.fixture(scope="module")
def models():
    return Models()


def request(models, steps=4, sampler="heun"):
    return Asked("builtin/cifar10", "horse", seeds="3", sampler=sampler, steps=steps).checked(models, Limits())


def test_every_step_is_kept_as_the_sampler_saw_it(models):
    seen, pipe = [], genkit.load("builtin/cifar10")
    path = follow(request(models), parse("Interval(CFG(3.0), 0.28, 5.42)"), jobs.Job(), Limits())
    want = pipe([7], [3], Interval(CFG(3.0), 0.28, 5.42), steps=4, trace="full", callback=lambda i, r: seen.append(r.denoised))
    assert np.array_equal(np.asarray(path.image), np.asarray(want.images[0]))
    assert path.nfe == want.nfe[0] == sum(row["rows"] for row in path.rows)
    assert len(path.previews) == len(path.rows) == len(seen) == 4
    for preview, denoised in zip(path.previews, seen, strict=True):
        pixels = (denoised[0] * 127.5 + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(preview), pixels)
    low, high = path.band
    assert [row["weight"] for row in path.rows] == [3.0 if low < row["sigma"] <= high else 1.0 for row in path.rows]
    assert max(path.previews[0].size) <= LARGEST


def test_stages_of_a_step_are_added_up():
    stages = [("step", 2), ("second", 1), ("step", 2), ("corrector", 4)]
    rows = [{"stage": stage, "rows": rows, "sigma": 1.0} for stage, rows in stages]
    assert [row["rows"] for row in plots.steps_of(rows)] == [3, 6]
    assert rows[0]["rows"] == 2  # the trace itself is as it was


def test_a_cancelled_run_stops_at_the_next_step(models):
    stream = jobs.stream(lambda job: follow(request(models, 100), CFG(2.0), job, Limits()), "me")
    first = next(stream)
    jobs.cancel("me")
    left = []
    with pytest.raises(jobs.Cancelled):
        left.extend(stream)
    assert first.step + len(left) < 20


@pytest.mark.parametrize(
    ("text", "ends", "expected"),
    [
        ("CFG(3.0)", (0.5, 2), "Interval(CFG(3.0), 0.5, 2)"),
        ("Interval(APG(4.0), 0.28, 5.42)", (0, 80), "Interval(APG(4.0), 0, 80)"),
        ("Interval(CFG(2.0), 1, 3, 'step')", (0.5, 2), "Interval(Interval(CFG(2.0), 1, 3, 'step'), 0.5, 2)"),
    ],
)
def test_another_interval_rewrites_the_guidance(text, ends, expected):
    changed = limited(parse(text), *ends)
    assert changed == parse(expected)
    assert band(changed) == ends


@pytest.mark.parametrize("ends", [(5.0, 1.0), (-1.0, 2.0), ("a", 1), (None, 1), (math.nan, 1)])
def test_no_interval(ends):
    with pytest.raises(Refused) as told:
        limited(CFG(3.0), *ends)
    assert told.value.field == "interval"


def test_band_and_line_stand_at_their_noise_levels():
    levels = [64.0, 8.0, 1.0, 0.125]
    row = {"stage": "step", "weight": 2.0, "rows": 2}
    drawn = plots.trajectory([{**row, "sigma": sigma} for sigma in levels])
    picture = drawn.marked("what it shows", (0.125, 8.0), at=1.0)
    svg = b64decode(re.search(r"base64,([^\"]+)", picture)[1]).decode()
    left, _, width, _ = drawn.boxes[0]

    def place(sigma):  # logarithmic, large levels on the left
        first, last = drawn.ends
        return left + width * math.log(first / sigma) / math.log(first / last)

    x, across = (
        float(v) for v in re.search(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="[\d.]+" fill="#', svg).groups()
    )
    assert x == pytest.approx(place(8.0), abs=0.1)
    assert x + across == pytest.approx(place(0.125), abs=0.2)
    assert float(re.findall(r'<path d="M([\d.]+) [\d.]+v', svg)[-1]) == pytest.approx(place(1.0), abs=0.1)
    dots = [float(v) for v in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+" style="fill: #4269d0', svg)]
    assert dots == pytest.approx([place(sigma) for sigma in levels], abs=0.1)  # matplotlib's own places of the same levels
    assert 'alt="what it shows"' in picture


def test_levels_beyond_the_axis_are_cut_off():
    drawn = plots.trajectory([{"stage": "step", "weight": 1.0, "rows": 1, "sigma": s} for s in (math.inf, 2.0, 0.5)])
    assert drawn.marked("", (0.0, math.inf), at=math.inf).startswith("<img")


@pytest.fixture(scope="module")
def client(models):
    with served("trajectory", models) as found:
        yield found


def run(client, guidance="Interval(CFG(3.0), 0.28, 5.42)", steps=3, seed="0", sampler="heun", label="horse"):
    return client.predict("builtin/cifar10", label, "", seed, guidance, sampler, steps, api_name="/trajectory_run")


def test_the_slider_shows_steps_without_running_the_model(client, models):
    calls = []
    handle = models.get("builtin/cifar10").pipe.models["main"].register_forward_hook(lambda *_: calls.append(1))
    try:
        status = run(client, steps=20, sampler="euler")[0]
        assert "20 steps" in status
        ran = len(calls)
        image, told, plot = client.predict(20, "CFG(3.0)", api_name="/trajectory_step")
    finally:
        handle.remove()
    assert "Step 20 of 20" in told
    assert "<img" in plot
    assert "Estimate of the clean image at step 20" in image
    assert 0 < ran == len(calls)


def test_one_step_has_no_slider(client):
    status, *_, step, _, _ = run(client, steps=1)[:6]
    assert "1 step," in status
    assert not step["visible"]
    assert "Step 1 of 1" in client.predict(1, "CFG(3.0)", api_name="/trajectory_step")[1]
    assert run(client, steps=2)[3]["visible"]


def test_the_endpoint_for_programs(client, models):
    want = models.get("builtin/cifar10").pipe([7], [5], "CFG(2.0)", steps=2, trace="full")
    out = client.predict("builtin/cifar10", "horse", "5", "CFG(2.0)", "heun", 2, api_name="/trajectory")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(b64decode(out["image"])))), np.asarray(want.images[0]))
    assert out["nfe"] == want.nfe[0]
    assert [row["cosine"] for row in out["trace"]] == [row["cosine"] for row in want.trace.rows if row["stage"] == "step"]
    assert len(out["previews"]) == 2
    with pytest.raises(AppError, match=r"guidance: .*did you mean"):
        client.predict("builtin/cifar10", "horse", "5", "CGF(2.0)", "heun", 2, api_name="/trajectory")


def test_the_interval_is_moved_over_the_api(client):
    run(client)
    guidance, plot, *rest = client.predict([1.0, 10], "CFG(3.0)", 1, api_name="/trajectory_interval")
    assert guidance == "Interval(CFG(3.0), 1.0, 10.0)"
    assert "guidance to act where 1 &lt; sigma &lt;= 10" in plot
    assert not errors(rest)
    ends, *_ = client.predict("Interval(APG(4.0), 0.5, 2.5)", 1, api_name="/trajectory_guidance")
    assert ends == [0.5, 2.5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance": "CGF(3.0)"}, "did you mean .*CFG"),
        ({"guidance": "__import__('os')"}, "cannot be called|unknown name|not allowed"),
        ({"guidance": "CFG(" * 400}, "not an expression|nested"),
        ({"seed": "0, 1"}, "give one seed"),
        ({"seed": "-1"}, "is no seed"),
        ({"sampler": "hoin"}, "hoin"),
        ({"label": "unicorn"}, "is no class"),
    ],
)
def test_bad_input_is_told_at_its_field(client, changes, words):
    found = errors(run(client, **changes))
    assert len(found) == 1
    assert re.search(words, found[0])
    assert "Traceback" not in found[0]


def test_a_bad_interval_is_told_at_its_field(client):
    for ends in ([5, 1], [1], "abc", [10**400, 1]):
        found = errors(client.predict(ends, "CFG(3.0)", 1, api_name="/trajectory_interval"))
        assert len(found) == 1
    body = '{"data": [[1.0, 10], "CFG(3.0)", NaN, null]}'
    answer = httpx.post(
        f"{client.src}gradio_api/run/trajectory_interval", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.json()["data"][0] == "Interval(CFG(3.0), 1.0, 10.0)"
