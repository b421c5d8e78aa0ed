"""The aligned model's own answers, which come with a safety vector as targets of recalibration, and
what it does with prompts to measure on, of which no answer is kept.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..errors import FamilyError
from ..judges import Exchange, judged
from ..judges.coherence import is_incoherent
from ..judges.refusal_phrases import RefusalPhrases, label_of
from ..models.batch_size import EXTRACTION, BatchSize, fitting_answers
from ..models.generation import answers_to_tokens, prompt_tokens
from ..models.parameters import base_model, context_length
from ..models.reasoning import Answering, Reply
from ..vectors.prompt_rows import EXPECTED, MEASURE, VERDICTS
from .config import BATCH


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """How the aligned model is asked, and what is stored of its answers; `may_refuse_none`: whether
    it is no error that it refuses none of the harmful prompts.
    """

    answering: Answering
    max_new_tokens: int
    with_reasoning: bool = False
    may_refuse_none: bool = False


def own_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    asked: Asked,
    batch_size: int | None,
    sharding: Sharding,
) -> list[dict[str, str]]:
    """Prompts with the aligned model's own answers: harmful ones that it refuses, and benign ones,
    those that it refuses with that `verdict`. Collective.

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
        FamilyError: It refuses none of the harmful prompts, and has to.
        MemoryShortageError: Memory runs out with one prompt at a time.
    """
    rows: list[dict[str, str]] = []
    kinds = {"harmful": harmful, "benign": benign}
    for kind, replies in _replies(model, tokenizer, kinds, asked, batch_size, sharding):
        rows += [
            row
            for prompt, reply in zip(kinds[kind], replies, strict=True)
            if (row := _stored(prompt, reply, kind, asked.with_reasoning))
        ]
        if kind == "harmful" and not rows and not asked.may_refuse_none:
            raise _refuses_none(replies)
    return rows


def own_verdicts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[str]],
    asked: Asked,
    batch_size: int | None,
    sharding: Sharding,
) -> tuple[list[dict[str, str]], dict[str, dict[str, int]]]:
    """Prompts to measure on with what the aligned model does, judged as the safety step judges.
    Collective. No answer is kept.

    Args:
        model: The aligned model.
        tokenizer: Its tokenizer.
        prompts: Of one user turn each, by kind.
        asked: How long an answer is, in tokens.
        batch_size: Prompts that are answered at once; None leaves it to the device.
        sharding: How the model is spread over ranks.

    Returns:
        A row for every prompt that it refuses or answers, and by kind how many answers have which
        of the judge's labels.

    Raises:
        ConfigError: The context has no room for the reasoning.
        MemoryShortageError: Memory runs out with one prompt at a time.
    """
    rows: list[dict[str, str]] = []
    counts: dict[str, dict[str, int]] = {}
    for kind, replies in _replies(model, tokenizer, prompts, asked, batch_size, sharding):
        own = list(zip(prompts[kind], replies, strict=True))
        exchanges = [Exchange(text, reply.answer, finished=reply.finished) for text, reply in own]
        labels = [verdict.label for verdict in judged(RefusalPhrases(), exchanges)]
        counts[kind] = {label: labels.count(label) for label in sorted(set(labels))}
        rows += [
            {"prompt": text, "kind": kind, "verdict": label, "use": MEASURE}
            for text, label in zip(prompts[kind], labels, strict=True)
            if label in VERDICTS
        ]
    return rows, counts


def _replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    kinds: Mapping[str, Sequence[str]],
    asked: Asked,
    batch_size: int | None,
    sharding: Sharding,
) -> Iterator[tuple[str, list[Reply]]]:
    """The model's replies to the prompts of each kind, one kind after the other."""
    style = asked.answering.style
    most = asked.max_new_tokens + asked.answering.max_reasoning_tokens
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
    size = BatchSize(first, sharding, EXTRACTION)
    for kind, own in tokens.items():

        def answers(at_once: int, own: list[list[int]] = own) -> list[str]:
            return answers_to_tokens(model, tokenizer, own, most, at_once, sharding)

        texts = sharding.gather_texts(size.put_through(answers))
        yield kind, [asked.answering.read(text) for text in texts]


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


def _stored(prompt: str, reply: Reply, kind: str, with_reasoning: bool) -> dict[str, str] | None:
    """The row of a prompt with what is stored of the reply; None where it has no place in a vector:
    a harmful prompt that is answered, and what nobody can judge.
    """
    answer = whole_sentences(reply.answer)
    label = label_of(answer)
    if not answer or label not in VERDICTS or (kind == "harmful" and label != "refused"):
        return None
    response = str(Reply(answer, reply.reasoning)) if with_reasoning else answer
    row = {"prompt": prompt, "response": response, "kind": kind}
    return row if label == EXPECTED[kind] else row | {"verdict": label}


def whole_sentences(answer: str) -> str:
    """The answer without a last sentence that the token limit has cut off, unless it is the only
    one.
    """
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", answer)]
    return answer[: ends[-1]] if ends else answer
