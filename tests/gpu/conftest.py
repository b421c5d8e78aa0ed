"""The device that these tests run on, and what each of them asks of a safety step."""

import os

import pytest
import torch
from jsonschema import validate
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safegene_trl.reporting.report import SCHEMA

from ..conftest import make_model, make_vector


ON_CPU = os.environ.get("SAFEGENE_GPU_TESTS_ON_CPU") == "1"
PHASES = {"prepare", "keep", "recalibrate", "measure", "save", "verify"}
# several cards would share out the batches of a training
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


@pytest.fixture(scope="session")
def device():
    """A GPU, or the CPU where that is asked for."""
    if ON_CPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("No GPU here: SAFEGENE_GPU_TESTS_ON_CPU=1 runs these tests on the CPU.")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def with_a_device(device):
    """Without one every test is skipped, whatever it asks for."""


@pytest.fixture
def every_vector_helps(monkeypatch):
    """A random vector on a random model helps by luck only."""
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *args: "")


@pytest.fixture
def vectors(tokenizer, vector_dir):
    """Folder and content of a vector of the tiny family."""
    return vector_dir, make_vector(make_model(), tokenizer)


def check_report(report, phases=frozenset(PHASES)):
    """It is complete, and what was shipped is what was measured."""
    validate(report, SCHEMA)
    assert report["status"] == "safeguarded" and set(report["phases"]) == phases
    assert any(report["coefficients"].values()) and report["history"]
    assert report["measured"]["before"] and report["measured"]["after"]
    assert all(report["files"].values())


def check_shipped(report, dtype, kinds=("merged", "reloaded")):
    """Logits of what was written, put in place again, are those that were measured.

    How far a fresh model's may be from a live one's, with its autocast and fused kernels, is up to
    the step, which fails beyond that.
    """
    distances = report["shipped"]["logit_distances"]
    assert set(distances) == set(kinds)
    assert distances["merged"] <= (1e-4 if dtype == torch.float32 else 0.02)
    rounding = report["shipped"]["rounding"]
    assert rounding["changed_weights"] > 0 and rounding["kept"] > 0.9


def check_weights(trainer, report, vector, folder, dtype):
    """Every written tensor is that of the fine-tune plus λ·V, worked out here in float32 on the
    CPU, but for the last bit of its data type.
    """
    trainer.save_model()
    plain = make_model().to(dtype).float()
    if isinstance(trainer.model, PeftModel):
        plain = PeftModel.from_pretrained(plain, trainer.args.output_dir).merge_and_unload()
    else:
        plain = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir, dtype=torch.float32)
    by_module = vector.space(report["config"]["search"]["granularity"]).by_module(
        report["coefficients"]
    )
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            change = delta.b @ (by_module[name][:, None] * delta.a)
            plain.get_submodule(name).weight += change
    expected, close = plain.state_dict(), 2 * torch.finfo(dtype).eps
    found = {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    assert len(found) > 20
    for name, tensor in found.items():
        assert tensor.dtype == dtype, name
        torch.testing.assert_close(
            tensor.float(), expected[name].float(), rtol=close, atol=max(close / 50, 1e-6)
        )
