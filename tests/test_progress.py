"""Bars: what a command shows of a long step, and that a library shows none."""

import io
import sys

import pytest
from tqdm.auto import tqdm

from safegene_trl import progress
from safegene_trl.models.generation import generate_answers
from safegene_trl.progress import (
    bar_of,
    in_progress,
    may_show,
    no_progress,
    progress_bar,
    progress_shown,
)


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


class Broken(io.StringIO):
    """Standard error on a full disk, or whose reader has left."""

    def write(self, text=""):
        raise OSError(28, "No space left on device")

    flush = write


@pytest.mark.parametrize("stream", [None, Broken(), "closed"])
def test_a_bar_that_cannot_be_written_does_not_end_the_work(stream, monkeypatch):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_shown(True):
        assert list(in_progress(range(50), "Sorting")) == list(range(50))
        with bar_of("Merging", 3, True, unit="B") as bar:
            bar.update(3)
            bar.set_postfix({"safety": "1"})


@pytest.mark.parametrize(("value", "shown"), [("1", False), ("True", False), ("0", True)])
def test_the_switch_of_tqdm_is_heeded(value, shown, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", value)
    with progress_shown(True):
        list(in_progress([1, 2], "Sorting"))
    assert ("Sorting" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    ("terminal", "kind", "often"),
    [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)],
)
def test_a_log_is_not_filled_with_bars(terminal, kind, often, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", kind)
    ticks = iter(range(1000))
    with progress_shown(True), progress_bar("Counting", 20, "prompt") as bar:
        monkeypatch.setattr(bar, "_time", lambda: bar.start_t + next(ticks), raising=False)
        for _ in range(20):  # a second each
            bar.update()
    assert (stream.getvalue().count("Counting") > 10) == often


def test_where_none_may_be_shown_nobody_can_ask_for_one(capsys):
    with progress_shown(True):
        with no_progress():
            assert not may_show() and not may_show(False)
            with progress_shown(True):
                list(in_progress([3], "Sorting"))
        assert capsys.readouterr().err == "" and may_show() and not may_show(False)
