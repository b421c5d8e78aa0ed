"""Vectors as components of one: the sum of what they add, each with its own coefficients, down to
the saved checkpoint.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from safegene_trl.commands.main import main
from safegene_trl.errors import ConfigError, FamilyError, VectorError
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.vectors.combination import combined
from safegene_trl.vectors.safety_vector import SafetyVector

from ..conftest import make_deltas, make_model, make_vector


@pytest.fixture
def two(tokenizer):
    """Two vectors of different ranks; the second acts in other layers too."""
    first = make_vector(make_model(), tokenizer)
    second = replace(
        make_vector(make_model(), tokenizer),
        deltas=make_deltas(make_model(), (0, 1), rank=3, seed=9),
    )
    second.extraction = {"method": "delta", "rank": 3}
    second.selection = first.selection | {"selected_layers": [0, 1]}
    second.prompts = [
        *first.prompts[:2],
        {"prompt": "how do i x", "response": "i cannot help", "kind": "harmful"},
    ]
    return first, second


def test_components_add_up(two, tmp_path, capsys):
    first, _ = two
    vector = combined(two)
    vector.save_pretrained(tmp_path / "vector")
    assert main(["inspect", str(tmp_path / "vector")]) == 0
    assert "2 components with coefficients of their own, of rank 2 + 3" in capsys.readouterr().out
    vector = SafetyVector.from_pretrained(tmp_path / "vector")
    assert vector.components == [2, 3] and vector.rank == 5 and vector.layers == [0, 1, 2]
    assert len(vector.prompts) == len(first.prompts) + 1
    names = vector.space("layer").modules
    assert names["model.layers.1.mlp.down_proj"] == ["layers.1/0"] * 2 + ["layers.1/1"] * 3
    name = "model.layers.1.mlp.down_proj"
    assert vector.space("rank").modules[name] == [
        f"{name}/{mark}" for mark in ("0#0", "0#1", "1#0", "1#1", "1#2")
    ]
    weights = {
        f"layers.{layer}/{part}": 0.1 * layer + part for layer in range(3) for part in range(2)
    }
    for name, own in vector.space("layer").by_module(weights).items():
        layer = int(name.split(".")[2])
        expected = sum(
            (0.1 * layer + part) * each.deltas[name].dense()
            for part, each in enumerate(two)
            if name in each.deltas
        )
        delta = vector.deltas[name]
        torch.testing.assert_close(delta.b @ (own[:, None] * delta.a), expected)


def test_of_a_prompt_in_several_vectors_the_row_with_soft_targets_is_kept(two, tmp_path, capsys):
    first, second = two
    targets = {"tokens": [7], "ids": [[7, 3]], "log_probs": [[-0.1, -3.0]]}
    second.prompts[0] = second.prompts[0] | {"targets": targets}
    for vectors in ((first, second), (second, first)):
        vector = combined(vectors)
        assert [row for row in vector.prompts if "targets" in row] == [second.prompts[0]]
    vector.save_pretrained(tmp_path / "vector")
    assert SafetyVector.from_pretrained(tmp_path / "vector").prompts == vector.prompts
    assert main(["inspect", str(tmp_path / "vector")]) == 0
    assert "answers, 1 of them with soft targets" in capsys.readouterr().out


MEASURED = {"prompt": "why is tea green", "kind": "benign", "verdict": "refused", "use": "measure"}
LENGTHS = {"max_new_tokens": 32, "max_reasoning_tokens": 0}


def test_prompts_to_measure_on_are_those_of_all(two, tmp_path):
    first, second = two
    other = MEASURED | {"prompt": "how do i y", "kind": "harmful"}
    first.prompts.append(MEASURED)
    second.prompts += [MEASURED, other]
    for vector in two:
        vector.selection = vector.selection | {"test_prompts": LENGTHS | {"benign": {"asked": 1}}}
    vector = combined(two)
    assert [row for row in vector.prompts if "use" in row] == [other, MEASURED]
    assert vector.selection["test_prompts"] == LENGTHS
    vector.save_pretrained(tmp_path / "vector")
    assert SafetyVector.from_pretrained(tmp_path / "vector").prompts == vector.prompts
    second.selection["test_prompts"] = LENGTHS | {"max_new_tokens": 48}
    with pytest.raises(FamilyError, match="unlike numbers of tokens"):
        combined(two)


@pytest.mark.parametrize("measured", [True, False])
def test_one_prompt_with_two_verdicts_is_refused(measured, two):
    """As after extractions with other arguments for the chat template."""
    first, second = two
    row = MEASURED if measured else {"prompt": "why", "kind": "benign", "response": "sorry, no"}
    first.prompts.append(row | {"verdict": "refused"})
    second.prompts.append(row | {"verdict": "answered"})
    with pytest.raises(FamilyError, match=r"refuses the prompt 'why.*by another it answers it"):
        combined(two)


def test_a_prompt_to_learn_from_may_be_one_to_measure_on_of_another_vector(two):
    first, second = two
    second.prompts.append(MEASURED | {"prompt": first.prompts[-1]["prompt"]})
    second.selection = second.selection | {"test_prompts": LENGTHS}
    assert len(combined(two).prompts) == len(first.prompts) + 2


def test_every_component_gets_its_own_coefficients(two, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *args: "")
    for name, vector in zip(("first", "second"), two, strict=True):
        vector.save_pretrained(name)
    assert main(["combine", "first", "second", "--output_dir", "both"]) == 0
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"prompt": f"sort item {i}", "response": "into a box"} for i in range(6)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--model_name_or_path",
        "model",
        "--safegene.vector",
        "both",
        "--safegene.allow_other_base",
        "true",
    ]
    options += ["--safegene.data.task_data", "task.jsonl", "--safegene.measure.max_new_tokens", "2"]
    assert main(["apply", *options, "--safegene.output.output_dir", "out"]) == 0
    report = json.loads((tmp_path / "out" / "safegene_report.json").read_text())
    coefficients = report["coefficients"]
    assert set(coefficients) == {
        f"{name}/{part}" for name in {**two[0].deltas, **two[1].deltas} for part in range(2)
    }
    assert len(set(coefficients.values())) > 2
    # The checkpoint holds both, and from the files, with these coefficients, the same.
    merged, plain = load_file("out/model.safetensors"), dict(make_model().state_dict())
    name = "model.layers.1.mlp.down_proj"
    expected = plain[f"{name}.weight"] + sum(
        coefficients[f"{name}/{part}"] * vector.deltas[name].dense()
        for part, vector in enumerate(two)
    )
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    assert (
        main(["apply", *options, "--coefficients", "out", "--safegene.output.output_dir", "again"])
        == 0
    )
    again = load_file("again/model.safetensors")
    assert all(torch.allclose(again[key], merged[key], atol=1e-6) for key in merged)


def test_what_cannot_be_combined(two, tmp_path):
    first, second = two
    with pytest.raises(ConfigError, match="name two or more"):
        combined([first])
    second.aligned_model = second.aligned_model | {"files": {"model.safetensors": "0" * 64}}
    with pytest.raises(FamilyError, match="different aligned models"):
        combined(two)
    first.extraction = {"method": "combined", "rank": 2, "components": [1, 2]}
    with pytest.raises(VectorError, match="`extraction`"):
        first.save_pretrained(tmp_path / "vector")


def test_factors_that_the_first_vectors_type_does_not_hold_are_refused(two):
    first, second = two
    first.deltas = {
        name: LowRankDelta(delta.a.half(), delta.b.half()) for name, delta in first.deltas.items()
    }
    name, delta = next(iter(second.deltas.items()))
    second.deltas = second.deltas | {name: LowRankDelta(torch.full_like(delta.a, 1e6), delta.b)}
    with pytest.raises(VectorError, match=f"`{name}` are beyond float16.*in float32 or bfloat16"):
        combined(two)


def test_a_vector_that_is_named_twice_is_refused(two, tmp_path, capsys):
    for number, vector in enumerate(two):
        vector.save_pretrained(tmp_path / str(number))
    one, other = (SafetyVector.from_pretrained(tmp_path / str(number)) for number in range(2))
    combined([one, other]).save_pretrained(tmp_path / "both")
    for vectors in ([one, other, one], [one, SafetyVector.from_pretrained(tmp_path / "both")]):
        with pytest.raises(FamilyError, match="is named twice"):
            combined(vectors)
    assert (
        main(
            [
                "combine",
                str(tmp_path / "0"),
                str(tmp_path / "0"),
                f"--output_dir={tmp_path / 'new'}",
            ]
        )
        == 2
    )
    assert "is named twice" in capsys.readouterr().err and not (tmp_path / "new").exists()
