"""The mutants: each breaks one check or one step of the package on purpose, and some test must fail for it.

An edit names a file of the package, a text that stands there exactly once, and what takes its place. Where code moves, the runner
says so and the entry has to follow. A new check in the package deserves a new entry here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """`old` → `new` in `file`, a path below `safegene_trl/`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault.

    Attributes:
        name: What is broken, in a few words.
        edits: How.
        tests: Test files (or single tests) of `make test` that ought to fail.
        long: Commands for Python that ought to fail where those pass; see `LONG_FUZZ` and `LONG_FAULTS`.
    """

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    long: tuple[tuple[str, ...], ...] = ()


LONG_FUZZ = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_fuzz.py")
LONG_FAULTS = ("-m", "tests.faults", "--count", "120")
FUZZ, FAULTS = "tests/test_fuzz.py", "tests/test_faults.py"


def _vector(name: str, old: str, new: str, file: str = "vector_files.py") -> Mutant:
    """A check of a vector's files."""
    return Mutant(f"vector: {name}", (Edit(file, old, new),), (FUZZ,), (LONG_FUZZ,))


def _output(name: str, *edits: Edit) -> Mutant:
    """How folders appear."""
    return Mutant(f"output: {name}", edits, (FAULTS,), (LONG_FAULTS,))


def _numbers(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, (Edit(file, old, new),), tests)


VECTOR = (
    _vector("size limits off", "if (folder / file).stat().st_size > _MOST_BYTES[file]:", "if False:"),
    _vector("hash not compared", ' or sha256_of_file(folder / file) != record["sha256"]', ""),
    _vector("any format version", "if version is True or version != FORMAT_VERSION:", "if version is None:"),
    _vector(
        "unknown sections taken",
        'if set(config) != {"format_version", *SECTIONS}:',
        'if not set(config) >= {"format_version", *SECTIONS}:',
    ),
    _vector("sections not validated", " or not _VALID[section](config[section])", ""),
    _vector("types of tensors not checked", " and a.dtype in _DTYPES", ""),
    _vector("factors of two types", " and a.dtype == b.dtype", ""),
    _vector("ranks of factors not compared", "return a.shape[0] == b.shape[1] and ", "return "),
    _vector("dimensions not checked", "if a.dim() != 2 or b.dim() != 2 or 0 in", "if 0 in"),
    _vector("empty factors", " or 0 in (*a.shape, *b.shape)", ""),
    _vector(
        "NaN taken", "if not all(math.isfinite(tensor.float().sum().item()) for tensor in half.values()):", "if False:"
    ),
    _vector("NaN looked for in A alone", "for tensor in half.values()):", 'for tensor in [half["lora_A"]]):'),
    _vector("ranks may differ", "if len({delta.a.shape[0] for delta in deltas.values()}) > 1:", "if False:"),
    _vector("any module name", " or not _MODULE.fullmatch(module)", " or False"),
    _vector("any kind of prompt", 'if row["kind"] not in ("harmful", "benign"):', "if False:"),
    _vector("answers not looked at", 'if row["kind"] == "harmful" and not is_refusal(row["response"]):', "if False:"),
    _vector("keys twice", "if len(dict(pairs)) < len(pairs):", "if False:"),
    _vector("NaN in JSON", "parse_constant=unlike_json, ", ""),
    _vector("paths for names", "Path(file).name == file and ", ""),
    _vector("components that do not add up", "and sum(components) == rank", ""),
    _vector("rank of the config not compared", 'config["extraction"]["rank"] != rank or ', ""),
    _vector("layers of the config not compared", ' or config["selection"]["selected_layers"] != layers', ""),
    _vector(
        "other weights than in the file",
        'LowRankDelta(half["lora_A"], half["lora_B"])',
        'LowRankDelta(half["lora_A"], half["lora_B"].abs())',
    ),
    _vector("signature of fewer files", "if missing := set(files) - signed:", "if missing := set():", "signing.py"),
    _vector("signature not asked for", "if public_key is not None:", "if False:"),
)

