"""Whether a vector's hooks act: which of them fired, and the output of which of them the loss was
computed from.

A hook shows nothing where a module's forward is gone around: fused kernels and fast paths read the
weights themselves. The coefficient found for such a module would be one that nothing was measured
with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..distributed.layouts import Sharding
from ..errors import UnsupportedModelError
from .names import shared_parameter


SWITCH_OFF = (
    "switch off fused kernels and fast paths (axolotl's `lora_mlp_kernel`, `lora_qkv_kernel` and `lora_o_kernel`; Unsloth's "
    "patches), or run `safegene apply` on the finished fine-tune"
)


@dataclass
class Evidence:
    """What hooks have seen, by canonical module name.

    Attributes:
        fired: Modules with a delta whose forward was called.
        reached: Those of them to whose output a backward pass came: the loss depends on it. That
            its gradient is 0 there, as that of a key is at the first token, does not matter.
        called: Items of module lists (layers, experts) whose forward was called.
    """

    fired: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)

    def gather(self, names: Sequence[str], items: Sequence[str], sharding: Sharding) -> "Evidence":
        """Collective: the evidence of all ranks together."""
        pairs = ((self.fired, names), (self.reached, names), (self.called, items))
        flags = torch.tensor([float(name in seen) for seen, known in pairs for name in known])
        sums = iter(sharding.sum(flags).tolist())
        return Evidence(*({name for name in known if next(sums)} for _, known in pairs))


def list_items(names: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Of each named module the items of module lists on its path, itself included: its layer, its
    expert.
    """
    return {
        name: [prefix for prefix in _prefixes(name) if _is_item(prefix, modules)] for name in names
    }


def check_effective(
    evidence: Evidence, items: Mapping[str, Sequence[str]], graded: bool = True
) -> list[str]:
    """The modules that no token was sent to: experts of a mixture of which another one was called.

    Args:
        evidence: Of at least one forward pass.
        items: From `list_items`, of all modules that have a delta.
        graded: Whether there was a backward pass too.

    Raises:
        UnsupportedModelError: A module's forward is bypassed, or its output is not used; it is
            named.
    """
    silent = [name for name in items if name not in evidence.fired]
    waiting = [name for name in silent if _is_passed_over(name, items[name], evidence)]
    _refuse([name for name in silent if name not in waiting], "is never called")
    if graded:
        unused = [name for name in items if name in evidence.fired - evidence.reached]
        _refuse(
            unused,
            "is called, but its output does not reach the logits, or their gradient does not come back",
        )
    return waiting


def _is_passed_over(name: str, items: Sequence[str], evidence: Evidence) -> bool:
    """Whether an item on the path was not called and another one of its list was, or another expert
    of its parameter.
    """
    if parameter := shared_parameter(name):  # its experts are no modules
        return any(shared_parameter(other) == parameter for other in evidence.fired)
    for item in items:
        neighbours = item.rpartition(".")[0] + "."
        if item not in evidence.called and any(
            other.startswith(neighbours) for other in evidence.fired
        ):
            return True
    return False


def _refuse(names: Sequence[str], what: str) -> None:
    if names:
        more = f" (as {len(names) - 1} more)" if len(names) > 1 else ""
        raise UnsupportedModelError(
            f"`{names[0]}`{more} {what} in the model's forward pass, so that the safety vector cannot be measured there: "
            f"{SWITCH_OFF}."
        )


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_item(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parent = modules.get(name.rpartition(".")[0])
    return isinstance(parent, nn.ModuleList | nn.ModuleDict)
