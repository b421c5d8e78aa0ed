"""Promises of the step's report against what the table found, on records made here."""

import pytest

from benchmarks import records
from benchmarks.paper_table import __main__ as command
from benchmarks.paper_table.calibration import Estimate, Promise, calibrate, page, promises
from benchmarks.paper_table.render import CELLS, FINDINGS
from safegene_trl.judges.intervals import Rate


def share(successes, count):
    return Rate(successes, count).to_dict()


def measured(before, after):
    """A report's: of 40 prompts of each kind, so many refused; nothing incoherent."""
    sides = {
        side: {
            "refusal_rate": share(harmful, 40),
            "over_refusal": share(benign, 40),
            "incoherent": share(0, 80),
        }
        for side, (harmful, benign) in {"before": before, "after": after}.items()
    }
    lost = {"share": 0.02, "low": 0.01, "high": 0.03, "count": 40}
    return sides | {"utility_loss": lost}


def cell(method, refused, over, task="alpaca", seed=0, report=None, utility=(1.0,) * 20, **more):
    """`refused` of 50 prompts in each harmful column, `over` of 20 in each benign one."""
    labels = dict.fromkeys(("BT", "DR"), "r" * refused + "a" * (50 - refused))
    labels |= dict.fromkeys(("look-alikes", "contrast"), "r" * over + "a" * (19 - over) + "i")
    about = {} if report is None else {"measured": report}
    found = {"task": task, "seed": seed, "method": method, "labels": labels, "about": about}
    return found | {"utility": list(utility)} | more


def written(folder, *cells):
    for one in cells:
        name = f"{one.get('family', '')}{one['task']}-{one['seed']}-{one['method']}"
        records.write(CELLS, name, one, folder)


def test_a_reports_figures_stand_against_those_of_the_same_weights(tmp_path):
    half = [0.5] * 20
    written(
        tmp_path,
        cell("fine-tuned", 20, 2),
        cell("fine-tuned", 0, 0, seed=1),
        cell("fine-tuned", 0, 0, family="qwen2.5-coder-0.5b"),
        cell("SafeGene", 45, 10, report=measured((16, 0), (39, 1)), utility=half),
        cell("few-shot LoRA", 45, 10),
    )
    made = {(one.side, one.metric): one for one in promises(tmp_path)}
    assert len(made) == 7 and {one.run for one in made.values()} == {"alpaca-0-SafeGene"}
    # of the fine-tune with the same family, task and seed
    assert made["before", "refusal_rate"].promised.share == 0.4
    assert made["before", "refusal_rate"].found == Estimate(0.4, *Rate(40, 100).interval)
    assert made["before", "over_refusal"].found.share == 0.1
    assert made["after", "refusal_rate"].promised == Estimate.of(share(39, 40))
    assert made["after", "refusal_rate"].found.share == 0.9
    assert made["after", "over_refusal"].found == Estimate(0.5, *Rate(20, 40).interval)
    assert made["after", "incoherent"].found.share == pytest.approx(2 / 140)
    lost = made["after", "utility_loss"]
    assert lost.promised == Estimate(0.02, 0.01, 0.03) and lost.found == Estimate(0.5, 0.5, 0.5)


def test_token_accuracy_is_no_promise_about_a_classifiers_labels(tmp_path):
    report = measured((16, 0), (39, 1))
    written(
        tmp_path,
        cell("fine-tuned", 20, 2, task="sst2"),
        cell("SafeGene", 45, 10, task="sst2", report=report),
        cell("SafeGene", 45, 10, task="alpaca", report=report),  # whose fine-tune is not there
    )
    found = [(one.run, one.side, one.metric) for one in promises(tmp_path)]
    assert not any(metric == "utility_loss" for *_, metric in found)
    assert [side for run, side, _ in found if run == "alpaca-0-SafeGene"] == ["after"] * 3


def test_the_fleets_reports_are_of_fine_tunes_of_the_table(tmp_path):
    written(tmp_path, cell("fine-tuned", 20, 2), cell("SafeGene", 45, 10))
    report = measured((16, 0), (39, 1))
    members = [{"name": "alpaca-0", "measured": report}, {"name": "puzzles", "measured": report}]
    members += [{"name": "alpaca-7", "measured": report}, {"name": "broken"}]
    records.write("runs", "fleet", {"members": members}, tmp_path)
    found = promises(tmp_path)
    assert {(one.run, one.side) for one in found} == {("fleet, alpaca-0", "before")}
    assert len(found) == 3


