"""Batched greedy decoding with left padding, whatever a checkpoint's generation config says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..progress import in_progress
from .inputs import padding_id, prompt_text
from .kernels import kernels_for_any_shape
from .parameters import base_model
from .reasoning import AS_TEMPLATE, PromptStyle, ReasoningFormat


Messages = list[dict[str, str]]


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_size: int,
    sharding: Sharding | None = None,
    style: PromptStyle = AS_TEMPLATE,
) -> list[str]:
    """Plain greedy answers in the order of the prompts, reasoning included. Does not draw random numbers or change the
    tokenizer.

    Of the checkpoint's generation config nothing counts but the tokens that end an answer: a
    repetition penalty or suppressed tokens would change what is measured.

    With a `sharding` it is collective: the batches are shared out over the ranks, and the answers
    that another rank generates are empty here.
    """
    tokens = prompt_tokens(tokenizer, prompts, style)
    return answers_to_tokens(model, tokenizer, tokens, max_new_tokens, batch_size, sharding)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    style: PromptStyle = AS_TEMPLATE,
) -> list[list[int]]:
    """The token ids of every prompt, up to where the assistant speaks."""
    texts = [prompt_text(tokenizer, messages, style) for messages in prompts]
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)
    return [list(ids) for ids in encoded["input_ids"]]


@torch.no_grad()
def answers_to_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    sharding: Sharding | None = None,
) -> list[str]:
    """As `generate_answers`, to prompts that are tokenised already."""
    sharding = sharding or Sharding(base_model(model).device)
    answers = [""] * len(prompts)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=_stop_tokens(model, tokenizer),
        pad_token_id=padding_id(tokenizer),
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with plain_decoding(model), kernels_for_any_shape(), sharding.forward_passes():
        for index in in_progress(list(sharding.share(len(groups))), "Answering"):
            group = groups[index or 0]
            padded = _left_padded([prompts[i] for i in group], settings.pad_token_id)
            ids, attention = padded.to(sharding.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=attention,
                generation_config=settings,
                synced_gpus=sharding.collective_forward,
            )
            sharding.reshard()
            decoded = _decoded(tokenizer, output[:, ids.shape[1] :])
            for i, answer in zip(group, decoded, strict=True):
                answers[i] = "" if index is None else answer.strip()
    return answers


def _decoded(tokenizer: PreTrainedTokenizerBase, rows: torch.Tensor) -> list[str]:
    """The texts without special tokens, but for those by which reasoning is told from the answer."""
    written = ReasoningFormat.of(tokenizer)
    if written is None:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)
    marks = written.opening + written.closing
    dropped = {
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special and added.content not in marks
    }
    kept = [[token for token in row if token not in dropped] for row in rows.tolist()]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


@contextmanager
def plain_decoding(model: Any) -> Iterator[None]:
    """While the block is open the model has a generation config in which nothing is set, and a
    mixture returns no router logits.

    `generate` takes whatever its argument leaves open from the model's own config. TRL sets
    `output_router_logits` in that of a mixture, which then computes its load-balancing loss with
    the mask of the whole text and the router logits of the new token, and fails.
    """
    # A PEFT model may have a config of its own, which it hands to its base model before it
    # generates.
    holders = {
        id(each): each for each in (base_model(model), model) if "generation_config" in vars(each)
    }
    kept = [(each, each.generation_config) for each in holders.values()]
    config = base_model(model).config
    routed = [
        each
        for each in {id(each): each for each in (config, config.get_text_config())}.values()
        if getattr(each, "output_router_logits", False)
    ]
    try:
        for each, _ in kept:
            each.generation_config = GenerationConfig()
        for each in routed:
            each.output_router_logits = False
        yield
    finally:
        for each in routed:
            each.output_router_logits = True
        for each, config in kept:
            each.generation_config = config


def _stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that the generation config, the config or the tokenizer names as the end of an
    answer.
    """
    base = base_model(model)
    sources = (base.generation_config, base.config, base.config.get_text_config(), tokenizer)
    named = [getattr(source, "eos_token_id", None) for source in sources]
    tokens = [
        token for each in named for token in (each if isinstance(each, (list, tuple)) else [each])
    ]
    return sorted({token for token in tokens if token is not None})


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in prompts])
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return torch.stack((ids, attention))
