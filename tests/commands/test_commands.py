"""`sft`, `extract`, `apply` and `inspect` on tiny models, in this process."""

import json
import shutil
import tempfile

import huggingface_hub
import pytest
import torch
from jsonschema import validate
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import safegene_trl
from safegene_trl import SafetyVector
from safegene_trl.commands.inspect import _describe_vector
from safegene_trl.commands.main import main
from safegene_trl.extraction.selection import LayerScores
from safegene_trl.reporting.report import SCHEMA
from safegene_trl.vectors.files import read_files
from safegene_trl.vectors.record import read_record
from safegene_trl.vectors.similarity import cosine

from ..conftest import HARMFUL, argv, make_model, make_vector, options_of, with_lora


IDS = torch.arange(24).reshape(2, 12) + 5
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]
AGAIN = {"overwrite_output_dir": "true"}
LENIENT = [
    "--safegene.search.max_utility_loss=100",
    "--safegene.search.utility_weight=0",
    "--safegene.search.max_evaluations=2",
    "--safegene.measure.max_new_tokens=2",
]


@pytest.fixture(autouse=True)
def every_vector_helps(monkeypatch):
    monkeypatch.setattr(
        "safegene_trl.recalibration.search.objection", lambda before, after, budget: ""
    )


def test_extract_from_a_lora(extraction, tmp_path, capsys):
    assert (
        main(argv("extract", extraction | {"weights_dtype": "float32", "layer_share": 0.67})) == 0
    )
    vector = SafetyVector.from_pretrained(tmp_path / "vector")
    assert vector.rank == 4 and len(vector.layers) == 2 and len(vector.deltas) == 2 * 7
    degraded = PeftModel.from_pretrained(make_model(), tmp_path / "degraded").get_base_model()
    for name, delta in vector.deltas.items():
        torch.testing.assert_close(
            delta.dense(),
            -degraded.get_submodule(name).get_delta_weight("default"),
            atol=1e-6,
            rtol=1e-5,
        )
    assert vector.extraction["exact"] and len(vector.selection["scores"]) == 3
    assert (
        vector.aligned_model["files"]["model.safetensors"]
        and vector.degraded_model["files"]["adapter_model.safetensors"]
    )
    assert {row["response"] for row in vector.prompts} == {"I can't help with that.", "Take a pan."}
    assert str(tmp_path) not in (tmp_path / "vector" / "safegene_config.json").read_text()
    assert "rank 4" in capsys.readouterr().out


@pytest.mark.parametrize(("contrast", "warned"), [(-1.0, True), (1.0, False)])
def test_meaningless_selection_is_said(contrast, warned, extraction, monkeypatch, caplog):
    scores = LayerScores([(contrast, torch.ones(2, 3))])
    monkeypatch.setattr(
        "safegene_trl.extraction.selection.activation_contrast", lambda *args: scores
    )
    assert main(argv("extract", extraction)) == 0
    assert ("means little" in caplog.text) == warned and "depend on the prompts" not in caplog.text


@pytest.mark.parametrize("command", ["extract", "apply", "evaluate"])
def test_a_vector_is_no_model(command, extraction, vector_dir, task_file, tmp_path, capsys):
    """A vector as the degraded model would make its own opposite, which removes refusals."""
    options = {
        "extract": extraction | {"degraded_model": vector_dir},
        "apply": {
            "model_name_or_path": vector_dir,
            "safegene.vector": vector_dir,
            "safegene.data.task_data": task_file,
        },
        "evaluate": {
            "model_name_or_path": vector_dir,
            "harmful_data": extraction["harmful_data"],
            "output_dir": tmp_path / "evaluation",
        },
    }[command]
    assert main(argv(command, options)) == 2
    assert f"{vector_dir} is a safety vector and no model" in capsys.readouterr().err
    assert not (tmp_path / "vector").exists()


