"""`gate.max_blind_spots`: an audit of the vector allows a step, or nothing is trained."""

import json
from pathlib import Path

import pytest

from safegene_trl import SafetyVector
from safegene_trl.commands.main import main
from safegene_trl.config.gate import GateConfig
from safegene_trl.errors import ConfigError, VectorError
from safegene_trl.step.audited import check_audit
from safegene_trl.vectors.audit_file import AUDIT_FILE

from ..conftest import config_of
from ..vectors.test_audit_file import audit_file, cell, nothing_lost


@pytest.fixture
def saved(tmp_path, vector_dir):
    """A vector in a folder of its own, and SHA-256 of its weights."""
    vector = SafetyVector.from_pretrained(vector_dir)
    vector.save_pretrained(tmp_path / "vector")
    return tmp_path / "vector", vector.files["adapter_model.safetensors"]["sha256"]


def checked(folder, **gate):
    values = {"vector": str(folder), "gate": {"max_blind_spots": 1, **gate}}
    config = config_of(**values)
    return check_audit(config, SafetyVector.from_pretrained(folder))


SPOTS = [cell("blind_spot", category=name) for name in ("a", "b")]


def test_an_audit_with_few_blind_spots_allows_a_step_and_is_named(saved, tmp_path):
    folder, weights = saved
    (folder / AUDIT_FILE).write_text(audit_file(weights, *SPOTS[:1], cell("unsure", form="story")))
    found = checked(folder)
    assert found["audit"]["blind_spots"] == 1 and len(found["audit"]["sha256"]) == 64
    (folder / AUDIT_FILE).rename(tmp_path / "own.json")
    assert checked(folder, audit=str(tmp_path / "own.json")) == found
    (tmp_path / "audit").mkdir()
    (tmp_path / "own.json").rename(tmp_path / "audit" / AUDIT_FILE)
    assert checked(folder, audit=str(tmp_path / "audit")) == found
    assert check_audit(config_of(vector=str(folder)), SafetyVector.from_pretrained(folder)) == {}


def test_more_blind_spots_than_allowed_are_named(saved):
    folder, weights = saved
    (folder / AUDIT_FILE).write_text(audit_file(weights, *SPOTS))
    with pytest.raises(ConfigError, match=r"tells of blind spots \(2: category a; category b\)"):
        checked(folder)
    assert checked(folder, max_blind_spots=2)


def test_an_audit_that_tells_nothing_allows_nothing(saved):
    folder, weights = saved
    for cells in ([], [cell("too_few", form="story"), nothing_lost(20)]):
        (folder / AUDIT_FILE).write_text(audit_file(weights, *cells))
        with pytest.raises(ConfigError, match="has enough lost refusals to tell anything"):
            checked(folder)


def test_without_an_audit_of_these_weights_there_is_no_step(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(ConfigError, match=r"comes without an audit\.json"):
        checked(folder)
    (folder / AUDIT_FILE).write_text(audit_file("c" * 64))
    with pytest.raises(VectorError, match="is of other weights"):
        checked(folder)
    (folder / AUDIT_FILE).write_text("{}")
    with pytest.raises(VectorError, match="no audit that this version reads"):
        checked(folder)
    with pytest.raises(VectorError, match="cannot be read"):
        checked(folder, audit=str(tmp_path / "none.json"))


def test_beside_a_public_key_the_vectors_own_audit_does_not_count(saved, tmp_path):
    folder, weights = saved
    text = audit_file(weights, cell("fine", 1.0, form="story"))
    (folder / AUDIT_FILE).write_text(text)
    config = config_of(vector=str(folder), gate={"max_blind_spots": 0}, public_key="maker.pub")
    vector = SafetyVector.from_pretrained(folder)
    with pytest.raises(ConfigError, match="no signature covers"):
        check_audit(config, vector)
    (tmp_path / "own.json").write_text(text)
    config.gate = GateConfig(max_blind_spots=0, audit=str(tmp_path / "own.json"))
    assert check_audit(config, vector)["audit"]["blind_spots"] == 0


@pytest.mark.parametrize("value", [-1, True, 0.5, "1"])
def test_a_limit_that_is_no_count_is_refused(value):
    with pytest.raises(ConfigError, match=r"`gate\.max_blind_spots`"):
        GateConfig(max_blind_spots=value)


def test_an_audit_without_a_limit_is_refused():
    with pytest.raises(ConfigError, match=r"`gate\.max_blind_spots` is not"):
        GateConfig(audit="audit.json")


@pytest.mark.parametrize("words", [["--coefficients", "0.5"], ["--safegene.dry_run", "true"]])
def test_apply_is_refused_before_anything_is_loaded(words, saved, model_dir, task_file, capsys):
    folder, weights = saved
    (folder / AUDIT_FILE).write_text(audit_file(weights, *SPOTS))
    words = ["apply", "--model_name_or_path", str(model_dir), *words]
    words += ["--safegene.vector", str(folder), "--safegene.allow_other_base", "true"]
    words += ["--safegene.data.task_data", str(task_file)]
    words += ["--safegene.output.output_dir", str(folder.parent / "out")]
    assert main([*words, "--safegene.gate.max_blind_spots", "1"]) == 2
    assert "tells of blind spots (2: " in capsys.readouterr().err
    assert not (folder.parent / "out").exists()
    assert main([*words, "--safegene.gate.max_blind_spots", "2"]) == 0
    report = Path(folder.parent / "out" / "safegene_report.json")
    if report.exists():  # not of a dry run
        assert json.loads(report.read_text())["vector"]["audit"]["blind_spots"] == 2
