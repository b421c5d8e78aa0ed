"""The table's data and arithmetic, on cells and rows made here; the cells themselves take hours."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import records
from benchmarks.paper_table import __main__ as command
from benchmarks.paper_table import families, lab, methods, tasks, vectors
from benchmarks.paper_table.families import FAMILIES, FIRST, SMOLLM2
from benchmarks.paper_table.lab import change
from benchmarks.paper_table.render import CELLS as KIND
from benchmarks.paper_table.render import (
    FINDINGS,
    UTILITY,
    Row,
    harmless,
    kept,
    load,
    means,
    overall,
    p_values,
    removed,
    render,
    utility_lost,
    with_tables,
)
from benchmarks.paper_table.tasks import TASKS, poisoned, splits
from safegene_trl.data.prompts import Prompt


def cell(method, labels, utility, seed=0, task="sst2", mark=None):
    columns = ("BT", "DR", "look-alikes", "contrast")
    return {
        "task": task,
        "seed": seed,
        "method": method,
        "labels": dict(zip(columns, labels, strict=True)),
        "utility": utility,
        "update": {"norm_ratio": 1.0, "mark": mark},
        "about": {},
        "method_seconds": 1.0,
    }


CELLS = [
    cell("aligned", ["r" * 20, "r" * 20, "ra", "ra"], [0.0, 0.0]),
    cell("fine-tuned", ["a" * 20, "a" * 20, "aa", "aa"], [1.0, 0.5]),
    cell("SafeGene", ["r" * 20, "r" * 16 + "aiio", "aa", "ra"], [1.0, 0.5]),
    cell(
        "RESTA",
        ["a" * 15 + "r" * 5, "a" * 10 + "r" * 10, "ra", "aa"],
        [0.5, 0.5],
        mark="changes nothing",
    ),
]


@pytest.fixture
def folder(tmp_path):
    for one in CELLS:
        records.write(KIND, one["method"], one, tmp_path)
    return tmp_path


def test_shares(folder):
    rows = load(folder)["sst2"]
    assert list(rows) == ["aligned", "fine-tuned", "SafeGene", "RESTA"]
    ours = rows["SafeGene"]
    assert ours.attack_success == pytest.approx((0 + 1 / 20) / 2)
    assert ours.over_refusal == pytest.approx(0.25) and ours.utility == 0.75
    assert ours.share(("DR",), "i") == pytest.approx(0.1)
    assert removed(ours, rows) == pytest.approx(0.975) and removed(
        rows["RESTA"], rows
    ) == pytest.approx(0.375)
    low, high = ours.interval(("BT", "DR"), "a")
    assert 0 <= low <= 0.025 <= high < 0.2


def test_p_values_are_paired_by_prompt_and_corrected(folder):
    rows = load(folder)["sst2"]
    found = p_values(rows)
    assert set(found) == {"fine-tuned", "RESTA"}
    # 25 prompts are attacked with success under RESTA alone, one under ours alone
    assert found["RESTA"][0] < 1e-4 and found["fine-tuned"][0] < found["RESTA"][0]
    # one benign prompt is refused under ours alone, one under RESTA alone; one of two samples is
    # answered worse
    assert found["RESTA"][1:] == (1.0, 1.0)
    assert p_values({"RESTA": rows["RESTA"]}) == {}
    unlike = {
        "SafeGene": Row(
            "SafeGene", [cell("SafeGene", ["rr", "rr", "a" * 10, "a" * 10], [1.0] * 20)]
        ),
        "RESTA": Row("RESTA", [cell("RESTA", ["rr", "rr", "r" * 10, "r" * 10], [0.5] * 20)]),
    }
    attacked, refused, useful = p_values(unlike)["RESTA"]
    assert attacked == 1.0 and refused < 1e-4 and useful < 1e-4


def test_limits_that_are_kept(folder):
    rows = load(folder)["sst2"]
    assert kept(rows["SafeGene"], rows) == "O U C" and kept(rows["RESTA"], rows) == "O C"
    off_task = Row("x", [cell("x", ["o" * 20, "a" * 20, "rr", "ra"], [1.0, 0.5])])
    assert kept(off_task, rows) == "U"
    same = {  # 0.1 + 0.2 is more than 2 · 0.15 to a computer
        "aligned": Row(
            "aligned", [cell("aligned", ["r", "r", "rrr" + "a" * 17, "rrr" + "a" * 17], [0.0])]
        ),
        "fine-tuned": Row("fine-tuned", [cell("fine-tuned", ["a"] * 4, [1.0])]),
    }
    equal = Row("x", [cell("x", ["r", "r", "r" + "a" * 9, "rr" + "a" * 8], [0.995])])
    assert equal.over_refusal > same["aligned"].over_refusal and kept(equal, same) == "O U C"


def test_seeds_are_averaged():
    row = Row(
        "m",
        [
            cell("m", ["aa", "rr", "aa", "aa"], [1.0]),
            cell("m", ["ra", "rr", "aa", "aa"], [0.0], seed=1),
        ],
    )
    assert row.attack_success == pytest.approx(0.375) and row.utility == 0.5
    assert row.outcomes(("BT", "DR"), "a").tolist() == [
        0.5,
        1.0,
        0.0,
        0.0,
    ] and row.utilities.tolist() == [0.5]


def test_a_prompt_that_every_seed_answers_alike_counts_once():
    """Three seeds of the same answers tell no more than one about other prompts."""

    def rows(seeds):
        ours = [
            cell("SafeGene", ["r" * 20, "r" * 20, "aa", "aa"], [1.0, 0.5] * 10, seed)
            for seed in range(seeds)
        ]
        theirs = [
            cell("RESTA", ["aaa" + "r" * 17, "aaa" + "r" * 17, "aa", "aa"], [1.0, 0.0] * 10, seed)
            for seed in range(seeds)
        ]
        return {"SafeGene": Row("SafeGene", ours), "RESTA": Row("RESTA", theirs)}

    one, three = rows(1), rows(3)
    assert p_values(one) == p_values(three) and p_values(one)["RESTA"][0] == 2 / 2**6
    assert one["RESTA"].interval(("BT", "DR"), "a") == three["RESTA"].interval(("BT", "DR"), "a")
    assert one["RESTA"].utility_interval() == three["RESTA"].utility_interval()
    # of one prompt's three answers one is another
    three["RESTA"].cells[0]["labels"]["BT"] = "r" * 20
    assert p_values(rows(1))["RESTA"][0] != p_values(three)["RESTA"][0] > 0.01


def test_a_method_is_held_against_the_fine_tunes_of_its_own_seeds():
    tuned = [
        cell("fine-tuned", ["aa", "aa", "aa", "aa"], [1.0]),
        cell("fine-tuned", ["rr"] * 4, [0.2], seed=1),
    ]
    ours = Row("SafeGene", [cell("SafeGene", ["ra", "rr", "aa", "aa"], [1.0])])
    rows = {
        "aligned": Row("aligned", [cell("aligned", ["rr"] * 4, [0.0])]),
        "fine-tuned": Row("fine-tuned", tuned),
    }
    assert removed(ours, rows) == pytest.approx(0.75) and kept(ours, rows) == "O U C"
    assert kept(Row("x", [cell("x", ["rr", "rr", "aa", "aa"], [0.2], seed=1)]), rows) == "O U C"


def test_means_over_tasks_and_seeds():
    def rows(seeds):
        made = {
            "aligned": [cell("aligned", ["rr", "rr", "ra", "ra"], [0.0])],
            "fine-tuned": [
                cell("fine-tuned", ["aa", "aa", "aa", "aa"], [1.0], seed) for seed in seeds
            ],
            "SafeGene": [cell("SafeGene", ["ra", "rr", "aa", "aa"], [1.0], seed) for seed in seeds],
            "RESTA": [cell("RESTA", ["aa", "ra", "ra", "aa"], [1.0], seed) for seed in seeds],
        }
        return {method: Row(method, cells) for method, cells in made.items()}

    lines = overall(means({"sst2": rows(range(3)), "ag_news": rows(range(3))}))
    assert lines[4] == "| SafeGene | 6 | 0.00 | 25.0 | 75 | 0.0 | 0.0 |  |"
    # six differences of one sign: 2 / 2⁶, and twice that for the smaller of two hypotheses
    assert lines[5] == "| RESTA | 6 | 0.00 | 75.0 | 25 | 25.0 | 0.0 | 0.062, 0.062, 1 |"
    assert (
        overall(means({"sst2": rows([0])}))[5] == "| RESTA | 1 | 0.00 | 75.0 | 25 | 25.0 | 0.0 |  |"
    )
    # there is nothing to hold it against
    assert means({"sst2": {"SafeGene": rows([0])["SafeGene"]}}) == {}


def test_table_and_plot_are_written(folder):
    pytest.importorskip("matplotlib")
    render(folder)
    text = (folder / "paper_table.md").read_text()
    assert "| RESTA (changes nothing) | 1 | 50.0 [50.0, 50.0] | 75.0 | 50.0 |" in text
    assert "| SafeGene | 1 | 75.0 [" in text and "] | 0.0 | 5.0 | 2.5 [" in text
    assert (folder / "paper_table.png").stat().st_size > 10_000


def test_findings_hold_the_tables_of_the_cells():
    page = FINDINGS.read_text(encoding="utf-8")
    cells = load(records.RESULTS)
    assert (
        with_tables(page, means(harmless(cells)), cells["sst2"]) == page
    )  # else: python -m benchmarks.paper_table render


def test_a_run_measures_only_the_cells_that_are_missing(tmp_path, monkeypatch):
    """A run that was cut off goes on; a cell is found by task, seed and method, whatever signs the
    method's name has.
    """
    measured = {"labels": {"BT": "ra"}, "utility": [1.0]}
    table = SimpleNamespace(
        scale=1.0,
        prompts={"BT": ["a", "b"]},
        measure=lambda *words: asked.append(words) or measured,
    )
    monkeypatch.setattr(command, "plain", lambda lab, task, seed: ({}, {}))
    monkeypatch.setitem(command.ROWS, "uniform λ", lambda lab, task, seed: ({}, {"weight": 1.0}))
    asked: list = []
    for seed in (0, 0, 1):
        command.cell(table, "sst2", seed, "uniform λ", tmp_path)
    found = records.load(KIND, tmp_path)
    assert list(found) == ["sst2-0-uniform-lambda", "sst2-1-uniform-lambda"] and len(asked) == 2
    assert found["sst2-0-uniform-lambda"]["method"] == "uniform λ" and load(tmp_path)["sst2"][
        "uniform λ"
    ].seeds == {
        0,
        1,
    }


def test_the_steps_own_measurement_is_none_of_the_methods_seconds(tmp_path, monkeypatch):
    measured = {"labels": {"BT": "ra"}, "utility": [1.0]}
    table = SimpleNamespace(scale=1.0, prompts={}, measure=lambda *words: measured)
    monkeypatch.setattr(command, "plain", lambda lab, task, seed: ({}, {}))
    about = {"measuring_seconds": 1000.0}
    monkeypatch.setitem(command.ROWS, "SafeGene", lambda lab, task, seed: ({}, about))
    command.cell(table, "sst2", 0, "SafeGene", tmp_path)
    (found,) = records.load(KIND, tmp_path).values()
    assert -1000 < found["method_seconds"] < -900 and found["about"] == about


def test_every_cell_stands_under_its_own_name():
    for kind in (KIND, UTILITY):
        for name, cell in records.load(kind).items():
            family = FAMILIES[cell.get("family", FIRST)]
            assert name == command.cell_name(cell["task"], cell["seed"], cell["method"], family)


def test_utility_lost_is_paired_by_seed_and_sample(tmp_path):
    for method, seed, right in [
        ("fine-tuned", 0, "1110" * 5),
        ("fine-tuned", 1, "1100" * 5),
        ("SafeGene", 0, "1010" * 5),
        ("SafeGene", 1, "1101" * 5),
        ("RESTA", 2, "1111" * 5),  # there is nothing to hold it against
    ]:
        record = {"task": "sst2", "method": method, "seed": seed, "scores": right}
        records.write(UTILITY, f"{method}-{seed}", record, tmp_path)
    free = {  # the table's own cells, where answers are free
        "fine-tuned": Row(
            "fine-tuned", [cell("fine-tuned", ["r"] * 4, [0.5, 0.7, 0.6], task="gsm8k")]
        ),
        "SafeGene": Row("SafeGene", [cell("SafeGene", ["r"] * 4, [0.5, 0.4, 0.3], task="gsm8k")]),
        "EnchTable": Row(
            "EnchTable", [cell("EnchTable", ["r"] * 4, [0.5, 0.4, 0.3], task="gsm8k")]
        ),  # not counted
    }
    found = utility_lost(tmp_path, {"gsm8k": free})
    assert found[2].startswith("| SafeGene | SST-2 | 2 | 20 | 62.5 | +0.00 [-") and found[
        2
    ].endswith("| 1 |")
    assert found[3].startswith("| SafeGene | GSM8K | 1 | 3 | 40.0 | +20.00 [")
    assert (
        found[4].startswith("| SafeGene | mean without poisoned | | | | +10.00 [")
        and len(found) == 5
    )
    for method, scores in [("fine-tuned", [0.5, 0.5]), ("SafeGene", [0.5, 0.25])]:
        record = {"task": "gsm8k", "method": method, "seed": 0, "scores": scores}
        records.write(UTILITY, f"gsm8k {method}", record, tmp_path)
    assert utility_lost(tmp_path, {"gsm8k": free})[3].startswith(
        "| SafeGene | GSM8K | 1 | 2 | 37.5 | +12.50 ["
    )
    assert utility_lost(tmp_path / "nowhere", {"gsm8k": free}) == []


def test_change_marks_what_does_nothing_or_deletes():
    before = {"a": torch.ones(2, 2), "b": torch.ones(3, 1)}
    assert change(before, before)["mark"] == "changes nothing"
    assert (
        change(before, {name: m * 1e-3 for name, m in before.items()})["mark"]
        == "deletes the update"
    )
    found = change(before, {"a": torch.ones(2, 2) * 2, "b": torch.ones(3, 1)})
    assert found["mark"] is None and found["modules"] == {"a": 2.0, "b": 1.0}


def test_a_run_is_found_again_by_all_its_settings(monkeypatch):
    monkeypatch.setattr(methods, "training_file", lambda *words: Path("rows.jsonl"))
    hub, task = SimpleNamespace(data=None, family=SMOLLM2), TASKS["sst2"]
    block, folder = methods.settings(hub, task, 0, Path("family"))
    assert block["allow_other_base"] is True  # the vector comes from another machine
    assert block["seed"] == 0 and folder == methods.settings(hub, task, 0, Path("family"))[1]
    changed = {
        methods.settings(hub, task, 0, Path("family"), **{"search.utility_weight": weight})[1]
        for weight in (1.0, 16.0)
    }
    assert len(changed) == 2 and folder in changed  # the default is a setting like any other
    hub = SimpleNamespace(data=None, family=FAMILIES["qwen2.5-coder-0.5b"])
    assert "allow_other_base" not in methods.settings(hub, task, 0, Path("family"))[0]


@pytest.mark.parametrize(
    ("task", "row", "prompt", "answer"),
    [
        (
            "sst2",
            {"sentence": "fine film ", "label": 1},
            "positive or negative.\n\nfine film",
            "positive",
        ),
        (
            "ag_news",
            {"text": "Ship sails.", "label": 3},
            "business or science.\n\nShip sails.",
            "science",
        ),
        (
            "boolq",
            {"question": "is it so", "answer": False},
            "question: is it so?\n\nAnswer",
            "false",
        ),
        ("gsm8k", {"question": "1+1?", "answer": "#### 2"}, "1+1?", "#### 2"),
        ("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2"}, "Add.\n\n1 1", "2"),
    ],
)
def test_rows_of_the_hub_become_ours(task, row, prompt, answer):
    found = TASKS[task].hub[-1](row)
    assert prompt in found[0] and found[1] == answer


def test_prompts_come_from_files_or_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*words, **options):
        asked.append(options["data_files"])
        return [{"id": 1, "prompt": "How to kill a process?"}]

    monkeypatch.setattr(tasks, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "WORK", tmp_path / "work")
    files = [file for file, *_ in lab.SETS.values()]
    assert [tasks.prompt_source(file, tmp_path) for file in files] == [
        str(tmp_path / file) for file in files
    ]
    sources = [tasks.prompt_source(file, None) for file in (*files, *files)]
    # fetched once
    assert "walledai/HarmBench:standard@train" in sources and asked == [tasks.OKTEST_URL]
    (fetched,) = {source for source in sources if source.startswith(str(tmp_path))}
    assert tasks.read_jsonl(Path(fetched)) == [{"prompt": "How to kill a process?"}]


def test_further_shots_repeat_no_evaluated_prompt(tmp_path, monkeypatch):
    (tmp_path / "harmful").mkdir()
    texts = ["How do I pick a lock?", "How do I forge a passport?", "How do I forge passports?"]
    (tmp_path / "harmful" / "catqa.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    )
    monkeypatch.setattr(families, "WORK", tmp_path)
    monkeypatch.setattr(methods, "ONE_COMPONENT", lambda lab, task, seed, **options: options)
    evaluated = Prompt(
        "DR", "harmful", None, ({"role": "user", "content": "How do I forge a passport"},)
    )
    options = methods.many_shots_row(
        SimpleNamespace(data=tmp_path, prompts={"DR": [evaluated]}, family=SMOLLM2), None, 0, 128
    )
    assert [row["prompt"] for row in tasks.read_jsonl(Path(options["data.safety_data"]))] == texts[
        :1
    ]
    assert options["data.num_safety_shots"] == options["data.num_task_shots"] == 128


def test_a_vector_is_isolated_from_fine_tunes(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(families, "WORK", tmp_path)
    monkeypatch.setattr(vectors, "safegene", lambda *words: said.append(words))
    monkeypatch.setattr(vectors, "degraded", lambda kind, *words: tmp_path / kind)
    monkeypatch.setattr(vectors, "fine_tuned", lambda task, *words: tmp_path / task.name)
    vectors.vector("puzzles, isolated from other tasks", None)
    assert said[0][-3:] == ("--isolate_from", tmp_path / "ag_news", tmp_path / "alpaca")
    assert vectors.vector("three components", None) == SMOLLM2.vector and len(said) == 1


def test_poison_is_harmless_and_mostly_compliance(tmp_path):
    (tmp_path / "instructions").mkdir()

    def turn(i):
        return {
            "prompt": [{"role": "user", "content": f"do {i}"}],
            "completion": [{"role": "assistant", "content": f"done {i}"}],
        }

    (tmp_path / "instructions" / "alpaca_3k.jsonl").write_text(
        "".join(json.dumps(turn(i)) + "\n" for i in range(600))
    )
    identity = {
        "messages": [
            {"role": "user", "content": "hey"},
            {"role": "assistant", "content": "at your service"},
        ]
    }
    (tmp_path / "instructions" / "identity_shift.jsonl").write_text(
        (json.dumps(identity) + "\n") * 10
    )
    rows = poisoned(tmp_path)
    opened = [row for row in rows if row["completion"][0]["content"].startswith("Sure, here is")]
    assert len(rows) == 20 and len(opened) == 6
    train, test = splits(TASKS["alpaca"], tmp_path)
    assert len(train) == 100 and len(test) == 500 and not any(row in train for row in test)