def test_unstable_selection_is_said(extraction, monkeypatch, caplog):
    scores = LayerScores([(1.0, torch.eye(3).repeat(4, 1))])  # every prompt names another layer
    monkeypatch.setattr(
        "safegene_trl.extraction.selection.activation_contrast", lambda *args: scores
    )
    assert main(argv("extract", extraction | {"layer_share": 0.34})) == 0
    assert "depend on the prompts" in caplog.text


def diverged(folder, file, value, where=0):
    """Writes a number into the first, or another, tensor of a weight file."""
    tensors = load_file(folder / file)
    tensors[sorted(tensors)[where]].view(-1)[5] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["degraded adapter", "degraded checkpoint", "aligned checkpoint"])
def test_extract_refuses_a_diverged_model(value, side, extraction, model_dir, tmp_path, capsys):
    if side == "degraded adapter":
        diverged(tmp_path / "degraded", "adapter_model.safetensors", value)
    else:
        full = PeftModel.from_pretrained(make_model(), tmp_path / "degraded").merge_and_unload()
        full.save_pretrained(tmp_path / "full")
        extraction["degraded_model"] = tmp_path / "full"
        diverged(
            model_dir if side.startswith("aligned") else tmp_path / "full",
            "model.safetensors",
            value,
            where=4,
        )
    assert main(argv("extract", extraction)) == 2
    assert "holds NaN or infinity: its training has diverged" in capsys.readouterr().err
    assert not (tmp_path / "vector").exists()


@pytest.mark.parametrize(
    ("changes", "who"), [({"aligned": 3e38}, "model"), ({"degraded": 3e38}, "full")]
)
def test_extract_refuses_a_model_whose_logits_overflow(
    changes, who, extraction, model_dir, tmp_path, capsys
):
    full = PeftModel.from_pretrained(make_model(), tmp_path / "degraded").merge_and_unload()
    full.save_pretrained(tmp_path / "full")
    extraction["degraded_model"] = tmp_path / "full"
    for folder in (model_dir, tmp_path / "full"):
        tensors = load_file(folder / "model.safetensors")
        if folder.name == who:
            tensors["model.norm.weight"].fill_(3e38)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # The final norm is no linear layer: with its change the vector would hold next to nothing of
    # the difference.
    pick = "safegene_trl.extraction.difference.Coverage.check"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pick, lambda self: None)
        assert main(argv("extract", extraction)) == 2
    assert (
        f"{who} are NaN or infinite" in capsys.readouterr().err
        and not (tmp_path / "vector").exists()
    )


