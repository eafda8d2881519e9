"""Open-MAGVIT2's generator against the official code: weights' names, logits, tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from genkit.guidance import CFG, Interval, NoGuidance
from genkit.models.open_magvit2_ar import OPEN_MAGVIT2_SIZES, OpenMAGVIT2, OpenMAGVIT2Config
from genkit.samplers.autoregressive.cache import StaticCache
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.guided import GuidedLogits, centre
from genkit.samplers.autoregressive.next_token import generate
from genkit.tokenizers.quantizers import LFQ
from tests.tokenizers.golden import close, layout, read, under

GOLDEN, META = read("open_magvit2_ar")
LABEL = GOLDEN["cls"][:, 0]
CODES = GOLDEN["pre"] + 8 * GOLDEN["post"]
SMALL = OpenMAGVIT2Config(2, 2, 4, 64, bits=(3, 5), tokens=16, num_classes=10, multiple=32)


@pytest.fixture(scope="module")
def network() -> OpenMAGVIT2:
    net = OpenMAGVIT2(SMALL)
    net.load_state_dict(under(GOLDEN, "state_dict."))
    return net.eval().requires_grad_(False)


def guided(net: OpenMAGVIT2, guidance: object, label: Tensor = LABEL) -> GuidedLogits:
    return GuidedLogits(net, guidance, {"cond": label, "uncond": net.null(len(label))}, len(label))  # type: ignore[arg-type]


def fed() -> Tensor:
    """Inputs (B, 32) of all positions along the official tokens."""
    before = torch.nn.functional.pad(CODES[:, :-1], (1, 0))
    return torch.stack([before, GOLDEN["pre"]], 2).flatten(1)


@pytest.mark.parametrize("size", OPEN_MAGVIT2_SIZES)
def test_weights_have_the_official_names_and_shapes(size: str) -> None:
    with torch.device("meta"):
        net = OpenMAGVIT2(OPEN_MAGVIT2_SIZES[size])
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == layout("magvit", f"AR_256_{size}.ckpt")


def test_greedy_tokens_with_a_scale_for_each_part(network: OpenMAGVIT2) -> None:
    run = guided(network, CFG(1.0))
    out = generate(run, [0, 1], Filters(temperature=0), scales=META["cfg_scale"])
    assert torch.equal(out, CODES)
    assert run.ledger.nfe == [2 * 32] * 2
    assert torch.equal(torch.stack(LFQ(8, parts=(3, 5)).split(out)), torch.stack([GOLDEN["pre"], GOLDEN["post"]]))


def test_logits_one_by_one(network: OpenMAGVIT2) -> None:
    run, inputs = guided(network, CFG(1.0)), fed()
    for i in range(16):
        for part, name in enumerate(("pre_logits", "post_logits")):
            at = 2 * i + part
            logits = run.logits(inputs[:, at : at + 1], i, 16, weight=META["cfg_scale"][part])
            close(logits[:, 0], centre(GOLDEN[name][:, i]))


@pytest.mark.parametrize("sizes", [(32,), (1, 7, 2, 1, 8, 13), (2, 3, 4, 23)])
def test_positions_together_are_positions_one_by_one(network: OpenMAGVIT2, sizes: tuple[int, ...]) -> None:
    cache, inputs, start, out = StaticCache.of(network, 2), fed(), 0, []
    for n in sizes:
        logits = network(inputs[:, start : start + n], LABEL, cache, start).logits
        out.append(torch.nn.functional.pad(logits, (0, 32 - logits.shape[-1]), value=-torch.inf))
        start += n
    found = torch.cat(out, 1)
    single, cache = [], StaticCache.of(network, 2)
    for i in range(32):
        single.append(network(inputs[:, i : i + 1], LABEL, cache, i).logits)
    for i, logits in enumerate(single):
        close(found[:, i : i + 1, : logits.shape[-1]], logits, 1e-5)
    assert bool((found[:, ::2, 8:] == -torch.inf).all())


def test_a_branch_that_opens_late_is_filled_up(network: OpenMAGVIT2) -> None:
    given = CODES.clone()
    given[:, 9:] = -1
    out = [generate(guided(network, g), [3, 4], given=given) for g in (Interval(CFG(2.0), 9, 20, "step"), CFG(2.0), NoGuidance())]
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


def test_temperature_and_filter_by_part(network: OpenMAGVIT2) -> None:
    kinds = [Filters(temperature=0), Filters(temperature=50.0)]
    a, b = (generate(guided(network, CFG(2.0)), seeds, kinds) for seeds in ([3, 4], [5, 6]))
    assert torch.equal(a[:, 0] % 8, b[:, 0] % 8)
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match=r"scales has 1 entries.*2 sub-tokens"):
        generate(guided(network, CFG(2.0)), [3, 4], scales=[2.0])


def test_no_trees(network: OpenMAGVIT2) -> None:
    with pytest.raises(ValueError, match="are for trees"):
        network(fed(), LABEL, mask=torch.ones(32, 32, dtype=torch.bool))


def test_released_files_are_read(tmp_path: Path, network: OpenMAGVIT2) -> None:
    weights = {f"transformer.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": {**weights, "first_stage_model.x": torch.zeros(1)}}, tmp_path / "AR.ckpt")
    with torch.device("meta"):
        net = OpenMAGVIT2(SMALL)
    net.load_state(tmp_path / "AR.ckpt")
    close(net(fed(), LABEL).hidden, network(fed(), LABEL).hidden, 1e-6)
