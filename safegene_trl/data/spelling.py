"""Token ids as text in a tokenizer's own alphabet, and the parts of such a text."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


UNIT = re.compile("\0[^\0]*\0|.", re.DOTALL)
SPACES = "▁Ġ "  # as SentencePiece, byte-level BPE and others spell them
WHITE_CHARACTERS = "▁ĠĊčĉ \t\r\n\v\f"
WHITE = re.compile(r"(?:[▁ĠĊčĉ\s]|<0x0A>)*")


@dataclass(frozen=True)
class Spelling:
    """Token ids as one text in the tokenizer's own alphabet, in which a special token cannot be
    mistaken for its name.

    Attributes:
        ids: The token ids.
        text: Their spellings, special tokens between NUL characters.
        starts: Where each token begins in `text`.
    """

    ids: list[int]
    text: str
    starts: list[int]

    def token_after(self, position: int) -> int:
        """The first token that reaches beyond this position of the text."""
        token = bisect_left(self.starts, position)
        after = self.starts[token] if token < len(self.starts) else len(self.text)
        return token - 1 if token and after > position else token

    def find(self, part: str) -> list[int]:
        """Every position of the text at which `part` begins."""
        return [match.start() for match in re.finditer(re.escape(part), self.text)]


class Speller:
    """Spells the ids of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.bos, self.special = tokenizer.bos_token, set(tokenizer.all_special_ids)
        self._marked = self.special | set(tokenizer.added_tokens_decoder)
        self.filling = tuple(
            f"\0{token}\0" for token in (tokenizer.pad_token, tokenizer.eos_token) if token
        )

    def id_of(self, token: str) -> int:
        """The id of a token by its name."""
        return int(self._tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]

    def __call__(self, ids: Sequence[int]) -> Spelling:
        tokens = self._tokenizer.convert_ids_to_tokens(list(ids))
        parts = [
            f"\0{t}\0" if i in self._marked else str(t) for i, t in zip(ids, tokens, strict=True)
        ]
        starts, length = [], 0
        for part in parts:
            starts.append(length)
            length += len(part)
        return Spelling(list(ids), "".join(parts), starts)


def special_units(text: str) -> list[str]:
    """The special tokens in a text, as they are spelled."""
    return [unit for unit in units(text) if unit.startswith("\0")]


def without_white_before(text: str) -> str:
    """The text without the white space that it begins with."""
    return text[WHITE.match(text).end() :]  # type: ignore[union-attr]


def without_white_after(text: str) -> str:
    """The text without the white space that it ends with."""
    while (shorter := text.removesuffix("<0x0A>").rstrip(WHITE_CHARACTERS)) != text:
        text = shorter
    return text


def units(text: str) -> list[str]:
    """Special tokens whole, all else by character."""
    return UNIT.findall(text)


def common_prefix(texts: Sequence[str]) -> str:
    common: list[str] = []
    for column in zip(*map(units, texts), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return "".join(common)
