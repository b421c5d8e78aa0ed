"""The data types in which the tensors of a checkpoint are written.

Hosts train in other types than they load: FSDP2 under mixed precision turns 16-bit weights into
float32 masters. What is written is then again what was loaded, unless users ask for a type.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import OutputError, UnsupportedModelError
from .parameters import Parameter, base_model, canonical_name, inside_adapter


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def asked_dtype(name: str) -> torch.dtype | None:
    """The data type that `output.dtype` names; None for `auto`."""
    return None if name == "auto" else getattr(torch, name)


def held_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The data types in which a model, of any kind, holds its floating-point tensors, by checkpoint
    name.
    """
    base = base_model(model)
    return {
        canonical_name(name): tensor.dtype
        for name, tensor in (*base.named_parameters(), *base.named_buffers())
        if tensor.is_floating_point() and not inside_adapter(name)
    }


@dataclass(frozen=True)
class WrittenTypes:
    """In which data type each tensor of a model is written.

    Attributes:
        asked: That of all floating-point tensors; None where each has its own.
        loaded: Where the host may have widened weights to spread them: by checkpoint name, the
            types before.
        kept: Parts of names whose float32 tensors transformers keeps in float32 beside 16-bit ones.
    """

    asked: torch.dtype | None = None
    loaded: Mapping[str, torch.dtype] = field(default_factory=dict)
    kept: Collection[str] = ()

    @classmethod
    def of_model(
        cls, model: nn.Module, name: str, loaded: Mapping[str, torch.dtype] | None = None
    ) -> "WrittenTypes":
        """Those of a model's checkpoint where `output.dtype` is `name`."""
        asked, kept = asked_dtype(name), set[str]()
        if asked in _SIXTEEN_BITS:
            base: Any = base_model(model)
            kept |= set(base._keep_in_fp32_modules_strict or ())
            if asked == torch.float16:
                kept |= set(base._keep_in_fp32_modules or ())
        return cls(asked, loaded or {}, kept)

    def of(self, parameter: Parameter) -> torch.dtype:
        """That of a live tensor."""
        return self.of_named(parameter.name, parameter.tensor.dtype)

    def of_named(self, name: str, held: torch.dtype) -> torch.dtype:
        """That of a tensor by its name, in a model or in its files, and the type that holds it."""
        if not held.is_floating_point:
            return held
        if self.asked is not None:
            keeps = held == torch.float32 and any(
                re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in self.kept
            )
            return held if keeps else self.asked
        before = self.loaded.get(name, held)
        return before if held == torch.float32 and before in _SIXTEEN_BITS else held

    def check_measurable(self, parameters: Iterable[Parameter]) -> None:
        """Raises where live tensors cannot hold what would be written of them, so that it could not
        be measured.

        Raises:
            UnsupportedModelError: A live tensor is of a narrower, or of the other 16-bit type.
        """
        for parameter in parameters:
            live, written = parameter.tensor.dtype, self.of(parameter)
            if torch.promote_types(live, written) != live:
                raise UnsupportedModelError(
                    f"`output.dtype` is {name_of(written)} and the live `{parameter.name}` is {name_of(live)}, which cannot hold it: "
                    f"what is written could not be measured. Leave it out, and run `safegene apply --dtype {name_of(written)}` on the "
                    "saved fine-tune."
                )


def name_of(dtype: torch.dtype) -> str:
    """E.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def check_range(name: str, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises `OutputError`, with the tensor's name, where finite numbers become infinite in the type
    that is written.
    """
    rounded = exact.to(dtype)
    lost = rounded.isinf() & exact.isfinite()
    if bool(lost.any()):
        largest = float(exact[lost].abs().max())
        raise OutputError(
            f"`{name}` has a number of {largest:.3g}, which is infinite in {name_of(dtype)}: set another `output.dtype`."
        )
