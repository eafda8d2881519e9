"""``GuidedLogits``: the guidances of genkit on the logits of an autoregressive network.

Contract, for decoding loops (next token, next scale, speculative)::

    guided = GuidedLogits(network, guidance, {"cond": labels, "uncond": null}, batch, length=room, seeds=seeds)
    z = guided.logits(inputs, index, total, tail=1)     # feeds the positions from guided.lengths on; (B, tail, V) guided logits
    guided.lengths                                      # (B,) positions fed so far, by row; moves on by n at every call
    guided.hidden["cond"]                               # (B, n, d) of the last call, by the name of the branch (rows of its mask)
    guided.keep(path)                                   # after a tree: of the last call's n nodes only path (B, m) stays
    guided.rewind(length)                               # forget the positions from length on (int, or one per row)
    guided.combined(predictions, index, total)          # the guided logits of predictions made elsewhere, by a drafter's branches
    guided.ledger.nfe, guided.trace

A network has ``cache_shape`` (layers, heads of keys and values, head_dim) and ``length`` (positions, those of the condition
included), and is called as ``network(inputs, condition, cache=cache, start=start, mask=mask)``, with ``positions=`` where given:

- inputs (B, n, ...): what positions start .. start + n - 1 are fed; where the condition stands alone, anything (zeros).
- start: an int, or one per row (B,) where rows differ in length.
- mask: (n, start + n) or (B, 1, n, max(start) + n), True where a position may look. None is the mask of training cut to these
  positions: feeding several steps (tokens, scales) at once gives what feeding them one by one does.
- positions: (n,) or (B, n), where the inputs stand if not at start, start + 1, ...: nodes of a tree share places.
- It returns :class:`genkit.models.autoregressive.Logits`.

Predictions are logits less their mean over the vocabulary, (B, n, V) in float32 at least: logits mean the same up to a constant,
and a zero mean makes norms and angles mean something. They stand for x0; there is no noise level: sigma and sigma_next are NaN,
alpha = 1, s = 0, x = 0. ``index`` counts tokens or scales.

Every planned branch has keys and values of its own. A branch that is not planned costs nothing. When it is planned again, the
positions it missed are fed in one pass before the new ones, so that its prediction is that of a branch which was never skipped.
The ledger counts positions: a row of n positions fed to a network is n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genkit.denoiser import Condition, Guided, Network, TraceLevel, _join, _rows
from genkit.guidance.base import Branch, Guidance, StepInfo
from genkit.samplers.autoregressive.cache import StaticCache

#: What a host of logits gives a guidance.
OFFERED = frozenset({"perturb", "noise"})


def check_logits(guidance: Guidance) -> None:
    """Raise ValueError, with the reason, for a guidance that means nothing on logits: it, or one inside it."""
    for part in guidance.parts:
        check_logits(part)
    if reason := _reason(guidance):
        raise ValueError(
            f"guidance={guidance!r} {reason}, which logits do not have; use CFG, Autoguidance, PAG, SLG or APG, alone or in "
            "Interval(..., unit='step'), Scheduled, Piecewise(..., unit='step'), Adaptive or Sum"
        )


def _reason(guidance: Guidance) -> str | None:
    if missing := guidance.requires - OFFERED:
        return f"needs {' and '.join(sorted(missing))}"
    if guidance.space != "x0":
        return f"works in the space {guidance.space!r}"
    if guidance.logits is False:
        return "is made for images or their noise levels"
    if getattr(guidance, "unit", None) == "sigma" or getattr(guidance, "time", None) in ("flow", "end"):
        return "is bound to noise levels (unit='sigma' or time='flow')"
    if not guidance.affine and not guidance.logits:
        return "is not affine in its predictions: it is made for the values of images"
    return None


class _Pack(NamedTuple):
    """The rows of one forward pass."""

    rows: Tensor  # of the lane's cache
    sample: Tensor  # which sample each is of
    sizes: list[int]  # how many each branch has
    cache: StaticCache  # over these rows


class _Lane:
    """The branches that one network evaluates: their rows in its cache, and how far each row is filled."""

    def __init__(self, cache: StaticCache, batch: int) -> None:
        self.cache, self.batch = cache, batch
        self.slots: dict[Branch, int] = {}
        self.filled = torch.zeros(0, dtype=torch.long)
        self._packs: dict[tuple[Branch, ...], _Pack] = {}

    def pack(self, branches: tuple[Branch, ...]) -> _Pack:
        """The rows of these branches; the cache grows for those not seen before."""
        if branches in self._packs:
            return self._packs[branches]
        keys = [b._replace(mask=None, transform=None) for b in branches]
        for key in keys:
            self.slots.setdefault(key, len(self.slots))
        if missing := len(self.slots) * self.batch - len(self.filled):
            reached = int(self.filled.max()) if len(self.filled) else 0
            self.filled = torch.cat([self.filled, torch.zeros(missing, dtype=torch.long)])
            self.cache = self.cache.grown(len(self.filled), reached)
            self._packs.clear()
        everyone = torch.arange(self.batch)
        samples = [everyone if b.mask is None else everyone[b.mask.cpu()] for b in branches]
        rows = torch.cat([self.slots[key] * self.batch + s for key, s in zip(keys, samples, strict=True)])
        pack = _Pack(rows, torch.cat(samples), [len(s) for s in samples], self.cache.rows(_span(rows)))
        if all(b.mask is None and b.transform is None for b in branches):
            self._packs[branches] = pack
        return pack


class GuidedLogits(Guided):
    """One run of a guidance over a batch of sequences; see the top of this file.

    Args:
        models: a network, or several by name, of which ``"main"`` is required.
        guidance: any guidance that means something on logits; it is not changed.
        conditions: the condition of each name a plan may ask for, each for the whole batch. ``"cond"`` is required.
        batch: number of samples.
        length: positions to make room for, those of the condition included; None: as many as the main network can have.
        trace: ``"full"`` also measures cosine and update norm, ``"none"`` keeps no trace.
        seeds: one integer per sample, for methods that draw random numbers.

    Raises:
        ValueError: the guidance means nothing on logits.
    """

    def __init__(
        self,
        models: Any,
        guidance: Guidance,
        conditions: Mapping[str, Condition],
        batch: int,
        length: int | None = None,
        trace: TraceLevel = "basic",
        seeds: Sequence[int] | None = None,
    ) -> None:
        check_logits(guidance)
        super().__init__(models if isinstance(models, Mapping) else {"main": models}, guidance, conditions, batch, trace, seeds)
        self.room: int = length or self.model("main").length
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.hidden: dict[str, Tensor] = {}
        self._history: Tensor | None = None  # (B, room, ...): what was fed at every position
        self._lanes: dict[Network, _Lane] = {}
        self._fed: tuple[Tensor, Tensor | None, Tensor | None, int] | None = None

    def logits(
        self,
        inputs: Tensor,
        index: int,
        total: int,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        tail: int | None = None,
        weight: float | None = None,
    ) -> Tensor:
        """Feed the positions from ``lengths`` on, and guide.

        Args:
            inputs: (B, n, ...), what the positions are fed, the same in all branches.
            index, total: the step and the number of steps, for the guidance.
            mask, positions: for trees: passed on to the network.
            tail: only the last so many positions are guided, and counted as the step's prediction; None: all n.
            weight: a guidance scale in place of the guidance's own.

        Returns:
            Guided logits (B, tail, V), of zero mean over V.
        """
        if len(inputs) != self.batch:
            raise ValueError(f"inputs has {len(inputs)} rows, but this run is one of batch={self.batch}")
        n = inputs.shape[1]
        tail = n if tail is None else tail
        self._remember(inputs)
        self._fed, self.hidden, before = (inputs, mask, positions, tail), {}, sum(self.ledger.nfe)
        result = self(self._info(index, total, tail, inputs.device)._replace(weight=weight))
        self.lengths = self.lengths + n
        if self.level != "none":
            self.trace.rows[-1]["rows"] = sum(self.ledger.nfe) - before
        return result.denoised

    def combined(self, predictions: Mapping[str, Tensor], index: int, total: int) -> Tensor:
        """The guided logits of other predictions (B, n, V), by the name of the branch. The run's state stays as it is."""
        centred = {name: centre(z) for name, z in predictions.items()}
        first = next(iter(centred.values()))
        return self.guidance.combine(self._info(index, total, first.shape[1], first.device), centred, self.state)[0].denoised

    def evaluate(self, info: StepInfo, branches: tuple[Branch, ...]) -> dict[str, Tensor]:
        """Centred logits of the planned branches; one forward pass per model and perturbation, and one to catch up."""
        self._asked += branches
        out: dict[str, Tensor] = {}
        for network in dict.fromkeys(b.network for b in branches):
            out.update(self._evaluate_network(info, network, tuple(b for b in branches if b.network == network)))
        for b in (b for b in branches if b.mask is not None):  # rows not asked for hold the conditional prediction
            full = out.get("cond")
            whole = out[b.name].new_zeros(self.batch, *out[b.name].shape[1:]) if full is None else full.clone()
            whole[b.mask] = out[b.name]
            out[b.name] = whole
        self._check_average(next(iter(out.values())))
        return out

    def keep(self, path: Tensor) -> None:
        """Of the n positions fed last, keep ``path`` (B, m): rising numbers from 0, filled up with -1 where a row keeps fewer."""
        if self._fed is None or self._history is None:
            raise ValueError("nothing has been fed yet; call logits first")
        path = path.cpu()
        start, kept = self.lengths - self._fed[0].shape[1], (path >= 0).sum(1)
        rows = torch.arange(self.batch)[:, None]
        moved = self._history[rows, start[:, None] + path.clamp_min(0)]
        self._history[rows, start[:, None] + torch.arange(path.shape[1])] = moved
        for lane in self._lanes.values():
            many = len(lane.slots)
            lane.cache.keep(path.repeat(many, 1), start.repeat(many))
            here = lane.filled > start.repeat(many)
            lane.filled = torch.where(here, (start + kept).repeat(many), lane.filled)
        self.lengths = start + kept

    def rewind(self, length: int | Tensor) -> None:
        """Forget the positions from ``length`` on; an int, or one per row (B,)."""
        self.lengths = self.lengths.minimum(torch.as_tensor(length).cpu())
        for lane in self._lanes.values():
            lane.filled = lane.filled.minimum(self.lengths.repeat(len(lane.slots)))

    def _info(self, index: int, total: int, n: int, device: torch.device) -> StepInfo:
        progress = index / (total - 1) if total > 1 else 0.0
        x = torch.zeros(self.batch, n, 1, device=device)
        return StepInfo(index, total, progress, "step", math.nan, math.nan, 1.0, 0.0, x)

    def _remember(self, inputs: Tensor) -> None:
        n, longest = inputs.shape[1], int(self.lengths.max())
        if longest + n > self.room:
            raise ValueError(f"length={self.room} is too short for {longest + n} positions; give the run more room")
        if self._history is None:
            self._history = inputs.new_zeros(self.batch, self.room, *inputs.shape[2:])
        if bool((self.lengths == longest).all()):
            self._history[:, longest : longest + n] = inputs
        else:
            self._history[torch.arange(self.batch)[:, None], self.lengths[:, None] + torch.arange(n)] = inputs

    def _evaluate_network(self, info: StepInfo, network: Network, branches: tuple[Branch, ...]) -> dict[str, Tensor]:
        name, perturbation = network
        net = self.model(name)
        if perturbation is not None and not hasattr(net, "perturbed"):
            raise ValueError(f"{self.guidance!r} needs a network that can be weakened in its layers; {name!r} cannot be")
        if network not in self._lanes:
            self._lanes[network] = _Lane(StaticCache.of(net, 0, self.room), self.batch)
        lane = self._lanes[network]
        pack, condition = lane.pack(branches), self._packed_condition(info, branches)
        with nullcontext() if perturbation is None else net.perturbed(perturbation):
            self._catch_up(net, lane, pack, condition)
            logits, hidden = self._feed(net, lane, pack, condition)
        self.hidden.update({b.name: h for b, h in zip(branches, hidden.split(pack.sizes), strict=True)})
        return {b.name: z for b, z in zip(branches, logits.split(pack.sizes), strict=True)}

    def _feed(self, net: Any, lane: _Lane, pack: _Pack, condition: Condition) -> tuple[Tensor, Tensor]:
        assert self._fed is not None
        inputs, mask, positions, tail = self._fed
        sample = pack.sample
        options: dict[str, Any] = {"mask": mask if mask is None or mask.ndim == 2 else mask[sample]}
        if positions is not None:
            options["positions"] = positions if positions.ndim == 1 else positions[sample]
        lengths = self.lengths[sample]
        start = int(lengths[0]) if bool((lengths == lengths[0]).all()) else lengths
        logits, hidden = net(inputs[sample], condition, cache=pack.cache, start=start, **options)
        lane.filled[pack.rows] = lengths + inputs.shape[1]
        self._book(sample, inputs.shape[1])
        return centre(logits[:, logits.shape[1] - tail :]), hidden

    def _catch_up(self, net: Any, lane: _Lane, pack: _Pack, condition: Condition) -> None:
        """Feed the positions that rows have missed: one pass for each stretch that some rows share."""
        assert self._history is not None
        rows, sample = pack.rows, pack.sample
        while bool((behind := lane.filled[rows] < self.lengths[sample]).any()):
            first = int(behind.nonzero()[0])
            begin, end = int(lane.filled[rows[first]]), int(self.lengths[sample[first]])
            pick = behind & (lane.filled[rows] == begin) & (self.lengths[sample] == end)
            inputs = self._history[sample[pick], begin:end]
            net(inputs, _rows(condition, pick), cache=lane.cache.rows(_span(rows[pick])), start=begin)
            lane.filled[rows[pick]] = end
            self._book(sample[pick], end - begin)

    def _book(self, sample: Tensor, positions: int) -> None:
        self.ledger.calls += 1
        self.ledger.count(1, positions * torch.bincount(sample, minlength=self.batch))

    def _packed_condition(self, info: StepInfo, branches: tuple[Branch, ...]) -> Condition:
        """The conditions, joined; what the network makes of them beforehand, if it can, unless they change from step to step."""
        if any(b.transform is not None or b.mask is not None for b in branches):
            found = zip(self._conditions(info, branches), branches, strict=True)
            return _join([c if b.mask is None else _rows(c, b.mask) for c, b in found])
        if branches not in self._packed:
            joined = _join(self._conditions(info, branches))
            prepare = getattr(self.model(branches[0].model), "prepare", None)
            self._packed[branches] = joined if prepare is None else prepare(joined)
        return self._packed[branches]

    def _check_average(self, prediction: Tensor) -> None:
        for value in _tensors(self.state):
            if value.ndim == 3 and value.shape != prediction.shape:
                raise ValueError(
                    f"guidance={self.guidance!r} keeps an average over steps, but they differ in shape "
                    f"({tuple(value.shape)}, now {tuple(prediction.shape)}); turn its momentum off"
                )


def centre(logits: Tensor) -> Tensor:
    """Logits less their mean over the vocabulary, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - logits.mean(-1, keepdim=True)


def _span(rows: Tensor) -> slice | Tensor:
    """The rows as a slice where they are one: a cache then gives views."""
    first = int(rows[0]) if len(rows) else 0
    return slice(first, first + len(rows)) if torch.equal(rows, torch.arange(first, first + len(rows))) else rows


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, tuple | list):
        return [value for part in state for value in _tensors(part)]
    return [state] if isinstance(state, Tensor) else []
