"""What rounding leaves."""

import pytest
import torch

from safegene_trl.errors import OutputError
from safegene_trl.models.rounding import Rounding


def added(change, dtype):
    rounding = Rounding()
    before = torch.ones(4, 8)
    rounding.add("w", before, before + change, dtype)
    return rounding


def test_what_is_kept_is_a_projection():
    assert added(2.0**-7, torch.bfloat16).check() == {"weights": 32, "changed_weights": 32, "kept": 1.0}
    half = torch.zeros(4, 8)
    half[:2] = 2.0**-7
    half[2:] = 2.0**-10  # rounds to nothing beside 1
    found = added(half, torch.bfloat16).check()
    assert found["changed_weights"] == 16 and found["kept"] == pytest.approx(1 / (1 + 2.0**-6))
    assert added(half, torch.float32).check()["kept"] == pytest.approx(1)


def test_a_change_that_vanishes_is_refused():
    with pytest.raises(OutputError, match="0 of 32 weights would change"):
        added(2.0**-10, torch.bfloat16).check()
    assert Rounding().check()["kept"] == 1.0 and added(0.0, torch.bfloat16).check()["changed_weights"] == 0


def test_what_overflows_is_refused_by_name():
    with pytest.raises(OutputError, match="`w` would hold NaN or infinity"):
        added(1e6, torch.float16)
