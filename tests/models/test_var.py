"""VAR: the official networks' logits, layouts, and that a cache changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.guidance.base import Perturbation
from genkit.models.var import VAR, VAR_SIZES, VARConfig
from genkit.samplers.autoregressive.cache import StaticCache
from tests.tokenizers import golden

FILES = ("var_l2norm", "var_no_l2norm", "var_shared_aln", "var_clip")


def build(name: str) -> tuple[VAR, dict[str, Tensor], dict[str, Any]]:
    """The network of a golden file, its tensors and the parameters of the run that made them."""
    tensors, meta = golden.read(name)
    c = meta["config"]
    model = VAR(
        VARConfig(
            c["depth"],
            c["embed_dim"],
            c["num_heads"],
            tuple(c["patch_nums"]),
            vocabulary=128,
            code_dim=8,
            num_classes=c.get("num_classes", 1000),
            text_dim=c.get("n_cond_embed"),
            shared_adaln=c["shared_aln"],
            l2_norm=c["attn_l2_norm"],
        )
    )
    model.load_state_dict(golden.under(tensors, "state_dict."))
    return model.eval().requires_grad_(False), tensors, meta


def cache_for(model: VAR, rows: int) -> StaticCache:
    return StaticCache.of(model, rows)


def first(inputs: Tensor) -> Tensor:
    """Inputs of all scales, from those after the first."""
    return torch.nn.functional.pad(inputs, (0, 0, 1, 0), value=torch.nan)


@pytest.mark.parametrize("name", FILES[:3])
def test_teacher_forced_logits_are_the_official_ones(name: str) -> None:
    model, tensors, _ = build(name)
    inputs, label = first(tensors["tf.x_wo_first"]), tensors["label"]
    golden.close(model(inputs, label).logits, tensors["tf.logits_cond"])
    golden.close(model(inputs, model.embed(label)).logits, tensors["tf.logits_cond"])
    if "tf.logits_uncond" in tensors:
        golden.close(model(inputs, model.null(2)).logits, tensors["tf.logits_uncond"])


@pytest.mark.parametrize("name", FILES)
def test_scales_through_a_cache_are_the_teacher_forced_ones(name: str) -> None:
    model, tensors, _ = build(name)
    generator = torch.Generator().manual_seed(0)
    inputs = first(torch.randn(2, model.length - 1, 8, generator=generator))
    condition = torch.cat((tensors["embedding" if name == "var_clip" else "label"][:1], model.null(1)))
    whole = model(inputs, condition)
    for ends in ((1, 5, 14, 39, 103), (14, 39, 103)):  # scale by scale, and several scales in the first pass
        cache, start = cache_for(model, 2), 0
        for end in ends:
            found = model(inputs[:, start:end], condition, cache, start)
            golden.close(found.logits, whole.logits[:, start:end])
            golden.close(found.hidden, whole.hidden[:, start:end])
            start = end


def test_a_scale_does_not_see_the_scales_after_it() -> None:
    model, tensors, _ = build("var_l2norm")
    inputs, label = first(tensors["tf.x_wo_first"]), tensors["label"]
    inputs[:, 39] += 1  # position 39, the first of the last scale
    found, before = model(inputs, label).logits, tensors["tf.logits_cond"]
    golden.close(found[:, :39], before[:, :39])
    assert (found[:, 39:] - before[:, 39:]).abs().amax(-1).min() > 1e-3  # and each position of its own scale sees it


def test_a_mask_given_is_the_one_used() -> None:
    model, tensors, _ = build("var_l2norm")
    inputs, label = first(tensors["tf.x_wo_first"]), tensors["label"]
    everything = torch.ones(103, 103, dtype=torch.bool)
    assert (model(inputs, label, mask=everything).logits - tensors["tf.logits_cond"]).abs().max() > 1e-2
    rows = model.scales.mask(0, 103).dense(103, 103, "cpu").expand(2, 1, 103, 103)
    golden.close(model(inputs, label, mask=rows).logits, tensors["tf.logits_cond"])


@pytest.mark.parametrize("size", ["d16", "d20", "d24", "d30", "d36"])
def test_the_layout_is_that_of_the_released_file(size: str) -> None:
    with torch.device("meta"):
        model = VAR(VAR_SIZES[size])
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == golden.layout("var", f"var_{size}.pth")


def test_buffers_are_the_official_ones() -> None:
    _, tensors, _ = build("var_l2norm")
    model = VAR(VARConfig(1, 8, 2, (1, 2, 3, 5, 8), 16, 4))
    assert torch.equal(model.lvl_1L, tensors["state_dict.lvl_1L"])
    assert torch.equal(model.attn_bias_for_masking, tensors["state_dict.attn_bias_for_masking"])
    assert torch.equal(model.scales.mask(0, 103).dense(103, 103, "cpu"), model.attn_bias_for_masking[0, 0] == 0)


def test_both_shapes_of_the_attention_scale_and_the_wrapper_of_the_training_are_read(tmp_path: Any) -> None:
    model, tensors, _ = build("var_l2norm")
    weights = golden.under(tensors, "state_dict.")
    turned = {key: value.transpose(1, 2) if key.endswith("scale_mul_1H11") else value for key, value in weights.items()}
    torch.save({"trainer": {"var_wo_ddp": turned}, "epoch": 3}, tmp_path / "training.pth")
    with torch.device("meta"):
        read = VAR(model.config)
    read.load_state(tmp_path / "training.pth")
    golden.close(read(first(tensors["tf.x_wo_first"]), tensors["label"]).logits, tensors["tf.logits_cond"])


def test_weakened_layers() -> None:
    model, tensors, _ = build("var_l2norm")
    inputs, label = first(tensors["tf.x_wo_first"]), tensors["label"]
    whole = model(inputs, label).logits
    with model.perturbed(Perturbation("skip", ("blocks.1",))):
        skipped = model(inputs, label).logits
    block, model.blocks = model.blocks[1], torch.nn.ModuleList([model.blocks[0], model.blocks[2]])
    golden.close(skipped, model(inputs, label).logits)
    model.blocks.insert(1, block)
    with model.perturbed(Perturbation("blur", sigma=1e-3)):  # too narrow to reach a neighbour
        golden.close(model(inputs, label).logits, whole)
    for kind in ("identity", "blur"):
        with model.perturbed(Perturbation(kind)):
            weak = model(inputs, label).logits
            cache = cache_for(model, 2)
            parts = [model(inputs[:, a:b], label, cache, a).logits for a, b in ((0, 14), (14, 39))]
            golden.close(torch.cat(parts, 1), weak[:, :39])
        assert (weak - whole).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"blocks\.7.*blocks\.2"):
        model.perturbed(Perturbation("skip", ("blocks.7",)))


@pytest.mark.parametrize("shared", [False, True])
def test_a_new_network_says_nothing_and_all_of_it_learns(shared: bool) -> None:
    torch.manual_seed(0)
    model = VAR(VARConfig(2, 32, 2, (1, 2, 3), 64, 4, num_classes=5, shared_adaln=shared))
    logits = model(torch.randn(2, 14, 4), torch.tensor([1, 5])).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(28))
    assert loss.item() == pytest.approx(math.log(64), abs=0.05)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_half_precision_gives_logits_in_float32() -> None:
    model, tensors, _ = build("var_shared_aln")
    inputs = first(tensors["tf.x_wo_first"]).nan_to_num()
    found, wanted = model.bfloat16()(inputs.bfloat16(), tensors["label"]).logits, tensors["tf.logits_cond"]
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="heads=3"):
        VAR(VARConfig(1, 8, 3))
    with pytest.raises(ValueError, match="growing"):
        VAR(VARConfig(1, 8, 2, (1, 3, 2)))
    model = VAR(VARConfig(1, 8, 2, (1, 2, 3), 16, 4))
    with pytest.raises(ValueError, match="whole scales"):
        model(torch.zeros(1, 3, 4), torch.zeros(1, dtype=torch.long), None, 5)
