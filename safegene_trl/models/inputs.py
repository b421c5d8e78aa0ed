"""What a model reads: a prompt as text, samples as tokens, samples of like length in batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .reasoning import AS_TEMPLATE, PromptStyle, ReasoningFormat, split_stored


@dataclass(frozen=True)
class SoftTargets:
    """What another model says to the first tokens of a response: the likeliest ones in each place.

    Attributes:
        tokens: The response's own, k.
        ids: Of the likeliest tokens, k×m.
        log_probs: Their log-probabilities in nats, k×m.
    """

    tokens: list[int]
    ids: list[list[int]]
    log_probs: list[list[float]]

    def first(self, count: int) -> "SoftTargets":
        """Those of the first tokens."""
        return SoftTargets(self.tokens[:count], self.ids[:count], self.log_probs[:count])


@dataclass(frozen=True)
class Sample:
    """One tokenised sample.

    Attributes:
        input_ids: The tokens.
        is_response: For every token, whether it belongs to the response.
        soft: What another model says to the response's first tokens: the sample ends with them.
    """

    input_ids: list[int]
    is_response: list[bool]
    soft: SoftTargets | None = None

    @property
    def response(self) -> list[int]:
        """The response's tokens that are predicted from one before them."""
        return [
            token
            for token, said in zip(self.input_ids[1:], self.is_response[1:], strict=True)
            if said
        ]


