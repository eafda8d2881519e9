"""Write docs/results.md, its plot and the README's table from the run files in docs/runs/ and the notes in docs/findings.md.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from genkit_eval.report.plots import against
from genkit_eval.table import format_number
from results_autoregressive import guidance_of_logits, plots, speculation, tuned
from tables import cell, made_with

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLUMNS = ("frechet", "kid", "precision", "recall", "density", "coverage", "saturation", "contrast")


def table(run: dict[str, Any]) -> list[str]:
    metrics = run["guidances"][0]["metrics"]
    titles = [metrics[name]["title"] for name in COLUMNS]
    lines = [f"| guidance | NFE | {' | '.join(titles)} | CPU s / image |", "|---|" + "---:|" * (len(COLUMNS) + 2)]
    for entry in run["guidances"]:
        cost = entry["cost"]
        cells = [f"`{entry['label']}`", f"{cost['nfe_mean']:.1f}", *(cell(entry["metrics"][name]) for name in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} | {cost['seconds_cpu']:.3f} |")
    return lines


def every_method(run: dict[str, Any]) -> list[str]:
    """The long table: every method at a few strengths."""
    g, first = run["generation"], run["guidances"][0]
    names = ("frechet", "precision", "recall", "density", "coverage", "saturation")
    titles = [first["metrics"][name]["title"] for name in names]
    about = (
        f"{first['n']:,} images per guidance on shared seeds and labels, {g['steps']} steps of `{g['sampler']}` unless another "
        "sampler is named; with 95 % bootstrap intervals. Formulas and sources: [guidance.md](guidance.md)."
    )
    lines = [f"| guidance | NFE | {' | '.join(titles)} | CPU s / image |", "|---|" + "---:|" * (len(names) + 2)]
    for entry in run["guidances"]:
        cost, metrics = entry["cost"], entry["metrics"]
        sampler = f" ({entry['sampler']})" if "sampler" in entry else ""
        cells = [cell(metrics[name]) for name in names]
        lines.append(
            f"| `{entry['label']}`{sampler} | {cost['nfe_mean']:.1f} | {' | '.join(cells)} | {cost['seconds_cpu']:.3f} |"
        )
    return ["## Every method", "", made_with(run), "", about, "", *lines, ""]


def equal_nfe(run: dict[str, Any]) -> list[str]:
    """Ways to spend the same number of evaluations, group by group."""
    g, first = run["generation"], run["guidances"][0]
    about = (
        f"Scale {run['scale']:g}, `{g['sampler']}`, {first['n']:,} images each on shared seeds and labels. LinearAG is fitted on "
        "64 other images; without coefficients it uses the last difference of the branches again. The thresholds of Adaptive "
        "were set so that its mean number of evaluations meets the budget."
    )
    names = ("frechet", "precision", "recall")
    titles = [first["metrics"][name]["title"] for name in names]
    lines = [f"| budget | NFE | steps | guidance | {' | '.join(titles)} |", "|---:|---:|---:|---|" + "---:|" * len(names)]
    for e in run["guidances"]:
        label = e["label"] if e["until"] is None else f"LinearAG({run['scale']}, until={e['until']}), fitted"
        figures = " | ".join(cell(e["metrics"][name]) for name in names)
        lines.append(f"| {e['budget']} | {e['cost']['nfe_mean']:.1f} | {e['steps']} | `{label}` | {figures} |")
    return ["## At equal evaluations", "", made_with(run), "", about, "", *lines, ""]


def minority(run: dict[str, Any]) -> list[str]:
    r = run["recipe"]
    about = (
        f"{run['images']:,} images on shared seeds and labels, {run['steps']} steps of `{run['sampler']}`. The minority score of "
        "an image is its distance, in the features of the built-in classifier, to what the diffusion model restores from it at "
        f"sigma {r['sigma']:g}, mean of {r['draws']} noises. Change: from no guidance on the same seed, mean with its 95 % "
        "bootstrap interval. The last columns are shares of images in the rarest and the commonest tenth of the training images; "
        "the grey lines of the plot are these tenths."
    )
    head = "| guidance | NFE | mean score | change | rarest tenth | commonest tenth |"
    lines = [head, "|---|---:|---:|---:|---:|---:|"]
    for e in run["rows"]:
        low, high = e["interval"]
        change = f"{e['change']:+.3f} <sub>{low:+.3f} - {high:+.3f}</sub>" if e["change"] else ""
        shares = f"{e['rarest_tenth']:.1%} | {e['commonest_tenth']:.1%}"
        lines.append(f"| `{e['guidance']}` | {e['nfe']:.1f} | {e['mean']:.3f} | {change} | {shares} |")
    picture = ["![Distribution of minority scores](images/minority.png)", ""]
    return ["## Minority guidance", "", made_with(run), "", about, "", *lines, "", *picture]


def verdict(row: dict[str, Any]) -> str:
    """What the paired interval says about one expected direction."""
    if row["metric"] == "nfe":
        wanted = -0.40 <= row["value"] <= -0.15 if row["expected"] == "a quarter lower" else row["value"] < 0
        return "as claimed" if wanted else "not so"
    low, high = row["interval"]
    if row["expected"] == "equal":
        within = max(abs(low), abs(high)) <= 0.05 * abs(row["base"])
        return "as claimed (within 5 %)" if within else "changed" if low > 0 or high < 0 else "undecided"
    if row["expected"] == "lower":
        low, high = -high, -low
    return "as claimed" if low > 0 else "opposite" if high < 0 else "undecided"


def claims(run: dict[str, Any]) -> list[str]:
    lines = ["| claim | source | compared | change, with 95 % paired interval | verdict |", "|---|---|---|---|---|"]
    titles = {name: metric["title"] for name, metric in run["guidances"][0]["metrics"].items()}
    for claim in run["claims"]:
        for row in claim["rows"]:
            if row["metric"] == "nfe":
                change = f"NFE {row['value']:+.0%}"
            else:
                low, high = row["interval"]
                change = f"{titles[row['metric']]} {row['value']:+.4g} ({low:+.4g} to {high:+.4g})"
            compared = f"`{claim['method']}` with `{claim['baseline']}`"
            lines.append(f"| {claim['claim']} | {claim['source']} | {compared} | {change} | {verdict(row)} |")
    return lines


def quality(run: dict[str, Any]) -> list[str]:
    g, first = run["generation"], run["guidances"][0]
    about = (
        f"Model `{g['model']}` (SHA-256 {g['model_sha256'][:12]}), {first['n']:,} images per guidance on shared seeds and "
        f"labels, sampler `{g['sampler']}`, {g['steps']} steps. FD-{run['extractor']['label']} is the Frechet distance in the "
        f"features of the built-in classifier ({run['extractor']['sha256'][:12]}) against all "
        f"{run['reference']['num_images']:,} training images of CIFAR-10 (JPEG copy); it is no FID. Small figures are 95 % "
        "bootstrap intervals."
    )
    ways = sorted({metric["variant"] for metric in first["metrics"].values()})
    head = ["## Quality and cost", "", made_with(run), "", about, ""]
    return [*head, *table(run), "", f"Protocols: {', '.join(ways)}.", "", "![FD against NFE](images/fd_nfe.png)", ""]


def overhead(run: dict[str, Any]) -> list[str]:
    lines = ["## Overhead beside the network", "", made_with(run), ""]
    way = f"batch {run['batch']}, one thread, minimum of {run['repeats']} interleaved runs"
    text = f"CPU microseconds a step with a no-op network, {way}."
    rows = [f"| {name} | {value:.0f} |" for name, value in run["us_per_step"].items()]
    return [*lines, text, "", "| loop | us / step |", "|---|---:|", *rows, ""]


def attach_overhead(run: dict[str, Any]) -> list[str]:
    lines = ["## Overhead of `genkit.attach`", "", made_with(run), ""]
    text = (
        "CPU microseconds from one call of the network to the next in a diffusers pipeline, with a no-op network, batch "
        f"{run['batch']}, one thread, of each step the minimum of {run['repeats']} interleaved runs; and what is added to the "
        "pipeline with its own CFG, which gives the network the same rows as CFG attached. Load average of the machine "
        f"meanwhile: {run['load_average']:g}."
    )
    rows = []
    for name, value in run["us_per_call"].items():
        scheduler, guidance = name.split(", ", 1)
        added = run["added_us_per_call"].get(name)
        rows.append(f"| {scheduler} | {guidance} | {value:.0f} | {'' if added is None else f'{added:+.0f}'} |")
    return [*lines, text, "", "| scheduler | guidance | us / call | added |", "|---|---|---:|---:|", *rows, ""]


def savings(run: dict[str, Any]) -> list[str]:
    lines = ["## Time follows the rows evaluated", "", made_with(run), ""]
    way = f"batch {run['batch']}, {run['steps']} steps, one thread, {run['repeats']} interleaved rounds (median of the shares)"
    text = f"CPU time with the built-in model, {way}."
    head = ["| guidance | rows / image | ms / image | share of CFG's rows | share of CFG's time |", "|---|---:|---:|---:|---:|"]
    rows = []
    for name, r in run["guidances"].items():
        figures = f"{r['rows_per_image']:.1f} | {r['ms_per_image']:.1f} | {r['share']['rows']:.3f} | {r['share']['time']:.3f}"
        rows.append(f"| `{name}` | {figures} |")
    return [*lines, text, "", *head, *rows, ""]


def branches(run: dict[str, Any]) -> list[str]:
    lines = ["## Agreement of the branches", "", made_with(run), ""]
    way = f"along `{run['guidance']}`, {run['images']} images: median, and 10 % to 90 %"
    text = f"Cosine of the conditional and the unconditional branch {way}."
    head = ["| sigma | cos(eps_c, eps_u) | cos(D_c, D_u) |", "|---:|---:|---:|"]
    rows = []
    for row in run["rows"]:
        cells = [f"{m:.5f} <sub>{low:.5f} - {high:.5f}</sub>" for low, m, high in (row["eps"], row["x0"])]
        rows.append(f"| {row['sigma']:.4g} | {' | '.join(cells)} |")
    return [*lines, text, "", *head, *rows, ""]


def short(run: dict[str, Any]) -> str:
    """The README's table: one line per guidance, few columns."""
    names = ("frechet", "precision", "recall", "saturation")
    titles = [run["guidances"][0]["metrics"][name]["title"] for name in names]
    lines = [f"| guidance | NFE | {' | '.join(titles)} |", "|---|" + "---:|" * (len(names) + 1)]
    for entry in run["guidances"]:
        figures = " | ".join(format_number(entry["metrics"][name]["value"]) for name in names)
        lines.append(f"| `{entry['label']}` | {entry['cost']['nfe_mean']:.1f} | {figures} |")
    way = f"{run['generation']['sampler']}, {run['generation']['steps']} steps"
    about = f"{run['guidances'][0]['n']:,} images each on the same seeds, {way}"
    return "\n".join(
        [*lines, "", f"{about}; {made_with(run)}. With intervals and the papers' claims: [docs/results.md](docs/results.md)."]
    )


