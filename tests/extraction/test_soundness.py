"""Numbers that mean nothing: logits of a model that has diverged, vectors that their data type
cannot hold.
"""

import pytest
import torch

from safegene_trl.errors import FamilyError, VectorError
from safegene_trl.extraction.soundness import check_runs, in_dtype
from safegene_trl.models.low_rank import LowRankDelta

from ..conftest import ALONE, make_model


def delta(scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        torch.randn(2, 8, generator=generator) * scale,
        torch.randn(6, 2, generator=generator) * scale,
    )


def test_logits(tokenizer):
    model = make_model()
    check_runs(model, tokenizer, "how", ALONE, "mine")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # every weight is finite, and no logit is
    with pytest.raises(FamilyError, match="logits of mine are NaN or infinite"):
        check_runs(model, tokenizer, "how", ALONE, "mine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ordinary_deltas_are_cast(dtype):
    found = in_dtype(
        {"m": delta(0.01), "n": LowRankDelta(torch.zeros(2, 8), torch.zeros(6, 2))}, dtype
    )
    assert found["m"].a.dtype == dtype and torch.equal(found["m"].b, delta(0.01).b.to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", ["a", "b"])
def test_not_finite(bad, half):
    broken = delta()
    getattr(broken, half)[1, 1] = bad
    with pytest.raises(VectorError, match="`n` of the vector holds NaN or infinity"):
        in_dtype({"m": delta(), "n": broken}, torch.float32)


@pytest.mark.parametrize(
    ("scale", "message"), [(1e6, "numbers too large for float16"), (1e-8, "too small for float16")]
)
def test_out_of_range(scale, message):
    with pytest.raises(VectorError, match=f"`n` of the vector .*{message}: set `weights_dtype"):
        in_dtype({"m": delta(), "n": delta(scale)}, torch.float16)
    assert in_dtype({"m": delta(), "n": delta(scale)}, torch.bfloat16)["n"].a.abs().max() > 0


@pytest.mark.parametrize(
    "empty",
    [
        LowRankDelta(torch.zeros(2, 8), torch.ones(6, 2)),
        LowRankDelta(torch.ones(2, 8), torch.zeros(6, 2)),
    ],
)
def test_nothing_but_zeros(empty):
    with pytest.raises(VectorError, match="changes nothing"):
        in_dtype({"m": empty}, torch.float32)
