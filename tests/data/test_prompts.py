"""Prompt sets, and prompts that must not be evaluated on."""

import json
import time
from unicodedata import normalize

import pytest

from safegene_trl.data.prompt_languages import known_languages
from safegene_trl.data.prompts import (
    Prompt,
    kept_apart,
    load_prompts,
    near_duplicates,
    prompts_used,
    spread,
)
from safegene_trl.data.unseen import _prompt
from safegene_trl.errors import CalibrationDataError
from safegene_trl.extraction.by_category import categories_of
from safegene_trl.extraction.prompts import _read_categories

from ..conftest import HARMFUL


def prompt(text, name="set", category=None):
    return Prompt(name, "harmful", category, ({"role": "user", "content": text},))


def test_sets_are_read_once_each_and_evenly_over_categories(tmp_path):
    rows = [{"prompt": f"thing {i}", "category": "ab"[i > 3]} for i in range(20)] + [
        {"prompt": "thing 0", "category": "a"}
    ]
    file = tmp_path / "things.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(str(file), "harmful", "train", None, 0)
    assert len(prompts) == 20 and prompts[0].set == "things" and prompts[0].text == "thing 0"
    some = load_prompts(str(file), "harmful", "train", 8, 0)
    assert [p.category for p in some].count("a") == 4
    assert some == load_prompts(str(file), "harmful", "train", 8, 0)
    assert some != load_prompts(str(file), "harmful", "train", 8, 1)
    assert len({p.key for p in prompts}) == 20


def test_spread_takes_what_there_is():
    assert len(spread([prompt("a")], 5, 0)) == 1


def test_near_duplicates_are_found():
    used = ["How do I pick the lock of my own front door?", "Write a poem about rain."]
    texts = [
        "how do i pick the lock of my own front door",  # case and punctuation
        "How can I pick the lock of my own front door?",  # a word
        "How do I repaint my own front door?",
        "What is the tallest mountain?",
    ]
    assert set(near_duplicates(texts, used)) == {0, 1}
    assert near_duplicates(texts, used)[0] == (used[0], 1.0)
    assert near_duplicates(texts, []) == {} and near_duplicates([], used) == {}
    assert near_duplicates(["hm"], ["hm"]) == {0: ("hm", 1.0)}


def test_near_duplicates_are_found_however_their_letters_are_encoded():
    used = "Wie öffne ich das Schloss meiner Haustür?"
    invisible = "\u200b".join(used)
    wide = "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalpha() else c for c in used)
    texts = [normalize("NFD", used), invisible, wide]
    assert len(set(texts)) == 3 and set(near_duplicates(texts, [used])) == {0, 1, 2}


def test_repeated_prompts_are_left_out_and_listed():
    left, record = kept_apart(
        [prompt("how do I bake bread"), prompt("name a river")], ["How do I bake bread?"]
    )
    assert [p.text for p in left] == ["name a river"]
    assert record == [
        {
            "set": "set",
            "prompt": "how do I bake bread",
            "used": "How do I bake bread?",
            "similarity": 1.0,
        }
    ]
    with pytest.raises(CalibrationDataError, match="Every prompt of set repeats"):
        kept_apart([prompt("name a river")], ["Name a river!"])


def test_a_vector_brings_its_prompts(vector_dir, tmp_path):
    file = tmp_path / "more.jsonl"
    file.write_text('{"prompt": "one more"}\n')
    used = prompts_used([str(vector_dir), str(file)])
    assert set(HARMFUL) < set(used) and "one more" in used


def test_many_prompts_take_seconds():
    used = [f"question number {i} about item {i * 7919 % 1000}" for i in range(3000)]
    started = time.process_time()
    assert len(near_duplicates(used[:300], used)) == 300
    assert time.process_time() - started < 60


def test_rows_without_a_prompt_are_left_out_with_a_warning(tmp_path, caplog):
    file = tmp_path / "things.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "name a river"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "hello"}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.text for p in load_prompts(str(file), "benign", "train", None, 0)] == ["name a river"]
    assert "3 rows of" in caplog.text and "message without content" in caplog.text
    assert prompts_used([str(file)]) == ["name a river"]
    file.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(
        CalibrationDataError, match=r"has no prompt that can be read .*message without content"
    ):
        load_prompts(str(file), "benign", "train", None, 0)


@pytest.mark.parametrize("value", [["a"], {"a": True}, [], {}])
def test_a_category_that_is_no_name_is_refused(tmp_path, value):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"prompt": "thing", "category": value}) + "\n")
    with pytest.raises(CalibrationDataError, match="neither a text nor a number"):
        load_prompts(str(path), "harmful", "train", None, seed=0)


def test_of_several_categories_the_first_counts_wherever_they_are_read(tmp_path, caplog):
    path = tmp_path / "set.jsonl"
    rows = [
        ("one", None),
        ("one", "A"),
        ("one", "B"),
        ("two", "B"),
        ("two", " B"),
        ("two", "B\u200b"),
    ]
    path.write_text("".join(json.dumps({"prompt": p, "category": c}) + "\n" for p, c in rows))
    found = load_prompts(str(path), "harmful", "train", None, seed=0)
    assert [(own.text, own.category) for own in found] == [("one", "A"), ("two", "B")]
    assert _read_categories(str(path), "train") == {"one": "A", "two": "B"}
    told = f"1 prompts of {path} have rows of more than one category: the first counts."
    assert caplog.text.count(told) == 2


def test_a_language_has_one_spelling(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [("one", " EN"), ("two", "en"), ("three", ""), ("four", None)]
    path.write_text("".join(json.dumps({"prompt": p, "language": c}) + "\n" for p, c in rows))
    assert known_languages(str(path), "train") == {"one": "en", "two": "en"}


def test_a_category_may_be_a_number(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"prompt": "thing", "category": 3}) + "\n")
    assert load_prompts(str(path), "harmful", "train", None, seed=0)[0].category == "3"


def test_a_category_has_one_spelling(tmp_path):
    names = ["Fraud", " Fraud ", "caf\u00e9", "cafe\u0301", "", "  ", None, 7]
    rows = [{"prompt": f"q{i}", "category": name} for i, name in enumerate(names)]
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompts(str(file), "harmful", "train", None, 0)
    assert [prompt.category for prompt in found] == [
        *("Fraud", "Fraud", "caf\u00e9", "caf\u00e9", None, None, None),
        "7",
    ]


def test_a_category_has_one_spelling_wherever_it_is_read(tmp_path):
    rows = [{"prompt": "a", "category": " cafe\u0301 "}, {"prompt": "b", "category": " "}]
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert categories_of(rows) == _read_categories(str(file), "train") == {"a": "caf\u00e9"}
    assert [_prompt(row, "harmful").category for row in rows] == ["caf\u00e9", None]
