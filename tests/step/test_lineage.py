"""A vector is never added twice: what a checkpoint says about itself, and what a fine-tune of it
takes on.
"""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safegene_trl import apply
from safegene_trl.commands.main import main
from safegene_trl.data.shots import gather_shots
from safegene_trl.errors import ConfigError, FamilyError
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.step.history import append_release
from safegene_trl.step.lineage import (
    ROUNDING,
    Carried,
    carried_coefficients,
    check_no_subtraction,
    check_verified,
    mark,
    reported_coefficients,
)
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import ALONE, config_of, make_model, make_vector, task_dataset, with_lora
from .test_history import release


LENIENT = [
    "--safegene.search.max_utility_loss=1000.0",
    "--safegene.search.utility_weight=0.0",
    "--safegene.search.max_evaluations=2",
]


@pytest.fixture
def helps(monkeypatch):
    monkeypatch.setattr(
        "safegene_trl.recalibration.search.objection", lambda before, after, budget: ""
    )


@pytest.fixture
def safeguarded(model_dir, vector_dir, task_file, tmp_path, helps):
    """A first release, and the options for a next one."""
    options = [
        f"--safegene.vector={vector_dir}",
        f"--safegene.data.task_data={task_file}",
        *LENIENT,
    ]
    words = [
        "--model_name_or_path",
        str(model_dir),
        *options,
        f"--safegene.output.output_dir={tmp_path / 'first'}",
    ]
    assert main(["apply", *words]) == 0
    return tmp_path / "first", options


def edited(entry, name, value):
    """As somebody changes a `config.json` who does not know what belongs together."""
    entry["safegene"]["coefficients"][name] = value
    return entry


