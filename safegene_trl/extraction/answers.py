"""The aligned model's own answers, which come with a safety vector as targets of recalibration."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..errors import FamilyError
from ..judges.refusal_phrases import is_refusal
from ..models.generation import generate_answers
from ..models.reasoning import Answering, Reply


@dataclass(frozen=True)
class Asked:
    """How the aligned model is asked, and what is stored of its answers."""

    answering: Answering
    max_new_tokens: int
    with_reasoning: bool = False


def own_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    asked: Asked,
    batch_size: int,
    sharding: Sharding,
) -> list[dict[str, str]]:
    """Prompts with the aligned model's own answers: refused harmful ones and answered benign ones,
    nothing else. Collective.

    Whether one refuses is told by the answer, whatever the reasoning before it says. One whose
    reasoning was cut off is none.

    Raises:
        FamilyError: It refuses none of the harmful prompts.
    """
    rows, unfinished = [], 0
    most = asked.max_new_tokens + asked.answering.max_reasoning_tokens
    for kind, prompts in (("harmful", harmful), ("benign", benign)):
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        own = generate_answers(
            model, tokenizer, messages, most, batch_size, sharding, asked.answering.style
        )
        replies = [asked.answering.read(text) for text in sharding.gather_texts(own)]
        unfinished += sum(not reply.finished for reply in replies)
        rows += [
            {"prompt": prompt, "response": response, "kind": kind}
            for prompt, reply in zip(prompts, replies, strict=True)
            if (response := _stored(reply, kind, asked.with_reasoning))
        ]
        if kind == "harmful" and not rows and unfinished:
            raise FamilyError(
                f"The aligned model refuses none of the harmful prompts, and {unfinished} of {len(prompts)} answers never left "
                "the reasoning: raise `max_reasoning_tokens`, or set it to 0."
            )
        if kind == "harmful" and not rows:
            raise FamilyError(
                "The aligned model refuses none of the harmful prompts: align it first, or give others."
            )
    return rows


def _stored(reply: Reply, kind: str, with_reasoning: bool) -> str:
    """What is stored of a reply; empty where it is not what a prompt of this kind should get."""
    answer = whole_sentences(reply.answer)
    if is_refusal(answer) != (kind == "harmful") or not answer:
        return ""
    return str(Reply(answer, reply.reasoning)) if with_reasoning else answer


def whole_sentences(answer: str) -> str:
    """The answer without a last sentence that the token limit has cut off, unless it is the only
    one.
    """
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", answer)]
    return answer[: ends[-1]] if ends else answer
