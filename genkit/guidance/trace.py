"""What a run did, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

COLUMNS = ("batch", "step", "stage", "sigma", "weight", "branches", "rows", "agreement", "cosine", "update_norm")


class Trace:
    """A table with one row per guided evaluation.

    Columns: ``batch`` (which chunk of a long run), ``step``, ``stage``, ``sigma`` (level at which the step begins), ``weight``
    (guidance scale in force; 1 where nothing guides), ``branches`` ("cond+uncond"), ``rows`` (network rows
    over the batch), ``agreement`` (the cosine by which an Adaptive decides, mean over the samples still guided); with the level
    "full" also ``cosine`` (of the branches' eps) and ``update_norm`` (|D - D_c|), batch means.
    """

    def __init__(self, rows: list[Row] | None = None) -> None:
        self._rows: list[Row] = rows if rows is not None else []
        self._later: list[Trace | tuple[Callable[..., Row], tuple[Any, ...]]] = []

    @property
    def rows(self) -> list[Row]:
        later, self._later = self._later, []
        for item in later:
            if isinstance(item, Trace):
                batch = self._rows[-1]["batch"] + 1 if self._rows else 0
                self._rows.extend({**row, "batch": batch} for row in item.rows)
            else:
                make, arguments = item
                self._rows.append(make(*arguments))
        return self._rows

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def later(self, make: Callable[..., Row], *arguments: Any) -> None:
        """Append ``make(*arguments)``, which is called when the table is first read: a run does not wait for its trace."""
        self._later.append((make, arguments))

    def extend(self, other: Trace) -> None:
        """Append the rows of a later chunk, which has ended, numbered as the next ``batch``."""
        self._later.append(other)

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": self.rows, "_later": []}

    def column(self, name: str) -> list[Any]:
        """Values of one column, None where a row lacks it. Raises KeyError naming the columns for an unknown one."""
        if name not in COLUMNS:
            raise KeyError(f"trace has no column {name!r}; it has {', '.join(COLUMNS)}")
        return [row.get(name) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """The table as aligned text."""
        shown = [c for c in COLUMNS if any(row.get(c) is not None for row in self.rows)]
        cells = [shown] + [[_cell(row.get(c)) for c in shown] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
        return "\n".join("  ".join(v.rjust(w) for v, w in zip(line, widths, strict=True)) for line in cells)

    def plot(self, ax: Axes | None = None, batch: int = 0) -> Axes:
        """Draw guidance scale and rows per step against sigma (log axis, noise to image from left to right).

        With a "full" trace the branches' cosine is drawn too. Needs matplotlib. Returns the matplotlib axes.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.figure(figsize=(7, 3.2), layout="constrained").add_subplot()
        rows = [r for r in self.rows if r["batch"] == batch and r["stage"] == "step"]
        sigma = [r["sigma"] for r in rows]
        ax.step(sigma, [r["weight"] for r in rows], where="mid", marker="o", markersize=3, label="guidance scale")
        ax.set(xscale="log", xlabel="sigma (noise level at the start of the step)", ylabel="guidance scale w")
        ax.invert_xaxis()
        if any(r.get("cosine") is not None for r in rows):
            other = ax.twinx()
            pairs = [(r["sigma"], r["cosine"]) for r in rows if r.get("cosine") is not None]
            other.plot(*zip(*pairs, strict=True), color="tab:green", marker=".", label="cos(eps_c, eps_u)")
            other.set_ylabel("cosine of the branches", color="tab:green")
        ax.set_title(f"{sum(r['rows'] for r in self.rows if r['batch'] == batch)} network rows in the batch", fontsize=10)
        return ax


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
