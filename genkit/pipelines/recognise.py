"""Which autoregressive network, image tokenizer or drafter a checkpoint holds, by its keys and their shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from genkit.models.eagle import EagleConfig, EagleHead
from genkit.models.flowar import FLOWAR_SIZES, FlowAR, FlowARConfig
from genkit.models.llamagen import LLAMAGEN_SIZES, LlamaGen, LlamaGenConfig
from genkit.models.open_magvit2_ar import OPEN_MAGVIT2_SIZES, OpenMAGVIT2, OpenMAGVIT2Config
from genkit.models.var import VAR, VAR_SIZES, VARConfig
from genkit.tokenizers.compact import CompactConfig, CompactTokenizer
from genkit.tokenizers.kl import KLAutoencoder, KLConfig
from genkit.tokenizers.llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from genkit.tokenizers.open_magvit2 import OpenMAGVIT2Tokenizer, OpenMAGVIT2TokenizerConfig
from genkit.tokenizers.var_vqvae import VARTokenizer, VARTokenizerConfig

Weights = Mapping[str, Tensor]
Role = Literal["network", "tokenizer", "drafter"]


class Kind(NamedTuple):
    """A family of modules: how to build one, and what it is for."""

    module: Callable[[Any], Any]
    config: Callable[..., Any]
    role: Role


KINDS = {
    "var": Kind(VAR, VARConfig, "network"),
    "llamagen": Kind(LlamaGen, LlamaGenConfig, "network"),
    "open-magvit2": Kind(OpenMAGVIT2, OpenMAGVIT2Config, "network"),
    "flowar": Kind(FlowAR, FlowARConfig, "network"),
    "var-vqvae": Kind(VARTokenizer, VARTokenizerConfig, "tokenizer"),
    "llamagen-vq": Kind(LlamaGenTokenizer, LlamaGenTokenizerConfig, "tokenizer"),
    "open-magvit2-lfq": Kind(OpenMAGVIT2Tokenizer, OpenMAGVIT2TokenizerConfig, "tokenizer"),
    "kl": Kind(KLAutoencoder, KLConfig, "tokenizer"),
    "compact": Kind(CompactTokenizer, CompactConfig, "tokenizer"),
    "eagle": Kind(EagleHead, EagleConfig, "drafter"),
}


@dataclass(frozen=True)
class Found:
    """What was recognised.

    Attributes:
        kind: a key of :data:`KINDS`. title: in words. config: for its module.
        assumed: what the file does not tell, and was taken for granted, in words.
        about: what the file's header says, where one of genkit's recipes wrote it.
    """

    kind: str
    title: str
    config: Any
    assumed: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def role(self) -> Role:
        return KINDS[self.kind].role

    def build(self) -> nn.Module:
        module: nn.Module = KINDS[self.kind].module(self.config)
        return module


def recognise(weights: Weights, image_size: int | None = None, hint: str = "") -> list[Found]:
    """The networks, tokenizers and drafters among these weights: none, one, or both of one file.

    Args:
        image_size: pixels along one side, for networks whose weights do not tell.
        hint: the file's name, which may tell it too.

    Raises:
        ValueError: a family is recognised, but a key that tells its size is missing, or it is of no released size.
    """
    found = []
    for prefix in ("transformer.", "first_stage_model.", ""):
        some = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)} if prefix else weights
        for mark, read in MARKS.items():
            if some and mark <= set(some):
                found.append(read(some, image_size, hint))
                break
    return found


def _size(weights: Weights, key: str, dim: int = 0) -> int:
    if key not in weights or weights[key].ndim <= dim:
        raise ValueError(f"{key} is missing, or has {dim} dimensions or fewer")
    return weights[key].shape[dim]


def _count(weights: Weights, prefix: str) -> int:
    numbers = [k[len(prefix) :].split(".")[0] for k in weights if k.startswith(prefix)]
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)


def _named(table: Mapping[str, Any], config: Any) -> str | None:
    return next((name for name, row in table.items() if row == config), None)


def _var(weights: Weights, image_size: int | None, hint: str) -> Found:
    depth, width = _count(weights, "blocks."), _size(weights, "word_embed.weight")
    scale = weights.get("blocks.0.attn.scale_mul_1H11")
    heads = None if scale is None or scale.numel() == depth else scale.numel()
    _size(weights, "lvl_1L", 1)
    sides = tuple(round(n**0.5) for n in weights["lvl_1L"].flatten().bincount().tolist())
    config = VARConfig(
        depth,
        None if width == 64 * depth else width,
        heads,
        sides,
        _size(weights, "head.weight"),
        _size(weights, "word_embed.weight", 1),
        _size(weights, "class_emb.weight") - 1 if "class_emb.weight" in weights else 1000,
        _size(weights, "cond_proj.weight", 1) if "cond_proj.weight" in weights else None,
        "shared_ada_lin.1.weight" in weights,
        scale is not None,
    )
    family = "VAR" if config.text_dim is None else "VAR-CLIP"
    name = _named(VAR_SIZES, config)
    title = f"VAR-{name}" if name and name != "clip" else f"{family} of depth {depth} and width {width}"
    return Found("var", f"{title}, {16 * sides[-1]} pixels", config)


def _llamagen(weights: Weights, image_size: int | None, hint: str) -> Found:
    layers, width = _count(weights, "layers."), _size(weights, "tok_embeddings.weight", 1)
    name, row = _row(LLAMAGEN_SIZES, layers, width, "LlamaGen")
    text = "cls_embedding.cap_proj.fc1.weight" in weights
    told = re.search(r"(?<!\d)(256|384|512)(?!\d)", hint)
    large = name in ("XL", "XXL", "3B") and not text
    pixels = image_size or (int(told[0]) if told else 384 if large else 256)
    key = "cls_embedding.embedding_table.weight"
    config = replace(
        row,
        tokens=(pixels // 16) ** 2,
        vocabulary=_size(weights, "tok_embeddings.weight"),
        **({"text_dim": _size(weights, "cls_embedding.cap_proj.fc1.weight", 1)} if text else {}),
        **({"text_tokens": _size(weights, "cls_embedding.uncond_embedding")} if text else {}),
        **({} if text else {"num_classes": _size(weights, key) - 1}),
    )
    assumed = "" if image_size or told else f"{pixels} pixels are assumed: the weights do not tell; image_size=... says it"
    return Found("llamagen", f"LlamaGen-{name} {'t2i' if text else 'c2i'}, {pixels} pixels", config, assumed)


def _open_magvit2(weights: Weights, image_size: int | None, hint: str) -> Found:
    layers, width = _count(weights, "spatial_blocks."), _size(weights, "pre_emb.weight", 1)
    name, row = _row(OPEN_MAGVIT2_SIZES, layers, width, "Open-MAGVIT2")
    bits = tuple(_size(weights, f"{part}_emb.weight").bit_length() - 1 for part in ("pre", "post"))
    classes = _size(weights, "class_emb.embedding_table.weight") - 1
    pixels = image_size or 256
    config = replace(row, bits=bits, num_classes=classes, tokens=(pixels // 16) ** 2)
    return Found("open-magvit2", f"Open-MAGVIT2-{name}, {pixels} pixels", config)


def _row(table: Mapping[str, Any], layers: int, width: int, family: str) -> tuple[str, Any]:
    """The row with these layers and this width: the number of heads cannot be read off the weights."""
    for name, row in table.items():
        if (row.layers, row.width) == (layers, width):
            return name, row
    sizes = ", ".join(f"{name} {row.layers} x {row.width}" for name, row in table.items())
    raise ValueError(f"{family} with {layers} layers of width {width} is no released size ({sizes})")


def _flowar(weights: Weights, image_size: int | None, hint: str) -> Found:
    width, length = _size(weights, "class_emb.weight", 1), _size(weights, "encoder_pos_embed_learned", 1)
    depth = _count(weights, "encoder_blocks.") + _count(weights, "decoder_blocks.")
    sides = tuple(2**i for i in range(((3 * length + 1).bit_length() - 1) // 2))  # 1 + 4 + ... + 4^(k - 1) = (4^k - 1) / 3
    flow_width = _size(weights, "flownet.input_proj.weight")
    heads = _heads(weights, "encoder_blocks.0.attn.rope.freqs", width)
    flow_heads = _heads(weights, "flownet.res_blocks.0.attn.rope.freqs", flow_width)
    config = FlowARConfig(
        width,
        depth,
        flow_width,
        _count(weights, "flownet.res_blocks."),
        any("crossattn" in key for key in weights),
        heads,
        flow_heads,
        sides,
        _size(weights, "z_proj.weight", 1),
        _size(weights, "class_emb.weight") - 1,
    )
    name = _named(FLOWAR_SIZES, config)
    return Found("flowar", f"FlowAR-{name}" if name else f"FlowAR of depth {depth} and width {width}", config)


def _heads(weights: Weights, key: str, width: int) -> int | None:
    """From the frequencies of the rotary positions, four channels each; None is the default."""
    heads = width // (4 * _size(weights, key)) if key in weights else 0
    return None if heads in (0, max(1, width // 64)) else heads


def _multipliers(weights: Weights, level: str, block: str, channels: int) -> tuple[int, ...]:
    keys = [f"{level}{i}.{block}.0.conv1.weight" for i in range(_count(weights, level))]
    return tuple(_size(weights, key) // channels for key in keys)


def _var_tokenizer(weights: Weights, image_size: int | None, hint: str) -> Found:
    channels = _size(weights, "encoder.conv_in.weight")
    phis = _count(weights, "quantize.quant_resi.qresi_ls.")
    share = phis or (1 if "quantize.quant_resi.qresi.weight" in weights else 0)
    config = VARTokenizerConfig(
        _size(weights, "quantize.embedding.weight"),
        _size(weights, "quantize.embedding.weight", 1),
        channels,
        _multipliers(weights, "encoder.down.", "block", channels),
        _count(weights, "encoder.down.0.block."),
        share=share,
    )
    return Found("var-vqvae", f"VAR's tokenizer, {config.size} codes of {config.dim}", config)


def _llamagen_tokenizer(weights: Weights, image_size: int | None, hint: str) -> Found:
    channels = _size(weights, "encoder.conv_in.weight")
    config = LlamaGenTokenizerConfig(
        _size(weights, "quantize.embedding.weight"),
        _size(weights, "quantize.embedding.weight", 1),
        channels,
        _multipliers(weights, "encoder.conv_blocks.", "res", channels),
        _count(weights, "encoder.conv_blocks.0.res."),
        _size(weights, "quant_conv.weight", 1),
    )
    name = f"VQ-{2 ** (len(config.multipliers) - 1)}"
    return Found("llamagen-vq", f"LlamaGen's tokenizer {name}, {config.size} codes of {config.dim}", config)


def _open_magvit2_tokenizer(weights: Weights, image_size: int | None, hint: str) -> Found:
    channels, bits = _size(weights, "encoder.conv_in.weight"), _size(weights, "decoder.conv_in.weight", 1)
    config = OpenMAGVIT2TokenizerConfig(
        bits=bits,
        parts=(bits // 3, bits - bits // 3),
        channels=channels,
        multipliers=_multipliers(weights, "encoder.down.", "block", channels),
        blocks=_count(weights, "encoder.down.0.block."),
    )
    return Found("open-magvit2-lfq", f"Open-MAGVIT2's tokenizer, 2^{bits} codes", config)


def _kl(weights: Weights, image_size: int | None, hint: str) -> Found:
    channels = _size(weights, "encoder.conv_in.weight")
    multipliers = _multipliers(weights, "encoder.down.", "block", channels)
    blocks, z = _count(weights, "encoder.down.0.block."), _size(weights, "post_quant_conv.weight")
    name = f"KL-{2 ** (len(multipliers) - 1)}"
    return Found("kl", f"the autoencoder {name}, {z} channels", KLConfig(channels, multipliers, blocks, z))


def _drafter(weights: Weights, image_size: int | None, hint: str) -> Found:
    vocabulary, width = (_size(weights, "embed_tokens.weight", i) for i in (0, 1))
    config = EagleConfig(width, vocabulary=vocabulary, hidden=_size(weights, "layers.0.mlp.up_proj.weight"))
    return Found("eagle", f"an EAGLE drafter of width {width}, {vocabulary} codes", config)


#: Keys that only one family has, and how to read its size.
MARKS: dict[frozenset[str], Callable[[Weights, int | None, str], Found]] = {
    frozenset({"pos_1LC", "word_embed.weight"}): _var,
    frozenset({"layers.0.attention.wqkv.weight", "tok_embeddings.weight"}): _llamagen,
    frozenset({"spatial_blocks.0.attention.wqkv.weight", "pre_emb.weight"}): _open_magvit2,
    frozenset({"encoder_pos_embed_learned", "flownet.input_proj.weight"}): _flowar,
    frozenset({"quantize.ema_vocab_hit_SV", "quantize.embedding.weight"}): _var_tokenizer,
    frozenset({"encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"}): _llamagen_tokenizer,
    frozenset({"decoder.adaptive.0.gamma.weight"}): _open_magvit2_tokenizer,
    frozenset({"encoder.mid.attn_1.q.weight", "post_quant_conv.weight"}): _kl,
    frozenset({"embed_tokens.weight", "fc.weight", "layers.0.self_attn.q_proj.weight"}): _drafter,
}

__all__ = ["KINDS", "Found", "Kind", "recognise"]
