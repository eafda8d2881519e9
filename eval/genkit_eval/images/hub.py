"""Datasets of the Hugging Face hub, where the ``datasets`` package is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from genkit_eval.errors import InputError
from genkit_eval.images.source import Source

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "cls")


class Hub(Source):
    """Rows of a dataset in their own order: ``hf:NAME?split=validation&revision=...&config=...&image=COLUMN&label=COLUMN``."""

    def __init__(self, name: str, options: dict[str, str], option: str = "IMAGES") -> None:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise InputError(option, "hf: needs the datasets package: pip install datasets") from None
        self.uri = f"hf:{name}"
        wanted = {key: options[key] for key in ("revision",) if key in options}
        try:
            rows: Any = datasets.load_dataset(name, options.get("config"), split=options.get("split", "train"), **wanted)
        except Exception as error:  # whatever the package raises for a name, a split or a network that is not there
            raise InputError(option, f"{self.uri} cannot be loaded ({error})") from None
        features: dict[str, Any] = rows.features
        self.column = self._column(features, options.get("image"), IMAGE_COLUMNS, option)
        self.rows = rows.cast_column(self.column, datasets.Image(decode=False))
        self.names = [f"{k:08d}" for k in range(len(rows))]
        label = options.get("label") or next((c for c in LABEL_COLUMNS if c in features), None)
        if label is not None:
            column = self._column(features, label, (), option)
            self.labels = [int(value) for value in rows[column]]
            self.class_names = tuple(getattr(features[column], "names", None) or ())
        self.stamp = str(rows._fingerprint)

    def _column(self, features: dict[str, Any], asked: str | None, usual: tuple[str, ...], option: str) -> str:
        found = next((c for c in ((asked,) if asked else usual) if c in features), None)
        if found is None:
            raise InputError(option, f"{self.uri} has the columns {', '.join(features)}; name one with ?image=COLUMN")
        return found

    def read(self, index: int) -> bytes:
        """The encoded image."""
        cell: dict[str, Any] = self.rows[index][self.column]
        return cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()

    def digest(self, index: int) -> str:
        """The package's fingerprint of the dataset, and the row."""
        return f"{self.stamp}:{index}"
