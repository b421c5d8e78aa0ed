"""The residual stream of a live model: the layers that it passes, the modules that write to it, and
directions added to it while a model runs.

    h_l ← h_l + α d_l

is plain activation steering (arXiv 2308.10248, in the form of arXiv 2606.05290): no weight changes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ConfigError, UnsupportedModelError
from .eager import running_eagerly
from .names import layer_index
from .parameters import base_model, linear_shape, text_modules
from .rounding import is_finite


# last part of the name of a linear layer whose output is added to the residual stream
_WRITERS = {
    "o_proj",
    "out_proj",
    "down_proj",
    "dense",
    "dense_4h_to_h",
    "c_proj",
    "fc2",
    "w2",
    "wo",
    "output_linear",
}


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The layers of the text model that the residual stream passes, by their index.

    Raises:
        UnsupportedModelError: It has none that transformers marks as such.
    """
    found: dict[int, nn.Module] = {}
    for name, module in text_modules(model).items():
        place = name.rpartition(".")[2]
        if isinstance(module, GradientCheckpointingLayer) and place.isdecimal():
            found.setdefault(int(place), module)
    if not found:
        raise UnsupportedModelError(
            f"No layers are known of {type(base_model(model)).__name__}: use a decoder that transformers has layers of."
        )
    return dict(sorted(found.items()))


def residual_writers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose outputs are added to the residual stream, by canonical name: those
    that end attention, MLP, mixer or convolution. Experts that lie in one parameter are not among
    them.

    Raises:
        UnsupportedModelError: There are none.
    """
    width = base_model(model).config.get_text_config().hidden_size
    found = {
        name: module
        for name, module in text_modules(model).items()
        if name.rpartition(".")[2] in _WRITERS
        and layer_index(name) is not None
        and (linear_shape(module) or (0, 0))[0] == width
    }
    if not found:
        raise UnsupportedModelError(
            f"No module of {type(base_model(model)).__name__} is known to write to the residual stream: use a model of "
            "attention and MLP layers with linear outputs."
        )
    return found


@torch.no_grad()
def bent_layers(model: nn.Module, input_ids: torch.Tensor) -> list[int]:
    """The layers in which the stream gets something else than what the modules of
    `residual_writers` write: a norm or a factor stands between, or experts write too.

    One pass; of each token the length of the difference is compared with that of what the stream
    gets, and the middle one of all tokens tells.

    Args:
        model: A plain one.
        input_ids: batch×tokens (int64), on the model's device.
    """
    layers = decoder_layers(model)
    written: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    got: dict[int, torch.Tensor] = {}

    def entered(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        got[index] = -(args[0] if args else kwargs["hidden_states"]).float()

    def left(index: int, layer: nn.Module, args: tuple, output: Any) -> None:
        got[index] = got[index] + stream_of(output).float()

    def wrote(index: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        written[index].append(output.to(torch.float32, copy=True))  # some layers add in place

    with ExitStack() as hooks:
        hooks.enter_context(running_eagerly(model))
        for index, layer in layers.items():
            before = layer.register_forward_pre_hook(partial(entered, index), with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(layer.register_forward_hook(partial(left, index)).remove)
        for name, module in residual_writers(model).items():
            hook = partial(wrote, layer_index(name) or 0)
            hooks.callback(module.register_forward_hook(hook).remove)
        base_model(model).base_model(input_ids=input_ids, use_cache=False)
    return [index for index in layers if not _is_sum(got[index], written[index])]


def _is_sum(got: torch.Tensor, written: list[torch.Tensor]) -> bool:
    if any(part.shape != got.shape for part in written):  # an expert sees some of the tokens
        return False
    rest = (got - torch.stack(written).sum(0)).norm(dim=-1) if written else got.norm(dim=-1)
    # more than what rounding in 16 bits leaves of a difference of two streams
    return bool((rest / got.norm(dim=-1)).median() < 0.2)


def stream_of(output: Any) -> torch.Tensor:
    """The residual stream (batch×tokens×hidden) in what a layer returns."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def steered(
    model: nn.Module, directions: Mapping[int, torch.Tensor], alpha: float = 1.0
) -> Iterator[None]:
    """While open, layer `l` of a model that runs, or generates, returns `h + α · directions[l]`.

    Nothing is written to the model, and the hooks are taken off in every case.

    Args:
        model: Plain or PEFT-wrapped, whole in this process.
        directions: By layer index a direction, `(hidden,)`; those of a vector that was made by
            `method: transport` are what `steering_directions` gives.
        alpha: How much of them is added: 1 is the length that they have. Never negative, as that
            would take refusals away.

    Raises:
        ConfigError: `alpha` is negative or no number, there is no such layer, or a direction has
            another width or is not finite.
        UnsupportedModelError: The model has no layers that are known.
    """
    if not (isinstance(alpha, Real) and math.isfinite(alpha) and alpha >= 0):
        raise ConfigError(f"`alpha` is {alpha}: it must be a number and never negative.")
    if not isinstance(directions, Mapping):
        raise ConfigError("`directions` must be a mapping from a layer to its direction.")
    layers = decoder_layers(model)
    width = base_model(model).config.get_text_config().hidden_size
    for index, direction in directions.items():
        if index not in layers:
            raise ConfigError(
                f"The model has no layer {index}: give directions for some of the layers 0 to {max(layers)}."
            )
        fits = isinstance(direction, torch.Tensor) and direction.shape == (width,)
        if not (fits and is_finite(float(alpha) * direction.detach().float())):
            raise ConfigError(
                f"The direction of layer {index} must be a tensor of {width} numbers, finite times `alpha` too: use one that was made "
                "for this model."
            )
    with ExitStack() as hooks:
        hooks.enter_context(running_eagerly(model))
        for index, direction in directions.items():
            hook = partial(_added, float(alpha) * direction.detach().float())
            hooks.callback(layers[index].register_forward_hook(hook).remove)
        yield


def _added(step: torch.Tensor, layer: nn.Module, inputs: tuple, output: Any) -> Any:
    stream = stream_of(output)
    moved = (stream.float() + step.to(stream.device)).to(stream.dtype)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


@contextmanager
def watched(
    outputs: Mapping[str, nn.Module],
    inputs: Mapping[str, nn.Module],
    seen: Callable[[str, torch.Tensor], None],
) -> Iterator[None]:
    """While open, `seen` is told of what modules return, or are given, at every pass.

    Args:
        outputs: By name, modules whose output is told of.
        inputs: By name, modules whose first input is.
        seen: Gets the name and the tensor, batch×tokens×width.
    """
    with ExitStack() as hooks:
        for name, module in outputs.items():
            hooks.callback(module.register_forward_hook(partial(_returned, seen, name)).remove)
        for name, module in inputs.items():
            hooks.callback(module.register_forward_pre_hook(partial(_given, seen, name)).remove)
        yield


def _returned(
    seen: Callable[[str, torch.Tensor], None], name: str, module: nn.Module, args: tuple, out: Any
) -> None:
    seen(name, stream_of(out))


def _given(
    seen: Callable[[str, torch.Tensor], None], name: str, module: nn.Module, args: tuple
) -> None:
    seen(name, args[0])
