"""What a GPU works out is what a CPU works out, losses, coefficients and answers of the same
float32 weights; and nothing is copied to it that is there.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gpu.measuring import measure
from benchmarks.gpu.rows import Row
from benchmarks.gpu.settings import Given
from safegene_trl import SafeGeneConfig, apply
from safegene_trl.checkpoints import staging
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.weight_files import WeightFiles
from safegene_trl.commands.main import main
from safegene_trl.data.shots import gather_shots
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.evaluation.evaluate import GENERATIONS, RESULT
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.models.coefficients import CoefficientSpace
from safegene_trl.models.generation import generate_answers
from safegene_trl.provenance import sha256_of_file
from safegene_trl.recalibration.search import recalibrate

from ..conftest import ALONE, HARMFUL, argv, config_of, make_model, with_lora
from ..recalibration.test_search import calibration_set, helpful_deltas
from .conftest import PHASES, check_report, check_shipped


pytestmark = pytest.mark.gpu
# Of float32: sums are added up in another order. A search is a few smooth steps away from that.
# (Weights that differ by 1e-6 move coefficients by less than 1e-5.)
LOSS, COEFFICIENT = 1e-4, 1e-3
# so that no coefficient ends at a bound, where it would be the same on any device
INSIDE = {"utility_weight": 20.0, "sparsity_weight": 0.05, "max_utility_loss": 100.0}


def searched(model, deltas, data, device):
    space = CoefficientSpace.of(deltas, [8], "module")
    attachment = VectorAttachment(model.to(device), deltas, space, Sharding(device))
    return recalibrate(attachment, data, config_of(vector="v", **INSIDE), 0)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_coefficients_are_those_of_a_cpu(lora, device):
    data = calibration_set()
    deltas = helpful_deltas(make_model(), data, layers=(0, 1, 2))

    def fresh():
        return with_lora(make_model()) if lora else make_model()

    expected = searched(fresh(), deltas, data, torch.device("cpu"))
    found = searched(fresh(), deltas, data, device)
    assert found.accepted and found.scale == expected.scale == 1.0
    assert len(found.history) == len(expected.history) > 2
    assert all(0.01 < value < 1.99 for value in expected.coefficients.values())
    assert found.coefficients == pytest.approx(expected.coefficients, abs=COEFFICIENT)
    for before, after in zip(expected.history, found.history, strict=True):
        assert after["objective"] == pytest.approx(before["objective"], rel=10 * LOSS)
    # the same point: no search lies between
    assert found.history[0] == {
        key: pytest.approx(value, rel=LOSS) for key, value in expected.history[0].items()
    }
    assert found.held_out_before.to_dict() == pytest.approx(
        expected.held_out_before.to_dict(), rel=LOSS, abs=1e-6
    )


def test_apply_finds_the_coefficients_of_a_cpu(
    device, every_vector_helps, vectors, model_dir, task_file, tokenizer, tmp_path
):
    place, vector = vectors
    shots = {"num_safety_shots": 8, "num_task_shots": 8, "num_benign_shots": 4}
    quick = {"max_evaluations": 3, "max_utility_loss": 100.0, "max_new_tokens": 4}
    config = config_of(
        vector=str(place),
        task_data=str(task_file),
        output_dir=str(tmp_path / "out"),
        num_test_prompts=4,
        **shots,
        **quick,
    )
    report = apply(config, str(model_dir))
    check_report(report, PHASES - {"keep"})
    check_shipped(report, torch.float32)
    again = SafeGeneConfig(**report["config"])
    drawn = gather_shots(again, vector, tokenizer, 256, None)
    space = vector.space(again.search.granularity)
    attachment = VectorAttachment(make_model(), vector.deltas, space, ALONE)
    alone = recalibrate(attachment, drawn.data, again, tokenizer.pad_token_id)
    assert report["coefficients"] == pytest.approx(alone.coefficients, abs=COEFFICIENT)
    objectives = [
        [entry["objective"] for entry in side] for side in (report["history"], alone.history)
    ]
    np.testing.assert_allclose(*objectives, rtol=10 * LOSS)


def test_evaluate_answers_as_a_cpu_does(device, model_dir, tokenizer, tmp_path):
    prompts = tmp_path / "forbidden.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in HARMFUL))
    options = {
        "model_name_or_path": model_dir,
        "harmful_data": prompts,
        "max_new_tokens": 8,
        "output_dir": tmp_path / "out",
    }
    assert main(argv("evaluate", options)) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / GENERATIONS).read_text().splitlines()]
    messages = [[{"role": "user", "content": text}] for text in HARMFUL]
    expected = generate_answers(make_model(), tokenizer, messages, 8, 4, ALONE)
    assert sorted(row["answer"] for row in rows) == sorted(expected)
    result = json.loads((tmp_path / "out" / RESULT).read_text())
    labels = result["judges"]["refusal_phrases"]["sets"]["forbidden"]["labels"]
    assert sum(labels.values()) == len(HARMFUL)


def test_resident_factors_are_not_copied_again(device, tmp_path):
    figures = measure(
        Row("tiny", "components", "attached"), Given(None, None, tmp_path), lambda known: None
    )
    assert figures["factors"]["place"] == "resident"
    for copies in (figures["copies_per_pass"], figures["copies_per_token"]):
        assert copies["of_factors"] == 0
        # what the model itself brings to the device is its own
        assert copies["with_vector"] == copies["without"]
    # in and out of the host's memory: both factors of every module, once
    brought = figures["copies_of_the_first_pass"]
    assert brought["of_factors"] == 28
    if device.type == "cuda":
        assert brought["with_vector"] >= 2 * 28


def test_weight_files_hold_what_is_on_the_device(device, tmp_path, monkeypatch):
    """Through page-locked buffers that are used many times, in several pieces a tensor."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 2**16)
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    tensors = {
        f"{dtype}-{rows}": (100 * torch.randn(rows, 513, device=device)).to(dtype)
        for dtype in dtypes
        for rows in (0, 1, 300, 1000)
    }
    contents = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    folder = CheckpointFolder(tmp_path, None, "1MB")
    with WeightFiles(folder, contents) as files:
        for name in contents:
            files.write(name, tensors[name].clone())  # whose memory the next one takes
        files.complete()
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
        assert folder.digests[path.name] == sha256_of_file(path)
    assert found.keys() == tensors.keys() and len(folder.digests) > 2
    assert all(torch.equal(found[name], tensor.cpu()) for name, tensor in tensors.items())
