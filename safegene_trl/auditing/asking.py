"""Asking the models of an audit, one after the other: each is loaded once, and only where labels of
its answers are missing.
"""

from collections.abc import Mapping, Sequence
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
from ..data.prompts import Prompt, check_encoding
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
from .config import AuditConfig
from .labels import Labels
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
class _FineTune:
    """What is known of a fine-tune whose weights are not read yet; `decides` is what its answers
    depend on.
    """

    tokenizer: PreTrainedTokenizerBase
    variants: Mapping[str, Variant]
    coefficients: Coefficients
    reference: Mapping[str, Any]
    decides: Mapping[str, Any]
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
        config: The audit's.
        vector: What is audited.
        contents: The bytes of its files.
        prompts: What is asked.
        labels: Where labels go.
        job: This process.
    """

    config: AuditConfig
    vector: SafetyVector
    contents: Mapping[str, bytes]
    prompts: Sequence[Prompt]
    labels: Labels
    job: Sharding

    def ask_all(self, aligned: str, chosen: Coefficients | None, model: str) -> Asked:
        """Asks the aligned model with and without the vector, then the fine-tune with and without
        it.

        Args:
            aligned: The aligned model.
            chosen: The coefficients that somebody has named.
            model: The fine-tune; empty where the aligned model without the vector stands in.

        Raises:
            SafeGeneError: One of its kinds: models, vector or prompts do not fit.
        """
        config, vector = self.config, self.vector
        tokenizer = load_tokenizer(aligned, config.aligned_revision)
        check_encoding(tokenizer, aligned, self.prompts)
        reference = self._check_aligned(aligned, tokenizer)
        variants = of_aligned(vector, chosen or uniform(vector))
        asking = config.asking(aligned, config.aligned_revision, self._kwargs)
        if not model:
            self._ask(asking, tokenizer, variants, reference)
            roles = {"aligned": "aligned", "fine_tune": WITHOUT, "safeguarded": "safeguarded"}
            return Asked(chosen or uniform(vector), {"aligned": reference}, True, roles)
        tuned = self._fine_tune(chosen, model)  # before hours are spent on the aligned one
        del variants["safeguarded"]
        self._ask(asking, tokenizer, variants, reference)
        asking = config.asking(model, config.model_revision, self._kwargs)
        self._ask(asking, tuned.tokenizer, tuned.variants, tuned.decides)
        roles = {role: role for role in ("aligned", "fine_tune", "safeguarded")}
        models = {"aligned": reference, "fine_tune": tuned.reference}
        return Asked(tuned.coefficients, models, False, roles, tuned.warnings)

    def _fine_tune(self, chosen: Coefficients | None, model: str) -> "_FineTune":
        """What there is to know of a fine-tune before it is loaded."""
        revision, family = self.config.model_revision, self.vector.family
        tokenizer = load_tokenizer(model, revision)
        check_encoding(tokenizer, model, self.prompts)
        shape = shape_of(model, revision)
        warnings = family.check_member(Family.of(shape, tokenizer))
        self.vector.check_fits(canonical_modules(shape))
        variants, found, said = of_fine_tune(shape, self.vector, chosen, model)
        own, base = model_reference(model, revision), adapter_base(model, revision)
        decides = own if base is None else {"adapter": own, "base": model_reference(base)}
        return _FineTune(tokenizer, variants, found, own, decides, [*warnings, *said])

    @property
    def _kwargs(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.vector.extraction.get("chat_template_kwargs", {})
        return found

    def _check_aligned(self, aligned: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        config = self.config
        asked = ExtractionConfig(
            aligned_model=aligned,
            aligned_revision=config.aligned_revision,
            vector=config.vector,
            allow_other_base=config.allow_other_base,
        )
        return check_aligned(asked, read_record(self.contents, config.vector), tokenizer)

    def _ask(
        self,
        asking: EvaluationConfig,
        tokenizer: PreTrainedTokenizerBase,
        variants: Mapping[str, Variant],
        reference: Mapping[str, Any],
    ) -> None:
        """Labels of one model's answers in all its variants."""
        files = {"files": reference.get("files", reference)}
        for role, variant in variants.items():
            self.labels.begin(role, self._deciding(asking, tokenizer, variant) | files)
        if not any(self.labels.missing(role, self.prompts) for role in variants):
            return
        model, sharding = load_placed(
            asking.model_name_or_path,
            asking.model_revision,
            asking.dtype,
            self.job,
            asking.allow_pickled_shards,
        )
        fold_adapters(model, sharding)
        self.vector.check_fits(canonical_modules(model))
        space = space_of(self.vector)
        for role, variant in variants.items():
            with variant.applied(model, self.vector, space, sharding):
                self.labels.ask(role, self.prompts, model, tokenizer, asking, sharding)

    def _deciding(
        self, asking: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, variant: Variant
    ) -> dict[str, Any]:
        """What an answer depends on, beside the model's files."""
        return {
            **asking.deciding_answers,
            **asking.answering(tokenizer).record,
            "chat_template": chat_template_hash(tokenizer),
            "vector": self.vector.files[WEIGHTS_FILE]["sha256"] if variant.record else None,
            "variant": variant.record,
        }
