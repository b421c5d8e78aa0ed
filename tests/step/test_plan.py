"""What would fail at the end of a step is refused before its first training step, and by a dry run."""

import json
from types import MethodType

import pytest
import torch
from torch import nn

from safegene_trl import SafeGeneCallback, SafeGeneError, SafetyVector
from safegene_trl.checkpoints.contents import MARKER
from safegene_trl.checkpoints.renaming import temporary_name
from safegene_trl.commands.main import main
from safegene_trl.errors import RejectedError
from safegene_trl.models.low_rank import LowRankDelta

from ..conftest import config_of, make_model, make_vector, options_of
from ..test_callback import sft


@pytest.fixture
def config(vector_dir):
    def make(**values):
        quick = {
            "max_utility_loss": 100.0,
            "utility_weight": 0.0,
            "max_evaluations": 2,
            "num_test_prompts": 0,
        }
        return config_of(**{"vector": str(vector_dir)} | quick | values)

    return make


def reading_weights(mlp, x):
    """As a fused kernel computes the block: the modules are never called."""
    gate, up = (nn.functional.linear(x, linear.weight) for linear in (mlp.gate_proj, mlp.up_proj))
    return nn.functional.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight)


def bypassed(model, tokenizer, folder):
    mlp = model.model.layers[1].mlp
    mlp.forward = MethodType(reading_weights, mlp)
    return {}


def unsavable_generation_config(model, tokenizer, folder):
    model.generation_config.top_p, model.generation_config.do_sample = 0.3, False
    return {}


def vector_on_a_tied_head(model, tokenizer, folder):
    vector = make_vector(model, tokenizer)
    vector.deltas["lm_head"] = LowRankDelta(torch.ones(2, 32), torch.ones(320, 2))
    vector.save_pretrained(folder / "vector")
    return {"vector": str(folder / "vector")}


def history_of_another_shape(model, tokenizer, folder):
    (folder / "history.jsonl").write_text('{"outcome": "accepted"}\n')
    return {"history": str(folder / "history.jsonl")}


def history_that_cannot_be_written(model, tokenizer, folder):
    return {"history": "/proc/history.jsonl"}


def link_for_an_output(model, tokenizer, folder):
    (folder / "there").mkdir()
    (folder / "safeguarded").symlink_to(folder / "there")
    return {"output_dir": str(folder / "safeguarded")}


def output_of_the_trainer(model, tokenizer, folder):
    return {"output_dir": str(folder / "out")}


def output_around_the_trainers(model, tokenizer, folder):
    return {"output_dir": str(folder)}


def name_that_is_too_long(model, tokenizer, folder):
    return {"output_dir": str(folder / ("x" * 240))}


def hub_that_cannot_be_reached(model, tokenizer, folder):
    """As the tests are: offline."""
    return {"hub_model_id": "me/x"}


REFUSED = {
    bypassed: "`model.layers.1.mlp.down_proj` is never called",
    unsavable_generation_config: "Saving the generation config failed",
    vector_on_a_tied_head: "changes `lm_head`, whose weight the model shares",
    history_of_another_shape: "[Ll]ine 1 of the history",
    history_that_cannot_be_written: "/proc/history.jsonl cannot be written",
    link_for_an_output: "symbolic link",
    output_of_the_trainer: "out is the trainer's `output_dir` .*itself",
    output_around_the_trainers: "holds the trainer's `output_dir`",
    name_that_is_too_long: "too long",
    hub_that_cannot_be_reached: "cannot be looked up on the hub .*offline",
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_refused_before_the_first_step(spoil, dry_run, config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    model = make_model()
    settings = spoil(model, tokenizer, tmp_path)
    callback = SafeGeneCallback(config(dry_run=dry_run, **settings))
    trainer = sft(tmp_path / "out", [callback], tokenizer, model=model)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SafeGeneError, match=REFUSED[spoil]) as raised:
        trainer.train()
    assert "\n" not in str(raised.value) and trainer.state.global_step == 0
    assert sorted(tmp_path.rglob("*")) == before


INPUTS = {  # setting, and what the refusal calls it
    "vector": "the safety vector",
    "history": "the history",
    "public_key": "the public key",
    "safety_data": "the safety data",
    "task_data": "the task data",
    "warm_start": "the earlier release",
    "gate.harmful_data": "the gate's data",
    "gate.benign_data": "the gate's data",
    "model": "the fine-tune",
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_output_that_would_cost_an_input_is_refused(
    name, model_dir, vector_dir, task_file, tokenizer, tmp_path, monkeypatch, capsys
):
    """Equal to it, or around it; a dry run, so that each is refused by its place and for nothing
    that is in it.
    """
    own = SafetyVector.from_pretrained
    monkeypatch.setattr(
        SafetyVector, "from_pretrained", lambda name, **options: own(str(vector_dir))
    )
    place = tmp_path / "inputs" / "one"
    place.mkdir(parents=True)
    settings = {"vector": vector_dir, name: place} if name != "model" else {"vector": vector_dir}
    if name == "model":
        for part in (make_model(), tokenizer):
            part.save_pretrained(place)
    words = [
        "apply",
        "--model_name_or_path",
        str(place if name == "model" else model_dir),
        "--coefficients=0.5",
    ]
    words += options_of(settings)
    before = sorted(tmp_path.rglob("*"))
    for target, relation in ((place, "is"), (place.parent, "holds")):
        assert (
            main([*words, "--safegene.dry_run=true", f"--safegene.output.output_dir={target}"]) == 2
        )
        assert f"{target} {relation} {INPUTS[name]} {place}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def earlier_checkpoint(target):
    """One that a run has moved aside which was killed before it put its own in the place."""
    aside = temporary_name(target, "old")
    aside.mkdir(parents=True)
    (aside / MARKER).write_text(json.dumps({"status": "safeguarded"}))
    return aside


def test_what_a_killed_run_moved_aside_comes_back_whatever_the_next_one_decides(
    config, tokenizer, tmp_path, capsys
):
    target = tmp_path / "release"
    aside = earlier_checkpoint(target)
    # every coefficient but 0 moves the fine-tune
    settings = {
        "output_dir": str(target),
        "max_utility_loss": 0.0,
    }
    with pytest.raises(SystemExit):
        sft(
            tmp_path / "out", [SafeGeneCallback(config(dry_run=True, **settings))], tokenizer
        ).train()
    assert (
        f"moved to {aside.name}, would be put back first" in capsys.readouterr().out
        and aside.is_dir()
    )
    with pytest.raises(RejectedError):
        sft(tmp_path / "out", [SafeGeneCallback(config(**settings))], tokenizer).train()
    assert (
        json.loads((target / MARKER).read_text()) == {"status": "safeguarded"}
        and not aside.exists()
    )
