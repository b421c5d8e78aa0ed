"""`SafetyVector`: a model family's reusable safety weights, on disk an ordinary PEFT LoRA
directory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from safetensors.torch import load, save_file

from ..config.search import Granularity
from ..errors import FamilyError
from ..models.coefficients import CoefficientSpace
from ..models.low_rank import LowRankDelta
from ..models.names import layer_ranges, layers_of, without_wrapper
from ..provenance import sha256_of_bytes, sha256_of_file, software_versions
from . import files as vector_files
from .audit_file import AUDIT_FILE
from .card import audit_record, vector_card
from .family import Family
from .files import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    HASHED_FILES,
    PREFIX,
    PROMPTS_FILE,
    SIGNED_FILES,
    WEIGHTS_FILE,
)
from .record import component_names_of, components_of, read_record
from .signing import SIGNATURE_FILE


@dataclass
class SafetyVector(
    ModelHubMixin,
    library_name="safegene-trl",
    tags=["safegene", "safety-vector", "lora"],
):
    """A family's safety vector: `V_m = B_m A_m` for every module `m` of the selected layers (arXiv
    2606.06519).

    On disk it is an ordinary PEFT LoRA directory with a record of its making, the aligned model's
    prompts and answers, and perhaps a signature. `save_pretrained` and `push_to_hub` are
    huggingface_hub's.

    Attributes:
        deltas: By canonical module name the factors `a` (`(r, d_in)`) and `b` (`(d_out, r)`) of its
            delta: float16, bfloat16 or float32, on the CPU; one rank r for all.
        family: The model family it fits: architecture, shapes, tokenizer and chat template, as
            hashes.
        aligned_model: Name, revision and file hashes of the aligned model.
        degraded_model: The same of the degraded model.
        extraction: How the deltas were made: method, rank, share (0–1) of `‖ΔW‖²` kept per module.
        selection: How the layers were selected: method, scores per layer, selected layers.
        prompts: Rows `{"prompt": str, "response": str, "kind": "harmful" | "benign"}`, perhaps with
            `category`; the responses are the aligned model's own. Harmful rows carry refusals only.
            From format 3 on `targets` are what it says to the response's first tokens: `tokens`
            (k), and of the likeliest in each place `ids` and `log_probs` (k×m, nats). `verdict`,
            `refused` or `answered`, is what it does where that is not what the kind asks for; rows
            with the `use` `measure` have it, and neither response nor targets.
        software: Versions it was made with.
        files: Size (bytes) and SHA-256 of every other file of a saved vector.
        signature: The content of the signature file it was loaded with, None where there was none.
            It is saved again with the files that it was loaded with, and with no others.
        audit: The content of the `audit.json` beside it, None where there was none. It is saved
            again beside these very weights, and told of in the card. No signature covers it.
    """

    deltas: dict[str, LowRankDelta]
    family: Family
    aligned_model: dict[str, Any]
    degraded_model: dict[str, Any]
    extraction: dict[str, Any]
    selection: dict[str, Any]
    prompts: list[dict[str, Any]]
    software: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    signature: bytes | None = None
    audit: bytes | None = None
    _signed_hashes: dict[str, str] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    _weights: bytes | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._hub_mixin_config = (
            None  # the mixin's config.json would duplicate safegene_config.json
        )

    @property
    def rank(self) -> int:
        """r, the rank of every delta."""
        return next(iter(self.deltas.values())).a.shape[0]

    @property
    def layers(self) -> list[int]:
        """Indices of the layers it acts in, in order."""
        return layers_of(self.deltas)

    @property
    def layer_ranges(self) -> str:
        """The same for people: `0–3, 7`."""
        return layer_ranges(self.layers)

    @property
    def components(self) -> list[int]:
        """Ranks of its components, which have coefficients of their own; as a rule there is one."""
        return components_of(self.extraction, self.rank)

    @property
    def component_names(self) -> list[str]:
        """What they are called in the names of their coefficients: `shared` and the categories in a
        vector by category, else numbers from 0.
        """
        return component_names_of(self.extraction, self.rank)

    def space(self, granularity: Granularity) -> CoefficientSpace:
        """Its coefficients at one granularity.

        Args:
            granularity: `layer`, `module` or `rank`.
        """
        return CoefficientSpace(self.deltas, self.components, granularity, self.component_names)

    def check_fits(self, modules: dict[str, torch.nn.Module]) -> None:
        """Checks that every delta has a linear layer, or an expert, of its name and shape in a
        model.

        Args:
            modules: The model's modules by canonical name.

        Raises:
            FamilyError: One has not.
        """
        from ..models.experts import matrix_shapes

        shapes = matrix_shapes(modules)
        for name, delta in self.deltas.items():
            shape = shapes.get(name)
            if shape is None:
                raise FamilyError(
                    f"The model has no linear layer `{name}`: use a safety vector of its own family."
                )
            if shape != (delta.b.shape[0], delta.a.shape[1]):
                raise FamilyError(
                    f"`{name}` is {shape[0]}×{shape[1]} in the model and {delta.b.shape[0]}×{delta.a.shape[1]} in the "
                    "safety vector: use a vector of the model's own family."
                )

    # Saving and loading go through huggingface_hub's mixin: `save_pretrained`, `from_pretrained`,
    # `push_to_hub`.

    def _save_pretrained(self, save_directory: Path) -> None:
        self._save_weights(save_directory / WEIGHTS_FILE)
        adapter_config = vector_files.adapter_config(
            self.deltas, self.rank, self.aligned_model["name"]
        )
        (save_directory / ADAPTER_CONFIG_FILE).write_text(adapter_config, encoding="utf-8")
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.prompts)
        (save_directory / PROMPTS_FILE).write_text(rows, encoding="utf-8")
        self.files = {
            name: vector_files.file_record(save_directory / name) for name in HASHED_FILES
        }
        (save_directory / CONFIG_FILE).write_text(
            json.dumps(self.describe(), indent=2) + "\n", encoding="utf-8"
        )
        # What cannot be loaded again is not to be saved.
        config = vector_files.read_config(
            (save_directory / CONFIG_FILE).read_bytes(), str(save_directory)
        )
        vector_files.check_consistent(config, self.rank, self.layers, str(save_directory))
        self._save_signature(save_directory)
        self._save_audit(save_directory / AUDIT_FILE)

    def _save_weights(self, path: Path) -> None:
        if self._weights is not None:
            path.write_bytes(self._weights)
            return
        tensors = {}
        for name, delta in self.deltas.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = delta.a.contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = delta.b.contiguous()
        save_file(tensors, path, metadata={"format": "pt"})

    def with_prompts(
        self,
        weights: bytes | None,
        prompts: list[dict[str, Any]],
        extraction: dict[str, Any],
        selection: dict[str, Any],
    ) -> "SafetyVector":
        """The same vector with other prompts. Its weights file is saved as it was, byte for byte,
        so that what refers to its hash (coefficients, histories, checkpoints) refers to the new one
        as well; a signature is not carried over.

        Args:
            weights: The bytes of that file, which the deltas were read from; None where they were not
                read from one.
            prompts: The rows.
            extraction: The record, with what is to be said of the prompts.
            selection: The same.
        """
        found = SafetyVector(
            self.deltas,
            self.family,
            self.aligned_model,
            self.degraded_model,
            extraction,
            selection,
            prompts,
            software_versions(),
        )
        found._weights = weights
        return found

    def _save_signature(self, folder: Path) -> None:
        """Only with the very files that were signed; an earlier one in the folder is of other
        files.
        """
        hashes = {name: sha256_of_file(folder / name) for name in SIGNED_FILES}
        if self.signature is not None and hashes == self._signed_hashes:
            (folder / SIGNATURE_FILE).write_bytes(self.signature)
        else:
            (folder / SIGNATURE_FILE).unlink(missing_ok=True)

    def _save_audit(self, path: Path) -> None:
        """Only beside the very weights that it is of; an earlier one in the folder goes."""
        if self.audit is not None and audit_record(self) is not None:
            path.write_bytes(self.audit)
        else:
            path.unlink(missing_ok=True)

    def describe(self) -> dict[str, Any]:
        """The content of `safegene_config.json`."""
        return {
            "format_version": vector_files.format_version(self.prompts),
            "family": self.family.to_dict(),
            "aligned_model": self.aligned_model,
            "degraded_model": self.degraded_model,
            "extraction": self.extraction,
            "selection": self.selection,
            "software": self.software,
            "files": self.files,
        }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "SafetyVector":
        """Loads and checks a vector.

        Args:
            pretrained_model_name_or_path: Local directory or hub id.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`;
                `public_key`, a PEM file that the vector's signature is checked with, before
                anything else is read.

        Returns:
            The vector, its factors on the CPU in the data type they were saved in.

        Raises:
            ConfigError: An argument is unknown.
            SignatureError: It is not signed, or not with that key, or was changed since.
            VectorError: Missing, altered, truncated, of another format version, or with NaN or
                infinite values.
        """
        vector_files.reject_unknown_arguments(kwargs)
        # The mixin's own lookup of a config.json is skipped: a vector has none.
        return cls._from_pretrained(model_id=str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, public_key: str | Path | None = None, **kwargs: Any
    ) -> "SafetyVector":
        contents = vector_files.read_files(model_id, **kwargs)
        return cls.from_files(contents, model_id, None if public_key is None else Path(public_key))

    @classmethod
    def from_files(
        cls, contents: Mapping[str, bytes], name: str, public_key: Path | None = None
    ) -> "SafetyVector":
        """From the bytes of its files, as `vector_files.read_files` gives them; checked as by
        `from_pretrained`.

        Args:
            contents: The files' bytes by name.
            name: Where they come from, for messages.
            public_key: PEM file that the signature is checked with.

        Raises:
            SignatureError: It is not signed, or not with that key, or was changed since.
            VectorError: Altered, truncated, of another format version, or with NaN or infinite
                values.
        """
        record = read_record(contents, name, public_key)
        tensors = load(contents[WEIGHTS_FILE])
        vector = cls(
            deltas={
                without_wrapper(module): LowRankDelta(
                    *(tensors[f"{PREFIX}{module}.{side}.weight"] for side in ("lora_A", "lora_B"))
                )
                for module in record.modules
            },
            prompts=record.prompts,
            signature=record.signature,
            audit=contents.get(AUDIT_FILE),
            **{section: getattr(record, section) for section in vector_files.SECTIONS},
        )
        if record.signature is not None:
            vector._signed_hashes = {file: sha256_of_bytes(contents[file]) for file in SIGNED_FILES}
        return vector

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that lies beside a saved vector: family, makers, numbers, licence of the aligned
        model.

        Args:
            *args: As huggingface_hub passes them; not used.
            **kwargs: The same.
        """
        return vector_card(self)
