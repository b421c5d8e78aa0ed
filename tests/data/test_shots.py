"""Where the shots come from, and what they are cut to."""

import json

import pytest

from safegene_trl.config.gate import GateConfig
from safegene_trl.data.shots import gather_shots
from safegene_trl.errors import CalibrationDataError

from ..conftest import HARMFUL, config_of, make_model, make_vector, task_dataset


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


def test_task_rows_without_responses_are_refused(gather):
    with pytest.raises(CalibrationDataError, match="needs a response"):
        gather([{"prompt": "a"}, {"prompt": "b"}])
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
