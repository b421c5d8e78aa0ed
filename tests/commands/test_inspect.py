"""`safegene inspect` on what is neither a vector nor a safeguarded checkpoint, and on many
coefficients.
"""

import json
import shutil
from dataclasses import replace

import pytest

from safegene_trl.commands.inspect import _describe_vector
from safegene_trl.commands.main import main
from safegene_trl.provenance import sha256_of_bytes
from safegene_trl.vectors.audit_file import AUDIT_FILE
from safegene_trl.vectors.files import read_files
from safegene_trl.vectors.record import read_record

from ..vectors.test_audit_file import audit_file, cell


DECIDED = {
    "decision": {"outcome": "rejected", "reason": "limits are not kept"},
    "vector": {"name": "v"},
    "model": {"architecture": "Llama", "kind": "full"},
}
REJECTED = DECIDED | {
    "status": "failed",
    "error": {"kind": "RejectedError", "message": "limits are not kept"},
}


@pytest.fixture
def inspect(capsys):
    """Exit code and what was said, in one text."""

    def inspected(*words):
        code = main(["inspect", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return inspected


def test_a_rejected_run_s_folder_names_the_report_that_says_why(inspect, model_dir):
    failed = model_dir / "safeguarded.failed.json"
    failed.write_text(json.dumps(REJECTED))
    for place in (model_dir, model_dir / "safeguarded"):
        code, said = inspect(place)
        assert (
            code == 2
            and f"was rejected or failed: inspect {failed}" in said
            and "vector" not in said
        )
    code, said = inspect(failed)
    assert code == 0 and said.startswith("rejected: limits are not kept") and "vector v" in said
    failed.write_text(
        json.dumps(
            {"status": "failed", "error": {"kind": "OutputError", "message": "disk\x1b full"}}
        )
    )
    assert inspect(failed) == (0, "failed: disk\\x1b full\n")
    accepted = REJECTED | {
        "decision": {"outcome": "accepted", "reason": ""},
        "coefficients": {"a": 1.0},
    }
    failed.write_text(json.dumps(accepted))  # decided, and then not written
    assert inspect(failed)[1].startswith("failed: limits")


@pytest.mark.parametrize("name", ["safeguarded", "_safeguarded"])
def test_a_trainer_s_folder_names_the_safeguarded_checkpoint_in_it(name, inspect, model_dir):
    (model_dir / name).mkdir()
    (model_dir / name / "safegene_report.json").write_text(
        json.dumps(DECIDED | {"coefficients": {"a": 1.0}})
    )
    code, said = inspect(model_dir)
    assert (
        code == 2
        and f"is a plain fine-tune: its safeguarded checkpoint is {model_dir / name}" in said
    )
    assert inspect(model_dir / name)[0] == 0
    code, said = inspect(model_dir / name, "--plot", model_dir / "x.png")
    assert code == 2 and "`--plot` draws a vector's layer scores" in said


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "is a checkpoint without the safety step: `safegene apply` safeguards it"),
        ("adapter_config.json", "is an adapter without the safety step"),
        ("evaluation.json", "holds an evaluation: read"),
        ("fleet.json", "is a fleet's"),
        ("notes.txt", "holds neither a safety vector nor a safeguarded checkpoint"),
    ],
)
def test_other_folders_are_told_apart(file, message, inspect, tmp_path):
    (tmp_path / file).write_text("{}")
    code, said = inspect(tmp_path)
    assert code == 2 and f"safegene inspect: {tmp_path} {message}" in said


def test_files_and_places_that_are_not_there(inspect, tmp_path):
    (tmp_path / "history.jsonl").write_text("{}\n")
    assert "give a history to `safegene history`" in inspect(tmp_path / "history.jsonl")[1]
    code, said = inspect(tmp_path / "none")
    assert code == 2 and f"{tmp_path / 'none'} is not there" in said
    assert "neither a local directory nor a readable hub" in inspect("no/such")[1]
    assert "nofolder is no folder or file: name" in inspect("nofolder")[1]


