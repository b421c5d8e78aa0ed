"""Breaks the package on purpose and looks whether its tests notice: `python -m tests.mutants
[--only NAME] [--quick] [--record FILE]`.

Every mutant of `table.py` is applied to a copy of the tree, and the tests it names must fail there.
Tests that fail without any mutation are told, left out, and make this command fail as well. Ends
with 0 where every mutant was caught.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import save
from safegene_trl.provenance import software_versions

from .table import MUTANTS, Mutant


ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "out", "site", "*.png")
QUICK_SECONDS, LONG_SECONDS = 1200, 3600
AT_LEAST_QUICK = 0.9  # the share that `make test` must catch
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


class MovedError(Exception):
    """A mutant's text is not where the table says, or not exactly once."""


@dataclass
class Copy:
    """The tree to be broken, apart from the one that is worked on.

    Attributes:
        failing: Tests that fail there without any mutation.
    """

    root: Path
    failing: set[str] = field(default_factory=set)

    def python(self, words: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Exit code (None: it took longer) and what was printed."""
        environment = (
            os.environ
            | {
                "PYTHONPATH": str(self.root),
                "PYTHONDONTWRITEBYTECODE": "1",  # two mutants of one second and size would share their bytecode
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
        )
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=seconds)
            return process.returncode, printed
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return None, process.communicate(timeout=30)[0]

    def pytest(
        self, tests: Sequence[str], *options: str, seconds: float = QUICK_SECONDS
    ) -> tuple[int | None, str]:
        left_out = [word for test in sorted(self.failing) for word in ("--deselect", test)]
        words = (
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=-rfE",
            "-m",
            "not exhaustive",
        )
        return self.python([*words, *options, *left_out, *tests], seconds)

    def check_imported(self) -> None:
        code, printed = self.python(
            ["-c", "import safegene_trl; print(safegene_trl.__file__)"], QUICK_SECONDS
        )
        assert code == 0 and Path(printed.strip()).is_relative_to(self.root), (
            f"not the copy is tested: {printed}"
        )


def apply(mutant: Mutant, root: Path) -> dict[Path, str]:
    """Changes the files; what they held before.

    Raises:
        MovedError: A text is not there exactly once, or nothing that Python can read comes out.
    """
    before: dict[Path, str] = {}
    changed: dict[Path, str] = {}
    for edit in mutant.edits:
        path = root / "safegene_trl" / edit.file
        if path not in changed:
            before[path] = changed[path] = (
                path.read_text(encoding="utf-8") if path.is_file() else ""
            )
        if (count := changed[path].count(edit.old)) != 1 or edit.old == edit.new:
            raise MovedError(
                f"{edit.file} holds {edit.old!r} {count} times: change the entry in tests/mutants."
            )
        changed[path] = changed[path].replace(edit.old, edit.new)
    for path, text in changed.items():
        try:
            compile(text, str(path), "exec")
        except SyntaxError as error:
            raise MovedError(
                f"{path.name} is no Python any more ({error}): change the entry in tests/mutants."
            ) from error
        path.write_text(text, encoding="utf-8")
    return before


def examine(mutant: Mutant, copy: Copy, quick: bool) -> dict[str, Any]:
    """Which test notices a mutant, and after how many seconds."""
    started = time.monotonic()
    found: dict[str, Any] = {
        "name": mutant.name,
        "files": sorted({edit.file for edit in mutant.edits}),
    }
    try:
        before = apply(mutant, copy.root)
    except MovedError as error:
        return found | {"caught_by": None, "moved": str(error)}
    try:
        code, printed = copy.pytest(mutant.tests, "-x")
        caught = _caught(code, printed)
        stage = "make test" if caught else None
        for words in () if caught or quick else mutant.long:
            os.environ["FUZZ_EXAMPLES"] = "22000"
            code, printed = copy.python(words, LONG_SECONDS)
            os.environ.pop("FUZZ_EXAMPLES")
            if (
                caught := _caught(code, printed)
                if "pytest" in words
                else f"python {' '.join(words)}"
                if code
                else None
            ):
                stage = "long run"
                break
    finally:
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")
    if caught is None and code != 0:
        found["trouble"] = printed[-1000:]
    return found | {
        "caught_by": caught,
        "stage": stage,
        "seconds": round(time.monotonic() - started, 1),
    }


def _caught(code: int | None, printed: str) -> str | None:
    """The test that failed. A run in which nothing could be collected, or that took too long, has
    caught nothing.
    """
    if code is not None and code < 0:
        return f"ended by signal {-code}"
    failed = _FAILED.search(printed)
    return failed[1] if code == 1 and failed else None


def _put_into(
    recorded: list[dict[str, Any]], results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What is recorded of the other mutants that there still are, and the new results, in the
    table's order.
    """
    by_name = {result["name"]: result for result in [*recorded, *results]}
    return [by_name[mutant.name] for mutant in MUTANTS if mutant.name in by_name]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="A mutant's name, or a part of it; may be repeated. A record keeps the others.",
    )
    parser.add_argument("--quick", action="store_true", help="Leave out the long runs.")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    chosen = [
        m for m in MUTANTS if not arguments.only or any(part in m.name for part in arguments.only)
    ]
    if not chosen:
        parser.error(f"no mutant is named {arguments.only}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # some tests become another user, who imports from here
        copy = Copy(Path(place).resolve() / "tree")
        shutil.copytree(ROOT, copy.root, ignore=LEFT_OUT)
        copy.check_imported()
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        code, printed = copy.pytest(tests, seconds=LONG_SECONDS)
        copy.failing = set(_FAILED.findall(printed))
        if code not in (0, 1) or (code == 1 and not copy.failing):
            print(printed[-3000:])
            return 2
        for test in sorted(copy.failing):
            print(f"fails without any mutation: {test}", flush=True)
        results = []
        for mutant in chosen:
            results.append(examine(mutant, copy, arguments.quick))
            print(
                f"{mutant.name}: {results[-1]['caught_by'] or results[-1].get('moved') or 'NOT CAUGHT'}",
                flush=True,
            )
    if arguments.only and arguments.record and arguments.record.is_file():
        results = _put_into(
            json.loads(arguments.record.read_text(encoding="utf-8"))["results"], results
        )
    by_stage = [result.get("stage") for result in results]
    record = {
        "mutants": len(results),
        "caught_by_make_test": by_stage.count("make test"),
        "caught_by_long_runs": by_stage.count("long run"),
        "not_caught": [result["name"] for result in results if not result["caught_by"]],
        "failing_without_mutation": sorted(copy.failing),
        "results": results,
        "seconds": round(time.monotonic() - started),
        "software": software_versions(),
    }
    if arguments.record:
        save(arguments.record, record)
    share = by_stage.count("make test") / len(results)
    print(
        f"{share:.0%} of {len(results)} mutants caught by make test, {len(record['not_caught'])} not caught"
    )
    enough = (
        share >= AT_LEAST_QUICK
        if arguments.quick
        else not record["not_caught"] and share >= AT_LEAST_QUICK
    )
    return int(not enough or bool(copy.failing))


if __name__ == "__main__":
    raise SystemExit(main())
