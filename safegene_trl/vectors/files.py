"""The files of a safety vector, read with distrust: whatever is not exactly what `save_pretrained`
writes is refused.

Nothing here runs code from a file, follows a name in a file to another file, or reads more than a
file may hold. What cannot be told from the files alone, a vector that was changed into another
valid one, is what signatures are for.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ..config.validation import is_template_options
from ..errors import SafeGeneError, VectorError
from ..judges.refusal_phrases import is_refusal
from ..models.names import is_label, shared_parameter
from ..models.reasoning import SafetyTarget, split_stored
from ..provenance import sha256_of_bytes, sha256_of_file
from .audit_file import AUDIT_FILE, MOST_BYTES
from .prompt_rows import MEASURE, VERDICTS, part_of, verdict_of
from .signing import SIGNATURE_FILE


FORMAT_VERSIONS = (2, 3)  # prompts have soft targets, verdicts and uses from 3 on
CONFIG_FILE = "safegene_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROMPTS_FILE = "safety_prompts.jsonl"
ADAPTER_CONFIG_FILE = "adapter_config.json"
HASHED_FILES = (WEIGHTS_FILE, PROMPTS_FILE, ADAPTER_CONFIG_FILE)
SIGNED_FILES = (CONFIG_FILE, *HASHED_FILES)
PREFIX = "base_model.model."
SECTIONS = (
    "family",
    "aligned_model",
    "degraded_model",
    "extraction",
    "selection",
    "software",
    "files",
)

_MOST_BYTES = {
    CONFIG_FILE: 2**24,
    WEIGHTS_FILE: 2**34,
    PROMPTS_FILE: 2**26,
    ADAPTER_CONFIG_FILE: 2**20,
    SIGNATURE_FILE: 2**20,
    AUDIT_FILE: MOST_BYTES,
}
_ADDED = {"targets", "verdict", "use"}  # fields of prompts that format 2 does not know
_MOST_TOKENS = 1024  # of a row's soft targets, and in each of their places
_NEARLY = 1.0  # nats from a response's token to the likeliest: rounding, a text tokenised anew
_ROUNDING = 0.01  # of probabilities that are rounded one by one
_NONE = object()  # in place of what a record need not have
_HASH = re.compile(r"[0-9a-f]{64}")
_FIELDS = f"A row of {PROMPTS_FILE} lacks `prompt`, `response` or `kind`: make the vector again."
_MEASURED_FIELDS = f"A row of {PROMPTS_FILE} to measure on has other fields than `prompt`, `kind` and `verdict`: make the vector again."


def read_files(name_or_path: str, **kwargs: Any) -> dict[str, bytes]:
    """The files of a vector by name, each opened once and read whole; downloaded if it is a hub id.

    All that is checked or used afterwards are these bytes, so it does not matter what happens to
    the files.

    Args:
        name_or_path: Local directory or hub id.
        **kwargs: Of `snapshot_download`.

    Returns:
        `SIGNED_FILES`, and `SIGNATURE_FILE` and `AUDIT_FILE` where there are such.

    Raises:
        VectorError: One is missing, no plain file, larger than any such file, or cannot be read.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _downloaded(name_or_path, **kwargs)
    try:
        # the folder is opened once as well: a link to it that is changed meanwhile gives no mixture
        # of two vectors
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise VectorError(
            f"The safety vector {name_or_path} cannot be read ({error.strerror})."
        ) from error
    try:
        found = {
            file: _read_whole(opened, file, name_or_path)
            for file in (*SIGNED_FILES, SIGNATURE_FILE, AUDIT_FILE)
        }
    finally:
        os.close(opened)
    if found[CONFIG_FILE] is None:
        raise VectorError(
            f"{name_or_path} has no {CONFIG_FILE}: it is not a safety vector; make one by `safegene extract`."
        )
    if missing := [file for file in SIGNED_FILES if found[file] is None]:
        raise VectorError(
            f"The safety vector {name_or_path} lacks {missing[0]}: download or make it again."
        )
    return {file: data for file, data in found.items() if data is not None}


