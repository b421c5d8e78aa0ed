"""What libraries say is held back, line by line, and nothing else."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from safegene_trl.commands.library_noise import LOGGED, WARNED, held_back, silenced

from ..conftest import options_of


SAID = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: no",
    "torch.distributed.run": "\n****\nSetting OMP_NUM_THREADS environment variable for each process to be 1 in default",
    "DeepSpeed": "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
}
WARNINGS = [
    (FutureWarning, "`torch.distributed.all_gather_into_tensor` is deprecated. Please use"),
    (FutureWarning, "`is_gradient_checkpointing` is deprecated and will be removed in v6."),
    (FutureWarning, "`gradient_checkpointing` is deprecated and will be removed in v6."),
    (
        UserWarning,
        "'pin_memory' argument is set as true but no accelerator is found, then device pinned",
    ),
    (
        UserWarning,
        "The PEFT config's `base_model_name_or_path` was renamed from 'a/b' to 'None'. Please",
    ),
]


def process(*words, timeout=240):
    """`safegene` as a user starts it, with nothing set that keeps libraries quiet."""
    quieted = ("TQDM", "HF_DATASETS_DISABLE", "TRANSFORMERS_VERBOSITY")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(quieted)}
    return subprocess.run(
        [sys.executable, "-m", "safegene_trl", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def heard():
    """What reaches the handlers of the loggers in `LOGGED`."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    for name in LOGGED:
        logging.getLogger(name).addHandler(handler)
    yield found
    for name in LOGGED:
        logging.getLogger(name).removeHandler(handler)


def test_these_lines_are_held_back_and_no_others(heard):
    assert set(SAID) == set(LOGGED)
    before = {name: list(logging.getLogger(name).filters) for name in LOGGED}
    with held_back(), warnings.catch_warnings(record=True) as warned:
        for name, line in SAID.items():
            logging.getLogger(name).warning(line)
            logging.getLogger(name).warning("%s is broken", name)
        for kind, line in WARNINGS:
            warnings.warn(line, kind, stacklevel=1)
            warnings.warn(f"Mind that {line}", kind, stacklevel=1)
    assert heard == [f"{name} is broken" for name in SAID]
    assert [str(each.message) for each in warned] == [f"Mind that {line}" for _, line in WARNINGS]
    assert len({pattern for _, pattern in WARNED}) == len(WARNED)
    assert {name: list(logging.getLogger(name).filters) for name in LOGGED} == before


def test_bars_wait_as_ours_do_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("TQDM_DELAY", raising=False)
    with held_back():
        assert os.environ["TQDM_DELAY"] == "2"
    assert "TQDM_DELAY" not in os.environ
    monkeypatch.setenv("TQDM_DELAY", "9")
    with held_back():
        assert os.environ["TQDM_DELAY"] == "9"


def test_silence_leaves_errors_and_what_we_warn_of():
    spoken = logging.lastResort
    with silenced():
        for name, level, shown in (
            ("safegene_trl.step.plan", logging.WARNING, True),
            ("peft", logging.WARNING, False),
            ("peft", logging.ERROR, True),
        ):
            record = logging.LogRecord(name, level, __file__, 1, "said", None, None)
            assert bool(spoken.filter(record)) is shown
    assert spoken.filter(logging.LogRecord("peft", logging.WARNING, __file__, 1, "", None, None))


OURS = re.compile(
    r"accepted|vector |held-out |refusal rate |over refusal |incoherent |task token |unjudged |over-refusal |"
    r"Safeguarded checkpoint: |Fine-tuned model: |\{'"  # the trainer's own log
)


def test_no_line_of_a_library_is_printed_and_standard_output_is_the_document(
    model_dir, vector_dir, task_file, tmp_path
):
    (tmp_path / "data").mkdir()
    task_file.rename(tmp_path / "data" / "task.jsonl")
    step = {"vector": vector_dir, "task_data": tmp_path / "data" / "task.jsonl"}
    step |= {"max_utility_loss": 1000, "utility_weight": 0, "max_evaluations": 1}
    step |= {"num_test_prompts": 2, "max_new_tokens": 2}
    words = ["--model_name_or_path", model_dir, "--dataset_name", tmp_path / "data"]
    words += ["--output_dir", tmp_path / "out", "--max_steps", "1", "--report_to", "none"]
    words += ["--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true"]
    done = process("sft", *words, *options_of(step), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    place = tmp_path / "out" / "safeguarded" / "safegene_report.json"
    assert json.loads(done.stdout) == json.loads(place.read_text())
    lines = [line.strip() for line in re.split(r"[\r\n]+", done.stderr)]
    bars = re.compile(r"\w+: +\d+%\|")  # of what took longer than two seconds here
    strange = [line for line in lines if line and not OURS.match(line) and not bars.match(line)]
    assert not strange


def test_a_quiet_command_says_nothing_in_a_process_of_its_own(vector_dir, model_dir, tmp_path):
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text(json.dumps({"prompt": "say where one may lift a raft unseen"}) + "\n")
    words = ["--model_name_or_path", model_dir, "--harmful_data", prompts]
    words += ["--max_new_tokens", "2", "--output_dir", tmp_path / "out"]
    done = process("evaluate", *words, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = process("inspect", vector_dir, "--json", "--quiet")
    assert done.returncode == 0 and not done.stderr
    assert json.loads(done.stdout)["architecture"] == "LlamaForCausalLM"
    done = process("history", tmp_path / "none.jsonl", "--json")
    assert done.returncode == 2 and done.stderr.startswith("safegene history: There is no file")
    assert json.loads(done.stdout)["exit_code"] == 2
