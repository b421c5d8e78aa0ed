"""What tells harmful prompts from others at a module's input."""

import numpy as np
import pytest

from safegene_trl.extraction.transport.detectors import auc, detector


def inputs(shift, width=60, seed=0):
    draw = np.random.default_rng(seed)
    direction = draw.standard_normal(width)
    harmful, benign, others = (draw.standard_normal((n, width)) for n in (40, 40, 100))
    return harmful + shift * direction, benign, others, direction


def test_a_detector_is_one_on_harmful_prompts_and_nothing_on_others():
    harmful, benign, others, _ = inputs(1.0)
    found = detector(harmful, benign, [others])
    assert found.auc > 0.98
    draw = np.random.default_rng(7)
    direction = np.random.default_rng(0).standard_normal(60)
    unseen = draw.standard_normal((500, 60))
    assert (unseen + direction) @ found.direction == pytest.approx(1, abs=0.8)
    assert float(((unseen + direction) @ found.direction).mean()) == pytest.approx(1, abs=0.15)
    assert float((unseen @ found.direction).mean()) == pytest.approx(0, abs=0.1)


def test_where_there_is_nothing_to_tell_the_separation_says_so():
    """With more numbers than texts a fit goes through all of them: only those left out count."""
    aucs = []
    for seed in range(5):
        harmful, benign, others, _ = inputs(0.0, width=400, seed=seed)
        aucs.append(detector(harmful, benign, [others]).auc)
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.12)


def test_what_is_left_out_is_as_if_it_were_left_out():
    harmful, benign, others, _ = inputs(0.3, width=20)
    found = detector(harmful, benign, [others])
    rows = np.concatenate([harmful, benign, others])
    answers = np.r_[np.ones(40), np.zeros(140)]
    weights = np.where(answers > 0, 0.5 / 40, 0.5 / 140)
    shift = found.penalty * float((weights[:, None] * rows**2).sum())
    scores = []
    for left in range(40):
        kept = np.arange(180) != left
        x, w = rows[kept], weights[kept]
        u = np.linalg.solve(x.T @ (w[:, None] * x) + shift * np.eye(20), x.T @ (w * answers[kept]))
        scores.append(rows[left] @ u)
    assert np.mean(scores) == pytest.approx(found.harmful, rel=1e-6)


def test_a_module_that_is_given_nothing_has_no_detector():
    found = detector(np.zeros((8, 5)), np.zeros((8, 5)), [np.zeros((8, 5))])
    assert found.auc == 0.5 and not found.direction.any()


def test_ties_count_half():
    assert auc(np.array([1.0, 2.0]), np.array([0.0, 1.0])) == pytest.approx(3.5 / 4)
