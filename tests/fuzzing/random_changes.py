"""Random mutations of a signed vector. Each draws what it changes, changes it, and returns the
outcome that must follow.
"""

import base64
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from model_signing import hashing, signing

from .edits import link_to_a_copy, renew_hashes, sparse
from .oracle import (
    AS_BEFORE,
    CONFIG,
    HASHED,
    LOADS,
    MOST_BYTES,
    SIGNATURE,
    SIGNED,
    WEIGHTS,
    Outcome,
    config_reasons,
    refused,
    signature_refused,
)
from .targeted import ODD_VALUES, TARGETED


ODD_NAMES = [
    "../x",
    "/etc/passwd",
    "a..b",
    "",
    "a b",
    "model.layers.1.self_attn.q_proj\0",
    "x" * 3000,
]


def targeted(folder: Path, data: Any, original: Path) -> Outcome:
    mutate, outcome = TARGETED[data.draw(st.sampled_from(sorted(TARGETED)), label="case")]
    mutate(folder)
    return outcome


def change_bytes(folder: Path, data: Any, original: Path) -> Outcome:
    """Bytes of a file flipped, cut out or put in; nothing is renewed."""
    name = data.draw(st.sampled_from(SIGNED), label="file")
    content = bytearray((folder / name).read_bytes())
    action = data.draw(st.sampled_from(["flip", "cut", "add"]), label="action")
    at = data.draw(st.integers(0, len(content) - 1), label="at")
    if action == "flip":
        for place in {
            at,
            *data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3), label="also"),
        }:
            content[place] ^= data.draw(st.integers(1, 255), label="by")
    elif action == "cut":
        del content[at : data.draw(st.integers(at + 1, len(content)), label="to")]
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=64), label="bytes")
    if content == (folder / name).read_bytes():
        return AS_BEFORE
    (folder / name).write_bytes(content)
    return _by_config(folder, original) if name == CONFIG else refused("changed", name)


def change_config(folder: Path, data: Any, original: Path) -> Outcome:
    """One field of the config: removed, added, renamed, swapped with another, or given a value of
    any type.
    """
    config = json.loads((folder / CONFIG).read_text())
    place = config
    while True:
        key = data.draw(st.sampled_from(sorted(place)), label="key")
        if not (isinstance(place[key], dict) and place[key]) or data.draw(
            st.booleans(), label="here"
        ):
            break
        place = place[key]
    action = data.draw(
        st.sampled_from(["remove", "add", "rename", "swap", "replace"]), label="action"
    )
    value = data.draw(st.sampled_from([*ODD_VALUES, 0, 1e308, "é" * 500]), label="value")
    name = data.draw(st.sampled_from(ODD_NAMES), label="name")
    if action == "remove":
        del place[key]
    elif action == "add":
        place[name] = value
    elif action == "rename":
        place[name] = place.pop(key)
    elif action == "swap":
        other = data.draw(st.sampled_from(sorted(place)), label="other")
        place[key], place[other] = place[other], place[key]
    else:
        place[key] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return _by_config(folder, original)


def change_numbers(folder: Path, data: Any, original: Path) -> Outcome:
    """Any bits in the place of one of the weights; hashes renewed."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    at = begin + 4 * data.draw(st.integers(0, (len(content) - begin) // 4 - 1), label="number")
    special = [
        0x7FC00000,
        0x7F800001,
        0x7F800000,
        0xFF800000,
        0xFFFFFFFF,
        0x00000001,
        0x80000000,
        0x3F800000,
    ]
    bits = data.draw(st.sampled_from(special) | st.integers(0, 2**32 - 1), label="bits")
    if content[at : at + 4] == struct.pack("<I", bits):
        return AS_BEFORE
    content[at : at + 4] = struct.pack("<I", bits)
    (folder / WEIGHTS).write_bytes(content)
    renew_hashes(folder)
    return refused("not finite") if bits & 0x7F800000 == 0x7F800000 else LOADS


def swap_files(folder: Path, data: Any, original: Path) -> Outcome:
    """Two files in each other's place."""
    first, second = data.draw(st.permutations(HASHED), label="files")[:2]
    (folder / first).rename(folder / "between")
    (folder / second).rename(folder / first)
    (folder / "between").rename(folder / second)
    outcome = refused("changed", first)
    return Outcome(outcome.refused + refused("changed", second).refused)


def change_signed_part(folder: Path, data: Any, original: Path) -> Outcome:
    """A byte of what is signed, or of the signature itself; the base64 around it stays whole."""
    bundle = json.loads((folder / SIGNATURE).read_text())
    part = data.draw(st.sampled_from(["payload", "signature"]), label="part")
    envelope = bundle["dsseEnvelope"]
    place, key = (envelope, "payload") if part == "payload" else (envelope["signatures"][0], "sig")
    content = bytearray(base64.b64decode(place[key]))
    content[data.draw(st.integers(0, len(content) - 1), label="at")] ^= data.draw(
        st.integers(1, 255), label="by"
    )
    place[key] = base64.b64encode(content).decode()
    (folder / SIGNATURE).write_text(json.dumps(bundle))
    return signature_refused("signature", "coverage")


