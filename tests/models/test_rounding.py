"""What rounding leaves."""

import pytest
import torch

from safegene_trl.errors import OutputError
from safegene_trl.models.rounding import Rounding, is_finite


def added(change, dtype):
    rounding = Rounding()
    before = torch.ones(4, 8)
    after = before + change
    rounding.add("w", before, after, after.to(dtype))
    return rounding


def test_what_is_kept_is_a_projection():
    assert added(2.0**-7, torch.bfloat16).check() == {
        "weights": 32,
        "changed_weights": 32,
        "kept": 1.0,
    }
    half = torch.zeros(4, 8)
    half[:2] = 2.0**-7
    half[2:] = 2.0**-10  # rounds to nothing beside 1
    found = added(half, torch.bfloat16).check()
    assert found["changed_weights"] == 16 and found["kept"] == pytest.approx(1 / (1 + 2.0**-6))
    assert added(half, torch.float32).check()["kept"] == pytest.approx(1)


def test_a_change_that_vanishes_is_refused():
    with pytest.raises(OutputError, match="0 of 32 weights would change"):
        added(2.0**-10, torch.bfloat16).check()
    assert (
        Rounding().check()["kept"] == 1.0
        and added(0.0, torch.bfloat16).check()["changed_weights"] == 0
    )


def test_what_overflows_is_refused_by_name():
    with pytest.raises(OutputError, match="`w` would hold NaN or infinity"):
        added(1e6, torch.float16)


def random(seed, std=1.0):
    return torch.randn((40, 30), generator=torch.Generator().manual_seed(seed)) * std


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 1e-2, 1e-4])
def test_formula(dtype, std, exact):
    before = random(0).to(dtype).float()
    after = before + random(1, std)
    rounding = Rounding()
    rounding.add("w", before, after, after.to(dtype), before_is_rounded=exact)
    real, wanted = after.to(dtype).double() - before.double(), after.double() - before.double()
    found = rounding.check()
    assert (found["weights"], found["changed_weights"]) == (1200, int((real != 0).sum()))
    assert found["kept"] == pytest.approx(
        float((real * wanted).sum() / wanted.square().sum()), rel=1e-4
    )


def test_weights_that_are_not_yet_rounded_are_before_they_are_compared():
    before, after = torch.tensor([1 + 2.0**-9]), torch.tensor([1 + 2.0**-9 + 2.0**-7])
    rounding = Rounding()
    rounding.add("w", before, after, after.bfloat16())
    assert rounding.check()["kept"] == pytest.approx(1)  # both lose the 2^-9


def test_parts_of_a_tensor_add_up():
    before, after = random(0).bfloat16().float(), random(2)
    whole, total = Rounding(), Rounding()
    whole.add("w", before, after, after.bfloat16())
    for first in range(0, 40, 7):
        part = Rounding()
        rows = slice(first, first + 7)
        part.add("w", before[rows], after[rows], after[rows].bfloat16())
        total.include(part)
    assert total.check() == whole.check() | {"kept": pytest.approx(whole.check()["kept"], rel=1e-5)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_and_large_numbers_are_not(bad):
    after = torch.ones(5)
    after[3] = bad
    with pytest.raises(OutputError, match="NaN or infinity"):
        Rounding().add("w", torch.ones(5), after, after)
    with pytest.raises(OutputError, match="NaN or infinity"):
        Rounding().add("w", after, after, after)
    huge = Rounding()
    # squares that float32 does not hold
    after = torch.tensor([1e30, 1e30])
    huge.add("w", torch.zeros(2), after, after)
    assert huge.check()["kept"] == pytest.approx(1)


def test_is_finite():
    assert (
        is_finite(torch.full((4,), 3e38))
        and is_finite(torch.arange(3))
        and is_finite(torch.zeros(0))
    )
    assert is_finite(torch.full((9,), 6e4, dtype=torch.float16))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2):
        values = torch.ones(9).to(dtype)
        assert is_finite(values)
        values[4] = float("nan")
        assert not is_finite(values)
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))
