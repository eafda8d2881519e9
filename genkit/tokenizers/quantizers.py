"""Vector quantizers: continuous latents to codebook indices and back, with the losses that train them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Largest number of distances held at once: 16M floats are 64 MB.
BLOCK = 2**24


class Quantized(NamedTuple):
    """What a quantizer makes of a latent.

    Attributes:
        z_q: (B, d, ...), the codes in the forward pass, the gradient of the latent in the backward pass (straight-through).
        indices: (B, ...), int64.
        losses: weighted terms, whose sum is the training loss; empty in evaluation mode.
    """

    z_q: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


def nearest(rows: Tensor, table: Tensor) -> Tensor:
    """Index (n,) of the entry of ``table`` (V, d) with the smallest L2 distance to each of ``rows`` (n, d), without gradient."""
    rows, table = rows.detach().float(), table.detach().float()
    squares = table.square().sum(1)
    blocks = rows.split(max(1, BLOCK // len(table)))
    return torch.cat([torch.addmm(squares, block, table.T, alpha=-2).argmin(1) for block in blocks])


def entropies(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean entropy of ``p = softmax(logits / temperature)`` over rows (n, V), and entropy of the mean of p.

    The second takes ``log(p + 1e-5)``, as the official codes do.
    """
    log_p = (logits / temperature).log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -(mean * (mean + 1e-5).log()).sum()