@dataclass(frozen=True)
class Batch:
    """Left-padded tokens, so that responses end together; all tensors B×T.

    Attributes:
        input_ids: int64.
        attention_mask: int64, 0 on padding.
        position_ids: int64, counted without padding.
        target_mask: bool, True where the *next* token belongs to a response.
        kept: Number of trailing positions that hold every target.
        soft_ids: Of the likeliest tokens in every response token's place, tokens×m, int64, in rows'
            order; None where no sample has soft targets.
        soft_log_probs: Their log-probabilities in nats, float32. Of a sample without soft targets
            its own tokens are all there is: a divergence from that is the cross-entropy.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    target_mask: torch.Tensor
    kept: int
    soft_ids: torch.Tensor | None = None
    soft_log_probs: torch.Tensor | None = None


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    style: PromptStyle = AS_TEMPLATE,
) -> str:
    """The prompt as the model reads it, up to where the assistant speaks."""
    if tokenizer.chat_template:
        return style.prompt(tokenizer, messages)
    return "\n".join(message["content"] for message in messages) + "\n"


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    response: str,
    style: PromptStyle = AS_TEMPLATE,
) -> Sample:
    """Tokenises a prompt with its response, the end-of-turn token included.

    Where a reasoning model is to start at its answer, that alone is the response, and an empty
    reasoning is part of the prompt; where it is to start at its reasoning, that and the answer are,
    or the answer alone if there is no reasoning.
    """
    prompt = prompt_text(tokenizer, messages, style)
    written = ReasoningFormat.of(tokenizer)
    thinks = False
    if written is not None and style.start != "template":
        thinks = written.place(prompt) == "reasoning"
        response = written.continuation(split_stored(response), thinks)
    full = prompt + response + (tokenizer.eos_token or "")
    if tokenizer.chat_template and not thinks:
        turn = [*messages, {"role": "assistant", "content": response}]
        templated = style.rendered(tokenizer, turn).rstrip("\n")
        # Of a reasoning model's template a prompt may end in what its replies do not begin with; a
        # trainer takes the reply from where the two differ.
        trained = written is not None and style.start == "template"
        full = templated if templated.startswith(prompt) or trained else full
    special = not tokenizer.chat_template
    prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    ids = tokenizer(full, add_special_tokens=special)["input_ids"]
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b),
        len(prompt_ids),
    )
    return Sample(list(ids), [position >= start for position in range(len(ids))])


def shortened(sample: Sample, max_length: int | None, max_response_tokens: int) -> Sample | None:
    """The sample cut to its first `max_length` tokens and first response tokens, of which no more
    are left than have soft targets where there are any; None if no response is left.
    """
    if sample.soft:
        max_response_tokens = min(max_response_tokens, len(sample.soft.ids))
    limit = len(sample.input_ids) if max_length is None else min(len(sample.input_ids), max_length)
    responses = [position for position in range(1, limit) if sample.is_response[position]]
    end = responses[:max_response_tokens][-1] + 1 if responses else 0
    mask = [False, *sample.is_response[1:end]]
    cut = Sample(sample.input_ids[:end], mask, sample.soft and sample.soft.first(sum(mask)))
    return cut if any(cut.is_response) else None


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id to pad with; what it is does not matter, as padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def batches(
    samples: Sequence[Sample], batch_size: int, pad_id: int, device: torch.device
) -> list[Batch]:
    """Groups samples of like length into as few batches as can be, of like size, and pads them on
    the left.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    count = math.ceil(len(ordered) / batch_size)
    groups = [
        ordered[len(ordered) * i // count : len(ordered) * (i + 1) // count] for i in range(count)
    ]
    return [collate(group, pad_id, device) for group in groups]


def tight_groups(samples: Sequence[Sample], batch_size: int, pass_cost: float) -> list[slice]:
    """Cuts samples, in their order, into groups whose passes cost least.

    A pass costs the positions that go through a model's layers and its head, as many in every
    sample as the longest of the group has, and something of its own.

    Args:
        samples: Those of like length stand together.
        batch_size: Most samples of a group.
        pass_cost: What a pass costs in itself, in positions; infinite for as few groups as can be,
            and among those the fewest positions.
    """
    # by where a group ends: passes, cost, groups
    best: list[tuple[float, float, tuple[slice, ...]]] = [(0, 0, ())]
    few = math.isinf(pass_cost)
    for end in range(1, len(samples) + 1):
        ways, width, answer = [], 0, 0
        for start in range(end - 1, max(end - batch_size, 0) - 1, -1):
            sample = samples[start]
            width = max(width, len(sample.input_ids))
            answer = max(answer, len(sample.input_ids) - sample.is_response.index(True))
            passes, cost, groups = best[start]
            own = cost + (end - start) * (width + answer) + (0 if few else pass_cost)
            ways.append((passes + few, own, (*groups, slice(start, end))))
        best.append(min(ways, key=lambda way: way[:2]))
    return list(best[-1][2])


def collate(samples: Sequence[Sample], pad_id: int, device: torch.device) -> Batch:
    """One batch of the samples, in their order."""
    width = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    targets = torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, width - length :] = torch.tensor(sample.input_ids)
        attention[row, width - length :] = 1
        targets[row, width - length : width - 1] = torch.tensor(sample.is_response[1:])
    first = int(targets.any(dim=0).nonzero()[0])
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    soft = _soft_targets(samples)
    return Batch(
        ids.to(device),
        attention.to(device),
        positions.to(device),
        targets.to(device),
        width - first,
        *(None if each is None else each.to(device) for each in soft),
    )


def _soft_targets(samples: Sequence[Sample]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`soft_ids` and `soft_log_probs` of a batch of the samples."""
    width = max((len(sample.soft.ids[0]) for sample in samples if sample.soft), default=0)
    if not width:
        return None, None
    ids, log_probs = [], []
    for sample in samples:
        soft = sample.soft or _certain(sample.response)
        # filled up with their own first token: a further one would count as one of the likeliest
        ids += [row + row[:1] * (width - len(row)) for row in soft.ids]
        missing = [-math.inf]
        log_probs += [[*map(float, row), *missing * (width - len(row))] for row in soft.log_probs]
    return torch.tensor(ids), torch.tensor(log_probs)


def _certain(tokens: list[int]) -> SoftTargets:
    return SoftTargets(tokens, [[token] for token in tokens], [[0.0] for _ in tokens])
