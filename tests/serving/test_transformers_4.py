"""What the step writes is read by the newest transformers 4 as by this one. `make test-serving`
brings it, beside the environment's own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from safegene_trl import SafeGeneCallback
from safegene_trl.checkpoints.portable_files import save_config

from ..conftest import config_of, make_vector, small_shape
from ..test_callback import sft


OTHER = os.environ.get("SAFEGENE_TRANSFORMERS_4")
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# a rotary base that is not the default one: who misses it answers something else
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA_3),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"rope_type": "default", "rope_theta": 100.0}),
}
pytestmark = pytest.mark.skipif(not OTHER, reason="`make test-serving` brings transformers 4")


def read(folder, *paths):
    """As whatever stands first in `paths` reads it."""
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("load.py")), str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", MODELS)
def test_version_4_answers_the_same(kind, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *args: "")
    config, architecture, rotary = MODELS[kind]
    model = architecture(
        config(**small_shape(rope_parameters=rotary, head_dim=16, max_position_embeddings=512))
    )
    base, vector = tmp_path / "base", tmp_path / "vector"
    model.save_pretrained(base)
    save_config(model.config, base)  # else version 4 misreads the adapter's base
    tokenizer.save_pretrained(base)
    make_vector(model, tokenizer).save_pretrained(vector)
    callback = SafeGeneCallback(
        config_of(
            vector=str(vector),
            max_evaluations=2,
            num_test_prompts=2,
            max_new_tokens=2,
            min_coefficient=0.2,
            output_format="both",
        )
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    out = tmp_path / "out"
    trainer = sft(
        out,
        [callback],
        tokenizer,
        model=architecture.from_pretrained(base),
        peft_config=lora,
        gradient_checkpointing=True,
    )
    trainer.train()
    newer, older = read(out / "safeguarded"), read(out / "safeguarded", OTHER)
    assert newer["version"][0] == "5" and older["version"][0] == "4"
    for key in ("merged", "adapter"):
        assert older[key] == pytest.approx(newer[key], abs=1e-4)
    for key in ("prompt", "words", "ends", "answer", "use_cache"):
        assert older[key] == newer[key]
    assert older["use_cache"] is True
