"""MinorityPrompt against the same optimisation written out with the toy model's own formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.denoiser import Guided
from genkit.guidance import CFG, COND, UNCOND, parse
from genkit.guidance.minority_prompt import FIRST_DRAW, MinorityPrompt, prompt_surprise, prompt_tokens, with_token
from genkit.noise import VE
from tests.toys import LABELS, MAIN, SHAPE, Run, conditions, step_info


def point() -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def guided(made: Any, models: Any = MAIN, condition: Any = None) -> Guided:
    return Guided(models, made, condition or conditions(LABELS), 4, seeds=range(4))


def look(x: Tensor, sigma: float, weights: Tensor) -> Tensor:
    return MAIN(x, torch.full((4,), sigma, dtype=torch.float64), weights)


def by_hand(run: Guided, made: MinorityPrompt, info: Any, start: Tensor) -> Tensor:
    """Adam (Kingma & Ba 2015, alg. 1), from zero moments, on minus the surprise."""
    plain, e = MAIN.embed(LABELS), start.clone()
    m = v = torch.zeros_like(e)
    for k in range(made.iterations):
        e = e.detach().requires_grad_()
        z = look(info.x, info.sigma, e)
        again = look(z + made.at * run.noise(info.x, info, FIRST_DRAW + k), made.at, plain)
        first = (z.detach() - again).flatten(1).square().sum(1).sqrt()
        second = (z - again.detach()).flatten(1).square().sum(1).sqrt()
        (g,) = torch.autograd.grad(-(first + made.balance * second).sum(), e)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        e = e - made.lr * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
    return e.detach()


@pytest.mark.parametrize("balance", [1.0, 0.25])
def test_the_embedding_is_that_of_adam_by_hand(balance: float) -> None:
    made = MinorityPrompt(CFG(3.0), at=1.5, until=0.0, lr=0.02, balance=balance)
    run, start = guided(made), MAIN.embed(LABELS)
    for index in (0, 1):  # the second step goes on from the embedding of the first, with fresh moments
        info = step_info(point(), index, 2, sigma=2.0 - index)
        expected = by_hand(run, made, info, start)
        with torch.no_grad():
            result = run(info)
        torch.testing.assert_close(run.state.token, expected)
        assert float((expected - start).abs().max()) > 0.01
        cond, uncond = look(info.x, info.sigma, expected), look(info.x, info.sigma, MAIN.embed(torch.full((4,), -1)))
        torch.testing.assert_close(result.denoised, uncond + 3 * (cond - uncond))
        start = expected
    assert run.ledger.nfe == [2 * (3 * 2 + 2)] * 4


def test_the_surprise_grows() -> None:
    made = MinorityPrompt(CFG(3.0), at=1.5, until=0.0, lr=0.05, iterations=20)
    run, info = guided(made), step_info(point(), sigma=1.0)
    run(info)

    def surprise(weights: Tensor) -> Tensor:
        z = look(info.x, 1.0, weights)
        return torch.stack([(z - look(z + 1.5 * run.noise(z, info, k), 1.5, MAIN.embed(LABELS))).flatten(1).norm(dim=1)
                            for k in range(50)]).mean(0)  # fmt: skip

    assert (surprise(run.state.token) > surprise(MAIN.embed(LABELS))).all()


def test_both_terms_of_the_surprise_are_differentiated() -> None:
    z = point().requires_grad_()
    again = 3 * z
    first, second = (torch.autograd.grad(prompt_surprise(z, again, b).sum(), z, retain_graph=True)[0] for b in (0.0, 1.0))
    unit = z.detach() / z.detach().flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(first, 3 * unit)  # of |stop(z) - 3 z|
    torch.testing.assert_close(second - first, -unit)  # of |z - stop(3 z)|


def test_optimised_steps() -> None:
    made = MinorityPrompt(CFG(3.0), at=1.5, until=1.0, iterations=2)
    run = Run(made, "heun")
    rows = [(row["step"], row["stage"], row["rows"] // 4) for row in run.guided.trace.rows]
    assert rows == [(i, stage, 6 if i < 2 and stage == "step" else 2) for i in range(6) for stage in ("step", "second")][:-1]
    assert float((run.guided.state.token - MAIN.embed(LABELS)).abs().max()) > 1e-3


def test_later_steps_see_the_embedding_that_was_found() -> None:
    run = guided(MinorityPrompt(CFG(3.0), at=1.5, until=1.0, iterations=2))
    run(step_info(point(), 0, 6, sigma=2.0))
    found, late = run.state.token, step_info(point(), 3, 6, sigma=0.9)  # no longer optimised
    assert float((found - MAIN.embed(LABELS)).abs().max()) > 1e-3
    cond, uncond = look(late.x, 0.9, found), look(late.x, 0.9, MAIN.embed(torch.full((4,), -1)))
    torch.testing.assert_close(run(late).denoised, uncond + 3 * (cond - uncond))
    assert torch.equal(run.state.token, found)


def test_only_the_main_models_conditional_branch_changes() -> None:
    made = parse("MinorityPrompt(CFG(3.0))")
    state = made.init(4)._replace(token=torch.zeros(4, 6))
    cond, uncond = made.plan(step_info(point()), state)
    assert cond._replace(transform=None) == COND
    assert cond.transform is not None
    assert uncond == UNCOND
    assert made.plan(step_info(point(), weight=1.0), state) == (COND,)


# ---- conditions of text models ----


class TextModel:
    """Sees the mean of its tokens as the weights of the mixture's components."""

    path = VE

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any, /) -> Tensor:
        tokens = condition["prompt_embeds"] if isinstance(condition, dict) else condition
        return MAIN(x, sigma, tokens.mean(1).softmax(-1).to(x.dtype))


