"""What a safety step is given and what it finds, whatever the fine-tune is: live in this job, or
stored on a disk.
"""

import json
import logging
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints.checkpoint_folder import CheckpointFolder
from ..checkpoints.contents import CHECKPOINT
from ..checkpoints.hub import check_hub
from ..checkpoints.loading import stored_vocabulary
from ..checkpoints.merge_terms import ScaledVector
from ..checkpoints.places import check_places
from ..checkpoints.portable_files import written_template
from ..checkpoints.preflight import check_output, check_writable
from ..checkpoints.renaming import moved_aside, temporary_folder
from ..checkpoints.write_errors import writing
from ..config.search import Granularity
from ..config.settings import SafeGeneConfig
from ..distributed.layouts import Sharding
from ..errors import UnsupportedModelError
from ..models.data_types import WrittenTypes
from ..models.parameters import canonical_modules, vocabulary_rows
from ..models.supported import check_adapter_layers, check_experts, check_untied
from ..provenance import check_base, sha256_of_bytes, sha256_of_file, software_versions
from ..reporting.clock import PhaseClock
from ..reporting.report import Report
from ..vectors.family import Family
from ..vectors.safety_vector import SafetyVector
from .audited import check_audit
from .decision import Decision
from .history import base_warnings, history_warnings, read_history
from .lineage import (
    Carried,
    Coefficients,
    TouchUpMark,
    carried_coefficients,
    carries_vector,
    mark,
)
from .notification import check_webhook


logger = logging.getLogger(__name__)
TRAINERS_OUTPUT, FINE_TUNE = "the trainer's `output_dir`", "the fine-tune"
_SHOWN_TOKENS = 8


@dataclass(frozen=True)
class Origin:
    """Where a fine-tune comes from.

    Attributes:
        base: Directory or hub id of the checkpoint that it started from, None where it is not
            known.
        revision: Its revision.
        kind: `lora` or `full`.
        places: Folders and files that it was made from or lies in, by what they are: none of them
            may be lost.
    """

    base: str | None
    revision: str | None
    kind: str
    places: Mapping[str, str | Path] = field(default_factory=dict)


