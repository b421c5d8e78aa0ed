"""What makes two models one family: architecture, parameter names and shapes, tokenizer."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import FamilyError, VectorError
from ..provenance import chat_template_hash, sha256_of_json, tokenizer_hash


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Family:
    """Identity of a model family.

    Attributes:
        architecture: Class name of the model, e.g. `LlamaForCausalLM`.
        fingerprint: SHA-256 over the sorted parameter names and shapes, without the vocabulary's
            size.
        vocab_size: Rows of the input embedding.
        tokenizer: SHA-256 of the token → id table.
        chat_template: SHA-256 of the chat template, None where there is none.
    """

    architecture: str
    fingerprint: str
    vocab_size: int
    tokenizer: str
    chat_template: str | None

    @classmethod
    def of(cls, model: "nn.Module", tokenizer: "PreTrainedTokenizerBase") -> "Family":
        """The family of a live model (plain or with a LoRA on it) and its tokenizer."""
        from ..distributed.shapes import class_name, full_shape
        from ..models.parameters import base_model, canonical_parameters

        base = base_model(model)
        embedding: Any = base.get_input_embeddings()
        vocab_size = full_shape(embedding.weight)[0]
        shapes = {
            parameter.name: ["vocab" if size == vocab_size else size for size in parameter.shape]
            for parameter in canonical_parameters(model)
        }
        return cls(
            architecture=class_name(base),
            fingerprint=sha256_of_json(shapes),
            vocab_size=vocab_size,
            tokenizer=tokenizer_hash(tokenizer),
            chat_template=chat_template_hash(tokenizer),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Family":
        try:
            return cls(**values)
        except TypeError as error:
            raise VectorError(
                "The safety vector's `family` record is incomplete: make or download it again."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check_member(self, other: "Family") -> list[str]:
        """Raises `FamilyError` unless a model of family `other` can take this family's vector;
        returns warnings.
        """
        if other.architecture != self.architecture:
            raise FamilyError(
                f"The safety vector was made for {self.architecture} and the model is {other.architecture}: use a vector "
                "of the model's own family."
            )
        if other.vocab_size != self.vocab_size:
            raise FamilyError(
                f"The model's vocabulary has {other.vocab_size} entries and the safety vector's family {self.vocab_size}: "
                "train without resizing the vocabulary, or make a vector for the resized family."
            )
        if other.fingerprint != self.fingerprint:
            raise FamilyError(
                "The model's parameter names or shapes differ from those of the safety vector's family: use a vector made "
                "from the same released model."
            )
        if other.tokenizer != self.tokenizer:
            raise FamilyError(
                "The tokenizer differs from that of the safety vector's family: train with the tokenizer of the released "
                "model."
            )
        if self.chat_template is not None and other.chat_template is None:
            raise FamilyError(
                "The safety vector was made with a chat template and the model's tokenizer has none: train with, and save, the "
                "chat template of the released model."
            )
        if other.chat_template != self.chat_template:
            return ["The chat template differs from the one the safety vector was made with."]
        return []
