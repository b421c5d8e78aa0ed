"""Whatever happens in the step: the fine-tune is on disk, the failure is reported, no half
checkpoint is left.
"""

import hashlib
import json
import os
import signal
import time
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import memory as accelerate_memory
from jsonschema import validate
from peft import LoraConfig
from safetensors.torch import load_file

from safegene_trl import SafeGeneCallback
from safegene_trl.distributed.communicator import Communicator
from safegene_trl.errors import (
    ConfigError,
    MemoryShortageError,
    RejectedError,
    SafeGeneError,
    UnexpectedError,
)
from safegene_trl.interruption import terminable
from safegene_trl.provenance import sha256_of_files
from safegene_trl.reporting.report import SCHEMA
from safegene_trl.step import run as run_module
from safegene_trl.step.history import read_history

from ..conftest import config_of, make_model
from ..test_callback import sft


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.fixture
def config(vector_dir):
    def make(**values):
        quick = {
            "max_utility_loss": 100.0,
            "max_evaluations": 2,
            "num_test_prompts": 2,
            "max_new_tokens": 2,
        }
        return config_of(**{"vector": str(vector_dir)} | quick | values)

    return make


FAULTS = {  # where: what is replaced
    "search": "safegene_trl.step.live_fine_tune.recalibrate",
    "measuring": "safegene_trl.step.live_fine_tune.Measurement",
    "writing": "safegene_trl.step.live_fine_tune.save_merged",
    "hashing": "safegene_trl.step.run.sha256_of_files",
    "reading back": "safegene_trl.step.read_back.stored_tensors",
    "evidence": "safegene_trl.step.run.write_evidence",
}
ERRORS = {
    "bug": (ZeroDivisionError("division by zero"), UnexpectedError, "failed unexpectedly"),
    "memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        SafeGeneError,
        "out of memory",
    ),
    "file": (OSError(5, "Input/output error"), SafeGeneError, "Input/output error"),
    "ctrl-c": (KeyboardInterrupt(), KeyboardInterrupt, ""),
}


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def checked_failure(out, fine_tune):
    """The failure report of a run whose fine-tune has these weights."""
    report = json.loads((out / "safeguarded.failed.json").read_text())
    validate(report, SCHEMA)
    assert report["status"] == "failed" and report["fine_tune"] == str(out)
    assert sorted(
        path.name for path in out.iterdir() if path.name.startswith(("safeguarded", "."))
    ) == [path.name for path in sorted(out.glob("safeguarded.failed.*"))]
    saved = load_file(out / "model.safetensors")
    assert saved and all(torch.equal(saved[name], fine_tune[name]) for name in saved)
    return report


def cases():
    """A bug at every place, every error at one; where memory runs out has ways of its own. The rest
    takes the same paths.
    """
    for kind in ERRORS:
        for where in FAULTS:
            quick = (
                kind == "bug"
                or where == "writing"
                or (kind == "memory" and where in ("search", "measuring", "reading back"))
            )
            yield pytest.param(
                kind, where, marks=() if quick else (pytest.mark.exhaustive,), id=f"{kind}-{where}"
            )


@pytest.mark.parametrize(("kind", "where"), cases())
def test_any_exception_is_reported_and_the_fine_tune_is_kept(
    where, kind, config, tokenizer, tmp_path, monkeypatch, caplog
):
    error, expected, message = ERRORS[kind]
    monkeypatch.setattr(FAULTS[where], raising(error))
    callback = SafeGeneCallback(config())
    trainer = sft(tmp_path, [callback], tokenizer)
    with pytest.raises(expected, match=message):
        trainer.train()
    report = checked_failure(tmp_path, trainer.model.state_dict())
    assert message in report["error"]["message"] and callback.report["status"] == "failed"
    how_to_go_on = f"{tmp_path} is the plain fine-tune: `safegene apply` runs the step on it"
    assert (how_to_go_on in caplog.text) == (kind == "ctrl-c")
    assert trainer.model.training and all(p.requires_grad for p in trainer.model.parameters())
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_memory_that_runs_out_while_the_fine_tune_is_kept_is_reported(
    config, tokenizer, tmp_path, monkeypatch
):
    """There is no fine-tune on the disk that could be named."""
    place = "safegene_trl.step.live_fine_tune.FinishedTraining.keep"
    monkeypatch.setattr(place, raising(torch.OutOfMemoryError("CUDA out of memory.")))
    trainer = sft(tmp_path, [SafeGeneCallback(config())], tokenizer, auto_find_batch_size=True)
    with pytest.raises(
        UnexpectedError, match=r"ran out of memory.*may not be on a disk yet"
    ) as one:
        trainer.train()
    assert not accelerate_memory.should_reduce_batch_size(one.value)
    report = json.loads((tmp_path / "safeguarded.failed.json").read_text())
    validate(report, SCHEMA)
    assert report["status"] == "failed" and "out of memory" in report["error"]["message"]
    assert not (tmp_path / "safeguarded").exists()


