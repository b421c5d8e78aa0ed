"""Samples from every accepted format, and plain words for every unusable one."""

import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset

from safegene_trl.data.calibration import check_context, split_samples
from safegene_trl.data.rows import conversation
from safegene_trl.data.sources import draw, load_rows
from safegene_trl.errors import CalibrationDataError
from safegene_trl.models.inputs import Sample, batches, shortened, tight_groups, tokenize


USER = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "response"),
    [
        ({"prompt": "hello"}, None),
        ({"prompt": "hello", "response": "hi"}, "hi"),
        ({"prompt": "hello", "completion": "hi"}, "hi"),
        ({"prompt": USER, "completion": [{"role": "assistant", "content": "hi"}]}, "hi"),
        ({"messages": [*USER, {"role": "assistant", "content": "hi"}]}, "hi"),
        ({"messages": USER}, None),
    ],
)
def test_formats(row, response):
    assert conversation(row) == (USER, response)


def test_unknown_columns():
    with pytest.raises(CalibrationDataError, match=r"'question'.*it needs `prompt`"):
        conversation({"question": "hello"})


def test_response_tokens_are_marked(tokenizer):
    sample = tokenize(tokenizer, USER, "hi there")
    response = [
        token for token, marked in zip(sample.input_ids, sample.is_response, strict=True) if marked
    ]
    assert tokenizer.decode(response) == "hi there<|end|>"
    assert tokenizer.decode(sample.input_ids) == "<|user|>hello<|end|><|assistant|>hi there<|end|>"


def test_shortened():
    sample = Sample(list(range(10)), [False] * 4 + [True] * 6)
    assert shortened(sample, 100, 100) == sample
    assert shortened(sample, 100, 2) == Sample(list(range(6)), [False] * 4 + [True] * 2)
    assert shortened(sample, 5, 100) == Sample(list(range(5)), [False] * 4 + [True])
    assert shortened(sample, 4, 100) is None
    assert shortened(Sample([7, 8], [True, True]), 10, 10) == Sample([7, 8], [False, True])


