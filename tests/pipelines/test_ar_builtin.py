"""Built-in autoregressive models, and any pair of files that the recipes export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from genkit_eval import command
from genkit_eval.blocks import BlockStore
from genkit_eval.cli import invoke
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.generate import fill
from genkit_eval.report.plots import traces
from genkit_eval.run import make_config
from safetensors.torch import load_file, save_file

import genkit
from genkit.models.eagle import EagleConfig, EagleHead
from genkit.models.llamagen import LlamaGen
from genkit.pipelines import loading
from genkit.pipelines.autoregressive import ScalePipeline, TokenPipeline
from genkit.pipelines.exported import load_exported, save_exported
from genkit.pipelines.loading_ar import save_autoregressive
from genkit.tokenizers.compact import CompactTokenizer
from tests.pipelines.tiny_ar import CODES, NEXT_TOKEN, data_of, export_all

NAMES = ("builtin/cifar10-next-token", "builtin/cifar10-next-token-cca", "builtin/cifar10-next-scale")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    (folder / "cifar10").mkdir()
    export_all(folder / "cifar10", tmp_path_factory.mktemp("work"))
    return folder


@pytest.fixture
def builtin(assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "ASSETS", assets)
    return assets / "cifar10"


# ---- the built-in names ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("builtin")
def test_built_in_pipelines_are_called_as_that_of_diffusion(name: str) -> None:
    pipe = genkit.load(name)
    assert isinstance(pipe, ScalePipeline if "scale" in name else TokenPipeline)
    assert (pipe.name, pipe.num_classes, pipe.class_names[8], pipe.image_shape) == (name, 10, "ship", (3, 32, 32))
    out = pipe(classes=["ship", 3], seeds=[0, 1], guidance="CFG(3.0)")
    assert out.pixels.shape == (2, 3, 32, 32)
    assert out.nfe == [2 * pipe.network.length - (pipe.sampler == "next_token") * 2] * 2
    assert not torch.equal(out.tokens, pipe(["ship", 3], [0, 1]).tokens)
    assert torch.equal(pipe("cat", 1, "CFG(3.0)").tokens[0], out.tokens[1])


@pytest.mark.usefixtures("builtin")
def test_the_next_token_model_carries_its_drafter() -> None:
    pipe = genkit.load(NAMES[0])
    assert isinstance(pipe.drafter, EagleHead)
    assert "and genkit's drafter (drafter.safetensors)" in pipe.found
    out = pipe(classes=[1, 2], guidance=2.0, speculative=True)
    assert out.speculation is not None
    assert out.speculation.mean_length >= 1
    assert out.calls == 1 + int(out.speculation.passes.max())
    assert not any(p.requires_grad for p in pipe.drafter.parameters())


def test_a_built_in_file_that_is_missing(builtin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_drafter = genkit.load(NAMES[0])
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setattr(loading, "ASSETS", tmp_path)
    for name, missing in (("next_token", "next_token"), ("tokenizer", "tokenizer")):
        with pytest.raises(
            FileNotFoundError, match=rf"model='builtin/cifar10-next-token': its file .*{missing}.safetensors is missing"
        ):
            genkit.load(NAMES[0])
        file = Path("cifar10") / f"{name}.safetensors"
        (tmp_path / file).write_bytes((builtin.parent / file).read_bytes())
    pipe = genkit.load(NAMES[0])  # the drafter may be missing
    assert pipe.drafter is None
    assert pipe.fingerprint != with_drafter.fingerprint
    with pytest.raises(ValueError, match="builtin/cifar10-next-token has no drafter; load it with drafter='FILE'"):
        pipe(classes=0, speculative=True)
    with pytest.raises(ValueError, match=r"use one of builtin/cifar10, .*-next-token, .*cca, .*next-scale, or a path"):
        genkit.load("builtin/cifar10-next")


# ---- exported files ----


def test_any_exported_pair(builtin: Path) -> None:
    pipe = genkit.load(builtin / "next_token.safetensors", tokenizer=builtin / "tokenizer.safetensors")
    assert (pipe.name, pipe.drafter, pipe.class_names[0]) == ("next_token", None, "airplane")
    assert pipe.found.startswith("genkit's next-token model (next_token.safetensors), with genkit's tokenizer (tokenizer.safe")
    assert torch.equal(pipe(0, 5, 2.0).tokens, genkit.load(NAMES[0])(0, 5, 2.0).tokens)
    whole = genkit.load(
        builtin / "next_token_cca.safetensors",
        tokenizer=str(builtin / "tokenizer.safetensors"),
        drafter=str(builtin / "drafter.safetensors"),
    )
    assert isinstance(whole.drafter, EagleHead)


def test_a_folder_with_a_network_and_what_goes_with_it(builtin: Path, tmp_path: Path) -> None:
    for name in ("next_token", "tokenizer", "drafter"):
        (tmp_path / f"{name}.safetensors").write_bytes((builtin / f"{name}.safetensors").read_bytes())
    pipe = genkit.load(tmp_path)
    assert isinstance(pipe.drafter, EagleHead)
    assert torch.equal(pipe(3, 1, speculative=True).tokens, genkit.load(NAMES[0])(3, 1, speculative=True).tokens)


def test_both_in_one_file(builtin: Path, tmp_path: Path) -> None:
    pipe = genkit.load(NAMES[2])
    save_autoregressive(tmp_path / "own.safetensors", pipe)
    again = genkit.load(tmp_path / "own.safetensors")
    assert isinstance(again.tokenizer, CompactTokenizer)
    assert torch.equal(again(1, 2, 3.0).tokens, pipe(1, 2, 3.0).tokens)


def test_a_released_drafter_is_recognised_by_its_keys(builtin: Path, tmp_path: Path) -> None:
    head, _ = load_exported(builtin / "drafter.safetensors")
    torch.save(head.state_dict(), tmp_path / "pytorch_model.bin")
    pair = {"tokenizer": builtin / "tokenizer.safetensors", "drafter": tmp_path / "pytorch_model.bin"}
    pipe = genkit.load(builtin / "next_token.safetensors", **pair)
    assert pipe.drafter.config == head.config
    assert torch.equal(pipe(3, 1, speculative=True).tokens, genkit.load(NAMES[0])(3, 1, speculative=True).tokens)


# ---- what is refused ----


def test_files_that_do_not_go_together(builtin: Path, tmp_path: Path) -> None:
    network, coder, many = (builtin / f"{n}.safetensors" for n in ("next_token", "tokenizer", "tokenizer_multiscale"))
    with pytest.raises(ValueError, match=r"genkit's next-token model \(next_token.safetensors\), which needs its tokenizer"):
        genkit.load(network)
    with pytest.raises(ValueError, match=r"genkit's tokenizer .*, which is no network; genkit.load\(network, tokenizer="):
        genkit.load(coder)
    with pytest.raises(ValueError, match=r"genkit's drafter .*, which is no network; genkit.load\(network, drafter="):
        genkit.load(builtin / "drafter.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer=.* is genkit's tokenizer, which does not go with genkit's next-token model"):
        genkit.load(network, tokenizer=many)
    with pytest.raises(ValueError, match=r"tokenizer=.* is genkit's tokenizer, which does not go with genkit's next-scale model"):
        genkit.load(builtin / "next_scale.safetensors", tokenizer=coder)
    with pytest.raises(ValueError, match=r"tokenizer=.* holds genkit's drafter, no tokenizer"):
        genkit.load(network, tokenizer=builtin / "drafter.safetensors")
    with pytest.raises(FileNotFoundError, match=r"drafter='none.safetensors' is not a file"):
        genkit.load(network, tokenizer=coder, drafter="none.safetensors")
    with pytest.raises(ValueError, match=r"drafter=.*: next_scale takes none"):
        genkit.load(builtin / "next_scale.safetensors", tokenizer=many, drafter=builtin / "drafter.safetensors")
    data_of(tmp_path / "other.safetensors", "simvq", seed=1)  # of the same shape, with other codes
    with pytest.raises(ValueError, match=r"has the fingerprint .*, but genkit's next-token model .* was trained on tokens of"):
        genkit.load(network, tokenizer=tmp_path / "other.safetensors")


def test_a_drafter_with_another_codebook(builtin: Path, tmp_path: Path) -> None:
    pair: dict[str, Any] = {"tokenizer": builtin / "tokenizer.safetensors"}
    head, about = load_exported(builtin / "drafter.safetensors")
    save_exported(tmp_path / "twin.safetensors", head, about | {"tokenizer": "0123456789ab"})
    with pytest.raises(ValueError, match=r"genkit's drafter \(twin.safetensors\) was trained on tokens of 0123456789ab"):
        genkit.load(builtin / "next_token.safetensors", drafter=tmp_path / "twin.safetensors", **pair)
    for width, size, tokens in ((16, CODES + 1, 64), (16, CODES, 16), (8, CODES, 64)):
        config = EagleConfig(width, 2, size, 8, tokens, 1)
        save_exported(tmp_path / "other.safetensors", EagleHead(config))
        with pytest.raises(ValueError, match=r"drafter=.* is made for vocabulary, .* \(.*\), but next_token has \(32, 16"):
            genkit.load(builtin / "next_token.safetensors", drafter=tmp_path / "other.safetensors", **pair)
        with pytest.raises(ValueError, match=r"drafter is made for vocabulary, .*, but builtin/cifar10-next-token has \(32, 16"):
            genkit.load(NAMES[0])(0, speculative=genkit.Speculative(drafter=EagleHead(config)))


def test_damaged_exports(builtin: Path, tmp_path: Path) -> None:
    pair: dict[str, Any] = {"tokenizer": builtin / "tokenizer.safetensors"}
    path, whole = tmp_path / "next_token.safetensors", (builtin / "next_token.safetensors").read_bytes()
    for data in (whole[: len(whole) // 2], whole[:4], b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model=.* cannot be read as safetensors .* damaged or of another format"):
            genkit.load(path, **pair)
    path.write_bytes(whole)
    weights, about = load_file(path), json.dumps({"network": {"layers": 2, "heads": 2, "size": 16}})
    save_file(weights, path, {"format": "genkit-next-token-1", "config": about})
    with pytest.raises(ValueError, match="its description does not fit this version of genkit"):
        genkit.load(path, **pair)
    save_exported(path, LlamaGen(NEXT_TOKEN), {"class_names": ["one", "two"]})
    with pytest.raises(ValueError, match=r"its metadata has class_names=\('one', 'two'\), but another number of classes"):
        genkit.load(path, **pair)
    about = json.dumps({"network": vars(NEXT_TOKEN) | {"width": 32}})
    save_file(weights, path, {"format": "genkit-next-token-1", "config": about})
    with pytest.raises(ValueError, match=r"weights do not fit this LlamaGen, first .*; recognised as genkit's next-token model"):
        genkit.load(path, **pair)


# ---- genkit-eval ----


@pytest.mark.usefixtures("builtin")
def test_genkit_eval_with_a_model_without_noise_levels(tmp_path: Path) -> None:
    size = ["--num-samples", "16", "--block-size", "8", "--bootstrap", "0", "--out", str(tmp_path)]
    assert invoke(["run", "--model", NAMES[2], "--guidance", "CFG(2.0)", *size]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["generation"]["sampler"], found["generation"]["steps"]) == ("next_scale", 4)
    assert found["guidances"][0]["cost"]["nfe_mean"] == 170
    assert len(found["guidances"][0]["trace"]) == 4
    assert "next_scale, 4 steps" in (tmp_path / "report.html").read_text()
    assert traces(found["guidances"], [True] * len(found["guidances"])) is not None


@pytest.mark.usefixtures("builtin")
@pytest.mark.parametrize("asked", [None, "next_token(top_k=8, speculative='Lantern(k=5, delta=0.3)')"])
def test_blocks_of_tokens_are_made_once_and_the_same_again(asked: str | None, tmp_path: Path) -> None:
    pipe, guidance = genkit.load(NAMES[0]), genkit.CFG(2.0)
    extractor = Extractor("first", "FIRST", "e" * 64, "none", lambda pixels: pixels.flatten(1)[:, :5].float())
    sampler, steps = command.settle_sampler(pipe, asked, None)
    assert (sampler, steps) == (asked or "next_token", 64)
    config = make_config(pipe, extractor, sampler, steps, 0, "balanced", 2)
    store = BlockStore(tmp_path, config.hash(repr(guidance)))
    assert fill(pipe, guidance, extractor, config, store, 6, lambda n: None) == 3
    before = store.read(1)
    store.path(1).unlink()
    assert fill(pipe, guidance, extractor, config, store, 6, lambda n: None) == 1
    after = store.read(1)
    assert torch.equal(after.pixels, before.pixels)
    assert after.nfe.tolist() == before.nfe.tolist()
    assert after.labels.tolist() == [2, 3]
    assert (after.nfe > 128).all() if asked else after.nfe.tolist() == [128, 128]


@pytest.mark.usefixtures("builtin")
@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        (None, 18, "--steps: builtin/cifar10-next-token draws images in 64 steps"),
        ("heun", None, "--sampler: sampler: unknown name 'heun'"),
        ("'heun'", None, "--sampler: sampler=\"'heun'\": builtin/cifar10-next-token draws by next_token"),
        ("next_token(tops=3)", None, "--sampler: sampler: next_token takes no tops"),
    ],
)
def test_samplers_that_a_model_of_tokens_does_not_have(sampler: str | None, steps: int | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        command.settle_sampler(genkit.load(NAMES[0]), sampler, steps)
    assert message in str(caught.value)
