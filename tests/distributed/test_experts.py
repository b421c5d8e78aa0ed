"""Mixtures of experts in two processes that share out their weights, held against one process that
reads the saved fine-tune.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from safegene_trl import SafeGeneConfig
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.live_merge import save_merged
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.data.shots import gather_shots
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.models.experts import can_be_changed, matrix_shapes
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.names import shared_parameter
from safegene_trl.models.parameters import canonical_modules
from safegene_trl.recalibration import search as recalibration
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.vectors.safety_vector import SafetyVector

from ..architectures import make_architecture
from ..conftest import ALONE, make_tokenizer, make_vector, task_dataset
from .launching import run_plans
from .test_backends import saved_fine_tune


pytestmark = pytest.mark.timeout(900)
FINE_TUNES = [("mixtral", False), ("qwen3_moe", True)]  # and whether by a LoRA


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A mixture of each kind, and a vector on its linear layers and experts."""
    root = tmp_path_factory.mktemp("mixtures")
    for kind, _ in FINE_TUNES:
        model = make_architecture(kind)
        generator = torch.Generator().manual_seed(3)
        deltas = {
            name: LowRankDelta(
                torch.randn(2, shape[1], generator=generator) * 0.1,
                torch.randn(shape[0], 2, generator=generator) * 0.1,
            )
            for name, shape in matrix_shapes(canonical_modules(model)).items()
            if can_be_changed(name)
        }
        assert sum(bool(shared_parameter(name)) for name in deltas) == 2 * 2 * 4
        vector = make_vector(model, make_tokenizer(), deltas)
        vector.selection |= {"selected_layers": [0, 1], "scores": [0.0, 0.1]}
        vector.save_pretrained(root / f"vector-{kind}")
        model.save_pretrained(root / f"model-{kind}")
        make_tokenizer().save_pretrained(root / f"model-{kind}")
    return root


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_sharded_experts_equal_one_process(backend, forked, families, tmp_path, monkeypatch):
    plans = [
        {
            "backend": backend,
            "lora": lora,
            "dtype": "float32",
            # all linear layers are the router too for PEFT, which is refused by name
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "model": str(families / f"model-{kind}"),
            "vector": str(families / f"vector-{kind}"),
            "out": str(tmp_path / kind),
            "config": {"granularity": "module", "num_test_prompts": 4},
        }
        for kind, lora in FINE_TUNES
    ]
    run_plans(forked, tmp_path, plans, timeout=800)
    monkeypatch.setattr(recalibration, "objection", lambda before, after, budget: "")
    for kind, lora in FINE_TUNES:
        folder = tmp_path / kind
        found = json.loads((folder / "result-0.json").read_text())
        report = found["report"]
        assert found["same_on_all_ranks"] and found["sharded_share"] == [
            pytest.approx(0.5, abs=0.01)
        ]
        assert report["launch"]["sharding"] == backend
        model = saved_fine_tune(families / f"model-{kind}", folder / "with", lora)
        vector = SafetyVector.from_pretrained(report["config"]["vector"])
        config = SafeGeneConfig(**report["config"])
        shots = gather_shots(config, vector, make_tokenizer(), 256, task_dataset())
        space = vector.space("module")
        attachment = VectorAttachment(model, vector.deltas, space, ALONE)
        alone = recalibrate(attachment, shots.data, config, 0)
        assert any("experts" in name and value for name, value in alone.coefficients.items())
        if backend == "fsdp2":
            assert report["coefficients"] == alone.coefficients
        else:  # its own linear layer rounds differently
            assert report["coefficients"] == pytest.approx(alone.coefficients, abs=1e-5)
        assert report["shipped"]["logit_distances"]["merged"] <= 1e-5
        by_module = space.by_module(report["coefficients"])
        (folder / "alone").mkdir()
        place = CheckpointFolder(folder / "alone", make_tokenizer(), "5GB")
        save_merged(model, ScaledVector(vector.deltas, by_module), place, ALONE)
        ours, theirs = load_file(folder / "alone" / "model.safetensors"), {}
        for file in (folder / "with" / "safeguarded").glob("*.safetensors"):
            theirs |= load_file(file)
        assert theirs.keys() == ours.keys() and any("experts" in name for name in ours)
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
        assert found["loss_again"] > 0
