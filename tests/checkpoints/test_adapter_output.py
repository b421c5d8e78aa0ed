"""Folded adapters give the hooked model's logits."""

import json

import pytest
import torch
from peft import PeftModel

from safegene_trl.checkpoints.adapter_output import save_adapter
from safegene_trl.checkpoints.merge_terms import ScaledVector

from ..conftest import ALONE, make_deltas, make_model, with_lora
from .test_live_merge import IDS, hooked_logits, random_coefficients


@pytest.mark.parametrize("lora", [True, False])
def test_adapter_equals_hooked_model(lora, tokenizer, tmp_path):
    base = make_model("qwen2")
    deltas = make_deltas(base)
    model = with_lora(make_model("qwen2")) if lora else base
    coefficients = random_coefficients(deltas)
    save_adapter(model, ScaledVector(deltas, coefficients), "base", tokenizer, tmp_path, ALONE)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == (6 if lora else 2)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    adapted = PeftModel.from_pretrained(make_model("qwen2"), tmp_path)
    torch.testing.assert_close(
        adapted(IDS).logits, hooked_logits(model, deltas, coefficients), atol=1e-5, rtol=1e-5
    )
