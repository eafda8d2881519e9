"""The recipe of the minority classifier: interrupted and resumed in each of its stages, and run as one command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from genkit.denoiser import EDMDenoiser
from genkit.guidance.minority import minority_levels
from genkit.models.classifier import Classifier, ClassifierConfig
from genkit.models.minority import MinorityConfig, load_minority
from genkit.models.unet import UNet, UNetConfig
from genkit.training import minority as recipe_module
from genkit.training.cifar10_diffusion import Batches
from genkit.training.minority import Recipe, Scorer, accuracy, split, trainer
from tests.training.test_cifar10_classifier import pack  # noqa: F401 (a fixture)

TINY = MinorityConfig(levels=4, channels=(16, 16), embedding=16)
SHORT = Recipe(draws=2, levels=4, images=48, batch=16)
MODEL = "builtin/cifar10"


@pytest.fixture(scope="module", autouse=True)
def _small_models() -> Iterator[None]:
    """Random networks in place of the built-in ones, which take seconds."""
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        net = EDMDenoiser(UNet(UNetConfig(channels=(16,), attention=(), embedding=16)))
        extractor = Classifier(ClassifierConfig(channels=(4, 8))).eval()
        torch.nn.init.normal_(net.network.out.weight, std=0.1)
        patch.setattr(recipe_module, "load", lambda model, device: SimpleNamespace(models={"main": net}))
        patch.setattr(recipe_module, "load_builtin", lambda: extractor)
        yield


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (24, 3, 8, 8), generator=g, dtype=torch.uint8), torch.arange(24) % 10


@pytest.fixture(scope="module")
def scores(data: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return Scorer(MODEL, SHORT, tmp_path_factory.mktemp("scores"))(*data)


def test_scores_are_those_of_the_formula_and_of_no_batch(data: tuple[Tensor, Tensor], scores: Tensor, tmp_path: Path) -> None:
    scorer = Scorer(MODEL, SHORT, tmp_path, block=5)
    torch.testing.assert_close(scorer(*data), scores)
    images, labels = data
    x, sigma = images[7:8].float() / 127.5 - 1, torch.tensor([SHORT.sigma])
    alone = [
        scorer.distance(x, scorer.denoiser(x + SHORT.sigma * recipe_module.Keyed([7], 11)(x, 0, k), sigma, labels[7:8]))
        for k in (0, 1)
    ]
    torch.testing.assert_close(scores[7:8], torch.stack(alone).mean(0), rtol=1e-3, atol=1e-3)


def test_interrupted_scoring_goes_on_where_it_was(
    data: tuple[Tensor, Tensor], scores: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    plain = Scorer.score

    def failing(self: Scorer, images: Tensor, labels: Tensor, first: int) -> Tensor:
        if first == 16 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(first)
        return plain(self, images, labels, first)

    monkeypatch.setattr(Scorer, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        Scorer(MODEL, SHORT, tmp_path, block=8)(*data)
    done.append(-1)
    torch.testing.assert_close(Scorer(MODEL, SHORT, tmp_path, block=8)(*data), scores)
    assert done == [0, 8, -1, 16]
    other = Scorer(MODEL, Recipe(draws=2, levels=4, sigma=1.0), tmp_path, block=8)
    assert other.folder != Scorer(MODEL, SHORT, tmp_path, block=8).folder


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(data: tuple[Tensor, Tensor], scores: Tensor, tmp_path: Path) -> None:
    batches = Batches(data[0], minority_levels(scores, 4)[0], SHORT.drawing, 4)
    whole = trainer(TINY, SHORT, tmp_path / "whole", "a")
    whole.run(batches)
    stopped = trainer(TINY, SHORT, tmp_path / "halves", "a")
    stopped.train_step(batches)
    stopped.save()
    resumed = trainer(TINY, SHORT, tmp_path / "halves", "a")
    assert (whole.step, resumed.step) == (3, 1)
    resumed.run(batches)
    expected, start = whole.plain().state_dict(), trainer(TINY, SHORT, tmp_path / "new", "a").plain().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.plain().state_dict().items())
    assert any(not torch.equal(v, expected[k]) for k, v in start.items())
    with pytest.raises(ValueError, match=r"halves' holds a run of another network or recipe"):
        trainer(TINY, SHORT, tmp_path / "halves", "another model's scores")


def test_it_learns_what_can_be_learned(tmp_path: Path) -> None:
    """Brightness as the level: seen through moderate noise."""
    g = torch.Generator().manual_seed(0)
    levels = torch.arange(64) % 4
    images = (60 * levels[:, None, None, None] + torch.randint(0, 40, (64, 3, 8, 8), generator=g)).to(torch.uint8)
    recipe = Recipe(levels=4, images=16 * 30, batch=16, lr=1e-2, warmup=32, p_mean=-1.5, p_std=0.3)
    run = trainer(TINY, recipe, tmp_path)
    before = accuracy(run.plain().eval(), images, levels, 0.2)
    run.net.train()
    run.run(Batches(images, levels, recipe.drawing, 4))
    after = accuracy(run.plain().eval(), images, levels, 0.2)
    assert before["exact"] < 0.6
    assert after["exact"] > 0.9
    assert after["exact"] <= after["within_one"] <= 1


def test_held_out_images_are_never_trained_on() -> None:
    trained, held = split(1000, Recipe())
    assert len(held) == 50
    assert sorted(torch.cat([trained, held]).tolist()) == list(range(1000))


def test_global_random_numbers_are_left_alone(data: tuple[Tensor, Tensor], scores: Tensor, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    trainer(TINY, SHORT, tmp_path).train_step(Batches(data[0], minority_levels(scores, 4)[0], SHORT.drawing, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_command_scores_trains_and_exports(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    argv = ["--data", str(pack), "--out", str(tmp_path / "run"), "--export", str(tmp_path / "assets"), "--hardware", "a test"]
    argv += ["--channels", "16", "16", "--draws", "1", "--levels", "4", "--images", "32", "--batch", "16"]
    recipe_module.main(argv)
    assert "held-out" in capsys.readouterr().out
    net = load_minority(tmp_path / "assets" / "minority.safetensors")
    about = json.loads(net.metadata["about"])
    assert net.levels == 4 == len(about["quantiles"])
    assert about["quantiles"] == sorted(about["quantiles"])
    assert (about["hardware"], about["model"], about["recipe"]["sigma"]) == ("a test", MODEL, 3.2)
    assert set(about["held_out"]) == {"0.1", "0.5", "2"}
    again = tmp_path / "again"
    recipe_module.main([*argv[:-2], "--batch", "16", "--export", str(again)])  # a finished run is exported anew, as it was
    for name, value in load_minority(again / "minority.safetensors").state_dict().items():
        assert torch.equal(value, net.state_dict()[name])
