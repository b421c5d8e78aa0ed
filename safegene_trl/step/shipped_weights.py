"""The weights as they are shipped, in the place of a live model's own for as long as they are
measured.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..checkpoints.live_merge import OWN_TYPES, merged_tensor
from ..checkpoints.merge_terms import ScaledVector
from ..distributed.layouts import Sharding
from ..errors import OutputError
from ..models.attachment import VectorAttachment
from ..models.coefficients import CoefficientSpace
from ..models.data_types import WrittenTypes
from ..models.experts import factors_on
from ..models.names import shared_parameter
from ..models.parameters import Parameter, canonical_parameters, trained_rows
from ..models.replacement import replaced, without_adapters
from ..models.rounding import Rounding


class ShippedWeights:
    """The weights that are shipped with something added, in the live ones' place from one use to
    the next.

    What is accepted is measured next: its weights are worked out once for both. They make way for
    those with something else added, or when they are closed; after an error at once.

    Args:
        put: Puts the weights with what is added into the live ones' place for as long as it is
            open.
    """

    def __init__(self, put: Callable[[ScaledVector], AbstractContextManager[None]]):
        self._put, self._held = put, ExitStack()
        self._added: ScaledVector | None = None

    @contextmanager
    def of(self, added: ScaledVector) -> Iterator[None]:
        """While open, and until they are closed, the weights are those with this added."""
        try:
            if not self._are_of(added):
                self.close()
                self._held.enter_context(self._put(added))
                self._added = added
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Puts the live weights back."""
        self._added = None
        self._held.close()

    def _are_of(self, added: ScaledVector) -> bool:
        held = self._added
        if held is None or held.deltas is not added.deltas:
            return False
        pairs = zip(held.coefficients.values(), added.coefficients.values(), strict=True)
        return all(torch.equal(*map(torch.as_tensor, pair)) for pair in pairs)


class TriedRounding(Rounding):
    """Of coefficients that are tried, and may be left: that a weight is not finite with them is
    said by `check`, once they are taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self._error: OutputError | None = None

    def add(self, *arguments: Any, **options: Any) -> None:
        """As `Rounding.add`, which raises nothing here."""
        try:
            super().add(*arguments, **options)
        except OutputError as error:
            self._error = self._error or error

    def check(self) -> dict[str, Any]:
        """As `Rounding.check`; raises what `add` met as well."""
        if self._error is not None:
            raise self._error
        return super().check()


@contextmanager
def merged_weights(
    model: nn.Module,
    vector: ScaledVector,
    sharding: Sharding,
    rounding: Rounding | None = None,
    types: WrittenTypes = OWN_TYPES,
) -> Iterator[None]:
    """While open, the weights are those of a merged checkpoint: the LoRA folded in, added in
    float32, rounded to the data type that is written.

    Args:
        model: The live fine-tune.
        vector: What its weights still lack.
        sharding: How the model is spread over ranks.
        rounding: Is told what the data types leave of the vector's part.
        types: In which data types it is written; live tensors can hold them.
    """

    shared = {shared_parameter(name) for name in vector.deltas}

    def merged(parameter: Parameter) -> torch.Tensor | None:
        """None for a tensor that is shipped as it is."""
        if parameter.is_weight:
            rows = trained_rows(parameter.module)
            acted_on = parameter.module_name in vector.deltas or bool(rows)
        else:
            acted_on = parameter.canonical in shared
        rounded = types.of(parameter) != parameter.tensor.dtype
        if not (acted_on or rounded or factors_on(parameter)):
            return None
        return merged_tensor(parameter, vector, sharding, rounding, types)

    with (
        replaced(list(canonical_parameters(model)), merged, sharding),
        without_adapters(model),
    ):
        yield


@contextmanager
def beside_weights(model: nn.Module, added: ScaledVector, sharding: Sharding) -> Iterator[None]:
    """While open, deltas act beside the weights, as an adapter does.

    Args:
        model: The live fine-tune.
        added: What acts, with a coefficient of every rank-one part.
        sharding: How the model is spread over ranks.
    """
    ranks = {name: delta.a.shape[0] for name, delta in added.deltas.items()}
    with ExitStack() as attached:
        for rank in sorted(set(ranks.values())):
            own = {name: delta for name, delta in added.deltas.items() if ranks[name] == rank}
            one = ScaledVector(own, added.coefficients)
            attached.enter_context(_of_one_rank(model, one, rank, sharding))
        yield


def _of_one_rank(
    model: nn.Module, added: ScaledVector, rank: int, sharding: Sharding
) -> AbstractContextManager[None]:
    deltas = added.deltas
    space = CoefficientSpace.of(deltas, [rank], "rank")
    # experts of one parameter share theirs
    by_name = {
        name: value
        for module, names in space.modules.items()
        for name, value in zip(
            names, torch.as_tensor(added.coefficients[module]).tolist(), strict=True
        )
    }
    values = space.values(by_name).to(sharding.device)
    return VectorAttachment(model, deltas, space, sharding).applied(values)
