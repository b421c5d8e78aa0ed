"""The safety step with given coefficients, from files to files."""

import errno
import json
import os
import re
import shutil

import jsonschema
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, CLIPImageProcessorPil, LlavaProcessor

from safegene_trl import SafetyVector
from safegene_trl.checkpoints.loading import load_processor
from safegene_trl.commands.main import main
from safegene_trl.reporting.report import SCHEMA
from safegene_trl.step.history import read_history

from ..architectures import make_architecture
from ..conftest import make_model, make_tokenizer, make_vector, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture
def apply(vector_dir, tmp_path):
    """Runs `safegene apply` with given coefficients; returns its exit code and the folder."""

    def run(model, coefficients, *options):
        target = tmp_path / "applied"
        words = ["apply", "--model_name_or_path", str(model), "--coefficients", str(coefficients)]
        return main(
            [
                *words,
                f"--safegene.vector={vector_dir}",
                f"--safegene.output.output_dir={target}",
                *options,
            ]
        ), target

    return run


def test_one_number_for_all(apply, model_dir, vector_dir, tokenizer, capsys):
    code, target = apply(model_dir, 0.5)
    assert code == 0
    before, after = (
        load_file(model_dir / "model.safetensors"),
        load_file(target / "model.safetensors"),
    )
    vector = SafetyVector.from_pretrained(vector_dir)
    for name, tensor in before.items():
        delta = vector.deltas.get(name.removesuffix(".weight"))
        expected = tensor if delta is None else tensor + 0.5 * delta.dense()
        torch.testing.assert_close(after[name], expected)
    report = json.loads((target / "safegene_report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["coefficients"] == dict.fromkeys(vector.deltas, 0.5)
    assert report["decision"]["reason"] == "The coefficients were given: nothing was measured."
    assert "held_out" not in report and "answers" not in report
    assert report["shipped"]["rounding"]["kept"] == pytest.approx(1.0)
    assert (
        0
        < report["shipped"]["rounding"]["changed_weights"]
        <= report["shipped"]["rounding"]["weights"]
    )
    assert main(["inspect", str(target)]) == 0
    assert "λ = 0.500" in capsys.readouterr().out


def test_a_full_fine_tune_is_the_base_of_its_adapter(apply, model_dir, vector_dir):
    code, target = apply(model_dir, 0.5, "--safegene.output.output_format=adapter")
    named = json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert code == 0 and named == str(model_dir)
    written = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), target)
    expected = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for name, delta in SafetyVector.from_pretrained(vector_dir).deltas.items():
            expected.get_submodule(name).weight += 0.5 * delta.dense()
    torch.testing.assert_close(written(IDS).logits, expected(IDS).logits, atol=1e-4, rtol=1e-4)