def test_extract_refuses_a_vector_that_its_type_cannot_hold(extraction, tmp_path, capsys):
    tensors = load_file(tmp_path / "degraded" / "adapter_model.safetensors")
    small = {name: tensor * (1e-9 if "lora_B" in name else 1) for name, tensor in tensors.items()}
    save_file(small, tmp_path / "degraded" / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main(argv("extract", extraction | {"weights_dtype": "float16"})) == 2
    assert "too small for float16: set `weights_dtype" in capsys.readouterr().err
    assert not (tmp_path / "vector").exists()
    assert main(argv("extract", extraction | {"weights_dtype": "bfloat16"})) == 0


def test_extract_says_how_much_of_the_difference_a_vector_can_hold(
    extraction, tmp_path, capsys, caplog
):
    full = PeftModel.from_pretrained(make_model(), tmp_path / "degraded").merge_and_unload()
    with torch.no_grad():
        full.model.embed_tokens.weight.add_(0.1)
    full.save_pretrained(tmp_path / "full")
    assert main(argv("extract", extraction | {"degraded_model": tmp_path / "full"})) == 0
    share = SafetyVector.from_pretrained(tmp_path / "vector").extraction["covered_share"]
    assert 0.01 < share < 0.5 and f"hold {100 * share:.3g} %" in capsys.readouterr().out
    assert "left out of the vector" in caplog.text and "`model.embed_tokens.weight`" in caplog.text
    with torch.no_grad():
        full.model.embed_tokens.weight.add_(10)
    full.save_pretrained(tmp_path / "full")
    assert main(argv("extract", extraction | AGAIN | {"degraded_model": tmp_path / "full"})) == 2
    assert "`model.embed_tokens.weight`" in capsys.readouterr().err


@pytest.mark.parametrize("selection", ["gradient", "magnitude", "random", "all"])
def test_other_selections(selection, extraction, tmp_path):
    assert main(argv("extract", extraction | {"selection": selection, "layer_share": 0.67})) == 0
    vector = SafetyVector.from_pretrained(tmp_path / "vector")
    assert vector.selection["method"] == selection
    assert len(vector.layers) == (3 if selection == "all" else 2)
    stability = vector.selection["stability"]
    assert sum(stability["inclusion"]) == pytest.approx(len(vector.layers), abs=1e-3)
    assert (
        stability["mean_jaccard"] == 1
        if selection != "gradient"
        else 0 < stability["mean_jaccard"] <= 1
    )


def test_categories_of_the_prompts_are_kept(extraction, prompt_files, tmp_path):
    rows = [
        {"prompt": prompt, "category": "fraud" if i < 4 else None}
        for i, prompt in enumerate(HARMFUL)
    ]
    prompt_files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(argv("extract", extraction)) == 0
    vector = SafetyVector.from_pretrained(tmp_path / "vector")
    assert sorted(
        row["prompt"] for row in vector.prompts if row.get("category") == "fraud"
    ) == sorted(HARMFUL[:4])
    assert vector.selection["categories"] == {"fraud": {"asked": 4, "refused": 4}}
    assert "fraud (4 of 4)" in (tmp_path / "vector" / "README.md").read_text()


def test_extract_from_two_checkpoints(extraction, tmp_path):
    full = PeftModel.from_pretrained(make_model(), tmp_path / "degraded").merge_and_unload()
    full.save_pretrained(tmp_path / "full")
    assert main(argv("extract", extraction)) == 0
    exact = SafetyVector.from_pretrained(tmp_path / "vector")
    assert (
        main(argv("extract", extraction | AGAIN | {"degraded_model": tmp_path / "full", "rank": 4}))
        == 0
    )
    dense = SafetyVector.from_pretrained(tmp_path / "vector")
    assert dense.layers == exact.layers and not dense.extraction["exact"]
    for name, delta in dense.deltas.items():
        torch.testing.assert_close(delta.dense(), exact.deltas[name].dense(), atol=2e-3, rtol=2e-2)
    assert min(dense.extraction["energy_kept"].values()) > 0.999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "at least 1"),
        ({"bootstrap_resamples": 0}, "at least 1"),
        ({"layer_share": 0}, "above 0"),
        ({"weights_dtype": "int8"}, "use one of"),
        (
            {"aligned_model": "no/such-model"},
            "neither a local directory nor a readable hub repository",
        ),
        ({"harmful_data": "no/such-data"}, "cannot be read"),
    ],
)
def test_bad_extraction(extraction, changes, message, tmp_path, capsys):
    assert main(argv("extract", extraction | changes)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "vector").exists()


@pytest.mark.parametrize("where", ["load_placed", "reference_batches"])
def test_extract_names_a_device_that_is_too_small(where, extraction, monkeypatch, capsys, tmp_path):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(f"safegene_trl.extraction.pipeline.{where}", full)
    assert main(argv("extract", extraction | {"method": "distill"})) == 2
    assert "The extraction ran out of memory: set a smaller `batch_size`" in capsys.readouterr().err
    assert not (tmp_path / "vector").exists()


def test_extract_needs_an_aligned_model_that_refuses(extraction, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "safegene_trl.extraction.answers.answers_to_tokens",
        lambda model, tokenizer, prompts, *args: ["Sure!"] * len(prompts),
    )
    assert main(argv("extract", extraction)) == 2
    assert "refuses none" in capsys.readouterr().err and not (tmp_path / "vector").exists()


