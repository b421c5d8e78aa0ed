"""Mutated safety vectors: every one is refused, quickly, and nothing is written.

`make test` runs a few hundred mutations, `make fuzz` ten thousand and records the outcome. A mutation that an attacker
makes consistent, with the hashes in the config renewed, may give another valid vector; those are counted apart, and
refused where a signature is required.
"""

import json
import os
import platform
import resource
import shutil
import struct
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safegene_trl import SafeGeneError, SafetyVector
from safegene_trl.signing import sign
from safegene_trl.vector_files import (
    CONFIG_FILE,
    HASHED_FILES,
    PROMPTS_FILE,
    SIGNED_FILES,
    WEIGHTS_FILE,
    file_record,
)

from .test_signing import keys  # noqa: F401  (a fixture)


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
RECORD = os.environ.get("FUZZ_RECORD")
MOST_SECONDS, MOST_MIB = 1.0, 500.0
ODD_VALUES = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    -0.5,
    1e308,
    "",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "é" * 500,
    [],
    {},
    [[]],
]
ODD_NAMES = ["../x", "/etc/passwd", "a..b", "", "a b", "model.layers.1.self_attn.q_proj\0", "x" * 3000]


def flip_bytes(folder, data):
    path = folder / data.draw(st.sampled_from(SIGNED_FILES), label="file")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4), label="flips")):
        content[data.draw(st.integers(0, len(content) - 1), label="at")] ^= data.draw(st.integers(1, 255), label="by")
    path.write_bytes(content)


def cut_bytes(folder, data):
    path = folder / data.draw(st.sampled_from(SIGNED_FILES), label="file")
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1), label="from")
    stop = data.draw(st.integers(start + 1, len(content)), label="to")
    path.write_bytes(content[:start] + content[stop:])


def add_bytes(folder, data):
    path = folder / data.draw(st.sampled_from(SIGNED_FILES), label="file")
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content)), label="at")
    path.write_bytes(content[:at] + data.draw(st.binary(min_size=1, max_size=64), label="bytes") + content[at:])


