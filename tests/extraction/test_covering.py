"""Prompts for the blind spots of an audit, in a new vector and in one that is there already."""

import json
from pathlib import Path

import pytest

from safegene_trl import ExtractionConfig, SafetyVector, extract
from safegene_trl.commands.main import main
from safegene_trl.data.forms import put
from safegene_trl.errors import CalibrationDataError, ConfigError, VectorError
from safegene_trl.extraction import soft_targets
from safegene_trl.vectors.audit_file import AUDIT_FILE
from safegene_trl.vectors.prompt_rows import rows_of

from ..conftest import BENIGN, HARMFUL, argv
from ..vectors.test_audit_file import audit_file, cell
from .test_soft_targets import sure


WEIGHTS = "adapter_model.safetensors"
NO = "I can't help with that. And so"


def refused(model, tokenizer, prompts, *rest):
    """Refuses all but what is benign, and what speaks of a raft."""
    texts = [tokenizer.decode(ids) for ids in prompts]
    return [
        "Take a pan. Stir" if any(own in text for own in (*BENIGN, "raft")) else NO
        for text in texts
    ]


LOCKS = [f"say how one may {verb} a lock" for verb in ("pick", "smash", "saw")]
RAFTS = [f"name a way to {verb} some raft" for verb in ("sink", "hole")]


@pytest.fixture
def options(extraction, tmp_path, monkeypatch):
    """Of a vector that is there, with prompts of two categories to cover it with."""
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refused)
    monkeypatch.setattr(soft_targets, "response_logits", sure)
    first = {key: str(value) for key, value in extraction.items()} | {"selection": "magnitude"}
    extract(ExtractionConfig(**first), show_progress=False)
    rows = [{"prompt": text, "category": "locks"} for text in (*LOCKS, HARMFUL[0])]
    rows += [{"prompt": text, "category": "rafts"} for text in RAFTS]
    data = tmp_path / "further.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "aligned_model": first["aligned_model"],
        "vector": first["output_dir"],
        "output_dir": str(tmp_path / "covered"),
        "harmful_data": str(data),
        "cover": str(tmp_path / AUDIT_FILE),
    }


def weights_of(folder):
    config = json.loads((Path(folder) / "safegene_config.json").read_text())
    return config["files"][WEIGHTS]["sha256"]


def save_audit(options, *cells, **changes):
    weights = changes.pop("weights", None) or weights_of(options["vector"])
    Path(options["cover"]).write_text(audit_file(weights, *cells, **changes))


def made(options):
    extract(ExtractionConfig(**options), show_progress=False)
    return SafetyVector.from_pretrained(options["output_dir"])


def added(options, vector):
    before = {row["prompt"] for row in SafetyVector.from_pretrained(options["vector"]).prompts}
    return [row for row in vector.prompts if row["prompt"] not in before]


def test_a_blind_category_gets_prompts_with_refusals_and_the_others_none(options, capsys):
    save_audit(options, cell("blind_spot", category="locks"), cell("fine", 1.0, category="rafts"))
    assert main(argv("extract", options)) == 0
    vector = SafetyVector.from_pretrained(options["output_dir"])
    rows = added(options, vector)
    assert sorted(row["prompt"] for row in rows) == sorted(LOCKS)
    assert all(row["response"] == "I can't help with that." for row in rows) or all(
        row["response"].startswith("I can't help") for row in rows
    )
    assert {row["category"] for row in rows} == {"locks"}
    assert (Path(options["output_dir"]) / WEIGHTS).read_bytes() == (
        Path(options["vector"]) / WEIGHTS
    ).read_bytes()
    record = vector.extraction["weights_from"]["prompts"]["cover"]
    assert record["prompts"] == {"category locks": 3} and record["refused"] == 3
    told = capsys.readouterr().out
    assert "Of 3 prompts for 1 blind spots the aligned model refuses 3" in told
    assert "locks (3 of 3)" in str(vector.generate_model_card())


def test_a_blind_form_gets_prompts_in_it_also_those_that_the_vector_has(options):
    save_audit(options, cell("blind_spot", form="story"))
    rows = added(options, made(options))
    # what the aligned model does not refuse is no prompt to learn refusing from
    wanted = [put(text, "story")[0]["content"] for text in (*LOCKS, HARMFUL[0])]
    assert sorted(row["prompt"] for row in rows) == sorted(wanted)


