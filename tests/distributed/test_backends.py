"""The callback under every backend, held against one process that reads the saved fine-tune."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import __version__ as accelerate_version
from accelerate.utils import convert_outputs_to_fp32
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from safegene_trl import SafeGeneConfig
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.live_merge import save_merged
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.data.shots import gather_shots
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.recalibration import search as recalibration
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import ALONE, make_model, make_tokenizer, make_vector, task_dataset
from .launching import run_plans


pytestmark = pytest.mark.timeout(900)
# DDP runs before DeepSpeed: within one process a later "DDP" trainer would still be DeepSpeed's.
LAUNCHES = [("ddp", "fsdp2"), ("zero1", "zero2", "zero3", "zero3_offload")]
SHARDED = ("zero3", "zero3_offload", "fsdp2")
KINDS = [
    (lora, tied, dtype)
    for lora in (False, True)
    for tied in (True, False)
    for dtype in ("float32", "bfloat16")
]
# One more with every backend: what else a real training turns on.
EXTRA = {
    "ddp": {
        "arguments": {"gradient_checkpointing": True, "bf16": True},
        "config": {"granularity": "module"},
    },
    "fsdp2": {"arguments": {}, "fsdp": {"activation_checkpointing": True}},
    "zero1": {"arguments": {"gradient_accumulation_steps": 2}, "config": {"output_format": "both"}},
    "zero2": {
        "arguments": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
    },
    "zero3": {
        "arguments": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        }
    },
    "zero3_offload": {
        "arguments": {
            "load_best_model_at_end": True,
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": 1,
            "eval_steps": 1,
        }
    },
}


def name_of(backend, lora, tied, dtype, extra=False):
    parts = (
        backend,
        "lora" if lora else "full",
        "tied" if tied else "untied",
        dtype,
        *(("extra",) if extra else ()),
    )
    return "-".join(parts)


BACKENDS = [backend for launch in LAUNCHES for backend in launch]
SCENARIOS = [
    # (With FSDP2's activation checkpointing PEFT saves an empty adapter, whether or not there is a
    # callback.)
    *((backend, backend != "fsdp2", True, "float32", True) for backend in BACKENDS),
    *((backend, *kind, False) for backend in BACKENDS for kind in KINDS),
]
# One of a layout stands for the others: ZeRO-1 and ZeRO-2 leave the weights whole as DDP does,
# offloading shards as ZeRO-3 does.
QUICK = [
    (backend, *kind) for backend in ("ddp", "fsdp2", "zero3") for kind in (KINDS[0], KINDS[-1])
]


def marked(scenario):
    """The whole matrix takes minutes: `make test` runs a quarter of it, `make test-all` the rest."""
    marks = () if scenario[:4] in QUICK or scenario[4] else (pytest.mark.exhaustive,)
    return pytest.param(scenario, marks=marks, id=name_of(*scenario))


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Models of both kinds and types, and a vector for each kind."""
    root = tmp_path_factory.mktemp("family")
    for tied in (True, False):
        make_vector(make_model(tied=tied), make_tokenizer()).save_pretrained(
            root / f"vector-{tied}"
        )
        for dtype in ("float32", "bfloat16"):
            model = make_model(tied=tied).to(getattr(torch, dtype))
            model.save_pretrained(root / f"model-{tied}-{dtype}")
            make_tokenizer().save_pretrained(root / f"model-{tied}-{dtype}")
    return root


@pytest.fixture(scope="session")
def launched(forked, family, tmp_path_factory, request):
    """Runs a launch with all its selected scenarios when the first of them asks for it; gives a
    scenario's folder.
    """
    folders: dict[tuple, Path] = {}
    selected = [
        item.callspec.params.get("scenario")
        for item in request.session.items
        if hasattr(item, "callspec")
    ]

    def folder_of(scenario) -> Path:
        launch = next(pair for pair in LAUNCHES if scenario[0] in pair)
        if launch not in folders:
            folders[launch] = root = tmp_path_factory.mktemp("-".join(launch))
            ours = [
                item
                for backend in launch
                for item in SCENARIOS
                if item[0] == backend and item in selected
            ]
            run_plans(forked, root, [plan_of(family, root, *item) for item in ours], timeout=800)
        return folders[launch] / name_of(*scenario)

    return folder_of


