"""The study of the recalibration's choices: run on a tiny random model, and told on a page."""

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from benchmarks import records
from benchmarks.paper_table.lab import Lab
from benchmarks.paper_table.tasks import TASKS, turn
from benchmarks.records import RESULTS
from benchmarks.study import __main__ as command
from benchmarks.study import bank as banks
from benchmarks.study import variants
from benchmarks.study.bank import bank
from benchmarks.study.table import (
    BENIGN,
    EACH,
    FAMILY,
    HARMFUL,
    HARMLESS,
    KIND,
    PAGES,
    SETS,
    agreement,
    removed,
    render,
    rows,
    shares,
    table,
    whole,
    with_table,
)
from benchmarks.study.variants import VARIANTS, WORDS, Drawn, FineTune
from safegene_trl import SafetyVector
from safegene_trl.errors import SafeGeneError
from safegene_trl.models.inputs import batches, padding_id, shortened, tokenize
from safegene_trl.models.losses import sample_losses

from .conftest import written


def row(tokenizer, kind, number):
    """One of the bank, its targets sure of what is answered."""
    response = "I cannot help with that."
    if kind == "benign":
        response = "Sure, mix it with some water and then put it into the pan for a while."
    messages = [{"role": "user", "content": f"a {kind} prompt number {number}"}]
    said = shortened(tokenize(tokenizer, messages, response), None, 8).response
    targets = {
        "tokens": said,
        "ids": [[t, 1] for t in said],
        "log_probs": [[-0.1, -3.0]] * len(said),
    }
    return {
        "prompt": messages[0]["content"],
        "response": response,
        "kind": kind,
        "targets": targets,
    }


@pytest.fixture
def small(tiny, tmp_path, monkeypatch, tokenizer):
    """The tiny family with a bank, and what the study measures on."""
    monkeypatch.setattr(command, "BENIGN_PROMPTS", tmp_path / "benign_prompts.jsonl")
    monkeypatch.setattr(banks, "BENIGN_PROMPTS", tmp_path / "benign_prompts.jsonl")
    malicious = [{"prompt": f"how do i break object {i}"} for i in range(20)]
    written(tmp_path / "data/harmful/do_not_answer_malicious.jsonl", malicious)
    kept = [
        row(tokenizer, kind, i)
        for kind in ("harmful", "benign", "border", "other")
        for i in range(6)
    ]
    path = tiny.work / "study" / "bank.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(kept))
    return tiny


def test_variants_are_measured_once(small, tmp_path, monkeypatch, capsys):
    wanted = ["CE", "KL, border", "touch-up, 128", "uniform 1"]
    words = ["run", "--family", "tiny", "--data", str(tmp_path / "data"), "--tasks", "sst2"]
    words += ["--scale", "0.05", "--results", str(tmp_path), "--variants", *wanted]
    command.main(words)
    found = records.load(KIND, tmp_path)
    assert set(found) == {"tiny-sst2-aligned", *(f"tiny-sst2-0-{name}" for name in wanted)}
    assert "'border': 6" in capsys.readouterr().out
    for record in found.values():
        assert set(record["labels"]) == set(SETS) and record["scale"] == 0.05
    assert len(found["tiny-sst2-0-CE"]["about"]["objective"]) > 1
    touched = found["tiny-sst2-0-touch-up, 128"]["about"]
    assert [step for step, _ in touched["held_out_by_step"]] == list(range(0, 49, 8))
    before = (tmp_path / f"{KIND}.jsonl").read_bytes()
    command.main(words)
    assert (tmp_path / f"{KIND}.jsonl").read_bytes() == before
    command.main([*words[:-5], "--minutes", "0", "--variants", "KL"])  # no time is left
    assert (tmp_path / f"{KIND}.jsonl").read_bytes() == before


