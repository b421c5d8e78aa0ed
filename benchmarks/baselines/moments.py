"""Second moments of modules' inputs, which Safe Delta, Antidote, SaLoRA and LSSF are computed from."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from safegene_trl.models.inputs import Sample, batches


@torch.no_grad()
def input_moments(
    model: nn.Module,
    modules: Iterable[str],
    samples: Sequence[Sample],
    pad_id: int,
    responses_only: bool = False,
) -> dict[str, torch.Tensor]:
    """`X Xᵀ / n` (float32, d_in×d_in) of each module's inputs over the tokens of `samples`.

    Args:
        model: Model.
        modules: Names of linear modules.
        samples: Tokenised prompts, with or without responses.
        pad_id: Token to pad with.
        responses_only: Count only positions that predict a token of a response.
    """
    sums: dict[str, torch.Tensor] = {}
    counted = torch.zeros(0)
    tokens = 0

    def hook(name: str):
        def add(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            x = inputs[0][counted].float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        for batch in batches(samples, 8, pad_id, next(model.parameters()).device):
            counted = batch.target_mask if responses_only else batch.attention_mask.bool()
            tokens += int(counted.sum())
            model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
            )
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def output_directions(
    weight: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors (d_out×k, k the smaller dimension) and values (k, descending, float32)
    of a module's outputs `W X / √n`.

    Args:
        weight: `W`, d_out×d_in.
        moment: `X Xᵀ / n`, d_in×d_in.
    """
    weight = weight.float()
    if weight.shape[0] <= weight.shape[1]:
        squares, vectors = torch.linalg.eigh(weight @ moment @ weight.T)  # ascending
        return vectors.flip(-1), squares.clamp(min=0).sqrt().flip(-1)
    # W X Xᵀ Wᵀ would have d_out rows and rank d_in
    squares, vectors = torch.linalg.eigh(moment)
    directions, values, _ = torch.linalg.svd(
        weight @ (vectors * squares.clamp(min=0).sqrt()), full_matrices=False
    )
    return directions, values
