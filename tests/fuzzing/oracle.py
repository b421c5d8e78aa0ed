"""What a mutated safety vector must lead to, told without the package's own reader.

A mutation states its `Outcome`: refused with a message of a certain kind, loaded with exactly the
content that `plain_content` finds in the files, or loaded exactly as before. Random changes of the
config are judged by `config_reasons`, a second reading of the format by a JSON schema.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonschema import Draft202012Validator
from jsonschema.validators import extend

from safegene_trl import SafetyVector


CONFIG, WEIGHTS = "safegene_config.json", "adapter_model.safetensors"
PROMPTS, ADAPTER_CONFIG, SIGNATURE = "safety_prompts.jsonl", "adapter_config.json", "model.sig"
HASHED = (WEIGHTS, PROMPTS, ADAPTER_CONFIG)
SIGNED = (CONFIG, *HASHED)
SECTIONS = (
    "family",
    "aligned_model",
    "degraded_model",
    "extraction",
    "selection",
    "software",
    "files",
)
MOST_BYTES = {
    CONFIG: 2**24,
    WEIGHTS: 2**34,
    PROMPTS: 2**26,
    ADAPTER_CONFIG: 2**20,
    SIGNATURE: 2**20,
}

# The messages of every check, by kind; `{}` is what the check is about.
MESSAGES = {
    "missing": "lacks {}|no {}|{} .*(is no plain file|cannot be read)",
    "too large": "{} of .* is larger than any",
    "no JSON": "{} of .* is not valid JSON",
    "no UTF-8": "{} of .* is not UTF-8",
    "version": "has format version",
    "keys": "lacks or adds",
    "section": "`{}` in .* is not as it must be",
    "changed": "{} of .* is truncated or was changed",
    "unreadable": f"{WEIGHTS} of .* cannot be read",
    "tensor": "holds an unexpected tensor",
    "pair": "is not a pair B·A",
    "not finite": "holds NaN or infinity",
    "empty": "is empty",
    "ranks": "differ in rank",
    "other weights": "describes other weights",
    "row": "A row of .* lacks `prompt`",
    "targets": "The soft targets of a row",
    "empty prompt": "A row of .* has an empty prompt",
    "twice": "has a prompt to measure on twice",
    "kind": "A row of .* is of kind",
    "use": "A row of .* is for the use",
    "verdict": "A row of .* has the verdict",
    "fields of a test": "A row of .* to measure on has other fields",
    "test record": "nothing says how the aligned model was asked",
    "harmful answer": "a response to a harmful prompt that the aligned model answers",
    "refusal": "something else than a refusal",
    "refusal of a benign prompt": "answers a benign prompt with a refusal",
    "unsigned": "is not signed",
    "signature": "does not carry a valid signature",
    "coverage": "does not cover",
}


def message(kind: str, about: str = "") -> str:
    """The pattern of a refusal's message."""
    return MESSAGES[kind].replace("{}", about.replace(".", r"\."))


@dataclass(frozen=True)
class Outcome:
    """What loading must lead to.

    Attributes:
        refused: Patterns of which the message must match one; empty where the vector must load.
        as_before: Whether it must load exactly as the vector before the mutation; else as its files
            say now.
        signed_refused: The same patterns where a signature is asked for; the message of the other
            loading is good there, too. Empty where the signature still holds.
    """

    refused: tuple[str, ...] = ()
    as_before: bool = False
    signed_refused: tuple[str, ...] = (message("signature"),)


LOADS = Outcome()
AS_BEFORE = Outcome(as_before=True, signed_refused=())


def refused(kind: str, about: str = "") -> Outcome:
    return Outcome((message(kind, about),))


def signature_refused(*kinds: str) -> Outcome:
    """The files are as they were and load; only the signature fails."""
    return Outcome(as_before=True, signed_refused=tuple(message(kind) for kind in kinds))


def content_of(vector: SafetyVector) -> dict[str, Any]:
    """All that a loaded vector holds; tensors by their bits."""
    found: dict[str, Any] = {section: getattr(vector, section) for section in SECTIONS}
    tensors = {}
    for module, delta in vector.deltas.items():
        for half, tensor in (("A", delta.a), ("B", delta.b)):
            bits = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            kind = str(tensor.dtype).removeprefix("torch.")
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = (
                kind,
                list(tensor.shape),
                bits,
            )
    return found | {
        "family": vector.family.to_dict(),
        "prompts": vector.prompts,
        "tensors": tensors,
    }


