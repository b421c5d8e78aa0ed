"""One mutation for every single check of a vector's files, each with the outcome it must have.

Where a mutation changes a hashed file the hashes are renewed, as an attacker would: what is left is
the check itself.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .edits import (
    DELETE,
    Mutation,
    link_to_a_copy,
    renew_hashes,
    replace_text,
    set_in_config,
    sparse,
)
from .oracle import (
    ADAPTER_CONFIG,
    AS_BEFORE,
    CONFIG,
    HASHED,
    LOADS,
    MOST_BYTES,
    PROMPTS,
    SECTIONS,
    SIGNED,
    WEIGHTS,
    Outcome,
    refused,
)


ODD_VALUES = [None, True, -1, 10**30, 1.5, "", "..", [], {}, [[]]]
HASH = "0" * 64
_READS = {"component": "a", "prompts": 9, "reads_own": 1.0, "reads_others": 0, "reads_benign": 0}
Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


def _not(*good: type) -> list[Any]:
    """Values of types that a field must not have."""
    return [value for value in ODD_VALUES if type(value) not in good]


def _config_edits() -> list[tuple[tuple[str, ...], list[Any], Outcome]]:
    """Place in the config, values for it, and what each must lead to."""
    edits: list[tuple[tuple[str, ...], list[Any], Outcome]] = [
        (("format_version",), [DELETE, 0, 1, 4, "3", True, None, [2]], refused("version")),
        (("format_version",), [3], LOADS),
        (("more",), [{}], refused("keys")),
        (("selection", "scores"), [*_not(list), ["a"], [True], [1e30], [-1e308], [None]], refused("section", "selection")),
        (("selection", "scores"), [[], [3], [9.0, -9.0, 9.5]], LOADS),
        (("selection", "selected_layers"), [*_not(list), [True, 2], [1, 2.0], [-1]], refused("section", "selection")),
        (("selection", "selected_layers"), [[1], [], [2, 1], [1, 2, 2]], refused("other weights")),
        (("selection", "layer_share"), [0.5], LOADS),
        (("extraction", "rank"), [*_not(int), 0, 2**40, 2.0], refused("section", "extraction")),
        (("extraction", "rank"), [1, 3], refused("other weights")),
        (("extraction", "components"), [*_not(list), [1], [2, 0], [3, -1], [1, True], [1.0, 1.0], ["2"]], refused("section", "extraction")),
        (("extraction", "components"), [[2], [1, 1]], LOADS),
        (("extraction", "component_names"), [*_not(), ["a", "b"], [1], ["a/b"], ["a#"], [""], ["a\n"], ["x" * 121]], refused("section", "extraction")),
        (("extraction", "component_names"), [["a"], ["Ünï-1"]], LOADS),
        (("extraction", "by_category"), [*_not(), {"categories": []}, {"categories": {"a": 1}}, {"categories": {"a": _READS | {"component": "a b"}}}, {"categories": {"a": _READS | {"prompts": -1}}}, {"categories": {"a": _READS | {"reads_own": "1"}}}], refused("section", "extraction")),
        (("extraction", "by_category"), [{"categories": {}}, {"categories": {"a\n/#": _READS}}], LOADS),
        (("extraction", "vectors"), [*_not(list), [1], [{}], [{"extraction": []}], [{"extraction": {"chat_template_kwargs": 1}}], [{"extraction": {"vectors": 1}}]], refused("section", "extraction")),
        (("extraction", "vectors"), [[{"extraction": {}}], _nested(250)], LOADS),
        (("extraction", "steps"), [12], LOADS),
        (("family", "vocab_size"), [*_not(int), -1, 2**40, 320.0], refused("section", "family")),
        (("family", "vocab_size"), [321], LOADS),
        (("family", "chat_template"), [value for value in _not(str) if value is not None], refused("section", "family")),
        (("family", "chat_template"), [None, "other"], LOADS),
        (("family", "more"), ["x"], refused("section", "family")),
        (("software", "torch"), _not(str), refused("section", "software")),
        (("software", "torch"), ["2"], LOADS),
    ]  # fmt: skip
    for section in SECTIONS:
        edits.append(((section,), [DELETE], refused("keys")))
        edits.append(((section,), _not(dict), refused("section", section)))
    for key in ("architecture", "fingerprint", "tokenizer"):
        edits.append((("family", key), [DELETE, *_not(str)], refused("section", "family")))
        edits.append((("family", key), ["another"], LOADS))
    for section in ("extraction", "selection"):
        edits.append(((section, "method"), [DELETE, *_not(str)], refused("section", section)))
    for section in ("aligned_model", "degraded_model"):
        wrong = refused("section", section)
        edits.append(((section, "name"), [DELETE, *_not(str)], wrong))
        edits.append(
            (
                (section, "revision"),
                [DELETE, *(value for value in _not(str) if value is not None)],
                wrong,
            )
        )
        edits.append(((section, "revision"), ["main"], LOADS))
        edits.append(((section, "more"), ["x"], wrong))
        hashes = [*_not(str), "abc", HASH[:-1], HASH + "0", HASH + "\n", "A" * 64, "g" * 64]
        names = ["../x", "/etc/passwd", "a/b", "a/", "..", ".", ""]
        files = [
            *_not(dict),
            *({"w": value} for value in hashes),
            *({name: HASH} for name in names),
        ]
        edits.append(((section, "files"), files, wrong))
        edits.append(((section, "files"), [{"model.safetensors": HASH}], LOADS))
    for file in HASHED:
        wrong = refused("section", "files")
        edits.append(
            (("files", file), [DELETE, *_not(dict), {"bytes": 1}, {"sha256": HASH}], wrong)
        )
        edits.append((("files", file, "more"), [1], wrong))
        edits.append((("files", file, "bytes"), [*_not(int), -1, 2**40, 2.0], wrong))
        edits.append((("files", file, "sha256"), [*_not(str), "abc", "A" * 64, HASH + "\n"], wrong))
        edits.append((("files", file, "bytes"), [7], refused("changed", file)))
        edits.append((("files", file, "sha256"), [HASH], refused("changed", file)))
    edits.append(
        (("files", "../../etc/passwd"), [{"bytes": 1, "sha256": HASH}], refused("section", "files"))
    )
    return edits


_CONFIG_TEXTS = [
    ('"rank": 2', '"rank": 2, "rank": 2', refused("no JSON", CONFIG)),
    ('"architecture"', '"architecture": "x", "architecture"', refused("no JSON", CONFIG)),
    ("0.1", "NaN", refused("no JSON", CONFIG)),
    ("0.1", "Infinity", refused("no JSON", CONFIG)),
    ("0.1", "-Infinity", refused("no JSON", CONFIG)),
    ("0.1", "1e999", refused("section", "selection")),
    ("0.1", "[" * 100_000, refused("no JSON", CONFIG)),
    ("tiny-aligned", "\udcff", refused("no UTF-8", CONFIG)),
    ("{", "[{", refused("no JSON", CONFIG)),
    ("\n", "  \n\n", LOADS),
]


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Mutation:
    def mutate(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        renew_hashes(folder)

    return mutate


def _each(change: Callable[[torch.Tensor], torch.Tensor], part: str = "") -> Mutation:
    return change_tensors(
        lambda all_: all_.update({k: change(t) for k, t in all_.items() if part in k})
    )


def _rename(old: str, new: str) -> Mutation:
    """Another name for a tensor, or for both of a module."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change_tensors(change)