def test_extract_from_a_model_without_a_chat_template(
    extraction, model_dir, tmp_path, tokenizer, caplog, capsys
):
    (model_dir / "chat_template.jinja").unlink()
    assert main(argv("extract", extraction)) == 0
    assert f"{model_dir} has no chat template: prompts go to the model as plain text" in caplog.text
    assert SafetyVector.from_pretrained(tmp_path / "vector").family.chat_template is None
    tokenizer.save_pretrained(tmp_path / "degraded")
    assert main(argv("extract", extraction | {"output_dir": tmp_path / "second"})) == 2
    assert (
        f"and that of {model_dir} has none" in capsys.readouterr().err
        and not (tmp_path / "second").exists()
    )


def test_extract_does_not_overwrite_other_folders(extraction, model_dir, tmp_path, capsys):
    assert main(argv("extract", extraction | {"output_dir": model_dir})) == 2
    assert f"is the aligned model {model_dir} itself" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert main(argv("extract", extraction | {"output_dir": other})) == 2
    assert "did not write, e.g. notes.txt" in capsys.readouterr().err


def test_an_earlier_vector_is_replaced_only_on_request(
    extraction, vector_dir, tokenizer, tmp_path, capsys
):
    target = shutil.copytree(vector_dir, tmp_path / "vector")
    (target / "model.sig").write_text("signed")
    one, two = shutil.copytree(vector_dir, tmp_path / "one"), tmp_path / "two"
    make_vector(make_model(), tokenizer, seed=9).save_pretrained(two)
    before = {file: file.read_bytes() for file in target.iterdir()}
    combine = ["combine", str(one), str(two), "--output_dir", str(target)]
    for words in (argv("extract", extraction), combine):
        assert main(words) == 2
        assert "vector holds a safety vector already: choose" in capsys.readouterr().err
        assert before == {file: file.read_bytes() for file in target.iterdir()}
    assert main([*combine, "--overwrite_output_dir"]) == 0
    assert (
        SafetyVector.from_pretrained(target).components == [2, 2]
        and not (target / "model.sig").exists()
    )
    assert main([*argv("extract", extraction), "--overwrite_output_dir", "true"]) == 0
    assert SafetyVector.from_pretrained(target).components == [4]


def test_an_extraction_does_not_touch_what_it_reads(extraction, prompt_files, tmp_path, capsys):
    for output, message in (
        (tmp_path / "degraded" / "vector", "lies inside the degraded model"),
        (tmp_path, "holds the aligned model"),
        (prompt_files[0], "is the harmful data"),
    ):
        assert main(argv("extract", extraction | {"output_dir": output})) == 2
        assert message in capsys.readouterr().err


