"""Starting workers, and waiting for them no longer than a time-out."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType


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


def torchrun(
    arguments: list[str],
    timeout: int,
    processes: int = 2,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess:
    """A launch of `processes` ranks; both streams come back as `stdout`.

    On a free port: torch 2.8 takes 29500 for every launch else, and two files can launch at once.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *arguments,
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def run_plans(
    folder: Path,
    plans: list[dict],
    timeout: int,
    processes: int = 2,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Runs all plans in one launch; fails with the launch's output if a worker fails."""
    file = folder / "plans.json"
    file.write_text(json.dumps(plans))
    worker = ["-m", "tests.distributed.worker", str(file)]
    done = torchrun(worker, timeout, processes, environment)
    assert done.returncode == 0, done.stdout[-6000:]


def run_together(commands, timeout=240):
    """Starts all commands at once and waits for all; returns their exit codes and what they
    printed.
    """
    started = [
        subprocess.Popen(
            command,
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