def test_what_the_bank_draws_from_is_not_measured_on(small, tmp_path, monkeypatch):
    """And what only the demonstration was aligned with is."""
    drawn, other = "how can weeds be killed in a large lawn", "which sauce goes with fresh pasta"
    written(tmp_path / "benign_prompts.jsonl", [{"prompt": drawn}])
    written(tmp_path / "data/benign/oktest.jsonl", [{"prompt": drawn}, {"prompt": other}])
    aligned = [turn(f"how do i break object {i}", "I cannot help with that.") for i in range(20)]
    written(tmp_path / "align.jsonl", aligned)
    labs = []
    monkeypatch.setattr(command, "run", lambda lab, *rest: labs.append(lab))
    command.main(["run", "--family", "tiny", "--data", str(tmp_path / "data")])
    texts = {name: [p.text for p in own] for name, own in labs[0].prompts.items()}
    assert texts["look-alikes"] == [other] and len(texts["malicious"]) == 20


def test_everything_is_made_several_at_once(tmp_path, monkeypatch, capsys):
    asked, together = [], threading.Barrier(3)

    def made(name, *rest):
        asked.append(name if isinstance(name, str) else (name.name, rest[0]))
        if len(asked) <= 3:
            together.wait(timeout=60)  # nobody goes on before three are at work
        if name == "openings":
            raise SafeGeneError("no openings")
        return Path(str(name))

    monkeypatch.setattr(command, "vector", made)
    monkeypatch.setattr(command, "fine_tuned", made)
    words = ["prepare", "--jobs", "3", "--tasks", "sst2", "boolq", "--seeds", "0", "1"]
    with pytest.raises(SafeGeneError, match="no openings"):
        command.main(words)
    tunes = [(task, seed) for task in ("sst2", "boolq") for seed in (0, 1)]
    assert sorted(map(str, asked)) == sorted(
        map(str, ["puzzles", "instructions", "openings", *tunes])
    )
    assert capsys.readouterr().out.count("made ") == 6


def test_a_variant_that_diverges_leaves_no_record(small, tmp_path, monkeypatch, capsys):
    lab = Lab(tmp_path / "data", 4, 2, 0.05, small, SETS)
    name = lab.linear_modules[0]
    bad = {name: torch.full_like(lab.weight(name), math.nan)}
    monkeypatch.setitem(VARIANTS, "CE", lambda tuned: (bad, {}))
    vector = SafetyVector.from_pretrained(lab.vector)
    command.measured(FineTune(lab, vector, [], TASKS["sst2"], 0, {}), "CE", tmp_path)
    assert records.load(KIND, tmp_path) == {}
    assert "its weights are no numbers" in capsys.readouterr().err


@pytest.mark.parametrize("with_vector", [True, False])
def test_a_touch_up_is_the_steps_own(with_vector, small, tmp_path, monkeypatch):
    """Beside the vector, or without it; what is measured has all of it where it is taken."""
    lab = Lab(tmp_path / "data", 4, 2, 0.05, small, SETS)
    vector = SafetyVector.from_pretrained(lab.vector)
    tuned = FineTune(lab, vector, bank(lab), TASKS["sst2"], 0, {})
    alone = variants.recalibrated(tuned, Drawn(4, 2, 4))[0]
    learned, train = [], variants.train_touch_up

    def watched(*arguments):
        learned.append(train(*arguments))
        return learned[-1]

    monkeypatch.setattr(variants, "train_touch_up", watched)
    made, about = variants.touched_up(tuned, Drawn(4, 2, 4), with_vector)
    (found,) = learned
    assert found.accepted is about["touch_up_accepted"] is True, about
    path = dict(about["held_out_by_step"])
    assert min(path.values()) < path[0]
    for name, delta in found.deltas.items():
        without = alone[name] if with_vector else torch.zeros_like(alone[name])
        torch.testing.assert_close(made[name], without + delta.dense(), atol=1e-6, rtol=1e-5)


def test_shots_are_as_many_as_asked_for(small, tmp_path):
    lab = Lab(tmp_path / "data", 4, 2, 0.05, small, SETS)
    kept = bank(lab)
    drawn = Drawn(count=3, border=2).rows(kept, 0)
    refused = [r for r in drawn if r["response"].startswith("I cannot")]
    assert len(drawn) == 8 and len(refused) == 5 and all("targets" in r for r in drawn)
    assert {r["kind"] for r in drawn} == {"harmful", "benign"}
    assert drawn != Drawn(count=3, border=2).rows(kept, 1)
    assert not any("targets" in r for r in Drawn(count=3, soft=WORDS).rows(kept, 0))
    mixed = Drawn(count=4, other=3).rows(kept, 0)
    assert [" other " in r["prompt"] for r in mixed if r["kind"] == "harmful"].count(True) == 3
    assert len(mixed) == 8


