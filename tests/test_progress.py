"""Bars: what a command shows of a long step, and that a library shows none."""

import pytest
from tqdm.auto import tqdm

from safegene_trl import progress
from safegene_trl.models.generation import generate_answers
from safegene_trl.progress import in_progress, may_show, no_progress, progress_bar, progress_shown


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0)


def test_a_bar_is_shown_where_it_was_asked_for_and_nowhere_else(capsys):
    assert list(in_progress([3, 1], "Sorting")) == [3, 1]
    assert capsys.readouterr().err == ""
    with progress_shown(True):
        assert list(in_progress([3, 1], "Sorting")) == [3, 1]
        shown = capsys.readouterr().err
        assert "Sorting" in shown and "0/2" in shown
        with progress_shown(False):
            list(in_progress([3], "Sorting"))
        assert capsys.readouterr().err == ""
        with progress_bar("Counting", 4, "prompt") as bar:
            bar.update(4)
        assert "Counting" in capsys.readouterr().err


def test_a_loop_that_is_left_leaves_no_bar_behind(capsys):
    with progress_shown(True):
        for item in in_progress([1, 2, 3], "Sorting"):
            if item == 2:
                break
    assert "Sorting" in capsys.readouterr().err and not tqdm._instances


def test_answers_are_counted_in_batches(model, tokenizer, capsys):
    prompts = [[{"role": "user", "content": text}] for text in ("a", "b", "c")]
    quiet = generate_answers(model, tokenizer, prompts, 2, batch_size=2)
    assert "Answering" not in capsys.readouterr().err
    with progress_shown(True):
        assert generate_answers(model, tokenizer, prompts, 2, batch_size=2) == quiet
    assert "Answering" in (shown := capsys.readouterr().err) and "0/2" in shown


def test_where_none_may_be_shown_nobody_can_ask_for_one(capsys):
    with progress_shown(True):
        with no_progress():
            assert not may_show() and not may_show(False)
            with progress_shown(True):
                list(in_progress([3], "Sorting"))
        assert capsys.readouterr().err == "" and may_show() and not may_show(False)
