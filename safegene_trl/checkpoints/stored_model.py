"""Finished models whose weights stay on disk.

Names, shapes and adapters come from a skeleton of the model without weights, so memory does not
grow with the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TypeVar

import torch
from torch import nn

from ..errors import CheckpointError
from ..models.data_types import WrittenTypes
from ..models.experts import Piece, expert_weights, factors_on, stored_pieces, weights_of
from ..models.names import expert_name, layer_index, shared_parameter, without_wrapper
from ..models.parameters import (
    Parameter,
    TrainedRows,
    as_stored,
    base_model,
    canonical_modules,
    canonical_parameters,
    is_transposed,
    task_factors,
    text_parameters,
    tied_weights,
    trained_rows,
)
from ..models.supported import check_supported
from .completeness import stored_names
from .merge_terms import Term, add_terms, expert_task_terms, task_terms
from .row_blocks import Block, RowReader, row_blocks
from .skeleton import is_placeholder, load_skeleton
from .source import adapter_base, stored_weights
from .tensor_file import StoredTensor


Found = TypeVar("Found")


@dataclass
class StoredModel:
    """A finished checkpoint, or an adapter on one.

    Attributes:
        model: The model without its weights; an adapter on it is real.
        files: The checkpoint's (or the base model's) tensors by their names in its files.
        name: What it was opened by, for messages.
        types: In which data types it is written when something is merged into it.
    """

    model: nn.Module
    files: dict[str, StoredTensor]
    name: str
    types: WrittenTypes = field(default_factory=WrittenTypes, kw_only=True)

    @classmethod
    def open(
        cls,
        name_or_path: str,
        revision: str | None = None,
        files: dict[str, StoredTensor] | None = None,
    ) -> "StoredModel":
        """Reads headers, config and adapter.

        Args:
            name_or_path: Directory or hub id of a checkpoint or LoRA adapter.
            revision: Branch, tag or commit on the hub.
            files: Its headers from `stored_weights`, if they are read already.

        Raises:
            UnsupportedModelError: Quantised, or a fine-tune whose weights cannot be merged exactly.
            CheckpointError: A weight file is missing or damaged, lacks a tensor of the model, or
                holds one that is not its own.
        """
        files = stored_weights(name_or_path, revision) if files is None else files
        model = load_skeleton(name_or_path, revision, files)
        check_supported(model)
        stored = cls(model, files, name_or_path)
        if unlike := sorted(stored.required_names - files.keys()):
            raise CheckpointError(
                f"{adapter_base(name_or_path, revision) or name_or_path} has another name for `{unlike[0]}`: load it by transformers and save it by `save_pretrained` first."
            )
        return stored

    @cached_property
    def required_names(self) -> set[str]:
        """The names in the files of all that the model reads. What else lies in the files is copied
        as it is.
        """
        return self._stored(canonical_parameters(self.model))

    @cached_property
    def text_files(self) -> dict[str, str]:
        """Those of the text model alone, by the names that they have without a wrapper."""
        return {without_wrapper(name): name for name in self._stored(text_parameters(self.model))}

    def _stored(self, parameters: Iterable[Parameter]) -> set[str]:
        tensors = {
            parameter.name: torch.empty(
                parameter.shape, dtype=parameter.tensor.dtype, device="meta"
            )
            for parameter in parameters
        }
        # Of tied weights the files may hold any one.
        for name, group in tied_weights(self.model).items():
            held = sorted(group & self.files.keys())
            if name in tensors and held and name not in held:
                tensors[held[0]] = tensors.pop(name)
        return set(stored_names(base_model(self.model), tensors))

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The model's parameters by their names in the files, where one tensor of a file is one
        parameter.
        """
        found: dict[str, Parameter] = {}
        for parameter in canonical_parameters(self.model):
            names = [parameter.name]
            if parameter.name not in self.files:
                mark = torch.empty(parameter.shape, device="meta")
                names = [
                    name
                    for name, part in as_stored(self.model, parameter.name, mark).items()
                    if part is mark
                ]
            found |= {name: parameter for name in names if name in self.files}
        return found

    @cached_property
    def weight_files(self) -> dict[str, str]:
        """Name in the files of every module's weight, by canonical module name."""
        return {
            parameter.module_name: name
            for name, parameter in self.parameters.items()
            if parameter.is_weight
        }

    @cached_property
    def experts(self) -> dict[str, list[Piece]]:
        """Where the files hold the experts that lie in one parameter of the model, by the names of
        their matrices.
        """
        found: dict[str, list[Piece]] = {}
        for parameter in canonical_parameters(self.model):
            pieces = stored_pieces(self.model, parameter) or []
            found |= {
                expert_name(parameter.canonical, expert): own
                for expert, own in enumerate(pieces)
                if all(piece.name in self.files for piece in own)
            }
        return found

    def pieces(self, matrix: str) -> list[Piece]:
        """Where the files hold a linear layer's weight, or an expert's; nothing where they hold it
        in another form than the model.
        """
        if shared_parameter(matrix):
            return self.experts.get(matrix, [])
        if (name := self.weight_files.get(matrix)) is None:
            return []
        return [Piece(name, 0, 0, self.files[name].num_rows)]

    def is_transposed(self, matrix: str) -> bool:
        """Whether the matrix is stored as `(d_in, d_out)`."""
        if (parameter := shared_parameter(matrix)) is None:
            return is_transposed(self._modules[matrix])
        module, _, leaf = parameter.rpartition(".")
        return expert_weights(self._modules[module])[leaf].transposed

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return canonical_modules(self.model)

    def spread(self, matrix: str, terms: Iterable[Term]) -> list[tuple[str, Term]]:
        """Terms of a matrix as those of the tensors that the files hold it in, by their names."""
        return [
            (
                piece.name,
                replace(
                    term,
                    left=term.left[piece.offset : piece.offset + piece.rows],
                    first=piece.first,
                ),
            )
            for term in terms
            for piece in self.pieces(matrix)
        ]

    @property
    def has_full_rank_changes(self) -> bool:
        """Whether an adapter changes linear layers by more than low-rank additions: by DoRA, or by
        weights of its own.
        """
        weights = [parameter for parameter in self.parameters.values() if parameter.is_weight]
        factors = [factor for parameter in weights for factor in task_factors(parameter.module)]
        own = [parameter for parameter in weights if not is_placeholder(parameter.tensor)]
        layers = [parameter for parameter in own if layer_index(parameter.module_name) is not None]
        return any(factor.dora is not None for factor in factors) or any(
            p.tensor.dim() > 1 for p in layers
        )

    def written_dtype(self, name: str) -> torch.dtype:
        """In which data type a tensor of the files is written."""
        return self.types.of_named(name, self.files[name].dtype)

    @property
    def written_bytes(self) -> int:
        """Size of the weights that are written."""
        return sum(
            prod(file.shape) * self.written_dtype(name).itemsize
            for name, file in self.files.items()
        )

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """What an adapter holds in the place of whole tensors of its base model, e.g. by
        `modules_to_save`; float32 where another data type than the files' is written.
        """
        own = {
            name: self._held(name, parameter.tensor.detach()).contiguous()
            for name, parameter in self.parameters.items()
            if not is_placeholder(parameter.tensor)
        }
        return self._under_each_name(own)

    def _held(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        stored = self.files[name].dtype
        return tensor.to(stored if self.written_dtype(name) == stored else torch.float32)

    @cached_property
    def trained_rows(self) -> dict[str, list[TrainedRows]]:
        """What an adapter holds in the place of single rows of its base model's tensors, by their
        names in the files.
        """
        found = {
            name: rows
            for name, parameter in self.parameters.items()
            if parameter.is_weight and (rows := trained_rows(parameter.module))
        }
        return self._under_each_name(found)

    def _under_each_name(self, found: dict[str, Found]) -> dict[str, Found]:
        for name, group in tied_weights(
            self.model
        ).items():  # a file may hold a tied weight under both names
            if (held := self._in_files(name)) in found:
                names = {self._in_files(other) for other in group}
                found |= dict.fromkeys(names & self.files.keys(), found[held])
        return found

    def put_trained_rows(self, block: Block, rows: torch.Tensor) -> None:
        """Puts what an adapter holds of a block's rows in their place."""
        for trained in self.trained_rows.get(block.name, ()):
            inside = (trained.indices >= block.first) & (trained.indices < block.stop)
            rows[trained.indices[inside] - block.first] = trained.values.detach()[inside].to(rows)

    def _in_files(self, name: str) -> str:
        """What the files call a tensor that has this name in the model."""
        if name in self.files:
            return name
        return next(iter(stored_names(base_model(self.model), {name: torch.empty(0)})), name)

    def _adapted_parameters(self) -> Iterable[Parameter]:
        """The parameters of the model that has the adapter."""
        return canonical_parameters(self.model)

    def task_terms(self, name: str) -> list[Term]:
        """What the adapter adds to a tensor of the base model."""
        return self._task_terms.get(name, [])

    @cached_property
    def _task_terms(self) -> dict[str, list[Term]]:
        found: dict[str, list[Term]] = {}
        for parameter in self._adapted_parameters():
            if not (factors := factors_on(parameter)):
                continue
            if (experts := weights_of(parameter)) is None:
                module = parameter.module_name
                terms = [(module, term) for term in task_terms(factors, self.is_transposed(module))]
            else:
                terms = [
                    (expert_name(parameter.canonical, expert), term)
                    for expert, term in expert_task_terms(factors, experts)
                ]
            for matrix, term in terms:
                for name, part in self.spread(matrix, [term]):
                    found.setdefault(name, []).append(part)
        return found

    @torch.no_grad()
    def matrix(self, reader: RowReader, matrix: str) -> torch.Tensor:
        """A linear layer's weight, or an expert's, with the adapter folded in: d_out×d_in, float32."""
        pieces = self.pieces(matrix)
        columns = self.files[pieces[0].name].columns
        weight = torch.empty(sum(piece.rows for piece in pieces), columns)
        for piece in pieces:
            shift = piece.offset - piece.first
            for block in row_blocks(piece.name, self.files[piece.name], piece.first, piece.rows):
                weight[block.first + shift : block.stop + shift] = self.rows(reader, block)
        return weight.T if self.is_transposed(matrix) else weight

    @torch.no_grad()
    def rows(self, reader: RowReader, block: Block, buffer: str = "wide") -> torch.Tensor:
        """A block of a tensor with the adapter folded in, float32, in a buffer of this thread."""
        parameter = self.parameters.get(block.name)
        if parameter is None or is_placeholder(parameter.tensor):
            stored = reader.rows(self.files[block.name], block)
        else:
            stored = parameter.tensor.detach().reshape(-1, self.files[block.name].columns)[
                block.first : block.stop
            ]
        wide = reader.scratch(stored, buffer)
        self.put_trained_rows(block, wide)
        add_terms(wide, self.task_terms(block.name), block.first)
        return wide