def claim(folder, vector, values):
    """Writes a whole, wrong entry into a checkpoint's `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | mark(vector, values)))


def report_of(folder):
    return json.loads((folder / "safegene_report.json").read_text())


def test_a_safeguarded_checkpoint_says_so_and_is_refused(safeguarded, vector_dir, tmp_path, capsys):
    first, options = safeguarded
    entry = json.loads((first / "config.json").read_text())["safegene"]
    assert entry["coefficients"] == report_of(first)["coefficients"]
    for more in ([], ["--coefficients", "1"]):
        words = [
            "--model_name_or_path",
            str(first),
            *options,
            f"--safegene.output.output_dir={tmp_path / 'second'}",
            *more,
        ]
        assert main(["apply", *words]) == 2
        assert "safeguarded checkpoint already" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("given", [False, True])
def test_a_fine_tune_of_it_is_rebased(safeguarded, vector_dir, tmp_path, capsys, given):
    """The weights are in the end those of the fine-tune plus the *change* of the coefficients times
    the vector.
    """
    first, options = safeguarded
    model = AutoModelForCausalLM.from_pretrained(first)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    # as a trainer does: the entry in config.json is inherited
    model.save_pretrained(tmp_path / "tuned")
    for file in [*first.glob("token*"), *first.glob("chat_template*")]:
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    before = report_of(first)["coefficients"]
    assert any(before.values())
    words = ["--model_name_or_path", str(tmp_path / "tuned"), *options]
    words += [
        f"--safegene.output.output_dir={tmp_path / 'second'}",
        *(["--coefficients", "0.25"] if given else []),
    ]
    assert main(["apply", *words]) == 2  # the fine-tune does not say where it started from
    assert (
        "as `search.warm_start`" in capsys.readouterr().err and not (tmp_path / "second").exists()
    )
    assert main(["apply", *words, f"--safegene.search.warm_start={first}"]) == 0
    report = report_of(tmp_path / "second")
    assert report["base"]["carried"] == {"claim": "verified", "source": f"the report {first}"}
    after = report["coefficients"]
    assert report["base"]["carries_vector"]
    assert (
        json.loads((tmp_path / "second" / "config.json").read_text())["safegene"]["coefficients"]
        == after
    )
    if given:
        assert set(after.values()) == {0.25}
    else:
        # it starts where the last release ended
        assert report["history"][0]["coefficients"] == pytest.approx(before)
    vector = SafetyVector.from_pretrained(vector_dir)
    change = vector.space("module").by_module({name: after[name] - before[name] for name in after})
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for name, delta in vector.deltas.items():
        expected = model.get_submodule(name).weight + delta.b @ (change[name][:, None] * delta.a)
        torch.testing.assert_close(
            second.get_submodule(name).weight, expected, atol=1e-5, rtol=1e-5
        )


def test_carried_coefficients_leave_the_model_as_it_is_and_keep_the_bounds(vector_dir, tokenizer):
    model, vector = make_model(), SafetyVector.from_pretrained(vector_dir)
    config = config_of(vector="v", max_coefficient=0.5, utility_weight=1.0, max_evaluations=4)
    data = gather_shots(config, vector, tokenizer, 256, task_dataset()).data
    space = vector.space("layer")
    held = {"layers.1": 0.4, "layers.2": 0.1}
    found = recalibrate(VectorAttachment(model, vector.deltas, space, ALONE, held), data, config, 0)
    assert found.history[0]["coefficients"] == held and found.history[0][
        "utility"
    ] == pytest.approx(0, abs=1e-6)
    assert all(
        0 <= value <= 0.5 for entry in found.history for value in entry["coefficients"].values()
    )
    # the same weights with the vector taken out of them say the same
    plain = make_model()
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            plain.get_submodule(name).weight -= held[f"layers.{name.split('.')[2]}"] * delta.dense()
    again = recalibrate(
        VectorAttachment(plain, vector.deltas, space, ALONE), data, config, 0, start=held
    )
    assert again.history[0]["safety"] == pytest.approx(found.history[0]["safety"], abs=1e-5)


def test_another_vector_or_granularity_is_refused(vector_dir, tokenizer):
    vector, model = SafetyVector.from_pretrained(vector_dir), make_model()
    names = {"layers.1": 0.0, "layers.2": 0.0}
    assert carried_coefficients(model, vector, "layer") == names
    by_layer = {"layers.1": 0.5, "layers.2": 0.2}
    model.config.safegene = mark(vector, by_layer)["safegene"]
    # a layer's coefficient is each of its modules'
    by_module = carried_coefficients(model, vector, "module")
    assert set(by_module) == set(vector.deltas) and len(by_module) > 2
    assert all(
        value == by_layer[f"layers.{name.split('.')[2]}"] for name, value in by_module.items()
    )
    made = make_model()
    assert carried_coefficients(made, vector, "module") == dict.fromkeys(by_module, 0.0)
    made.config.safegene = mark(vector, by_module)["safegene"]
    assert carried_coefficients(made, vector, "module") == by_module
    # and a module's that of each of its rank-one parts
    by_part = carried_coefficients(made, vector, "rank")
    assert by_part == {
        f"{name}#{part}": value for name, value in by_module.items() for part in range(2)
    }
    for held, wanted in ((by_module, "layer"), (by_part, "module")):
        made.config.safegene = mark(vector, held)["safegene"]
        with pytest.raises(FamilyError, match="other kinds of coefficients"):
            carried_coefficients(made, vector, wanted)
    for entry, message in (
        (mark(vector, {"layers.1": 0.5, "layers.2": 0.2}), None),
        (mark(vector, {"layers.1": 0.5}), "other kinds of coefficients"),
        (mark(vector, {"layers.1": -0.5, "layers.2": 0.2}), "damaged"),
        (mark(vector, {"layers.1": float("nan"), "layers.2": 0.2}), "damaged"),
        (mark(vector, {"layers.1": 1e6, "layers.2": 0.2}), "damaged"),
        (mark(vector, {"layers.1": True, "layers.2": 0.2}), "damaged"),
        (mark(vector, {}), "damaged"),
        (edited(mark(vector, names), "layers.1", 0.1), "damaged"),
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
    words = [
        "--model_name_or_path",
        str(model_dir),
        *options,
        f"--safegene.output.history={history}",
    ]
    assert (
        main(
            [
                "apply",
                *words,
                f"--safegene.output.output_dir={tmp_path / 'a'}",
                f"--safegene.search.warm_start={first}",
            ]
        )
        == 0
    )
    a = report_of(tmp_path / "a")
    assert a["history"][0]["coefficients"] == pytest.approx(report_of(first)["coefficients"])
    assert main(["apply", *words, f"--safegene.output.output_dir={tmp_path / 'b'}"]) == 0
    assert report_of(tmp_path / "b")["history"][0]["coefficients"] == pytest.approx(
        a["coefficients"]
    )
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["coefficients"] for line in lines] == [
        a["coefficients"],
        report_of(tmp_path / "b")["coefficients"],
    ]
    vector = SafetyVector.from_pretrained(vector_dir)
    with pytest.raises(ConfigError, match="no readable report"):
        reported_coefficients("nowhere", vector)


def test_a_claim_that_is_too_large_subtracts_nothing(safeguarded, vector_dir, tmp_path, capsys):
    """`config.json` says λ = 5, or 1.9, of weights that hold less: `--coefficients 0.5` would take
    the difference out of them.
    """
    first, options = safeguarded
    vector = SafetyVector.from_pretrained(vector_dir)
    for file in first.glob("*report*"):
        file.unlink()
    for value, more, message in (
        (5.0, [], "more than `search.max_coefficient` (2)"),
        (
            5.0,
            ["--safegene.search.max_coefficient=6"],
            "would subtract 4.5 times the vector at `model.layers.1",
        ),
        (1.9, [], "would subtract 1.4 times the vector at `model.layers.1"),
        (1.9, ["--granularity"], "would subtract"),
    ):
        claim(first, vector, dict.fromkeys(vector.deltas, value))
        words = ["--model_name_or_path", str(first), "--coefficients", "0.5", *options]
        words += [
            f"--safegene.output.output_dir={tmp_path / 'second'}",
            *(["--safegene.search.granularity=rank"] if more == ["--granularity"] else more),
        ]
        assert main(["apply", *words]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "second").exists()
    claim(first, vector, dict.fromkeys(vector.deltas, 0.4))
    assert main(["apply", *words]) == 0  # nothing is taken out: a warning is enough
    report = report_of(tmp_path / "second")
    assert report["base"]["carried"] == {"claim": "unverified", "source": None}
    assert any("Nothing confirms the coefficients" in warning for warning in report["warnings"])


def test_what_confirms_a_claim(safeguarded, vector_dir, tmp_path):
    first, _ = safeguarded
    vector, held = SafetyVector.from_pretrained(vector_dir), report_of(first)["coefficients"]
    model = with_lora(make_model())
    model.base_model.model.config.safegene = mark(vector, held)["safegene"]
    own = {"vector": {"name": "v", "sha256": mark(vector, held)["safegene"]["vector"]}}
    append_release(tmp_path / "yes.jsonl", release(coefficients=held, **own))
    append_release(tmp_path / "yes.jsonl", release(coefficients={"layers.1": 0.5}, **own))
    append_release(tmp_path / "no.jsonl", release(coefficients=held))  # with another vector
    append_release(
        tmp_path / "no.jsonl", release(coefficients=held | {next(iter(held)): 0.0123}, **own)
    )

    def found(granularity="module", base=None, **values):
        return carried_coefficients(
            model, vector, granularity, config_of(vector="v", **values), base
        )

    assert found().verified is False and found().record == {"claim": "unverified", "source": None}
    assert found(base=str(tmp_path)).verified is False and found(base="no/where").verified is False
    assert found(history=str(tmp_path / "no.jsonl")).verified is False
    with pytest.raises(FamilyError, match="nothing confirms how much"):
        check_verified(found())
    for source, sure in (
        ("the report beside", found(base=str(first))),
        ("the report ", found(warm_start=str(first))),
        ("the history", found(history=str(tmp_path / "yes.jsonl"))),
        ("the report beside", found("rank", base=str(first))),
    ):
        check_verified(sure)
        assert sure.verified and sure.source.startswith(source) and sure.warnings == []
    assert found() == held and found().warnings
    name = next(name for name, value in held.items() if value)
    model.base_model.model.config.safegene = mark(vector, held | {name: held[name] / 2})["safegene"]
    with pytest.raises(FamilyError, match=f"the report beside .* do not say the same.*{name}"):
        found(base=str(first))
    assert carried_coefficients(make_model(), vector, "module").verified is None


def test_touch_ups_are_held_against_the_earlier_release(safeguarded, vector_dir):
    """A `config.json` that has lost one, or names another, is not the release's."""
    first, _ = safeguarded
    vector, report = SafetyVector.from_pretrained(vector_dir), report_of(first)
    held = report["coefficients"]
    marks = [{"rank": 8, "sha256": letter * 64} for letter in "ab"]
    report["base"]["touch_ups"] = marks[:1]
    report["repair"] = {"rung": "vector+touch-up", "reason": "r", "touch_up": marks[1]}
    (first / "safegene_report.json").write_text(json.dumps(report))
    model = make_model()

    def found(touch_ups, base=None, **values):
        model.config.safegene = mark(vector, held, touch_ups)["safegene"]
        return carried_coefficients(
            model, vector, "module", config_of(vector="v", **values), base and str(base)
        )

    for sure in (found(marks, first), found(marks, warm_start=str(first))):
        assert sure.verified and sure.touch_ups == marks
    for other in (marks[:1], marks[::-1], []):
        with pytest.raises(FamilyError, match=r"report beside .* do not say the same.*`touch_ups`"):
            found(other, first)
        assert found(other, warm_start=str(first)).verified is False


