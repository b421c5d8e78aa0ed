"""Folders appear whole or not at all, whoever writes, reads, fails or is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import pytest

from safegene_trl.checkpoints import atomic_writes, renaming
from safegene_trl.checkpoints.atomic_writes import (
    atomic_directory,
    replace_file,
    write_new_files,
)
from safegene_trl.checkpoints.contents import CHECKPOINT, MARKER
from safegene_trl.checkpoints.preflight import check_output
from safegene_trl.errors import OutputError


@pytest.fixture(params=["exchanged", "moved aside"])
def way(request, monkeypatch):
    """Both ways of replacing a folder."""
    if request.param == "moved aside":
        monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    elif renaming._renameat2() is None:
        pytest.skip("no renameat2 here")
    return request.param


def put(target, text, **files):
    with atomic_directory(target) as folder:
        (folder / MARKER).write_text(text)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replaced_in_one_piece(way, tmp_path):
    target = tmp_path / "out"
    put(target, "{}", config="one")
    put(target, "{}", generation_config="two")
    assert names(tmp_path) == ["out"] and names(target) == ["generation_config.json", MARKER]


def test_a_reader_finds_a_whole_folder_at_any_moment(tmp_path):
    if renaming._renameat2() is None:
        pytest.skip("no renameat2 here")
    target = tmp_path / "out"
    put(target, "{}")
    script = """
import os, sys, time
target, missing, looks = sys.argv[1], 0, 0
print("ready", flush=True)
ends = time.monotonic() + 1.5
while time.monotonic() < ends:
    looks += 1
    missing += not os.path.exists(target)
print(missing, looks)
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", script, str(target / MARKER)], stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout.readline() == "ready\n"
    written = 0
    while reader.poll() is None:
        put(target, "{}", config=str(written))
        written += 1
    missing, looks = map(int, reader.stdout.read().split())
    assert missing == 0 and looks > 1000 and written > 10
    assert names(tmp_path) == ["out"]


