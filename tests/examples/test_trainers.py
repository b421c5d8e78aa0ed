"""The four trainers of the example, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from ..conftest import in_groups, task_dataset


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "trainers.py"


@pytest.mark.parametrize("trainer", ["plain", "sft", "dpo", "grpo"])
def test_callback_with_trainer(trainer, model_dir, vector_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "safegene_trl.recalibration.search.objection", lambda before, after, budget: ""
    )
    rows = [
        row
        | {"chosen": row["completion"], "rejected": [{"role": "assistant", "content": "no box"}]}
        for row in task_dataset()
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "max_evaluations": 2,
        "num_test_prompts": 2,
        "max_new_tokens": 2,
        "num_benign_shots": 2,
        "utility_weight": 0.0,
    }
    words = [
        trainer,
        "--model",
        str(model_dir),
        "--vector",
        str(vector_dir),
        "--data",
        str(data),
        "--use_cpu",
    ]
    words += [
        "--output",
        str(tmp_path / "out"),
        "--max_steps",
        "1",
        "--settings",
        json.dumps(in_groups(settings)),
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads((tmp_path / "out" / "safeguarded" / "safegene_report.json").read_text())
    assert report["decision"]["outcome"] == "accepted"
    assert report["data"]["task"]["fit"] == 18 and report["measured"]["utility_loss"]["count"] == 2
    assert report["model"]["kind"] == ("full" if trainer == "plain" else "lora")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "safeguarded")


def test_text_without_a_chat_template_is_trained_on_as_it_is(
    model_dir, vector_dir, tmp_path, monkeypatch
):
    rows = [
        {key: row[key][-1]["content"] for key in ("prompt", "completion")} for row in task_dataset()
    ]
    plain = runpy.run_path(str(SCRIPT))["plain"]
    trainer = plain(str(model_dir), Dataset.from_list(rows), {"output_dir": str(tmp_path)})
    tokenizer, row = trainer.processing_class, trainer.train_dataset[0]
    said = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert said == rows[0]["completion"] + tokenizer.eos_token
    assert tokenizer.decode(row["input_ids"]) == rows[0]["prompt"] + said
