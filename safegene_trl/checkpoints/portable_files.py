"""Configs and tokenizers that servers and older versions of transformers read as well.

transformers 5 saves them in a form of its own. Version 4, and what is built on it, refuses its
tokenizers, and takes the rotary base that it does not find for 10,000: such a model answers
nonsense and says nothing. So what a fine-tune left as it was stays in the words of its own files,
and the rest is told in both forms. Whatever is written here is read back by transformers and
compared: where it does not say the same, its own form is written.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file


TOKENIZER_CONFIG = "tokenizer_config.json"
_OF_THE_RUN = ("use_cache", "_name_or_path", "transformers_version")  # not of the model
_ROTARY = ("rope_theta", "rope_scaling")  # version 4's names for `rope_parameters`
_ANY_FAST = "PreTrainedTokenizerFast"  # what version 5 calls TokenizersBackend


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Writes `config.json` so that transformers 5 reads `config` from it, and others what they know
    of it.
    """
    own_form = deepcopy(config)
    own_form.save_pretrained(folder)
    file = folder / CONFIG_NAME
    saved = json.loads(file.read_text(encoding="utf-8"))
    original = _original(str(getattr(config, "_name_or_path", "") or ""))
    # a training switches it off for itself
    use_cache = original.get("use_cache", True)
    if "use_cache" in saved:
        saved["use_cache"] = use_cache
    told = _with_rotary_base(_in_its_words(saved, original, type(config)))
    if not _same(_read(type(config), told), _read(type(config), saved)):
        told = saved
    text = json.dumps(told, indent=2, sort_keys=True) + "\n"
    file.write_text(text, encoding="utf-8")


def _original(name_or_path: str) -> dict[str, Any]:
    """The config that a model came with: of a folder, or of the hub's cache; empty if there is
    none.
    """
    if not name_or_path:
        return {}
    try:
        found = cached_file(name_or_path, CONFIG_NAME, local_files_only=True)
        content = json.loads(Path(str(found)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_its_words(
    saved: Mapping[str, Any], original: Mapping[str, Any], kind: type[PreTrainedConfig]
) -> dict[str, Any]:
    """The original with what is not as it says."""
    if original.get("model_type") != saved.get("model_type"):
        return dict(saved)
    known = _read(kind, original)
    if known is None:
        return dict(saved)
    told = {key: value for key, value in original.items() if key in saved or key not in known}
    for key, value in saved.items():
        if key not in known or known[key] != value:
            told |= _changed(key, value, original)
            if key == "rope_parameters":  # the original's names for it say what it was
                for name in _ROTARY:
                    told.pop(name, None)
    told["transformers_version"] = saved.get("transformers_version")
    return told


def _changed(key: str, value: Any, original: Mapping[str, Any]) -> dict[str, Any]:
    """What says it under the names that the original uses."""
    if key == "dtype" and "torch_dtype" in original:
        return {"torch_dtype": value}
    return {key: value}


def _with_rotary_base(config: dict[str, Any]) -> dict[str, Any]:
    """With `rope_theta` and `rope_scaling`, as version 4 calls what version 5 has in
    `rope_parameters`.
    """
    rotary = config.get("rope_parameters")
    if not isinstance(rotary, Mapping) or "rope_theta" not in rotary or "rope_theta" in config:
        return config
    scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return config | {"rope_theta": rotary["rope_theta"], "rope_scaling": None if plain else scaling}


def _read(kind: type[PreTrainedConfig], content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What transformers makes of a config's file, None where it makes nothing of it."""
    try:
        return kind.from_dict(deepcopy(dict(content))).to_dict()
    except Exception:  # of any kind: an original can be of any version
        return None


def _same(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    if one is None or other is None:
        return False
    # version 4's names are kept beside its own, as it keeps whatever it does not know
    ignored = {*_OF_THE_RUN, *_ROTARY, "torch_dtype"}
    return all(one.get(key) == other.get(key) for key in (one.keys() | other.keys()) - ignored)


def save_processor(processor: Any, folder: Path) -> None:
    """Writes a tokenizer, or the processor that holds it, so that version 4 reads it as well."""
    processor.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    if not file.is_file():
        return
    saved = file.read_text(encoding="utf-8")
    told = _in_version_4(json.loads(saved))
    if told == json.loads(saved):
        return
    file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = getattr(processor, "tokenizer", processor)
    if not _reads_as(tokenizer, folder):
        file.write_text(saved, encoding="utf-8")


def _in_version_4(config: Mapping[str, Any]) -> dict[str, Any]:
    told = dict(config)
    if told.get("tokenizer_class") == "TokenizersBackend":
        told["tokenizer_class"] = _ANY_FAST
    if isinstance(told.get("extra_special_tokens"), list):
        told["additional_special_tokens"] = told.pop("extra_special_tokens")
    return told


def _reads_as(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether what lies in the folder is this tokenizer."""
    try:
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # of any kind: then transformers' own form is kept
        return False
    return (
        read.get_vocab() == tokenizer.get_vocab()
        and read.special_tokens_map == tokenizer.special_tokens_map
        and read.all_special_ids == tokenizer.all_special_ids
        and read.chat_template == tokenizer.chat_template
    )