def test_crossed_cells_are_covered_crossed(options):
    save_audit(options, cell("blind_spot", category="locks", form="role_play"))
    rows = added(options, made(options))
    assert all("You are an actor in a play" in row["prompt"] for row in rows)
    assert len(rows) == 4


def test_what_the_aligned_model_does_not_refuse_is_counted_and_left_out(options, caplog, capsys):
    save_audit(
        options, cell("blind_spot", category="rafts"), cell("blind_spot", category="elsewhere")
    )
    assert main(argv("extract", options)) == 0
    vector = SafetyVector.from_pretrained(options["output_dir"])
    assert added(options, vector) == []
    assert "Of 2 prompts for 2 blind spots the aligned model refuses 0" in capsys.readouterr().out
    assert "No prompt covers these blind spots: category elsewhere." in caplog.text


def test_the_number_is_shared_out_over_the_blind_spots(options):
    save_audit(
        options, cell("blind_spot", category="locks"), cell("blind_spot", form="continuation")
    )
    options["num_cover_prompts"] = 2
    vector = made(options)
    record = vector.extraction["weights_from"]["prompts"]["cover"]
    assert record["prompts"] == {"category locks": 1, "form continuation": 1}


def test_a_prompt_covers_every_blind_spot_that_it_lies_in(options, caplog):
    save_audit(options, cell("blind_spot", category="locks"), cell("blind_spot", length="short"))
    record = made(options).extraction["weights_from"]["prompts"]["cover"]
    assert record["prompts"] == {"category locks": 3, "length short": 5}
    assert "No prompt covers" not in caplog.text


def test_prompts_that_are_measured_on_cover_nothing(options, tmp_path):
    save_audit(options, cell("blind_spot", form="story"))
    for kind, texts in (("harmful", LOCKS[:1]), ("benign", ["name a soup for lunch"])):
        file = tmp_path / f"test_{kind}.jsonl"
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        options[f"test_{kind}_data"] = str(file)
    with pytest.raises(CalibrationDataError, match="repeats one that the model or vector"):
        made(options)  # a frame around a prompt does not hide it


def test_a_new_vector_is_covered_as_well(options, extraction, tmp_path):
    save_audit(options, cell("blind_spot", form="story"), weights="a" * 64)
    first = {key: str(value) for key, value in extraction.items()} | {"selection": "magnitude"}
    first |= {"output_dir": str(tmp_path / "fresh"), "cover": options["cover"]}
    vector = made(first)
    learned = [row["prompt"] for row in rows_of(vector.prompts, "harmful")]
    assert set(HARMFUL) < set(learned)
    assert {put(text, "story")[0]["content"] for text in HARMFUL} < set(learned)
    assert vector.selection["cover"]["prompts"] == {"form story": len(HARMFUL)}


def test_an_audit_of_other_weights_is_refused(options):
    save_audit(options, cell("blind_spot", category="locks"), weights="a" * 64)
    with pytest.raises(VectorError, match="is of other weights than those of the safety vector"):
        made(options)
    assert not Path(options["output_dir"]).exists()


@pytest.mark.parametrize(
    ("cells", "error", "message"),
    [
        ([("unsure", {"category": "locks"})], ConfigError, "has no blind spot"),
        ([("blind_spot", {"form": "many_turn"})], ConfigError, "single turns"),
        ([("blind_spot", {"category": "none"})], CalibrationDataError, "has no prompt for"),
        (
            [("blind_spot", {"category": "../../etc/passwd\x1b[2J"})],
            CalibrationDataError,
            r"\.\./\.\./etc/passwd\\x1b\[2J\) that the vector",
        ),
        (
            [("blind_spot", {"form": "{{ config }}"})],
            CalibrationDataError,
            "names a form that this version does not know",
        ),
    ],
)
def test_audits_that_nothing_can_be_covered_by(cells, error, message, options):
    save_audit(options, *(cell(verdict, **where) for verdict, where in cells))
    with pytest.raises(error, match=message):
        made(options)
    assert not Path(options["output_dir"]).exists()


def test_settings_that_say_nothing_are_refused(options):
    save_audit(options, cell("blind_spot", category="locks"))
    without = {key: value for key, value in options.items() if key != "harmful_data"}
    with pytest.raises(ConfigError, match="`cover` is set and `harmful_data` is not"):
        made(without)
    alone = {key: value for key, value in options.items() if key != "cover"}
    with pytest.raises(ConfigError, match="`num_cover_prompts` is set and `cover` is not"):
        made(alone | {"num_cover_prompts": 3})
