"""What was written, read back in the place of a live model's own: a checkpoint's tensors, or an
adapter's factors.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from ..checkpoints.adapter_output import read_adapter
from ..checkpoints.live_merge import OWN_TYPES
from ..checkpoints.merge_terms import ScaledVector
from ..checkpoints.read_ahead import ReadAhead
from ..checkpoints.tensor_file import stored_tensors
from ..distributed.layouts import Sharding
from ..errors import CheckpointError
from ..models.data_types import WrittenTypes, name_of
from ..models.experts import stored_pieces
from ..models.low_rank import broadcast_deltas
from ..models.parameters import Parameter, StoredForm, canonical_parameters
from ..models.replacement import replaced, without_adapters
from .shipped_weights import beside_weights


class WrittenTensors:
    """The tensors of a written checkpoint as values of a live model's parameters, in their order;
    on rank 0 only.

    Args:
        model: The live model.
        folder: The checkpoint; None on other ranks.
        files: Holds its files open for as long as values are asked for.
        types: In which data types it was to be written.

    Raises:
        CheckpointError: A tensor of the model is not in the files, or of another data type.
    """

    def __init__(
        self, model: nn.Module, folder: Path | None, files: ExitStack, types: WrittenTypes
    ):
        # by the names of live tensors the pieces of them in the files, one below the other; one that
        # is not among them is held in another form: no vector and no LoRA acts on it, and the live
        # one is what it was
        self._pieces: dict[str, list[str]] = {}
        self._left: set[str] = set()
        if folder is None:
            return
        stored, parameters = stored_tensors(folder), list(canonical_parameters(model))
        form = StoredForm(model, parameters, types.of)
        if missing := sorted(form.contents.keys() - stored.keys()):
            raise CheckpointError(
                f"The written checkpoint lacks {missing[0]}: run it again, and report this."
            )
        for name, meant in form.contents.items():
            if stored[name].dtype != meant.dtype:
                raise CheckpointError(
                    f"`{name}` in the written checkpoint is {name_of(stored[name].dtype)} and was to be {name_of(meant.dtype)}: run it "
                    "again, and report this."
                )
        self._left = stored.keys() - form.contents.keys()
        self._pieces = {
            each.name: [form.names[each.name]] if each.name in form.names else _pieces(model, each)
            for each in parameters
        }
        asked = [name for pieces in self._pieces.values() for name in pieces]
        self._tensors = files.enter_context(ReadAhead(stored, asked))

    def __call__(self, parameter: Parameter) -> torch.Tensor | None:
        found = []
        for name in self._pieces.get(parameter.name, ()):
            read, tensor = self._tensors.next()
            assert read == name
            found.append(tensor)
        if len(found) < 2:
            return found[0] if found else None
        return torch.cat(found).view(parameter.shape)

    def check_complete(self) -> None:
        """Raises `CheckpointError` for a tensor in the files that the model has not."""
        if self._left:
            raise CheckpointError(
                f"The written checkpoint holds {min(self._left)}, which the model has not: run it again, and report this."
            )


def _pieces(model: nn.Module, parameter: Parameter) -> list[str]:
    experts = stored_pieces(model, parameter) or []
    return [piece.name for own in experts for piece in own]


@contextmanager
def as_written(
    model: nn.Module, folder: Path, sharding: Sharding, types: WrittenTypes = OWN_TYPES
) -> Iterator[None]:
    """While open, every tensor of a live model holds what a checkpoint's files say."""
    with ExitStack() as held:
        with ExitStack() as files:
            with sharding.raising_together():
                value = WrittenTensors(model, folder if sharding.is_main else None, files, types)
            held.enter_context(replaced(list(canonical_parameters(model)), value, sharding))
        held.enter_context(without_adapters(model))
        with sharding.raising_together():
            value.check_complete()
        yield


@contextmanager
def with_adapter(model: nn.Module, place: Path, sharding: Sharding) -> Iterator[None]:
    """While open, a written adapter acts in the place of a live model's own."""
    with sharding.raising_together():
        deltas = read_adapter(place) if sharding.is_main else {}
    deltas = broadcast_deltas(deltas, sharding)
    ones = {name: torch.ones(delta.a.shape[0]) for name, delta in deltas.items()}
    with without_adapters(model), beside_weights(model, ScaledVector(deltas, ones), sharding):
        yield
