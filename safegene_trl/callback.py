"""`SafeGeneCallback`: the safety step at the end of a `Trainer` or `SFTTrainer` run."""

import logging
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .checkpoints.contents import ADAPTER_CONFIG
from .checkpoints.loading import load_processor
from .checkpoints.places import failure_path, same_place
from .config.settings import SafeGeneConfig
from .config.validation import check_is, shown
from .data.prompt_style import trained_options
from .data.rows import with_arguments
from .distributed.layouts import is_whole, sharding_of
from .distributed.processes import check_parallelism
from .errors import (
    ConfigError,
    FamilyError,
    OutputError,
    RejectedError,
    SafeGeneError,
    UnexpectedError,
)
from .models.data_types import held_dtypes, name_of
from .models.parameters import adapter_configs, base_model, uncompiled
from .reporting.report import scalars
from .reporting.summary import announcement
from .step.decision import category_scalars
from .step.finished_training import FinishedTraining, fingerprint
from .step.live_fine_tune import safeguard
from .step.plan import TRAINERS_OUTPUT, InputModel, Origin, Plan, dry_run_message
from .step.preparation import Preparation, prepare


logger = logging.getLogger(__name__)
# all that there are, of which one training may have two
_CALLBACKS: "WeakSet[SafeGeneCallback]" = WeakSet()


