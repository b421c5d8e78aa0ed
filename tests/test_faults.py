"""A short run of the fault suite (`make faults` is the long one), in a process of its own because
it forks.

One test for each thing that must not happen, so that what fails says what broke.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safegene_trl.checkpoints.atomic_writes import atomic_directory

from .faults.events import KINDS
from .faults.suite import WHERE_IT_HURTS, WRONG


COUNT = 12  # eight of them in saving and renaming: one of each kind
JOBS = ("apply", "coefficients")  # the others take longer


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    file = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [
        sys.executable,
        "-m",
        "tests.faults",
        "--count",
        str(COUNT),
        "--seed",
        "1",
        "--record",
        str(file),
    ]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--jobs", *JOBS],
        cwd=root,
        timeout=400,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert file.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.read_text())


def test_faults_are_where_they_hurt(record):
    assert record["faults"] >= 0.9 * COUNT
    assert sum(record["phases"][phase] for phase in WHERE_IT_HURTS) >= record["faults"] / 3
    assert set(record["jobs"]) <= set(JOBS) and set(KINDS[:8]) <= set(record["kinds"])
    assert record["sites_of_saving"] > 20  # else the phases are not told apart any more
    assert set(record["wrong"]) | set(record["wrong_without_a_fault"]) <= set(WRONG)


@pytest.mark.parametrize("what", WRONG)
def test_never(what, record):
    found = [one for one in record["details"] if what in one["wrong"]]
    assert not found and what not in record["wrong_without_a_fault"], json.dumps(found, indent=1)


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
