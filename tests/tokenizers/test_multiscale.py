"""Multi-scale quantizers against those of VAR and Infinity."""

from __future__ import annotations

import pytest
import torch

from genkit.tokenizers.multiscale import MultiScaleBSQ, MultiScaleVQ
from tests.tokenizers.golden import close, listed, read, under


@pytest.mark.parametrize("case", range(5))
def test_variants_of_var(case):
    data, meta = read("var_quantizer_variants")
    about, own = meta["cases"][case], under(data, f"case{case}.")
    vq = MultiScaleVQ(
        about["V"],
        about["Cvae"],
        about["patch_nums"],
        share=about["share_quant_resi"],
        ratio=about["quant_resi"],
        cosine=about["using_znorm"],
        commit_weight=about["beta"],
    )
    vq.load_state_dict(under(own, "state_dict."))
    f = own["f"].requires_grad_()
    z_q, indices, losses = vq.encode(f)
    for found, wanted in zip(vq.split(indices), listed(own, "idx"), strict=True):
        assert torch.equal(found, wanted)
    close(z_q, own["forward_f_hat"])
    loss = sum(losses.values())
    close(loss, own["loss"])
    grad_f, grad_embedding = torch.autograd.grad(loss, [f, vq.embedding.weight])
    close(grad_f, own["grad_f"])
    close(grad_embedding, own["grad_embedding"])
    for found, wanted in zip(vq.f_hats(indices), listed(own, "f_hat"), strict=True):
        close(found, wanted)
    close(vq.next_inputs(indices), own["var_input"])


@pytest.mark.parametrize("down", ["bilinear", "area"])
def test_bits_of_infinity(down):
    data, meta = read("infinity_bsq")
    patch_nums = tuple(scale[1] for scale in meta["scale_schedule"])
    vq = MultiScaleBSQ(meta["bits"], patch_nums, down=down).eval()
    indices = vq.encode(data["bsq.x"][:, :, 0]).indices
    name = "ms" if down == "bilinear" else "official_ms"
    for found, wanted in zip(vq.split(indices), listed(data, f"{name}.bits"), strict=True):
        assert torch.equal(vq.base.bits(found).int(), wanted.flatten(1, 3))
    for found, wanted in zip(vq.f_hats(indices), listed(data, "ms.cum"), strict=True):
        close(found, wanted[:, :, 0])
    close(vq.f_hats(indices)[-1], data["official_ms.quantized_out"])
    inputs = listed(data, "ms.next_input" if down == "bilinear" else "official_ms.var_input")
    close(vq.next_inputs(indices), torch.cat([x.flatten(2).transpose(1, 2) for x in inputs], 1))


def test_steps_are_the_walk():
    data, _ = read("var_quantizer_variants")
    own = under(data, "case3.")
    vq = MultiScaleVQ(16, 4, (1, 2, 3, 4), share=0).eval()
    vq.load_state_dict(under(own, "state_dict."))
    f_hat, fed = None, []
    for i, tokens in enumerate(listed(own, "idx")):
        f_hat, following = vq.step(f_hat, vq.codes(tokens), i)
        close(f_hat, own[f"f_hat.{i}"])
        fed += [] if following is None else [following]
    close(torch.cat(fed, 1), own["var_input"])
    assert vq.length == 1 + 4 + 9 + 16


def test_wrong_shapes():
    vq = MultiScaleVQ(8, 2, (1, 2, 4))
    assert [s.shape[1] for s in vq.split(torch.zeros(2, 5, dtype=torch.long))] == [1, 4]
    for n in (0, 3, 22):
        with pytest.raises(ValueError, match=f"indices has {n} tokens a row; scales end at 1, 5, 21"):
            vq.split(torch.zeros(2, n, dtype=torch.long))
    with pytest.raises(ValueError, match=r"z has height and width \(4, 3\)"):
        vq.encode(torch.zeros(1, 2, 4, 3))
    with pytest.raises(ValueError, match=r"patch_nums=\(2, 1\)"):
        MultiScaleVQ(8, 2, (2, 1))
    with pytest.raises(ValueError, match="share=-1"):
        MultiScaleVQ(8, 2, share=-1)
    with pytest.raises(ValueError, match="down='cubic'"):
        MultiScaleBSQ(4, (1, 2), down="cubic")
