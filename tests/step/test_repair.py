"""How far a repair goes: when a touch-up is trained, when it is released, and what is released."""

import hashlib
import json
from collections import Counter

import pytest
import torch
from jsonschema import validate
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safegene_trl import SafeGeneCallback
from safegene_trl.errors import ConfigError
from safegene_trl.recalibration import touch_up as touching
from safegene_trl.reporting.report import SCHEMA
from safegene_trl.step import live_fine_tune
from safegene_trl.step.history import read_history
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import config_of, make_model
from ..test_callback import IDS, expected_logits, sft


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
FILE = "touch_up/safegene_touch_up.safetensors"
BOTH = "vector+touch-up"


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """At a rate at which a tiny model moves within a few steps."""
    monkeypatch.setattr(touching, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(touching, "STEPS", 16)


@pytest.fixture
def config(vector_dir):
    def make(**values):
        quick = {
            "max_utility_loss": 100.0,
            "utility_weight": 0.0,
            "max_evaluations": 3,
            "num_test_prompts": 2,
            "max_new_tokens": 2,
            "repair": BOTH,
        }
        return config_of(**{"vector": str(vector_dir)} | quick | values)

    return make


def touched_up(folder, name):
    """What a released touch-up adds to a module's weight."""
    factors = load_file(folder / FILE)
    return factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]


def with_touch_up(trainer, report, vector, folder):
    """Logits of the saved fine-tune with λ·V and the released touch-up, computed from scratch."""
    for name, delta in vector.deltas.items():
        extra = touched_up(folder, name)
        left, right = torch.linalg.qr(extra)
        assert torch.allclose(left @ right, extra, atol=1e-5)
    expected = expected_logits(trainer, report, vector)
    return expected


@pytest.mark.parametrize(
    ("lora", "output_format"),
    [(False, "merged"), (True, "both"), pytest.param(False, "adapter", marks=pytest.mark.exhaustive)],
)
def test_what_is_released_is_the_fine_tune_with_vector_and_touch_up(
    lora, output_format, config, tokenizer, tmp_path, vector_dir
):
    callback = SafeGeneCallback(config(output_format=output_format, output={"history": str(tmp_path / "line.jsonl")}))
    make_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = sft(tmp_path, [callback], tokenizer, model=model, peft_config=LORA if lora else None)
    trainer.train()
    report, folder = callback.report, tmp_path / "safeguarded"
    print(json.dumps(report["repair"], indent=1), report["held_out"], report["decision"])
    validate(report, SCHEMA)
