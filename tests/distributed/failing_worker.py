"""One rank of a run in which something fails: `… -m tests.distributed.failing_worker PLAN.json`."""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from safegene_trl.checkpoints import live_merge as merging
from safegene_trl.checkpoints.tensor_file import TensorFile
from safegene_trl.models import losses
from safegene_trl.recalibration import objective
from safegene_trl.recalibration import search as recalibration
from safegene_trl.recalibration import trust_region as optimization
from safegene_trl.step import preparation

from .backends import DEEPSPEED
from .worker import callback_of, start, trainer_of


class Fault(Exception):
    """No `SafeGeneError`: as a bug or a broken machine would raise."""


def break_down(*args, **kwargs):
    raise Fault("broken on purpose")


def kill_self(*args, **kwargs):
    print(f"rank {dist.get_rank()} kills itself", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(file, name, tensor, offset=0):
    raise OSError(28, "No space left on device")


def second_call(function, fault):
    """`function`, but its second call is `fault`."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        return fault() if len(calls) == 2 else function(*args, **kwargs)

    return wrapped


def little_memory(model, batch):
    if len(batch.input_ids) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(model, batch)


forward = losses._forward
FAULTS = {  # name: module, attribute, what it is replaced by, on which rank
    "validation": (preparation, "check_supported", break_down, 1),
    "recalibration": (
        objective,
        "sample_losses",
        second_call(objective.sample_losses, break_down),
        1,
    ),
    "kill": (objective, "sample_losses", second_call(objective.sample_losses, kill_self), 1),
    "gathering": (merging, "whole", second_call(merging.whole, break_down), 1),
    "search": (recalibration, "minimize_in_box", break_down, 0),
    "later in the search": (optimization, "_step", break_down, 0),
    "memory": (losses, "_forward", little_memory, 1),
    "disk": (TensorFile, "write", full_disk, 0),
}


def run(plan: dict) -> dict:
    """What this rank saw: the error, and how many steps were trained before it."""
    rank = dist.get_rank()
    os.chdir(plan["folders"][rank])
    plan = plan | {
        "config": plan["config"] | plan["configs"][rank],
        "vector": plan["vectors"][rank],
    }
    fault = FAULTS.get(plan["fault"])
    broken = patch.object(*fault[:3]) if fault and fault[3] == rank else nullcontext()
    trainer = trainer_of(plan, Path(plan["out"]), [callback_of(plan)])
    found = {"kind": None, "message": "", "notes": []}
    started = time.monotonic()
    try:
        with broken:
            trainer.train()
    except Exception as error:
        found = {
            "kind": type(error).__name__,
            "message": str(error),
            "notes": getattr(error, "__notes__", []),
        }
        if plan["alone"]:  # as an uncaught error would end it
            print(
                f"{found['kind']}: {found['message']} {found['notes']}", file=sys.stderr, flush=True
            )
            os._exit(1)
    return found | {"steps": trainer.state.global_step, "seconds": time.monotonic() - started}


def main() -> None:
    plans = json.loads(Path(sys.argv[1]).read_text())
    start(plans[0]["backend"] in DEEPSPEED)
    recalibration.objection = lambda before, after, budget: ""
    for plan in plans:
        found = run(plan)
        Path(plan["out"], f"result-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
