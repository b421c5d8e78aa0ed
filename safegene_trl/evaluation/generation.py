"""Batched greedy decoding with left padding."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..calibration import prompt_text
from ..sharding import Sharding
from ..weights import base_model


Messages = list[dict[str, str]]


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_size: int,
    sharding: Sharding | None = None,
) -> list[str]:
    """Greedy answers in the order of the prompts. Does not draw random numbers or change the tokenizer.

    With a `sharding` it is collective: the batches are shared out over the ranks, and the answers that another rank
    generates are empty here.
    """
    sharding = sharding or Sharding(base_model(model).device)
    answers = [""] * len(prompts)
    texts = [prompt_text(tokenizer, messages) for messages in prompts]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=_stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with sharding.forward_passes():
        for index in sharding.share(len(groups)):
            group = groups[index or 0]
            padded = _left_padded(tokenizer, [texts[i] for i in group], settings.pad_token_id)
            ids, attention = padded.to(sharding.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=attention,
                generation_config=settings,
                synced_gpus=sharding.collective_forward,
            )
            sharding.release()
            decoded = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, answer in zip(group, decoded, strict=True):
                answers[i] = "" if index is None else answer.strip()
    return answers


def _stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(base_model(model).generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*tokens, tokenizer.eos_token_id) if token is not None})


def _left_padded(tokenizer: PreTrainedTokenizerBase, texts: list[str], pad_id: int) -> torch.Tensor:
    encoded = [tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"] for text in texts]
    width = max(len(ids) for ids in encoded)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in encoded])
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    return torch.stack((ids, attention))
