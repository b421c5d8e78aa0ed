"""What CI does where the packages of another trainer cannot be had, and where its tests fail."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "integrations"
HOSTS = ("axolotl", "llamafactory")
MAKE = """#!/usr/bin/env bash
echo "$1" >> called
case "$1" in
    .venv-*) mkdir -p "${1%/ready}"; echo "ERROR: No such package"; echo "make: *** Error 1"; exit $MADE ;;
    operators) exit 2 ;;
    *) echo "tests: $1"; exit $PASSED ;;
esac
"""


def run(folder, made=0, passed=0, name="integrations"):
    """A script with a `make` that only says what it is asked for."""
    shutil.copytree(SCRIPT.parent, folder / ".ci")
    for program, text in (("make", MAKE), ("chromium", "")):
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MADE": str(made), "PASSED": str(passed)}
    done = subprocess.run(
        ["bash", f".ci/{name}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, (folder / "called").read_text().split()


def test_both_are_tested_where_both_can_be_had_and_leave_no_environment(tmp_path):
    (tmp_path / ".venv-axolotl").mkdir()  # somebody's own
    code, said, called = run(tmp_path)
    assert code == 0 and said.split("\n")[:-1] == [f"tests: test-{host}" for host in HOSTS]
    assert called == [each for h in HOSTS for each in (f".venv-{h}/ready", f"test-{h}")]
    assert [(tmp_path / f".venv-{host}").exists() for host in HOSTS] == [True, False]


@pytest.mark.parametrize(
    ("made", "whys"),
    [
        (2, ["ERROR: No such package"] * 2),
        # what took too long once gets less time, so that CI ends
        (124, [f"it was not ready after {seconds} seconds" for seconds in (600, 120)]),
    ],
)
def test_what_cannot_be_had_is_left_out_in_one_line(made, whys, tmp_path):
    code, said, called = run(tmp_path, made=made)
    assert code == 0 and called == [f".venv-{host}/ready" for host in HOSTS]
    line = "Left out: the tests with {}, as its environment could not be made ({})."
    assert said.split("\n")[:-1] == [line.format(*each) for each in zip(HOSTS, whys, strict=True)]
    assert not list(tmp_path.glob(".venv-*"))


def test_tests_that_fail_are_an_error(tmp_path):
    code, _, called = run(tmp_path, passed=2)
    assert code == 2 and called == [".venv-axolotl/ready", "test-axolotl"]


def test_operators_that_cannot_be_compiled_beforehand_stop_nothing(tmp_path):
    code, _, called = run(tmp_path, name="run")
    assert code == 0 and called.count("operators") == 1
    called.remove("operators")  # begun beside the others
    first = ["environment", "lint", "docs", "quickstart-short", "test-serving"]
    assert called[:5] == first and called[-1] == "test-all"


def test_pytest_has_the_last_word():
    assert SCRIPT.with_name("run").read_text().splitlines()[-2:] == [
        "bash .ci/integrations",
        "make test-all",
    ]