@dataclass(frozen=True)
class InputModel:
    """The model that a step is for.

    Attributes:
        model: As it is now, live or without weights; it is left as it is.
        processor: Its tokenizer, or the processor that holds it; saved with the checkpoint.
        origin: Where the fine-tune comes from.
        loaded: Where the host may have widened weights to spread them: the data types that they had
            before, by checkpoint name.
    """

    model: nn.Module
    processor: Any
    origin: Origin
    loaded: Mapping[str, torch.dtype] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which writes prompts in the chat template that trainers and servers use:
        a processor's own one, where it has one.
        """
        tokenizer: PreTrainedTokenizerBase = getattr(self.processor, "tokenizer", self.processor)
        if (template := written_template(self.processor)) == tokenizer.chat_template:
            return tokenizer
        own = copy(tokenizer)  # the trainer's stays as it is
        own.chat_template = template
        return own

    def written_types(self, config: SafeGeneConfig) -> WrittenTypes:
        """In which data types its tensors are written."""
        return WrittenTypes.of_model(self.model, config.output.dtype, self.loaded)


@dataclass
class Plan:
    """All that a safety step needs beside the fine-tune, read and checked before the first training
    step.

    Attributes:
        processor: What is saved with the checkpoint: the tokenizer, or the processor that holds it.
        types: In which data types a merged checkpoint is written.
        granularity: Of the coefficients.
        carried: Coefficients with which the model's weights hold the vector already, by name.
        report: What is known so far; the whole report in the end, also after a failure.
    """

    config: SafeGeneConfig
    vector: SafetyVector
    tokenizer: PreTrainedTokenizerBase
    processor: Any
    target: Path
    sharding: Sharding
    origin: Origin
    types: WrittenTypes
    granularity: Granularity
    carried: Carried
    report: Report
    clock: PhaseClock

    def find_carried(self, model: nn.Module, granularity: Granularity) -> None:
        """Reads what the weights hold of the vector already, and what confirms that.

        Raises:
            FamilyError: They hold another vector, or what they say of this one cannot be right.
        """
        self.granularity = granularity
        base, revision = self.origin.base, self.origin.revision
        self.carried = carried_coefficients(
            model, self.vector, granularity, self.config, base, revision
        )
        self.report.warnings += self.carried.warnings
        self.report.base["carried"] = self.carried.record
        if self.carried.touch_ups:
            self.report.base["touch_ups"] = self.carried.touch_ups

    def warn(self) -> None:
        """Says on rank 0 what is right but surprising, as far as it is known; the report has it too."""
        for warning in self.report.warnings if self.sharding.is_main else ():
            logger.warning("%s", warning)

    @property
    def merges(self) -> bool:
        """Whether a full checkpoint is written."""
        return self.config.output.output_format in ("merged", "both")

    def adapter_place(self, folder: Path) -> Path | None:
        """Where in the output the adapter goes, None where there is none."""
        places = {"adapter": folder, "both": folder / "adapter"}
        return places.get(self.config.output.output_format)

    def merged_folder(self, folder: Path, found: "Found") -> CheckpointFolder:
        """The full checkpoint that holds what was found, and what its weights held before."""
        size = self.config.output.max_shard_size
        touch_ups = [*self.carried.touch_ups, *([found.touch_up.mark] if found.touch_up else [])]
        says = mark(self.vector, found.coefficients, touch_ups)
        return CheckpointFolder(folder, self.processor, size, says)


@dataclass(frozen=True)
class LearnedTouchUp:
    """A touch-up that is released.

    Attributes:
        rank: Of its factors.
        content: Its factors as a safetensors file.
    """

    rank: int
    content: bytes

    @cached_property
    def mark(self) -> TouchUpMark:
        """What `config.json` and the report say of it."""
        return {"rank": self.rank, "sha256": sha256_of_bytes(self.content)}


@dataclass
class Found:
    """What a step has found for a fine-tune.

    Attributes:
        coefficients: λ by name, of the whole vector.
        decision: What becomes of the fine-tune.
        added: What the weights still lack: of the vector, and of a touch-up.
        scale: Share (0–1) of what the search found that was kept.
        touch_up: What was learned beside the vector; None where nothing was.
    """

    coefficients: Coefficients
    decision: Decision
    added: ScaledVector
    scale: float = 1.0
    touch_up: LearnedTouchUp | None = None


class FineTune(Protocol):
    """A finished fine-tune that the step works on."""

    def keep(self) -> Path | str:
        """Where the plain fine-tune lies on a disk; it is put there if it is only in memory."""
        ...

    def find(self) -> Found:
        """Coefficients and decision; what was found goes into the report as it comes."""
        ...

    def write(self, folder: Path, found: Found) -> dict[str, str]:
        """Writes the checkpoint into a folder that has nothing but that in the end; returns the
        SHA-256 of those of its files that were hashed while they were written, by name.
        """
        ...

    def compare(self, folder: Path) -> dict[str, Any]:
        """Reads back what was written, and says how far it is from what was measured."""
        ...


def check_base_vocabulary(model: nn.Module, origin: Origin) -> None:
    """Raises `UnsupportedModelError` where an adapter on the base model that a LoRA started from
    would lack the embeddings of another vocabulary.
    """
    if origin.kind != "lora":
        return
    before, now = stored_vocabulary(origin.base, origin.revision), vocabulary_rows(model)
    if before not in (None, now):
        raise UnsupportedModelError(
            f"The fine-tune has a vocabulary of {now} tokens and its base model {origin.base} one of {before}, which no low-rank "
            "delta can hold: set `output.output_format: merged`."
        )


def load_vector(config: SafeGeneConfig) -> SafetyVector:
    """The configured vector.

    Raises:
        SignatureError: It is not signed as configured.
        VectorError: It cannot be read.
    """
    return SafetyVector.from_pretrained(
        config.vector, revision=config.vector_revision, public_key=config.public_key
    )


def read_vector(
    config: SafeGeneConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[SafetyVector, Family, list[str]]:
    """The configured vector, the model's family, and warnings.

    Raises:
        SignatureError: The vector is not signed as configured.
        VectorError: The vector cannot be read.
        FamilyError: The model is not of its family.
    """
    vector = load_vector(config)
    family = Family.of(model, tokenizer)
    warnings = vector.family.check_member(family)
    vector.check_fits(canonical_modules(model))
    check_untied(model, vector.deltas)
    check_experts(model, vector.deltas, config.output.output_format == "merged")
    if config.output.output_format != "merged":
        check_adapter_layers(model, vector.deltas)
    return vector, family, warnings


def plan_step(
    config: SafeGeneConfig,
    input_model: InputModel,
    target: Path,
    sharding: Sharding,
    needed_bytes: int,
) -> Plan:
    """Reads and checks what every step needs: vector, family, places, base, history. Writes nothing
    that stays.

    Collective: every rank calls it, and if it fails on one it raises on all.

    Args:
        config: What to do.
        input_model: The model; only its names and shapes matter here.
        target: Folder of the checkpoint to be.
        sharding: How the model is spread over ranks.
        needed_bytes: Size of what will be written.

    Raises:
        SafeGeneError: One of its kinds, saying what to do.
    """
    clock, origin = PhaseClock(), input_model.origin
    with clock.phase("prepare"):
        with sharding.raising_together():
            vector, family, warnings = read_vector(config, input_model.model, input_model.tokenizer)
            audited = check_audit(config, vector)
            if sharding.is_main:
                check_webhook()
                try_output(config, input_model, target, needed_bytes)
        # the hub is asked, and a large local checkpoint is hashed
        with sharding.on_main_rank() as working:
            if working and config.output.hub_model_id:
                check_hub(config.output.hub_model_id)
            # that a quantised base was made of the one it is merged into is checked number by number
            named = config.output.merge_base
            base = check_base(
                named or origin.base,
                None if named else origin.revision,
                vector.aligned_model,
                config.allow_other_base,
                working,
                carries_vector(input_model.model),
            )
        with sharding.raising_together():
            if sharding.is_main and config.output.history:
                warnings += history_warnings(Path(config.output.history))
                warnings += base_warnings(read_history(Path(config.output.history)), base)
    sharding.check_same("SafeGene settings", json.dumps(config.to_dict(), sort_keys=True))
    sharding.check_same("a safety vector", json.dumps(vector.files, sort_keys=True))
    report = Report(
        config=config.to_dict(),
        vector=_vector_record(config, vector) | audited,
        base=base,
        model={
            "kind": origin.kind,
            **family.to_dict(),
            "added_tokens": _added_tokens(vector, family),
        },
        launch=sharding.describe(),
        software=software_versions(),
        warnings=warnings,
        phases=clock.phases,
    )
    return Plan(
        config,
        vector,
        input_model.tokenizer,
        input_model.processor,
        target,
        sharding,
        origin,
        input_model.written_types(config),
        config.search.granularity,
        Carried({}),
        report,
        clock,
    )


def _added_tokens(vector: SafetyVector, family: Family) -> dict[str, Any]:
    """What the report says of the tokens that the fine-tune's tokenizer has beyond the vector's
    family.
    """
    added = vector.family.added_tokens(family) or []
    return {"count": len(added), "first": added[:_SHOWN_TOKENS]}


def _vector_record(config: SafeGeneConfig, vector: SafetyVector) -> dict[str, Any]:
    """What the report says of the vector: as it was named, whose signature it has, what it is."""
    key = config.public_key
    return {
        "name": config.vector,
        "revision": config.vector_revision,
        "signed_by": None if key is None else sha256_of_file(Path(key)),
        **vector.describe(),
    }


def try_output(
    config: SafeGeneConfig, input_model: InputModel, target: Path, needed_bytes: int
) -> None:
    """Does what the end will do, so that what could fail there fails now.

    Raises:
        OutputError: The output cannot be written, or would cost an input.
    """
    inputs: dict[str, Any] = {
        "the safety vector": config.vector,
        "the history": Path(config.output.history) if config.output.history else None,
        "the public key": config.public_key,
        "the audit": config.gate and config.gate.audit,
        "the safety data": config.data.safety_data,
        "the task data": config.data.task_data,
        "the earlier release": config.search.warm_start,
        "the base model": input_model.origin.base,
        "the 16-bit base model": config.output.merge_base,
        **input_model.origin.places,
    }
    if config.gate:
        inputs["the gate's data"] = [config.gate.harmful_data, config.gate.benign_data]
    check_places(target, inputs, inside_ok=(TRAINERS_OUTPUT, FINE_TUNE))
    check_output(target, needed_bytes, restore_earlier=not config.dry_run)
    if config.output.history:
        check_writable(Path(config.output.history))
    with writing(), temporary_folder(target) as folder:  # on the disk that it will be written to
        checkpoint = CheckpointFolder(folder, input_model.processor, config.output.max_shard_size)
        checkpoint.save_record(input_model.model)


def dry_run_message(target: Path) -> str:
    """What a dry run says when all is well."""
    said = f"Dry run: all checks passed; the safeguarded checkpoint would go to {target}."
    if earlier := moved_aside(target, CHECKPOINT):
        said += f" An earlier one, which a killed run had moved to {earlier.name}, would be put back first."
    return said