class Quantizer(nn.Module):
    """A codebook of V codes of d values, and the rule that picks among them.

    Attributes:
        size: V. dim: d.
        entropy_weight: of ``mean entropy - entropy of the mean``, which makes choices sharp and codes used. Costs (n, V) memory.
        temperature: of the softmax in it.
    """

    def __init__(self, size: int, dim: int, entropy_weight: float = 0.0, temperature: float = 0.01) -> None:
        super().__init__()
        if size < 2 or dim < 1 or temperature <= 0:
            raise ValueError(f"size={size}, dim={dim}, temperature={temperature}: give size >= 2, dim >= 1, temperature > 0")
        self.size, self.dim, self.entropy_weight, self.temperature = size, dim, entropy_weight, temperature
        self._near: tuple[object, Tensor] | None = None

    def encode(self, z: Tensor) -> Quantized:
        """Quantize a latent (B, d, ...)."""
        raise NotImplementedError

    def codes(self, indices: Tensor) -> Tensor:
        """Codes (..., d) of indices (...), as the decoder gets them."""
        raise NotImplementedError

    def table(self) -> Tensor:
        """All codes (V, d)."""
        raise NotImplementedError

    @torch.no_grad()
    def neighbours(self, k: int) -> Tensor:
        """The k codes nearest to each code in L2, nearest first and itself left out: (V, k), int32. Kept until the codes change.

        Args:
            k: from 1 to V - 1.
        """
        if not 1 <= k < self.size:
            raise ValueError(f"k={k}: give 1 to {self.size - 1}, the number of other codes")
        version = [(id(p), p.data_ptr(), p._version) for p in self.parameters()]
        if self._near is None or self._near[0] != version or self._near[1].shape[1] < k:
            self._near = (version, self._neighbours(k))
        return self._near[1][:, :k]

    def _neighbours(self, k: int) -> Tensor:
        table, out = self.table().float(), []
        for first in range(0, self.size, step := max(1, BLOCK // self.size)):
            rows = table[first : first + step]
            distance = torch.cdist(rows, table, compute_mode="donot_use_mm_for_euclid_dist")
            distance[torch.arange(len(rows)), first + torch.arange(len(rows))] = math.inf
            out.append(distance.topk(k, largest=False).indices.int())
        return torch.cat(out)

    def usage(self, indices: Tensor) -> float:
        """Share of the codebook, from 0 to 1, that occurs in ``indices``."""
        return len(indices.unique()) / self.size

    def _entropy(self, logits: Tensor) -> dict[str, Tensor]:
        sample, batch = entropies(logits, self.temperature)
        return {"sample_entropy": self.entropy_weight * sample, "batch_entropy": -self.entropy_weight * batch}


class VectorQuantizer(Quantizer):
    """Nearest code of a learned codebook, ``k = argmin |z - e_k|^2`` (van den Oord et al. 2017, eq. 1-3).

    Loss ``codebook_weight mse(e_k, sg z) + commit_weight mse(z, sg e_k)``, plus the entropy terms.

    Args:
        size: V. dim: d.
        l2_norm: latents and codes are scaled to norm 1 first, and ``codes`` gives them so (LlamaGen).
        commit_weight: beta. codebook_weight: of the other term.
        entropy_weight, temperature: see :class:`Quantizer`; logits are ``-|z - e|^2``.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        l2_norm: bool = False,
        commit_weight: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.0,
        temperature: float = 0.01,
    ) -> None:
        super().__init__(size, dim, entropy_weight, temperature)
        self.l2_norm, self.commit_weight, self.codebook_weight = l2_norm, commit_weight, codebook_weight
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def _project(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    def codes(self, indices: Tensor) -> Tensor:
        return self._project(self.embedding(indices))

    def table(self) -> Tensor:
        return self._project(self.embedding.weight)

    def encode(self, z: Tensor) -> Quantized:
        rows = z.movedim(1, -1)
        rows = F.normalize(rows, dim=-1) if self.l2_norm else rows
        flat = rows.flatten(0, -2)
        indices = nearest(flat, self.table()).view(rows.shape[:-1])
        q = self.codes(indices)
        losses = {}
        if self.training:
            losses["codebook"] = self.codebook_weight * F.mse_loss(q, rows.detach())
            losses["commit"] = self.commit_weight * F.mse_loss(rows, q.detach())
            if self.entropy_weight:
                table = self.table()
                distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
                losses |= self._entropy(-distance)
        return Quantized((rows + (q - rows).detach()).movedim(-1, 1), indices, losses)


class SimVQ(VectorQuantizer):
    """Nearest code of ``W c_k + b`` with a frozen random codebook c: one linear layer moves all codes at once (Zhu et al. 2024).

    Args:
        size, dim: V and d.
        legacy: put beta on the codebook term instead of the commitment term, the default of the official code.
        beta: the weight of that term.
    """

    def __init__(self, size: int, dim: int, *, beta: float = 0.25, legacy: bool = False) -> None:
        weights = (1.0, beta) if legacy else (beta, 1.0)
        super().__init__(size, dim, commit_weight=weights[0], codebook_weight=weights[1])
        nn.init.normal_(self.embedding.weight, std=dim**-0.5).requires_grad_(False)
        self.embedding_proj = nn.Linear(dim, dim)

    def _project(self, rows: Tensor) -> Tensor:
        out: Tensor = self.embedding_proj(rows)
        return out


class IBQ(VectorQuantizer):
    """Index backpropagation: ``k = argmax z.e_k``, and the gradient of ``softmax(z.e)`` reaches every code (Shi et al. 2024).

    Loss ``mse(z_q, z) + mse(sg e_k, z) + commit_weight mse(e_k, sg z)``, plus the entropy terms. Holds (n, V) values.
    """

    def encode(self, z: Tensor) -> Quantized:
        rows, table = z.movedim(1, -1), self.table()
        logits = rows @ table.T
        soft = logits.softmax(-1)
        indices = soft.argmax(-1)
        hard = F.one_hot(indices, self.size).to(soft)
        q, fixed = (hard - soft.detach() + soft) @ table, self.codes(indices)
        losses = {}
        if self.training:
            losses["codebook"] = F.mse_loss(q, rows) + self.commit_weight * F.mse_loss(fixed, rows.detach())
            losses["commit"] = F.mse_loss(rows, fixed.detach())
            if self.entropy_weight:
                losses |= self._entropy(logits.flatten(0, -2))
        return Quantized(q.movedim(-1, 1), indices, losses)


class LFQ(Quantizer):
    """Look-up free: ``q = sign(z)``, ``index = sum_i 2^i [z_i > 0]`` (Yu et al. 2023, sec. 3.1). No codebook is stored.

    Loss ``commit_weight mse(z, sg q)``, plus the entropy terms with logits ``2 z.c`` over all 2^bits codes c.

    Args:
        bits: d, 1 to 62; with an entropy_weight, as few as memory for (n, 2^bits) values allows.
        parts: bits of the sub-tokens an index is split into, lowest first, such as (6, 12); () does not split.
        commit_weight: default 0.25. entropy_weight: default 0.1. temperature: default 0.01.
    """

    normalize, scale = False, 1.0

    def __init__(
        self,
        bits: int,
        *,
        parts: tuple[int, ...] = (),
        commit_weight: float = 0.25,
        entropy_weight: float = 0.1,
        temperature: float = 0.01,
    ) -> None:
        if not 1 <= bits <= 62:
            raise ValueError(f"bits={bits}: give 1 to 62")
        super().__init__(2**bits, bits, entropy_weight, temperature)
        if parts and (sum(parts) != bits or min(parts) < 1):
            raise ValueError(f"parts={parts}: give positive numbers that add up to bits={bits}")
        self.parts, self.commit_weight = tuple(parts) or (bits,), commit_weight
        self.register_buffer("shifts", torch.arange(bits), persistent=False)

    shifts: Tensor

    def bits(self, indices: Tensor) -> Tensor:
        """The bits (..., d) of indices (...), lowest first: int64, 0 or 1."""
        return indices[..., None] >> self.shifts & 1

    def from_bits(self, bits: Tensor) -> Tensor:
        """Indices (...) of bits (..., d)."""
        return (bits.long() << self.shifts).sum(-1)

    def split(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The sub-tokens of indices, each of the shape of ``indices``."""
        firsts = [sum(self.parts[:i]) for i in range(len(self.parts))]
        return tuple(indices >> first & 2**width - 1 for first, width in zip(firsts, self.parts, strict=True))

    def join(self, *tokens: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        return torch.stack([token << sum(self.parts[:i]) for i, token in enumerate(tokens)]).sum(0)

    def codes(self, indices: Tensor) -> Tensor:
        return (2 * self.bits(indices) - 1).to(torch.get_default_dtype()) * self.scale

    def table(self) -> Tensor:
        return self.codes(torch.arange(self.size, device=self.shifts.device))

    def encode(self, z: Tensor) -> Quantized:
        rows = z.movedim(1, -1)
        rows = F.normalize(rows, dim=-1) if self.normalize else rows
        indices = self.from_bits(rows > 0)
        q = torch.where(rows > 0, self.scale, -self.scale).to(rows)
        losses = {}
        if self.training:
            losses["commit"] = self.commit_weight * F.mse_loss(rows, q)
            if self.entropy_weight:
                losses |= self._entropy(2 * rows.flatten(0, -2) @ self.table().to(rows).T)
        return Quantized((rows + (q - rows).detach()).movedim(-1, 1), indices, losses)

    def _neighbours(self, k: int) -> Tensor:
        # Flipping m bits moves by 2 sqrt(m) in any direction; ties go to the lower bits.
        flips = torch.arange(1, self.size, device=self.shifts.device)
        flips = flips[self.bits(flips).sum(-1).argsort(stable=True)[:k]]
        return (torch.arange(self.size, device=flips.device)[:, None] ^ flips).int()


class BSQ(LFQ):
    """Binary spherical: :class:`LFQ` of ``z / |z|`` with codes ``+-1 / sqrt(d)`` (Zhao et al. 2024)."""

    normalize = True

    def __init__(self, bits: int, *, commit_weight: float = 0.25, entropy_weight: float = 0.0, temperature: float = 0.01) -> None:
        super().__init__(bits, commit_weight=commit_weight, entropy_weight=entropy_weight, temperature=temperature)
        self.scale = bits**-0.5
