"""What a mutant is: one check or one step of the package broken on purpose, for which some test
must fail.

An edit names a file of the package, a text that stands there exactly once, and what takes its
place. Where code moves, the runner says so and the entry has to follow. A new check in the package
deserves a new entry here.
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
        long: Commands for Python that ought to fail where those pass; see `files.py`.
    """

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    long: tuple[tuple[str, ...], ...] = ()


LONG_FUZZ = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_fuzz.py")
LONG_FAULTS = ("-m", "tests.faults", "--count", "120")
FUZZ, FAULTS = "tests/test_fuzz.py", "tests/test_faults.py"


def simple(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A mutant of one edit, for tests of `make test` alone."""
    return Mutant(name, (Edit(file, old, new),), tests)
