"""Starting workers, and waiting for them no longer than a time-out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from ..interpreter import Interpreter
from .forked import IMPORTED


ROOT = Path(__file__).resolve().parents[2]
BIN = os.path.dirname(sys.executable)
MODULE = ["-m", "safegene_trl"]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": str(ROOT),
}
DEVICE_VARIABLE = "SAFEGENE_WORKER_DEVICE"  # of the workers; default: the CPU
ON_GPU = {DEVICE_VARIABLE: "cuda", "DS_ACCELERATOR": "cuda"}


Launch = Callable[[list[str], int], subprocess.CompletedProcess]


def ranks(*words: str, processes: int = 2) -> list[str]:
    """Python's arguments that launch a script, or a module after `-m`, by torchrun.

    On a free port: torch 2.8 takes 29500 for every launch else, and two files can launch at once.
    """
    group = ["--standalone", "--nproc_per_node", str(processes)]
    return ["-m", "torch.distributed.run", *group, *words]


def start(
    arguments: list[str],
    timeout: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` as a process of its own; both streams come back as `stdout`."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def run_plans(
    launch: Launch, folder: Path, plans: list[dict], timeout: int, processes: int = 2
) -> None:
    """Runs all plans in one launch; fails with the launch's output if a worker fails."""
    file = folder / "plans.json"
    file.write_text(json.dumps(plans))
    worker = ranks("-m", "tests.distributed.worker", str(file), processes=processes)
    done = launch(worker, timeout)
    assert done.returncode == 0, done.stdout[-6000:]


class Forked:
    """Launches, by any launcher that is torchrun underneath, whose ranks have imported everything
    when they start.
    """

    def __init__(self):
        self._interpreter = Interpreter(ENVIRONMENT, IMPORTED)

    def __call__(self, arguments: list[str], timeout: int = 240) -> subprocess.CompletedProcess:
        """`python ARGUMENTS`; both streams come back as `stdout`."""
        codes, printed = self.together([arguments], timeout)
        return subprocess.CompletedProcess(arguments, codes[0], printed)

    def together(self, commands: list[list[str]], timeout: int = 240) -> tuple[list[int], str]:
        """As `run_together`."""
        script = "import sys; from tests.distributed.forked import launch; launch(*sys.argv[1:])"
        forks = [self._interpreter.start(script, timeout, *words) for words in commands]
        ended = [fork.done() for fork in forks]
        return [done.returncode for done in ended], "\n".join(
            done.stdout + done.stderr for done in ended
        )

    def end(self) -> None:
        self._interpreter.end()


def run_together(commands: list[list[str]], timeout: int = 240) -> tuple[list[int], str]:
    """Starts `python ARGUMENTS` for all at once and waits for all; returns their exit codes and
    what they printed.
    """
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"PATH": f"{BIN}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], "\n".join(printed)
