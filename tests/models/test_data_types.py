"""In which data types tensors are written."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from safegene_trl.checkpoints.live_merge import checkpoint_bytes
from safegene_trl.errors import OutputError
from safegene_trl.models.data_types import WrittenTypes, check_range, held_dtypes
from safegene_trl.models.parameters import canonical_parameters

from ..conftest import make_model, small_shape


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("before", "now", "written"),
    [
        (BF16, F32, BF16),  # the host has widened it
        (F16, F32, F16),
        (F32, F32, F32),  # a master that the user has loaded
        (F32, BF16, BF16),  # the host has narrowed it
        (None, F32, F32),  # nobody saw it before
        (None, torch.int64, torch.int64),
    ],
)
def test_auto(before, now, written):
    loaded = {} if before is None else {"w": before}
    assert WrittenTypes(loaded=loaded).of_named("w", now) == written


def test_what_is_asked_goes_before_what_was_loaded():
    types = WrittenTypes(F16, {"w": BF16})
    assert types.of_named("w", F32) == F16
    assert types.of_named("w", torch.int64) == torch.int64


def test_what_transformers_keeps_in_float32_stays_so(tmp_path):
    """Else a model that is loaded in 16 bits would have other numbers in it."""
    shape = small_shape(num_hidden_layers=2, moe_intermediate_size=8, n_routed_experts=4)
    shape |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    shape |= {"qk_nope_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, num_experts_per_tok=2))
    types = WrittenTypes.of_model(model, "bfloat16")
    found = {parameter.name: types.of(parameter) for parameter in canonical_parameters(model)}
    kept = {name for name, dtype in found.items() if dtype == F32}
    model.save_pretrained(tmp_path)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    assert kept == {p.name for p in canonical_parameters(loaded) if p.tensor.dtype == F32}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in kept and len(kept) < 3
    assert set(WrittenTypes.of_model(model, "auto").kept) == set()


def test_bytes_follow():
    model = make_model()
    whole = checkpoint_bytes(model, WrittenTypes())
    assert whole == 4 * sum(p.numel() for p in model.parameters())
    assert checkpoint_bytes(model, WrittenTypes.of_model(model, "bfloat16")) * 2 == whole
    assert set(held_dtypes(model).values()) == {F32} and len(held_dtypes(model)) > 20
    halves = WrittenTypes(loaded=dict.fromkeys(held_dtypes(model), BF16))
    assert checkpoint_bytes(model, halves) * 2 == whole


def test_infinity_that_was_there_is_not_the_types_fault():
    check_range("w", torch.tensor([float("inf"), 1.0]), F16)
    with pytest.raises(OutputError, match="`w` has a number of 7e"):
        check_range("w", torch.tensor([float("inf"), -7e4]), F16)
