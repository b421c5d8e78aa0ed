"""How far a repair goes: when a touch-up is trained, when it is released, and what is released."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from jsonschema import validate
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safegene_trl import SafeGeneCallback
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.errors import ConfigError, RejectedError
from safegene_trl.recalibration import search
from safegene_trl.recalibration import touch_up as touching
from safegene_trl.recalibration.objective import Objective
from safegene_trl.reporting.report import SCHEMA
from safegene_trl.step import live_fine_tune
from safegene_trl.step import repair as repair_module
from safegene_trl.step.apply import apply
from safegene_trl.step.history import read_history
from safegene_trl.step.repair import check_repair, with_touch_up
from safegene_trl.step.shipped_weights import beside_weights
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import ALONE, config_of, make_deltas, make_model
from ..test_callback import IDS, sft


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
FILE = "touch_up/safegene_touch_up.safetensors"
BOTH = "vector+touch-up"


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """At a rate at which a tiny model moves within a few steps."""
    monkeypatch.setattr(touching, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(touching, "STEPS", 16)


@pytest.fixture
def config(vector_dir):
    def make(**values):
        quick = {
            "max_utility_loss": 100.0,
            "utility_weight": 0.0,
            "max_evaluations": 3,
            "num_test_prompts": 2,
            "max_new_tokens": 2,
            "repair": BOTH,
        }
        return config_of(**{"vector": str(vector_dir)} | quick | values)

    return make


def made(tokenizer, tmp_path, settings, **kwargs):
    """A fine-tune with the step: its trainer, its report, and the folder of its release."""
    callback = SafeGeneCallback(settings)
    if "model" not in kwargs:
        make_model().save_pretrained(tmp_path / "base")
        kwargs["model"] = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = sft(tmp_path, [callback], tokenizer, **kwargs)
    trainer.train()
    validate(callback.report, SCHEMA)
    return trainer, callback.report, tmp_path / "safeguarded"


def factors_of(folder):
    """By module name, what a released touch-up adds to its weight."""
    factors = load_file(folder / FILE)
    names = {name.rpartition(".lora_")[0] for name in factors}
    return {n: factors[f"{n}.lora_B.weight"] @ factors[f"{n}.lora_A.weight"] for n in names}


def repaired(model, report, folder, vector):
    """A plain model with λ·V and the released touch-up added, worked out from scratch."""
    by_module = vector.space("module").by_module(report["coefficients"])
    extra = factors_of(folder)
    assert extra.keys() == vector.deltas.keys() and all(bool(each.any()) for each in extra.values())
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            weight = model.get_submodule(name).weight
            weight += delta.b @ (by_module[name][:, None] * delta.a) + extra[name]
    return model


def plain(trainer, lora):
    trainer.save_model()
    out = trainer.args.output_dir
    if not lora:
        return AutoModelForCausalLM.from_pretrained(out)
    return PeftModel.from_pretrained(make_model(), out).merge_and_unload()


@pytest.mark.parametrize(
    ("lora", "output_format"),
    [
        (False, "merged"),
        (True, "both"),
        pytest.param(False, "adapter", marks=pytest.mark.exhaustive),
    ],
)
def test_what_is_released_is_the_fine_tune_with_vector_and_touch_up(
    lora, output_format, config, tokenizer, tmp_path, vector_dir
):
    history = {"history": str(tmp_path / "line.jsonl")}
    settings = config(output_format=output_format, output=history)
    peft = LORA if lora else None
    trainer, report, folder = made(tokenizer, tmp_path, settings, peft_config=peft)
    vector = SafetyVector.from_pretrained(vector_dir)
    expected = repaired(plain(trainer, lora), report, folder, vector)(IDS).logits
    if output_format != "adapter":
        found = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(found(IDS).logits, expected, atol=1e-4)
        entry = json.loads((folder / "config.json").read_text())["safegene"]
        sha256 = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
        assert entry["touch_ups"] == [{"rank": 8, "sha256": sha256}]
        assert entry["coefficients"] == report["coefficients"]
        assert report["shipped"]["logit_distances"]["merged"] == 0.0
    if output_format != "merged":
        place = folder / "adapter" if output_format == "both" else folder
        name = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = AutoModelForCausalLM.from_pretrained(name)
        loaded = PeftModel.from_pretrained(base, place).eval()
        assert torch.allclose(loaded(IDS).logits, expected, atol=1e-3)
    repair = report["repair"]
    assert repair["rung"] == BOTH and repair["touch_up"]["accepted"]
    assert repair["reason"].startswith("No limit of the gate says that the vector alone is enough;")
    assert report["files"][FILE] == repair["touch_up"]["sha256"]
    path = [entry["objective"] for entry in repair["touch_up"]["held_out_by_step"]]
    assert min(path) < path[0]
    held_out = repair["touch_up"]["held_out"]
    assert report["held_out"]["after"] == held_out["after"] != held_out["before"]
    (release,) = read_history(tmp_path / "line.jsonl")
    assert release["repair"] == BOTH
    # what is shipped was measured: the vector's rung first
    assert report["phases"]["touch_up"]["seconds"] > 0


def test_coefficients_stay_and_the_model_is_left_as_it_was(config, tokenizer, tmp_path):
    """The live model stays the plain fine-tune, and draws what it would have drawn."""
    states, models, reports = [], [], []
    for repair in ("vector", BOTH):
        model = make_model()
        trainer, report, _ = made(tokenizer, tmp_path / repair, config(repair=repair), model=model)
        states.append(torch.get_rng_state())
        models.append(trainer.model)
        reports.append(report)
    assert torch.equal(*states)
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert models[1].training == models[0].training
    assert not any(module._forward_hooks for module in models[1].modules())
    assert reports[1]["coefficients"] == reports[0]["coefficients"]
    assert "repair" not in reports[0] and reports[1]["repair"]["rung"] == BOTH


@pytest.fixture
def gate(monkeypatch):
    """Outcomes of the gate in the place of its own, one for each rung that is decided."""

    def set_to(*outcomes):
        coming = iter(outcomes)

        def decide(*args):
            return replace(DECIDE(*args), outcome=next(coming))

        monkeypatch.setattr(live_fine_tune, "decide", decide)
        return coming

    return set_to


@pytest.fixture
def passes(monkeypatch):
    """How many passes are made with gradients, of the touch-up's training."""
    counted = Counter()
    original = Objective.gradient_by

    def gradient_by(self, *args):
        counted["steps"] += 1
        return original(self, *args)

    monkeypatch.setattr(Objective, "gradient_by", gradient_by)
    return counted


