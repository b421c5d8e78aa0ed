"""The aligned model's own answers, which come with a safety vector as targets of recalibration."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..errors import FamilyError
from ..judges.coherence import is_incoherent
from ..judges.refusal_phrases import label_of
from ..models.batch_size import EXTRACTION, BatchSize, fitting_answers
from ..models.generation import answers_to_tokens, prompt_tokens
from ..models.parameters import base_model, context_length
from ..models.reasoning import Answering, Reply
from .config import BATCH


logger = logging.getLogger(__name__)
WANTED = {"harmful": "refused", "benign": "answered"}


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
    batch_size: int | None,
    sharding: Sharding,
) -> list[dict[str, str]]:
    """Prompts with the aligned model's own answers: refused harmful ones and answered benign ones,
    nothing else. Collective.

    Whether one refuses is told by the answer, whatever the reasoning before it says. One whose
    reasoning was cut off is none.

    Args:
        model: The aligned model.
        tokenizer: Its tokenizer.
        harmful: Prompts of one user turn.
        benign: Others.
        asked: How long an answer is, in tokens, and what of it is stored.
        batch_size: Prompts that are answered at once; None leaves it to the device.
        sharding: How the model is spread over ranks.

    Raises:
        ConfigError: The context has no room for the reasoning.
        FamilyError: It refuses none of the harmful prompts.
        MemoryShortageError: Memory runs out with one prompt at a time.
    """
    style = asked.answering.style
    most = asked.max_new_tokens + asked.answering.max_reasoning_tokens
    kinds = {"harmful": harmful, "benign": benign}
    tokens = {
        kind: prompt_tokens(
            tokenizer, [[{"role": "user", "content": text}] for text in prompts], style
        )
        for kind, prompts in kinds.items()
    }
    lengths = [len(ids) for own in tokens.values() for ids in own]
    with sharding.raising_together():
        short = asked.answering.lacks_room(
            lengths, context_length(model), asked.max_new_tokens, "max_reasoning_tokens"
        )
    if short and sharding.is_main:
        logger.warning(short)
    longest = max(lengths) + most
    first = fitting_answers(batch_size, base_model(model), longest, 1, sharding, BATCH)
    size, rows = BatchSize(first, sharding, EXTRACTION), []
    for kind, prompts in kinds.items():

        def answers(at_once: int, own: list[list[int]] = tokens[kind]) -> list[str]:
            return answers_to_tokens(model, tokenizer, own, most, at_once, sharding)

        texts = sharding.gather_texts(size.put_through(answers))
        replies = [asked.answering.read(text) for text in texts]
        rows += [
            {"prompt": prompt, "response": response, "kind": kind}
            for prompt, reply in zip(prompts, replies, strict=True)
            if (response := _stored(reply, kind, asked.with_reasoning))
        ]
        if kind == "harmful" and not rows:
            raise _refuses_none(replies)
    return rows


def _refuses_none(replies: Sequence[Reply]) -> FamilyError:
    """Says what the answers to the harmful prompts are instead."""
    counts = Counter(
        "unfinished"
        if not reply.finished
        else "incoherent"
        if is_incoherent(reply.answer)
        else label_of(whole_sentences(reply.answer))  # as it would be stored
        for reply in replies
    )
    said = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    what = f"The aligned model refuses none of the harmful prompts (its answers: {said})"
    if counts["unfinished"]:
        return FamilyError(
            f"{what}, and {counts['unfinished']} of {len(replies)} answers never left the reasoning: raise "
            "`max_reasoning_tokens`, or set it to 0."
        )
    return FamilyError(f"{what}: align it first, or give others.")


def _stored(reply: Reply, kind: str, with_reasoning: bool) -> str:
    """What is stored of a reply; empty where it is not what a prompt of this kind should get."""
    answer = whole_sentences(reply.answer)
    if label_of(answer) != WANTED[kind] or not answer:
        return ""
    return str(Reply(answer, reply.reasoning)) if with_reasoning else answer


def whole_sentences(answer: str) -> str:
    """The answer without a last sentence that the token limit has cut off, unless it is the only
    one.
    """
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", answer)]
    return answer[: ends[-1]] if ends else answer
