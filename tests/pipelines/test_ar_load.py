"""Loading of autoregressive models: official layouts are recognised; what does not fit, or is hostile, is refused."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import genkit
from genkit.guidance import CFG
from genkit.models import llamagen as llamagen_module
from genkit.models.flowar import FLOWAR_SIZES, FlowAR, FlowARConfig
from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.open_magvit2_ar import OPEN_MAGVIT2_SIZES, OpenMAGVIT2
from genkit.models.var import VAR, VAR_SIZES, VARConfig
from genkit.pipelines.autoregressive import FlowScalePipeline, ScalePipeline, TokenPipeline
from genkit.pipelines.hub import is_hub
from genkit.pipelines.loading_ar import save_autoregressive
from genkit.pipelines.recognise import recognise
from genkit.samplers.autoregressive.cache import StaticCache
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.guided import GuidedLogits
from genkit.tokenizers.kl import KLAutoencoder, KLConfig
from genkit.tokenizers.llamagen_vq import LLAMAGEN_TOKENIZERS, LlamaGenTokenizer, LlamaGenTokenizerConfig
from genkit.tokenizers.open_magvit2 import OpenMAGVIT2Tokenizer
from genkit.tokenizers.var_vqvae import VARTokenizer, VARTokenizerConfig
from tests.tokenizers.golden import layout

SCALES = (1, 2, 4)
TINY_VAR = VARConfig(2, 16, 4, SCALES, vocabulary=24, code_dim=4, num_classes=3)
TINY_LLAMA = LlamaGenConfig(2, 2, 16, vocabulary=24, num_classes=3, multiple=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Official layouts of tiny models; LlamaGen's in the wrapper its training writes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("files")
    modules = {
        "var_tiny.pth": VAR(TINY_VAR),
        "vae.pth": VARTokenizer(VARTokenizerConfig(24, 4, 32, (1, 1), 1, SCALES)),
        "vq.pt": LlamaGenTokenizer(LlamaGenTokenizerConfig(24, 4, 32, (1, 1, 1, 1, 1), 1, 32)),
        "flow.pth": FlowAR(
            FlowARConfig(16, 2, 16, 1, cross=True, heads=2, flow_heads=2, patch_nums=SCALES, channels=4, num_classes=3)
        ),
        "kl.ckpt": KLAutoencoder(KLConfig(32, (1, 1), 1, 4)),
    }
    for name, module in modules.items():
        torch.save(module.state_dict(), folder / name)
    torch.save({"model": LlamaGen(replace(TINY_LLAMA, tokens=4)).state_dict(), "step": 3}, folder / "c2i_tiny.pt")
    return folder


@pytest.fixture
def tiny_size(monkeypatch):
    monkeypatch.setitem(llamagen_module.LLAMAGEN_SIZES, "tiny", TINY_LLAMA)


# ---- recognition ----


def meta(shapes, **values):
    return {key: values.get(key, torch.empty(shape, device="meta")) for key, shape in shapes.items()}


@pytest.mark.parametrize("size", ["d16", "d20", "d24", "d30", "d36"])
def test_released_var(size):
    sides = VAR_SIZES[size].patch_nums
    level = torch.tensor([i for i, p in enumerate(sides) for _ in range(p * p)])[None]
    (found,) = recognise(meta(layout("var", f"var_{size}.pth"), lvl_1L=level))
    assert found.config == VAR_SIZES[size]
    assert found.title.startswith(f"VAR-{size},")


@pytest.mark.parametrize(
    "name",
    ["c2i_B_256", "c2i_B_384", "c2i_L_384", "c2i_XL_384", "c2i_XXL_384", "c2i_3B_384", "t2i_XL_stage1_256", "t2i_XL_stage2_512"],
)
def test_released_llamagen(name):
    weights = meta(layout("llamagen", f"{name}.pt"))
    (found,) = recognise(weights, hint=f"{name}.pt")
    assert found.config == llamagen_module.LLAMAGEN_FILES[name]
    assert not found.assumed
    assert recognise(weights, image_size=512)[0].config.tokens == 1024
    assert "pixels are assumed" in recognise(weights)[0].assumed


def test_released_tokenizers_and_the_rest():
    assert recognise(meta(layout("var", "vae_ch160v4096z32.pth")))[0].config == VARTokenizerConfig()
    for name, file in (("VQ-16", "vq_ds16_c2i.pt"), ("VQ-8", "vq_ds8_c2i.pt")):
        (found,) = recognise(meta(layout("llamagen", file)))
        assert found.config == LLAMAGEN_TOKENIZERS[name]
        assert name in found.title
    with torch.device("meta"):
        lfq = recognise(OpenMAGVIT2Tokenizer().state_dict())[0]
        assert lfq.config == OpenMAGVIT2Tokenizer().config
        assert recognise(KLAutoencoder().state_dict())[0].config == KLConfig()
        for size in ("S", "L"):
            (found,) = recognise(FlowAR(FLOWAR_SIZES[size]).state_dict())
            assert (found.config, found.title) == (FLOWAR_SIZES[size], f"FlowAR-{size}")
        both = {f"transformer.{k}": v for k, v in OpenMAGVIT2(OPEN_MAGVIT2_SIZES["B"]).state_dict().items()}
        both |= {f"first_stage_model.{k}": v for k, v in OpenMAGVIT2Tokenizer().state_dict().items()}
    network, coder = recognise(both)
    assert (network.title, network.config) == ("Open-MAGVIT2-B, 256 pixels", OPEN_MAGVIT2_SIZES["B"])
    assert coder.config == lfq.config
    assert recognise({"something": torch.zeros(1)}) == []


# ---- whole pipelines ----


def test_var(files):
    pipe = genkit.load(files / "var_tiny.pth", tokenizer=files / "vae.pth")
    assert isinstance(pipe, ScalePipeline)
    assert pipe.found.startswith("VAR of depth 2 and width 16, 64 pixels (var_tiny.pth), with VAR's tokenizer, 24 codes of 4")
    assert pipe.network.config == TINY_VAR
    assert len(pipe.fingerprint) == 64
    out = pipe([0, 2], guidance=2.0, top_k=5)
    assert out.latents.shape == (2, 3, 8, 8)
    assert not any(p.requires_grad or p.is_meta for p in pipe.network.parameters())


@pytest.mark.usefixtures("tiny_size")
def test_llamagen(files):
    pipe = genkit.load(files / "c2i_tiny.pt", tokenizer=files / "vq.pt", image_size=32)
    assert isinstance(pipe, TokenPipeline)
    assert pipe(1, guidance=2.0).latents.shape == (1, 3, 32, 32)
    assert "256 pixels are assumed" in genkit.load(files / "c2i_tiny.pt", tokenizer=files / "vq.pt").found


@pytest.mark.usefixtures("tiny_size")
def test_a_folder_with_both(files, tmp_path):
    for name in ("flow.pth", "kl.ckpt"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    pipe = genkit.load(tmp_path)
    assert isinstance(pipe, FlowScalePipeline)
    assert pipe(1, steps=2).latents.shape == (1, 3, 8, 8)
    (tmp_path / "kl.ckpt").unlink()
    with pytest.raises(ValueError, match=r"holds FlowAR of depth 2 .*, which needs its tokenizer"):
        genkit.load(tmp_path)
    with pytest.raises(ValueError, match="give one network, and its tokenizer"):
        genkit.load(files)


def test_own_checkpoints(files, tmp_path):
    pipe = genkit.load(files / "var_tiny.pth", tokenizer=files / "vae.pth")
    pipe = replace(pipe, class_names=("ant", "bee", "cat"), filters=Filters(top_k=3, order="var"))
    path = tmp_path / "own.safetensors"
    save_autoregressive(path, pipe, {"images": 12})
    again = genkit.load(path)
    assert (again.class_names, again.filters, again.network.config) == (pipe.class_names, pipe.filters, pipe.network.config)
    for key, value in pipe.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value.half().float() if value.is_floating_point() else value)
    assert again("cat").tokens.shape == (1, 21)
    weights = load_file(path)
    about = {"class_names": [], "filters": [{}], "network": {"kind": "unheard-of"}, "tokenizer": {}}
    save_file(weights, path, metadata={"format": "genkit-autoregressive-1", "config": json.dumps(about)})
    with pytest.raises(ValueError, match="its metadata does not fit this version of genkit"):
        genkit.load(path)


# ---- the hub ----


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub("hf:owner/name/file.pth")
    assert is_hub("owner/name")
    assert not any(map(is_hub, ("builtin/cifar10", "var_d16.pth", "folder/var_d16.pth", "/tmp/x", "./a/b")))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub("owner/name")


def test_files_in_the_hub_cache(files, tmp_path, monkeypatch):
    """As the hub's client lays them out, offline."""
    import huggingface_hub.constants as constants

    repo, commit = tmp_path / "models--someone--tiny", "a" * 40
    for name in ("var_tiny.pth", "vae.pth"):
        (repo / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (repo / "snapshots" / commit / name).write_bytes((files / name).read_bytes())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    pipe = genkit.load("hf:someone/tiny/var_tiny.pth", tokenizer="hf:someone/tiny/vae.pth")
    assert pipe.name == "var_tiny"
    assert genkit.load("someone/tiny").network.config == TINY_VAR
    for name in ("hf:someone/tiny/none.pth", "no-one/nothing"):
        with pytest.raises(FileNotFoundError, match=f"model='{name}' is not here and cannot be had from the hub"):
            genkit.load(name)


# ---- what is refused ----


def test_another_size_names_the_keys(files, tmp_path):
    weights = torch.load(files / "var_tiny.pth", weights_only=True)
    weights["head.bias"] = torch.zeros(5)
    del weights["blocks.1.ffn.fc1.bias"]
    torch.save(weights, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=r"2 weights do not fit this VAR, first blocks.1.ffn.fc1.bias \(missing\), head.bias"):
        genkit.load(tmp_path / "var.pth", tokenizer=files / "vae.pth")
    with pytest.raises(ValueError, match=r"LlamaGen with 2 layers of width 16 is no released size \(B 12 x 768"):
        genkit.load(files / "c2i_tiny.pt", tokenizer=files / "vq.pt")


def test_a_tokenizer_of_another_model(files):
    with pytest.raises(ValueError, match="which does not go with VAR of depth 2"):
        genkit.load(files / "var_tiny.pth", tokenizer=files / "vq.pt")
    with pytest.raises(ValueError, match=r"tokenizer=.* holds VAR of depth 2 .*, no tokenizer"):
        genkit.load(files / "var_tiny.pth", tokenizer=files / "var_tiny.pth")
    with pytest.raises(ValueError, match="which needs its tokenizer"):
        genkit.load(files / "var_tiny.pth")
    with pytest.raises(ValueError, match="which is no network"):
        genkit.load(files / "vae.pth")
    with pytest.raises(FileNotFoundError, match="tokenizer="):
        genkit.load(files / "var_tiny.pth", tokenizer=files / "none.pth")
    with pytest.raises(ValueError, match=r"text_encoder=.* takes classes"):
        genkit.load(files / "var_tiny.pth", tokenizer=files / "vae.pth", text_encoder="t5")


def test_damaged_and_hostile_files(files, tmp_path):
    path, whole = tmp_path / "var.pth", (files / "var_tiny.pth").read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not a model\n" * 50):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read as a torch checkpoint"):
            genkit.load(path)

    class Hostile:
        def __reduce__(self):
            return (subprocess.call, (["touch", str(tmp_path / "ran")],))

    torch.save({"pos_1LC": Hostile()}, path)
    with pytest.raises(ValueError, match="needs code to load, which is refused"):
        genkit.load(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"something": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no model that genkit knows; first keys something"):
        genkit.load(path)


@pytest.mark.parametrize("role", ["tokenizer", "drafter"])
@pytest.mark.usefixtures("tiny_size")
def test_damaged_and_hostile_files_beside_a_network(files, tmp_path, role):
    path = tmp_path / "other.pt"

    class Hostile:
        def __reduce__(self):
            return (subprocess.call, (["touch", str(tmp_path / "ran")],))

    options = {"image_size": 32, "tokenizer": files / "vq.pt", role: path}
    torch.save({"model": {"quantize.embedding.weight": Hostile()}}, path)
    with pytest.raises(ValueError, match=r"other.pt' needs code to load, which is refused"):
        genkit.load(files / "c2i_tiny.pt", **options)
    assert not (tmp_path / "ran").exists()
    path.write_bytes((files / "vq.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"other.pt' cannot be read as a torch checkpoint"):
        genkit.load(files / "c2i_tiny.pt", **options)
    torch.save({"something": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"{role}=.*other.pt' holds no model that genkit knows, no {role}"):
        genkit.load(files / "c2i_tiny.pt", **options)


@pytest.mark.usefixtures("tiny_size")
def test_calls_that_a_model_cannot_answer(files):
    pipe = genkit.load(files / "c2i_tiny.pt", tokenizer=files / "vq.pt", image_size=32)
    with pytest.raises(ValueError, match="top_k=25 is larger than the vocabulary of 24; use 1 to 24, or 0 for all"):
        pipe(0, top_k=25)
    with pytest.raises(ValueError, match="prompt='a cat': c2i_tiny takes classes, 0 to 2"):
        pipe(prompt="a cat")
    with pytest.raises(ValueError, match="classes contains 3: use an index from 0 to 2"):
        pipe(3)
    with pytest.raises(ValueError, match="c2i_tiny has no drafter"):
        pipe(0, speculative=True)
    run = GuidedLogits(pipe.models, CFG(2.0), {"cond": torch.tensor([0]), "uncond": pipe.network.null(1)}, 1)
    with torch.no_grad():
        run.logits(torch.zeros(1, 5, dtype=torch.long), 0, 4)
        with pytest.raises(ValueError, match="length=5 is too short for 6 positions; give the run more room"):
            run.logits(torch.zeros(1, 1, dtype=torch.long), 1, 4)
    with pytest.raises(ValueError, match="length=5 of the cache is too short for 6 positions"), torch.no_grad():
        pipe.network(
            torch.zeros(1, 6, dtype=torch.long),
            torch.tensor([0]),
            StaticCache.of(pipe.network, 1),
            positions=torch.arange(5).repeat(2)[:6],
        )
    scales = genkit.load(files / "var_tiny.pth", tokenizer=files / "vae.pth")
    with pytest.raises(ValueError, match="top_k=25 is larger than the vocabulary of 24"):
        scales(0, top_k=25)
    assert scales(0).tokens.shape == (1, 21)  # the default filters are for larger ones, and leave out nothing here
