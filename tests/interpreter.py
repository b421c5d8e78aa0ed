"""Processes that have imported everything when they start: forks of one interpreter, for tests that
only need a process of their own.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    "safegene_trl.commands.apply",
    "safegene_trl.commands.fleet",
    "safegene_trl.step.live_fine_tune",
    "safegene_trl.step.apply_with_coefficients",
    "safegene_trl.reporting.plots",
    "matplotlib.backends.backend_agg",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
)
SERVER = """
import gc, importlib, json, os, sys, traceback

for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
gc.freeze()

def run(wanted):
    code = 1
    try:
        for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
            os.dup2(os.open(wanted["streams"][number], mode), number)
        sys.stdin, sys.argv = open(0, closefd=False), ["-c", *wanted["words"]]
        exec(compile(wanted["script"], "<script>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    wanted = json.loads(line)
    if "ended" in wanted:
        answer = os.waitstatus_to_exitcode(os.waitpid(wanted["ended"], 0)[1])
    elif not (answer := os.fork()):
        run(wanted)
    print(f"answer {answer}", flush=True)
"""


class Interpreter:
    """One process with everything imported, whose forks run scripts.

    Args:
        environment: What it and they have besides the tests' own.
        imported: The modules that it imports.
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, imported: Sequence[str] = IMPORTED
    ):
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(imported)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | variables | dict(environment),
            text=True,
        )

    def ask(self, **wanted) -> int:
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        for line in iter(self._process.stdout.readline, ""):
            if line.startswith("answer "):
                return int(line.split()[1])
        raise RuntimeError("the interpreter has ended")

    def start(self, script: str, *words: object) -> "Fork":
        """A fork that runs a script, which finds the words in `sys.argv`."""
        place = Path(tempfile.mkdtemp())
        streams = [os.devnull, str(place / "stdout"), str(place / "stderr")]
        for stream in streams[1:]:
            Path(stream).touch()
        return Fork(
            self, self.ask(script=script, words=[*map(str, words)], streams=streams), streams
        )

    def run(self, script: str, *words: object) -> subprocess.CompletedProcess:
        return self.start(script, *words).done()

    def end(self) -> None:
        self._process.kill()
        self._process.wait(60)


@dataclass
class Fork:
    """A running script."""

    interpreter: Interpreter
    pid: int
    streams: Sequence[str]

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def done(self) -> subprocess.CompletedProcess:
        """Waits for it; pytest's own time-out ends a test in which it hangs."""
        code = self.interpreter.ask(ended=self.pid)
        printed = [Path(stream).read_text() for stream in self.streams[1:]]
        shutil.rmtree(Path(self.streams[1]).parent)
        return subprocess.CompletedProcess([], code, *printed)