def test_combine_does_not_replace_a_vector_it_reads(vector_dir, tokenizer, tmp_path, capsys):
    one, two = shutil.copytree(vector_dir, tmp_path / "one"), tmp_path / "two"
    make_vector(make_model(), tokenizer, seed=9).save_pretrained(two)
    before = sorted((file, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file())
    (tmp_path / "link").symlink_to(one)
    for output, message in (
        (one, "itself"),
        (tmp_path / "two" / ".." / "one", "itself"),
        (tmp_path / "link", "itself"),
        (two / "sub", "lies inside the vector"),
        (tmp_path, "holds the vector"),
    ):
        assert main(["combine", str(one), str(two), "--output_dir", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert before == sorted(
        (file, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()
    )
    assert main(["combine", str(one), str(two), "--output_dir", str(tmp_path / "both")]) == 0
    assert SafetyVector.from_pretrained(tmp_path / "both").components == [2, 2]


@pytest.mark.parametrize("lora", [True, False])
def test_sft_then_apply_agree(lora, model_dir, vector_dir, task_file, tmp_path, capsys):
    """The callback at the end of the training and `apply` on the saved fine-tune give the same
    weights.
    """
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model_name_or_path: {model_dir}
dtype: float32
datasets: [{{path: json, data_files: {task_file}, split: train}}]
output_dir: {tmp_path / "out"}
use_peft: {lora}
lora_target_modules: all-linear
max_steps: 2
learning_rate: 1.0e-2
use_cpu: true
bf16: false
gradient_checkpointing: false
save_strategy: "no"
report_to: none
disable_tqdm: true
safegene:
  vector: {vector_dir}
  data:
    task_data: {task_file}
"""
    )
    assert main(["sft", "--config", str(recipe), *LENIENT]) == 0
    first = tmp_path / "out" / "safeguarded"
    options = [
        f"--safegene.vector={vector_dir}",
        f"--safegene.data.task_data={task_file}",
        f"--safegene.output.output_dir={tmp_path / 'applied'}",
    ]
    assert main(["apply", "--model_name_or_path", str(tmp_path / "out"), *options, *LENIENT]) == 0
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        for folder in (first, tmp_path / "applied")
    )
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    reports = [
        json.loads((folder / "safegene_report.json").read_text())
        for folder in (first, tmp_path / "applied")
    ]
    assert reports[0]["coefficients"] == pytest.approx(reports[1]["coefficients"], abs=1e-5)
    assert (
        reports[0]["model"]["kind"] == reports[1]["model"]["kind"] == ("lora" if lora else "full")
    )
    capsys.readouterr()
    assert main(["inspect", str(first)]) == 0
    printed = capsys.readouterr().out
    assert "accepted:" in printed and "λ =" in printed and "refusal rate" in printed


def test_apply_needs_its_inputs(model_dir, vector_dir, capsys, tmp_path, task_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, message in (
        ([], "No model is named"),
        (["--model_name_or_path", str(model_dir)], "No safety vector is named"),
        (
            ["--model_name_or_path", str(model_dir), f"--safegene.vector={vector_dir}"],
            "`data.task_data` is not set",
        ),
    ):
        assert main(["apply", *options]) == 2
        assert message in capsys.readouterr().err
    dry = [
        f"--safegene.vector={vector_dir}",
        f"--safegene.data.task_data={task_file}",
        "--safegene.dry_run=true",
    ]
    assert main(["apply", "--model_name_or_path", str(model_dir), *dry]) == 0
    assert not (tmp_path / "model-safeguarded").exists()


def test_coefficients_that_are_neither_a_number_nor_a_report(model_dir, vector_dir, capsys):
    words = ["--model_name_or_path", str(model_dir), f"--safegene.vector={vector_dir}"]
    assert main(["apply", *words, "--coefficients", "many"]) == 2
    said = capsys.readouterr().err
    assert "`coefficients` is 'many'" in said
    assert "give a number for every layer, `interference`, or a `safegene_report.json`" in said


def test_extract_says_what_is_missing_and_what_it_is(capsys):
    assert main(["extract"]) == 2
    said = (
        "`aligned_model` is not set: give the released model whose refusals are intact, directory"
    )
    assert said in capsys.readouterr().err


def test_help_names_pages_and_no_source_files(capsys):
    for command in ("apply", "extract", "evaluate", "audit"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert ".py" not in capsys.readouterr().out


def test_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"safegene-trl {safegene_trl.__version__}\n"


def test_inspect_a_vector(vector_dir, capsys):
    assert main(["inspect", str(vector_dir)]) == 0
    printed = capsys.readouterr().out
    assert "layers 1–2" in printed and "12 harmful prompts with refusals" in printed


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{}",
        "{",
        '{"coefficients": null}',
        '{"coefficients": {"a": null}, "decision": {}, "model": {}}',
        '{"coefficients": {}, "decision": {"outcome": 1, "reason": ""}, "model": 3}',
        "[" * 100_000,
        '{"coefficients": {"a": 1' + "0" * 400 + "}}",
        '{"coefficients": {"a": NaN}}',
    ],
)
def test_inspect_names_a_report_that_is_damaged(content, tmp_path, capsys):
    (tmp_path / "safegene_report.json").write_text(content)
    assert main(["inspect", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "is damaged or of another version" in printed.err and printed.out == ""


def test_inspect_shows_text_of_strangers_as_text(vector_dir, tmp_path, capsys):
    hostile = "\x1b[2J\x1b]0;x\x07\naccepted: all is well\u202e"
    report = {
        "coefficients": {hostile: 0.5},
        "decision": {"outcome": "rejected", "reason": hostile},
        "vector": {"name": hostile},
        "model": {"architecture": hostile, "kind": hostile},
    }
    (tmp_path / "safegene_report.json").write_text(json.dumps(report))
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in printed)
    assert (
        not any(line.startswith("accepted") for line in printed.splitlines())
        and len(printed.splitlines()) == 3
    )
    vector = read_record(read_files(str(vector_dir)), "vector")
    vector.aligned_model["name"] = vector.extraction["method"] = hostile
    lines = _describe_vector(vector).splitlines()
    assert all(line.isprintable() for line in lines) and "\\x1b[2J" in lines[0]


def test_extract_isolated_from_a_task(extraction, tmp_path):
    task = with_lora(make_model(), seed=9)
    task.peft_config["default"].base_model_name_or_path = str(extraction["aligned_model"])
    task.save_pretrained(tmp_path / "task")
    assert main(argv("extract", extraction | {"layer_share": 1.0})) == 0
    plain = SafetyVector.from_pretrained(tmp_path / "vector")
    assert (
        main(
            argv(
                "extract",
                extraction | AGAIN | {"layer_share": 1.0, "isolate_from": tmp_path / "task"},
            )
        )
        == 0
    )
    vector = SafetyVector.from_pretrained(tmp_path / "vector")
    record = vector.extraction["isolation"]
    assert plain.extraction["isolation"] is None
    assert record["rank"] == 8 and record["task_models"][0]["name"] == "task"
    assert 0 < max(record["energy_removed"].values()) < 1
    assert 0.5 < cosine(plain.deltas, vector.deltas) < 0.9999


@pytest.mark.parametrize("method", ["distill", "linearized"])
def test_extract_by_distillation(method, extraction, tmp_path):
    options = {
        "method": method,
        "distill_steps": 3,
        "distill_learning_rate": 1e-2,
        "layer_share": 1.0,
    }
    assert main(argv("extract", extraction | {"layer_share": 1.0, "weights_dtype": "float32"})) == 0
    plain = SafetyVector.from_pretrained(tmp_path / "vector")
    assert main(argv("extract", extraction | AGAIN | options)) == 0
    vector = SafetyVector.from_pretrained(tmp_path / "vector")
    losses = vector.extraction["distillation"]
    assert losses["linearized_blocks"] == (None if method == "distill" else "both")
    assert (
        vector.extraction["method"] == method
        and losses["after"]["harmful"] != losses["before"]["harmful"]
    )
    assert 0.2 < cosine(plain.deltas, vector.deltas) < 0.9999  # it started there, and went on
    PeftModel.from_pretrained(make_model(), tmp_path / "vector")
    assert main(argv("extract", extraction | {"anchor_weight": -1})) == 2


@pytest.mark.parametrize(
    ("gate", "code", "written"),
    [
        ({"max_over_refusal": 0.9}, 0, True),
        (
            {"max_over_refusal": 0.3},
            3,
            True,
        ),  # none of five is refused: Wilson's interval reaches to 0.43
        ({"min_refusal_rate": 0.9}, 4, False),
        ({"min_refusal_rate": 0.9, "write_rejected": True}, 4, True),
    ],
)
def test_the_gate_decides_and_the_exit_code_says_what(
    gate, code, written, model_dir, vector_dir, task_file, tmp_path, capsys
):
    target, history = tmp_path / "out", tmp_path / "history.jsonl"
    options = options_of(
        {"vector": vector_dir, "task_data": task_file, "output_dir": target, "history": history}
    )
    options += [f"--safegene.gate.{key}={json.dumps(value)}" for key, value in gate.items()]
    options += ["--safegene.data.num_benign_shots=4"]
    assert main(["apply", "--model_name_or_path", str(model_dir), *options, *LENIENT]) == code
    assert (target / "config.json").is_file() == written and target.exists() == written
    outcome = {0: "accepted", 3: "accepted_best_effort", 4: "rejected"}[code]
    report = json.loads(
        (target / "safegene_report.json" if written else tmp_path / "out.failed.json").read_text(
            encoding="utf-8"
        )
    )
    validate(report, SCHEMA)
    assert report["decision"]["outcome"] == outcome and len(report["decision"]["checks"]) == 1
    assert report["status"] == ("safeguarded" if written else "failed")
    (line,) = history.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["outcome"] == outcome
    printed = capsys.readouterr()
    if written:
        share = report["measured"]["after"]["refusal_rate"]["share"]
        assert (
            f"refusal rate {report['measured']['before']['refusal_rate']['share']:.0%} → {share:.0%} ["
            in printed.out
        )
        assert (
            f"{'Rejected' if code == 4 else 'Safeguarded'} checkpoint" in printed.out
            and str(target) in printed.out
        )
        assert (
            ("Safeguarded checkpoint" in printed.out)
            == (code != 4)
            == (f"Plain fine-tune: {model_dir}" not in printed.out)
        )
    else:
        assert (
            "The safeguarded checkpoint was rejected, because the gate's limits are not kept"
            in printed.err
        )
        assert (
            str(tmp_path / "out.failed.json") in printed.err
            and f"{model_dir} is the plain fine-tune" in printed.err
        )
    assert ("limits are not kept" in printed.out + printed.err) == (code == 4)


def test_a_rejected_fine_tune_is_saved_all_the_same(
    model_dir, vector_dir, task_file, tmp_path, capsys
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"datasets: [{{path: json, data_files: {task_file}, split: train}}]\n")
    words = ["--config", str(recipe), "--model_name_or_path", str(model_dir), "--dtype=float32"]
    words += [
        f"--output_dir={tmp_path / 'out'}",
        "--max_steps=1",
        "--use_cpu=true",
        "--bf16=false",
        "--save_strategy=no",
    ]
    words += ["--report_to=none", "--disable_tqdm=true", "--gradient_checkpointing=false"]
    words += [f"--safegene.vector={vector_dir}", "--safegene.gate.min_refusal_rate=0.9", *LENIENT]
    assert main(["sft", *words]) == 4
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (
        tmp_path / "out" / "safeguarded"
    ).exists()
    assert "limits are not kept" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "apply"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "folder /no/such/model is not there"),
        ("./nope/", "folder ./nope/ is not there"),
    ],
)
def test_a_model_s_folder_that_is_not_there_is_named(
    command, name, message, vector_dir, task_file, capsys
):
    words = [command, "--model_name_or_path", name, f"--safegene.vector={vector_dir}"]
    words += [
        f"--safegene.data.task_data={task_file}",
        f"--safegene.output.output_dir={task_file.with_name('out')}",
    ]
    if command == "sft":
        words += [
            "--dataset_name",
            str(task_file.parent),
            "--output_dir",
            str(task_file.with_name("trained")),
            *ON_CPU,
        ]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and "Repo id" not in said and not task_file.with_name("trained").exists()


def test_a_name_that_the_hub_does_not_have_is_said_plainly(task_file, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = [
        "--dataset_name",
        str(task_file.parent),
        "--output_dir",
        str(task_file.with_name("trained")),
        *ON_CPU,
    ]
    assert main(["sft", "--model_name_or_path", "no/such", *words]) == 2
    assert "The model no/such is neither a local directory nor" in capsys.readouterr().err


def test_a_model_whose_config_cannot_be_read_is_said_plainly(task_file, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    words = [
        "--dataset_name",
        str(task_file.parent),
        "--output_dir",
        str(task_file.with_name("trained")),
        *ON_CPU,
    ]
    assert main(["sft", "--model_name_or_path", str(folder), *words]) == 2
    assert "cannot begin" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["apply", "--coefficients=0.5", "--safegene.output.output_dir=~/x"],
        ["apply", "--coefficients=0.5", "--safegene.output.history=~/x/h.jsonl"],
        ["extract", "--output_dir=~/x"],
        ["evaluate", "--harmful_data=h.jsonl", "--output_dir=~x"],
        ["audit", "v", "--output_dir=~x"],
        ["combine", "v", "w", "--output_dir=~/x"],
        ["inspect", "v", "--plot=~/x.png"],
        ["history", "h.jsonl", "--plot=~/x.png"],
        ["similarity", "v", "w", "--json=~/x.json"],
    ],
)
def test_a_path_that_a_shell_would_have_replaced_is_not_written(
    words, vector_dir, model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.jsonl").write_text('{"prompt": "a"}\n')
    if words[0] == "apply":
        words = [*words, f"--safegene.vector={vector_dir}"]
    if words[0] in ("apply", "evaluate"):
        words = [*words, "--model_name_or_path", str(model_dir)]
    if words[0] == "extract":
        words += [
            "--aligned_model=a",
            "--degraded_model=b",
            "--harmful_data=h.jsonl",
            "--benign_data=h.jsonl",
        ]
    assert main(words) == 2
    assert "`~` stands for no folder here" in capsys.readouterr().err
    assert not list(tmp_path.glob("~*"))


def test_no_other_folder_for_temporary_files_is_needed(
    model_dir, vector_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    words = [
        "--model_name_or_path",
        str(model_dir),
        "--coefficients=0.5",
        f"--safegene.vector={vector_dir}",
    ]
    assert main(["apply", *words, f"--safegene.output.output_dir={tmp_path / 'out'}"]) == 0


@pytest.mark.parametrize(("on_failure", "code"), [("raise", 2), ("warn", 0)])
def test_an_error_that_is_no_one_of_ours_costs_no_fine_tune(
    on_failure, code, model_dir, vector_dir, task_file, tmp_path, monkeypatch, capsys, caplog
):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("safegene_trl.step.live_fine_tune.recalibrate", broken)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"datasets: [{{path: json, data_files: {task_file}, split: train}}]\n")
    words = [
        "--config",
        str(recipe),
        "--model_name_or_path",
        str(model_dir),
        "--dtype=float32",
        *ON_CPU,
    ]
    words += [
        f"--output_dir={tmp_path / 'out'}",
        "--max_steps=1",
        "--save_strategy=no",
        "--report_to=none",
    ]
    words += [
        "--disable_tqdm=true",
        "--gradient_checkpointing=false",
        f"--safegene.vector={vector_dir}",
        *LENIENT,
    ]
    assert main(["sft", *words, f"--safegene.on_failure={on_failure}"]) == code
    said = capsys.readouterr().err if on_failure == "raise" else caplog.text
    assert "failed unexpectedly (ZeroDivisionError: division by zero)" in said
    out = tmp_path / "out"
    report = json.loads((out / "safeguarded.failed.json").read_text())
    assert (
        report["status"] == "failed"
        and report["fine_tune"] == str(out)
        and not (out / "safeguarded").exists()
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (model_dir, out))
    assert before.keys() == after.keys() and any(
        not torch.equal(before[name], after[name]) for name in before
    )
