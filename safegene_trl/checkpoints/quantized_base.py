"""The 16-bit base of a live fine-tune whose own base is quantised: what its LoRA and the vector are
merged into, from file to file. Nothing is requantised, and the live weights are not read.
"""

from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..distributed.shapes import class_name
from ..errors import UnsupportedModelError
from ..models.parameters import (
    Parameter,
    adapter_configs,
    base_model,
    canonical_modules,
    canonical_parameters,
    saved_copy,
    task_factors,
    unadapted,
)
from ..models.quantized import is_quantized, kept_codes
from .loading import UNREADABLE, read_config
from .merge_terms import Term
from .row_blocks import RowReader, row_blocks
from .source import adapter_base, stored_weights
from .stored_model import StoredModel
from .tensor_file import StoredTensor


LEAST_KEPT = 0.99  # of a weight's quantised numbers: another device may round a few otherwise
REMEDY = "name its 16-bit model as `output.merge_base`, or set `output.output_format: adapter`"


@dataclass
class QuantizedFineTune(StoredModel):
    """A base's files with the LoRA of a live fine-tune on them, as its weights are at the moment.

    Attributes:
        base: The base alone.
        live: The live fine-tune.
    """

    base: StoredModel
    live: nn.Module

    @classmethod
    def on(cls, base: StoredModel, live: nn.Module) -> "QuantizedFineTune":
        """A live fine-tune on its base's files, with the config that it was trained with.

        Raises:
            UnsupportedModelError: The files make a model of another kind.
        """
        model: Any = base.model
        trained = base_model(live)
        if class_name(model) != class_name(trained):
            raise UnsupportedModelError(
                f"The fine-tune is a {class_name(trained)} and {base.name} is loaded as a {class_name(model)}: set "
                "`output.output_format: adapter`."
            )
        dtype = model.config.dtype
        model.config = deepcopy(trained.config)
        model.config.__dict__.pop("quantization_config", None)
        model.config.dtype = dtype
        model.generation_config = deepcopy(trained.generation_config)
        return cls(model, base.files, base.name, base, live, types=base.types)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """As of any stored model; with the live modules, and with the live tensors that the adapter
        holds whole.
        """
        live = {parameter.name: parameter for parameter in canonical_parameters(self.live)}
        return {
            name: self._trained(parameter, live[parameter.name])
            if parameter.name in live
            else parameter
            for name, parameter in self.base.parameters.items()
        }

    def _trained(self, stored: Parameter, live: Parameter) -> Parameter:
        tensor = live.tensor if self.is_whole(live) else stored.tensor
        return Parameter(stored.name, tensor, stored.module_name, live.module)

    def is_whole(self, live: Parameter) -> bool:
        """Whether the adapter holds a tensor in the place of the base's: by `modules_to_save`, or a
        trained bias.
        """
        biases = {getattr(config, "bias", "none") for config in adapter_configs(self.live).values()}
        trained = "all" in biases or ("lora_only" in biases and isinstance(live.module, LoraLayer))
        return saved_copy(live.module) is not None or (trained and live.name.endswith("bias"))

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """As of any stored model, on the CPU."""
        return {name: tensor.cpu() for name, tensor in super().own_tensors().items()}

    def _adapted_parameters(self) -> Iterable[Parameter]:
        return canonical_parameters(self.live)

    def task_terms(self, name: str) -> list[Term]:
        """As of any stored model, on the CPU."""
        return [term.cpu() for term in super().task_terms(name)]

    @property
    def dtype(self) -> str:
        """Of most of the files' numbers, e.g. `bfloat16`."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.files.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
        return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


def open_base(name_or_path: str | None, revision: str | None = None) -> StoredModel:
    """The 16-bit model that a fine-tune of a quantised base is merged into; headers are read.

    Raises:
        UnsupportedModelError: It cannot be read, is an adapter, or is quantised itself.
        CheckpointError: Its files are damaged, or not those of its model.
    """
    if not name_or_path:
        raise UnsupportedModelError(
            f"The base model is quantised, and the fine-tune does not say where its files are: {REMEDY}."
        )
    what = f"The base model is quantised, and {name_or_path}, into which the fine-tune would be merged,"
    try:
        is_adapter = adapter_base(name_or_path, revision) is not None
        config = None if is_adapter else read_config(name_or_path, revision)
        is_quantised = getattr(config, "quantization_config", None) is not None
        plain = not (is_adapter or is_quantised)
        files = stored_weights(name_or_path, revision) if plain else {}
    except (UnsupportedModelError, *UNREADABLE) as error:
        raise UnsupportedModelError(f"{what} cannot be read: {REMEDY}.") from error
    if is_adapter:
        raise UnsupportedModelError(f"{what} is an adapter: {REMEDY}.")
    if is_quantised:  # its files are not the aligned model's, which the origin check compares
        raise UnsupportedModelError(
            f"{what} is quantised itself: {REMEDY}, with `allow_other_base: true` beside the second."
        )
    return StoredModel.open(name_or_path, revision, files)


def check_base(fine_tune: QuantizedFineTune, changed: Collection[str]) -> None:
    """Raises unless the files are those that a live fine-tune's quantised base was made from.

    Names and shapes are compared, what is not quantised number by number, and quantised weights by
    what the files' are quantised to.

    Args:
        fine_tune: The live fine-tune on the files.
        changed: Names of the modules that the vector changes.

    Raises:
        UnsupportedModelError: They are another model's, or hold a module in another form.
    """
    stored, live = fine_tune.base, fine_tune.live
    modules = canonical_modules(live)
    adapted = [name for name, module in modules.items() if task_factors(module)]
    for name in (*adapted, *changed):
        if not stored.pieces(name):
            raise UnsupportedModelError(
                f"The files of {stored.name} hold `{name}` in another form than the model: set `output.output_format: adapter`."
            )
    found = {parameter.name: parameter for parameter in canonical_parameters(live)}
    with RowReader() as reader:
        for name, parameter in stored.parameters.items():
            own = found.get(parameter.name)
            if own is None:  # a name of a tied weight
                continue
            alike = tuple(own.shape) == stored.files[name].shape
            layer = unadapted(own.module)
            if alike and own.is_weight and is_quantized(layer):
                alike = kept_codes(layer, stored.matrix(reader, own.module_name)) >= LEAST_KEPT
            elif alike and not fine_tune.is_whole(own):
                alike = _is_rounded(own.tensor.detach(), stored.files[name], reader, name)
            if not alike:
                raise UnsupportedModelError(
                    f"`{parameter.name}` of {stored.name} is not the one that the quantised base was made from: name that base's "
                    "16-bit model as `output.merge_base`, or set `output.output_format: adapter`."
                )


def _is_rounded(live: torch.Tensor, stored: StoredTensor, reader: RowReader, name: str) -> bool:
    """Whether live numbers are the stored ones in some data type that they went through."""
    dtypes = (stored.dtype, live.dtype, torch.bfloat16, torch.float16)
    rows = live.reshape(-1, stored.columns)
    for block in row_blocks(name, stored):
        here, there = rows[block.first : block.stop].cpu(), reader.rows(stored, block)
        if not any(torch.equal(here, there.to(dtype).to(here.dtype)) for dtype in dtypes):
            return False
    return True
