"""Asking the models of an audit, one after the other: each is loaded once, and only where labels of
its answers are missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints.folding import fold_adapters
from ..checkpoints.loading import load_placed, load_tokenizer
from ..checkpoints.skeleton import load_skeleton, stores_quantised
from ..checkpoints.source import adapter_base
from ..checkpoints.stored_model import StoredModel
from ..checkpoints.zero_shards import holds_only_zero_shards
from ..data.prompts import check_encoding
from ..distributed.layouts import Sharding
from ..evaluation.config import EvaluationConfig
from ..extraction.config import ExtractionConfig
from ..extraction.retargeting import check_aligned
from ..models.parameters import canonical_modules
from ..models.supported import check_supported
from ..provenance import chat_template_hash, model_reference
from ..vectors.family import Family
from ..vectors.files import WEIGHTS_FILE
from ..vectors.record import read_record
from ..vectors.safety_vector import SafetyVector
from .labels import Labels
from .plan import PlannedAudit
from .variants import WITHOUT, Coefficients, Variant, of_aligned, of_fine_tune, space_of, uniform


@dataclass
class Asked:
    """What was asked.

    Attributes:
        coefficients: Those that were audited.
        models: References of the models, by what they are.
        stand_in: Whether the aligned model without the vector stood in for a fine-tune.
        roles: By role of the audit, whose labels it has.
        warnings: What is right but surprising.
    """

    coefficients: Coefficients
    models: dict[str, Any]
    stand_in: bool
    roles: dict[str, str]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Looked:
    """What is known of a model whose weights are not read yet.

    Attributes:
        name: The model.
        shape: The model without its weights.
        tokenizer: Its tokenizer.
        asking: How it is asked.
        variants: Those that are asked, by role.
        reference: Names it.
        decides: What its answers depend on.
        coefficients: Those that are audited.
        warnings: What is right but surprising.
    """

    name: str
    shape: nn.Module
    tokenizer: PreTrainedTokenizerBase
    asking: EvaluationConfig
    variants: dict[str, Variant]
    reference: Mapping[str, Any]
    decides: Mapping[str, Any]
    coefficients: Coefficients
    warnings: list[str]


def shape_of(name: str, revision: str | None) -> nn.Module:
    """A fine-tune without its weights. Its files are seen to hold all of it, but for packed ones:
    of a checkpoint that bitsandbytes has quantised it is the 16-bit model that this stands for.

    Raises:
        UnsupportedModelError: It cannot be loaded, or nobody can tell its weights exactly.
        CheckpointError: Its files are not the model's.
    """
    base = adapter_base(name, revision)
    shards = base is None and holds_only_zero_shards(Path(name))
    if not shards and not stores_quantised(base or name, None if base else revision):
        return StoredModel.open(name, revision).model
    model = load_skeleton(name, revision, quantised=True)
    check_supported(model)
    return model


@dataclass(frozen=True)
class Asker:
    """Asks models, and keeps labels.

    Attributes:
        plan: What is audited, how, and with which prompts.
        labels: Where labels go.
        job: This process.
    """

    plan: PlannedAudit
    labels: Labels
    job: Sharding

    def ask_all(self) -> Asked:
        """Asks the aligned model with and without the vector, then the fine-tune with and without
        it.

        Raises:
            SafeGeneError: One of its kinds: models, vector or prompts do not fit.
        """
        models = look_at_models(self.plan)  # all of them before hours are spent on one
        for each in models:
            self._ask(each)
        aligned, last = models[0], models[-1]
        if len(models) == 1:
            roles = {"aligned": "aligned", "fine_tune": WITHOUT, "safeguarded": "safeguarded"}
            return Asked(last.coefficients, {"aligned": aligned.reference}, True, roles)
        roles = {role: role for role in ("aligned", "fine_tune", "safeguarded")}
        named = {"aligned": aligned.reference, "fine_tune": last.reference}
        return Asked(last.coefficients, named, False, roles, last.warnings)

    def _ask(self, looked: Looked) -> None:
        """Labels of one model's answers in all its variants."""
        asking, variants, vector = looked.asking, looked.variants, self.plan.vector
        prompts, tokenizer = self.plan.found.prompts, looked.tokenizer
        files = {"files": looked.decides.get("files", looked.decides)}
        for role, variant in variants.items():
            self.labels.begin(role, self._deciding(asking, tokenizer, variant) | files)
        if not any(self.labels.missing(role, prompts) for role in variants):
            return
        model, sharding = load_placed(
            asking.model_name_or_path,
            asking.model_revision,
            asking.dtype,
            self.job,
            asking.allow_pickled_shards,
        )
        fold_adapters(model, sharding)
        vector.check_fits(canonical_modules(model))
        space = space_of(vector)
        for role, variant in variants.items():
            with variant.applied(model, vector, space, sharding):
                self.labels.ask(role, prompts, model, tokenizer, asking, sharding)

    def _deciding(
        self, asking: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, variant: Variant
    ) -> dict[str, Any]:
        """What an answer depends on, beside the model's files."""
        return {
            **asking.deciding_answers,
            **asking.answering(tokenizer).record,
            "chat_template": chat_template_hash(tokenizer),
            "vector": self.plan.vector.files[WEIGHTS_FILE]["sha256"] if variant.record else None,
            "variant": variant.record,
        }


def look_at_models(plan: PlannedAudit) -> list[Looked]:
    """The aligned model and, where there is one, the fine-tune, before any of their weights is read.

    Raises:
        SafeGeneError: One of its kinds: models, vector or prompts do not fit.
    """
    aligned = _aligned(plan)
    if not plan.model:
        return [aligned]
    del aligned.variants["safeguarded"]
    return [aligned, _fine_tune(plan)]


def _aligned(plan: PlannedAudit) -> Looked:
    config, name, vector = plan.config, plan.aligned, plan.vector
    tokenizer = load_tokenizer(name, config.aligned_revision)
    check_encoding(tokenizer, name, plan.found.prompts)
    asked = ExtractionConfig(
        aligned_model=name,
        aligned_revision=config.aligned_revision,
        vector=config.vector,
        allow_other_base=config.allow_other_base,
    )
    reference = check_aligned(asked, read_record(plan.contents, config.vector), tokenizer)
    found = plan.chosen or uniform(vector)
    shape = StoredModel.open(name, config.aligned_revision).model
    asking = config.asking(name, config.aligned_revision, _template_options(vector))
    variants = of_aligned(vector, found)
    return Looked(name, shape, tokenizer, asking, variants, reference, reference, found, [])


def _fine_tune(plan: PlannedAudit) -> Looked:
    name, revision, vector = plan.model, plan.config.model_revision, plan.vector
    tokenizer = load_tokenizer(name, revision)
    check_encoding(tokenizer, name, plan.found.prompts)
    shape = shape_of(name, revision)
    warnings = vector.family.check_member(Family.of(shape, tokenizer))
    vector.check_fits(canonical_modules(shape))
    variants, found, said = of_fine_tune(shape, vector, plan.chosen, name)
    own, base = model_reference(name, revision), adapter_base(name, revision)
    decides = own if base is None else {"adapter": own, "base": model_reference(base)}
    asking = plan.config.asking(name, revision, _template_options(vector))
    warnings = [*warnings, *said]
    return Looked(name, shape, tokenizer, asking, variants, own, decides, found, warnings)


def _template_options(vector: SafetyVector) -> Mapping[str, Any]:
    found: Mapping[str, Any] = vector.extraction.get("chat_template_kwargs", {})
    return found
