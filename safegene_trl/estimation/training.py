"""What a step of a LoRA training holds, reckoned from a model's shapes: nothing is run, so that a
model of any size is told of at once, and nothing is measured.

A training that recomputes its layers holds, beside weights, factors and optimizer,

    2 · s · T · h · L + max(16 · T · V, 1.5 · s · T · w),

in bytes for T tokens, L layers, the residual stream's width h, the vocabulary V, numbers of s bytes
and all inputs and outputs w of a layer's matrices: what is kept of every layer, and the larger of the
logits with their gradients and one layer. Without recomputing it holds every layer and the logits.
"""

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.experts import can_be_changed, matrix_shapes
from ..models.names import layer_index, shared_parameter
from ..models.parameters import canonical_parameters, text_modules
from .cost import BYTES_OF_A_NUMBER, Launch


OF_A_LOGIT = 16  # bytes: logits, their float32 copy, its softmax and gradient
IN_A_LAYER = 1.5  # what is kept of an input or output, in its own bytes: most are read twice
PER_LAYER = 2  # of the residual stream: itself, and what the layer's norms make of it
NF4 = 0.52  # bytes of a number in 4 bits, with its share of constants that are quantised again
AROUND = 2**30  # bytes of the process on its GPU: libraries, kernels, communication
EXPERTS_OF_A_TOKEN = 8  # where a config does not say how many it goes through


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model that a LoRA is trained on.

    Attributes:
        parameters: Numbers in its weights, tied ones once.
        in_layers: Those of its linear layers but the head, which bitsandbytes holds in 4 bits.
        factors: Numbers of a LoRA of rank 1.
        layers: How many there are.
        hidden: Width of the residual stream.
        width: Inputs and outputs of all matrices in the widest layer that a token goes through.
        vocabulary: Entries of the head.
    """

    parameters: int
    in_layers: int
    factors: int
    layers: int
    hidden: int
    width: int
    vocabulary: int

    @classmethod
    def of(cls, skeleton: nn.Module, adapted: Collection[str] | None = None) -> "ModelSizes":
        """Those of a model without its weights, from `load_skeleton`.

        Args:
            skeleton: The model.
            adapted: Last parts of the names of the linear layers that have a LoRA; None of all.
        """
        model: Any = skeleton
        text = model.config.get_text_config()
        shapes = {
            name: shape
            for name, shape in matrix_shapes(text_modules(model)).items()
            if can_be_changed(name)
        }
        plain = {name: shape for name, shape in shapes.items() if not shared_parameter(name)}
        return cls(
            parameters=sum(p.shape.numel() for p in canonical_parameters(model)),
            in_layers=sum(rows * columns for rows, columns in plain.values()),
            factors=sum(
                sum(shape)
                for name, shape in plain.items()
                if adapted is None or name.rpartition(".")[2] in adapted
            ),
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            width=_width(shapes, getattr(text, "num_experts_per_tok", None) or EXPERTS_OF_A_TOKEN),
            vocabulary=int(text.vocab_size),
        )

    def weights(self, itemsize: int, four_bit: bool = False) -> int:
        """Bytes of the weights; in 4 bits the linear layers alone, the others are float32 then."""
        if not four_bit:
            return self.parameters * itemsize
        return int(NF4 * self.in_layers) + 4 * (self.parameters - self.in_layers)


def training_bytes(
    sizes: ModelSizes,
    rank: int,
    tokens: int,
    itemsize: int,
    launch: Launch = Launch(),  # noqa: B008  (frozen)
    four_bit: bool = False,
    checkpointing: bool = True,
) -> int:
    """Bytes that one process holds at the peak of a step, about.

    Args:
        sizes: The model's.
        rank: The LoRA's.
        tokens: In one batch of one process.
        itemsize: Bytes of a number of the weights and activations.
        launch: In how many processes, and whether they share out the weights.
        four_bit: Whether the base is held in 4 bits.
        checkpointing: Whether layers are recomputed in the backward pass.
    """
    held = launch.held(sizes.weights(itemsize, four_bit), itemsize)
    learned = BYTES_OF_A_NUMBER * rank * sizes.factors
    learned = math.ceil(learned / launch.processes) if launch.sharded else learned
    logits = OF_A_LOGIT * tokens * sizes.vocabulary
    layer = int(IN_A_LAYER * itemsize * tokens * sizes.width)
    kept = PER_LAYER * itemsize * tokens * sizes.hidden * sizes.layers + max(logits, layer)
    return AROUND + held + learned + (kept if checkpointing else layer * sizes.layers + logits)


def _width(shapes: dict[str, tuple[int, int]], experts: int) -> int:
    """Inputs and outputs of a layer's matrices, of experts those that a token goes through."""
    plain: dict[int | None, int] = defaultdict(int)
    of_experts: dict[tuple[int | None, str], list[int]] = defaultdict(list)
    for name, shape in shapes.items():
        layer, parameter = layer_index(name), shared_parameter(name)
        if parameter is None:
            plain[layer] += sum(shape)
        else:
            of_experts[layer, parameter].append(sum(shape))
    for (layer, _), sums in of_experts.items():
        plain[layer] += sum(sums[:experts])
    return max(plain.values(), default=0)
