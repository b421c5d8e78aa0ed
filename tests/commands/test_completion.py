"""`safegene completion`: in a real bash, and in the other shells as far as they are here."""

import dataclasses
import json
import os
import pty
import runpy
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from safegene_trl.commands import sft
from safegene_trl.commands.completion import script_for
from safegene_trl.commands.main import COMMANDS, main
from safegene_trl.commands.parsing import SafeGeneArguments


ROOT = Path(__file__).resolve().parents[2]
ASKED = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_safegene
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    file = tmp_path / "safegene.bash"
    file.write_text(capsys.readouterr().out)
    return file


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("in", {"init", "inspect"}),
        ("--quiet ver", {"verify"}),
        ("--js", {"--json"}),
        ("sft --safegene.gate.max_inc", {"--safegene.gate.max_incoherent"}),
        ("apply --config a.yaml --fl", {"--fleet"}),
        ("--json apply --accel", {"--accelerate_config"}),
        ("estimate ", {"sft", "apply", "extract", "audit"}),
        ("estimate apply --coef", {"--coefficients"}),
        ("estimate apply apply --coef", {"--coefficients"}),
        ("inspect inspect --pl", {"--plot"}),
        ("completion ", {"bash", "zsh", "fish"}),
        ("inspect ", set()),  # bash completes file names itself
    ],
)
def test_bash_offers_commands_and_options(line, offered, script):
    words = ["safegene", *line.split(" ")]
    asked = ["bash", "-c", ASKED, "bash", str(script), *words]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    assert set(done.stdout.split()) == offered and not done.stderr


@pytest.mark.parametrize("typed", ["safegene inspect so", "safegene inspect --json=so"])
def test_bash_completes_file_names_where_they_are_typed(typed, script, tmp_path):
    (tmp_path / "some file.json").touch()
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.environ["TERM"] = "dumb"
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    shown, end = "", time.monotonic() + 20
    os.write(terminal, f"source {script}; echo rea''dy\n".encode())
    try:
        while time.monotonic() < end and "file.json" not in shown:
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
            if "ready" in shown and typed not in shown:
                os.write(terminal, f"{typed}\t".encode())
                time.sleep(0.2)
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)
    assert f"{typed}me\\ file.json" in shown, shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_s_script_can_be_read_by_it(shell, tmp_path):
    text = script_for(shell)
    assert all(command in text for command in COMMANDS) and "--safegene.gate" in text
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        check = [shell, "-n", str(tmp_path / "script")]
        done = subprocess.run(check, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr


def test_a_shell_that_is_none_is_named(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "`shell` is 'tcsh': use one of" in capsys.readouterr().err


def test_the_options_are_the_commands_own():
    """`python .ci/completion_words.py` writes them. Those of TRL differ a little from one version to
    the next.
    """
    before = os.environ.get("COLUMNS")
    script = runpy.run_path(str(ROOT / ".ci" / "completion_words.py"))
    try:
        listed = script["words"]()
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    stored = json.loads(script["WORDS"].read_text(encoding="utf-8"))
    theirs = {
        f"--{field.name}"
        for kind in sft.ARGUMENTS
        if kind is not SafeGeneArguments
        for field in dataclasses.fields(kind)
    }
    own, known = (set(found.pop("sft")) for found in (listed, stored))
    assert stored == listed and list(stored) == [name for name in COMMANDS if name != "sft"]
    assert {name for name in own if name not in theirs} <= known
    assert len(own & known) > 0.9 * max(len(own), len(known))
