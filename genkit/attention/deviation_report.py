"""Tables and the plot of what :mod:`genkit.attention.deviation` measures."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

Lines = list[dict[str, Any]]
DTYPES = ("float32", "bfloat16", "float16")


def markdown(found: dict[str, Any], details: bool = True) -> list[str]:
    """All tables; ``details`` are those of every shape."""
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None)
    lines = ["# Deviation of attention from float64", "", machine, "", *summary(found["attention"] + found["kernels"])]
    lines += ["", "## Over mantissa and tile, emulated", "", *emulated(found["emulated"])]
    if "trajectories" in found:
        lines += ["", "## Images and tokens of the built-in models", "", *diffusion(found["trajectories"])]
        lines += ["", *tokens(found["trajectories"])]
    return [*lines, "", "## Every shape", "", *every_shape(found["attention"])] if details else lines


def summary(measured: Lines) -> list[str]:
    """The worst of each backend, kernel and reference over all shapes, in bands."""
    lines = ["| what | dtype | rms / band | allowed | largest / band | allowed | bias / band | W1 / band | |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for key in dict.fromkeys((x["kind"], x["name"], x["dtype"]) for x in measured):
        some = [x for x in measured if (x["kind"], x["name"], x["dtype"]) == key]
        bound = some[0].get("bound", {"rms": None, "largest": None})
        rms, bias, w1 = (max(abs(x[name]) / x["band_rms"] for x in some) for name in ("rms", "bias", "wasserstein"))
        largest = max(x["largest"] / x["band_largest"] for x in some)
        verdict = "" if bound["rms"] is None else "exceeded" if any(x["exceeds"] for x in some) else "kept"
        allowed = ["" if bound[name] is None else f"{bound[name]:g}" for name in ("rms", "largest")]
        numbers = f"{rms:.2f} | {allowed[0]} | {largest:.2f} | {allowed[1]} | {bias:.3f} | {w1:.2f} | {verdict}"
        lines.append(f"| {key[1]} | {key[2]} | {numbers} |")
    return lines


def every_shape(measured: Lines) -> list[str]:
    """Each measurement of attention in units of the output."""
    lines = [
        "| keys | head | gain | queries | dtype | what | largest | rms | bias | W1 |",
        "|---:|---:|---:|---:|---|---|" + "---:|" * 4,
    ]
    for x in measured:
        shape = f"{x['keys']} | {x['head_size']} | {x['gain']:g} | {min(x['queries'], x['keys'])} | {x['dtype']} | {x['name']}"
        lines.append(f"| {shape} | {x['largest']:.2e} | {x['rms']:.2e} | {x['bias']:+.1e} | {x['wasserstein']:.1e} |")
    return lines


def by_length(measured: Lines, names: Iterable[str], dtype: str = "bfloat16") -> list[str]:
    """RMS of some backends and references at each shape, in one dtype."""
    columns = list(names)
    lines = [f"| keys | head | gain | {' | '.join(columns)} |", "|---:|---:|---:|" + "---:|" * len(columns)]
    for key in dict.fromkeys((x["keys"], x["head_size"], x["gain"], x["queries"]) for x in measured):
        some = {
            x["name"]: x["rms"]
            for x in measured
            if (x["keys"], x["head_size"], x["gain"], x["queries"]) == key and x["dtype"] == dtype
        }
        cells = [f"{some[name]:.1e}" if name in some else "" for name in columns]
        lines.append(f"| {key[0]} | {key[1]} | {key[2]:g} | {' | '.join(cells)} |")
    return lines


def emulated(measured: Lines) -> list[str]:
    """RMS (and largest) over mantissa bits, down, and keys per tile, across."""
    tiles = list(dict.fromkeys(x["tile"] for x in measured))
    heads = ["one tile" if tile is None else f"tiles of {tile}" for tile in tiles]
    lines = [f"| mantissa bits | {' | '.join(heads)} |", "|---:|" + "---:|" * len(tiles)]
    for bits in dict.fromkeys(x["bits"] for x in measured):
        row = {x["tile"]: f"{x['rms']:.1e} (largest {x['largest']:.1e})" for x in measured if x["bits"] == bits}
        lines.append(f"| {bits} | {' | '.join(row[tile] for tile in tiles)} |")
    return lines


def diffusion(measured: Lines) -> list[str]:
    """Of the images of the diffusion model."""
    lines = ["| network | attention | largest, any step | largest, images | rms | W1 | 8-bit values changed |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for x in (x for x in measured if "steps" in x):
        numbers = f"{max(x['steps']):.1e} | {x['largest']:.1e} | {x['rms']:.1e} | {x['wasserstein']:.1e} | {x['changed']:.2%}"
        lines.append(f"| {x['setting']} | {x['backend']} | {numbers} |")
    return lines


def tokens(measured: Lines) -> list[str]:
    """Of the tokens of the autoregressive models."""
    lines = ["| model | network | attention | largest, logits | rms, logits | equal tokens | identical images |"]
    lines += ["|---|---|---|---:|---:|---:|---:|"]
    for x in (x for x in measured if "equal" in x):
        numbers = f"{x['largest']:.1e} | {x['rms']:.1e} | {x['equal']:.1%} | {x['identical']:.0%}"
        lines.append(f"| {x['model'].removeprefix('builtin/')} | {x['setting']} | {x['backend']} | {numbers} |")
    return lines


COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")


def plot(found: dict[str, Any]) -> bytes:
    """PNG: backends over dtype, the emulation over mantissa and tile, images along the steps. Needs matplotlib.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    panels = figure.subplots(1, 3)
    _backends(panels[0], found["attention"])
    _emulated(panels[1], found["emulated"])
    _courses(panels[2], [x for x in found.get("trajectories", []) if "steps" in x])
    for ax in panels:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _backends(ax: Any, measured: Lines) -> None:
    names = list(dict.fromkeys(x["name"] for x in measured))
    for i, name in enumerate(names):
        for j, dtype in enumerate(DTYPES):
            some = [x["rms"] / x["band_rms"] for x in measured if (x["name"], x["dtype"]) == (name, dtype)]
            place = [j + (i - len(names) / 2) * 0.8 / len(names)] * len(some)
            style = {"marker": "x" if any(x["name"] == name and x["kind"] == "reference" for x in measured) else "o"}
            ax.plot(place, some, ls="", ms=5, color=COLOURS[i % len(COLOURS)], label=name if j == 0 else None, **style)
    ax.axhline(1, color="black", lw=0.8, ls=":")
    ax.set_xticks(range(len(DTYPES)), DTYPES)
    ax.set_yscale("log")
    ax.set(title="Backends: each point a shape", ylabel="rms deviation, in bands")
    ax.legend(fontsize=8, loc="upper right")


