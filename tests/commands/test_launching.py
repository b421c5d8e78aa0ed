"""Which words go to the launcher, and which to the command."""

import subprocess

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from safegene_trl.commands import launching, sft
from safegene_trl.commands.launch_option import wants_launch
from safegene_trl.commands.parsing import make_parser
from safegene_trl.errors import ConfigError


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` is asked for."""
    asked = []
    monkeypatch.setattr(launching, "launch_command", asked.append)

    def launch(*words):
        assert launching.launch("sft", words, make_parser(sft.ARGUMENTS)) == 0
        return asked.pop()

    return launch


def test_options_go_where_they_are_known(launched):
    words = [
        "--num_processes",
        "4",
        "--config",
        "r.yaml",
        "--machine_rank",
        "1",
        "--use_cpu",
        "true",
    ]
    args = launched(*words, "--accelerate_config", "zero3", "--safegene.seed", "3")
    assert args.config_file.endswith("zero3.yaml")
    assert (args.num_processes, args.machine_rank, args.module, args.training_script) == (
        4,
        1,
        True,
        "safegene_trl",
    )
    assert args.training_script_args == [
        "sft",
        "--config",
        "r.yaml",
        "--use_cpu",
        "true",
        "--safegene.seed",
        "3",
    ]


def test_as_many_processes_as_gpus_unless_said_otherwise(launched, monkeypatch, tmp_path):
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 8)
    assert launched("--accelerate_config=zero2", "--config", "r.yaml").num_processes == 8
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "num_processes": 3}))
    args = launched("--accelerate_config", str(own), "--config", "r.yaml")
    assert args.num_processes is None and args.config_file == str(own)  # the file says 3
    assert launched("--accelerate_config", "zero2", "--num_processes=4").num_processes == 4


def test_every_launch_on_one_machine_gets_a_free_port_unless_said_otherwise(launched, tmp_path):
    """By accelerate's default two at a time would ask for one port, and the second would fail."""

    def port(*words, **settings):
        own = tmp_path / "own.yaml"
        own.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **settings}))
        return launched("--accelerate_config", str(own), *words).main_process_port

    assert port() == port(num_machines=1, main_process_port=None) == 0
    assert launched("--accelerate_config", "zero3").main_process_port == 0
    assert port("--main_process_port=1234") == 1234
    assert port(main_process_port=1234) is None  # the file says it
    assert port("--num_machines", "2") is None and port(num_machines=2) is None


@pytest.mark.parametrize(
    "name", ["cpu", "ddp", "fsdp2", "single_gpu", "zero1", "zero2", "zero3", "zero3_offload"]
)
def test_shipped_configs_are_valid(name, launched):
    loaded = load_config_from_file(launched("--accelerate_config", name).config_file)
    kinds = {"cpu": "NO", "single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert loaded.distributed_type == kinds.get(name, "DEEPSPEED")
    assert loaded.use_cpu == (name == "cpu")
    if name.startswith("zero"):
        assert loaded.deepspeed_config["zero_stage"] == int(name[4])
    if name == "fsdp2":
        assert loaded.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("words", [["--accelerate_config"], ["--accelerate_config", "zero9"]])
def test_unknown_config_is_an_error_that_lists_the_shipped_ones(words, launched):
    with pytest.raises(
        ConfigError,
        match="neither a file nor one of cpu, ddp, fsdp2, single_gpu, zero1, zero2, zero3",
    ):
        launched(*words)


@pytest.mark.parametrize("code", [3, 4])
def test_exit_code_of_one_process_is_passed_on(code, monkeypatch):
    def fails(arguments):
        raise subprocess.CalledProcessError(code, ["python"])

    monkeypatch.setattr(launching, "launch_command", fails)
    words = ["--accelerate_config=cpu", "--num_processes=1"]
    assert launching.launch("sft", words, make_parser(sft.ARGUMENTS)) == code


def test_command_without_the_option_is_not_launched():
    assert not wants_launch(["--config", "r.yaml", "--accelerator_config", "x"])
    assert wants_launch(["--accelerate_config=ddp"])
    assert wants_launch(["--accelerate-config", "ddp"])


def test_the_option_may_be_written_with_dashes(launched):
    for words in (["--accelerate-config=zero2"], ["--accelerate-config", "zero2"]):
        assert launched(*words, "--num_processes=2").config_file.endswith("zero2.yaml")


def test_a_wrong_value_for_the_launcher_is_one_sentence(launched):
    with pytest.raises(ConfigError, match=r"^`--num_processes` is 'many': it must be a whole numb"):
        launched("--accelerate_config=ddp", "--num_processes", "many")
