"""Where the shots come from, and what they are cut to."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest

from safegene_trl.config.gate import GateConfig
from safegene_trl.data.prompt_style import trained_options
from safegene_trl.data.shots import gather_shots, within_vocabulary
from safegene_trl.errors import CalibrationDataError, ConfigError
from safegene_trl.models.inputs import tokenize
from safegene_trl.vectors.combination import combined

from ..conftest import (
    HARMFUL,
    config_of,
    make_deltas,
    make_model,
    make_vector,
    task_dataset,
)
from ..reasoning_templates import reasoning_tokenizer


WORDS = ("lantern", "orchard", "granite", "whistle", "meadow")


@pytest.fixture
def gather(tokenizer):
    vector = make_vector(make_model(), tokenizer)

    def run(task_rows=None, **values):
        rows = task_dataset() if task_rows is None else task_rows
        return gather_shots(config_of(vector="v", **values), vector, tokenizer, 256, rows)

    return run


def test_defaults_come_from_the_vector_and_the_training_set(gather):
    shots = gather()
    assert [shots.record[kind]["source"] for kind in ("safety", "benign", "task")] == [
        "vector",
        "vector",
        "training set",
    ]
    assert (shots.record["safety"]["fit"], shots.record["safety"]["held_out"]) == (9, 3)
    assert all(len(shots.record[kind]["sha256"]) == 64 for kind in ("safety", "benign", "task"))


def with_further_rows(vector):
    """The vector with benign prompts that the aligned model refuses, and some to measure on."""
    border = {"response": "sorry i cannot help", "kind": "benign", "verdict": "refused"}
    rows = [{"prompt": f"how do i kill process {i}", **border} for i in range(8)]
    for number, kind in enumerate(["harmful", "benign"] * 10):
        verdict = ("refused", "answered")[number % 3 == 0]
        text = f"{WORDS[number // 5]} {WORDS[number % 5]} {number}"
        rows.append({"prompt": text, "kind": kind, "verdict": verdict, "use": "measure"})
    record = {"test_prompts": {"max_new_tokens": 32, "max_reasoning_tokens": 0}}
    return replace(vector, prompts=[*vector.prompts, *rows], selection=vector.selection | record)


def measured_on(tokenizer, vector=None, **values):
    """Shots of a vector with prompts to measure on."""
    vector = vector or with_further_rows(make_vector(make_model(), tokenizer))
    return gather_shots(config_of(vector="v", **values), vector, tokenizer, 256, task_dataset())


def test_the_vectors_prompts_to_measure_on_come_first(tokenizer, tmp_path):
    vector = with_further_rows(make_vector(make_model(), tokenizer))
    rows = {row["prompt"]: row for row in vector.prompts if "use" in row}
    shots = measured_on(tokenizer, vector, num_test_prompts=7)
    for kind, prompts in shots.unseen.prompts.items():
        assert len(prompts) == 7 and all(rows[p.text]["kind"] == kind for p in prompts)
        assert shots.unseen.verdicts[kind] == [rows[p.text]["verdict"] for p in prompts]
        record = {"source": "vector", "use": "measure", "count": 7}
        assert shots.record["unseen"][kind] == record
    own = lines(tmp_path / "own.jsonl", [{"prompt": "why do birds sing"}])
    shots = measured_on(tokenizer, vector, gate=GateConfig(harmful_data=own))
    assert shots.unseen.verdicts["harmful"] == [None]
    assert "use" not in shots.record["unseen"]["harmful"]
    assert None not in shots.unseen.verdicts["benign"]


def test_which_prompts_come_with_the_vector_and_may_be_shown(tokenizer, tmp_path):
    plain, both = make_vector(make_model(), tokenizer), {"harmful", "benign"}
    rows = [{"prompt": f"forbidden {i}", "response": "i cannot help"} for i in range(12)]
    own = lines(tmp_path / "own.jsonl", rows)
    few = {"num_safety_shots": 4, "num_benign_shots": 4}
    assert measured_on(tokenizer, plain, **few).unseen.from_vector == both
    found = measured_on(tokenizer, plain, safety_data=own, **few)
    assert found.unseen.counts["harmful"] and found.unseen.from_vector == {"benign"}
    # fitted on the user's, and measured on the vector's
    assert measured_on(tokenizer, safety_data=own, **few).unseen.from_vector == both
    gate = GateConfig(harmful_data=own)
    assert measured_on(tokenizer, gate=gate).unseen.from_vector == {"benign"}
    gate = GateConfig(benign_data=own)
    assert measured_on(tokenizer, gate=gate).unseen.from_vector == {"harmful"}


def test_a_prompt_to_measure_on_repeats_no_shot(tokenizer, tmp_path):
    vector = with_further_rows(make_vector(make_model(), tokenizer))
    row = next(row for row in vector.prompts if "use" in row and row["kind"] == "harmful")
    own = [row["prompt"].upper(), *(f"forbidden {i}" for i in range(4))]
    rows = [{"prompt": text, "response": "no, i cannot help"} for text in own]
    file = lines(tmp_path / "own.jsonl", rows)
    shots = measured_on(tokenizer, vector, safety_data=file)
    assert row["prompt"] not in [prompt.text for prompt in shots.unseen.prompts["harmful"]]
    assert list(shots.record["unseen"]["harmful"]["skipped"].values()) == [1]
    assert None not in shots.unseen.verdicts["harmful"]


@pytest.mark.parametrize("values", [{"max_new_tokens": 48}, {"max_new_tokens": 31}])
def test_verdicts_on_answers_of_another_length_are_not_known(values, tokenizer):
    shots = measured_on(tokenizer, **values)
    for kind, verdicts in shots.unseen.verdicts.items():
        assert set(verdicts) == {None} and shots.record["unseen"][kind]["use"] == "measure"
    (warning,) = [said for said in shots.warnings if "to measure on" in said]
    assert "set `measure.max_new_tokens` to 32 and `measure.max_reasoning_tokens` to 0" in warning
    assert not any("to measure on" in said for said in measured_on(tokenizer).warnings)


def test_of_what_the_shots_leave_the_vectors_verdicts_are_known(gather, tokenizer, tmp_path):
    shots = gather(num_safety_shots=4, num_benign_shots=4)
    harmful, benign = (shots.unseen.verdicts[kind] for kind in ("harmful", "benign"))
    assert set(harmful) == {"refused"} and set(benign) == {"answered"}
    assert len(harmful) == shots.unseen.counts["harmful"] > 0
    rows = [{"prompt": f"forbidden {i}", "response": "i cannot help"} for i in range(6)]
    own = gather(safety_data=lines(tmp_path / "own.jsonl", rows), num_safety_shots=4)
    assert set(own.unseen.verdicts["harmful"]) == {None}


def test_a_verdict_is_that_of_an_answer_of_as_many_tokens_as_here(tokenizer):
    """A refusal that comes later than where answers are cut here is none."""
    late = "take a pan and stir , sorry i cannot help with that"
    vector = make_vector(make_model(), tokenizer)
    rows = [row | {"response": late} if row["kind"] == "harmful" else row for row in vector.prompts]
    vector = replace(vector, prompts=rows)
    verdicts = {}
    for length in (4, 32):
        shots = measured_on(tokenizer, vector, max_new_tokens=length, num_safety_shots=4)
        verdicts[length] = set(shots.unseen.verdicts["harmful"])
    assert verdicts == {4: {"answered"}, 32: {"refused"}}


def test_a_verdict_of_shorter_answers_than_here_is_not_known(tokenizer):
    """What is stored may have been cut before a refusal."""
    vector = make_vector(make_model(), tokenizer)
    few = {"num_safety_shots": 4, "num_benign_shots": 4}
    shots = measured_on(tokenizer, vector, max_new_tokens=48, **few)
    assert None not in shots.unseen.verdicts["harmful"] and not shots.warnings
    shots = measured_on(tokenizer, vector, max_new_tokens=49, **few)
    assert {verdict for own in shots.unseen.verdicts.values() for verdict in own} == {None}
    assert "set `measure.max_new_tokens` to 48 or less" in shots.warnings[0]
    long = [row | {"response": "sorry " * 60} for row in vector.prompts]
    shots = measured_on(tokenizer, replace(vector, prompts=long), max_new_tokens=60, **few)
    assert None not in shots.unseen.verdicts["harmful"]


def test_verdicts_on_prompts_that_were_written_otherwise_are_not_known():
    tokenizer = reasoning_tokenizer("hybrid")
    made = make_vector(make_model(vocab_size=len(tokenizer)), tokenizer)
    for vector in (made, with_further_rows(made)):
        for given, known in (({}, True), ({"enable_thinking": False}, False)):
            shots = measured_on(
                tokenizer,
                vector,
                num_safety_shots=4,
                num_benign_shots=4,
                chat_template_kwargs=given,
            )
            assert all((None not in own) == known for own in shots.unseen.verdicts.values())


def test_verdicts_in_another_chat_template_are_not_known(tokenizer):
    other = deepcopy(tokenizer)
    other.chat_template = "<|system|>be brief" + tokenizer.chat_template
    made = make_vector(make_model(), tokenizer)
    for vector in (made, with_further_rows(made)):
        for own, known in ((tokenizer, True), (other, False)):
            shots = measured_on(own, vector, num_safety_shots=4, num_benign_shots=4)
            assert all((None not in each) == known for each in shots.unseen.verdicts.values())
    assert any("in another chat template" in said for said in shots.warnings)
    shots = measured_on(tokenizer, vector)
    assert not any("in another chat template" in said for said in shots.warnings)


def test_verdicts_of_vectors_whose_prompts_were_written_in_unlike_ways_are_not_known():
    tokenizer = reasoning_tokenizer("hybrid")
    model = make_model(vocab_size=len(tokenizer))
    first = with_further_rows(make_vector(model, tokenizer))
    second = replace(first, deltas=make_deltas(model, seed=5))
    for thinks in (False, True):
        written = {"chat_template_kwargs": {"enable_thinking": thinks}}
        parts = [
            replace(first, extraction=first.extraction | written),
            replace(second, extraction=second.extraction | {"chat_template_kwargs": {}}),
        ]
        shots = measured_on(tokenizer, combined(parts))
        assert all(set(own) == {None} for own in shots.unseen.verdicts.values())
    shots = measured_on(tokenizer, combined([first, second]))
    assert all(None not in own for own in shots.unseen.verdicts.values())


def test_a_benign_prompt_to_measure_on_repeats_no_shot_of_ones_own(tokenizer, tmp_path):
    vector = with_further_rows(make_vector(make_model(), tokenizer))
    row = next(row for row in vector.prompts if "use" in row and row["kind"] == "benign")
    own = [row["prompt"], *(f"forbidden {i}" for i in range(4))]
    rows = [{"prompt": text, "response": "no, i cannot help"} for text in own]
    shots = measured_on(tokenizer, vector, safety_data=lines(tmp_path / "own.jsonl", rows))
    assert row["prompt"] not in [prompt.text for prompt in shots.unseen.prompts["benign"]]


def test_what_is_there_twice_is_not_fitted_and_measured_on(tokenizer):
    vector = make_vector(make_model(), tokenizer)
    rows = [row for row in vector.prompts for _ in range(5)]
    shots = measured_on(
        tokenizer, replace(vector, prompts=rows), num_safety_shots=8, num_benign_shots=8
    )
    for kind, split in (("harmful", shots.data.harmful), ("benign", shots.data.benign)):
        texts = [prompt.text for prompt in shots.unseen.prompts[kind]]
        fitted = " ".join(tokenizer.decode(sample.input_ids) for sample in split.fit)
        assert texts and len(set(texts)) == len(texts)
        assert not any(f"{text}<|end|>" in fitted for text in texts)


def test_benign_shots_are_answers_and_prompts_to_measure_on_no_shots(gather, tokenizer):
    before = gather(num_benign_shots=4)
    vector = with_further_rows(make_vector(make_model(), tokenizer))
    config = config_of(vector="v", num_benign_shots=4)
    after = gather_shots(config, vector, tokenizer, 256, task_dataset())
    assert after.data.harmful == before.data.harmful and after.data.benign == before.data.benign
    assert after.record["benign"] == before.record["benign"]


def test_what_nothing_is_fitted_on_is_left_to_measure_on(gather, tokenizer):
    shots = gather(num_safety_shots=4, num_benign_shots=4, num_task_shots=8, num_test_prompts=6)
    # of eight benign prompts three are fitted on
    assert shots.unseen.counts == {
        "harmful": 6,
        "benign": 5,
        "task": 6,
    }
    fitted = {
        tokenizer.decode(sample.input_ids)
        for sample in (*shots.data.harmful.fit, *shots.data.benign.fit)
    }
    for prompts in shots.unseen.prompts.values():
        assert not any(prompt.text in text for prompt in prompts for text in fitted)
    task = {tuple(sample.input_ids) for sample in shots.data.task.fit}
    assert not any(tuple(sample.input_ids) in task for sample in shots.unseen.task)
    assert gather(num_test_prompts=0).unseen.counts == {"harmful": 0, "benign": 0, "task": 0}


def test_the_gates_own_prompts_do_not_repeat_a_shot(gather, tmp_path):
    rows = [
        {"prompt": HARMFUL[0], "category": "a"},
        {"prompt": "why do birds sing", "category": "b"},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shots = gather(gate=GateConfig(harmful_data=str(tmp_path / "own.jsonl")))
    assert [(p.text, p.category) for p in shots.unseen.prompts["harmful"]] == [
        ("why do birds sing", "b")
    ]
    skipped = {"text that repeats, or nearly repeats, a prompt that was used": 1}
    assert shots.record["unseen"]["harmful"] == {
        "source": str(tmp_path / "own.jsonl"),
        "count": 1,
        "skipped": skipped,
    }


def test_a_gate_whose_prompts_are_mostly_used_ones_is_refused(gather, tmp_path):
    rows = [{"prompt": text} for text in (*HARMFUL[:3], "why do birds sing")]
    with pytest.raises(CalibrationDataError, match=r"3 of 4 prompts of .*own.jsonl repeat"):
        gather(gate=GateConfig(harmful_data=lines(tmp_path / "own.jsonl", rows)))


def test_counts_and_cuts(gather):
    shots = gather(
        num_safety_shots=4,
        num_task_shots=6,
        num_benign_shots=0,
        max_refusal_tokens=3,
        max_response_tokens=2,
    )
    assert shots.data.benign is None and shots.record["benign"] is None
    assert {sum(sample.is_response) for sample in shots.data.harmful.fit} == {3}
    assert {sum(sample.is_response) for sample in shots.data.task.fit} == {2}
    assert len(shots.data.harmful.fit) + len(shots.data.harmful.held_out) == 4


def test_same_seed_same_shots(gather):
    assert gather(num_task_shots=4).record == gather(num_task_shots=4).record
    assert (
        gather(num_task_shots=4, seed=1).record["task"]["sha256"]
        != gather(num_task_shots=4).record["task"]["sha256"]
    )


def test_a_stream_is_read_from_its_start(gather):
    rows = [row["prompt"][0]["content"] for row in task_dataset()][:3]
    shots = gather(task_dataset().to_iterable_dataset(), num_task_shots=3)
    assert shots.record["task"]["fit"] + shots.record["task"]["held_out"] == len(rows)


def test_prompts_without_refusals_take_the_vectors(gather, tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"forbidden {i}"}) + "\n" for i in range(4)))
    shots = gather(safety_data=str(file), max_refusal_tokens=100)
    for sample in shots.data.harmful.fit:
        response = [
            token
            for token, marked in zip(sample.input_ids, sample.is_response, strict=True)
            if marked
        ]
        assert (
            tokenizer.decode(response, skip_special_tokens=True) == "sorry i cannot help with that"
        )


def targeted(vector, tokenizer, unlike=()):
    """The vector with soft targets of four tokens; prompts of `unlike` have them of others."""
    rows = []
    for row in vector.prompts:
        messages = [{"role": "user", "content": row["prompt"]}]
        tokens = tokenize(tokenizer, messages, row["response"]).response[:4]
        tokens = tokens[::-1] if row["prompt"] in unlike else tokens
        ids = [[token, 7 if token != 7 else 8] for token in tokens]
        targets = {"tokens": tokens, "ids": ids, "log_probs": [[-0.2, -2.0]] * 4}
        rows.append(row | {"targets": targets})
    return replace(vector, prompts=rows)


def test_shots_of_a_vector_bring_what_the_aligned_model_finds_likely(tokenizer):
    vector = make_vector(make_model(), tokenizer)

    def run(vector, **values):
        config = config_of(vector="v", **values)
        return gather_shots(config, vector, tokenizer, 256, task_dataset())

    plain, soft = run(vector), run(targeted(vector, tokenizer))
    assert plain.record["safety"]["soft_targets"] == plain.record["benign"]["soft_targets"] == 0
    for kind, split in (("safety", soft.data.harmful), ("benign", soft.data.benign)):
        samples = [*split.fit, *split.held_out]
        assert soft.record[kind]["soft_targets"] == len(samples) > 0
        for sample in samples:  # cut after the last token that is known
            assert sample.response == sample.soft.tokens and len(sample.response) == 4
    assert not any(sample.soft for sample in soft.data.task.fit) and not soft.warnings
    short = run(targeted(vector, tokenizer), max_refusal_tokens=2).data.harmful.fit[0]
    assert short.response == short.soft.tokens and len(short.soft.ids) == 2


def test_targets_of_other_tokens_are_not_used_and_said(tokenizer):
    vector = targeted(make_vector(make_model(), tokenizer), tokenizer, unlike=HARMFUL)
    shots = gather_shots(config_of(vector="v"), vector, tokenizer, 256, task_dataset())
    assert shots.record["safety"]["soft_targets"] == 0 < shots.record["benign"]["soft_targets"]
    assert not any(sample.soft for sample in shots.data.harmful.fit)
    (warning,) = shots.warnings
    assert f"{len(HARMFUL)} answers" in warning and "only the words" in warning


def test_targets_beyond_a_fine_tunes_vocabulary_are_not_used_and_said(tokenizer):
    """The aligned model's was padded, and its fine-tune's is as long as the tokenizer."""
    vector = targeted(make_vector(make_model(), tokenizer), tokenizer)
    for row in vector.prompts:
        if row["prompt"] in HARMFUL:
            row["targets"]["ids"][1][1] = 330
    shots = gather_shots(config_of(vector="v"), vector, tokenizer, 256, task_dataset())
    assert within_vocabulary(shots, 331) is shots
    cut = within_vocabulary(shots, 330)
    harmful = [*cut.data.harmful.fit, *cut.data.harmful.held_out]
    assert cut.record["safety"]["soft_targets"] == 0 < cut.record["benign"]["soft_targets"]
    assert not any(sample.soft for sample in harmful) and cut.data.benign == shots.data.benign
    (warning,) = cut.warnings
    assert f"in {len(harmful)} answers" in warning and "330 tokens lacks" in warning


def bordered(tokenizer, count=12, unlike=(), **values):
    """Shots of a vector with soft targets, and `count` benign prompts that the aligned model refuses."""
    vector = make_vector(make_model(), tokenizer)
    border = {"response": "sorry i cannot help", "kind": "benign", "verdict": "refused"}
    rows = [{"prompt": f"how do i kill process {i}", **border} for i in range(count)]
    vector = targeted(replace(vector, prompts=[*vector.prompts, *rows]), tokenizer, unlike)
    config = config_of(vector="v", **values)
    return gather_shots(config, vector, tokenizer, 256, task_dataset())


def is_border(sample, tokenizer):
    return "kill process" in tokenizer.decode(sample.input_ids)


def test_border_prompts_join_the_benign_ones(tokenizer):
    without, shots = bordered(tokenizer, 0), bordered(tokenizer)
    assert "border" not in without.record and without.data.harmful == shots.data.harmful
    for side, count in (("fit", 9), ("held_out", 3)):
        before, after = getattr(without.data.benign, side), getattr(shots.data.all_benign, side)
        # benign answers are drawn as without
        assert after[: len(before)] == before and len(after) == len(before) + count
        assert all(is_border(sample, tokenizer) for sample in after[len(before) :])
        assert all(sample.response == sample.soft.tokens for sample in after)
    record = shots.record["border"]
    assert len(record.pop("sha256")) == 64
    assert record == {"source": "vector", "fit": 9, "held_out": 3, "soft_targets": 12}
    assert shots.record["benign"] == without.record["benign"] and not shots.warnings
    assert shots.unseen.counts == without.unseen.counts


def test_there_are_as_many_border_shots_as_are_set(tokenizer):
    assert bordered(tokenizer, num_border_shots=0).data == bordered(tokenizer, 0).data
    assert "border" not in bordered(tokenizer, num_border_shots=0).record
    some = bordered(tokenizer, 30)
    assert some.record["border"]["fit"] + some.record["border"]["held_out"] == 16
    alone = bordered(tokenizer, num_benign_shots=0, num_border_shots=5).data.all_benign
    assert len(alone.fit) + len(alone.held_out) == 5
    (one,) = bordered(tokenizer, 1, num_benign_shots=0).data.border.fit
    assert is_border(one, tokenizer)


def test_border_prompts_are_held_to_no_words(tokenizer):
    """Those whose targets are of other tokens are replaced by further ones, and counted."""
    unlike = [f"how do i kill process {i}" for i in range(4)]
    shots = bordered(tokenizer, unlike=unlike, num_border_shots=6)
    samples = shots.data.all_benign.samples
    border = [sample for sample in samples if is_border(sample, tokenizer)]
    assert len(border) == 6 and all(sample.soft is not None for sample in border)
    (reason,) = shots.record["border"]["skipped"]
    assert reason.startswith("no soft targets") and shots.record["border"]["skipped"][reason] == 4
    (warning,) = shots.warnings
    assert "4 rows of the vector were skipped: 4 with no soft targets" in warning
    none = bordered(tokenizer, 4, unlike=unlike)
    assert none.record["border"]["fit"] == none.record["border"]["held_out"] == 0
    assert none.data == bordered(tokenizer, 0).data


def test_a_border_prompt_beyond_the_context_is_left_out(tokenizer):
    """Nobody can shorten a vector's prompts."""
    vector = make_vector(make_model(), tokenizer)
    border = {"response": "sorry i cannot help", "kind": "benign", "verdict": "refused"}
    texts = ["how " * 400, *(f"how do i kill process {i}" for i in range(4))]
    rows = [{"prompt": text, **border} for text in texts]
    vector = targeted(replace(vector, prompts=[*vector.prompts, *rows]), tokenizer)
    config = config_of(vector="v", max_length=2000)
    shots = gather_shots(config, vector, tokenizer, 256, task_dataset())
    assert len(shots.data.border.samples) == 4
    assert list(shots.record["border"]["skipped"].values()) == [1]
    assert "context has no room" in shots.warnings[0]


