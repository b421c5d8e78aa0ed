"""A short run of the fault suite (`make faults` is the long one), in a process of its own because it forks."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safegene_trl.output import atomic_directory

from .faults import KINDS


def test_faults_leave_a_finished_checkpoint_or_none(tmp_path):
    record = tmp_path / "faults.json"
    command = [sys.executable, "-m", "tests.faults", "--count", "18", "--seed", "1", "--record", str(record)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, cwd=root, timeout=500, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(record.read_text())
    assert found["details"] == [] and found["faults"] == 18
    assert {end.split(":")[0] for end in found["ends"]} == set(KINDS)


def test_what_a_killed_run_left_is_cleared_away_and_a_running_one_is_let_be(tmp_path):
    target = tmp_path / "out"
    (tmp_path / ".out.12345678.tmp").mkdir()
    (tmp_path / ".out.56789abc.old").mkdir()
    (tmp_path / ".out.56789abc.old" / "safegene_report.json").write_text("earlier")
    (tmp_path / ".other.1.tmp").mkdir()
    with atomic_directory(target) as outer:
        assert (target / "safegene_report.json").read_text() == "earlier"  # it had been moved aside
        (outer / "safegene_report.json").write_text("outer")
        with atomic_directory(target) as inner:
            (inner / "safegene_report.json").write_text("inner")
        assert outer.is_dir() and (target / "safegene_report.json").read_text() == "inner"
    assert (target / "safegene_report.json").read_text() == "outer"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.1.tmp", "out"]