def plan_of(family, root, backend, lora, tied, dtype, extra):
    config = {"num_test_prompts": 8 if extra and backend in ("ddp", "fsdp2", "zero3") else 0}
    plan = {
        "backend": backend,
        "lora": lora,
        "dtype": dtype,
        "model": str(family / f"model-{tied}-{dtype}"),
        "vector": str(family / f"vector-{tied}"),
        "out": str(root / name_of(backend, lora, tied, dtype, extra)),
        "config": config,
    }
    if extra:
        plan |= EXTRA[backend] | {"config": config | EXTRA[backend].get("config", {})}
    return plan


def saved_fine_tune(base: Path, folder: Path, lora: bool):
    """The fine-tune as `save_model()` wrote it, every tensor in the type it was saved in."""
    if not lora:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"), folder
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors
    for name, parameter in model.named_parameters():
        if (key := name.replace(".default.", ".")) in tensors:
            parameter.data = tensors.pop(key)
    assert not tensors
    return model


# accelerate 1.13 means to widen weights as well, and widens a copy of each.
WIDENED = "float32" if Version(accelerate_version) >= Version("1.14") else "bfloat16"
# the fine-tune's weights as loaded; how it is trained; as they are live; asked for; written
TYPES = {
    "fsdp2": [
        ("bfloat16", {"arguments": {"bf16": True}}, WIDENED, "auto", "bfloat16"),
        ("float32", {"arguments": {"bf16": True}}, "float32", "auto", "float32"),
        ("float32", {}, "float32", "float16", "float16"),
    ],
    "zero3": [("float32", {}, "float32", "bfloat16", "bfloat16")],
}


@pytest.mark.parametrize("backend", TYPES)
def test_the_data_type_that_is_written(backend, forked, family, tmp_path):
    plans = []
    for loaded, options, _, asked, written in TYPES[backend]:
        plan = plan_of(family, tmp_path, backend, False, False, loaded, False) | options
        plan["out"] = str(tmp_path / f"{loaded}-{written}")
        plan["config"] = {"output": {"dtype": asked}}
        plans.append(plan)
    run_plans(forked, tmp_path, plans, timeout=800)
    for plan, (_, _, held_as, _, written) in zip(plans, TYPES[backend], strict=True):
        folder, dtype = Path(plan["out"]), getattr(torch, written)
        report = json.loads((folder / "result-0.json").read_text())["report"]
        live = LlamaForCausalLM.from_pretrained(folder / "with", dtype=torch.float32)
        held = load_file(folder / "with" / "model.safetensors")
        assert {tensor.dtype for tensor in held.values()} == {getattr(torch, held_as)}
        vector = SafetyVector.from_pretrained(plan["vector"])
        space = vector.space(report["config"]["search"]["granularity"])
        by_module = space.by_module(report["coefficients"])
        assert any(report["coefficients"].values())
        (folder / "alone").mkdir()
        place = CheckpointFolder(folder / "alone", make_tokenizer(), "5GB")
        save_merged(live, ScaledVector(vector.deltas, by_module), place, ALONE)
        exact, found = load_file(folder / "alone" / "model.safetensors"), {}
        for file in (folder / "with" / "safeguarded").glob("*.safetensors"):
            found |= load_file(file)
        assert found.keys() == exact.keys()
        for name, tensor in exact.items():
            assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name
        named = json.loads((folder / "with" / "safeguarded" / "config.json").read_text())["dtype"]
        assert named == written
        # measured with the very numbers
        assert report["shipped"]["logit_distances"]["merged"] == 0.0


