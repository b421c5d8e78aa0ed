"""Mixtures of experts whose weights lie in one parameter: every expert's matrix counts as a linear
layer.

transformers keeps `experts.gate_up_proj` and `experts.down_proj` as tensors of experts×rows×columns
and lets any function that keeps its contract compute them (`use_experts_implementation`: grouped or
batched products, a loop). What is attached to experts therefore comes as one more such function.
The matrix of expert 3 is called `…experts.down_proj[3]`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ..distributed.shapes import full_shape
from .names import expert_name, layer_index
from .parameters import (
    Parameter,
    TaskFactors,
    as_stored,
    linear_shape,
    task_factors,
    text_modules,
    unadapted,
)


# of values by sample those of an expert's tokens
Samples = Callable[[torch.Tensor], torch.Tensor]
# what a matrix product becomes: of the matrix's name, inputs (tokens×d_in) and outputs
# (tokens×d_out)
Product = Callable[[str, torch.Tensor, torch.Tensor, Samples], torch.Tensor]
_Weights = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class ExpertWeights:
    """One parameter that holds a matrix of each expert.

    Attributes:
        count: How many experts there are.
        shape: `(d_out, d_in)` of each one's matrix.
        transposed: Whether they are stored as `(d_in, d_out)`.
    """

    count: int
    shape: tuple[int, int]
    transposed: bool

    @property
    def rows(self) -> int:
        """Of each matrix as it is stored."""
        return self.shape[1] if self.transposed else self.shape[0]


def expert_weights(module: nn.Module) -> dict[str, ExpertWeights]:
    """The parameters of a module that hold matrices of experts, by their names in it; none of any
    other module.
    """
    experts: Any = unadapted(module)
    if not hasattr(type(experts), "_apply_gate"):  # from `use_experts_implementation`
        return {}
    found = {}
    for name in (first_weight(experts), "down_proj"):
        count, rows, columns = full_shape(getattr(experts, name))
        shape = (columns, rows) if experts.is_transposed else (rows, columns)
        found[name] = ExpertWeights(count, shape, experts.is_transposed)
    return found


def first_weight(experts: Any) -> str:
    """Name of the parameter that tokens come to first."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def weights_of(parameter: Parameter) -> ExpertWeights | None:
    """What a parameter holds, None where that is no matrices of experts."""
    leaf = parameter.name.rpartition(".")[2]
    return expert_weights(parameter.module).get(leaf)


# Mamba's mixer multiplies by this weight itself (also in Jamba): no hook can act on it
_NEVER_CALLED = ".dt_proj"


def can_be_changed(matrix: str) -> bool:
    """Whether a vector can hold a change of a matrix: it lies in a layer, and is called."""
    return layer_index(matrix) is not None and not matrix.endswith(_NEVER_CALLED)


def matrix_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """`(d_out, d_in)` of every matrix that a vector can change: linear layers and experts.

    Args:
        modules: A model's modules by canonical name.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        if (shape := linear_shape(module)) is not None:
            found[name] = shape
        for leaf, weights in expert_weights(module).items():
            for expert in range(weights.count):
                found[expert_name(f"{name}.{leaf}", expert)] = weights.shape
    return found


def factors_on(parameter: Parameter) -> list[TaskFactors]:
    """The task's own unmerged LoRA factors on a parameter; those on experts are of all of them
    together, see `of_experts`.
    """
    if parameter.is_weight:
        return task_factors(parameter.module)
    return _on_experts(parameter.module, parameter.name.rpartition(".")[2])


def _on_experts(module: Any, leaf: str) -> list[TaskFactors]:
    """From PEFT's `target_parameters`: one wrapper a parameter, around each other."""
    found: list[TaskFactors] = []
    while isinstance(module, ParamWrapper):
        lora_a: Any = module.lora_A
        lora_b: Any = module.lora_B
        if module.parameter_name == leaf and not module.disable_adapters:
            found += [
                TaskFactors(
                    lora_a[name].weight,
                    lora_b[name].weight,
                    float(module.scaling[name]),
                )
                for name in module.active_adapters
                if name in lora_a and name not in module.merged_adapters
            ]
        module = module.base_layer
    return found


