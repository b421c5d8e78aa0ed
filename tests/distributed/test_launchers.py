"""The commands under every launcher that users have, on two CPU ranks."""

import json
import shutil

import pytest
import torch
import yaml
from accelerate.utils.other import get_free_port
from safetensors.torch import load_file

from safegene_trl.commands.main import main
from safegene_trl.step.history import read_history

from ..conftest import make_model, make_tokenizer, make_vector, task_dataset
from .backends import deepspeed_config
from .launching import BIN, MODULE, ROOT, run_together


pytestmark = pytest.mark.timeout(400)
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
TORCHRUN = ["-m", "torch.distributed.run"]
SFT = [*MODULE, "sft"]
TWO = ["--num_processes", "2"]
CONFIGS = ROOT / "safegene_trl" / "accelerate_configs"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe for a tiny model; `needless` keeps random coefficients acceptable by a huge budget."""
    root = tmp_path_factory.mktemp("recipe")
    make_model().save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    make_vector(make_model(), make_tokenizer()).save_pretrained(root / "vector")
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_dataset()))
    (root / "zero3.json").write_text(json.dumps(deepspeed_config("zero3", gather=False)))
    settings = {
        "model_name_or_path": str(root / "model"),
        "dtype": "float32",
        "datasets": [{"path": "json", "data_files": str(root / "task.jsonl"), "split": "train"}],
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "safegene": block(root),
    }
    (root / "sft.yaml").write_text(yaml.safe_dump(settings))
    (root / "apply.yaml").write_text(yaml.safe_dump({"safegene": block(root)}))
    return root


def block(root):
    shots = {"num_safety_shots": 6, "num_benign_shots": 4, "num_task_shots": 6}
    return {
        "vector": str(root / "vector"),
        "data": {"task_data": str(root / "task.jsonl"), **shots},
        "search": {"max_evaluations": 2, "max_utility_loss": 100.0},
        "measure": {"max_new_tokens": 4},
    }


def node(rank, port):
    group = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
    return [*TORCHRUN, *group, "--master_addr", "127.0.0.1", "--master_port", str(port)]


def accelerate_node(rank, port):
    group = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return [*SFT, "--accelerate_config", "zero3", *group, *place]


LAUNCHERS = {  # Python's arguments before the recipe's, for every launcher started
    "safegene zero3": lambda port: [[*SFT, "--accelerate_config", "zero3", *TWO]],
    "safegene zero3_offload": lambda port: [[*SFT, "--accelerate_config=zero3_offload", *TWO]],
    "safegene zero2": lambda port: [
        [*SFT, "--accelerate_config", str(CONFIGS / "zero2.yaml"), *TWO]
    ],
    "accelerate zero1": lambda port: [
        [*ACCELERATE, "--config_file", str(CONFIGS / "zero1.yaml"), *TWO, *SFT]
    ],
    "accelerate ddp": lambda port: [
        [*ACCELERATE, "--config_file", str(CONFIGS / "ddp.yaml"), *TWO, *SFT]
    ],
    "torchrun ddp": lambda port: [[*TORCHRUN, "--nproc_per_node", "2", *SFT]],
    "deepspeed zero3": lambda port: [
        [
            f"{BIN}/deepspeed",
            "--num_gpus",
            "2",
            "--master_port",
            str(port),
            "--module",
            "safegene_trl",
            "sft",
        ]
    ],
    "two nodes torchrun": lambda port: [[*node(rank, port), *SFT] for rank in (0, 1)],
    "two nodes safegene zero3": lambda port: [accelerate_node(rank, port) for rank in (0, 1)],
}
QUICK = ("safegene zero3",)
# Every launcher is started once as users start it; where it only has other settings, its ranks are forks.
OTHER_SETTINGS = (
    "safegene zero3_offload",
    "safegene zero2",
    "accelerate ddp",
    "two nodes safegene zero3",
)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(name, marks=() if name in QUICK else (pytest.mark.exhaustive,))
        for name in LAUNCHERS
    ],
)
def test_training_launches_and_is_safeguarded(launcher, forked, recipe, tmp_path, monkeypatch):
    options = ["--config", str(recipe / "sft.yaml"), "--output_dir", str(tmp_path / "out")]
    if launcher == "deepspeed zero3":
        options += [
            "--deepspeed",
            str(recipe / "zero3.json"),
            "--save_strategy",
            "steps",
            "--save_steps",
            "2",
        ]
    together = forked.together if launcher in OTHER_SETTINGS else run_together
    codes, printed = together(
        [[*command, *options] for command in LAUNCHERS[launcher](get_free_port())]
    )
    assert codes == [0] * len(codes), printed[-6000:]
    report = json.loads((tmp_path / "out" / "safeguarded" / "safegene_report.json").read_text())
    assert report["launch"] == {
        "sharding": "zero3" if "zero3" in launcher else "whole",
        "processes": 2,
    }

    # A finished checkpoint gives the same coefficients, in one process; also one that holds
    # DeepSpeed's shards only.
    checkpoint = tmp_path / "out"
    if launcher == "deepspeed zero3":
        checkpoint = tmp_path / "out" / "checkpoint-2"
        assert not list(checkpoint.glob("*.safetensors"))
    source = ["--config", str(recipe / "apply.yaml"), "--model_name_or_path", str(checkpoint)]
    if launcher == "deepspeed zero3":
        source += ["--allow_pickled_shards", "true"]
    monkeypatch.chdir(tmp_path)
    assert main(["apply", *source, "--safegene.output.output_dir", "alone"]) == 0
    alone = json.loads((tmp_path / "alone" / "safegene_report.json").read_text())
    assert alone["data"]["task"] == report["data"]["task"]
    assert report["coefficients"] == pytest.approx(alone["coefficients"], abs=2e-6)


@pytest.mark.exhaustive
def test_a_script_with_the_callback_under_zero3(forked, recipe, tmp_path):
    launch = [*ACCELERATE, "--config_file", str(CONFIGS / "zero3.yaml"), "--num_processes", "2"]
    script = [str(ROOT / "examples" / "trainers.py"), "sft", "--use_cpu", "--max_steps", "1"]
    files = [
        "--model",
        recipe / "model",
        "--vector",
        recipe / "vector",
        "--data",
        recipe / "task.jsonl",
    ]
    settings = {key: value for key, value in block(recipe).items() if key != "vector"}
    words = [*files, "--output", tmp_path / "out", "--settings", json.dumps(settings)]
    done = forked([*launch, *script, *map(str, words)])
    assert done.returncode == 0, done.stdout[-6000:]
    report = json.loads((tmp_path / "out" / "safeguarded" / "safegene_report.json").read_text())
    assert report["launch"] == {"sharding": "zero3", "processes": 2}
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", ["zero3", "ddp"])
def test_finished_checkpoint_is_safeguarded_in_many_processes(
    config, forked, recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    source = ["--config", str(recipe / "apply.yaml"), "--model_name_or_path", str(recipe / "model")]
    launch = [*MODULE, "apply", "--accelerate_config", config, "--num_processes", "2"]
    done = forked([*launch, *source, "--safegene.output.output_dir", str(tmp_path / "sharded")])
    assert done.returncode == 0, done.stdout[-6000:]
    assert main(["apply", *source, "--safegene.output.output_dir", "alone"]) == 0
    reports = [
        json.loads((tmp_path / name / "safegene_report.json").read_text())
        for name in ("sharded", "alone")
    ]
    assert reports[0]["launch"] == {
        "sharding": "zero3" if config == "zero3" else "whole",
        "processes": 2,
    }
    assert reports[0]["coefficients"] == pytest.approx(reports[1]["coefficients"], abs=2e-6)
    for side in ("before", "after"):
        assert reports[0]["measured"][side] == reports[1]["measured"][side]
    sharded, alone = (
        load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "alone")
    )
    assert sharded.keys() == alone.keys()
    assert all(torch.allclose(sharded[key], alone[key], rtol=0, atol=1e-6) for key in alone)


@pytest.mark.exhaustive
def test_the_gate_rejects_in_many_processes(forked, recipe, tmp_path):
    launch = [*MODULE, "apply", "--accelerate_config", "ddp", "--num_processes", "2"]
    source = ["--config", str(recipe / "apply.yaml"), "--model_name_or_path", str(recipe / "model")]
    gate = [
        "--safegene.gate.min_refusal_rate",
        "0.9",
        "--safegene.output.history",
        str(tmp_path / "history.jsonl"),
    ]
    place = ["--safegene.output.output_dir", str(tmp_path / "out")]
    done = forked([*launch, *source, *gate, *place])
    assert done.returncode == 4, done.stdout[-6000:]
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed.html").is_file()
    (release,) = read_history(tmp_path / "history.jsonl")
    assert release["outcome"] == "rejected"


def test_bad_recipe_ends_the_launch_with_one_sentence(forked, recipe, tmp_path):
    shutil.copy(recipe / "sft.yaml", tmp_path / "sft.yaml")
    launch = [*MODULE, "sft", "--accelerate_config", "ddp", "--num_processes", "2"]
    done = forked([*launch, "--config", str(tmp_path / "sft.yaml"), "--safegene.vectr", "x"])
    assert done.returncode == 2, done.stdout[-6000:]
    assert done.stdout.count("safegene sft: Unknown key `safegene.vectr`") == 1
