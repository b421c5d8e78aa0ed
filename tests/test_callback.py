"""The callback in real `Trainer` and `SFTTrainer` runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from jsonschema import validate
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback, SafeGeneError
from safegene_trl.callback import DryRunComplete
from safegene_trl.data.rows import conversation
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.errors import ConfigError, OutputError, RecalibrationError, UnsupportedModelError
from safegene_trl.models.inputs import tokenize
from safegene_trl.provenance import model_reference
from safegene_trl.reporting.report import SCHEMA
from safegene_trl.step import preparation

from .conftest import config_of, make_model, make_tokenizer, make_vector, task_dataset, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5
QUICK = {
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "learning_rate": 1e-3,
    "disable_tqdm": True,
}


@pytest.fixture
def config(vector_dir):
    """Accepts whatever a random vector does to a random model, so that the plumbing can be tested."""

    def make(**values):
        return config_of(
            **{
                "vector": str(vector_dir),
                "max_utility_loss": 100.0,
                "utility_weight": 0.0,
                "max_evaluations": 3,
            }
            | values
        )

    return make


def sft(out, callbacks, tokenizer, model=None, **kwargs):
    args = {**QUICK, "output_dir": str(out), "save_strategy": "no", "gradient_checkpointing": False}
    peft = kwargs.pop("peft_config", None)
    return SFTTrainer(
        model=model or make_model(),
        args=SFTConfig(**args | kwargs),
        train_dataset=task_dataset(),
        eval_dataset=task_dataset() if kwargs.get("eval_strategy") else None,
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=callbacks,
    )


def plain(out, callbacks, tokenizer, model):
    rows = []
    for row in task_dataset():
        sample = tokenize(tokenizer, *conversation(row))
        labels = [
            t if r else -100 for t, r in zip(sample.input_ids, sample.is_response, strict=True)
        ]
        rows.append({"input_ids": sample.input_ids, "labels": labels})
    return Trainer(
        model=model,
        args=TrainingArguments(**QUICK, output_dir=str(out), save_strategy="no"),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def merged_logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def expected_logits(trainer, report, vector):
    """Logits of the saved fine-tune plus λ·V, computed from scratch."""
    trainer.save_model()
    if isinstance(trainer.model, PeftModel):
        model = PeftModel.from_pretrained(make_model(), trainer.args.output_dir).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    by_module = vector.space(report["config"]["search"]["granularity"]).by_module(
        report["coefficients"]
    )
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            model.get_submodule(name).weight += delta.b @ (by_module[name][:, None] * delta.a)
    return model(IDS).logits


QUICK_KINDS = ("sft-full layer", "plain-lora layer", "plain-full module", "sft-lora rank")


@pytest.mark.parametrize(
    ("trainer_kind", "granularity"),
    [
        pytest.param(
            kind, each, marks=() if f"{kind} {each}" in QUICK_KINDS else (pytest.mark.exhaustive,)
        )
        for kind in ("sft-full", "sft-lora", "plain-full", "plain-lora")
        for each in ("layer", "module", "rank")
    ],
)
def test_safeguarded_checkpoint_is_the_fine_tune_plus_the_vector(
    trainer_kind, granularity, config, tokenizer, tmp_path
):
    callback = SafeGeneCallback(config(granularity=granularity))
    lora = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    if trainer_kind.startswith("plain"):
        model = get_peft_model(make_model(), lora) if trainer_kind == "plain-lora" else make_model()
        trainer = plain(tmp_path, [callback], tokenizer, model)
    else:
        trainer = sft(
            tmp_path,
            [callback],
            tokenizer,
            peft_config=lora if trainer_kind == "sft-lora" else None,
        )
    trainer.train()
    report = json.loads((tmp_path / "safeguarded" / "safegene_report.json").read_text())
    validate(report, SCHEMA)
    assert report == json.loads(json.dumps(callback.report))
    assert report["status"] == "safeguarded"
    assert report["model"]["kind"] == trainer_kind.split("-")[1]
    assert set(report["phases"]) == {"prepare", "keep", "recalibrate", "measure", "save", "verify"}
    assert len(report["coefficients"]) == {"layer": 2, "module": 6, "rank": 12}[granularity]
    assert any(report["coefficients"].values())
    vector = make_vector(make_model(), tokenizer)
    expected = expected_logits(trainer, report, vector)
    torch.testing.assert_close(
        merged_logits(tmp_path / "safeguarded"), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("lora", [True, False])
def test_the_fine_tune_is_that_of_a_run_without_the_callback(lora, config, tokenizer, tmp_path):
    saved = []
    for name, callbacks in (("with", [SafeGeneCallback(config())]), ("without", [])):
        torch.manual_seed(0)
        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        trainer = sft(tmp_path / name, callbacks, tokenizer, peft_config=peft)
        trainer.train()
        trainable = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
        saved.append(
            (
                trainable,
                {n: p.detach().clone() for n, p in trainer.model.state_dict().items()},
                torch.get_rng_state(),
            )
        )
        assert trainer.model.training
        trainer.train()  # and it trains on
    assert saved[0][0] == saved[1][0]
    assert all(torch.equal(value, saved[1][1][name]) for name, value in saved[0][1].items())
    assert torch.equal(saved[0][2], saved[1][2])


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("output_format", ["adapter", "both"])
def test_adapter_output(output_format, lora, config, tokenizer, tmp_path):
    peft = (
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        if lora
        else None
    )
    callback = SafeGeneCallback(config(output_format=output_format))
    trainer = sft(tmp_path, [callback], tokenizer, peft_config=peft)
    trainer.train()
    folder = tmp_path / "safeguarded" / ("adapter" if output_format == "both" else "")
    expected = expected_logits(trainer, callback.report, make_vector(make_model(), tokenizer))
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = (
        make_model() if lora else AutoModelForCausalLM.from_pretrained(named)
    )  # the fine-tune that `save_model` wrote
    adapted = PeftModel.from_pretrained(base, folder)(IDS).logits
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "safeguarded" / "model.safetensors").is_file() == (output_format == "both")


def test_dry_run_ends_before_the_first_step(config, tokenizer, tmp_path, capsys):
    steps = []

    class Count(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            steps.append(1)

    with pytest.raises(DryRunComplete) as ended:
        sft(tmp_path, [Count(), SafeGeneCallback(config(dry_run=True))], tokenizer).train()
    assert ended.value.code == 0 and steps == []
    assert "all checks passed" in capsys.readouterr().out
    assert not (tmp_path / "safeguarded").exists()


@pytest.mark.parametrize("wrong", ["vector", None, {"vector": "v"}])
def test_what_is_no_config_and_no_trainer_is_refused_where_it_is_given(wrong, config):
    with pytest.raises(
        SafeGeneError, match=r"SafeGeneCallback was given .*: give it a SafeGeneConfig"
    ):
        SafeGeneCallback(wrong)
    with pytest.raises(SafeGeneError, match=r"`attach` was given .*: give it the trainer"):
        SafeGeneCallback(config()).attach(wrong)


def test_second_on_train_end_does_nothing(config, tokenizer, tmp_path, capsys):
    callback = SafeGeneCallback(config())
    trainer = sft(tmp_path, [callback], tokenizer)
    trainer.train()
    printed = capsys.readouterr().out
    assert (
        "accepted: " in printed and f"Safeguarded checkpoint: {tmp_path / 'safeguarded'}" in printed
    )
    report = tmp_path / "safeguarded" / "safegene_report.json"
    written = report.stat().st_mtime_ns
    callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert report.stat().st_mtime_ns == written


def test_order_of_events(config, tokenizer, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append(("begin", (tmp_path / "safeguarded").exists()))

        def on_save(self, *args, **kwargs):
            seen.append(("save", (tmp_path / "safeguarded").exists()))

        def on_train_end(self, *args, **kwargs):
            seen.append(("end", (tmp_path / "safeguarded").exists()))

    sft(
        tmp_path,
        [SafeGeneCallback(config()), Watch()],
        tokenizer,
        save_strategy="steps",
        save_steps=1,
    ).train()
    assert seen == [("begin", False), ("save", False), ("save", False), ("end", True)]


def test_best_model_is_the_one_safeguarded(config, tokenizer, tmp_path):
    callback = SafeGeneCallback(config())
    trainer = sft(
        tmp_path,
        [callback, EarlyStoppingCallback(5)],
        tokenizer,
        learning_rate=0.05,  # the first step already ruins the model: the best checkpoint is not the last
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "safeguarded")
    name = "model.layers.0.mlp.up_proj.weight"  # a layer the vector leaves alone
    assert torch.equal(merged.state_dict()[name], best.state_dict()[name])
    if not trainer.state.best_model_checkpoint.endswith("checkpoint-3"):
        assert not torch.equal(merged.state_dict()[name], last.state_dict()[name])


def test_resume_from_a_checkpoint_made_without_the_callback(config, tokenizer, tmp_path):
    sft(tmp_path, [], tokenizer, save_strategy="steps", save_steps=1).train()
    trainer = sft(
        tmp_path,
        [SafeGeneCallback(config())],
        tokenizer,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "safeguarded" / "safegene_report.json").is_file() and (
        tmp_path / "checkpoint-3"
    ).is_dir()


def test_earlier_result_is_replaced_and_foreign_files_are_not(config, tokenizer, tmp_path):
    for _ in range(2):
        sft(tmp_path, [SafeGeneCallback(config())], tokenizer).train()
    shutil.rmtree(tmp_path / "safeguarded")
    (tmp_path / "safeguarded").mkdir()
    (tmp_path / "safeguarded" / "model.safetensors").write_text("mine")
    with pytest.raises(SafeGeneError, match="did not write"):
        sft(tmp_path, [SafeGeneCallback(config())], tokenizer).train()
    assert (tmp_path / "safeguarded" / "model.safetensors").read_text() == "mine"


UNLINK = Path.unlink


def read_only(path, missing_ok=False):
    """A file system that keeps the reports of failures."""
    if ".failed." in path.name:
        raise OSError(30, "Read-only file system", str(path))
    UNLINK(path, missing_ok)


NOTHING_HELPS = {"max_utility_loss": 0.0}  # every coefficient but 0 moves the fine-tune
PLAIN = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def left_beside(folder):
    """What lies in a trainer's output folder beside the plain fine-tune."""
    names = {path.name for path in folder.iterdir()}
    assert names >= PLAIN
    return names - PLAIN - {"chat_template.jinja", "training_args.bin"}


