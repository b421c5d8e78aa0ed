"""What makes two models one family: architecture, parameter names and shapes, tokenizer.

A fine-tune may have added tokens, and another number of rows in its embeddings: a vector acts on
neither. A text model and a class of text and images around it are one family.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import FamilyError, VectorError
from ..provenance import chat_template_hash, sha256_of_bytes, sha256_of_json, tokenizer_hash


if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..models.parameters import Parameter


# text models inside of classes of text and images for which transformers has no class of its own,
# and the class that computes the same
_TEXT_CLASSES = {
    "Qwen2VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class Live:
    """What is known of a live model and its tokenizer, and not kept in a vector.

    Attributes:
        wrapped: Architecture and fingerprint as vectors have them that were made on a class of text
            and images before its text model counted alone.
        vocabulary: The tokenizer's token → id table.
        added: Those of its tokens that were added to it, by its maker or later.
    """

    wrapped: tuple[str, str]
    vocabulary: Mapping[str, int]
    added: Collection[str]


@dataclass(frozen=True)
class Family:
    """Identity of a model family.

    Attributes:
        architecture: Class name of the text model, e.g. `LlamaForCausalLM`.
        fingerprint: SHA-256 over the sorted names and shapes of the text model's parameters,
            without the vocabulary's size.
        vocab_size: Rows of the input embedding.
        tokenizer: SHA-256 of the token → id table.
        chat_template: SHA-256 of the chat template, None where there is none.
        live: What else is known, None of a family that was read from a vector.
    """

    architecture: str
    fingerprint: str
    vocab_size: int
    tokenizer: str
    chat_template: str | None
    live: Live | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, model: "nn.Module", tokenizer: "PreTrainedTokenizerBase") -> "Family":
        """The family of a live model (plain or with a LoRA on it) and its tokenizer."""
        from ..distributed.shapes import class_name
        from ..models.parameters import (
            base_model,
            canonical_parameters,
            text_parameters,
            vocabulary_rows,
        )

        base = base_model(model)
        vocab_size = vocabulary_rows(model)
        whole, text = list(canonical_parameters(model)), text_parameters(model)
        return cls(
            architecture=_text_class(base) if len(text) < len(whole) else class_name(base),
            fingerprint=_fingerprint(text, vocab_size),
            vocab_size=vocab_size,
            tokenizer=tokenizer_hash(tokenizer),
            chat_template=chat_template_hash(tokenizer),
            live=Live(
                (class_name(base), _fingerprint(whole, vocab_size, wrapped=True)),
                tokenizer.get_vocab(),
                tokenizer.get_added_vocab(),
            ),
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
        values = asdict(self)
        del values["live"]
        return values

    def check_member(self, other: "Family") -> list[str]:
        """Raises `FamilyError` unless a live model of family `other` can take this family's vector;
        returns warnings.
        """
        if other.live is None or other.live.wrapped != (self.architecture, self.fingerprint):
            if other.architecture != self.architecture:
                raise FamilyError(
                    f"The safety vector was made for {self.architecture} and the model is {other.architecture}: use a vector "
                    "of the model's own family."
                )
            if other.fingerprint != self.fingerprint:
                raise FamilyError(
                    "The model's parameter names or shapes differ from those of the safety vector's family: use a vector made "
                    "from the same released model."
                )
        added = self.added_tokens(other)
        if added is None:
            raise FamilyError(
                "The tokenizer differs from that of the safety vector's family by more than added tokens: train with the tokenizer "
                "of the released model."
            )
        self._check_embedded(other, added)
        if self.chat_template is not None and other.chat_template is None:
            raise FamilyError(
                "The safety vector was made with a chat template and the model's tokenizer has none: train with, and save, the "
                "chat template of the released model."
            )
        if other.chat_template != self.chat_template:
            return ["The chat template differs from the one the safety vector was made with."]
        return []

    def added_tokens(self, other: "Family") -> list[str] | None:
        """The tokens that a live model's tokenizer has beyond this family's, in the order of their
        ids; None where it is not this family's with tokens added after the last.
        """
        if other.tokenizer == self.tokenizer:
            return []
        if other.live is None:
            return None
        vocabulary, table = other.live.vocabulary, sorted(other.live.vocabulary)
        entries = {token: f"{json.dumps(token)}:{vocabulary[token]}" for token in table}
        found: list[str] = []
        # A vector has the table's hash, not its length: tokens are taken off its end, one by one.
        for token in sorted(other.live.added, key=lambda token: vocabulary[token], reverse=True):
            del entries[token]
            found.insert(0, token)
            if sha256_of_bytes(f"{{{','.join(entries.values())}}}".encode()) == self.tokenizer:
                return found
        return None

    def _check_embedded(self, other: "Family", added: Collection[str]) -> None:
        """Raises `FamilyError` for a token without a row in a live model's embedding, where the
        family's own model had one.
        """
        for token, index in other.live.vocabulary.items() if other.live else ():
            had_one = index < self.vocab_size or token in added
            if index >= other.vocab_size and had_one:
                raise FamilyError(
                    f"The tokenizer's {token!r} has the id {index} and the model's embedding {other.vocab_size} rows: call "
                    "`model.resize_token_embeddings(len(tokenizer))` before the training, and save the embeddings with an adapter."
                )


def _fingerprint(parameters: "Iterable[Parameter]", vocab_size: int, wrapped: bool = False) -> str:
    """Hash of the names and shapes, without the part of a name that says where in a class of text
    and images the text model is, or with it.
    """
    from ..models.names import without_wrapper

    return sha256_of_json(
        {
            parameter.name if wrapped else without_wrapper(parameter.name): [
                "vocab" if size == vocab_size else size for size in parameter.shape
            ]
            for parameter in parameters
        }
    )


def _text_class(base: Any) -> str:
    """Name of the class that a text model has outside of a class of text and images; that class's
    own name where there is none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from ..distributed.shapes import class_name

    name = class_name(base)
    config = type(base.config.get_text_config())
    if config in MODEL_FOR_CAUSAL_LM_MAPPING and config is not type(base.config):
        architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        return str(architecture.__name__)
    return _TEXT_CLASSES.get(name, name)