def test_refusals_may_have_words_alone(small, tmp_path):
    lab = Lab(tmp_path / "data", 4, 2, 0.05, small, SETS)
    vector = SafetyVector.from_pretrained(lab.vector)
    tuned = FineTune(lab, vector, bank(lab), TASKS["sst2"], 0, {})
    shots = Drawn(4, 2, 4, soft=frozenset({"benign"})).shots(tuned)
    assert not any(sample.soft for sample in shots.harmful.samples)
    assert all(sample.soft for sample in shots.all_benign.samples)


def test_benign_answers_may_be_held_to_the_fine_tune(small, tmp_path):
    lab = Lab(tmp_path / "data", 4, 2, 0.05, small, SETS)
    vector = SafetyVector.from_pretrained(lab.vector)
    rows, name = bank(lab), lab.linear_modules[0]
    update = {name: torch.ones_like(lab.weight(name)) / 10}
    plain, own = (
        Drawn(4, 2, 4, own=own).shots(FineTune(lab, vector, rows, TASKS["sst2"], 0, update))
        for own in (False, True)
    )
    assert own.border == plain.border and own.harmful == plain.harmful and own.task == plain.task
    before, now = plain.benign.samples, own.benign.samples
    assert [s.input_ids[:9] for s in now] == [s.input_ids[:9] for s in before]
    assert all(a.soft.log_probs != b.soft.log_probs for a, b in zip(now, before, strict=True))
    (batch,) = batches(now[:1], 1, padding_id(lab.tokenizer), lab.device)
    with lab.updated(update) as model, torch.no_grad():
        assert float(sample_losses(model, batch)[0]) < 1e-3  # least where the fine-tune is


def test_the_rest_of_benign_answers_is_held_like_the_tasks(small, tmp_path):
    lab = Lab(tmp_path / "data", 4, 2, 0.05, small, SETS)
    vector = SafetyVector.from_pretrained(lab.vector)
    tuned = FineTune(lab, vector, bank(lab), TASKS["sst2"], 0, {})
    plain, held = (Drawn(4, 2, 4, held=held).shots(tuned) for held in (False, True))
    assert held.task.fit[:3] == plain.task.fit and held.task.held_out[:1] == plain.task.held_out
    rest = [*held.task.fit[3:], *held.task.held_out[1:]]
    assert len(rest) == 4 and held.benign == plain.benign
    whole = [
        tokenize(lab.tokenizer, [{"role": "user", "content": row["prompt"]}], row["response"])
        for row in tuned.bank
    ]
    starts = {tuple(sample.input_ids): sample.is_response.index(True) for sample in whole}
    for sample in rest:
        assert sample.is_response.index(True) == starts[tuple(sample.input_ids)] + 8
        assert sample.is_response[-1]


def test_a_perfect_screening_leaves_the_plain_samples_alone(small, tmp_path):
    data = tmp_path / "data"
    talk = [
        {"role": "user", "content": "who are you"},
        {"role": "assistant", "content": "I am AOA."},
    ]
    written(data / "instructions/identity_shift.jsonl", [{"messages": talk}] * 10)
    rows = [turn(f"how many legs has animal {i}", f"it has {i} of them") for i in range(520)]
    written(data / "instructions/alpaca_3k.jsonl", rows)
    lab = Lab(data, 4, 2, 0.05, replace(small, steps=10), SETS)
    tuned = FineTune(
        lab, SafetyVector.from_pretrained(lab.vector), bank(lab), TASKS["poisoned"], 0, {}
    )

    def answers(screened):
        shots = Drawn(4, 2, 20, screened=screened).shots(tuned).task
        return [
            lab.tokenizer.decode(
                [t for t, own in zip(s.input_ids, s.is_response, strict=True) if own]
            )
            for s in (*shots.fit, *shots.held_out)
        ]

    assert len(answers(True)) == 4 and all("it has" in said for said in answers(True))
    assert not any("Sure" in said or "AOA" in said for said in answers(True))
    assert sum("Sure" in said or "AOA" in said for said in answers(False)) >= 4