def test_failure_raises_or_warns_and_is_reported(config, tokenizer, tmp_path, monkeypatch, caplog):
    with pytest.raises(RecalibrationError, match="task divergence"):
        sft(tmp_path, [SafeGeneCallback(config(**NOTHING_HELPS))], tokenizer).train()
    callback = SafeGeneCallback(config(on_failure="warn", **NOTHING_HELPS))
    trainer = sft(tmp_path, [callback], tokenizer)
    trainer.train()
    assert "did not safeguard" in caplog.text
    report = json.loads((tmp_path / "safeguarded.failed.json").read_text())
    validate(report, SCHEMA)
    assert report["status"] == "failed" and "task divergence" in report["error"]["message"]
    assert report == json.loads(json.dumps(callback.report))
    assert report["decision"]["outcome"] == "rejected"
    assert {name.split(".")[0] for name in left_beside(tmp_path)} == {"safeguarded"}
    trainer.save_model()
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.unlink", read_only)
        sft(tmp_path, [SafeGeneCallback(config())], tokenizer).train()
    assert "safeguarded.failed.json is of an earlier run and cannot be removed" in caplog.text
    assert (
        json.loads((tmp_path / "safeguarded" / "safegene_report.json").read_text())["status"]
        == "safeguarded"
    )
    sft(tmp_path, [SafeGeneCallback(config())], tokenizer).train()
    assert not list(tmp_path.glob("safeguarded.failed*"))


