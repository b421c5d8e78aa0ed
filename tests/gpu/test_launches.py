"""One process under ZeRO-2, ZeRO-3 and FSDP2, over NCCL, by the worker of `tests/distributed`; on a
CPU two processes over gloo.
"""

import json
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from safegene_trl import SafeGeneConfig
from safegene_trl.data.shots import gather_shots
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import make_model, make_tokenizer, make_vector, task_dataset
from ..distributed.launching import ON_GPU, run_plans, start
from ..distributed.test_backends import SHARDED, name_of, plan_of, saved_fine_tune
from .conftest import PHASES, check_report


pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
LAUNCHES = [("ddp", "fsdp2"), ("zero2", "zero3")]  # DDP runs before DeepSpeed
DTYPES = {"fsdp2": "float32", "zero2": "bfloat16", "zero3": "float32", "ddp": "bfloat16"}
COEFFICIENT = {"float32": 2e-3, "bfloat16": 0.1}  # kernels of another kind round differently


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    make_vector(make_model(), make_tokenizer()).save_pretrained(root / "vector-True")
    for dtype in ("float32", "bfloat16"):
        folder = root / f"model-True-{dtype}"
        make_model().to(getattr(torch, dtype)).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return root


@pytest.fixture(scope="module")
def launched(family, device, tmp_path_factory):
    """A backend's folder, its launch run when the first of it is asked for."""
    roots = {}
    processes, environment = (1, ON_GPU) if device.type == "cuda" else (2, {})

    def folder_of(backend):
        launch = next(names for names in LAUNCHES if backend in names)
        if launch not in roots:
            roots[launch] = root = tmp_path_factory.mktemp("-".join(launch))
            plans = [
                plan_of(family, root, name, True, True, DTYPES[name], False) for name in launch
            ]
            for plan in plans:
                plan["config"] = {"num_test_prompts": 4}
            run_plans(partial(start, environment=environment), root, plans, 300, processes)
        name = name_of(backend, True, True, DTYPES[backend])
        return roots[launch] / name, processes

    return folder_of


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_launch_finds_what_one_plain_process_finds(
    backend, device, family, launched, monkeypatch
):
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("ZeRO needs the package `deepspeed`.")
    folder, processes = launched(backend)
    found, dtype = json.loads((folder / "result-0.json").read_text()), DTYPES[backend]
    report = found["report"]
    check_report(report, PHASES)
    assert report["launch"] == {
        "sharding": backend if backend in SHARDED else "whole",
        "processes": processes,
    }
    assert found["sharded_share"] == [1 / processes if backend in SHARDED else 1.0]
    assert found["same_on_all_ranks"] and found["loss_again"] > 0
    limit = 1e-5 if dtype == "float32" else 0.05
    assert report["shipped"]["logit_distances"]["merged"] <= limit

    # one process on the same device, from what was saved
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *args: "")
    model = saved_fine_tune(family / f"model-True-{dtype}", folder / "with", True).to(device)
    vector, config = (
        SafetyVector.from_pretrained(report["config"]["vector"]),
        SafeGeneConfig(**report["config"]),
    )
    shots = gather_shots(config, vector, make_tokenizer(), 256, task_dataset())
    space = vector.space(config.search.granularity)
    attachment = VectorAttachment(model, vector.deltas, space, Sharding(device))
    alone = recalibrate(attachment, shots.data, config, 0)
    assert report["coefficients"] == pytest.approx(alone.coefficients, abs=COEFFICIENT[dtype])
    rel = 1e-4 if dtype == "float32" else 1e-2
    assert report["history"][0]["objective"] == pytest.approx(
        alone.history[0]["objective"], rel=rel
    )