def update_readme(run: dict[str, Any]) -> None:
    readme = DOCS.parent / "README.md"
    begin, end = "<!-- results: begin -->", "<!-- results: end -->"
    text = readme.read_text()
    block = re.search(f"{begin}.*?{end}", text, re.DOTALL)
    if block is None:
        raise SystemExit(f"README.md has no {begin} ... {end}")
    readme.write_text(text.replace(block.group(0), f"{begin}\n{short(run)}\n{end}"))


def main() -> None:
    runs = {path.stem: json.loads(path.read_text()) for path in sorted((DOCS / "runs").glob("*.json"))}
    lines = [
        "# Results",
        "",
        "This page is written by `python benchmarks/results_page.py` from the run files in `docs/runs/`.",
        "",
    ]
    if "claims" in runs:
        run = runs["claims"]
        (DOCS / "images" / "fd_nfe.png").write_bytes(against(run["guidances"], "nfe", "frechet"))
        update_readme(run)
        lines += [*quality(run), "## The papers' claims", "", *claims(run), ""]
        lines += [(DOCS / "findings.md").read_text().strip(), ""]
    lines += every_method(runs["methods"]) if "methods" in runs else []
    lines += equal_nfe(runs["equal_nfe"]) if "equal_nfe" in runs else []
    lines += minority(runs["minority"]) if "minority" in runs else []
    lines += branches(runs["branch_cosine"]) if "branch_cosine" in runs else []
    lines += overhead(runs["overhead"]) if "overhead" in runs else []
    lines += attach_overhead(runs["attach_overhead"]) if "attach_overhead" in runs else []
    lines += savings(runs["savings"]) if "savings" in runs else []
    if "autoregressive" in runs:
        for name, png in plots(runs["autoregressive"]).items():
            (DOCS / "images" / name).write_bytes(png)
        lines += [*guidance_of_logits(runs["autoregressive"]), *tuned(runs["autoregressive"])]
    lines += speculation(runs["speculative"]) if "speculative" in runs else []
    (DOCS / "results.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
