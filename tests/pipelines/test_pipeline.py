"""The class pipeline over exact denoisers: what it returns, what it costs, what it refuses."""

import matplotlib
import numpy as np
import pytest
import torch

from genkit.guidance import APG, CFG, Interval
from genkit.noise import FLOW, GRIDS, edm, uniform_t
from genkit.pipelines.diffusion import ClassPipeline
from genkit.pipelines.images import to_pil, to_uint8
from genkit.random import Gaussian
from genkit.samplers import SAMPLERS
from tests.gaussians import Gaussians, solve

matplotlib.use("Agg")
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def pipe():
    """Classes are Gaussians at -0.5, 0, 0.5; the dropped label is one wide Gaussian."""
    model = Gaussians([-0.5, 0.0, 0.5, 0.0], [0.01, 0.01, 0.01, 0.2])
    return ClassPipeline({"main": model}, CLASSES, (3, 4, 4), fingerprint="f" * 64, name="toy")


def rows(pipe):
    return pipe.models["main"].rows


# ---- what comes out ----


def test_an_output(pipe):
    out = pipe(classes=[2, "ant", "bee"], seeds=[5, 6, 7], guidance=CFG(2.0), steps=6)
    assert out.latents.shape == (3, 3, 4, 4)
    assert out.latents.dtype == torch.float32
    assert out.pixels.dtype == torch.uint8
    assert [image.size for image in out.images] == [(4, 4)] * 3
    assert (out.classes, out.seeds) == ([2, 0, 1], [5, 6, 7])
    assert torch.equal(torch.from_numpy(np.stack([np.asarray(i) for i in out.images])).permute(0, 3, 1, 2), out.pixels)


def test_each_image_shows_its_class(pipe):
    means = pipe(classes=[2, "ant", "bee"], steps=18).latents.mean((1, 2, 3)).tolist()
    assert means == pytest.approx([0.5, -0.5, 0.0], abs=0.06)  # standard error 0.1 / sqrt(48)