class DryRunComplete(SystemExit):
    """Ends the script with exit code 0 after a dry run's checks have passed, before the first
    training step.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message


class SafeGeneCallback(TrainerCallback):
    """Gives a fine-tune its family's refusals back when its training ends.

    Before the first step it checks everything that could fail later. After the last step (and after
    `load_best_model_at_end`) it finds the coefficients (arXiv 2606.06519) and writes the
    safeguarded checkpoint and `safegene_report.json` into `<output_dir>/safeguarded`;
    `<output_dir>/_safeguarded` where the trainer pushes to the hub, because `Trainer.push_to_hub`
    uploads every other subfolder. The live model stays the plain fine-tune, so
    `trainer.save_model()` afterwards saves that.

    Args:
        config: What to do.

    Attributes:
        report: The report of the last run, as in `safegene_report.json`; None before it.

    Raises:
        ConfigError: `config` is no `SafeGeneConfig`.
        SafeGeneError: One of its kinds: at the start of the training for anything that can be
            checked then, with any `on_failure`; at its end with `on_failure="raise"`, a
            `RejectedError` where the gate's limits are not kept.
        SystemExit: With code 0 before the first step, after a dry run's checks have passed.

    Example:
        >>> trainer = SFTTrainer(model, train_dataset=data, callbacks=[SafeGeneCallback(SafeGeneConfig(vector="…"))])
        >>> trainer.train()
    """

    def __init__(self, config: SafeGeneConfig):
        check_is(config, SafeGeneConfig, "SafeGeneCallback")
        self.config = config
        self.report: dict[str, Any] | None = None
        self._prepared: Preparation | None = None
        # who keeps the callback for its report keeps no models, of which a trainer may have two
        self._trainers: WeakSet[Trainer] = WeakSet()
        # in which data types models lay in memory before anything spread them over processes
        self._loaded: WeakKeyDictionary[nn.Module, dict[str, torch.dtype]] = WeakKeyDictionary()
        # by the step of each checkpoint, what the weights were
        self._saved: dict[int, torch.Tensor] = {}
        self._begun: bool | None = None  # None: it has seen no training yet
        self._state: TrainerState | None = None  # of the training that goes on
        self._place: Path | None = None
        _CALLBACKS.add(self)

    def attach(self, trainer: Trainer) -> "SafeGeneCallback":
        """Adds the callback to a trainer so that its metrics, under `safegene/`, reach the trackers
        in the run of the fine-tune.

        As one of the trainer's `callbacks` it comes after the trackers, which close their runs when
        the training ends. Attached it comes before them, and after every other callback: one may
        still change the weights then. Transformers gives the names to TensorBoard, wandb and
        Trackio with its prefix `train/`.

        Args:
            trainer: A `Trainer` that has not been started; also one whose `callbacks` hold this
                callback already. Several can take turns.

        Raises:
            ConfigError: It is no `Trainer`.
        """
        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"`attach` was given {shown(trainer)}: give it the trainer, before `trainer.train()`; the output folder is "
                "`SafeGeneConfig.output.output_dir`."
            )
        self._trainers.add(trainer)
        self._stand_in_line(trainer)
        self._note_dtypes(trainer.model)
        return self

    def _trainer_of(self, state: TrainerState) -> Trainer | None:
        """The trainer whose training this is, None where the callback is not attached to it."""
        return next((trainer for trainer in self._trainers if trainer.state is state), None)

    def _stand_in_line(self, trainer: Trainer | None) -> None:
        """Takes its place; in a new list, as the old one may be walked through just now."""
        if trainer is not None:
            handler = trainer.callback_handler
            others = [each for each in handler.callbacks if each is not self]
            handler.callbacks = sorted(
                [*others, self], key=lambda each: (_is_tracker(each), each is self)
            )

    def _note_dtypes(self, model: Any) -> None:
        # with `model_init` there may be none yet
        if isinstance(model, nn.Module) and is_whole(model):
            self._loaded[uncompiled(model)] = held_dtypes(model)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the data types of the weights, before sharding may change them."""
        self._note_dtypes(kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks vector, family, data and output place before the GPU hours."""
        self._prepared, self._saved, self._begun = None, {}, True
        self._state, self._place = state, self._target(args)
        trainer = self._trainer_of(state)
        self._stand_in_line(trainer)
        if state.is_hyper_param_search:
            logger.warning("SafeGene skips hyper-parameter trials: run it on the final training.")
            return
        model, loader = uncompiled(kwargs["model"]), kwargs.get("train_dataloader")
        sharding = sharding_of(model, args.device, kwargs.get("optimizer"))
        with sharding.naming_rank(), sharding.raising_together():
            self.config.check()
            check_parallelism(model, args)
            _check_output_dir(model, args)
            self._check_alone()
            processor = _processor(kwargs.get("processing_class"), model)
        prepared = getattr(trainer, "train_dataset", None)
        rows = None if loader is None else with_arguments(loader.dataset, prepared)
        with sharding.naming_rank():
            loaded = self._loaded.get(model, {}) if sharding.widens else {}
            input_model = InputModel(model, processor, _origin(model, args), loaded)
            options = trained_options(args, rows, prepared)
            self._prepared = prepare(
                self.config, input_model, self._place, sharding, rows, _packed(args), options
            )
        plan = self._prepared.plan
        if sharding.widens and model not in self._loaded:
            plan.report.warnings += _unknown_dtypes(model, plan)
        plan.warn()
        if self.config.dry_run:
            message = dry_run_message(plan.target)
            if sharding.is_main:
                print(message)
            self.report = plan.report.to_dict()
            raise DryRunComplete(message)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises where the callback was added in the middle of a training, of which it knows too
        little.
        """
        self._check_begun()

    def _check_begun(self) -> None:
        if not self._begun:
            raise ConfigError(
                "The SafeGene callback was added after the training had begun, so that nothing was checked: add it before "
                "`trainer.train()`."
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes which step the training has a checkpoint of, and what the weights are."""
        if self._prepared is not None:
            self._saved[state.global_step] = fingerprint(kwargs["model"], self._prepared.sharding)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the fine-tune, recalibrates, merges and saves. Does nothing when called a second
        time for one training.
        """
        if self._begun is None:
            self._check_begun()
        prepared, self._prepared = self._prepared, None
        self._begun, self._state = False, None
        if prepared is None:
            return
        plan, model = prepared.plan, uncompiled(kwargs["model"])
        trainer = self._trainer_of(state)
        training = FinishedTraining(args, state, self._saved, trainer)
        try:
            safeguard(prepared, model, _adapter_base(model), not args.disable_tqdm, training)
        except SafeGeneError as error:
            # What only one rank met leaves the others in a collective operation: it has to end the
            # job.
            alone = isinstance(error, UnexpectedError) and not error.on_all_ranks
            if alone or self.config.on_failure == "raise":
                raise
            # it says so itself
            place = "" if isinstance(error, RejectedError) else f" ({failure_path(plan.target)})"
            logger.warning("SafeGene did not safeguard this fine-tune: %s%s", error, place)
        else:
            if plan.sharding.is_main:
                print(announcement(plan.report.to_dict(), plan.target), flush=True)
        finally:
            self.report = plan.report.to_dict()
            if trainer is not None:
                trainer.log(scalars(self.report) | category_scalars(self.report))

    def _check_alone(self) -> None:
        """Raises `ConfigError` where another callback of the training would write to the same place:
        what is written last would stay.
        """
        for other in _CALLBACKS:
            if other is self or other._state is not self._state:
                continue
            if self._place and other._place and same_place(self._place, other._place):
                raise ConfigError(
                    f"Two SafeGene callbacks of this training write to {self._place}: leave one of them out, give each an "
                    "`output.output_dir` of its own, or make one vector of theirs by `safegene combine`."
                )

    def _target(self, args: TrainingArguments) -> Path:
        if self.config.output.output_dir is not None:
            return Path(self.config.output.output_dir)
        return Path(str(args.output_dir)) / ("_safeguarded" if args.push_to_hub else "safeguarded")


def _unknown_dtypes(model: nn.Module, plan: Plan) -> list[str]:
    """A warning where 16-bit weights may have been widened before the callback saw them."""
    loaded = base_model(model).config.dtype
    wide = torch.float32 in held_dtypes(model).values()
    if plan.types.asked is not None or loaded in (None, torch.float32) or not wide:
        return []
    return [
        f"The weights are float32 and `config.json` says {name_of(loaded)}. Whether FSDP2 has widened them cannot be told, so the "
        "checkpoint is written in float32: give the trainer the callback as one of its `callbacks` or by `attach`, or set "
        "`output.dtype`."
    ]


def _is_tracker(callback: TrainerCallback) -> bool:
    """Whether it sends metrics somewhere, and closes that when the training ends."""
    return any(
        kind.__module__.startswith("transformers.integrations") for kind in type(callback).__mro__
    )


def _processor(processing_class: Any, model: nn.Module) -> Any:
    """The trainer's tokenizer, or its processor with one."""
    if isinstance(processing_class, ProcessorMixin | PreTrainedTokenizerBase):
        return processing_class
    name, cause = base_model(model).config.name_or_path, None
    try:
        if name:
            return load_processor(name)
    except SafeGeneError as error:
        cause = error
    raise FamilyError(
        "The trainer has no tokenizer: pass `processing_class=tokenizer` to it."
    ) from cause


def _packed(args: TrainingArguments) -> bool | None:
    """Whether TRL packed rows without keeping their boundaries; None where the arguments do not
    say.
    """
    packing = getattr(args, "packing", None)
    return (
        None
        if packing is None
        else bool(packing and getattr(args, "packing_strategy", "") == "wrapped")
    )


def _origin(model: nn.Module, args: TrainingArguments) -> Origin:
    """Where the training starts, as far as the model knows, and where it writes."""
    config = base_model(model).config
    kind = "lora" if isinstance(model, PeftModel) else "full"
    revision = getattr(config, "_commit_hash", None)
    return Origin(
        config.name_or_path or None, revision, kind, {TRAINERS_OUTPUT: Path(str(args.output_dir))}
    )


def _check_output_dir(model: nn.Module, args: TrainingArguments) -> None:
    """Raises `OutputError` where the fine-tune would be saved over its base, or beside what is read
    in its place.
    """
    base, folder = Path(base_model(model).config.name_or_path or ""), Path(str(args.output_dir))
    if base.is_dir() and base.resolve() == folder.resolve():
        raise OutputError(
            f"`output_dir` is {base}, the model that the training starts from: name another folder."
        )
    if not adapter_configs(model) and (folder / ADAPTER_CONFIG).is_file():
        raise OutputError(
            f"`output_dir` ({folder}) holds the adapter of an earlier training, which would be loaded in the place of this full "
            f"fine-tune: name another folder, or remove the {ADAPTER_CONFIG} there."
        )


def _adapter_base(model: nn.Module) -> str:
    """What a saved adapter is relative to: a LoRA's base model; empty for a full fine-tune, which
    is its own.
    """
    if isinstance(model, PeftModel):
        return str(
            model.active_peft_config.base_model_name_or_path
            or base_model(model).config.name_or_path
        )
    return ""
