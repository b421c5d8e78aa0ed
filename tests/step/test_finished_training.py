"""The plain fine-tune is on a disk, whole, where the report says, and what the end of a training
shows is refused.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from safegene_trl import SafeGeneCallback, SafeGeneError
from safegene_trl.checkpoints.loading import load_model

from ..conftest import config_of, make_model, with_lora
from ..test_callback import Averaging, sft


IDS = torch.arange(24).reshape(2, 12) + 5


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


class AtLastStep(TrainerCallback):
    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            self.act(model)


@pytest.fixture
def train(vector_dir, tokenizer, tmp_path):
    """Trains a model with the callback, attached or not, and gives both the trainer and the report."""

    def run(model, act=None, attach=True, fails=None, settings=None, before=(), **kwargs):
        values = {
            "vector": str(vector_dir),
            "max_utility_loss": 100.0,
            "utility_weight": 0.0,
            "max_evaluations": 3,
        }
        callback = SafeGeneCallback(config_of(**values | (settings or {})))
        others = [*before, *([AtLastStep(act)] if act else [])]
        trainer = sft(tmp_path / "out", [*others, callback], tokenizer, model, **kwargs)
        if attach:
            callback.attach(trainer)
        if fails is None:
            trainer.train()
        else:
            with pytest.raises(SafeGeneError, match=fails) as raised:
                trainer.train()
            assert "\n" not in str(raised.value)
            assert not (tmp_path / "out" / "safeguarded").exists()
        return trainer, callback.report

    return run


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("saving", ["no", "steps"])
def test_a_named_adapter_is_in_the_folder_of_its_name(attach, saving, train, tmp_path):
    model = with_lora(make_model(), adapter_name="mine")
    trainer, report = train(model, attach=attach, save_strategy=saving, save_steps=2)
    folder = tmp_path / "out" / ("checkpoint-2" if saving == "steps" else "")
    assert report["fine_tune"] == str(folder / "mine")
    kept = PeftModel.from_pretrained(make_model(), report["fine_tune"])
    torch.testing.assert_close(logits(kept), logits(trainer.model))
    assert saving == "no" or not list((tmp_path / "out").glob("mine"))  # no second copy


@pytest.mark.parametrize("attach", [True, False])
def test_of_adapters_that_act_together_all_are_kept_and_named(attach, train, tmp_path):
    model = with_lora(make_model())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(False)  # it acts, and is not trained
    trainer, report = train(model, attach=attach)
    out = tmp_path / "out"
    assert report["fine_tune"] == f"{out} and {out / 'other'}"
    kept = PeftModel.from_pretrained(make_model(), out)
    kept.load_adapter(str(out / "other"), "other")
    kept.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(kept), logits(trainer.model))


@pytest.mark.parametrize("saving", ["no", "steps"])
def test_an_adapter_names_the_place_of_the_full_fine_tune(saving, train, tmp_path):
    settings = {"output_format": "adapter"}
    trainer, report = train(make_model(), settings=settings, save_strategy=saving, save_steps=2)
    config = json.loads((tmp_path / "out" / "safeguarded" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == report["fine_tune"]
    kept = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    torch.testing.assert_close(logits(kept), logits(trainer.model))


class Shards(TrainerCallback):
    """Leaves checkpoints as DeepSpeed does where 16-bit weights are not gathered."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "model.safetensors").unlink()
        (folder / "latest").write_text(f"global_step{state.global_step}")


@pytest.mark.parametrize("output_format", ["merged", "adapter", "both"])
def test_an_adapter_names_no_folder_of_shards(output_format, train, tmp_path):
    settings, out = {"output_format": output_format}, tmp_path / "out"
    trainer, report = train(
        make_model(), settings=settings, save_strategy="steps", save_steps=2, before=[Shards()]
    )
    if output_format == "merged":  # the shards are the fine-tune, and no second copy is made
        assert (
            report["fine_tune"] == str(out / "checkpoint-2")
            and not (out / "model.safetensors").exists()
        )
        return
    place = out / "safeguarded" / ("adapter" if output_format == "both" else "")
    named = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == report["fine_tune"] == str(out)
    kept = AutoModelForCausalLM.from_pretrained(named)
    torch.testing.assert_close(logits(kept), logits(trainer.model))


def merge(model):
    model.merge_adapter()


def unfreeze(model):
    model.get_base_model().model.norm.requires_grad_(True)