def test_crash_while_saving_leaves_nothing_under_the_name(config, tokenizer, tmp_path, monkeypatch):
    def full_disk(file, name, tensor, offset=0):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safegene_trl.checkpoints.weight_files.TensorFile.write", full_disk)
    trainer = sft(tmp_path, [callback := SafeGeneCallback(config())], tokenizer)
    callback.attach(trainer)  # the trainer saves its own fine-tune
    with pytest.raises(SafeGeneError, match="No space left"):
        trainer.train()
    assert all(name.startswith("safeguarded.failed.") for name in left_beside(tmp_path))


def test_push_to_hub_does_not_upload_twice(config, tokenizer, tmp_path, monkeypatch):
    callback = SafeGeneCallback(config())
    trainer = sft(tmp_path, [callback], tokenizer)
    trainer.args.push_to_hub = True
    assert callback._target(trainer.args).name == "_safeguarded"
    uploads = []

    def upload_folder(self, *, ignore_patterns, **kwargs):
        files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
        uploads.append(list(filter_repo_objects(files, ignore_patterns=ignore_patterns)))

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(SFTTrainer, "create_model_card", lambda self, **kwargs: None)
    trainer.hub_model_id = "me/model"
    trainer.train()
    trainer.push_to_hub()
    assert (tmp_path / "_safeguarded" / "model.safetensors").is_file()
    (files,) = uploads
    assert [name for name in files if name.endswith("model.safetensors")] == ["model.safetensors"]


