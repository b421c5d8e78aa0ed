"""The two models of a transport, each loaded alone: what they have in mind of anchors and prompts."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...checkpoints.loading import load_placed, load_tokenizer
from ...checkpoints.stored_model import StoredModel
from ...data.prompt_style import target_style
from ...distributed.layouts import Sharding
from ...errors import ConfigError, FamilyError
from ...judges.refusal_phrases import is_refusal
from ...models.attachment import VectorAttachment
from ...models.batch_size import EXTRACTION, ON_CPU, halving
from ...models.generation import answers_to_tokens
from ...models.names import layer_ranges
from ...models.parameters import canonical_modules
from ...models.reasoning import PromptStyle
from ...models.residual import bent_layers, decoder_layers, residual_writers
from ...provenance import model_reference, same_weights
from ...vectors.family import Family
from ...vectors.record import shares_of_one
from ...vectors.safety_vector import SafetyVector
from ..config import ExtractionConfig
from .detectors import ANCHORS
from .states import Reader, Rows, record


logger = logging.getLogger(__name__)

_ASKED, _NEW_TOKENS = 32, 32  # of a source and its degraded model, to tell which is which


@dataclass(frozen=True)
class Texts:
    """What both models read: benign anchors, and harmful and benign prompts, each one user turn."""

    anchors: list[str]
    harmful: list[str]
    benign: list[str]

    def kinds(self) -> dict[str, list[str]]:
        """By kind."""
        return {"anchors": self.anchors, "harmful": self.harmful, "benign": self.benign}


@dataclass(frozen=True)
class SourceStates:
    """What the source has in mind; on disk, and in rank 0 alone.

    Attributes:
        anchors: Of the anchors, by layer.
        harmful: Of the harmful prompts.
        benign: Of the benign ones.
        other: Of both kinds of prompts, of the degraded source or of the one with its vector; none
            where the direction is taken from the source alone.
        sign: +1 where `other` has more of the direction than the source, −1 where less.
    """

    anchors: list[Rows]
    harmful: list[Rows]
    benign: list[Rows]
    other: tuple[list[Rows], list[Rows]] | None
    sign: float

    def looked_at(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """`g` of harmful and of benign prompts (`directions.py`), prompts×hidden."""
        found = [self.harmful[layer].read(), self.benign[layer].read()]
        if self.other is not None:
            found = [
                self.sign * (side[layer].read() - own)
                for side, own in zip(self.other, found, strict=True)
            ]
        return found[0], found[1]


@dataclass(frozen=True)
class TargetStates:
    """What the target has in mind; on disk, and in rank 0 alone.

    Attributes:
        anchors: Of the anchors, by layer.
        harmful: Of the harmful prompts.
        benign: Of the benign ones.
        inputs: By kind of texts, module and pooling the inputs of the modules that write to the
            residual stream.
    """

    anchors: list[Rows]
    harmful: list[Rows]
    benign: list[Rows]
    inputs: dict[str, dict[tuple[str, str], Rows]]

    def detecting(self, module: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """What the detector of a module is made of."""
        harmful, benign = (self.inputs[kind][module, "last"] for kind in ("harmful", "benign"))
        others = [
            self.inputs["anchors"][module, "last"],
            self.inputs["anchors"][module, "mean"],
            self.inputs["benign"][module, "mean"],
        ]
        return harmful.read(), benign.read(), [rows.read() for rows in others]


def check_other_family(config: ExtractionConfig) -> None:
    """Raises `FamilyError` where source and target are of one family."""
    source, target = (
        Family.of(StoredModel.open(name, revision).model, load_tokenizer(name, revision))
        for name, revision in (
            (config.source_model, config.source_revision),
            (config.aligned_model, config.aligned_revision),
        )
    )
    if (source.architecture, source.fingerprint, source.tokenizer) == (
        target.architecture,
        target.fingerprint,
        target.tokenizer,
    ):
        use = (
            f"{config.source_vector} fits it as it is"
            if config.source_vector
            else "make a vector of the two by `method: delta`"
        )
        raise FamilyError(
            f"{config.source_model} and {config.aligned_model} are one family, so nothing has to be carried over: {use}."
        )


def read_source_vector(config: ExtractionConfig) -> SafetyVector:
    """The source's safety vector, which is seen to be of the source.

    Raises:
        FamilyError: It is of another family, or was made from other weights.
        VectorError: It is missing, altered or truncated.
    """
    vector = SafetyVector.from_pretrained(
        config.source_vector, revision=config.source_vector_revision
    )
    name, revision = config.source_model, config.source_revision
    stored = StoredModel.open(name, revision)
    vector.family.check_member(Family.of(stored.model, load_tokenizer(name, revision)))
    same = same_weights(model_reference(name, revision), vector.aligned_model)
    if same is False and not config.allow_other_base:
        raise FamilyError(
            f"{name} has other weights than the aligned model that {config.source_vector} was made from: give that one as "
            "`source_model`, or set `allow_other_base: true` where its weights are the same and stored otherwise."
        )
    return vector


def source_style(config: ExtractionConfig) -> PromptStyle:
    """How prompts are put to the source: as its own template has them, at the answer."""
    tokenizer = load_tokenizer(config.source_model, config.source_revision)
    return target_style(tokenizer, {}, "answer", "safety_target")


def read_source(
    config: ExtractionConfig,
    texts: Texts,
    vector: SafetyVector | None,
    folder: Path,
    job: Sharding,
) -> SourceStates:
    """What the source has in mind of the texts. Collective.

    Args:
        config: Which models, and how states are pooled.
        texts: What they read.
        vector: That of the source, where the direction is what it adds.
        folder: For the states.
        job: The processes of this job.

    Raises:
        FamilyError: A state is not finite, or the degraded model is of another family.
        ConfigError: The degraded model refuses more than the source.
    """
    style = source_style(config)
    reader = _loaded(config.source_model, config.source_revision, config.dtype, style, job)
    own = _states(reader, texts.kinds(), folder / "source", config.state_pooling)
    prompts = {"harmful": texts.harmful, "benign": texts.benign}
    other, sign = None, 1.0
    if vector is not None:
        vector.check_fits(canonical_modules(reader.model))
        space = vector.space("layer")
        attachment = VectorAttachment(reader.model, vector.deltas, space, reader.sharding)
        shares = shares_of_one(vector.extraction, vector.rank)
        parts = [
            share
            for share, rank in zip(shares, vector.components, strict=True)
            for _ in range(rank)
        ]
        values = space.values(
            {
                name: part
                for own in space.modules.values()
                for name, part in zip(own, parts, strict=True)
            }
        )
        with torch.no_grad(), attachment.applied(values.to(reader.sharding.device)):
            other = _states(reader, prompts, folder / "with_vector", config.state_pooling)
    elif config.source_degraded_model:
        refused = _refused(reader, texts.harmful)
        del reader
        gc.collect()
        name, revision = config.source_degraded_model, config.source_degraded_revision
        degraded = _loaded(name, revision, config.dtype, style, job)
        weakened = _refused(degraded, texts.harmful)
        other, sign = _states(degraded, prompts, folder / "degraded", config.state_pooling), -1.0
        with job.raising_together():
            _check_pair(config, own["harmful"], other["harmful"])
            _check_order(config, refused, weakened)
    pair = None if other is None else (other["harmful"], other["benign"])
    return SourceStates(own["anchors"], own["harmful"], own["benign"], pair, sign)


def _check_pair(config: ExtractionConfig, own: Sequence[Rows], other: Sequence[Rows]) -> None:
    if [rows.width for rows in own] != [rows.width for rows in other]:
        raise FamilyError(
            f"{config.source_degraded_model} has other layers than {config.source_model}: give the same model with weakened "
            "refusals as `source_degraded_model`."
        )


def _refused(reader: Reader, harmful: Sequence[str]) -> int:
    """How many of the first harmful prompts a model refuses. Collective."""
    tokens, sharding = reader.tokens(harmful[:_ASKED]), reader.sharding

    def answers(size: int) -> list[str]:
        return answers_to_tokens(
            reader.model, reader.tokenizer, tokens, _NEW_TOKENS, size, sharding
        )

    return sum(
        map(is_refusal, sharding.gather_texts(halving(ON_CPU, answers, sharding, EXTRACTION)))
    )


def _check_order(config: ExtractionConfig, refused: int, weakened: int) -> None:
    """Raises `ConfigError` where the direction would point away from refusals."""
    if weakened > refused:
        raise ConfigError(
            f"{config.source_degraded_model} refuses {weakened} of the harmful prompts that both were asked, and {config.source_model} "
            f"{refused}: the direction would take refusals away. Give the model with more refusals as `source_model`, and the "
            "weakened one as `source_degraded_model`."
        )


def read_target(
    config: ExtractionConfig, reader: Reader, texts: Texts, folder: Path
) -> TargetStates:
    """What the target has in mind of the texts. Collective.

    Args:
        config: How states are pooled.
        reader: The target.
        texts: What it reads.
        folder: For the states.

    Raises:
        FamilyError: A state is not finite.
        UnsupportedModelError: No module is known to write to the residual stream.
    """
    layers = {str(index): layer for index, layer in decoder_layers(reader.model).items()}
    writers = residual_writers(reader.model)
    _warn_of_bent_layers(reader, texts)
    found: dict[str, list[Rows]] = {}
    inputs: dict[str, dict[tuple[str, str], Rows]] = {}
    for kind, own in texts.kinds().items():
        place = folder / "target" / kind
        place.mkdir(parents=True)
        many = ANCHORS if kind == "anchors" else len(own)
        rows = record(reader, own, place, layers, writers, config.state_pooling, many)
        found[kind] = _by_layer(rows, layers, config.state_pooling)
        inputs[kind] = {key: each for key, each in rows.items() if key[0] in writers}
    return TargetStates(found["anchors"], found["harmful"], found["benign"], inputs)


def _warn_of_bent_layers(reader: Reader, texts: Texts) -> None:
    """Says where directions do not come out as they are written. Collective."""
    tokens = reader.tokens(texts.benign[:1])
    bent = bent_layers(reader.model, torch.tensor(tokens).to(reader.sharding.device))
    reader.sharding.reshard()
    if bent and reader.sharding.is_main:
        logger.warning(
            "In layers %s of %s a norm, a factor or experts stand between what these modules write and what the model gets: "
            "the direction comes out scaled and bent there, and the coefficients make up for the scale alone.",
            layer_ranges(bent),
            reader.name,
        )


def _loaded(
    name: str, revision: str | None, dtype: str, style: PromptStyle, job: Sharding
) -> Reader:
    model, sharding = load_placed(name, revision, dtype, job)
    tokenizer = load_tokenizer(name, revision)
    return Reader(name, model, tokenizer, sharding, style)


def _states(
    reader: Reader, kinds: dict[str, list[str]], folder: Path, pooling: str
) -> dict[str, list[Rows]]:
    layers: dict[str, nn.Module] = {
        str(index): layer for index, layer in decoder_layers(reader.model).items()
    }
    found = {}
    for kind, texts in kinds.items():
        place = folder / kind
        place.mkdir(parents=True)
        rows = record(reader, texts, place, layers, {}, pooling, 0)
        found[kind] = _by_layer(rows, layers, pooling)
    return found


def _by_layer(
    rows: dict[tuple[str, str], Rows], layers: dict[str, nn.Module], pooling: str
) -> list[Rows]:
    """In the order of the layers; empty in all ranks but the first."""
    return [rows[name, pooling] for name in layers if (name, pooling) in rows]