def change_names_in_payload(folder: Path, data: Any, original: Path) -> Outcome:
    """A file left out of what is signed, or named twice, and not signed again."""
    bundle = json.loads((folder / SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    resources = statement["predicate"]["resources"]
    chosen = resources.pop(data.draw(st.integers(0, len(resources) - 1), label="resource"))
    if data.draw(st.booleans(), label="twice"):
        resources += [chosen, chosen]
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (folder / SIGNATURE).write_text(json.dumps(bundle))
    return signature_refused("signature", "coverage")


def sign_other_content(folder: Path, data: Any, original: Path) -> Outcome:
    """A true signature: of the maker over fewer files, of somebody else, or of the maker over
    another vector.
    """
    keys = original.parent / "keys"
    action = data.draw(
        st.sampled_from(["fewer files", "another key", "another vector"]), label="action"
    )
    if action == "fewer files":
        left_out = data.draw(
            st.sets(st.sampled_from(SIGNED), min_size=1, max_size=3), label="left out"
        )
        sign(folder, [name for name in SIGNED if name not in left_out], keys / "maker.pem")
        return signature_refused("coverage")
    if action == "another key":
        sign(folder, SIGNED, keys / "other.pem")
    else:
        other = shutil.copytree(original, folder.with_name("other"))
        text = (other / CONFIG).read_text().replace("tiny-aligned", "tiny-other")
        (other / CONFIG).write_text(text)
        sign(other, SIGNED, keys / "maker.pem")
        shutil.copyfile(other / SIGNATURE, folder / SIGNATURE)
        shutil.rmtree(other)
    return signature_refused("signature")


def replace_signature(folder: Path, data: Any, original: Path) -> Outcome:
    """No signature, or something else in its place."""
    path = folder / SIGNATURE
    content = path.read_bytes()
    nothing = {"missing": lambda p: None, "dangling link": lambda p: p.symlink_to("nowhere")}
    no_file = {"folder": Path.mkdir, "device": lambda p: p.symlink_to("/dev/zero"), "pipe": os.mkfifo,
               "link to itself": lambda p: p.symlink_to(p.name)}  # fmt: skip
    no_signature = {"link to another file": lambda p: p.symlink_to("/etc/hostname"), "empty": Path.touch,
                    "no JSON": lambda p: p.write_bytes(b"{" + content), "bytes": lambda p: p.write_bytes(b"\xff" * 99),
                    "half": lambda p: p.write_bytes(content[: len(content) // 2]), "list": lambda p: p.write_text("[]"),
                    "empty object": lambda p: p.write_text("{}"), "deep": lambda p: p.write_text("[" * 100_000),
                    "no payload": lambda p: p.write_text('{"dsseEnvelope": {}}'),
                    }  # fmt: skip
    action = data.draw(
        st.sampled_from(["link to a copy", "too large", *nothing, *no_file, *no_signature]),
        label="action",
    )
    if action == "link to a copy":
        link_to_a_copy(path)
        return AS_BEFORE
    path.unlink()
    if action == "too large":
        sparse(
            path,
            data.draw(st.sampled_from([MOST_BYTES[SIGNATURE] + 1, 2**28, 2**40]), label="size"),
        )
        return refused("too large", SIGNATURE)
    make: Callable[[Path], Any] = (nothing | no_file | no_signature)[action]
    make(path)
    if action in no_file:
        return refused("missing", SIGNATURE)
    return signature_refused("unsigned" if action in nothing else "signature")


MUTATIONS = [
    targeted,
    change_bytes,
    change_config,
    change_numbers,
    swap_files,
    change_signed_part,
    change_names_in_payload,
    sign_other_content,
    replace_signature,
]


def _by_config(folder: Path, original: Path) -> Outcome:
    reasons = config_reasons(folder, json.loads((original / CONFIG).read_text()))
    return Outcome(reasons)


def sign(folder: Path, names: Any, key: Path) -> None:
    """Signs some files of a folder by the library itself, so that this does not hang on the
    package's own signing.
    """
    others = [path.relative_to(folder) for path in folder.iterdir() if path.name not in names]
    config = (
        hashing.Config()
        .set_ignored_paths(paths=others, ignore_git_paths=True)
        .set_allow_symlinks(True)
    )
    signer = signing.Config().use_elliptic_key_signer(private_key=key)
    signer.set_hashing_config(config).sign(folder, folder / SIGNATURE)
