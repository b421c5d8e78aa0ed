"""`python -m benchmarks.gpu` on a CPU: what it counts, and that a run which is killed goes on."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import records
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.counting import HostToDeviceCopies, passes_to_1_percent
from benchmarks.gpu.measuring import measure
from benchmarks.gpu.rows import AIMS, Row, wanted
from benchmarks.gpu.settings import Given
from safegene_trl.models import factors


ROOT = Path(__file__).resolve().parents[2]
TINY = wanted(["tiny"])
STEP, ATTACHED = (Row("tiny", "components", work) for work in ("step", "attached"))
MODULES = 4 * 7  # all linear layers of four layers, each with a pair of factors


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A row's figures, and what was noted on the way."""
    found = {}

    def figures_of(row):
        if row not in found:
            noted = []
            given = Given(None, None, tmp_path_factory.mktemp("row"))
            figures = measure(row, given, lambda known: noted.append(json.loads(json.dumps(known))))
            found[row] = figures, noted
        return found[row]

    return figures_of


def test_resident_factors_are_not_copied_again(measured):
    figures, _ = measured(ATTACHED)
    assert figures["copies_of_the_first_pass"] == {"with_vector": 0, "of_factors": MODULES}
    assert figures["copies_per_pass"] == {"with_vector": 0, "without": 0, "of_factors": 0}
    assert figures["copies_per_token"] == {"with_vector": 0, "without": 0, "of_factors": 0}
    assert figures["factors"]["place"] == "resident"


def test_factors_that_are_fetched_are_counted(tmp_path, monkeypatch):
    """In each pass forward and back, and for every token: the zeros above are no accident."""
    monkeypatch.setattr(factors, "free_bytes", lambda device: 0)
    figures = measure(ATTACHED, Given(None, None, tmp_path), lambda known: None)
    assert figures["copies_per_pass"]["of_factors"] == 2 * MODULES
    assert figures["copies_per_token"]["of_factors"] == MODULES
    assert figures["factors"]["place"] == "fetched"


def test_copies_to_a_device_are_seen():
    """`meta` stands for the device that is not here."""
    here = torch.ones(3)
    with HostToDeviceCopies() as seen:
        there = here.to("meta")
        there.copy_(here)
        there.to(torch.float16)
        here.to(torch.float16).copy_(here)
    assert seen.count == 2


def test_decoding_is_counted(measured):
    decoding = measured(ATTACHED)[0]["decoding"]
    assert decoding["batch"] == 32
    assert decoding["generated"] == {"calls": 1, "steps": 32, "tokens": 32 * 32}
    seconds = decoding["seconds_per_token"]
    assert decoding["beside"] == pytest.approx(seconds["beside"] / seconds["without"], rel=0.02)


def test_a_step_is_counted(measured):
    figures, _ = measured(STEP)
    # 6 fitting samples of each kind, 8 at a time
    assert figures["search"]["passes_per_evaluation"] == 3
    # 6 + 2 task samples, 22 response tokens of each, 320 numbers
    assert figures["search"]["reference_bytes"] % (320 * 4) == 0
    assert figures["search"]["reference_bytes"] > 8 * 320 * 4
    assert figures["search"]["coefficients"] == 3 * MODULES
    # harmful and benign prompts, before and after: 8 answers of 4 tokens each
    assert figures["generation"] == {"calls": 4, "steps": 16, "tokens": 4 * 8 * 4}
    assert figures["report"]["status"] == "safeguarded"
    assert figures["training"]["samples_per_step"] == 4 and figures["training"]["steps"] == 4
    phases = ["prepare", "keep", "recalibrate", "measure", "save", "verify"]
    assert list(figures["phases"]) == phases


def test_what_the_step_is_held_against(measured):
    figures, _ = measured(STEP)
    search, training = figures["search"], figures["training"]
    seconds = sum(phase["seconds"] for phase in figures["phases"].values())
    assert figures["step_seconds"] == pytest.approx(seconds, abs=0.001)
    spared = search["most_evaluations"] - search["evaluations"]
    at_most = seconds + spared * search["seconds_per_evaluation"]
    assert figures["step_seconds_at_most"] == pytest.approx(at_most, abs=0.001) and spared >= 0
    assert figures["share_of_1000_steps"] == pytest.approx(
        at_most / (1000 * training["seconds_per_step"]), abs=0.0002
    )


def test_a_step_that_dies_has_told_of_what_was_done(measured):
    _, noted = measured(STEP)
    trained = [figures for figures in noted if "training" in figures]
    assert list(noted[0]["phases"]) == list(trained[0]["phases"]) == ["prepare"]
    assert [len(figures["phases"]) for figures in trained] == [1, 2, 3, 4, 5, 6]


