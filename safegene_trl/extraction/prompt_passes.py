"""Forward passes over prompts, of which something is kept at each one's last token."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..models.batch_size import EXTRACTION, fitting_answers, halving
from ..models.generation import prompt_tokens
from ..models.inputs import padding_id
from ..models.parameters import base_model
from ..models.reasoning import PromptStyle
from ..progress import in_progress


Places = tuple[torch.Tensor, list[int]]  # of the last tokens: rows, and places in them
Read = Callable[[dict[str, torch.Tensor], Places], torch.Tensor]


def read_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sharding: Sharding,
    style: PromptStyle,
    read: Read,
) -> torch.Tensor:
    """What `read` gives for every prompt, in their order: prompts×…, on the CPU. Collective.

    On a CPU prompts are read one by one, on a GPU as many together as its free memory is for. They
    are padded on the right, where none of their tokens looks.

    Args:
        model: The model; it is put into evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Each one user turn.
        sharding: How the model is spread over ranks.
        style: How prompts are written.
        read: Runs the model on a batch (`input_ids` and `attention_mask`, on its device), and gives
            what is kept of each prompt, by the places of their last tokens.
    """
    messages = [[{"role": "user", "content": text}] for text in prompts]
    tokens = prompt_tokens(tokenizer, messages, style)
    longest = max(map(len, tokens))
    first = fitting_answers(None, base_model(model), longest, longest, sharding, on_cpu=1)
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    model.eval()

    def together(group: Sequence[int]) -> torch.Tensor:
        rows = [torch.tensor(tokens[index]) for index in group]
        ids = pad_sequence(rows, batch_first=True, padding_value=padding_id(tokenizer))
        attention = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch = {"input_ids": ids, "attention_mask": attention}
        places = torch.arange(len(rows)), [len(row) - 1 for row in rows]
        found = read({key: tensor.to(sharding.device) for key, tensor in batch.items()}, places)
        sharding.reshard()
        return found

    def passes(batch_size: int) -> list[torch.Tensor]:
        groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        with torch.no_grad(), sharding.forward_passes():
            return [together(group) for group in in_progress(groups, "Reading prompts")]

    found = torch.cat(halving(first, passes, sharding, EXTRACTION))
    return found[torch.tensor(order).argsort()]