@pytest.mark.parametrize(
    ("act", "message"),
    [(merge, r"`unmerge_adapter\(\)`"), (unfreeze, "`model.norm.weight` beside its LoRA")],
)
def test_an_adapter_that_is_not_the_fine_tune_at_the_end_is_refused(act, message, train):
    seen = []
    trainer, report = train(
        with_lora(make_model()),
        lambda model: (act(model), seen.append(logits(model.train(False)))),
        fails=message,
    )
    assert torch.equal(logits(trainer.model), seen[0])  # the live model is what it was
    kept = PeftModel.from_pretrained(make_model(), report["fine_tune"])
    torch.testing.assert_close(logits(kept), seen[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attach", [True, False])
def test_a_generation_config_that_cannot_be_saved_does_not_keep_back_the_weights(
    attach, train, tmp_path
):
    def spoil(model):
        model.generation_config.top_p, model.generation_config.do_sample = 0.3, False

    trainer, report = train(
        make_model(), spoil, attach, fails="generation config.*top_p.*`safegene apply`"
    )
    assert report["fine_tune"] == str(tmp_path / "out")
    torch.testing.assert_close(logits(load_model(report["fine_tune"])), logits(trainer.model))
    assert trainer.model.generation_config.top_p == 0.3


def test_an_earlier_adapter_in_a_checkpoint_does_not_stand_for_a_full_fine_tune(train, tmp_path):
    with_lora(make_model()).save_pretrained(tmp_path / "out" / "checkpoint-2")
    trainer, report = train(make_model(), save_strategy="steps", save_steps=2)
    assert report["fine_tune"] == str(tmp_path / "out")
    torch.testing.assert_close(logits(load_model(report["fine_tune"])), logits(trainer.model))


def test_an_earlier_full_fine_tune_does_not_stand_for_an_adapter(train, model_dir, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "out")
    model = with_lora(AutoModelForCausalLM.from_pretrained(model_dir))
    trainer, report = train(model, settings={"allow_other_base": True})
    torch.testing.assert_close(logits(load_model(report["fine_tune"])), logits(trainer.model))


def test_a_full_fine_tune_beside_an_earlier_adapter_is_refused_at_the_start(train, tmp_path):
    with_lora(make_model()).save_pretrained(tmp_path / "out")
    trainer, _ = train(
        make_model(), fails="holds the adapter of an earlier training.*name another folder"
    )
    assert trainer.state.global_step == 0 and not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("lora", [True, False])
def test_a_training_that_diverged_is_told_from_a_bug_and_is_kept(lora, train, tmp_path):
    def diverge(model):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    model = with_lora(make_model()) if lora else make_model()
    _, report = train(model, diverge, fails="has diverged")
    assert report["error"]["kind"] == "RecalibrationError" and report["fine_tune"] == str(
        tmp_path / "out"
    )
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert any(tensor.isnan().any() for tensor in load_file(tmp_path / "out" / name).values())


def test_a_best_checkpoint_from_before_a_resumed_training_is_not_taken_for_the_fine_tune(
    vector_dir, tokenizer, tmp_path
):
    """What another callback has changed since it was loaded cannot be told."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    saving |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    out = tmp_path / "out"
    sft(out, [], tokenizer, make_model(), max_steps=1, **saving).train()
    values = {"max_utility_loss": 100.0, "utility_weight": 0.0, "max_evaluations": 3}
    callback = SafeGeneCallback(config_of(vector=str(vector_dir), **values))
    # the first checkpoint stays the best
    saving |= {"greater_is_better": True, "max_steps": 2, "learning_rate": 1e-3}
    trainer = sft(out, [Averaging(), callback], tokenizer, make_model(), **saving)
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-1")
    assert callback.report["fine_tune"] == str(out)
    kept = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(kept, trainer.model.get_input_embeddings().weight.detach())


@pytest.mark.parametrize("best", [False, True])
def test_a_checkpoint_from_before_the_weights_were_changed_is_not_named(best, train, tmp_path):
    """By another callback at the training's end: an adapter would be relative to other weights."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    if best:
        saving |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    settings = {"output": {"output_format": "adapter"}}
    trainer, report = train(make_model(), before=[Averaging()], settings=settings, **saving)
    out = tmp_path / "out"
    assert report["fine_tune"] == str(out) and (out / "checkpoint-2").is_dir()
    config = json.loads((out / "safeguarded" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out)
    kept = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(kept, trainer.model.get_input_embeddings().weight.detach())
