"""What is the same at every step is computed once, and never what has changed since."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from torch import Tensor, nn

from genkit.guidance import CFG
from genkit.models.flowar import FlowAR, FlowARConfig
from genkit.pipelines import DiffusersPipeline
from genkit.pipelines.attach import attach
from genkit.pipelines.hoist import hoist
from genkit.pipelines.hoist.memo import KEEP, Count, Memo
from genkit.samplers.autoregressive.flow_scale import GuidedFlow, next_scale_flow
from tests.attach.tiny import CASES, distance, lively, randn, seeded

PART = "Interval(CFG(3.0), 1, 2, 'step')"
TEXT = ["sd", "sdxl", "sd3", "pixart", "sana", "wan", "wan 2.2", "sd control", "flux"]


class Calls:
    """Counts the calls that reach ``torch.nn.functional.linear`` with one of these weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *layers: nn.Linear) -> None:
        self.count, plain, mine = 0, nn.functional.linear, {id(layer.weight) for layer in layers}

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            self.count += id(weight) in mine
            return plain(x, weight, bias)

        monkeypatch.setattr(nn.functional, "linear", linear)


def crossing(network: nn.Module) -> list[nn.Linear]:
    """The projections of the text in cross-attention."""
    return [p for m in network.modules() if getattr(m, "is_cross_attention", False) for p in (m.to_k, m.to_v)]


# ---- the text ----


@pytest.mark.parametrize(("name", "guidance"), [("sd", None), ("pixart", None), *((name, PART) for name in TEXT)])
def test_the_same_bit_for_bit(name: str, guidance: str | None) -> None:
    case = CASES[name]

    def run() -> Tensor:
        with nullcontext() if guidance is None else attach(case.pipe, guidance):
            return case(3.0)

    plain = run()
    with hoist(case.pipe) as found:
        assert torch.equal(run(), plain)
    assert found.text.reused >= found.text.computed > 0 or name == "wan 2.2"  # whose two networks have two steps each


def test_the_text_is_projected_once_for_each_set_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd"]
    layers = crossing(case.pipe.unet)
    calls = Calls(monkeypatch, *layers)
    case(3.0)
    assert calls.count == 4 * len(layers)  # each of 4 steps
    calls.count = 0
    with hoist(case.pipe):
        case(3.0)
    assert calls.count == len(layers)
    calls.count = 0
    with hoist(case.pipe), attach(case.pipe, PART):
        case(3.0)
    assert calls.count == 2 * len(layers)  # the conditional rows, and both


def test_no_text_of_one_run_reaches_the_next() -> None:
    case = CASES["pixart"]
    other = {"prompt_embeds": randn(2, 5, 12, seed=77), "negative_prompt_embeds": randn(2, 5, 12, seed=78)}
    plain = [case(3.0), case(3.0, **other), case(2.0, 1), case(3.0)]
    with hoist(case.pipe):
        for again, expected in zip([case(3.0), case(3.0, **other), case(2.0, 1), case(3.0)], plain, strict=True):
            assert torch.equal(again, expected)


