"""`ExtractionConfig`: everything that can be set about making a safety vector."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, cast

from transformers import PreTrainedTokenizerBase

from ..config.docstrings import meanings, with_help
from ..config.validation import (
    COUNT_OR_DEFAULT,
    DTYPES,
    LARGEST_COUNT,
    Rule,
    check_values,
    folder,
    named_fields,
    template_options,
)
from ..data.prompt_style import target_style
from ..errors import ConfigError
from ..models.reasoning import REASONING_TOKENS, Answering, PromptStyle
from ..models.template_names import check_names
from ..vectors.prompt_rows import ANSWER_TOKENS
from .linearization import Blocks
from .methods import METHODS
from .selection import SELECTIONS


BATCH = 16  # of prompts on a CPU; of a step's samples anywhere, as what is learned depends on it
_COUNT = Rule(at_least=1, at_most=LARGEST_COUNT)
_FOR_WEIGHTS = ("degraded_model", "harmful_data", "benign_data")  # not needed with `vector`
_OF_A_DIFFERENCE = (  # what only a difference of two models has
    "degraded_model",
    "degraded_revision",
    "linearized_blocks",
    "distill_steps",
    "distill_learning_rate",
    "anchor_weight",
    "rank",
    "exact_svd",
    "isolate_from",
    "isolation_rank",
)
_OF_A_TRANSPORT = (
    "source_model",
    "source_revision",
    "source_degraded_model",
    "source_degraded_revision",
    "source_vector",
    "source_vector_revision",
    "anchor_data",
    "num_anchors",
    "transport_map",
    "map_penalty",
    "layer_matching",
    "state_pooling",
    "min_transport_quality",
)
_OF_THE_VECTOR = (  # what `vector` has settled
    *_OF_A_TRANSPORT,
    *_OF_A_DIFFERENCE,
    "method",
    "selection",
    "layer_share",
    "bootstrap_resamples",
    "num_selection_prompts",
    "chat_template_kwargs",
    "safety_target",
    "weights_dtype",
)


@with_help
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
        vector: A safety vector of the aligned model (directory or hub id) whose weights, layers and
            record of both are kept, in place of a degraded model; what is made anew are the prompts
            that come with it. They are its own, with soft targets, and those of the data sets here.
        vector_revision: Its branch, tag or commit on the hub.
        allow_other_base: Take an aligned model whose weight files are others than those that
            `vector`, or a source model than those that `source_vector`, was made from.
        output_dir: Where the vector goes.
        overwrite_output_dir: Replace a vector that is there.
        method: How the deltas are made: `delta` is the plain weight difference, `distill` learns
            them from there (see docs/vectors.md), and so does `linearized`, on blocks that are
            linear in their weights. `transport` carries the safety direction of `source_model`, of
            any architecture, over to the aligned model, which needs no degraded one then (see
            docs/transport.md).
        linearized_blocks: Blocks that `linearized` expands.
        distill_steps: Optimiser steps of `distill` and `linearized`.
        distill_learning_rate: Learning rate of `distill` and `linearized`.
        anchor_weight: Weight of the term in `distill` and `linearized` that keeps benign answers as
            they are.
        source_model: The aligned model that `transport` carries the direction from: directory or
            hub id. `aligned_model` is the one that gets the vector, aligned or not.
        source_revision: Its branch, tag or commit on the hub.
        source_degraded_model: The source model with weakened refusals, where the direction is the
            difference of the two.
        source_degraded_revision: Its branch, tag or commit on the hub.
        source_vector: A safety vector of the source model, where the direction is what it adds.
        source_vector_revision: Its branch, tag or commit on the hub.
        anchor_data: Benign texts, about 1000 sentences, that the map from the source's states to
            the target's is fitted on: prompts without answers. None may nearly repeat a harmful
            prompt. Default: a thousand sentences of this package.
        num_anchors: How many of them are read, at most.
        transport_map: The map: `procrustes` (a rotation), `ridge` (a regression) or `mlp` (the same
            with a hidden layer on top).
        map_penalty: Ridge penalty of `ridge` and `mlp`, in the mean variance of the source's
            states.
        layer_matching: Which layer of the source a layer of the target takes its direction from:
            that of the same relative `depth`, or that of the most similar states (`cka`).
        state_pooling: The state of a text: at the `last` token of the prompt, or the `mean` over
            what the user says.
        min_transport_quality: Mean cosine (0–1) of mapped and true states of anchors held out, below
            which a layer takes no direction on; where no layer reaches it nothing is made.
        rank: Rank of every delta. Default: the LoRA's own rank, else 8.
        exact_svd: Truncate by the exact SVD instead of the randomised one.
        isolate_from: Fine-tunes of the aligned model (checkpoints or LoRAs) whose directions are
            taken out of the vector.
        isolation_rank: Dimension of the task models' subspace in every module.
        by_category: Make a component of every harm category, with coefficients of its own, and one
            of what they share. Categories are those of the column `category` in the harmful prompts
            that are asked, eight or more of each; `vector` is split where it is set.
        selection: How layers are selected.
        layer_share: Share (0–1] of the layers that are kept.
        bootstrap_resamples: How often the prompts are drawn again to see how stable the selection
            is.
        harmful_data: Harmful prompts: a column `prompt`, no answers needed. With `vector` it may
            be left out.
        benign_data: Benign prompts, look-alikes above all. With `vector` it may be left out.
        cover: An `audit.json` of `safegene audit`. Prompts of `harmful_data` that are of its blind
            spots are added, in the form of the blind spot. With `vector` they are the only ones of
            `harmful_data` that are.
        num_cover_prompts: Prompts that are added for `cover`, at most, as many for every blind
            spot.
        data_split: Split of all the data sets.
        num_selection_prompts: Prompts of each kind that layers are selected by.
        num_safety_prompts: Harmful prompts that the aligned model is asked, as many of every
            category; those that it refuses are stored with the vector.
        num_benign_prompts: Benign prompts stored with the vector, at most, with the aligned model's
            answers, or with its refusals where it refuses them.
        test_harmful_data: Harmful prompts of another source to store for measuring, with what the
            aligned model does and without its answers. None that nearly repeats a prompt of
            `harmful_data` or `benign_data` that is used is stored.
        test_benign_data: The same of benign prompts. Both are set, or neither.
        num_test_prompts: Prompts to measure on, of each kind and at most.
        max_new_tokens: Length of the aligned model's stored answers, in tokens.
        max_reasoning_tokens: Tokens generated for the reasoning before it, of a reasoning model; 0
            puts an empty reasoning there. Default: 0 where the chat template can leave the
            reasoning out, 1024 where it opens one in every prompt or `safety_target` is
            `reasoning`.
        chat_template_kwargs: Arguments for the chat template, e.g. `{"enable_thinking": false}`.
            They are stored with the vector.
        safety_target: What is stored of a reasoning model's answers, and where they begin in what
            is selected and distilled by: the `answer` alone, after an empty reasoning, or the
            `reasoning` with it.
        batch_size: Prompts per generated batch, and samples of an optimiser step of `distill` and
            `linearized`. Default: 16; for prompts, on a GPU, what its free memory is for. Where
            memory runs out fewer are answered at once.
        dtype: Data type to load the models in, e.g. float32.
        weights_dtype: Data type to store the vector in.
        seed: Seed for drawing prompts.

    Raises:
        ConfigError: A name is no setting. Values are checked by `check`, with which `extract`
            begins.
    """

    aligned_model: str = ""
    aligned_revision: str | None = None
    degraded_model: str = ""
    degraded_revision: str | None = None
    vector: str = ""
    vector_revision: str | None = None
    allow_other_base: bool = False
    output_dir: str = ""
    overwrite_output_dir: bool = False
    method: str = field(
        default="delta",
        metadata={
            "choices": METHODS.keys(),
        },
    )
    linearized_blocks: str = field(
        default="both",
        metadata={
            "choices": ["attention", "mlp", "both"],
        },
    )
    distill_steps: int = 60
    distill_learning_rate: float = 1e-4
    anchor_weight: float = 1.0
    source_model: str = ""
    source_revision: str | None = None
    source_degraded_model: str = ""
    source_degraded_revision: str | None = None
    source_vector: str = ""
    source_vector_revision: str | None = None
    anchor_data: str = ""
    num_anchors: int = 1000
    transport_map: str = field(
        default="ridge", metadata={"choices": ["procrustes", "ridge", "mlp"]}
    )
    map_penalty: float = 0.1
    layer_matching: str = field(default="depth", metadata={"choices": ["depth", "cka"]})
    state_pooling: str = field(default="last", metadata={"choices": ["last", "mean"]})
    min_transport_quality: float = 0.3
    rank: int | None = None
    exact_svd: bool = False
    isolate_from: list[str] = field(default_factory=list)
    isolation_rank: int = 8
    by_category: bool = False
    selection: str = field(
        default="activation_contrast",
        metadata={"choices": SELECTIONS.keys()},
    )
    layer_share: float = 0.5
    bootstrap_resamples: int = 200
    harmful_data: str = ""
    benign_data: str = ""
    cover: str = ""
    num_cover_prompts: int = 64
    data_split: str = "train"
    num_selection_prompts: int = 32
    num_safety_prompts: int = 256
    num_benign_prompts: int = 256
    test_harmful_data: str | None = None
    test_benign_data: str | None = None
    num_test_prompts: int = 128
    max_new_tokens: int = ANSWER_TOKENS
    max_reasoning_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    safety_target: str = field(default="answer", metadata={"choices": ["answer", "reasoning"]})
    batch_size: int | None = None
    dtype: str = "auto"
    weights_dtype: str = "float16"
    seed: int = 0

    RULES: ClassVar[Mapping[str, Rule]] = {
        "output_dir": Rule(syntax=folder),
        "distill_steps": _COUNT,
        "distill_learning_rate": Rule(at_least=0.0),
        "anchor_weight": Rule(at_least=0.0),
        "num_anchors": _COUNT,
        "map_penalty": Rule(at_least=0.0),
        "min_transport_quality": Rule(at_least=0.0, at_most=1.0),
        "rank": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "isolation_rank": _COUNT,
        "layer_share": Rule(above=0.0, at_most=1.0),
        "bootstrap_resamples": _COUNT,
        "num_selection_prompts": _COUNT,
        "num_safety_prompts": _COUNT,
        "num_benign_prompts": Rule(at_least=0, at_most=LARGEST_COUNT),
        "test_harmful_data": Rule(may_be_null=True),
        "test_benign_data": Rule(may_be_null=True),
        "num_test_prompts": _COUNT,
        "num_cover_prompts": _COUNT,
        "max_new_tokens": _COUNT,
        "max_reasoning_tokens": COUNT_OR_DEFAULT,
        "chat_template_kwargs": Rule(may_be_null=True),
        "batch_size": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "dtype": Rule(choices=DTYPES),
        "weights_dtype": Rule(choices=DTYPES[1:]),
        "seed": Rule(at_least=0, at_most=2**32 - 1),
    }

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimiser step of the methods that learn."""
        return self.batch_size or BATCH

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

    def target(self, tokenizer: PreTrainedTokenizerBase) -> PromptStyle:
        """The style of prompts whose answer is known.

        Raises:
            ConfigError: Answers with their reasoning are asked for, and the template has none; or
                it never reads one of the arguments.
        """
        check_names(tokenizer, self._options, "`chat_template_kwargs`")
        return target_style(tokenizer, self._options, self.safety_target, "safety_target")

    def answering(self, tokenizer: PreTrainedTokenizerBase) -> Answering:
        """How the aligned model is asked for its answers."""
        most = self.max_reasoning_tokens
        if most is None and self.safety_target == "reasoning":
            most = REASONING_TOKENS
        return Answering.of(tokenizer, self._options, most)

    def measuring(self, tokenizer: PreTrainedTokenizerBase) -> Answering:
        """How the aligned model is asked prompts to measure on: as a safety step asks with as many
        tokens for the reasoning.
        """
        return Answering.of(tokenizer, self._options, self.max_reasoning_tokens)

    @property
    def _options(self) -> dict[str, Any]:
        return template_options("chat_template_kwargs", self.chat_template_kwargs)

    def check(self) -> None:
        """Checks every value.

        Raises:
            ConfigError: One is missing or impossible.
        """
        origin = "source_model" if self.transports else "degraded_model"
        for name in ("aligned_model", origin, "output_dir", "harmful_data", "benign_data"):
            if not getattr(self, name) and not (self.vector and name in _FOR_WEIGHTS):
                meant = meanings(type(self))[name].replace(":", ",")
                raise ConfigError(f"`{name}` is not set: give {meant[0].lower()}{meant[1:]}")
        check_values(self)
        self._check_vector()
        self._check_transport()
        if self.cover and not self.harmful_data:
            raise ConfigError(
                "`cover` is set and `harmful_data` is not: name the prompts that the blind spots are covered from."
            )
        if (self.test_harmful_data is None) != (self.test_benign_data is None):
            there, missing = "test_harmful_data", "test_benign_data"
            if self.test_harmful_data is None:
                there, missing = missing, there
            raise ConfigError(
                f"`{there}` is set and `{missing}` is not: set both, or neither, as both kinds of prompts are measured on."
            )
        template_options("chat_template_kwargs", self.chat_template_kwargs)

    @property
    def transports(self) -> bool:
        """Whether the direction of another model is carried over, and there is no difference."""
        return self.method == "transport" and not self.vector

    def _named(self) -> list[str]:
        """The settings that are not as they are by default."""
        return [
            each.name
            for each in fields(self)
            if getattr(self, each.name) != (each.default if each.default is not MISSING else [])
        ]

    def _check_transport(self) -> None:
        """Raises `ConfigError` for what says nothing with `method: transport`, or nothing without
        it.
        """
        unread = _OF_A_DIFFERENCE if self.transports else _OF_A_TRANSPORT
        for name in self._named():
            if name in unread:
                raise ConfigError(
                    f"`{name}` is set and `method` is `{self.method}`, which does not read it: leave out `{name}`."
                )
        if self.transports and SELECTIONS[self.selection].takes_gradients:
            raise ConfigError(
                f"`selection` is `{self.selection}`, which takes gradients of a degraded model, and a transport has none: use "
                "`activation_contrast` or `all`."
            )
        for name in ("by_category", "cover"):
            if self.transports and getattr(self, name):
                raise ConfigError(
                    f"`{name}` is set and `method` is `transport`: make the vector first, and name it as `vector` in another run."
                )
        if self.source_vector and self.source_degraded_model:
            raise ConfigError(
                "`source_vector` and `source_degraded_model` are both set: leave out one, as the direction is taken from either."
            )
        for name in ("source_vector", "source_degraded_model"):
            revision = name.removesuffix("_model") + "_revision"
            if getattr(self, revision) is not None and not getattr(self, name):
                raise ConfigError(
                    f"`{revision}` is set and `{name}` is not: set both, or leave out `{revision}`."
                )

    def _check_vector(self) -> None:
        """Raises `ConfigError` for what says nothing with `vector`, or nothing without it."""
        for name in self._named():
            if self.vector and name in _OF_THE_VECTOR:
                raise ConfigError(
                    f"`{name}` is set and so is `vector`, which keeps its weights, its layers and the way its prompts are written: leave "
                    f"out `{name}`."
                )
            if name == "allow_other_base" and self.source_vector:
                continue
            if name == "num_cover_prompts" and not self.cover:
                raise ConfigError(
                    "`num_cover_prompts` is set and `cover` is not: set both, or leave out `num_cover_prompts`."
                )
            if not self.vector and name in ("vector_revision", "allow_other_base"):
                raise ConfigError(
                    f"`{name}` is set and `vector` is not: set both, or leave out `{name}`."
                )