def text(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randn(4, 5, 6, generator=g).to(dtype)
    return {"prompt_embeds": tokens, "pooled": tokens.mean(1), "mask": torch.ones(4, 5, dtype=torch.long)}


def test_one_token_of_a_prompt_changes() -> None:
    plain = text()
    seen: list[Tensor] = []

    class Model(TextModel):
        def __call__(self, x: Tensor, sigma: Tensor, condition: Any, /) -> Tensor:
            seen.append(condition["prompt_embeds"].detach()[:4])
            return super().__call__(x, sigma, condition)

    made = MinorityPrompt(CFG(3.0), at=1.5, until=0.0, lr=0.1, position=2)
    guided(made, Model(), {"cond": plain, "uncond": plain})(step_info(point()))
    change = (seen[-1] - plain["prompt_embeds"]).abs().amax((0, 2))
    assert change[2] > 0.1
    assert change[[0, 1, 3, 4]].max() == 0
    assert torch.equal(plain["prompt_embeds"], text()["prompt_embeds"])


def test_an_encoder_is_run_anew_if_the_host_has_one() -> None:
    tokens = text()["prompt_embeds"]

    def encode(inputs: Tensor) -> Tensor:
        return inputs.cumsum(1)  # causal, as text encoders are: a token reaches those after it

    condition = {"cond": encode(tokens), "uncond": encode(tokens), "tokens": tokens}
    made = MinorityPrompt(CFG(3.0), at=1.5, until=0.0, lr=0.1, position=2)
    run = guided(made, {"main": TextModel(), "encode": encode}, condition)
    result = run(step_info(point()))
    changed = with_token(tokens, run.state.token, 2)
    cond = TextModel()(point(), torch.ones(4), encode(changed))
    uncond = TextModel()(point(), torch.ones(4), encode(tokens))
    torch.testing.assert_close(result.denoised, uncond + 3 * (cond - uncond))
    assert float((changed - tokens).abs().max()) > 0.1


def test_half_precision_embeddings_are_optimised_in_float32() -> None:
    made = MinorityPrompt(CFG(3.0), at=1.5, until=0.0, lr=1e-4)
    run = guided(made, TextModel(), {"cond": text(torch.float16), "uncond": text(torch.float16)})
    run(step_info(point()))
    assert run.state.token.dtype == torch.float32
    assert 0 < float((run.state.token - text(torch.float16)["prompt_embeds"][:, -1]).abs().max()) < 4e-4


def test_which_tensor_holds_the_tokens() -> None:
    key, tokens = prompt_tokens(text())
    assert key == "prompt_embeds"
    assert tokens.shape == (4, 5, 6)
    assert prompt_tokens(torch.zeros(4, 6))[0] is None
    with pytest.raises(ValueError, match=r"found 2 in dict \(a, b\)"):
        prompt_tokens({"a": torch.zeros(4, 6), "b": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="found 0 in Tensor"):
        prompt_tokens(torch.zeros(4, dtype=torch.long))


def test_inference_mode_is_refused() -> None:
    run = guided(parse("MinorityPrompt(CFG(3.0), until=0.0)"))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad instead"):
        run(step_info(point()))


@pytest.mark.parametrize("arguments", [{"at": 0.0}, {"lr": 0.0}, {"every": 0}, {"iterations": 0.5}, {"position": "a"}], ids=str)
def test_bad_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"MinorityPrompt: {next(iter(arguments))}="):
        MinorityPrompt(CFG(3.0), **arguments)
