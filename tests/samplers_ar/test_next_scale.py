"""VAR's loop: the official images, guidance by scale, forced tokens, partial images."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.guidance import CFG, Interval, NoGuidance, parse
from genkit.guidance.base import Perturbation
from genkit.models.var import VAR
from genkit.samplers.autoregressive import next_scale as module
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.guided import GuidedLogits, centre
from genkit.samplers.autoregressive.next_scale import Drawn, known_tokens, mixture, next_scale, var_guidance
from genkit.tokenizers.var_vqvae import VARTokenizer, VARTokenizerConfig
from tests.models.test_var import FILES, build
from tests.tokenizers import golden

GREEDY = Filters(top_k=1, order="var")
SIDES = (1, 2, 3, 5, 8)


@lru_cache(maxsize=1)
def tokenizer() -> VARTokenizer:
    model = VARTokenizer(VARTokenizerConfig(128, 8, 32, (1, 1, 2), 1, SIDES))
    model.load_state_dict(golden.under(golden.read("var_vqvae")[0], "state_dict."))
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def network(name: str) -> tuple[VAR, dict[str, Tensor], dict[str, Any]]:
    return build(name)


class Run(GuidedLogits):
    """A run that keeps the guided logits of every step."""

    def logits(self, *args: Any, **options: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), super().logits(*args, **options)]
        return self.seen[-1]


def start(name: str = "var_shared_aln", guidance: Any = None, rows: slice = slice(None), kind: Any = Run) -> Any:
    model, tensors, meta = network(name)
    cond = tensors["embedding" if name == "var_clip" else "label"][rows]
    guidance = var_guidance(meta["cfg"]) if guidance is None else guidance
    return kind(model, guidance, {"cond": cond, "uncond": model.null(len(cond))}, len(cond))


def image(drawn: Drawn) -> Tensor:
    return tokenizer().decode_features(drawn.f_hat) / 2 + 0.5


@pytest.mark.parametrize("name", FILES)
def test_images_are_the_official_ones(name: str) -> None:
    _, tensors, _ = network(name)
    prefix = "" if name == "var_clip" else "infer."
    run = start(name)
    drawn = next_scale(run, tokenizer().quantize, [0, 1], GREEDY)
    for found, wanted in zip(run.seen, golden.listed(tensors, prefix + "cfg_logits"), strict=True):
        golden.close(found, centre(wanted))
    assert torch.equal(drawn.indices, torch.cat(golden.listed(tensors, prefix + "idx"), 1))
    golden.close(image(drawn), tensors[prefix + "image"])
    # The first scale is not guided, so its null rows wait for the second: 1 + 2 (4 + 9 + 25 + 64), and the 1 that was missed.
    assert run.ledger.nfe == [206, 206]
    assert run.trace.column("branches") == ["cond"] + 4 * ["cond+uncond"]


def test_smooth_images_are_the_official_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale by scale from the official logits: a temperature of 0.005 turns their rounding into visible differences."""
    _, tensors, _ = network("var_l2norm")
    wanted = golden.listed(tensors, "smooth.cfg_logits")
    monkeypatch.setattr(module, "_waits", lambda seeds, like, scale: tensors[f"smooth.exponential_noise.{scale}"])

    class Official(GuidedLogits):
        def logits(self, inputs: Tensor, index: int, total: int, **options: Any) -> Tensor:
            golden.close(super().logits(inputs, index, total, **options), centre(wanted[index]))
            return wanted[index]

    run = start("var_l2norm", kind=Official)
    drawn = next_scale(run, tokenizer().quantize, [0, 1], Filters(top_k=20, order="var"), smooth=True)
    golden.close(image(drawn), tensors["smooth.image"])


