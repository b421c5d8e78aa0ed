"""Mutated safety vectors: each leads to exactly what its mutation says, quickly, and nothing is
written.

`make test` runs every targeted mutation (one for each single check) and a few hundred random ones,
`make fuzz` ten thousand, and records how they ended. See `fuzzing/` for the mutations and for how
the right outcome is known.
"""

import os
import platform
import re
import resource
import shutil
import stat
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.records import save
from safegene_trl import SafeGeneError, SafetyVector

from .fuzzing.oracle import SIGNED, Outcome, content_of, plain_content
from .fuzzing.random_changes import MUTATIONS, sign
from .fuzzing.targeted import TARGETED
from .vectors.test_signing import keys  # noqa: F401  (a fixture)


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
RECORD = os.environ.get("FUZZ_RECORD")
# of CPU time for one loading; of the process, beyond what it has before
MOST_SECONDS, MOST_MIB = (
    1.0,
    200.0,
)


@pytest.fixture(scope="module")
def original(vector_dir, keys, tmp_path_factory):  # noqa: F811
    """A vector signed by its maker, whose keys lie in `keys` beside it."""
    place = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(keys, place / "keys")
    folder = shutil.copytree(vector_dir, place / "original")
    sign(folder, SIGNED, keys / "maker.pem")
    return folder


def state_of(folder: Path) -> dict[str, tuple]:
    """Kind, size, time and small contents of all that lies in a folder."""
    found = {}
    for path in folder.rglob("*"):
        seen = path.lstat()
        small = stat.S_ISREG(seen.st_mode) and seen.st_size < 2**20
        found[str(path)] = (
            seen.st_mode,
            seen.st_size,
            seen.st_mtime_ns,
            path.read_bytes() if small else b"",
        )
    return found


def check(folder: Path, original: Path, outcome: Outcome) -> tuple[str, float]:
    """Loads a mutated vector without and with the maker's key, and compares; how it ended, and the
    longest time.
    """
    before, seconds = state_of(folder.parent), []
    expected = (
        plain_content(original if outcome.as_before else folder) if not outcome.refused else None
    )
    signed_patterns = outcome.refused + outcome.signed_refused
    for options, patterns in (
        ({}, outcome.refused),
        (
            {"public_key": original.parent / "keys" / "maker.pub"},
            signed_patterns if outcome.signed_refused else outcome.refused,
        ),
    ):
        started = time.process_time()
        try:
            loaded = content_of(SafetyVector.from_pretrained(folder, **options))
        except SafeGeneError as error:
            loaded, said = None, str(error)
        seconds.append(time.process_time() - started)
        if patterns:
            assert loaded is None, f"was taken, and must be refused by {patterns}"
            assert any(re.search(pattern, said, re.DOTALL) for pattern in patterns), (
                said,
                patterns,
            )
            assert "\n" not in said and len(said) < 2000
        else:
            assert loaded is not None, f"must be taken, and was refused: {said}"
            assert loaded == expected
    assert state_of(folder.parent) == before
    return "refused" if outcome.refused else "as before" if outcome.as_before else "loaded", max(
        seconds
    )


def test_the_vector_before_any_mutation(original):
    assert check(original, original, Outcome(as_before=True, signed_refused=()))[0] == "as before"
    assert plain_content(original) == content_of(SafetyVector.from_pretrained(original))


@pytest.mark.parametrize("case", TARGETED)
def test_every_single_check(case, original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "vector")
    mutate, outcome = TARGETED[case]
    mutate(folder)
    _, seconds = check(folder, original, outcome)
    assert seconds < MOST_SECONDS


@pytest.fixture(scope="module")
def tally():
    """How the mutations ended, by mutation, and the slowest loading; recorded where a record is
    asked for.
    """
    outcomes: Counter[str] = Counter()
    worst = {"slowest_seconds": 0.0, "memory_added_mib": 0.0}
    yield outcomes, worst
    if RECORD:
        record = {
            "mutations": sum(outcomes.values()),
            "targeted_cases": len(TARGETED),
            "outcomes": dict(sorted(outcomes.items())),
            **{name: round(value, 3) for name, value in worst.items()},
            "python": platform.python_version(),
        }
        save(Path(RECORD), record)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_leads_to_what_it_must(mutation, original, tally, tmp_path):
    outcomes, worst = tally
    before, count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0

    @settings(
        max_examples=-(-EXAMPLES // len(MUTATIONS)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def mutate_and_load(data):
        nonlocal count
        shutil.rmtree(tmp_path / "mutated", ignore_errors=True)
        folder = shutil.copytree(original, tmp_path / "mutated")
        outcome = mutation(folder, data, original)
        ended, seconds = check(folder, original, outcome)
        signed = "refused" if outcome.refused or outcome.signed_refused else ended
        outcomes[f"{mutation.__name__}: {ended}, with a key {signed}"] += 1
        count += 1
        worst["slowest_seconds"] = max(worst["slowest_seconds"], seconds)
        assert seconds < MOST_SECONDS

    mutate_and_load()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    worst["memory_added_mib"] = max(worst["memory_added_mib"], memory)
    assert memory < MOST_MIB and count > 0
