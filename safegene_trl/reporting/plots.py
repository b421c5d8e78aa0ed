"""PNG plots, by matplotlib's own renderer; no display needed.

Whatever goes wrong with a plot, a library that is broken or a full disk, is a `PlotError`: a caller
can go on without the picture.
"""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

from ..config.metrics import shares
from ..errors import PlotError
from ..models.names import by_component
from ..text import printable


MOST_POINTS = 100  # of a line: with more of them their intervals cannot be told apart
MOST_ROWS = 20  # components of a vector, one above the other
LARGEST_SIDE = 100.0  # inches
Table = list[list[float | None]]
_COLOURS = ("tab:blue", "tab:orange", "tab:grey", "tab:green", "tab:red", "tab:purple")
# Names may hold what matplotlib takes for formulas, and a person's own settings may ask for LaTeX.
_SETTINGS: Any = {"text.usetex": False, "text.parse_math": False}


def heat_map(
    tables: dict[str, list[list[float | None]]], labels: Sequence[str], path: Path
) -> None:
    """The overall table of cosines, and for every pair its cosine along the layers.

    Raises:
        PlotError: It cannot be drawn or written.
    """
    names = [printable(label) for label in labels]
    with _figure(
        path, 1, 2, width=5 + len(labels) + len(tables) / 4, height=2 + len(labels) * 0.6
    ) as (left, right):
        overall = [[_number(value) for value in row] for row in tables["overall"]]
        _image(left, overall, names, names)
        left.set_title("overall")
        pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
        layers = [name for name in tables if name != "overall"]
        rows = [[_number(tables[name][i][j]) for name in layers] for i, j in pairs]
        pair_names = [f"{names[i]} · {names[j]}" for i, j in pairs]
        _image(right, rows, pair_names, [name.split(".")[1] for name in layers])
        right.set_title("per layer")


def component_maps(panels: Mapping[str, tuple[Table, Sequence[str]]], path: Path) -> None:
    """Tables of cosines between components of one vector, side by side.

    Args:
        panels: By title a table and the names of its rows.
        path: The PNG file.

    Raises:
        PlotError: It cannot be drawn or written.
    """
    most = max(len(labels) for _, labels in panels.values())
    width, height = (3 + 0.6 * most) * len(panels), 3 + 0.5 * most
    with _figure(path, 1, len(panels), width=width, height=height) as axes:
        for one, (title, (table, labels)) in zip(axes, panels.items(), strict=True):
            names = [printable(label) for label in labels]
            _image(one, [[_number(value) for value in row] for row in table], names, names)
            one.set_title(title)


def selection_plot(selection: dict[str, Any], path: Path) -> None:
    """Score of every layer, and how often resampled prompts select it.

    Raises:
        PlotError: It cannot be drawn or written.
    """
    with _figure(path, 2, 1, width=9, height=5) as (upper, lower):
        layers = range(len(selection["scores"]))
        colours = [
            "tab:blue" if layer in selection["selected_layers"] else "lightgrey" for layer in layers
        ]
        upper.bar(layers, selection["scores"], color=colours)
        upper.set_ylabel(f"score ({printable(selection['method'])})")
        lower.bar(layers, selection["stability"]["inclusion"], color=colours)
        lower.set_ylabel("share of resamples\nthat select the layer")
        lower.set_xlabel("layer (selected ones in blue)")
        upper.set_title(
            f"mean Jaccard index over resampled prompts: {selection['stability']['mean_jaccard']:.2f}"
        )


def coefficients_plot(coefficients: dict[str, float], path: Path) -> None:
    """Coefficients by layer or module, in steps; those of a vector's components above each other,
    the first ones if there are many.

    Raises:
        PlotError: It cannot be drawn or written.
    """
    components = by_component(coefficients)
    shown = list(components.items())[:MOST_ROWS]
    with _figure(path, len(shown), 1, width=9, height=1.5 + 1.5 * len(shown)) as rows:
        for row, (component, values) in zip(rows, shown, strict=True):
            heights = [_number(value) for value in values.values()]
            # one shape, whatever the number of bars
            edges = [number - 0.5 for number in range(len(heights) + 1)]
            row.fill_between(edges, [*heights, heights[-1]], step="post")
            row.set_ylabel(f"λ, component {printable(component)}" if component else "λ")
        left_out = (
            f" (the first {len(shown)} of {len(components)} components)"
            if len(shown) < len(components)
            else ""
        )
        rows[-1].set_xlabel(f"layer or module, in order{left_out}")