@pytest.mark.parametrize("where", ["gather_shots", "VectorAttachment"])
def test_memory_that_runs_out_before_the_first_step_trains_nothing(
    where, config, tokenizer, tmp_path, monkeypatch
):
    failing = raising(torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(f"safegene_trl.step.preparation.{where}", failing)
    trainer = sft(tmp_path, [SafeGeneCallback(config())], tokenizer, auto_find_batch_size=True)
    with pytest.raises(MemoryShortageError, match="checks before the safety step ran out") as one:
        trainer.train()
    assert not accelerate_memory.should_reduce_batch_size(one.value)
    assert trainer.state.global_step == 0 and not list(tmp_path.glob("safeguarded*"))


@pytest.mark.parametrize("batch_size", [None, 64])
def test_a_device_that_is_too_small_is_named_before_the_first_step(
    batch_size, config, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("safegene_trl.models.batch_size.free_bytes", lambda device: 2**17)
    nothing = SimpleNamespace(free=0)
    monkeypatch.setattr("safegene_trl.models.batch_size.psutil.swap_memory", lambda: nothing)
    trainer = sft(tmp_path, [SafeGeneCallback(config(batch_size=batch_size))], tokenizer)
    if batch_size is None:
        trainer.train()  # one sample at a time would do
        return
    with pytest.raises(ConfigError, match=r"bytes are missing, so set `batch_size: \d+`"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.glob("safeguarded*"))


@pytest.mark.parametrize("where", ["search", "writing"])
def test_any_error_obeys_on_failure(where, config, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(FAULTS[where], raising(ZeroDivisionError("division by zero")))
    trainer = sft(tmp_path, [SafeGeneCallback(config(on_failure="warn"))], tokenizer)
    trainer.train()
    assert "did not safeguard this fine-tune" in caplog.text and "ZeroDivisionError" in caplog.text
    checked_failure(tmp_path, trainer.model.state_dict())


def test_no_error_of_the_step_starts_the_training_anew(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(FAULTS["writing"], raising(torch.OutOfMemoryError("CUDA out of memory.")))
    seen = []
    trainer = sft(
        tmp_path,
        [SafeGeneCallback(config())],
        tokenizer,
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
    )
    inner = trainer._inner_training_loop

    def counted(*args, **kwargs):
        seen.append(1)
        return inner(*args, **kwargs)

    trainer._inner_training_loop = counted
    with pytest.raises(UnexpectedError, match="out of memory") as raised:
        trainer.train()
    assert not accelerate_memory.should_reduce_batch_size(raised.value)
    assert len(seen) == 1


def test_a_terminated_run_says_so(interpreter, tmp_path):
    """SIGTERM in the middle of the search, to a process of its own."""
    script = f"""
import os, signal
from pathlib import Path
from safegene_trl import SafeGeneCallback, SafeGeneConfig
from safegene_trl.step import live_fine_tune
from tests.conftest import make_model, make_tokenizer, make_vector
from tests.test_callback import sft

out = Path({str(tmp_path)!r})
make_vector(make_model(), make_tokenizer()).save_pretrained(out / "vector")
real = live_fine_tune.recalibrate

def ended(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **kwargs)

live_fine_tune.recalibrate = ended
sft(out / "out", [SafeGeneCallback(SafeGeneConfig(vector=str(out / "vector"), on_failure="warn"))], make_tokenizer()).train()
"""
    done = interpreter.run(script)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "safeguarded.failed.json").read_text())
    ending = {"kind": "Interrupted", "message": "The run was ended by SIGTERM."}
    assert report["error"] == ending and (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "safeguarded").exists()


def test_signals_mean_again_what_they_meant_before():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised, terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # the signal comes at once
    assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_the_fine_tune_is_saved_once_and_as_the_trainer_saves_it(
    lora, attached, config, tokenizer, tmp_path
):
    callback = SafeGeneCallback(config())
    trainer = sft(tmp_path, [callback], tokenizer, peft_config=LORA if lora else None)
    if attached:
        callback.attach(trainer)
    trainer.train()
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    kept = load_file(tmp_path / name)
    assert callback.report["fine_tune"] == str(tmp_path)
    trainer.save_model()
    saved = load_file(tmp_path / name)
    assert kept.keys() == saved.keys() and all(torch.equal(kept[key], saved[key]) for key in saved)


def test_a_training_that_saved_itself_is_not_saved_again(config, tokenizer, tmp_path):
    callback = SafeGeneCallback(config())
    sft(tmp_path, [callback], tokenizer, save_strategy="steps", save_steps=1).train()
    assert callback.report["fine_tune"] == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_of_an_earlier_run_is_not_taken_for_this_one(config, tokenizer, tmp_path):
    sft(tmp_path, [], tokenizer, save_strategy="steps", save_steps=1).train()
    callback = SafeGeneCallback(config())
    sft(tmp_path, [callback], tokenizer).train()
    assert (
        callback.report["fine_tune"] == str(tmp_path) and (tmp_path / "model.safetensors").is_file()
    )


def test_the_base_model_is_never_saved_over(config, tokenizer, model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    before = (model_dir / "model.safetensors").read_bytes()
    trainer = sft(model_dir, [SafeGeneCallback(config())], tokenizer, model=model)
    with pytest.raises(SafeGeneError, match="the model that the training starts from"):
        trainer.train()
    assert (
        trainer.state.global_step == 0 and (model_dir / "model.safetensors").read_bytes() == before
    )


def test_report_names_every_file_with_its_hash(config, tokenizer, tmp_path, monkeypatch):
    """Weights are hashed while they are written: of them no file is read for it afterwards."""
    read = []
    monkeypatch.setattr(
        run_module, "sha256_of_files", lambda f: read.extend(f) or sha256_of_files(f)
    )
    callback = SafeGeneCallback(config(output_format="both", max_shard_size="20KB"))
    sft(tmp_path, [callback], tokenizer).train()
    folder = tmp_path / "safeguarded"
    evidence = {"README.md", *(path.name for path in folder.glob("safegene_report.*"))}
    written = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    } - evidence
    assert set(callback.report["files"]) == written and len(written) > 8
    for name, digest in callback.report["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert read and not [path for path in read if path.match("model-*.safetensors")]


def test_rejected_release_is_in_the_history_and_on_no_disk(config, tokenizer, tmp_path):
    history = tmp_path / "line" / "history.jsonl"
    callback = SafeGeneCallback(
        config(max_utility_loss=0.0, utility_weight=0.0, history=str(history))
    )
    with pytest.raises(RejectedError) as raised:
        sft(tmp_path / "out", [callback], tokenizer).train()
    message, out = str(raised.value), tmp_path / "out"
    assert (
        message.startswith("The safeguarded checkpoint was rejected, because ")
        and "`search.max_utility_loss`" in message
    )
    assert (
        f"nothing was written to {out / 'safeguarded'}, the report is {out / 'safeguarded.failed.json'}"
        in message
    )
    assert (
        f"{out} is the plain fine-tune" in message and (out / "safeguarded.failed.json").is_file()
    )
    assert [release["outcome"] for release in read_history(history)] == ["rejected"]
    assert not (tmp_path / "out" / "safeguarded").exists()


def test_processor_is_saved_with_the_checkpoint(config, tokenizer, tmp_path):
    saved = []

    class Processor:
        """As those of vision-language models: it holds the tokenizer."""

        def __init__(self):
            self.tokenizer = tokenizer

        def save_pretrained(self, folder, **kwargs):
            saved.append(Path(folder))
            tokenizer.save_pretrained(folder)

    from safegene_trl.distributed.layouts import Sharding
    from safegene_trl.step.live_fine_tune import safeguard
    from safegene_trl.step.plan import InputModel, Origin
    from safegene_trl.step.preparation import prepare

    from ..conftest import task_dataset

    model = make_model()
    prepared = prepare(
        config(),
        InputModel(model, Processor(), Origin(None, None, "full")),
        tmp_path / "out",
        Sharding(torch.device("cpu")),
        task_rows=task_dataset(),
    )
    safeguard(prepared, model, "somewhere")
    # tried at the start, then beside the weights
    assert len(saved) == 2 and saved[1].parent == tmp_path


def test_what_may_take_long_keeps_no_other_process_in_a_collective(
    config, tokenizer, tmp_path, monkeypatch
):
    """Hashing a base, asking the hub, hashing what was written and uploading it: while rank 0 works
    alone.
    """
    alone, within = [], {}
    original = Communicator.on_main_rank

    @contextmanager
    def watched(self):
        with original(self) as working:
            alone.append(True)
            yield working
            alone.pop()

    def watch(name, result=None):
        module, _, function = name.rpartition(".")
        real = getattr(import_module(module), function)

        def seen(*args, **kwargs):
            within[function] = bool(alone)
            return real(*args, **kwargs) if result is None else result

        monkeypatch.setattr(name, seen)

    monkeypatch.setattr(Communicator, "on_main_rank", watched)
    for name in ("plan.check_base", "run.hashes"):
        watch(f"safegene_trl.step.{name}")
    for name in ("plan.check_hub", "run.upload"):
        watch(f"safegene_trl.step.{name}", result=True)
    settings = config(hub_model_id="me/release")
    sft(tmp_path, [SafeGeneCallback(settings)], tokenizer).train()
    assert within == dict.fromkeys(("check_base", "hashes", "check_hub", "upload"), True)
