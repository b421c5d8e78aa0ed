"""Folded adapters give the hooked model's logits."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from safegene_trl.checkpoints.adapter_output import save_adapter
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.live_merge import save_merged
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


def several(model):
    """Two adapters that act together."""
    other = LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    model = with_lora(model)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    return model


LORAS = {
    "rsLoRA": lambda model: with_lora(model, use_rslora=True),
    "several": several,
    "on the head": lambda model: with_lora(model, target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("kind", LORAS)
def test_loras_of_other_kinds_are_written_as_they_compute(kind, tokenizer, tmp_path):
    def base():
        return make_model("qwen2", tied=False)

    deltas, model = make_deltas(base()), LORAS[kind](base()).eval()
    vector = ScaledVector(deltas, random_coefficients(deltas))
    expected = hooked_logits(model, deltas, vector.coefficients)
    with torch.no_grad(), model.disable_adapter():
        assert (model(IDS).logits - expected).abs().max() > 0.1
    (tmp_path / "merged").mkdir()
    save_merged(model, vector, CheckpointFolder(tmp_path / "merged", tokenizer, "5GB"), ALONE)
    save_adapter(model, vector, "base", tokenizer, tmp_path / "adapter", ALONE)
    for written in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(base(), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(written(IDS).logits, expected, atol=1e-4, rtol=1e-4)
