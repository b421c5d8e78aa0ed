"""Distillation of a safety vector in two processes: whole models and ZeRO-3 shards give one vector."""

import json

import pytest
import torch

from safegene_trl.commands.main import main
from safegene_trl.models.inputs import batches, tokenize
from safegene_trl.models.losses import cross_entropy
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import BENIGN, HARMFUL, make_model, make_tokenizer, with_lora
from .launching import MODULE


pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def extraction(tmp_path_factory):
    """Options of an extraction; the aligned model has learned by heart to refuse and to answer."""
    root = tmp_path_factory.mktemp("extraction")
    torch.manual_seed(0)
    tokenizer, model = make_tokenizer(), make_model()
    turns = [(prompt, "i cannot help with that.") for prompt in HARMFUL] + [
        (prompt, "take a pan.") for prompt in BENIGN
    ]
    samples = [
        tokenize(tokenizer, [{"role": "user", "content": prompt}], answer)
        for prompt, answer in turns
    ]
    (batch,) = batches(samples, len(samples), 0, torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = cross_entropy(model, batch).sum() / batch.target_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(root / "aligned")
    tokenizer.save_pretrained(root / "aligned")
    degraded = with_lora(model)
    degraded.peft_config["default"].base_model_name_or_path = str(root / "aligned")
    degraded.save_pretrained(root / "degraded")
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        )
    options = {
        "aligned_model": root / "aligned",
        "degraded_model": root / "degraded",
        "harmful_data": root / "harmful.jsonl",
        "benign_data": root / "benign.jsonl",
        "rank": 2,  # half the LoRA's, or the student would be the aligned model from the start
        "method": "distill",
        "distill_steps": 4,
        "distill_learning_rate": 1e-2,
        "selection": "gradient",
        "layer_share": 0.67,
        "batch_size": 3,
        "max_new_tokens": 12,
        "weights_dtype": "float32",
    }
    return [item for key, value in options.items() for item in (f"--{key}", str(value))]


@pytest.mark.exhaustive
def test_two_processes_make_one_vector(extraction, forked, tmp_path):
    for config in ("zero3", "ddp"):
        launch = [*MODULE, "extract", "--accelerate_config", config, "--num_processes", "2"]
        done = forked([*launch, *extraction, "--output_dir", str(tmp_path / config)])
        assert done.returncode == 0, done.stdout[-6000:]
    assert main(["extract", *extraction, "--output_dir", str(tmp_path / "alone")]) == 0
    sharded, whole, alone = (
        SafetyVector.from_pretrained(tmp_path / name) for name in ("zero3", "ddp", "alone")
    )
    assert sharded.prompts == whole.prompts == alone.prompts and len(alone.prompts) > 12
    # Two ranks learn from two batches a step, one from one: where they start is the same, where
    # they end is not.
    records = [vector.extraction["distillation"] for vector in (sharded, whole, alone)]
    assert [record["processes"] for record in records] == [2, 2, 1]
    for kind in ("harmful", "benign"):
        before, after = ([record[when][kind] for record in records] for when in ("before", "after"))
        assert before == pytest.approx([before[2]] * 3, abs=1e-4)
        assert after[0] == pytest.approx(after[1], abs=1e-3)
    assert records[2]["after"]["harmful"] < records[2]["before"]["harmful"]
    assert sharded.layers == whole.layers
    for name, delta in whole.deltas.items():
        assert torch.allclose(sharded.deltas[name].a, delta.a, atol=1e-4)
        assert torch.allclose(sharded.deltas[name].b, delta.b, atol=1e-4)


@pytest.mark.exhaustive  # in one process: tests/extraction/test_linearization.py
def test_linear_blocks_are_refused_under_zero3(extraction, forked, tmp_path):
    launch = [*MODULE, "extract", "--accelerate_config", "zero3", "--num_processes", "2"]
    words = ["linearized" if word == "distill" else word for word in extraction]
    options = [*words, "--output_dir", str(tmp_path / "vector")]
    done = forked([*launch, *options])
    assert done.returncode == 2, done.stdout[-6000:]
    assert "launch with `ddp`" in done.stdout and not (tmp_path / "vector").exists()


@pytest.mark.exhaustive  # in one process: tests/extraction/test_by_category.py
def test_two_processes_make_one_vector_by_category(extraction, forked, tmp_path):
    rows = [{"prompt": text, "category": "things"} for text in HARMFUL]
    rows += [{"prompt": f"how do i forge paper {i}", "category": "a/b"} for i in range(9)]
    (tmp_path / "by.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = extraction.index("--harmful_data") + 1
    words = [*extraction[:place], str(tmp_path / "by.jsonl"), *extraction[place + 1 :]]
    words[words.index("--method") + 1] = "delta"
    words += ["--by_category", "true"]
    launch = [*MODULE, "extract", "--accelerate_config", "zero3", "--num_processes", "2"]
    done = forked([*launch, *words, "--output_dir", str(tmp_path / "zero3")])
    assert done.returncode == 0, done.stdout[-6000:]
    assert main(["extract", *words, "--output_dir", str(tmp_path / "alone")]) == 0
    sharded, alone = (SafetyVector.from_pretrained(tmp_path / name) for name in ("zero3", "alone"))
    assert sharded.component_names == ["shared", "a_b", "things"] == alone.component_names
    assert sharded.layers == alone.layers and sharded.rank == 4
    records = [vector.extraction["by_category"] for vector in (sharded, alone)]
    assert (
        records[0]["modules"] == records[1]["modules"] == {"split": len(alone.deltas), "whole": 0}
    )
    for name, delta in alone.deltas.items():
        assert torch.allclose(sharded.deltas[name].a, delta.a, atol=1e-3)
        assert torch.allclose(sharded.deltas[name].b, delta.b, atol=1e-3)
