"""What the benchmarks' tests share: a family on disk with a tiny random model."""

import json
from dataclasses import replace

import pytest

from benchmarks.paper_table import families, lab, methods, tasks, vectors
from benchmarks.paper_table.families import FAMILIES, Family
from safegene_trl.commands.main import main as safegene

from ..conftest import BENIGN, TASK, make_model, make_vector


@pytest.fixture
def tiny(tmp_path, monkeypatch, tokenizer) -> Family:
    """A family on disk, with prepared data, vectors and the data sets; `safegene` runs in this
    process.
    """
    model = make_model()
    model.save_pretrained(tmp_path / "aligned")
    tokenizer.save_pretrained(tmp_path / "aligned")
    family = Family("tiny", str(tmp_path / "aligned"), steps=2, rank=4, max_length=64)
    monkeypatch.setitem(FAMILIES, "tiny", family)
    monkeypatch.setattr(families, "WORK", tmp_path / "work")
    for module in (lab, vectors):
        monkeypatch.setattr(module, "MODELS", tmp_path)
    vector = make_vector(model, tokenizer)
    vector = replace(vector, aligned_model=vector.aligned_model | {"name": family.aligned})
    for name in ("three components", "puzzles"):
        vector.save_pretrained(family.work / "vectors" / name)
    for name in ("align", "safety_prompts", "benign_prompts"):
        written(tmp_path / f"{name}.jsonl", [{"prompt": f"a prompt that {name} has"}])
    harmful = [{"prompt": f"how do i hide object {i}"} for i in range(60)]
    written(tmp_path / "data/harmful/beavertails_eval_dev.jsonl", harmful[:30])
    written(tmp_path / "data/harmful/harmbench_val.jsonl", harmful[30:])
    benign = [{"prompt": text, "category": "Requests with safety concerns"} for text in BENIGN]
    written(tmp_path / "data/benign/oktest.jsonl", benign)
    written(tmp_path / "data/benign/coconot_contrast.jsonl", benign)
    rows = [tasks.turn(text, "positive") for text in TASK]
    for part in ("train", "test"):
        written(tmp_path / f"data/tasks/sst2_{part}.jsonl", rows)
    for module in (tasks, vectors, methods):
        monkeypatch.setattr(module, "safegene", in_process)
    return family


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_process(*words):
    assert safegene(list(map(str, words))) == 0