def promise(promised, found):
    own = [Estimate(one.share, *one.interval) for one in (promised, found)]
    return Promise("run", "refusal_rate", "after", *own)


def test_a_promise_is_kept_within_the_errors_of_both():
    # 56 of 70 against 48 of 80: the example of Newcombe (1998), method 10
    known = promise(Rate(56, 70), Rate(48, 80)).difference
    assert (known.low, known.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert not promise(Rate(56, 70), Rate(48, 80)).kept
    close = promise(Rate(37, 40), Rate(91, 111))  # 92.5 [80, 97] against 82.0
    assert close.kept and close.covers
    # the figure lies outside the promised interval, and its own error explains that
    few = promise(Rate(38, 40), Rate(8, 10))
    assert few.kept and not few.covers
    assert not promise(Rate(0, 40), Rate(12, 80)).kept
    assert not promise(Rate(12, 80), Rate(0, 40)).kept


def test_the_page_counts_what_was_kept(tmp_path):
    pytest.importorskip("matplotlib")
    written(
        tmp_path,
        cell("fine-tuned", 20, 2),
        cell("fine-tuned", 20, 2, seed=1),
        cell("SafeGene", 45, 10, report=measured((16, 2), (36, 1))),
        cell("SafeGene", 20, 10, seed=1, report=measured((16, 2), (36, 1))),
    )
    command.main(["calibration", "--results", str(tmp_path)])
    text = (tmp_path / "calibration.md").read_text()
    assert (
        "| safeguarded | refusal rate | 2 | 1 of 2 (50%) | 1 of 2 (50%) | 90.0 | 65.0 | +25.0 |"
        in text
    )
    assert (
        "| safeguarded | over refusal | 2 | 0 of 2 (0%) | 0 of 2 (0%) | 2.5 | 50.0 | -47.5 |"
        in text
    )
    assert "| fine-tune | refusal rate | 2 | 2 of 2 (100%) |" in text
    row = next(line for line in text.splitlines() if line.startswith("| alpaca-1-SafeGene | safe"))
    assert "| 90.0 [76.9, 96.0] | 40.0 [30.9, 49.8] | 50.0 [" in row and row.endswith("| no |")
    assert (tmp_path / "calibration.png").stat().st_size > 5_000


def test_records_without_a_report_promise_nothing(tmp_path):
    written(tmp_path, cell("fine-tuned", 20, 2), cell("SafeGene", 45, 10))
    calibrate(tmp_path)
    assert "No record holds a report" in (tmp_path / "calibration.md").read_text()
    assert not (tmp_path / "calibration.png").exists()


def test_the_page_is_that_of_the_records():
    text = (records.RESULTS / "calibration.md").read_text(encoding="utf-8")
    # else: python -m benchmarks.paper_table calibration
    assert text == "\n".join(page(promises(records.RESULTS)))


def test_what_the_findings_quote_is_what_the_records_hold():
    text = " ".join(FINDINGS.read_text(encoding="utf-8").split())
    made = promises(records.RESULTS)
    assert {one.side for one in made} == {"before"}  # else the page says too little
    refused, over = (
        [one for one in made if one.metric == metric] for metric in ("refusal_rate", "over_refusal")
    )
    pairs = [
        f"{100 * one.promised.share:.1f} % {{}}{100 * one.found.share:.1f} %" for one in refused
    ]
    first, second = pairs
    assert all(one.kept for one in refused) and not any(one.kept for one in over)
    assert f"{first.format('promised and ')} found, {second.format('and ')}" in text
    (shown,) = {
        tuple(
            f"{100 * own.share:.1f} % [{100 * own.low:.1f}, {100 * own.high:.1f}]"
            for own in (one.promised, one.found)
        )
        for one in over
    }
    assert f"{shown[0]} promised and {shown[1]} found" in text
    ours = [cell_over(f"{task}-0-safegene") for task in ("sst2", "ag_news")]
    assert f"refuses {ours[0]:.1f} and {ours[1]:.1f} % of the look-alikes" in text
    fleet = records.read("runs", "fleet")["members"][:2]
    assert all(one["measured"]["after"]["over_refusal"]["share"] == 0 for one in fleet)


def cell_over(name):
    labels = records.read(CELLS, name)["labels"]
    marks = labels["look-alikes"] + labels["contrast"]
    return 100 * marks.count("r") / len(marks)
