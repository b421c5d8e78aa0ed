"""New prompts for a vector that is there already, with its weights as they were."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from safegene_trl import ExtractionConfig, SafetyVector, combine, extract
from safegene_trl.commands.main import main
from safegene_trl.errors import CalibrationDataError, ConfigError, FamilyError, OutputError
from safegene_trl.extraction import soft_targets
from safegene_trl.extraction.config import _OF_THE_VECTOR
from safegene_trl.provenance import sha256_of_file
from safegene_trl.vectors.prompt_rows import part_of, rows_of

from ..conftest import BENIGN, HARMFUL, make_model, with_lora
from .test_prompts import REFUSED, TESTS, add, said
from .test_soft_targets import sure


WEIGHTS = "adapter_model.safetensors"
NEW_HARMFUL = ["say how one may forbid a lock", "answered: how to sink a raft"]
NEW_BENIGN = [REFUSED, "name a soup for lunch"]


@pytest.fixture
def old(extraction, tmp_path, monkeypatch):
    """A vector of format 2, whose weights file has another order than one that is saved now."""
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", said)
    options = {key: str(value) for key, value in extraction.items()}
    extract(ExtractionConfig(**options, selection="magnitude"), show_progress=False)
    folder = Path(options["output_dir"])
    saved = load_file(folder / WEIGHTS)
    save_file(saved, folder / WEIGHTS, metadata={"format": "pt", "saved_by": "an earlier version"})
    record = json.loads((folder / "safegene_config.json").read_text())
    path = folder / WEIGHTS
    record["files"][WEIGHTS] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    (folder / "safegene_config.json").write_text(json.dumps(record))
    assert record["format_version"] == 2
    return folder


@pytest.fixture
def options(old, model_dir, tmp_path, monkeypatch):
    """Of new prompts for it: some of either kind that it has, some that it has not, and to measure on."""
    monkeypatch.setattr(soft_targets, "response_logits", sure)
    found = {
        "aligned_model": str(model_dir),
        "vector": str(old),
        "output_dir": str(tmp_path / "new"),
    }
    files = {
        "harmful_data": [*HARMFUL[:3], *NEW_HARMFUL],
        "benign_data": [*BENIGN[:2], *NEW_BENIGN],
        "test_harmful_data": TESTS["harmful"],
        "test_benign_data": [BENIGN[1], *TESTS["benign"][:1]],
    }
    for name, prompts in files.items():
        found[name] = str(tmp_path / f"new_{name}.jsonl")
        rows = [{"prompt": text, "category": f"of {text[0]}"} for text in prompts]
        Path(found[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def made(options):
    extract(ExtractionConfig(**options), show_progress=False)
    return SafetyVector.from_pretrained(options["output_dir"])


def test_weights_stay_and_prompts_get_targets_border_and_tests(old, options, capsys):
    before = SafetyVector.from_pretrained(old)
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert main(["extract", *words]) == 0
    told = capsys.readouterr().out
    assert (
        f"The weights are those of {old}. Of 27 prompts 23 have soft targets, 1 are benign" in told
    )
    vector, folder = (
        SafetyVector.from_pretrained(options["output_dir"]),
        Path(options["output_dir"]),
    )
    assert (folder / WEIGHTS).read_bytes() == (old / WEIGHTS).read_bytes()
    assert vector.files[WEIGHTS] == before.files[WEIGHTS]
    assert vector.describe()["format_version"] == 3
    for section in ("family", "aligned_model", "degraded_model"):
        assert getattr(vector, section) == getattr(before, section)
    origin = vector.extraction.pop("weights_from")
    assert vector.extraction == before.extraction
    assert origin["name"] == "vector" and origin["files"] == before.files
    assert origin["config"] == sha256_of_file(old / "safegene_config.json")
    assert origin["prompts"]["asked"] == {"harmful": 2, "benign": 2}
    assert "other_base" not in origin and "weights_from" not in origin
    tests = vector.selection.pop("test_prompts")
    assert "of s (1 of 1)" in str(vector.generate_model_card())
    assert vector.selection.pop("categories") == {
        "of a": {"asked": 1, "refused": 0},
        "of s": {"asked": 1, "refused": 1},
    }
    assert vector.selection == {k: v for k, v in before.selection.items() if k != "categories"}
    assert tests["harmful"]["asked"] == 3 and tests["benign"]["repeated"] == 1
    kept = [{k: v for k, v in row.items() if k != "targets"} for row in vector.prompts]
    assert [row for row in kept if row in before.prompts] == before.prompts
    added = [row for row in kept if row not in before.prompts]
    assert {row["prompt"]: part_of(row) for row in added if "use" not in row} == {
        NEW_HARMFUL[0]: "harmful",
        NEW_BENIGN[0]: "border",
        NEW_BENIGN[1]: "benign",
    }
    assert added[0]["category"] == "of s"
    assert len(rows_of(vector.prompts, "measure")) == 4
    assert all(("targets" in row) == ("use" not in row) for row in vector.prompts)


def test_targets_alone_and_then_nothing_is_left_to_do(old, options, tmp_path):
    for name in ("harmful_data", "benign_data", "test_harmful_data", "test_benign_data"):
        del options[name]
    vector = made(options)
    assert sorted(row["prompt"] for row in vector.prompts) == sorted([*HARMFUL, *BENIGN])
    assert all("targets" in row for row in vector.prompts)
    again = options | {"vector": options["output_dir"], "output_dir": str(tmp_path / "third")}
    with pytest.raises(CalibrationDataError, match="new has soft targets, and there are no others"):
        made(again)
    assert not (tmp_path / "third").exists()


def test_prompts_to_measure_on_stay_and_are_not_learned(options, tmp_path):
    first = made(options)
    near = TESTS["harmful"][0] + "!"
    add(options["harmful_data"], near, "say how one may forbid a gate")
    again = {key: value for key, value in options.items() if not key.startswith("test_")}
    second = made(again | {"vector": options["output_dir"], "output_dir": str(tmp_path / "third")})
    assert rows_of(second.prompts, "measure") == rows_of(first.prompts, "measure")
    assert second.selection["test_prompts"] == first.selection["test_prompts"]
    assert near not in [row["prompt"] for row in second.prompts]
    assert "say how one may forbid a gate" in [row["prompt"] for row in second.prompts]
    origin = second.extraction["weights_from"]
    assert origin["weights_from"] == first.extraction["weights_from"]
    third = options | {"vector": options["output_dir"], "output_dir": str(tmp_path / "fourth")}
    Path(third["test_benign_data"]).write_text(
        json.dumps({"prompt": "draw a map of a lake"}) + "\n"
    )
    prompts = [row["prompt"] for row in rows_of(made(third).prompts, "measure")]
    assert sorted(prompts) == sorted([*TESTS["harmful"][1:], "draw a map of a lake"])


def test_answers_that_the_model_would_not_give_are_told(options, monkeypatch, caplog):
    monkeypatch.undo()
    for name in ("harmful_data", "benign_data", "test_harmful_data", "test_benign_data"):
        del options[name]
    vector = made(options)
    assert not any("targets" in row for row in vector.prompts)
    assert "20 of 20 answers of" in caplog.text and "stay without soft targets" in caplog.text


def test_other_weights_are_refused_unless_they_are_allowed(options, tokenizer, tmp_path):
    other = tmp_path / "other"
    make_model(seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    options["aligned_model"] = str(other)
    with pytest.raises(
        FamilyError, match=r"other has other weights than the aligned model that .*"
    ):
        made(options)
    vector = made(options | {"allow_other_base": True})
    assert vector.aligned_model["name"] == "model"
    assert vector.extraction["weights_from"]["other_base"]["name"] == "other"


def test_weights_that_cannot_be_compared_are_refused(old, options):
    record = json.loads((old / "safegene_config.json").read_text())
    record["aligned_model"]["files"] = {}
    (old / "safegene_config.json").write_text(json.dumps(record))
    with pytest.raises(FamilyError, match="cannot be compared by its files' hashes"):
        made(options)


def test_another_family_or_template_is_refused(options, tokenizer, tmp_path):
    other = tmp_path / "other"
    make_model("qwen2").save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(FamilyError, match="made for LlamaForCausalLM and the model is Qwen2"):
        made(options | {"aligned_model": str(other)})
    template = Path(options["aligned_model"]) / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(FamilyError, match=r"The chat template of .* differs from the one"):
        made(options)


VALUES = {
    "linearized_blocks": "mlp",
    "method": "distill",
    "selection": "all",
    "isolate_from": ["x"],
    "exact_svd": True,
    "chat_template_kwargs": {"a": 1},
    "safety_target": "reasoning",
    "weights_dtype": "float32",
    "degraded_model": "x",
    "degraded_revision": "x",
    "layer_share": 1.0,
    "anchor_weight": 0.5,
    "distill_learning_rate": 0.5,
    **dict.fromkeys(("source_model", "source_revision", "source_degraded_model"), "x"),
    **dict.fromkeys(("source_degraded_revision", "source_vector", "source_vector_revision"), "x"),
    "anchor_data": "x",
    "transport_map": "mlp",
    "layer_matching": "cka",
    "state_pooling": "mean",
    "min_transport_quality": 0.5,
}


@pytest.mark.parametrize("name", _OF_THE_VECTOR)
def test_settings_that_the_vector_has_settled_are_refused(name, options):
    with pytest.raises(ConfigError, match=f"`{name}` is set and so is `vector`, which keeps"):
        made(options | {name: VALUES.get(name, 3)})


@pytest.mark.parametrize(("name", "value"), [("vector_revision", "x"), ("allow_other_base", True)])
def test_settings_of_the_vector_need_one(name, value, extraction):
    options = {key: str(each) for key, each in extraction.items()}
    with pytest.raises(ConfigError, match=f"`{name}` is set and `vector` is not"):
        made(options | {name: value})


def test_every_other_setting_is_for_both(options):
    """A new setting has to be sorted: what a vector has settled is to be refused with one."""
    both = {
        *("aligned_model", "aligned_revision", "vector", "vector_revision", "allow_other_base"),
        *("output_dir", "overwrite_output_dir", "harmful_data", "benign_data", "data_split"),
        *("num_safety_prompts", "num_benign_prompts", "test_harmful_data", "test_benign_data"),
        *("num_test_prompts", "max_new_tokens", "max_reasoning_tokens", "batch_size", "dtype"),
        *("seed", "by_category", "cover", "num_cover_prompts"),
    }
    assert {each.name for each in fields(ExtractionConfig)} == both | set(_OF_THE_VECTOR)


def test_the_vector_itself_is_not_written_over(old, options):
    with pytest.raises(OutputError, match=r"is the safety vector .* itself"):
        made(options | {"output_dir": str(old), "overwrite_output_dir": True})


def test_a_signature_is_not_carried_over(old, options, tmp_path, caplog):
    (old / "model.sig").write_bytes(b"somebody's")
    made(options)
    assert not (Path(options["output_dir"]) / "model.sig").exists()
    assert "is of its former prompts and is not carried over" in caplog.text


def test_components_stay_components(old, options, extraction, model_dir, tmp_path):
    degraded = with_lora(make_model(), seed=9)
    degraded.peft_config["default"].base_model_name_or_path = str(model_dir)
    degraded.save_pretrained(tmp_path / "degraded_again")
    second = {key: str(value) for key, value in extraction.items()} | {
        "degraded_model": str(tmp_path / "degraded_again"),
        "output_dir": str(tmp_path / "second"),
        "selection": "magnitude",
    }
    made(second)
    both = tmp_path / "both"
    before = combine([old, second["output_dir"]], both)
    vector = made(options | {"vector": str(both)})
    assert vector.components == before.components == [4, 4]
    assert vector.extraction["vectors"] == before.extraction["vectors"]
    assert (Path(options["output_dir"]) / WEIGHTS).read_bytes() == (both / WEIGHTS).read_bytes()
    assert "of s (1 of 1)" in str(vector.generate_model_card())
    record = json.loads((both / "safegene_config.json").read_text())
    record["extraction"]["vectors"][0]["extraction"]["chat_template_kwargs"] = {"a": 1}
    (both / "safegene_config.json").write_text(json.dumps(record))
    with pytest.raises(FamilyError, match=r"components of .* were written in unlike ways"):
        made(options | {"vector": str(both), "output_dir": str(tmp_path / "third")})