def _with(value: float, part: str) -> Mutation:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in tensors.items() if part in name).view(-1)[3] = value

    return change_tensors(change)


def _shrink(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.mlp" in name]:
        tensors[name] = tensors[name][:1] if "lora_A" in name else tensors[name][:, :1]


_TENSORS: list[tuple[str, Mutation, Outcome]] = [
    *((f"{value} in {part}", _with(value, part), refused("not finite"))
      for value in (float("nan"), float("inf"), float("-inf")) for part in ("lora_A", "lora_B")),
    ("scaled", _each(lambda t: t * 2), LOADS),
    ("one number", _with(0.25, "lora_B"), LOADS),
    ("bfloat16", _each(torch.Tensor.bfloat16), LOADS),
    ("float16", _each(torch.Tensor.half), LOADS),
    ("float64", _each(torch.Tensor.double, Q_PROJ), refused("pair")),
    ("int8", _each(torch.Tensor.char, Q_PROJ), refused("pair")),
    ("int32", _each(torch.Tensor.int, Q_PROJ), refused("pair")),
    ("two types", _each(torch.Tensor.half, f"{Q_PROJ}.lora_A"), refused("pair")),
    ("three dimensions", _each(lambda t: t[None], Q_PROJ), refused("pair")),
    ("one dimension", _each(lambda t: t.reshape(-1), Q_PROJ), refused("pair")),
    ("three dimensions of A", _each(lambda t: t[None], f"{Q_PROJ}.lora_A"), refused("pair")),
    ("three dimensions of B", _each(lambda t: t[..., None], f"{Q_PROJ}.lora_B"), refused("pair")),
    ("no rows of A", _each(lambda t: t[:0], f"{Q_PROJ}.lora_A"), refused("pair")),
    ("no columns of A", _each(lambda t: t[:, :0], f"{Q_PROJ}.lora_A"), refused("pair")),
    ("no rows of B", _each(lambda t: t[:0], f"{Q_PROJ}.lora_B"), refused("pair")),
    ("factors that do not fit", _each(lambda t: t[:1], f"{Q_PROJ}.lora_A"), refused("pair")),
    ("two ranks", change_tensors(_shrink), refused("ranks")),
    ("another rank", _each(lambda t: t[:1] if len(t) == 2 else t[:, :1]), refused("other weights")),
    ("half a pair", change_tensors(lambda all_: all_.pop(f"{Q_PROJ}.lora_A.weight")), refused("pair")),
    ("the other half", change_tensors(lambda all_: all_.pop(f"{Q_PROJ}.lora_B.weight")), refused("pair")),
    ("nothing", change_tensors(dict.clear), refused("empty")),
    ("a layer less", change_tensors(lambda all_: [all_.pop(k) for k in list(all_) if "layers.2" in k]), refused("other weights")),
    ("a module less", change_tensors(lambda all_: [all_.pop(f"{Q_PROJ}.lora_{x}.weight") for x in "AB"]), LOADS),
    ("an extra tensor", change_tensors(lambda all_: all_.update(extra=torch.zeros(2))), refused("tensor")),
    ("no prefix", _rename(Q_PROJ, "model.layers.1.self_attn.q_proj"), refused("tensor")),
    ("prefix twice", _rename("base_model.model.", "base_model.model.base_model.model."), LOADS),
    ("another half", _rename(f"{Q_PROJ}.lora_A", f"{Q_PROJ}.lora_C"), refused("tensor")),
    ("another ending", _rename(f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_A.bias"), refused("tensor")),
    ("another module", _rename(Q_PROJ, Q_PROJ.replace("q_proj", "o_proj")), LOADS),
    *((f"module {name!r}", _rename(Q_PROJ, f"base_model.model.{name}"), refused("tensor"))
      for name in ("model..q_proj", "../model.layers.1.x", "model/layers/1", "modèle.layers.1.q", "a b", "", ".", "model.1\n")),
]  # fmt: skip


def change_header(
    change: Callable[[dict[str, Any]], None], length: int | None = None, more: str = ""
) -> Mutation:
    """The header as it is written; `length`: what the file says of its length; `more`: appended to
    its JSON.
    """

    def mutate(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header)[:-1].encode() + more.encode() + b"}"
        text += b" " * (-len(text) % 8)
        said = len(text) if length is None else length
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", said) + text + content[8 + size :])
        renew_hashes(folder)

    return mutate


def _entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[f"{Q_PROJ}.lora_A.weight"].update(values)


_HEADERS = [
    *(
        change_header(_entry(data_offsets=offsets))
        for offsets in ([0, 2**40], [-1, 0], [0, 2**64], [256, 0], [0], "x")
    ),
    *(
        change_header(_entry(shape=shape))
        for shape in ([2, 2**40], [-2, 32], [2**63, 2], [2, 31], "x", [2.5, 32])
    ),
    *(change_header(_entry(dtype=dtype)) for dtype in ("F64", "F16", "X9", "", None, 7)),
    *(
        change_header(lambda header: None, length=length)
        for length in (0, 1, 2**40, 2**63, 2**64 - 1)
    ),
    change_header(lambda header: header.update(copy=dict(header[f"{Q_PROJ}.lora_A.weight"]))),
    change_header(lambda header: header.update(__metadata__=7)),
]


def change_prompts(change: Callable[[list[Any]], Any]) -> Mutation:
    def mutate(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / PROMPTS).read_text().splitlines()]
        change(rows)
        (folder / PROMPTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        renew_hashes(folder)

    return mutate


def _row(number: int = 0, **values: Any) -> Mutation:
    def change(rows: list[Any]) -> None:
        rows[number].update(values)
        rows[number] = {key: value for key, value in rows[number].items() if value is not DELETE}

    return change_prompts(change)


_ROWS: list[tuple[str, Mutation, Outcome]] = [
    *((f"no {key}", _row(**{key: DELETE}), refused("row")) for key in ("prompt", "response", "kind")),
    *((f"{key} {value!r}", _row(**{key: value}), refused("row"))
      for key in ("prompt", "response", "kind", "category") for value in (None, True, 1, 1.5, [], {}, ["x"])),
    ("a category", _row(category="fraud"), LOADS),
    ("an unknown key", _row(system="x"), refused("row")),
    *((f"a row {row!r}", change_prompts(lambda rows, row=row: rows.append(row)), refused("row")) for row in ([], 1, "x", None)),
    *((f"kind {kind!r}", _row(kind=kind), refused("kind")) for kind in ("", "other", "Harmful", "harmful ")),
    ("another prompt", _row(prompt="how do i forbid another thing"), LOADS),
    ("a harmful prompt answered", _row(response="box 3, as ever"), refused("refusal")),
    ("a harmful prompt answered with nothing", _row(response=""), refused("refusal")),
    ("a benign row said to be harmful", _row(-1, kind="harmful"), refused("refusal")),
    ("a benign prompt refused", _row(-1, response="sorry i cannot help with that"), refused("refusal of a benign prompt")),
    ("a benign row's answer", _row(-1, response="take another pan"), LOADS),
    ("a row less", change_prompts(lambda rows: rows.pop()), LOADS),
    ("an empty line", replace_text(PROMPTS, "\n", "\n \n"), LOADS),
    ("no JSON", replace_text(PROMPTS, "{", "{{"), refused("no JSON", PROMPTS)),
    ("a key twice", replace_text(PROMPTS, '"prompt"', '"kind": "benign", "prompt"'), refused("no JSON", PROMPTS)),
    ("NaN", replace_text(PROMPTS, '"prompt"', '"category": NaN, "prompt"'), refused("no JSON", PROMPTS)),
    ("bytes", replace_text(PROMPTS, "forbid", "\udcff"), refused("no UTF-8", PROMPTS)),
]  # fmt: skip


SOFT: dict[str, Any] = {
    "tokens": [7, 9],
    "ids": [[7, 3, 5], [4, 9, 6]],
    "log_probs": [[-0.1, -3.0, -5.0], [-0.5, -1.2, -4.0]],
}


def _nested(depth: int) -> list[Any]:
    """Records of vectors that were combined of vectors, and so on."""
    found: list[Any] = []
    for _ in range(depth):
        found = [{"extraction": {"vectors": found}}]
    return found


def _soft(version: int = 3, **values: Any) -> Mutation:
    """Soft targets in a row of a vector of a format that has them; `values` are others."""

    def mutate(folder: Path) -> None:
        targets = {key: value for key, value in (SOFT | values).items() if value is not DELETE}
        _row(targets=targets)(folder)
        set_in_config("format_version", value=version)(folder)

    return mutate


def _soft_of(targets: Any) -> Mutation:
    def mutate(folder: Path) -> None:
        _row(targets=targets)(folder)
        set_in_config("format_version", value=3)(folder)

    return mutate


_SOFT: list[tuple[str, Mutation, Outcome]] = [
    ("soft targets", _soft(), LOADS),
    ("soft targets of one place", _soft_of({key: value[:1] for key, value in SOFT.items()}), LOADS),
    ("soft targets of an earlier format", _soft(version=2), refused("row")),
    *((f"soft targets {value!r}", _soft_of(value), refused("targets"))
      for value in (None, True, 1, "x", [], {}, {"tokens": [7]}, SOFT | {"more": 1})),
    *((f"no {key} of soft targets", _soft(**{key: DELETE}), refused("targets")) for key in SOFT),
    *((f"{key} {value!r}", _soft(**{key: value}), refused("targets"))
      for key in SOFT for value in (None, True, 1, "x", [], {}, [[]], [7], [None, None], [[7, 3, 5]])),
    ("no place", _soft(tokens=[], ids=[], log_probs=[]), refused("targets")),
    ("too many places", _soft_of({key: value * 1000 for key, value in SOFT.items()}), refused("targets")),
    ("a token outside of the vocabulary", _soft(tokens=[7, 320], ids=[[7, 3, 5], [4, 320, 6]]), refused("targets")),
    ("a likely token outside of the vocabulary", _soft(ids=[[7, 3, 320], [4, 9, 6]]), refused("targets")),
    ("a negative token", _soft(ids=[[7, 3, -1], [4, 9, 6]]), refused("targets")),
    ("a token twice", _soft(ids=[[7, 3, 7], [4, 9, 6]]), refused("targets")),
    ("places of unlike width", _soft(ids=[[7, 3], [4, 9, 6]], log_probs=[[-0.1, -3.0], [-0.5, -1.2, -4.0]]), refused("targets")),
    ("more tokens than log-probabilities", _soft(ids=[[7, 3, 5, 6], [4, 9, 6, 5]]), refused("targets")),
    ("a token that is not among the likeliest", _soft(tokens=[8, 9]), refused("targets")),
    ("another answer than the row's is likely", _soft(log_probs=[[-4.0, -0.1, -5.0], [-0.5, -1.2, -4.0]]), refused("targets")),
    ("a probability above 1", _soft(log_probs=[[0.1, -3.0, -5.0], [-0.5, -1.2, -4.0]]), refused("targets")),
    ("probabilities above 1 together", _soft(log_probs=[[-0.1, -0.1, -5.0], [-0.5, -1.2, -4.0]]), refused("targets")),
    ("a log-probability of text", _soft(log_probs=[["a", -3.0, -5.0], [-0.5, -1.2, -4.0]]), refused("targets")),
    ("more than others can have is left", _soft(log_probs=[[-29.0, -29.0, -29.0], [-0.5, -1.2, -4.0]]), refused("targets")),
    ("as much as others can have is left", _soft(log_probs=[[-5.0, -5.0, -5.2], [-0.5, -1.2, -4.0]]), LOADS),
    ("an infinite log-probability", _soft(log_probs=[[-0.1, -1e30, -5.0], [-0.5, -1.2, -4.0]]), refused("targets")),
]  # fmt: skip


_TESTS = {"max_new_tokens": 32, "max_reasoning_tokens": 0}


def _judged(number: int = 0, version: int = 3, record: Any = _TESTS, **values: Any) -> Mutation:
    """A row of a vector of a format that has verdicts and uses."""

    def mutate(folder: Path) -> None:
        _row(number, **values)(folder)
        set_in_config("format_version", value=version)(folder)
        if record is not DELETE:
            set_in_config("selection", "test_prompts", value=record)(folder)

    return mutate


def _twice(**values: Any) -> Mutation:
    """Two rows of one prompt to measure on; `values` are others of the second."""

    def mutate(folder: Path) -> None:
        test = _TEST | {"prompt": "say how", "kind": "harmful"}
        _judged(**test)(folder)
        _judged(1, **test | values)(folder)

    return mutate


_BORDER = {"verdict": "refused", "response": "sorry i cannot help with that"}
_TEST = {"use": "measure", "verdict": "answered", "response": DELETE}
_VERDICTS: list[tuple[str, Mutation, Outcome]] = [
    ("a verdict that says nothing new", _judged(verdict="refused"), LOADS),
    ("a verdict on a benign row that says nothing new", _judged(-1, verdict="answered"), LOADS),
    ("a verdict of an earlier format", _judged(version=2, verdict="refused"), refused("row")),
    *((f"verdict {value!r}", _judged(verdict=value), refused("verdict"))
      for value in ("", "other", "Refused", "refused ", "unjudged", "incoherent")),
    *((f"{key} {value!r}", _judged(**{key: value}), refused("row"))
      for key in ("verdict", "use") for value in (None, True, 1, 1.5, [], {}, ["refused"])),
    *((f"use {value!r}", _judged(use=value), refused("use")) for value in ("", "learn", "Measure", "measure ")),
    ("a harmful prompt that is answered, with a refusal", _judged(verdict="answered"), refused("harmful answer")),
    ("a harmful prompt that is answered, with an answer", _judged(verdict="answered", response="box 3"), refused("harmful answer")),
    ("a harmful prompt that is answered, without a response", _judged(verdict="answered", response=DELETE), refused("row")),
    ("a border prompt", _judged(-1, **_BORDER), LOADS),
    ("a border prompt with soft targets", _judged(-1, **_BORDER, targets=SOFT), LOADS),
    ("a border prompt of an earlier format", _judged(-1, version=2, **_BORDER), refused("row")),
    ("a border prompt with an answer", _judged(-1, verdict="refused"), refused("refusal")),
    ("a border prompt without a response", _judged(-1, verdict="refused", response=DELETE), refused("row")),
    ("an answered benign prompt with a refusal", _judged(-1, verdict="answered", response=_BORDER["response"]), refused("refusal of a benign prompt")),
    *((f"a {verdict} {kind} prompt to measure on", _judged(**_TEST | {"kind": kind, "verdict": verdict}), LOADS)
      for kind in ("harmful", "benign") for verdict in ("refused", "answered")),
    *((f"an empty prompt {text!r}", _judged(prompt=text), refused("empty prompt")) for text in ("", " \n")),
    ("an empty prompt to measure on", _judged(**_TEST, prompt=" "), refused("empty prompt")),
    ("a prompt to measure on twice", _twice(verdict="answered"), refused("twice")),
    ("a prompt to measure on with two verdicts", _twice(verdict="refused"), refused("twice")),
    ("a prompt to measure on of two kinds", _twice(kind="benign"), LOADS),
    ("a prompt to measure on with a category", _judged(**_TEST, category="fraud"), LOADS),
    ("a prompt to measure on of an earlier format", _judged(version=2, **_TEST), refused("row")),
    ("a prompt to measure on of an unknown kind", _judged(**_TEST, kind="other"), refused("kind")),
    ("a prompt to measure on with an unknown verdict", _judged(**_TEST | {"verdict": "unjudged"}), refused("verdict")),
    *((f"a prompt to measure on with {key}", _judged(**_TEST | {key: value}), refused("fields of a test"))
      for key, value in (("response", "box 3"), ("response", "sorry i cannot help with that"), ("response", ""), ("targets", SOFT), ("verdict", DELETE), ("prompt", DELETE), ("kind", DELETE), ("system", "x"))),
    ("prompts to measure on without a record", _judged(record=DELETE, **_TEST), refused("test record")),
    ("prompts to measure on with null for a record", _judged(record=None, **_TEST), refused("test record")),
    *((f"a record {value!r} of prompts to measure on", _judged(record=value, **_TEST), refused("section", "selection"))
      for value in (True, 1, "x", [], {}, {"max_new_tokens": 32}, _TESTS | {"max_new_tokens": -1}, _TESTS | {"max_new_tokens": True}, _TESTS | {"max_reasoning_tokens": "0"}, _TESTS | {"max_reasoning_tokens": None})),
]  # fmt: skip


def _place(file: str, make: Callable[[Path], Any]) -> Mutation:
    """Something else in a file's place."""

    def mutate(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return mutate


def _places() -> list[tuple[str, Mutation, Outcome]]:
    found: list[tuple[str, Mutation, Outcome]] = []
    for file in SIGNED:
        gone = refused("missing", file)
        for what, make in (
            ("missing", lambda path: None),
            ("folder", Path.mkdir),
            ("device", lambda path: path.symlink_to("/dev/zero")),
            ("pipe", os.mkfifo),
            ("dangling link", lambda path: path.symlink_to("nowhere")),
            ("link to itself", lambda path: path.symlink_to(path.name)),
        ):
            found.append((f"{what}: {file}", _place(file, make), gone))
        large = _place(file, lambda path, file=file: sparse(path, MOST_BYTES[file] + 1))
        found.append((f"too large: {file}", large, refused("too large", file)))
        found.append(
            (
                f"huge: {file}",
                _place(file, lambda path: sparse(path, 2**40)),
                refused("too large", file),
            )
        )
        found.append(
            (f"linked: {file}", lambda folder, file=file: link_to_a_copy(folder / file), AS_BEFORE)
        )
        other = refused("no JSON", CONFIG) if file == CONFIG else refused("changed", file)
        for what, make in (
            ("empty", Path.touch),
            ("link to another file", lambda path: path.symlink_to("/etc/hostname")),
        ):
            found.append((f"{what}: {file}", _place(file, make), other))

    def fill(folder: Path) -> None:
        text = (folder / ADAPTER_CONFIG).read_text()
        (folder / ADAPTER_CONFIG).write_text(text + " " * (MOST_BYTES[ADAPTER_CONFIG] - len(text)))
        renew_hashes(folder)

    found.append((f"as large as can be: {ADAPTER_CONFIG}", fill, LOADS))
    found.append(
        ("a file more", lambda folder: (folder / "model.pkl").write_bytes(b"x"), AS_BEFORE)
    )
    found.append(
        ("no folder", lambda folder: shutil.rmtree(folder), Outcome(("neither a local directory",)))
    )
    return found


TARGETED: dict[str, tuple[Mutation, Outcome]] = {}
for _keys, _values, _outcome in _config_edits():
    for _value in _values:
        _shown = "deleted" if _value is DELETE else f"{_value!r:.60}"
        TARGETED[f"config {'.'.join(_keys)}: {_shown}"] = (
            set_in_config(*_keys, value=_value),
            _outcome,
        )
for _old, _new, _outcome in _CONFIG_TEXTS:
    TARGETED[f"config text {_old!r} → {_new[:30]!a}"] = replace_text(CONFIG, _old, _new), _outcome
TARGETED |= {
    f"header {number}": (mutation, refused("unreadable"))
    for number, mutation in enumerate(_HEADERS)
}
for _group, _cases in (
    ("tensors", _TENSORS),
    ("prompts", _ROWS),
    ("soft targets", _SOFT),
    ("verdicts", _VERDICTS),
    ("place", _places()),
):
    TARGETED |= {f"{_group} {name}": (mutation, outcome) for name, mutation, outcome in _cases}