def of_experts(factors: TaskFactors, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`(A, B)` of each expert, float32, from the factors of all (whole), as PEFT lays them out."""
    a, b = factors.pair()
    # PEFT: rows of A are expert by expert, columns of B part by part
    of_a = a.reshape(count, -1, a.shape[-1])
    of_b = b.reshape(len(b), -1, count).permute(2, 0, 1)
    return list(zip(of_a, of_b, strict=True))


def task_matrices(model: nn.Module) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """`(A, B)` of every LoRA of the task on the text model, float32, by the matrix that it is on; of
    whole weights.
    """
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, module in text_modules(model).items():
        if own := task_factors(module):
            found[name] = [lora.pair() for lora in own]
        for leaf, weights in expert_weights(module).items():
            for lora in _on_experts(module, leaf):
                for expert, pair in enumerate(of_experts(lora, weights.count)):
                    found.setdefault(expert_name(f"{name}.{leaf}", expert), []).append(pair)
    return found


@dataclass(frozen=True)
class Piece:
    """Rows of a matrix as checkpoint files hold them.

    Attributes:
        name: The tensor in the files.
        first: The first of those rows in that tensor, as if all of it were one matrix.
        offset: The first of them in the matrix, as the model stores it.
        rows: How many.
    """

    name: str
    first: int
    offset: int
    rows: int


def stored_pieces(model: nn.Module, parameter: Parameter) -> list[list[Piece]] | None:
    """Where checkpoint files hold each expert's matrix of a parameter: fused as in the model, or
    apart and in parts. None for any other form.

    The order of the pieces is what transformers' own conversion makes of numbered ones.
    """
    weights = weights_of(parameter)
    if weights is None:
        return None
    mark = torch.empty(parameter.shape, device="meta")
    pieces = as_stored(model, parameter.name, mark)
    if len(pieces) == 1 and (whole := next(iter(pieces.items())))[1] is mark:
        rows = weights.rows
        return [[Piece(whole[0], e * rows, 0, rows)] for e in range(weights.count)]
    parts, rest = divmod(len(pieces), weights.count)
    if rest or not parts or weights.transposed or weights.rows % parts:
        return None
    rows = weights.rows // parts
    numbers = torch.arange(len(pieces)).view(weights.count, parts, 1)
    numbered = as_stored(model, parameter.name, numbers)
    if any(piece.shape != (rows, weights.shape[1]) for piece in pieces.values()) or any(
        number.numel() != 1 for number in numbered.values()
    ):
        return None
    names = sorted(numbered, key=lambda name: int(numbered[name]))
    return [
        [Piece(names[e * parts + p], 0, p * rows, rows) for p in range(parts)]
        for e in range(weights.count)
    ]


@contextmanager
def computing_with(module: nn.Module, name: str, product: Product) -> Iterator[None]:
    """While open, an experts module computes one expert at a time, and what `product` makes of each
    matrix product goes on.

    By the contract of transformers' own implementations, one of which it takes the place of.

    Args:
        module: The experts themselves, without adapters around them.
        name: Their canonical name.
        product: What makes of each product what is passed on.
    """
    own = module.__dict__
    # accelerate, where it spreads a model over devices, calls that one between its own hooks
    place = "_old_forward" if "_old_forward" in own else "forward"
    had, before = place in own, own.get(place)
    own[place] = partial(_forward, module, name, product)
    try:
        yield
    finally:
        if had:
            own[place] = before
        else:
            del own[place]


def _forward(
    experts: Any,
    name: str,
    product: Product,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    shares, chosen = top_k_weights.reshape(-1, 1), top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    up, down = _weights(experts, first_weight(experts)), _weights(experts, "down_proj")
    outs, begin = [], 0
    for expert, number in enumerate(torch.bincount(chosen).tolist()):
        places = order[begin : begin + number]
        begin += number
        if not number:
            continue
        tokens = places // top_k_index.shape[-1]
        samples = partial(_of_samples, tokens, len(hidden_states))
        x = hidden_states[tokens]
        matrix = expert_name(f"{name}.{first_weight(experts)}", expert)
        out = product(matrix, x, _multiplied(x, up, expert), samples)
        x = experts._apply_gate(out) if experts.has_gate else experts.act_fn(out)
        matrix = expert_name(f"{name}.down_proj", expert)
        out = product(matrix, x, _multiplied(x, down, expert), samples)
        if getattr(experts, "has_post_expert_norm", False):
            out = experts.post_expert_norm(out)
        outs.append(out * shares[places])
    total = torch.cat(outs)[torch.argsort(order)].view(*top_k_index.shape, -1).sum(dim=-2)
    return total.to(hidden_states.dtype)


def _multiplied(x: torch.Tensor, weights: _Weights, expert: int) -> torch.Tensor:
    weight, bias = weights
    return F.linear(x, weight[expert], None if bias is None else bias[expert])


def _weights(experts: Any, leaf: str) -> _Weights:
    """Weights as experts×d_out×d_in, and biases. With a LoRA on them they are made when they are
    read: once for all experts.
    """
    weight = getattr(experts, leaf)
    bias = getattr(experts, f"{leaf}_bias") if experts.has_bias else None
    return weight.transpose(-2, -1) if experts.is_transposed else weight, bias


def _of_samples(tokens: torch.Tensor, count: int, values: torch.Tensor) -> torch.Tensor:
    """Of values by sample (samples×r) those of tokens, by their places among all `count`."""
    each, rest = divmod(count, len(values))
    if rest:  # tokens of no even number per sample: shared out evenly
        return values.mean(dim=0, keepdim=True)
    return values[tokens // each]
