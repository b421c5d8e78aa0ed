"""The difference of two models, dense and as a LoRA."""

import pytest
import torch

from safegene_trl.errors import FamilyError
from safegene_trl.extraction.delta import dense_delta, lora_delta

from ..conftest import make_model, with_lora


def lora_weight(model, name):
    layer = model.get_base_model().get_submodule(name)
    return layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]


def test_lora_on_the_aligned_model_is_negated_exactly():
    degraded = with_lora(make_model(), rank=4)
    deltas, energy = lora_delta(degraded)
    assert len(deltas) == 3 * 7 and set(energy.values()) == {1.0}
    for name, delta in deltas.items():
        assert delta.a.shape[0] == 4
        torch.testing.assert_close(delta.dense(), -lora_weight(degraded, name), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("rank", [2, 6])
def test_lora_at_another_rank(rank):
    degraded = with_lora(make_model(), rank=4)
    deltas, energy = lora_delta(degraded, rank=rank)
    for name, delta in deltas.items():
        expected = -lora_weight(degraded, name)
        u, s, vh = torch.linalg.svd(expected)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(delta.dense(), best, atol=1e-6, rtol=1e-4)
        assert energy[name] == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-5)
        assert delta.a.shape[0] == delta.b.shape[1] == rank


def test_dense_difference_of_a_low_rank_update_is_exact():
    aligned = make_model()
    degraded = with_lora(make_model(), rank=3).merge_and_unload()
    deltas, energy = dense_delta(aligned, degraded, rank=3)
    assert len(deltas) == 3 * 7  # no embedding, no norm, no output head
    for name, delta in deltas.items():
        expected = aligned.get_submodule(name).weight - degraded.get_submodule(name).weight
        torch.testing.assert_close(delta.dense(), expected, atol=1e-5, rtol=1e-4)
        assert energy[name] == pytest.approx(1.0, abs=1e-4)


def test_truncation_reports_what_it_keeps():
    aligned, degraded = make_model(seed=0), make_model(seed=1)
    name = "model.layers.0.mlp.up_proj"
    deltas, energy = dense_delta(aligned, degraded, rank=4)
    difference = aligned.get_submodule(name).weight - degraded.get_submodule(name).weight
    lost = (difference - deltas[name].dense()).square().sum() / difference.square().sum()
    assert energy[name] == pytest.approx(1 - float(lost), abs=1e-4)
    assert 0.1 < energy[name] < 0.9


def test_two_families_are_refused():
    with pytest.raises(FamilyError, match="use one family"):
        dense_delta(make_model(), make_model(layers=2), rank=2)


def test_idle_lora_is_refused():
    model = with_lora(make_model())
    with model.disable_adapter(), pytest.raises(FamilyError, match="changes no layer"):
        lora_delta(model)
