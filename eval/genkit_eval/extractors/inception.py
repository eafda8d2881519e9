"""InceptionV3 of 2015-12-05, the network of FID, in the key layout that torch-fidelity and pytorch-fid publish.

It is not torchvision's: average pools leave the padding out, the last block pools by maximum, there are 1008 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.weights import read_weights
from genkit_eval.errors import InputError
from genkit_eval.extractors.base import MAIN, Extractor, Options
from genkit_eval.extractors.resize import Preprocess
from genkit_eval.extractors.weights import WeightsFile, locate, named

NAME = "inception-2015"
SIZE = 299
LAYERS = {MAIN: 2048, "spatial": 2023, "logits": 1008}
EPS = 1e-3  # of every batch norm
WEIGHTS = WeightsFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
)
#: Resize rules it is used with, and the name of each protocol; the first is the default.
VARIANTS = {
    "tf1": "adm-tf1",
    "clean": "clean",
    "torch-bilinear": "pytorch-fid",
    "torchmetrics": "torchmetrics",
    "none": "no-resize",
}

#: A branch: names of convolutions, functions, and forks, one after the other.
Branch = list["str | Callable[[Tensor], Tensor] | list[Branch]"]


class Conv(nn.Conv2d):
    """Convolution with the batch norm folded in, then ReLU. Without padding where the stride is 2, else of the same size."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if pad and stride == 1 else (0, 0)
        super().__init__(channels, out, (height, width), stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class Mixed(nn.Module):
    """Branches over one input, joined along the channels. ``convs`` are arguments of :class:`Conv` by name."""

    def __init__(self, branches: list[Branch], **convs: tuple[int, ...] | tuple[int, int, tuple[int, int]]) -> None:
        super().__init__()
        self.branches = branches
        for name, arguments in convs.items():
            self.add_module(name, Conv(*arguments))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(x, branch) for branch in self.branches], dim=1)

    def _run(self, x: Tensor, branch: Branch) -> Tensor:
        for step in branch:
            if isinstance(step, list):
                x = torch.cat([self._run(x, fork) for fork in step], dim=1)
            else:
                x = getattr(self, step)(x) if isinstance(step, str) else step(x)
        return x


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _block_a(c: int, pool: int) -> Mixed:
    """35x35."""
    return Mixed(
        [
            ["branch1x1"],
            ["branch5x5_1", "branch5x5_2"],
            ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
            [_average, "branch_pool"],
        ],
        branch1x1=(c, 64, 1),
        branch5x5_1=(c, 48, 1),
        branch5x5_2=(48, 64, 5),
        branch3x3dbl_1=(c, 64, 1),
        branch3x3dbl_2=(64, 96, 3),
        branch3x3dbl_3=(96, 96, 3),
        branch_pool=(c, pool, 1),
    )


def _block_b(c: int) -> Mixed:
    """35x35 to 17x17."""
    return Mixed(
        [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], [_halve]],
        branch3x3=(c, 384, 3, 2),
        branch3x3dbl_1=(c, 64, 1),
        branch3x3dbl_2=(64, 96, 3),
        branch3x3dbl_3=(96, 96, 3, 2),
    )


def _block_c(c: int, narrow: int) -> Mixed:
    """17x17."""
    return Mixed(
        [
            ["branch1x1"],
            ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
            ["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"],
            [_average, "branch_pool"],
        ],
        branch1x1=(c, 192, 1),
        branch7x7_1=(c, narrow, 1),
        branch7x7_2=(narrow, narrow, (1, 7)),
        branch7x7_3=(narrow, 192, (7, 1)),
        branch7x7dbl_1=(c, narrow, 1),
        branch7x7dbl_2=(narrow, narrow, (7, 1)),
        branch7x7dbl_3=(narrow, narrow, (1, 7)),
        branch7x7dbl_4=(narrow, narrow, (7, 1)),
        branch7x7dbl_5=(narrow, 192, (1, 7)),
        branch_pool=(c, 192, 1),
    )


