"""What is accepted is what is written."""

import json
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from safegene_trl import SafeGeneCallback
from safegene_trl.checkpoints import live_merge
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.merge_terms import NO_VECTOR, ScaledVector
from safegene_trl.checkpoints.tensor_file import TensorFile
from safegene_trl.errors import (
    CheckpointError,
    OutputError,
    RejectedError,
    UnsupportedModelError,
)
from safegene_trl.recalibration import search
from safegene_trl.step import live_fine_tune, measurement, probe, shipped_weights

from ..conftest import ALONE, config_of, make_model, make_vector
from ..test_callback import sft


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture
def config(vector_dir):
    def make(**values):
        quick = {
            "max_utility_loss": 100.0,
            "max_evaluations": 3,
            "num_test_prompts": 2,
            "max_new_tokens": 2,
        }
        return config_of(**{"vector": str(vector_dir), "utility_weight": 0.0} | quick | values)

    return make


@pytest.fixture
def probed(monkeypatch):
    """Batches and logits of every probe, as they come."""
    seen = []
    original = probe.response_logits

    def recorded(model, batch):
        logits, targets = original(model, batch)
        seen.append((batch, logits.detach().clone()))
        return logits, targets

    monkeypatch.setattr(probe, "response_logits", recorded)
    return seen


@pytest.mark.parametrize(
    ("lora", "dtype", "output_format"),
    [
        pytest.param(
            lora, dtype, form, marks=() if form == "both" or quick else (pytest.mark.exhaustive,)
        )
        for lora in (True, False)
        for dtype, quick in (("float32", not lora), ("bfloat16", lora))
        for form in ("merged", "adapter", "both")
    ],
)
def test_logits_that_were_measured_are_those_of_the_written_files(
    lora, dtype, output_format, config, tokenizer, tmp_path, probed
):
    kind = getattr(torch, dtype)
    callback = SafeGeneCallback(config(output_format=output_format))
    make_model().save_pretrained(tmp_path / "base")
    # its buffers stay in float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=kind)
    trainer = sft(tmp_path, [callback], tokenizer, model=model, peft_config=LORA if lora else None)
    trainer.train()
    shipped, folder = callback.report["shipped"], tmp_path / "safeguarded"
    measured = probed[2]  # two were passes over one sample before the training
    if output_format != "adapter":
        assert shipped["logit_distances"]["merged"] == 0.0
        kept = shipped["rounding"]
        assert 0 < kept["changed_weights"] <= kept["weights"]
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
        with torch.no_grad():
            again = probe.response_logits(loaded, measured[0])[0]
        assert torch.equal(again, measured[1])
    if output_format != "merged":
        place = folder / "adapter" if output_format == "both" else folder
        assert shipped["logit_distances"]["adapter"] <= (1e-4 if dtype == "float32" else 0.2)
        named = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base" if lora else named, dtype=kind
        )
        loaded = PeftModel.from_pretrained(base, place).eval()
        with torch.no_grad():
            again = probe.response_logits(loaded, measured[0])[0]
        distance = float((again - measured[1]).abs().max())
        assert distance <= (1e-4 if dtype == "float32" else 0.3)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_rounded_to_another_type_is_measured_so(
    lora, dtype, config, tokenizer, tmp_path, probed
):
    """Float32 weights: the logits that were measured are those of the written numbers."""
    kind = getattr(torch, dtype)
    callback = SafeGeneCallback(config(output={"dtype": dtype}, min_coefficient=0.2))
    trainer = sft(tmp_path, [callback], tokenizer, peft_config=LORA if lora else None)
    trainer.train()
    folder, measured = tmp_path / "safeguarded", probed[2]
    written = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {kind}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert callback.report["shipped"]["logit_distances"]["merged"] == 0.0
    assert callback.report["shipped"]["rounding"]["kept"] == pytest.approx(1.0, abs=0.02)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        again = probe.response_logits(loaded, measured[0])[0]
    assert torch.equal(again, measured[1])
    vector = make_vector(make_model(), tokenizer)
    granularity = callback.report["config"]["search"]["granularity"]
    by_module = vector.space(granularity).by_module(callback.report["coefficients"])
    (tmp_path / "exact").mkdir()
    live_merge.save_merged(
        trainer.model,
        ScaledVector(vector.deltas, by_module),
        CheckpointFolder(tmp_path / "exact", tokenizer, "5GB"),
        ALONE,
    )
    for name, exact in load_file(tmp_path / "exact" / "model.safetensors").items():  # cast once
        assert exact.dtype == torch.float32 and torch.equal(exact.to(kind), written[name])


