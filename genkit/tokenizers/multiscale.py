"""Residual quantizers over a pyramid of scales: the tokens of next-scale models."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.tokenizers.quantizers import BSQ, Quantized, Quantizer, nearest


def resize(x: Tensor, side: int, mode: str) -> Tensor:
    """(B, C, H, W) to (B, C, side, side), by ``"area"``, ``"bilinear"`` or ``"bicubic"``."""
    out: Tensor = F.interpolate(x, size=(side, side), mode=mode, align_corners=None if mode == "area" else False)
    return out


def to_map(h: Tensor) -> Tensor:
    """(B, p*p, C) to (B, C, p, p)."""
    side = round(h.shape[1] ** 0.5)
    return h.transpose(1, 2).reshape(len(h), -1, side, side)


class MultiScale(Quantizer):
    """A latent f (B, C, P, P) as codes on growing grids p_1 < ... < p_K = P, each of what the ones before leave over.

    ``r_1 = f``, ``k_i = index of area(r_i, p_i)``, ``h_i = phi_i(up(codes(k_i), P))``, ``r_{i+1} = r_i - h_i``,
    ``f_hat_i = h_1 + ... + h_i``.
    A model that has f_hat_i is fed ``down(f_hat_i, p_{i+1})`` to predict scale i + 1 (Tian et al. 2024, alg. 1 and 2).
    Indices of all scales are kept in one tensor (B, L), L the sum of the p_i^2; a prefix that ends with a scale is as good.

    Attributes:
        patch_nums: the p_i. length: L.
        up: how codes are enlarged. down: how the next input is made, ``"area"`` or as ``up``.
    """

    up, down = "bicubic", "area"
    commit_weight = 0.25

    def __init__(self, size: int, dim: int, patch_nums: tuple[int, ...]) -> None:
        super().__init__(size, dim)
        self.patch_nums = tuple(patch_nums)
        if not self.patch_nums or self.patch_nums[0] < 1 or list(self.patch_nums) != sorted(set(self.patch_nums)):
            raise ValueError(f"patch_nums={self.patch_nums}: give growing sides, such as (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)")
        self.length = sum(p * p for p in self.patch_nums)

    def assign(self, rows: Tensor) -> Tensor:
        """Indices (n,) of the codes for rows (n, C)."""
        raise NotImplementedError

    def phi(self, h: Tensor, scale: int) -> Tensor:
        """What is done to the enlarged codes (B, C, P, P) of a scale, counted from 0."""
        return h

    def split(self, indices: Tensor) -> list[Tensor]:
        """Indices (B, L') by scale: (B, p_i^2) each.

        Raises:
            ValueError: L' is not where a scale ends.
        """
        sizes, given = [p * p for p in self.patch_nums], indices.shape[1]
        ends = list(accumulate(sizes))
        if given not in ends:
            raise ValueError(f"indices has {given} tokens a row; scales end at {', '.join(map(str, ends))}")
        return list(indices.split(sizes[: ends.index(given) + 1], 1))

    def step(self, f_hat: Tensor | None, h: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add the codes h (B, p^2, C) of a scale, counted from 0, to f_hat (None at the first).

        Returns:
            f_hat (B, C, P, P), and the input (B, p'^2, C) for the next scale; None after the last.
        """
        added = self.phi(resize(to_map(h), self.patch_nums[-1], self.up), scale)
        f_hat = added if f_hat is None else f_hat + added
        if scale + 1 == len(self.patch_nums):
            return f_hat, None
        return f_hat, resize(f_hat, self.patch_nums[scale + 1], self.down).flatten(2).transpose(1, 2)

    def _walk(self, indices: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        f_hat, f_hats, inputs = None, [], []
        for i, tokens in enumerate(self.split(indices)):
            f_hat, following = self.step(f_hat, self.codes(tokens), i)
            f_hats.append(f_hat)
            inputs += [] if following is None else [following]
        return f_hats, inputs

    def f_hats(self, indices: Tensor) -> list[Tensor]:
        """The latent (B, C, P, P) after each scale of indices (B, L')."""
        return self._walk(indices)[0]

    def next_inputs(self, indices: Tensor) -> Tensor:
        """Teacher forcing: the inputs (B, L - p_1^2, C) of all scales but the first, from indices (B, L)."""
        return torch.cat(self._walk(indices)[1], 1)

    def encode(self, z: Tensor) -> Quantized:
        """Quantize a latent (B, C, P, P); indices are (B, L).

        Raises:
            ValueError: another height or width than P.
        """
        side = self.patch_nums[-1]
        if z.shape[2:] != (side, side):
            raise ValueError(f"z has height and width {tuple(z.shape[2:])}; the scales {self.patch_nums} need ({side}, {side})")
        indices: list[Tensor] = []
        f_hats: list[Tensor] = []
        for i, p in enumerate(self.patch_nums):
            left = z if i == 0 else z - f_hats[-1]
            rows = resize(left.detach(), p, "area").permute(0, 2, 3, 1)
            indices.append(self.assign(rows.flatten(0, 2)).view(len(z), p * p))
            f_hats.append(self.step(f_hats[-1] if i else None, self.codes(indices[-1]), i)[0])
        losses = {}
        if self.training:
            losses["codebook"] = torch.stack([F.mse_loss(f_hat, z.detach()) for f_hat in f_hats]).mean()
            losses["commit"] = self.commit_weight * torch.stack([F.mse_loss(z, f_hat.detach()) for f_hat in f_hats]).mean()
        return Quantized(z + (f_hats[-1] - z).detach(), torch.cat(indices, 1), losses)


class Phi(nn.Conv2d):
    """``(1 - ratio) h + ratio conv3x3(h)``."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__(dim, dim, 3, padding=1)
        self.ratio = ratio

    def forward(self, input: Tensor) -> Tensor:
        return (1 - self.ratio) * input + self.ratio * super().forward(input)


class MultiScaleVQ(MultiScale):
    """VAR's quantizer: one learned codebook for all scales, bicubic enlargement, convolutions phi (Tian et al. 2024, alg. 1, 2).

    Loss: the mean over scales of ``mse(f_hat_i, sg f) + commit_weight mse(f, sg f_hat_i)``.

    Args:
        size, dim: V and C.
        patch_nums: sides of the scales.
        share: how many convolutions phi the scales share; 0 is one for each.
        ratio: share of the convolution in phi, 0 to 1, default 0.5.
        cosine: pick codes by the angle instead of the distance (the codes keep their norm).
        commit_weight: beta, default 0.25.
    """

    def __init__(
        self,
        size: int = 4096,
        dim: int = 32,
        patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        *,
        share: int = 4,
        ratio: float = 0.5,
        cosine: bool = False,
        commit_weight: float = 0.25,
    ) -> None:
        super().__init__(size, dim, patch_nums)
        if share < 0 or not 0 <= ratio <= 1:
            raise ValueError(f"share={share}, ratio={ratio}: give share >= 0 and a ratio from 0 to 1")
        self.cosine, self.commit_weight = cosine, commit_weight
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)
        # Part of the official layout: running counts of how often a code is hit at each scale. Nothing here reads them.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.patch_nums), size))
        phis = [Phi(dim, ratio) for _ in range(share or len(self.patch_nums))]
        #: The official layout names them by how they are shared.
        self.quant_resi = nn.ModuleDict({"qresi": phis[0]} if share == 1 else {})
        if share == 0:
            self.quant_resi.update({str(i): phi for i, phi in enumerate(phis)})
        elif share > 1:
            self.quant_resi["qresi_ls"] = nn.ModuleList(phis)

    def phi(self, h: Tensor, scale: int) -> Tensor:
        phis = [module for module in self.quant_resi.modules() if isinstance(module, Phi)]
        at, count = scale / max(len(self.patch_nums) - 1, 1), len(phis)
        edge = 1 / 3 / count if count == 4 else 1 / 2 / count  # the official ticks; 4 is where the released models are
        ticks = torch.linspace(edge, 1 - edge, count, dtype=torch.float64)
        out: Tensor = phis[int((ticks - at).abs().argmin())](h)
        return out

    def codes(self, indices: Tensor) -> Tensor:
        out: Tensor = self.embedding(indices)
        return out

    def table(self) -> Tensor:
        return self.embedding.weight

    def assign(self, rows: Tensor) -> Tensor:
        if self.cosine:
            return nearest(F.normalize(rows, dim=-1), F.normalize(self.embedding.weight, dim=-1))
        return nearest(rows, self.embedding.weight)


class MultiScaleBSQ(MultiScale):
    """Infinity's quantizer: :class:`BSQ` codes on each scale, bilinear enlargement, nothing learned (Han et al. 2024, sec. 3.2).

    Args:
        bits: C, one bit for each channel.
        patch_nums: sides of the scales.
        down: how the next input is made: ``"bilinear"``, what the released transformers are fed, or ``"area"``, what the
            official tokenizer gives.
    """

    up = "bilinear"

    def __init__(self, bits: int, patch_nums: tuple[int, ...], *, down: str = "bilinear") -> None:
        super().__init__(2**bits, bits, patch_nums)
        if down not in ("area", "bilinear"):
            raise ValueError(f"down={down!r}: give 'bilinear' or 'area'")
        self.down, self.base = down, BSQ(bits)

    def codes(self, indices: Tensor) -> Tensor:
        return self.base.codes(indices)

    def table(self) -> Tensor:
        return self.base.table()

    def assign(self, rows: Tensor) -> Tensor:
        return self.base.from_bits(rows > 0)

    def _neighbours(self, k: int) -> Tensor:
        return self.base._neighbours(k)
