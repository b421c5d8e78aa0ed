"""The aligned model's own answers, which come with a safety vector as targets of recalibration."""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..errors import FamilyError
from ..judges.refusal_phrases import label_of
from ..models.generation import generate_answers


def own_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    sharding: Sharding,
) -> list[dict[str, str]]:
    """Prompts with the aligned model's own answers: refused harmful ones and answered benign ones,
    nothing else. Collective.

    Raises:
        FamilyError: It refuses none of the harmful prompts.
    """
    rows = []
    for kind, prompts, wanted in (
        ("harmful", harmful, "refused"),
        ("benign", benign, "answered"),
    ):
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        own = generate_answers(model, tokenizer, messages, max_new_tokens, batch_size, sharding)
        answers = sharding.gather_texts(own)
        rows += [
            {"prompt": prompt, "response": answer, "kind": kind}
            for prompt, answer in zip(prompts, map(whole_sentences, answers), strict=True)
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
