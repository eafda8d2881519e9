"""Run folders of ``genkit-eval``, read as files: what a page may show of them, and nothing outside one folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SCHEMA = "genkit-eval/1"
RESULTS, CONFIG = "results.json", "run.json"
#: Larger files are refused.
MAX_BYTES, MAX_PIXELS = 64 * 2**20, 40_000_000
#: Folders that are looked at, and how deep.
MAX_FOLDERS, MAX_DEPTH = 2000, 3
#: Metrics that stand first in a table; the others follow as they come.
ORDER = ("frechet", "kid", "precision", "recall", "density", "coverage", "saturation", "contrast", "clipped")


class Unreadable(ValueError):
    """A run that cannot be shown; the message is for people."""


@dataclass(frozen=True)
class Metric:
    """A number with its protocol. ``better`` is ``"lower"``, ``"higher"`` or ``"neither"``."""

    title: str
    variant: str
    better: str
    value: float
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Entry:
    """The numbers of one guidance (or of one set of images), and where its grid of images lies."""

    label: str
    n: int
    metrics: dict[str, Metric]
    nfe: float | None = None
    seconds: float | None = None
    grid: Path | None = None

    def value(self, name: str) -> float | None:
        """A metric by its name, or a cost: ``"nfe"``, ``"seconds"``."""
        if name in ("nfe", "seconds"):
            found: float | None = getattr(self, name)
            return found
        return self.metrics[name].value if name in self.metrics else None


@dataclass(frozen=True)
class Run:
    """A run as far as it has come. ``status`` is ``"begun"`` (no numbers yet), ``"partial"`` or ``"complete"``."""

    name: str
    status: str
    about: str
    entries: tuple[Entry, ...] = ()
    warnings: tuple[str, ...] = ()
    blocks: int = 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, the usual ones first."""
        names = dict.fromkeys(name for entry in self.entries for name in entry.metrics)
        places = {name: place for place, name in enumerate(ORDER)}
        return tuple(sorted(names, key=lambda name: (places.get(name.partition("@")[0], len(places)), name)))

    def metric(self, name: str) -> Metric:
        """The first entry's metric of that name, for its title and protocol."""
        return next(entry.metrics[name] for entry in self.entries if name in entry.metrics)

    def better(self, name: str) -> str:
        """Which way a metric or cost is better."""
        return "lower" if name in ("nfe", "seconds") else self.metric(name).better

    def front(self, names: tuple[str, ...]) -> list[bool]:
        """Whether each entry is on the Pareto front: none is at least as good in all of ``names`` and better in one."""
        signs = [-1.0 if self.better(name) == "higher" else 1.0 for name in names]
        rows = [[entry.value(name) for name in names] for entry in self.entries]
        whole = [[s * v for s, v in zip(signs, row, strict=True) if v is not None] for row in rows]
        known = [row for row in whole if len(row) == len(names)]

        def beaten(row: list[float]) -> bool:
            return any(o != row and all(a <= b for a, b in zip(o, row, strict=True)) for o in known)

        return [len(row) == len(names) and not beaten(row) for row in whole]