@pytest.mark.parametrize(
    "touch_up",
    [{"rank": 0, "sha256": "a" * 64}, {"rank": 8, "sha256": "z" * 64}, {"rank": 8}, "x"],
)
def test_touch_ups_that_cannot_be_are_damage(vector_dir, touch_up):
    """What a report could not hold by its schema is not taken on."""
    vector, model = SafetyVector.from_pretrained(vector_dir), make_model()
    model.config.safegene = mark(vector, dict.fromkeys(vector.deltas, 0.5), [touch_up])["safegene"]
    with pytest.raises(FamilyError, match=r"`safegene` in the model's config\.json is damaged"):
        carried_coefficients(model, vector, "module")


def test_nothing_is_subtracted_that_may_not_be_there():
    claimed = {"a": 0.5, "b": 0.0}
    sure, unsure = Carried(claimed, "the report"), Carried(claimed)
    for carried in (sure, unsure, None):
        check_no_subtraction({"a": 0.0, "b": -1e-9}, carried)
        check_no_subtraction({"a": 0.3, "b": -ROUNDING / 2}, carried)
        for bad in (
            {"a": 0.1, "b": -0.01},
            {"b": float("nan")},
            {"b": -float("inf")},
            {"a": -0.51},
        ):
            with pytest.raises(FamilyError, match=r"`[ab]`"):
                check_no_subtraction(bad, carried)
    check_no_subtraction({"a": -0.5, "b": 0.0}, sure)
    for carried in (unsure, None):
        with pytest.raises(
            FamilyError, match=r"subtract 0\.2 times the vector at `a`.*as `search.warm_start`"
        ):
            check_no_subtraction({"a": -0.2}, carried)


