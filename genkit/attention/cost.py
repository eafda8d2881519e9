"""What an image costs in attention pairs and FLOPs: scale by scale, token by token, by diffusion. No network is needed.

    python -m genkit.attention.cost [--model var-d16 ...] [--sides 1,2,3] [--steps 50] [--no-cache] [--growth]

A pair is a query that looks at a key. A FLOP is a multiplication or an addition of a matrix product (``2 m n k`` for an
``(m, k) x (k, n)`` product), as ``torch.utils.flop_counter`` counts; norms, activations and exponentials are left out. With
width w, depth L, and R = images x branches rows:

- attention: ``4 w`` FLOPs per pair, layer and row (``q k^T`` and the weighted sum of v, over all heads);
- a block's matrices: ``24 w^2`` per position (4 w^2 + 8 w^2 weights), or ``8 w^2 + 6 w h`` with SwiGLU of width h;
- pairs of scales of n_1, n_2, ... positions, ``N_k = n_1 + ... + n_k``: ``sum_k n_k N_k`` with a cache,
  ``sum_k sum_(j <= k) n_j N_j`` without;
- pairs of T tokens after P of the condition, ``N = P + T - 1``: ``N (N + 1) / 2`` with a cache, ``sum_(i = P)^N i (i + 1) / 2``
  without;
- pairs of S steps over T tokens: ``S T^2``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass(frozen=True)
class Cost:
    """What the images of one call cost.

    Attributes:
        tokens: of an image, all scales together.
        calls: passes of the network, each over all rows.
        rows: R = images x branches.
        positions: that are fed, over all calls, per row.
        pairs: that attention needs, per row and layer, over all calls.
        attention: FLOPs of attention.
        linear: FLOPs of all other matrix products.
        exponentials: of the softmaxes.
        cached: numbers in the cache of keys and values at the end.
    """

    tokens: int
    calls: int
    rows: int
    positions: int
    pairs: int
    attention: int
    linear: int
    exponentials: int
    cached: int

    @property
    def flops(self) -> int:
        return self.attention + self.linear

    @property
    def share(self) -> float:
        """Attention's share of the FLOPs, 0 to 1."""
        return self.attention / self.flops


class Network(Protocol):
    """Sizes of a network."""

    def cost(self, images: int = 1, branches: int = 2, cache: bool = True) -> Cost: ...


def _cost(
    tokens: int, calls: int, rows: int, positions: int, pairs: int, linear: int, sizes: tuple[int, int, int], cached: int
) -> Cost:
    width, depth, heads = sizes
    attention, exponentials = 4 * width * depth * rows * pairs, heads * depth * rows * pairs
    return Cost(tokens, calls, rows, positions, pairs, attention, linear, exponentials, 2 * width * depth * rows * cached)


@dataclass(frozen=True)
class NextScale:
    """VAR: each scale in one pass, which sees itself and all before.

    Args:
        width, depth, heads: of the blocks.
        sides: of the scales; scale k has sides[k]^2 tokens.
        vocabulary, code_dim: of the tokenizer.
    """

    width: int
    depth: int
    heads: int
    sides: tuple[int, ...] = SCALES_256
    vocabulary: int = 4096
    code_dim: int = 32

    def cost(self, images: int = 1, branches: int = 2, cache: bool = True) -> Cost:
        """Of drawing ``images`` with ``branches`` rows each; without a cache every pass begins at the first scale.

        What the condition does in AdaLN is computed once. Scales are fed the codes of those before, the first the condition.
        """
        w, depth, rows = self.width, self.depth, images * branches
        sizes = [side * side for side in self.sides]
        ends = list(accumulate(sizes))
        looks = [n * end for n, end in zip(sizes, ends, strict=True)]
        fed, pairs = (sizes, looks) if cache else (ends, list(accumulate(looks)))
        coded = sum(fed) - (1 if cache else len(sizes)) * sizes[0]
        per_position = 24 * w * w * depth + 2 * w * self.vocabulary
        modulation = 12 * w * w * depth + 4 * w * w
        linear = rows * (sum(fed) * per_position + coded * 2 * self.code_dim * w + modulation)
        shape = (w, depth, self.heads)
        return _cost(ends[-1], len(sizes), rows, sum(fed), sum(pairs), linear, shape, ends[-1] if cache else 0)


