"""Maps between states: what they find, how well they say they do, and what they hold in memory."""

import tracemalloc

import numpy as np
import pytest

from safegene_trl import SafeGeneError
from safegene_trl.extraction.transport.directions import cosine
from safegene_trl.extraction.transport.maps import (
    MAPS,
    Fit,
    Moments,
    carried,
    held_out_quality,
    mlp,
    procrustes,
    rank_warning,
    ridge,
    split,
)

from .arrays import related, rows


def fit_of(source, target, penalty=1e-3):
    return Fit(source, target, split(source.count)[0], penalty, 0)


@pytest.mark.parametrize("kind", list(MAPS))
@pytest.mark.parametrize("widths", [(24, 40), (40, 24)])
def test_a_direction_is_carried_over(tmp_path, kind, widths):
    (source, target), frames = related(tmp_path, widths=widths, noise=0.01)
    found = MAPS[kind](fit_of(source, target))
    planted = np.random.default_rng(1).standard_normal(10)
    there = carried(found, planted @ frames[0], source.read(slice(20)))
    assert cosine(there, planted @ frames[1]) >= 0.95
    quality = held_out_quality(found, source, target, split(source.count)[1])
    assert quality.explained > 0.95 and quality.cosine > 0.97


@pytest.mark.parametrize("kind", list(MAPS))
def test_between_models_that_share_nothing_nothing_is_found(tmp_path, kind):
    (source, _), frames = related(tmp_path, seed=0)
    (_, target), other = related(tmp_path, seed=1)
    found = MAPS[kind](fit_of(source, target, penalty=0.1))
    quality = held_out_quality(found, source, target, split(source.count)[1])
    assert quality.explained < 0.05 and abs(quality.cosine) < 0.15
    at, cosines = source.read(slice(20)), []
    for planted in np.random.default_rng(1).standard_normal((200, 10)):
        cosines.append(cosine(carried(found, planted @ frames[0], at), planted @ other[1]))
    assert abs(np.mean(cosines)) < 0.2


def test_a_rotation_is_found_and_is_semi_orthogonal(tmp_path):
    (source, target), frames = related(tmp_path)
    matrix = procrustes(fit_of(source, target)).matrix
    assert np.allclose(matrix, frames[0].T @ frames[1], atol=1e-5)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert np.allclose(values[:10], values[0]) and np.allclose(values[10:], 0, atol=1e-6)


def test_the_regression_is_the_textbook_s(tmp_path):
    (source, target), _ = related(tmp_path, noise=0.3)
    fit = fit_of(source, target, penalty=0.2)
    s, t = source.read(fit.rows), target.read(fit.rows)
    s, t = s - s.mean(axis=0), t - t.mean(axis=0)
    shift = 0.2 * np.trace(s.T @ s) / 24
    expected = np.linalg.solve(s.T @ s + shift * np.eye(24), s.T @ t)
    assert np.allclose(ridge(fit).matrix, expected)


def test_the_hidden_layer_learns_what_no_matrix_does(tmp_path):
    draw = np.random.default_rng(0)
    states = draw.standard_normal((1000, 4))
    source = rows(tmp_path, "s", states)
    target = rows(tmp_path, "t", np.abs(states) + 0.5 * states)
    fit, held_out = fit_of(source, target), split(1000)[1]
    plain, bent = (held_out_quality(f(fit), source, target, held_out) for f in (ridge, mlp))
    assert plain.explained < 0.7 and bent.explained > plain.explained + 0.1


def test_memory_does_not_grow_with_the_anchors(tmp_path):
    """Counted are the bytes that arrays hold at once, wherever they are made."""
    peaks = []
    for count in (2000, 10000):
        (source, target), _ = related(tmp_path, count=count, seed=count)
        fit, held_out = fit_of(source, target), split(count)[1]
        tracemalloc.start()
        for kind in (procrustes, ridge):
            found = kind(fit)
            held_out_quality(found, source, target, held_out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    further = 8000 * (24 + 40) * 8  # bytes of the further states
    assert peaks[1] - peaks[0] < further / 20


def test_covariances_in_blocks_are_those_of_all(tmp_path):
    (source, target), _ = related(tmp_path, count=700, noise=0.1)
    chosen = np.arange(0, 700, 2)
    moments = Moments.of(source, target, chosen)
    s, t = source.read(chosen), target.read(chosen)
    assert np.allclose(moments.within, np.cov(s.T, bias=True))
    assert np.allclose(moments.across, (s - s.mean(0)).T @ (t - t.mean(0)) / 350)


def test_too_few_anchors_for_the_width_are_told_with_the_number_needed(tmp_path):
    assert rank_warning(577, 576, "ridge", 0.1) == ""
    said = rank_warning(240, 576, "ridge", 0.1)
    assert "at least 337 directions" in said and "722 anchors are needed" in said
    assert len(split(722)[0]) == 578 and len(split(720)[0]) == 576
    assert "722" in rank_warning(240, 576, "procrustes", 0.0)
    for kind in ("ridge", "mlp"):
        with pytest.raises(SafeGeneError, match="set `map_penalty` above 0"):
            rank_warning(240, 576, kind, 0.0)