DECIDE = live_fine_tune.decide
LIMIT = {"max_over_refusal": 1.0}


def test_where_the_vector_alone_keeps_every_limit_nothing_is_trained(
    config, tokenizer, tmp_path, gate, passes
):
    gate("accepted")
    _, report, folder = made(tokenizer, tmp_path, config(gate=LIMIT))
    assert report["repair"] == {
        "rung": "vector",
        "reason": "The vector alone keeps every limit of the gate for sure.",
    }
    assert not passes and "touch_up" not in report["phases"]
    assert not (folder / FILE).parent.exists()
    assert "touch_ups" not in json.loads((folder / "config.json").read_text())["safegene"]


@pytest.mark.parametrize("first", ["accepted_best_effort", "rejected"])
def test_where_a_limit_is_not_kept_for_sure_a_touch_up_is_tried(
    first, config, tokenizer, tmp_path, gate, passes
):
    gate(first, "accepted")
    _, report, _ = made(tokenizer, tmp_path, config(gate=LIMIT))
    assert report["repair"]["rung"] == BOTH and passes["steps"] == 16
    assert report["decision"]["outcome"] == "accepted"
    alone = first.replace("_", " ")
    why = f"The outcome with the vector alone is {alone}; the touch-up is taken: "
    assert report["repair"]["reason"].startswith(why)


