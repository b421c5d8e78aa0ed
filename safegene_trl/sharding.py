"""How the model's weights are spread over processes. Nothing else in the package knows a backend's name."""

from transformers import TrainingArguments

from .errors import UnsupportedModelError


def check_launch(args: TrainingArguments) -> None:
    """Raises `UnsupportedModelError` for a launch whose weights this version cannot read whole from one process."""
    if args.world_size > 1:
        raise UnsupportedModelError(
            f"The training runs in {args.world_size} processes, which this version cannot safeguard in place: launch one "
            "process, or run `safegene apply` on the finished checkpoint."
        )
    if args.deepspeed or args.fsdp:
        raise UnsupportedModelError(
            "DeepSpeed and FSDP trainings cannot be safeguarded in place by this version: run `safegene apply` on the "
            "finished checkpoint."
        )
