"""Three fine-tunes in a row on new data, the second one with a model that refuses no more: it is
rejected, and the third goes on from the first. Which file was released is known by the file.
"""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

from safegene_trl.errors import SafeGeneError
from safegene_trl.step.history import append_release, read_history

from ..conftest import in_groups, task_dataset
from ..step.test_history import release as release_of_a_line


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
    nights, failing = [], []

    def answers(model, tokenizer, prompts, *rest):
        if failing:
            raise SafeGeneError(failing.pop())
        nights.append(True)
        night = (len(nights) - 1) // 2 + 1  # after and before
        return [
            "I'm sorry, but I can't help with that."
            if night != 2
            else "Take the first one on the left."
        ] * len(prompts)

    monkeypatch.setattr("safegene_trl.step.measurement.answers_to_tokens", answers)

    def run(count, failure=None):
        failing[:] = [failure] if failure else []
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
    assert pipeline(1) == 0
    assert pipeline(3, failure="Something failed.") == 2  # and the third is not begun
    assert pipeline(2) == 4  # the second is done again, and rejected
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
    assert "release 2: Something failed." in printed and "release 2: failed" in printed


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The script on files by their letters, whose fine-tunes end as `fates` says, or well; returns
    its exit code and what was trained: number, file and learning rate.
    """
    spec = importlib.util.spec_from_file_location("pipeline_example", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for letter in "abcd":
        (tmp_path / letter).write_text(letter)
    line, trained, fates = tmp_path / "line", [], {}

    def release(number, data, rate, options):
        trained.append((number, data.name, rate))
        if (outcome := fates.get(data.name, "accepted")) != "failed":
            output = str(line / f"release-{number}")
            append_release(
                line / "history.jsonl", release_of_a_line(outcome=outcome, output=output)
            )

    monkeypatch.setattr(script, "release", release)

    def run(letters, *words, **ends):
        trained.clear()
        fates.clear()
        fates.update(ends)
        files = [str(tmp_path / letter) for letter in letters]
        given = ["--model", "m", "--vector", "v", "--line", str(line), "--data", *files, *words]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
        return script.main(), list(trained)

    return run


def test_a_failed_one_is_done_again_before_the_next(main):
    assert main("abc", b="failed") == (2, [(1, "a", 2e-4), (2, "b", 2e-4)])
    assert main("abcd") == (0, [(2, "b", 2e-4), (3, "c", 2e-4), (4, "d", 2e-4)])
    assert main("abcd") == (0, [])


def test_a_rejected_newest_release_stays_one_when_the_same_is_run_again(main):
    for _ in range(2):
        assert main("ab", b="rejected")[0] == 4


def test_a_file_is_known_by_its_content(main, tmp_path, capsys):
    """Neither by its place in the list nor by its name, which the next night's may have too."""
    assert main("ab", "--learning_rates", "1", "2", b="rejected")[0] == 4
    assert main("cb") == (0, [(3, "c", 2e-4)])
    assert "release 2: rejected in an earlier run" in capsys.readouterr().out
    (tmp_path / "a").write_text("another night's")
    (tmp_path / "d").write_text("a")
    assert main("ad") == (0, [(4, "a", 2e-4)])
    known = json.loads((tmp_path / "line" / "fine_tunes.json").read_text())
    assert [Path(each["data"]).name for each in known] == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("letters", "words", "said"),
    [
        ("abc", ["--learning_rates", "1", "2"], "names 3 files and --learning_rates 2 rates"),
        ("a", ["--learning_rates", "1", "2"], "names 1 files and --learning_rates 2 rates"),
        ("ae", [], "names files that are not there"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(
    main, tmp_path, capsys, letters, words, said
):
    with pytest.raises(SystemExit) as end:
        main(letters, *words)
    assert end.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "line").exists()


def test_a_line_of_which_the_files_are_not_known_is_refused(main, tmp_path, capsys):
    assert main("ab")[0] == 0
    (tmp_path / "line" / "fine_tunes.json").unlink()
    with pytest.raises(SystemExit) as end:
        main("abc")
    assert end.value.code == 2 and "give another --line" in capsys.readouterr().err
