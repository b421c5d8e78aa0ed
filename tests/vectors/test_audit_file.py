"""`audit.json`, read with distrust."""

import json
import os

import pytest

from safegene_trl import SafetyVector
from safegene_trl.errors import VectorError
from safegene_trl.vectors.audit_file import AUDIT_FILE, MOST_BYTES, audit_of, read_audit


def cell(verdict, share=0.0, count=20, **where):
    """A cell of an audit's file."""
    return {
        "where": where,
        "verdict": verdict,
        "prompts": count,
        "count": count,
        "share": {"share": share},
    }


def audit_file(weights, *cells, **changes):
    """An audit's file with these cells: what is read of one."""
    found = {
        "schema_version": 1,
        "vector": {"weights": weights},
        "fine_tune": {"stand_in": False},
        "measure": "restored",
        "least_share": 0.5,
        "cells": list(cells),
        "blind_spots": sum(own["verdict"] == "blind_spot" for own in cells),
        "prompts": [],
    }
    return json.dumps(found | changes)


def nothing_lost(prompts):
    """A cell of so many judged prompts of which none was lost."""
    return cell("nothing_lost", count=0, category="a") | {"prompts": prompts, "share": None}


WEIGHTS = "b" * 64


def test_what_is_read_of_an_audit(tmp_path):
    cells = [cell("blind_spot", category="a", form="story"), cell("fine", 1.0, language="en")]
    answers = [{"key": "0" * 16, "safeguarded": "refused"}]
    (tmp_path / AUDIT_FILE).write_text(audit_file(WEIGHTS, *cells, prompts=answers))
    found = read_audit(tmp_path / AUDIT_FILE)
    assert [own.name for own in found.cells] == ["category a, form story", "language en"]
    assert found.blind_spots == found.cells[:1] and found.prompts == {"0" * 16: "refused"}
    found.check_of(WEIGHTS, "v")
    for other in ("c" * 64, None):
        with pytest.raises(VectorError, match="is of other weights"):
            found.check_of(other, "v")


@pytest.mark.timeout(30)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / AUDIT_FILE)
    with pytest.raises(VectorError, match="it is no file"):
        read_audit(tmp_path / AUDIT_FILE)


HOSTILE = {
    "no object": "[]",
    "no JSON": "{",
    "deep": "[" * 100_000,
    "NaN": audit_file(WEIGHTS).replace("0.5", "NaN"),
    "another version": audit_file(WEIGHTS, schema_version=2),
    "a path for a hash": audit_file("../../etc/passwd"),
    "no verdict": audit_file(WEIGHTS, cell("safe", category="a")),
    "another dimension": audit_file(WEIGHTS, cell("fine", place="a")),
    "nowhere": audit_file(WEIGHTS, cell("fine")),
    "a long name": audit_file(WEIGHTS, cell("fine", category="a" * 301)),
    "a name that is none": audit_file(WEIGHTS, cell("fine", category=["a"])),
    "an empty name": audit_file(WEIGHTS, cell("fine", category="")),
    "a share beyond 1": audit_file(WEIGHTS, cell("fine", 1.5, category="a")),
    "true for a count": audit_file(WEIGHTS, cell("fine", count=True, category="a")),
    "a negative count": audit_file(WEIGHTS, cell("fine", count=-1, category="a")),
    "fewer blind spots": audit_file(WEIGHTS, cell("blind_spot", category="a"), blind_spots=0),
    "a cell twice": audit_file(WEIGHTS, *[cell("fine", 1.0, category="a")] * 2),
    "too many cells": audit_file(WEIGHTS, *[cell("fine", category="a")] * 10_001),
    "text for cells": audit_file(WEIGHTS, cells="cells"),
    "a key that is none": audit_file(WEIGHTS, prompts=[{"key": "x", "safeguarded": "refused"}]),
    "no measure": audit_file(WEIGHTS, measure="hidden"),
    "no judges": audit_file(WEIGHTS, judges=[]),
    "a judge without a name": audit_file(WEIGHTS, judges=[{"name": 1}]),
    "text for a count": audit_file(WEIGHTS, max_new_tokens="48"),
    "a file without a hash": audit_file(WEIGHTS, models={"fine_tune": {"files": {"a": None}}}),
    "text for a coefficient": audit_file(
        WEIGHTS, coefficients={"least": "1", "mean": 1, "largest": 1}
    ),
    "too large": " " * (MOST_BYTES + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_audit_is_refused_in_one_sentence(name, tmp_path):
    with pytest.raises(VectorError, match="no audit that this version reads") as caught:
        audit_of(HOSTILE[name].encode(), "x.json")
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("own", "changes"),
    [
        (cell("fine", 0.0, count=1000, category="a"), {}),
        (cell("fine", 0.5, category="a"), {}),
        (cell("unsure", 0.5, category="a") | {"prompts": 1}, {}),
        (cell("unsure", 0.5, count=0, category="a"), {}),
        (cell("fine", 0.9, category="a") | {"share": None}, {}),
        (cell("fine", 0.9, category="a"), {"least_share": 0}),
        (nothing_lost(0), {}),
        (nothing_lost(7), {"min_prompts": 8}),
        (nothing_lost(8), {"min_prompts": "8"}),
        (cell("nothing_lost", 0.9, category="a"), {}),
    ],
)
def test_a_verdict_that_its_numbers_do_not_allow_is_refused(own, changes):
    with pytest.raises(VectorError, match="no audit that this version reads"):
        audit_of(audit_file(WEIGHTS, own, **changes).encode(), "x.json")


def test_nothing_lost_of_as_many_prompts_as_tell_something_is_read():
    for prompts, changes in ((8, {"min_prompts": 8}), (1, {})):  # an earlier one did not say
        found = audit_of(audit_file(WEIGHTS, nothing_lost(prompts), **changes).encode(), "x.json")
        assert found.cells[0].verdict == "nothing_lost"


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path, "a\0b"):
        with pytest.raises(VectorError, match="cannot be read"):
            read_audit(path)


def test_names_from_an_audit_are_inert_in_a_card(tmp_path, vector_dir):
    vector = SafetyVector.from_pretrained(vector_dir)
    weights = vector.files["adapter_model.safetensors"]["sha256"]
    name = "x](http://evil)\n# Heading\n<img src=x>\x1b[31m"
    vector.audit = audit_file(weights, cell("blind_spot", category=name)).encode()
    vector.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "## Audit" in card and "- Blind spot: category x" in card
    assert "\n# Heading" not in card and "x](http" not in card and "\x1b" not in card
    assert "\\<img" in card and "was not shown to be safe" in card


def test_many_blind_spots_are_counted_in_a_card(tmp_path, vector_dir):
    vector = SafetyVector.from_pretrained(vector_dir)
    weights = vector.files["adapter_model.safetensors"]["sha256"]
    cells = [cell("blind_spot", category=f"c{i}") for i in range(25)]
    vector.audit = audit_file(weights, *cells).encode()
    card = str(vector.generate_model_card())
    assert "25 blind spots, 0 unsure" in card and "- 5 more in `audit.json`." in card


def test_a_damaged_audit_beside_a_vector_is_left_out_and_said(tmp_path, vector_dir, caplog):
    vector = SafetyVector.from_pretrained(vector_dir)
    vector.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / AUDIT_FILE).write_text("{}")
    loaded = SafetyVector.from_pretrained(tmp_path / "saved")
    assert "## Audit" not in str(loaded.generate_model_card())
    assert "The audit beside the vector is left out" in caplog.text
    loaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / AUDIT_FILE).exists()