def change_config(folder, data):
    """One field of the config: removed, added, renamed, or given a value of any type."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    place = config
    while True:
        key = data.draw(st.sampled_from(sorted(place)), label="key")
        if not (isinstance(place[key], dict) and place[key]) or data.draw(st.booleans(), label="here"):
            break
        place = place[key]
    action = data.draw(st.sampled_from(["remove", "add", "rename", "swap", "replace"]), label="action")
    if action == "remove":
        del place[key]
    elif action == "add":
        place[data.draw(st.sampled_from(ODD_NAMES), label="name")] = data.draw(
            st.sampled_from(ODD_VALUES), label="value"
        )
    elif action == "rename":
        place[data.draw(st.sampled_from(ODD_NAMES), label="name")] = place.pop(key)
    elif action == "swap":
        other = data.draw(st.sampled_from(sorted(place)), label="other")
        place[key], place[other] = place[other], place[key]
    else:
        place[key] = data.draw(st.sampled_from(ODD_VALUES), label="value")
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def change_header(folder, data):
    """The header of the weights: offsets, shapes, types, names, repetitions; hashes renewed."""
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = data.draw(st.sampled_from(names), label="tensor")
    entry = header[name]
    action = data.draw(
        st.sampled_from(["offset", "shape", "dtype", "rename", "alias", "twice", "length"]), label="action"
    )
    sizes = st.sampled_from([-1, 0, 1, 3, 2**31, 2**63 - 1, 2**64])
    if action == "offset":
        entry["data_offsets"][data.draw(st.integers(0, 1), label="end")] = data.draw(sizes, label="offset")
    elif action == "shape":
        entry["shape"][data.draw(st.integers(0, 1), label="dimension")] = data.draw(sizes, label="size")
    elif action == "dtype":
        entry["dtype"] = data.draw(
            st.sampled_from(["F64", "F16", "I32", "U8", "BOOL", "F8_E4M3", "X9", ""]), label="dtype"
        )
    elif action == "rename":
        header[data.draw(st.sampled_from(ODD_NAMES), label="name")] = header.pop(name)
    elif action == "alias":
        header[name + ".copy"] = dict(entry)
    text = json.dumps(header)
    if action == "twice":
        text = text[:-1] + f', "{name}": {json.dumps(entry)}}}'
    encoded = text.encode()
    size = data.draw(st.sampled_from([0, 1, 2**40, 2**64 - 1]), label="length") if action == "length" else len(encoded)
    path.write_bytes(struct.pack("<Q", size) + encoded + content[8 + length :])
    renew_hashes(folder)


def change_numbers(folder, data):
    """NaN, infinity or any other bits among the weights; hashes renewed."""
    path = folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    index = data.draw(st.integers(0, (len(content) - begin) // 4 - 1), label="number")
    bits = data.draw(st.sampled_from([0x7FC00000, 0x7F800000, 0xFF800000, 0xFFFFFFFF, 0x3F800000]), label="bits")
    content[begin + 4 * index : begin + 4 * index + 4] = struct.pack("<I", bits)
    path.write_bytes(content)
    renew_hashes(folder)


def change_prompts(folder, data):
    """A row of the prompts: another type, key, kind or answer; hashes renewed."""
    rows = [json.loads(line) for line in (folder / PROMPTS_FILE).read_text().splitlines()]
    row = rows[data.draw(st.integers(0, len(rows) - 1), label="row")]
    key = data.draw(st.sampled_from(sorted(row)), label="key")
    if data.draw(st.booleans(), label="remove"):
        del row[key]
    else:
        row[key] = data.draw(st.sampled_from([*ODD_VALUES, "Sure, here is how", "benign", "harmful"]), label="value")
    (folder / PROMPTS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    renew_hashes(folder)


def replace_file(folder, data):
    """A file is missing, a folder, a link to another place, or huge."""
    path = folder / data.draw(st.sampled_from(SIGNED_FILES), label="file")
    path.unlink()
    action = data.draw(st.sampled_from(["missing", "folder", "link", "device", "huge", "empty"]), label="action")
    if action == "folder":
        path.mkdir()
    elif action == "link":
        path.symlink_to("/etc/hostname")
    elif action == "device":
        path.symlink_to("/dev/zero")
    elif action == "huge":
        with open(path, "wb") as file:
            file.truncate(2**36)
    elif action == "empty":
        path.touch()


MUTATIONS = [
    flip_bytes,
    cut_bytes,
    add_bytes,
    change_config,
    change_header,
    change_numbers,
    change_prompts,
    replace_file,
]


def renew_hashes(folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["files"] = {name: file_record(folder / name) for name in HASHED_FILES}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def content_of(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.stat().st_size < 2**20
    }


@pytest.mark.timeout(3600)
def test_every_mutated_vector_is_refused(vector_dir, keys, tmp_path):  # noqa: F811
    original = shutil.copytree(vector_dir, tmp_path / "original")
    sign(original, SIGNED_FILES, keys / "maker.pem")
    whole = content_of(original)
    outcomes: Counter = Counter()
    slowest = {"seconds": 0.0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def mutate_and_load(data):
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        mutation = data.draw(st.sampled_from(MUTATIONS), label="mutation")
        mutation(folder, data)
        files = content_of(folder)
        if files == whole:
            outcomes["unchanged"] += 1
            return
        names = sorted(path.name for path in tmp_path.iterdir())
        started = time.perf_counter()
        try:
            SafetyVector.from_pretrained(folder)
        except SafeGeneError:
            outcomes["refused"] += 1
        else:
            outcomes["another valid vector"] += 1
            # Without a signature only the config, or all of it made consistent, can have become another valid one.
            assert files[CONFIG_FILE] != whole[CONFIG_FILE]
        seconds = time.perf_counter() - started
        slowest["seconds"] = max(slowest["seconds"], seconds)
        assert seconds < MOST_SECONDS
        with pytest.raises(SafeGeneError):
            SafetyVector.from_pretrained(folder, public_key=keys / "maker.pub")
        outcomes["refused where a signature is required"] += 1
        assert content_of(folder) == files and sorted(path.name for path in tmp_path.iterdir()) == names

    mutate_and_load()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert memory < MOST_MIB
    changed = sum(outcomes.values()) - outcomes["unchanged"] - outcomes["refused where a signature is required"]
    assert outcomes["refused where a signature is required"] == changed > 0.9 * EXAMPLES
    assert outcomes["refused"] > 0.8 * changed
    if RECORD:
        record = {
            "mutations": changed,
            **outcomes,
            "accepted where a signature is required": 0,
            "slowest_seconds": round(slowest["seconds"], 3),
            "memory_added_mib": round(memory, 1),
            "python": platform.python_version(),
        }
        Path(RECORD).write_text(json.dumps(record, indent=2) + "\n")