def plain_content(folder: Path) -> dict[str, Any]:
    """The same, read from files that are taken to be right."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    lines = (folder / PROMPTS).read_text(encoding="utf-8").split("\n")
    header, data = read_weights(folder / WEIGHTS)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[entry["dtype"]]
            tensors[name] = (kind, entry["shape"], data[begin:end])
    return {
        **{section: config[section] for section in SECTIONS},
        "prompts": [json.loads(line) for line in lines if line.strip()],
        "tensors": tensors,
    }


def read_weights(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def record(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as a config holds them."""
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**40}
_HASH = {"type": "string", "pattern": r"\A[0-9a-f]{64}\Z"}


def _exactly(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_REFERENCE = _exactly(
    name=_TEXT,
    revision={"type": ["string", "null"]},
    files={
        "type": "object",
        "propertyNames": {"pattern": r"\A[^/]+\Z", "not": {"enum": [".", ".."]}},
        "additionalProperties": _HASH,
    },
)
_SCHEMAS: dict[str, Any] = {
    "family": _exactly(
        architecture=_TEXT,
        fingerprint=_TEXT,
        vocab_size=_COUNT,
        tokenizer=_TEXT,
        chat_template={"type": ["string", "null"]},
    ),
    "aligned_model": _REFERENCE,
    "degraded_model": _REFERENCE,
    "extraction": {
        "type": "object",
        "properties": {
            "method": _TEXT,
            "rank": _COUNT | {"minimum": 1},
            "components": {"type": "array", "items": _COUNT | {"minimum": 1}},
        },
        "required": ["method", "rank"],
    },
    "selection": {
        "type": "object",
        "properties": {
            "method": _TEXT,
            "scores": {
                "type": "array",
                "items": {"type": "number", "exclusiveMinimum": -1e30, "exclusiveMaximum": 1e30},
            },
            "selected_layers": {"type": "array", "items": _COUNT},
        },
        "required": ["method", "scores", "selected_layers"],
    },
    "software": {"type": "object", "additionalProperties": _TEXT},
    "files": _exactly(**{name: _exactly(bytes=_COUNT, sha256=_HASH) for name in HASHED}),
}
_TYPES = Draft202012Validator.TYPE_CHECKER.redefine(  # JSON schema takes 2.0 for an integer
    "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
)
_Strict = extend(Draft202012Validator, type_checker=_TYPES)


def config_reasons(folder: Path, whole: dict[str, Any]) -> tuple[str, ...]:
    """Every reason for which the config must be refused, as patterns of messages; none where it
    must load.

    Args:
        folder: The vector, whose other files are as they were.
        whole: The config as it was.
    """
    content = (folder / CONFIG).read_bytes()
    try:
        config = json.loads(content.decode(), parse_constant=_refuse, object_pairs_hook=_unique)
    except UnicodeError:
        return (message("no UTF-8", CONFIG),)
    except (ValueError, RecursionError):
        return (message("no JSON", CONFIG),)
    version = config.get("format_version") if isinstance(config, dict) else None
    if type(version) is not int or version not in (2, 3):
        return (message("version"),)
    reasons = [] if set(config) == {"format_version", *SECTIONS} else [message("keys")]
    for section in set(config) & set(SECTIONS):
        value = config[section]
        wrong = not _Strict(_SCHEMAS[section]).is_valid(value)
        if not wrong and section == "extraction":
            wrong = sum(value.get("components", [value["rank"]])) != value["rank"]
        if wrong:
            reasons.append(message("section", section))
    if not reasons:
        reasons += [
            message("changed", file)
            for file in HASHED
            if config["files"][file] != whole["files"][file]
        ]
        same = config["extraction"]["rank"] == whole["extraction"]["rank"]
        same &= config["selection"]["selected_layers"] == whole["selection"]["selected_layers"]
        reasons += [] if same else [message("other weights")]
    return tuple(reasons)


def _refuse(word: str) -> None:
    raise ValueError(word)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("twice")
    return dict(pairs)