def test_batches_are_left_padded(tokenizer):
    long, short = Sample([5, 6, 7, 8], [False, False, True, True]), Sample([9, 10], [False, True])
    (batch,) = batches([long, short], 4, 0, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[0, 0, 9, 10], [5, 6, 7, 8]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert batch.target_mask.tolist() == [[False, False, True, False], [False, True, True, False]]
    assert batch.kept == 3
    assert [len(b.input_ids) for b in batches([long] * 9, 4, 0, torch.device("cpu"))] == [3, 3, 3]
    assert [len(b.input_ids) for b in batches([long] * 5, 2, 0, torch.device("cpu"))] == [1, 2, 2]
    assert batches([], 2, 0, torch.device("cpu")) == []


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("pass_cost", [0.0, 30.0, math.inf])
def test_groups_are_cut_where_passes_cost_least(size, pass_cost):
    """Against all ways to cut seven samples."""
    lengths = [(9, 2), (30, 20), (33, 21), (5, 2), (6, 4), (6, 1), (40, 3)]
    samples = [Sample([0] * n, [i >= n - own for i in range(n)]) for n, own in lengths]

    def cost(groups):
        positions = sum(
            len(lengths[group]) * sum(max(own) for own in zip(*lengths[group], strict=True))
            for group in groups
        )
        few = pass_cost == math.inf
        return (len(groups), positions) if few else positions + pass_cost * len(groups)

    found = tight_groups(samples, size, pass_cost)
    ends = [
        (0, *cuts, 7) for count in range(7) for cuts in itertools.combinations(range(1, 7), count)
    ]
    ways = [
        [slice(*pair) for pair in itertools.pairwise(own)]
        for own in ends
        if max(np.diff(own)) <= size
    ]
    assert found in ways and cost(found) == min(map(cost, ways))
    assert tight_groups([], size, pass_cost) == []


def test_context_is_checked():
    samples = [Sample([1] * 9, [True] * 9)]
    check_context(samples, 9, "data")
    check_context(samples, None, "data")
    with pytest.raises(CalibrationDataError, match="9 tokens and the model's context is 8"):
        check_context(samples, 8, "data")


def test_draw_is_seeded_and_leaves_the_global_rng(tmp_path):
    data = Dataset.from_list([{"prompt": str(i)} for i in range(50)])
    state = torch.get_rng_state()
    assert draw(data, 5, 1) == draw(data, 5, 1) != draw(data, 5, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(draw(data, 80, 1)) == 50
    assert draw(data.to_iterable_dataset(), 2, 1) == [{"prompt": "0"}, {"prompt": "1"}]


def test_split_keeps_one_on_each_side():
    samples = [Sample([i], [True]) for i in range(4)]
    assert [len(side) for side in vars(split_samples(samples, 0.25, "data")).values()] == [3, 1]
    assert [len(side) for side in vars(split_samples(samples[:2], 0.01, "data")).values()] == [1, 1]
    with pytest.raises(CalibrationDataError, match="1 usable samples"):
        split_samples(samples[:1], 0.5, "data")


def test_load_rows(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("prompt\na\nb\n")
    Dataset.from_list(rows).save_to_disk(tmp_path / "disk")
    for name in ("a.jsonl", "a.csv", "disk"):
        assert [row["prompt"] for row in load_rows(str(tmp_path / name), "train")] == ["a", "b"]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"prompt": "a"}\n')
    assert len(load_dataset(str(tmp_path / "hub"), split="train")) == len(
        load_rows(str(tmp_path / "hub"), "train")
    )


def test_a_file_of_the_same_name_and_time_is_read_anew(tmp_path):
    for prompt in ("a", "b"):
        (tmp_path / "x.jsonl").write_text(f'{{"prompt": "{prompt}"}}\n')
        os.utime(tmp_path / "x.jsonl", (1, 1))
        assert load_rows(str(tmp_path / "x.jsonl"), "train")["prompt"] == [prompt]


def test_words_for_nothing_are_words(tmp_path):
    rows = "prompt,category\na,None\nb,NA\nc,\n"
    (tmp_path / "x.csv").write_text(rows)
    (tmp_path / "x.tsv").write_text(rows.replace(",", "\t"))
    for name in ("x.csv", "x.tsv"):
        found = load_rows(str(tmp_path / name), "train")
        assert found["category"] == ["None", "NA", None] and found["prompt"] == ["a", "b", "c"]


def test_load_rows_of_one_configuration_and_split(tmp_path):
    """As of a repository on the hub, here in a folder."""
    place = tmp_path / "repository"
    place.mkdir()
    files = [("plain", "train"), ("plain", "test"), ("contrast", "test")]
    for config, split in files:
        (place / f"{config}-{split}.jsonl").write_text(
            json.dumps({"prompt": f"{config} {split}"}) + "\n"
        )
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": s, "path": f"{c}-{s}.jsonl"} for c, s in files if c == name],
        }
        for name in ("plain", "contrast")
    ]
    (place / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for named, expected in (
        (":plain", "plain train"),
        (":plain@test", "plain test"),
        (":contrast@test", "contrast test"),
    ):
        assert load_rows(f"{place}{named}", "train")["prompt"] == [expected]
    # which configuration, or a split that it does not have
    for named in (
        "",
        "@test",
        ":contrast",
    ):
        with pytest.raises(CalibrationDataError, match="`ID:CONFIG@SPLIT` names one"):
            load_rows(f"{place}{named}", "train")
    odd = tmp_path / "a:b@c.jsonl"  # a path is a path
    odd.write_text('{"prompt": "a"}\n')
    assert load_rows(str(odd), "train")["prompt"] == ["a"]


def test_unreadable_and_empty_data(tmp_path):
    with pytest.raises(CalibrationDataError, match="cannot be read"):
        load_rows("nobody/no-such-data", "train")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(CalibrationDataError, match="cannot be read"):
        load_rows(str(tmp_path / "broken.jsonl"), "train")
    (tmp_path / "empty.csv").write_text("prompt\n")
    with pytest.raises(CalibrationDataError, match="is empty"):
        load_rows(str(tmp_path / "empty.csv"), "train")