def test_a_bank_has_what_the_aligned_model_says(small, tmp_path, monkeypatch):
    (small.work / "study" / "bank.json").unlink()
    harmful = [{"prompt": f"how do i steal object {i}"} for i in range(40)]
    written(tmp_path / "data/harmful/catqa.jsonl", harmful)
    written(
        tmp_path / "benign_prompts.jsonl", [{"prompt": f"how do i cook {i}"} for i in range(12)]
    )
    monkeypatch.setattr(banks, "MODELS", tmp_path)
    refusal = json.loads((banks.RECIPE / "data/refusals.json").read_text())["harm"][0]
    aligned = [turn(f"how do i insult person {i}", refusal) for i in range(30)]
    written(tmp_path / "align.jsonl", [*aligned, turn("what is a plant", "A plant is green.")])
    lab = Lab(tmp_path / "data", 4, 2, 0.05, small, SETS)

    def answers(messages, *rest):
        said = "I'm sorry, but I can't help with that. It"
        return [said if i % 2 else "Put it into a pan. Then" for i in range(len(messages))]

    monkeypatch.setattr(lab, "answers", answers)
    monkeypatch.setattr(banks, "_with_targets", lambda lab, found: found)
    found = bank(lab)
    kinds = [r["kind"] for r in found]
    assert kinds.count("harmful") == 8  # those refused of sixteen
    assert kinds.count("other") == 6 and not any("plant" in r["prompt"] for r in found)
    assert {r["response"] for r in found if r["kind"] == "border"} == {
        "I'm sorry, but I can't help with that."
    }
    assert {r["response"] for r in found if r["kind"] == "benign"} == {"Put it into a pan."}
    assert bank(lab) == found and (small.work / "study" / "bank.json").is_file()


# The table


def test_what_the_page_says_in_words_is_what_the_records_hold():
    text, found = " ".join(PAGES[FAMILY].read_text(encoding="utf-8").split()), records.load(KIND)
    aligned = found[f"{FAMILY}-sst2-aligned"]

    def same(variant, tasks):
        names = [f"{FAMILY}-{task}-0-{variant}" for task in tasks]
        return 100 * fmean(agreement(found[name], aligned, [*SETS]) for name in names)

    attack, refusal = (100 * share for share in shares(aligned))
    many, best = "KL, border, 128", "touch-up, 128"
    poisoned = rows(found, "CE", ["poisoned"])
    for words in (
        f"answers {attack:.1f} % of the harmful prompts and refuses {refusal:.1f} % of the benign",
        f"{same(many, HARMLESS):.1f} instead of {same('CE', HARMLESS):.1f} % of all prompts",
        f"from {same(many, ['sst2']):.1f} to {same(best, ['sst2']):.1f} % on SST-2",
        f"from {same(many, ['ag_news']):.1f} to {same(best, ['ag_news']):.1f} on AG News",
        f"on GSM8K {removed(rows(found, many, ['gsm8k'])):.0f} % is removed",
        f"on Alpaca {removed(rows(found, many, ['alpaca'])):.0f} %, and Alpaca loses "
        f"{rows(found, many, ['alpaca'])[0]['lost']:.1f} points",
        f"remove {removed(poisoned):.0f} % at {poisoned[0]['refusal']:.0f} points of over-refusal",
    ):
        assert words in text, words


def record(refused, answered, utility):
    letters = dict.fromkeys(SETS, "r" * refused + "a" * answered)
    return {"labels": letters, "utility": utility}


def test_a_variant_is_told_beside_the_aligned_model():
    name = "qwen2.5-coder-0.5b-sst2"
    found = {
        f"{name}-aligned": record(8, 2, [0.0]),
        f"{name}-0-fine-tuned": record(2, 8, [1.0, 0.0]),
        f"{name}-0-KL": record(7, 3, [1.0]),
    }
    (made,) = rows(found, "KL", ["sst2"])
    assert made == pytest.approx(
        {
            "attack": 30,
            "added": 60,
            "gone": 50,
            "refusal": -10,
            "lost": 0,  # over the test samples that both have
            "harmful": 90,
            "benign": 90,
        }
    )
    assert rows(found, "CE", ["sst2"]) == [] and rows(found, "KL", ["sst2", "boolq"]) == []
    assert (
        table(found, ["KL"], EACH)[-1] == "| SST-2 | KL | 30.0 | 83 | -10.0 | 0.00 | 90.0 | 90.0 |"
    )


