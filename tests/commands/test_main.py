"""How a command ends: errors, signals and closed pipes, each with its exit code and without noise."""

import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from safegene_trl.commands import main as module
from safegene_trl.commands.main import main
from safegene_trl.errors import ConfigError, RejectedError, UnexpectedError
from safegene_trl.interruption import Interrupted, interruptible, undisturbed


@pytest.fixture
def command(monkeypatch):
    """Makes `safegene inspect` do something else."""

    def instead(run):
        monkeypatch.setattr(
            module.importlib, "import_module", lambda name, package: SimpleNamespace(main=run)
        )

    return instead


def raising(error):
    def run(argv):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ConfigError("a\n  \x1b[2Jb"), 2, "safegene inspect: a \\x1b[2Jb\n"),
        (RejectedError("no"), 4, "safegene inspect: no\n"),
        (KeyboardInterrupt(), 130, "safegene inspect: interrupted.\n"),
    ],
)
def test_foreseen_ends_are_one_line(error, code, printed, command, capsys):
    command(raising(error))
    assert main(["inspect"]) == code
    assert capsys.readouterr().err == printed


def test_an_error_that_was_not_foreseen_keeps_its_traceback(command, capsys):
    command(raising(KeyError("x")))
    assert main(["inspect"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and any("test_main.py" in line for line in lines)
    assert lines[-1].startswith(
        "safegene inspect: it failed by an error that was not foreseen (KeyError: 'x')"
    )


def test_the_cause_of_what_the_step_did_not_foresee_is_shown(command, capsys):
    error = UnexpectedError("the step failed")
    error.__cause__ = KeyError("x")
    command(raising(error))
    assert main(["inspect"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "KeyError: 'x'" in lines and lines[-1] == "safegene inspect: the step failed"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_unwind_and_are_put_back(number, code, command, capsys):
    tidied = []

    def run(argv):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            tidied.append(True)

    command(run)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        main(["inspect"])
    assert ended.value.code == code and tidied and signal.getsignal(number) == before
    assert capsys.readouterr().err == f"safegene inspect: ended by {signal.Signals(number).name}.\n"


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_wait_while_things_are_put_in_order():
    done = []
    with pytest.raises(Interrupted), interruptible():
        with undisturbed():
            signal.raise_signal(signal.SIGTERM)
            done.append("forgotten")
        with undisturbed(later=True):
            signal.raise_signal(signal.SIGTERM)
            done.append("later")
        done.append("never")
    assert done == ["forgotten", "later"]


ENDLESS = """
import sys
from types import SimpleNamespace
from safegene_trl.commands import main

def run(argv):
    for number in range(100_000):
        print("line", number)
    return 0

main.importlib.import_module = lambda name, package: SimpleNamespace(main=run)
raise SystemExit(main.main(["inspect"]))
"""


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141


def test_a_pipe_of_another_kind_is_an_error(command, capsys):
    command(raising(BrokenPipeError(32, "Broken pipe")))
    assert main(["inspect"]) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "inspekt",
            "There is no command `inspekt`; did you mean `inspect`? `safegene --help` lists",
        ),
        ("--helps", "There is no command `--helps`. `safegene --help` lists"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest_one(word, said, capsys):
    assert main([word]) == 2
    printed = capsys.readouterr()
    assert (
        printed.err.startswith(f"safegene: {said}")
        and len(printed.err.splitlines()) == 1
        and not printed.out
    )


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in module.COMMANDS)


def test_estimate_has_help_and_names_the_nearest_command(capsys):
    assert main(["estimate", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Says how many seconds, how much memory and how much disk a command")
    assert "is followed by sft, apply, extract" in printed
    assert main(["estimate", "aply"]) == 2
    assert (
        "estimate: `aply` cannot be estimated; did you mean `apply`? `safegene"
        in capsys.readouterr().err
    )


def test_that_bitsandbytes_uses_kernels_of_its_own_is_not_said(command, caplog):
    cpu = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def run(argv):
        cpu.warning(
            "Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no `kernels`"
        )
        cpu.warning("something else")
        return 0

    command(run)
    kept = list(cpu.filters)
    try:
        assert main(["inspect"]) == 0
    finally:
        cpu.filters[:] = kept
    assert [record.getMessage() for record in caplog.records] == ["something else"]
