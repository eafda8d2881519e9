"""The table of results for other programs: CSV with every digit, LaTeX as a paper prints it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from genkit_eval.pareto import USUAL, front, known
from genkit_eval.runs import Run, check_one_protocol, labelled
from genkit_eval.table import columns_of, metric_order

COST = ("nfe_mean", "seconds_wall", "seconds_cpu")
PARTS = ("value", "low", "high", "variant")
LATEX = str.maketrans(
    {
        **{char: f"\\{char}" for char in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "∞": r"$\infty$",
    }
)


def to_csv(runs: Sequence[Run]) -> str:
    """One line per guidance: run, label, images, cost, reference, then value, interval and variant of every metric."""
    check_one_protocol(runs)
    pairs = [(run, entry) for run in runs for entry in run.entries]
    entries = [entry for _, entry in pairs]
    names = metric_order({name for entry in entries for name in entry["metrics"]})
    best = front(entries, known(entries, USUAL))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{part}" if part != "value" else name for name in names for part in PARTS]
    writer.writerow(["run", "label", "guidance", "n", "on_front", *COST, "reference_sha256", *columns])
    for (run, entry), on in zip(pairs, best, strict=True):
        row = [run.name, entry["label"], entry["guidance"], entry["n"], int(on)]
        row += [entry.get("cost", {}).get(key, "") for key in COST]
        row.append(entry["reference_sha256"])
        for name in names:
            metric = entry["metrics"].get(name)
            limits = ["", ""] if metric is None or metric["interval"] is None else metric["interval"]
            row += ["", "", "", ""] if metric is None else [metric["value"], *limits, metric["variant"]]
        writer.writerow(row)
    return text.getvalue()


def to_latex(runs: Sequence[Run]) -> str:
    """A ``tabular`` with booktabs' rules: the best of each column bold, the protocols as comments above."""
    check_one_protocol(runs)
    entries = [entry for _, entry in labelled(runs)]
    columns = columns_of(entries)
    heads = [f"{column.title} {column.arrow}".strip().translate(LATEX) for column in columns]
    lines = [f"% {column.title}: {column.hint}" for column in columns]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", rf"guidance & {' & '.join(heads)} \\", r"\midrule"]
    for row, entry in enumerate(entries):
        cells = [rf"\textbf{{{c.cells[row].text}}}" if c.cells[row].best else c.cells[row].text for c in columns]
        lines.append(rf"{entry['label'].translate(LATEX)} & {' & '.join(cells)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
