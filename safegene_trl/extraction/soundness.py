"""Models and vectors whose numbers mean nothing are told before anything is made of them."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..errors import FamilyError, VectorError
from ..models.inputs import prompt_text
from ..models.low_rank import LowRankDelta
from ..models.rounding import is_finite


LOST = 0.1  # share of a factor's norm that the stored type may lose


@torch.no_grad()
def check_runs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sharding: Sharding,
    named: str,
) -> None:
    """Collective: one forward pass. Weights can be finite and overflow all the same.

    Raises:
        FamilyError: A logit is NaN or infinite.
    """
    model.eval()
    text = prompt_text(tokenizer, [{"role": "user", "content": prompt}])
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    with sharding.forward_passes():
        finite = is_finite(model(**inputs.to(sharding.device), use_cache=False).logits)
        sharding.reshard()
    with sharding.raising_together():
        if not finite:
            raise FamilyError(
                f"The logits of {named} are NaN or infinite: it has diverged, or its numbers are too large for the `dtype` it "
                "is loaded in."
            )


def in_dtype(deltas: Mapping[str, LowRankDelta], dtype: torch.dtype) -> dict[str, LowRankDelta]:
    """The deltas in the data type that they are stored in.

    Raises:
        VectorError: One holds NaN or infinity, or numbers too large or too small for that type; or
            all are zero.
    """
    found = {}
    for name, delta in deltas.items():
        for tensor in (delta.a, delta.b):
            if not is_finite(tensor):
                raise VectorError(
                    f"`{name}` of the vector holds NaN or infinity: a model or the distillation has diverged."
                )
            if lost := _lost(tensor, dtype):
                kind = str(dtype).removeprefix("torch.")
                raise VectorError(
                    f"`{name}` of the vector {lost} for {kind}: set `weights_dtype: bfloat16` or `float32`."
                )
        found[name] = LowRankDelta(delta.a.to(dtype), delta.b.to(dtype))
    if not any(bool(delta.a.any()) and bool(delta.b.any()) for delta in found.values()):
        raise VectorError(
            "The vector changes nothing in the selected layers: degrade the model further, or set `layer_share: 1.0`."
        )
    return found


def _lost(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    cast = tensor.to(dtype).double()
    if not is_finite(cast):
        return "holds numbers too large"
    wide = tensor.double()
    return "is too small" if float((cast - wide).norm()) > LOST * float(wide.norm()) else None
