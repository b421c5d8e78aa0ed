"""Temporary folders go whatever ends the work in them, and wherever."""

import os
import signal
import sys
import time

import pytest

from safegene_trl.checkpoints import renaming
from safegene_trl.checkpoints.renaming import temporary_folder


MAKING = {"_made", "_make_missing", "temporary_name", "locked", "_lock", "sync"}


class Interruption(BaseException):
    """What a signal's handler raises."""


def interrupted_at(number, target):
    """Makes a temporary folder, ended at the `number`-th line or return of what makes it; whether
    there are so many.
    """
    left = number

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != renaming.__file__ or frame.f_code.co_name not in MAKING:
            return trace
        if event in ("line", "return"):
            left -= 1
            if left == 0:
                raise Interruption
        return trace

    before = sys.gettrace()
    try:
        # imports, and whatever is cached, before the first is counted
        with temporary_folder(target):
            pass
        sys.settrace(trace)
        with temporary_folder(target) as folder:
            sys.settrace(before)
            assert folder.is_dir()
        return False
    except Interruption:
        return True
    finally:
        sys.settrace(before)


def test_whatever_line_is_interrupted_nothing_is_left(tmp_path):
    number = 1
    while interrupted_at(number, tmp_path / "above" / "results" / "out"):
        assert os.listdir(tmp_path) == [], number
        number += 1
    assert number > 40  # lines that were tried


def test_a_signal_while_it_is_removed_waits_for_that(tmp_path, monkeypatch):
    remove = renaming.remove

    def slowly(folder):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        remove(folder)

    monkeypatch.setattr(renaming, "remove", slowly)
    # a shell that starts the tests in the background has them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path / "out"):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_another_run_made_above_it_stays(tmp_path, monkeypatch):
    real = renaming.Path.mkdir

    def second(path, *rest, **named):  # another run is faster
        if path.name == "results":
            real(path)
        real(path, *rest, **named)

    monkeypatch.setattr(renaming.Path, "mkdir", second)
    with temporary_folder(tmp_path / "results" / "out"):
        pass
    assert os.listdir(tmp_path) == ["results"]
