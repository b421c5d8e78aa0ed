"""`ExtractionConfig`: everything that can be set about making a safety vector."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

from ..config.validation import DTYPES, LARGEST_COUNT, Rule, check_values, folder, named_fields
from ..errors import ConfigError
from .linearization import Blocks
from .methods import METHODS
from .selection import SELECTIONS


_COUNT = Rule(at_least=1, at_most=LARGEST_COUNT)


@named_fields
@dataclass
class ExtractionConfig:
    """How to make a safety vector.

    Args:
        aligned_model: The released model whose refusals are intact: directory or hub id.
        aligned_revision: Its branch, tag or commit on the hub.
        degraded_model: The same model with weakened refusals, or a LoRA on `aligned_model` that
            weakens them.
        degraded_revision: Its branch, tag or commit on the hub.
        output_dir: Where the vector goes.
        overwrite_output_dir: Replace a vector that is there.
        method: How the deltas are made: `delta` is the plain weight difference, `distill` learns
            them from there (see `distillation.py`), and so does `linearized`, on blocks that are
            linear in their weights (see `linearization.py`).
        linearized_blocks: Which blocks those are.
        distill_steps: Optimiser steps of `distill` and `linearized`.
        distill_learning_rate: Its learning rate.
        anchor_weight: Weight of its term that keeps benign answers as they are.
        rank: Rank of every delta. Default: the LoRA's own rank, else 8.
        exact_svd: Truncate by the exact SVD instead of the randomised one.
        isolate_from: Fine-tunes of the aligned model (checkpoints or LoRAs) whose directions are
            taken out of the vector, see `isolation.py`.
        isolation_rank: Dimension of their subspace in every module.
        selection: How layers are selected, see `selection.py`.
        layer_share: Share (0–1] of the layers that are kept.
        bootstrap_resamples: How often the prompts are drawn again to see how stable the selection
            is.
        harmful_data: Harmful prompts: a column `prompt`, no answers needed.
        benign_data: Benign prompts, look-alikes above all.
        data_split: Split of both data sets.
        num_selection_prompts: Prompts of each kind that layers are selected by.
        num_safety_prompts: Harmful prompts stored with the vector, at most; only those the aligned
            model refuses.
        num_benign_prompts: Benign prompts stored with the vector, at most; only those the aligned
            model answers.
        max_new_tokens: Length of the aligned model's stored answers, in tokens.
        batch_size: Prompts per generated batch.
        dtype: Data type to load the models in.
        weights_dtype: Data type to store the vector in.
        seed: Seed for drawing prompts.

    Raises:
        ConfigError: A name is no setting. Values are checked by `check`, with which `extract`
            begins.
    """

    aligned_model: str = field(
        default="", metadata={"help": "Model with intact refusals: directory or hub id."}
    )
    aligned_revision: str | None = field(
        default=None, metadata={"help": "Its branch, tag or commit on the hub."}
    )
    degraded_model: str = field(
        default="", metadata={"help": "Model or LoRA with weakened refusals."}
    )
    degraded_revision: str | None = field(
        default=None, metadata={"help": "Its branch, tag or commit on the hub."}
    )
    output_dir: str = field(default="", metadata={"help": "Where the vector goes."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a vector that is there."}
    )
    method: str = field(
        default="delta",
        metadata={
            "help": "How the deltas are made.",
            "choices": METHODS.keys(),
        },
    )
    linearized_blocks: str = field(
        default="both",
        metadata={
            "help": "Blocks that `linearized` expands.",
            "choices": ["attention", "mlp", "both"],
        },
    )
    distill_steps: int = field(default=60, metadata={"help": "Optimiser steps of `distill`."})
    distill_learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of `distill`."}
    )
    anchor_weight: float = field(
        default=1.0, metadata={"help": "Weight of benign prompts in `distill`."}
    )
    rank: int | None = field(
        default=None, metadata={"help": "Rank of every delta. Default: the LoRA's own, else 8."}
    )
    exact_svd: bool = field(default=False, metadata={"help": "Truncate by the exact SVD: slow."})
    isolate_from: list[str] = field(
        default_factory=list, metadata={"help": "Task models to isolate the vector from."}
    )
    isolation_rank: int = field(
        default=8, metadata={"help": "Dimension of the task models' subspace in every module."}
    )
    selection: str = field(
        default="activation_contrast",
        metadata={"help": "How layers are selected.", "choices": SELECTIONS.keys()},
    )
    layer_share: float = field(default=0.5, metadata={"help": "Share of the layers that are kept."})
    bootstrap_resamples: int = field(
        default=200, metadata={"help": "Resamples to see how stable the selection is."}
    )
    harmful_data: str = field(
        default="", metadata={"help": "Harmful prompts, without answers: file or hub id."}
    )
    benign_data: str = field(default="", metadata={"help": "Benign prompts: file or hub id."})
    data_split: str = field(default="train", metadata={"help": "Split of both data sets."})
    num_selection_prompts: int = field(
        default=32, metadata={"help": "Prompts of each kind for layer selection."}
    )
    num_safety_prompts: int = field(
        default=64, metadata={"help": "Harmful prompts stored with the vector."}
    )
    num_benign_prompts: int = field(
        default=64, metadata={"help": "Benign prompts stored with the vector."}
    )
    max_new_tokens: int = field(default=48, metadata={"help": "Length of the stored answers."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per generated batch."})
    dtype: str = field(default="auto", metadata={"help": "Data type to load the models in."})
    weights_dtype: str = field(
        default="float16", metadata={"help": "Data type to store the vector in."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for drawing prompts."})

    RULES: ClassVar[Mapping[str, Rule]] = {
        "output_dir": Rule(syntax=folder),
        "distill_steps": _COUNT,
        "distill_learning_rate": Rule(at_least=0.0),
        "anchor_weight": Rule(at_least=0.0),
        "rank": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "isolation_rank": _COUNT,
        "layer_share": Rule(above=0.0, at_most=1.0),
        "bootstrap_resamples": _COUNT,
        "num_selection_prompts": _COUNT,
        "num_safety_prompts": _COUNT,
        "num_benign_prompts": Rule(at_least=0, at_most=LARGEST_COUNT),
        "max_new_tokens": _COUNT,
        "batch_size": _COUNT,
        "dtype": Rule(choices=DTYPES),
        "weights_dtype": Rule(choices=DTYPES[1:]),
        "seed": Rule(at_least=0, at_most=2**32 - 1),
    }

    @property
    def expanded_blocks(self) -> Blocks | None:
        """The blocks that are replaced by their first-order expansion; None unless the method
        expands some.
        """
        return cast(Blocks, self.linearized_blocks) if METHODS[self.method].expands else None

    @property
    def selected_share(self) -> float:
        """Share (0–1] of the layers that are kept: all of them, whatever `layer_share`, where
        `selection` says so.
        """
        return 1.0 if self.selection == "all" else self.layer_share

    def check(self) -> None:
        """Checks every value.

        Raises:
            ConfigError: One is missing or impossible.
        """
        for name in (
            "aligned_model",
            "degraded_model",
            "output_dir",
            "harmful_data",
            "benign_data",
        ):
            if not getattr(self, name):
                raise ConfigError(f"`{name}` is not set.")
        check_values(self)
