"""One rank of a sharded run: `python -m torch.distributed.run --nproc_per_node 2 -m
tests.distributed.worker PLAN.json`.

The plan lists scenarios; each is a fine-tune with the callback, and what rank 0 learned from it
goes to a JSON file of its own. Assertions are made by the tests that launch this.
"""

import gc
import json
import os
import shutil
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback
from safegene_trl.distributed.layouts import sharding_of
from safegene_trl.recalibration import search as recalibration
from safegene_trl.recalibration import touch_up

from ..conftest import config_of, task_dataset
from .backends import DEEPSPEED, launch_fsdp2, training_arguments
from .launching import DEVICE_VARIABLE


TIMEOUT = timedelta(seconds=60)
ON_GPU = os.environ.get(DEVICE_VARIABLE) == "cuda"
BACKEND = "nccl" if ON_GPU else "gloo"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def start(deepspeed: bool) -> None:
    """The process group, with a time-out: the Trainer would take 30 minutes on a CPU."""
    gc.freeze()  # as in conftest.py: what is imported is not looked through at the end of every training
    if deepspeed:
        import deepspeed as ds

        ds.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # else the first use compiles it for two minutes
        )
        ds.init_distributed(dist_backend=BACKEND, timeout=TIMEOUT, auto_mpi_discovery=False)
    else:
        dist.init_process_group(BACKEND, timeout=TIMEOUT)


def callback_of(plan: dict) -> SafeGeneCallback:
    return SafeGeneCallback(
        config_of(
            vector=plan["vector"],
            max_utility_loss=100.0,
            max_evaluations=3,
            batch_size=4,
            num_safety_shots=8,
            num_task_shots=10,
            num_benign_shots=6,
            max_shard_size="20KB",
            max_new_tokens=4,
            **plan.get("config", {}),
        )
    )


def trainer_of(plan: dict, out: Path, callbacks: list) -> SFTTrainer:
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4,
        target_modules=plan.get("target_modules", "all-linear"),
        task_type="CAUSAL_LM",
        init_lora_weights=True,
    )
    args = SFTConfig(
        output_dir=str(out),
        max_steps=2,
        use_cpu=not ON_GPU,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        model_init_kwargs={"dtype": plan["dtype"], "device_map": None},
        **training_arguments(plan),
    )
    if plan["backend"] == "fsdp2" and not ON_GPU:
        launch_fsdp2()
    return SFTTrainer(
        model=plan["model"],
        args=args,
        train_dataset=task_dataset(),
        eval_dataset=task_dataset()
        if plan.get("arguments", {}).get("load_best_model_at_end")
        else None,
        peft_config=lora if plan["lora"] else None,
        callbacks=callbacks,
    )


def run(plan: dict, out: Path) -> dict:
    """A fine-tune with the callback, one without, and one more on the model of the first."""
    gradients = record_gradients()
    sharded: list[float] = []
    callback = callback_of(plan)
    observe(callback, sharded)
    trainer = trainer_of(plan, out / "with", [callback])
    trainer.train()
    trainable = [trainable_of(trainer)]
    trainer.save_model()
    trainer.save_state()
    # with or without the callback: the old engine's hooks would break the next one
    if plan["backend"] in DEEPSPEED:
        trainer.model_wrapped.destroy()
    loss = loss_of_more_training(trainer, plan, out)
    plain = trainer_of(plan, out / "without", [])
    plain.train()
    plain.save_model()
    trainable.append(trainable_of(plain))
    values = list(callback.report["coefficients"].values())
    coefficients = torch.tensor(values, dtype=torch.float64, device=DEVICE)
    everywhere = [torch.zeros_like(coefficients) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, coefficients)
    return {
        "gradients": gradients,
        "report": callback.report,
        "same_on_all_ranks": all(torch.equal(other, coefficients) for other in everywhere),
        "sharded_share": sharded,
        "trainable": trainable,
        "loss_again": loss,
    }


def loss_of_more_training(trainer: SFTTrainer, plan: dict, out: Path) -> float:
    """Of a step on the model after the safety step: by another trainer where one takes it."""
    if plan["backend"] == "fsdp2":  # accelerate wraps a model once
        batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
        return trainer.training_step(trainer.model_wrapped, batch).item()
    again = Trainer(
        model=trainer.model,
        args=TrainingArguments(
            output_dir=str(out / "again"),
            max_steps=1,
            use_cpu=not ON_GPU,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **training_arguments(plan | {"arguments": {}}),
        ),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )
    return again.train().training_loss


def trainable_of(trainer: Trainer) -> list[str]:
    return [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]


def observe(callback: SafeGeneCallback, sharded: list[float]) -> None:
    """Notes which share of the weights this rank holds when the safety step begins."""
    original = callback.on_train_end

    def on_train_end(args, state, control, **kwargs):
        sharding = sharding_of(kwargs["model"], args.device, kwargs["optimizer"])
        held = whole = 0
        for parameter in kwargs["model"].parameters():
            part = getattr(parameter, "ds_tensor", parameter)
            part = part.to_local() if hasattr(part, "to_local") else part
            held += part.numel()
            with sharding.full([parameter]) as (full,):
                whole += full.numel()
        sharded.append(held / whole)
        original(args, state, control, **kwargs)

    callback.on_train_end = on_train_end


def record_gradients() -> list:
    """Every evaluation's point and gradient, as they come."""
    found: list = []

    def recorded(model, fit, attach, point, config):
        value, losses, gradient, rows = ORIGINAL(model, fit, attach, point, config)
        found.append(
            {
                "point": list(map(float, point)),
                "gradient": gradient.tolist(),
                "losses": losses.to_dict(),
            }
        )
        return value, losses, gradient, rows

    recalibration.evaluate_objective = recorded
    return found


ORIGINAL = recalibration.evaluate_objective


def main() -> None:
    plans = json.loads(Path(sys.argv[1]).read_text())
    start(any(plan["backend"] in DEEPSPEED for plan in plans))
    recalibration.objection = lambda before, after, budget: ""  # a random vector helps by luck only
    touch_up.objection = recalibration.objection
    touch_up.LEARNING_RATE, touch_up.STEPS = 1e-2, 8  # a tiny model moves within a few steps
    for plan in plans:
        out = Path(plan["out"])
        try:
            found = run(plan, out)
        except Exception:
            found = {"error": traceback.format_exc()}
        if dist.get_rank() == 0 or "error" in found:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"result-{dist.get_rank()}.json").write_text(json.dumps(found))
        shutil.rmtree(out / "again", ignore_errors=True)
        if "error" in found:
            print(found["error"], file=sys.stderr, flush=True)
            os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
