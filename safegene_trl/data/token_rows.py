"""A row that a trainer has tokenised: its ids, which of them are learnt, and where packed samples
begin.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rows import Row, UnreadableRowError, is_unicode


_IGNORED = -100


def holds_tokens(row: Row) -> bool:
    if "prompt_ids" in row:
        return "chosen_ids" in row or ("completion_ids" in row and row.get("prompt") is None)
    return "input_ids" in row or "chosen_labels" in row


def preferred(row: Row, padding: "Padding") -> tuple[list[int], list[bool]] | None:
    """Ids and mask of the answer that TRL's preference trainers raise, None for another row.

    DPO and KTO keep the answer apart from its prompt; ORPO and CPO keep both together, with labels.
    """
    if "prompt_ids" in row:
        prompt = _checked(row["prompt_ids"])
        answer = _checked(row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"])
        ids = [*prompt, *answer]
        return ids, [position >= len(prompt) for position in range(len(ids))]
    if "chosen_labels" in row:
        names = ("input_ids", "attention_mask", "labels")
        chosen = {name: row.get(f"chosen_{name}") for name in names}
        ids, mask, _ = tokens(chosen, padding)
        return ids, mask or [False] * len(ids)
    return None


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in value
    )


def _checked(ids: Any) -> list[int]:
    if not is_ids(ids):
        raise UnreadableRowError("token ids that are no list of integers")
    if min(ids, default=0) < 0:
        raise UnreadableRowError("negative token ids")
    return ids


@dataclass(frozen=True)
class Padding:
    """The token that rows are filled up with, None where there is none, and whether it also ends,
    or begins, what is said.
    """

    token: int | None
    ends: bool = False
    begins: bool = False

    def kept(self, ids: list[int]) -> list[bool]:
        """Which tokens are no filling at an end of a row; of a token that means something there
        too, one is none.
        """
        first, after = 0, len(ids)
        while after and ids[after - 1] == self.token:
            after -= 1
        while first < after and ids[first] == self.token:
            first += 1
        if first and self.begins:
            first -= 1
        if after < len(ids) and self.ends:
            after += 1
        return [first <= position < after for position in range(len(ids))]


def tokens(row: Row, padding: Padding) -> tuple[list[int], list[bool] | None, list[int]]:
    """Ids, mask of the response (None if there is none) and boundaries of a tokenised row, padding
    left out.
    """
    ids = _checked(row["input_ids"])
    mask: list[bool] | None
    if row.get("labels") is not None:
        mask = (
            [label != _IGNORED for label in row["labels"]]
            if isinstance(row["labels"], list)
            else []
        )
    else:
        given = row.get("completion_mask") or row.get("assistant_masks")
        mask = [bool(value) for value in given] if given else None
    attention = row.get("attention_mask")
    for values in (mask, attention):
        if values is not None and (not isinstance(values, list) or len(values) != len(ids)):
            raise UnreadableRowError("labels or masks of another length than the tokens")
    cuts = _cuts(row, len(ids))
    read = padding.kept(ids) if attention is None else attention
    kept = [i for i in range(len(ids)) if read[i]]
    if len(kept) < len(ids):
        cuts = sorted({sum(i < cut for i in kept) for cut in cuts} - {0, len(kept)})
        ids, mask = [ids[i] for i in kept], None if mask is None else [mask[i] for i in kept]
    return ids, mask, cuts


def _cuts(row: Row, length: int) -> list[int]:
    """Where a packed row's samples begin, the first one's beginning left out."""
    lengths, positions, attention = (
        row.get(name) for name in ("seq_lengths", "position_ids", "attention_mask")
    )
    if isinstance(lengths, list) and sum(lengths) == length:
        cuts = set(itertools.accumulate(lengths))
    elif isinstance(positions, list) and len(positions) == length and is_ids(positions):
        cuts = {i for i in range(1, length) if positions[i] == 0}
    # samples numbered from 1, padding 0
    elif isinstance(attention, list) and max(attention, default=0) > 1:
        cuts = {i for i in range(1, length) if attention[i] != attention[i - 1]}
    else:
        cuts = set()
    return sorted(cuts - {0, length})


def leaves_out(ids: list[int], mask: list[bool] | None, pad: int | None) -> bool:
    """Whether a mask leaves out more than the first token, which nothing predicts, and padding."""
    return mask is not None and any(
        not said and token != pad for token, said in zip(ids[1:], mask[1:], strict=True)
    )


def prompt_length(ids: list[int], row: Row, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt column that the row begins with, 0 if there is none."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if (
        not isinstance(prompt, str)
        or not isinstance(completion, str)
        or not prompt
        or not is_unicode(prompt)
    ):
        return 0
    prompt_ids = tokenizer(prompt)["input_ids"]
    return next(
        (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b),
        len(prompt_ids),
    )