@pytest.mark.parametrize("value", ["NaN", "1e999", "-0.1", "1e308", '"0.5"', "true", "null"])
def test_a_report_with_an_impossible_coefficient_is_named(vector_dir, tmp_path, value):
    vector = SafetyVector.from_pretrained(vector_dir)
    report = {
        "vector": {"files": vector.files},
        "coefficients": {"layers.1": 0.5, "layers.2": "HERE"},
    }
    (tmp_path / "warm.json").write_text(json.dumps(report).replace('"HERE"', value))
    with pytest.raises(ConfigError, match=r"coefficient of `layers\.2` in .*warm\.json"):
        reported_coefficients(str(tmp_path / "warm.json"), vector)


def test_it_is_named_at_the_start(model_dir, vector_dir, task_file, tmp_path, capsys):
    report = {
        "vector": {"files": SafetyVector.from_pretrained(vector_dir).files},
        "coefficients": {"a": float("nan")},
    }
    (tmp_path / "warm.json").write_text(json.dumps(report))
    words = ["--model_name_or_path", str(model_dir), f"--safegene.vector={vector_dir}", *LENIENT]
    words += [
        f"--safegene.data.task_data={task_file}",
        f"--safegene.output.output_dir={tmp_path / 'out'}",
    ]
    for more in (
        [f"--safegene.search.warm_start={tmp_path / 'warm.json'}", "--safegene.dry_run=true"],
        ["--coefficients", str(tmp_path / "warm.json")],
    ):
        assert main(["apply", *words, *more]) == 2
        assert "The coefficient of `a` in" in capsys.readouterr().err
    for number in ("1e308", "nan", "-0.5"):
        assert main(["apply", *words, "--coefficients", number]) == 2
        assert "must be 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_safeguarded_adapter_is_refused_wherever_it_lies(vector_dir, model_dir, tmp_path):
    """Also in the folder of a merged checkpoint, and as a copy: no report lies beside it there."""
    model = with_lora(make_model())
    model.peft_config["default"].base_model_name_or_path = str(model_dir)
    model.save_pretrained(tmp_path / "tuned")

    def again(name, out, output_format="merged"):
        output = {"output_dir": str(tmp_path / out), "output_format": output_format}
        config = config_of(vector=str(vector_dir), output=output)
        return apply(config, tmp_path / name, coefficients=0.5)["status"]

    assert again("tuned", "both", "both") == again("tuned", "alone", "adapter") == "safeguarded"
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "alone" / name, copied)
    for name in ("both/adapter", "alone", "copied"):
        with pytest.raises(ConfigError, match=f"{name} is a safeguarded checkpoint already"):
            again(name, "again")
    PeftModel.from_pretrained(make_model(), copied)  # whoever serves it reads on
