"""Configs and tokenizers that servers and older versions of transformers read as well.

transformers 5 saves them in a form of its own. Version 4, and what is built on it, refuses its
tokenizers, and takes the rotary embedding that it does not find for its default one (a base of
10,000): such a model answers nonsense and says nothing. So what a fine-tune left as it was stays in
the words of its own files, and a rotary embedding that those words do not tell is told in both
forms: base, scaling and partial factor, those of sliding and of full attention, of a model and of
the models inside it, under the names that its architecture has in version 4. Whatever is written
here is read back by transformers and compared: where it does not say the same, its own form is
written.

llama.cpp reads a tokenizer of SentencePiece from `tokenizer.model`, which transformers 5 leaves
out: its converter refuses Gemma 2 without that file, and gives every token of Llama 2 the same
score, so that texts are cut into other tokens. So the file of the fine-tune's own base goes along.
"""

import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from shutil import copyfile
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file


logger = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"
_OF_THE_RUN = ("use_cache", "_name_or_path", "transformers_version")  # not of the model
_ROTARY = (  # version 4's names for what version 5 has in `rope_parameters`
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rotary_emb_base",
    "rotary_pct",
    "global_rope_theta",
    "local_rope_theta",
)
_NAMED_OTHERWISE = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
    "modernbert-decoder": {
        "rope_theta": "global_rope_theta",
        "rope_local_base_freq": "local_rope_theta",
    },
}
_OF_THREE = ("phi3", "phi4_multimodal")  # whose scaling version 4 refuses with any other field
_UNSCALED = ("default", "axial")  # the second is what version 4 does for images without a name
_ANY_FAST = "PreTrainedTokenizerFast"  # what version 5 calls TokenizersBackend


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Writes `config.json` so that transformers 5 reads `config` from it, and others what they know
    of it.
    """
    own_form = deepcopy(config)
    own_form.save_pretrained(folder)
    file = folder / CONFIG_NAME
    saved = _without_stale_part(json.loads(file.read_text(encoding="utf-8")))
    original = _original(str(getattr(config, "_name_or_path", "") or ""))
    # a training switches it off for itself
    use_cache = original.get("use_cache", True)
    if "use_cache" in saved:
        saved["use_cache"] = use_cache
    # TRL switches it on in a mixture, which answers no batch of prompts then
    for part, own in ((saved, original), (saved.get("text_config"), original.get("text_config"))):
        if part and "output_router_logits" in part:
            part["output_router_logits"] = (own or {}).get("output_router_logits", False)
    kind = type(config)
    wanted = _read(kind, saved)
    forms = (_with_rotary_names(_in_its_words(saved, original, kind)), _with_rotary_names(saved))
    told = next((form for form in forms if wanted and _same(_read(kind, form), wanted)), saved)
    text = json.dumps(told, indent=2, sort_keys=True) + "\n"
    file.write_text(text, encoding="utf-8")


def _without_stale_part(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Without the partial factor that transformers before 5.20 keeps beside `rope_parameters`, and
    reads from there where they no longer have one; in the configs inside it, too.
    """
    told = {
        key: _without_stale_part(value) if _is_config(value) else value
        for key, value in saved.items()
    }
    rotary = saved["rope_parameters"] if _is_rotary(saved) else {}
    if "rope_theta" in rotary and "partial_rotary_factor" not in rotary:
        told.pop("partial_rotary_factor", None)
    return told


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
    told = _with_changes(original, known, saved)
    told["transformers_version"] = saved.get("transformers_version")
    return told


