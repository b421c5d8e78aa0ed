"""Factors stay where they are computed with, if there is room for them."""

import pytest
import torch

from safegene_trl.models import factors as module
from safegene_trl.models.factors import Factors
from safegene_trl.models.low_rank import LowRankDelta

from ..conftest import make_model
from ..recalibration.test_search import calibration_set, helpful_deltas, run


@pytest.fixture
def deltas():
    generator = torch.Generator().manual_seed(0)
    return {
        name: LowRankDelta(
            *(torch.randn(shape, generator=generator).half() for shape in ((2, 6), (5, 2)))
        )
        for name in ("one", "two")
    }


def test_after_the_first_pass_nothing_is_copied(deltas):
    factors, like = Factors(deltas), torch.zeros(1, dtype=torch.bfloat16)
    first = [factors.of(name, like) for name in deltas]
    assert factors.copies == 2 and factors.resident
    again = [factors.of(name, like) for name in deltas]
    assert factors.copies == 2 and all(
        a[0] is b[0] and a[1] is b[1] for a, b in zip(first, again, strict=True)
    )
    for name, (a, b) in zip(deltas, first, strict=True):
        assert torch.equal(a, deltas[name].a.bfloat16()) and torch.equal(
            b, deltas[name].b.bfloat16()
        )


def test_where_room_is_short_each_pass_fetches_them(deltas, monkeypatch):
    factors, like = Factors(deltas), torch.zeros(1)
    monkeypatch.setattr(module, "free_bytes", lambda device: 4 * factors.num_bytes(like.dtype) - 1)
    for _ in range(3):
        factors.of("one", like)
    assert factors.copies == 3 and not factors.resident
    assert factors.describe()["place"] == "fetched"
    factors.clear()
    monkeypatch.setattr(module, "free_bytes", lambda device: 4 * factors.num_bytes(like.dtype))
    assert factors.describe() == {}
    factors.of("one", like)
    assert factors.resident and factors.describe()["place"] == "resident"  # decided anew


def test_two_types_in_turn_do_not_push_each_other_out(deltas):
    factors = Factors(deltas)
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            assert factors.of("one", torch.zeros(1, dtype=dtype))[0].dtype == dtype
    assert factors.copies == 2


def test_a_search_copies_every_pair_once_and_gives_the_memory_back(monkeypatch):
    seen = []
    clear = Factors.clear

    def noted(self):
        seen.append((self.copies, len(self._deltas)))
        clear(self)

    monkeypatch.setattr(Factors, "clear", noted)
    model, data = make_model(), calibration_set()
    deltas = helpful_deltas(make_model(), data)
    found = run(model, deltas, data, batch_size=4)
    copies, modules = seen[-1]
    assert copies == modules > 0 and len(found.history) > 1

    monkeypatch.setattr(module, "free_bytes", lambda device: 0)
    fetched = run(make_model(), deltas, data, batch_size=4)
    assert seen[-1][0] > 10 * modules
    assert fetched.coefficients == found.coefficients  # bit by bit
    assert (found.passes["factors"]["place"], fetched.passes["factors"]["place"]) == (
        "resident",
        "fetched",
    )
    assert fetched.passes["factors"]["allowed_mib"] == 0