def history_plot(releases: Sequence[dict[str, Any]], path: Path) -> None:
    """Shares of every release after the safety step, with their 95 % intervals; rejected ones
    hollow.

    Of a long line every k-th release is shown, counted back from the newest.

    Raises:
        PlotError: It cannot be drawn or written.
    """
    every = -(-len(releases) // MOST_POINTS)
    numbered = list(enumerate(releases, start=1))[::-1][::every][::-1]
    with _figure(path, 1, 1, width=8, height=4) as (axes,):
        for metric, colour in zip(shares(), cycle(_COLOURS), strict=False):
            found = [
                (
                    number,
                    share["share"],
                    share["low"],
                    share["high"],
                    release["outcome"] == "rejected",
                )
                for number, release in numbered
                if (share := (release.get("after") or {}).get(metric.key))
            ]
            for rejected in (False, True):
                _points(
                    axes,
                    [point[:4] for point in found if point[4] == rejected],
                    colour,
                    hollow=rejected,
                )
            kept = [(number, share) for number, share, _, _, rejected in found if not rejected]
            axes.plot(
                [n for n, _ in kept], [share for _, share in kept], color=colour, label=metric.words
            )
        thinned = f"; every {every}th of {len(releases)}" if every > 1 else ""
        axes.set(
            xlabel=f"release (hollow: rejected{thinned})",
            ylabel="share of prompts",
            ylim=(-0.03, 1.03),
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()


def _points(
    axes: Any, points: Sequence[tuple[int, float, float, float]], colour: str, hollow: bool
) -> None:
    """Estimates with their intervals, all in one call: matplotlib takes a millisecond for each."""
    if not points:
        return
    numbers, shares = [point[0] for point in points], [point[1] for point in points]
    below = [max(0.0, share - low) for _, share, low, _ in points]
    above = [max(0.0, high - share) for _, share, _, high in points]
    face = "white" if hollow else colour
    axes.errorbar(
        numbers, shares, yerr=[below, above], fmt="o", color=colour, markerfacecolor=face, capsize=3
    )


@contextmanager
def _figure(
    path: Path, rows: int, columns: int, width: float, height: float
) -> Iterator[list[Any]]:
    """The axes of a new figure, row by row; at the end it is written to `path`, whole or not at
    all.
    """
    try:
        # not `pyplot`: that would look for a display and keep every figure
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("Plots need matplotlib: pip install 'safegene-trl[report]'.") from error
    except (
        Exception
    ) as error:  # e.g. built for another numpy, or a backend in MPLBACKEND that there is not
        raise PlotError(
            f"matplotlib cannot be loaded ({_said(error)}): repair its installation."
        ) from error
    try:
        with matplotlib.rc_context(_SETTINGS):
            size = (min(width, LARGEST_SIDE), min(height, LARGEST_SIDE))
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            yield list(figure.subplots(rows, columns, squeeze=False).flat)
            _write(figure, path)
    except OSError as error:
        raise PlotError(f"The plot {path} cannot be written: {error.strerror or error}.") from error
    except Exception as error:  # odd numbers, fonts, sizes: of a library that draws
        raise PlotError(f"The plot {path} cannot be drawn ({_said(error)}).") from error


def _write(figure: Any, path: Path) -> None:
    """In one piece; where there was no plot before, under its own name from the start.

    A folder that holds files of other names is not cleared away after a run that was killed.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    replaces = path.exists()
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") if replaces else path
    try:
        unfinished.write_bytes(drawn.getvalue())
        if replaces:
            os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def _said(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")[:200]


def _image(
    axes: Any, values: list[list[float]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    if len(columns) <= 16:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