LIMITS = {"min_refusal_rate": 1.0, "max_over_refusal": 1.0}


def test_the_limit_that_the_vector_alone_did_not_keep_is_named(config, tokenizer, tmp_path):
    report = made(tokenizer, tmp_path, config(gate=LIMITS | {"write_rejected": True}))[1]
    assert report["repair"]["rung"] == BOTH
    assert report["repair"]["reason"].startswith(
        "The vector alone did not keep `min_refusal_rate` for sure; the touch-up is taken: "
    )


@pytest.mark.parametrize("repair", ["vector", BOTH])
def test_a_rejection_names_the_rung_that_was_not_tried(repair, config, tokenizer, tmp_path):
    with pytest.raises(RejectedError) as rejected:
        made(tokenizer, tmp_path, config(gate=LIMITS, repair=repair))
    assert ("set `search.repair: vector+touch-up`" in str(rejected.value)) == (repair == "vector")


def test_where_the_outcome_is_worse_the_vectors_rung_stands(config, tokenizer, tmp_path, gate):
    """Its numbers, its weights and its decision."""
    gate("accepted_best_effort", "rejected")
    one = made(tokenizer, tmp_path / "one", config(gate=LIMIT))
    gate("accepted_best_effort")
    other = made(tokenizer, tmp_path / "other", config(gate=LIMIT, repair="vector"))
    repair = one[1]["repair"]
    assert repair["rung"] == "vector" and repair["touch_up"]["accepted"]
    assert "rejected, and with the vector alone accepted best effort" in repair["reason"]
    for key in ("decision", "held_out", "measured", "coefficients", "shipped"):
        assert one[1][key] == other[1][key], key
    mine, theirs = (load_file(run[2] / "model.safetensors") for run in (one, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not (one[2] / FILE).exists()


def test_what_the_rule_does_not_take_is_not_released(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(touching, "objection", lambda *losses: "it is too dear")
    _, report, folder = made(tokenizer, tmp_path, config())
    repair = report["repair"]
    assert repair["rung"] == "vector" and not repair["touch_up"]["accepted"]
    assert repair["reason"] == "No touch-up is taken: it is too dear."
    assert report["held_out"]["after"] == repair["touch_up"]["held_out"]["before"]
    assert not (folder / FILE).exists()
    assert report["shipped"]["logit_distances"]["merged"] == 0.0


def test_a_touch_up_can_repair_where_no_coefficients_are_accepted(
    config, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(search, "objection", lambda *losses: "it is too dear")
    _, report, folder = made(tokenizer, tmp_path, config())
    assert set(report["coefficients"].values()) == {0.0}
    assert report["repair"]["rung"] == BOTH and (folder / FILE).is_file()
    assert report["decision"]["outcome"] == "accepted_best_effort"
    # trained on the live weights, where those that were tried last stood before
    losses, path = report["held_out"]["before"], report["repair"]["touch_up"]["held_out_by_step"]
    assert path[0]["objective"] == pytest.approx(losses["safety"] + losses["benign"], rel=1e-5)


def test_a_vector_on_nothing_but_shared_experts_is_refused_before_the_training(
    config, tokenizer, tmp_path
):
    experts = {f"model.layers.1.mlp.experts.down_proj[{i}]": None for i in range(2)}
    with pytest.raises(ConfigError, match="which get no touch-up: set it to `vector`"):
        check_repair(config(), experts)
    check_repair(config(repair="vector"), experts)
    check_repair(config(), experts | {"model.layers.1.mlp.gate_proj": None})
    trainer = sft(tmp_path, [SafeGeneCallback(config())], tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair_module, "plain_modules", lambda names: [])
        with pytest.raises(ConfigError, match="which get no touch-up"):
            trainer.train()
    assert trainer.state.global_step == 0


def test_coefficients_alone_do_not_make_such_a_release(
    config, tokenizer, tmp_path, vector_dir, task_file
):
    """Neither by its report nor by its folder; another search can start from it."""
    _, report, folder = made(tokenizer, tmp_path, config())
    tokenizer.save_pretrained(tmp_path / "base")
    options = config(output_dir=str(tmp_path / "again"), repair="vector", allow_other_base=True)
    for given in (folder, folder / "safegene_report.json"):
        with pytest.raises(ConfigError, match="is of a release with a touch-up, which its coeff"):
            apply(options, str(tmp_path / "base"), coefficients=given)
    assert not (tmp_path / "again").exists()
    warm = config(
        output_dir=str(tmp_path / "warm"),
        repair="vector",
        warm_start=str(folder),
        task_data=str(task_file),
        allow_other_base=True,
    )
    started = apply(warm, str(tmp_path / "base"))
    assert started["history"][0]["coefficients"] == pytest.approx(report["coefficients"])


def test_a_touch_up_is_refused_beside_coefficients(config, model_dir, tmp_path):
    """Nothing is learned with given ones: a release without would say nothing of that."""
    options = config(output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"`search.repair: vector\+touch-up` is set beside"):
        apply(options, str(model_dir), coefficients=0.5)
    assert not (tmp_path / "out").exists()


def test_a_fine_tune_of_such_a_release_keeps_its_touch_up(config, tokenizer, tmp_path, vector_dir):
    """It is a part of the weights that the next one starts from: the change of λ is added, and the
    new touch-up.
    """
    _, first, released = made(tokenizer, tmp_path / "first", config())
    settings = config(warm_start=str(released), allow_other_base=True)
    model = AutoModelForCausalLM.from_pretrained(released)
    trainer, second, folder = made(tokenizer, tmp_path / "second", settings, model=model)
    sums = [run["repair"]["touch_up"]["sha256"] for run in (first, second)]
    assert sums[0] != sums[1]
    marks = [{"rank": 8, "sha256": each} for each in sums]
    assert second["base"]["touch_ups"] == marks[:1]
    assert json.loads((folder / "config.json").read_text())["safegene"]["touch_ups"] == marks
    vector = SafetyVector.from_pretrained(vector_dir)
    before, after = first["coefficients"], second["coefficients"]
    change = {name: after[name] - before[name] for name in after}
    expected = repaired(plain(trainer, False), {"coefficients": change}, folder, vector)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(found(IDS).logits, expected(IDS).logits, atol=1e-4)


def test_stacked_factors_add_what_vector_and_touch_up_add():
    deltas = make_deltas(make_model())
    more = make_deltas(make_model(), layers=(1,), rank=8, seed=9)
    scale = {name: torch.tensor([0.5, 0.25]) for name in deltas}
    both = with_touch_up(ScaledVector(deltas, scale), more)
    assert both.deltas.keys() == deltas.keys()
    for name, delta in deltas.items():
        a, b = both.factors(name)
        expected = delta.b @ (scale[name][:, None] * delta.a)
        if name in more:
            expected = expected + more[name].dense()
        assert torch.allclose(b @ a, expected, atol=1e-6)


def test_deltas_of_several_ranks_act_beside_the_weights():
    model, deltas = make_model(), make_deltas(make_model())
    more = make_deltas(make_model(), layers=(1,), rank=8, seed=9)
    both = with_touch_up(
        ScaledVector(deltas, dict.fromkeys(deltas, torch.tensor([0.5, 0.25]))), more
    )
    with torch.no_grad():
        with beside_weights(model, both, ALONE):
            found = model(IDS).logits
        for name in deltas:
            a, b = both.factors(name)
            model.get_submodule(name).weight += b @ a
        assert torch.allclose(found, model(IDS).logits, atol=1e-4)