@dataclass(frozen=True)
class NextToken:
    """LlamaGen: one token in one pass, which sees all before; the condition's tokens come first.

    Args:
        width, depth, heads: of the blocks.
        tokens: T of an image.
        vocabulary: of the tokenizer.
        prefix: P, tokens of the condition; 1 for a class.
        multiple: the width of SwiGLU, 8/3 of the width, is rounded up to a multiple of it.
    """

    width: int
    depth: int
    heads: int
    tokens: int = 256
    vocabulary: int = 16384
    prefix: int = 1
    multiple: int = 256

    def cost(self, images: int = 1, branches: int = 2, cache: bool = True) -> Cost:
        """Of drawing ``images`` with ``branches`` rows each; without a cache every pass begins at the condition."""
        w, rows, end = self.width, images * branches, self.prefix + self.tokens - 1  # the last token is not fed
        hidden = -(-int(8 * w / 3) // self.multiple) * self.multiple
        ends = range(self.prefix, end + 1)
        positions = end if cache else sum(ends)
        pairs = end * (end + 1) // 2 if cache else sum(n * (n + 1) // 2 for n in ends)
        per_position = (8 * w * w + 6 * w * hidden) * self.depth + 2 * w * self.vocabulary
        shape = (w, self.depth, self.heads)
        return _cost(
            self.tokens, self.tokens, rows, positions, pairs, rows * positions * per_position, shape, end if cache else 0
        )


@dataclass(frozen=True)
class Diffusion:
    """DiT: all tokens in every pass.

    Args:
        width, depth, heads: of the blocks.
        tokens: T, patches of the latent.
        steps: S, evaluations of the network.
        patch_in, patch_out: values of a patch, and of its prediction (twice as many with learned variances).
        frequencies: of the timestep's embedding.
    """

    width: int
    depth: int
    heads: int
    tokens: int = 256
    steps: int = 50
    patch_in: int = 16
    patch_out: int = 32
    frequencies: int = 256

    def cost(self, images: int = 1, branches: int = 2, cache: bool = True) -> Cost:
        """Of drawing ``images`` with ``branches`` rows each. There is nothing to cache: every token changes at every step."""
        w, rows, positions = self.width, images * branches, self.steps * self.tokens
        per_position = 24 * w * w * self.depth + 2 * w * (self.patch_in + self.patch_out)
        per_pass = 2 * w * (self.frequencies + w) + 12 * w * w * self.depth + 4 * w * w  # timestep MLP, AdaLN, final AdaLN
        linear = rows * (positions * per_position + self.steps * per_pass)
        shape = (w, self.depth, self.heads)
        return _cost(self.tokens, self.steps, rows, positions, self.steps * self.tokens**2, linear, shape, 0)


#: Sizes of the released models, for images of 256 pixels unless the name says otherwise.
MODELS: dict[str, NextScale | NextToken | Diffusion] = {
    **{f"var-d{depth}": NextScale(64 * depth, depth, depth) for depth in (16, 20, 24, 30)},
    "var-d36-512": NextScale(64 * 36, 36, 36, SCALES_512),
    "llamagen-B": NextToken(768, 12, 12),
    "llamagen-L": NextToken(1024, 24, 16),
    "llamagen-XL-384": NextToken(1280, 36, 20, 576),
    "llamagen-XXL-384": NextToken(1536, 48, 24, 576),
    "llamagen-3B-384": NextToken(3200, 24, 32, 576),
    "dit-s-2": Diffusion(384, 12, 6),
    "dit-b-2": Diffusion(768, 12, 12),
    "dit-l-2": Diffusion(1024, 24, 16),
    "dit-xl-2": Diffusion(1152, 28, 16),
    "dit-xl-2-512": Diffusion(1152, 28, 16, tokens=1024),
}


def doubled(side: int) -> tuple[int, ...]:
    """The scales 1, 2, 4, ... up to ``side``, a power of 2. Raises ValueError for any other side."""
    if side < 1 or side & (side - 1):
        raise ValueError(f"side={side}: give a power of 2")
    return tuple(2**i for i in range(side.bit_length()))


def growth(sides: Sequence[int] = (8, 16, 32, 64), cache: bool = True) -> list[dict[str, float]]:
    """Pairs per layer and row over the side n of the token grid, as multiples of n^4, for the three ways to draw an image.

    With a cache all are of order n^4: scales 1, 2, 4, ..., n tend to 64/45 n^4, a raster of n^2 tokens to n^4 / 2, and a step of
    diffusion has n^4. Ke et al. 2025 (arXiv 2501.04377): less than about n^4 is possible for VAR (d = O(log n)) only where
    entries are bounded by o(sqrt(log n)), then O(n^(2 + o(1))).
    """
    rows = []
    for n in sides:
        scales = NextScale(64, 1, 1, doubled(n)).cost(1, 1, cache)
        raster = NextToken(64, 1, 1, n * n).cost(1, 1, cache)
        step = Diffusion(64, 1, 1, n * n, 1).cost(1, 1)
        pairs = {"next_scale": scales.pairs, "next_token": raster.pairs, "diffusion_step": step.pairs}
        rows.append({"side": n, **{name: value / n**4 for name, value in pairs.items()}})
    return rows


def table(costs: dict[str, Cost]) -> list[str]:
    """Markdown, one line for each network."""
    head = (
        "| network | tokens | calls | rows | pairs / layer / row | attention GFLOP | other GFLOP | attention | cache, M numbers |"
    )
    lines = [head, "|---|" + "---:|" * 8]
    for name, c in costs.items():
        numbers = f"{c.tokens:,} | {c.calls:,} | {c.rows} | {c.pairs:,} | {c.attention / 1e9:,.1f} | {c.linear / 1e9:,.1f}"
        lines.append(f"| {name} | {numbers} | {c.share:.1%} | {c.cached / 1e6:,.1f} |")
    return lines


def growth_table(rows: list[dict[str, float]]) -> list[str]:
    """Markdown of :func:`growth`."""
    lines = ["| side n | next scale / n^4 | next token / n^4 | one diffusion step / n^4 |", "|---:|---:|---:|---:|"]
    return lines + [f"| {r['side']} | {r['next_scale']:.3f} | {r['next_token']:.3f} | {r['diffusion_step']:.3f} |" for r in rows]


def chosen(
    names: Sequence[str], sides: tuple[int, ...] | None, steps: int | None
) -> dict[str, NextScale | NextToken | Diffusion]:
    """The networks of these names with other scales or steps. Raises ValueError for a name that there is not, or such numbers."""
    if sides is not None and (sides[0] < 1 or list(sides) != sorted(set(sides))):
        raise ValueError(f"sides={','.join(map(str, sides))}: give growing sides from 1 on, such as 1,2,3,4,5,6,8,10,13,16")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: give 1 or more")
    found = {}
    for name in names:
        if name not in MODELS:
            raise ValueError(f"model={name!r} is unknown; use {', '.join(MODELS)}")
        network = MODELS[name]
        if isinstance(network, NextScale) and sides:
            network = replace(network, sides=sides)
        elif isinstance(network, Diffusion) and steps:
            network = replace(network, steps=steps)
        elif isinstance(network, NextToken) and sides:
            network = replace(network, tokens=sides[-1] ** 2)
        found[name] = network
    return found


def _sides(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(side) for side in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give sides with commas between them, such as 1,2,4,8") from None


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m genkit.attention.cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--sides", type=_sides, help="scales, such as 1,2,4,8; token by token, the last of them is the side of the grid"
    )
    parser.add_argument("--steps", type=int, help="of diffusion; default 50")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--branches", type=int, default=2, help="rows per image: 2 under guidance, 1 without")
    parser.add_argument("--no-cache", action="store_true", help="feed everything again in every pass")
    parser.add_argument("--growth", action="store_true", help="pairs over the side of the token grid")
    args = parser.parse_args(argv)
    for name in ("images", "branches"):
        if getattr(args, name) < 1:
            parser.error(f"{name}={getattr(args, name)}: give 1 or more")
    try:
        networks = chosen(args.model, args.sides, args.steps)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(table({n: net.cost(args.images, args.branches, not args.no_cache) for n, net in networks.items()})))
    if args.growth:
        print("\n" + "\n".join(growth_table(growth(cache=not args.no_cache))))


if __name__ == "__main__":
    main()
