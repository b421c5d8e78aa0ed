"""The benchmarks' results: records that are read, appended and replaced by kind and name.

    python -m benchmarks.records                      # every kind, and the names of its records
    python -m benchmarks.records runs quickstart      # one record, to be read by people
    python -m benchmarks.records mutants              # a kind that is one record

A kind of many records is a file of JSON lines, `results/KIND.jsonl`: one record a line, in the
order of their `name`, which no two share. A kind of one record is an indented file,
`results/KIND.json`, so that a diff shows what changed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from safegene_trl.checkpoints.atomic_writes import replace_file
from safegene_trl.checkpoints.renaming import LONGEST_WAIT, locked
from safegene_trl.errors import SafeGeneError


RESULTS = Path(__file__).with_name("results")
Record = dict[str, Any]


def load(kind: str, folder: Path = RESULTS) -> dict[str, Record]:
    """All records of a kind of many, by name; none where there is no file.

    Raises:
        SafeGeneError: A line is no record, or two have one name.
    """
    path, found = folder / f"{kind}.jsonl", {}
    if not path.is_file():
        return {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name = record["name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SafeGeneError(
                f"Line {number} of {path} is no record with a `name`: remove the line, or take the file from git."
            ) from error
        if name in found:
            raise SafeGeneError(
                f"{path} holds two records named `{name}`: remove one of the lines."
            )
        found[name] = record
    return found


def read(kind: str, name: str | None = None, folder: Path = RESULTS) -> Record:
    """One record: of a kind of many by its name, of a kind of one without.

    Raises:
        SafeGeneError: There is none.
    """
    path = folder / f"{kind}.json{'l' if name else ''}"
    if name is None and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if name is not None and name in (found := load(kind, folder)):
        return found[name]
    which = f"record named `{name}`" if name else "record without a name"
    raise SafeGeneError(
        f"{path} holds no {which}: `python -m benchmarks.records` lists what there is."
    )


def write(kind: str, name: str | None, record: Record, folder: Path = RESULTS) -> None:
    """Appends a record, or replaces the one of its name; `name` is None for a kind of one record.

    Several processes may write at once, and whoever reads, or is killed, finds the old file or the
    new one.
    """
    if name is None:
        save(folder / f"{kind}.json", record)
        return
    # the results' own folder is what `replace_file` locks
    with locked(Path(__file__), LONGEST_WAIT):
        found = load(kind, folder) | {name: {"name": name} | record}
        lines = [json.dumps(found[key], ensure_ascii=False) + "\n" for key in sorted(found)]
        replace_file(folder / f"{kind}.jsonl", "".join(lines))


def save(path: Path, record: Record) -> None:
    """Writes a kind of one record to a file of the caller's choice."""
    replace_file(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def listed(folder: Path = RESULTS) -> dict[str, list[str]]:
    """The names of the records by kind; an empty list for a kind of one record."""
    found: dict[str, list[str]] = {path.stem: [] for path in folder.glob("*.json")}
    found |= {path.stem: list(load(path.stem, folder)) for path in folder.glob("*.jsonl")}
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?")
    parser.add_argument("name", nargs="?")
    arguments = parser.parse_args()
    if arguments.kind is None:
        for kind, names in listed().items():
            print(f"{kind}: {', '.join(names)}" if names else kind)
        return
    try:
        record = read(arguments.kind, arguments.name)
    except SafeGeneError as error:
        parser.error(str(error))
    print(json.dumps(record, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
