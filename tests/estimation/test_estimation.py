"""Estimates against what the steps take: operations in place of seconds, which
`benchmarks/estimation.py` measures, and bytes.
"""

import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from safegene_trl import SafetyVector
from safegene_trl.commands.estimate import table
from safegene_trl.commands.main import main
from safegene_trl.data.shots import gather_shots
from safegene_trl.errors import SafeGeneError
from safegene_trl.estimation import safeguard as estimation_of_safeguard
from safegene_trl.estimation import stored_merge
from safegene_trl.estimation.cost import Launch
from safegene_trl.estimation.planned_run import PlannedRun
from safegene_trl.estimation.probe import Probe, _Allocations
from safegene_trl.estimation.safeguard import estimate_safeguard
from safegene_trl.models.attachment import VectorAttachment, recomputed_layers
from safegene_trl.recalibration import touch_up
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.recalibration.touch_up import train_touch_up
from safegene_trl.step.live_fine_tune import safeguard
from safegene_trl.step.plan import InputModel, Origin
from safegene_trl.step.preparation import prepare

from ..conftest import (
    ALONE,
    ARCHITECTURES,
    BENIGN,
    HARMFUL,
    config_of,
    make_model,
    make_vector,
    refusing,
    small_shape,
    with_lora,
)
from ..extraction.transport import planted


LAYERS = 4
ONE = Launch()


@pytest.fixture(scope="module")
def model():
    return llama(LAYERS)