NUMBERS = (
    _numbers(
        "merging: coefficient dropped",
        "merging.py",
        "return delta.a.float(), coefficient * delta.b.float()",
        "return delta.a.float(), delta.b.float()",
        "tests/test_merging.py",
    ),
    _numbers(
        "merging: transposed weights as others",
        "merging.py",
        "return Term(a.T.contiguous(), b.T.contiguous()) if transposed else Term(b, a, magnitude)",
        "return Term(b, a, magnitude)",
        "tests/test_weights.py",
        "tests/test_merging.py",
    ),
    _numbers(
        "merging: every block as the first",
        "merging.py",
        "part = slice(first_row, first_row + len(rows))",
        "part = slice(0, len(rows))",
        "tests/test_streaming.py",
    ),
    _numbers(
        "streaming: what an adapter replaces is not written",
        "streaming.py",
        "file.write(name, own[name])",
        "pass",
        "tests/test_streaming.py",
    ),
    _numbers(
        "streaming: a file that shrinks is read to its end",
        "streaming.py",
        'raise CheckpointError(f"{tensor.path} became shorter while it was read: run it again.")',
        "break",
        "tests/test_streaming.py",
    ),
    _numbers(
        "streaming: errors of threads are lost",
        "streaming.py",
        "                pool.shutdown(cancel_futures=True)\n                raise\n",
        "                pool.shutdown(cancel_futures=True)\n",
        "tests/test_streaming.py",
    ),
    Mutant(
        "optimization: bounds dropped",
        (
            Edit(
                "optimization.py",
                "np.maximum(lower - point, -radius), np.minimum(upper - point, radius)",
                "np.full_like(point, -radius), np.full_like(point, radius)",
            ),
            Edit("optimization.py", "new = np.clip(point + step, lower, upper)", "new = point + step"),
        ),
        ("tests/test_optimization.py",),
    ),
    _numbers(
        "optimization: the last point, not the best",
        "optimization.py",
        "if new_value < value:",
        "if True:",
        "tests/test_optimization.py",
    ),
    _numbers(
        "optimization: the matrix never learns",
        "optimization.py",
        "        if known <= 0:\n            return",
        "        return",
        "tests/test_optimization.py",
    ),
    _numbers(
        "recalibration: unchanged safety is taken for better",
        "recalibration.py",
        "if not after.safety < before.safety:",
        "if not after.safety <= before.safety:",
        "tests/test_recalibration.py",
    ),
    _numbers(
        "recalibration: utility budget dropped",
        "recalibration.py",
        "if not after.utility <= budget:",
        "if False:",
        "tests/test_recalibration.py",
    ),
    _numbers(
        "recalibration: start not clipped",
        "recalibration.py",
        "point = np.array([first[name] for name in names]).clip(config.min_coefficient, config.max_coefficient)",
        "point = np.array([first[name] for name in names])",
        "tests/test_recalibration.py",
    ),
    _numbers(
        "hooks: coefficients rounded to the model's type",
        "attach.py",
        "chosen = coefficients[..., index].to(output.device)",
        "chosen = coefficients[..., index].to(output)",
        "tests/test_attach.py",
    ),
    _numbers(
        "hooks: coefficients' sum over samples",
        "attach.py",
        "chosen = chosen.mean(dim=0, keepdim=True)",
        "chosen = chosen.sum(dim=0, keepdim=True)",
        "tests/test_attach.py",
        "tests/test_recalibration.py",
    ),
    _numbers(
        "gate: a share over the limit is kept for sure",
        "gate.py",
        "surely = low >= value if at_least else high <= value",
        "surely = right",
        "tests/test_gate.py",
    ),
    _numbers(
        "gate: broken limits do not reject",
        "gate.py",
        'if broken := [check for check in checks if check.verdict == "broken"]:',
        "if broken := []:",
        "tests/test_gate.py",
    ),
    _numbers(
        "history: chain not compared",
        "history.py",
        'chained = release["previous"] == previous',
        "chained = True",
        "tests/test_history.py",
    ),
)

OUTPUT = (
    _output(
        "the earlier checkpoint is deleted first",
        Edit("output.py", "            target.rename(aside)\n            folder.rename(target)\n            _remove(aside)\n",
             "            shutil.rmtree(target)\n            folder.rename(target)\n"),
    ),
    _output("files not flushed", Edit("output.py", "        _sync(path)\n    _sync(folder)", "        pass\n    _sync(folder)")),
    _output("folder not flushed", Edit("output.py", "        _sync(path)\n    _sync(folder)", "        _sync(path)")),
    _output("renaming not flushed", Edit("output.py", "        _sync(target.parent)", "        pass")),
    _output(
        "unfinished folders left behind",
        Edit("output.py", "                shutil.rmtree(folder, ignore_errors=True)", "                pass"),
    ),
    _output("what was killed is not cleared away", Edit("output.py", "                    _clear_leftovers(target)", "                    pass")),
    _output(
        "short writes taken for whole",
        Edit("checkpoint.py", "            rest, position = rest[written:], position + written", "            break"),
    ),
    _output(
        "written in place",
        Edit("output.py", 'folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_UNFINISHED}")', "folder = target"),
        Edit("output.py", "                    folder.mkdir(parents=True)", "                    folder.mkdir(parents=True, exist_ok=True)"),
        Edit("output.py", "    with _locked(target.parent, wait=True):\n        if target.exists():", "    with _locked(target.parent, wait=True):\n        if folder == target:\n            return\n        if target.exists():"),
    ),
)  # fmt: skip

MUTANTS = (*VECTOR, *NUMBERS, *OUTPUT)
