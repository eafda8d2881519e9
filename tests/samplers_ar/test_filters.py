"""Filters against the official codes, the draw against the law of large numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genkit.samplers.autoregressive.filters import Filters, Race
from tests.tokenizers.golden import close, read


@pytest.mark.parametrize("project", ["llamagen", "var"])
def test_official_probabilities(project: Any) -> None:
    tensors, meta = read(f"{project}_sampling_filter")
    for case in meta["cases"]:
        made = Filters(case.get("temperature", 1.0), case["top_k"], case["top_p"], order=project)
        before = tensors["logits"].clone()
        close(made.probabilities(tensors["logits"]), tensors[f"case{case['case']}.probs"], 1e-6)
        assert torch.equal(tensors["logits"], before)


def test_orders_at_the_edge() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    kept = {
        (order, p, k): (Filters(1.0, k, p, order=order)(logits) > -torch.inf).tolist()  # type: ignore[arg-type]
        for order in ("llamagen", "var", "transformers")
        for p, k in ((0.7, 0), (0.8, 3), (0.55, 2))
    }
    for order in ("llamagen", "var", "transformers"):
        assert kept[order, 0.7, 0] == [True, True, False, False]
    assert kept["llamagen", 0.8, 3] == kept["var", 0.8, 3] == [True, True, False, False]  # of the three, 5/9 + 2.5/9 pass 0.8
    assert kept["transformers", 0.8, 3] == [True, True, True, False]  # of all, 0.75 does not
    assert kept["llamagen", 0.55, 2] == [True, False, False, False]


def test_edges_of_the_arguments() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert torch.equal(Filters()(logits), logits)
    assert torch.equal(Filters(top_k=9)(logits), logits)
    assert (Filters(top_k=1)(logits) > -torch.inf).tolist() == [[False, True, True, False]]  # equals stay together
    assert Filters(temperature=0).probabilities(logits).tolist() == [[0, 1, 0, 0]]
    for wrong in ({"temperature": -1}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 1.5}, {"order": "hf"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Filters(**wrong)  # type: ignore[arg-type]


def test_the_race_has_the_probabilities() -> None:
    """Chi-square with 3 degrees of freedom, 40000 draws: 16.3 is exceeded once in a thousand."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    drawn = Race([7])(p.expand(1, 40000, 5))
    counts = torch.bincount(drawn[0], minlength=5).double()
    assert counts[4] == 0
    assert float(((counts[:4] - 40000 * p[:4]).square() / (40000 * p[:4])).sum()) < 16.3


def test_a_draw_belongs_to_its_sample_and_its_key() -> None:
    p = torch.rand(3, 2, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    before = torch.get_rng_state()
    whole = Race([4, 5, 6])(p, 2, 0)
    assert torch.equal(Race([6, 4])(p[[2, 0]], 2, 0), whole[[2, 0]])
    assert not torch.equal(Race([4, 5, 6])(p, 3, 0), whole)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="one seed per sample"):
        Race([1])(p)
