"""PNG plots, by matplotlib's own renderer; no display needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SafeGeneError
from ..models.coefficients import by_component


def heat_map(tables: dict[str, list[list[float | None]]], labels: Sequence[str], path: Path) -> None:
    """The overall table of cosines, and for every pair its cosine along the layers."""
    figure, (left, right) = _figure(1, 2, width=5 + len(labels) + len(tables) / 4, height=2 + len(labels) * 0.6)
    overall = [[_number(value) for value in row] for row in tables["overall"]]
    _image(left, overall, labels, labels)
    left.set_title("overall")
    pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
    layers = [name for name in tables if name != "overall"]
    rows = [[_number(tables[name][i][j]) for name in layers] for i, j in pairs]
    _image(right, rows, [f"{labels[i]} · {labels[j]}" for i, j in pairs], [name.split(".")[1] for name in layers])
    right.set_title("per layer")
    _save(figure, path)


def selection_plot(selection: dict[str, Any], path: Path) -> None:
    """Score of every layer, and how often resampled prompts select it."""
    figure, (upper, lower) = _figure(2, 1, width=9, height=5)
    layers = range(len(selection["scores"]))
    colours = ["tab:blue" if layer in selection["selected_layers"] else "lightgrey" for layer in layers]
    upper.bar(layers, selection["scores"], color=colours)
    upper.set_ylabel(f"score ({selection['method']})")
    lower.bar(layers, selection["stability"]["inclusion"], color=colours)
    lower.set_ylabel("share of resamples\nthat select the layer")
    lower.set_xlabel("layer (selected ones in blue)")
    figure.suptitle(f"mean Jaccard index over resampled prompts: {selection['stability']['mean_jaccard']:.2f}")
    _save(figure, path)


def coefficients_plot(coefficients: dict[str, float], path: Path) -> None:
    """One bar per layer or module; those of a vector's components above each other."""
    components = by_component(coefficients)
    figure, axes = _figure(len(components), 1, width=9, height=1.5 + 1.5 * len(components))
    for row, (component, values) in zip(np.atleast_1d(axes), components.items(), strict=True):
        row.bar(range(len(values)), list(values.values()))
        row.set_ylabel(f"λ, component {component}" if component else "λ")
    row.set_xlabel("layer or module, in order")
    _save(figure, path)


def history_plot(releases: Sequence[dict[str, Any]], path: Path) -> None:
    """Shares of every release after the safety step, with their 95 % intervals; rejected ones hollow."""
    figure, axes = _figure(1, 1, width=8, height=4)
    for name, colour in (("refusal_rate", "tab:blue"), ("over_refusal", "tab:orange"), ("incoherent", "tab:grey")):
        points = [
            (number, share, release["outcome"] == "rejected")
            for number, release in enumerate(releases, start=1)
            if (share := (release.get("after") or {}).get(name))
        ]
        for number, share, rejected in points:
            ends = [[share["share"] - share["low"]], [share["high"] - share["share"]]]
            face = "white" if rejected else colour
            axes.errorbar(
                [number], [share["share"]], yerr=ends, fmt="o", color=colour, markerfacecolor=face, capsize=3
            )
        kept = [(number, share["share"]) for number, share, rejected in points if not rejected]
        axes.plot(
            [number for number, _ in kept], [value for _, value in kept], color=colour, label=name.replace("_", " ")
        )
    axes.set(xlabel="release (hollow: rejected)", ylabel="share of prompts", ylim=(-0.03, 1.03))
    axes.set_xticks(range(1, len(releases) + 1))
    axes.legend()
    _save(figure, path)


def _figure(rows: int, columns: int, width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SafeGeneError("Plots need `pip install safegene-trl[report]`.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _image(axes: Any, values: list[list[float]], rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    if len(columns) <= 12:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise SafeGeneError(f"The plot {path} cannot be written: {error.strerror}.") from error