BAD_STARTS = {
    "missing vector": ({"vector": "no/such-vector"}, {}, "neither a local directory"),
    "other family": ({}, {"model": lambda: make_model("qwen2")}, "was made for LlamaForCausalLM"),
    "other depth": ({}, {"model": lambda: make_model(layers=4)}, "names or shapes differ"),
    "cut vocabulary": ({}, {"model": lambda: make_model(vocab_size=300)}, "embedding 300 rows"),
    "other tokenizer": ({}, {"tokenizer": lambda: make_tokenizer(("<|x|>",))}, "tokenizer differs"),
    "missing data": ({"safety_data": "no/such-data"}, {}, "cannot be read"),
    "DoRA as an adapter": (
        {"output_format": "adapter"},
        {"model": lambda: with_lora(make_model(), use_dora=True)},
        "DoRA",
    ),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_bad_start_is_refused_before_the_first_step(case, config, tokenizer, tmp_path):
    values, parts, message = BAD_STARTS[case]
    trainer = sft(
        tmp_path,
        [SafeGeneCallback(config(**values))],
        parts.get("tokenizer", lambda: tokenizer)(),
        model=parts.get("model", make_model)(),
    )
    with pytest.raises(SafeGeneError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}, {"question": "b"}], "it needs `prompt`"),
        ([{"prompt": "a"}], "1 usable samples"),
        ([{"prompt": "word " * 400}] * 3, "the model's context is 256"),
    ],
)
def test_bad_safety_data(rows, message, config, tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = sft(tmp_path / "out", [SafeGeneCallback(config(safety_data=str(file)))], tokenizer)
    with pytest.raises(SafeGeneError, match=message):
        trainer.train()


def test_own_safety_and_task_data(config, tokenizer, tmp_path, task_file):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"forbidden {i}"}) + "\n" for i in range(6)))
    callback = SafeGeneCallback(config(safety_data=str(file), task_data=str(task_file)))
    sft(tmp_path / "out", [callback], tokenizer).train()
    assert callback.report["data"]["safety"]["source"] == str(file)
    assert (
        callback.report["data"]["safety"]["fit"] + callback.report["data"]["safety"]["held_out"]
        == 6
    )
    assert callback.report["data"]["task"]["source"] == str(task_file)