def test_what_matters_most_comes_first():
    names = [row.name for row in wanted(["1b", "8b"], "mine")]
    assert names == [
        "mine/own/step",
        "mine/own/attached",
        "1b/half/step",
        "8b/half/step",
        "1b/components/attached",
        "8b/components/attached",
        "1b/components/step",
        "8b/components/step",
    ]
    assert [Row.named(name).name for name in names] == names


def test_passes_to_1_percent():
    assert passes_to_1_percent([2.0, 1.5, 1.01, 1.0]) == 3
    assert passes_to_1_percent([]) is None


def test_every_aim_finds_its_figure(measured):
    figures = {row: measured(row)[0] for row in (STEP, ATTACHED)}
    for aim in AIMS:
        sizes = [(aim.only or ("tiny",))[0], "components"]
        if aim.only == ("own",):
            sizes = ["tiny", "own"]
        rows = {row: Row(*sizes, row.work) for row in figures}
        found = [aim.figure(rows[row], figures[row]) for row in figures]
        assert [value is None for value in found].count(False) == 1, aim.what


def options(folder, **changes):
    words = {"record": "here", "results": folder, "work": folder / "work", "model": None}
    defaults = {"vector": None, "tiny": True, "sizes": [], "minutes": 8.0, "measure": None}
    return argparse.Namespace(**defaults | words | changes)


def rows_in(folder):
    return records.load("gpu", folder).get("here", {}).get("rows", {})


@pytest.mark.exhaustive
def test_a_killed_run_goes_on(tmp_path, monkeypatch, capsys):
    """What was measured before it was killed is not measured again, and its row's process ends."""
    words = ["--tiny", "--record", "here", "--results", tmp_path, "--work", tmp_path / "work"]
    started = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 200
        second = tmp_path / "work" / TINY[1].name.replace("/", "-") / command.LOG
        while not second.exists() and time.monotonic() < until:
            time.sleep(0.1)
        rows = psutil.Process(started.pid).children(recursive=True)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait(60)
    assert rows and not psutil.wait_procs(rows, timeout=60)[1]
    (first,) = rows_in(tmp_path).items()
    assert first[0] == TINY[0].name and first[1]["status"] == "measured"
    assert first[1]["report"]["status"] == "safeguarded"

    asked = []

    def measured(row, arguments, seconds):
        asked.append(row)
        return {"status": "measured", "wall_seconds": 1.0}

    monkeypatch.setattr(command, "run", measured)
    monkeypatch.setattr(command, "parsed", lambda: options(tmp_path))
    assert command.main() == 0
    assert asked == TINY[1:] and dict([first])[TINY[0].name] == rows_in(tmp_path)[TINY[0].name]
    assert "measured before" in capsys.readouterr().out
    assert command.main() == 0 and asked == TINY[1:]


def test_other_code_or_another_device_is_measured_again(tmp_path):
    known = command.identity()
    row = known | {"status": "measured"}
    assert command.is_done(row, known)
    other = {"device": {"name": "another"}, "sources": {"commit": None, "sha256": "0"}}
    for key, value in other.items():
        assert not command.is_done(row | {key: value}, known)
    assert command.is_done(row | {"sources": known["sources"] | {"commit": "of the docs"}}, known)
    assert not command.is_done(row | {"status": "failed"}, known)
    assert not command.is_done(None, known)


@pytest.mark.parametrize(("way", "status"), [("exit 3", "failed"), ("sleep 60", "out of time")])
def test_a_row_that_dies_takes_no_other(way, status, tmp_path, monkeypatch):
    """Its figures so far stay, with what it said last."""
    program = tmp_path / "python"
    figures = tmp_path / "work" / "tiny-components-step" / command.FIGURES
    program.write_text(f"#!/bin/sh\necho '{{\"seen\": 1}}' > {figures}\necho it broke\n{way}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = command.run(STEP, options(tmp_path), 2.0)
    assert found["status"] == status and found["seen"] == 1
    assert ("it broke" in found.get("error", "")) == (status == "failed")
    assert not figures.parent.exists()


def test_rows_wait_for_another_call_where_no_time_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "parsed", lambda: options(tmp_path, minutes=0.1))
    assert command.main() == 1 and not rows_in(tmp_path)
    assert "call again" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--record", "here"])
    with pytest.raises(SystemExit):
        command.main()
    assert "`--tiny` runs every row on the CPU" in capsys.readouterr().err