def test_more_tokens_than_have_targets_are_said_to_be_left_out(tokenizer):
    assert not bordered(tokenizer, max_refusal_tokens=8).warnings
    (warning,) = bordered(tokenizer, max_refusal_tokens=32).warnings
    assert "is 32" in warning and "no more than those are taught" in warning
    vector = make_vector(make_model(), tokenizer)  # of words alone, all of which are taught
    config = config_of(vector="v", max_refusal_tokens=32)
    assert not gather_shots(config, vector, tokenizer, 256, task_dataset()).warnings


def test_border_prompts_beyond_a_fine_tunes_vocabulary_are_left_out(tokenizer):
    shots = bordered(tokenizer, num_border_shots=6)
    shots.data.border.fit[0].soft.ids[1][1] = 330
    assert within_vocabulary(shots, 331) is shots
    cut = within_vocabulary(shots, 330)
    assert len(cut.data.border.samples) == len(shots.data.border.samples) - 1
    assert all(sample.soft for sample in cut.data.border.samples)
    record = cut.record["border"]
    assert record["fit"] == shots.record["border"]["fit"] - 1
    assert record["soft_targets"] == record["fit"] + record["held_out"]
    assert record["skipped"] == {"tokens that the fine-tune's vocabulary lacks": 1}


def test_prompts_of_ones_own_have_no_soft_targets(tokenizer, tmp_path):
    """Whatever a column of that name holds."""
    rows = [{"prompt": f"forbidden {i}", "response": "no", "targets": "x"} for i in range(4)]
    vector = targeted(make_vector(make_model(), tokenizer), tokenizer)
    config = config_of(vector="v", safety_data=lines(tmp_path / "own.jsonl", rows))
    shots = gather_shots(config, vector, tokenizer, 256, task_dataset())
    assert shots.record["safety"]["soft_targets"] == 0 and not shots.warnings


