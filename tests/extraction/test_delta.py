"""The difference of two models: from their files, and from their adapters."""

import pytest
import torch
from peft import PeftModel

from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.errors import FamilyError
from safegene_trl.extraction.delta import adapter_delta, stored_delta

from ..conftest import make_model, with_lora


def lora_weight(model, name):
    layer = model.get_base_model().get_submodule(name)
    return (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    )


def stored(model, folder):
    model.save_pretrained(folder)
    return StoredModel.open(str(folder))


def test_lora_on_the_aligned_model_is_negated_exactly():
    degraded = with_lora(make_model(), rank=4)
    found = adapter_delta(make_model(), degraded)
    assert len(found) == 3 * 7 and {truncation.kept for truncation in found.values()} == {1.0}
    for name, truncation in found.items():
        assert truncation.delta.a.shape[0] == 4
        torch.testing.assert_close(
            truncation.delta.dense(), -lora_weight(degraded, name), atol=1e-7, rtol=1e-6
        )


def test_two_loras_on_one_base():
    aligned, degraded = (
        with_lora(make_model(), rank=2, seed=1),
        with_lora(make_model(), rank=4, seed=2),
    )
    for name, truncation in adapter_delta(aligned, degraded).items():
        expected = lora_weight(aligned, name) - lora_weight(degraded, name)
        torch.testing.assert_close(truncation.delta.dense(), expected, atol=1e-6, rtol=1e-5)
        assert truncation.delta.a.shape[0] == 6


@pytest.mark.parametrize("rank", [2, 6])
def test_lora_at_another_rank(rank):
    degraded = with_lora(make_model(), rank=4)
    for name, truncation in adapter_delta(make_model(), degraded, rank=rank).items():
        expected = -lora_weight(degraded, name)
        u, s, vh = torch.linalg.svd(expected)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(truncation.delta.dense(), best, atol=1e-6, rtol=1e-4)
        assert truncation.kept == pytest.approx(
            float(s[:rank].square().sum() / s.square().sum()), abs=1e-5
        )
        assert truncation.delta.a.shape[0] == truncation.delta.b.shape[1] == rank


@pytest.mark.parametrize("exact", [True, False])
def test_stored_difference_of_a_low_rank_update_is_exact(exact, tmp_path):
    aligned = make_model()
    degraded = with_lora(make_model(), rank=3).merge_and_unload()
    found = stored_delta(
        stored(aligned, tmp_path / "a"), stored(degraded, tmp_path / "d"), rank=3, exact=exact
    )
    assert len(found) == 3 * 7  # no embedding, no norm, no output head
    for name, truncation in found.items():
        expected = aligned.get_submodule(name).weight - degraded.get_submodule(name).weight
        torch.testing.assert_close(truncation.delta.dense(), expected, atol=1e-5, rtol=1e-4)
        assert truncation.kept == pytest.approx(1.0, abs=1e-4)


def test_adapter_on_another_base_is_folded_in(tmp_path):
    base = make_model(seed=5)
    base.save_pretrained(tmp_path / "base")
    adapted = with_lora(make_model(seed=5), use_dora=True)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    aligned = make_model()
    found = stored_delta(
        stored(aligned, tmp_path / "a"), StoredModel.open(str(tmp_path / "adapter")), 32, exact=True
    )
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    name = "model.layers.1.mlp.up_proj"
    expected = aligned.get_submodule(name).weight - merged.get_submodule(name).weight
    torch.testing.assert_close(found[name].delta.dense(), expected, atol=1e-4, rtol=1e-4)


def test_two_families_are_refused(tmp_path):
    with pytest.raises(FamilyError, match="use one family"):
        stored_delta(
            stored(make_model(), tmp_path / "a"),
            stored(make_model(layers=2), tmp_path / "d"),
            rank=2,
        )


def test_equal_models_are_refused(tmp_path):
    with pytest.raises(FamilyError, match="do not differ"):
        stored_delta(
            stored(make_model(), tmp_path / "a"), stored(make_model(), tmp_path / "d"), rank=2
        )
    model = with_lora(make_model())
    with model.disable_adapter(), pytest.raises(FamilyError, match="do not differ"):
        adapter_delta(make_model(), model)
