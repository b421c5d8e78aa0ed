"""Three fine-tunes in a row on new data, the second one with a model that refuses no more: it is
rejected, and the third goes on from the first.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest

from safegene_trl.step.history import read_history

from ..conftest import in_groups, task_dataset


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pipeline.py"


@pytest.fixture
def pipeline(model_dir, vector_dir, tmp_path, monkeypatch):
    """Runs the script on the first so many nights; what the models answer is said here, because a
    random one says nothing.
    """
    rows = list(task_dataset())
    for night in range(3):
        file = tmp_path / f"night{night}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[8 * night : 8 * night + 8]))
    settings = {
        "num_benign_shots": 0,
        "num_safety_shots": 4,
        "num_task_shots": 2,
        "max_utility_loss": 100.0,
    }
    settings |= {"max_evaluations": 2, "num_test_prompts": 12}
    nights = []

    def answers(model, tokenizer, prompts, *rest):
        nights.append(True)
        night = (len(nights) - 1) // 2 + 1  # after and before
        return [
            "I'm sorry, but I can't help with that."
            if night != 2
            else "Take the first one on the left."
        ] * len(prompts)

    monkeypatch.setattr("safegene_trl.step.measurement.answers_to_tokens", answers)

    def run(count):
        files = [str(tmp_path / f"night{night}.jsonl") for night in range(count)]
        words = [
            "--model",
            str(model_dir),
            "--vector",
            str(vector_dir),
            "--line",
            str(tmp_path / "line"),
            "--use_cpu",
        ]
        words += [
            "--max_steps",
            "1",
            "--settings",
            json.dumps(in_groups(settings)),
            "--allow_other_base",
        ]
        words += ["--gate", json.dumps({"min_refusal_rate": 0.5}), "--data", *files]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code

    return run


def test_three_releases_in_a_row(pipeline, tmp_path, capsys):
    assert pipeline(2) == 4  # the last of them is rejected
    assert pipeline(3) == 0
    line = tmp_path / "line"
    releases = read_history(line / "history.jsonl")
    assert [release["outcome"] for release in releases] == ["accepted", "rejected", "accepted"]
    assert [(line / f"release-{number}" / "config.json").is_file() for number in (1, 2, 3)] == [
        True,
        False,
        True,
    ]
    assert not releases[0]["base"]["carries_vector"]
    assert releases[2]["base"]["carries_vector"] and releases[2]["base"]["name"] == "release-1"
    last = json.loads((line / "release-3" / "safegene_report.json").read_text())
    assert last["history"][0]["coefficients"] == pytest.approx(releases[0]["coefficients"])
    mark = json.loads((line / "release-3" / "config.json").read_text())["safegene"]
    assert mark["coefficients"] == releases[2]["coefficients"]
    printed = capsys.readouterr().out
    assert "limits are not kept" in printed and printed.rstrip().endswith("release-3")
