"""The touch-up under every way of spreading a model, held against one process that reads the saved
fine-tune.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from safegene_trl import SafeGeneConfig
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.data.shots import gather_shots
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.recalibration import search, touch_up
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.recalibration.touch_up import train_touch_up
from safegene_trl.step.repair import with_touch_up
from safegene_trl.step.shipped_weights import merged_weights
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import ALONE, make_model, make_tokenizer, make_vector, task_dataset
from .launching import run_plans
from .test_backends import saved_fine_tune


pytestmark = pytest.mark.timeout(600)
# within one process a later "DDP" trainer would still be DeepSpeed's
LAUNCHES = [
    [("ddp", False)],
    pytest.param([("zero3", True)], id="zero3"),
    pytest.param(
        [("ddp", True), ("fsdp2", False), ("fsdp2", True)],
        marks=pytest.mark.exhaustive,
        id="fsdp2",
    ),
    pytest.param(
        [("zero3", False), ("zero3_offload", True)], marks=pytest.mark.exhaustive, id="offload"
    ),
]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_ranks_learn_what_one_process_learns(launch, forked, tmp_path, monkeypatch):
    make_vector(make_model(), make_tokenizer()).save_pretrained(tmp_path / "vector")
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    plans = [
        {
            "backend": backend,
            "lora": lora,
            "dtype": "float32",
            "model": str(tmp_path / "model"),
            "vector": str(tmp_path / "vector"),
            "out": str(tmp_path / f"{backend}-{lora}"),
            "config": {"num_test_prompts": 0, "repair": "vector+touch-up"},
        }
        for backend, lora in launch
    ]
    run_plans(forked, tmp_path, plans, timeout=500)
    for module in (search, touch_up):
        monkeypatch.setattr(module, "objection", lambda *losses: "")
    monkeypatch.setattr(touch_up, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(touch_up, "STEPS", 8)
    for backend, lora in launch:
        check(tmp_path, tmp_path / f"{backend}-{lora}", lora)


def check(root, out, lora):
    report = json.loads((out / "result-0.json").read_text())["report"]
    repair, folder = report["repair"], out / "with" / "safeguarded"
    assert report["launch"]["processes"] == 2 and repair["rung"] == "vector+touch-up"
    released = load_file(folder / "touch_up" / "safegene_touch_up.safetensors")

    model = saved_fine_tune(root / "model", out / "with", lora)
    config, vector = (
        SafeGeneConfig(**report["config"]),
        SafetyVector.from_pretrained(root / "vector"),
    )
    space = vector.space(config.search.granularity)
    data = gather_shots(config, vector, make_tokenizer(), 256, task_dataset()).data
    attachment = VectorAttachment(model, vector.deltas, space, ALONE)
    found = recalibrate(attachment, data, config, 0)
    added = ScaledVector(vector.deltas, space.by_module(found.coefficients))

    def ship(deltas):
        return merged_weights(model, with_touch_up(added, deltas), ALONE)

    alone = train_touch_up(attachment, data, config, 0, found, ship)
    assert alone.accepted
    path = [(entry["step"], entry["objective"]) for entry in repair["touch_up"]["held_out_by_step"]]
    assert [step for step, _ in path] == [0, 8]
    for (_, mine), (_, theirs) in zip(alone.held_out_by_step, path, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    losses = repair["touch_up"]["held_out"]["after"]
    assert losses == pytest.approx(alone.held_out.to_dict(), rel=1e-3, abs=1e-5)
    # AdamW's first steps take the sign of gradients near 0, which rounding can turn
    for name, delta in alone.deltas.items():
        for factor, kind in ((delta.a, "A"), (delta.b, "B")):
            own = released[f"{name}.lora_{kind}.weight"]
            assert (
                torch.nn.functional.cosine_similarity(own.flatten(), factor.flatten(), dim=0)
                > 1 - 1e-4
            )
    # what was written gives the logits that were measured
    assert report["shipped"]["logit_distances"]["merged"] <= 1e-5