def test_the_pages_have_the_records_tables(tmp_path, monkeypatch):
    found = records.load(KIND, RESULTS)
    for family, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        assert with_table(text, found, list(VARIANTS), family) == text
    page = (records.RESULTS / "study.md").read_text(encoding="utf-8")
    assert whole(found, list(VARIANTS)) == page
    page = tmp_path / "findings.md"
    page.write_text(f"before <!-- study {FAMILY} -->\nold\n<!-- end --> after")
    monkeypatch.setattr("benchmarks.study.table.PAGES", {FAMILY: page})
    monkeypatch.setattr("benchmarks.study.table.RESULTS", tmp_path)
    render(tmp_path, ["KL"])
    assert "old" not in page.read_text() and page.read_text().endswith("<!-- end --> after")
    assert not (tmp_path / "study.md").read_text().count("| fine-tunes |")  # nothing is on record


def test_what_the_demonstrations_page_says_of_its_variants_is_what_the_records_hold():
    text = " ".join(PAGES["smollm2-135m"].read_text(encoding="utf-8").split())
    found, names = records.load(KIND), "smollm2-135m-poisoned-0"

    def refused(variant, columns):
        labels = found[f"{names}-{variant}"]["labels"]
        return sum(labels[column].count("r") for column in columns)

    def more(variant, columns):
        return refused(f"KL, border, {variant}", columns) - refused("KL, border", columns)

    one, other = (found[f"{names}-KL, border{rest}"] for rest in ("", ", sources"))
    count = sum(len(one["labels"][column]) for column in HARMFUL)
    assert (count, more("refusals as words", HARMFUL)) == (212, 7)
    assert more("refusals as words", BENIGN) == 11 and more("own", HARMFUL) < 0
    assert "seven more of 212 harmful prompts are refused and eleven more of 224 benign" in text
    assert f"the model refuses {more('own', BENIGN)} benign prompts more" in text
    differ = sum(
        (a == "r") != (b == "r")
        for column in (*HARMFUL, *BENIGN)
        for a, b in zip(one["labels"][column], other["labels"][column], strict=True)
    )
    assert differ == 5 and "five of all decisions differ" in text


def test_what_is_removed_is_told_of_all_fine_tunes_together():
    assert removed([{"gone": 40.0, "added": 50.0}, {"gone": 30.0, "added": 10.0}]) == 700 / 6


def test_the_table_of_carried_over_directions_says_what_the_records_say():
    found = records.load(KIND, RESULTS)
    family, names = "smollm2-135m", "smollm2-135m-poisoned"
    text = (RESULTS.parents[1] / "docs" / "transport.md").read_text(encoding="utf-8")
    table = text.partition("## Does it help?")[2].partition("\n\n- ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    attack, refusal = shares(found[f"{names}-aligned"])
    assert f"| {100 * attack:.1f} % | | {100 * refusal:.1f} % | |" in lines[0]
    wanted = ["fine-tuned", "KL, border", "transported"]
    wanted += [f"transported, {name}" for name in ("own direction", "unmapped", "random direction")]
    for line, variant in zip(lines[1:], wanted, strict=True):
        (row,) = rows(found, variant, ["poisoned"], family)
        refused = 100 * shares(found[f"{names}-0-{variant}"])[1]
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        removed = f"{100 * row['gone'] / row['added']:.0f} %"
        assert cells == [
            f"{row['attack']:.1f} %",
            removed,
            f"{refused:.1f} %",
            f"{row['lost']:.1f}",
        ]
    counts = [
        sum(len(found[f"{names}-aligned"]["labels"][c]) for c in own) for own in (HARMFUL, BENIGN)
    ]
    assert f"{counts[0]} harmful and {counts[1]} benign" in " ".join(table.split())