@pytest.mark.parametrize("scenario", map(marked, SCENARIOS))
def test_sharded_equals_one_process(scenario, launched, family, tmp_path, monkeypatch):
    backend, lora, tied, dtype, extra = scenario
    folder = launched(scenario)
    found = json.loads((folder / "result-0.json").read_text())
    report = found["report"]

    # All ranks agree, and where weights are said to be sharded each rank held its half only.
    assert found["same_on_all_ranks"]
    assert found["sharded_share"] == [0.5 if backend in SHARDED else 1.0]
    assert report["launch"]["processes"] == 2
    assert report["launch"]["sharding"] == (
        backend.split("_")[0] if backend in SHARDED else "whole"
    )

    # One process finds the same coefficients, from the same gradients on the same data.
    model = saved_fine_tune(family / f"model-{tied}-{dtype}", folder / "with", lora)
    vector = SafetyVector.from_pretrained(report["config"]["vector"])
    config = SafeGeneConfig(**report["config"])
    shots = gather_shots(config, vector, make_tokenizer(), 256, task_dataset())
    # here from the columns
    reading = {
        "source": "training set",
        "read_by": report["data"]["task"]["read_by"],
    }
    record = shots.record["task"] | reading
    assert set(reading["read_by"]) == {"labels"}
    assert report["data"] == shots.record | {"task": record}
    gradients = []
    monkeypatch.setattr(recalibration, "objection", lambda before, after, budget: "")
    original = recalibration.evaluate_objective

    def recorded(*args):
        evaluated = original(*args)
        gradients.append(evaluated[2])
        return evaluated

    monkeypatch.setattr(recalibration, "evaluate_objective", recorded)
    space = vector.space(config.search.granularity)
    if extra and EXTRA[backend]["arguments"].get("bf16", False):  # as accelerate wraps it
        mixed = torch.autocast("cpu", torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(mixed)
    attachment = VectorAttachment(model, vector.deltas, space, ALONE)
    alone = recalibrate(attachment, shots.data, config, 0)
    if report["launch"]["sharding"] != "zero3":
        np.testing.assert_array_equal(found["gradients"][0]["gradient"], gradients[0])
        assert report["coefficients"] == alone.coefficients
    else:  # its own linear layer rounds differently
        near = 2e-6 if Version(torch.__version__) >= Version("2.9") else 1e-5
        rtol, atol, apart = (2e-7, 2e-8, near) if dtype == "float32" else (1e-2, 1e-3, 0.1)
        np.testing.assert_allclose(found["gradients"][0]["gradient"], gradients[0], rtol, atol)
        assert report["coefficients"] == pytest.approx(alone.coefficients, abs=apart)
        reached = [
            min(entry["objective"] for entry in history)
            for history in (report["history"], alone.history)
        ]
        assert reached[0] == pytest.approx(reached[1], rel=1e-6 if dtype == "float32" else 2e-3)

    # What was written gives the logits that were measured.
    shipped = report["shipped"]["logit_distances"]
    assert shipped["merged"] <= (1e-5 if dtype == "float32" else 0.05)

    # The merged checkpoint is bit by bit the one that one process writes with these coefficients.
    by_module = space.by_module(report["coefficients"])
    save_merged(
        model,
        ScaledVector(vector.deltas, by_module),
        CheckpointFolder(tmp_path, make_tokenizer(), config.output.max_shard_size),
        ALONE,
    )
    written = sorted(path.name for path in (folder / "with" / "safeguarded").glob("*.safetensors"))
    assert (
        written == sorted(path.name for path in tmp_path.glob("*.safetensors")) and len(written) > 2
    )
    for name in written:
        theirs, ours = load_file(folder / "with" / "safeguarded" / name), load_file(tmp_path / name)
        assert theirs.keys() == ours.keys()
        assert all(
            torch.equal(theirs[key], ours[key]) and theirs[key].dtype == ours[key].dtype
            for key in ours
        )
    assert sorted(p.name for p in folder.glob("with/.*")) == []

    # The fine-tune itself is that of a run without the callback, and the live model still trains.
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    with_callback, without = (
        load_file(folder / "with" / weights),
        load_file(folder / "without" / weights),
    )
    assert with_callback.keys() == without.keys() and len(without) > 20
    assert all(torch.equal(with_callback[key], without[key]) for key in without)
    assert found["trainable"][0] == found["trainable"][1] and len(found["trainable"][0]) > 20
    assert found["loss_again"] > 0