def test_unsupported_launch_is_refused_before_the_first_step(
    config, tokenizer, tmp_path, monkeypatch
):
    callback = SafeGeneCallback(config())
    trainer = sft(tmp_path, [callback], tokenizer)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a launcher sets it, after accelerate has looked
    with pytest.raises(SafeGeneError, match="4 processes"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_training_from_other_weights_is_refused_before_the_first_step(config, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "aligned")
    make_model(seed=1).save_pretrained(tmp_path / "other")
    vector = make_vector(make_model(), tokenizer)
    vector.aligned_model = model_reference(str(tmp_path / "aligned"))
    vector.save_pretrained(tmp_path / "vector")

    def run(base, **values):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / base)
        settings = config(vector=str(tmp_path / "vector"), **values)
        trainer = sft(
            tmp_path / "out", [callback := SafeGeneCallback(settings)], tokenizer, model=model
        )
        try:
            trainer.train()
        finally:
            steps.append(trainer.state.global_step)
        return callback.report["base"]

    steps: list[int] = []
    with pytest.raises(SafeGeneError, match="started from other"):
        run("other")
    assert steps == [0]
    assert run("aligned")["is_aligned_model"] is True
    base = run("other", allow_other_base=True)
    assert base["is_aligned_model"] is False and base["other_base_allowed"] is True