def test_pixels_are_rounded_by_the_stated_rule():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.003, 0.99, 1.0, 5.0]).reshape(1, 1, 1, 8).expand(1, 3, 1, 8)
    assert to_uint8(x)[0, 0, 0].tolist() == [0, 0, 0, 128, 128, 254, 255, 255]
    assert to_pil(to_uint8(x))[0].getpixel((3, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("classes", "seeds", "expected"),
    [
        (1, None, ([1], [0])),
        ("cat", 9, ([2], [9])),
        ([0, 1], None, ([0, 1], [0, 1])),
        (1, [4, 5, 6], ([1, 1, 1], [4, 5, 6])),
        ([0, 2], 3, ([0, 2], [3, 3])),
        (torch.tensor([0, 2]), np.array([1, 2]), ([0, 2], [1, 2])),
        (range(3), range(3), ([0, 1, 2], [0, 1, 2])),
        (np.int64(2), np.int64(4), ([2], [4])),
        (np.array([0, 2]), torch.tensor([1, 2]), ([0, 2], [1, 2])),
    ],
)
def test_classes_and_seeds_are_paired(pipe, classes, seeds, expected):
    out = pipe(classes, seeds, steps=1)
    assert (out.classes, out.seeds) == expected


def test_class_and_seed_make_the_image(pipe):
    a = pipe([0, 0, 1, 1], [1, 2, 1, 2], sampler="euler", steps=4).latents
    assert torch.equal(a, pipe([0, 0, 1, 1], [1, 2, 1, 2], sampler="euler", steps=4).latents)
    assert all((a[i] - a[j]).abs().max() > 0.05 for i in range(4) for j in range(i))


def test_guidance_may_be_an_object_text_a_number_or_nothing(pipe):
    as_object = pipe(0, 1, CFG(3.0), steps=4).latents
    assert torch.equal(pipe(0, 1, "CFG(3.0)", steps=4).latents, as_object)
    assert torch.equal(pipe(0, 1, 3, steps=4).latents, as_object)
    assert torch.equal(pipe(0, 1, None, steps=4).latents, pipe(0, 1, "NoGuidance()", steps=4).latents)
    assert not torch.equal(pipe(0, 1, None, steps=4).latents, as_object)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("sampler", ["heun", "euler_ancestral"])
def test_batch_size_changes_chunks_not_images(pipe, batch_size, sampler):
    classes, seeds = [i % 3 for i in range(7)], list(range(7))
    whole = pipe(classes, seeds, "Interval(APG(4.0), 0.28, 5.42)", sampler=sampler, steps=6)
    rows(pipe).clear()
    chunks = pipe(classes, seeds, "Interval(APG(4.0), 0.28, 5.42)", sampler=sampler, steps=6, batch_size=batch_size)
    torch.testing.assert_close(chunks.latents, whole.latents, rtol=0, atol=1e-5)
    assert (chunks.nfe, chunks.classes, chunks.seeds) == (whole.nfe, classes, seeds)
    assert chunks.calls == len(rows(pipe)) == whole.calls * -(-7 // batch_size)
    assert max(rows(pipe)) <= 2 * batch_size
    assert {r["batch"] for r in chunks.trace.rows} == set(range(-(-7 // batch_size)))


def test_a_stochastic_sampler_starts_where_a_deterministic_one_does(pipe):
    starts = []
    for sampler in ("euler", "euler_ancestral", "heun(churn=0.5)"):
        seen = []
        pipe([0, 1], [1, 2], sampler=sampler, grid=edm(3), callback=lambda info, _, seen=seen: seen.append(info.x))
        starts.append(seen[0])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])  # churn raises the level before the first evaluation


def test_a_run_is_start_and_way_from_two_streams(pipe):
    """Stream 0 makes the start, stream 1 what is added on the way: the start's own noise never comes back."""
    seeds, grid, like = [8, 9], edm(5), torch.empty(2, 3, 4, 4)
    start, way = 80 * Gaussian(seeds, stream=0)(like), Gaussian(seeds, stream=1)
    expected = solve(pipe.models["main"], start, grid, "euler_ancestral", noise=way)
    assert torch.equal(pipe([0, 0], seeds, sampler="euler_ancestral", grid=grid).latents, expected)


def test_the_grid_is_the_samplers_own_unless_given(pipe):
    for name in (name for name, sampler in SAMPLERS.items() if sampler.route is None):  # the others visit levels of their own
        out = pipe(0, 0, sampler=name, steps=3)
        expected = GRIDS[SAMPLERS[name].grid](3, 0.002, 80.0)[:-1].tolist()
        assert [r["sigma"] for r in out.trace.rows if r["stage"] == "step"] == expected
    assert pipe(0, 0, grid="exponential", steps=3).trace.column("sigma")[0] == 80.0
    levels = torch.tensor([10.0, 1.0, 0.0])
    assert pipe(0, 0, grid=levels, sampler="euler").trace.column("sigma") == [10.0, 1.0]
    assert pipe(0, 0, grid=[10.0, 1.0, 0.0], sampler="euler").trace.column("sigma") == [10.0, 1.0]


def test_flow_samplers_run_on_a_ve_network(pipe):
    flow = pipe([0, 2], [1, 1], sampler="flow_heun", steps=60, grid=uniform_t(60, 0, 80.0)).latents
    torch.testing.assert_close(flow, pipe([0, 2], [1, 1], sampler="heun", steps=60).latents, rtol=0, atol=0.02)
    assert SAMPLERS["flow_heun"].path == FLOW


# ---- what it costs ----


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluations_are_counted(pipe, steps):
    plain = pipe([0, 1], steps=steps, sampler="heun")
    assert (plain.nfe, plain.calls) == ([2 * steps - 1] * 2, 2 * steps - 1)
    assert rows(pipe) == [2] * (2 * steps - 1)
    guided = pipe([0, 1], guidance=CFG(2.0), steps=steps, sampler="heun")
    assert (guided.nfe, guided.calls) == ([2 * (2 * steps - 1)] * 2, 2 * steps - 1)
    assert pipe(0, guidance=CFG(2.0), steps=steps, sampler="dpmpp_2m").nfe == [2 * steps]


def test_an_interval_pays_for_its_steps_only(pipe):
    out = pipe([0, 1], guidance=Interval(APG(4.0), 0.28, 5.42), sampler="heun", steps=18)
    levels = [s for s in edm(18)[:-1].tolist() if 0.28 < s <= 5.42]
    inside = len(levels)
    assert inside == 6
    assert out.nfe == [35 + 2 * inside] * 2
    assert (out.calls, sum(rows(pipe))) == (35, sum(out.nfe))
    assert sum(out.trace.column("rows")) == sum(out.nfe)
    guided = [(r["sigma"], r["stage"]) for r in out.trace.rows if r["branches"] == "cond+uncond"]
    assert guided == [(s, stage) for s in levels for stage in ("step", "second")]


def test_the_trace_is_a_table(pipe):
    out = pipe([0, 1], guidance=Interval(CFG(3.0), 0.28, 5.42), sampler="heun", steps=5, trace="full")
    assert len(out.trace) == 9
    first, guided = out.trace.rows[0], next(r for r in out.trace.rows if r["branches"] == "cond+uncond")
    assert (first["step"], first["stage"], first["sigma"], first["rows"], first["weight"]) == (0, "step", 80.0, 2, 1.0)
    assert (guided["rows"], guided["weight"]) == (4, 3.0)
    assert -1 <= guided["cosine"] <= 1
    assert guided["update_norm"] > 0 == first["update_norm"]
    text = str(out.trace).splitlines()
    assert len(text) == 10
    assert text[0].split()[:4] == ["batch", "step", "stage", "sigma"]
    assert pipe([0], steps=2, trace="none").trace.rows == []
    assert "cosine" not in pipe([0], guidance=CFG(2.0), steps=2).trace.rows[0]


def test_the_trace_is_drawn(pipe):
    import matplotlib.pyplot as plt

    trace = pipe([0, 1], guidance=CFG(3.0), steps=5, trace="full").trace
    ax = trace.plot()
    assert ax.get_xscale() == "log"
    figure, own = plt.subplots()
    assert trace.plot(own) is own
    assert own.lines[0].get_ydata().tolist() == [3.0] * 5
    figure.canvas.draw()
    plt.close("all")


def test_progress_goes_to_stderr(pipe, capsys):
    pipe([0, 1], steps=3, batch_size=1, progress=True)
    captured = capsys.readouterr()
    assert "6" in captured.err
    assert captured.out == ""
    pipe([0], steps=3)
    assert capsys.readouterr().err == ""


def test_global_random_state_is_left_alone(pipe):
    before = torch.get_rng_state()
    pipe([0, 1], sampler="euler_ancestral", guidance=CFG(2.0), steps=3)
    assert torch.equal(torch.get_rng_state(), before)


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["cta"]}, r"classes contains 'cta', which toy does not know; did you mean 'cat'"),
        ({"classes": ["zzzz"]}, "use one of ant, bee, cat"),
        ({"classes": [3]}, r"classes contains 3: use an index from 0 to 2 or a name \(ant, bee, cat\)"),
        ({"classes": [-1]}, "classes contains -1"),
        ({"classes": [True]}, "classes contains True"),
        ({"classes": [1.0]}, "classes contains 1.0"),
        ({"classes": None}, "classes contains None"),
        ({"classes": []}, "classes is empty: give at least one class"),
        ({"classes": [0, 1], "seeds": [1, 2, 3]}, "seeds has 3 entries but classes has 2: give one seed per class"),
        ({"classes": [0, 1], "seeds": [1]}, "seeds has 1 entries but classes has 2"),
        ({"classes": [0], "seeds": []}, "seeds has 0 entries but classes has 1"),
        ({"seeds": [-1]}, "seeds contains -1"),
        ({"seeds": True}, "seeds contains True"),
        ({"seeds": "12"}, "seeds contains '12'"),
        ({"seeds": 1.5}, "seeds contains 1.5"),
        ({"guidance": "Interval(CFG(3.0), 5.42, 0.28)"}, "low=5.42 is above high=0.28; .*Interval"),
        ({"guidance": "CGF(3.0)"}, "unknown name 'CGF'; did you mean ICG or CFG"),
        ({"guidance": "__import__('os').system('true')"}, "guidance"),
        ({"guidance": "CFG(nan)"}, "scale=nan"),
        ({"guidance": [1.0]}, "guidance=.* must be a guidance object, an expression"),
        ({"guidance": True}, "guidance=True must be"),
        ({"sampler": "hun"}, "unknown name 'hun'; did you mean heun"),
        ({"sampler": "heun(eta=1)"}, "no option 'eta'"),
        ({"grid": "kaarras"}, "grid='kaarras' is unknown; use one of karras, edm, exponential, uniform_t"),
        ({"grid": 5}, "grid=5"),
        ({"grid": {}}, "grid="),
        ({"grid": torch.tensor([1.0, 2.0])}, "strictly falling"),
        ({"grid": torch.tensor([[2.0, 1.0]])}, "strictly falling"),
        ({"grid": ["a", "b"]}, "grid="),
        ({"steps": 0}, "steps=0: use an integer from 1 to 10000"),
        ({"steps": True}, "steps=True"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"trace": "fully"}, "trace='fully': use 'none', 'basic' or 'full'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_any_work(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"classes": [0], "steps": 2, **arguments})
    assert rows(pipe) == []
