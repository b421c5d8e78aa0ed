"""Pictures: written whole or not at all, fast, and one kind of error for whatever keeps them from
being drawn.
"""

import builtins
import os
import sys
import time

import pytest

from safegene_trl.errors import PlotError
from safegene_trl.reporting import plots
from safegene_trl.reporting.plots import coefficients_plot, heat_map, history_plot, selection_plot


pytest.importorskip("matplotlib")
HOSTILE = "a$\\frac{$\x1b[2J\n<b>\u202e"


def releases(count):
    share = {"share": 0.5, "low": 0.4, "high": 0.6}
    after = dict.fromkeys(("refusal_rate", "over_refusal", "incoherent"), share)
    return [
        {"outcome": "rejected" if i % 7 == 0 else "accepted", "after": after} for i in range(count)
    ]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [2, 100, 101, 10_000])
def test_a_long_line_is_thinned_out(count, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "_points", lambda axes, points, colour, hollow: shown.append(points))
    history_plot(releases(count), tmp_path / "x.png")
    numbers = sorted(point[0] for point in [*shown[0], *shown[1]])
    assert len(numbers) <= 100 and numbers[-1] == count and is_png(tmp_path / "x.png")
    assert count > 100 or numbers == list(range(1, count + 1))


def test_long_lines_and_many_coefficients_take_no_time(tmp_path):
    history_plot(releases(3), tmp_path / "first.png")  # matplotlib's own start
    started = time.process_time()
    history_plot(releases(10_000), tmp_path / "history.png")
    coefficients_plot(
        {f"layers.{i}": i % 10 / 5 for i in range(5_000)}, tmp_path / "coefficients.png"
    )
    coefficients_plot(
        {f"layers.{i}/{j}": 1.0 for i in range(2) for j in range(1_000)},
        tmp_path / "components.png",
    )
    assert time.process_time() - started < 10
    assert all(is_png(path) for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 4


def test_names_are_text(tmp_path):
    heat_map(
        {"overall": [[1.0, 0.5], [0.5, None]], "layers.0": [[1.0, 0.2], [0.2, 1.0]]},
        [HOSTILE, "b"],
        tmp_path / "a",
    )
    coefficients_plot({f"layers.1/{HOSTILE}": 0.5, "layers.1/b": float("nan")}, tmp_path / "b")
    stability = {"inclusion": [0.5, 1.0], "mean_jaccard": 0.5}
    selection = {
        "scores": [0.1, 0.2],
        "selected_layers": [1],
        "method": HOSTILE,
        "stability": stability,
    }
    selection_plot(selection, tmp_path / "c")
    assert all(is_png(path) for path in tmp_path.iterdir())


def test_no_display_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    history_plot(releases(3), tmp_path / "x.png")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    "broken", [ImportError("not here"), RuntimeError("built for another numpy")]
)
def test_a_library_that_cannot_be_loaded(broken, tmp_path, monkeypatch):
    real = builtins.__import__

    def load(name, *rest):
        if name.startswith("matplotlib"):
            raise broken
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", load)
    with pytest.raises(PlotError, match="matplotlib"):
        history_plot(releases(3), tmp_path / "x.png")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("no fonts"), MemoryError()]
)
def test_what_cannot_be_written_leaves_nothing_and_keeps_what_was_there(
    error, tmp_path, monkeypatch
):
    (tmp_path / "x.png").write_bytes(b"earlier")

    def savefig(figure, file, **options):
        file.write(b"\x89PNG")
        raise error

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    with pytest.raises(PlotError, match=r"x\.png cannot be"):
        history_plot(releases(3), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"earlier" and os.listdir(tmp_path) == ["x.png"]


def test_odd_content_is_the_same_error(tmp_path):
    with pytest.raises(PlotError, match="cannot be drawn"):
        selection_plot({"scores": [1]}, tmp_path / "x.png")
    with pytest.raises(PlotError, match="cannot be written: No such file"):
        history_plot(releases(3), tmp_path / "nowhere" / "x.png")