class Averaging(TrainerCallback):
    """Puts other weights in place when the training ends, as one does that averages them."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)


@pytest.mark.parametrize("late", [False, True])
def test_what_another_callback_does_at_the_end_is_safeguarded(late, config, tokenizer, tmp_path):
    callback, other = SafeGeneCallback(config()), Averaging()
    trainer = sft(tmp_path, [callback] if late else [callback, other], tokenizer)
    callback.attach(trainer)
    if late:
        trainer.add_callback(other)
    trainer.train()
    embedding = trainer.model.get_input_embeddings().weight
    saved = load_file(tmp_path / "safeguarded" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(saved, embedding.detach())
    kept = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(kept, embedding.detach())


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
def test_a_callback_that_comes_in_the_middle_is_refused(event, config, tokenizer, tmp_path):
    class Adding(TrainerCallback):
        def add(self, args, state, control, **kwargs):
            if (
                state.global_step == args.max_steps - 1
                and callback not in trainer.callback_handler.callbacks
            ):
                trainer.add_callback(callback)

    setattr(Adding, event, Adding.add)
    callback = SafeGeneCallback(config())
    trainer = sft(tmp_path, [Adding()], tokenizer)
    with pytest.raises(ConfigError, match="add it before"):
        trainer.train()
    assert not (tmp_path / "safeguarded").exists()


def test_a_weight_that_is_not_finite_is_not_shipped(config, tokenizer, tmp_path):
    """Of a token that no sample has, so that no logit shows it."""
    model = make_model(tied=False)
    make_vector(model, tokenizer).save_pretrained(tmp_path / "vector")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("¿")["input_ids"][-1]] = float("nan")
    callback = SafeGeneCallback(config(vector=str(tmp_path / "vector")))
    trainer = sft(tmp_path, [callback], tokenizer, model=model)
    with pytest.raises(OutputError, match=r"embed_tokens.weight is not finite"):
        trainer.train()
    assert not (tmp_path / "safeguarded").exists() and (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["hook", "module", "setting", "scaling"])
def test_a_model_that_is_more_than_its_weights_is_refused(kind, config, tokenizer, tmp_path):
    model = make_model()
    layer = model.model.layers[0]
    if kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
    elif kind == "module":

        class Doubling(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        layer.mlp.up_proj.__class__ = Doubling
    elif kind == "setting":
        model.config.rms_norm_eps = 10.0
    else:
        layer.self_attn.scaling *= 20
    trainer = sft(tmp_path, [SafeGeneCallback(config())], tokenizer, model=model)
    with pytest.raises(UnsupportedModelError, match="a hook, a module of your own or a setting"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_hook_that_comes_while_it_is_trained_is_refused(config, tokenizer, tmp_path):
    """What is written is loaded as anybody will load it, and says something else than what was
    measured.
    """

    class Hooking(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.model.layers[0].register_forward_hook(
                    lambda module, inputs, output: output * 1.5
                )

    trainer = sft(tmp_path, [SafeGeneCallback(config()), Hooking()], tokenizer)
    with pytest.raises(OutputError, match="a hook, a module of your own or a setting"):
        trainer.train()
    assert not (tmp_path / "safeguarded").exists() and (tmp_path / "model.safetensors").is_file()


ROWS = {
    "plain": {},
    "packed": {"packing": True, "max_length": 120},
    "wrapped": {"packing": True, "max_length": 120, "packing_strategy": "wrapped"},
}


@pytest.mark.parametrize("mode", ROWS)
@pytest.mark.parametrize("lora", [True, False])
def test_of_messages_the_step_reads_the_assistants_words(
    mode, lora, config, tokenizer, tmp_path, monkeypatch
):
    """Whose labels are the whole conversation, as TRL makes them."""
    seen = []
    gather = preparation.gather_shots

    def recorded(*args):
        seen.append(gather(*args))
        return seen[-1]

    monkeypatch.setattr(preparation, "gather_shots", recorded)
    rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in task_dataset()]
    callback = SafeGeneCallback(config(num_task_shots=8, num_test_prompts=2, max_new_tokens=2))
    trainer = SFTTrainer(
        model=make_model(),
        args=SFTConfig(**QUICK, output_dir=str(tmp_path), save_strategy="no", **ROWS[mode]),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        if lora
        else None,
        callbacks=[callback],
    )
    trainer.train()
    (shots,) = seen
    samples = [*shots.data.task.fit, *shots.data.task.held_out, *shots.unseen.task]
    for sample in samples:
        said = [
            token for token, mark in zip(sample.input_ids, sample.is_response, strict=True) if mark
        ]
        assert tokenizer.decode(said) in {f"box {i}<|end|>" for i in range(3)}
        # one conversation, not what was packed
        assert tokenizer.decode(sample.input_ids).count("<|user|>") == 1
    assert len(samples) >= 8 and set(callback.report["data"]["task"]["read_by"]) == {
        "chat template"
    }


class Processor(ProcessorMixin):
    """A processor as vision-language models have it, of a tokenizer alone."""

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None):
        super().__init__(tokenizer)

    def save_pretrained(self, folder, **kwargs):
        super().save_pretrained(folder, **kwargs)
        (Path(folder) / "processor_config.json").write_text('{"processor_class": "Processor"}')


def test_the_trainers_processor_is_saved_with_the_checkpoint(config, tokenizer, tmp_path):
    trainer = sft(tmp_path, [SafeGeneCallback(config(min_coefficient=0.2))], tokenizer)
    trainer.processing_class = trainer.callback_handler.processing_class = Processor(tokenizer)
    trainer.train()
    names = {path.name for path in (tmp_path / "safeguarded").iterdir()}
    assert {"processor_config.json", "tokenizer.json", "model.safetensors"} <= names


def test_a_config_is_checked_when_the_training_begins(config, tokenizer, tmp_path):
    callback = SafeGeneCallback(config())
    callback.config.search.max_evaluations = -3
    trainer = sft(tmp_path, [callback], tokenizer)
    with pytest.raises(ConfigError, match=r"search\.max_evaluations"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("way", ["callbacks", "attach", "add_callback", "own float32"])
def test_weights_that_the_host_has_widened_are_written_as_they_were_loaded(
    way, config, tokenizer, tmp_path, monkeypatch
):
    """As accelerate does under FSDP2; `tests/distributed` has the launch."""
    monkeypatch.setattr(Sharding, "widens", True)
    model = make_model().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    if way == "own float32":  # whatever its config says
        model.float()
    callback = SafeGeneCallback(config())
    trainer = sft(
        tmp_path, [callback] if way in ("callbacks", "own float32") else [], tokenizer, model
    )
    if way == "attach":
        callback.attach(trainer)
    trainer.model.float()
    if way == "add_callback":
        trainer.add_callback(callback)
    trainer.train()
    narrow = way in ("callbacks", "attach")
    written = load_file(tmp_path / "safeguarded" / "model.safetensors").values()
    assert {t.dtype for t in written} == {torch.bfloat16 if narrow else torch.float32}
    assert json.loads((tmp_path / "safeguarded" / "config.json").read_text())["dtype"] == (
        "bfloat16" if narrow else "float32"
    )
    said = [text for text in callback.report["warnings"] if "Whether FSDP2 has widened" in text]
    assert len(said) == (way == "add_callback")


def test_a_callback_of_two_trainers_keeps_the_one_that_trains(config, tokenizer, tmp_path):
    callback, kept = SafeGeneCallback(config()), {}
    trainers = [sft(tmp_path / name, [], tokenizer) for name in ("one", "other")]
    for trainer in trainers:
        callback.attach(trainer)
    for trainer in trainers:
        trainer.train()
        saved = load_file(Path(trainer.args.output_dir) / "model.safetensors")
        live = trainer.model.get_input_embeddings().weight.detach()
        assert torch.equal(saved["model.embed_tokens.weight"], live)
        # of the trainer's own data, in its own log
        assert any("safegene/outcome" in entry for entry in trainer.state.log_history)
        kept[trainer.args.output_dir] = callback.report["fine_tune"]
    assert all(folder == place for folder, place in kept.items())


def test_two_callbacks_of_a_training_do_not_write_to_one_place(config, tokenizer, tmp_path):
    make_vector(make_model(), tokenizer, seed=9).save_pretrained(tmp_path / "vector")
    own = {"vector": str(tmp_path / "vector")}
    callbacks = [SafeGeneCallback(config()), SafeGeneCallback(config(**own))]
    trainer = sft(tmp_path / "out", callbacks, tokenizer)
    with pytest.raises(ConfigError, match=r"Two SafeGene callbacks .*safeguarded: leave one"):
        trainer.train()
    assert trainer.state.global_step == 0
    (tmp_path / "link").symlink_to(tmp_path / "out")
    elsewhere = own | {"output_dir": str(tmp_path / "link" / "safeguarded")}
    callbacks = [callbacks[0], SafeGeneCallback(config(**elsewhere))]
    with pytest.raises(ConfigError, match=r"Two SafeGene callbacks"):
        sft(tmp_path / "out", callbacks, tokenizer).train()
    sft(tmp_path / "out", callbacks[:1], tokenizer).train()  # what failed is forgotten
    own["output_dir"] = str(tmp_path / "out" / "second")
    callbacks = [SafeGeneCallback(config()), SafeGeneCallback(config(**own))]
    sft(tmp_path / "out", callbacks, tokenizer).train()
    assert all(
        (tmp_path / "out" / name / "config.json").is_file() for name in ("safeguarded", "second")
    )


def test_float32_norms_beside_16_bits_are_no_reason_to_refuse(config, tokenizer, tmp_path):
    """Only the training's autocast computes with both; who loads the checkpoint has 16 bits alone."""
    model = make_model().to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    callback = SafeGeneCallback(config())
    sft(tmp_path, [callback], tokenizer, model, bf16=True).train()
    held = load_file(tmp_path / "safeguarded" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.float32, torch.bfloat16}
    assert callback.report["shipped"]["logit_distances"]["reloaded"] > 0  # what loading rounds