def _downloaded(name: str, **kwargs: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=[*SIGNED_FILES, SIGNATURE_FILE, AUDIT_FILE], **kwargs
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise VectorError(
            f"The safety vector {name} is neither a local directory nor a readable hub repository: check the "
            "name, the revision and your access."
        ) from error


def _read_whole(folder: int, file: str, name: str) -> bytes | None:
    """All of a plain file that is not larger than any such file; None where there is none.

    Links are followed, because the hub's cache consists of them: to plain files only, never to a
    device or a pipe.
    """
    try:
        # a pipe must not be waited for
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VectorError(
            f"{file} of the safety vector {name} cannot be read ({error.strerror})."
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise VectorError(
                f"{file} of {name} is no plain file: download or make the vector again."
            )
        if status.st_size > _MOST_BYTES[file]:
            raise VectorError(
                f"{file} of {name} is larger than any such file: download or make the vector again."
            )
        with open(descriptor, "rb", closefd=False) as opened:
            data = opened.read(status.st_size + 1)
    except (OSError, MemoryError) as error:
        raise VectorError(
            f"{file} of the safety vector {name} cannot be read ({error})."
        ) from error
    finally:
        os.close(descriptor)
    if len(data) != status.st_size:
        raise VectorError(
            f"{file} of the safety vector {name} was changed while it was read: read it again."
        )
    return data


def file_record(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the config keeps them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def adapter_config(modules: Iterable[str], rank: int, base: str) -> str:
    """The content of `adapter_config.json`: a plain LoRA on these modules, as PEFT, vLLM and others
    read it.

    Experts that lie in one parameter are no modules: only `safegene` can put the vector on them.
    Alpha is the rank, so that they apply `B A` unscaled. What is left out is as PEFT has it by
    default. Sorted, one vector is one file whoever saves it.
    """
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(name for name in modules if not shared_parameter(name)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2) + "\n"


def format_version(prompts: Iterable[Mapping[str, Any]]) -> int:
    """The lowest that a vector with these prompts can have, so that earlier versions of this package
    read what they can.
    """
    plain, soft = FORMAT_VERSIONS
    return soft if any(_ADDED & set(row) for row in prompts) else plain


def read_config(data: bytes, name: str) -> dict[str, Any]:
    """The content of `safegene_config.json`, every field of the type it must have."""
    config = _json(_text(data, CONFIG_FILE, name), f"{CONFIG_FILE} of {name}")
    version = config.get("format_version") if isinstance(config, dict) else None
    if type(version) is not int or version not in FORMAT_VERSIONS:
        read = " and ".join(map(str, FORMAT_VERSIONS))
        raise VectorError(
            f"The safety vector {name} has format version {str(version)[:20]} and this safegene-trl reads {read}: "
            "install the version it was made with, or make it again."
        )
    if set(config) != {"format_version", *SECTIONS}:
        odd = sorted(set(config) ^ {"format_version", *SECTIONS})[0]
        raise VectorError(
            f"{CONFIG_FILE} of {name} lacks or adds `{odd[:40]}`: download or make the vector again."
        )
    for section in SECTIONS:
        if not isinstance(config[section], dict) or not _VALID[section](config[section]):
            raise VectorError(
                f"`{section}` in {CONFIG_FILE} of {name} is not as it must be: download or make the vector again."
            )
    return config


def check_files(contents: Mapping[str, bytes], name: str, records: dict[str, Any]) -> None:
    """Raises `VectorError` unless every file has the size and hash that the config says."""
    for file, record in records.items():
        data = contents[file]
        if len(data) != record["bytes"] or sha256_of_bytes(data) != record["sha256"]:
            raise VectorError(
                f"{file} of the safety vector {name} is truncated or was changed after it was made: download or make it again."
            )


def read_prompts(data: bytes, name: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prompts, most of them with the aligned model's own answers. A harmful prompt's must be a
    refusal; prompts to measure on have none.

    Args:
        data: The file's bytes.
        name: Where it comes from, for messages.
        config: The vector's, which says what its format has.
    """
    lines = _text(data, PROMPTS_FILE, name).split("\n")
    rows = [_json(line, f"{PROMPTS_FILE} of {name}") for line in lines if line.strip()]
    vocabulary = config["family"]["vocab_size"]
    for row in rows:
        _check_fields(row, config["format_version"])
        if "targets" in row and not _valid_targets(row["targets"], vocabulary):
            raise VectorError(
                f"The soft targets of a row of {PROMPTS_FILE} are not those of its response: make the vector again."
            )
        if row["kind"] not in ("harmful", "benign"):
            raise VectorError(
                f"A row of {PROMPTS_FILE} is of kind {row['kind'][:20]!r}: make the vector again."
            )
        if verdict_of(row) not in VERDICTS:
            raise VectorError(
                f"A row of {PROMPTS_FILE} has the verdict {row['verdict'][:20]!r}: make the vector again."
            )
        if not row["prompt"].strip():
            raise VectorError(
                f"A row of {PROMPTS_FILE} has an empty prompt: make the vector again without it."
            )
        if part_of(row) != "measure":
            _check_response(row, name)
        elif config["selection"].get("test_prompts") is None:
            raise VectorError(
                f"{PROMPTS_FILE} of {name} has prompts to measure on, and nothing says how the aligned model was asked them: make "
                "the vector again."
            )
    measured = [(row["kind"], row["prompt"]) for row in rows if part_of(row) == "measure"]
    if len(set(measured)) < len(measured):
        raise VectorError(
            f"{PROMPTS_FILE} of {name} has a prompt to measure on twice, which would count twice: make the vector again."
        )
    return rows


def _check_fields(row: Any, version: int) -> None:
    """Raises `VectorError` unless a row is texts under the names that a row of its use has."""
    texts = isinstance(row, dict) and {k: v for k, v in row.items() if k != "targets"}
    if not isinstance(row, dict) or not _is_mapping(texts, str):
        raise VectorError(_FIELDS)
    use, added = row.get("use"), _ADDED if version > 2 else set()
    if use is None or not added:
        needed, optional = {"prompt", "response", "kind"}, {"category"} | (added - {"use"})
    elif use == MEASURE:
        needed, optional = {"prompt", "kind", "verdict", "use"}, {"category"}
    else:
        raise VectorError(
            f"A row of {PROMPTS_FILE} is for the use {use[:20]!r}: make the vector again."
        )
    if set(row) - optional != needed:
        raise VectorError(_MEASURED_FIELDS if "use" in needed else _FIELDS)


def _check_response(row: Mapping[str, Any], name: str) -> None:
    """Raises `VectorError` unless a row's response does what its verdict says; a harmful prompt that
    is answered may have none.
    """
    refused = verdict_of(row) == "refused"
    if row["kind"] == "harmful" and not refused:
        raise VectorError(
            f"{PROMPTS_FILE} of {name} has a response to a harmful prompt that the aligned model answers: do not use this vector."
        )
    if is_refusal(split_stored(row["response"]).answer) != refused:
        found = (
            f"answers a {row['kind']} prompt with something else than"
            if refused
            else "answers a benign prompt with"
        )
        raise VectorError(f"{PROMPTS_FILE} of {name} {found} a refusal: do not use this vector.")


def _text(data: bytes, file: str, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeError as error:
        raise VectorError(
            f"{file} of {name} is not UTF-8: download or make the vector again."
        ) from error


def _json(text: str, what: str) -> Any:
    def unlike_json(word: str) -> None:
        raise ValueError(word)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=unlike_json, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise VectorError(
            f"{what} is not valid JSON: download or make the vector again."
        ) from error


def _is_mapping(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _valid_targets(targets: Any, vocabulary: int) -> bool:
    """Whether they can be what a model says to a response that it gave itself, its own tokens being
    about the likeliest: a target may not teach what the response does not say.
    """
    if not isinstance(targets, dict) or set(targets) != {"tokens", "ids", "log_probs"}:
        return False
    columns = [targets[key] for key in ("tokens", "ids", "log_probs")]
    return (
        all(isinstance(column, list) for column in columns)
        and 0 < len(columns[0]) <= _MOST_TOKENS
        and all(len(column) == len(columns[0]) for column in columns)
        and all(_valid_place(*each, vocabulary=vocabulary) for each in zip(*columns, strict=True))
        and len({len(ids) for ids in targets["ids"]}) == 1
    )


def _valid_place(token: Any, ids: Any, log_probs: Any, *, vocabulary: int) -> bool:
    """Whether these are the likeliest tokens in a token's place, it being about the likeliest: no
    other token of the vocabulary can have more of what they leave than the least of them.
    """
    if not (
        isinstance(ids, list)
        and isinstance(log_probs, list)
        and 0 < len(ids) == len(log_probs) <= _MOST_TOKENS
        and all(_is_count(each) and each < vocabulary for each in (token, *ids))
        and len(set(ids)) == len(ids)
        and all(_is_number(value) and value <= 0 for value in log_probs)
        and about_likeliest(token, ids, log_probs)
    ):
        return False
    known = [math.exp(value) for value in log_probs]
    most = (vocabulary - len(ids)) * min(known) * (1 + _ROUNDING)
    return -_ROUNDING <= 1 - sum(known) <= most + _ROUNDING


def about_likeliest(token: int, ids: Sequence[int], log_probs: Sequence[float]) -> bool:
    """Whether a token is the likeliest of its place, or as good as that."""
    return token in ids and max(log_probs) - log_probs[ids.index(token)] < _NEARLY


def _valid_family(family: dict[str, Any]) -> bool:
    texts = [family.get(key) for key in ("architecture", "fingerprint", "tokenizer")]
    template = family.get("chat_template")
    known = {"architecture", "fingerprint", "tokenizer", "chat_template", "vocab_size"}
    return (
        set(family) == known
        and all(isinstance(text, str) for text in texts)
        and (template is None or isinstance(template, str))
        and _is_count(family["vocab_size"])
    )


def _valid_reference(reference: dict[str, Any]) -> bool:
    revision = reference.get("revision")
    return (
        set(reference) == {"name", "revision", "files"}
        and isinstance(reference["name"], str)
        and (revision is None or isinstance(revision, str))
        and _is_mapping(reference["files"], str)
        and all(
            Path(file).name == file not in ("", "..") and _HASH.fullmatch(value)
            for file, value in reference["files"].items()
        )
    )


def _valid_extraction(extraction: dict[str, Any]) -> bool:
    rank = extraction.get("rank")
    components = extraction.get("components", [rank])
    return (
        isinstance(extraction.get("method"), str)
        and is_template_options(extraction.get("chat_template_kwargs", {}))
        and extraction.get("safety_target", "answer") in get_args(SafetyTarget)
        and _is_count(rank)
        and isinstance(components, list)
        and all(_is_count(part) and part > 0 for part in components)
        and sum(components) == rank
        and _valid_names(extraction.get("component_names", _NONE), len(components))
        and _valid_by_category(extraction.get("by_category", _NONE))
        and _valid_parts(extraction.get("vectors", []))
        and _valid_transport(extraction)
    )


def _valid_names(names: Any, components: int) -> bool:
    """Whether names of components, where there are any, can stand in names of coefficients."""
    return names is _NONE or (
        isinstance(names, list)
        and len(names) == components
        and all(map(is_label, names))
        and len(set(names)) == components
    )


def _valid_by_category(record: Any) -> bool:
    """Whether a record of a split by category, where there is one, can be shown."""
    if record is _NONE:
        return True
    categories = record.get("categories") if isinstance(record, dict) else None
    return isinstance(categories, dict) and all(
        isinstance(own, dict)
        and is_label(own.get("component"))
        and _is_count(own.get("prompts"))
        and all(_is_number(own.get(key)) for key in ("reads_own", "reads_others", "reads_benign"))
        for own in categories.values()
    )


def _valid_transport(extraction: dict[str, Any]) -> bool:
    """Whether a vector that was carried over from another model, and no other, says from which one,
    how well and whose refusals it brings.
    """
    record = extraction.get("transport")
    if (extraction.get("method") == "transport") != (record is not None):
        return False
    if record is None:
        return True
    if not isinstance(record, dict) or not isinstance(record.get("refusals"), dict):
        return False
    source, layers, detectors = (record.get(key) for key in ("source", "layers", "detectors"))
    return (
        isinstance(source, dict)
        and {"model"} <= set(source) <= {"model", "vector", "degraded_model"}
        and all(isinstance(each, dict) and _valid_reference(each) for each in source.values())
        and isinstance(record.get("transport_map"), str)
        and isinstance(layers, list)
        and layers != []
        # a length below 0 would turn the direction round
        and all(
            _are_numbers(layer, "cosine", "length") and layer["length"] >= 0 for layer in layers
        )
        and isinstance(detectors, dict)
        and detectors != {}
        and all(_are_numbers(own, "auc") for own in detectors.values())
        and record["refusals"].get("from") in ("target", "source")
    )


def _are_numbers(record: Any, *keys: str) -> bool:
    return isinstance(record, dict) and all(_is_number(record.get(key)) for key in keys)


def _valid_parts(parts: Any) -> bool:
    """Whether the records of combined vectors, where there are any, say how each was made, those of
    their own parts included.
    """
    left = [parts]
    while left:
        own = left.pop()
        if not isinstance(own, list) or not all(isinstance(part, dict) for part in own):
            return False
        made = [part.get("extraction") for part in own]
        if not all(
            isinstance(each, dict)
            and is_template_options(each.get("chat_template_kwargs", {}))
            and _valid_transport(each)
            for each in made
        ):
            return False
        left += [each.get("vectors", []) for each in made if each]
    return True


def _valid_selection(selection: dict[str, Any]) -> bool:
    scores, layers = selection.get("scores"), selection.get("selected_layers")
    return (
        isinstance(selection.get("method"), str)
        and isinstance(scores, list)
        and all(map(_is_number, scores))
        and isinstance(layers, list)
        and all(map(_is_count, layers))
        and _valid_stability(selection.get("stability"), len(scores))
        and _valid_categories(selection.get("categories"))
        and _valid_test_prompts(selection.get("test_prompts"))
    )


def _valid_stability(stability: Any, layers: int) -> bool:
    """Whether a record of how stable the selection is, where there is one, can be shown."""
    if stability is None:
        return True
    inclusion = stability.get("inclusion") if isinstance(stability, dict) else None
    return (
        isinstance(inclusion, list)
        and len(inclusion) == layers
        and all(map(_is_number, inclusion))
        and _is_number(stability.get("mean_jaccard"))
    )


def _valid_categories(categories: Any) -> bool:
    return categories is None or (
        isinstance(categories, dict)
        and all(
            isinstance(count, dict)
            and _is_count(count.get("asked"))
            and _is_count(count.get("refused"))
            for count in categories.values()
        )
    )


def _valid_test_prompts(record: Any) -> bool:
    """Whether a record of how prompts to measure on were asked, where there is one, says how long
    the answers were.
    """
    return record is None or (
        isinstance(record, dict)
        and all(_is_count(record.get(key)) for key in ("max_new_tokens", "max_reasoning_tokens"))
    )


def _valid_files(files: dict[str, Any]) -> bool:
    return set(files) == set(HASHED_FILES) and all(
        isinstance(record, dict)
        and set(record) == {"bytes", "sha256"}
        and _is_count(record["bytes"])
        and isinstance(record["sha256"], str)
        and bool(_HASH.fullmatch(record["sha256"]))
        for record in files.values()
    )


_VALID = {
    "family": _valid_family,
    "aligned_model": _valid_reference,
    "degraded_model": _valid_reference,
    "extraction": _valid_extraction,
    "selection": _valid_selection,
    "software": lambda software: _is_mapping(software, str),
    "files": _valid_files,
}


def check_consistent(config: dict[str, Any], rank: int, layers: list[int], name: str) -> None:
    """Raises `VectorError` unless the weights, of this rank and in these layers, are those that the
    config describes.
    """
    if config["extraction"]["rank"] != rank or config["selection"]["selected_layers"] != layers:
        raise VectorError(
            f"{CONFIG_FILE} of {name} describes other weights than {WEIGHTS_FILE} holds: download or make the vector again."
        )


def reject_unknown_arguments(kwargs: dict[str, Any]) -> None:
    """Raises `SafeGeneError` for an argument that loading does not take, `trust_remote_code` above
    all.
    """
    allowed = {"revision", "token", "cache_dir", "local_files_only", "force_download", "public_key"}
    if unknown := set(kwargs) - allowed:
        raise SafeGeneError(
            f"Unknown argument `{unknown.pop()}`: use one of {', '.join(sorted(allowed))}."
        )
