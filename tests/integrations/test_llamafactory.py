"""The example for LLaMA-Factory; `make test-integrations` runs it where that is installed, in an
environment of its own.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from ..conftest import TASK


pytest.importorskip("llamafactory")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "llamafactory_sft.py"


def test_training_ends_with_the_safety_step(model_dir, vector_dir, tmp_path, monkeypatch):
    rows = [
        {"instruction": text, "input": "", "output": f"box {i % 3}"} for i, text in enumerate(TASK)
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"boxes": {"file_name": "boxes.json"}}))
    recipe = {
        "model_name_or_path": str(model_dir),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "dataset": "boxes",
        "dataset_dir": str(tmp_path),
        "template": "empty",
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "preprocessing_num_workers": 1,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
    settings = {
        "search": {"max_evaluations": 1},
        "measure": {"num_test_prompts": 2},
        "gate": {"max_over_refusal": 1.0},
    }
    words = [
        str(tmp_path / "train.yaml"),
        "--vector",
        str(vector_dir),
        "--settings",
        json.dumps(settings),
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads((tmp_path / "out" / "safeguarded" / "safegene_report.json").read_text())
    assert report["decision"]["outcome"] == "accepted" and report["model"]["kind"] == "lora"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "safeguarded")
