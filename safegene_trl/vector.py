"""`SafetyVector`: a model family's reusable safety weights, on disk an ordinary PEFT LoRA directory."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .attach import LowRankDelta
from .errors import FamilyError, SafeGeneError, VectorError
from .family import Family
from .provenance import sha256_of_file
from .signing import SIGNATURE_FILE, verify
from .weights import layer_index, linear_shape


FORMAT_VERSION = 1
CONFIG_FILE = "safegene_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROMPTS_FILE = "safety_prompts.jsonl"
SIGNED_FILES = (CONFIG_FILE, WEIGHTS_FILE, PROMPTS_FILE, "adapter_config.json")
_PREFIX = "base_model.model."


@dataclass
class SafetyVector(
    ModelHubMixin,
    library_name="safegene-trl",
    tags=["safegene", "safety-vector", "lora"],
):
    """A family's safety vector: `V_m = B_m A_m` for every module `m` of the selected layers (arXiv 2606.06519).

    Attributes:
        deltas: Low-rank deltas by canonical module name; all of one rank.
        family: The model family it fits.
        aligned_model: Name, revision and file hashes of the aligned model.
        degraded_model: The same of the degraded model.
        extraction: How the deltas were made: method, rank, energy kept per module.
        selection: How the layers were selected: method, scores per layer, selected layers.
        prompts: Rows `{"prompt": str, "response": str, "kind": "harmful" | "benign"}`; the responses are the aligned
            model's own. Harmful rows carry refusals only.
        software: Versions it was made with.
    """

    deltas: dict[str, LowRankDelta]
    family: Family
    aligned_model: dict[str, Any]
    degraded_model: dict[str, Any]
    extraction: dict[str, Any]
    selection: dict[str, Any]
    prompts: list[dict[str, str]]
    software: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._hub_mixin_config = None  # the mixin's config.json would duplicate safegene_config.json

    @property
    def rank(self) -> int:
        return next(iter(self.deltas.values())).a.shape[0]

    @property
    def layers(self) -> list[int]:
        """Indices of the layers it acts in, in order."""
        return sorted({index for name in self.deltas if (index := layer_index(name)) is not None})

    def coefficient_names(self, granularity: str) -> dict[str, str]:
        """The name of every module's coefficient: its layer's (`layers.12`) or its own."""
        if granularity == "module":
            return {name: name for name in self.deltas}
        return {name: f"layers.{layer_index(name)}" for name in self.deltas}

    def check_fits(self, modules: dict[str, torch.nn.Module]) -> None:
        """Raises `FamilyError` unless every delta has a linear module of its name and shape in the model."""
        for name, delta in self.deltas.items():
            shape = linear_shape(modules[name]) if name in modules else None
            if shape is None:
                raise FamilyError(f"The model has no linear layer `{name}`: use a safety vector of its own family.")
            if shape != (delta.b.shape[0], delta.a.shape[1]):
                raise FamilyError(
                    f"`{name}` is {shape[0]}×{shape[1]} in the model and {delta.b.shape[0]}×{delta.a.shape[1]} in the "
                    "safety vector: use a vector of the model's own family."
                )

    # Saving and loading go through huggingface_hub's mixin: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {}
        for name, delta in self.deltas.items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = delta.a.contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = delta.b.contiguous()
        save_file(tensors, save_directory / WEIGHTS_FILE, metadata={"format": "pt"})
        # alpha = rank, so that PEFT and vLLM apply B A unscaled.
        LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=sorted(self.deltas),
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=self.aligned_model["name"],
        ).save_pretrained(str(save_directory))
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.prompts)
        (save_directory / PROMPTS_FILE).write_text(rows, encoding="utf-8")
        self.files = {name: sha256_of_file(save_directory / name) for name in (WEIGHTS_FILE, PROMPTS_FILE)}
        (save_directory / CONFIG_FILE).write_text(json.dumps(self.describe(), indent=2) + "\n", encoding="utf-8")

    def describe(self) -> dict[str, Any]:
        """The content of `safegene_config.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "family": self.family.to_dict(),
            "aligned_model": self.aligned_model,
            "degraded_model": self.degraded_model,
            "extraction": self.extraction,
            "selection": self.selection,
            "software": self.software,
            "files": self.files,
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SafetyVector":
        """Loads and checks a vector.

        Args:
            pretrained_model_name_or_path: Local directory or hub id.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; `public_key`, a PEM file that
                the vector's signature is checked with, before anything else is read.

        Raises:
            SignatureError: It is not signed, or not with that key, or was changed since.
            VectorError: Missing, altered, truncated, of another format version, or with NaN or infinite values.
        """
        allowed = {"revision", "token", "cache_dir", "local_files_only", "force_download", "public_key"}
        if unknown := set(kwargs) - allowed:
            raise SafeGeneError(f"Unknown argument `{unknown.pop()}`: use one of {', '.join(sorted(allowed))}.")
        # The mixin's own lookup of a config.json is skipped: a vector has none.
        return cls._from_pretrained(model_id=str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> "SafetyVector":
        public_key = kwargs.pop("public_key", None)
        folder = _locate(model_id, **kwargs)
        if public_key is not None:
            verify(folder, SIGNED_FILES, Path(public_key))
        config = _read_config(folder, model_id)
        for name in (WEIGHTS_FILE, PROMPTS_FILE):
            if not (folder / name).is_file():
                raise VectorError(f"The safety vector {model_id} lacks {name}: download or make it again.")
            if sha256_of_file(folder / name) != config["files"].get(name):
                raise VectorError(
                    f"{name} of the safety vector {model_id} is truncated or was changed after it was made: download or "
                    "make it again."
                )
        return cls(
            deltas=_read_deltas(folder / WEIGHTS_FILE, model_id),
            family=Family.from_dict(config["family"]),
            prompts=_read_prompts(folder / PROMPTS_FILE),
            **{key: config[key] for key in _SECTIONS if key != "family"},
        )

    def generate_model_card(self, *args: Any, **kwargs: Any):
        from .reporting.cards import vector_card

        return vector_card(self)


_SECTIONS = ("family", "aligned_model", "degraded_model", "extraction", "selection", "software", "files")


def _locate(model_id: str, **kwargs: Any) -> Path:
    if Path(model_id).is_dir():
        return Path(model_id)
    try:
        return Path(snapshot_download(model_id, allow_patterns=[*SIGNED_FILES, SIGNATURE_FILE], **kwargs))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise VectorError(
            f"The safety vector {model_id} is neither a local directory nor a readable hub repository: check the name, "
            "the revision and your access."
        ) from error


def _read_config(folder: Path, model_id: str) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise VectorError(
            f"{model_id} has no {CONFIG_FILE}: it is not a safety vector; make one by `safegene extract`."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VectorError(
            f"{CONFIG_FILE} of {model_id} is not valid JSON: download or make the vector again."
        ) from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise VectorError(
            f"The safety vector {model_id} has format version {version} and this safegene-trl reads {FORMAT_VERSION}: "
            "install the version it was made with, or make it again."
        )
    for section in _SECTIONS:
        if not isinstance(config.get(section), dict):
            raise VectorError(f"{CONFIG_FILE} of {model_id} lacks `{section}`: download or make the vector again.")
    return config


def _read_deltas(path: Path, model_id: str) -> dict[str, LowRankDelta]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                name, _, half = key.removesuffix(".weight").rpartition(".")
                if not key.startswith(_PREFIX) or half not in ("lora_A", "lora_B"):
                    raise VectorError(
                        f"The safety vector {model_id} holds an unexpected tensor `{key}`: make it again."
                    )
                halves.setdefault(name.removeprefix(_PREFIX), {})[half] = file.get_tensor(key)
    except SafetensorError as error:
        raise VectorError(f"{path.name} of {model_id} cannot be read: download or make the vector again.") from error
    deltas = {}
    for name, half in sorted(halves.items(), key=lambda item: _natural(item[0])):
        if set(half) != {"lora_A", "lora_B"} or half["lora_A"].shape[0] != half["lora_B"].shape[1]:
            raise VectorError(f"`{name}` of the safety vector {model_id} is not a pair B·A: make the vector again.")
        if not all(math.isfinite(tensor.float().sum().item()) for tensor in half.values()):
            raise VectorError(
                f"`{name}` of the safety vector {model_id} holds NaN or infinity: make the vector again."
            )
        deltas[name] = LowRankDelta(half["lora_A"], half["lora_B"])
    if not deltas:
        raise VectorError(f"The safety vector {model_id} is empty: make it again.")
    if len({delta.a.shape[0] for delta in deltas.values()}) > 1:
        raise VectorError(f"The modules of the safety vector {model_id} differ in rank: make it again with one rank.")
    return deltas


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _read_prompts(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        if not {"prompt", "response", "kind"} <= set(row):
            raise VectorError(f"A row of {path.name} lacks `prompt`, `response` or `kind`: make the vector again.")
    return rows