def llama(layers):
    torch.manual_seed(0)
    width = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    config = LlamaConfig(
        **small_shape(
            **width,
            **heads,
            num_hidden_layers=layers,
            max_position_embeddings=512,
            eos_token_id=1999,
        )
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def settings(tmp_path):
    long = [
        {"prompt": "sort " + "item into box " * 20, "response": "into a box " * 8}
        for _ in range(24)
    ]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    return config_of(
        vector=str(tmp_path / "vector"),
        task_data=str(tmp_path / "task.jsonl"),
        output_dir=str(tmp_path / "out"),
        num_safety_shots=12,
        num_task_shots=24,
        num_benign_shots=8,
        max_evaluations=3,
        max_utility_loss=1e9,
        max_new_tokens=8,
        allow_other_base=True,
    )


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr("safegene_trl.estimation.probe.REPETITIONS", 1)


@pytest.fixture
def operation_clock(monkeypatch):
    """Counts floating-point operations in place of seconds: a step takes the same number every
    time.
    """
    monkeypatch.setattr(Probe, "_seconds", lambda probe, run: operations(run))


def vector_for(model, tokenizer, settings, layers):
    vector = make_vector(model, tokenizer, layers=layers, std=0.01)
    vector.selection["selected_layers"] = list(layers)
    vector.save_pretrained(settings.vector)
    return vector


def prepared(model, tokenizer, settings):
    input_model = InputModel(model, tokenizer, Origin(None, None, "full"))
    return prepare(settings, input_model, Path(settings.output.output_dir), ALONE)


def estimated(model, tokenizer, settings, vector, launch=ONE):
    shots = gather_shots(settings, vector, tokenizer, None, None)
    return estimate_safeguard(Probe(model, "float32"), settings, vector, tokenizer, shots, launch)


@pytest.mark.parametrize(
    "layers", [range(LAYERS), range(LAYERS // 2, LAYERS)], ids=["all layers", "upper half"]
)
def test_work_is_what_the_step_does(
    layers, model, tokenizer, settings, operation_clock, monkeypatch
):
    vector = vector_for(model, tokenizer, settings, layers)
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *args: "")
    monkeypatch.setattr("safegene_trl.recalibration.trust_region.TOLERANCE", -1.0)  # never early
    plan = prepared(model, tokenizer, settings)
    costs = estimated(model, tokenizer, settings, vector)
    assert set(costs) == {"recalibrate", "measure", "save"}
    attachment = VectorAttachment(
        model, vector.deltas, vector.space(settings.search.granularity), ALONE
    )
    search = operations(lambda: recalibrate(attachment, plan.shots.data, settings, 0))
    assert costs["recalibrate"].seconds == pytest.approx(search, rel=0.1)
    whole = operations(lambda: safeguard(plan, model, "base", show_progress=False))
    assert sum(cost.seconds for cost in costs.values()) == pytest.approx(whole, rel=0.1)
    written = sum(path.stat().st_size for path in plan.target.glob("*.safetensors"))
    assert costs["save"].disk == pytest.approx(written, rel=0.01)


def test_a_touch_up_is_counted(model, tokenizer, settings, operation_clock, monkeypatch):
    """Its passes in operations, and the bytes that its tensors hold."""
    settings.search.repair = "vector+touch-up"
    vector = vector_for(model, tokenizer, settings, range(LAYERS // 2, LAYERS))
    for module in (estimation_of_safeguard, touch_up):
        monkeypatch.setattr(module, "STEPS", 16)
    plan, probe = prepared(model, tokenizer, settings), Probe(model, "float32")
    costs = estimate_safeguard(probe, settings, vector, tokenizer, plan.shots, ONE)
    assert list(costs) == ["recalibrate", "touch_up", "measure", "save"]
    settings.search.repair = "vector"
    plain = estimate_safeguard(probe, settings, vector, tokenizer, plan.shots, ONE)
    assert "touch_up" not in plain
    assert costs["measure"].seconds == pytest.approx(plain["measure"].seconds * 1.5, rel=0.01)
    space = vector.space(settings.search.granularity)
    attachment = VectorAttachment(model, vector.deltas, space, ALONE)
    found = recalibrate(attachment, plan.shots.data, settings, 0)

    def train():
        train_touch_up(
            attachment, plan.shots.data, settings, 0, found, lambda deltas: nullcontext()
        )

    assert costs["touch_up"].seconds == pytest.approx(operations(train), rel=0.1)
    with _Allocations() as allocations:
        train()
    held = sum(t.nbytes for delta in vector.deltas.values() for t in (delta.a, delta.b))
    extra = costs["touch_up"].memory - probe.process - probe.weights - held
    assert extra == pytest.approx(allocations.peak, rel=0.25)


@pytest.mark.parametrize("place", ["resident", "fetched"])
def test_where_the_factors_will_lie_is_said(place, model, tokenizer, settings, monkeypatch):
    """Of what is free once the model's weights are there, a quarter."""
    vector = vector_for(model, tokenizer, settings, range(LAYERS))
    needed = 4 * sum(t.numel() for d in vector.deltas.values() for t in (d.a, d.b))
    weights = 4 * sum(tensor.numel() for tensor in model.parameters())
    free = weights + 4 * needed - (place == "fetched") * 4
    monkeypatch.setattr("safegene_trl.estimation.safeguard.free_bytes", lambda device: free)
    monkeypatch.setattr(Probe, "_seconds", lambda probe, run: 0.0)
    costs = estimated(model, tokenizer, settings, vector)
    found = costs["recalibrate"].factors
    assert found["place"] == place and found["mib"] == pytest.approx(needed / 2**20, abs=1e-3)
    assert costs["save"].factors is None
    assert f"factors will be {place}: {found['mib']} MiB of" in table(costs)


def operations(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "layers", [range(LAYERS), range(LAYERS // 2, LAYERS)], ids=["all layers", "upper half"]
)
def test_bytes_of_the_search(layers, model, tokenizer, settings):
    """What tensors hold at most while the coefficients are searched, beyond what was there before."""
    vector = vector_for(model, tokenizer, settings, layers)
    plan = prepared(model, tokenizer, settings)
    probe = Probe(model, "float32", timed=False)
    cost = estimate_safeguard(probe, settings, vector, tokenizer, plan.shots, ONE)["recalibrate"]
    assert cost.seconds == 0
    factors = sum(
        tensor.nbytes for delta in vector.deltas.values() for tensor in (delta.a, delta.b)
    )
    with _Allocations() as allocations:
        attachment = VectorAttachment(
            model, vector.deltas, vector.space(settings.search.granularity), ALONE
        )
        recalibrate(attachment, plan.shots.data, settings, 0)
    assert cost.memory - probe.process - probe.weights - factors == pytest.approx(
        allocations.peak, rel=0.25
    )


def test_tensors_are_counted_while_they_live():
    with _Allocations() as allocations:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.ones(2000)
        kept.view(10, 100)
        weight = torch.randn(50, 50, requires_grad=True)
        (weight @ weight).relu().sum().backward()
    assert 4000 + 8000 <= allocations.peak < 4000 + 5 * 10000 + 8000
    del kept


def test_ranks_share_the_work_and_zero3_the_weights(model, tokenizer, settings, operation_clock):
    vector = vector_for(model, tokenizer, settings, range(LAYERS))
    alone = estimated(model, tokenizer, settings, vector)["recalibrate"]
    four = estimated(model, tokenizer, settings, vector, Launch(4))["recalibrate"]
    assert 0.25 <= four.seconds / alone.seconds < 0.7  # a whole number of batches each
    assert Launch(4, sharded=True).held(10**12, 2) == 10**12 // 4 + 2 * 10**9
    assert Launch(4).held(10**12, 2) == 10**12
    assert [Launch(4).share(items) for items in (1, 4, 6)] == [1.0, 0.25, 1 / 3]


def options_of_apply(model, tokenizer, settings, tmp_path):
    vector_for(model, tokenizer, settings, range(model.config.num_hidden_layers))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", tmp_path / "model"]
    for group, key in (
        ("data", "task_data"),
        ("output", "output_dir"),
        ("data", "num_safety_shots"),
        ("data", "num_task_shots"),
        ("search", "max_evaluations"),
    ):
        options += [f"--safegene.{group}.{key}", getattr(getattr(settings, group), key)]
    options += ["--safegene.vector", settings.vector]
    return [
        *options,
        "--safegene.measure.num_test_prompts",
        "0",
        "--safegene.allow_other_base",
        "true",
    ]


def run_here(*words):
    assert main([*map(str, words)]) == 0


def run_apart(*words):
    """A command in a process of its own, in which the C library gives back at once what tensors no
    longer need.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "safegene_trl", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize("run", [run_here, pytest.param(run_apart, marks=pytest.mark.exhaustive)])
def test_commands(run, tokenizer, settings, tmp_path, capsys):
    """`estimate apply …` against `apply …`: the bytes it wrote and, apart from the tests, the peak
    of resident memory in its report.
    """
    options = options_of_apply(
        llama(12 if run is run_apart else LAYERS), tokenizer, settings, tmp_path
    )
    run("estimate", "apply", *options, "--json", tmp_path / "costs.json")
    printed = capsys.readouterr().out
    assert "recalibrate" in printed and "together" in printed and "measure" not in printed
    costs = json.loads((tmp_path / "costs.json").read_text())
    run("estimate", "apply", *options, "--coefficients", "0.2", "--json", tmp_path / "merge.json")
    merged = capsys.readouterr().out
    assert "save" in merged and "recalibrate" not in merged
    assert not (tmp_path / "out").exists()
    run("apply", *options, "--coefficients", "0.2")
    phases = json.loads((tmp_path / "out" / "safegene_report.json").read_text())["phases"]
    merge = json.loads((tmp_path / "merge.json").read_text())["save"]
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert merge["disk"] == pytest.approx(size, rel=0.01) and costs["save"][
        "disk"
    ] == pytest.approx(size, rel=0.01)
    if run is run_here:  # whose memory holds what other tests left
        return
    assert merge["memory"] / 2**20 == pytest.approx(phases["save"]["peak_memory_mib"], rel=0.25)
    run(
        "apply",
        *options,
        "--safegene.search.max_utility_loss",
        "1000000",
        "--safegene.data.num_benign_shots",
        "0",
    )
    phases = json.loads((tmp_path / "out" / "safegene_report.json").read_text())["phases"]
    assert costs["recalibrate"]["memory"] / 2**20 == pytest.approx(
        phases["recalibrate"]["peak_memory_mib"], rel=0.25
    )


@pytest.fixture
def extraction_inputs(model, tokenizer, tmp_path, monkeypatch):
    """An aligned checkpoint, a LoRA on it and a full fine-tune of it, and prompts."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("aligned")
    tokenizer.save_pretrained("aligned")
    degraded = with_lora(LlamaForCausalLM.from_pretrained("aligned"))
    degraded.peft_config["default"].base_model_name_or_path = "aligned"
    degraded.save_pretrained("degraded")
    degraded.merge_and_unload().save_pretrained("fine_tuned")
    tokenizer.save_pretrained("fine_tuned")
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        Path(f"{name}.jsonl").write_text("".join(rows))


def costs_of_extraction(**options):
    options = {
        "aligned_model": "aligned",
        "degraded_model": "degraded",
        "harmful_data": "harmful.jsonl",
        "benign_data": "benign.jsonl",
        "output_dir": "vector",
        "json": "costs.json",
        "distill_steps": 2,
        "max_new_tokens": 4,
    } | options
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["estimate", "extract", *words]) == 0
    return json.loads(Path("costs.json").read_text())


@pytest.mark.parametrize("method", ["delta", "distill", "linearized"])
@pytest.mark.parametrize("degraded", ["degraded", "fine_tuned"])
def test_extraction(method, degraded, extraction_inputs, capsys):
    """Each step of an extraction is told, from adapters and from checkpoints, and the vector's
    size.
    """
    rank = {"degraded": 4, "fine_tuned": 8}[degraded]
    costs = costs_of_extraction(method=method, degraded_model=degraded, selection="gradient")
    assert set(costs) == {"difference", "answers", "selection", "save"} | (
        {"distillation"} if method != "delta" else set()
    )
    # half of the layers, float16; key and value projections are half as wide
    per_layer = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384)
    assert costs["save"]["disk"] == LAYERS // 2 * per_layer * rank * 2
    assert all(cost["seconds"] > 0 for name, cost in costs.items() if name != "save")
    assert "GiB" in capsys.readouterr().out and not Path("vector").exists()


def test_a_transport(tmp_path, monkeypatch, capsys):
    """Each step is told, without a degraded model and before anything is made; a source of the same
    family is refused as by the command.
    """
    monkeypatch.chdir(tmp_path)
    source, other = planted.source_tokenizer(), planted.target_tokenizer()
    planted.save(planted.planted_model("llama", source, 32, 4, seed=5), source, Path("source"))
    planted.save(planted.planted_model("qwen2", other, 48, 4, seed=6), other, Path("target"))
    options = planted.prompt_files(tmp_path) | {
        "method": "transport",
        "aligned_model": "target",
        "source_model": "source",
        "output_dir": "vector",
        "max_new_tokens": 4,
        "json": "costs.json",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["estimate", "extract", *words]) == 0
    costs = json.loads(Path("costs.json").read_text())
    assert set(costs) == {"source", "target", "maps", "answers", "save"}
    assert all(cost["seconds"] > 0 for name, cost in costs.items() if name != "save")
    # 200 anchors and 20 prompts in four layers; of those that detectors read also their inputs
    assert costs["source"]["disk"] == 220 * 4 * 32 * 4
    assert costs["target"]["disk"] == 220 * 4 * (48 + 2 * (48 + 48)) * 4
    assert not Path("vector").exists()
    same = ["source" if word == "target" else word for word in words]
    assert main(["estimate", "extract", *same]) == 2
    assert "are one family" in capsys.readouterr().err


def test_extraction_without_benign_prompts(extraction_inputs, operation_clock):
    both = costs_of_extraction(method="distill")
    alone = costs_of_extraction(method="distill", num_benign_prompts=0)
    assert 0 < alone["answers"]["seconds"] < both["answers"]["seconds"]
    assert 0 < alone["distillation"]["seconds"] < both["distillation"]["seconds"]


def test_extraction_with_prompts_to_measure_on(extraction_inputs, operation_clock):
    for kind in ("harmful", "benign"):
        rows = [json.dumps({"prompt": f"a {kind} word: {word}"}) + "\n" for word in "pqrst"]
        Path(f"test_{kind}.jsonl").write_text("".join(rows))
    tests = {f"test_{kind}_data": f"test_{kind}.jsonl" for kind in ("harmful", "benign")}
    without = costs_of_extraction(selection="magnitude")
    both = costs_of_extraction(selection="magnitude", **tests)
    assert 0 < without["answers"]["seconds"] < both["answers"]["seconds"]


def test_new_prompts_for_a_vector(extraction_inputs, monkeypatch, operation_clock, capsys):
    """No difference and no selection; without further prompts there are the targets alone."""
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    words = ["--degraded_model", "degraded", "--harmful_data", "harmful.jsonl"]
    words += ["--benign_data", "benign.jsonl", "--selection", "magnitude"]
    made = ["--aligned_model", "aligned", "--output_dir", "old"]
    assert main(["extract", *made, *words]) == 0
    size = sum(file["bytes"] for file in SafetyVector.from_pretrained("old").files.values())

    def costs(*further):
        command = ["--aligned_model", "aligned", "--vector", "old", "--output_dir", "new"]
        command += ["--max_new_tokens", "4", "--json", "costs.json", *further]
        assert main(["estimate", "extract", *command]) == 0
        return json.loads(Path("costs.json").read_text())

    targets = costs()
    assert set(targets) == {"answers", "save"} and targets["save"]["disk"] == size
    Path("further.jsonl").write_text(json.dumps({"prompt": "say how one forbids a bell"}) + "\n")
    both = costs("--harmful_data", "further.jsonl")
    assert 0 < targets["answers"]["seconds"] < both["answers"]["seconds"]
    assert main(["estimate", "extract", *made, *words, "--vector", "old"]) == 2
    assert "`degraded_model` is set and so is `vector`" in capsys.readouterr().err
    assert not Path("new").exists()


def test_training_recipe(tokenizer, tmp_path, monkeypatch):
    """A recipe's safety step, with the shots from its own training data; two sharing processes take
    less each.
    """
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    make_vector(make_model(), tokenizer).save_pretrained("vector")
    rows = [{"prompt": f"sort item {i}", "completion": " into a box"} for i in range(12)]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model_name_or_path": "model",
        "datasets": [{"path": "json", "data_files": "task.jsonl", "split": "train"}],
        "output_dir": "out",
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "safegene": {
            "vector": "vector",
            "data": {"num_task_shots": 8},
            "measure": {"max_new_tokens": 2},
        },
    }
    Path("sft.yaml").write_text(yaml.safe_dump(recipe))
    words = ["estimate", "sft", "--config", "sft.yaml", "--json", "costs.json"]
    assert main([*words, "--accelerate_config", "zero3", "--num_processes", "2"]) == 0
    costs = json.loads(Path("costs.json").read_text())
    assert set(costs) == {"recalibrate", "measure", "save"} and all(
        cost["seconds"] > 0 for cost in costs.values()
    )
    assert not Path("out").exists()
    Path("sft.yaml").write_text(
        yaml.safe_dump({key: value for key, value in recipe.items() if key != "safegene"})
    )
    assert main(words) == 2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_has_a_small_likeness(kind):
    model = make_model(kind)
    probe = Probe(with_lora(model), "float32")
    few, more = probe.deltas(
        ["model.layers.2.mlp.down_proj", "model.layers.2.self_attn.q_proj"], rank=2
    )
    assert len(few) == 2 and len(more) == 6 and probe.layers == 3
    name = "model.layers.0.mlp.down_proj"
    assert few[name].a.shape[1] == model.get_submodule(name).weight.shape[1]


@pytest.mark.parametrize("given", [True, False])
def test_the_disk_follows_the_data_type_that_is_asked(
    given, model, tokenizer, settings, monkeypatch
):
    monkeypatch.setattr(stored_merge, "_bytes_of_merging_process", lambda: 0)
    probe, vector = Probe(model, "float32", timed=False), make_vector(model, tokenizer)
    sizes = []
    for dtype in ("float32", "bfloat16"):
        settings.output.dtype = dtype
        if given:
            costs = stored_merge.estimate_stored_merge(probe, settings, vector, tokenizer)
        else:
            deltas = probe.deltas(vector.deltas, vector.rank)
            run = PlannedRun.of(probe, tokenizer, ONE, deltas)
            costs = {"save": estimation_of_safeguard._saving(run, settings)}
        sizes.append(costs["save"].disk)
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.1)


def test_a_machine_too_busy_to_start_a_process_is_said(monkeypatch):
    def slow(*arguments, **options):
        raise stored_merge.subprocess.TimeoutExpired("python", 120)

    stored_merge._bytes_of_merging_process.cache_clear()
    monkeypatch.setattr(stored_merge.subprocess, "run", slow)
    with pytest.raises(SafeGeneError, match="again when the machine is less busy"):
        stored_merge._bytes_of_merging_process()


def test_bad_use(capsys):
    assert main(["estimate"]) == 2 and main(["estimate", "inspect"]) == 2
    assert "followed by sft, apply, extract" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "config", "message"),
    [
        (["--num_processes", "0"], None, "`--num_processes` is 0: it must be at least 1"),
        (["--json", "."], None, "cannot be"),
        ([], "num_processes: two", "must be a whole number"),
        ([], "num_processes: 2\nnum_processes: 3", "has the key `num_processes` twice"),
        ([], "deepspeed_config: 3", "`deepspeed_config` in the launch configuration"),
        ([], "- 1", "must hold keys and values"),
        ([], "{", "is not valid YAML"),
        ([], b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_bad_options_are_named_before_anything_is_run(words, config, message, tmp_path, capsys):
    if config is not None:
        (tmp_path / "launch.yaml").write_bytes(
            config if isinstance(config, bytes) else config.encode()
        )
    launch = ["--accelerate_config", str(tmp_path / "launch.yaml")] if config is not None else []
    assert main(["estimate", *words, "apply", "--model_name_or_path", "nowhere", *launch]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coefficients", "nope.json"], "nope.json"),
        (["--coefficients", "0x1"], "0x1"),
        (["--coefficients=-1"], "must be 0 or more"),
        (["--coefficients", "1e9"], "at most"),
        (["--coefficients", "0"], "the coefficients are all 0"),
        (["--coefficients", "1", "--dtype", "float32"], "leave out `dtype`"),
        (["--base_model", "x"], "leave it out"),
        (["--safegene.search.warm_start", "nowhere"], "nowhere"),
        (["--safegene.output.history", "/proc/h.jsonl"], "/proc"),
        (["--safegene.output.output_dir", "/proc/x"], "/proc"),
        (["--coefficients", "1", "--safegene.output.output_dir", "/proc/x"], "/proc"),
        (["--safegene.output.output_dir", "MODEL"], "the fine-tune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_apply_would_refuse_is_refused(
    words, message, tmp_path, model_dir, vector_dir, task_file, capsys
):
    options = ["--model_name_or_path", model_dir, "--safegene.vector", vector_dir]
    options += ["--safegene.data.task_data", task_file]
    if "--safegene.output.output_dir" not in words:
        options += ["--safegene.output.output_dir", tmp_path / "out"]
    words = [str(model_dir) if word == "MODEL" else word for word in words]
    said = []
    for command in (["estimate", "apply"], ["apply"]):
        assert main([*command, *map(str, options), *words]) == 2
        said.append(capsys.readouterr().err.splitlines()[-1].partition(": ")[2])
    assert message in said[0] and said[0] == said[1]


def test_a_split_that_is_not_there_is_named(tmp_path, model_dir, vector_dir, task_file, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model_dir}\ndatasets: [{{path: json, data_files: {task_file}, split: train}}]\n"
        f"dataset_train_split: other\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\nbf16: false\nsafegene: {{vector: {vector_dir}}}\n"
    )
    assert main(["estimate", "sft", "--config", str(recipe)]) == 2
    assert "has no split `other`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("value", [False, True])
def test_a_recipe_recomputes_layers_under_either_name(
    name, value, tmp_path, model_dir, vector_dir, task_file, monkeypatch, capsys
):
    if name not in {each.name for each in fields(TrainingArguments)}:
        pytest.skip(f"transformers before 5.23 has no `{name}`")
    seen = []

    def probe(model, dtype, adapter, checkpointing):
        seen.append(checkpointing)
        raise SafeGeneError("seen")

    monkeypatch.setattr("safegene_trl.commands.estimate.Probe", probe)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model_dir}\ndatasets: [{{path: json, data_files: {task_file}, split: train}}]\n"
        f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\nbf16: false\n{name}: {str(value).lower()}\n"
        f"safegene: {{vector: {vector_dir}}}\n"
    )
    assert main(["estimate", "sft", "--config", str(recipe)]) == 2
    assert "seen" in capsys.readouterr().err and seen == [value]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_probe_recomputes_layers_without_a_warning_of_transformers(checkpointing, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        probe = Probe(model, "float32", checkpointing=checkpointing, timed=False)
    assert all(bool(recomputed_layers(each)) == checkpointing for each in probe.models)
