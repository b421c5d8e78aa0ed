"""Which layers a safety vector acts in, chosen by data (SafeGene, arXiv 2606.06519).

`activation_contrast`: with `h_l(x)` the residual stream after layer `l` at the last prompt token,

    d_l(x) = ‖h_l^aligned(x) − h_l^degraded(x)‖ / ‖h_l^aligned(x)‖
    s_l = mean_{harmful x} d_l(x) − mean_{benign x} d_l(x)

and the layers with the highest scores are kept. Differences accumulate along the residual stream, so late layers tend to
score higher; the scores are stored with the vector so that this can be seen.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .calibration import prompt_text
from .errors import ConfigError
from .weights import base_model


def last_token_states(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> torch.Tensor:
    """Residual stream after every layer at the last prompt token: float32, prompts×layers×hidden.

    transformers gives the last layer's state after the final norm, so does this.
    """
    states = []
    model.eval()
    for prompt in prompts:
        text = prompt_text(tokenizer, [{"role": "user", "content": prompt}])
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        with torch.no_grad():
            output = model(**inputs.to(base_model(model).device), output_hidden_states=True, use_cache=False)
        states.append(torch.stack([hidden[0, -1].float().cpu() for hidden in output.hidden_states[1:]]))
    return torch.stack(states)


def activation_contrast(
    aligned_states: Callable[[Sequence[str]], torch.Tensor],
    degraded_states: Callable[[Sequence[str]], torch.Tensor],
    harmful: Sequence[str],
    benign: Sequence[str],
) -> list[float]:
    """Score `s_l` of every layer. The two callables return states as `last_token_states` does."""

    def contrast(prompts: Sequence[str]) -> torch.Tensor:
        reference = aligned_states(prompts)
        return ((reference - degraded_states(prompts)).norm(dim=-1) / reference.norm(dim=-1)).mean(dim=0)

    return (contrast(harmful) - contrast(benign)).tolist()


def top_layers(scores: Sequence[float], share: float) -> list[int]:
    """Indices, in order, of the `share` (0–1] of layers with the highest scores; at least one layer."""
    if not 0 < share <= 1:
        raise ConfigError(f"`layer_share` is {share}: it must lie above 0 and at most at 1.")
    count = max(1, round(len(scores) * share))
    return sorted(sorted(range(len(scores)), key=lambda layer: -scores[layer])[:count])