def _with_changes(
    original: Mapping[str, Any], known: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """The original, of which transformers makes `known`, with what `saved` says otherwise."""
    told = {key: value for key, value in original.items() if key in saved or key not in known}
    # what stands under these names beside `rope_parameters` is used by nobody
    unused = _ROTARY if _is_rotary(saved) else ()
    for key, value in saved.items():
        if key in unused:
            continue
        if _is_config(value) and _is_config(known.get(key)):
            inside = original.get(key)  # absent where all of it is as by default, or told outside
            inside = _with_changes(inside if isinstance(inside, Mapping) else {}, known[key], value)
            told |= {key: inside} if inside else {}
        elif key not in known or known[key] != value:
            told |= _changed(key, value, original)
            if key == "rope_parameters":  # the original's names for it say what it was
                for name in _ROTARY:
                    told.pop(name, None)
    return told


def _changed(key: str, value: Any, original: Mapping[str, Any]) -> dict[str, Any]:
    """What says it under the names that the original uses."""
    if key == "dtype" and "torch_dtype" in original:
        return {"torch_dtype": value}
    return {key: value}


def _with_rotary_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the names of version 4 for what version 5 has in `rope_parameters`, in the configs
    inside it, too.
    """
    told = {
        key: _with_rotary_names(value)
        if isinstance(value, Mapping) and key != "rope_parameters"
        else value
        for key, value in config.items()
    }
    if not _is_rotary(config):
        return told
    names = _NAMED_OTHERWISE.get(str(config.get("model_type")), {})
    rotary = _in_version_4_names(config["rope_parameters"])
    scaling = rotary.get("rope_scaling")
    if scaling and config.get("model_type") in _OF_THREE:
        factors = {name: scaling.get(name) for name in ("short_factor", "long_factor")}
        rotary["rope_scaling"] = {"type": scaling.get("rope_type"), **factors}
    return told | {names.get(name, name): value for name, value in rotary.items()}


def _in_version_4_names(rotary: Mapping[str, Any]) -> dict[str, Any]:
    local = rotary.get("sliding_attention")
    if isinstance(rotary.get("full_attention"), Mapping):  # one for each type of layer
        told = _in_version_4_names(rotary["full_attention"])
        if isinstance(local, Mapping) and "rope_theta" in local:
            told["rope_local_base_freq"] = local["rope_theta"]
        return told
    if "rope_theta" not in rotary:
        return {}
    outside = ("rope_theta", "partial_rotary_factor")
    told = {name: rotary[name] for name in outside if name in rotary}
    scaling = {name: value for name, value in rotary.items() if name not in outside}
    unscaled = scaling.get("rope_type", "default") in _UNSCALED
    if unscaled and scaling.keys() <= {"rope_type", "type"}:
        return told | {"rope_scaling": None}
    return told | {"rope_scaling": scaling}


def _is_config(value: Any) -> bool:
    """Whether it is a config inside another one: those of transformers 5 all name their type."""
    return isinstance(value, Mapping) and "model_type" in value


def _is_rotary(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("rope_parameters"), Mapping) and bool(config["rope_parameters"])


def _read(kind: type[PreTrainedConfig], content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What transformers makes of a config's file, None where it makes nothing of it."""
    try:
        return kind.from_dict(deepcopy(dict(content))).to_dict()
    except Exception:  # of any kind: an original can be of any version
        return None


def _same(one: Any, other: Any, ignored: tuple[str, ...] = _OF_THE_RUN) -> bool:
    """Whether transformers made the same of two files; `ignored` is not looked for in the configs
    inside them.
    """
    if not (_is_config(one) and _is_config(other)):
        return bool(one == other)
    # version 4's names are kept beside its own, as it keeps whatever it does not know
    beside = _ROTARY if _is_rotary(one) and _is_rotary(other) else ()
    if beside:
        one, other = ({**form, "rope_parameters": _of_one_type(form)} for form in (one, other))
    keys = (one.keys() | other.keys()) - {*ignored, *beside, "torch_dtype"}
    return all(_same(one.get(key), other.get(key), ()) for key in keys)


def _of_one_type(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding without the older name of its type, which is kept beside the newer."""
    rotary = dict(config["rope_parameters"])
    if "rope_type" in rotary:
        rotary.pop("type", None)
    return rotary


def save_processor(processor: Any, folder: Path, base: str = "") -> None:
    """Writes a tokenizer, or the processor that holds it, so that version 4 and llama.cpp's
    converter read it as well.

    Args:
        processor: What is saved.
        folder: Where to.
        base: Folder or hub id of the model that was fine-tuned: where `tokenizer.model` is looked
            for if it does not lie beside the tokenizer.
    """
    processor.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    if not file.is_file():
        return
    tokenizer = getattr(processor, "tokenizer", processor)
    saved = file.read_text(encoding="utf-8")
    told = _in_version_4(json.loads(saved))
    copied = _copy_sentencepiece(tokenizer, base, folder)
    if copied:
        told["added_tokens_decoder"] = _added_tokens(tokenizer)
    if told == json.loads(saved):
        return
    file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not _reads_as(tokenizer, written_template(processor), folder):
        file.write_text(saved, encoding="utf-8")
        if copied:
            (folder / SENTENCEPIECE).unlink()


def _copy_sentencepiece(tokenizer: PreTrainedTokenizerBase, base: str, folder: Path) -> bool:
    """Copies the SentencePiece file that the tokenizer was made of; whether there is one now."""
    kind = _backend_model(tokenizer)
    if not (kind.get("byte_fallback") or kind.get("type") == "Unigram"):
        return (folder / SENTENCEPIECE).is_file()  # no tokenizer of SentencePiece
    for source in dict.fromkeys((str(tokenizer.name_or_path or ""), base)):
        found = _sentencepiece_of(source)
        if found is not None and _made_of(tokenizer, source):
            if found.resolve() != (folder / SENTENCEPIECE).resolve():
                copyfile(found, folder / SENTENCEPIECE)
            return True
    logger.warning(
        "The tokenizer's %s was not found. If the model that was fine-tuned has one, copy it to %s: llama.cpp's converter needs it.",
        SENTENCEPIECE,
        folder,
    )
    return False


def _sentencepiece_of(source: str) -> Path | None:
    """The file of a folder or of the hub, from where transformers 5 does not always bring it."""
    if not source:
        return None
    try:
        return Path(str(cached_file(source, SENTENCEPIECE)))
    except (OSError, ValueError):
        return None


def _made_of(tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    """Whether the tokenizer still has the pieces of the one at `source`; tokens may be added."""
    try:
        other = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # of any kind: then nothing tells that they are the same
        return False
    return _backend_model(other) == _backend_model(tokenizer)


def _backend_model(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Kind, pieces and merges of a tokenizer, without the tokens that were added; empty where it is
    not one of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    return model if isinstance(model, dict) else {}


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """As version 4 told them: beside `tokenizer.model` llama.cpp's converter looks nowhere else."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        str(number): {name: getattr(token, name) for name in names}
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }


def _in_version_4(config: Mapping[str, Any]) -> dict[str, Any]:
    told = dict(config)
    if told.get("tokenizer_class") == "TokenizersBackend":
        told["tokenizer_class"] = _ANY_FAST
    if isinstance(told.get("extra_special_tokens"), list):
        told["additional_special_tokens"] = told.pop("extra_special_tokens")
    return told


def written_template(processor: Any) -> Any:
    """The chat template that lies beside what is saved: a processor's own, else its tokenizer's."""
    own = getattr(processor, "chat_template", None)
    return own or getattr(processor, "tokenizer", processor).chat_template


def _reads_as(tokenizer: PreTrainedTokenizerBase, template: Any, folder: Path) -> bool:
    """Whether what lies in the folder is this tokenizer, with this chat template."""
    try:
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # of any kind: then transformers' own form is kept
        return False
    return (
        read.get_vocab() == tokenizer.get_vocab()
        and read.special_tokens_map == tokenizer.special_tokens_map
        and read.all_special_ids == tokenizer.all_special_ids
        and read.chat_template == template
    )