def test_mixtures_at_a_large_ratio_are_races() -> None:
    """As tau goes to 0, the weight moves to the winner of the race for p^(1 + r)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).expand(4000, 3)
    waits = torch.empty_like(logits).exponential_(generator=generator)
    weights = mixture(logits, waits, 1.0)
    golden.close(weights.sum(-1), torch.ones(4000, dtype=torch.float64))
    assert torch.equal(weights.argmax(-1), (logits * 2 - waits.log()).argmax(-1))
    shares = torch.bincount(weights.argmax(-1), minlength=3) / 4000
    golden.close(shares, (2 * logits[0]).softmax(-1).float(), 0.03)  # 4 deviations


def test_without_guidance_the_null_branch_is_never_evaluated() -> None:
    run = start(guidance=NoGuidance())
    next_scale(run, tokenizer().quantize, [0, 1], GREEDY)
    assert run.ledger.nfe == [103, 103]
    assert set(run.hidden) == {"cond"}
    assert run.ledger.calls == 5
    late = start(guidance=Interval(CFG(3.0), 4, 4, unit="step"))
    next_scale(late, tokenizer().quantize, [0, 1], GREEDY)
    assert late.ledger.nfe == [206, 206]  # caught up, in one more pass
    assert late.ledger.calls == 6


@pytest.mark.parametrize(("method", "weakening"), [("PAG", "identity"), ("SEG", "blur"), ("SLG", "skip")])
def test_guidance_by_a_weakened_network_is_the_formula_on_teacher_forced_logits(method: str, weakening: Any) -> None:
    run = start(guidance=parse(f"{method}(2.0, layers=('blocks.1',))"))
    drawn = next_scale(run, tokenizer().quantize, [0, 1], GREEDY)
    model, label = run.model("main"), run.conditions["cond"]
    inputs = torch.nn.functional.pad(tokenizer().quantize.next_inputs(drawn.indices), (0, 0, 1, 0))
    cond = centre(model(inputs, label).logits)
    with model.perturbed(Perturbation(weakening, ("blocks.1",))):
        weak = centre(model(inputs, label).logits)
    golden.close(torch.cat(run.seen, 1), 2 * cond - weak)
    assert (cond - weak).abs().max() > 0.1


def test_a_sample_depends_on_its_own_seed_alone() -> None:
    filters = Filters(top_k=40, top_p=0.9, order="var")
    whole = next_scale(start(), tokenizer().quantize, [7, 8], filters).indices
    for i, seed in ((0, 7), (1, 8)):
        assert torch.equal(next_scale(start(rows=slice(i, i + 1)), tokenizer().quantize, [seed], filters).indices[0], whole[i])
    other = next_scale(start(), tokenizer().quantize, [7, 9], filters).indices
    assert torch.equal(other[0], whole[0])
    assert not torch.equal(other[1], whole[1])
    smooth = [next_scale(start(rows=slice(1)), tokenizer().quantize, [s], filters, smooth=True).f_hat for s in (7, 7, 9)]
    assert torch.equal(smooth[0], smooth[1])
    assert not torch.equal(smooth[0], smooth[2])


def test_given_tokens_stand_and_the_rest_is_drawn_around_them() -> None:
    quantizer, filters = tokenizer().quantize, Filters(order="var")
    free = next_scale(start(), quantizer, [3, 4], filters)
    known = torch.zeros(2, 32, 32, dtype=torch.bool)
    known[:, :16] = True
    keep = known_tokens(known, SIDES)
    assert [int(part.sum()) // 2 for part in keep.split([p * p for p in SIDES], 1)] == [0, 2, 3, 10, 32]
    assert int(known_tokens(known, SIDES, 0.5).sum()) // 2 == 1 + 2 + 6 + 15 + 32
    wanted = (free.indices + 1) % 128
    given = wanted.where(keep, -1)
    for smooth in (False, True):
        drawn = next_scale(start(), quantizer, [3, 4], filters, given=given, smooth=smooth)
        assert torch.equal(drawn.indices[keep], wanted[keep])
        assert not torch.equal(drawn.indices[~keep], free.indices[~keep])
    everything = next_scale(start(), quantizer, [3, 4], filters, given=wanted, smooth=True)
    golden.close(everything.f_hat, quantizer.f_hats(wanted)[-1])


def test_partial_images_come_with_every_scale() -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    quantizer = tokenizer().quantize
    drawn = next_scale(start(), quantizer, [0, 1], GREEDY, callback=lambda *row: seen.append(row))
    assert [k for k, _, _ in seen] == [0, 1, 2, 3, 4]
    for (_, indices, f_hat), wanted in zip(seen, quantizer.f_hats(drawn.indices), strict=True):
        assert torch.equal(indices, drawn.indices[:, : indices.shape[1]])
        golden.close(f_hat, wanted)


def test_errors_name_what_is_wrong() -> None:
    quantizer = tokenizer().quantize
    with pytest.raises(ValueError, match=r"given of shape \(2, 4\)"):
        next_scale(start(), quantizer, [0, 1], given=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="0 to 127"):
        next_scale(start(), quantizer, [0, 1], given=torch.full((2, 103), 128))
    with pytest.raises(ValueError, match="seeds"):
        next_scale(start(), quantizer, [0])
    with pytest.raises(ValueError, match="trained with"):
        next_scale(start(), type(quantizer)(128, 8, (1, 2, 4)), [0, 1])
    with pytest.raises(ValueError, match="least"):
        known_tokens(torch.ones(1, 4, 4), SIDES, 0.0)