def _emulated(ax: Any, measured: Lines) -> None:
    tiles = list(dict.fromkeys(x["tile"] for x in measured))
    first = {x["bits"]: x["rms"] for x in measured if x["tile"] == tiles[0]}
    for i, tile in enumerate(tiles):
        some = [x for x in measured if x["tile"] == tile]
        label = "one tile (the plain softmax)" if tile is None else f"tiles of {tile} keys"
        ax.plot([x["bits"] for x in some], [x["rms"] / first[x["bits"]] for x in some], "o-", ms=4, color=COLOURS[i], label=label)
    ax.set_xticks(list(first))
    shape = measured[0]
    title = f"Emulated: {shape['keys']} keys, head {shape['head_size']}, score std {shape['gain']:g}"
    ax.set(title=title, xlabel="mantissa bits of every result", ylabel="rms deviation, over that of one tile")
    ax.legend(fontsize=8)


def _courses(ax: Any, measured: Lines) -> None:
    drawn: list[list[float]] = []
    for x in measured:
        if x["steps"] in drawn:  # backends that do the same
            continue
        label = f"{x['setting']} ({x['backend']})"
        ax.plot(range(1, len(x["steps"]) + 1), x["steps"], ".-", color=COLOURS[len(drawn) % len(COLOURS)], label=label)
        drawn.append(x["steps"])
    ax.axhline(1 / 127.5, color="black", lw=0.8, ls=":")
    ax.set_yscale("log")
    ax.set(title="builtin/cifar10, CFG(3): estimates along the steps", xlabel="step", ylabel="largest pixel difference (range 2)")
    if drawn:
        ax.text(1, 1 / 127.5, "one of 255 levels", va="bottom", fontsize=8)
        ax.legend(fontsize=7, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