def _block_d(c: int) -> Mixed:
    """17x17 to 8x8."""
    return Mixed(
        [["branch3x3_1", "branch3x3_2"], ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"], [_halve]],
        branch3x3_1=(c, 192, 1),
        branch3x3_2=(192, 320, 3, 2),
        branch7x7x3_1=(c, 192, 1),
        branch7x7x3_2=(192, 192, (1, 7)),
        branch7x7x3_3=(192, 192, (7, 1)),
        branch7x7x3_4=(192, 192, 3, 2),
    )


def _block_e(c: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    """8x8."""
    return Mixed(
        [
            ["branch1x1"],
            ["branch3x3_1", [["branch3x3_2a"], ["branch3x3_2b"]]],
            ["branch3x3dbl_1", "branch3x3dbl_2", [["branch3x3dbl_3a"], ["branch3x3dbl_3b"]]],
            [pool, "branch_pool"],
        ],
        branch1x1=(c, 320, 1),
        branch3x3_1=(c, 384, 1),
        branch3x3_2a=(384, 384, (1, 3)),
        branch3x3_2b=(384, 384, (3, 1)),
        branch3x3dbl_1=(c, 448, 1),
        branch3x3dbl_2=(448, 384, 3),
        branch3x3dbl_3a=(384, 384, (1, 3)),
        branch3x3dbl_3b=(384, 384, (3, 1)),
        branch_pool=(c, 192, 1),
    )


class InceptionV3(nn.Module):
    """From normalised images (B, 3, 299, 299) to the layers that FID, sFID and the Inception Score read."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average)
        self.Mixed_7c = _block_e(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``features`` (B, 2048), ``spatial`` (B, 2023), ``logits`` (B, 1008) without the bias."""
        x = self.Conv2d_1a_3x3(x.contiguous(memory_format=torch.channels_last))
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x)))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        # The first channels are those of branch1x1; ADM flattens them height, width, channel.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        features = x.mean(dim=(2, 3))
        return {MAIN: features, "spatial": spatial, "logits": F.linear(features, self.fc.weight)}


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights with each batch norm folded into its convolution (in float64).

    ``w' = w g / sqrt(v + eps)`` and ``b' = b - m g / sqrt(v + eps)``, for scale g, shift b, mean m and variance v.
    """
    found = {key: value for key, value in state.items() if key.startswith("fc.")}
    for key in state:
        name, conv, _ = key.partition(".conv.weight")
        if conv:
            scale, shift, mean, variance = (
                state[f"{name}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
            )
            factor = scale / (variance + EPS).sqrt()
            found[f"{name}.weight"] = (state[key].double() * factor.view(-1, 1, 1, 1)).float()
            found[f"{name}.bias"] = (shift - mean * factor).float()
    return found


def load_state(state: Mapping[str, Tensor]) -> InceptionV3:
    """The network with the weights of a published file. ValueError for the file of another network."""
    with torch.device("meta"):
        net = InceptionV3()
    try:
        net.load_state_dict(fold(state), strict=True, assign=True)
    except (RuntimeError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"not the Inception of 2015 in the layout of torch-fidelity or pytorch-fid: {first}") from None
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def load_inception(options: Options) -> Extractor:
    """The extractor ``inception-2015``. Other weights than the published ones never carry the name FID."""
    rule = options.rule(NAME, VARIANTS)
    path, sha256 = locate(WEIGHTS, options.weights, options.any_weights)
    try:
        net = load_state(read_weights(path)).to(options.device)
    except ValueError as error:
        raise InputError("--weights", f"{path}: {error}") from None
    centre, half = (127.5, 127.5) if rule == "torch-bilinear" else (128.0, 128.0)
    prepare = Preprocess(rule, SIZE, (centre,) * 3, (half,) * 3)
    mark = named(sha256, WEIGHTS)
    said = "" if VARIANTS[rule] == "adm-tf1" else f"-{VARIANTS[rule]}"
    return Extractor(
        f"{NAME}{mark}",
        f"other-Inception{said}{mark}" if mark else f"Inception{said}",
        sha256,
        rule,
        lambda pixels: net(prepare(pixels)),
        layers=LAYERS,
        variant=f"{VARIANTS[rule]}{mark}",
        fid="" if mark else f"FID{said}",
        device=options.device,
        batch=32,
        part="inception",
    )