def test_many_coefficients_are_summed_up(inspect, tmp_path):
    names = [
        f"layers.{i}.{part}/{c}" for c in (0, 1) for i in range(30) for part in ("q", "k", "v")
    ]
    values = {name: i / 100 for i, name in enumerate(names)} | {names[7]: -5.0}
    report = tmp_path / "safegene_report.json"
    report.write_text(json.dumps(DECIDED | {"coefficients": values}))
    lines = inspect(tmp_path)[1].splitlines()
    assert lines[2] == "  90 λ of component 0: least -5.000, median 0.445, largest 0.890"
    assert lines[3] == "  90 λ of component 1: least 0.900, median 1.345, largest 1.790"
    assert lines[4] == f"the 5 strongest ({report} has all):" and len(lines) == 10
    assert lines[5].split() == [names[7], "λ", "=", "-5.000"] and "λ = 1.790" in lines[6]
    report.write_text(json.dumps(DECIDED | {"coefficients": dict(list(values.items())[:100])}))
    assert sum("λ =" in line for line in inspect(tmp_path)[1].splitlines()) == 100


def test_the_working_directory_is_a_folder_like_any_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["."], [""], ["/"]):
        assert main(["inspect", *words]) == 2
        assert "not foreseen" not in capsys.readouterr().err


def test_the_audit_of_a_vector_is_told_where_it_is_of_its_weights(inspect, vector_dir, tmp_path):
    folder = tmp_path / "audited"
    shutil.copytree(vector_dir, folder)
    assert "audit" not in inspect(folder)[1]
    weights = sha256_of_bytes((folder / "adapter_model.safetensors").read_bytes())
    cells = [cell("blind_spot", category="a"), cell("unsure", category="b")]
    (folder / AUDIT_FILE).write_text(audit_file(weights, *cells))
    assert "audited in 2 cells: blind spots 1, unsure 1 (audit.json)" in inspect(folder)[1]
    for text in (audit_file("0" * 64, *cells), "{}"):
        (folder / AUDIT_FILE).write_text(text)
        assert "the audit beside it does not count: " in inspect(folder)[1]


def test_what_an_older_vector_lacks_is_said_with_what_adds_it(inspect, vector_dir):
    adds = "`safegene extract` with `--vector` adds them"
    assert f"without soft targets and prompts to measure on: {adds}" in inspect(vector_dir)[1]
    record = read_record(read_files(vector_dir), vector_dir)
    soft = [row | {"targets": {}} for row in record.prompts]
    assert f"without prompts to measure on: {adds}" in _describe_vector(
        replace(record, prompts=soft)
    )
    test = {"prompt": "a", "kind": "harmful", "verdict": "refused", "use": "measure"}
    assert "without" not in _describe_vector(replace(record, prompts=[*soft, test]))


def test_a_vector_s_record_of_a_wrong_type_is_one_sentence(inspect, vector_dir, tmp_path):
    folder = tmp_path / "vector"
    shutil.copytree(vector_dir, folder)
    file = folder / "safegene_config.json"
    config = json.loads(file.read_text())
    for stability in ({"mean_jaccard": "x", "inclusion": [1.0] * 3}, {}, 3):
        config["selection"]["stability"] = stability
        file.write_text(json.dumps(config))
        code, said = inspect(folder)
        assert code == 2 and "`selection` in safegene_config.json" in said
        assert said.count("\n") == 1 and "not foreseen" not in said
    config["selection"]["stability"] = None
    file.write_text(json.dumps(config))
    assert inspect(folder)[0] == 0
    code, said = inspect(folder, "--plot", tmp_path / "p.png")
    assert code == 2 and "keeps no stability" in said


@pytest.mark.parametrize(
    "change",
    [
        {"coefficients": {"a": 10**400}},
        {"coefficients": {"a": "x"}},
        {"coefficients": [1]},
        {"vector": "v"},
        {"decision": "accepted"},
        {"decision": {"outcome": 3, "reason": "r"}},
        {"measured": {"after": {"refusal_rate": {"share": "x"}}}},
        {"held_out": 3},
    ],
)
def test_a_report_s_field_of_a_wrong_type_is_one_sentence(change, inspect, tmp_path):
    report = DECIDED | {"coefficients": {"a": 1.0}} | change
    (tmp_path / "safegene_report.json").write_text(json.dumps(report))
    code, said = inspect(tmp_path)
    assert code == 2 and "is damaged or of another version" in said and said.count("\n") == 1
