"""The releases of a model line: chained, append-only, watched for drift."""

import json

import pytest

from safegene_trl.errors import SafeGeneError
from safegene_trl.evaluation.intervals import Rate
from safegene_trl.history import append_release, base_warnings, drift_warnings, last_accepted, read_history
from safegene_trl.provenance import sha256_of_json


def release(refused=90, count=100, outcome="accepted", base="a", carries=False, **values):
    return {
        "outcome": outcome,
        "after": {"refusal_rate": Rate(refused, count).to_dict()},
        "base": {"name": "model", "revision": base, "sha256": f"hash {base}", "carries_vector": carries},
        **values,
    }


def test_releases_are_kept_in_order_and_chained(tmp_path):
    path = tmp_path / "line" / "history.jsonl"
    assert read_history(path) == []
    for number in range(3):
        append_release(path, release(number=number))
    found = read_history(path)
    assert [entry["number"] for entry in found] == [0, 1, 2]
    assert found[0]["previous"] is None and len({entry["previous"] for entry in found}) == 3
    assert last_accepted([*found, release(outcome="rejected")])["number"] == 2
    assert last_accepted([]) is None


@pytest.mark.parametrize("change", ["changed", "taken out", "no JSON"])
def test_a_changed_line_is_noticed(tmp_path, change):
    path = tmp_path / "history.jsonl"
    for number in range(3):
        append_release(path, release(number=number))
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = {"changed": lines[1].replace('"number": 1', '"number": 7'), "taken out": "", "no JSON": "{\n"}[change]
    path.write_text("".join(lines))
    with pytest.raises(SafeGeneError, match="restore the file"):
        read_history(path)


def test_a_line_that_a_crash_cut_off_is_forgotten(tmp_path):
    path = tmp_path / "history.jsonl"
    append_release(path, release(number=0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert len(read_history(path)) == 1
    append_release(path, release(number=1))
    assert [entry["number"] for entry in read_history(path)] == [0, 1]
    path.write_bytes(whole[:40])
    append_release(path, release(number=5))
    assert [entry["number"] for entry in read_history(path)] == [5]


def test_drift_is_told_from_chance():
    assert drift_warnings([]) == drift_warnings([release()]) == []
    assert drift_warnings([release(90), release(88)]) == []
    assert "78%" in drift_warnings([release(92), release(91), release(78)])[0]
    slow = [release(refused) for refused in (95, 94, 92, 91, 90)]
    assert "from release to release: 95%, 94%, 92%, 91%, 90%" in drift_warnings(slow)[0]
    assert drift_warnings([*slow[:4], release(10, outcome="rejected")]) == []
    assert drift_warnings([release(), {**release(), "after": None}]) == []


def test_another_base_is_noticed():
    def found(name, carries=False):
        return {"name": "model", "revision": name, "files": {"model.safetensors": name}, "carries_vector": carries}

    def line(name, **values):
        entry = release(base=name, **values)
        entry["base"]["sha256"] = sha256_of_json({"model.safetensors": name})
        return entry

    assert base_warnings([], found("a")) == base_warnings([line("a")], found("a")) == []
    assert "model at b instead of model at a" in base_warnings([line("a")], found("b"))[0]
    assert base_warnings([line("a")], found("b", carries=True)) == []
    assert base_warnings([line("a"), line("r1", carries=True)], found("a")) == []
    assert base_warnings([line("a"), line("b", outcome="rejected")], found("a")) == []


def test_history_is_one_json_object_per_line(tmp_path):
    path = tmp_path / "history.jsonl"
    append_release(path, release(reason="línea\nnueva"))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["reason"] == "línea\nnueva"
