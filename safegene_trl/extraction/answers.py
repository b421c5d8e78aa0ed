"""The aligned model's own answers, which come with a safety vector as targets of recalibration."""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..errors import FamilyError
from ..judges.refusal_phrases import label_of
from ..models.batch_size import EXTRACTION, BatchSize, fitting_answers
from ..models.generation import answers_to_tokens, prompt_tokens
from ..models.parameters import base_model
from .config import BATCH


WANTED = {"harmful": "refused", "benign": "answered"}


def own_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    max_new_tokens: int,
    batch_size: int | None,
    sharding: Sharding,
) -> list[dict[str, str]]:
    """Prompts with the aligned model's own answers: refused harmful ones and answered benign ones,
    nothing else. Collective.

    Args:
        model: The aligned model.
        tokenizer: Its tokenizer.
        harmful: Prompts of one user turn.
        benign: Others.
        max_new_tokens: Length of an answer, in tokens.
        batch_size: Prompts that are answered at once; None leaves it to the device.
        sharding: How the model is spread over ranks.

    Raises:
        FamilyError: It refuses none of the harmful prompts.
        MemoryShortageError: Memory runs out with one prompt at a time.
    """
    kinds = {"harmful": harmful, "benign": benign}
    tokens = {
        kind: prompt_tokens(tokenizer, [[{"role": "user", "content": text}] for text in prompts])
        for kind, prompts in kinds.items()
    }
    longest = max(len(ids) for own in tokens.values() for ids in own) + max_new_tokens
    first = fitting_answers(batch_size, base_model(model), longest, 1, sharding, BATCH)
    size, rows = BatchSize(first, sharding, EXTRACTION), []
    for kind, prompts in kinds.items():

        def answers(at_once: int, asked: list[list[int]] = tokens[kind]) -> list[str]:
            return answers_to_tokens(model, tokenizer, asked, max_new_tokens, at_once, sharding)

        texts, wanted = sharding.gather_texts(size.put_through(answers)), WANTED[kind]
        rows += [
            {"prompt": prompt, "response": answer, "kind": kind}
            for prompt, answer in zip(prompts, map(whole_sentences, texts), strict=True)
            if label_of(answer) == wanted and answer
        ]
        if kind == "harmful" and not rows:
            raise FamilyError(
                "The aligned model refuses none of the harmful prompts: align it first, or give others."
            )
    return rows


def whole_sentences(answer: str) -> str:
    """The answer without a last sentence that the token limit has cut off, unless it is the only
    one.
    """
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", answer)]
    return answer[: ends[-1]] if ends else answer