@pytest.mark.parametrize(
    ("live", "dtype"),
    [("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16")],
)
def test_a_type_that_the_live_weights_cannot_hold_is_refused_before_the_training(
    live, dtype, config, tokenizer, tmp_path
):
    """What they cannot hold cannot be measured."""
    model = make_model().to(getattr(torch, live))
    callback = SafeGeneCallback(config(output={"dtype": dtype}))
    trainer = sft(tmp_path, [callback], tokenizer, model=model)
    with pytest.raises(UnsupportedModelError, match=f"{dtype} and the live `.*{live}.*--dtype"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("when", ["before", "in the training"])
def test_numbers_that_float16_cannot_hold_are_named(when, config, tokenizer, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    class Grows(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.get_parameter(name).data[0, 0] = 70000.0

    callback = SafeGeneCallback(config(output={"dtype": "float16"}))
    before = [Grows()] if when != "before" else []
    trainer = sft(tmp_path, [*before, callback], tokenizer)
    if when == "before":
        trainer.model.get_parameter(name).data[0, 0] = 70000.0
    with pytest.raises(OutputError, match=rf"`{name}` has a number of 7e\+04, which is infinite"):
        trainer.train()
    assert trainer.state.global_step == (0 if when == "before" else 2)
    assert not (tmp_path / "safeguarded").exists()


def test_a_written_tensor_of_another_type_is_refused(config, tokenizer, tmp_path, monkeypatch):
    """As if what was asked for were forgotten when it is written."""
    original = live_merge.save_merged

    def forgetting(model, vector, folder, sharding, types):
        original(model, vector, folder, sharding)

    monkeypatch.setattr(live_fine_tune, "save_merged", forgetting)
    trainer = sft(tmp_path, [SafeGeneCallback(config(output={"dtype": "bfloat16"}))], tokenizer)
    with pytest.raises(CheckpointError, match="is float32 and was to be bfloat16"):
        trainer.train()


@pytest.fixture
def merges(monkeypatch):
    """Names of the weights that a merge adds up, as they come."""
    names = []
    for module in (shipped_weights, live_merge):
        original = module.merged_tensor

        def counted(parameter, vector, *rest, original=original, **options):
            if parameter.is_weight and vector.terms(parameter.module_name, False):
                names.append(parameter.name)
            return original(parameter, vector, *rest, **options)

        monkeypatch.setattr(module, "merged_tensor", counted)
    return names


@pytest.mark.parametrize("refused", [0, 2])
def test_a_weight_is_merged_once_to_be_tried_and_measured_and_once_to_be_saved(
    refused, config, tokenizer, tmp_path, monkeypatch, merges
):
    """`refused`: how many shares of the found coefficients are refused."""
    verdicts = iter(["too much"] * refused)
    monkeypatch.setattr(search, "objection", lambda *losses: next(verdicts, ""))
    callback = SafeGeneCallback(config(min_coefficient=0.2))
    trainer = sft(tmp_path, [callback], tokenizer, peft_config=LORA, learning_rate=0.0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    counts = Counter(merges)
    assert len(counts) == 6 and set(counts.values()) == {refused + 2}
    # and the live weights are back
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert callback.report["measured"]["after"]["refusal_rate"]["count"] > 0


@pytest.mark.parametrize("ending", ["rejected", "no start", "in the middle"])
def test_the_live_weights_are_back_however_measuring_ends(
    ending, config, tokenizer, tmp_path, monkeypatch
):
    """Those that were tried last stand in their place until then."""
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tried = []

    def looked(*arguments):
        state = model.state_dict()
        tried.append(any(not torch.equal(state[n], t) for n, t in before.items()))
        return "too much"

    def failing(*arguments):
        looked()
        raise KeyboardInterrupt

    if ending == "rejected":
        monkeypatch.setattr(search, "objection", looked)
    else:
        name = "prompt_tokens" if ending == "no start" else "answers_to_tokens"
        monkeypatch.setattr(measurement, name, failing)
    callback = SafeGeneCallback(config(min_coefficient=0.2))
    trainer = sft(tmp_path, [callback], tokenizer, model=model, learning_rate=0.0)
    with pytest.raises(RejectedError if ending == "rejected" else KeyboardInterrupt):
        trainer.train()
    assert tried and all(tried)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_vector_that_rounding_takes_away_is_refused(tokenizer, tmp_path, config):
    vector = make_vector(make_model().to(torch.bfloat16), tokenizer, std=1e-4)
    vector.save_pretrained(tmp_path / "vector")
    callback = SafeGeneCallback(config(vector=str(tmp_path / "vector")))
    trainer = sft(tmp_path / "out", [callback], tokenizer, model=make_model().to(torch.bfloat16))
    with pytest.raises(RejectedError, match="held-out safety loss went from"):
        trainer.train()
    # the search had found something
    assert max(callback.report["history"][-1]["coefficients"].values()) > 0
    assert not (tmp_path / "out" / "safeguarded").exists()


def test_the_decision_rests_on_the_shipped_weights(config, tokenizer, tmp_path, monkeypatch):
    """A merge that loses the vector is noticed before anything is written."""
    original = shipped_weights.merged_tensor

    def without_vector(parameter, vector, *rest):
        return original(parameter, NO_VECTOR, *rest)

    monkeypatch.setattr(shipped_weights, "merged_tensor", without_vector)
    with pytest.raises(RejectedError, match="held-out safety loss went from"):
        sft(tmp_path, [SafeGeneCallback(config())], tokenizer).train()
    assert not (tmp_path / "safeguarded").exists()


def test_files_that_hold_something_else_are_refused(config, tokenizer, tmp_path, monkeypatch):
    original = TensorFile.write

    def wrong(file, name, data, offset=0):
        if name.endswith("down_proj.weight"):
            data = (data.view(torch.float32) * 1.5).view(torch.uint8)
        original(file, name, data, offset)

    monkeypatch.setattr(TensorFile, "write", wrong)
    trainer = sft(tmp_path, [callback := SafeGeneCallback(config())], tokenizer)
    callback.attach(trainer)
    with pytest.raises(OutputError, match="not the model that was measured"):
        trainer.train()
    assert not (tmp_path / "safeguarded").exists()


def test_tensors_that_files_call_otherwise_are_read_back(config, tokenizer, tmp_path, monkeypatch):
    """As transformers renames modules of some models between memory and files."""

    def renamed(model, tensors):
        return {name.replace("down_proj", "w2"): tensor for name, tensor in tensors.items()}

    monkeypatch.setattr("safegene_trl.models.parameters.revert_weight_conversion", renamed)
    trainer = sft(tmp_path, [callback := SafeGeneCallback(config(min_coefficient=0.2))], tokenizer)
    callback.attach(trainer)
    trainer.train()
    assert callback.report["shipped"]["largest_logit_distance"] == 0.0
    names = load_file(tmp_path / "safeguarded" / "model.safetensors")
    assert any("w2" in name for name in names) and not any("down_proj" in name for name in names)


def test_the_live_model_stays_the_plain_fine_tune(config, tokenizer, tmp_path):
    trainer = sft(tmp_path, [SafeGeneCallback(config())], tokenizer)
    trainer.train()
    saved = load_file(tmp_path / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in saved)


@pytest.mark.parametrize("output_format", ["merged", "adapter"])
def test_the_gate_measures_the_model_that_is_shipped(
    output_format, config, tokenizer, tmp_path, monkeypatch
):
    """In bfloat16, where hooks and merged weights give other logits."""
    answering = []

    @torch.no_grad()
    def answers(model, tokenizer, prompts, *rest):
        answering.append(model(input_ids=IDS).logits)
        return ["Take a pan."] * len(prompts)

    monkeypatch.setattr(measurement, "answers_to_tokens", answers)
    make_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    callback = SafeGeneCallback(config(output_format=output_format, min_coefficient=0.2))
    sft(tmp_path, [callback], tokenizer, model=model, peft_config=LORA).train()
    measured, fine_tune = answering
    assert not torch.equal(measured, fine_tune)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, fine_tune)
    if output_format == "merged":
        shipped = AutoModelForCausalLM.from_pretrained(
            tmp_path / "safeguarded", dtype=torch.bfloat16
        )
        with torch.no_grad():
            assert torch.equal(shipped.eval()(IDS).logits, measured)
    else:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        with torch.no_grad():
            found = PeftModel.from_pretrained(base, tmp_path / "safeguarded").eval()(IDS).logits
        assert (found - measured).abs().max() < (found - fine_tune).abs().max()


def test_measuring_starts_again_with_smaller_batches_where_memory_runs_out(
    config, tokenizer, tmp_path, monkeypatch
):
    sizes, generate = [], measurement.answers_to_tokens

    def small(model, tokenizer, prompts, new_tokens, batch_size, sharding):
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(model, tokenizer, prompts, new_tokens, batch_size, sharding)

    reports = []
    for name, batch_size in (("plain", 2), ("short", 8)):
        callback = SafeGeneCallback(
            config(min_coefficient=0.2, num_test_prompts=4, batch_size=batch_size)
        )
        sft(tmp_path / name, [callback], tokenizer).train()
        reports.append(callback.report)
        monkeypatch.setattr(measurement, "answers_to_tokens", small)
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2}
    measured = [report["measured"] for report in reports]
    assert measured[1] == measured[0] and measured[0]["after"]["refusal_rate"]["count"] > 2


@pytest.mark.parametrize("own", [False, True])
def test_the_report_says_whether_the_vectors_own_prompts_decided(own, config, tokenizer, tmp_path):
    gate = {"max_over_refusal": 1.0}
    if own:
        rows = [{"prompt": f"name the {word} river"} for word in ("longest", "oldest", "coldest")]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        gate["benign_data"] = str(tmp_path / "own.jsonl")
    callback = SafeGeneCallback(config(gate=gate, min_coefficient=0.2, num_benign_shots=4))
    sft(tmp_path, [callback], tokenizer).train()
    decision = callback.report["decision"]
    assert decision["independent_prompts"] is own
    assert ("came with the vector itself" in decision["reason"]) != own
    card = (tmp_path / "safeguarded" / "README.md").read_text()
    assert ("came with the vector itself" in card) != own


def test_answers_in_languages_that_the_judge_does_not_know_are_told(
    config, tokenizer, tmp_path, monkeypatch, caplog
):
    answer = "Przepraszam, nie mogę w tym pomóc, proszę zapytać o coś innego."
    monkeypatch.setattr(measurement, "answers_to_tokens", lambda *given: [answer] * len(given[2]))
    callback = SafeGeneCallback(config(gate={"max_utility_loss": 1.0}))
    sft(tmp_path, [callback], tokenizer).train()
    report, said = callback.report, "so that refusals and over-refusal were not measured: judge"
    assert any(said in warning for warning in report["warnings"]) and said in caplog.text
    assert said in report["decision"]["reason"]
    card = (tmp_path / "safeguarded" / "README.md").read_text()
    assert "without a measurement of refusals" in card


@pytest.mark.parametrize("plots", [True, False])
def test_a_plot_that_cannot_be_written_costs_no_checkpoint(
    plots, config, tokenizer, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("matplotlib")

    def full(figure, file, **options):
        raise OSError(28, "No space left on device")

    if not plots:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    callback = SafeGeneCallback(config(min_coefficient=0.2))
    sft(tmp_path, [callback], tokenizer).train()
    folder = tmp_path / "safeguarded"
    assert callback.report["status"] == "safeguarded" and (folder / "model.safetensors").is_file()
    assert (
        bool(list(folder.glob("*.png"))) == plots and ("could not be drawn" in caplog.text) != plots
    )
