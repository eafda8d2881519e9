"""Published protocols by name: which network, resize rule, metrics, labels, 8-bit rule and number of images they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genkit_eval.errors import InputError


@dataclass(frozen=True)
class Preset:
    """A published protocol.

    ``about`` says whose it is, ``metrics`` what is computed, ``reference`` which file its authors compare with. The others are
    options of that name; None leaves one as it is, where the protocol does not say.
    """

    name: str
    about: str
    metrics: tuple[str, ...]
    reference: str
    extractor: str = "inception-2015"
    resize: tuple[str, ...] = ("tf1",)
    num_samples: int = 50_000
    labels: str | None = "random"
    uint8: str | None = None

    def options(self) -> dict[str, Any]:
        """Values by the name of the option; what is given explicitly wins over them."""
        known = {
            "extractor": self.extractor,
            "resize": list(self.resize),
            "num_samples": self.num_samples,
            "labels": self.labels,
            "uint8": self.uint8,
        }
        return {name: value for name, value in known.items() if value is not None}

    def as_dict(self, used: dict[str, Any]) -> dict[str, Any]:
        """For the results: the preset and, of the options ``used``, those that are not its own."""
        changed = {
            name: {"preset": value, "used": used[name]}
            for name, value in self.options().items()
            if name in used and used[name] != value
        }
        return {"name": self.name, "about": self.about, "reference": self.reference, "changed": changed}


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "adm-imagenet-256",
            "FID, sFID, IS, precision and recall of ADM's evaluator (Dhariwal and Nichol 2021); exact ones beside its float16",
            ("frechet", "sfid", "inception_score_adm", "precision_adm", "recall_adm", "precision", "recall"),
            "VIRTUAL_imagenet256_labeled.npz of guided-diffusion",
            uint8="adm-floor",
        ),
        Preset(
            "edm2",
            "FID and FD-DINOv2 of EDM2's calculate_metrics.py (Karras et al. 2024), 8 bits as its latent models make them",
            ("frechet", "frechet@dinov2"),
            "a pkl of EDM2's dataset-refs, with the entries fid and fd_dinov2",
            extractor="inception-2015+dinov2-vit-l-14",
            resize=("inception=tf1", "dinov2=torch-bicubic-antialias"),
            uint8="adm-floor",
        ),
        Preset(
            "clean-fid",
            "FID and KID of clean-fid's mode 'clean' (Parmar et al. 2022)",
            ("frechet", "kid_subsets"),
            "an npz of clean-fid's statistics, or one built from images with --resize clean",
            resize=("clean",),
            labels=None,
        ),
        Preset(
            "torch-fidelity",
            "IS, FID, KID, precision and recall of torch-fidelity over its Inception features",
            ("inception_score", "frechet", "kid_subsets", "precision", "recall"),
            "a statistics cache (.pt) of torch-fidelity, or one built from images",
        ),
        Preset(
            "cifar10",
            "FID and IS of CIFAR-10 as score-based models report them (Karras et al. 2022)",
            ("frechet", "inception_score"),
            "cifar10-32x32.npz of EDM, or one built from the training images",
            uint8="edm",
        ),
    )
}


def check_reference(name: str | None, given: object, own: object) -> None:
    """InputError that names the authors' file, where a preset has no reference: neither one given nor the extractor's own."""
    if name is not None and given is None and own is None:
        raise InputError("--reference", f"preset {name} compares with {find_preset(name).reference}; give it")


def find_preset(name: str) -> Preset:
    """The preset; InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError("--preset", f"got {name!r}; one of {', '.join(PRESETS)} works")
    return PRESETS[name]