@pytest.mark.parametrize("name", ["sd", "pixart"])
@pytest.mark.parametrize("change", ["in place", "another", "a view of it"])
def test_a_text_that_changes_half_way_is_seen(name: str, change: str) -> None:
    case = CASES[name]
    network = case.pipe.unet if name == "sd" else case.pipe.transformer
    shape = (1, 4, 8, 8)

    def run() -> list[Tensor]:
        text = randn(2, 5, 12, seed=3)
        out = []
        for step in range(4):
            if step == 2 and change == "in place":
                text.mul_(-1)
            if step == 2 and change == "another":
                text = text * 2
            given = text[step // 2 :][:1] if change == "a view of it" else text[:1]
            with torch.no_grad():
                out.append(
                    network(randn(*shape), timestep=torch.tensor([500]), encoder_hidden_states=given, return_dict=False)[0]
                )
        return out

    plain = run()
    with hoist(network) as found:
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert not torch.equal(plain[0], plain[3])  # the change shows
    assert found.text.reused == found.text.computed  # of two steps, one


class Watched:
    """A linear layer under a memo, and whether a call reached it."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        self.layer = layer or nn.Linear(3, 4)
        self.count = Count()
        self.memo, self.reached = Memo(self.layer, self.count), 0

    def __call__(self, x: Tensor) -> Tensor:
        def original(x: Tensor) -> Tensor:
            self.reached += 1
            return type(self.layer).forward(self.layer, x)

        out = self.memo(original, (x,), {})
        assert torch.equal(out, type(self.layer).forward(self.layer, x))  # never anything else
        return out

    def fresh(self, x: Tensor) -> bool:
        """Whether it is computed anew."""
        before = self.reached
        self(x)
        return self.reached > before


@torch.no_grad()
def test_what_is_kept_and_what_is_not() -> None:
    one, x = seeded(Watched), randn(2, 5, 3)
    assert [one.fresh(x) for _ in range(3)] == [True, False, False]
    assert one.fresh(x[:1])
    assert not one.fresh(x[:1])
    assert one.fresh(x[1:])
    assert not one.fresh(x)
    x[0, 0, 0] = 9  # a write to it is a write to its views
    assert one.fresh(x)
    assert one.fresh(x[:1])
    view = x.view(10, 3)
    assert one.fresh(view)
    assert not one.fresh(x.view(10, 3))
    view.zero_()
    assert one.fresh(x)
    assert one.fresh(x.clone())  # equal, but another


@torch.no_grad()
def test_memory_that_is_used_again_is_another_tensor() -> None:
    one = seeded(Watched)
    for k in range(20):
        one(randn(2, 3, seed=k))  # freed, and its place given to the next
    assert one.reached == 20
    assert len(one.memo.entries) == KEEP


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    one, x = seeded(Watched), randn(2, 3)
    one(x)
    one.layer.weight.mul_(2)
    assert one.fresh(x)
    assert not one.fresh(x)
    one.layer.bias.data = torch.ones(4)
    assert one.fresh(x)
    assert not one.fresh(x)
    one.layer.weight = nn.Parameter(torch.ones(4, 3))
    assert one.fresh(x)
    assert not one.fresh(x)
    one.layer.load_state_dict({"weight": torch.zeros(4, 3), "bias": torch.zeros(4)})
    assert one.fresh(x)


@torch.no_grad()
def test_an_output_that_somebody_writes_to_is_not_used_again() -> None:
    one, x = seeded(Watched), randn(2, 3)
    one(x).mul_(2)
    assert one.fresh(x)


def test_autograd_inference_tensors_and_autocast() -> None:
    one, x = seeded(Watched), randn(2, 3)
    assert one.fresh(x)
    assert one.fresh(x)
    out = one(x)
    out.sum().backward()
    assert one.layer.weight.grad is not None
    with torch.inference_mode():
        y = randn(2, 3)
        assert one.fresh(y)
        assert one.fresh(y)
        y.mul_(2)  # which torch does not count
        one(y)
        assert one.fresh(x)
    with torch.no_grad():
        assert one.fresh(x)
        assert not one.fresh(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert one.fresh(x)
            assert one(x).dtype == torch.bfloat16
        assert one(x).dtype == torch.float32


class Scaled(nn.Linear):
    """Has a number beside its weights, as a LoRA."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


@torch.no_grad()
def test_layers_of_other_libraries_are_left_alone() -> None:
    one, x = Watched(Scaled(3, 4)), randn(2, 3)
    one(x)
    Scaled.scale = 2.0
    try:
        one(x)
    finally:
        Scaled.scale = 1.0
    assert one.count.reused == 0


def test_other_threads_are_not_served() -> None:
    from threading import Thread

    case, out = CASES["sd"], []
    with hoist(case.pipe) as found:
        thread = Thread(target=lambda: out.append(case(3.0)))
        thread.start()
        thread.join()
    assert found.text == Count()
    assert torch.equal(out[0], case(3.0))


# ---- AdaLN ----


def modulating(pipe: Any) -> list[nn.Linear]:
    return [block.norm1.linear for block in pipe.transformer.transformer_blocks]


@pytest.mark.parametrize("guidance", [None, PART, "CFG(3.0)", "APG(3.0)"])
def test_modulations_of_all_steps_come_of_one_product_per_block(guidance: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["dit"]
    guided: Callable[[], AbstractContextManager[Any]] = lambda: nullcontext() if guidance is None else attach(case.pipe, guidance)  # noqa: E731
    with guided():
        plain = case(3.0)
    calls = Calls(monkeypatch, *modulating(case.pipe))
    with hoist(case.pipe) as found, guided():
        got = case(3.0)
    assert distance(got, plain) < 1e-6
    assert calls.count == len(modulating(case.pipe)) == 2
    assert found.modulation.computed == 2 * 4 * 3  # blocks, steps, two labels and none


def test_a_label_or_a_time_that_was_not_planned() -> None:
    network = another_dit()

    def out(t: list[float], y: list[int]) -> Tensor:
        with torch.no_grad():
            return network(randn(len(y), 4, 8, 8), timestep=torch.tensor(t), class_labels=torch.tensor(y), return_dict=False)[0]

    asks = [([900.0], [1]), ([900.0, 900.0], [1, 1000]), ([3.5, 900.0], [2, 7]), ([600.0, 600.0], [7, 2]), ([900.0], [1])]
    plain = [out(*ask) for ask in asks]
    for memory in (0, 10**9):
        with hoist(network, timesteps=[900, 600, 300], memory=memory):
            for ask, expected in zip(asks, plain, strict=True):
                assert distance(out(*ask), expected) < 1e-6
    assert distance(plain[0], plain[3][1:]) > 1e-3


def test_memory_bounds_the_tables() -> None:
    case = CASES["dit"]
    row = sum(layer.out_features for layer in modulating(case.pipe)) * 4
    plain = case(3.0)
    with hoist(case.pipe, memory=3 * row * 2) as found:  # three labels, two steps
        assert distance(case(3.0), plain) < 1e-6
    assert found.modulation.computed == 2 * (2 * 3) * 2  # twice


def another_dit() -> Any:
    """A network like that of the case, with weights of its own, which a test may change."""
    network = CASES["dit"].pipe.transformer
    return lively(seeded(type(network).from_config, network.config)).eval()


def test_modulations_of_changed_weights_and_of_the_same_tensors() -> None:
    network = another_dit()
    x, t, y = randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([3])

    def run() -> list[Tensor]:
        out = [network(x, timestep=t, class_labels=y, return_dict=False)[0]]
        network.transformer_blocks[1].norm1.linear.weight.mul_(2)
        out.append(network(x, timestep=t, class_labels=y, return_dict=False)[0])
        network.transformer_blocks[1].norm1.linear.weight.mul_(0.5)
        y.fill_(5)
        out.append(network(x, timestep=t, class_labels=y, return_dict=False)[0])
        y.fill_(3)
        return out

    with torch.no_grad():
        plain = run()
        with hoist(network):
            got = run()
    assert all(distance(a, b) < 1e-5 for a, b in zip(got, plain, strict=True))  # one product, or one for each label
    assert min(distance(plain[0], plain[1]), distance(plain[0], plain[2])) > 1e-3


def test_modulations_have_gradients_where_they_are_wanted() -> None:
    network = another_dit()
    with hoist(network) as found:
        out = network(randn(1, 4, 8, 8), timestep=torch.tensor([500]), class_labels=torch.tensor([3]), return_dict=False)[0]
        out.sum().backward()
    assert found.modulation == Count()
    assert network.transformer_blocks[0].norm1.linear.weight.grad.abs().sum() > 0


def test_in_genkits_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = DiffusersPipeline(CASES["dit"].pipe)
    calls = Calls(monkeypatch, *modulating(pipe.pipe))
    for sampler in ("bridge", "dpmpp_2m"):
        options = {"sampler": sampler, "num_inference_steps": 4, "guidance": PART, "output_type": "latent"}
        plain, got = (pipe(class_labels=[1, 2], hoist=flag, **options).images for flag in (False, True))
        assert distance(got, plain) < 1e-6
    calls.count = 0
    pipe(class_labels=[1, 2], hoist=True, **{**options, "sampler": "bridge"})
    assert calls.count == 2  # blocks
    with hoist(pipe) as found:
        pipe(class_labels=[1, 2], **options)
    assert found.modulation.reused > 0


# ---- FlowAR ----


def test_the_conditions_of_a_flow_are_projected_once() -> None:
    config = FlowARConfig(16, 2, 16, 1, cross=True, heads=2, flow_heads=2, patch_nums=(1, 2), channels=3, num_classes=5)
    model = seeded(lively, seeded(FlowAR, config)).eval()
    labels = torch.tensor([1, 4])

    def run() -> Tensor:
        guided = GuidedFlow(model, CFG(2.0), {"cond": labels, "uncond": torch.full((2,), 5)}, 2)
        return next_scale_flow(guided, [0, 1], steps=5)

    plain = run()
    with hoist(model) as found:
        assert torch.equal(run(), plain)
    layers = 1 + 2 * 1  # what embeds the condition, and its norm and its projection in each block
    assert found.text == Count(computed=2 * layers, reused=2 * 3 * layers)  # two scales of four steps


# ---- leaving ----


def patched(pipe: Any) -> list[str]:
    nets = [net for net in pipe.components.values() if isinstance(net, nn.Module)]
    return [name for net in nets for name, module in net.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("name", ["sd", "dit", "pixart"])
def test_all_is_put_back(name: str) -> None:
    case = CASES[name]
    plain = case(3.0)

    def halted() -> None:
        with hoist(case.pipe):
            case(3.0)
            assert patched(case.pipe)
            raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"):
        halted()
    assert patched(case.pipe) == []
    assert torch.equal(case(3.0), plain)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"QwenImage.*nothing.*same at every step"), hoist(CASES["qwen"].pipe):
        pass
    with pytest.raises(ValueError, match="no network"), hoist("sd"):
        pass
    network = type(CASES["dit"].pipe.transformer).from_config(CASES["dit"].pipe.transformer.config)
    network.compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled"), hoist(network):
        pass
    assert all("forward" not in module.__dict__ for module in network.modules())
