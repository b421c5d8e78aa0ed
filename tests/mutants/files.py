"""Mutants of what is read and written: a vector's files, and folders that appear whole."""

from .mutant import Edit, Mutant


LONG_FUZZ = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_fuzz.py")
LONG_FAULTS = ("-m", "tests.faults", "--count", "120")
FUZZ, FAULTS = "tests/test_fuzz.py", "tests/test_faults.py"


def _vector(name: str, old: str, new: str, file: str = "vectors/files.py") -> Mutant:
    """A check of a vector's files."""
    return Mutant(f"vector: {name}", (Edit(file, old, new),), (FUZZ,), (LONG_FUZZ,))


def _output(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """How folders appear."""
    return Mutant(f"output: {name}", (Edit(file, old, new),), (*tests, FAULTS), (LONG_FAULTS,))


VECTOR = (
    _vector("size limits off", "if status.st_size > _MOST_BYTES[file]:", "if False:"),
    _vector("hash not compared", ' or sha256_of_bytes(data) != record["sha256"]', ""),
    _vector(
        "any format version",
        "if type(version) is not int or version not in FORMAT_VERSIONS:",
        "if version is None:",
    ),
    _vector(
        "soft targets of an earlier format",
        "_ADDED if version > 2 else set()",
        "_ADDED",
    ),
    _vector(
        "soft targets not validated",
        'if "targets" in row and not _valid_targets(row["targets"], vocabulary):',
        'if "targets" in row and not isinstance(row["targets"], dict):',
    ),
    _vector(
        "soft targets of another answer", "        and about_likeliest(token, ids, log_probs)\n", ""
    ),
    _vector("soft targets that leave more than others can have", " <= most + _ROUNDING", " <= 1"),
    _vector("a prompt to measure on twice", "if len(set(measured)) < len(measured):", "if False:"),
    _vector(
        "unknown sections taken",
        'if set(config) != {"format_version", *SECTIONS}:',
        'if not set(config) >= {"format_version", *SECTIONS}:',
    ),
    _vector("sections not validated", " or not _VALID[section](config[section])", ""),
    _vector(
        "types of tensors not checked", ' and one["dtype"] in _DTYPES', "", "vectors/weights.py"
    ),
    _vector("factors of two types", ' and one["dtype"] == two["dtype"]', "", "vectors/weights.py"),
    _vector(
        "ranks of factors not compared", "return a[0] == b[1] and ", "return ", "vectors/weights.py"
    ),
    _vector(
        "dimensions not checked",
        "if len(a) != 2 or len(b) != 2 or 0 in",
        "if 0 in",
        "vectors/weights.py",
    ),
    _vector("empty factors", " or 0 in (*a, *b)", "", "vectors/weights.py"),
    _vector(
        "NaN taken",
        "if not all(math.isfinite(_sum(tensor)) for tensor in half.values()):",
        "if False:",
        "vectors/weights.py",
    ),
    _vector(
        "NaN looked for in A alone",
        "for tensor in half.values()):",
        'for tensor in [half["lora_A"]]):',
        "vectors/weights.py",
    ),
    _vector(
        "ranks may differ", "if len(set(ranks.values())) > 1:", "if False:", "vectors/weights.py"
    ),
    _vector(
        "any module name", " or not _MODULE.fullmatch(module)", " or False", "vectors/weights.py"
    ),
    _vector("any kind of prompt", 'if row["kind"] not in ("harmful", "benign"):', "if False:"),
    _vector(
        "answers not looked at",
        'if is_refusal(split_stored(row["response"]).answer) != refused:',
        "if False:",
    ),
    _vector(
        "benign answers not looked at",
        'if is_refusal(split_stored(row["response"]).answer) != refused:',
        'if refused and not is_refusal(split_stored(row["response"]).answer):',
    ),
    _vector("any verdict", "if verdict_of(row) not in VERDICTS:", "if False:"),
    _vector("any use", "    elif use == MEASURE:", "    elif use:"),
    _vector(
        "prompts to measure on may have answers",
        'needed, optional = {"prompt", "kind", "verdict", "use"}, {"category"}',
        'needed, optional = {"prompt", "kind", "verdict", "use"}, {"category", "response", "targets"}',
    ),
    _vector(
        "harmful prompts that are answered may have a response",
        'if row["kind"] == "harmful" and not refused:',
        "if False:",
    ),
    _vector(
        "prompts to measure on without a record",
        'elif config["selection"].get("test_prompts") is None:',
        "elif False:",
    ),
    _vector(
        "the record of prompts to measure on not validated",
        '        and _valid_test_prompts(selection.get("test_prompts"))\n',
        "",
    ),
    _vector("keys twice", "if len(dict(pairs)) < len(pairs):", "if False:"),
    _vector("NaN in JSON", "parse_constant=unlike_json, ", ""),
    _vector("paths for names", 'Path(file).name == file not in ("", "..") and ', ""),
    _vector("components that do not add up", "and sum(components) == rank", ""),
    _vector("rank of the config not compared", 'config["extraction"]["rank"] != rank or ', ""),
    _vector(
        "layers of the config not compared",
        ' or config["selection"]["selected_layers"] != layers',
        "",
    ),
    _vector(
        "other weights than in the file",
        'tensors[f"{PREFIX}{module}.{side}.weight"]',
        'tensors[f"{PREFIX}{module}.{side}.weight"].abs()',
        "vectors/safety_vector.py",
    ),
    _vector("signature of fewer files", "    if unsigned:", "    if False:", "vectors/signing.py"),
    _vector(
        "signature not asked for", "if public_key is not None:", "if False:", "vectors/record.py"
    ),
    _vector("devices and pipes", "if not stat.S_ISREG(status.st_mode):", "if False:"),
)

_RENAMING = "checkpoints/renaming.py"
_PLACED = "    check_replaceable(target, kind)\n    if exchange(folder, target):"
OUTPUT = (
    _output(
        "the earlier checkpoint is deleted first",
        _RENAMING,
        _PLACED,
        "    shutil.rmtree(target)\n    folder.rename(target)\n    return None\n    if exchange(folder, target):",
    ),
    _output("the earlier checkpoint is moved aside first", _RENAMING, _PLACED, _PLACED.replace("exchange(folder, target)", "False")),
    _output("files not flushed", "checkpoints/atomic_writes.py", "        sync(path)\n    sync(folder)", "    sync(folder)"),
    _output("folder not flushed", "checkpoints/atomic_writes.py", "        sync(path)\n    sync(folder)", "        sync(path)"),
    _output("a new file goes over another", "checkpoints/atomic_writes.py", 'open(path, "x", encoding="utf-8")', 'open(path, "w", encoding="utf-8")', "tests/checkpoints/test_atomic_writes.py"),
    _output("renaming not flushed", _RENAMING, "        sync(target.parent)\n    if earlier is not None:", "    if earlier is not None:"),
    _output("unfinished folders left behind", _RENAMING, "undo.callback(remove, folder)", "pass"),
    _output("what was killed is not cleared away", _RENAMING, "for path in _abandoned(target, clear):", "for path in ():", "tests/checkpoints/test_atomic_writes.py"),
    _output(
        "leftovers told by the beginning of their names",
        _RENAMING,
        "if parse_temporary_name(path.name) == (target.name, state):",
        "if f\".{state}.{target.name}\" in path.name:",
        "tests/checkpoints/test_atomic_writes.py",
    ),
    _output("files of others are replaced", "checkpoints/contents.py", "    if foreign is not None:", "    if False:", "tests/checkpoints"),
    _output("short writes taken for whole", "checkpoints/tensor_file.py", "rest, position = rest[written:], position + written", "break"),
    _output(
        "hashes of what is not written yet",
        "checkpoints/following_hash.py",
        "end = self._size if self._complete else self._end",
        "end = self._size",
        "tests/checkpoints/test_following_hash.py",
    ),
    _output(
        "the last files are not waited for",
        "checkpoints/weight_files.py",
        "        while self._closing:\n",
        "        while False:\n",
        "tests/checkpoints/test_weight_files.py",
    ),
    _output(
        "a file is closed before all of it is written",
        "checkpoints/weight_files.py",
        "    for written in writes:\n        written.result()\n",
        "",
        "tests/checkpoints/test_weight_files.py",
    ),
    Mutant(
        "output: written in place",
        (
            Edit("checkpoints/atomic_writes.py", "folder = held.enter_context(temporary_folder(target, clear=kind))", "folder.mkdir(parents=True, exist_ok=True)"),
            Edit("checkpoints/atomic_writes.py", "                install(folder, target, kind)", "                pass"),
        ),
        (FAULTS,),
        (LONG_FAULTS,),
    ),
)  # fmt: skip
