"""`safegene sft --config recipe.yaml`: TRL's SFT script with the safety step at its end."""

from collections.abc import Sequence
from typing import Any, cast

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
    get_quantization_config,
)

from ..callback import DryRunComplete, SafeGeneCallback
from ..checkpoints.loading import check_readable
from ..checkpoints.write_errors import writing
from ..distributed.processes import join_processes, leave_processes
from ..errors import (
    RejectedError,
    SafeGeneError,
    UnexpectedError,
    UnsupportedModelError,
)
from ..progress import may_show
from ..step.decision import EXIT_CODES
from .launch_option import wants_launch
from .launching import launch
from .output import give
from .parsing import SafeGeneArguments, make_parser, parse
from .training_data import check_rows, split_of, training_data


NO_MODEL = "No model is named: set `model_name_or_path` to a directory or hub id."
ARGUMENTS = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, SafeGeneArguments)


def main(argv: Sequence[str]) -> int:
    """Runs one fine-tune; `out/` then holds it as TRL saves it and `out/safeguarded/` the
    safeguarded checkpoint.
    """
    if wants_launch(argv):
        return launch("sft", argv, make_parser(ARGUMENTS))
    join_processes()
    script, training, model, mixture, safegene = parse(
        ARGUMENTS,
        argv,
        prog="safegene sft",
        description="Fine-tune with TRL's SFTTrainer and the safety step at its end.",
        needed={"model_name_or_path": NO_MODEL},
    )
    check_readable(model.model_name_or_path, model.model_revision)
    callback = SafeGeneCallback(safegene.config) if safegene.config else None
    trainer = _trainer(script, training, model, mixture)
    if callback:
        callback.attach(trainer)
    failure = _train(trainer, callback)
    _save(trainer, script, callback.report if callback else None)
    if trainer.accelerator.is_main_process:
        place = str(training.output_dir)
        record = (callback.report if callback else None) or {"fine_tune": place}
        give(record, f"Fine-tuned model: {place}")
    if isinstance(failure, RejectedError):  # on every rank
        leave_processes()
    if failure:
        raise failure
    leave_processes()
    if hasattr(trainer, "end"):  # from transformers 5.18 on
        trainer.end()
    return _exit_code(callback.report if callback else None)


def _trainer(
    script: ScriptArguments, training: SFTConfig, model: ModelConfig, mixture: DatasetMixtureConfig
) -> SFTTrainer:
    """TRL's, as its own script makes it."""
    train_rows, eval_rows = _rows(script, training, model, mixture)
    name, given = str(model.model_name_or_path), cast(Any, training.model_init_kwargs)
    training.disable_tqdm = not may_show(not training.disable_tqdm)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        # TRL before 1.16 asks for "auto" there, which ZeRO-3 refuses
        **({"device_map": None} if training.use_cpu else {}),
        **(given or {}),
    }
    try:
        return SFTTrainer(
            model=name,
            args=training,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"The training from {name} cannot begin ({reason}): check the files of model and tokenizer."
        ) from error


def _train(trainer: SFTTrainer, callback: SafeGeneCallback | None) -> SafeGeneError | None:
    """Trains; how the safety step failed, where a fine-tune is there to be saved all the same."""
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except DryRunComplete:
        if callback and trainer.accelerator.is_main_process:
            give(callback.report, "")  # it has said so itself
        leave_processes()
        raise
    except SafeGeneError as error:
        if not (callback and callback.report):  # before the training: there is nothing to save
            raise
        # the others do not come here
        if isinstance(error, UnexpectedError) and not error.on_all_ranks:
            raise
        return error
    return None


def _save(trainer: SFTTrainer, script: ScriptArguments, report: dict[str, Any] | None) -> None:
    """Puts the fine-tune where TRL does, unless the step has."""
    training = trainer.args
    if not (report and report.get("fine_tune") == str(training.output_dir)):
        with writing():
            trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def _exit_code(report: dict[str, Any] | None) -> int:
    if report and report["status"] == "safeguarded":
        return EXIT_CODES[report["decision"]["outcome"]]
    return 0


def _rows(
    script: ScriptArguments, training: SFTConfig, model: ModelConfig, mixture: DatasetMixtureConfig
) -> tuple[Any, Any]:
    """What is trained on and, where the recipe evaluates, what is evaluated on; checked before the
    model is loaded.
    """
    splits = training_data(script, mixture)
    name, revision = str(model.model_name_or_path), model.model_revision
    train_rows = split_of(splits, script.dataset_train_split, "dataset_train_split")
    check_rows(train_rows, "training data", training, name, revision)
    if training.eval_strategy == "no":
        return train_rows, None
    eval_rows = split_of(splits, script.dataset_test_split, "dataset_test_split")
    check_rows(eval_rows, "evaluation data", training, name, revision)
    return train_rows, eval_rows
