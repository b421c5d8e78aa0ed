"""A vector is never added twice: what a checkpoint says about itself, and what a fine-tune of it takes on."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from safegene_trl.commands.main import main
from safegene_trl.config import SafeGeneConfig
from safegene_trl.errors import ConfigError, FamilyError
from safegene_trl.lineage import carried_coefficients, mark, reported_coefficients
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.recalibration import recalibrate
from safegene_trl.shots import gather_shots
from safegene_trl.vector import SafetyVector

from .conftest import ALONE, make_model, make_vector, task_dataset


LENIENT = ["--safegene.max_utility_loss=1000.0", "--safegene.utility_weight=0.0", "--safegene.max_evaluations=2"]


@pytest.fixture
def helps(monkeypatch):
    monkeypatch.setattr("safegene_trl.recalibration._objection", lambda before, after, budget: "")


@pytest.fixture
def safeguarded(model_dir, vector_dir, task_file, tmp_path, helps):
    """A first release, and the options for a next one."""
    options = [f"--safegene.vector={vector_dir}", f"--safegene.task_data={task_file}", *LENIENT]
    words = ["--model_name_or_path", str(model_dir), *options, f"--safegene.output_dir={tmp_path / 'first'}"]
    assert main(["apply", *words]) == 0
    return tmp_path / "first", options


def report_of(folder):
    return json.loads((folder / "safegene_report.json").read_text())


def test_a_safeguarded_checkpoint_says_so_and_is_refused(safeguarded, vector_dir, tmp_path, capsys):
    first, options = safeguarded
    entry = json.loads((first / "config.json").read_text())["safegene"]
    assert entry["coefficients"] == report_of(first)["coefficients"]
    for more in ([], ["--coefficients", "1"]):
        words = ["--model_name_or_path", str(first), *options, f"--safegene.output_dir={tmp_path / 'second'}", *more]
        assert main(["apply", *words]) == 2
        assert "safeguarded checkpoint already" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("given", [False, True])
def test_a_fine_tune_of_it_is_rebased(safeguarded, vector_dir, tmp_path, given):
    """The weights are in the end those of the fine-tune plus the *change* of the coefficients times the vector."""
    first, options = safeguarded
    model = AutoModelForCausalLM.from_pretrained(first)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    model.save_pretrained(tmp_path / "tuned")  # as a trainer does: the entry in config.json is inherited
    for file in first.glob("token*"):
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    before = report_of(first)["coefficients"]
    assert any(before.values())
    words = ["--model_name_or_path", str(tmp_path / "tuned"), *options]
    words += [f"--safegene.output_dir={tmp_path / 'second'}", *(["--coefficients", "0.25"] if given else [])]
    assert main(["apply", *words]) == 0
    report = report_of(tmp_path / "second")
    after = report["coefficients"]
    assert report["base"]["carries_vector"]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["safegene"]["coefficients"] == after
    if given:
        assert set(after.values()) == {0.25}
    else:
        assert report["history"][0]["coefficients"] == pytest.approx(before)  # it starts where the last release ended
    vector = SafetyVector.from_pretrained(vector_dir)
    change = vector.space("module").by_module({name: after[name] - before[name] for name in after})
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for name, delta in vector.deltas.items():
        expected = model.get_submodule(name).weight + delta.b @ (change[name][:, None] * delta.a)
        torch.testing.assert_close(second.get_submodule(name).weight, expected, atol=1e-5, rtol=1e-5)


def test_carried_coefficients_leave_the_model_as_it_is_and_keep_the_bounds(vector_dir, tokenizer):
    model, vector = make_model(), SafetyVector.from_pretrained(vector_dir)
    config = SafeGeneConfig(vector="v", max_coefficient=0.5, utility_weight=1.0, max_evaluations=4)
    data = gather_shots(config, vector, tokenizer, 256, task_dataset()).data
    space = vector.space("layer")
    held = {"layers.1": 0.4, "layers.2": 0.1}
    found = recalibrate(VectorAttachment(model, vector.deltas, space, ALONE, held), data, config, 0)
    assert found.history[0]["coefficients"] == held and found.history[0]["utility"] == pytest.approx(0, abs=1e-6)
    assert all(0 <= value <= 0.5 for entry in found.history for value in entry["coefficients"].values())
    # the same weights with the vector taken out of them say the same
    plain = make_model()
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            plain.get_submodule(name).weight -= held[f"layers.{name.split('.')[2]}"] * delta.dense()
    again = recalibrate(VectorAttachment(plain, vector.deltas, space, ALONE), data, config, 0, start=held)
    assert again.history[0]["safety"] == pytest.approx(found.history[0]["safety"], abs=1e-5)


def test_another_vector_or_granularity_is_refused(vector_dir, tokenizer):
    vector, model = SafetyVector.from_pretrained(vector_dir), make_model()
    names = {"layers.1": 0.0, "layers.2": 0.0}
    assert carried_coefficients(model, vector, "layer") == names
    by_layer = {"layers.1": 0.5, "layers.2": 0.2}
    model.config.safegene = mark(vector, by_layer)["safegene"]
    by_module = carried_coefficients(model, vector, "module")  # a layer's coefficient is each of its modules'
    assert set(by_module) == set(vector.deltas) and len(by_module) > 2
    assert all(value == by_layer[f"layers.{name.split('.')[2]}"] for name, value in by_module.items())
    made = make_model()
    assert carried_coefficients(made, vector, "module") == dict.fromkeys(by_module, 0.0)
    made.config.safegene = mark(vector, by_module)["safegene"]
    assert carried_coefficients(made, vector, "module") == by_module
    by_part = carried_coefficients(made, vector, "rank")  # and a module's that of each of its rank-one parts
    assert by_part == {f"{name}#{part}": value for name, value in by_module.items() for part in range(2)}
    for held, wanted in ((by_module, "layer"), (by_part, "module")):
        made.config.safegene = mark(vector, held)["safegene"]
        with pytest.raises(FamilyError, match="other kinds of coefficients"):
            carried_coefficients(made, vector, wanted)
    for entry, message in (
        (mark(vector, {"layers.1": 0.5, "layers.2": 0.2}), None),
        (mark(vector, {"layers.1": 0.5}), "other kinds of coefficients"),
        (mark(vector, {"layers.1": -0.5, "layers.2": 0.2}), "other kinds of coefficients"),
        (mark(make_vector(model, tokenizer), names), "another safety vector"),
        ({"safegene": {"vector": 1}}, "damaged"),
        ({"safegene": "yes"}, "damaged"),
    ):
        model.config.safegene = entry["safegene"]
        if message is None:
            assert carried_coefficients(model, vector, "layer") == entry["safegene"]["coefficients"]
        else:
            with pytest.raises(FamilyError, match=message):
                carried_coefficients(model, vector, "layer")


def test_the_search_starts_at_the_last_release(safeguarded, model_dir, vector_dir, tmp_path):
    first, options = safeguarded
    history = tmp_path / "history.jsonl"
    words = ["--model_name_or_path", str(model_dir), *options, f"--safegene.history={history}"]
    assert main(["apply", *words, f"--safegene.output_dir={tmp_path / 'a'}", f"--safegene.warm_start={first}"]) == 0
    a = report_of(tmp_path / "a")
    assert a["history"][0]["coefficients"] == pytest.approx(report_of(first)["coefficients"])
    assert main(["apply", *words, f"--safegene.output_dir={tmp_path / 'b'}"]) == 0
    assert report_of(tmp_path / "b")["history"][0]["coefficients"] == pytest.approx(a["coefficients"])
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["coefficients"] for line in lines] == [a["coefficients"], report_of(tmp_path / "b")["coefficients"]]
    vector = SafetyVector.from_pretrained(vector_dir)
    with pytest.raises(ConfigError, match="no readable report"):
        reported_coefficients("nowhere", vector)