def forked(act):
    """Runs it in a child process; exit code 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_several_writers_of_one_folder(way, tmp_path):
    target = tmp_path / "deep" / "out"

    def write(number):
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            check_output(target, 10)
            with atomic_directory(target) as folder:
                (folder / "adapter").mkdir()
                for name in (
                    MARKER,
                    "config.json",
                    f"model-0000{number}-of-00009.safetensors",
                    "adapter/config.json",
                ):
                    (folder / name).write_text(f'{{"{number}": 1}}')

    children = [forked(partial(write, number)) for number in range(3)]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    assert names(target.parent) == ["out"]  # nothing left
    found = {path.read_text() for path in target.rglob("*") if path.is_file()}
    assert len(found) == 1 and len(list(target.rglob("*"))) == 5  # all of one writer


def test_several_writers_of_siblings_that_fail_and_start_anew(tmp_path):
    """Each makes and removes the same parents; one that another had made may stay, empty."""
    errors = []

    def write(name):
        for _ in range(60):
            try:
                with atomic_directory(tmp_path / "a" / "b" / name):
                    raise KeyError("any")
            except KeyError:
                pass
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("v1", "v1.2", "v1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and {path.name for path in tmp_path.rglob("*")} <= {"a", "b"}


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_while_it_replaces(moment, way, tmp_path):
    """By SIGKILL around the renaming; the earlier folder or the new one is there, at the latest
    after the next check.
    """
    target = tmp_path / "out"
    put(target, "{}", config="earlier")

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    def put_and_die():
        rename, plain = Path.rename, renaming.exchange
        if moment == "before":
            renaming.check_replaceable = die
        elif moment == "after":
            renaming.remove = die
        elif way == "moved aside":
            Path.rename = lambda one, other: (
                die() if ".new." in one.name and other == target else rename(one, other)
            )
        else:
            renaming.exchange = lambda one, other: (plain(one, other), die())
        put(target, "{}", config="new")

    assert exit_code(forked(put_and_die)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    hidden = moment == "between" and way == "moved aside"
    assert target.exists() != hidden
    is_new = moment == "after" or (moment == "between" and not hidden)
    check_output(target, restore_earlier=False)
    assert target.exists() != hidden  # a dry run puts nothing back
    check_output(target)
    assert (target / "config.json").read_text() == ("new" if is_new else "earlier")
    put(target, "{}", config="next")
    assert names(tmp_path) == ["out"] and (target / "config.json").read_text() == "next"


def test_a_failure_between_two_renames_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    target = tmp_path / "out"
    put(target, "{}", config="earlier")
    plain = Path.rename

    def rename(one, other):
        if ".new." in one.name:
            raise OSError(5, "Input/output error")
        return plain(one, other)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="Input/output error"):
        put(target, "{}", config="new")
    assert (target / "config.json").read_text() == "earlier" and names(tmp_path) == ["out"]


def test_names_that_begin_alike_leave_each_other_s_leftovers(tmp_path):
    v1, v12 = tmp_path / "v1", tmp_path / "v1.2"
    put(v12, "{}", config="v1.2")
    v12.rename(renaming.temporary_name(v12, "old"))
    unfinished = renaming.temporary_name(v12)
    unfinished.mkdir()
    earlier_style = tmp_path / ".v1.2.12345678.old"
    earlier_style.mkdir()
    (earlier_style / MARKER).write_text("{}")
    before = names(tmp_path)
    put(v1, "{}", config="v1")
    put(v1, "{}", config="v1")
    assert names(tmp_path) == sorted([*before, "v1"])
    earlier_style.rename(tmp_path / ".v1.12345678.old")  # v1's own, and v1 is there
    put(v1, "{}", config="v1")
    assert names(tmp_path) == sorted([*(set(before) - {earlier_style.name}), "v1"])
    check_output(v12)
    assert (v12 / "config.json").read_text() == "v1.2"
    put(v12, "{}", config="newer")
    assert names(tmp_path) == ["v1", "v1.2"]


def test_foreign_files_in_what_is_left_over_are_kept(tmp_path):
    target = tmp_path / "out"
    put(target, "{}")
    for left in (renaming.temporary_name(target, "old"), renaming.temporary_name(target)):
        left.mkdir()
        (left / MARKER).write_text("{}")
        (left / "thesis.txt").write_text("mine")
    put(target, "{}")
    assert sorted(path.name for path in tmp_path.rglob("*")).count("thesis.txt") == 2
    assert sorted(name.split(".")[2] for name in names(tmp_path) if name != "out") == ["new", "old"]


def test_a_file_that_is_put_into_the_earlier_folder_meanwhile_is_kept(way, tmp_path):
    target = tmp_path / "out"
    put(target, "{}")
    with (
        pytest.raises(OutputError, match=f"{target} holds files .* thesis.txt"),
        atomic_directory(target) as folder,
    ):
        (folder / MARKER).write_text("new")
        (target / "thesis.txt").write_text("mine")
    assert names(target) == [MARKER, "thesis.txt"] and names(tmp_path) == ["out"]
    (target / "thesis.txt").unlink()
    plain = renaming.check_replaceable
    calls = []

    def late(*arguments):  # between the look and the renaming
        calls.append(plain(*arguments))
        if len(calls) == 1:
            (target / "thesis.txt").write_text("mine")

    renaming_check = pytest.MonkeyPatch()
    renaming_check.setattr(renaming, "check_replaceable", late)
    with pytest.raises(OutputError, match=f"{target} holds files .* thesis.txt"):
        put(target, "new")
    renaming_check.undo()
    assert names(target) == [MARKER, "thesis.txt"] and names(tmp_path) == ["out"]


def test_what_the_trainer_uploads_leaves_unfinished_folders_out(tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    with atomic_directory(tmp_path / "safeguarded") as folder:
        (folder / "model.safetensors").write_text("half")
        found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
        assert len(found) == 2
        assert list(filter_repo_objects(found, ignore_patterns=["_*", "checkpoint-*"])) == []


def test_failures_and_interrupts_leave_nothing(tmp_path):
    for error in (KeyboardInterrupt, OSError, KeyError):
        with (
            pytest.raises((KeyboardInterrupt, OutputError, KeyError)),
            atomic_directory(tmp_path / "a" / "b") as folder,
        ):
            (folder / "half").write_text("x")
            raise error("any")
        assert names(tmp_path) == []


def test_replace_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "state.json"
    synced = []
    plain = atomic_writes.sync
    monkeypatch.setattr(atomic_writes, "sync", lambda path: synced.append((path.name, plain(path))))
    replace_file(path, "one")
    assert path.read_text() == "one" and names(path.parent) == ["state.json"]
    assert [name.endswith(".new.state.json") or name == "deep" for name, _ in synced] == [
        True,
        True,
    ]
    killed, other = (
        renaming.temporary_name(path.with_name(name)) for name in ("state.json", "other.json")
    )
    killed.write_text("half")
    other.write_text("another's")
    replace_file(path, "two")
    assert path.read_text() == "two" and names(path.parent) == sorted([other.name, "state.json"])

    def fails(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_writes, "sync", fails)
    with pytest.raises(OutputError, match="No space left"):
        replace_file(path, "three")
    assert path.read_text() == "two" and names(path.parent) == sorted([other.name, "state.json"])


def test_several_writers_of_one_file(tmp_path):
    path = tmp_path / "state.json"
    errors = []

    def write(text):
        try:
            for _ in range(50):
                replace_file(path, text)
                assert json.loads(path.read_text())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(json.dumps([n] * 1000),)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and names(tmp_path) == ["state.json"]


def test_a_lock_that_another_holds_for_ever_does_not_stop_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(renaming, "LONGEST_WAIT", 0.05)
    target = tmp_path / "out"
    started = time.monotonic()
    with renaming.locked(tmp_path) as free:
        assert free
        put(target, "{}")
        put(target, "{}")
    assert time.monotonic() - started < 5 and names(tmp_path) == ["out"]
    assert CHECKPOINT.marker == MARKER


def test_new_files_are_all_written_or_none(tmp_path):
    folder = tmp_path / "made" / "here"
    with pytest.raises(UnicodeEncodeError):
        write_new_files(folder, {"one": "1", "two": "\ud800"})
    assert names(folder) == []
    write_new_files(folder, {"one": "1", "two": "2"})
    assert (folder / "one").read_text() == "1" and names(folder) == ["one", "two"]
    with pytest.raises(OutputError, match="two is there already and is not replaced"):
        write_new_files(folder, {"three": "3", "two": "other"})
    assert names(folder) == ["one", "two"] and (folder / "two").read_text() == "2"


def test_new_files_go_over_nothing_that_came_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "two").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(atomic_writes, "check_new", lambda folder, names: None)
    with pytest.raises(OutputError, match="two is there already and is not replaced"):
        write_new_files(tmp_path, {"one": "1", "two": "2"})
    assert names(tmp_path) == ["two"] and not (tmp_path / "nowhere").exists()
