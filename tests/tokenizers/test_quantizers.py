"""Quantizers against the official ones, and against what their definitions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit.tokenizers import quantizers
from genkit.tokenizers.quantizers import BSQ, IBQ, LFQ, SimVQ, VectorQuantizer, entropies, nearest
from tests.tokenizers.golden import FOLDER, close, read


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, of))


@pytest.mark.parametrize("case", [0, 1])
def test_simvq(case):
    data, meta = read("simvq_quantizer")
    about, own = meta["cases"][case], {k.split(".", 1)[1]: v for k, v in data.items() if k.startswith(f"simvq{case}.")}
    vq = SimVQ(64, 8, beta=about["beta"], legacy=about["legacy"])
    vq.load_state_dict({k.removeprefix("state_dict."): v for k, v in own.items() if k.startswith("state_dict.")})
    x = own["x"].requires_grad_()
    z_q, indices, losses = vq.encode(x)
    assert torch.equal(indices.flatten(), own["indices"])
    close(z_q, own["quantized"])
    close(vq.table(), own["projected_codebook"])
    # The official look-up leaves out the projection; decoding needs what the forward pass gave.
    close(vq.codes(indices).movedim(-1, 1), own["quantized"])
    assert (own["official_get_codebook_entry"] - own["quantized"]).abs().max() > 0.1
    loss = sum(losses.values())
    close(loss, own["commitment"])
    found = gradients(loss + z_q.square().mean(), x, vq.embedding_proj.weight, vq.embedding_proj.bias)
    for value, name in zip(found, ("grad_x", "grad_proj_weight", "grad_proj_bias"), strict=True):
        close(value, own[name])
    assert not vq.embedding.weight.requires_grad


@pytest.mark.parametrize("legacy", [False, True])
def test_simvq_of_the_second_producer(legacy):
    data = {k: torch.from_numpy(v) for k, v in np.load(FOLDER.parent / "samplers" / f"simvq_legacy{int(legacy)}.npz").items()}
    vq = SimVQ(32, 8, beta=float(data["beta"]), legacy=legacy)
    weights = {"embedding.weight": "codebook_frozen", "embedding_proj.weight": "proj_weight", "embedding_proj.bias": "proj_bias"}
    vq.load_state_dict({k: data[v] for k, v in weights.items()})
    z = data["z"].requires_grad_()
    z_q, indices, losses = vq.encode(z)
    assert torch.equal(indices.flatten(), data["indices"])
    close(z_q, data["z_q"])
    close(vq.table(), data["codebook_effective"])
    loss = sum(losses.values())
    close(loss, data["commit_loss"])
    for value, name in zip(
        gradients(loss, z, vq.embedding_proj.weight, vq.embedding_proj.bias),
        ("grad_z", "grad_proj_weight", "grad_proj_bias"),
        strict=True,
    ):
        close(value, data[name])
    close(torch.autograd.grad(z_q, z, data["upstream"])[0], data["straight_through_grad_z"])


def test_lfq():
    data, _ = read("seedvoken_quantizers")
    lfq = LFQ(8, entropy_weight=1.0, commit_weight=1.0)
    x = data["lfq.x"].requires_grad_()
    z_q, indices, losses = lfq.encode(x)
    assert torch.equal(indices.flatten(), data["lfq.indices"])
    close(z_q, data["lfq.quantized"])
    close(lfq.codes(indices).movedim(-1, 1), data["lfq.entry"])
    close(losses["commit"], data["lfq.train.commitment"])
    close(losses["sample_entropy"], data["lfq.train.per_sample_entropy"])
    close(-losses["batch_entropy"], data["lfq.train.codebook_entropy"])
    close(losses["sample_entropy"] + losses["batch_entropy"], data["lfq.train.entropy_aux_loss"])
    close(gradients(sum(LFQ(8).encode(x).losses.values()), x)[0], data["lfq.train.grad_x"])  # the default weights
    assert LFQ(8).eval().encode(x).losses == {}


def test_lfq_in_parts():
    data, _ = read("seedvoken_quantizers")
    lfq = LFQ(8, parts=(3, 5)).eval()
    z_q, indices, _ = lfq.encode(data["lfq_fact.x"])
    close(z_q, data["lfq_fact.quantized"])
    pre, post = lfq.split(indices)
    assert torch.equal(pre.flatten(), data["lfq_fact.pre"])
    assert torch.equal(post.flatten(), data["lfq_fact.post"])
    assert torch.equal(lfq.join(pre, post), indices)
    entry = lfq.codes(lfq.join(pre, post)).movedim(-1, 1)
    close(entry[:, :3], data["lfq_fact.entry_pre"])
    close(entry[:, 3:], data["lfq_fact.entry_post"])


def test_ibq():
    data, meta = read("seedvoken_quantizers")
    about = meta["cases"]["ibq"]
    temperature = about["entropy_temperature"]
    ibq = IBQ(64, 8, commit_weight=about["beta"], entropy_weight=0.05, temperature=temperature)
    ibq.load_state_dict({"embedding.weight": data["ibq.embedding.weight"]})
    x = data["ibq.x"].requires_grad_()
    z_q, indices, losses = ibq.encode(x)
    assert torch.equal(indices.flatten(), data["ibq.indices"])
    close(z_q, data["ibq.quantized"])
    close(losses["codebook"] + losses["commit"], data["ibq.quant_loss"])
    close(losses["sample_entropy"] / 0.05, data["ibq.sample_entropy"])
    close(losses["batch_entropy"] / -0.05, data["ibq.avg_entropy"])
    close((losses["sample_entropy"] + losses["batch_entropy"]) / 0.05, data["ibq.entropy_loss"])
    for value, name in zip(gradients(sum(losses.values()), x, ibq.embedding.weight), ("x", "embedding"), strict=True):
        close(value, data[f"ibq.grad_{name}"])


def test_bsq():
    data, _ = read("infinity_bsq")
    bsq = BSQ(16).eval()
    z_q, indices, _ = bsq.encode(data["bsq.x"])
    close(z_q, data["bsq.quantized"])
    assert torch.equal(bsq.bits(indices).int(), data["bsq.bit_indices"])
    assert torch.equal(bsq.from_bits(data["bsq.bit_indices"]), indices)
    close(bsq.codes(indices).movedim(-1, 1), data["bsq.codes_from_bits"])
    assert z_q.movedim(1, -1).norm(dim=-1).sub(1).abs().max() < 1e-5


def test_neighbours_are_those_of_lantern(monkeypatch):
    data, _ = read("lantern_accept_single")
    vq = VectorQuantizer(64, 4)
    vq.load_state_dict({"embedding.weight": data["codebook"]})
    monkeypatch.setattr(quantizers, "BLOCK", 64 * 10)  # several blocks, the last one not full
    table = vq.neighbours(63)
    assert torch.equal(table.long(), data["neighbours"])
    assert table.dtype == torch.int32
    assert torch.equal(vq.neighbours(5).long(), data["neighbours"][:, :5])
    assert vq.neighbours(5).data_ptr() == table.data_ptr()  # kept, not computed again
    with torch.no_grad():
        vq.embedding.weight[0] = 100.0
    assert (vq.neighbours(63)[1:, -1] == 0).all()  # the codes have changed: the moved one is everybody's last
    for k in (0, 64):
        with pytest.raises(ValueError, match=f"k={k}: give 1 to 63"):
            vq.neighbours(k)


def test_neighbours_of_bits_are_the_fewest_flips():
    lfq = LFQ(5)
    found = lfq.neighbours(31).long()
    distance = torch.cdist(lfq.codes(torch.arange(32)), lfq.codes(torch.arange(32)))
    assert torch.equal(distance.gather(1, found), distance.sort(1).values[:, 1:])
    assert torch.equal(found.sort(1).values, torch.stack([torch.arange(32)[torch.arange(32) != i] for i in range(32)]))


def test_nearest_does_not_depend_on_its_blocks(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    rows, table = torch.randn(23, 3, generator=gen), torch.randn(7, 3, generator=gen)
    wanted = torch.cdist(rows, table).argmin(1)
    assert torch.equal(nearest(rows, table), wanted)
    monkeypatch.setattr(quantizers, "BLOCK", 7 * 4)
    assert torch.equal(nearest(rows, table), wanted)


def test_straight_through_and_usage():
    vq = VectorQuantizer(4, 2).eval()
    with torch.no_grad():
        vq.embedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
    z = torch.tensor([[3.0, 0.2, 0.9], [0.1, 4.0, 0.5]])[None].requires_grad_()
    z_q, indices, losses = vq.encode(z)
    assert indices.tolist() == [[0, 1, 0]]
    assert losses == {}
    assert torch.autograd.grad((z_q * 3).sum(), z)[0].eq(3).all()
    assert vq.usage(indices) == 0.5


def test_entropies_of_certain_and_of_undecided_rows():
    sample, batch = entropies(100 * torch.eye(4), 1.0)
    assert sample < 1e-6
    assert abs(batch - np.log(4)) < 1e-3  # every row decides, and no two alike
    sample, batch = entropies(torch.zeros(3, 4), 0.01)
    close(sample, torch.tensor(np.log(4), dtype=torch.float32))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VectorQuantizer(1, 4), "size=1"),
        (lambda: VectorQuantizer(4, 4, temperature=0.0), "temperature=0.0"),
        (lambda: LFQ(63), "bits=63: give 1 to 62"),
        (lambda: LFQ(8, parts=(3, 6)), r"parts=\(3, 6\): .* bits=8"),
    ],
)
def test_wrong_arguments(make, said):
    with pytest.raises(ValueError, match=said):
        make()
