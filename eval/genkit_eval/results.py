"""The results file: entries of guidances, and the rule that no number is written without its protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genkit_eval.files import read_json, write_json
from genkit_eval.score import difference

SCHEMA = "genkit-eval/1"
RESULTS, SCORES, CONFIG = "results.json", "scores.json", "run.json"
SMALL_N = 50_000

REQUIRED = {
    "extractor": ("name", "sha256", "resize"),
    "reference": ("sha256", "num_images"),
    "generation": ("model", "model_sha256", "sampler", "steps", "seed_rule", "label_rule", "uint8_rule"),
}


def check_protocol(results: dict[str, Any]) -> None:
    """ValueError when something is missing without which a number means nothing."""
    missing = [f"{part}.{key}" for part, keys in REQUIRED.items() for key in keys if results.get(part, {}).get(key) in (None, "")]
    for entry in results["guidances"]:
        for name, metric in entry["metrics"].items():
            missing += [f"{entry['label']}.{name}.{key}" for key in ("variant", "n_fake") if not metric.get(key)]
    if missing:
        raise ValueError(f"results lack {', '.join(missing)}")


def earlier_entries(out: Path) -> list[dict[str, Any]]:
    """Entries already in the folder, without the differences, which depend on what stands first; empty when there are none."""
    path = out / RESULTS
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = read_json(path, "--out").get("guidances", [])
    return entries


def replace_entry(entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """``entries`` with ``entry`` in the place of the one for the same guidance, or at the end."""
    if any(old["slug"] == entry["slug"] for old in entries):
        return [entry if old["slug"] == entry["slug"] else old for old in entries]
    return [*entries, entry]


def add_differences(out: Path, entries: list[dict[str, Any]]) -> None:
    """Give each metric its ``difference`` to the first guidance, paired by seed and class; the first one has none."""
    scores = [_replicates(out, entry) for entry in entries]
    for entry, ours in zip(entries, scores, strict=True):
        for name, metric in entry["metrics"].items():
            first = scores[0].get(name)
            paired = None if entry is entries[0] or first is None or name not in ours else difference(ours[name], first)
            metric["difference"] = paired


def _replicates(out: Path, entry: dict[str, Any]) -> dict[str, Any]:
    path = out / entry["slug"] / SCORES
    if not path.exists():
        return {}
    metrics: dict[str, Any] = read_json(path, "--out")["metrics"]
    return metrics


def warnings_of(entries: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before comparing these numbers with others."""
    counts = sorted({entry["n"] for entry in entries})
    found = []
    if counts and counts[0] < SMALL_N:
        found.append(
            f"The Frechet distance of {counts[0]:,} images is biased upwards and is not comparable with one of {SMALL_N:,}; "
            "compare numbers of equal sample count only."
        )
    if len(counts) > 1:
        found.append(
            f"Sample counts differ between guidances ({', '.join(f'{n:,}' for n in counts)}): compare only rows of one count."
        )
    found += [f"{title} is not available: {reason}." for title, reason in _missing(entries).items()]
    return found + [note for entry in entries if (note := _commits_note(entry))]


def _missing(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {title: reason for entry in entries for title, reason in entry.get("not_available", {}).items()}


def _commits_note(entry: dict[str, Any]) -> str:
    known = [(made["commit"], made["dirty"]) for made in entry.get("made_with", [])]
    names = [f"{(commit or 'no commit')[:12]}{' with changes' if dirty else ''}" for commit, dirty in dict.fromkeys(known)]
    if len(names) < 2:
        return ""
    return f"The images of {entry['label']} were made by {len(names)} different commits: {', '.join(names)}."


def write_results(out: Path, header: dict[str, Any], entries: list[dict[str, Any]], complete: bool) -> dict[str, Any]:
    """Put the results together, check them and replace the file in one step."""
    add_differences(out, entries)
    results = {
        "schema": SCHEMA,
        "status": "complete" if complete else "partial",
        **header,
        "warnings": warnings_of(entries),
        "guidances": entries,
    }
    check_protocol(results)
    write_json(out / RESULTS, results)
    return results