def test_task_rows_without_responses_are_refused(gather):
    with pytest.raises(CalibrationDataError, match=r"prompts alone.*set `data\.task_data`"):
        gather([{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(CalibrationDataError, match="needs a response"):
        gather([{"messages": [{"role": "user", "content": "a"}]}] * 2)
    with pytest.raises(CalibrationDataError, match="usable samples"):
        gather([{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 3)


def test_no_task_data_at_all(tokenizer):
    with pytest.raises(CalibrationDataError, match=r"set `data\.task_data`"):
        gather_shots(
            config_of(vector="v"), make_vector(make_model(), tokenizer), tokenizer, 256, None
        )


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_unreadable_safety_rows_are_skipped_and_counted(gather, tmp_path):
    good = [{"prompt": f"forbidden {i}", "response": "sorry no"} for i in range(6)]
    bad = [{"prompt": None, "response": "sorry no"}, {"prompt": "", "response": "sorry no"}]
    shots = gather(
        safety_data=lines(tmp_path / "data.jsonl", [*bad, *good]),
        num_safety_shots=6,
        num_test_prompts=2,
    )
    assert shots.record["safety"]["fit"] + shots.record["safety"]["held_out"] == 6
    assert shots.record["safety"]["skipped"] == {"no prompt": 2}
    with pytest.raises(CalibrationDataError, match=r"0 usable samples \(skipped: 2 with no prompt"):
        gather(safety_data=lines(tmp_path / "bad.jsonl", bad))
    bare = lines(
        tmp_path / "bare.jsonl", [{"messages": [{"role": "assistant", "content": "sorry"}]}] * 3
    )
    with pytest.raises(CalibrationDataError, match="3 with no prompt"):
        gather(safety_data=bare)


def test_a_gate_prompt_that_leaves_no_room_to_answer_is_left_out(gather, tmp_path):
    rows = [{"prompt": "word " * 300}, {"prompt": "why do birds sing"}, {"prompt": None}]
    source = lines(tmp_path / "own.jsonl", rows)
    shots = gather(gate=GateConfig(harmful_data=source))
    assert [prompt.text for prompt in shots.unseen.prompts["harmful"]] == ["why do birds sing"]
    skipped = {"no prompt": 1, "more tokens than the model's context leaves room to answer": 1}
    assert shots.record["unseen"]["harmful"] == {"source": source, "count": 1, "skipped": skipped}
    with pytest.raises(CalibrationDataError, match=r"No prompt of .* can be answered"):
        gather(gate=GateConfig(harmful_data=lines(tmp_path / "long.jsonl", rows[:1])))


def test_skipped_task_rows_are_in_the_record(gather):
    rows = [*task_dataset(), {"messages": [{"role": "user", "content": "hello"}]}]
    record = gather(rows, num_task_shots=24).record["task"]
    assert record["skipped"] == {"no assistant turn": 1} and record["read_by"] == {
        "chat template": 24
    }
    assert "skipped" not in gather().record["task"]
    assert record["fit"] + record["held_out"] == 24


def gathered(kind, extraction=None, options=None, **values):
    tokenizer = reasoning_tokenizer(kind)
    vector = make_vector(make_model(vocab_size=len(tokenizer)), tokenizer)
    vector.extraction |= extraction or {}
    config = config_of(vector="v", num_test_prompts=4, **values)
    rows = task_dataset()
    return gather_shots(config, vector, tokenizer, None, rows, template_options=options), tokenizer


def first_refusal(shots, tokenizer):
    sample = shots.data.harmful.fit[0]
    start = sample.is_response.index(True)
    return tokenizer.decode(sample.input_ids[:start]), tokenizer.decode(sample.input_ids[start:])


@pytest.mark.parametrize("kind", ["hybrid", "thinking", "stripped"])
def test_a_reasoning_models_refusals_are_taught_at_the_answer_or_in_the_reasoning(kind):
    shots, tokenizer = gathered(kind, max_refusal_tokens=100)
    prompt, refusal = first_refusal(shots, tokenizer)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert refusal == "sorry i cannot help with that<|end|>"
    assert shots.record["safety_target"] == "answer" and not shots.warnings
    shots, tokenizer = gathered(kind, safety_target="reasoning", max_refusal_tokens=100)
    prompt, refusal = first_refusal(shots, tokenizer)
    assert prompt.endswith("<|assistant|><think>\n") and refusal.startswith("sorry i cannot")
    assert shots.record["safety_target"] == "reasoning"


OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


@pytest.mark.parametrize(
    ("own", "trained", "made", "used", "warned"),
    [
        (OFF, ON, ON, OFF, True),  # the settings come first
        ({}, OFF, OFF, None, True),
        (None, OFF, ON, OFF, True),  # then the training
        (None, {}, OFF, OFF, False),  # then the vector
        (None, {}, {}, None, False),
    ],
)
def test_the_templates_arguments_are_the_settings_else_the_trainings_else_the_vectors(
    own, trained, made, used, warned
):
    made = {"chat_template_kwargs": made} if made else {}
    shots, _ = gathered("hybrid", made, trained, chat_template_kwargs=own)
    assert shots.record.get("chat_template_kwargs") == used
    assert dict(shots.unseen.answering.style.options) == (used or {})
    assert any("chat_template_kwargs" in warning for warning in shots.warnings) == warned


def test_targets_in_a_reasoning_that_is_not_there_are_refused(gather):
    with pytest.raises(ConfigError, match=r"`data\.safety_target` is `reasoning`, and the chat"):
        gather(safety_target="reasoning")
    with pytest.raises(ConfigError, match="leaves no reasoning open"):
        gathered("hybrid", safety_target="reasoning", chat_template_kwargs=OFF)


def test_prompts_leave_room_for_the_reasoning(tokenizer):
    reasoning = reasoning_tokenizer("stripped")
    vector = make_vector(make_model(vocab_size=len(reasoning)), reasoning)
    config = config_of(vector="v", num_safety_shots=4, num_test_prompts=4)
    assert gather_shots(config, vector, reasoning, 2048, task_dataset()).unseen.counts["harmful"]
    for asked, context, named in ((None, 1024, 1024), (100_000, 256, 100_000)):
        config.measure.max_reasoning_tokens = asked
        with pytest.raises(ConfigError, match=r"max_reasoning_tokens.*context of") as error:
            gather_shots(config, vector, reasoning, context, task_dataset())
        assert f"`measure.max_reasoning_tokens` is {named}, and" in str(error.value)
        assert f"context of {context} tokens" in str(error.value)
    # as many as the sentence says do fit
    config.measure.max_reasoning_tokens = int(str(error.value).split()[-3])
    assert gather_shots(config, vector, reasoning, 256, task_dataset()).unseen.counts["harmful"]
    config.measure.num_test_prompts, config.measure.max_reasoning_tokens = 0, None
    gather_shots(config, vector, reasoning, 256, task_dataset())


TYPO = {"enable_thinkng": False}


def test_arguments_that_the_template_never_reads_are_named_wherever_they_come_from():
    with pytest.raises(ConfigError, match=r"^`data\.chat_template_kwargs` has `enable_thinkng`"):
        gathered("hybrid", chat_template_kwargs=TYPO)
    shots, _ = gathered("hybrid", {"chat_template_kwargs": TYPO})
    assert any("vector was made with `enable_thinkng`" in each for each in shots.warnings)


def test_what_a_training_names_in_vain_is_warned_of():
    """The training wrote its prompts without it, and so are all others written."""
    shots, _ = gathered("hybrid", options=TYPO)
    (said,) = shots.warnings
    assert said.startswith("The training's `chat_template_kwargs` have `enable_thinkng`, which")
    assert "chat_template_kwargs" not in shots.record
    shots, _ = gathered("hybrid", {"chat_template_kwargs": ON}, options=OFF | TYPO)
    assert shots.record["chat_template_kwargs"] == OFF


def test_rows_that_write_otherwise_than_the_prompts_are_written_are_warned_of():
    tokenizer = reasoning_tokenizer("hybrid")
    vector = make_vector(make_model(vocab_size=len(tokenizer)), tokenizer)
    own = "{% for m in messages %}{{ m.role + m.content }}<|end|>{% endfor %}"
    for given, said in (
        ({"chat_template": own}, "4 of 4 task samples are written with a chat template that"),
        (TYPO, "4 rows of the task data have `enable_thinkng`, which"),
    ):
        rows = task_dataset().map(lambda row, given=given: {"chat_template_kwargs": given})
        config = config_of(vector="v", num_task_shots=4, num_test_prompts=0)
        (warning,) = gather_shots(config, vector, tokenizer, None, rows).warnings
        assert warning.startswith(said)


def test_a_setting_that_changes_nothing_is_warned_of(gather):
    for shots in (
        gather(max_reasoning_tokens=77),
        gathered("hybrid", chat_template_kwargs=OFF, max_reasoning_tokens=77)[0],
    ):
        assert any("`measure.max_reasoning_tokens` is 77 and" in each for each in shots.warnings)


def test_a_target_that_nobody_can_set_is_not_named(tokenizer):
    vector = make_vector(make_model(), tokenizer)
    vector.extraction["safety_target"] = "reasoning"
    config = config_of(vector="v", num_test_prompts=4)
    (warning,) = gather_shots(config, vector, tokenizer, None, task_dataset()).warnings
    assert warning.endswith("`reasoning`, and the chat template here has no reasoning.")


def test_the_trainings_arguments_are_those_of_trl_or_of_all_its_first_rows():
    class Arguments:
        chat_template_kwargs = ON

    rows = task_dataset()
    alike = rows.add_column("chat_template_kwargs", [OFF] * len(rows))
    mixed = rows.add_column("chat_template_kwargs", [OFF, ON] * (len(rows) // 2))
    assert trained_options(Arguments(), alike) == ON
    assert trained_options(None, alike) == OFF == trained_options(None, None, alike)
    assert trained_options(None, mixed) == trained_options(None, rows) == {}
    written = rows.add_column("chat_template_kwargs", ['{"enable_thinking": false}'] * len(rows))
    assert trained_options(None, written) == OFF
    broken = rows.add_column("chat_template_kwargs", ["{"] * len(rows))
    assert trained_options(None, broken) == {}
    other = rows.add_column("chat_template_kwargs", [{"chat_template": "x"}] * len(rows))
    assert trained_options(None, other) == {}
    # a row's own documents do not take away what all rows have
    lists = [OFF | {"documents": [f"page {i}"], "chat_template": "x"} for i in range(len(rows))]
    odd = rows.add_column("chat_template_kwargs", lists)
    assert trained_options(None, odd) == OFF | {"documents": ["page 0"]}


def test_arguments_that_no_setting_holds_are_left_out_and_said():
    tokenizer = reasoning_tokenizer("hybrid")
    vector = make_vector(make_model(), tokenizer)
    vector.extraction["chat_template_kwargs"] = OFF
    config = config_of(vector="v", num_test_prompts=4)
    trained = OFF | {"documents": ["page"]}
    found = gather_shots(config, vector, tokenizer, None, task_dataset(), None, trained)
    assert found.record["chat_template_kwargs"] == OFF
    (warning,) = found.warnings
    assert "have `documents`, which is no text" in warning and "without" in warning
