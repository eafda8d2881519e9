"""The sections of docs/results.md about autoregressive models."""

from __future__ import annotations

from typing import Any

from genkit_eval.report.plots import against
from genkit_eval.table import format_number
from tables import cell, made_with

NAMES = ("frechet", "precision", "recall", "saturation")
BASE, TUNED = "builtin/cifar10-next-token", "builtin/cifar10-next-token-cca"


def _titles(entries: list[dict[str, Any]], names: tuple[str, ...] = NAMES) -> str:
    return " | ".join(entries[0]["metrics"][name]["title"] for name in names)


def _figures(entry: dict[str, Any], names: tuple[str, ...] = NAMES) -> str:
    return " | ".join(cell(entry["metrics"][name]) for name in names)


def guidance_of_logits(run: dict[str, Any]) -> list[str]:
    """FD against evaluations, as for diffusion, one table for each model."""
    entries = run["guidances"]
    about = (
        "Images on shared seeds and labels, with 95 % bootstrap intervals; distances of different numbers of images are not "
        "comparable. One evaluation is one token of one branch: 64 tokens an image, or 103 over all scales. Steps of "
        "`Interval` count tokens, or scales. Filters: the pipeline's own."
    )
    lines = ["## Guidance of autoregressive models", "", made_with(run), "", about, ""]
    for model in dict.fromkeys(e["model"] for e in entries if e["model"] != TUNED):
        rows = [e for e in entries if e["model"] == model]
        lines += [f"`{model}`, {rows[0]['n']:,} images each:", "", f"| guidance | NFE | {_titles(rows)} | CPU s / image |"]
        lines.append("|---|---:|" + "---:|" * (len(NAMES) + 1))
        for e in rows:
            cost = e["cost"]
            lines.append(f"| `{e['label']}` | {cost['nfe_mean']:.1f} | {_figures(e)} | {cost['seconds_cpu']:.3f} |")
        lines += ["", f"![FD against NFE, {model}](images/{picture(model)})", ""]
    return lines


def picture(model: str) -> str:
    """Name of a model's plot."""
    return f"fd_nfe_{model.removeprefix('builtin/cifar10-').replace('-', '_')}.png"


def plots(run: dict[str, Any]) -> dict[str, bytes]:
    """The plot of each table of :func:`guidance_of_logits`, by name."""
    models = dict.fromkeys(e["model"] for e in run["guidances"] if e["model"] != TUNED)
    return {picture(m): against([e for e in run["guidances"] if e["model"] == m], "nfe", "frechet") for m in models}


def tuned(run: dict[str, Any]) -> list[str]:
    """The fine-tuned model without guidance, beside the original with it."""
    entries = [e for e in run["guidances"] if e["model"] in (BASE, TUNED)]
    plain = next(e for e in entries if e["model"] == BASE and e["label"] == "none")
    guided = [e for e in entries if e["model"] == BASE and e["label"].startswith("CFG(")]
    rows = [("original, no guidance", plain), *((f"original, `{e['label']}`", e) for e in guided)]
    rows.append(("fine-tuned, no guidance", next(e for e in entries if e["model"] == TUNED)))
    lines = ["## Condition contrastive alignment", "", made_with(run), ""]
    about = (
        "The next-token model fine-tuned by `python -m genkit.training.cca`, which is to do without guidance, at half the "
        "evaluations, what guidance does for the original."
    )
    lines += [about, "", f"| model | NFE | {_titles(entries)} |", "|---|---:|" + "---:|" * len(NAMES)]
    return [*lines, *(f"| {name} | {e['cost']['nfe_mean']:.0f} | {_figures(e)} |" for name, e in rows), ""]


def speculation(run: dict[str, Any]) -> list[str]:
    """Speed and quality over the rules of acceptance."""
    names = ("frechet", "precision", "recall")
    entries = run["guidances"]
    titles = _titles(entries, names)
    about = (
        f"Under `{entries[0]['label']}`; {entries[0]['n']:,} images on shared seeds and labels for the metrics. Speed: one image "
        f"at a time, {run['timed']} images, CPU seconds of one thread, all rules in turn on the same seeds. Length: tokens that "
        "one pass of the network settles. Drafts are four draws of the drafter in a row, where no tree is named. Times as fast: "
        "than token by token; than exact speculation."
    )
    lines = ["## Speculative decoding", "", made_with(run), "", about, ""]
    lines += [f"| rule | passes | length | s / image | times plain | times exact | {titles} |"]
    lines.append("|---|" + "---:|" * (5 + len(names)))
    exact = next(e["seconds"] for e in entries if e["rule"] == "True")
    for e in entries:
        name = {None: "token by token", "True": "exact"}.get(e["rule"], f"`{e['rule']}`")
        cells = [f"{e['passes']:.1f}", f"{e['length']:.2f}", format_number(e["seconds"]), f"{e['speedup']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {exact / e['seconds']:.2f} | {_figures(e, names)} |")
    return [*lines, ""]


def decoding(run: dict[str, Any]) -> list[str]:
    lines = ["## Autoregressive decoding beside the official code", "", made_with(run), ""]
    text = (
        "CPU seconds for the tokens of a batch, with CFG, in float32 and one thread, with the same random weights and numbers; "
        f"{run['rounds']} interleaved rounds, of each step the fastest. Matrix products: those of the blocks and the head alone, "
        "as the official code computes them. Reading: what it takes to read their weights once for each pass, which few rows "
        "cannot do without. Times as fast: the official seconds over the compiled ones, where they were measured."
    )
    head = ["| model | official | genkit | compiled | times as fast | matrix products | reading | equal tokens | cache, MB |"]
    rows = []
    for name, r in run["models"].items():
        seconds, equal = r["seconds"], f"{r['equal_tokens']} of {r['tokens']}"
        compiled = f"{seconds['compiled']:.2f}" if "compiled" in seconds else ""
        figures = (
            f"{seconds['official']:.2f} | {seconds['genkit']:.2f} | {compiled} | {r['ratio']:.2f} | {seconds['matmuls']:.2f}"
        )
        reading = f"{r['reading_weights']:.2f}" if "reading_weights" in r else ""
        rows.append(f"| {name} | {figures} | {reading} | {equal} | {r['cache_bytes'] / 1e6:.1f} |")
    return [*lines, text, "", *head, "|---|" + "---:|" * 8, *rows, ""]