class Folder:
    """The folder whose runs may be opened. Links are followed, and refused where they lead out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def names(self) -> list[str]:
        """Runs by their path below the folder: those that changed last come first."""
        found = []
        for path, name in self._runs():
            with contextlib.suppress(OSError, UnicodeEncodeError):  # gone by now, a link to nothing, a name no page can show
                found.append((path.stat().st_mtime, name.encode().decode()))
        return [name for _, name in sorted(found, reverse=True)]

    def _runs(self) -> Iterator[tuple[Path, str]]:
        for number, (place, folders, files) in enumerate(os.walk(self.root)):
            here = Path(place)
            depth = len(here.relative_to(self.root).parts)
            is_run = RESULTS in files or CONFIG in files
            if depth >= MAX_DEPTH or is_run or number >= MAX_FOLDERS:
                folders.clear()
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if is_run:
                yield here / (RESULTS if RESULTS in files else CONFIG), str(here.relative_to(self.root))
                continue
            for name in sorted(files):
                if name.endswith(".json") and _is_results(here / name):
                    yield here / name, str((here / name).relative_to(self.root))

    def path(self, name: Any) -> Path:
        """Where a run lies. Raises Unreadable for anything outside the folder."""
        if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > 1000:
            raise Unreadable("choose a run, or write its path below the folder of runs")
        try:
            path = (self.root / name.strip()).resolve()
            there = path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, no text that can be a name
            raise Unreadable(f"{name[:80]!r} cannot be opened ({error})") from None
        if not path.is_relative_to(self.root):
            raise Unreadable(f"{name[:80]!r} is outside the folder of runs; only runs inside it can be opened")
        if not there:
            raise Unreadable(f"there is no run {name[:80]!r} in the folder of runs")
        return path

    def stamp(self, name: str) -> tuple[Any, ...]:
        """Changes whenever there is something new to see of a run."""
        path = self.path(name)
        file = path if path.is_file() else path / RESULTS
        state = file.stat() if file.exists() else None
        return (state.st_mtime_ns if state else 0, state.st_size if state else 0, _blocks(path))

    def read(self, name: str) -> Run:
        """The run. Raises Unreadable: outside the folder, not there, damaged, of another kind or version."""
        path = self.path(name)
        file = path if path.is_file() else path / RESULTS
        if path.is_dir() and not file.exists():
            if not (path / CONFIG).exists():
                raise Unreadable(f"{name!r} holds neither {RESULTS} nor {CONFIG}: it is no run folder of genkit-eval")
            config = self._json(path / CONFIG)
            about = _about(config) if isinstance(config, dict) else ""
            return Run(name, "begun", about, blocks=_blocks(path))
        found = self._json(file)
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise Unreadable(f"{name!r} is no results file of this version ({SCHEMA})")
        try:
            entries = tuple(self._entry(entry, file.parent) for entry in found["guidances"])
            about = _about(found["generation"])
            return Run(name, str(found["status"]), about, entries, tuple(map(str, found["warnings"])), _blocks(path))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unreadable(f"{name!r} lacks a part, or has one of another kind ({type(error).__name__}: {error})") from None

    def _json(self, path: Path) -> Any:
        self._inside(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise Unreadable(f"{path.name} has more than {MAX_BYTES // 2**20} MiB; it is not opened here")
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, Unreadable):
                raise
            raise Unreadable(f"{path.name} is damaged, or not written to its end ({error})") from None

    def _inside(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self.root):
            raise Unreadable(f"{path.name} is a link out of the folder of runs; it is not opened")

    def _entry(self, found: dict[str, Any], folder: Path) -> Entry:
        cost = found.get("cost") or {}
        metrics = {str(name): _metric(metric) for name, metric in found["metrics"].items()}
        grid = None
        if found.get("grid"):
            path = (folder / str(found["grid"])).resolve()
            grid = path if path.is_relative_to(self.root) and path.is_file() else None
        nfe, seconds = cost.get("nfe_mean"), cost.get("seconds_wall")
        return Entry(str(found["label"]), int(found["n"]), metrics, _number(nfe), _number(seconds), grid)


def picture(path: Path) -> Image.Image:
    """A grid of images. Raises Unreadable."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{path.name} has {image.width} x {image.height} pixels; that is too large to be shown")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{path.name} is damaged, or not written to its end") from None


def _metric(found: dict[str, Any]) -> Metric:
    limits = found.get("interval")
    value = _number(found["value"])
    if value is None:
        raise ValueError(f"value {found['value']!r}")
    interval = None if limits is None else (float(limits[0]), float(limits[1]))
    return Metric(str(found["title"]), str(found["variant"]), str(found["better"]), value, interval, int(found["n_fake"]))


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the number {value!r}")
    return number


def _about(generation: dict[str, Any]) -> str:
    parts = [str(generation.get("model") or ""), str(generation.get("sampler") or "")]
    steps = generation.get("steps")
    return ", ".join([*filter(None, parts), *([f"{steps} steps"] if steps else [])])


def _blocks(path: Path) -> int:
    return sum(1 for _ in path.glob("*/blocks/*.safetensors")) if path.is_dir() else 0


def _is_results(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return f'"schema": "{SCHEMA}"'.encode() in file.read(200)
    except OSError:
        return False


__all__ = ["Entry", "Folder", "Metric", "Run", "Unreadable", "picture"]
