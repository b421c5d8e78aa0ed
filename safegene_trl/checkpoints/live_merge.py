"""Live models merged and streamed to disk, one weight at a time: float32 add, one cast."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..distributed.layouts import Sharding
from ..errors import OutputError
from ..models.data_types import WrittenTypes, check_range
from ..models.experts import factors_on
from ..models.parameters import (
    Parameter,
    StoredForm,
    TaskFactors,
    canonical_parameters,
    trained_rows,
)
from ..models.rounding import Rounding
from .checkpoint_folder import CheckpointFolder
from .merge_terms import NO_VECTOR, ScaledVector, add_terms, full_float32, live_terms
from .tensor_file import commonest_dtype
from .weight_files import WeightFiles
from .write_errors import writing


OWN_TYPES = WrittenTypes()  # every tensor is written in the type that it has


def save_merged(
    model: nn.Module,
    vector: ScaledVector,
    folder: CheckpointFolder,
    sharding: Sharding,
    types: WrittenTypes = OWN_TYPES,
) -> None:
    """Writes `W + ΔW_task + λ·B·A`, added in float32 and cast once to the type of `types`, as a full
    checkpoint.

    Collective: every rank calls it, rank 0 writes, beside which the next weights are merged. Weights
    are gathered one at a time, and few are in rank 0's memory; the live weights are only read.
    """
    parameters = list(canonical_parameters(model))
    form = StoredForm(model, parameters, types.of)
    contents = {}  # in the order in which they come
    for parameter in parameters:
        mark = torch.empty(parameter.shape, dtype=types.of(parameter), device="meta")
        for name, part in form.of(parameter.name, mark).items():
            contents[name] = (part.dtype, part.shape)
    with ExitStack() as stack:
        with sharding.raising_together(), writing():
            if sharding.is_main:
                files = stack.enter_context(WeightFiles(folder, contents))
                folder.save_record(model, commonest_dtype(contents))
        for parameter in parameters:
            tensor = merged_tensor(parameter, vector, sharding, types=types)
            with sharding.raising_together(), writing():
                if sharding.is_main and tensor is not None:
                    if vector.deltas:  # a plain fine-tune is kept as it is
                        check_finite(parameter.name, tensor)
                    for name, part in form.of(parameter.name, tensor).items():
                        files.write(name, part.contiguous())
        with sharding.raising_together(), writing():
            if sharding.is_main:
                files.complete()


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises `OutputError` for a tensor with NaN or infinity in it."""
    if (
        tensor.is_floating_point()
        and tensor.element_size() > 1
        and not bool(tensor.isfinite().all())
    ):
        raise OutputError(
            f"The fine-tune's {name} is not finite, so nothing is written: train it again, with a lower learning rate or in "
            "float32."
        )


@torch.no_grad()
def merged_tensor(
    parameter: Parameter,
    vector: ScaledVector,
    sharding: Sharding,
    rounding: Rounding | None = None,
    types: WrittenTypes = OWN_TYPES,
) -> torch.Tensor | None:
    """Collective: one tensor of the merged model, whole, contiguous and in the type that is written.

    On rank 0, and on every rank that holds whole weights anyway; on the live tensor's device. What
    is whole there, of that type, and nothing is added to is the live tensor itself.

    Args:
        parameter: Which.
        vector: What is added to the fine-tune.
        sharding: How the model is spread over ranks.
        rounding: Is told what the cast to the data type leaves of the vector's part.
        types: In which data type it is written.
    """
    rows = trained_rows(parameter.module) if parameter.is_weight else []
    live = [parameter.tensor, *(own.values for own in rows)]
    with whole(sharding, live, factors_on(parameter)) as (tensors, factors):
        if sharding.collective_forward and not sharding.is_main:
            return None
        weight = tensors[0].detach()
        for own, values in zip(rows, tensors[1:], strict=True):
            weight = weight.index_copy(0, own.indices.to(weight.device), values.detach().to(weight))
        terms, of_vector = live_terms(parameter, factors, vector)
        dtype = types.of(parameter)
        if not terms and not of_vector:
            return weight.to(dtype, copy=sharding.collective_forward).contiguous()
        with full_float32():
            total = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            matrix = total.view(-1, total.shape[-1])  # of experts: one below the other
            add_terms(matrix, terms)
            before = total.clone() if rounding is not None and of_vector else None
            add_terms(matrix, of_vector)
        rounded = total.to(dtype)
        if rounding is not None and before is not None:
            # nothing was added yet to what the written type holds
            exact = not terms and dtype == weight.dtype
            rounding.add(parameter.name, before, total, rounded, before_is_rounded=exact)
        return rounded.contiguous()


def checkpoint_bytes(model: nn.Module, types: WrittenTypes) -> int:
    """Size of the merged checkpoint's weights."""
    return sum(p.shape.numel() * types.of(p).itemsize for p in canonical_parameters(model))


def check_ranges(model: nn.Module, types: WrittenTypes, sharding: Sharding) -> None:
    """Collective: raises `OutputError`, with a tensor's name, where the fine-tune has numbers that
    float16 cannot hold and that is what is written.
    """
    for parameter in canonical_parameters(model):
        if types.of(parameter) == torch.float16 != parameter.tensor.dtype:
            tensor = merged_tensor(parameter, NO_VECTOR, sharding)
            with sharding.raising_together():
                if tensor is not None:
                    check_range(parameter.name, tensor, torch.float16)


@contextmanager
def whole(
    sharding: Sharding, tensors: Sequence[torch.Tensor], factors: Sequence[TaskFactors]
) -> Iterator[tuple[list[torch.Tensor], list[TaskFactors]]]:
    """Collective: `tensors` whole, and the task's LoRA factors."""
    live = [*tensors, *(part for lora in factors for part in lora.tensors())]
    with sharding.full(live) as full:
        rest = iter(full[len(tensors) :])
        yield full[: len(tensors)], [lora.of(rest) for lora in factors]
