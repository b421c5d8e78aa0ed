"""Isolation against its formula on small matrices."""

import pytest
import torch

from safegene_trl.errors import ConfigError
from safegene_trl.extraction.isolation import isolated
from safegene_trl.models.low_rank import LowRankDelta


def delta(seed, rank=3, shape=(20, 12)):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        torch.randn(rank, shape[1], generator=generator),
        torch.randn(shape[0], rank, generator=generator),
    )


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_formula(rank):
    vector, tasks = delta(0, rank=12), [delta(1), delta(2)]
    found, removed = isolated({"m": vector}, [{"m": task} for task in tasks], rank)
    stacked = [task.dense() for task in tasks]
    left = torch.linalg.svd(torch.cat(stacked, dim=1)).U[:, :rank]
    right = torch.linalg.svd(torch.cat(stacked, dim=0)).Vh[:rank].T
    shared = left @ left.T @ vector.dense() @ right @ right.T
    expected = vector.dense() - shared  # of rank 12 at most, so nothing is cut off
    torch.testing.assert_close(found["m"].delta.dense(), expected, atol=1e-4, rtol=1e-4)
    assert removed["m"] == pytest.approx(
        float(shared.square().sum() / vector.dense().square().sum()), rel=1e-3
    )
    assert found["m"].delta.a.shape[0] == 12


def test_a_vector_that_is_a_task_vanishes_and_others_stay():
    task, other = delta(1), delta(3)
    found, removed = isolated({"m": task, "n": other}, [{"m": task}], 3)
    assert removed["m"] == pytest.approx(1, abs=1e-4) and removed["n"] == 0
    assert found["m"].delta.dense().norm() < 1e-3 * task.dense().norm()
    assert torch.equal(found["n"].delta.dense(), other.dense())


def test_bad_rank():
    with pytest.raises(ConfigError, match="isolation_rank"):
        isolated({"m": delta(0)}, [{"m": delta(1)}], 0)
