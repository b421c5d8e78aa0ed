"""How each backend is set up on CPUs for models of a few thousand weights."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType


DEEPSPEED = ("zero1", "zero2", "zero3", "zero3_offload")


def deepspeed_config(backend: str, gather: bool) -> dict:
    """ZeRO of one stage. The thresholds make ZeRO-3 shard even tiny weights and keep none of them
    gathered.
    """
    stage = int(backend[4])
    zero: dict = {"stage": stage, "reduce_bucket_size": 8192}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 8192,
            "stage3_max_live_parameters": 20000,
            "stage3_max_reuse_distance": 0,
            "stage3_gather_16bit_weights_on_model_save": gather,
        }
    if backend.endswith("offload"):
        zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def training_arguments(plan: dict) -> dict:
    """What a scenario's backend and its own `arguments` add to the trainer's arguments."""
    arguments = {
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "optim": "adamw_torch",
    }
    if plan["backend"] in DEEPSPEED:
        arguments["bf16"] = plan["dtype"] == "bfloat16"
        arguments["deepspeed"] = deepspeed_config(plan["backend"], plan.get("gather", True))
    if plan["backend"] == "fsdp2":
        arguments["fsdp"] = True
        arguments["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",
            "reshard_after_forward": True,
        } | plan.get("fsdp", {})
    return arguments | plan.get("arguments", {})


def launch_fsdp2() -> None:
    """With `use_cpu` the Trainer ignores `fsdp`; accelerate honours it for any kind but MULTI_CPU."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
