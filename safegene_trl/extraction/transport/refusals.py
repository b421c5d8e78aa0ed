"""The prompts that come with a transported vector: its target's own answers, and where the target has
no refusals of its own, the source's.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...checkpoints.loading import load_placed, load_tokenizer
from ...distributed.layouts import Sharding
from ...errors import FamilyError
from ...models.reasoning import Answering
from ...vectors.prompt_rows import rows_of
from ..aligned_rows import Inputs, answered, with_targets
from ..answers import Asked, own_answers
from ..config import ExtractionConfig


logger = logging.getLogger(__name__)
OWN_SHARE = (
    0.25  # of the harmful prompts asked, that a target refuses whose own refusals are stored
)


@dataclass(frozen=True)
class StoredRows:
    """The rows to learn from, and the record of whose refusals they hold."""

    rows: list[dict[str, Any]]
    record: dict[str, Any]


def stored_rows(inputs: Inputs, model: nn.Module, sharding: Sharding) -> StoredRows:
    """What the target says, with soft targets; its refusals only where it refuses at least a quarter
    of the harmful prompts. Else those are left for `with_refusals`. Collective.
    """
    own = answered(inputs, model, sharding, may_refuse_none=True)
    asked = len(inputs.prompts.to_answer()[0])
    refused = len(rows_of(own, "harmful"))
    record = {"from": "target", "asked": asked, "refused": refused}
    if refused < OWN_SHARE * asked:
        own, record = rows_of(own, "benign", "border"), record | {"from": "source"}
    return StoredRows(with_targets(inputs, model, own, sharding), record)


def with_refusals(config: ExtractionConfig, stored: StoredRows, inputs: Inputs) -> StoredRows:
    """The same with the source's refusals, as words alone, where the target has too few. Collective.

    Raises:
        FamilyError: The source refuses none either.
    """
    if stored.record["from"] == "target":
        return stored
    name, revision = config.source_model, config.source_revision
    model, sharding = load_placed(name, revision, config.dtype, inputs.job)
    tokenizer = load_tokenizer(name, revision)
    asked = Asked(
        Answering.of(tokenizer, {}, config.max_reasoning_tokens),
        config.max_new_tokens,
        may_refuse_none=True,
    )
    harmful = inputs.prompts.to_answer()[0]
    rows = own_answers(model, tokenizer, harmful, [], asked, config.batch_size, sharding)
    refused = rows_of(rows, "harmful")
    if not refused:
        raise FamilyError(
            f"Neither {config.aligned_model} nor {name} refuses harmful prompts, so there are no refusals to learn from: give an "
            "aligned source, or others as `harmful_data`."
        )
    if sharding.is_main:
        logger.warning(
            "%s refuses %s of %s harmful prompts itself: the refusals that come with its vector are those of %s, as words.",
            config.aligned_model,
            stored.record["refused"],
            stored.record["asked"],
            name,
        )
    found: list[dict[str, Any]] = [*refused, *stored.rows]
    return StoredRows(found, stored.record | {"refused_by_source": len(refused)})


def own_rows(stored: StoredRows) -> list[Mapping[str, Any]]:
    """The rows that say what the target itself does."""
    if stored.record["from"] == "target":
        return list(stored.rows)
    return list(rows_of(stored.rows, "benign", "border"))
