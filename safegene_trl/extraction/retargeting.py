"""New prompts for a safety vector that is there already: soft targets, border prompts and prompts to
measure on, by its aligned model alone. Its weights stay as they are, byte for byte, unless it is
split by category.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.loading import load_placed, load_tokenizer
from ..checkpoints.stored_model import StoredModel
from ..distributed.layouts import Sharding
from ..errors import CalibrationDataError, FamilyError
from ..models.low_rank import LowRankDelta
from ..provenance import model_reference, same_weights, sha256_of_bytes
from ..vectors.family import Family
from ..vectors.files import CONFIG_FILE, WEIGHTS_FILE, read_files
from ..vectors.prompt_rows import rows_of
from ..vectors.record import VectorRecord, extractions, read_record
from ..vectors.safety_vector import SafetyVector
from .aligned_rows import Inputs, answered, prompts_to_measure_on, with_targets
from .by_category import ByCategory, split_by_category
from .config import ExtractionConfig
from .covering import check_cover
from .prompts import ExtractionPrompts
from .soundness import check_runs, in_dtype


logger = logging.getLogger(__name__)
Rows = list[dict[str, Any]]
Reference = dict[str, Any]


@dataclass(frozen=True)
class KnownVector:
    """A vector as it was read.

    Attributes:
        contents: Its files' bytes, by name.
        record: What they say, checked.
        learned: Its prompts to learn from.
        measured: Those to measure on that are kept: none where others take their place.
    """

    contents: Mapping[str, bytes]
    record: VectorRecord
    learned: Rows
    measured: Rows

    @classmethod
    def read(cls, config: ExtractionConfig) -> "KnownVector":
        """The one that a config names.

        Raises:
            VectorError: It is missing, altered or truncated.
        """
        contents = read_files(config.vector, revision=config.vector_revision)
        record = read_record(contents, config.vector)
        learned = rows_of(record.prompts, "harmful", "benign", "border")
        measured = [] if config.test_harmful_data else rows_of(record.prompts, "measure")
        return cls(contents, record, learned, measured)

    def check_splittable(self, config: ExtractionConfig) -> None:
        """Raises `FamilyError` for a vector that is by category already."""
        made = self.record.extraction
        if any("by_category" in each for each in (made, *extractions(made))):
            raise FamilyError(
                f"{config.vector} is by category already: split the vector that it was made from, or leave out `by_category`."
            )

    def settings(self, config: ExtractionConfig) -> ExtractionConfig:
        """The config with prompts written as the vector's own were.

        Raises:
            FamilyError: Those of its components were written in unlike ways.
        """
        extraction = self.record.extraction
        written = [_written(part["extraction"]) for part in extraction.get("vectors", [])]
        if any(own != written[0] for own in written):
            raise FamilyError(
                f"The prompts of the components of {config.vector} were written in unlike ways: give each component its soft "
                "targets, then combine them."
            )
        options, target = _written(extraction)
        return replace(config, chat_template_kwargs=options or None, safety_target=target)

    def prompts(self, config: ExtractionConfig) -> ExtractionPrompts:
        """Those to add.

        Raises:
            CalibrationDataError: They cannot be read, or there is nothing to do.
        """
        stored, measured = (
            [row["prompt"] for row in rows] for rows in (self.learned, self.measured)
        )
        found = ExtractionPrompts.read(config, stored, measured)
        if all("targets" in row for row in self.learned) and not (
            any(found.to_answer()) or found.tests or config.by_category
        ):
            raise CalibrationDataError(
                f"Every prompt of {config.vector} has soft targets, and there are no others: name further prompts as `harmful_data`, "
                "`benign_data`, `test_harmful_data` and `test_benign_data`, or leave the vector as it is."
            )
        return found


def _written(extraction: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    return (
        dict(extraction.get("chat_template_kwargs", {})),
        extraction.get("safety_target", "answer"),
    )


def retarget(config: ExtractionConfig, job: Sharding) -> SafetyVector | None:
    """Makes the prompts of `config.vector` anew and saves nothing. Collective; rank 0 has the vector
    then, the others None.

    Its prompts are kept with their answers; those without soft targets get them. Prompts of the
    config's data sets are added as by an extraction, but those that the vector has. Prompts to
    measure on take the place of its own where the config names such.

    Args:
        config: Which vector, which aligned model, which prompts.
        job: The processes of this job, from `this_job`.

    Raises:
        SafeGeneError: One of its kinds: the vector, the model or the data do not fit.
    """
    with job.raising_together():
        config.check()
        known = KnownVector.read(config)
        check_cover(config, known.record.files[WEIGHTS_FILE]["sha256"])
        config = known.settings(config)
        prompts = known.prompts(config)
        by = prompts.by_category(known.learned)
        if by is not None:
            known.check_splittable(config)
        tokenizer = load_tokenizer(config.aligned_model, config.aligned_revision)
        style = config.target(tokenizer)
        asked = check_aligned(config, known.record, tokenizer) if job.is_main else {}
    job.check_same("a safety vector", json.dumps(known.record.files, sort_keys=True))
    inputs = Inputs(config, tokenizer, prompts, job, style)
    model, sharding = load_placed(
        config.aligned_model, config.aligned_revision, config.dtype, inputs.job
    )
    text = known.record.prompts[0]["prompt"]
    check_runs(model, tokenizer, text, sharding, config.aligned_model)
    further: Rows = []
    if any(prompts.to_answer()):
        further = answered(inputs, model, sharding, may_refuse_none=True)
    rows = with_targets(inputs, model, [*known.learned, *further], sharding)
    tests, test_record = prompts_to_measure_on(inputs, model, sharding)
    vector = SafetyVector.from_files(known.contents, config.vector)
    if by is not None:
        deltas = {name: LowRankDelta(d.a.float(), d.b.float()) for name, d in vector.deltas.items()}
        made = split_by_category(deltas, by, model, tokenizer, style, sharding)
        vector = _by_category(vector, made)
    if not job.is_main:
        return None
    count = len(known.learned)
    _tell(config, known, rows[:count])
    added = prompts.with_categories([*rows[count:], *tests])
    origin = _origin(config, known, asked) | {
        "prompts": prompts.further_record() | prompts.cover_record(further)
    }
    return vector.with_prompts(
        known.contents[WEIGHTS_FILE] if by is None else None,
        _in_order([*rows[:count], *known.measured, *added]),
        vector.extraction | {"weights_from": origin},
        _selection(known, prompts, further) | test_record,
    )


def _by_category(vector: SafetyVector, made: ByCategory) -> SafetyVector:
    """The vector with the deltas by category, in its own data type."""
    dtype = next(iter(vector.deltas.values())).a.dtype
    return replace(
        vector,
        deltas=in_dtype(made.deltas, dtype),
        extraction=vector.extraction | made.record,
    )


def check_aligned(config: ExtractionConfig, record: VectorRecord, tokenizer: Any) -> Reference:
    """The reference of the aligned model, which is seen to be the vector's own.

    Raises:
        FamilyError: It is of another family, its chat template is another one, or its weights are.
    """
    stored = StoredModel.open(config.aligned_model, config.aligned_revision)
    if record.family.check_member(Family.of(stored.model, tokenizer)):
        raise FamilyError(
            f"The chat template of {config.aligned_model} differs from the one that {config.vector} was made with, so its answers "
            "may be others: give the aligned model with its own template."
        )
    reference = model_reference(config.aligned_model, config.aligned_revision)
    same = same_weights(reference, record.aligned_model)
    if not same and not config.allow_other_base:
        what = (
            "has other weights than the aligned model that"
            if same is False
            else "cannot be compared by its files' hashes with the aligned model that"
        )
        raise FamilyError(
            f"{config.aligned_model} {what} {config.vector} was made from: give that one as `aligned_model`, or set "
            "`allow_other_base: true` where its weights are the same and stored otherwise."
        )
    return reference


def _tell(config: ExtractionConfig, known: KnownVector, rows: Sequence[Mapping[str, Any]]) -> None:
    """What somebody may not expect of the new vector."""
    unlike = sum("targets" not in row for row in rows)
    if unlike:
        logger.warning(
            "%s of %s answers of %s begin with what this aligned model would not say: they stay without soft targets.",
            unlike,
            len(rows),
            config.vector,
        )
    if known.record.signature is not None:
        logger.warning(
            "The signature of %s is of its former prompts and is not carried over: sign the new vector by `safegene sign`.",
            config.vector,
        )


def _origin(config: ExtractionConfig, known: KnownVector, asked: Reference) -> dict[str, Any]:
    """Which vector the weights are from, and which model was asked where it is not plainly its own."""
    record, place = known.record, Path(config.vector)
    before = record.extraction.get("weights_from")
    other = not same_weights(asked, record.aligned_model)
    return {
        "name": place.resolve().name if place.is_dir() else config.vector,
        "revision": config.vector_revision,
        "config": sha256_of_bytes(known.contents[CONFIG_FILE]),
        "files": record.files,
        "software": record.software,
        **({"other_base": asked} if other else {}),
        **({"weights_from": before} if before else {}),
    }


def _selection(
    known: KnownVector, prompts: ExtractionPrompts, further: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """The vector's record of its selection, with the categories of the added prompts."""
    found = dict(known.record.selection)
    categories = {name: dict(count) for name, count in found.get("categories", {}).items()}
    for name, count in prompts.refused_by_category(further).items():
        own = categories.setdefault(name, {"asked": 0, "refused": 0})
        for key, number in count.items():
            own[key] += number
    return found | ({"categories": dict(sorted(categories.items()))} if categories else {})


def _in_order(rows: Rows) -> Rows:
    """Harmful prompts first, those to measure on last."""
    return [
        row
        for part in (("harmful",), ("benign", "border"), ("measure",))
        for row in rows_of(rows, *part)
    ]