NO_ADAPTER = {  # the base model, and the LoRA on it
    "DoRA": (lambda: make_model(), {"use_dora": True}),
    "modules_to_save": (lambda: make_model(tied=False), {"modules_to_save": ["lm_head"]}),
    "saved layers": (
        lambda: make_model(),
        {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    ),
    "biases": (lambda: make_model("qwen2"), {"bias": "all"}),
    "tokens": (lambda: make_model(), {"trainable_token_indices": [5, 7]}),
    "embeddings": (lambda: make_model(tied=False), {"target_modules": ["embed_tokens"]}),
    "experts": (
        lambda: make_architecture("mixtral"),
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("kind", NO_ADAPTER)
def test_files_of_what_no_adapter_of_linear_layers_can_hold(kind, apply, tmp_path, capsys):
    make, options = NO_ADAPTER[kind]
    make().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    adapted = with_lora(make(), **options)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    code, target = apply(tmp_path / "adapter", 0.5, "--safegene.output.output_format=adapter")
    assert code == 2 and not target.exists()
    assert "set `output.output_format: merged`" in capsys.readouterr().err


@pytest.mark.parametrize("output_format", ["merged", "adapter", "both"])
def test_an_earlier_report_gives_the_same_weights(
    output_format, apply, model_dir, task_file, tokenizer, tmp_path
):
    adapted = with_lora(make_model())
    adapted.peft_config["default"].base_model_name_or_path = str(model_dir)
    adapted.save_pretrained(tmp_path / "adapter")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    _, found = apply(model_dir, 0.25)
    report = json.loads((found / "safegene_report.json").read_text())
    report["coefficients"] = {"layers.1": 0.7, "layers.2": 0.1}
    (earlier / "safegene_report.json").write_text(json.dumps(report))
    code, target = apply(
        tmp_path / "adapter", earlier, f"--safegene.output.output_format={output_format}"
    )
    assert code == 0
    expected = adapted.merge_and_unload()
    for name, delta in make_vector(make_model(), tokenizer).deltas.items():
        expected.get_submodule(name).weight.data += (
            report["coefficients"][f"layers.{name.split('.')[2]}"] * delta.dense()
        )
    places = {"merged": [target], "adapter": [target], "both": [target, target / "adapter"]}[
        output_format
    ]
    for place in places:
        if (place / "adapter_config.json").is_file():
            loaded = PeftModel.from_pretrained(make_model(), place)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(place)
        torch.testing.assert_close(loaded(IDS).logits, expected(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ("-0.5", "must be 0 or more"),
        ("nan", "must be 0 or more"),
        ("no-such-file", "no readable report"),
        ('{"coefficients": {"layers.9": 1.0}}', "no report of a safety step"),
        ('{"coefficients": {"layers.9": 1.0}, "vector": {"files": {}}}', "another safety vector"),
        ("same vector, other layers", "not those of this vector"),
    ],
)
def test_bad_coefficients_are_refused_before_anything_is_written(
    coefficients, message, apply, model_dir, vector_dir, tmp_path, capsys
):
    if not coefficients.startswith(("-", "n")):
        if coefficients.startswith("same"):
            files = SafetyVector.from_pretrained(vector_dir).files
            coefficients = json.dumps(
                {"coefficients": {"layers.9": 1.0}, "vector": {"files": files}}
            )
        (tmp_path / "report.json").write_text(coefficients)
        coefficients = tmp_path / "report.json"
    code, target = apply(model_dir, f"{coefficients}")
    assert code == 2 and not target.exists()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_limits_of_a_gate_are_refused_where_nothing_is_measured(
    dry_run, apply, model_dir, tmp_path, capsys
):
    options = [
        "--safegene.gate.min_refusal_rate=0.99",
        f"--safegene.output.history={tmp_path / 'h'}",
    ]
    code, target = apply(model_dir, 0.5, *options, f"--safegene.dry_run={dry_run}")
    assert code == 2 and not target.exists() and not (tmp_path / "h").exists()
    assert "`gate.min_refusal_rate` is set beside `coefficients`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ("0", "all 0"),
        ("1e-400", "all 0"),
        ("1e-30", "too small to be told from 0"),
        ("1.1e-5", "0 of .* would change"),
    ],
)
@pytest.mark.parametrize("output_format", ["merged", "adapter"])
def test_coefficients_that_change_no_weight_are_refused(
    coefficients, message, output_format, apply, tokenizer, tmp_path, capsys
):
    if coefficients == "1.1e-5" and output_format == "adapter":
        pytest.skip("its factors hold it")
    adapted = make_model()
    for parameter in adapted.parameters():
        parameter.data.copy_(torch.where(parameter >= 0, 1e4, -1e4))
    adapted.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = [
        f"--safegene.output.output_format={output_format}",
        "--safegene.allow_other_base=true",
    ]
    code, target = apply(tmp_path / "model", coefficients, *options)
    assert code == 2 and not target.exists()
    assert re.search(message, capsys.readouterr().err)


def test_coefficients_that_the_weights_carry_already_are_refused(
    apply, model_dir, tokenizer, tmp_path, capsys
):
    first = apply(model_dir, 0.5)[1].rename(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    code, target = apply(tmp_path / "tuned", 0.5, f"--safegene.search.warm_start={first}")
    assert code == 2 and not target.exists()
    assert "carry the vector with these coefficients already" in capsys.readouterr().err


def test_a_history_whose_disk_is_full_is_met_before_the_checkpoint_is_there(
    apply, model_dir, tmp_path, monkeypatch, capsys
):
    place, sync = tmp_path / "line" / "h.jsonl", os.fsync
    place.parent.mkdir()

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(place):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, target = apply(model_dir, 0.5, f"--safegene.output.history={place}")
    assert code == 2 and not target.exists() and read_history(place) == []
    assert (
        "The history" in (said := capsys.readouterr().err)
        and "name another `output.history`" in said
    )
    assert json.loads(target.with_name("applied.failed.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    code, target = apply(model_dir, 0.5, f"--safegene.output.history={place}")
    assert (
        code == 0
        and len(read_history(place)) == 1
        and not target.with_name("applied.failed.json").exists()
    )


def test_dry_run_and_other_options(apply, model_dir, capsys):
    code, target = apply(model_dir, 1, "--safegene.dry_run=true")
    assert code == 0 and not target.exists() and "all checks passed" in capsys.readouterr().out
    code, target = apply(model_dir, 1, "--dtype=bfloat16")
    assert code == 2 and not target.exists() and "leave out `dtype`" in capsys.readouterr().err


def test_an_image_processor_beside_the_model_is_kept(apply, model_dir, tokenizer, tmp_path):
    """Also where only the base model of an adapter has it."""
    place = shutil.copytree(model_dir, tmp_path / "seeing")
    LlavaProcessor(CLIPImageProcessorPil(), make_tokenizer(), patch_size=14).save_pretrained(place)
    code, target = apply(place, 0.5)
    saved = AutoProcessor.from_pretrained(target)
    assert code == 0 and type(saved) is LlavaProcessor and saved.patch_size == 14
    adapter = with_lora(AutoModelForCausalLM.from_pretrained(place))
    adapter.save_pretrained(tmp_path / "adapter")
    assert type(load_processor(str(tmp_path / "adapter"))) is LlavaProcessor
    own = make_tokenizer()
    own.add_tokens(["<of the adapter>"])
    own.save_pretrained(tmp_path / "adapter")
    around = load_processor(str(tmp_path / "adapter")).tokenizer
    assert (
        "<of the adapter>" in around.get_vocab() and "<of the adapter>" not in tokenizer.get_vocab()
    )


def test_the_data_type_that_is_asked_for(apply, model_dir, capsys):
    code, target = apply(model_dir, 0.5, "--safegene.output.dtype=bfloat16")
    assert code == 0
    written = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == torch.bfloat16
    assert apply(model_dir, 0.5, "--dtype=bfloat16")[0] == 2
    assert "name the type that is written as `output.dtype`" in capsys.readouterr().err


def several_adapters(model_dir, folder, second="other"):
    """A training with two LoRAs as PEFT saves it, and beside them a trainer's checkpoint and an
    earlier output.
    """
    adapted = with_lora(make_model())
    adapted.peft_config["default"].base_model_name_or_path = str(model_dir)
    adapted.add_adapter(second, LoraConfig(r=2, target_modules=["up_proj"]))
    adapted.peft_config[second].base_model_name_or_path = str(model_dir)
    adapted.save_pretrained(folder)
    for place, mark in (("checkpoint-2", "trainer_state.json"), ("old", "safegene_report.json")):
        shutil.copytree(folder / second, folder / place)
        (folder / place / mark).write_text("{}")
    return folder


@pytest.mark.parametrize("search", [False, True])
def test_further_adapters_of_a_folder_are_warned_of(
    search, apply, model_dir, vector_dir, task_file, tokenizer, tmp_path, caplog
):
    folder = several_adapters(model_dir, tmp_path / "tuned")
    tokenizer.save_pretrained(folder)
    if search:
        options = [f"--safegene.vector={vector_dir}", f"--safegene.data.task_data={task_file}"]
        words = ["apply", "--model_name_or_path", str(folder), "--safegene.dry_run=true"]
        code = main([*words, *options])
    else:
        code, target = apply(folder, 0.5)
        report = json.loads((target / "safegene_report.json").read_text())
        assert any("further adapters (other)" in warning for warning in report["warnings"])
    assert code == 0 and "holds further adapters (other), and only its own is read" in caplog.text
    assert "checkpoint-2" not in caplog.text


def test_what_is_right_but_surprising_is_said_by_apply(
    apply, model_dir, tmp_path, caplog, monkeypatch
):
    """It is in the report, and said as well."""
    told = ["This is surprising."]
    monkeypatch.setattr("safegene_trl.step.plan.history_warnings", lambda path: list(told))
    monkeypatch.setattr("safegene_trl.step.plan.base_warnings", lambda *given: [])
    monkeypatch.setattr("safegene_trl.step.plan.read_history", lambda path: [])
    code, _ = apply(model_dir, 0.5, f"--safegene.output.history={tmp_path / 'history.jsonl'}")
    assert code == 0 and "This is surprising." in caplog.text
