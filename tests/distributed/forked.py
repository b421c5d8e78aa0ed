"""A launch in a process that has imported everything, and whose ranks are forks of it: all but the
start of Python is the launcher's own.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.launcher import api


IMPORTED = (
    "accelerate.commands.accelerate_cli",
    "deepspeed",
    "safegene_trl.commands.apply",
    "safegene_trl.commands.evaluate",
    "safegene_trl.commands.extract",
    "safegene_trl.commands.sft",
    "safegene_trl.step.live_fine_tune",
    "tests.distributed.forked",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
)


class ForkingLaunch(api.elastic_launch):
    """torchrun's own, which would start `python ARGUMENTS` for every rank."""

    def __init__(self, config, entrypoint):
        config.start_method = "fork"
        super().__init__(config, python)


def python(*arguments: str) -> None:
    """Runs a module (`-m NAME …`) or a script as `python ARGUMENTS` does, in this process."""
    words = [word for word in arguments if word != "-u"]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def end_all(*_) -> None:
    os.killpg(0, signal.SIGKILL)


def launch(timeout: str, *arguments: str) -> None:
    """`python ARGUMENTS`, where that launches ranks; after `timeout` seconds none is left."""
    os.setsid()
    signal.signal(signal.SIGALRM, end_all)
    signal.alarm(int(timeout))
    os.chdir(Path(__file__).parents[2])
    api.elastic_launch = run.elastic_launch = ForkingLaunch
    python(*arguments)
